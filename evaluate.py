"""What a trained model can do: the paper's evaluation (Section 4.3), as a table and as JSON.

python evaluate.py                              # the last run of --config small
python evaluate.py --checkpoint runs/other --n 228 --json results.json --sheet results.png
python evaluate.py --checkpoint runs/qwen3-8b --text book.txt --choices hellaswag.jsonl --data coco/val

On the built-in shapes, combinations that training never showed (--split validation for every choice, and the
other ones, the default, for what is reported):

prompt match   each attribute, and all at once, read off the painted picture (small/world.py); strict: and
               the picture hardly differs from a rendering of what was asked for
captions       of held-out pictures: CIDEr, and exactly right, word for word
Frechet        the distance of painted from real pictures (lab/metrics.py: features of our own, not FID's)
validation     the diffusion error under the right and under another caption, by timestep
language       questions about the text world, and over several sentences (lab/language.py)
text           perplexity of the base and of the trained model, and whether both are the same to the last bit

On files, with any checkpoint: --text, --choices (multiple choice), --data (CIDEr of the captions it writes).

Shapes: M pictures; pictures are uint8 (M, 3, S, S), C, h, w a latent.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import Trained, check_device, load_trained, write_atomic
from config import Bar, Parser, check_range, read_text, run_command, tune_torch
from data import CAPTION_FIRST, Batch, caption_document, collate, permuted
from diffusion import SAMPLERS, Diffusion, T
from generate import derive_seed, describe_images, encode_text, generate_images, picture_size
from lab import figures
from lab.language import knowledge, multiple_choice, perplexity, puzzles, read_questions, reasoning
from lab.metrics import caption_tokens, cider, exact_match, frechet
from load_qwen3 import encode_plain, materialise, model_config, resolve, text_tensors
from model import LMFusion
from scale.pictures import Pictures, load_pictures
from small.world import PIXELS, SPLITS, STRICT, all_scenes, prompt_match, render, text_document

BATCH = 76  # of prompts
TIMESTEPS = (100, 300, 500, 700, 900)


def in_batches(work: Callable[..., Iterable[Any]], what: str, size: int, *columns: Sequence[Any]) -> list:
    """The results of work(*columns) on `size` rows of the columns at a time, with a progress bar."""
    results = []
    for i in Bar(range(0, len(columns[0]), size), desc=what, leave=False):
        results += list(work(*(c[i : i + size] for c in columns)))
    return results


@torch.no_grad()
def errors_by_timestep(model: LMFusion, diffusion: Diffusion, batch: Batch, weighting: str) -> list[float]:
    """The diffusion loss of a batch at each of TIMESTEPS, under the batch's own noise."""
    errors = []
    for value in TIMESTEPS:
        t = torch.full((len(batch.eps),), value, device=batch.eps.device)
        x_t, t, which = batch.noised(diffusion, t)
        hidden = model(batch.prefix, batch.rest, x_t, t)[1]
        output, eps = model.unet_output(hidden, which), batch.eps
        if which is not None:
            x_t, t, eps = x_t[which], t[which], eps[which]
        predicted = diffusion.eps_from_output(output, x_t, t)
        errors.append(diffusion.loss(predicted, eps, t, weighting).item())
    return errors


def validation_error(trained: Trained, pictures: Tensor, captions: list[str]) -> dict:
    """Mean squared error of v under the right and under a permuted caption (if there is one), by timestep."""
    config, device = trained.model.config, trained.model.device
    ids = [encode_text(trained, c, room=0) for c in captions]
    latents, out = trained.codec.encode(pictures), {"t": list(TIMESTEPS)}
    for key, rows in (("right", ids), ("permuted", permuted(ids))):
        if not rows:  # there is no other caption
            continue
        documents = [caption_document(None, row, CAPTION_FIRST, config) for row in rows]
        for number, document in enumerate(documents):
            document.seed = number
        batch = collate(documents, latents, config).to(device)
        out[key] = errors_by_timestep(trained.model, trained.diffusion, batch, "v")
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are the same to the last bit; torch.equal takes -0.0 for 0.0."""
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def load_base(trained: Trained) -> LMFusion:
    """The language model that a checkpoint was trained on, as it was.

    Read tensor by tensor. One that equals the trained model's to the last bit is shared with it, so frozen
    text is in memory once. While this model is in use, do not train that one.
    """
    overrides = {**trained.info["model"], "unet_channels": (4, 4), "separation": "none"}
    like, ours, folder = trained.model, trained.model.text_parameters(), resolve(trained.info["base"])
    with torch.device("meta"):
        base = LMFusion(model_config(folder, **overrides))
    read = text_tensors(folder, base)

    def share(name: str) -> Tensor:
        value = read(name).to(like.device, like.dtype)
        return ours[name].detach() if same_bits(ours[name].detach(), value) else value

    materialise(base, share, like.dtype, like.device)
    return base


def text_parameters_changed(model: LMFusion, base: LMFusion) -> list[str]:
    """Names of the text tensors of a model that differ from its base's in any bit."""
    ours, theirs = model.text_parameters(), base.text_parameters()
    return [n for n in theirs if not same_bits(ours[n].detach(), theirs[n].detach())]


