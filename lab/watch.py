"""What a run shows: validation errors, sheets of fixed prompts and edits, curves, speed, a model card."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import Trained, append_metrics, read_metrics
from config import Bar, say_once
from data import make_batches
from evaluate import TIMESTEPS, errors_by_timestep
from generate import edit_images, generate_images
from lab import figures
from load_qwen3 import SHIPPED
from scale.budget import ATTENTION
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


def model_card(run: Run) -> dict[str, str | bytes]:
    """Of a finished run: README.md, as model hubs show it beside a checkpoint, and the sheets in it."""
    config, last = run.config, read_metrics(run.out / "metrics.jsonl")[-1]
    sheets = {p.name: p.read_bytes() for p in sorted(run.out.glob(f"*-{run.step:06d}.png"))}
    on_hub = run.base not in SHIPPED and not Path(run.base).is_dir()
    frozen = config.lr_text_ratio == 0
    losses = {name: last[name] for name in ("ddpm_loss", "lm_loss") if last[name] is not None}
    rows = ("right caption", last["val"]["right"]), ("another caption", last["val"].get("permuted"))
    form = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    card = form.format(
        run=run,
        config=config,
        tags=", ".join(("lmfusion", *config.tasks)),
        base_model=f"base_model: {run.base}\n" if on_hub else "",
        sheets="".join(f"![]({name})\n" for name in sheets),
        base=run.base if on_hub else Path(run.base).name,
        text="are as they were, and not in this folder" if frozen else "were trained as well",
        losses=", ".join(f"{name} {value:.4f}" for name, value in losses.items()),
        t=" | ".join(f"t = {t}" for t in TIMESTEPS) + " |\n" + "|---" * (len(TIMESTEPS) + 1),
        errors="\n".join(f"| {k} | {' | '.join(f'{x:.4f}' for x in v)} |" for k, v in rows if v),
    )
    return {"README.md": card, **sheets}


@contextlib.contextmanager
def asking_to_stop(run: Run) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM ask the run to stop after the step; Ctrl-C once more stops it at once."""

    def ask(number: int, _: object) -> None:
        if run.asked["stop"] and number == signal.SIGINT:
            raise KeyboardInterrupt
        if run.team.is_main and not run.asked["stop"]:  # not print, which may be what was interrupted
            os.write(2, b"\nstopping after this step, with a checkpoint; a second Ctrl-C stops without one\n")
        run.asked["stop"] = True

    # what is ignored stays so, for a job in the background
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    former = {n: signal.signal(n, ask) for n in numbers}
    try:
        yield
    finally:
        for n, handler in former.items():
            signal.signal(n, handler or signal.SIG_DFL)


# ---- How long a step takes, and how much of it is arithmetic ----


