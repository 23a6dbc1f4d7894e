"""train.py: the loss, who is trained and how fast, exact resumption, kills at any moment, what is written.

Most runs are on tiny photos of 16 x 16 pixels (4 patches), where a step takes 30 ms; see small.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

import checkpoint
import data
import train
from attention import IMAGE, Tokens
from checkpoint import list_checkpoints, load_trained
from data import BEHIND, DROPPED, FIRST, Document, PictureSource, Recipe, arrange, collate, make_batch
from evaluate import text_report
from lab import ablate
from model import LMFusion
from scale.latents import LatentSource
from scale.parallel import Team
from train import INHERITED, Run, draw_noise, losses, lr_factor, read_metrics

FIXTURES = Path(__file__).resolve().parent / "fixtures"
SEPARATIONS = pytest.mark.parametrize("separation", ("deep", "shallow", "none"))
TASKS = "generate=2,caption=1,edit=3,chat=6"
EDITS = ("--data", helpers.edits() / "all.jsonl")  # edits and captions
SHAPES = ("--data", "shapes", "--image-size", 32, "--latent-channels", 16)


class Killed(BaseException):
    """Stands in for kill -9: nothing in the code under test may catch it."""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs leave their name in runs/last-small: below the test's folder, not in the user's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make_run(tmp_path):
    """make_run(*flags) -> a Run on the tiny photos, all parameters perturbed unless told otherwise."""

    def make(*flags: object, perturb: float = 0.1) -> Run:
        with helpers.inside(tmp_path):
            torch.manual_seed(0)
            run = Run(helpers.photo_config(tmp_path / "run", *flags), "small")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=perturb)
        return run

    return make


def draw_batch(run: Run, n: int = 16, seed: int = 0, **recipe: float):
    rng = random.Random(seed)
    pictures, captions = run.source.sample(n, rng)
    ids, latents = [run.tokenise(c) for c in captions], run.codec.encode(pictures)
    return make_batch(ids, latents, Recipe(**recipe) if recipe else run.config.recipe, run.model.config, rng)


def run_losses(run: Run, batch, seed: int = 0) -> dict[str, torch.Tensor]:
    noise = draw_noise(batch.latents.shape, torch.Generator().manual_seed(seed))
    return losses(run.model, run.diffusion, batch, run.config, noise)


def text_copy(model: LMFusion) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.text_parameters().items()}


def tokens_of(batch) -> list[list[int]]:
    """The sequences of a batch, each patch as one IMAGE."""
    return [
        [i for t in (batch.prefix, batch.rest) for i in t.ids[r].tolist() if i >= IMAGE]
        for r in range(len(batch.latents))
    ]


# ---- the loss ----


@pytest.mark.parametrize("factor", (0.0, 1.0, 5.0))
def test_the_loss_is_lm_plus_lambda_times_ddpm(make_run, factor):
    run = make_run("--lambda-ddpm", factor)
    out = run_losses(run, draw_batch(run))
    assert torch.allclose(out["loss"], out["lm_loss"] + factor * out["ddpm_loss"])
    assert out["lm_loss"] > 0 and out["ddpm_loss"] > 0


@pytest.mark.parametrize("weighting", ("none", "v"))
def test_the_diffusion_loss_is_the_mean_squared_error_of_the_noise(make_run, monkeypatch, weighting):
    run = make_run("--loss-weighting", weighting, "--prediction", "eps")
    seen = {}
    noising, up = run.diffusion.q_sample, run.model.unet_up.forward
    monkeypatch.setattr(
        run.diffusion, "q_sample", lambda x, t, eps: seen.update(t=t, eps=eps) or noising(x, t, eps)
    )
    monkeypatch.setattr(run.model.unet_up, "forward", lambda *a: seen.setdefault("out", up(*a)))
    got = run_losses(run, draw_batch(run))["ddpm_loss"]
    each = (seen["out"] - seen["eps"]).square().mean((1, 2, 3))
    if weighting == "v":
        each = each / run.diffusion.alpha_bar[seen["t"]].float()
    assert torch.allclose(got, each.mean())
    assert abs(seen["eps"].std() - 1) < 0.05 and abs(seen["eps"].mean()) < 0.05


def test_timesteps_are_uniform_below_the_limit_of_each_picture(make_run, monkeypatch):
    run, seen = make_run("--noise-limit", 300), []
    monkeypatch.setattr(run.diffusion, "q_sample", lambda x, t, eps: seen.append(t) or x)
    below = {300: [], 1000: []}
    for seed in range(20):
        batch = draw_batch(run, n=100, seed=seed)
        run_losses(run, batch, seed)
        for t, limit in zip(seen[-1].tolist(), batch.max_t.tolist(), strict=True):
            below[limit].append(t)
    for limit, ts in below.items():
        assert 0 <= min(ts) < 0.05 * limit and 0.95 * limit < max(ts) < limit
        assert abs(sum(ts) / len(ts) / limit - 0.5) < 4 / math.sqrt(12 * len(ts))
    assert {type(t) for ts in below.values() for t in ts} == {int}


def test_one_t_a_picture_goes_to_the_noising_and_to_both_halves_of_the_unet(make_run, monkeypatch):
    run, seen = make_run(), {}
    q_sample = run.diffusion.q_sample

    def noising(x, t, eps):
        seen["noising"], seen["x_t"] = t, q_sample(x, t, eps)
        return seen["x_t"]

    monkeypatch.setattr(run.diffusion, "q_sample", noising)
    run.model.unet_down.register_forward_pre_hook(lambda m, a: seen.update(x=a[0], down=a[1]))
    run.model.unet_up.register_forward_pre_hook(lambda m, a: seen.update(up=a[1]))
    run_losses(run, draw_batch(run))
    assert torch.equal(seen["x"], seen["x_t"])
    assert torch.equal(seen["noising"], seen["down"]) and torch.equal(seen["noising"], seen["up"])
    assert len(set(seen["noising"].tolist())) > 10 and seen["noising"].shape == (16,)


def reference_lm_loss(run: Run, batch, x_t: torch.Tensor, t: torch.Tensor, everything: bool) -> torch.Tensor:
    """L_LM by a loop: each sequence alone, in one phase, position by position."""
    model, terms, boi = run.model, [], run.model.config.boi_id
    for r, ids in enumerate(tokens_of(batch)):
        short = [i for k, i in enumerate(ids) if i != IMAGE or ids[k - 1] != IMAGE]
        tokens = Tokens.rows([short], model.config.num_patches)
        log_p = model.logits(model.encode(tokens, x_t[r : r + 1], t[r : r + 1]).text).log_softmax(-1)
        text = [k for k, i in enumerate(ids) if i != IMAGE]
        for row, k in enumerate(text[:-1]):
            behind_the_picture = IMAGE in ids[:k]
            target = ids[k + 1]
            if ids[k] != boi and target not in (IMAGE, boi) and (everything or behind_the_picture):
                terms.append(-log_p[row, target])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("ratio", (0, 0.1))
def test_lm_loss_is_the_mean_over_the_tokens_that_carry_a_gradient(make_run, monkeypatch, ratio):
    run, seen = make_run("--lr-text-ratio", ratio), {}
    forward = run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda *a: seen.update(x_t=a[2], t=a[3]) or forward(*a))
    batch = draw_batch(run, caption_first=0.6, caption_drop=0.2)
    got = run_losses(run, batch)["lm_loss"]
    both = [
        reference_lm_loss(run, batch, seen["x_t"], seen["t"], everything=e) for e in (ratio > 0, ratio == 0)
    ]
    assert torch.allclose(got, both[0], rtol=1e-4)
    assert not torch.allclose(got, both[1], rtol=1e-3)  # the other mean is another number


def test_there_is_no_lm_loss_where_no_text_stands_behind_a_picture(make_run):
    run = make_run()
    out = run_losses(run, draw_batch(run, caption_first=1.0))
    assert "lm_loss" not in out and torch.allclose(out["loss"], 5 * out["ddpm_loss"])


def test_the_draw_loss_trains_the_boi_row_alone(make_run):
    run = make_run()
    run_losses(run, draw_batch(run))["draw_loss"].backward()
    assert [n for n, p in run.model.named_parameters() if p.grad is not None] == ["boi_head"]
    assert run.model.boi_head.grad.abs().min() > 0
    run.model.boi_head.grad = None
    run_losses(run, draw_batch(run))["loss"].backward()
    assert run.model.boi_head.grad is None


def test_the_draw_loss_is_the_logistic_loss_of_whether_boi_comes_next(make_run):
    run = make_run()
    captions = [[50, 60, 70], [80, 90]]
    latents = torch.zeros(2, 8, 4, 4)
    always = Recipe(caption_first=1, caption_drop=0)
    batch = make_batch(captions, latents, always, run.model.config, random.Random(0))
    got = run_losses(run, batch)["draw_loss"]
    terms = []
    for ids in captions:
        text = run.model.encode(Tokens.text(torch.tensor([ids]))).text  # (N, D)
        logit = text @ run.model.boi_head
        terms += F.binary_cross_entropy_with_logits(
            logit, torch.tensor([0.0] * (len(ids) - 1) + [1.0]), reduction="none"
        ).unbind()
    assert torch.allclose(got, torch.stack(terms).mean(), rtol=1e-4)


# ---- packing ----


def pack_rows(model: LMFusion, pack: int, dtype: torch.dtype = torch.float32):
    """The same 14 documents of 3 to 24 text tokens and an image, in rows of up to `pack` tokens."""
    rng, generator, c = random.Random(0), torch.Generator().manual_seed(0), model.config
    captions = [[rng.randint(4, 63) for _ in range(rng.randint(0, 20))] for _ in range(14)]
    latents = torch.randn(14, c.latent_channels, c.latent_size, c.latent_size, generator=generator).to(dtype)
    orders = Recipe(0.6, 0.2).draw(14, rng)
    return arrange(captions, latents, orders, c, noise_limit=300, pack=pack)


@pytest.mark.parametrize("frozen", (True, False), ids=("frozen text", "trained text"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("dense", (2**19, 0), ids=("dense", "segments"))
def test_packing_changes_no_loss_and_no_gradient(make_model, monkeypatch, frozen, dtype, dense):
    """One document a row, each longer than `pack` or without packing; one or two; up to five; all in one."""
    model = make_model(dtype=dtype)
    model.freeze_text(frozen)
    diffusion = train.Diffusion(1.0, "eps")
    found = {}
    for pack in (0, 1, 60, 150, 10**6):
        monkeypatch.setattr("attention.DENSE", 2**19 if pack == 0 else dense)
        batch = pack_rows(model, pack, dtype)
        noise = draw_noise(batch.latents.shape, torch.Generator().manual_seed(1))
        out = losses(model, diffusion, batch, train.CONFIGS["small"], noise)
        assert set(out) == {"ddpm_loss", "lm_loss", "draw_loss", "loss"}
        (out["loss"] + out["draw_loss"]).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        found[pack] = len(batch.rest.ids), train.count_targets(model, batch), out, gradient
    assert [rows for rows, *_ in found.values()] == [14, 14, 9, 3, 1]
    _, counts, expected, gradient = found.pop(0)
    assert set(gradient) >= set(model.image_parameters())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6  # angles, norms and losses are float32 in any case
    for pack, (_, counts_packed, out, packed) in found.items():
        assert counts_packed == counts and packed.keys() == gradient.keys()
        for name, loss in expected.items():
            assert abs(out[name] - loss) <= tolerance * loss, (pack, name)
        for name, x in gradient.items():
            assert (packed[name] - x).abs().max() <= tolerance * x.abs().max(), (pack, name)


def test_a_run_that_packs_takes_the_steps_of_one_that_does_not(make_run):
    plain, packed = make_run(), make_run("--pack", 60, "--activation-checkpointing", True)
    assert len(packed.draw_batches()[0][0].rest.ids) < len(plain.draw_batches()[0][0].rest.ids) == 6
    for _ in range(2):
        assert packed.train_step() == pytest.approx(plain.train_step(), rel=1e-4)


# ---- who is trained ----


def take_steps(run: Run, n: int = 4) -> None:
    for _ in range(n):
        run.train_step()


def changed(before: dict[str, torch.Tensor], model: LMFusion) -> set[str]:
    now = dict(model.named_parameters())
    return {n for n, x in before.items() if not torch.equal(x, now[n])}


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_training_changes_every_image_tensor_and_no_bit_of_the_text(make_run, optimizer):
    run = make_run("--optimizer", optimizer, "--weight-decay", 0, "--warmup", 0)
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = run.model.text_logits(ids)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    take_steps(run)
    assert changed(before, run.model) == set(run.model.image_parameters())
    assert len(run.model.text_parameters()) == 2 + 11 * 2
    with torch.no_grad():
        assert torch.equal(run.model.text_logits(ids), logits)


@pytest.mark.parametrize("base", ("llama3_rope", "qwen2_biases"))
def test_training_on_another_base_changes_the_image_side_alone(make_run, base):
    run = make_run("--base", FIXTURES / base, "--weight-decay", 0, "--warmup", 0, "--pack", 60)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    ids = torch.randint(288, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = run.model.text_logits(ids)
    take_steps(run)
    assert changed(before, run.model) == set(run.model.image_parameters())
    assert ("layers.0.image.self_attn.q_proj.bias" in before) == (base == "qwen2_biases")
    with torch.no_grad():
        assert torch.equal(run.model.text_logits(ids), logits)


def test_a_whole_command_leaves_the_text_as_the_base_has_it():
    trained = load_trained(helpers.shapes_run())
    base = checkpoint.load_qwen3(helpers.base())
    for name, p in base.text_parameters().items():
        assert torch.equal(p, trained.model.text_parameters()[name]), name
    fresh = dict(base.named_parameters())  # image experts start as copies of the text's
    own = {n: p for n, p in trained.model.image_parameters().items() if n.startswith("layers.")}
    assert own and all(not torch.equal(p, fresh[n]) for n, p in own.items())


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_frozen_text_is_in_no_group_requires_no_gradient_and_enters_no_clip_norm(
    make_run, monkeypatch, optimizer
):
    run, clipped, clip = make_run("--optimizer", optimizer), [], torch.nn.utils.clip_grad_norm_

    def clipping(parameters, largest):
        clipped.extend(parameters := list(parameters))
        return clip(parameters, largest)

    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", clipping)
    run.train_step()
    text, image = (
        {id(p) for p in part.values()} for part in (run.model.text_parameters(), run.model.image_parameters())
    )
    grouped = [id(p) for o in run.optimizers for g in o.param_groups for p in g["params"]]
    assert set(grouped) == image and len(grouped) == len(image)
    assert {id(p) for p in clipped} == image
    assert all(not p.requires_grad and p.grad is None for p in run.model.text_parameters().values())
    assert text and not text & image


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_the_text_trains_at_its_own_rate_and_its_final_norm_never(make_run, optimizer):
    run = make_run("--optimizer", optimizer, "--lr-text-ratio", 0.1, "--weight-decay", 0, "--warmup", 0)
    names = {id(p): n for n, p in run.model.named_parameters()}
    peaks = {names[id(p)]: g["peak"] for o in run.optimizers for g in o.param_groups for p in g["params"]}
    assert set(peaks) == set(names.values()) - {"norm_text.weight"}
    for name, peak in peaks.items():
        matrix = optimizer == "muon" and name.startswith("layers.") and name.endswith("proj.weight")
        ratio = 0.1 if name in run.model.text_parameters() else 1.0
        assert peak == pytest.approx(ratio * (run.config.muon_lr if matrix else run.config.lr)), name
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    take_steps(run)
    assert changed(before, run.model) == set(names.values()) - {"norm_text.weight"}


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_weight_decay_is_on_matrices_only(make_run, optimizer):
    run = make_run("--optimizer", optimizer, "--weight-decay", 0.07)
    for o in run.optimizers:
        for group in o.param_groups:
            for p in group["params"]:
                assert group["weight_decay"] == (0.07 if p.dim() > 1 else 0.0)


def test_the_rate_of_each_group_is_its_peak_times_the_schedule(make_run):
    run = make_run("--warmup", 3, "--steps", 10, "--lr-text-ratio", 0.5)
    for step in range(5):
        run.train_step()
        for o in run.optimizers:
            for group in o.param_groups:
                assert group["lr"] == pytest.approx(group["peak"] * lr_factor(step, run.config))


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_the_row_that_decides_when_to_draw_has_a_rate_of_its_own(make_run, optimizer):
    plain, run = (make_run("--optimizer", optimizer, "--draw-lr-ratio", ratio) for ratio in (1, 7))
    peaks = []
    for r in (plain, run):
        names = {id(p): n for n, p in r.model.named_parameters()}
        groups = [g for o in r.optimizers for g in o.param_groups]
        peaks.append({names[id(p)]: (g["peak"], g["weight_decay"]) for g in groups for p in g["params"]})
    assert peaks[0].keys() == peaks[1].keys() == set(run.trained)
    assert {n for n in peaks[0] if peaks[0][n] != peaks[1][n]} == {"boi_head"}
    assert peaks[0]["boi_head"] == (1e-3, 0) and peaks[1]["boi_head"] == pytest.approx((7e-3, 0))


@SEPARATIONS
def test_every_separation_trains_only_what_it_should_under_frozen_text(make_run, separation):
    run = make_run("--separation", separation, "--weight-decay", 0, "--warmup", 0)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    take_steps(run)
    unet = {n for n in before if n.startswith(("unet_down.", "unet_up."))} | {"boi_head"}
    ffn = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    attention = (
        "input_layernorm",
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        "self_attn.q_norm",
        "self_attn.k_norm",
    )
    own = {"deep": attention + ffn, "shallow": ffn, "none": ()}[separation]
    image = {f"layers.{i}.image.{n}.weight" for i in range(2) for n in own}
    final = set() if separation == "none" else {"norm_image.weight"}
    assert changed(before, run.model) == unet | image | final == set(run.trained)


def test_weights_are_averaged_with_a_decay_that_grows_to_the_one_asked_for(make_run):
    run = make_run("--ema", 0.25)
    wanted = {n: p.detach().double().clone() for n, p in run.trained.items()}
    run.average = {n: p.detach().clone() for n, p in run.trained.items()}  # the fixture perturbed the model
    for step in range(1, 7):
        run.train_step()
        decay = min(0.25, step / (step + 10))
        wanted = {n: decay * x + (1 - decay) * run.trained[n].detach().double() for n, x in wanted.items()}
        assert all(torch.allclose(x.double(), wanted[n], atol=1e-5) for n, x in run.average.items()), step
    assert all(not torch.equal(x, run.trained[n]) for n, x in run.average.items())


def test_inside_averaged_the_model_has_the_average_and_its_own_weights_again_behind_it(make_run):
    run = make_run("--ema", 0.9)
    take_steps(run, 2)
    own = {n: p.detach().clone() for n, p in run.trained.items()}
    average = {n: x.clone() for n, x in run.average.items()}
    with pytest.raises(Killed), run.averaged():
        assert all(torch.equal(run.trained[n], x) for n, x in average.items())
        raise Killed
    assert all(torch.equal(run.trained[n], x) for n, x in own.items())
    assert all(torch.equal(run.average[n], x) for n, x in average.items())


# ---- stages ----


def test_stages_are_read_as_steps_and_patterns():
    assert train.parse_stages("") == train.parse_stages(" ") == []
    assert train.parse_stages("0:*") == [(0, ["*"])]
    text = " 0 : unet_* ;500:unet_*, *.self_attn.*,;900:*"
    assert train.parse_stages(text) == [(0, ["unet_*"]), (500, ["unet_*", "*.self_attn.*"]), (900, ["*"])]


@pytest.mark.parametrize("text", ("unet_*", "0", "0:", "0: , ", ":*", "x:*", "-1:*", "0.5:*", "²:*", "0:*;"))
def test_a_stage_of_another_form_is_refused(tmp_path, text):
    with pytest.raises(ValueError) as error:
        helpers.photo_config(tmp_path, f"--stages={text}")
    last_item = text.split(";")[-1].strip()
    assert str(error.value) == f"--stages: {last_item!r} is not of the form STEP:PATTERN,PATTERN"


@pytest.mark.parametrize("text", ("5:*", "1:unet_*;0:*", "0:unet_*;0:*", "0:*;9:unet_*;5:*"))
def test_stages_begin_with_the_first_step_and_follow_each_other(tmp_path, text):
    with pytest.raises(ValueError, match="--stages .*: the steps must begin with 0 and grow") as error:
        helpers.photo_config(tmp_path, f"--stages={text}")
    assert text in str(error.value)


def test_a_pattern_that_fits_no_trained_parameter_names_some_that_are_there(make_run):
    for pattern in ("unet.*", "layers.0.text.*"):  # the latter is there, and frozen
        with pytest.raises(ValueError, match="fits no trained parameter; some are ") as error:
            make_run("--stages", f"0:*;3:unet_*,{pattern}")
        start, _, named = str(error.value).partition("some are ")
        assert start.startswith(f"--stages: {pattern} fits no ")
        assert 3 <= len(named.split(", ")) <= 5 and set(named.split(", ")) < set(make_run().trained)
    run = make_run("--stages", "0:layers.0.text.*", "--lr-text-ratio", 0.1)
    assert run.stages == [(0, {n for n in run.trained if n.startswith("layers.0.text.")})]


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_only_what_its_stage_names_changes_in_a_step_or_counts_in_the_norm(make_run, monkeypatch, optimizer):
    stages = ("--stages", "0:unet_up.*;2:*;3:unet_down.*,*.image.self_attn.*")
    run = make_run(*stages, "--optimizer", optimizer, "--weight-decay", 0.5, "--warmup", 0)
    clip, norms = torch.nn.utils.clip_grad_norm_, []

    def clipping(parameters, largest):
        squares = {n: p.grad.square().sum() for n, p in run.trained.items() if p.grad is not None}
        norms.append((set(squares), sum(squares.values()).sqrt(), clip(parameters, largest)))
        return norms[-1][-1]

    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", clipping)
    up, everything = {n for n in run.trained if n.startswith("unet_up.")}, set(run.trained)
    down = {n for n in run.trained if n.startswith("unet_down.") or ".image.self_attn." in n}
    assert up and down and up | down < everything
    for wanted in (up, up, everything, down, down):  # by then `up` has momentum, and has to rest as well
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.train_step()
        assert changed(before, run.model) == wanted
        with_gradient, norm, reported = norms.pop()
        assert with_gradient == wanted and torch.allclose(norm, reported)


# ---- the schedule ----


def test_the_learning_rate_warms_up_then_falls_along_a_cosine(tmp_path):
    config = helpers.photo_config(tmp_path, "--warmup", 10, "--steps", 110, "--lr", 1e-3, "--lr-final", 1e-4)
    assert [lr_factor(s, config) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    for s in range(10, 111):
        closed = 0.1 + 0.9 * math.cos(math.pi / 2 * (s - 10) / 100) ** 2
        assert lr_factor(s, config) == pytest.approx(closed)
    assert lr_factor(10, config) == 1 and lr_factor(60, config) == pytest.approx(0.55)
    assert config.lr * lr_factor(110, config) == pytest.approx(config.lr_final)
    assert config.lr * lr_factor(10**6, config) == pytest.approx(config.lr_final)


def test_the_paper_s_recipe_is_the_default():
    config = train.TrainConfig()
    recipe = (config.lr, config.lr_final, config.warmup, config.weight_decay, config.clip, config.lambda_ddpm)
    assert recipe == (1e-4, 1.5e-5, 4000, 0.1, 1.0, 5.0)
    assert config.recipe == Recipe(0.8, 0.1, 500) and config.lr_text_ratio == 0


# ---- resuming ----


def last(folder: Path) -> Path:
    return list_checkpoints(folder)[-1]


def metrics_without_clocks(folder: Path) -> list[dict]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in m.items() if k not in ("seconds", "images_per_second")} for m in lines]


def killed_at(monkeypatch, step: int):
    """train_step that dies before its `step`-th step."""
    train_step = Run.train_step

    def dying(run):
        if run.step + 1 == step:
            raise Killed
        return train_step(run)

    monkeypatch.setattr(Run, "train_step", dying)


KINDS = {
    "adamw": ("--optimizer", "adamw"),
    "muon": ("--optimizer", "muon"),
    "average": ("--optimizer", "muon", "--ema", 0.8, "--lr-text-ratio", 0.1),
    "tasks": ("--init-from", "first", "--task", TASKS, "--micro-batch", 4, "--ema", 0.8, *EDITS),
    # the last checkpoint lies in the middle of the second stage, and some tensors have not moved by then
    "stages": ("--optimizer", "muon", "--ema", 0.8, "--stages", "0:unet_*;1:unet_down.*,*.image.mlp.*;3:*"),
    "scratch": ("--optimizer", "muon", "--from-scratch", True, "--lr-text-ratio", 1, "--text-batch", 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_a_kill_and_two_more_equal_four_bit_for_bit(tmp_path, monkeypatch, kind):
    flags = (*KINDS[kind], "--steps", 5, "--checkpoint-every", 2, "--val-every", 2)
    shutil.copytree(helpers.photo_run(), tmp_path / "first")
    helpers.good(train, *helpers.photo_flags(Path("whole"), *flags), folder=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=4)  # step 3 is done and logged, but the last checkpoint is of step 2
        helpers.call(train, *helpers.photo_flags(Path("cut"), *flags), folder=tmp_path)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert last(cut).name == "step-000002"
    assert [m["step"] for m in read_metrics(cut / "metrics.jsonl")] == [1, 2, 3]
    (cut / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # and a line that the kill cut short
    shutil.rmtree(tmp_path / "first")  # no more needed
    again = ("--resume", *(EDITS if kind == "tasks" else ()))
    helpers.good(train, *helpers.photo_flags(Path("cut"), *again), folder=tmp_path)
    files = {p.name for p in last(whole).iterdir()}
    assert files == {p.name for p in last(cut).iterdir()}
    assert ("ema.safetensors" in files) == ("--ema" in KINDS[kind])
    for name in files - {"checkpoint.json"}:
        assert (last(cut) / name).read_bytes() == (last(whole) / name).read_bytes(), name
    assert metrics_without_clocks(cut) == metrics_without_clocks(whole)
    assert [m["step"] for m in read_metrics(cut / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    info = [json.loads((last(f) / "checkpoint.json").read_text()) for f in (cut, whole)]
    assert {k for k in info[0] if info[0][k] != info[1][k]} == {"config"}
    assert {k for k in info[0]["config"] if info[0]["config"][k] != info[1]["config"][k]} == {"out"}


def test_a_resumed_run_may_be_made_longer(tmp_path):
    helpers.good(train, *helpers.photo_flags(Path("run"), "--steps", 1), folder=tmp_path)
    out = helpers.good(train, *helpers.photo_flags(Path("run"), "--resume", "--steps", 3), folder=tmp_path)
    assert "2 steps" in out and last(tmp_path / "run").name == "step-000003"
    before = helpers.files(tmp_path)
    out = helpers.good(train, *helpers.photo_flags(Path("run"), "--resume"), folder=tmp_path)
    assert "nothing is left" in out and helpers.files(tmp_path) == before


def test_a_step_depends_on_the_seed_and_its_number_only(make_run):
    runs = [make_run(), make_run(), make_run("--seed", 1)]
    runs[1].ids.clear()
    torch.manual_seed(123)  # the global generator has no say in it
    random.seed(123)
    results = [run.train_step() for run in runs]
    assert results[0] == results[1] != results[2]


def test_resuming_on_other_data_keeps_the_latents_of_the_run(tmp_path):
    helpers.good(train, *helpers.photo_flags(Path("run"), "--steps", 1), folder=tmp_path)
    before = (last(tmp_path / "run") / "latents.safetensors").read_bytes()
    helpers.write_photos(tmp_path / "others", seed=7)
    flags = helpers.photo_flags(Path("run"), "--resume", "--steps", 2, "--data", "others")
    helpers.good(train, *flags, folder=tmp_path)
    assert last(tmp_path / "run").name == "step-000002"
    assert (last(tmp_path / "run") / "latents.safetensors").read_bytes() == before


# ---- the second stage: where it starts ----


def begin(monkeypatch, folder: Path, *flags: object) -> Run:
    """The run of a command, as it stands before its first step."""
    runs = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", runs.append)
        helpers.good(train, *flags, folder=folder)
    return runs[0]


@pytest.mark.parametrize("first", (helpers.photo_run, helpers.shapes_run), ids=("weights", "average"))
def test_a_second_stage_starts_from_exactly_the_image_side_and_the_latents_of_the_first(
    tmp_path, monkeypatch, first
):
    folder = last(first())
    averaged = (folder / "ema.safetensors").is_file()
    assert averaged == (first is helpers.shapes_run)
    data = "shapes" if averaged else helpers.write_photos(tmp_path / "others", seed=7)
    flags = ("--config", "small", "--init-from", first(), "--out", "second", "--data", data)
    run = begin(monkeypatch, tmp_path, *flags, "--seed", 5, "--ema", 0.5)
    wanted, plain = (
        load_file(folder / f"{n}.safetensors") for n in ("ema" if averaged else "model", "model")
    )
    assert run.step == 0 and run.trained.keys() == wanted.keys() == run.model.image_parameters().keys()
    for name, p in run.trained.items():
        assert torch.equal(p, wanted[name]) and torch.equal(run.average[name], p), name
        assert run.average[name].data_ptr() != p.data_ptr() and p.requires_grad
    assert averaged == any(not torch.equal(x, plain[n]) for n, x in wanted.items())
    base = checkpoint.load_qwen3(helpers.base())
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in run.model.text_parameters().items())
    codec, fitted = load_file(folder / "latents.safetensors"), train.open_codec(run.config, run.source, "cpu")
    assert all(torch.equal(x, codec[n]) for n, x in run.codec.tensors().items())
    assert not torch.equal(fitted[1].basis, run.codec.basis)
    pictures, captions = run.source.validation(96)
    right, wrong = (x.encode(pictures) - run.validation["latents"] for x in (run.codec, fitted[1]))
    assert right.abs().max() < 1e-4 < wrong.abs().max()  # not equal: a command sets torch's precision
    assert run.validation["ids"] == [run.tokenise(c) for c in captions]
    assert not any(o.state for o in run.optimizers)


OF_THE_MODEL = dict(
    separation="shallow",
    image_size=48,
    latent_patch=6,
    latent_channels=5,
    whiten=0.25,
    unet_channels=(12, 20),
    unet_attention=True,
    patch_positions=False,
    prediction="eps",
    loss_weighting="none",
    schedule_shift=3.0,
    noise_limit=77,
)


@pytest.fixture
def odd_first(tmp_path) -> Path:
    """A folder with the checkpoint.json of a first stage of which every field is another than `small` has."""
    config = vars(helpers.photo_config(Path("x"))) | OF_THE_MODEL | dict(steps=77, lr=0.5, seed=9, ema=0.5)
    folder = tmp_path / "first"
    folder.mkdir()
    vae = {"path": "/its/vae", "fingerprint": "0"}
    (folder / "checkpoint.json").write_text(json.dumps({"config": config, "base": "/its/base", "vae": vae}))
    return folder


def test_a_second_stage_takes_over_what_the_model_is_and_nothing_else(odd_first):
    start = {f: getattr(train.CONFIGS["small-chat"], f) for f in OF_THE_MODEL}
    assert all(start[f] != value for f, value in OF_THE_MODEL.items())
    assert set(INHERITED) == set(OF_THE_MODEL)
    config, name, resume, dry = train.parse(["--config", "small-chat", "--init-from", str(odd_first)])
    assert (name, resume, dry) == ("small-chat", False, False)
    taken = OF_THE_MODEL | {"base": "/its/base", "vae": "/its/vae", "init_from": str(odd_first)}
    assert vars(config) == vars(train.CONFIGS["small-chat"]) | taken
    flags = ["--config", "small", "--init-from", str(odd_first), "--base", "b", "--vae", "w", "--seed", "3"]
    moved = train.parse(flags)[0]
    assert vars(moved) == vars(train.CONFIGS["small"]) | taken | {"base": "b", "vae": "w", "seed": 3}


@pytest.mark.parametrize("field", OF_THE_MODEL)
def test_what_the_first_stage_was_may_be_said_again_and_not_be_contradicted(odd_first, field):
    def flags(value) -> list[str]:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        same = ("--image-size", "48", "--latent-patch", "6")  # the two must fit together
        start = ["--config", "small", "--init-from", str(odd_first), *same]
        return [*start, "--" + field.replace("_", "-"), text]

    assert getattr(train.parse(flags(OF_THE_MODEL[field]))[0], field) == OF_THE_MODEL[field]
    other = 24 if field == "image_size" else 4 if field == "latent_patch" else None
    other = other or getattr(train.CONFIGS["small"], field)
    with pytest.raises(ValueError, match=f"first: {field} was .* there and cannot become ") as error:
        train.parse(flags(other))
    assert str(OF_THE_MODEL[field]) in str(error.value) and str(other) in str(error.value)


def test_a_first_stage_that_trained_other_tensors_is_refused(make_run):
    runs = {ratio: make_run("--lr-text-ratio", ratio) for ratio in (0, 0.1)}
    for ratio, run in runs.items():
        run.out = run.out / str(ratio)
        run.train_step()
        run.save()
    with pytest.raises(ValueError, match="tensor .*(text|embed_tokens).* is not expected"):
        runs[0].start_from(last(runs[0.1].out))
    with pytest.raises(ValueError, match="tensor .*(text|embed_tokens).* is missing"):
        runs[0.1].start_from(last(runs[0].out))
    runs[0].start_from(last(runs[0].out))


def test_a_first_stage_on_latents_gives_its_vae_to_a_second_on_pictures(tmp_path, monkeypatch):
    from scale import latents

    vae = FIXTURES / "vae_sd"
    words = ("encode", "--data", helpers.photos(), "--vae", vae, "--base", helpers.base(), "--image-size", 16)
    helpers.good(latents, *words, "--out", "encoded", folder=tmp_path)
    flags = (*helpers.SHAPES_FLAGS, "--base", helpers.base(), "--image-size", 16, "--steps", 1)
    helpers.good(train, *flags, "--data", "encoded", "--out", "first", "--val-every", 9, folder=tmp_path)
    flags = ("--config", "small", "--init-from", "first", "--data", helpers.edits(), "--task", "edit")
    for more in ((), ("--vae", shutil.copytree(vae, tmp_path / "moved"))):
        run = begin(monkeypatch, tmp_path, *flags, *more)
        assert run.codec.fingerprint() == latents.load_vae(vae).fingerprint()
        assert torch.equal(
            run.codec.bound, load_file(last(tmp_path / "first") / "latents.safetensors")["bound"]
        )


def test_a_second_stage_is_remembered_by_the_name_of_its_configuration(tmp_path):
    flags = ("--config", "small-chat", "--init-from", helpers.shapes_run(), "--steps", 1, "--batch-size", 4)
    helpers.good(train, *flags, "--sheet-every", 0, "--out", "second", folder=tmp_path)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["last-small-chat"]
    info = load_trained(None, config="small-chat").info
    assert info["name"] == "small-chat" and info["config"]["task"] == TASKS
    assert info["config"]["init_from"] == str(helpers.shapes_run()) and info["step"] == 1


# ---- tasks ----


@pytest.mark.parametrize("task", ("generate", "caption"))
def test_a_task_of_captions_and_pictures_alone_is_a_recipe_of_the_first_stage(make_run, task):
    run = make_run("--task", task, "--caption-drop", 0.4, "--batch-size", 30)
    plain = make_run("--caption-first", float(task == "generate"), "--caption-drop", 0.4, "--batch-size", 30)
    (batch, noise), (other, other_noise) = (r.draw_batches()[0] for r in (run, plain))
    assert tokens_of(batch) == tokens_of(other)
    assert torch.equal(batch.latents, other.latents) and torch.equal(batch.max_t, other.max_t)
    assert all(map(torch.equal, noise, other_noise))
    config, rows = run.model.config, tokens_of(batch)
    dropped = [row == [config.boi_id] + [IMAGE] * 4 for row in rows]
    if task == "caption":
        assert {tuple(row[:6]) for row in rows} == {(config.boi_id, *[IMAGE] * 4, config.eoi_id)}
        assert {row[-1] for row in rows} == {config.eos_id} and set(batch.max_t.tolist()) == {200}
    else:
        assert {tuple(row[-5:]) for row in rows} == {(config.boi_id, *[IMAGE] * 4)}
        assert 4 < sum(dropped) < 20 and set(batch.max_t.tolist()) == {1000}
    assert make_run("--task", "generate=3,caption=1").config.recipe == Recipe(0.75, 0.1, 200)


def test_a_mixture_draws_its_tasks_in_proportion_and_drops_what_guidance_nulls(make_run, monkeypatch):
    run = make_run("--task", TASKS, "--edit-drop", 0.3, *SHAPES)
    drawn = []
    monkeypatch.setattr(
        train, "caption_document", lambda *a: drawn.append(("generate caption".split()[a[2] == BEHIND], a[2]))
    )
    monkeypatch.setattr(train, "edit_document", lambda *a: drawn.append(("edit", DROPPED if a[3] else FIRST)))
    monkeypatch.setattr(train, "chat_document", lambda *a: drawn.append(("chat", DROPPED if a[1] else FIRST)))
    for number in range(900):
        run.draw_document(random.Random(f"0-0-{number}"))
    for task, share in {"generate": 2 / 12, "caption": 1 / 12, "edit": 3 / 12, "chat": 6 / 12}.items():
        orders = [order for name, order in drawn if name == task]
        assert abs(len(orders) - 900 * share) < 4 * (900 * share * (1 - share)) ** 0.5, task
        if task == "caption":
            assert set(orders) == {BEHIND}
        else:
            dropped, n = 0.3 if task == "edit" else 0.1, len(orders)
            assert abs(orders.count(DROPPED) - dropped * n) < 4 * (dropped * (1 - dropped) * n) ** 0.5, task


def change(run: Run, **fields: object) -> None:
    """Another configuration of the same run; to make a new one takes longer than a step."""
    run.config = dataclasses.replace(run.config, **fields)


def drawn_by(run: Run) -> list[tuple]:
    """The documents of a step with their latents and noise, in the order of the batches."""
    out = []
    for batch, (u, eps) in run.draw_batches():
        assert len(batch.rest.ids) == len(batch.prefix.ids) and len(u) == len(eps) == len(batch.latents)
        first = 0
        for r in range(len(batch.rest.ids)):
            n = int(batch.rest.image[r].max())
            here = slice(first, first + n)
            text = [i for t in (batch.prefix, batch.rest) for i in t.ids[r].tolist() if i >= IMAGE]
            own = [
                x
                for t in (batch.prefix, batch.rest)
                for x, i in zip(t.loss_mask[r].tolist(), t.ids[r].tolist(), strict=True)
                if i >= IMAGE
            ]
            parts = (batch.latents[here], batch.max_t[here], u[here], eps[here])
            out.append((str(text), str(own), *(str(x.tolist()) for x in parts)))
            first += n
        assert first == len(batch.latents)
    return out


def test_a_document_follows_from_the_seed_the_step_and_its_number_alone(make_run):
    run = make_run("--task", TASKS, "--batch-size", 12, *SHAPES)
    whole = drawn_by(run)
    assert len(set(whole)) == 12 and drawn_by(run) == whole
    for noise in (4, 5):  # each document has its own
        found = [row[noise] for row in whole if row[noise] != "[]"]
        assert len(set(found)) == len(found) > 8
    shared = []
    for rank in range(3):
        run.team = Team(rank, 3)
        shared += drawn_by(run)
    assert shared == whole
    run.team, run.step = Team(), 1
    assert not set(drawn_by(run)) & set(whole)
    assert {row[5] for row in drawn_by(run)} & {row[5] for row in whole} <= {"[]"}
    run.step = 0
    for size in (1, 5, 12):
        change(run, micro_batch=size)
        widths = [batch.rest.ids.shape[1] for batch, _ in run.draw_batches()]
        assert len(widths) == math.ceil(12 / size) and widths == sorted(widths)  # like lengths together
        found = drawn_by(run)
        assert [row for row in whole if row in found] == whole
        # a batch without a picture has one more document, of BOI and an empty one
        assert {row[0] for row in found if row not in whole} <= {
            str([run.model.config.boi_id] + [IMAGE] * 16)
        }
    change(run, micro_batch=0, batch_size=24)
    assert drawn_by(run)[:12] == whole
    change(run, batch_size=12, seed=1)
    assert not set(drawn_by(run)) & set(whole)


def test_a_step_on_tasks_is_the_same_in_micro_batches_and_packed(make_run):
    run, found = make_run("--task", TASKS, "--batch-size", 12, *SHAPES, "--clip", 1e9), []
    run.optimizers = []  # the gradient stays
    for micro, pack in ((0, 0), (1, 0), (5, 0), (0, 200), (5, 300)):
        change(run, micro_batch=micro, pack=pack)
        run.step, result = 0, run.train_step()
        found.append((result, {n: p.grad for n, p in run.trained.items()}))
        run.model.zero_grad()
    result, gradient = found.pop(0)
    assert set(result) == {"loss", "lm_loss", "ddpm_loss", "draw_loss"}
    assert all(x.abs().max() > 0 for x in gradient.values())
    for other, grads in found:
        assert other == pytest.approx(result, rel=1e-5)
        for name, x in gradient.items():
            assert (grads[name] - x).abs().max() <= 2e-4 * x.abs().max(), name


# ---- text alone ----

TEXT = ("--lr-text-ratio", 0.5, "--text-batch", 8)


def same_batch(one: tuple, other: tuple) -> bool:
    """Whether two batches and their noise are the same."""
    (a, noise), (b, other_noise) = one, other
    one, other = ((x.prefix.ids, x.rest.ids, x.latents, x.max_t) for x in (a, b))
    return all(map(torch.equal, (*one, *noise), (*other, *other_noise)))


def texts_of(run: Run) -> list[tuple[int, ...]]:
    """The documents of a step's text alone, in the order of its batches, each of which ends in a picture."""
    rows = [r for batch, _ in run.draw_text_batches() for r in batch.prefix.ids.tolist()[:-1]]
    return [tuple(i for i in row if i >= 0) for row in rows]