@torch.inference_mode()
def text_report(trained: Trained, documents: list[str]) -> dict:
    """Is the text what it was? Every text tensor and the logits compared bit by bit with the base's."""
    base, device = load_base(trained), trained.model.device
    ids = [encode_text(trained, d, room=0) + [base.config.eos_id] for d in documents]
    some = [torch.tensor([row], device=device) for row in ids[:20]]
    return {
        "dtype": str(trained.model.dtype).removeprefix("torch."),
        "perplexity_base": perplexity(base, ids),
        "perplexity_trained": perplexity(trained.model, ids),
        "tensors": len(base.text_parameters()),
        "tensors_changed": text_parameters_changed(trained.model, base),
        "logits_bit_equal": all(torch.equal(trained.model.text_logits(x), base.text_logits(x)) for x in some),
    }


def unseen_documents(seed: int) -> list[str]:
    """Built-in text that the base was not trained on, but by chance."""
    rng = random.Random(f"held-out text {seed}")
    return [text_document(rng) for _ in range(200)]


def language_report(trained: Trained, n: int, seed: int, split: str) -> dict:
    """Built-in multiple choice: what captions never repeat, and n questions over several sentences each."""
    sets = {"knowledge": knowledge(), "reasoning": reasoning(n, seed, split), "puzzles": puzzles(n, seed)}
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
    return int(digits[1]) if (digits := re.search(r"(\d+)$", Path(name).stem)) else name


def describe_pictures(trained: Trained, found: Pictures, max_tokens: int) -> tuple[dict, list[dict]]:
    """The report on pictures with captions (rows of one file are one picture's), and COCO's results."""
    references: dict[str, list[str]] = {}
    for name, caption in zip(found.names, found.captions, strict=True):
        references.setdefault(name, []).append(caption)
    pictures = found.pixels[[found.names.index(name) for name in references]]
    written = in_batches(partial(describe_images, trained, max_tokens=max_tokens), "describing", 32, pictures)
    ids = [image_id(name) for name in references]
    ids = ids if len(set(ids)) == len(ids) else list(references)  # a1.png and b1.png are not one picture
    results = [{"image_id": i, "caption": c} for i, c in zip(ids, written, strict=True)]
    return caption_report(written, list(references.values())), results


def evaluate(
    trained: Trained, n: int, steps: int, cfg: float, sampler: str, seed: int, split: str = "test"
) -> dict:
    """All figures, over n combinations of a split; also the "pictures", and the "prompts_used" for them."""
    held_out = all_scenes(split)
    scenes = random.Random(seed).sample(held_out, n)
    captions = [s.caption for s in scenes]
    seeds = [derive_seed(seed, i) for i in range(n)]
    start = time.perf_counter()
    paint = partial(generate_images, trained, steps=steps, cfg=cfg, sampler=sampler)
    pictures = torch.stack(in_batches(paint, "painting", BATCH, captions, seeds))
    seconds = time.perf_counter() - start
    real = render(scenes, random.Random(seed))
    written = in_batches(partial(describe_images, trained, max_tokens=32), "describing", BATCH, real)
    pairs = list(zip(captions, written, strict=True))
    matched = prompt_match(scenes, pictures)
    strict, residual = matched.pop("strict"), matched.pop("residual")
    report = {"checkpoint": str(trained.folder), "step": trained.info["step"], "split": split, "prompts": n}
    report |= {"held_out_combinations": len(held_out), "steps": steps, "cfg": cfg, "seed": seed}
    return report | {
        "sampler": sampler,
        "prompt_match": matched,
        "strict": strict,
        "residual": residual,
        "template_check": prompt_match(scenes, real)["all"],
        "seconds_per_picture": round(seconds / n, 4),
        "frechet": frechet(pictures, real) if n > 1 else None,
        "captions_exact": sum(a == b for a, b in pairs) / n,
        "captions_cider": caption_report(written, [[c] for c in captions])["cider"],
        "caption_errors": [{"right": a, "written": b} for a, b in pairs if a != b][:8],
        "validation": validation_error(trained, real, captions),
        "language": language_report(trained, 300, seed, split),
        "text": text_report(trained, unseen_documents(seed)),
        "pictures": pictures,
        "prompts_used": captions,
    }


