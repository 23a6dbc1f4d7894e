"""lab/watch.py and the loop of train.py: validation, sheets, curves, and the lines of metrics.jsonl."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from runs import EDITS, SHAPES, Killed, change, documents_that, last, new_run, take_steps
from torch.utils.flop_counter import FlopCounterMode

import train
from attention import IMAGE, Tokens
from checkpoint import append_metrics, list_checkpoints, load_trained, read_metrics
from data import draw_noise, make_batches
from evaluate import TIMESTEPS
from lab import watch
from lab.watch import draw_sheets, ema_weights, validate
from train import Run


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs leave their name in runs/last-small: below the test's folder, not in the user's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make_run(tmp_path):
    """make_run(*flags) -> a Run on the tiny photos, all parameters perturbed unless told otherwise."""
    return functools.partial(new_run, tmp_path)


def colours(path: Path) -> int:
    """How many colours a PNG has."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return len(image.convert("RGB").getcolors(2**24))


# ---- the model card ----


def test_a_finished_run_has_a_model_card_with_its_sheet_and_figures(tmp_path):
    flags = ("--steps", 2, "--checkpoint-every", 1, "--keep", 2)
    helpers.good(train, *helpers.photo_flags(tmp_path / "run", *flags), folder=tmp_path)
    before, folder = list_checkpoints(tmp_path / "run")
    assert not (before / "README.md").exists()
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    assert card.data.license == "other" and card.data.base_model is None
    assert card.data.pipeline_tag == "text-to-image" and card.data.tags == ["lmfusion", "generate", "caption"]
    (shown,) = re.findall(r"!\[\]\((.*)\)", card.text)
    assert (folder / shown).read_bytes() == (tmp_path / "run" / "sheet-000002.png").read_bytes()
    last_line = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    for name, errors in (("right", last_line["val"]["right"]), ("another", last_line["val"]["permuted"])):
        assert f"| {name} caption | {' | '.join(f'{x:.4f}' for x in errors)} |" in card.text
    assert f"ddpm_loss {last_line['ddpm_loss']:.4f}, lm_loss {last_line['lm_loss']:.4f}" in card.text
    assert "in 2 steps of 6 documents" in card.text and "as they were, and not in this folder" in card.text
    assert "{" not in card.content and load_trained(folder).info["step"] == 2


def test_a_model_card_names_the_base_of_the_hub_and_says_that_text_was_trained(make_run):
    run = make_run("--lr-text-ratio", 0.1, "--task", "edit", "--data", helpers.edits())
    run.base = "Qwen/Qwen3-0.6B"
    run.out.mkdir()
    line = {"step": 0, "lm_loss": None, "ddpm_loss": 0.5, "val": {"t": list(TIMESTEPS), "right": [0.25] * 5}}
    append_metrics(run.out, line)
    files = watch.model_card(run)
    card = ModelCard(files.pop("README.md"))
    assert card.data.base_model == "Qwen/Qwen3-0.6B" and card.data.tags == ["lmfusion", "edit"] and not files
    assert "Losses of the last steps: ddpm_loss 0.5000. " in card.text and "another caption" not in card.text
    assert "`Qwen/Qwen3-0.6B`, whose weights\nwere trained as well" in card.text
    run.base = "small/base"  # found from here by its name: no hub id
    card = ModelCard(watch.model_card(run)["README.md"])
    assert card.data.base_model is None and "language model `base`" in card.text


# ---- the moving average ----


def test_inside_ema_weights_the_model_has_the_average_and_its_own_weights_again_behind_it(make_run):
    run = make_run("--ema", 0.9)
    take_steps(run, 2)
    own = {n: p.detach().clone() for n, p in run.trained.items()}
    average = {n: x.clone() for n, x in run.ema.items()}
    with pytest.raises(Killed), ema_weights(run):
        assert all(torch.equal(run.trained[n], x) for n, x in average.items())
        raise Killed
    assert all(torch.equal(run.trained[n], x) for n, x in own.items())
    assert all(torch.equal(run.ema[n], x) for n, x in average.items())


# ---- validation ----


