"""sample.py: what is computed when, what a picture depends on, which token is chosen, and what is written."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import small
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from checkpoint import Trained
from data import Recipe, Shapes, make_batch
from diffusion import timesteps
from model import IMAGE, Cache, Tokens
from sample import choose, continue_text, describe_images, encode_text, generate_images, generate_text

PROMPTS = ["a red circle", "on a white background, in the top left, a small blue cross", "green"]
SEEDS = [11, 22, 33]


@pytest.fixture
def trained() -> Trained:
    return small.perturbed()


class Spy:
    """Records what `model.encode` is called with and what it returns."""

    def __init__(self, trained: Trained, monkeypatch):
        self.calls, encode = [], trained.model.encode

        def spying(tokens, latents=None, t=None, cache=None, keep=True):
            hidden = encode(tokens, latents, t, cache, keep)
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
        assert together.dtype == torch.uint8 and together.shape == (3, 3, 32, 32)
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
        assert len(latents) == 2 * n and t.shape == (2 * n,)
        assert torch.equal(latents[:n], latents[n:])  # with and without the prompt, the same noisy latent
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
        sample,
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
    recipe = Recipe(caption_first=1, caption_drop=1)
    ids = [encode_text(trained, p, room=0) for p in PROMPTS]
    dropped = make_batch(ids, torch.zeros(3, 1, 1, 1), recipe, config, random.Random(0))
    kept = make_batch(ids, torch.zeros(3, 1, 1, 1), Recipe(1, 0), config, random.Random(0))
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
        return [x.clone() for x in (*cache.k, *cache.v, cache.image, cache.position, cache.document)]

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
    pictures = Shapes().validation(3)[0]
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
    pictures = Shapes().validation(2)[0]
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
    monkeypatch.setattr(sample, "choose", lambda *a: torch.tensor(next(script)))
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


# ---- the command ----


def run(*args: object, folder: Path) -> str:
    return small.good(sample, "--checkpoint", small.shapes_run(), *map(str, args), folder=folder)


@pytest.mark.parametrize("sampler", ("ddim", "ddpm"))
def test_the_same_seed_and_arguments_write_the_same_file_byte_for_byte(tmp_path, sampler):
    flags = ("--prompt", PROMPTS[0], "--n", 3, "--steps", 4, "--sampler", sampler)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*flags, "--seed", seed, "--out", f"{name}.png", "--gif", f"{name}.gif", folder=tmp_path)
    for kind in ("png", "gif"):
        a, b, c = ((tmp_path / f"{name}.{kind}").read_bytes() for name in "abc")
        assert a == b != c


def test_several_pictures_become_a_grid_each_with_its_own_noise(tmp_path):
    out = run(
        "--prompt",
        PROMPTS[0],
        "--n",
        4,
        "--steps",
        2,
        "--scale",
        0,
        "--out",
        "deep/er/grid.png",
        folder=tmp_path,
    )
    assert "deep/er/grid.png: 4 pictures, 64 x 64 pixels" in out
    with Image.open(tmp_path / "deep/er/grid.png") as image:
        assert image.format == "PNG" and image.size == (64, 64)
        tiles = [image.crop((x, y, x + 32, y + 32)).tobytes() for y in (0, 32) for x in (0, 32)]
    assert len(set(tiles)) == 4


def test_scale_enlarges_without_smoothing(tmp_path):
    for scale in (0, 64):
        run("--prompt", "red", "--steps", 1, "--scale", scale, "--out", f"{scale}.png", folder=tmp_path)
    with Image.open(tmp_path / "0.png") as a, Image.open(tmp_path / "64.png") as b:
        assert a.size == (32, 32) and b.size == (64, 64)
        assert a.resize((64, 64), Image.Resampling.NEAREST).tobytes() == b.tobytes()


def test_labels_are_written_below_their_pictures(tmp_path):
    flags = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--steps", 1)
    run(*flags, "--labels", "--out", "with.png", folder=tmp_path)
    with Image.open(tmp_path / "with.png") as page:
        assert page.width == 2 * 138 + 10 and page.height > 128 + 20
        below = page.crop((10, 10 + 128 + 2, page.width, page.height)).convert("L")
        assert below.getextrema()[0] < 100  # there is ink


def test_a_film_shows_the_noise_becoming_the_picture(tmp_path):
    out = run(
        *("--prompt", PROMPTS[1], "--prompt", PROMPTS[0], "--steps", 5, "--scale", 64),
        *("--gif", "film.gif", "--out", "last.png"),
        folder=tmp_path,
    )
    assert "film.gif: 5 frames" in out
    with Image.open(tmp_path / "film.gif") as film, Image.open(tmp_path / "last.png") as last:
        assert film.format == "GIF" and film.size == last.size and 2 <= film.n_frames <= 5
        film.seek(film.n_frames - 1)
        frame, wanted = (
            torch.frombuffer(bytearray(x.convert("RGB").tobytes()), dtype=torch.uint8).float()
            for x in (film, last)
        )
        assert (frame - wanted).abs().mean() < 25  # a GIF has 256 colours


def test_prompts_from_a_file_are_painted_line_by_line_behind_those_of_flags(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text(
        "a red circle\n\n   a café  \r\nsecond: 50% “off”\n", encoding="utf-8"
    )
    seen = []
    paint = sample.generate_images
    monkeypatch.setattr(
        sample, "generate_images", lambda t, prompts, *a: seen.extend(prompts) or paint(t, prompts, *a)
    )
    run("--prompt", "first", "--prompts", "prompts.txt", "--steps", 1, "--n", 2, folder=tmp_path)
    assert seen[::2] == seen[1::2] == ["first", "a red circle", "a café", "second: 50% “off”"]
    assert (tmp_path / "sample.png").is_file()  # the name without --out


def test_more_prompts_than_fit_a_batch_are_painted_as_if_they_did(trained, tmp_path):
    args = sample.parse(["--prompt", "red", "--n", "5", "--steps", "2", "--gif", "film.gif"])
    sample.check(args)
    with small.inside(tmp_path):
        for batch, name in ((64, "one.png"), (2, "three.png")):
            args.out = name
            sample.paint(trained, args, batch)
            with Image.open("film.gif") as film:
                assert film.n_frames == 2
    with Image.open(tmp_path / "one.png") as a, Image.open(tmp_path / "three.png") as b:
        a, b = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).int() for x in (a, b))
        assert (a - b).abs().max() <= 1


def test_a_painted_picture_can_be_described(tmp_path):
    run("--prompt", PROMPTS[0], "--steps", 1, "--out", "out.png", folder=tmp_path)
    out = run("--caption", "out.png", "--max-tokens", 4, folder=tmp_path)
    assert out.startswith("out.png: ")


def test_text_alone_is_continued_by_the_frozen_model(trained, tmp_path):
    out = run("--text", "the sky is", "--max-tokens", 5, folder=tmp_path)
    wanted = generate_text(sample.load_trained(small.shapes_run()), "the sky is", max_tokens=5)
    assert out == f"the sky is{wanted}\n"


def test_sampled_text_repeats_for_a_seed_and_differs_for_another(tmp_path):
    flags = ("--text", "the sky is", "--max-tokens", 12, "--temperature", 1)
    a, b, c = (run(*flags, "--seed", s, folder=tmp_path) for s in (1, 1, 2))
    assert a == b != c


def test_without_a_checkpoint_the_last_small_run_is_used(tmp_path):
    flags = ("--prompt", "red", "--steps", 1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "last-small").write_text(f"{small.shapes_run()}\n")
    small.good(sample, *flags, "--out", "a.png", folder=tmp_path)
    run(*flags, "--out", "b.png", folder=tmp_path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_file_of_any_size_is_read_square_and_upright(tmp_path):
    image = Image.new("RGB", (90, 30), (10, 200, 30))
    image.paste((250, 0, 0), (30, 0, 60, 30))
    image.save(tmp_path / "wide.png")
    picture = sample.read_picture(str(tmp_path / "wide.png"), 32)
    assert picture.shape == (1, 3, 32, 32)
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
    assert info == {"shift": 2.0, "prediction": "v"} and trained.diffusion.prediction == "v"
    half = trained.diffusion.alpha_bar[500]
    assert 0.15 < half < 0.25  # 0.2 with a shift of 2; 0.5 without
