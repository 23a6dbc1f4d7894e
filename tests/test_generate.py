"""generate.py: what is computed when, what a picture depends on, which token is chosen, and the cache.

The test of tests is `test_a_conversation_with_a_cache_equals_everything_read_again`: two turns, pictures and
thoughts, against a context that keeps nothing.
"""

from __future__ import annotations

import dataclasses
import json
import random

import helpers
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import generate
from attention import IMAGE, Cache, Tokens
from chat.template import END_THINK, IM_END, THINK, apply_chat_template, encode
from checkpoint import Trained
from data import CAPTION_DROPPED, CAPTION_FIRST, caption_document, chat_document, collate, edit_document
from diffusion import timesteps
from generate import (
    Context,
    GenerationConfig,
    choose,
    continue_text,
    describe_images,
    draws,
    edit_images,
    encode_text,
    generate_images,
)
from small.dialogues import conversation

PROMPTS = ["a red circle", "on a white background, in the top left, a small blue cross", "green"]
SEEDS = [11, 22, 33]


@pytest.fixture
def trained() -> Trained:
    return helpers.perturbed()


class Spy:
    """Records what `model.encode` is called with and what it returns."""

    def __init__(self, trained: Trained, monkeypatch):
        self.calls, encode = [], trained.model.encode

        def spying(tokens, latents=None, t=None, cache=None, keep=True, layout=None):
            hidden = encode(tokens, latents, t, cache, keep, layout)
            self.calls.append((tokens, latents, t, cache, hidden))
            return hidden

        monkeypatch.setattr(trained.model, "encode", spying)


def words(trained: Trained, n: int, seed: int = 0) -> list[int]:
    """Random ids of plain text."""
    rng = random.Random(seed)
    return [rng.randrange(10, trained.model.config.vocab_size) for _ in range(n)]


# ---- text -> image ----


def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch(trained):
    for sampler in ("ddim", "ddpm"):
        together = generate_images(trained, PROMPTS, SEEDS, steps=5, cfg=3.0, sampler=sampler)
        alone = torch.cat(
            [
                generate_images(trained, [p], [s], steps=5, cfg=3.0, sampler=sampler)
                for p, s in zip(PROMPTS, SEEDS, strict=True)
            ]
        )
        assert together.dtype == torch.uint8 and together.shape == (3, 3, 64, 64)
        assert (together.int() - alone.int()).abs().max() <= 1, sampler
        assert (together[0].int() - together[1].int()).abs().max() > 10  # and they are not all alike


@pytest.mark.parametrize("change", ("prompt", "seed", "cfg", "steps", "sampler"))
def test_a_picture_depends_on_prompt_seed_guidance_steps_and_sampler(trained, change):
    how = dict(prompt=PROMPTS[1], seed=5, steps=4, cfg=3.0, sampler="ddim")
    other = dict(prompt=PROMPTS[0], seed=6, steps=5, cfg=2.0, sampler="ddpm")

    def paint(prompt, seed, **rest):
        return generate_images(trained, [prompt], [seed], **rest)

    assert not torch.equal(paint(**how), paint(**{**how, change: other[change]}))
    assert torch.equal(paint(**how), paint(**how))


def test_the_prompt_is_encoded_once_and_a_step_computes_patches_alone(trained, monkeypatch):
    spy, n, steps, P = Spy(trained, monkeypatch), len(PROMPTS), 4, trained.model.config.num_patches
    generate_images(trained, PROMPTS, SEEDS, steps=steps, cfg=3.0)
    (prompt, latents, _, before, _), *rest = spy.calls
    assert latents is None and before is None and not (prompt.ids == IMAGE).any() and len(prompt.ids) == 2 * n
    assert len(rest) == steps
    for tokens, latents, t, cache, _ in rest:
        assert (tokens.ids == IMAGE).all() and tokens.ids.shape == (2 * n, P)
        assert len(latents) == n and t.shape == (n,)  # with and without the prompt, the same noisy latent
        assert cache is rest[0][3]
    assert [call[2][0].item() for call in rest] == timesteps(4)


def test_without_guidance_a_step_is_a_single_batch(trained, monkeypatch):
    spy = Spy(trained, monkeypatch)
    generate_images(trained, PROMPTS, SEEDS, steps=2, cfg=1.0)
    assert [len(tokens.ids) for tokens, *_ in spy.calls] == [3, 3, 3]


def test_guidance_of_one_and_of_nearly_one_agree(trained):
    pictures = [generate_images(trained, PROMPTS, SEEDS, steps=3, cfg=c).int() for c in (1.0, 1.0 + 1e-6)]
    assert (pictures[0] - pictures[1]).abs().max() <= 1


def test_guidance_is_over_all_channels(trained, monkeypatch):
    """Predicted noise at cfg 3 is 3 eps_c - 2 eps_u, each computed alone in one phase."""
    model, seen = trained.model, {}
    monkeypatch.setattr(
        generate,
        "sample",
        lambda d, predict, noise, *a: seen.update(x=noise, eps=predict(noise, seen["t"])) or noise,
    )
    seen["t"] = torch.full((len(PROMPTS),), 400)
    generate_images(trained, PROMPTS, SEEDS, cfg=3.0)
    for i, prompt in enumerate(PROMPTS):
        eps = []
        for text in (encode_text(trained, prompt, room=0), []):
            row = Tokens.rows([text + [model.config.boi_id, IMAGE]], model.config.num_patches)
            hidden = model.encode(row, seen["x"][i : i + 1], seen["t"][:1])
            output = model.unet_output(hidden)
            eps.append(trained.diffusion.eps_from_output(output, seen["x"][i : i + 1], seen["t"][:1]))
        assert torch.allclose(seen["eps"][i], (3 * eps[0] - 2 * eps[1])[0], atol=1e-3)
        assert (eps[0] - eps[1]).abs().mean((0, 2, 3)).min() > 1e-3  # the prompt matters in every channel


