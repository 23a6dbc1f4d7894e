"""train.py: the losses, packing, who is trained and how fast, stages, and what a step draws."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import signal
import threading
from pathlib import Path

import helpers
import pytest
import runs
import torch
import torch.nn.functional as F
from runs import (
    EDITS,
    FIXTURES,
    SHAPES,
    TASKS,
    batch_of,
    change,
    changed,
    copies,
    documents_that,
    draw_batch,
    run_losses,
    take_steps,
)
from tokenizers import Tokenizer, models
from torch import Tensor

import data
import train
from attention import IMAGE, Tokens
from checkpoint import load_trained, read_metrics, save_run
from config import lr_factor
from data import (
    CAPTION_DROPPED,
    CAPTION_FIRST,
    IMAGE_FIRST,
    Ahead,
    Batch,
    Document,
    Documents,
    caption_document,
    collate,
    next_tokens,
)
from evaluate import text_report
from load_qwen3 import encode_plain, load_qwen3
from model import LMFusion
from scale.parallel import Team
from scale.sources import LatentSource, PictureSource
from small import pretrain, shapes
from train import Run, count_targets, losses, total_loss

OPTIMIZERS = pytest.mark.parametrize("optimizer", ("adamw", "muon"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs leave their name in runs/last-small: below the test's folder, not in the user's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make_run(tmp_path):
    """make_run(*flags) -> a Run on the tiny photos, all parameters perturbed unless told otherwise."""
    return functools.partial(runs.new_run, tmp_path)


def rows_of(batch: Batch) -> list[list[int]]:
    """The sequences of a batch, each patch as one IMAGE."""
    parts = batch.prefix, batch.rest
    return [[i for t in parts for i in t.ids[r].tolist() if i >= IMAGE] for r in range(len(batch.rest.ids))]


# ---- the loss ----


@pytest.mark.parametrize("factor", (0.0, 1.0, 5.0))
def test_the_loss_is_lm_plus_lambda_times_ddpm_and_the_draw_loss_is_trained_beside_it(make_run, factor):
    run = make_run("--lambda-ddpm", factor)
    parts = run_losses(run, draw_batch(run))
    lm, ddpm, draw = (parts[k] for k in ("lm_loss", "ddpm_loss", "draw_loss"))
    assert min(lm, ddpm, draw) > 0
    assert torch.allclose(total_loss(parts, run.config), lm + factor * ddpm + draw)
    result = run.train_step()
    assert result["loss"] == pytest.approx(result["lm_loss"] + factor * result["ddpm_loss"])


@pytest.mark.parametrize("frozen", (True, False), ids=("frozen text", "trained text"))
def test_logits_made_for_some_words_at_a_time_change_no_loss_and_no_gradient(make_model, monkeypatch, frozen):
    model, config, found, rows = make_model(), train.TrainConfig(), [], []
    model.freeze_text(frozen)
    batch, logits = pack_rows(model, 0), model.logits
    monkeypatch.setattr(model, "logits", lambda h: rows.append(len(h)) or logits(h))
    for at_once in (10**9, 20, 1):
        monkeypatch.setattr(train, "LOGITS", at_once * model.config.vocab_size)
        rows.clear()
        out = losses(model, batch, config)
        total_loss(out, config).backward()
        found.append((out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
        n = count_targets(model, batch, config)["lm_loss"]
        once = [min(at_once, n - i) for i in range(0, n, at_once)]
        assert 20 < n == sum(once) and sorted(rows) == sorted(once * (1 + (at_once < n)))
    (whole, gradient), *others = found
    assert ("embed_tokens.weight" in gradient) != frozen
    for out, other in others:
        assert other.keys() == gradient.keys() and out.keys() == whole.keys()
        assert all(torch.allclose(out[k], x, rtol=1e-6, atol=0) for k, x in whole.items())
        for name, x in gradient.items():
            assert (other[name] - x).abs().max() <= 2e-6 * x.abs().max(), name


@pytest.mark.parametrize("weighting", ("none", "v"))
def test_the_diffusion_loss_is_the_mean_squared_error_of_the_noise(make_run, monkeypatch, weighting):
    run = make_run("--loss-weighting", weighting, "--prediction", "eps")
    batch, seen = draw_batch(run), {}
    diffusion, up = run.config.diffusion, run.model.unet_up.forward
    noising = diffusion.q_sample
    monkeypatch.setattr(
        diffusion, "q_sample", lambda x, t, eps: seen.update(t=t, eps=eps) or noising(x, t, eps)
    )
    monkeypatch.setattr(run.model.unet_up, "forward", lambda *a: seen.setdefault("out", up(*a)))
    got = run_losses(run, batch)["ddpm_loss"]
    each = (seen["out"] - seen["eps"]).square().mean((1, 2, 3))
    if weighting == "v":
        each = each / diffusion.alpha_bar[seen["t"]].float()
    assert torch.allclose(got, each.mean()) and torch.equal(seen["eps"], batch.eps)
    assert abs(seen["eps"].std() - 1) < 0.05 and abs(seen["eps"].mean()) < 0.05


def test_timesteps_are_uniform_below_the_limit_of_each_picture(make_run, monkeypatch):
    run, below = make_run("--noise-limit", 300), {300: [], 1000: []}
    for seed in range(20):
        batch, seen = draw_batch(run, n=100, seed=seed), []
        monkeypatch.setattr(run.config.diffusion, "q_sample", lambda x, t, eps, to=seen: to.append(t) or x)
        run_losses(run, batch)
        for t, limit in zip(seen[0].tolist(), batch.max_t.tolist(), strict=True):
            below[limit].append(t)
    for limit, ts in below.items():
        assert 0 <= min(ts) < 0.05 * limit and 0.95 * limit < max(ts) < limit
        assert abs(sum(ts) / len(ts) / limit - 0.5) < 4 / math.sqrt(12 * len(ts))
    assert {type(t) for ts in below.values() for t in ts} == {int}


def test_one_t_a_picture_goes_to_the_noising_and_to_both_halves_of_the_unet(make_run, monkeypatch):
    run = make_run()
    batch, seen, q_sample = draw_batch(run), {}, run.config.diffusion.q_sample

    def noising(x, t, eps):
        seen["noising"], seen["x_t"] = t, q_sample(x, t, eps)
        return seen["x_t"]

    monkeypatch.setattr(run.config.diffusion, "q_sample", noising)
    run.model.unet_down.register_forward_pre_hook(lambda m, a: seen.update(x=a[0], down=a[1]))
    run.model.unet_up.register_forward_pre_hook(lambda m, a: seen.update(up=a[1]))
    run_losses(run, batch)
    assert torch.equal(seen["x"], seen["x_t"])
    assert torch.equal(seen["noising"], seen["down"]) and torch.equal(seen["noising"], seen["up"])
    assert len(set(seen["noising"].tolist())) > 10 and seen["noising"].shape == (16,)


def test_there_is_no_lm_loss_where_no_text_stands_behind_a_picture(make_run):
    run = make_run("--caption-first", 1)
    parts = run_losses(run, draw_batch(run))
    assert "lm_loss" not in parts
    assert torch.allclose(total_loss(parts, run.config), 5 * parts["ddpm_loss"] + parts["draw_loss"])


def test_the_draw_loss_trains_the_boi_row_alone(make_run):
    run = make_run()
    parts = run_losses(run, draw_batch(run))
    draw = parts.pop("draw_loss")
    total_loss(parts, run.config).backward()
    assert run.model.boi_head.grad is None
    run.model.zero_grad(set_to_none=True)
    draw.backward()
    assert [n for n, p in run.model.named_parameters() if p.grad is not None] == ["boi_head"]
    assert run.model.boi_head.grad.abs().min() > 0


def to_be_said(run: Run, ids: list[int]) -> list[bool]:
    """Of each id, whether it is the model's: an assistant's turn from its name to its end, or a caption.

    Where captions and pictures are all that is trained, a caption before its picture as well.
    """
    tokenizer = run.documents.tokenizer
    start, end, assistant = map(tokenizer.token_to_id, ("<|im_start|>", "<|im_end|>", "assistant"))
    if not run.config.task:
        return [True] * len(ids)
    own = [start not in ids and ids[-1] == run.model.config.eos_id and i > 2 for i in range(len(ids))]
    for i in (i for i, token in enumerate(ids) if token == start):
        if ids[i + 1] == assistant:
            length = ids[i:].index(end) + 1 if end in ids[i:] else len(ids[i:])
            own[i + 1 : i + length] = [True] * (length - 1)
    return own


def reference_losses(run: Run, documents: list[Document], x_t, t, noise, everything: bool) -> tuple:
    """All losses by a loop: each document alone, in one phase; what is learned read off its ids.

    everything: the words before a picture too. Returns the losses, and over how many things they are means.
    """
    model, boi, diffusion = run.model, run.model.config.boi_id, run.config.diffusion
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
                    predicted = diffusion.eps_from_output(output[j - here.start][None], x_t[one], t[one])
                    errors.append(diffusion.loss(predicted, noise[one], t[one], run.config.loss_weighting))
                else:
                    assert t[j] == 0  # clean
    parts = dict(zip(train.PARTS, (errors, words, draws), strict=True))
    return {k: torch.stack(v).mean() for k, v in parts.items()}, {k: len(v) for k, v in parts.items()}


DATA = {"captions": (), "shapes": ("--task", TASKS, *SHAPES), "pictures": ("--task", TASKS, *EDITS)}


@pytest.mark.parametrize("ratio", (0, 0.1))
@pytest.mark.parametrize("flags", DATA.values(), ids=DATA)
def test_the_losses_are_those_of_a_loop_over_the_documents(make_run, monkeypatch, ratio, flags):
    run, seen = make_run("--batch-size", 24, "--caption-first", 0.6, *flags, "--lr-text-ratio", ratio), {}
    forward = run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda *a: seen.update(x_t=a[2], t=a[3]) or forward(*a))
    documents, (batch,) = run.documents.of_step(0, slice(24)), run.batches()
    out, x_t, t = run_losses(run, batch), seen["x_t"], seen["t"]
    clean, others = ((batch.max_t == 0).nonzero().squeeze(1), (batch.max_t > 0).nonzero().squeeze(1))
    assert torch.equal(x_t[clean], batch.latents[clean]) and (len(clean) > 3) == bool(flags)
    wanted = run.config.diffusion.q_sample(batch.latents, (batch.u * batch.max_t).long(), batch.eps)
    assert torch.equal(x_t[others], wanted[others])
    parts, counts = reference_losses(run, documents, x_t, t, batch.eps, ratio > 0)
    assert counts == count_targets(run.model, batch, run.config) and min(counts.values()) > 3
    assert out.keys() == parts.keys()
    for name, value in parts.items():
        assert torch.allclose(out[name], value, rtol=2e-4), name
    other = reference_losses(run, documents, x_t, t, batch.eps, ratio == 0)[0]["lm_loss"]
    assert not torch.allclose(out["lm_loss"], other, rtol=4e-4)  # the other mean is another number


@pytest.mark.parametrize("task", ("edit", "chat"))
def test_a_clean_picture_has_no_noise_and_no_loss_of_its_own_but_is_seen(make_run, task):
    run = make_run("--task", task, *SHAPES)
    both = [0, 1000] if task == "edit" else [0] * 2 + [1000]
    batch = batch_of(run, documents_that(run, lambda d: d.max_t[-2:] == both[-2:], n=4))
    clean = batch.max_t == 0

    def with_(where: Tensor, noise_by: float = 0.0, pixels_by: float = 0.0) -> dict[str, float]:
        keep = where[:, None, None, None]
        u, eps = torch.where(where, (batch.u + noise_by) % 1, batch.u), batch.eps + noise_by * keep
        other = dataclasses.replace(batch, latents=batch.latents + pixels_by * keep, u=u, eps=eps)
        return {k: x.item() for k, x in run_losses(run, other).items() if k != "draw_loss"}

    assert 0 < clean.sum() < len(clean)
    plain = with_(clean)
    assert with_(clean, noise_by=0.3) == plain
    assert with_(~clean, noise_by=0.3)["ddpm_loss"] != pytest.approx(plain["ddpm_loss"], rel=1e-3)
    assert with_(clean, pixels_by=0.3)["ddpm_loss"] != pytest.approx(plain["ddpm_loss"], rel=1e-4)


def gradients(run: Run, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The losses of a batch, and the largest gradient of every trained tensor; each must have one."""
    out = run_losses(run, batch)
    total_loss(out, run.config).backward()
    assert all(p.grad is not None for p in run.trained.values())
    return out, {n: p.grad.abs().max().item() for n, p in run.trained.items()}


