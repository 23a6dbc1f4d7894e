"""evaluate.py: pictures are read rightly, numbers are what they say, and a changed text is found out."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import small
import torch
from PIL import Image

import evaluate
from checkpoint import load_trained
from data import FIRST, Document, Recipe, caption_document, collate, edit_document
from diffusion import Diffusion, T
from evaluate import errors_by_timestep, perplexity, prompt_match, read_scenes, text_report, validation_error
from model import Tokens
from world import COLORS, PLACES, SHAPES, SIZES, Scene, all_scenes, render

HELD_OUT = list(all_scenes(held_out=True))


@pytest.fixture
def trained():
    return load_trained(small.shapes_run())


# ---- reading pictures ----


@pytest.mark.parametrize("jitter", (False, True))
def test_every_held_out_picture_is_read_rightly(jitter):
    assert read_scenes(render(HELD_OUT, random.Random(3) if jitter else None)) == HELD_OUT


def test_pictures_under_noise_and_shifted_colours_are_read_rightly():
    generator = torch.Generator().manual_seed(0)
    pictures = render(HELD_OUT, random.Random(4)).float()
    noisy = pictures + 25 * torch.randn(pictures.shape, generator=generator)
    washed = 0.85 * pictures + 15 * torch.rand(len(pictures), 3, 1, 1, generator=generator)
    for changed, least in ((noisy, 0.99), (washed, 0.98)):
        got = read_scenes(changed.round().clamp(0, 255).to(torch.uint8))
        assert sum(a == b for a, b in zip(got, HELD_OUT, strict=True)) >= least * len(HELD_OUT)


def test_the_reader_agrees_with_a_search_over_every_rendering():
    """The expanded square is the squared distance: compared with all 360 x 56 renderings."""
    generator, rng = torch.Generator().manual_seed(1), random.Random(1)
    one, two = (render(rng.choices(HELD_OUT, k=12), rng).double() for _ in range(2))
    pictures = (0.5 * (one + two) + 40 * torch.randn(one.shape, generator=generator)).clamp(0, 255)
    pictures = pictures.to(torch.uint8)  # each is two scenes at once, under noise
    coverage = evaluate.coverage()  # (shape, size, place, dy, dx, 32, 32)
    colors = torch.tensor(list(COLORS.values())).float()[..., None, None]  # (8, 3, 1, 1)
    best: list[tuple[float, Scene | None]] = [(math.inf, None)] * len(pictures)
    for s, shape in enumerate(SHAPES):
        for z, size in enumerate(SIZES):
            for p, place in enumerate(PLACES):
                a = coverage[s, z, p].flatten(0, 1)[:, None, None]  # (9, 1, 1, 32, 32)
                for b, background in enumerate(COLORS):
                    drawn = (colors[b] + a * (colors - colors[b])).flatten(2)  # (9, 8, 3 * 1024)
                    distance = torch.cdist(drawn.flatten(0, 1), pictures.float().flatten(1))  # (72, n)
                    distance = distance.view(9, 8, -1).amin(0)  # (8, n)
                    distance[b] = math.inf
                    for n, (d, c) in enumerate(zip(*(x.tolist() for x in distance.min(0)), strict=True)):
                        scene = Scene(size, list(COLORS)[c], shape, place, background)
                        best[n] = min(best[n], (d, scene), key=lambda x: x[0])
    assert read_scenes(pictures) == [scene for _, scene in best]


def test_prompt_match_counts_each_attribute_and_all_at_once():
    shown = [
        Scene("big", "red", "circle", "center", "blue"),
        Scene("small", "red", "circle", "center", "blue"),
        Scene("big", "green", "cross", "top left", "white"),
        Scene("big", "black", "square", "bottom right", "yellow"),
    ]
    wanted = [
        shown[0],
        dataclasses.replace(shown[1], size="big"),
        dataclasses.replace(shown[2], color="red", shape="square", background="black"),
        dataclasses.replace(shown[3], place="bottom left"),
    ]
    match = prompt_match(wanted, render(shown, random.Random(0)))
    assert match == {
        "background": 0.75,
        "color": 0.75,
        "place": 0.75,
        "shape": 0.75,
        "size": 0.75,
        "all": 0.25,
    }


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
    trained = small.perturbed()
    pictures, captions = render(HELD_OUT[:6]), [s.caption for s in HELD_OUT[:6]]
    report = validation_error(trained, pictures, captions)
    assert report == validation_error(trained, pictures, captions)
    assert report["t"] == [100, 300, 500, 700, 900]
    assert all(abs(a - b) > 1e-5 for a, b in zip(report["right"], report["permuted"], strict=True))
    same = validation_error(trained, pictures, captions[:1] * 6)  # nothing to permute
    assert same["right"] == same["permuted"]


def test_a_perfect_model_has_no_validation_error(monkeypatch):
    trained = small.perturbed()
    seen = {}
    noising = trained.diffusion.q_sample
    monkeypatch.setattr(trained.diffusion, "q_sample", lambda x, t, e: seen.update(e=e) or noising(x, t, e))
    monkeypatch.setattr(trained.diffusion, "eps_from_output", lambda *_: seen["e"])
    report = validation_error(trained, render(HELD_OUT[:3]), [s.caption for s in HELD_OUT[:3]])
    assert report["right"] == report["permuted"] == [0.0] * 5


@pytest.mark.parametrize("prediction", ("eps", "v"))
@pytest.mark.parametrize("weighting", ("none", "v"))
def test_the_error_of_edits_is_that_of_the_pictures_after_them(prediction, weighting):
    """Against one document at a time: the context clean at t = 0, and only the noisy images counted."""
    trained = small.perturbed()
    model, diffusion = trained.model, Diffusion(prediction=prediction)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    documents = [
        edit_document(None, None, [40, 41, 42], False, config),
        caption_document(None, [50, 51], FIRST, config, Recipe()),
        edit_document(None, None, [60], False, config),
        Document([7, 8], [], [], [True, True]),
    ]
    latents, noise = torch.randn(2, 5, 16, 8, 8, generator=generator)
    batch = collate(documents, latents, config)
    assert batch.max_t.tolist() == [0, T, T, 0, T]
    found = errors_by_timestep(model, diffusion, batch, noise, weighting)
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
            errors.append((predicted - eps).square().mean().item() / (a if weighting == "v" else 1))
        assert value == pytest.approx(sum(errors) / len(errors), rel=1e-4)


# ---- the command ----


def test_the_command_prints_a_table_and_writes_json_and_a_sheet(tmp_path):
    out = small.good(
        evaluate,
        *("--checkpoint", small.shapes_run(), "--n", 5, "--steps", 2, "--seed", 3),
        *("--json", "new/results.json", "--sheet", "new/sheet.png"),
        folder=tmp_path,
    )
    report = json.loads((tmp_path / "new" / "results.json").read_text())
    assert report["prompts"] == 5 and report["step"] == 3 and report["steps"] == 2 and report["seed"] == 3
    assert report["held_out_combinations"] == len(HELD_OUT)
    assert set(report["prompt_match"]) == {"background", "color", "place", "shape", "size", "all"}
    assert all(0 <= v <= 1 for v in report["prompt_match"].values())
    assert report["template_check"] == 1.0 and 0 <= report["captions_exact"] <= 1
    assert report["text"]["tensors_changed"] == [] and report["text"]["logits_bit_equal"] is True
    assert "pictures" not in report and len(report["caption_errors"]) == 5
    for words in ("5 held-out prompts, ddim 2 steps", "| **all five at once** |", "| right caption |"):
        assert words in out
    assert "0 of 24 tensors changed; logits equal to the last bit" in out
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        sheet.load()


def test_the_command_repeats_itself_for_a_seed(tmp_path):
    for name in ("a", "b"):
        flags = ("--n", 3, "--steps", 2, "--json", f"{name}.json")
        small.good(evaluate, "--checkpoint", small.shapes_run(), *flags, folder=tmp_path)
    a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "ab")
    a.pop("seconds_per_picture"), b.pop("seconds_per_picture")
    assert a == b


def test_what_is_counted_is_what_was_painted(trained, monkeypatch):
    """A model that paints every prompt as it should, and describes every picture rightly, gets full marks."""
    captions = {s.caption: s for s in HELD_OUT}
    monkeypatch.setattr(
        evaluate, "generate_images", lambda t, prompts, *a: render([captions[p] for p in prompts])
    )
    monkeypatch.setattr(
        evaluate, "describe_images", lambda t, pictures, **_: [s.caption for s in read_scenes(pictures)]
    )
    report = evaluate.evaluate(trained, n=30, steps=1, cfg=1.0, sampler="ddim", seed=0, batch=7)
    assert set(report["prompt_match"].values()) == {1.0} and report["captions_exact"] == 1.0
    assert report["caption_errors"] == [] and len(set(report["prompts_used"])) == 30
    assert report["pictures"].shape == (30, 3, 32, 32)
    assert not {*report["prompts_used"]} & {s.caption for s in all_scenes(held_out=False)}


def test_a_base_that_was_moved_is_named_with_a_flag(tmp_path):
    import shutil

    shutil.copytree(small.base(), tmp_path / "moved")
    shutil.copytree(small.shapes_run(), tmp_path / "run")
    file = next((tmp_path / "run").glob("step-*/checkpoint.json"))
    file.write_text(file.read_text().replace(str(small.base()), "/gone"))
    flags = ("--checkpoint", "run", "--n", 1, "--steps", 1)
    assert "/gone: no such folder" in small.call(evaluate, *flags, folder=tmp_path).err
    assert "0 of 24 tensors changed" in small.good(evaluate, *flags, "--base", "moved", folder=tmp_path)


def test_a_run_on_pictures_of_another_size_is_refused_in_words(tmp_path):
    result = small.call(evaluate, "--checkpoint", small.photo_run(), folder=tmp_path)
    assert result.status == 2 and "paints 16 pixels a side" in result.err