def test_what_guidance_nulls_is_what_training_drops(trained, monkeypatch):
    spy, config = Spy(trained, monkeypatch), trained.model.config
    generate_images(trained, PROMPTS, SEEDS, steps=1, cfg=3.0)
    (prompt, *_), (patches, *_) = spy.calls
    ids = [encode_text(trained, p, room=0) for p in PROMPTS]
    kept, dropped = (
        collate([caption_document(None, row, order, config) for row in ids], torch.zeros(3, 1, 1, 1), config)
        for order in (CAPTION_FIRST, CAPTION_DROPPED)
    )
    for tokens, first, second in ((prompt, kept.prefix, dropped.prefix), (patches, kept.rest, dropped.rest)):
        for half, wanted in ((slice(0, 3), first), (slice(3, 6), second)):
            for field in ("ids", "image", "position", "document"):
                got, want = (getattr(x, field)[r] for x, r in ((tokens, half), (wanted, slice(None))))
                used = tokens.document[half] >= 0
                assert used.sum() == (wanted.document >= 0).sum()
                assert torch.equal(got[used], want[wanted.document >= 0]), field


def test_denoising_does_not_change_the_cache(trained, monkeypatch):
    spy, before = Spy(trained, monkeypatch), {}

    def copies(cache: Cache) -> list[torch.Tensor]:
        kept = (x[:, :, : cache.length] for x in (*cache.k, *cache.v))  # behind them may be room
        return [x.clone() for x in (*kept, cache.image, cache.position, cache.document)]

    def watch(_):
        before.setdefault("cache", copies(spy.calls[0][4].cache))

    generate_images(trained, PROMPTS, SEEDS, steps=4, watch=watch)
    after = copies(spy.calls[-1][3])
    assert all(torch.equal(a, b) for a, b in zip(before["cache"], after, strict=True))
    longest = max(len(encode_text(trained, p, room=0)) for p in PROMPTS) + 1
    assert all(call[3].position.shape[1] == longest for call in spy.calls[1:])


def test_watch_sees_every_step_and_the_last_is_the_picture(trained):
    frames = []
    picture = generate_images(trained, PROMPTS[:1], SEEDS[:1], steps=6, watch=frames.append)
    assert len(frames) == 6 and torch.equal(trained.codec.decode(frames[-1]), picture)


def test_finished_latents_keep_to_the_bound(trained):
    frames = []
    generate_images(trained, PROMPTS, SEEDS, steps=3, cfg=20.0, watch=frames.append)
    assert (frames[-1].abs() <= trained.codec.bound * (1 + 1e-5)).all()


# ---- choosing a token ----


def brute_force_probabilities(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Probabilities of a next token by sorting and looping, in float64."""
    p = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        order = order[:top_k]
    total, kept, mass = sum(p[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        mass += p[i] / total
        if mass >= top_p:
            break
    out = torch.zeros(len(p), dtype=torch.float64)
    for i in kept:
        out[i] = p[i] / sum(p[j] for j in kept)
    return out


LOGITS = [2.0, -1.0, 0.5, 1.9, -3.0, 0.0, 1.0, 2.5]


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1, 0, 1),
        (0.5, 0, 1),
        (3, 0, 1),
        (1, 3, 1),
        (1, 1, 1),
        (1, 0, 0.6),
        (1, 0, 0.05),
        (2, 4, 0.7),
        (1, 99, 1),
    ],
)
def test_sampling_follows_the_probabilities_of_a_loop(temperature, top_k, top_p):
    n = 20000
    drawn = choose(
        torch.tensor([LOGITS]).expand(n, -1), temperature, top_k, top_p, torch.Generator().manual_seed(0)
    )
    wanted = brute_force_probabilities(LOGITS, temperature, top_k, top_p)
    got = torch.bincount(drawn, minlength=len(LOGITS)).double() / n
    assert (wanted[got > 0] > 0).all() and (got[wanted > 1e-3] > 0).all()
    assert (got - wanted).abs().max() < 4 * 0.5 / n**0.5


def test_temperature_zero_takes_the_likeliest_of_each_row():
    logits = torch.tensor([LOGITS, LOGITS[::-1]])
    assert choose(logits, 0, 0, 1.0, None).tolist() == [7, 0]
    assert choose(logits, 0, 3, 0.2, None).tolist() == [7, 0]


def test_rows_of_a_batch_are_filtered_each_by_its_own_logits():
    logits = torch.tensor([[5.0, 4.9, 0.0, 0.0], [0.0, 0.0, 4.9, 5.0]])
    for how in (dict(top_k=2, top_p=1.0), dict(top_k=0, top_p=0.6)):
        drawn = [choose(logits, 1.0, **how, generator=torch.Generator().manual_seed(s)) for s in range(60)]
        assert {d[0].item() for d in drawn} == {0, 1} and {d[1].item() for d in drawn} == {2, 3}


def test_the_same_generator_chooses_the_same():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    first, second, third = (choose(logits, 1.0, 0, 1.0, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_a_temperature_of_nearly_zero_is_greedy():
    assert choose(torch.tensor([LOGITS]), 1e-40, 0, 1.0, None).tolist() == [7]


# ---- text ----


def write_on_from_scratch(trained: Trained, ids: list[int], n: int) -> list[int]:
    """Greedy continuation that reads everything again for every token."""
    out = list(ids)
    for _ in range(n):
        out.append(trained.model.text_logits(torch.tensor([out]))[0, -1].argmax().item())
    return out[len(ids) :]


def distinct(trained: Trained) -> Trained:
    """Louder text, so that greedy continuations do not repeat one token."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in trained.model.text_parameters().values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return trained


@torch.no_grad()
def test_text_continued_with_a_cache_equals_everything_read_again(trained):
    distinct(trained)
    ids, model = words(trained, 9), trained.model
    hidden = model.encode(Tokens.text(torch.tensor([ids])))
    got = continue_text(model, hidden.text[-1:], hidden.cache, max_tokens=12)[0]
    wanted = write_on_from_scratch(trained, ids, 12)
    if model.config.eos_id in wanted:
        wanted = wanted[: wanted.index(model.config.eos_id)]
    assert got == wanted and len(set(got)) > 3


@torch.no_grad()
def test_captions_written_with_a_cache_equal_everything_read_again(trained):
    distinct(trained)
    model, config = trained.model, trained.model.config
    pictures = helpers.held_out_pictures(3)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained.tokenizer.__class__, "decode", lambda self, ids: ids, raising=False)
        got = describe_images(trained, pictures, max_tokens=6)
    for i in range(3):
        row, latents = [config.boi_id, IMAGE, config.eoi_id], trained.codec.encode(pictures[i : i + 1])
        for _ in range(6):
            hidden = model.encode(Tokens.rows([row], config.num_patches), latents, torch.zeros(1).long())
            row.append(model.logits(hidden.text)[-1].argmax().item())
        new = row[3:]
        assert got[i] == (new[: new.index(config.eos_id)] if config.eos_id in new else new)
    assert got[0] != got[1] or got[1] != got[2]  # the picture matters