def table(r: dict) -> str:
    """The figures as Markdown."""
    rows = [(k, v) for k, v in r["prompt_match"].items() if k != "all"]
    rows.append(("**all five at once**", r["prompt_match"]["all"], r["strict"]))
    rows.append(("caption of a held-out picture, word for word", r["captions_exact"]))
    rows.append(("(template matching itself, on real pictures)", r["template_check"]))
    head = f"{r['prompts']} held-out prompts ({r['split']}), {r['sampler']} {r['steps']} steps"
    lines = [f"{head}, guidance {r['cfg']}, step {r['step']}:", "", *percentages(rows), ""]
    lines.append("| error of v at t = | " + " | ".join(map(str, r["validation"]["t"])) + " |")
    lines.append("|---" * (len(TIMESTEPS) + 1) + "|")
    for k in (k for k in ("right", "permuted") if k in r["validation"]):
        lines.append(f"| {k} caption | " + " | ".join(f"{v:.4f}" for v in r["validation"][k]) + " |")
    lines += ["", f"strict: and a residual below {STRICT:g} of 255; the median is {r['residual']:.1f}."]
    lines += ["", f"Captions: CIDEr {r['captions_cider']:.3f}."]
    if r["frechet"] is not None:
        lines[-1] += f" Frechet distance of the pictures (own features): {r['frechet']:.4f}."
    found = (f"{k} {100 * f['accuracy']:.1f}% of {f['questions']}" for k, f in r["language"].items())
    return "\n".join([*lines, f"Questions in text: {', '.join(found)}.", text_line(r["text"])])