def reference_error(run: Run, pictures: list, words: str, seed: int, value: int) -> float:
    """The error of the last of one or two pictures at one timestep; the first of two is clean."""
    config, diffusion, n = run.model.config, run.config.diffusion, len(pictures)
    ids = [*run.documents.tokenise(words, n), config.boi_id, IMAGE]
    ids = ids if n == 1 else [config.boi_id, IMAGE, config.eoi_id, *ids]
    latents = run.codec.encode(torch.stack(pictures))
    eps, t = draw_noise(latents.shape, seed)[1][-1:], torch.tensor([0] * (n - 1) + [value])
    noisy = diffusion.q_sample(latents[-1:], t[-1:], eps)
    with torch.no_grad():
        hidden = run.model.encode(Tokens.rows([ids], config.num_patches), torch.cat((latents[:-1], noisy)), t)
        output = run.model.unet_output(hidden)[-1:]
    predicted = diffusion.eps_from_output(output, noisy, t[-1:])
    return diffusion.loss(predicted, eps, t[-1:], run.config.loss_weighting).item()


ALONE = ("--task", "edit", "--data", helpers.edits())


@pytest.mark.parametrize("flags", ((), ALONE), ids=("captions", "edits"))
def test_validation_is_the_error_under_the_right_and_under_another_text(make_run, flags):
    run = make_run(*flags, perturb=0.3)
    source = run.documents.source
    examples = source.validation_edits(96) if flags else source.validation(96)
    report, words = validate(run), [example[-1] for example in examples]
    assert len(words) == 2 and report["t"] == list(TIMESTEPS)
    for key, texts in (("right", words), ("permuted", words[1:] + words[:1])):
        for k, value in enumerate(TIMESTEPS):
            errors = [
                reference_error(run, list(pictures), text, number, value)
                for number, ((*pictures, _), text) in enumerate(zip(examples, texts, strict=True))
            ]
            assert report[key][k] == pytest.approx(sum(errors) / 2, rel=1e-4)
    assert all(abs(a - b) > 1e-6 for a, b in zip(report["right"], report["permuted"], strict=True))
    assert validate(run) == report and all(p.grad is None for p in run.model.parameters())
    change(run, micro_batch=1)
    for key, errors in validate(run).items():
        assert errors == pytest.approx(report[key], rel=1e-5)


def test_edits_of_validation_are_none_of_training_and_a_mixture_is_validated_on_captions(make_run):
    run = make_run(*ALONE)
    seen = {tuple(d.ids[3:-2]) for d in documents_that(run, lambda d: len(d.ids) > 5, n=200)}
    held_out = [tuple(run.documents.tokenise(e[-1], 2)) for e in run.documents.source.validation_edits(96)]
    assert len(held_out) == 2 and len(seen) == 19 and not seen & set(held_out)  # 3 share a picture with these
    run = make_run("--task", "edit,generate", *EDITS)
    documents, c = run.documents.validation(96)[0], run.model.config
    captions = [caption for _, caption in run.documents.source.validation(96)]
    assert [d.ids for d in documents] == [[*run.documents.tokenise(x), c.boi_id, IMAGE] for x in captions]


def test_a_sheet_and_a_validation_leave_no_trace_in_the_training(make_run):
    first, second = make_run("--ema", 0.5), make_run("--ema", 0.5)
    first.out.mkdir()
    for run in (first, second):
        run.train_step()
        if run is first:
            validate(run)
            draw_sheets(run)
    assert first.train_step() == second.train_step()
    assert all(torch.equal(p, second.trained[n]) for n, p in first.trained.items())
    assert all(torch.equal(p, second.ema[n]) for n, p in first.ema.items())


# ---- sheets ----


@pytest.mark.parametrize("data", (SHAPES, EDITS), ids=("shapes", "pictures"))
def test_a_sheet_of_edits_has_the_pictures_before_and_what_the_averaged_weights_make_of_them(
    make_run, monkeypatch, data
):
    run, seen = make_run("--task", "edit,generate", *data, "--ema", 0.5), {}
    run.out.mkdir()
    own = {n: p.detach().clone() for n, p in run.trained.items()}

    def edited(trained, pictures, words, seeds):
        assert trained.codec is run.codec and len(set(seeds)) == len(words)
        assert all(torch.equal(run.trained[n], x) for n, x in run.ema.items())
        seen.update(before=pictures, words=words)
        return 255 - pictures

    def generated(trained, prompts, seeds):
        assert all(torch.equal(run.trained[n], x) for n, x in run.ema.items())
        assert len(set(seeds)) == len(prompts)
        return torch.zeros(len(prompts), 3, 16, 16)

    monkeypatch.setattr(watch, "edit_images", edited)
    monkeypatch.setattr(watch, "generate_images", generated)
    monkeypatch.setattr(watch.figures, "sheet", lambda pictures, texts: (pictures, texts))
    monkeypatch.setattr(watch.figures, "save_image", lambda page, path: seen.update({path.name: page}))
    draw_sheets(run)
    source = run.documents.source
    before, _, words = map(list, zip(*source.validation_edits(9), strict=True))
    assert seen["words"] == words and torch.equal(seen["before"], source.pixels(before))
    pictures, texts = seen["edits-000000.png"]
    assert torch.equal(pictures[::2], seen["before"]) and torch.equal(pictures[1::2], 255 - seen["before"])
    assert texts[1::2] == words and set(texts[::2]) == {""}
    assert seen["sheet-000000.png"][1] == source.prompts()
    assert all(torch.equal(run.trained[n], x) for n, x in own.items())


