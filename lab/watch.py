"""What a run shows while it trains: the validation error, sheets of fixed prompts and edits, and curves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from checkpoint import Trained, read_metrics
from data import make_batches
from evaluate import TIMESTEPS, errors_by_timestep
from generate import edit_images, generate_images
from lab import figures
from scale.parallel import release

if TYPE_CHECKING:
    from train import Run


def as_trained(run: Run) -> Trained:
    """A run as the functions that generate and evaluate take it."""
    info = {"model": run.overrides, "base": run.base}
    return Trained(run.model, run.documents.tokenizer, run.config.diffusion, run.codec, info, run.out)


def validate(run: Run) -> dict[str, list]:
    """The training error of 96 fixed documents under the right and under another caption, by timestep."""
    out: dict[str, list] = {"t": list(TIMESTEPS)}
    for key, documents in zip(("right", "permuted"), run.documents.validation(96), strict=True):
        size, errors = run.config.micro_batch or len(documents), torch.zeros(len(TIMESTEPS))
        for i in range(0, len(documents), size):
            part = documents[i : i + size]
            (batch,) = make_batches(part, run.documents.source, run.codec, run.model.config)
            batch = batch.to(run.team.device)
            found = errors_by_timestep(run.model, run.config.diffusion, batch, run.config.loss_weighting)
            errors += torch.tensor(found) * len(part) / len(documents)
        out[key] = errors.tolist()
    release(run.model)
    return out


@contextlib.contextmanager
def ema_weights(run: Run) -> Iterator[None]:
    """Inside, the model has the averaged weights, if there are any."""
    ema = run.ema or {}
    kept = {name: run.trained[name].detach().clone() for name in ema}

    @torch.no_grad()
    def put(values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            run.trained[name].copy_(value)

    put(ema)
    try:
        yield
    finally:
        put(kept)


def draw_sheets(run: Run) -> None:
    """OUT/sheet-STEP.png: fixed prompts, painted with fixed noise; OUT/edits-STEP.png: fixed edits."""
    documents, source, trained = run.documents, run.documents.source, as_trained(run)
    pages = {}
    with ema_weights(run):
        if "edit" in run.config.tasks:
            before, _, words = zip(*source.validation_edits(9), strict=True)
            before = source.pixels(list(before))
            words = [
                documents.tokenizer.decode(documents.tokenise(w, 2)) for w in words
            ]  # cut as in training
            after = edit_images(trained, before, words, seeds=list(range(len(words))))
            pictures = torch.stack((before, after), 1).flatten(0, 1)
            pages["edits"] = pictures, [x for w in words for x in ("", w)]
        # a caption that training cuts would be an error in sampling
        prompts = [p for p in source.prompts() if documents.fits(p)]
        if prompts and set(run.config.tasks) != {"edit"}:
            pages["sheet"] = generate_images(trained, prompts, seeds=list(range(len(prompts)))), prompts
        release(run.model)
    if run.team.is_main:
        for name, (pictures, captions) in pages.items():
            figures.save_image(figures.sheet(pictures, captions), run.out / f"{name}-{run.step:06d}.png")


def draw_curves(run: Run) -> None:
    """OUT/curves.png from metrics.jsonl."""
    page = figures.training_curves(read_metrics(run.out / "metrics.jsonl"), TIMESTEPS)
    figures.save_image(page, run.out / "curves.png")


def log_line(
    step: int, window: list[dict[str, float]], lr: float, rate: float, seconds: float
) -> dict[str, float | None]:
    """A line of metrics.jsonl: means over the steps since the last one; None where a loss had no target."""
    known = {k: [w[k] for w in window if k in w] for k in ("loss", "lm_loss", "ddpm_loss", "draw_loss")}
    return {
        "step": step,
        **{k: sum(values) / len(values) if values else None for k, values in known.items()},
        "lr": lr,
        "images_per_second": round(rate, 1),
        "seconds": round(seconds, 2),
    }


def show(bar: tqdm, line: dict) -> None:
    """A line of metrics.jsonl for people: behind the bar, and at validations as a line of its own."""
    loss = {k: math.nan if line[f"{k}_loss"] is None else line[f"{k}_loss"] for k in ("ddpm", "lm")}
    if "val" in line:
        middle = len(TIMESTEPS) // 2
        right, permuted = line["val"]["right"][middle], line["val"]["permuted"][middle]
        bar.write(
            f"step {line['step']}: ddpm {loss['ddpm']:.4f}, lm {loss['lm']:.4f}; "
            f"validation at t = {TIMESTEPS[middle]}: {right:.4f} under the right caption, "
            f"{permuted:.4f} under another; {line['images_per_second']:.0f} pictures/s"
        )
    bar.set_postfix(
        ddpm=f"{loss['ddpm']:.4f}", lm=f"{loss['lm']:.3f}", ips=f"{line['images_per_second']:.0f}"
    )