def test_clean_pictures_alone_have_no_diffusion_loss_and_the_text_behind_them_trains_the_experts(make_run):
    run = make_run("--task", "chat", *SHAPES)
    batch = batch_of(run, documents_that(run, lambda d: d.pictures and not any(d.max_t)))
    out, largest = gradients(run, batch)
    assert out["ddpm_loss"] == 0 < out["lm_loss"]
    assert count_targets(run.model, batch, run.config)["ddpm_loss"] == 0
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
    assert out["ddpm_loss"] == 0 < out["draw_loss"] and "lm_loss" not in out
    assert [n for n, x in largest.items() if x > 0] == ["boi_head"]
    counts = count_targets(run.model, batch, run.config)
    assert counts["ddpm_loss"] == counts["lm_loss"] == 0 < counts["draw_loss"]


def test_a_step_without_a_noisy_picture_is_taken_and_logged(tmp_path, monkeypatch):
    real = Documents.draw

    def clean(documents: Documents, rng: random.Random) -> Document:
        while any((document := real(documents, rng)).max_t):
            pass
        return document

    monkeypatch.setattr(Documents, "draw", clean)
    flags = ("--task", "chat", "--steps", 2, "--batch-size", 2, "--sheet-every", 0, *EDITS)
    helpers.good(train, *helpers.photo_flags(Path("run"), *flags), folder=tmp_path)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["ddpm_loss"] for m in lines] == [None, None]
    assert all(m["loss"] == m["lm_loss"] > 0 for m in lines)


