"""evaluate.py: numbers are what they say, and a changed text is found out."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import helpers
import pytest
import torch
from PIL import Image

import evaluate
from attention import Tokens
from checkpoint import load_trained
from data import CAPTION_FIRST, Document, caption_document, collate, edit_document
from diffusion import Diffusion, T
from evaluate import errors_by_timestep, perplexity, text_report, validation_error
from generate import describe_images, generate_images
from lab.metrics import caption_tokens, cider, frechet
from load_qwen3 import base_fingerprint, encode_plain
from scale.pictures import load_pictures
from small.world import all_scenes, prompt_match, read_scenes, render

HELD_OUT = list(all_scenes("test"))


@pytest.fixture
def trained():
    return load_trained(helpers.shapes_run())


# ---- the other numbers ----


def test_perplexity_equals_a_loop_over_the_tokens(trained):
    documents = [[5, 9, 200, 31, 7], [300, 12], [8] * 9]
    terms = []
    for ids in documents:
        for i in range(1, len(ids)):
            with torch.no_grad():
                logits = trained.model.text_logits(torch.tensor([ids[:i]]))[0, -1].double()
            terms.append(-(logits - logits.logsumexp(0))[ids[i]].item())
    assert perplexity(trained.model, documents) == pytest.approx(math.exp(sum(terms) / len(terms)), rel=1e-5)


def test_the_text_report_finds_the_text_unchanged(trained):
    report = text_report(trained, ["grass is green.", "the sky is blue."])
    assert report["tensors"] == 24 and report["tensors_changed"] == [] and report["logits_bit_equal"]
    assert report["perplexity_base"] == report["perplexity_trained"]


@pytest.mark.parametrize(
    "name", ("layers.1.text.mlp.up_proj.weight", "norm_text.weight", "embed_tokens.weight")
)
def test_the_text_report_finds_the_smallest_change_of_a_tensor(trained, name):
    p = trained.model.text_parameters()[name]
    with torch.no_grad():
        p.view(-1)[-1] = torch.nextafter(p.view(-1)[-1], torch.tensor(math.inf))
    assert text_report(trained, ["grass is green."])["tensors_changed"] == [name]
    with torch.no_grad():
        p.mul_(1.5)
    report = text_report(trained, ["grass is green."])
    assert not report["logits_bit_equal"] and report["perplexity_base"] != report["perplexity_trained"]


def test_the_validation_error_tells_captions_apart_and_repeats_itself(monkeypatch):
    trained = helpers.perturbed()
    pictures, captions = render(HELD_OUT[:6]), [s.caption for s in HELD_OUT[:6]]
    report = validation_error(trained, pictures, captions)
    assert report == validation_error(trained, pictures, captions)
    assert report["t"] == [100, 300, 500, 700, 900]
    assert all(abs(a - b) > 1e-5 for a, b in zip(report["right"], report["permuted"], strict=True))
    some = validation_error(trained, pictures, captions[:1] * 5 + captions[5:])  # the next is often the same
    assert all(abs(a - b) > 1e-5 for a, b in zip(some["right"], some["permuted"], strict=True))
    for n in (1, 6):  # there is no other caption
        assert set(validation_error(trained, pictures[:n], captions[:1] * n)) == {"t", "right"}


def test_a_perfect_model_has_no_validation_error(monkeypatch):
    trained = helpers.perturbed()
    seen = {}
    noising = trained.diffusion.q_sample
    monkeypatch.setattr(trained.diffusion, "q_sample", lambda x, t, e: seen.update(e=e) or noising(x, t, e))
    monkeypatch.setattr(trained.diffusion, "eps_from_output", lambda *_: seen["e"])
    report = validation_error(trained, render(HELD_OUT[:3]), [s.caption for s in HELD_OUT[:3]])
    assert report["right"] == report["permuted"] == [0.0] * 5


@pytest.mark.parametrize("prediction", ("eps", "v", "x"))
@pytest.mark.parametrize("weighting", ("none", "v"))
def test_the_error_of_edits_is_that_of_the_pictures_after_them(prediction, weighting):
    """Against one document at a time: the context clean at t = 0, and only the noisy images counted."""
    trained = helpers.perturbed()
    model, diffusion = trained.model, Diffusion(prediction=prediction)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    documents = [
        edit_document(None, None, [40, 41, 42], config),
        caption_document(None, [50, 51], CAPTION_FIRST, config),
        edit_document(None, None, [60], config),
        Document([7, 8], [], [], [True, True]),
    ]
    batch = collate(documents, torch.randn(5, 36, 8, 8, generator=generator), config)
    latents, noise = batch.latents, batch.eps
    assert batch.max_t.tolist() == [0, T, T, 0, T]
    found = errors_by_timestep(model, diffusion, batch, weighting)
    assert len(found) == len(evaluate.TIMESTEPS)
    for t, value in zip(evaluate.TIMESTEPS, found, strict=True):
        a, errors = diffusion.alpha_bar[t].item(), []
        for document, images in zip(documents, ([0, 1], [2], [3, 4]), strict=False):
            x, eps, last = latents[images].clone(), noise[images[-1]], len(images) - 1
            x[last] = math.sqrt(a) * x[last] + math.sqrt(1 - a) * eps
            times = torch.tensor([0] * last + [t])
            with torch.no_grad():
                _, hidden = model(None, Tokens.rows([document.ids], config.num_patches), x, times)
                predicted = model.unet_output(hidden)[last]
            if prediction == "v":
                predicted = math.sqrt(1 - a) * x[last] + math.sqrt(a) * predicted
            if prediction == "x":
                predicted = (x[last] - math.sqrt(a) * predicted) / math.sqrt(1 - a)
            errors.append((predicted - eps).square().mean().item() / (a if weighting == "v" else 1))
        assert value == pytest.approx(sum(errors) / len(errors), rel=1e-4)


# ---- the command ----


def test_the_command_prints_a_table_and_writes_json_and_a_sheet_and_repeats_itself_for_a_seed(tmp_path):
    flags = ("--checkpoint", helpers.shapes_run(), "--n", 5, "--steps", 2, "--seed", 3)
    more = ("--json", "new/results.json", "--sheet", "new/sheet.png")
    out = helpers.good(evaluate, *flags, *more, folder=tmp_path)
    assert helpers.good(evaluate, *flags, "--json", "again.json", folder=tmp_path) == out
    report = json.loads((tmp_path / "new" / "results.json").read_text())
    again = json.loads((tmp_path / "again.json").read_text())
    assert again | {"seconds_per_picture": report["seconds_per_picture"]} == report
    assert report["prompts"] == 5 and report["step"] == 3 and report["steps"] == 2 and report["seed"] == 3
    assert report["held_out_combinations"] == len(HELD_OUT)
    assert set(report["prompt_match"]) == {"background", "color", "place", "shape", "size", "all"}
    assert all(0 <= v <= 1 for v in report["prompt_match"].values())
    assert report["strict"] == 0.0 and report["residual"] > 15 and report["split"] == "test"  # hardly trained
    assert f"residual below 15 of 255; the median is {report['residual']:.1f}." in out
    assert report["template_check"] == 1.0 and 0 <= report["captions_exact"] <= 1
    assert report["text"]["tensors_changed"] == [] and report["text"]["logits_bit_equal"] is True
    assert "pictures" not in report and len(report["caption_errors"]) == 5
    assert report["captions_cider"] >= 0 and report["frechet"] > 0
    assert {"knowledge", "reasoning"} <= set(report["language"])
    for name, found in report["language"].items():
        assert found["questions"] > 50 and 0 <= found["accuracy"] <= 1
        assert f" {name} {100 * found['accuracy']:.1f}% of {found['questions']}" in out
    assert f"Captions: CIDEr {report['captions_cider']:.3f}. Frechet distance of" in out
    assert f"(own features): {report['frechet']:.4f}." in out
    assert "Frechet" not in evaluate.table(report | {"frechet": None})  # of a single picture
    for words in ("5 held-out prompts (test), ddim 2 steps", "| **all five at once** |", "| right caption |"):
        assert words in out
    assert "0 of 24 tensors changed; logits equal to the last bit" in out
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        sheet.load()


@pytest.fixture
def pictures_alone(monkeypatch) -> None:
    """Without the questions in text, which take longest."""
    monkeypatch.setattr(evaluate, "language_report", lambda *a: {})


def test_what_is_counted_is_what_was_painted(trained, monkeypatch, pictures_alone):
    """A model that paints every prompt as it should, and describes every picture rightly, gets full marks."""
    captions = {s.caption: s for s in HELD_OUT}
    monkeypatch.setattr(
        evaluate, "generate_images", lambda t, prompts, *a, **_: render([captions[p] for p in prompts])
    )
    monkeypatch.setattr(
        evaluate, "describe_images", lambda t, pictures, **_: [s.caption for s in read_scenes(pictures)]
    )
    monkeypatch.setattr(evaluate, "BATCH", 7)
    report = evaluate.evaluate(trained, n=30, steps=1, cfg=1.0, sampler="ddim", seed=0)
    assert set(report["prompt_match"].values()) == {1.0} and report["captions_exact"] == 1.0
    assert report["strict"] == 1.0 and report["residual"] == 0.0
    assert report["caption_errors"] == [] and len(set(report["prompts_used"])) == 30
    assert report["captions_cider"] == pytest.approx(10)
    real = render([captions[p] for p in report["prompts_used"]], random.Random(0))
    assert report["frechet"] == frechet(report["pictures"], real) > 0
    assert report["pictures"].shape == (30, 3, 64, 64)
    assert not {*report["prompts_used"]} & {s.caption for s in all_scenes("train")}
    assert "| **all five at once** | 100.0% | 100.0% |" in evaluate.table(report)


def test_the_validation_tenth_is_judged_without_touching_the_test_tenth(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(evaluate, "choose_answers", lambda m, t, questions, what: asked.extend(questions))
    monkeypatch.setattr(evaluate, "table", lambda report: "")
    flags = ("--checkpoint", helpers.shapes_run(), "--split", "validation", "--n", 233, "--steps", 1)
    monkeypatch.setattr(evaluate, "describe_images", lambda t, pictures, **_: [""] * len(pictures))
    small = lambda t, prompts, *a, **_: torch.zeros(len(prompts), 3, 64, 64, dtype=torch.uint8)  # noqa: E731
    monkeypatch.setattr(evaluate, "generate_images", small)
    helpers.good(evaluate, *flags, "--json", "report.json", folder=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["split"] == "validation" and report["prompts"] == report["held_out_combinations"] == 233
    own = {s.caption for s in all_scenes("validation")}
    assert {e["right"] for e in report["caption_errors"]} <= own
    answers = {q.choices[q.label] for q in asked}
    assert answers & own and not answers & {s.caption for s in HELD_OUT}
    result = helpers.call(evaluate, "--checkpoint", helpers.shapes_run(), "--n", 229, folder=tmp_path)
    assert result.status == 2 and "there are 228 held-out combinations (--split test)" in result.err


# ---- memory, and bits ----


def test_frozen_text_is_in_memory_once_and_what_changed_is_the_base_s_own(trained):
    ours = trained.model.text_parameters()
    p = ours["layers.1.text.mlp.up_proj.weight"]
    before = p.detach().clone()
    with torch.no_grad():
        p.view(-1)[3] += 1
    base = evaluate.load_base(trained)
    own = [n for n, x in base.text_parameters().items() if x.data_ptr() != ours[n].data_ptr()]
    assert own == ["layers.1.text.mlp.up_proj.weight"]
    assert torch.equal(base.text_parameters()[own[0]], before)
    assert evaluate.text_parameters_changed(trained.model, base) == own


def test_a_zero_that_changed_its_sign_is_a_change_of_one_bit(trained):
    p = trained.model.text_parameters()["norm_text.weight"]
    base = evaluate.load_base(trained)
    theirs = dict(base.named_parameters())["norm_text.weight"]
    theirs.data, p.data = theirs.clone(), p.clone()
    theirs.data[5], p.data[5] = 0.0, -0.0
    assert evaluate.text_parameters_changed(trained.model, base) == ["norm_text.weight"]


def test_bfloat16_is_what_everything_is_computed_in(tmp_path, pictures_alone):
    flags = ("--checkpoint", helpers.shapes_run(), "--n", 2, "--steps", 1)
    out = helpers.good(evaluate, *flags, "--dtype", "bfloat16", "--json", "half.json", folder=tmp_path)
    helpers.good(evaluate, *flags, "--json", "whole.json", folder=tmp_path)
    half, whole = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("half", "whole"))
    assert "0 of 24 tensors changed as bfloat16; logits equal" in out
    assert half["text"]["dtype"] == "bfloat16" and whole["text"]["dtype"] == "float32"
    for key in ("perplexity_base", "perplexity_trained"):
        assert half["text"][key] != whole["text"][key]
        assert half["text"][key] == pytest.approx(whole["text"][key], rel=0.02)
    for a, b in zip(half["validation"]["right"], whole["validation"]["right"], strict=True):
        assert a != b and a == pytest.approx(b, rel=0.05)


def test_a_base_that_was_moved_is_named_with_a_flag(tmp_path, pictures_alone):
    shutil.copytree(helpers.base(), tmp_path / "moved")
    shutil.copytree(helpers.shapes_run(), tmp_path / "run")
    file = next((tmp_path / "run").glob("step-*/checkpoint.json"))
    file.write_text(file.read_text().replace(str(helpers.base()), "/gone"))
    flags = ("--checkpoint", "run", "--n", 1, "--steps", 1)
    assert "/gone: no such folder" in helpers.call(evaluate, *flags, folder=tmp_path).err
    assert "0 of 24 tensors changed" in helpers.good(evaluate, *flags, "--base", "moved", folder=tmp_path)


def test_a_run_on_pictures_of_another_size_is_refused_in_words(tmp_path):
    result = helpers.call(evaluate, "--checkpoint", helpers.photo_run(), folder=tmp_path)
    assert result.status == 2 and "paints 16 pixels a side" in result.err


# ---- files of one's own ----


def on_files(folder: Path, *flags: object) -> tuple[str, dict]:
    """What the command prints about files, and its JSON; the run paints 16 pixels, not 64."""
    flags = ("--checkpoint", helpers.photo_run(), *flags, "--json", "report.json")
    out = helpers.good(evaluate, *flags, folder=folder)
    return out, json.loads((folder / "report.json").read_text())


def test_a_text_of_one_s_own_is_as_likely_to_the_last_bit_as_under_the_base(tmp_path):
    paragraphs = ["the grass is green, and so is\nthe frog in it.", "nobody knows what the cow says."]
    text = "\r\n \r\n".join([paragraphs[0].replace("\n", "\r\n"), "too short", "", paragraphs[1]]) + "\r\n"
    (tmp_path / "book.txt").write_bytes(text.encode("utf-8-sig"))
    out, report = on_files(tmp_path, "--text", "book.txt")
    assert set(report) == {"checkpoint", "step", "text"} and report["step"] == 2
    found, trained = report["text"], load_trained(helpers.photo_run())
    assert found["perplexity_base"] == found["perplexity_trained"] and found["logits_bit_equal"] is True
    assert found["tensors"] == 24 and found["tensors_changed"] == []
    ids = [encode_plain(trained.tokenizer, p) + [trained.model.config.eos_id] for p in paragraphs]
    assert found["perplexity_base"] == pytest.approx(perplexity(trained.model, ids), rel=1e-5)
    assert out.startswith(f"Text perplexity: base {found['perplexity_base']:.10f}, trained ")
    assert "0 of 24 tensors changed; logits equal to the last bit" in out and out.count("\n") == 1


def test_all_files_are_read_before_anything_is_computed(tmp_path):
    (tmp_path / "book.txt").write_text("the grass is green, and so is the frog in it.")
    flags = ("--checkpoint", helpers.photo_run(), "--text", "book.txt", "--data", "nowhere")
    result = helpers.call(evaluate, *flags, folder=tmp_path)
    assert result.status == 2 and "nowhere" in result.err and result.out == ""


def test_questions_of_two_files_are_answered_by_the_trained_model_and_its_base(tmp_path):
    questions = [("the cow says", "moo"), ("grass is", "green"), ("the day after monday is", "tuesday")]
    for name, n in (("a.jsonl", 3), ("b.jsonl", 2)):
        rows = [{"context": c, "choices": [right, "woof woof"], "label": 0} for c, right in questions[:n]]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    out, report = on_files(tmp_path, "--choices", "a.jsonl", "--choices", "b.jsonl")
    trained = load_trained(helpers.photo_run())
    assert set(report) == {"checkpoint", "step", "choices"} and list(report["choices"]) == [
        "a.jsonl",
        "b.jsonl",
    ]
    for (name, found), line in zip(report["choices"].items(), out.splitlines(), strict=True):
        asked = evaluate.read_questions(str(tmp_path / name))
        assert found["trained"] == found["base"] and found["base"]["questions"] == len(asked)
        encode = lambda text: encode_plain(trained.tokenizer, text)  # noqa: E731
        assert found["base"] == evaluate.multiple_choice(trained.model, encode, asked)
        share, plain = (100 * found["base"][k] for k in ("accuracy", "accuracy_unnormalised"))
        both = ", ".join(f"{who} {share:.2f}% ({plain:.2f}%)" for who in ("trained", "base"))
        assert line.startswith(f"{name}: {len(asked)} questions, {both}; ")


def test_choices_are_made_by_the_model_of_the_checkpoint_and_by_its_base(tmp_path, monkeypatch):
    trained = load_trained(helpers.photo_run())
    seen = []
    monkeypatch.setattr(evaluate, "load_trained", lambda *a, **k: trained)
    monkeypatch.setattr(
        evaluate,
        "multiple_choice",
        lambda model, *a: seen.append(model) or {"accuracy": len(seen) / 4, "accuracy_unnormalised": 0},
    )
    (tmp_path / "a.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "label": 1}')
    _, report = on_files(tmp_path, "--choices", "a.jsonl")
    assert {who: x["accuracy"] for who, x in report["choices"]["a.jsonl"].items()} == {
        "trained": 0.25,
        "base": 0.5,
    }
    assert seen[0] is trained.model is not seen[1]
    assert evaluate.text_parameters_changed(trained.model, seen[1]) == []


def test_captions_of_a_folder_are_written_as_coco_has_them(tmp_path, monkeypatch):
    names = ("COCO_val2014_000000000042", "000007", "a photo")
    (tmp_path / "data").mkdir()
    for name, photo in zip(names, sorted(helpers.photos().glob("*.png")), strict=False):
        shutil.copy(photo, tmp_path / "data" / f"{name}.png")
        shutil.copy(photo.with_suffix(".txt"), tmp_path / "data" / f"{name}.txt")
    flags = ("--data", "data", "--max-tokens", 5, "--captions", "new/captions.json")
    out, report = on_files(tmp_path, *flags)
    trained, found = load_trained(helpers.photo_run()), load_pictures(str(tmp_path / "data"), 16)
    written = evaluate.describe_images(trained, found.pixels, 5)
    assert json.loads((tmp_path / "new" / "captions.json").read_text()) == [
        {"image_id": i, "caption": c} for i, c in zip((7, 42, "a photo.png"), written, strict=True)
    ]
    assert set(report) == {"checkpoint", "step", "captions"}
    assert report["captions"] == evaluate.caption_report(written, [[c] for c in found.captions])
    assert out == f"data: 3 pictures, CIDEr {report['captions']['cider']:.4f}, exact 0.0%\n"
    result = helpers.call(evaluate, "--checkpoint", helpers.photo_run(), *flags, folder=tmp_path)
    assert result.err == "note: 3 of 3 captions reach --max-tokens 5, where they are cut\n"
    monkeypatch.setattr(evaluate, "describe_images", lambda t, pictures, **_: ["red"] * len(pictures))
    result = helpers.call(evaluate, "--checkpoint", helpers.photo_run(), *flags, folder=tmp_path)
    assert result.status == 0 and not result.err
    shutil.copy(tmp_path / "data" / "000007.png", tmp_path / "data" / "no 7.png")
    shutil.copy(tmp_path / "data" / "000007.txt", tmp_path / "data" / "no 7.txt")
    on_files(tmp_path, *flags)
    assert {row["image_id"] for row in json.loads((tmp_path / "new" / "captions.json").read_text())} == {
        *(f"{name}.png" for name in (*names, "no 7"))  # by their numbers two would be one
    }


def test_rows_that_name_one_file_are_references_of_one_picture(tmp_path, monkeypatch):
    for name, color in (("000000000009", "red"), ("blue", "blue")):
        Image.new("RGB", (20, 30), color).save(tmp_path / f"{name}.png")
    rows = [
        ("000000000009.png", "a picture in red"),
        ("000000000009.png", "all of this is red"),
        ("blue.png", "a blue picture, café"),
        ("000000000009.png", "nothing but red"),
    ]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    shown = []

    def describe(trained, pictures, max_tokens):
        shown.append((len(pictures), max_tokens))
        return ["All of this is red." if p[0, 0, 0] > 200 else "a blue café" for p in pictures]

    monkeypatch.setattr(evaluate, "describe_images", describe)
    out, report = on_files(tmp_path, "--data", "metadata.jsonl", "--captions", "captions.json")
    assert shown == [(2, 64)]  # each once
    references = [[rows[i][1] for i in (0, 1, 3)], [rows[2][1]]]
    tokens = [[caption_tokens(c) for c in group] for group in references]
    score = cider([caption_tokens("all of this is red"), caption_tokens("a blue café")], tokens)[0]
    assert report["captions"] == {"pictures": 2, "cider": pytest.approx(score), "exact": 0.5} and score > 1
    assert f"metadata.jsonl: 2 pictures, CIDEr {score:.4f}, exact 50.0%" in out
    assert json.loads((tmp_path / "captions.json").read_text(encoding="utf-8")) == [
        {"image_id": 9, "caption": "All of this is red."},
        {"image_id": "blue.png", "caption": "a blue café"},
    ]


def write_two_kinds(folder: Path) -> Path:
    """cats/000.png and dogs/000.png, ...: ten pictures each, of equal names."""
    for seed, kind in enumerate(("cats", "dogs")):
        helpers.write_photos(folder / kind, n=10, seed=seed)
        for path in (folder / kind).glob("*.txt"):
            path.write_text(f"one of the {kind}, number {path.stem}")
    return folder


def test_pictures_of_equal_names_in_several_folders_are_several_pictures(tmp_path, monkeypatch):
    write_two_kinds(tmp_path / "two")
    shown = []
    monkeypatch.setattr(
        evaluate, "describe_images", lambda t, pictures, **_: shown.extend(pictures) or ["x"] * len(pictures)
    )
    out, report = on_files(tmp_path, "--data", "two/*", "--captions", "captions.json")
    assert report["captions"]["pictures"] == 20 == len({p.numpy().tobytes() for p in shown})
    names = [row["image_id"] for row in json.loads((tmp_path / "captions.json").read_text())]
    assert names == [f"{kind}/{i:03d}.png" for kind in ("cats", "dogs") for i in range(10)]


def test_a_picture_is_judged_by_the_captions_of_its_own_folder_however_it_is_spelled(tmp_path, monkeypatch):
    write_two_kinds(tmp_path / "two")
    kept = [("000.png", "first"), ("./000.png", "second"), ("x/../000.png", "third")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in kept]
    (tmp_path / "two" / "dogs" / "metadata.jsonl").write_text("\n".join(lines))
    judged = []
    monkeypatch.setattr(evaluate, "describe_images", lambda t, pictures, **_: ["x"] * len(pictures))
    monkeypatch.setattr(evaluate, "caption_report", lambda written, right: judged.extend(right))
    evaluate.describe_pictures(None, load_pictures(str(tmp_path / "two" / "*"), 16), 8)
    cats = [[f"one of the cats, number {i:03d}"] for i in range(10)]
    assert judged == [*cats, ["first", "second", "third"]]


@pytest.mark.parametrize(
    "name, number",
    (
        ("COCO_val2014_000000391895.jpg", 391895),
        ("val2017/000000000139.jpg", 139),
        ("part-3.tar/000000000139.jpg", 139),
        ("7.png", 7),
        ("photo12.png", 12),
        ("photo.png", "photo.png"),
        ("12 photos.png", "12 photos.png"),
        ("photos-2014/a.png", "photos-2014/a.png"),
    ),
)
def test_a_picture_is_called_by_the_number_at_the_end_of_its_name(name, number):
    assert evaluate.image_id(name) == number


def test_several_files_are_looked_at_in_one_call_and_a_bad_one_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("the grass is green, and so is the frog.\n")
    (tmp_path / "a.jsonl").write_text('{"context": "grass is", "choices": ["red", "green"], "label": 1}\n')
    flags = ("--text", "book.txt", "--choices", "a.jsonl", "--data", helpers.photos(), "--max-tokens", 1)
    out, report = on_files(tmp_path, *flags)
    assert {"text", "choices", "captions"} < set(report) and len(out.splitlines()) == 3
    (tmp_path / "b.jsonl").write_text('{"context": "grass is"}\n')
    flags = ("--checkpoint", helpers.photo_run(), "--text", "book.txt", "--choices", "b.jsonl")
    result = helpers.call(evaluate, *flags, folder=tmp_path)
    assert result.status == 2 and result.out == "" and "b.jsonl: line 1 has no " in result.err


def test_paragraphs_of_windows_are_those_of_other_systems_and_end_at_blank_lines_alone(tmp_path):
    text = "first line of the first\u2028\x0cparagraph\nits second line\n\n \nthe second one of them\n"
    for name, content in (("a", text), ("b", text.replace("\n", "\r\n"))):
        (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    found = evaluate.read_paragraphs(str(tmp_path / "a"))
    assert found == evaluate.read_paragraphs(str(tmp_path / "b"))
    assert found == ["first line of the first\u2028\x0cparagraph\nits second line", "the second one of them"]


# ---- what the repository ships ----


def test_the_shipped_checkpoint_does_what_its_record_says():
    """A sample of prompts and captions; the record has all of them."""
    folder = helpers.ROOT / "small" / "checkpoint"
    made = json.loads((folder / "MADE.json").read_text())
    assert made["base"] == base_fingerprint(helpers.ROOT / "small" / "base")
    trained, figures = load_trained(None), made["figures"]
    assert trained.folder == folder
    scenes = list(all_scenes("test"))[::8]
    prompts = [scene.caption for scene in scenes]
    how = dict(steps=figures["steps"], cfg=figures["cfg"], sampler=figures["sampler"])
    painted = prompt_match(scenes, generate_images(trained, prompts, range(len(prompts)), **how))
    assert painted["all"] > figures["prompt_match"]["all"] - 0.15
    assert painted["strict"] > figures["strict"] - 0.2
    written = describe_images(trained, render(scenes, random.Random(0)))
    right = sum(a == b for a, b in zip(written, prompts, strict=True)) / len(prompts)
    assert right > figures["captions_exact"] - 0.15
