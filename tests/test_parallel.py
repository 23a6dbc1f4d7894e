"""parallel.py: many processes compute what one computes alone; what happens when one of them dies.

The processes are real. Importing torch takes each of them seconds, so that most of the work is done in one
start of torchrun: two processes do the JOBS one after another, and the tests look at what they left. This
file is the script that torchrun starts. What needs a start of its own is forked from a process that has
imported everything already, with the environment that torchrun would give it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import checkpoint
import train
from checkpoint import (
    list_checkpoints,
    load_trained,
    optimizer_tensors,
    part_name,
    read_metrics,
    read_tensors,
    resume,
)
from config import run_command, tune_torch
from evaluate import TIMESTEPS
from lab.watch import draw_sheets, validate
from load_qwen3 import load_qwen3
from scale import parallel
from scale.parallel import Team, alike, end_processes, fill, full_tensor, init_processes
from scale.sources import PictureSource
from train import Run

LIMIT = 300  # seconds after which a start of all the jobs counts as hanging
SOON = 60  # seconds for everything else
STEADY = "--optimizer adamw --lr 1e-3 --lr-final 1e-3 --sheet-every 0".split()
FILLED = "layers.0.image.mlp.up_proj.weight"
TASKS = "generate=2,caption=1,edit=3,chat=6 --data edits/all.jsonl"
LOSSES = ("loss", "lm_loss", "ddpm_loss", "draw_loss")


# ------------------------------------------------------------------------------------------------------------
# What the processes do


@dataclass(frozen=True)
class Job:
    """A run of `train.py`, in a folder that holds `base`, `photos`, `edits`, and a first stage, `first`."""

    flags: str = ""
    steps: int = 3
    of: str = ""  # the run to go on with, from a copy
    flags_of_the_last: str = ""  # a mistake: what the last process is told besides
    folder_of_the_last: str = "."  # a mistake: where the last process works, with what it has there
    says: str = ""  # what the error of every process must say


JOBS = {
    "plain": Job("--ema 0.9", steps=10),
    "gradients": Job("--clip 1e6", steps=1),
    "muon": Job("--optimizer muon --lr-final 0"),
    "micro": Job("--micro-batch 2 --lambda-ddpm 2 --lm-mean all"),
    "pack": Job("--pack 44"),
    "recomputed": Job("--activation-checkpointing true"),
    "all": Job("--micro-batch 2 --pack 44 --activation-checkpointing true --ema 0.9 --lr-text-ratio 0.1"),
    "none": Job("--separation none"),
    "shallow": Job("--separation shallow"),
    "text": Job("--lr-text-ratio 0.1"),
    "chunks": Job("--lr-text-ratio 0.1"),  # logits for a few words at a time, by two processes
    "half": Job("--ema 0.9", steps=5),
    "two by two": Job(steps=10, of="half"),
    "one by two": Job(steps=10, of="alone half"),
    "watched": Job("--ema 0.9 --val-every 1 --sheet-every 2"),
    "bfloat16": Job("--dtype bfloat16 --ema 0.9"),
    "bfloat16 resumed": Job(steps=5, of="bfloat16"),
    "uneven": Job("--batch-size 7", says="--batch-size 7 is not a multiple of 2"),
    "other data": Job(folder_of_the_last="other-data", says="the processes differ in what --data holds"),
    "other text": Job(
        "--lr-text-ratio 0.1 --text-batch 2 --text-data text.txt",
        folder_of_the_last="other-text",
        says="the processes differ in what --text-data holds",
    ),
    "other base": Job(folder_of_the_last="other-base", says="differ in the base language model"),
    "other sizes": Job(folder_of_the_last="other-sizes", says="differ in the base language model"),
    "other flags": Job(flags_of_the_last="--lr 2e-3", says="the processes differ in their configuration"),
    # a process may have nothing to learn of words and of when to draw while another has
    "drops": Job("--batch-size 2 --caption-first 0.6 --caption-drop 0.6", steps=6),
    "text drops": Job("--batch-size 2 --caption-first 0.6 --caption-drop 0.6 --lr-text-ratio 0.1", steps=6),
    # the second stage
    "tasks": Job(f"--init-from first --task {TASKS} --micro-batch 3 --batch-size 8 --ema 0.9"),
    "watched edits": Job("--task edit --data edits --ema 0.9 --val-every 1 --sheet-every 2"),
    "talk": Job("--task chat --data edits/all.jsonl --batch-size 2 --lr-text-ratio 0.1", steps=6),
}
ERRORS = [name for name, job in JOBS.items() if job.says]


def folder_of(name: str) -> str:
    return name.replace(" ", "-")


def flags_of(name: str) -> list[str]:
    """The command line of a job, without the mistake."""
    job = JOBS[name]
    common = [*helpers.PHOTO_FLAGS, *STEADY, "--out", folder_of(name), "--steps", str(job.steps)]
    if job.of:
        return [*common[:2], "--resume", *common[-4:]]
    return [*common, "--base", "base", "--data", "photos", *job.flags.split()]


def tell(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def unseen(run: Run) -> dict:
    """In place of a validation, which takes longer than the steps that a test is about."""
    zero = [0.0] * len(TIMESTEPS)
    return {"t": list(TIMESTEPS), "right": zero, "permuted": zero}


def two_prompts(source: PictureSource) -> list[str]:
    return [caption for _, caption in source.validation(2)]


def do(name: str, team: Team) -> None:
    """A job, by one of the processes: its run is at FOLDER, what this process saw in FOLDER.RANK.json."""
    job, folder, seen = JOBS[name], Path(folder_of(name)), {"counts": []}
    if job.of and team.is_main:
        shutil.copytree(folder_of(job.of), folder)
    team.wait()
    mistaken = team.rank == team.size - 1
    config, *_ = train.parse(flags_of(name) + (job.flags_of_the_last.split() if mistaken else []))
    count, resume, save = train.count_targets, train.resume, train.save_run

    def counting(*args):
        counts = count(*args)
        seen["counts"].append([counts[part] for part in train.PARTS])
        return counts

    def resuming(run, *args):
        resume(run, *args)
        run.out = Path(f"{folder}-loaded")  # what was loaded, written again
        save(run)
        run.out = folder

    def saving(run, extra):
        save(run, extra)
        seen["text"] = run.fingerprint, helpers.text_fingerprint(run.model)  # before and after

    patch = pytest.MonkeyPatch()
    patch.chdir(job.folder_of_the_last if mistaken else ".")
    patch.setattr(train, "count_targets", counting)
    patch.setattr(train, "resume", resuming)
    patch.setattr(train, "save_run", saving)
    if name == "chunks":
        patch.setattr(train, "LOGITS", 3000)
    if name.startswith("watched"):
        patch.setattr(PictureSource, "prompts", two_prompts)
    else:
        patch.setattr(train, "validate", unseen)
        patch.setattr(train, "draw_curves", lambda run: None)
    try:
        train.work(config, "small", list_checkpoints(folder)[-1] if job.of else None, team)
    except ValueError as error:
        if not job.says:
            raise
        seen["error"] = str(error)
    finally:
        patch.undo()
    tell(Path(f"{folder}.{team.rank}.json"), seen)


def watch(run: Run) -> list[list[float]]:
    """Validation of three models: with one final norm, with another, and after a sheet with a third one."""
    found, norm = [], run.trained["norm_image.weight"]
    last = run.trained["unet_up.conv_out.weight"]
    ramp = torch.linspace(-0.3, 0.3, last.numel()).view(last.shape)
    fill(last, ramp)
    fill(run.ema["unet_up.conv_out.weight"], ramp)
    fill(run.ema["norm_image.weight"], torch.zeros(norm.shape))
    run.documents.source.prompts = lambda: ["a small photo"]
    run.out = Path(f"sheets-{run.team.size}")
    run.out.mkdir(exist_ok=True)
    found.append(validate(run)["right"])
    fill(norm, torch.full(norm.shape, 3.0))
    found.append(validate(run)["right"])
    draw_sheets(run)
    return [*found, validate(run)["right"]]


def look_at_the_model(team: Team) -> None:
    """What each process holds of a model before the first step, and all of it together."""
    run = Run(train.parse(flags_of("plain"))[0], "small", team)
    tensors = dict(run.model.named_parameters())
    sizes = {n: (p.to_local().numel(), p.numel()) for n, p in tensors.items() if isinstance(p, DTensor)}
    seen = {"sizes": sizes, "names": list(tensors)}
    tensors = {n: full_tensor(p.detach()).clone() for n, p in tensors.items()}
    p = run.trained[FILLED]
    value = torch.arange(p.numel(), dtype=torch.float32).view(p.shape)
    seen["alike"] = torch.equal(full_tensor(alike(p, value)), value) and torch.equal(
        alike(p, value[0]), value[0]
    )
    fill(p, value)
    seen["filled"] = torch.equal(full_tensor(p.detach()), value)
    fill(p, tensors[FILLED])
    parts = (*run.model.layers, run.model.unet_down, run.model.unet_up, run.model)
    seen["cut"] = all(isinstance(part, FSDPModule) for part in parts)
    seen["watched"] = watch(run)
    tell(Path(f"model.{team.rank}.json"), seen)
    if team.is_main:
        save_file(tensors, "model.safetensors")


def jobs() -> None:
    """All jobs, by one of the processes that torchrun starts."""
    torch.set_num_threads(1)
    tune_torch()
    team = init_processes("cpu", "float32")
    try:
        look_at_the_model(team)
        for name in JOBS:
            do(name, team)
    finally:
        end_processes(team)


if __name__ == "__main__":
    jobs()


# ------------------------------------------------------------------------------------------------------------
# How they are started


def folder_with(folder: Path, base: Path, photos: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "base").symlink_to(base)
    (folder / "photos").symlink_to(photos)
    (folder / "edits").symlink_to(helpers.edits())
    (folder / "first").symlink_to(helpers.photo_run())
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """The folder in which two processes work; `alone` in it is where one does, and two hold other things."""
    folder = tmp_path_factory.mktemp("parallel")
    others = helpers.write_photos(folder / "other-photos", seed=1)
    folder_with(folder, helpers.base(), helpers.photos())
    folder_with(folder / "alone", helpers.base(), helpers.photos())
    folder_with(folder / "other-data", helpers.base(), others)
    folder_with(folder / "other-text", helpers.base(), helpers.photos())
    for place, text in (
        (folder, "the sky over the sea is blue"),
        (folder / "other-text", "the sky is grey today"),
    ):
        (place / "text.txt").write_text(text)
    other = shutil.copytree(helpers.base(), folder / "other-weights")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    folder_with(folder / "other-base", other, helpers.photos())
    folder_with(folder / "other-sizes", helpers.other_base(), helpers.photos())
    return folder


def alone(here: Path, name: str) -> Path:
    """The job, done by one process, as a user would."""
    folder = here / "alone" / folder_of(name)
    if not folder.is_dir():
        if JOBS[name].of:
            shutil.copytree(alone(here, JOBS[name].of), folder)
        with pytest.MonkeyPatch.context() as patch:
            if name.startswith("watched"):
                patch.setattr(PictureSource, "prompts", two_prompts)
            else:
                patch.setattr(train, "validate", unseen)
            helpers.good(train, *flags_of(name), folder=here / "alone")
    return folder


def end_group(process: subprocess.Popen) -> None:
    """Kill a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def torchrun(size: int, *command: object, folder: Path) -> subprocess.Popen:
    """torchrun with its processes, in a group of its own; their output goes to FOLDER/log."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            [*start, *map(str, command)],
            cwd=folder,
            env={**os.environ, **helpers.environment()},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def together(here) -> Path:
    """The folder in which two processes under torchrun have done all JOBS."""
    shutil.copytree(alone(here, "half"), here / "alone-half")
    process = torchrun(2, __file__, folder=here)
    try:
        process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        with open(here / "log", "a") as log:
            log.write(f"nothing came after {LIMIT} s")
    finally:
        end_group(process)
    return here


def two(here: Path, name: str) -> Path:
    """The job, done by two processes."""
    folder = here / folder_of(name)
    if not Path(f"{folder}.1.json").is_file():
        raise AssertionError(f"{name} did not end: {(here / 'log').read_text()[-6000:]}")
    return folder


def one_of_many(rank: int, size: int, port: int, folder: str, flags: list[str], prepare) -> None:
    """A process with the environment of torchrun: `python train.py FLAGS` after `prepare(rank)`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.chdir(folder)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    sys.argv = ["train.py", *flags]
    if prepare is not None:
        prepare(rank)
    run_command(train.main)