def test_the_words_of_others_carry_no_loss_and_no_decision(make_run):
    run = make_run("--task", "chat", *SHAPES)
    boi, eoi = run.model.config.boi_id, run.model.config.eoi_id
    for d in documents_that(run, lambda d: d.max_t == [0, 0]):
        batch = batch_of(run, [d])
        counted = [
            (int(w), int(k))
            for t in (batch.prefix, batch.rest)
            for w, k in zip(*next_tokens(t, boi), strict=True)
        ]
        own = to_be_said(run, d.ids)
        words = [i for i, mine in zip(d.ids, own, strict=True) if mine and i >= 0 and i not in (boi, eoi)]
        assert [w for w, _ in counted if w >= 0] == words
        shown = sum(not mine for i, mine in zip(d.ids, own, strict=True) if i == boi)
        assert sum(k == 1 for _, k in counted) == 2 - shown


# ---- numbers that are none ----


def test_a_loss_that_is_no_number_stops_the_run_with_the_step_and_a_hint(tmp_path, monkeypatch):
    calls, real = [], train.losses  # the first call is for the FLOPs of a step

    def broken(*args):
        calls.append(real(*args))
        return calls[-1] if len(calls) < 4 else {**calls[-1], "ddpm_loss": calls[-1]["ddpm_loss"] * math.nan}

    monkeypatch.setattr(train, "losses", broken)
    flags = helpers.photo_flags(Path("run"), "--steps", 5, "--checkpoint-every", 1)
    result = helpers.call(train, *flags, folder=tmp_path)
    assert result.status == 2
    assert "the loss is nan at step 3" in result.err and "--lr" in result.err
    assert runs.last(tmp_path / "run").name == "step-000002"
    assert all(x.isfinite().all() for x in load_trained(tmp_path / "run").model.parameters())


def test_a_gradient_that_is_no_number_never_reaches_the_weights(make_run):
    run = make_run()
    run.model.unet_up.conv_out.weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(ValueError, match="norm of the gradient is nan at step 1"):
        run.train_step()
    assert all(p.isfinite().all() for p in run.model.parameters())


# ---- packing ----


def pack_rows(model: LMFusion, pack: int, dtype: torch.dtype = torch.float32) -> Batch:
    """The same 14 documents of 3 to 24 text tokens and an image, in rows of up to `pack` tokens."""
    rng, generator, c = random.Random(0), torch.Generator().manual_seed(0), model.config
    latents = torch.randn(14, c.latent_channels, c.latent_size, c.latent_size, generator=generator).to(dtype)
    documents = []
    for number in range(14):
        caption = [rng.randint(4, 63) for _ in range(rng.randint(0, 20))]
        order = rng.choices((CAPTION_FIRST, CAPTION_DROPPED, IMAGE_FIRST), (5, 1, 4))[0]
        documents.append(caption_document(None, caption, order, c, noise_limit=300))
        documents[-1].seed = number
    assert {len(d.ids) for d in documents} >= {2} and {d.max_t[0] for d in documents} == {300, 1000}
    return collate(documents, latents, c, pack)