def percentages(rows: list[tuple]) -> list[str]:
    """The lines of a Markdown table of shares: what, how much is right and, of pictures, strictly right."""
    cells = [[what, *(f"{100 * x:.1f}%" for x in shares), ""][:3] for what, *shares in rows]
    return ["| what | right | strict |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in cells)]


def text_line(text: dict) -> str:
    """What became of the text, in one line."""
    changed = f"{len(text['tensors_changed'])} of {text['tensors']} tensors changed"
    if text["dtype"] != "float32":  # what rounding hides is not seen
        changed += f" as {text['dtype']}"
    logits = "equal to the last bit" if text["logits_bit_equal"] else "DIFFER"
    both = f"base {text['perplexity_base']:.10f}, trained {text['perplexity_trained']:.10f}"
    return f"Text perplexity: {both}; {changed}; logits {logits}"


def read_paragraphs(path: str, flag: str = "--text") -> list[str]:
    """The paragraphs of a text file of more than 20 characters; ValueError if there are none."""
    text = read_text(path, f"{flag} {path}")
    found = [p.strip() for p in re.split(r"\n\s*\n", text) if len(p.strip()) > 20]
    if not found:
        raise ValueError(f"{flag} {path}: no paragraph in it")
    return found


def parse(args: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked: ValueError for a value out of bounds, OSError for a file that cannot be written."""
    parser = Parser(prog="evaluate.py", usage="python evaluate.py [FLAG ...]")
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="run, checkpoint, hub id; else the last small run or the shipped")
    add("--split", choices=SPLITS[1:], default="test", help="validation: to choose; test: to report")
    add("--n", type=int, metavar="N", help="held-out prompts; without it, all of the split")
    add("--steps", type=int, default=25, metavar="N", help="denoising steps")
    add("--cfg", type=float, default=1.5, metavar="S", help="guidance scale; 1 is none")
    add("--seed", type=int, default=0, metavar="N", help="of prompts' order and of all noise")
    add("--json", metavar="FILE", help="write the figures here as well")
    add("--sheet", metavar="FILE", help="write a sheet of the first 36 pictures here")
    add("--text", metavar="FILE", help="instead: perplexity of this file, and of the base's")
    add("--choices", action="append", default=[], metavar="JSONL", help="instead: multiple choice")
    add("--data", metavar="PATH", help="instead: CIDEr of the captions of these pictures")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add = partial(add, rare=True)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model's weights")
    add("--sampler", choices=SAMPLERS, default="ddim", help="ddpm with 250 steps is the paper's")
    add("--captions", metavar="FILE.json", help="with --data: write them here, in the form of COCO's results")
    add("--max-tokens", type=int, default=64, help="longest caption to write for --data")
    add("--base", help="where the base language model lies, if it was moved since training")
    add("--vae", help="where the VAE lies, if it was moved since training")
    args = parser.parse_args(args)
    there = len(all_scenes(args.split))
    args.n = there if args.n is None else args.n
    if not 1 <= args.n <= there:
        raise ValueError(f"--n is {args.n}; there are {there} held-out combinations (--split {args.split})")
    check_range(args, steps=(1, T), cfg=(-100, 100), max_tokens=(1, 10**6))
    if args.captions and not args.data:
        raise ValueError(f"--captions {args.captions} goes with --data")
    check_device(args.device)
    for file, kinds in ((args.json, None), (args.captions, None), (args.sheet, figures.FORMATS)):
        if file:
            figures.check_place(file, kinds)
    return args


def on_files(trained: Trained, args: argparse.Namespace) -> dict:
    """The figures on the user's own files, printed as they come."""
    report: dict = {"checkpoint": str(trained.folder), "step": trained.info["step"]}
    paragraphs = read_paragraphs(args.text) if args.text else []  # all files first, and their errors
    questions = {path: read_questions(path) for path in args.choices}
    pictures = load_pictures(args.data, picture_size(trained)) if args.data else None
    if paragraphs:
        report["text"] = text_report(trained, paragraphs)
        print(text_line(report["text"]))
    by = {"trained": trained.model, "base": load_base(trained)} if questions else {}
    for path, asked in questions.items():
        found = {name: choose_answers(model, trained, asked, name) for name, model in by.items()}
        report.setdefault("choices", {})[path] = found
        parts = [(k, 100 * f["accuracy"], 100 * f["accuracy_unnormalised"]) for k, f in found.items()]
        shares = (f"{name} {by_length:.2f}% ({plain:.2f}%)" for name, by_length, plain in parts)
        print(f"{path}: {len(asked)} questions, {', '.join(shares)}; in brackets, not normalised by length")
    if pictures is not None:
        report["captions"], written = describe_pictures(trained, pictures, args.max_tokens)
        c = report["captions"]
        print(f"{args.data}: {c['pictures']} pictures, CIDEr {c['cider']:.4f}, exact {100 * c['exact']:.1f}%")
        lengths = [len(encode_plain(trained.tokenizer, row["caption"])) for row in written]
        if long := sum(n >= args.max_tokens for n in lengths):
            cut = f"note: {long:,} of {len(lengths):,} captions reach --max-tokens {args.max_tokens}"
            print(f"{cut}, where they are cut", file=sys.stderr)
        if args.captions:
            write_atomic(Path(args.captions), json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    return report


def check_shapes(trained: Trained) -> None:
    """ValueError for a model whose pictures are not of the built-in world's size."""
    side = picture_size(trained)
    if side != PIXELS:
        raise ValueError(f"{trained.folder} paints {side} pixels a side; the built-in shapes have {PIXELS}")


def main() -> None:
    args = parse()
    tune_torch(keep_memory=True)
    trained = load_trained(args.checkpoint, args.base, args.device, getattr(torch, args.dtype), args.vae)
    if args.text or args.choices or args.data:
        report = on_files(trained, args)
    else:
        check_shapes(trained)
        how = args.steps, args.cfg, args.sampler, args.seed, args.split
        report = evaluate(trained, args.n, *how)
        pictures, prompts = report.pop("pictures"), report.pop("prompts_used")
        print(table(report))
        if args.sheet:
            figures.save_image(figures.sheet(pictures[:36], prompts[:36]), args.sheet)
    if args.json:
        write_atomic(Path(args.json), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