@dataclass
class Started:
    """Processes of one run."""

    processes: list[multiprocessing.Process]
    folder: Path

    def end(self, limit: float = SOON) -> list[helpers.Result]:
        """What they left, when all have ended by themselves; a hang is a failure."""
        stop = time.monotonic() + limit
        for p in self.processes:
            p.join(max(0.0, stop - time.monotonic()))
        alive = [rank for rank, p in enumerate(self.processes) if p.is_alive()]
        self.kill()
        texts = [[(self.folder / f"{n}.{r}").read_text() for n in ("out", "err")] for r in self.ranks]
        assert not alive, f"processes {alive} still ran after {limit} s: {texts}"
        return [helpers.Result(p.exitcode, *t) for p, t in zip(self.processes, texts, strict=True)]

    @property
    def ranks(self) -> range:
        return range(len(self.processes))

    def kill(self) -> None:
        for p in self.processes:
            p.kill()
            p.join()


@pytest.fixture
def start(here, forks, tmp_path) -> Iterator[Callable[..., Started]]:
    """start(size, flags, prepare=None) -> so many processes of `train.py FLAGS` in tmp_path."""
    running = []
    folder_with(tmp_path, here / "base", here / "photos")

    def start(size: int, flags: list[str], prepare: Callable[[int], None] | None = None) -> Started:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        args = [(rank, size, port, str(tmp_path), flags, prepare) for rank in range(size)]
        running.append(Started([forks.Process(target=one_of_many, args=a) for a in args], tmp_path))
        for p in running[-1].processes:
            p.start()
        return running[-1]

    yield start
    for started in running:
        started.kill()