def test_a_picture_is_described_clean_at_t_zero_between_boi_and_eoi(trained, monkeypatch):
    spy, config = Spy(trained, monkeypatch), trained.model.config
    pictures = helpers.held_out_pictures(2)[0]
    describe_images(trained, pictures, max_tokens=3)
    (tokens, latents, t, cache, _), *rest = spy.calls
    assert t.tolist() == [0, 0] and cache is None
    assert torch.equal(latents, trained.codec.encode(pictures))
    assert tokens.ids[0].tolist() == [config.boi_id] + [IMAGE] * config.num_patches + [config.eoi_id]
    assert all(tokens.ids.shape[1] == 1 and (tokens.ids >= 0).all() for tokens, *_ in rest) and rest


@torch.no_grad()
def test_a_sequence_ends_at_eos_and_its_neighbours_go_on(trained, monkeypatch):
    model = trained.model
    eos, script = model.config.eos_id, iter([[7, 8], [9, model.config.eos_id], [10, 11], [12, 13]])
    monkeypatch.setattr(generate, "choose", lambda *a: torch.tensor(next(script)))
    hidden = model.encode(Tokens.text(torch.tensor([words(trained, 4), words(trained, 4, seed=1)])))
    last = hidden.text.view(2, 4, -1)[:, -1]
    assert continue_text(model, last, hidden.cache, max_tokens=4) == [[7, 9, 10, 12], [8]]
    script = iter([[7, eos], [eos, 5], [1, 1]])
    assert continue_text(model, last, hidden.cache, max_tokens=9) == [[7], []]
    assert len(list(script)) == 1  # nothing was computed behind the last EOS


def test_no_more_than_max_tokens_are_written(trained):
    ids = words(trained, 5)
    hidden = trained.model.encode(Tokens.text(torch.tensor([ids])))
    for n in (0, 1, 4):
        assert len(continue_text(trained.model, hidden.text[-1:], hidden.cache, n)[0]) <= n


def test_special_tokens_that_a_user_types_stay_text(trained):
    special = [
        trained.tokenizer.token_to_id(t) for t in ("<|vision_start|>", "<|vision_end|>", "<|endoftext|>")
    ]
    text = "a <|vision_start|>red<|vision_end|> circle<|endoftext|>"
    ids = encode_text(trained, text, room=0)
    assert not set(special) & set(ids)
    assert trained.tokenizer.decode(ids, skip_special_tokens=False) == text
    loud, plain = (generate_images(trained, [p], [1], steps=2) for p in (text, "a red circle"))
    assert not torch.equal(loud, plain)


@pytest.mark.parametrize("room", (0, 7))
def test_a_text_may_fill_the_context_to_the_last_token(trained, room):
    limit = trained.model.config.max_position_embeddings - room
    text = " red" * limit
    assert len(encode_text(trained, text, room)) == limit
    with pytest.raises(ValueError, match=f"{limit + 1} tokens long; the context has room for {limit}"):
        encode_text(trained, text + " red", room)


def test_a_picture_file_of_any_size_is_read_square_and_upright(trained, tmp_path):
    image = Image.new("RGB", (90, 30), (10, 200, 30))
    image.paste((250, 0, 0), (30, 0, 60, 30))
    image.save(tmp_path / "wide.png")
    picture = generate.read_picture(trained, tmp_path / "wide.png")
    assert picture.shape == (1, 3, 64, 64)
    assert (picture[0].float().mean((1, 2)) - torch.tensor([250.0, 0, 0])).abs().max() < 12


def test_bfloat16_paints_nearly_the_same(trained):
    whole = generate_images(trained, PROMPTS, SEEDS, steps=3).float()
    trained.model.to(torch.bfloat16)
    half = generate_images(trained, PROMPTS, SEEDS, steps=3).float()
    other = generate_images(trained, PROMPTS, SEEDS[::-1], steps=3).float()
    assert 0 < F.l1_loss(whole, half) < 0.1 * F.l1_loss(whole, other)


def test_a_checkpoint_says_how_it_denoises(trained):
    """The sampler takes the schedule and the prediction from the checkpoint, not from a default."""
    info = json.loads((trained.folder / "checkpoint.json").read_text())["diffusion"]
    assert info == {"shift": 2.0, "prediction": "x"} and trained.diffusion.prediction == "x"
    half = trained.diffusion.alpha_bar[500]
    assert 0.15 < half < 0.25  # 0.2 with a shift of 2; 0.5 without


# ---- editing ----

INSTRUCTIONS = ["make it green", "", "move the small circle to the bottom left and make it big"]


def test_an_edit_does_not_depend_on_its_neighbours_in_the_batch(trained):
    pictures = helpers.held_out_pictures(3)[0]
    together = edit_images(trained, pictures, INSTRUCTIONS, SEEDS, steps=4)
    assert together.dtype == torch.uint8 and together.shape == (3, 3, 64, 64)
    for i in range(3):
        alone = edit_images(trained, pictures[i : i + 1], INSTRUCTIONS[i : i + 1], SEEDS[i : i + 1], steps=4)
        assert (together[i : i + 1].int() - alone.int()).abs().max() <= 1


def test_an_edit_depends_on_the_picture_the_instruction_and_the_seed(trained):
    a, b = helpers.held_out_pictures(2)[0].split(1)
    first = edit_images(trained, a, ["make it green"], [1], steps=3)
    assert torch.equal(first, edit_images(trained, a, ["make it green"], [1], steps=3))
    for other in ((b, ["make it green"], [1]), (a, ["make it red"], [1]), (a, ["make it green"], [2])):
        assert not torch.equal(first, edit_images(trained, *other, steps=3))


