"""What a trained model can do: the paper's evaluation (Section 4.3), as a table and as JSON.

python evaluate.py                              # the last run of --config small
python evaluate.py --checkpoint runs/other --n 228 --json results.json --sheet results.png
python evaluate.py --checkpoint runs/qwen3-8b --text book.txt --choices hellaswag.jsonl --data coco/val

On the built-in shapes, combinations that training never showed:

prompt match   each attribute, and all at once, read off the generated picture by template matching that knows
               nothing of the model
captions       of held-out pictures: CIDEr, and exactly right, word for word
Frechet        the distance of painted from real pictures (metrics.py: features of our own, not FID's)
validation     the diffusion error under the right and under another caption, by timestep
language       questions about the text world, and over several sentences (language.py)
text           perplexity of the base and of the trained model, and whether both are the same to the last bit

On files, with any checkpoint: --text, --choices (multiple choice), --data (CIDEr of the captions it writes).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
from attention import Tokens
from checkpoint import Trained, check_device, load_trained, write_atomic
from data import Batch, Recipe, make_batch
from diffusion import Diffusion, T
from generate import continue_text, describe_images, encode_text, generate_images
from lab import figures
from lab.language import knowledge, multiple_choice, perplexity, puzzles, read_questions, reasoning
from lab.metrics import caption_tokens, cider, exact_match, frechet
from load_qwen3 import encode_plain, load_qwen3
from model import LMFusion
from scale.pictures import Pictures, load_pictures
from small.world import (
    ATTRIBUTES,
    COLORS,
    JITTER,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    all_scenes,
    coverage,
    render,
    text_document,
)

TIMESTEPS = (100, 300, 500, 700, 900)


def read_scenes(pictures: Tensor) -> list[Scene]:
    """The scenes whose renderings are nearest, in squared error, to pictures uint8 (n, 3, 32, 32).

    A rendering is a c + (1 - a) b with coverage a, colour c and background b, over all shapes, sizes, places
    and shifts of the middle. Its distance to x is quadratic in c and b, so sums over pixels with weights a
    and 1 - a do.
    """
    x = pictures.double().flatten(2)  # (n, 3, pixels)
    a = coverage().double().flatten(0, 4).flatten(1)  # (m, pixels)
    colors = torch.tensor(list(COLORS.values()), dtype=torch.float64)  # (8, 3)
    xa = torch.einsum("ncp,mp->nmc", x, a)  # sums over the shape
    xb = x.sum(2)[:, None] - xa  # sums over the background
    aa, bb, ab = (a * a).sum(1), ((1 - a) ** 2).sum(1), (a * (1 - a)).sum(1)  # (m,)
    square, product = (colors**2).sum(1), colors @ colors.T
    distance = (  # (n, m, 8, 8), less the constant |x|^2
        -2 * (xa @ colors.T)[..., :, None]
        - 2 * (xb @ colors.T)[..., None, :]
        + aa[:, None, None] * square[:, None]
        + bb[:, None, None] * square
        + 2 * ab[:, None, None] * product
    )
    distance = distance + torch.diag(torch.full((len(COLORS),), torch.inf)).nan_to_num(0.0, posinf=torch.inf)
    best = distance.flatten(1).argmin(1)
    shifts = (2 * JITTER + 1) ** 2
    sizes = (len(SHAPES), len(SIZES), len(PLACES), shifts, len(COLORS), len(COLORS))
    names = (SHAPES, list(SIZES), list(PLACES), None, list(COLORS), list(COLORS))
    found = []
    for index in zip(*(i.tolist() for i in torch.unravel_index(best, sizes)), strict=True):
        shape, size, place, color, background = (n[i] for n, i in zip(names, index, strict=True) if n)
        found.append(Scene(size, color, shape, place, background))
    return found


def prompt_match(wanted: list[Scene], pictures: Tensor) -> dict[str, float]:
    """Share of pictures that show what was asked for: by attribute, and "all" at once."""
    got = read_scenes(pictures)
    out = {
        k: sum(getattr(w, k) == getattr(g, k) for w, g in zip(wanted, got, strict=True)) / len(wanted)
        for k in ATTRIBUTES
    }
    return out | {"all": sum(w == g for w, g in zip(wanted, got, strict=True)) / len(wanted)}


def in_batches(work, n: int, size: int, what: str) -> list:
    """work(i, j) on slices of range(n), with a progress bar; the results joined."""
    results = []
    for i in tqdm(range(0, n, size), desc=what, disable=None):
        results += list(work(i, min(i + size, n)))
    return results


@torch.no_grad()
def errors_by_timestep(
    model: LMFusion, diffusion: Diffusion, batch: Batch, noise: Tensor, weighting: str
) -> list[float]:
    """The diffusion loss of a batch at each of TIMESTEPS, its images under this `noise` (M, C, h, w)."""
    errors = []
    for value in TIMESTEPS:
        t = torch.full((len(noise),), value, device=noise.device)
        x_t, t, which = batch.noised(diffusion, t, noise)
        hidden = model(batch.prefix, batch.rest, x_t, t)[1]
        output, eps = model.unet_output(hidden, which), noise
        if which is not None:
            x_t, t, eps = x_t[which], t[which], noise[which]
        predicted = diffusion.eps_from_output(output, x_t, t)
        errors.append(diffusion.loss(predicted, eps, t, weighting).item())
    return errors


def validation_error(trained: Trained, pictures: Tensor, captions: list[str]) -> dict:
    """Mean squared error of v under the right and under a permuted caption, by timestep."""
    ids = [encode_text(trained, c, room=0) for c in captions]
    device = trained.model.boi_head.device
    latents = trained.codec.encode(pictures).to(device)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    out: dict[str, list] = {"t": list(TIMESTEPS)}
    for key, rows in (("right", ids), ("permuted", ids[1:] + ids[:1])):
        batch = make_batch(
            rows, latents, Recipe(caption_first=1, caption_drop=0), trained.model.config, random.Random(0)
        )
        out[key] = errors_by_timestep(trained.model, trained.diffusion, batch.to(device), noise, "v")
    return out


def load_base(trained: Trained) -> LMFusion:
    """The language model that a checkpoint was trained on, as it was."""
    overrides = {**trained.info["model"], "unet_channels": (4, 4), "separation": "none"}
    like = trained.model.boi_head
    return load_qwen3(trained.info["base"], **overrides).to(device=like.device, dtype=like.dtype)


def text_parameters_changed(model: LMFusion, base: LMFusion) -> list[str]:
    """Names of the text tensors of a model that differ from its base's in any bit."""
    ours, theirs = model.text_parameters(), base.text_parameters()
    return [n for n in theirs if not torch.equal(ours[n], theirs[n])]