# ------------------------------------------------------------------------------------------------------------
# Two processes against one


def last(folder: Path) -> Path:
    return list_checkpoints(folder)[-1]


def lines(folder: Path) -> list[dict]:
    return read_metrics(folder / "metrics.jsonl")


def losses_of(found: list[dict]) -> list[dict]:
    return [{k: m[k] for k in ("step", *LOSSES)} for m in found]


def largest_difference(one: list[dict], other: list[dict], relative: bool = False) -> float:
    """Of the losses, step by step; the same ones must be there."""
    assert [m["step"] for m in one] == [m["step"] for m in other] and one
    pairs = [(a[k], b[k]) for a, b in zip(one, other, strict=True) for k in LOSSES]
    assert all((a is None) == (b is None) for a, b in pairs)
    return max(abs(a - b) / (a if relative else 1) for a, b in pairs if a is not None)


def stored(folder: Path, kind: str) -> dict[str, Tensor]:
    files = sorted(last(folder).glob(f"{kind}*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def length(tensors: Iterable[Tensor]) -> float:
    return sum(x.double().square().sum().item() for x in tensors) ** 0.5


def distance(one: Path, other: Path, start: dict[str, Tensor] | None, ema: bool = False) -> float:
    """How far apart two runs ended, in weights and in the optimizer's moments, over how far they came.

    Not each number for itself: AdamW makes a whole step of a gradient that is nothing but rounding.
    """
    worst = 0.0
    for kind in ("model", "optimizer", "ema")[: 3 if ema else 2]:
        a, b = stored(one, kind), stored(other, kind)
        assert set(a) == set(b) and a
        for key in {n.partition("/")[0] for n in a} if kind == "optimizer" else {""}:
            names = [n for n in a if n.startswith(key)]
            moved = length(a[n] - start[n] if start and kind != "optimizer" else a[n] for n in names)
            assert moved > 0
            worst = max(worst, length(a[n] - b[n] for n in names) / moved)
    return worst


def seen(folder: Path, name: str) -> list[dict]:
    """What each of the two processes saw of a job."""
    two(folder, name)
    return [json.loads((folder / f"{folder_of(name)}.{rank}.json").read_text()) for rank in (0, 1)]


ALIKE = [n for n, job in JOBS.items() if not (job.says or job.of or "bfloat16" in job.flags)]


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_compute_what_one_computes(here, together, name):
    one, other, flags = alone(here, name), two(together, name), JOBS[name].flags
    assert len(lines(other)) == JOBS[name].steps
    difference = largest_difference(lines(one), lines(other))
    same_start = not any(word in flags for word in ("none", "shallow"))
    start = load_file(together / "model.safetensors") if same_start else None
    apart = distance(one, other, start, "--ema" in flags)
    assert difference < 1e-4 and apart < 1e-2, (difference, apart)


def test_among_them_are_steps_in_which_a_process_has_nothing_to_learn_of_a_kind(together):
    for name, kind in (("plain", 1), ("drops", 1), ("drops", 2), ("text drops", 1), ("text drops", 2)):
        pairs = [
            (a[kind], b[kind]) for a, b in zip(*(s["counts"] for s in seen(together, name)), strict=True)
        ]
        assert any(bool(a) != bool(b) for a, b in pairs), (name, pairs)
        assert any(a and b and a != b for a, b in pairs) or name != "plain"
    for kind in range(3):  # noisy pictures, words, decisions
        counts = [[c[kind] for c in s["counts"]] for s in seen(together, "talk")]
        assert any(bool(a) != bool(b) for a, b in zip(*counts, strict=True)), counts
    micro = [s["counts"] for s in seen(together, "micro")]
    assert [[c[0] for c in rank] for rank in micro] == [[2, 1] * 3] * 2  # the last micro batch is smaller


def test_one_process_under_torchrun_computes_what_one_without_it_computes(here, start, tmp_path):
    flags = [*flags_of("plain"), "--steps", "4"]
    assert [r.status for r in start(1, flags).end()] == [0]
    assert largest_difference(lines(alone(here, "plain"))[:4], lines(tmp_path / "plain")) < 1e-6


def test_watching_a_run_does_not_change_it(together):
    watched, not_watched = lines(two(together, "watched")), lines(two(together, "half"))[:3]
    assert losses_of(watched) == losses_of(not_watched)
    assert all("val" in m for m in watched)


def colour_difference(*files: Path) -> int:
    """The largest one between two pictures, which are not blank."""
    one, other = (np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files)
    assert one.std() > 10
    return np.abs(one - other).max()


def test_every_look_is_at_the_weights_of_that_moment(here, together):
    """FSDP keeps some of them whole after a forward pass, until it is told to let go."""
    with helpers.inside(here / "alone"):
        run = Run(train.parse(flags_of("plain"))[0], "small")
        wanted = watch(run)
    first, second, third = json.loads((together / "model.0.json").read_text())["watched"]
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 1e-3 and second == third
    for a, b in zip((first, second, third), wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    sheets = [together / "sheets-2" / "sheet-000000.png", here / "alone" / "sheets-1" / "sheet-000000.png"]
    assert colour_difference(*sheets) <= 8


def test_two_processes_see_and_paint_what_one_does(here, together):
    for job, kind in (("watched", "sheet"), ("watched edits", "edits")):
        one, other = alone(here, job), two(together, job)
        for a, b in zip(lines(one), lines(other), strict=True):
            for key in ("right", "permuted"):
                assert a["val"][key] == pytest.approx(b["val"][key], abs=1e-4) and min(a["val"][key]) > 0
        for name in (f"{kind}-000002.png", f"{kind}-000003.png"):
            assert colour_difference(one / name, other / name) <= 8


# ------------------------------------------------------------------------------------------------------------
# What each process holds


def test_each_process_holds_half_of_the_model(together):
    for rank in (0, 1):
        found = json.loads((together / f"model.{rank}.json").read_text())
        assert set(found["sizes"]) == set(found["names"])  # nothing is held whole
        own, all_of_it = (sum(x) for x in zip(*found["sizes"].values(), strict=True))
        assert 0.45 < own / all_of_it < 0.55
        assert all(0 < mine < size or size == 1 for mine, size in found["sizes"].values())
        assert found["alike"] is found["filled"] is found["cut"] is True


def test_together_they_start_from_what_one_process_starts_from(here, together):
    got = load_file(together / "model.safetensors")
    with helpers.inside(here / "alone"):
        model = Run(train.parse(flags_of("plain"))[0], "small").model
    wanted = dict(model.named_parameters())
    assert set(got) == set(wanted) and any(n.startswith("unet_up.") for n in got)
    for name, value in got.items():
        assert torch.equal(value, wanted[name]), name
        if ".image." in name:
            assert torch.equal(value, got[name.replace(".image.", ".text.")]), name


def test_a_share_is_a_part_of_the_batch_and_all_shares_are_the_whole():
    for size in (1, 2, 3, 8):
        shares = [Team(rank, size).share(24) for rank in range(size)]
        assert [i for s in shares for i in range(24)[s]] == list(range(24))
        assert {len(range(24)[s]) for s in shares} == {24 // size}


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    used, backends = [], []
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append(str(device)))
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 5)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda kind, shape: (kind, shape))
    team = init_processes("cuda", "float32")
    assert team == Team(5, 8, "cuda:1", ("cuda", (8,)))
    assert used == ["1"] and "nccl" in backends[0]


# ------------------------------------------------------------------------------------------------------------
# Frozen text, trained text, bfloat16


def test_frozen_text_is_after_training_what_it_was_bit_for_bit(here, together):
    base = load_trained(alone(here, "half")).info["fingerprint"]
    for name in (n for n in JOBS if n not in ERRORS):
        ratio = "--lr-text-ratio" in JOBS[name].flags
        for before, after in (s["text"] for s in seen(together, name)):
            assert before == base and (after != base) == ratio, name


def test_text_that_is_trained_is_in_the_checkpoint_and_moved(together):
    start, trained = load_file(together / "model.safetensors"), stored(two(together, "text"), "model")
    text = [n for n in trained if ".text." in n or n == "embed_tokens.weight"]
    assert len(text) == 23 and all(not torch.equal(trained[n], start[n]) for n in text)


def check_bfloat16(run: Path, float32: Path) -> None:
    """The losses are near those of float32, and not the same; all that learns is stored as float32."""
    assert 1e-6 < largest_difference(lines(float32)[: len(lines(run))], lines(run), relative=True) < 0.03
    for kind in ("model", "ema", "optimizer"):
        tensors = stored(run, kind)
        assert {x.dtype for x in tensors.values()} == {torch.float32}, kind
        assert all(x.isfinite().all() for x in tensors.values()), kind
    # more than the 8 bits of a bfloat16 are in use
    x = stored(run, "model")[FILLED]
    assert (x != x.bfloat16().float()).float().mean() > 0.9


def test_two_processes_compute_in_bfloat16_and_keep_float32(together):
    check_bfloat16(two(together, "bfloat16"), two(together, "plain"))
    check_bfloat16(two(together, "bfloat16 resumed"), two(together, "plain"))
    assert len(lines(two(together, "bfloat16 resumed"))) == 5


def test_a_process_alone_computes_in_bfloat16_and_keeps_float32(here):
    check_bfloat16(alone(here, "bfloat16"), alone(here, "plain"))
    check_bfloat16(alone(here, "bfloat16 resumed"), alone(here, "plain"))
    trained, base = load_trained(alone(here, "bfloat16 resumed")), load_qwen3(here / "base")
    for name, p in base.text_parameters().items():
        assert torch.equal(p, trained.model.text_parameters()[name]), name
    assert not torch.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_of_two_has_two_parts_with_each_tensor_once(together):
    folder = last(two(together, "half"))
    run_info = json.loads((folder / "checkpoint.json").read_text())
    for kind, names in (("model", "trained"), ("ema", "trained"), ("optimizer", "optimizer")):
        parts = [load_file(folder / part_name(f"{kind}.safetensors", rank, 2)) for rank in (0, 1)]
        assert sorted([*parts[0], *parts[1]]) == run_info[names]
        assert abs(len(parts[0]) - len(parts[1])) <= 1
        assert not (folder / f"{kind}.safetensors").exists()
    assert (folder / "model-00001-of-00002.safetensors").is_file()


def test_sampling_loads_a_checkpoint_of_two(together):
    trained, wanted = load_trained(two(together, "plain")), stored(two(together, "plain"), "ema")
    for name, p in trained.model.image_parameters().items():
        assert torch.equal(p, wanted[name]), name
    assert not torch.equal(stored(two(together, "plain"), "model")["boi_head"], wanted["boi_head"])


@pytest.mark.parametrize("name", ("two by two", "one by two"))
def test_two_processes_load_what_was_saved_and_go_on_as_if_never_interrupted(here, together, name):
    saved = together / folder_of(JOBS[name].of)
    loaded = together / f"{folder_of(name)}-loaded"
    two(together, name)
    for kind in ("model", "optimizer", "ema"):
        a, b = stored(saved, kind), stored(loaded, kind)
        assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a), kind
    start = load_file(together / "model.safetensors")
    for straight in (alone(here, "plain"), two(together, "plain")):
        assert largest_difference(lines(straight), lines(together / folder_of(name))) < 1e-4
        assert distance(straight, together / folder_of(name), start, ema=True) < 1e-2