@torch.no_grad()
def test_guidance_of_an_edit_is_what_two_whole_sequences_give(trained, monkeypatch):
    model, seen = trained.model, {}
    monkeypatch.setattr(
        generate,
        "sample",
        lambda d, predict, noise, *a: seen.update(x=noise, eps=predict(noise, seen["t"])) or noise,
    )
    seen["t"] = torch.full((3,), 400)
    pictures = helpers.held_out_pictures(3)[0]
    edit_images(trained, pictures, INSTRUCTIONS, SEEDS, cfg=3.0, cfg_image=1.0)
    clean = trained.codec.encode(pictures)
    for i, instruction in enumerate(INSTRUCTIONS):
        eps = []
        for text in (encode_text(trained, instruction, room=0), []):
            row = [model.config.boi_id, IMAGE, model.config.eoi_id, *text, model.config.boi_id]
            eps.append(whole_sequence_noise(trained, row, [clean[i]], seen["x"][i : i + 1], seen["t"][:1]))
        assert torch.allclose(seen["eps"][i], (3 * eps[0] - 2 * eps[1])[0], atol=1e-3)
        assert torch.equal(eps[0], eps[1]) == (instruction == "")


@pytest.mark.parametrize("cfg, rows", ((1.0, 2), (3.0, 4)))
def test_an_edit_reads_what_training_reads(trained, monkeypatch, cfg, rows):
    """Row for row, the sequences of `edit_document`, cut where the picture to be painted begins."""
    spy, config = Spy(trained, monkeypatch), trained.model.config
    pictures, instructions = helpers.held_out_pictures(2)[0], ["make it green", "make it a big red square"]
    edit_images(trained, pictures, instructions, [1, 2], steps=1, cfg=cfg, cfg_image=1.0)
    (tokens, latents, t, before, hidden), *steps = spy.calls
    clean = trained.codec.encode(pictures)
    assert before is None and torch.equal(latents, clean.repeat(rows // 2, 1, 1, 1)) and not t.any()
    wanted = [
        edit_document(0, 1, encode_text(trained, text, room=0), config, dropped).ids
        for dropped in (False, True)[: rows // 2]
        for text in instructions
    ]
    wanted = Tokens.rows(wanted, config.num_patches)
    (patches, *_, cache, _), *_ = steps
    for i in range(rows):
        for name in ("ids", "image", "position"):
            parts = (tokens, patches)
            got = torch.cat([getattr(p, name)[i][p.document[i] >= 0] for p in parts])
            assert torch.equal(got, getattr(wanted, name)[i][wanted.document[i] >= 0]), name


def test_a_long_instruction_fills_the_context_and_no_more(trained):
    config = trained.model.config
    limit = config.max_position_embeddings - 2 * config.num_patches - 3
    picture = helpers.held_out_pictures(1)[0]
    edit_images(trained, picture, [" red" * limit], [1], steps=1)
    with pytest.raises(ValueError, match=f"{limit + 1} tokens long; the context has room for {limit}"):
        edit_images(trained, picture, [" red" * (limit + 1)], [1], steps=1)


def test_a_picture_of_another_size_is_an_error(trained):
    with pytest.raises(ValueError, match="16, 16"):
        edit_images(trained, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["red"], [1])


# ---- the cache ----


def read_text(trained: Trained, ids: list[int], start: int = 0, cache: Cache | None = None):
    return trained.model.encode(Tokens.text(torch.tensor([ids]), start), cache=cache)


def same_slots(cache: Cache, row: int, other: Cache, other_row: int, n: int) -> bool:
    """Do the first n slots of two rows hold the same?"""
    fields = ("image", "position", "document")
    return all(
        torch.allclose(a[row, :, :n], b[other_row, :, :n], atol=1e-5)
        for a, b in zip((*cache.k, *cache.v), (*other.k, *other.v), strict=True)
    ) and all(torch.equal(getattr(cache, f)[row, :n], getattr(other, f)[other_row, :n]) for f in fields)


@torch.no_grad()
@pytest.mark.parametrize("room", (0, 7, 40))
def test_the_first_slots_of_a_cache_are_those_of_a_shorter_text(trained, room):
    ids, other = words(trained, 20), words(trained, 9, seed=1)
    cache = read_text(trained, ids).cache
    cache = cache.reserve(room) if room else cache
    kept = cache.keep(12)
    short = read_text(trained, ids[:12]).cache
    assert kept.length == short.length == 12 and kept.room == 8 + room
    assert same_slots(kept, 0, short, 0, 12)
    # what is read behind it overwrites what was forgotten
    again = read_text(trained, other, 12, kept)
    fresh = read_text(trained, ids[:12] + other)
    assert torch.allclose(again.text, fresh.text[12:], atol=1e-4)
    assert same_slots(kept.extend(again.cache), 0, fresh.cache, 0, 21)


@torch.no_grad()
@pytest.mark.parametrize("lengths", ((5, 17), (17, 5), (6, 6)))
@pytest.mark.parametrize("room", (0, 30))
def test_stacked_caches_are_those_of_a_padded_batch(trained, lengths, room):
    model, config = trained.model, trained.model.config
    P, latents = config.num_patches, trained.codec.encode(helpers.held_out_pictures(2)[0])
    rows = [
        words(trained, n - 3, seed=n + i) + [config.boi_id, IMAGE, config.eoi_id]
        for i, n in enumerate(lengths)
    ]
    zero = torch.zeros(2, dtype=torch.long)
    padded = model.encode(Tokens.rows(rows, P), latents, zero).cache
    single = [
        model.encode(Tokens.rows([row], P), latents[i : i + 1], zero[:1]).cache for i, row in enumerate(rows)
    ]
    stacked = (single[0].reserve(room) if room else single[0]).stack(single[1])
    size = [n + P - 1 for n in lengths]
    assert stacked.length == max(size) and stacked.room == 0
    for i in range(2):
        assert same_slots(stacked, i, padded, i, size[i])
        assert (stacked.document[i, size[i] :] == -1).all() and (stacked.document[i, : size[i]] == 0).all()
    # and nothing that attends to them sees the padding
    patches, noise = Tokens.rows([[IMAGE]] * 2, P, size, [1, 1]), latents.flip(0)
    t = torch.full((2,), 300)
    got, want = (
        model.unet_output(model.encode(patches, noise, t, cache, keep=False)) for cache in (stacked, padded)
    )
    alone = [
        model.unet_output(
            model.encode(
                Tokens.rows([[IMAGE]], P, size[i : i + 1], [1]),
                noise[i : i + 1],
                t[:1],
                single[i],
                keep=False,
            )
        )
        for i in range(2)
    ]
    assert torch.allclose(got, want, atol=1e-4) and torch.allclose(got, torch.cat(alone), atol=1e-4)


# ---- everything in turns ----


@pytest.fixture
def talker(trained, monkeypatch) -> Trained:
    """A model with a long context that decides to draw behind every fourth token or so."""
    model = trained.model
    model.config = dataclasses.replace(model.config, max_position_embeddings=2048)
    own, ids = model.draw_logit, prompt(trained)
    answers = torch.tensor([ids + words(trained, 30, seed) for seed in range(10)])
    with torch.no_grad():
        usual = own(model.encode(Tokens.text(answers)).text).view(10, -1)[:, len(ids) :]
    middle, spread = usual.quantile(0.75), usual.std()
    monkeypatch.setattr(model, "draw_logit", lambda text: 4 * (own(text) - middle) / spread)
    return trained


def whole_sequence_noise(trained: Trained, row: list[int], latents: list, x: torch.Tensor, t: torch.Tensor):
    """The noise that the model sees in x (1, C, h, w) at t (1,) behind a row of ids and clean latents."""
    model, P = trained.model, trained.model.config.num_patches
    times = torch.cat((torch.zeros(len(latents), dtype=torch.long), t))
    hidden = model.encode(Tokens.rows([[*row, IMAGE]], P), torch.cat((*(z[None] for z in latents), x)), times)
    return trained.diffusion.eps_from_output(model.unet_output(hidden)[-1:], x, t)


class Forgetful(Context):
    """Keeps nothing: everything is read again at every token and at every step of denoising, in one go."""

    def read(self, ids, latents=()):
        self.ids, self.latents = self.ids + ids, self.latents + list(latents)
        model = self.trained.model
        images = torch.stack(self.latents) if self.latents else None
        t = torch.zeros(len(self.latents), dtype=torch.long)
        return model.encode(Tokens.rows([self.ids], model.config.num_patches), images, t).text[-1]

    def rewind(self, ids, latents):
        self.ids, self.latents = [], []
        return ids, latents

    def predictor(self, cfg):
        def predict(x, t):
            full = whole_sequence_noise(self.trained, self.ids, self.latents, x, t)
            null = whole_sequence_noise(self.trained, [self.trained.model.config.boi_id], [], x, t)
            return null + cfg * (full - null)

        return predict


def open_with(monkeypatch, *first: int) -> list[int]:
    """The first tokens that are chosen are these. Returns the list of those still to come."""
    to_come, own = list(first), generate.choose
    monkeypatch.setattr(generate, "choose", lambda *a: torch.tensor([to_come.pop(0)]) if to_come else own(*a))
    return to_come


@torch.inference_mode()
def two_turns(context: Context, thinking: bool, options: GenerationConfig, opening: list[int]) -> list:
    """What comes in two turns: the user shows a picture first, and the first answer loses its thoughts."""
    trained, config, tokenizer = context.trained, context.trained.model.config, context.trained.tokenizer
    think, end_think = tokenizer.token_to_id(THINK), tokenizer.token_to_id(END_THINK)
    latents = list(trained.codec.encode(helpers.held_out_pictures(1)[0]))
    shown = [{"type": "image", "image": 0}, {"type": "text", "text": "tell a story with this"}]
    ids, events = [], []
    for content in (shown, "and another one"):
        pieces = apply_chat_template([{"role": "user", "content": content}], thinking)
        ids = ids + encode(tokenizer, pieces, config.boi_id, config.eoi_id)
        opening[:] = [think] if thinking else []
        features = context.read(*context.rewind(ids, latents))
        inside = False
        for event in generate.generate(trained, context, features, options):
            events.append(event)
            if isinstance(event, torch.Tensor):
                ids, latents = ids + [config.boi_id, IMAGE, config.eoi_id], latents + [event]
            elif event in (think, end_think):
                inside = event == think
            elif not inside:
                ids = ids + [event]
        ids = ids + [tokenizer.token_to_id(IM_END)]
    return events


@pytest.mark.parametrize("cfg", (3.0, 1.0))
@pytest.mark.parametrize("thinking", (False, True))
def test_a_conversation_with_a_cache_equals_everything_read_again(talker, monkeypatch, thinking, cfg):
    opening = open_with(monkeypatch)
    options = GenerationConfig(
        max_tokens=30, max_thought=8, max_images=3, temperature=1.0, steps=3, cfg=cfg, seed=2
    )
    context, forgetful = Context(talker), Forgetful(talker)
    got, want = (two_turns(c, thinking, options, opening) for c in (context, forgetful))
    assert context.ids == forgetful.ids and forgetful.cache is None and len(context) == context.cache.length
    pictures = [e for e in want if isinstance(e, torch.Tensor)]
    written = [e for e in want if not isinstance(e, torch.Tensor)]
    assert len(pictures) >= 3 and len(set(written)) > 25
    assert [e for e in got if not isinstance(e, torch.Tensor)] == written
    assert [isinstance(e, torch.Tensor) for e in got] == [isinstance(e, torch.Tensor) for e in want]
    painted = [e for e in got if isinstance(e, torch.Tensor)]
    for a, b in zip(painted, pictures, strict=True):
        assert (a - b).abs().max() < 1e-4
    assert (pictures[0] - pictures[1]).abs().max() > 0.1  # and they are not all alike
    end_think = talker.tokenizer.token_to_id(END_THINK)
    assert (written.count(end_think) >= 2) == thinking


def prompt(trained: Trained, text: str = "draw a red circle", thinking: bool = False) -> list[int]:
    config = trained.model.config
    pieces = apply_chat_template([{"role": "user", "content": text}], thinking)
    return encode(trained.tokenizer, pieces, config.boi_id, config.eoi_id)


def answer(
    trained: Trained,
    options: GenerationConfig,
    ids: list[int] | None = None,
    context: Context | None = None,
    **how,
):
    """The events of one turn behind ids."""
    context = Context(trained) if context is None else context
    features = context.read(prompt(trained) if ids is None else ids)
    return list(generate.generate(trained, context, features, options, **how))


def kinds(trained: Trained, events: list) -> list:
    """Events with "P" for pictures."""
    return ["P" if isinstance(e, torch.Tensor) else e for e in events]


@pytest.mark.parametrize("same", (0, 1, 5, 8, 9, 15))
def test_a_rewound_context_keeps_the_longest_common_beginning(talker, same):
    """8: up to the picture, which is another one; 9: past it."""
    config, pictures = talker.model.config, list(talker.codec.encode(helpers.held_out_pictures(3)[0]))
    first = words(talker, 7) + [config.boi_id, IMAGE, config.eoi_id] + words(talker, 8, seed=1)
    second = [*first[:same], *([7, 7, 7, 7] if same != 8 else first[8:])]
    latents = [] if same < 8 else [pictures[1 if same == 8 else 0]]
    context = Context(talker)
    context.read(first, pictures[:1])
    rest = context.rewind(second, latents)
    assert context.ids == first[:same] and rest[0] == second[same:]
    assert len(context.latents) == (same > 8) and len(rest[1]) == (same == 8)
    assert (context.cache.length if same else context.cache) == (len(context) if same else None)
    fresh = Context(talker)
    assert torch.allclose(context.read(*rest), fresh.read(second, latents), atol=1e-4)
    assert context.ids == fresh.ids and len(context.latents) == len(fresh.latents)
    assert same_slots(context.cache, 0, fresh.cache, 0, len(fresh))


def test_a_rewound_context_reads_the_last_token_of_a_sequence_it_holds(talker):
    ids = words(talker, 12)
    for shorter in (ids, ids[:5]):
        context = Context(talker)
        context.read(ids)
        assert context.rewind(shorter, []) == (shorter[-1:], []) and context.ids == shorter[:-1]
        assert torch.allclose(context.read(shorter[-1:]), Context(talker).read(shorter), atol=1e-4)


def test_an_answer_behind_a_rewound_context_is_that_of_a_fresh_one(talker):
    options = GenerationConfig(max_tokens=20, temperature=1.0, steps=2, seed=4)
    context = Context(talker)
    answer(talker, options, prompt(talker, "draw a big blue square, please"), context)
    ids = prompt(talker, "draw a big red circle")
    features = context.read(*context.rewind(ids, []))
    again, fresh = list(generate.generate(talker, context, features, options)), answer(talker, options, ids)
    assert kinds(talker, again) == kinds(talker, fresh) and "P" in kinds(talker, fresh)
    for a, b in zip(again, fresh, strict=True):
        assert not isinstance(a, torch.Tensor) or (a - b).abs().max() < 1e-4


def test_a_context_abandoned_in_the_middle_of_an_answer_is_as_good_as_fresh(talker):
    options = GenerationConfig(max_tokens=20, temperature=1.0, steps=2, seed=4)
    fresh = kinds(talker, answer(talker, options))
    for n in (1, 3, fresh.index("P") + 1, len(fresh) - 1):
        context, ids = Context(talker), prompt(talker)
        for _, _ in zip(
            range(n), generate.generate(talker, context, context.read(ids), options), strict=False
        ):
            pass
        assert len(context) == context.cache.length
        features = context.read(*context.rewind(ids, []))
        assert kinds(talker, generate.generate(talker, context, features, options)) == fresh


def test_a_context_that_overflows_stays_as_it_was(talker):
    talker.model.config = dataclasses.replace(talker.model.config, max_position_embeddings=40)
    context = Context(talker)
    context.read(words(talker, 30))
    assert context.room == 10
    with pytest.raises(ValueError, match="the conversation is 41 tokens long; the context has room for 40"):
        context.read(words(talker, 11))
    assert len(context.ids) == context.cache.length == 30
    context.read(words(talker, 10))
    assert context.room == 0


def test_a_too_long_thought_is_ended_and_the_answer_goes_on(talker, monkeypatch):
    think, end_think = (talker.tokenizer.token_to_id(t) for t in (THINK, END_THINK))
    newline, newlines = (encode(talker.tokenizer, [t], 0, 0) for t in ("\n", "\n\n"))
    monkeypatch.setattr(generate, "choose", lambda *a: torch.tensor([9]))
    monkeypatch.setattr(generate, "draws", lambda *a: False)
    opening = open_with(monkeypatch, 8, think)
    got = answer(talker, GenerationConfig(max_tokens=20, max_thought=5))
    ended = [8, think, *[9] * 5, *newline, end_think, *newlines]
    assert not opening and got == ended + [9] * (20 - len(ended))
    open_with(monkeypatch, think, 8, end_think)  # a short one ends by itself
    assert answer(talker, GenerationConfig(max_tokens=8, max_thought=5)) == [think, 8, end_think] + [9] * 5


def test_a_thought_within_a_thought_does_not_make_it_longer(talker, monkeypatch):
    think, end_think = (talker.tokenizer.token_to_id(t) for t in (THINK, END_THINK))
    monkeypatch.setattr(generate, "draws", lambda *a: False)
    monkeypatch.setattr(generate, "choose", lambda *a: torch.tensor([think]))
    got = answer(talker, GenerationConfig(max_tokens=20, max_thought=5))
    assert got[:6] == [think] * 6 and got.count(end_think) >= 1 and got.index(end_think) < 10


def test_nothing_is_drawn_inside_a_thought(talker, monkeypatch):
    """Where a picture could come, one does; in a thought the question is not even put."""
    think, end_think = (talker.tokenizer.token_to_id(t) for t in (THINK, END_THINK))
    asked, context = [], Context(talker)
    monkeypatch.setattr(generate, "draws", lambda *a: asked.append(list(context.ids)) or len(asked) > 1)
    open_with(monkeypatch, think)
    ids = prompt(talker)
    got = kinds(
        talker,
        answer(talker, GenerationConfig(max_tokens=14, max_thought=6, max_images=2, steps=1), ids, context),
    )
    end = got.index(end_think)
    assert got[0] == think and "P" not in got[:end] and got.count("P") == 2
    assert asked[0] == ids and all(a[len(ids) :].count(end_think) == 1 for a in asked[1:])
    newlines = encode(talker.tokenizer, ["\n\n"], 0, 0)
    assert got[end + 1 : end + 1 + len(newlines)] == newlines  # these come first
    assert got[end + 1 + len(newlines)] == "P"


@pytest.mark.parametrize("n", (0, 1, 3))
def test_a_turn_has_no_more_than_max_images_pictures(talker, monkeypatch, n):
    monkeypatch.setattr(generate, "draws", lambda *a: True)
    monkeypatch.setattr(generate, "choose", lambda *a: torch.tensor([9]))
    steps, context = [], Context(talker)
    got = answer(
        talker, GenerationConfig(max_tokens=5, max_images=n, steps=2), context=context, watch=steps.append
    )
    assert kinds(talker, got) == ["P"] * n + [9] * 5 and len(steps) == 2 * n
    painted = got[:n]
    for i, z in enumerate(painted):
        assert z.shape == (36, 8, 8) and torch.equal(z, context.latents[i])
        assert torch.equal(z, steps[2 * i + 1][0])
        assert all(not torch.equal(z, other) for other in painted[:i])


def test_a_finished_picture_is_read_between_boi_and_eoi_and_is_not_noisy(talker, monkeypatch):
    monkeypatch.setattr(generate, "draws", lambda *a: True)
    monkeypatch.setattr(generate, "choose", lambda *a: torch.tensor([9]))
    config, context, ids = talker.model.config, Context(talker), prompt(talker)
    answer(talker, GenerationConfig(max_tokens=2, max_images=2, steps=2), ids, context)
    assert context.ids == [*ids, *[config.boi_id, IMAGE, config.eoi_id] * 2, 9, 9]
    fresh = Context(talker)
    fresh.read(context.ids, context.latents)
    assert same_slots(context.cache, 0, fresh.cache, 0, len(fresh))


@pytest.mark.parametrize("n", (1, 2, 7))
def test_a_turn_has_no_more_than_max_tokens_words(talker, monkeypatch, n):
    monkeypatch.setattr(generate, "choose", lambda *a: torch.tensor([9]))
    monkeypatch.setattr(generate, "draws", lambda *a: False)
    assert answer(talker, GenerationConfig(max_tokens=n)) == [9] * n


@pytest.mark.parametrize("token", ("<|im_end|>", "<|endoftext|>"))
def test_a_turn_ends_at_its_end_which_is_not_read(talker, monkeypatch, token):
    monkeypatch.setattr(generate, "draws", lambda *a: False)
    context, ids, end = Context(talker), prompt(talker), talker.tokenizer.token_to_id(token)
    open_with(monkeypatch, 9, 10, end, 11)
    assert answer(talker, GenerationConfig(), ids, context) == [9, 10] and context.ids == [*ids, 9, 10]


def test_the_vocabulary_says_nothing_about_pictures(talker, monkeypatch):
    """BOI and EOI are the extra row's to say, however likely the language model holds them."""
    config, logits = talker.model.config, torch.zeros(talker.model.config.vocab_size)
    logits[[config.boi_id, config.eoi_id, 9]] = torch.tensor([5.0, 4.0, 3.0])
    monkeypatch.setattr(talker.model, "logits", lambda text: logits)
    monkeypatch.setattr(generate, "draws", lambda *a: False)
    assert answer(talker, GenerationConfig(max_tokens=3)) == [9, 9, 9]
    assert logits[config.boi_id] == 5  # the model's own logits stay as they are


@pytest.mark.parametrize("drawing", (False, True))
def test_a_full_context_ends_the_turn(talker, monkeypatch, drawing):
    monkeypatch.setattr(generate, "draws", lambda *a: drawing)
    monkeypatch.setattr(generate, "choose", lambda *a: torch.tensor([9]))
    ids, P = prompt(talker), talker.model.config.num_patches
    for room in range(1, P + 8):
        limit = len(ids) + room
        talker.model.config = dataclasses.replace(talker.model.config, max_position_embeddings=limit)
        context = Context(talker)
        got = kinds(talker, answer(talker, GenerationConfig(steps=1), ids, context))
        assert len(context) == context.cache.length and 0 <= context.room <= 1
        assert ("P" in got) == (drawing and room > P + 2)


def test_a_turn_repeats_for_a_seed_and_differs_for_another(talker):
    options = GenerationConfig(max_tokens=15, temperature=1.0, steps=2, seed=4, sampler="ddpm")
    a, b, c = (answer(talker, dataclasses.replace(options, seed=s)) for s in (4, 4, 5))
    assert kinds(talker, a) == kinds(talker, b) != kinds(talker, c) and "P" in kinds(talker, a)
    assert all(not isinstance(x, torch.Tensor) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_pictures_differ_by_seed_and_by_their_number_in_the_conversation(talker, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        generate, "denoise", lambda t, p, seed, *a: seeds.extend(seed) or torch.zeros(1, 36, 8, 8)
    )
    monkeypatch.setattr(generate, "draws", lambda *a: True)
    for seed in (0, 1):
        context = Context(talker)
        for _ in range(2):
            answer(talker, GenerationConfig(max_tokens=1, max_images=2, seed=seed), context=context)
    assert len(seeds) == 8 == len(set(seeds)) and all(0 <= s < 2**63 for s in seeds)


def test_every_field_of_the_generation_config_is_followed(talker, monkeypatch):
    options = GenerationConfig(
        temperature=0.5, top_k=7, top_p=0.9, steps=5, cfg=2.5, sampler="ddpm", max_tokens=1
    )
    asked, end = {}, talker.model.config.eos_id
    monkeypatch.setattr(
        generate, "draws", lambda logit, *how: asked.update(draws=how[0]) or "paint" not in asked
    )
    monkeypatch.setattr(
        generate, "choose", lambda logits, *how: asked.update(choose=how[:3]) or torch.tensor([end])
    )
    monkeypatch.setattr(
        generate, "denoise", lambda t, p, s, *how: asked.update(paint=how) or torch.zeros(1, 36, 8, 8)
    )
    predictor = Context.predictor
    monkeypatch.setattr(Context, "predictor", lambda c, cfg: asked.update(cfg=cfg) or predictor(c, cfg))
    answer(talker, options, watch=print)
    assert asked == dict(draws=0.5, choose=(0.5, 7, 0.9), paint=(5, "ddpm", print), cfg=2.5)


def test_whether_to_draw_follows_the_log_odds():
    generator = torch.Generator().manual_seed(0)
    assert draws(torch.tensor(0.1), 0.0, generator) and not draws(torch.tensor(-0.1), 0.0, generator)
    for logit, temperature in ((1.0, 1.0), (1.0, 0.5), (-2.0, 2.0)):
        share = sum(draws(torch.tensor(logit), temperature, generator) for _ in range(4000)) / 4000
        assert abs(share - torch.sigmoid(torch.tensor(logit / temperature)).item()) < 0.03


@torch.no_grad()
def test_the_decision_to_draw_is_the_extra_rows(talker, monkeypatch):
    """At temperature 0 a picture comes where its log-odds are positive, and nowhere else."""
    context, ids = Context(talker), prompt(talker)
    open_with(monkeypatch, *words(talker, 25))
    got = kinds(talker, answer(talker, GenerationConfig(max_tokens=25, max_images=2, steps=1), ids, context))
    wanted, fresh = [], Forgetful(talker)
    features = fresh.read(ids)
    for event, latent in zip(got, latents_beside(got, context.latents), strict=True):
        wanted.append(talker.model.draw_logit(features).item() > 0 and wanted.count(True) < 2)
        ids_of = [talker.model.config.boi_id, IMAGE, talker.model.config.eoi_id] if event == "P" else [event]
        features = fresh.read(ids_of, [latent] if event == "P" else [])
    assert [e == "P" for e in got] == wanted and True in wanted and False in wanted


def latents_beside(events: list, latents: list) -> list:
    """For each event its latent, or None."""
    latents = iter(latents)
    return [next(latents) if e == "P" else None for e in events]


@pytest.mark.parametrize("thinking", (False, True))
def test_a_chat_reads_what_training_reads(talker, thinking):
    """Up to the answer, the ids of a conversation are the beginning of what `chat_document` makes of it."""
    config, rng = talker.model.config, random.Random(thinking)
    for _ in range(20):
        messages = conversation(rng, thinking)
        ids = encode(
            talker.tokenizer, apply_chat_template(messages[:-1], thinking), config.boi_id, config.eoi_id
        )
        document = chat_document(messages, talker.tokenizer, config, rng)
        assert document.ids[: len(ids)] == ids and len(document.ids) > len(ids)
        assert document.max_t[: ids.count(IMAGE)] == [0] * ids.count(IMAGE)
    dropped = chat_document(conversation(rng, thinking, ["draw"]), talker.tokenizer, config, rng, True)
    assert dropped.ids == [config.boi_id, IMAGE]  # and that is what `predictor` compares with


@pytest.mark.parametrize(
    "cfg, cfg_image", ((2.0, 3.0), (3.0, 3.0), (2.0, 1.0), (0.0, 1.0), (1.0, 1.0), (1.0, 2.0))
)
def test_guidance_of_an_edit_is_over_the_picture_and_over_the_instruction(trained, cfg, cfg_image):
    """The three predictions are computed apart, from rows of their own, and combined by the formula."""
    model, config = trained.model, trained.model.config
    P, source = config.num_patches, [config.boi_id, IMAGE, config.eoi_id]
    generator = torch.Generator().manual_seed(5)
    shape = (1, config.latent_channels, config.latent_size, config.latent_size)
    latent, x = (torch.randn(shape, generator=generator) for _ in range(2))
    t, clean, boi = torch.tensor([400]), torch.zeros(1, dtype=torch.long), [config.boi_id]
    words = encode_text(trained, "make it green", room=0)
    eps = []
    for row in ([*source, *words, *boi], [*source, *boi], boi):
        images = torch.cat([latent] * row.count(IMAGE) + [x])
        times = torch.cat([clean] * row.count(IMAGE) + [t])
        hidden = model.encode(Tokens.rows([[*row, IMAGE]], P), images, times)
        eps.append(trained.diffusion.eps_from_output(model.unet_output(hidden)[-1:], x, t))
    wanted = eps[2] + cfg_image * (eps[1] - eps[2]) + cfg * (eps[0] - eps[1])

    seen = {}

    def stop(trained, predict, *rest):
        seen["eps"] = predict(x, t)
        return latent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "denoise", stop)
        patch.setattr(generate, "encode_pictures", lambda *a: latent)
        edit_images(trained, torch.zeros(1, 3, 8, 8), ["make it green"], [0], cfg=cfg, cfg_image=cfg_image)
    torch.testing.assert_close(seen["eps"], wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("end", (3, 5, "eos"))
def test_a_text_ends_at_every_id_that_ends_one(talker, monkeypatch, end):
    model, eos = talker.model, talker.model.config.eos_id
    model.config = dataclasses.replace(model.config, end_ids=(eos, 3, 5))
    monkeypatch.setattr(generate, "draws", lambda *how: False)
    monkeypatch.setattr(generate, "choose", lambda *a, **how: torch.tensor(next(script)))
    script = iter([[7], [9], [eos if end == "eos" else end], [8]])
    assert answer(talker, GenerationConfig(max_tokens=9)) == [7, 9] and next(script) == [8]
    hidden = model.encode(Tokens.text(torch.tensor([words(talker, 4)])))
    script = iter([[7], [9], [eos if end == "eos" else end], [8]])
    assert continue_text(model, hidden.text[-1:], hidden.cache, 9) == [[7, 9]] and next(script) == [8]