def test_text_alone_trains_the_text_and_of_the_image_side_the_boi_row(make_run):
    run = make_run(*TEXT)
    ((batch, noise),) = run.draw_text_batches()
    out = losses(run.model, run.diffusion, batch, run.config, noise)
    assert out["ddpm_loss"] == 0 < out["lm_loss"] == out["loss"]
    (out["loss"] + out["draw_loss"]).backward()
    assert all(p.grad is not None for p in run.trained.values())
    moved = {n for n, p in run.trained.items() if p.grad.abs().max() > 0}
    assert moved == set(run.model.text_parameters()) - {"norm_text.weight"} | {"boi_head"}


def test_the_lm_loss_of_a_step_is_the_mean_over_the_words_of_captions_and_of_text_alone(
    make_run, monkeypatch
):
    run, seen = make_run(*TEXT), []
    monkeypatch.setattr(train, "collate", lambda d, *a: seen.extend(d) or collate(d, *a))
    (captions, noise), _ = run.draw_batches()
    out = losses(run.model, run.diffusion, captions, run.config, noise)
    n, from_captions = train.count_targets(run.model, captions)[1], out["lm_loss"].item()
    words = [n * from_captions]
    assert n > 0 and len(seen) == 8
    for d in seen:
        with torch.no_grad():
            log_p = run.model.text_logits(torch.tensor([d.ids]))[0].log_softmax(-1)
        learned = [k for k in range(1, len(d.ids)) if d.loss_mask[k]]
        words += [-log_p[k - 1, d.ids[k]].item() for k in learned]
        n += len(learned)
    result = run.train_step()
    assert result["lm_loss"] == pytest.approx(sum(words) / n, rel=1e-4)
    assert result["lm_loss"] != pytest.approx(from_captions, rel=1e-3)
    assert result["ddpm_loss"] == pytest.approx(out["ddpm_loss"].item(), rel=1e-5)


