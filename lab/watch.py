"""What a run shows while it trains: the validation error, sheets of fixed prompts and edits, and curves."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from checkpoint import Trained, append_metrics, read_metrics
from config import Bar
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
    """The training error of 96 fixed documents under the right and under another caption, by timestep.

    Without "permuted" where all their captions are alike.
    """
    out: dict[str, list] = {"t": list(TIMESTEPS)}
    for key, documents in zip(("right", "permuted"), run.documents.validation(96), strict=True):
        if not documents:
            continue
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
            before, cut = source.pixels(list(before)), [documents.tokenise(w, 2) for w in words]
            words = [documents.tokenizer.decode(ids) for ids in cut]  # as training reads them
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
    """OUT/curves.png from metrics.jsonl, by the main process."""
    if not run.team.is_main:
        return
    page = figures.training_curves(read_metrics(run.out / "metrics.jsonl"), TIMESTEPS)
    figures.save_image(page, run.out / "curves.png")


@contextlib.contextmanager
def asking_to_stop(run: Run) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM ask the run to stop after the step; Ctrl-C once more ends it at once."""

    def ask(number: int, _: object) -> None:
        if run.asked["stop"] and number == signal.SIGINT:
            raise KeyboardInterrupt
        if run.team.is_main and not run.asked["stop"]:  # not print, which may be what was interrupted
            os.write(2, b"\nending with a checkpoint after this step; Ctrl-C ends at once, without\n")
        run.asked["stop"] = True

    # what is ignored stays so, for a job in the background
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    former = {n: signal.signal(n, ask) for n in numbers}
    try:
        yield
    finally:
        for n, handler in former.items():
            signal.signal(n, handler or signal.SIG_DFL)


class Progress:
    """The bar of a run, and its lines in metrics.jsonl; the main process writes them."""

    def __init__(self, run: Run):
        self.run, self.first, self.start = run, run.step, time.perf_counter()
        self.window: list[dict[str, float]] = []  # the losses of the steps since the last line
        self.window_start, self.waited, self.saved = self.start, 0.0, self.start
        bar = dict(total=run.config.steps, initial=run.step, unit="step", desc="training")
        self.bar = Bar(**bar, quiet=not run.team.is_main)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count: pictures a second are those of training alone."""
        pause = time.perf_counter()
        yield
        self.waited += time.perf_counter() - pause

    def checkpoint_is_due(self) -> bool:
        """Whether --checkpoint-minutes have passed since this was last so. The main process decides."""
        now, wait = time.perf_counter(), 60 * self.run.config.checkpoint_minutes
        due = self.run.team.is_main and 0 < wait <= now - self.saved
        self.saved = now if due else self.saved
        return due

    def add(self, losses: dict[str, float], more: dict, lr: float, last: bool) -> None:
        """One more step; and a line, if it is the last, if there is `more` to say, or if it is time."""
        config, now = self.run.config, time.perf_counter()
        self.window.append(losses)
        late = 0 < 60 * config.log_minutes <= now - self.window_start
        if last or more or late or self.run.step % config.log_every == 0:
            pictures = len(self.window) * config.batch_size
            rate = pictures / max(1e-9, now - self.window_start - self.waited)
            line = log_line(self.run.step, self.window, lr, rate, self.run.seconds + now - self.start) | more
            if self.run.team.is_main:
                append_metrics(self.run.out, line)
                show(self.bar, line)
            self.window, self.window_start, self.waited = [], now, 0.0
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        if self.run.team.is_main:
            steps, seconds = self.run.step - self.first, time.perf_counter() - self.start
            pictures = steps * self.run.config.batch_size
            print(f"{steps} steps, {pictures} pictures in {seconds:.0f} s; all of it is in {self.run.out}")


def log_line(
    step: int, window: list[dict], lr: float, rate: float, seconds: float
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


def show(bar: Bar, line: dict) -> None:
    """A line of metrics.jsonl for people: behind the bar, and at validations as a line of its own."""
    loss = {k: math.nan if line[f"{k}_loss"] is None else line[f"{k}_loss"] for k in ("ddpm", "lm")}
    if "val" in line:
        middle = len(TIMESTEPS) // 2
        right, permuted = (line["val"].get(k, [math.nan] * 5)[middle] for k in ("right", "permuted"))
        other = "no other caption" if math.isnan(permuted) else f"{permuted:.4f} under another"
        bar.write(
            f"step {line['step']}: ddpm {loss['ddpm']:.4f}, lm {loss['lm']:.4f}; "
            f"validation at t = {TIMESTEPS[middle]}: {right:.4f} under the right caption, "
            f"{other}; {line['images_per_second']:.0f} pictures/s"
        )
    rate = f"{line['images_per_second']:.0f} pictures/s"
    bar.set_postfix_str(f"ddpm {loss['ddpm']:.4f}, lm {loss['lm']:.3f}, {rate}")