@torch.inference_mode()
def text_report(trained: Trained, documents: list[str]) -> dict:
    """Is the text what it was? Every text tensor and the logits compared bit by bit with the base's."""
    base, device = load_base(trained), trained.model.boi_head.device
    ids = [encode_text(trained, d, room=0) + [base.config.eos_id] for d in documents]
    changed = text_parameters_changed(trained.model, base)
    equal = all(
        torch.equal(trained.model.text_logits(x), base.text_logits(x))
        for x in (torch.tensor([row], device=device) for row in ids[:20])
    )
    return {
        "perplexity_base": perplexity(base, ids),
        "perplexity_trained": perplexity(trained.model, ids),
        "tensors": len(base.text_parameters()),
        "tensors_changed": changed,
        "logits_bit_equal": equal,
    }


def language_report(trained: Trained, n: int, seed: int) -> dict:
    """Built-in multiple choice: what captions never repeat, and n questions over several sentences each."""
    sets = {"knowledge": knowledge(), "reasoning": reasoning(n, seed), "puzzles": puzzles(n, seed)}
    return {name: choose_answers(trained.model, trained, questions, name) for name, questions in sets.items()}


def choose_answers(model: LMFusion, trained: Trained, questions: list, what: str) -> dict[str, float]:
    """`multiple_choice` with a checkpoint's tokenizer: by its own model, or by its base."""
    return multiple_choice(model, lambda text: encode_plain(trained.tokenizer, text), questions, what)