@pytest.mark.parametrize("flags", ((), ("--task", TASKS, *SHAPES)), ids=("captions", "tasks"))
def test_pictures_captions_and_noise_of_a_step_are_the_same_with_and_without_text(make_run, flags):
    run = make_run(*flags, *TEXT, "--micro-batch", 4)
    drawn = run.draw_batches()
    change(run, text_batch=0)
    without = run.draw_batches()
    assert len(drawn) == 2 + 2 and len(without) == 2
    assert all(map(same_batch, drawn[:2], without))
    assert not same_batch(drawn[0], drawn[1]) and not same_batch(drawn[1], drawn[2])


def test_a_text_follows_from_the_seed_the_step_and_its_number_alone(make_run):
    run = make_run(*TEXT)
    whole = texts_of(run)
    assert len(set(whole)) == 8 and texts_of(run) == whole == sorted(whole, key=len)
    assert {tuple(run.draw_text(random.Random(f"text 0-0-{i}")).ids) for i in range(8)} == set(whole)
    shared = []
    for rank in range(2):
        run.team = Team(rank, 2)
        shared.append(texts_of(run))
    assert [len(x) for x in shared] == [4, 4] and sorted(sum(shared, [])) == sorted(whole)
    run.team, run.step = Team(), 1
    assert not set(texts_of(run)) & set(whole)
    run.step = 0
    for size in (1, 3):
        change(run, micro_batch=size)
        assert texts_of(run) == whole and len(run.draw_text_batches()) == math.ceil(8 / size)
    change(run, micro_batch=0, text_batch=16)
    assert len(texts_of(run)) == 16 and set(whole) < set(texts_of(run))
    change(run, text_batch=8, seed=1)
    assert not set(texts_of(run)) & set(whole)