def test_one_process_loads_what_two_saved_and_goes_on_as_if_never_interrupted(here, together):
    folder = Path(shutil.copytree(two(together, "half"), here / "alone" / "two-by-one"))
    flags = ["--config", "small", "--resume", "--steps", "10", "--out", "two-by-one"]
    with helpers.inside(here / "alone"):
        run = Run(train.parse(flags)[0], "small")
        resume(run, last(folder))
    for kind, found in (
        ("model", run.trained),
        ("ema", run.ema),
        ("optimizer", optimizer_tensors(run.trained, run.optimizers)),
    ):
        wanted = stored(folder, kind)
        assert set(found) == set(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted), kind
    helpers.good(train, *flags, folder=here / "alone")
    straight = alone(here, "plain")
    assert largest_difference(lines(straight), lines(folder)) < 1e-4
    assert distance(straight, folder, load_file(together / "model.safetensors"), ema=True) < 1e-2


@pytest.mark.parametrize("kind", ("model", "optimizer", "ema"))
@pytest.mark.parametrize("damage", ("first missing", "second missing", "second cut", "of another count"))
def test_parts_that_do_not_belong_together_are_named(together, tmp_path, kind, damage):
    source = last(two(together, "half"))
    folder = Path(shutil.copytree(source, tmp_path / "run" / source.name))
    first, second = (folder / part_name(f"{kind}.safetensors", rank, 2) for rank in (0, 1))
    bad = first if damage == "first missing" else second
    if damage == "of another count":
        bad = folder / part_name(f"{kind}.safetensors", 2, 3)
        shutil.copy(second, bad)
    elif damage == "second cut":
        bad.write_bytes(bad.read_bytes()[:1000])
    else:
        bad.unlink()
    with pytest.raises(ValueError, match=bad.name):
        read_tensors(folder / f"{kind}.safetensors", {})