def caption_report(written: list[str], references: list[list[str]]) -> dict[str, float]:
    """CIDEr and exact matches of captions, each against all references of its picture."""
    tokens = [caption_tokens(c) for c in written]
    right = [[caption_tokens(r) for r in group] for group in references]
    return {"pictures": len(written), "cider": cider(tokens, right)[0], "exact": exact_match(tokens, right)}


def image_id(name: str) -> int | str:
    """What COCO calls a picture: the number at the end of its name, COCO_val2014_000000391895.jpg."""
    digits = re.search(r"(\d+)$", Path(name).stem)
    return int(digits[1]) if digits else name


def describe_pictures(trained: Trained, found: Pictures, max_tokens: int) -> tuple[dict, list[dict]]:
    """The report on real pictures with one or more captions each, and what was written, in COCO's form.

    Rows of a metadata.jsonl that name one file are references of one picture.
    """
    references: dict[str, list[str]] = {}
    for name, caption in zip(found.names, found.captions, strict=True):
        references.setdefault(name, []).append(caption)
    first = [found.names.index(name) for name in references]
    pictures = found.pixels[first]
    written = in_batches(
        lambda i, j: describe_images(trained, pictures[i:j], max_tokens), len(first), 32, "describing"
    )
    ids = [image_id(name) for name in references]
    ids = ids if len(set(ids)) == len(ids) else list(references)  # a1.png and b1.png are not one picture
    results = [{"image_id": i, "caption": c} for i, c in zip(ids, written, strict=True)]
    return caption_report(written, list(references.values())), results


@torch.inference_mode()
def answers(trained: Trained) -> dict[str, str]:
    """A few greedy continuations by the frozen language model, to look at."""
    out = {}
    for text in (
        "the sky is",
        "a small red circle in the center on a blue background. what color is the circle?",
    ):
        ids = torch.tensor([encode_text(trained, text, room=24)], device=trained.model.boi_head.device)
        hidden = trained.model.encode(Tokens.text(ids))
        new = continue_text(trained.model, hidden.text[-1:], hidden.cache, max_tokens=4)
        out[text] = trained.tokenizer.decode(new[0])
    return out


def evaluate(
    trained: Trained, n: int, steps: int, cfg: float, sampler: str, seed: int, batch: int = 76
) -> dict:
    """All figures, over n held-out combinations; also returns the pictures, under "pictures"."""
    held_out = all_scenes(held_out=True)
    scenes = random.Random(seed).sample(held_out, n)
    captions = [s.caption for s in scenes]
    start = time.perf_counter()
    seeds = [random.Random(f"{seed}-{i}").getrandbits(63) for i in range(n)]
    pictures = torch.stack(
        in_batches(
            lambda i, j: generate_images(trained, captions[i:j], seeds[i:j], steps, cfg, sampler),
            n,
            batch,
            "painting",
        )
    )
    painted = time.perf_counter() - start
    real = render(scenes, random.Random(seed))
    described = in_batches(
        lambda i, j: describe_images(trained, real[i:j], max_tokens=32), n, batch, "describing"
    )
    rng = random.Random(f"held-out text {seed}")
    return {
        "checkpoint": str(trained.folder),
        "step": trained.info["step"],
        "held_out_combinations": len(held_out),
        "prompts": n,
        "sampler": sampler,
        "steps": steps,
        "cfg": cfg,
        "seed": seed,
        "prompt_match": prompt_match(scenes, pictures),
        "template_check": prompt_match(scenes, real)["all"],
        "seconds_per_picture": round(painted / n, 4),
        "frechet": frechet(pictures, real) if n > 1 else None,
        "captions_exact": sum(a == b for a, b in zip(captions, described, strict=True)) / n,
        "captions_cider": caption_report(described, [[c] for c in captions])["cider"],
        "caption_errors": [
            {"right": a, "written": b} for a, b in zip(captions, described, strict=True) if a != b
        ][:8],
        "validation": validation_error(trained, real, captions),
        "language": language_report(trained, 300, seed),
        "text": text_report(trained, [text_document(rng) for _ in range(200)]),
        "answers": answers(trained),
        "pictures": pictures,
        "prompts_used": captions,
    }