def test_a_step_with_text_alone_is_the_same_in_micro_batches_and_packed(make_run):
    run, found = make_run(*TEXT, "--clip", 1e9), []
    run.optimizers = []  # the gradient stays
    for micro, pack in ((0, 0), (3, 0), (0, 150)):
        change(run, micro_batch=micro, pack=pack)
        run.step, result = 0, run.train_step()
        found.append((result, {n: p.grad for n, p in run.trained.items()}))
        run.model.zero_grad()
    result, gradient = found.pop(0)
    assert all(x.abs().max() > 0 for x in gradient.values())
    for other, grads in found:
        assert other == pytest.approx(result, rel=1e-5)
        for name, x in gradient.items():
            assert (grads[name] - x).abs().max() <= 2e-4 * x.abs().max(), name


def test_paragraphs_of_a_file_are_learned_word_by_word_and_cut_to_the_context(make_run, tmp_path):
    paragraphs = [
        "the grass is green and the sky is blue.",
        "red and blue " * 60,
        "a cow says moo,\nand a dog woof.",
    ]
    (tmp_path / "text.txt").write_text("\n\n".join([*paragraphs, "too short"]) + "\n")
    run = make_run(*TEXT, "--text-data", tmp_path / "text.txt")
    c, rng = run.model.config, random.Random(0)
    wanted = {(*train.encode_plain(run.tokenizer, p.strip()), c.eos_id)[:96] for p in paragraphs}
    drawn = [run.draw_text(rng) for _ in range(40)]
    assert {tuple(d.ids) for d in drawn} == wanted and c.max_position_embeddings == 96
    cut = [ids for ids in wanted if ids[-1] != c.eos_id]
    assert [len(ids) for ids in cut] == [96]
    assert all(d.loss_mask == [True] * len(d.ids) and not d.pictures for d in drawn)
    assert run.train_step()["lm_loss"] > 0 and set(texts_of(run)) <= wanted
    for pack, room in ((40, 40), (150, 96)):
        change(run, pack=pack)
        assert max(len(run.draw_text(rng).ids) for _ in range(40)) == room


