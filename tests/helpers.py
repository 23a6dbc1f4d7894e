"""A tiny base, tiny pictures and a tiny trained run, made once a session, and a way to call the commands.

Everything lies in one temporary folder, which goes when the session ends. The commands are called in this
process, because a new one takes three seconds to import torch; `call` gives back what a shell would show.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

import train
from checkpoint import Trained, load_trained
from config import run_command
from model import LMFusion
from scale.parallel import full_tensor
from small import pretrain
from small.shapes import Shapes

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # not hidden_size / heads
    max_position_embeddings=96,
)
SHAPES_FLAGS = "--config small --unet-channels 8,12 --batch-size 6 --warmup 1".split()
PHOTO_FLAGS = [*SHAPES_FLAGS, *"--image-size 16 --latent-patch 4 --latent-channels 8 --log-every 1".split()]
session = tempfile.TemporaryDirectory(prefix="lmfusion-tests-")


class Result(NamedTuple):
    """What a command left in a shell."""

    status: int
    out: str
    err: str


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in `folder`; the random state and torch's CPU settings are afterwards what they were."""
    before, precision = os.getcwd(), torch.get_float32_matmul_precision()
    os.chdir(folder)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        os.chdir(before)
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Inside, no file may grow beyond `size` bytes, as on a full disk.

    The limit is the whole process's: nothing may be printed inside, for standard output may be a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def call(module: ModuleType, *args: str | Path, folder: Path) -> Result:
    """`python MODULE.py ARGS` in `folder`. An error that the command lets through is raised here as well."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, args)]
    try:
        with inside(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(module.main)
    except SystemExit as stop:
        return Result(int(stop.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv
    raise AssertionError("run returned")


def environment() -> dict[str, str]:
    """That of a process which finds the tests and the project."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def train_apart(folder: Path, args: list[str], disk: int, pipe: Connection, threads: int) -> None:
    """`python train.py ARGS` in a process of `forks`; no file may grow beyond `disk` bytes."""
    torch.set_num_threads(threads)
    os.chdir(folder)
    sys.stdout = sys.stderr = os.fdopen(pipe.fileno(), "w", closefd=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    sys.argv = ["train.py", *args]
    run_command(train.main)


def good(module: ModuleType, *args: str | Path, folder: Path) -> str:
    """The output of a command that must succeed."""
    result = call(module, *args, folder=folder)
    assert result.status == 0, result.err
    return result.out


@functools.cache
def base() -> Path:
    """A tiny Qwen3 folder after two steps of pretraining."""
    folder = Path(session.name) / "base"
    with inside(Path(session.name)):
        pretrain.pretrain_base(folder, steps=2, **SIZES)
    return folder


@functools.cache
def other_base() -> Path:
    """Another one, of the same sizes."""
    folder = Path(session.name) / "other-base"
    with inside(Path(session.name)):
        pretrain.pretrain_base(folder, seed=1, steps=1, **SIZES)
    return folder


def write_photos(folder: Path, n: int = 24, seed: int = 0) -> Path:
    """A folder of `n` pictures of 16 x 16 pixels, name.png beside name.txt; every picture is another."""
    folder.mkdir(parents=True)
    pixels = torch.randint(256, (n, 4, 4, 3), generator=torch.Generator().manual_seed(seed))
    for i, x in enumerate(pixels.to(torch.uint8)):
        Image.fromarray(x.numpy()).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"a {['small', 'big'][i % 2]} photo of number {i}\n")
    return folder


def held_out_pictures(n: int) -> tuple[Tensor, list[str]]:
    """Up to n built-in pictures that training never shows: uint8 (n, 3, S, S), and their captions."""
    shots, captions = zip(*Shapes().validation(n), strict=True)
    return Shapes().pixels(list(shots)), list(captions)


@functools.cache
def photos() -> Path:
    return write_photos(Path(session.name) / "photos")


def write_edits(folder: Path, n: int = 24, seed: int = 0) -> Path:
    """A folder of pictures with `n` edits of them in metadata.jsonl; the same and captions in all.jsonl."""
    write_photos(folder, n + 1, seed)
    names = [f"{i:03d}.png" for i in range(n + 1)]
    edits = [
        {"source": before, "text": f"make it number {i + 1}", "file_name": after}
        for i, (before, after) in enumerate(zip(names, names[1:], strict=False))
    ]
    captions = [{"file_name": name, "text": f"a photo called {name}"} for name in names]
    for file, rows in (("metadata.jsonl", edits), ("all.jsonl", captions + edits)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@functools.cache
def edits() -> Path:
    return write_edits(Path(session.name) / "edits")


@functools.cache
def shapes_run() -> Path:
    """A run of three steps on the built-in shapes, with a moving average; also the last run of `small`."""
    good(
        train,
        *SHAPES_FLAGS,
        *("--base", base(), "--out", "shapes-run", "--steps", 3, "--log-every", 1, "--ema", 0.5),
        folder=Path(session.name),
    )
    return Path(session.name) / "shapes-run"


@functools.cache
def photo_run() -> Path:
    """A run of two steps on the tiny photos."""
    good(
        train,
        *(*PHOTO_FLAGS, "--base", base(), "--data", photos(), "--out", "photo-run", "--steps", 2),
        folder=Path(session.name),
    )
    return Path(session.name) / "photo-run"


def photo_flags(out: Path, *more: object) -> list[str]:
    """Flags of a tiny run on the tiny photos."""
    return [*PHOTO_FLAGS, *map(str, ("--base", base(), "--data", photos(), "--out", out, *more))]


def photo_config(out: Path, *more: object) -> train.TrainConfig:
    return train.parse(photo_flags(out, *more))[0]


@functools.cache
def _shapes_model() -> Trained:
    trained = load_trained(shapes_run())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return trained


def perturbed() -> Trained:
    """The model of `shapes_run` with noise on every parameter; the caller's own."""
    return copy.deepcopy(_shapes_model())


def text_fingerprint(model: LMFusion) -> str:
    """What `load_qwen3.base_fingerprint` gives, of a model; all processes of one that is cut call it."""
    digest = hashlib.sha256()
    for name, p in sorted(model.text_parameters().items()):
        value = full_tensor(p.detach()).float().cpu().contiguous()
        digest.update(f"{name} {tuple(p.shape)} {value.dtype}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def files(*folders: Path) -> dict[str, str]:
    """A fingerprint of every file below some folders."""
    found = sorted(p for folder in folders for p in [folder, *folder.rglob("*")] if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}