def table(r: dict) -> str:
    """The figures as Markdown."""
    lines = [
        f"{r['prompts']} held-out prompts, {r['sampler']} {r['steps']} steps, guidance {r['cfg']}, "
        f"step {r['step']}:",
        "",
        "| what | right |",
        "|---|---|",
    ]
    lines += [
        f"| {k if k != 'all' else '**all five at once**'} | {100 * v:.1f}% |"
        for k, v in r["prompt_match"].items()
    ]
    lines += [
        f"| caption of a held-out picture, word for word | {100 * r['captions_exact']:.1f}% |",
        f"| (template matching itself, on real pictures) | {100 * r['template_check']:.1f}% |",
        "",
        "| error of v at t = | " + " | ".join(map(str, r["validation"]["t"])) + " |",
        "|---" * (len(TIMESTEPS) + 1) + "|",
    ]
    lines += [
        f"| {k} caption | " + " | ".join(f"{v:.4f}" for v in r["validation"][k]) + " |"
        for k in ("right", "permuted")
    ]
    language = ", ".join(
        f"{name} {100 * found['accuracy']:.1f}% of {found['questions']}"
        for name, found in r["language"].items()
    )
    lines += ["", f"Captions: CIDEr {r['captions_cider']:.3f}."]
    if r["frechet"] is not None:
        lines[-1] += f" Frechet distance of the pictures (own features): {r['frechet']:.4f}."
    return "\n".join([*lines, f"Questions in text: {language}.", text_line(r["text"])])


def text_line(text: dict) -> str:
    """What became of the text, in one line."""
    changed = f"{len(text['tensors_changed'])} of {text['tensors']} tensors changed"
    return (
        f"Text perplexity: base {text['perplexity_base']:.10f}, trained {text['perplexity_trained']:.10f}; "
        f"{changed}; logits {'equal to the last bit' if text['logits_bit_equal'] else 'DIFFER'}"
    )