@pytest.mark.parametrize("flag", ("--batch-size", "--text-batch"))
def test_a_batch_that_processes_cannot_share_is_named(tmp_path, flag):
    config = helpers.photo_config(tmp_path / "run", *TEXT, flag, 7)
    with pytest.raises(ValueError, match=f"{flag} 7 is not a multiple of 2 processes"):
        Run(config, "small", Team(0, 2))


# ---- random text weights ----

SCRATCH = ("--from-scratch", True, "--lr-text-ratio", 1)


def test_random_text_weights_have_nothing_of_the_base(make_run, write_qwen3, tmp_path):
    base = write_qwen3(tmp_path / "base")
    runs = [make_run(*SCRATCH, "--base", base, "--seed", seed, perturb=0) for seed in (0, 0, 1)]
    text, again, other = (run.model.text_parameters() for run in runs)
    former = checkpoint.load_qwen3(base).text_parameters()
    assert len(text) == 24 and not any(torch.equal(p, former[n]) for n, p in text.items())
    for name, p in text.items():
        assert torch.equal(p, again[name])
        if p.dim() == 1:
            assert set(p.tolist()) == {2.0 if "q_norm" in name else 1.0}, name
        else:
            residual = 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1  # sqrt(2 layers)
            wanted = 0.05 if name == "embed_tokens.weight" else p.shape[1] ** -0.5 / residual
            assert p.std().item() == pytest.approx(wanted, rel=0.1) and not torch.equal(p, other[name]), name
            assert former[name].std().item() == pytest.approx(0.15, rel=0.1)
    assert runs[0].fingerprint == runs[2].fingerprint  # the base's: what a checkpoint is loaded on
    image = runs[0].model.image_parameters()
    copies = {n: p for n, p in image.items() if n.startswith(("layers.", "norm_image."))}
    assert len(copies) == 11 * 2 + 1
    assert all(torch.equal(p, text[n.replace("image", "text")]) for n, p in copies.items())


@pytest.mark.parametrize("separation", ("deep", "none"))
def test_a_run_from_random_text_trains_the_final_norm_and_its_checkpoint_is_loaded_as_it_was(
    make_run, separation
):
    run = make_run(*SCRATCH, "--separation", separation, "--weight-decay", 0, "--warmup", 0)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    take_steps(run, 2)
    assert changed(before, run.model) == set(before) == set(run.trained) >= {"norm_text.weight"}
    run.save()
    trained = load_trained(run.out)
    parameters = dict(trained.model.named_parameters())
    assert parameters.keys() == run.trained.keys()
    assert all(torch.equal(p, run.trained[n]) for n, p in parameters.items())
    report = text_report(trained, ["grass is green."])
    assert set(report["tensors_changed"]) == set(run.model.text_parameters())
    assert not report["logits_bit_equal"] and report["perplexity_base"] != report["perplexity_trained"]


# ---- tasks: the loss ----


def documents_that(run: Run, condition, n: int = 6) -> list[Document]:
    """The first n documents of a run for which the condition holds."""
    numbers, found = iter(range(10_000)), []
    while len(found) < n:
        document = run.draw_document(random.Random(next(numbers)))
        found += [document] if condition(document) else []
    return found


def batch_of(run: Run, documents: list[Document]):
    pictures = [p for d in documents for p in d.pictures]
    latents = run.codec.encode(run.source.pixels(pictures)) if pictures else torch.zeros(0)
    return collate(documents, latents, run.model.config)


def to_be_said(run: Run, ids: list[int]) -> list[bool]:
    """Of each id, whether it is the model's: an assistant's turn from its name to its end, or a caption."""
    start, end, assistant = map(run.tokenizer.token_to_id, ("<|im_start|>", "<|im_end|>", "assistant"))
    own = [start not in ids and ids[-1] == run.model.config.eos_id and i > 2 for i in range(len(ids))]
    for i in (i for i, token in enumerate(ids) if token == start):
        if ids[i + 1] == assistant:
            length = ids[i:].index(end) + 1 if end in ids[i:] else len(ids[i:])
            own[i + 1 : i + length] = [True] * (length - 1)
    return own