@pytest.mark.parametrize("frozen", (True, False), ids=("frozen text", "trained text"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("dense", (2**19, 0), ids=("dense", "segments"))
def test_packing_changes_no_loss_and_no_gradient(make_model, monkeypatch, frozen, dtype, dense):
    """One document a row, each longer than `pack` or without packing; one or two; up to five; all in one."""
    model, config = make_model(dtype=dtype), train.TrainConfig()
    model.freeze_text(frozen)
    found = {}
    for pack in (0, 1, 60, 150, 10**6):
        monkeypatch.setattr("attention.DENSE", 2**19 if pack == 0 else dense)
        batch = pack_rows(model, pack, dtype)
        out = losses(model, batch, config)
        assert set(out) == set(train.PARTS)
        total_loss(out, config).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        found[pack] = len(batch.rest.ids), count_targets(model, batch, config), out, gradient
    rows = [rows for rows, *_ in found.values()]
    assert rows[:2] == [14, 14] and 14 > rows[2] > rows[3] > 1 == rows[4]
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
    assert len(packed.batches()[0].rest.ids) < len(plain.batches()[0].rest.ids) == 6
    for _ in range(2):
        assert packed.train_step() == pytest.approx(plain.train_step(), rel=1e-4)


# ---- who is trained ----

KINDS = {
    "adamw": ("--optimizer", "adamw"),
    "muon": ("--optimizer", "muon"),
    "tasks": ("--task", TASKS, *SHAPES),
    "llama3_rope": ("--base", FIXTURES / "llama3_rope", "--pack", 60),
    "qwen2_biases": ("--base", FIXTURES / "qwen2_biases", "--pack", 60),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_every_image_tensor_and_no_bit_of_the_text(make_run, kind):
    run = make_run(*KINDS[kind], "--weight-decay", 0, "--warmup", 0)
    ids = torch.randint(288, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = run.model.text_logits(ids)
    before = copies(run.model)
    take_steps(run)
    assert changed(before, run.model) == set(run.model.image_parameters())
    assert ("layers.0.image.self_attn.q_proj.bias" in before) == (kind == "qwen2_biases")
    if kind in ("adamw", "muon", "tasks"):
        assert len(run.model.text_parameters()) == 2 + 11 * 2
    with torch.no_grad():
        assert torch.equal(run.model.text_logits(ids), logits)


def test_a_whole_command_leaves_the_text_as_the_base_has_it():
    trained, base = load_trained(helpers.shapes_run()), load_qwen3(helpers.base())
    for name, p in base.text_parameters().items():
        assert torch.equal(p, trained.model.text_parameters()[name]), name
    fresh = dict(base.named_parameters())  # image experts start as copies of the text's
    own = {n: p for n, p in trained.model.image_parameters().items() if n.startswith("layers.")}
    assert own and all(not torch.equal(p, fresh[n]) for n, p in own.items())


@OPTIMIZERS
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


def groups_of(run: Run) -> dict[str, dict]:
    """The optimizer's group of every trained parameter."""
    names = {id(p): n for n, p in run.model.named_parameters()}
    groups = [g for o in run.optimizers for g in o.param_groups]
    assert sum(len(g["params"]) for g in groups) == len(run.trained)
    return {names[id(p)]: g for g in groups for p in g["params"]}


@OPTIMIZERS
def test_the_text_trains_at_its_own_rate_and_its_final_norm_never(make_run, optimizer):
    run = make_run("--optimizer", optimizer, "--lr-text-ratio", 0.1, "--weight-decay", 0, "--warmup", 0)
    before, groups = copies(run.model), groups_of(run)
    assert set(groups) == set(before) - {"norm_text.weight"}
    for name, group in groups.items():
        matrix = optimizer == "muon" and name.startswith("layers.") and name.endswith("proj.weight")
        ratio = 0.1 if name in run.model.text_parameters() else 1.0
        wanted = ratio * (run.config.muon_lr if matrix else run.config.lr)
        assert group["peak"] == pytest.approx(wanted), name
    take_steps(run)
    assert changed(before, run.model) == set(groups)


@OPTIMIZERS
def test_weight_decay_is_on_matrices_only_and_the_rate_is_the_peak_times_the_schedule(make_run, optimizer):
    flags = ("--optimizer", optimizer, "--weight-decay", 0.07, "--warmup", 3, "--steps", 10)
    run = make_run(*flags, "--lr-text-ratio", 0.5)
    for name, group in groups_of(run).items():
        assert group["weight_decay"] == (0.07 if run.trained[name].dim() > 1 else 0.0)
    for step in range(5):
        run.train_step()
        for group in groups_of(run).values():
            assert group["lr"] == pytest.approx(group["peak"] * lr_factor(step, run.config))


@OPTIMIZERS
def test_the_row_that_decides_when_to_draw_has_a_rate_of_its_own(make_run, optimizer):
    plain, other = (
        {n: (g["peak"], g["weight_decay"]) for n, g in groups_of(run).items()}
        for run in (make_run("--optimizer", optimizer, "--draw-lr-ratio", ratio) for ratio in (1, 7))
    )
    assert plain.keys() == other.keys() and {n for n in plain if plain[n] != other[n]} == {"boi_head"}
    assert plain["boi_head"] == (1e-3, 0) and other["boi_head"] == pytest.approx((7e-3, 0))


@pytest.mark.parametrize("separation", ("deep", "shallow", "none"))
def test_every_separation_trains_only_what_it_should_under_frozen_text(make_run, separation):
    run = make_run("--separation", separation, "--weight-decay", 0, "--warmup", 0)
    before = copies(run.model)
    take_steps(run)
    unet = {n for n in before if n.startswith(("unet_down.", "unet_up."))} | {"boi_head"}
    ffn = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
    projections = tuple(f"self_attn.{x}_proj" for x in "qkvo")
    attention = ("input_layernorm", *projections, "self_attn.q_norm", "self_attn.k_norm")
    own = {"deep": attention + ffn, "shallow": ffn, "none": ()}[separation]
    image = {f"layers.{i}.image.{n}.weight" for i in range(2) for n in own}
    final = set() if separation == "none" else {"norm_image.weight"}
    assert changed(before, run.model) == unet | image | final == set(run.trained)


def test_weights_are_averaged_with_a_decay_that_grows_to_the_one_asked_for(make_run):
    run = make_run("--ema", 0.25)
    wanted = {n: p.detach().double().clone() for n, p in run.trained.items()}
    run.ema = {n: p.detach().clone() for n, p in run.trained.items()}  # `make_run` perturbed the model
    for step in range(1, 7):
        run.train_step()
        decay = min(0.25, step / (step + 10))
        wanted = {n: decay * x + (1 - decay) * run.trained[n].detach().double() for n, x in wanted.items()}
        assert all(torch.allclose(x.double(), wanted[n], atol=1e-5) for n, x in run.ema.items()), step
    assert all(not torch.equal(x, run.trained[n]) for n, x in run.ema.items())


@OPTIMIZERS
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
        before = copies(run.model)
        run.train_step()
        assert changed(before, run.model) == wanted
        with_gradient, norm, reported = norms.pop()
        assert with_gradient == wanted and torch.allclose(norm, reported)


def test_a_pattern_that_fits_no_trained_parameter_names_some_that_are_there(make_run):
    for pattern in ("unet.*", "layers.0.text.*"):  # the latter is there, and frozen
        with pytest.raises(ValueError, match="fits no trained parameter; some are ") as error:
            make_run("--stages", f"0:*;3:unet_*,{pattern}")
        start, _, named = str(error.value).partition("some are ")
        assert start.startswith(f"--stages: {pattern} fits no ")
        assert 3 <= len(named.split(", ")) <= 5 and set(named.split(", ")) < set(make_run().trained)
    run = make_run("--stages", "0:layers.0.text.*", "--lr-text-ratio", 0.1)
    assert run.stages == [(0, {n for n in run.trained if n.startswith("layers.0.text.")})]


def test_the_learning_rate_warms_up_then_falls_along_a_cosine(tmp_path):
    config = helpers.photo_config(tmp_path, "--warmup", 10, "--steps", 110, "--lr", 1e-3, "--lr-final", 1e-4)
    assert [lr_factor(s, config) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    for s in range(10, 111):
        closed = 0.1 + 0.9 * math.cos(math.pi / 2 * (s - 10) / 100) ** 2
        assert lr_factor(s, config) == pytest.approx(closed)
    assert lr_factor(10, config) == 1 and lr_factor(60, config) == pytest.approx(0.55)
    assert config.lr * lr_factor(110, config) == pytest.approx(config.lr_final)
    assert config.lr * lr_factor(10**6, config) == pytest.approx(config.lr_final)


# ---- what a step draws ----


@pytest.mark.parametrize("flags", ((), ("--task", TASKS, *SHAPES)), ids=("captions", "tasks"))
def test_a_step_depends_on_the_seed_and_its_number_only(make_run, flags):
    three = [make_run(*flags), make_run(*flags), make_run(*flags, "--seed", 1)]
    three[1].documents.tokenise("a caption that another step left in the cache")
    torch.manual_seed(123)  # the global generators have no say in it
    random.seed(123)
    results = [run.train_step() for run in three]
    assert results[0] == results[1] != results[2]
    assert three[0].train_step() != results[0]


@pytest.mark.parametrize("task", ("generate", "caption"))
def test_a_task_of_captions_and_pictures_has_its_order_and_its_noise(make_run, task):
    run = make_run("--task", task, "--caption-drop", 0.4, "--batch-size", 30)
    (batch,), config = run.batches(), run.model.config
    rows = rows_of(batch)
    dropped = [row == [config.boi_id] + [IMAGE] * 4 for row in rows]
    if task == "caption":
        assert {tuple(row[:6]) for row in rows} == {(config.boi_id, *[IMAGE] * 4, config.eoi_id)}
        assert {row[-1] for row in rows} == {config.eos_id} and set(batch.max_t.tolist()) == {200}
    else:
        assert {tuple(row[-5:]) for row in rows} == {(config.boi_id, *[IMAGE] * 4)}
        assert 4 < sum(dropped) < 20 and set(batch.max_t.tolist()) == {1000}


def test_a_mixture_draws_its_tasks_in_proportion_and_drops_what_guidance_nulls(make_run, monkeypatch):
    run, drawn = make_run("--task", TASKS, "--edit-drop", 0.3, *SHAPES), []

    def caption(picture, ids, order, *_, learn_caption):
        assert not learn_caption  # beside conversations, these say when to draw
        drawn.append(("caption" if order == IMAGE_FIRST else "generate", order == CAPTION_DROPPED))

    monkeypatch.setattr(data, "caption_document", caption)
    monkeypatch.setattr(data, "edit_document", lambda *a: drawn.append(("edit", a[4])))
    monkeypatch.setattr(data, "chat_document", lambda *a: drawn.append(("chat", a[4])))
    for number in range(900):
        run.documents.draw(random.Random(f"0-0-{number}"))
    for task, share in {"generate": 2 / 12, "caption": 1 / 12, "edit": 3 / 12, "chat": 6 / 12}.items():
        dropped = [d for name, d in drawn if name == task]
        assert abs(len(dropped) - 900 * share) < 4 * (900 * share * (1 - share)) ** 0.5, task
        p, n = {"edit": 0.3, "caption": 0}.get(task, 0.1), len(dropped)
        assert abs(sum(dropped) - p * n) <= 4 * (p * (1 - p) * n) ** 0.5, task


def drawn_by(run: Run) -> list[tuple]:
    """The documents of a step with their latents and noise, in the order of the batches."""
    out = []
    for batch in run.batches():
        u, eps, parts = batch.u, batch.eps, (batch.prefix, batch.rest)
        assert len(batch.rest.ids) == len(batch.prefix.ids) and len(u) == len(eps) == len(batch.latents)
        first = 0
        for r, row in enumerate(rows_of(batch)):
            n = int(batch.rest.image[r].max())
            here = slice(first, first + n)
            own = [m for t in parts for m, i in zip(t.loss_mask[r], t.ids[r], strict=True) if i >= IMAGE]
            pictures = (batch.latents[here], batch.max_t[here], u[here], eps[here])
            out.append((str(row), str(torch.stack(own).tolist()), *(str(x.tolist()) for x in pictures)))
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
        lengths = [len(max(rows_of(batch), key=len)) for batch in run.batches()]
        assert len(lengths) == math.ceil(12 / size) and lengths == sorted(lengths)  # like lengths together
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


def test_a_process_draws_documents_and_noise_for_its_own_share_alone(make_run, monkeypatch):
    run, seeds, drawn = make_run("--batch-size", 12, "--micro-batch", 2), [], []
    noise, draw = data.draw_noise, Documents.draw
    monkeypatch.setattr(data, "draw_noise", lambda shape, seed: seeds.append(seed) or noise(shape, seed))
    monkeypatch.setattr(Documents, "draw", lambda *a: drawn.append(a) or draw(*a))
    run.batches()
    whole = set(seeds)
    shares = []
    for rank in range(3):
        seeds.clear(), drawn.clear()
        run.team = Team(rank, 3)
        run.batches()
        shares.append(set(seeds))
        assert len(seeds) == len(drawn) == len(shares[-1]) == 4
    assert set.union(*shares) == whole and len(whole) == 12


# ---- batches made ahead ----


def test_steps_with_batches_made_ahead_are_the_same_to_the_last_bit(make_run, monkeypatch):
    flags = ("--task", TASKS, "--batch-size", 6, "--micro-batch", 4, *SHAPES)
    plain, ahead = make_run(*flags), make_run(*flags)
    ahead.ahead, made = Ahead(ahead.batches), []
    of_step = Documents.of_step
    monkeypatch.setattr(
        Documents, "of_step", lambda d, *a: made.append((a[0], threading.get_ident())) or of_step(d, *a)
    )
    for step in (0, 1, 2, 7, 8):  # a resumed run begins anywhere
        plain.step = ahead.step = step
        assert plain.train_step() == ahead.train_step()
    assert all(torch.equal(p, ahead.trained[n]) for n, p in plain.trained.items())
    ahead.ahead.future.result()
    here = [step for step, thread in made if thread == threading.get_ident()]
    beside = [step for step, thread in made if thread != threading.get_ident()]
    assert here == [0, 1, 2, 7, 8] and beside == [0, 1, 2, 3, 7, 8, 9]  # each once, and one too many twice


def test_the_next_batch_is_begun_before_the_step_is_taken_and_its_error_comes_with_its_own_step():
    begun, goes_on = [], threading.Event()

    def make(step: int) -> list[str]:
        begun.append(step)
        if step == 6:
            goes_on.wait()
            raise ValueError("no such picture")
        return [f"batch {step}"]

    ahead = Ahead(make)
    assert ahead.take(4) == ["batch 4"] and ahead.take(5) == ["batch 5"]
    goes_on.set()
    for _ in range(2):  # whoever asks again is told again
        with pytest.raises(ValueError, match="no such picture"):
            ahead.take(6)
    assert begun == [4, 5, 6]


def test_ctrl_c_does_not_wait_for_a_batch_that_does_not_come():
    goes_on, former = threading.Event(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            Ahead(lambda step: goes_on.wait(60)).take(0)
        assert not goes_on.is_set()
    finally:
        signal.signal(signal.SIGINT, former)
        goes_on.set()


def test_an_error_in_a_batch_made_ahead_is_told_like_any_other(tmp_path, monkeypatch):
    init, of_step = Run.__init__, Documents.of_step

    def with_ahead(run: Run, *args: object) -> None:
        init(run, *args)
        run.ahead = Ahead(run.batches)

    def broken(documents: Documents, step: int, share: slice) -> list[Document]:
        if step == 2:
            raise ValueError("shard-00007.safetensors: is gone")
        return of_step(documents, step, share)

    monkeypatch.setattr(Run, "__init__", with_ahead)
    monkeypatch.setattr(Documents, "of_step", broken)
    flags = helpers.photo_flags(Path("run"), "--steps", 4, "--checkpoint-every", 1, "--sheet-every", 0)
    result = helpers.call(train, *flags, folder=tmp_path)
    assert result.status == 2 and result.err == "error: shard-00007.safetensors: is gone\n"
    assert runs.last(tmp_path / "run").name == "step-000002"


# ---- text alone ----

TEXT = ("--lr-text-ratio", 0.5, "--text-batch", 8)
STEPS = {
    "tasks": (("--task", TASKS, "--batch-size", 12, *SHAPES), ((0, 0), (1, 0), (5, 0), (0, 200), (5, 300))),
    "text": (TEXT, ((0, 0), (3, 0), (0, 150))),
}


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_is_the_same_in_micro_batches_and_packed(make_run, kind):
    flags, ways = STEPS[kind]
    run, found = make_run(*flags, "--clip", 1e9), []
    run.optimizers = []  # the gradient stays
    for micro, pack in ways:
        run.config = dataclasses.replace(run.config, micro_batch=micro, pack=pack)
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


@pytest.mark.parametrize("ratio", (0, 0.1))
def test_over_all_words_l_lm_is_the_sum_of_what_learns_divided_by_the_words_of_equation_1(make_run, ratio):
    """In one batch, and in micro batches of which some have words but none to learn."""
    flags = ("--batch-size", 24, "--caption-first", 0.8, "--lr-text-ratio", ratio, "--clip", 1e9)
    run = make_run(*flags)
    run.optimizers = []
    documents, (batch,) = run.documents.of_step(0, slice(24)), run.batches()
    learned, every = (
        sum(
            k + 1 < len(d.ids)
            and i not in (IMAGE, run.model.config.boi_id)
            and d.ids[k + 1] not in (IMAGE, run.model.config.boi_id)
            and (IMAGE in d.ids[:k] or everything)
            for d in documents
            for k, i in enumerate(d.ids)
        )
        for everything in (ratio > 0, True)
    )
    mean = run_losses(run, batch)["lm_loss"].item()
    assert count_targets(run.model, batch, run.config)["lm_loss"] == learned
    run.config = dataclasses.replace(run.config, lm_mean="all")
    assert count_targets(run.model, batch, run.config)["lm_loss"] == every
    wanted = pytest.approx(mean * learned / every, rel=1e-5)
    assert run_losses(run, batch)["lm_loss"].item() == wanted and (every > 2 * learned) == (ratio == 0)
    for micro in (0, 1, 5):
        run.config, run.step = dataclasses.replace(run.config, micro_batch=micro), 0
        found = run.train_step()
        assert found["lm_loss"] == wanted
        assert found["loss"] == pytest.approx(found["lm_loss"] + 5 * found["ddpm_loss"])


def test_over_all_words_a_caption_trains_by_as_much_less_as_there_are_more_words(make_run):
    run = make_run("--lambda-ddpm", 0, "--caption-first", 0.6, "--clip", 1e9)
    run.optimizers, found = [], {}
    for how in ("learned", "all"):
        run.config, run.step = dataclasses.replace(run.config, lm_mean=how), 0
        words = count_targets(run.model, run.batches()[0], run.config)["lm_loss"]
        run.train_step()
        found[how] = words, run.trained["layers.0.image.self_attn.v_proj.weight"].grad.clone()
        run.model.zero_grad()
    (few, whole), (many, part) = found.values()
    assert many > few and (part * many - whole * few).abs().max() < 1e-4 * (whole * few).abs().max()


def text_batches(run: Run) -> list[Batch]:
    """The batches of a step's text alone: those behind its pictures."""
    pictures = run.config.batch_size // run.team.size
    return run.batches()[math.ceil(pictures / (run.config.micro_batch or pictures)) :]


def texts_of(run: Run) -> list[tuple[int, ...]]:
    """The documents of a step's text alone, in the order of its batches, each of which ends in a picture."""
    rows = [r for batch in text_batches(run) for r in batch.prefix.ids.tolist()[:-1]]
    return [tuple(i for i in row if i >= 0) for row in rows]


def same_batch(one: Batch, other: Batch) -> bool:
    """Whether two batches and their noise are the same."""
    one, other = ((b.prefix.ids, b.rest.ids, b.latents, b.max_t, b.u, b.eps) for b in (one, other))
    return all(map(torch.equal, one, other))


def test_text_alone_trains_the_text_and_of_the_image_side_the_boi_row(make_run):
    run = make_run(*TEXT)
    (batch,) = text_batches(run)
    out, largest = gradients(run, batch)
    assert out["ddpm_loss"] == 0 < out["lm_loss"]
    moved = {n for n, x in largest.items() if x > 0}
    assert moved == set(run.model.text_parameters()) - {"norm_text.weight"} | {"boi_head"}


def test_the_lm_loss_of_a_step_is_the_mean_over_the_words_of_captions_and_of_text_alone(make_run):
    run = make_run(*TEXT)
    captions, _ = run.batches()
    out = run_losses(run, captions)
    n, from_captions = count_targets(run.model, captions, run.config)["lm_loss"], out["lm_loss"].item()
    words, texts = [n * from_captions], run.documents.text_of_step(0, slice(8))
    assert n > 0 and len(texts) == 8
    for d in texts:
        with torch.no_grad():
            log_p = run.model.text_logits(torch.tensor([d.ids]))[0].log_softmax(-1)
        learned = [k for k in range(1, len(d.ids)) if d.loss_mask[k]]
        words += [-log_p[k - 1, d.ids[k]].item() for k in learned]
        n += len(learned)
    result = run.train_step()
    assert result["lm_loss"] == pytest.approx(sum(words) / n, rel=1e-4)
    assert result["lm_loss"] != pytest.approx(from_captions, rel=2e-4)
    assert result["ddpm_loss"] == pytest.approx(out["ddpm_loss"].item(), rel=1e-5)


def test_pictures_captions_and_noise_of_a_step_are_the_same_with_and_without_text(make_run):
    run = make_run("--task", TASKS, *SHAPES, *TEXT, "--micro-batch", 4)
    drawn = run.batches()
    change(run, text_batch=0)
    without = run.batches()
    assert len(drawn) == 2 + 2 and len(without) == 2
    assert all(map(same_batch, drawn[:2], without))
    assert not same_batch(drawn[0], drawn[1]) and not same_batch(drawn[1], drawn[2])


def test_a_text_follows_from_the_seed_the_step_and_its_number_alone(make_run):
    run = make_run(*TEXT)
    whole, text = texts_of(run), run.documents.text
    assert len(set(whole)) == 8 and texts_of(run) == whole
    drawn = [text.draw(random.Random(f"text 0-0-{i}"))[0] for i in range(8)]
    for ids, read in zip(drawn, whole, strict=True):  # all of it, or a piece as long as the context
        assert read in [tuple(ids[i : i + 96]) for i in range(0, len(ids), 96)]
    shared = []
    for rank in range(2):
        run.team = Team(rank, 2)
        shared.append(texts_of(run))
    assert [len(x) for x in shared] == [4, 4] and sum(shared, []) == whole
    run.team, run.step = Team(), 1
    assert not set(texts_of(run)) & set(whole)
    run.step = 0
    for size in (1, 3):
        change(run, micro_batch=size)
        assert texts_of(run) == sorted(whole, key=len) and len(text_batches(run)) == math.ceil(8 / size)
    change(run, micro_batch=0, text_batch=16)
    assert texts_of(run)[:8] == whole and len(texts_of(run)) == 16
    change(run, text_batch=8, seed=1)
    assert not set(texts_of(run)) & set(whole)


def test_paragraphs_of_a_file_are_learned_word_by_word_and_cut_to_the_context(make_run, tmp_path):
    paragraphs = ["the grass is green and the sky is blue.", "red and blue " * 60]
    paragraphs += ["a cow says moo,\nand a dog woof."]
    (tmp_path / "text.txt").write_text("\n\n".join([*paragraphs, "too short"]) + "\n")
    run = make_run(*TEXT, "--text-data", tmp_path / "text.txt")
    c, tokenizer = run.model.config, run.documents.tokenizer
    whole = [(*encode_plain(tokenizer, p.strip()), c.eos_id) for p in paragraphs]
    wanted = {ids[i : i + 96] for ids in whole for i in range(0, len(ids), 96)}
    change(run, text_batch=40)
    drawn = run.documents.text_of_step(0, slice(40))
    assert {tuple(d.ids) for d in drawn} == wanted and c.max_position_embeddings == 96
    assert {len(ids) for ids in wanted if ids[-1] != c.eos_id} == {96} and len(wanted) > 3  # one is in pieces
    assert all(d.loss_mask == [True] * len(d.ids) and not d.pictures for d in drawn)
    assert run.train_step()["lm_loss"] > 0 and set(texts_of(run)) <= wanted
    for pack, room in ((40, 40), (150, 96)):
        change(run, pack=pack)
        assert max(len(d.ids) for d in run.documents.text_of_step(0, slice(40))) == room


@pytest.mark.parametrize("flag", ("--batch-size", "--text-batch"))
def test_a_batch_that_processes_cannot_share_is_named(tmp_path, flag):
    config = helpers.photo_config(tmp_path / "run", *TEXT, flag, 7)
    with pytest.raises(ValueError, match=f"{flag} 7 is not a multiple of 2 processes"):
        Run(config, "small", Team(0, 2))


# ---- random text weights ----

SCRATCH = ("--from-scratch", True, "--lr-text-ratio", 1)


def test_random_text_weights_have_nothing_of_the_base(make_run, write_qwen3, tmp_path):
    base = write_qwen3(tmp_path / "base")
    three = [make_run(*SCRATCH, "--base", base, "--seed", seed, perturb=0) for seed in (0, 0, 1)]
    text, again, other = (run.model.text_parameters() for run in three)
    former = load_qwen3(base).text_parameters()
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
    assert three[0].fingerprint == three[2].fingerprint  # the base's: what a checkpoint is loaded on
    image = three[0].model.image_parameters()
    experts = {n: p for n, p in image.items() if n.startswith(("layers.", "norm_image."))}
    assert len(experts) == 11 * 2 + 1
    assert all(torch.equal(p, text[n.replace("image", "text")]) for n, p in experts.items())


@pytest.mark.parametrize("separation", ("deep", "none"))
def test_a_run_from_random_text_trains_the_final_norm_and_its_checkpoint_is_loaded_as_it_was(
    make_run, separation
):
    run = make_run(*SCRATCH, "--separation", separation, "--weight-decay", 0, "--warmup", 0)
    before = copies(run.model)
    take_steps(run, 2)
    assert changed(before, run.model) == set(before) == set(run.trained) >= {"norm_text.weight"}
    save_run(run)
    trained = load_trained(run.out)
    parameters = dict(trained.model.named_parameters())
    assert parameters.keys() == run.trained.keys()
    assert all(torch.equal(p, run.trained[n]) for n, p in parameters.items())
    report = text_report(trained, ["grass is green."])
    assert set(report["tensors_changed"]) == set(run.model.text_parameters())
    assert not report["logits_bit_equal"] and report["perplexity_base"] != report["perplexity_trained"]


# ---- what it trains on ----


def test_the_kinds_of_built_in_conversations_have_their_shares(monkeypatch):
    monkeypatch.setattr(shapes, "conversation", lambda rng, thinking, kinds: kinds)
    rng = random.Random(0)
    drawn = [shapes.Shapes().conversation(rng) for _ in range(2000)]
    kinds = [kind for turns in drawn for kind in turns]
    shares = {k: weight / sum(shapes.TURNS) for k, weight in zip(shapes.KINDS, shapes.TURNS, strict=True)}
    for name, share in shares.items():
        n = len(kinds)
        assert abs(kinds.count(name) - n * share) < 4 * (n * share * (1 - share)) ** 0.5, name
    assert max(shares, key=shares.get) == "story" and set(kinds) == set(shares)
    for turns, share in ((1, 0.7), (2, 0.25), (3, 0.05)):
        count = sum(len(x) == turns for x in drawn)
        assert abs(count - 2000 * share) < 4 * (2000 * share * (1 - share)) ** 0.5, turns


def test_training_on_a_folder_of_pictures_sets_some_aside(make_run, monkeypatch):
    run = make_run()
    source, seen = run.documents.source, []
    assert source.train is source.val and not set(source.rows) & set(source.val_rows)
    assert (len(source.rows), len(source.val_rows)) == (22, 2)
    held_out = [run.documents.tokenise(source.val.captions[i]) for i in source.val_rows]
    shown = [[*ids, run.model.config.boi_id, IMAGE] for ids in held_out]
    for documents in run.documents.validation(96):
        assert sorted(d.ids for d in documents) == sorted(shown)
    tokenise = run.documents.tokenise
    monkeypatch.setattr(run.documents, "tokenise", lambda caption: seen.append(caption) or tokenise(caption))
    take_steps(run, 6)
    assert len(seen) == 36 and set(seen) <= {source.train.captions[i] for i in source.rows}


def test_chat_takes_captioned_pictures_without_edits(make_run):
    run = make_run("--task", "chat", "--batch-size", 8)
    assert run.documents.source.edits is None
    documents = documents_that(run, lambda d: True, n=60)
    decode = run.documents.tokenizer.decode
    texts = {decode([i for i in d.ids if i >= 0]) for d in documents if len(d.ids) > 2}
    assert any("draw a small photo" in t or "paint a big photo" in t for t in texts)
    assert {tuple(d.max_t) for d in documents} == {(0,), (1000,)}
    results = [run.train_step() for _ in range(2)]
    assert all(r["lm_loss"] > 0 and r["draw_loss"] > 0 for r in results)


def test_chat_takes_edits_where_there_are_some(make_run):
    run = make_run("--task", "chat", *EDITS)
    kinds = [tuple(d.max_t) for d in documents_that(run, lambda d: len(d.ids) > 2, n=200)]
    assert 50 < sum(len(k) == 2 for k in kinds) < 150 and {k[0] for k in kinds if len(k) == 2} == {0}


def test_what_a_source_of_edits_holds_tells_it_from_another(make_run):
    source = make_run("--task", "edit,generate", *EDITS).documents.source
    words = ["make it another", *source.edits.captions[1:]]
    others = [dict(sources=255 - source.edits.sources), dict(pixels=255 - source.edits.pixels)]
    seen = {source.fingerprint()}
    for fields in (*others, dict(captions=words)):
        edits = dataclasses.replace(source.edits, **fields)
        seen.add(PictureSource(source.train, None, edits).fingerprint())
    assert len(seen) == 4
    assert PictureSource(source.train, None, source.edits).fingerprint() == source.fingerprint()


def test_tasks_that_the_data_or_the_tokenizer_do_not_give_are_refused(make_run):
    run, tokenizer = make_run(), Tokenizer(models.BPE())
    config, model, source = run.config, run.model.config, run.documents.source
    there = dataclasses.replace(config, task="edit,chat", data="there")
    latents = LatentSource.__new__(LatentSource)
    latents.edit_rows = []
    with pytest.raises(ValueError, match="--task edit,chat: there holds no edits"):
        latents.check(there, model, "")
    chat = dataclasses.replace(config, task="generate,chat")
    for missing in ("<|im_start|>", "<|im_end|>"):
        with pytest.raises(ValueError, match="--task chat: the base has no chat tokens") as error:
            Documents(chat, model, tokenizer, source)
        assert missing in str(error.value)
        tokenizer.add_special_tokens([missing])
    Documents(chat, model, tokenizer, source)
    Documents(dataclasses.replace(config, task="edit"), model, Tokenizer(models.BPE()), source)


def test_the_base_of_the_lab_is_pretrained_once_and_again_for_another_recipe(monkeypatch):
    from lab import ablate  # here: it takes the whole laboratory

    made, plan = [], ablate.Plan()
    monkeypatch.setattr(
        pretrain, "pretrain_base", lambda folder, **how: made.append(how) or folder.mkdir(parents=True)
    )
    first = ablate.ensure_lab_base(plan)
    assert ablate.ensure_lab_base(plan) == first and made == [{"steps": 2600}]
    monkeypatch.setattr(pretrain, "RECIPE", pretrain.RECIPE + 1)
    assert ablate.ensure_lab_base(plan) != first and made == 2 * [{"steps": 2600}]