def read_paragraphs(path: str, flag: str = "--text") -> list[str]:
    """The paragraphs of a text file of more than 20 characters; ValueError if there are none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path}: {error}") from None
    found = [p.strip() for p in re.split(r"\n\s*\n", text) if len(p.strip()) > 20]
    if not found:
        raise ValueError(f"{flag} {path}: no paragraph in it")
    return found


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="evaluate.py", description="Figures of a model trained on the built-in shapes.")
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        help="a run or a checkpoint; without it, the last run of --config small",
    )
    add("--base", help="where the base language model lies, if it was moved since training")
    add("--vae", help="where the VAE lies, if it was moved since training")
    add(
        "--n",
        type=int,
        default=len(all_scenes(held_out=True)),
        help="held-out prompts; the default is all of them",
    )
    add("--steps", type=int, default=25, help="denoising steps")
    add("--sampler", choices=("ddim", "ddpm"), default="ddim", help="ddpm with 250 steps is the paper's")
    add("--cfg", type=float, default=3.0, help="guidance scale; 1 is none")
    add("--seed", type=int, default=0, help="of prompts' order and of all noise")
    add("--json", metavar="FILE", help="write the figures here as well")
    add("--sheet", metavar="FILE", help="write a sheet of the first 36 pictures here")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add(
        "--text", metavar="FILE", help="instead: perplexity of the paragraphs of this file, and of the base's"
    )
    add(
        "--choices",
        action="append",
        default=[],
        metavar="FILE.jsonl",
        help='instead: multiple choice; lines of {"context": ..., "choices": [...], "label": 0} (repeatable)',
    )
    add(
        "--data",
        metavar="PATH",
        help="instead: CIDEr of the captions it writes for these pictures (a folder, a metadata.jsonl, tars)",
    )
    add("--captions", metavar="FILE.json", help="with --data: write them here, in the form of COCO's results")
    add("--max-tokens", type=int, default=64, help="longest caption to write for --data")
    args = parser.parse_args(args)
    if not 1 <= args.n <= len(all_scenes(held_out=True)):
        raise ValueError(f"--n is {args.n}; there are {len(all_scenes(held_out=True))} held-out combinations")
    if not 1 <= args.steps <= T:
        raise ValueError(f"--steps is {args.steps}; it must be from 1 to {T}")
    if not -100 <= args.cfg <= 100:
        raise ValueError(f"--cfg is {args.cfg}; it must be from -100 to 100")
    if not 1 <= args.max_tokens <= 10**6:
        raise ValueError(f"--max-tokens is {args.max_tokens}; it must be from 1 to 1000000")
    if args.captions and not args.data:
        raise ValueError(f"--captions {args.captions} goes with --data")
    check_device(args.device)
    for file in (args.json, args.captions):
        if file:
            figures.check_place(file)
    if args.sheet:
        figures.check_place(args.sheet, figures.FORMATS)
    return args


def on_files(trained: Trained, args: argparse.Namespace) -> dict:
    """The figures on the user's own files, printed as they come."""
    report: dict = {"checkpoint": str(trained.folder), "step": trained.info["step"]}
    size = trained.model.config.latent_size * trained.codec.patch
    paragraphs = read_paragraphs(args.text) if args.text else []  # all files first, and their errors
    questions = {path: read_questions(path) for path in args.choices}
    pictures = load_pictures(args.data, size) if args.data else None
    if paragraphs:
        report["text"] = text_report(trained, paragraphs)
        print(text_line(report["text"]))
    for path, asked in questions.items():
        by = {"trained": trained.model, "base": load_base(trained)}
        found = {name: choose_answers(model, trained, asked, name) for name, model in by.items()}
        report.setdefault("choices", {})[path] = found
        shares = (
            f"{name} {100 * f['accuracy']:.2f}% ({100 * f['accuracy_unnormalised']:.2f}%)"
            for name, f in found.items()
        )
        print(f"{path}: {len(asked)} questions, {', '.join(shares)}; in brackets, not normalised by length")
    if pictures is not None:
        report["captions"], written = describe_pictures(trained, pictures, args.max_tokens)
        c = report["captions"]
        print(f"{args.data}: {c['pictures']} pictures, CIDEr {c['cider']:.4f}, exact {100 * c['exact']:.1f}%")
        if args.captions:
            write_atomic(Path(args.captions), json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    return report


def main() -> None:
    args = parse()
    cli.tune_torch()
    trained = load_trained(args.checkpoint, args.base, args.device, vae=args.vae)
    if args.base:
        trained.info["base"] = args.base
    if args.text or args.choices or args.data:
        report = on_files(trained, args)
        if args.json:
            write_atomic(Path(args.json), json.dumps(report, indent=1) + "\n")
        return
    config, codec = trained.model.config, trained.codec
    if config.latent_size * codec.patch != 32:
        raise ValueError(
            f"{trained.folder} paints {config.latent_size * codec.patch} pixels a side; the built-in "
            "shapes, which this program reads, have 32"
        )
    report = evaluate(trained, args.n, args.steps, args.cfg, args.sampler, args.seed)
    pictures, prompts = report.pop("pictures"), report.pop("prompts_used")
    print(table(report))
    if args.json:
        write_atomic(Path(args.json), json.dumps(report, indent=1) + "\n")
    if args.sheet:
        figures.save_image(figures.sheet(pictures[:36], prompts[:36]), args.sheet)


if __name__ == "__main__":
    cli.run(main)