def reference_losses(run: Run, documents: list[Document], x_t, t, noise, everything: bool) -> dict:
    """All losses by a loop: each document alone, in one phase; what is learned read off its ids."""
    model, boi = run.model, run.model.config.boi_id
    words, draws, errors, first = [], [], [], 0
    for d in documents:
        here = slice(first, first + d.ids.count(IMAGE))
        first, own = here.stop, to_be_said(run, d.ids)
        hidden = model.encode(Tokens.rows([d.ids], model.config.num_patches), x_t[here], t[here])
        text = [k for k, i in enumerate(d.ids) if i != IMAGE]
        for h, k in zip(hidden.text, text, strict=True):
            if k + 1 == len(d.ids) or d.ids[k] == boi or not own[k + 1]:
                continue
            if d.ids[k + 1] != boi and (everything or IMAGE in d.ids[:k]):
                words.append(-model.logits(h).log_softmax(-1)[d.ids[k + 1]])
            drawn = torch.tensor(float(d.ids[k + 1] == boi))
            draws.append(F.binary_cross_entropy_with_logits(h @ model.boi_head, drawn))
        if hidden.image is not None:
            output = model.unet_output(hidden)
            for j in range(here.start, here.stop):
                captioned = d.ids[-1] == model.config.eos_id and len(d.pictures) == 1
                if captioned or (d.ids[-1] == IMAGE and j == here.stop - 1):
                    one = slice(j, j + 1)
                    predicted = run.diffusion.eps_from_output(output[j - here.start][None], x_t[one], t[one])
                    error = (predicted - noise[one]).square().mean()
                    errors.append(error / run.diffusion.alpha_bar[t[j]].float())
                else:
                    assert t[j] == 0  # clean
    means = {"lm_loss": words, "draw_loss": draws, "ddpm_loss": errors}
    return {k: torch.stack(v).mean() for k, v in means.items()}, [len(v) for v in (errors, words, draws)]


@pytest.mark.parametrize("ratio", (0, 0.1))
@pytest.mark.parametrize("data", (SHAPES, EDITS), ids=("shapes", "pictures"))
def test_the_losses_of_tasks_are_those_of_a_loop_over_the_documents(make_run, monkeypatch, ratio, data):
    run, seen = make_run("--task", TASKS, "--batch-size", 24, *data, "--lr-text-ratio", ratio), {}
    forward = run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda *a: seen.update(x_t=a[2], t=a[3]) or forward(*a))
    monkeypatch.setattr(train, "collate", lambda d, *a: seen.update(documents=d) or collate(d, *a))
    batch, noise = run.draw_batches()[0]
    out = losses(run.model, run.diffusion, batch, run.config, noise)
    clean = (batch.max_t == 0).nonzero().squeeze(1)
    assert len(clean) > 3 and torch.equal(seen["x_t"][clean], batch.latents[clean])
    others = (batch.max_t > 0).nonzero().squeeze(1)
    wanted = run.diffusion.q_sample(batch.latents, (noise[0] * batch.max_t).long(), noise[1])
    assert torch.equal(seen["x_t"][others], wanted[others])
    parts, counts = reference_losses(run, seen["documents"], seen["x_t"], seen["t"], noise[1], ratio > 0)
    assert counts == train.count_targets(run.model, batch) and min(counts) > 3
    for name, value in parts.items():
        assert torch.allclose(out[name], value, rtol=2e-4), name
    assert torch.allclose(out["loss"], out["lm_loss"] + 5 * out["ddpm_loss"])


@pytest.mark.parametrize("task", ("edit", "chat"))
def test_a_clean_picture_has_no_noise_and_no_loss_of_its_own_but_is_seen(make_run, task):
    run = make_run("--task", task, "--batch-size", 8, *SHAPES)
    both = [0, 1000] if task == "edit" else [0] * 2 + [1000]
    documents = documents_that(run, lambda d: d.max_t[-2:] == both[-2:], n=4)
    batch = batch_of(run, documents)
    u, eps = draw_noise(batch.latents.shape, torch.Generator().manual_seed(0))
    clean = batch.max_t == 0

    def with_(where, noise_by: float = 0.0, pixels_by: float = 0.0) -> dict[str, float]:
        keep = where[:, None, None, None]
        noise = torch.where(where, (u + noise_by) % 1, u), eps + noise_by * keep
        changed = dataclasses.replace(batch, latents=batch.latents + pixels_by * keep)
        out = losses(run.model, run.diffusion, changed, run.config, noise)
        return {k: x.item() for k, x in out.items() if k != "draw_loss"}

    assert 0 < clean.sum() < len(clean)
    plain = with_(clean)
    assert with_(clean, noise_by=0.3) == plain
    assert with_(~clean, noise_by=0.3)["ddpm_loss"] != pytest.approx(plain["ddpm_loss"], rel=1e-3)
    assert with_(clean, pixels_by=0.3)["ddpm_loss"] != pytest.approx(plain["ddpm_loss"], rel=1e-4)


def gradients(run: Run, batch) -> tuple[dict, dict[str, float]]:
    """The losses of a batch, and the largest gradient of every trained tensor; each must have one."""
    out = run_losses(run, batch)
    (out["loss"] + out["draw_loss"]).backward()
    assert all(p.grad is not None for p in run.trained.values())
    return out, {n: p.grad.abs().max().item() for n, p in run.trained.items()}


def test_clean_pictures_alone_have_no_diffusion_loss_and_the_text_behind_them_trains_the_experts(make_run):
    run = make_run("--task", "chat", *SHAPES)
    documents = documents_that(run, lambda d: d.pictures and not any(d.max_t))
    out, largest = gradients(run, batch_of(run, documents))
    assert out["ddpm_loss"] == 0 and out["lm_loss"] > 0 and out["loss"] == out["lm_loss"]
    assert train.count_targets(run.model, batch_of(run, documents))[0] == 0
    assert {n for n, x in largest.items() if x == 0 and n.startswith("unet_")} == {
        n for n in largest if n.startswith("unet_up.")
    }
    behind = ("o_proj", "mlp", "post_attention")  # of the last layer: only UNet-Up reads what they make
    silent = {n for n in largest if n.startswith("layers.1.image") and any(x in n for x in behind)}
    silent |= {"norm_image.weight", "layers.1.image.self_attn.q_proj.weight"}
    silent |= {"layers.1.image.self_attn.q_norm.weight"}
    assert {n for n, x in largest.items() if x == 0 and not n.startswith("unet_")} == silent


def test_a_batch_without_a_picture_trains_the_boi_row_alone(make_run):
    run = make_run("--task", "chat", *SHAPES)
    batch = batch_of(run, documents_that(run, lambda d: not d.pictures))
    assert len(batch.latents) == 1 and batch.max_t.tolist() == [0]
    out, largest = gradients(run, batch)
    assert out["loss"] == out["ddpm_loss"] == 0 < out["draw_loss"] and "lm_loss" not in out
    assert [n for n, x in largest.items() if x > 0] == ["boi_head"]
    counts = train.count_targets(run.model, batch)
    assert counts[:2] == [0, 0] and counts[2] > 0


def test_a_step_without_a_noisy_picture_is_taken_and_logged(tmp_path, monkeypatch):
    real = Run.draw_document

    def clean(run, rng):
        while any((document := real(run, rng)).max_t):
            pass
        return document

    monkeypatch.setattr(Run, "draw_document", clean)
    flags = ("--task", "chat", "--steps", 2, "--batch-size", 2, "--sheet-every", 0, *EDITS)
    helpers.good(train, *helpers.photo_flags(Path("run"), *flags), folder=tmp_path)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["ddpm_loss"] for m in lines] == [None, None]
    assert all(m["loss"] == m["lm_loss"] > 0 for m in lines)


def test_the_words_of_others_carry_no_loss_and_no_decision(make_run):
    """Another user: the features differ, and nothing that is counted or predicted does."""
    run = make_run("--task", "chat", *SHAPES)
    documents = documents_that(run, lambda d: len(d.pictures) == 2 and d.max_t[-1] == 0 and d.max_t[0] == 0)
    for d in documents:
        batch = batch_of(run, [d])
        counted = [
            (int(w), int(k))
            for t in (batch.prefix, batch.rest)
            for w, k in zip(*train.next_tokens(t, run.model.config.boi_id), strict=True)
        ]
        own = to_be_said(run, d.ids)
        loss_mask = [i for i, mine in zip(d.ids, own, strict=True) if mine and i >= 0]
        words = [i for i in loss_mask if i not in (run.model.config.boi_id, run.model.config.eoi_id)]
        assert [w for w, _ in counted if w >= 0] == words
        shown = sum(not mine for i, mine in zip(d.ids, own, strict=True) if i == run.model.config.boi_id)
        assert sum(k == 1 for _, k in counted) == 2 - shown


def test_training_on_tasks_changes_every_image_tensor_and_no_bit_of_the_text(make_run):
    run = make_run("--task", TASKS, *SHAPES, "--optimizer", "muon", "--weight-decay", 0, "--warmup", 0)
    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = run.model.text_logits(ids)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    take_steps(run, 3)
    assert changed(before, run.model) == set(run.model.image_parameters())
    with torch.no_grad():
        assert torch.equal(run.model.text_logits(ids), logits)


def test_the_kinds_of_built_in_conversations_have_their_shares(monkeypatch):
    monkeypatch.setattr(data, "conversation", lambda rng, thinking, kinds: kinds)
    rng = random.Random(0)
    drawn = [data.Shapes().conversation(rng) for _ in range(2000)]
    kinds = [kind for turns in drawn for kind in turns]
    shares = {k: weight / sum(data.TURNS) for k, weight in zip(data.KINDS, data.TURNS, strict=True)}
    for name, share in shares.items():
        n = len(kinds)
        assert abs(kinds.count(name) - n * share) < 4 * (n * share * (1 - share)) ** 0.5, name
    assert max(shares, key=shares.get) == "story" and set(kinds) == set(shares)
    for turns, share in ((1, 0.7), (2, 0.25), (3, 0.05)):
        count = sum(len(x) == turns for x in drawn)
        assert abs(count - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5, turns


# ---- tasks: real pictures ----


def test_edits_alone_run_from_end_to_end(tmp_path):
    flags = ("--init-from", helpers.photo_run(), "--task", "edit", "--data", helpers.edits(), "--steps", 2)
    helpers.good(train, *helpers.photo_flags(Path("run"), *flags), folder=tmp_path)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "curves.png",
        "edits-000002.png",
        "metrics.jsonl",
        "step-000002",
    }
    with Image.open(tmp_path / "run" / "edits-000002.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 10
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["lm_loss"] for m in lines] == [None, None] and all(m["ddpm_loss"] > 0 for m in lines)
    assert lines[-1]["val"]["right"] != lines[-1]["val"]["permuted"]
    assert load_trained(tmp_path / "run").info["step"] == 2