class Stopwatch:
    """Seconds of the parts of a step.

    On a GPU they lie between events on the device, in whose time a part that waits for data counts as well.
    The device is waited for when `read` is called, and then alone. Elsewhere a clock says them.
    """

    def __init__(self, device: str):
        self.on_gpu = torch.device(device).type == "cuda"
        self.laps: list[tuple[str, Any]] = []

    def lap(self, part: str) -> None:
        """What has passed since the last call belongs to `part`; to none, if that is empty."""
        mark: Any = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            mark.record()
        self.laps.append((part, mark))

    def read(self) -> dict[str, float]:
        """Seconds of each part since this was last called."""
        if self.on_gpu:
            self.laps[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for (_, begin), (part, end) in zip(self.laps, self.laps[1:], strict=False):
            if part:
                passed = begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
                seconds[part] = seconds.get(part, 0.0) + passed
        self.laps = []
        return seconds


def best(work: Callable, seconds: float = 3.0) -> float:
    """Shortest time of one run, in seconds, over about `seconds` of trying."""
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


@functools.cache
def product_peak(dtype: torch.dtype, device: str, sizes: tuple[int, ...], seconds: float) -> float:
    """FLOP/s of the fastest product of two square matrices, of some sizes, tried for `seconds` each."""
    rates = []
    for n in sizes:
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        rates.append(2 * n**3 / best(lambda a=a, b=b: a @ b, seconds))
    return max(rates)


def flops_of_step(run: Run, loss: Callable) -> float:
    """FLOPs of this process in a step's forward and backward passes, from 64 documents of the next step.

    loss(model, batch, config): what a step differentiates. The documents pass once more than they would, for
    under torch's counter nothing runs compiled: the step itself would be another one.
    """
    config, documents, flops = run.config, run.documents, 0.0
    # as the step has them, but for a GPU, on which they take more memory than compiled
    size = 8 if torch.device(run.team.device).type == "cuda" else config.micro_batch
    for part in documents.share_of_step(run.step, run.team):
        some = part[:: -(-len(part) // 64) or 1]
        for batch in make_batches(some, documents.source, run.codec, run.model.config, size):
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                loss(run.model, batch.to(run.team.device), config).backward()
            flops += counter.get_total_flops() * len(part) / len(some)
    run.model.zero_grad()
    return flops


def choose_threads(run: Run, loss: Callable) -> None:
    """Settle `--threads`: as many as there are, or one, whichever takes a batch through sooner.

    Beside another busy process, threads wait for each other, and one alone is several times as fast. What is
    found is kept in the checkpoints, for other threads round otherwise.
    """
    config, most = run.config, torch.get_num_threads()
    alone = run.team.size == 1 and torch.device(run.team.device).type == "cpu"
    if alone and not config.threads and most > 1:
        (batch, *_), times = run.batches(), {}
        for n in (1, most):
            torch.set_num_threads(n)
            times[n] = best(lambda: loss(run.model, batch, config).backward(), 1.0)
        run.model.zero_grad()
        run.config = replace(config, threads=min(times, key=times.get))
        seconds = ", ".join(f"{x:.2f} s with {n}" for n, x in times.items())
        say_once(f"threads: {run.config.threads} (a batch takes {seconds})")
    if run.config.threads:
        torch.set_num_threads(run.config.threads)


# ---- Lines ----


class Progress:
    """The bar of a run, and its lines in metrics.jsonl; the main process writes them.

    A line is about the steps since the one before: "step" (the last of them) and "lr" (its learning rate);
    "loss", "lm_loss", "ddpm_loss", "draw_loss", their means; "images_per_second", of all processes;
    "flops_per_second", of this process (forward and backward passes, see `flops_of_step`), and "peak_share",
    that over `product_peak`; "seconds" since the run began; and how many of them a step takes for
    "seconds_data", "seconds_forward", "seconds_backward" and "seconds_optimizer" (see `Stopwatch`). Some
    have "val" (see `validate`) and "watched" (see train.train).
    """

    def __init__(self, run: Run, loss: Callable):
        """loss: as `flops_of_step` takes it."""
        choose_threads(run, loss)
        self.flops, self.peak = flops_of_step(run, loss), math.nan
        if run.team.is_main:
            sizes = (4096, 8192) if torch.device(run.team.device).type == "cuda" else (1024,)
            self.peak = product_peak(getattr(torch, run.config.dtype), run.team.device, sizes, 0.1)
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
            n = len(self.window)
            rate = n / max(1e-9, now - self.window_start - self.waited)  # steps a second
            line = {"step": self.run.step} | mean_losses(self.window) | {"lr": lr}
            line |= {"images_per_second": round(rate * config.batch_size, 1)}
            line |= {"flops_per_second": self.flops * rate, "peak_share": self.flops * rate / self.peak}
            line |= {"seconds": round(self.run.seconds + now - self.start, 2)}
            line |= {f"seconds_{part}": round(x / n, 6) for part, x in self.run.clock.read().items()} | more
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


def mean_losses(window: list[dict[str, float]]) -> dict[str, float | None]:
    """Means over some steps; None where a loss had no target in any."""
    known = {k: [w[k] for w in window if k in w] for k in ("loss", "lm_loss", "ddpm_loss", "draw_loss")}
    return {k: sum(values) / len(values) if values else None for k, values in known.items()}


def show(bar: Bar, line: dict) -> None:
    """A line of metrics.jsonl for people: behind the bar, and at validations as a line of its own."""
    known = [(k, line[f"{k}_loss"]) for k in ("ddpm", "lm") if line[f"{k}_loss"] is not None]
    losses = ", ".join(f"{k} {x:.4f}" for k, x in known)
    if "val" in line:
        middle = len(TIMESTEPS) // 2
        right, permuted = (line["val"].get(k, [math.nan] * 5)[middle] for k in ("right", "permuted"))
        other = "no other caption" if math.isnan(permuted) else f"{permuted:.4f} under another"
        bar.write(
            f"step {line['step']}: {losses}; "
            f"validation at t = {TIMESTEPS[middle]}: {right:.4f} under the right caption, "
            f"{other}; {line['images_per_second']:.0f} pictures/s"
        )
    work = f"{line['flops_per_second'] / 1e9:.0f} GFLOP/s"
    share = f"{100 * line['peak_share']:.0f}% of the product peak"
    rates = f"{line['images_per_second']:.0f} pictures/s, {work} ({share})"
    bar.set_postfix_str(f"{losses}, {rates}")
