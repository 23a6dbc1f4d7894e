"""Runs of training in the process of the test, and what tests ask of them.

Most are on tiny photos of 16 x 16 pixels (4 patches), where a step takes 20 ms.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import helpers
import torch
from torch import Tensor

from checkpoint import list_checkpoints, read_metrics
from data import Batch, Document, Documents, make_batches
from model import LMFusion
from train import Run, losses

FIXTURES = Path(__file__).resolve().parent / "fixtures"
TASKS = "generate=2,caption=1,edit=3,chat=6"
EDITS = ("--data", helpers.edits() / "all.jsonl")  # edits and captions
SHAPES = ("--data", "shapes", "--image-size", 64, "--latent-patch", 8, "--latent-channels", 16)


class Killed(BaseException):
    """Stands in for kill -9: nothing in the code under test may catch it."""


def new_run(folder: Path, *flags: object, perturb: float = 0.1) -> Run:
    """A run on the tiny photos, with noise on all parameters unless told otherwise."""
    with helpers.inside(folder):
        run = Run(helpers.photo_config(folder / "run", *flags), "small")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=perturb)
    return run


def change(run: Run, **fields: object) -> None:
    """Another configuration of the same run; to make a new one takes longer than a step."""
    run.config, former = dataclasses.replace(run.config, **fields), run.documents
    run.documents = Documents(run.config, run.model.config, former.tokenizer, former.source, former.text)


def batch_of(run: Run, documents: list[Document]) -> Batch:
    (batch,) = make_batches(documents, run.documents.source, run.codec, run.model.config)
    return batch


def draw_batch(run: Run, n: int = 16, seed: int = 0) -> Batch:
    """n documents of a run in one batch; another seed gives others."""
    change(run, batch_size=n, seed=seed)
    return batch_of(run, run.documents.of_step(0, slice(n)))


def run_losses(run: Run, batch: Batch) -> dict[str, Tensor]:
    return losses(run.model, batch, run.config)


def documents_that(run: Run, condition, n: int = 6) -> list[Document]:
    """The first n documents of a run for which the condition holds."""
    numbers, found = iter(range(10_000)), []
    while len(found) < n:
        document = run.documents.draw(random.Random(next(numbers)))
        found += [document] if condition(document) else []
    return found


def take_steps(run: Run, n: int = 4) -> None:
    for _ in range(n):
        run.train_step()


def copies(model: LMFusion) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def changed(before: dict[str, Tensor], model: LMFusion) -> set[str]:
    now = dict(model.named_parameters())
    return {n for n, x in before.items() if not torch.equal(x, now[n])}


def last(folder: Path) -> Path:
    return list_checkpoints(folder)[-1]


def metrics_without_clocks(folder: Path) -> list[dict]:
    lines = read_metrics(folder / "metrics.jsonl")
    clocks = ("seconds", "images_per_second", "flops_per_second", "peak_share")
    return [{k: v for k, v in m.items() if not k.startswith(clocks)} for m in lines]