def test_validation_of_edits_shows_the_picture_before_under_the_right_and_another_instruction(make_run):
    run = make_run("--task", "edit", "--data", helpers.edits(), perturb=0.3)
    before, after, words = run.source.validation_edits(96)
    assert len(words) == 2 and not set(words) & {run.source.edited(random.Random(i))[2] for i in range(200)}
    report, config = run.validate(), run.model.config
    assert report == run.validate()
    latents = torch.stack((run.codec.encode(before), run.codec.encode(after)), 1)
    noise = torch.randn(latents[:, 1].shape, generator=torch.Generator().manual_seed(0))
    for key, instructions in (("right", words), ("permuted", words[1:] + words[:1])):
        for k, value in enumerate(train.TIMESTEPS):
            errors, t = [], torch.tensor([0, value])
            for i, text in enumerate(instructions):
                ids = [config.boi_id, IMAGE, config.eoi_id, *run.tokenise(text), config.boi_id, IMAGE]
                noisy = run.diffusion.q_sample(latents[i, 1:], t[1:], noise[i : i + 1])
                x_t = torch.cat((latents[i, :1], noisy))
                with torch.no_grad():
                    hidden = run.model.encode(Tokens.rows([ids], config.num_patches), x_t, t)
                    output = run.model.unet_output(hidden)[1:]
                predicted = run.diffusion.eps_from_output(output, noisy, t[1:])
                errors.append(run.diffusion.loss(predicted, noise[i : i + 1], t[1:], "v").item())
            assert report[key][k] == pytest.approx(sum(errors) / 2, rel=1e-4)
    assert report["right"] != pytest.approx(report["permuted"], rel=1e-3)
    run.validation["size"] = 1  # in micro batches
    small_batches = run.validate()
    for key in ("right", "permuted"):
        assert small_batches[key] == pytest.approx(report[key], rel=1e-5)


@pytest.mark.parametrize("data", (SHAPES, EDITS), ids=("shapes", "pictures"))
def test_a_sheet_of_edits_has_the_pictures_before_and_what_the_averaged_weights_make_of_them(
    make_run, monkeypatch, data
):
    run, seen = make_run("--task", "edit,generate", *data, "--ema", 0.5), {}
    run.out.mkdir()
    own = {n: p.detach().clone() for n, p in run.trained.items()}

    def edited(trained, pictures, words, seeds):
        assert trained.codec is run.codec and len(set(seeds)) == len(words)
        assert all(torch.equal(run.trained[n], x) for n, x in run.average.items())
        seen.update(before=pictures, words=words)
        return 255 - pictures

    monkeypatch.setattr(train, "edit_images", edited)
    monkeypatch.setattr(train, "generate_images", lambda trained, prompts, **_: torch.zeros(18, 3, 16, 16))
    monkeypatch.setattr(train.figures, "sheet", lambda pictures, texts: (pictures, texts))
    monkeypatch.setattr(train.figures, "save_image", lambda page, path: seen.update({path.name: page}))
    run.draw_sheet()
    before, _, words = run.source.validation_edits(9)
    assert seen["words"] == words and torch.equal(seen["before"], run.source.pixels(before))
    pictures, texts = seen["edits-000000.png"]
    assert torch.equal(pictures[::2], seen["before"]) and torch.equal(pictures[1::2], 255 - seen["before"])
    assert texts[1::2] == words and set(texts[::2]) == {""} and "sheet-000000.png" in seen
    assert all(torch.equal(run.trained[n], x) for n, x in own.items())
    # of a mixture, what is validated is captioned pictures
    assert run.validation["context"] is None
    assert run.validation["ids"] == [run.tokenise(c) for c in run.source.validation(96)[1]]


def test_an_instruction_longer_than_the_context_does_not_end_the_run(tmp_path):
    folder = helpers.write_edits(tmp_path / "edits")
    rows = [json.loads(x) for x in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        row["text"] += " make it red" * 60
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--init-from", helpers.photo_run(), "--task", "edit", "--data", folder, "--steps", 1)
    helpers.good(train, *helpers.photo_flags(Path("run"), *flags), folder=tmp_path)
    assert (tmp_path / "run" / "edits-000001.png").is_file()
    with helpers.inside(tmp_path):
        run = Run(helpers.photo_config(tmp_path / "x", *flags), "small")
    for document in documents_that(run, lambda d: len(d.ids) > 5):
        assert (
            len(document.ids) - 2 + 2 * run.model.config.num_patches
            <= helpers.SIZES["max_position_embeddings"]
        )
    batch, _ = run.validation_batch(run.validation["ids"], slice(0, 2))
    assert batch.rest.position[batch.rest.ids != -2].max() < helpers.SIZES["max_position_embeddings"]


def test_chat_takes_captioned_pictures_without_edits(tmp_path, monkeypatch):
    flags = ("--init-from", helpers.photo_run(), "--task", "chat", "--steps", 2, "--sheet-every", 0)
    flags = helpers.photo_flags(Path("run"), *flags, "--batch-size", 8)
    run = begin(monkeypatch, tmp_path, *flags)
    assert run.source.edits is None
    documents = documents_that(run, lambda d: True, n=60)
    texts = {run.tokenizer.decode([i for i in d.ids if i >= 0]) for d in documents if len(d.ids) > 2}
    assert any("draw a small photo" in t or "paint a big photo" in t for t in texts)
    assert {tuple(d.max_t) for d in documents} == {(0,), (1000,)}
    helpers.good(train, *flags, folder=tmp_path)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["step"] for m in lines] == [1, 2] and all(
        m["lm_loss"] > 0 and m["draw_loss"] > 0 for m in lines
    )


def test_chat_takes_edits_where_there_are_some(make_run):
    run = make_run("--task", "chat", *EDITS)
    kinds = [tuple(d.max_t) for d in documents_that(run, lambda d: len(d.ids) > 2, n=200)]
    assert 50 < sum(len(k) == 2 for k in kinds) < 150 and {k[0] for k in kinds if len(k) == 2} == {0}


def test_what_a_source_of_edits_holds_tells_it_from_another(make_run):
    source = make_run("--task", "edit,generate", *EDITS).source
    seen = [train.content(source)]
    for field in ("sources", "targets"):
        edits = dataclasses.replace(source.edits, **{field: 255 - getattr(source.edits, field)})
        seen.append(train.content(PictureSource(source.train, source.val, edits)))
    words = ["make it another", *source.edits.instructions[1:]]
    edits = dataclasses.replace(source.edits, instructions=words)
    seen.append(train.content(PictureSource(source.train, source.val, edits)))
    assert (
        len(set(seen)) == 4
        and train.content(PictureSource(source.train, source.val, source.edits)) == seen[0]
    )


def test_tasks_that_the_data_or_the_tokenizer_do_not_give_are_refused(make_run):
    run, empty = make_run(), Tokenizer(models.BPE())
    latents = LatentSource.__new__(LatentSource)
    with pytest.raises(ValueError, match="--task edit,chat: there holds captioned latents"):
        train.check_tasks({"edit": 0.5, "chat": 0.5}, latents, run.tokenizer, "there")
    with pytest.raises(ValueError, match=r"--task chat: the base has no chat tokens: <\|im_start\|>"):
        train.check_tasks({"chat": 1.0}, run.source, empty, "there")
    half = Tokenizer(models.BPE())
    half.add_special_tokens(["<|im_start|>"])
    with pytest.raises(ValueError, match=r"no chat tokens: <\|im_end\|>"):
        train.check_tasks({"generate": 0.5, "chat": 0.5}, run.source, half, "there")
    train.check_tasks({"chat": 1.0}, run.source, run.tokenizer, "there")
    edits = PictureSource(run.source.train, run.source.val, make_run("--task", "edit", *EDITS).source.edits)
    train.check_tasks({"edit": 1.0}, edits, empty, "there")


# ---- kills ----


@pytest.mark.parametrize(
    "moment", ("model.safetensors", "optimizer.safetensors", "checkpoint.json", "rename")
)
@pytest.mark.parametrize("kind", (OSError, Killed))
def test_a_crash_while_a_checkpoint_is_written_leaves_the_last_one(tmp_path, monkeypatch, moment, kind):
    with helpers.inside(tmp_path):
        torch.manual_seed(0)
        run = Run(helpers.photo_config(tmp_path / "run"), "small")
        take_steps(run, 1)
        run.save()
        before, good = (
            helpers.files(tmp_path / "run"),
            {n: p.detach().clone() for n, p in run.trained.items()},
        )
        take_steps(run, 1)
        with monkeypatch.context() as patch:
            break_writing(patch, moment, kind)
            with pytest.raises(kind):
                run.save()
        whole = {k: v for k, v in helpers.files(tmp_path / "run").items() if "/." not in k}
        assert whole == before
        if kind is OSError:  # a process that lives on cleans up behind itself
            assert helpers.files(tmp_path / "run") == before
        again = Run(run.config, "small")
        again.resume(last(tmp_path / "run"))
        assert again.step == 1 and all(torch.equal(again.trained[n], x) for n, x in good.items())
        again.train_step()
        again.save()  # what the crash left lying does not stand in the way
        assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(("step", "."))] == [
            "step-000002"
        ]