# ------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_is_named_by_every_process(together, name):
    for found in seen(together, name):
        assert JOBS[name].says in found["error"]
    assert not (together / folder_of(name) / "metrics.jsonl").exists()


def work_elsewhere(folder: Path, rank: int) -> None:
    if rank == 1:
        os.chdir(folder)


def test_a_mistake_of_one_process_ends_all_with_one_line_each(here, start):
    results = start(2, flags_of("plain"), partial(work_elsewhere, here / "other-data")).end()
    for result in results:
        assert result.status == 2
        assert result.err.startswith("error: the processes differ in what --data holds: rank 0 has ")
        assert len(result.err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------
# Kills


ENDED = "another process of this run has ended"


def ranks_of(parent: int) -> dict[int, int]:
    """The processes that torchrun has started: rank -> pid."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            rank = [x[5:] for x in (folder / "environ").read_text().split("\0") if x.startswith("RANK=")]
        except OSError:  # it has ended
            continue
        if ours and rank:
            found[int(rank[0])] = int(folder.name)
    return found


def wait_for(there: Callable[[], object], process: subprocess.Popen) -> None:
    stop = time.monotonic() + SOON
    while not there():
        assert time.monotonic() < stop and process.poll() is None, "the run did not come so far"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_kill_of_one_process_ends_the_run_and_it_can_be_resumed(here, start, tmp_path):
    run = tmp_path / "run"
    flags = [*flags_of("plain"), "--out", "run", "--steps", "100000", "--checkpoint-every", "2"]
    process = torchrun(2, helpers.ROOT / "train.py", *flags, folder=tmp_path)
    try:
        wait_for(lambda: len(lines(run)) > 5 and list_checkpoints(run), process)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        assert process.wait(SOON) not in (0, None)
    finally:
        end_group(process)
    log = (tmp_path / "log").read_text()
    name, step = last(run).name, int(last(run).name[5:])
    # whichever comes first to the process that is left: the lost connection or torchrun's SIGTERM
    lost = f"error: {ENDED}; none can go on alone; run/{name} is whole: --resume goes on from it\n"
    ended = rf"interrupted: at step \d+; --resume goes on from {name}\n"
    assert lost in log or re.search(ended, log), log
    assert load_trained(run).info["step"] == step >= 4
    flags = ["--config", "small", "--resume", "--out", "run", "--steps", str(step + 2)]
    assert [r.status for r in start(2, flags).end()] == [0, 0]
    assert last(run).name == f"step-{step + 2:06d}" and [m["step"] for m in lines(run)][-1] == step + 2
    n = min(10, step)
    assert largest_difference(lines(alone(here, "plain"))[:n], lines(run)[:n]) < 1e-4


def asked_to_stop(victim: int, rank: int) -> None:
    """SIGTERM, to one process, in its third step."""
    train_step = Run.train_step

    def asked(run):
        if run.step == 2 and rank == victim:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(run)

    Run.train_step = asked
    train.draw_curves = lambda run: None


@pytest.mark.parametrize("victim", (0, 1))
def test_a_signal_to_one_process_ends_all_with_a_checkpoint_of_the_same_step(start, tmp_path, victim):
    flags = [*flags_of("plain"), "--out", "run", "--steps", "9"]
    results = start(2, flags, partial(asked_to_stop, victim)).end()
    for rank, result in enumerate(results):
        assert (
            result.status == 130 and "interrupted: at step 3; --resume goes on from step-000003" in result.err
        )
        assert ("stopping after this step" in result.err) == (rank == victim == 0)  # one speaks for all
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-000003"]
    assert [m["step"] for m in lines(tmp_path / "run")] == [1, 2, 3]
    assert load_trained(tmp_path / "run").info["step"] == 3


def die_while_writing(moment: str, victim: int, rank: int) -> None:
    """kill -9 at a moment of writing the checkpoint of step 4."""
    train.validate, train.draw_curves = unseen, lambda run: None
    save_file, rename = checkpoint.save_file, os.rename

    def half_saved(tensors, path, **more):
        save_file(tensors, path, **more)
        if moment in path and "step-000004" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def not_renamed(source, target):
        if "step-000004" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    if rank == victim:
        checkpoint.save_file = half_saved
        if moment == "rename":
            os.rename = not_renamed


@pytest.mark.parametrize(
    "moment, victim",
    (
        pytest.param("model", 0, marks=pytest.mark.slow),
        pytest.param("ema", 1, marks=pytest.mark.slow),
        ("rename", 0),
    ),
)
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(here, start, tmp_path, moment, victim):
    run = tmp_path / "run"
    flags = [*flags_of("plain"), "--out", "run", "--steps", "5", "--checkpoint-every", "2"]
    results = start(2, flags, partial(die_while_writing, moment, victim)).end()
    assert results[victim].status == -signal.SIGKILL
    assert results[1 - victim].status == 2
    assert results[1 - victim].err.startswith(f"error: {ENDED}"), results[1 - victim].err
    assert "run/step-000002 is whole" in results[1 - victim].err
    assert [p.name for p in run.glob("step-*")] == ["step-000002"] and load_trained(run).info["step"] == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "validate", unseen)
        helpers.good(train, "--config", "small", "--resume", "--out", "run", folder=tmp_path)
    assert not list(run.glob(".step*"))
    assert largest_difference(lines(alone(here, "plain"))[:5], lines(run)) < 1e-4


@pytest.mark.parametrize(
    "words, lost",
    (
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2953", True),
        ("[pair.cc:534] Read error [::1]: Connection reset by peer", True),
        ("[pair.cc:598] writev [::1]:1: Broken pipe", True),
        ("Timed out waiting 1800000ms for recv operation to complete", True),
        ("Application timeout caused pair closure", True),
        ("NCCL error: ncclRemoteError: A call failed possibly due to a remote exit", True),
        ("NCCL error in: NCCLUtils.cpp:94, invalid usage: ncclInvalidUsage: a bug in the caller", False),
        ("NCCL error in: ProcessGroupNCCL.cpp:2, unhandled cuda error: ncclUnhandledCudaError", False),
        ("[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4", False),
        ("mat1 and mat2 shapes cannot be multiplied (nccl)", False),
    ),
)
def test_only_what_says_that_another_peer_lost_is_told_so(words, lost):
    assert parallel.peer_lost(RuntimeError(words)) == lost