def test_edits_alone_run_from_end_to_end(tmp_path):
    flags = ("--init-from", helpers.photo_run(), "--task", "edit", "--data", helpers.edits(), "--steps", 2)
    helpers.good(train, *helpers.photo_flags(Path("run"), *flags), folder=tmp_path)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "curves.png",
        "edits-000002.png",
        "metrics.jsonl",
        "step-000002",
    }
    assert colours(tmp_path / "run" / "edits-000002.png") > 10
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["lm_loss"] for m in lines] == [None, None] and all(m["ddpm_loss"] > 0 for m in lines)
    assert lines[-1]["val"]["right"] != lines[-1]["val"]["permuted"]
    assert load_trained(tmp_path / "run").info["step"] == 2


def test_an_instruction_longer_than_the_context_does_not_end_the_run(tmp_path):
    folder = helpers.write_edits(tmp_path / "edits")
    rows = [json.loads(x) for x in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        row["text"] += " make it red" * 60
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with helpers.inside(tmp_path):
        flags = ("--task", "edit", "--data", folder, "--steps", 1)
        run = Run(helpers.photo_config(tmp_path / "run", *flags), "small")
        run.out.mkdir()
        train.train(run)
    assert (tmp_path / "run" / "edits-000001.png").is_file()
    context = helpers.SIZES["max_position_embeddings"]
    for document in documents_that(run, lambda d: len(d.ids) > 5):
        assert len(document.ids) - 2 + 2 * run.model.config.num_patches <= context
    documents = run.documents.validation(2)[0]
    (batch,) = make_batches(documents, run.documents.source, run.codec, run.model.config)
    assert context / 2 < batch.rest.position[batch.rest.ids != -2].max() < context


def test_a_caption_longer_than_the_context_does_not_end_the_run(tmp_path):
    photos = helpers.write_photos(tmp_path / "photos", n=10)
    for path in photos.glob("*.txt"):
        if path.name > "002":
            path.write_text("a photo of a red circle " * 40)
    flags = helpers.photo_flags(Path("run"), "--data", photos, "--steps", 2, "--caption-drop", 0)
    helpers.good(train, *flags, folder=tmp_path)
    assert (tmp_path / "run" / "sheet-000002.png").is_file()


# ---- metrics.jsonl and curves.png ----


def test_metrics_have_their_fields_and_are_numbers():
    lines = [json.loads(x) for x in (helpers.shapes_run() / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [1, 2, 3]
    fields = ("loss", "lm_loss", "ddpm_loss", "draw_loss", "lr", "images_per_second", "seconds")
    parts = ("seconds_data", "seconds_forward", "seconds_backward", "seconds_optimizer")
    fields += (*parts, "flops_per_second", "peak_share")
    for m in lines:
        assert all(isinstance(m[f], float) and math.isfinite(m[f]) for f in fields), m
        assert m["loss"] == pytest.approx(m["lm_loss"] + 5 * m["ddpm_loss"], rel=1e-4)
        assert m["images_per_second"] > 0 and min(m[k] for k in parts) > 0 < m["peak_share"] < 1
        peak, flops = (m["flops_per_second"] / m[k] for k in ("peak_share", "images_per_second"))
        assert peak == pytest.approx(lines[0]["flops_per_second"] / lines[0]["peak_share"])
        # of all documents of the first step, per picture
        assert flops == pytest.approx(lines[0]["flops_per_second"] / lines[0]["images_per_second"], rel=0.02)
    assert [m["lr"] for m in lines] == pytest.approx([1e-3, 1e-3, (1e-3 + 3e-5) / 2])
    assert lines[0]["seconds"] <= lines[1]["seconds"] <= lines[2]["seconds"]
    assert not any("watched" in m or "val" in m for m in lines[:2]) and "watched" not in lines[2]
    val = lines[-1]["val"]
    assert val["t"] == [100, 300, 500, 700, 900] and len(val["right"]) == len(val["permuted"]) == 5


def test_a_logged_line_is_the_mean_of_the_steps_since_the_last_and_sheets_have_their_steps(tmp_path):
    lines = []
    for name, every, sheets in (("each", 1, 0), ("pairs", 2, 3)):
        flags = ("--steps", 4, "--log-every", every, "--sheet-every", sheets)
        helpers.good(train, *helpers.photo_flags(Path(name), *flags), folder=tmp_path)
        lines.append(read_metrics(tmp_path / name / "metrics.jsonl"))
    each, pairs = lines
    assert [m["step"] for m in pairs] == [2, 4]
    for field in ("loss", "ddpm_loss"):
        means = [(each[i][field] + each[i + 1][field]) / 2 for i in (0, 2)]
        assert [m[field] for m in pairs] == pytest.approx(means)
    assert [p.name for p in (tmp_path / "each").glob("*.png")] == ["curves.png"]
    pages = sorted((tmp_path / "pairs").glob("*.png"))
    assert [p.name for p in pages] == ["curves.png", "sheet-000003.png", "sheet-000004.png"]
    assert min(map(colours, pages)) > 10


def test_a_run_whose_captions_all_come_first_logs_no_lm_loss_and_still_draws_its_curves(tmp_path):
    flags = helpers.photo_flags(Path("run"), "--steps", 2, "--caption-first", 1, "--sheet-every", 0)
    helpers.good(train, *flags, folder=tmp_path)
    assert [m["lm_loss"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [None, None]
    assert colours(tmp_path / "run" / "curves.png") > 10


def test_what_is_watched_stands_in_the_metrics_at_each_validation_and_nowhere_else(make_run):
    run = make_run("--steps", 5, "--val-every", 2, "--sheet-every", 0)
    run.out.mkdir()
    train.train(run, watch=lambda r: {"seen": [r is run, r.step]})
    lines = read_metrics(run.out / "metrics.jsonl")
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5]
    watched = {m["step"]: m["watched"] for m in lines if "watched" in m}
    assert watched == {step: {"seen": [True, step]} for step in (2, 4, 5)}
    assert set(watched) == {m["step"] for m in lines if "val" in m}
    assert b"seen" not in (last(run.out) / "checkpoint.json").read_bytes()


def counted(run: Run) -> int:
    """FLOPs of the forward and backward passes of the next step, as torch counts them on the step itself."""
    batches = run.batches()  # latents of pictures are no part of it
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            train.step_loss(run.model, batch, run.config).backward()
    run.model.zero_grad()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "flags, tolerance",
    (
        (("--batch-size", 64), 0),
        (("--batch-size", 8, "--micro-batch", 3, "--activation-checkpointing", True), 0),
        (("--batch-size", 48, "--micro-batch", 8), 0),
        (("--batch-size", 150), 0.1),
        (("--batch-size", 8, "--lr-text-ratio", 0.5, "--text-batch", 24), 0.1),
    ),
    ids=str,
)
def test_the_flops_of_a_step_are_those_that_torch_counts_and_counting_changes_nothing(
    make_run, flags, tolerance
):
    run, other = make_run(*flags, "--optimizer", "adamw"), make_run(*flags, "--optimizer", "adamw")
    flops = watch.flops_of_step(run, train.step_loss)
    assert flops == pytest.approx(counted(other), rel=tolerance) and flops > 1e6
    for _ in range(2):
        assert run.train_step() == other.train_step()
    assert all(torch.equal(p, other.trained[n]) for n, p in run.trained.items())


def test_a_stopwatch_tells_the_parts_of_steps_and_leaves_out_what_lies_between(monkeypatch):
    clock = iter((0, 1, 3, 6, 10, 100, 102, 107, 110, 114))
    monkeypatch.setattr(watch.time, "perf_counter", lambda: next(clock))
    stopwatch = watch.Stopwatch("cpu")
    for _ in range(2):
        for part in ("", "data", "forward", "backward", "optimizer"):
            stopwatch.lap(part)
    assert stopwatch.read() == dict(data=1 + 2, forward=2 + 5, backward=3 + 3, optimizer=4 + 4)
    assert stopwatch.read() == {}


def test_the_peak_is_the_fastest_product(monkeypatch):
    """Products of 64 x 64 matrices take 2 seconds here, and those of 128 x 128 ones 4."""
    monkeypatch.setattr(watch, "best", lambda work, seconds: 2 * work().shape[0] / 64)
    watch.product_peak.cache_clear()
    assert watch.product_peak(torch.float32, "cpu", (64, 128), 0.1) == 2 * 128**3 / 4
    watch.product_peak.cache_clear()


@pytest.fixture
def slow_clock(monkeypatch) -> None:
    """A step takes 40 seconds by the clock of the run, and no time."""
    clock, train_step = [0.0], Run.train_step
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(watch, "product_peak", lambda *_: 1e9)

    def step(run):
        clock[0] += 40
        return train_step(run)

    monkeypatch.setattr(Run, "train_step", step)


@pytest.mark.parametrize("minutes, steps", ((1, [2, 4, 5]), (1.5, [3, 5]), (0, [5])))
def test_a_line_is_written_after_so_many_minutes_at_the_latest(make_run, slow_clock, minutes, steps):
    run = make_run("--steps", 5, "--log-every", 100, "--log-minutes", minutes, "--sheet-every", 0)
    run.out.mkdir()
    train.train(run)
    lines = read_metrics(run.out / "metrics.jsonl")
    assert [m["step"] for m in lines] == steps and lines[-1]["seconds"] == 200
    assert all(m["images_per_second"] == pytest.approx(6 / 40, abs=0.06) for m in lines)


@pytest.mark.parametrize("minutes, steps", ((1, [3, 5, 7]), (0, [7])))
def test_a_checkpoint_is_written_whenever_so_many_minutes_have_passed(make_run, slow_clock, minutes, steps):
    run = make_run("--steps", 7, "--checkpoint-minutes", minutes, "--keep", 9, "--sheet-every", 0)
    run.out.mkdir()
    train.train(run)
    assert [int(p.name[5:]) for p in list_checkpoints(run.out)] == steps


def test_a_line_for_people_says_what_was_measured_and_a_validation_gets_a_line_of_its_own():
    window = [{"loss": 1.0, "ddpm_loss": 0.2}, {"loss": 2.0, "ddpm_loss": 0.4, "lm_loss": 3.0}]
    means = watch.mean_losses(window)
    assert means == dict(loss=1.5, lm_loss=3.0, ddpm_loss=pytest.approx(0.3), draw_loss=None)
    line = means | dict(step=7, images_per_second=123.5, flops_per_second=4.12e11, peak_share=0.378)
    told, behind = [], []
    bar = SimpleNamespace(write=told.append, set_postfix_str=behind.append)
    watch.show(bar, line | {"lm_loss": None})
    work = "412 GFLOP/s (38% of the product peak)"
    assert behind == [f"ddpm 0.3000, 124 pictures/s, {work}"] and not told
    val = {"right": [0, 0, 0.25, 0, 0], "permuted": [0, 0, 0.75, 0, 0]}
    watch.show(bar, line | {"val": val})
    (text,) = told
    assert text.startswith("step 7: ddpm 0.3000, lm 3.0000; validation at t = 500: 0.2500 under the right ")
    assert "0.7500 under another" in text
    watch.show(bar, line | {"val": {"right": val["right"]}})
    assert "0.2500 under the right caption, no other caption; " in told[-1]


def test_a_single_validation_picture_has_no_error_under_another_caption(make_run, tmp_path):
    photos = helpers.write_photos(tmp_path / "few", n=9)
    run = make_run("--data", photos, "--micro-batch", 2)
    assert set(validate(run)) == {"t", "right"}
    assert len(run.documents.source.validation(96)) == 1


# ---- threads ----


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("faster", (1, 2))
def test_the_faster_number_of_threads_is_measured_said_once_and_kept(
    make_run, monkeypatch, capsys, two_threads, faster
):
    run, tried = make_run(), []

    def best(work, seconds):
        work()
        tried.append(torch.get_num_threads())
        return 0.5 if tried[-1] == faster else 2.0

    monkeypatch.setattr(watch, "best", best)
    watch.say_once.cache_clear()
    watch.choose_threads(run, train.step_loss)
    assert tried == [1, 2] and torch.get_num_threads() == run.config.threads == faster
    assert f"threads: {faster} (a batch takes " in capsys.readouterr().err
    assert all(p.grad is None for p in run.model.parameters())
    torch.set_num_threads(2)
    watch.choose_threads(run, train.step_loss)  # a run that goes on
    assert tried == [1, 2] and torch.get_num_threads() == faster