def break_writing(patch, moment: str, kind: type[BaseException]) -> None:
    """Writing a checkpoint fails at `moment`, half-way through a file; a killed process cleans nothing up."""
    save_file, write_text, rmtree, dead = checkpoint.save_file, Path.write_text, shutil.rmtree, []

    def fail():
        dead.append(kind is Killed)
        raise kind("No space left on device")

    patch.setattr(shutil, "rmtree", lambda *a, **k: None if any(dead) else rmtree(*a, **k))

    def broken_save(tensors, path, **options):
        save_file(tensors, path, **options)
        if Path(path).name == moment:
            data = Path(path).read_bytes()
            Path(path).write_bytes(data[: len(data) // 2])
            fail()

    def broken_write(path, text, **options):
        if path.name == moment:
            write_text(path, text[: len(text) // 2], **options)
            fail()
        return write_text(path, text, **options)

    patch.setattr(checkpoint, "save_file", broken_save)
    patch.setattr(Path, "write_text", broken_write)
    if moment == "rename":
        patch.setattr(checkpoint.os, "rename", lambda *_: fail())


KILL_FLAGS = ("--steps", 14, "--checkpoint-every", 1, "--ema", 0.8)


def start_training(folder: Path, resume: bool) -> subprocess.Popen:
    command = [sys.executable, str(helpers.ROOT / "train.py"), *helpers.photo_flags(Path("run"), *KILL_FLAGS)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        command + ["--resume"] * resume,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def newest(folder: Path) -> int:
    """The step of the last whole checkpoint; 0 if there is none."""
    return max([0, *(int(p.name.removeprefix("step-")) for p in list_checkpoints(folder / "run"))])


def kill_at_a_random_moment(folder: Path, rng: random.Random) -> None:
    """Start or resume training in a process of its own, and kill it a few checkpoints and moments later."""
    wanted = newest(folder) + rng.randint(1, 3)
    process = start_training(folder, resume=newest(folder) > 0)
    try:
        for _ in range(10_000):
            if process.poll() is not None or newest(folder) >= wanted:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
    finally:
        process.kill()  # SIGKILL; nothing if it has ended already
        error = process.communicate()[1].decode()
    assert process.returncode in (-signal.SIGKILL, 0), error


def check_kills(folder: Path, kills: int, seed: int) -> None:
    rng, steps = random.Random(seed), [0]
    for _ in range(kills):
        kill_at_a_random_moment(folder, rng)
        steps.append(newest(folder))
        assert steps[-1] > steps[-2]
        assert load_trained(folder / "run").info["step"] == steps[-1]
        if steps[-1] == 14:
            break
    assert 0 < steps[1] < 14, "the first kill came too early or too late to show anything"
    helpers.good(train, *helpers.photo_flags(Path("run"), *KILL_FLAGS, "--resume"), folder=folder)
    helpers.good(train, *helpers.photo_flags(Path("whole"), *KILL_FLAGS), folder=folder)
    for name in ("model", "ema", "optimizer", "latents"):
        file = f"step-000014/{name}.safetensors"
        assert (folder / "run" / file).read_bytes() == (folder / "whole" / file).read_bytes(), file
    assert metrics_without_clocks(folder / "run") == metrics_without_clocks(folder / "whole")
    assert [p.name for p in list_checkpoints(folder / "run")] == ["step-000014"]


def test_a_run_killed_by_the_system_at_a_random_moment_ends_as_if_it_had_not_been(tmp_path):
    check_kills(tmp_path, kills=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_twenty_kills_end_as_if_there_had_been_none(tmp_path, seed):
    check_kills(tmp_path, kills=2, seed=100 + seed)


# ---- numbers that are none ----


def test_a_loss_that_is_no_number_stops_the_run_with_the_step_and_a_hint(tmp_path, monkeypatch):
    real = train.losses

    def broken(*args):
        out = real(*args)
        return out if next_is_good() else {**out, "ddpm_loss": out["ddpm_loss"] * math.nan}

    calls = iter([True, True, False])
    next_is_good = lambda: next(calls)  # noqa: E731
    monkeypatch.setattr(train, "losses", broken)
    flags = helpers.photo_flags(Path("run"), "--steps", 5, "--checkpoint-every", 1)
    result = helpers.call(train, *flags, folder=tmp_path)
    assert result.status == 2
    assert "the loss is nan at step 3" in result.err and "--lr" in result.err
    assert last(tmp_path / "run").name == "step-000002"
    assert all(x.isfinite().all() for x in load_trained(tmp_path / "run").model.parameters())


def test_a_gradient_that_is_no_number_never_reaches_the_weights(make_run):
    run = make_run()
    run.model.unet_up.conv_out.weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(ValueError, match="step 1"):
        run.train_step()
    assert all(p.isfinite().all() for p in run.model.parameters())


# ---- what is written ----


def test_metrics_have_their_fields_and_are_numbers():
    lines = [json.loads(x) for x in (helpers.shapes_run() / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [1, 2, 3]
    fields = ("loss", "lm_loss", "ddpm_loss", "lr", "images_per_second", "seconds")
    for m in lines:
        assert all(isinstance(m[f], float) and math.isfinite(m[f]) for f in fields), m
        assert m["loss"] == pytest.approx(m["lm_loss"] + 5 * m["ddpm_loss"], rel=1e-4)
        assert m["images_per_second"] > 0
    assert [m["lr"] for m in lines] == pytest.approx([1e-3, 1e-3, (1e-3 + 3e-5) / 2])
    assert lines[0]["seconds"] <= lines[1]["seconds"] <= lines[2]["seconds"]
    val = lines[-1]["val"]
    assert val["t"] == [100, 300, 500, 700, 900] and len(val["right"]) == len(val["permuted"]) == 5


def test_a_logged_line_is_the_mean_of_the_steps_since_the_last(tmp_path):
    lines = []
    for name, every in (("each", 1), ("pairs", 2)):
        flags = helpers.photo_flags(Path(name), "--steps", 4, "--log-every", every)
        helpers.good(train, *flags, folder=tmp_path)
        lines.append(read_metrics(tmp_path / name / "metrics.jsonl"))
    each, pairs = lines
    assert [m["step"] for m in pairs] == [2, 4]
    for field in ("loss", "ddpm_loss"):
        means = [(each[i][field] + each[i + 1][field]) / 2 for i in (0, 2)]
        assert [m[field] for m in pairs] == pytest.approx(means)


def test_a_run_whose_captions_all_come_first_logs_no_lm_loss_and_still_draws_its_curves(tmp_path):
    flags = helpers.photo_flags(Path("run"), "--steps", 2, "--caption-first", 1)
    helpers.good(train, *flags, folder=tmp_path)
    assert [m["lm_loss"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [None, None]
    Image.open(tmp_path / "run" / "curves.png").verify()


def test_sheets_and_curves_are_pictures_of_more_than_one_colour(tmp_path):
    flags = helpers.photo_flags(Path("run"), "--steps", 2, "--sheet-every", 1)
    helpers.good(train, *flags, folder=tmp_path)
    names = sorted(p.name for p in (tmp_path / "run").glob("*.png"))
    assert names == ["curves.png", "sheet-000001.png", "sheet-000002.png"]
    for name in names:
        with Image.open(tmp_path / "run" / name) as image:
            assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 10
            image.load()


def test_validation_tells_the_right_caption_from_a_permuted_one_and_repeats_itself(make_run):
    run = make_run(perturb=0.3)
    report = run.validate()
    assert report == run.validate()
    assert all(abs(a - b) > 1e-6 for a, b in zip(report["right"], report["permuted"], strict=True))
    assert all(p.grad is None for p in run.model.parameters())


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
    again = make_run("--steps", 2, "--val-every", 1, "--sheet-every", 0, "--out", run.out / "unwatched")
    again.out.mkdir()
    train.train(again)
    assert not any("watched" in m for m in read_metrics(again.out / "metrics.jsonl"))


def test_a_sheet_and_a_validation_leave_no_trace_in_the_training(make_run):
    first, second = make_run("--ema", 0.5), make_run("--ema", 0.5)
    first.out.mkdir()
    for run in (first, second):
        run.train_step()
        if run is first:
            run.validate()
            run.draw_sheet()
    assert first.train_step() == second.train_step()
    assert all(torch.equal(p, second.trained[n]) for n, p in first.trained.items())
    assert all(torch.equal(p, second.average[n]) for n, p in first.average.items())


def test_a_caption_longer_than_the_context_does_not_end_the_run(tmp_path):
    photos = helpers.write_photos(tmp_path / "photos", n=10)
    for path in photos.glob("*.txt"):
        if path.name > "002":
            path.write_text("a photo of a red circle " * 40)
    flags = helpers.photo_flags(Path("run"), "--data", photos, "--steps", 2, "--caption-drop", 0)
    helpers.good(train, *flags, folder=tmp_path)
    assert (tmp_path / "run" / "sheet-000002.png").is_file()


def test_training_on_a_folder_of_pictures_sets_some_aside(make_run):
    run = make_run()
    train_names, val_names = set(run.source.train.names), set(run.source.val.names)
    assert len(train_names) == 22 and len(val_names) == 2 and not train_names & val_names
    held_out = [run.tokenise(c) for c in run.source.val.captions]
    assert sorted(run.validation["ids"]) == sorted(held_out)
    seen, tokenise = [], run.tokenise
    run.tokenise = lambda caption: seen.append(caption) or tokenise(caption)
    take_steps(run, 6)
    assert len(seen) == 36 and set(seen) <= set(run.source.train.captions)


def test_only_the_last_checkpoint_is_kept_and_the_last_small_run_is_remembered(tmp_path):
    flags = helpers.photo_flags(Path("some/run"), "--steps", 3, "--checkpoint-every", 1)
    helpers.good(train, *flags, folder=tmp_path)
    assert [p.name for p in list_checkpoints(tmp_path / "some/run")] == ["step-000003"]
    assert (tmp_path / "runs" / "last-small").read_text() == "some/run\n"


def test_the_base_is_pretrained_once_and_again_for_another_seed_or_recipe(tmp_path, monkeypatch):
    made, steps = [], train.pretrain.STEPS
    monkeypatch.setattr(
        train.pretrain, "pretrain_base", lambda folder, *how: made.append(how) or folder.mkdir(parents=True)
    )
    with helpers.inside(tmp_path):
        folders = [train.ensure_base(seed) for seed in (0, 0, 1)]
        assert made == [(0, steps), (1, steps)] and folders[0] == folders[1] != folders[2]
        monkeypatch.setattr(train.pretrain, "RECIPE", train.pretrain.RECIPE + 1)
        folders.append(train.ensure_base(0))
        folders += [ablate.ensure_lab_base(ablate.Plan()) for _ in range(2)]
        assert train.ensure_base(0) == folders[3]
    assert made[2:] == [(0, steps), (0, 2600)] and len(set(folders)) == 4  # the lab's base is another


# ---- flags ----


def test_every_field_of_the_configuration_is_a_flag(tmp_path):
    first = tmp_path / "first"
    values = dict(
        zip(
            "base data val_data device out vae init_from task text_data stages".split(),
            ("b", "d", "v", "meta", str(tmp_path), "w", str(first), "edit", "t", "0:*"),
            strict=True,
        ),
        dtype="bfloat16",
        separation="shallow",
        unet_channels=(6, 10),
        unet_attention=True,
        patch_positions=False,
        prediction="eps",
        loss_weighting="none",
        optimizer="adamw",
        image_size=48,
        latent_patch=8,
    )
    for i, (name, value) in enumerate(vars(train.CONFIGS["small"]).items()):
        if name not in values and isinstance(value, bool):
            values[name] = not value
        elif name not in values:
            values[name] = value + 1 + i if isinstance(value, int) else min(value / 2 + 0.125, 0.75)
    flags = ["--config", "small"]
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flags += ["--" + name.replace("_", "-"), text]
    first.mkdir()  # what the first stage was and what is asked for are the same
    (first / "checkpoint.json").write_text(json.dumps({"config": values}))
    config = train.parse(flags)[0]
    assert vars(config) == values
    assert all(value != getattr(train.CONFIGS["small"], name) for name, value in values.items())
