"""Configurations of training, and command lines: every setting of a run is a flag of the same name.

A field of `TrainConfig` knows its own rules, and they stand nowhere else: its bounds or choices, whether a
second stage inherits it from the first, and whether it may change when a run is resumed.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import difflib
import dis
import functools
import gc
import io
import math
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import ge, gt, le, lt
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion import PREDICTIONS, WEIGHTINGS, Diffusion
from model import SEPARATIONS

DTYPES = ("float32", "bfloat16")  # weights that learn stay float32
TASKS = ("caption", "generate", "edit", "chat")


@dataclass(frozen=True)
class Rule:
    """What a setting may be: one of `choices`, or a number from `low` to `high`, `above` and `below` some."""

    help: str
    choices: tuple[str, ...] | None = None
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    inherited: bool = False  # a second stage (--init-from) takes it from the first
    resumable: bool = False  # may change on --resume
    common: bool = False  # stands in --help; where some are, the others stand in --help-all
    newer: bool = False  # than the first checkpoints, which lack it: its default means "as it was then"

    def check(self, flag: str, value: float | str) -> None:
        """ValueError, with the flag and the rule, for a value outside of the bounds or choices."""
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{flag} is {value!r}; it must be one of {', '.join(self.choices)}")
        bounds = (("at least", self.low, ge), ("above", self.above, gt), ("at most", self.high, le))
        bounds = [bound for bound in (*bounds, ("below", self.below, lt)) if bound[1] is not None]
        if not all(holds(value, limit) for _, limit, holds in bounds):  # a NaN holds none
            rule = " and ".join(f"{words} {limit}" for words, limit, _ in bounds)
            raise ValueError(f"{flag} is {value}; it must be {rule}")


def setting(default: object, help: str, choices: tuple | None = None, **rule: object) -> typing.Any:
    """A dataclass field with its `Rule`."""
    return dataclasses.field(default=default, metadata={"rule": Rule(help, choices, **rule)})


def rules(cls: type) -> dict[str, Rule]:
    """Name -> rule, of every field of a dataclass."""
    return {field.name: field.metadata["rule"] for field in dataclasses.fields(cls)}


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def parse_stages(text: str) -> list[tuple[int, list[str]]]:
    """ "0:unet_*;500:*" -> steps, which begin with 0 and grow, and patterns of what trains from there on."""
    stages: list[tuple[int, list[str]]] = []
    for item in text.split(";") if text.strip() else []:
        step, colon, patterns = item.partition(":")
        names = [p.strip() for p in patterns.split(",") if p.strip()]
        if not colon or not step.strip().isdecimal() or not names:
            raise ValueError(f"--stages: {item.strip()!r} is not of the form STEP:PATTERN,PATTERN")
        first = int(step)
        if first <= stages[-1][0] if stages else first:
            raise ValueError(f"--stages {text}: the steps must begin with 0 and grow")
        stages.append((first, names))
    return stages


def parse_tasks(text: str) -> dict[str, float]:
    """ "edit" or "generate=2,edit=1" -> the share of each task; ValueError names the choices."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, weight = (x.strip() for x in item.partition("="))
        if name not in TASKS:
            raise ValueError(f"--task {text}: {name!r} is not one of {', '.join(TASKS)}")
        try:
            shares[name] = float(weight) if "=" in item else 1.0
        except ValueError:
            raise ValueError(f"--task {text}: the weight {weight!r} of {name} is not a number") from None
        if not 0 < shares[name] < math.inf:
            raise ValueError(f"--task {text}: the weight of {name} must be positive")
    total = sum(shares.values())
    return {name: weight / total for name, weight in shares.items()}


# ---- A run of training ----


@dataclass(frozen=True)
class TrainConfig:
    """A run. The defaults are the paper's recipe (Section 4.1); `CONFIGS` holds the named ones."""

    # what to train on
    base: str = setting("", "folder or hub id of a Qwen3; empty: the tiny one", resumable=True, common=True)
    # shapes, or a path or glob of: folders of latents or pictures, metadata.jsonl files, WebDataset tars
    data: str = setting("shapes", "shapes, or a path of pictures or latents", resumable=True, common=True)
    val_data: str = setting("", "to validate; empty: a 20th of --data", resumable=True, common=True)
    init_from: str = setting("", "run, checkpoint or hub id of a first stage", resumable=True, common=True)
    # empty: captioned pictures, as --caption-first has it
    task: str = setting("", "caption, generate, edit, chat; or weights: generate=2,chat=3", common=True)
    text_data: str = setting("", "paragraphs of text for --text-batch; empty: built-in text", resumable=True)
    from_scratch: bool = setting(False, "random text weights; Transfusion with --separation none")
    out: str = setting("runs/small", "folder of the run", resumable=True, common=True)
    seed: int = setting(0, "of everything random", low=0, below=2**63, common=True)
    device: str = setting("cpu", "cpu, cuda, ...", resumable=True, common=True)
    dtype: str = setting("float32", "of the computation", DTYPES, resumable=True, common=True)
    threads: int = setting(0, "on a CPU; 0: measured at the start", low=0, resumable=True, newer=True)
    # the image side of the model
    separation: str = setting("deep", "Section 5.1", SEPARATIONS, inherited=True, common=True)
    image_size: int = setting(256, "pixels a side", above=0, inherited=True, common=True)
    vae: str = setting("", "folder or hub id of the VAE; empty: linear latents", resumable=True, common=True)
    latent_patch: int = setting(8, "linear latents: pixels a side of a position", above=0, inherited=True)
    latent_channels: int = setting(4, "linear latents: channels", above=0, inherited=True)
    whiten: float = setting(0.5, "linear latents: 1 makes all components alike", low=0, inherited=True)
    unet_channels: tuple[int, ...] = setting((640, 1792), "at full and at half resolution", inherited=True)
    unet_attention: bool = setting(True, "self-attention of the U-Net at half resolution", inherited=True)
    patch_positions: bool = setting(False, "a learned vector for each patch", inherited=True)
    # diffusion and losses
    prediction: str = setting("eps", "what UNet-Up's output is", PREDICTIONS, inherited=True)
    loss_weighting: str = setting("none", "see Diffusion.loss", WEIGHTINGS, inherited=True)
    schedule_shift: float = setting(1.0, "its square divides the SNR at each t", above=0, inherited=True)
    lambda_ddpm: float = setting(5.0, "lambda of Eq. (4)", low=0)
    caption_first: float = setting(0.8, "share of samples with the caption before the picture", low=0, high=1)
    caption_drop: float = setting(0.1, "share of those whose caption is dropped, for guidance", low=0, high=1)
    # "all": sums over the words that learn are divided by all words of Eq. (1)
    lm_mean: str = setting("learned", "words that L_LM is a mean over", ("learned", "all"), newer=True)
    edit_drop: float = setting(0.2, "share of edits whose instruction is dropped", low=0, high=1)
    edit_empty: float = setting(
        0.0, "share of edits whose picture is dropped as well, for --cfg-image", low=0, high=1, newer=True
    )
    noise_limit: int = setting(500, "before its caption, t is below this", above=0, high=1000, inherited=True)
    # optimisation
    steps: int = setting(250_000, "training steps", above=0, resumable=True, common=True)
    batch_size: int = setting(64, "pictures a step, over all processes", above=0, common=True)
    text_batch: int = setting(0, "documents of text alone beside them, where the text side learns", low=0)
    micro_batch: int = setting(0, "documents a process computes at once; 0: its share", low=0, resumable=True)
    pack: int = setting(0, "tokens of a sequence that documents share; 0: one each", low=0, resumable=True)
    activation_checkpointing: bool = setting(False, "recompute layers: less memory", resumable=True)
    compile: bool = setting(False, "compile the experts: a minute, then faster", resumable=True, newer=True)
    optimizer: str = setting("adamw", "muon: for the experts' matrices alone", ("adamw", "muon"))
    lr: float = setting(1e-4, "peak learning rate of the image side", above=0, common=True)
    lr_final: float = setting(1.5e-5, "learning rate at the end of the cosine", low=0)
    muon_lr: float = setting(8e-3, "peak learning rate of the matrices under muon", above=0)
    # patterns of parameter names, 'unet_*' or '*'; empty: everything, always
    stages: str = setting("", "what trains when: STEP:PATTERN,...;STEP:PATTERN,...")
    lr_text_ratio: float = setting(0.0, "of the text side, over --lr; 0 freezes it", low=0, common=True)
    draw_lr_ratio: float = setting(1.0, "learning rate of the row that decides to draw, over --lr", low=0)
    warmup: int = setting(4000, "steps of linear warm-up", low=0)
    weight_decay: float = setting(0.1, "on matrices", low=0)
    clip: float = setting(1.0, "largest norm of the gradient", above=0)
    ema: float = setting(0.0, "decay of a moving average of the trained weights; 0: none", low=0, below=1)
    # what is written, and when
    log_every: int = setting(20, "steps between lines of metrics.jsonl", above=0, resumable=True)
    val_every: int = setting(500, "steps between validations", above=0, resumable=True)
    sheet_every: int = setting(500, "steps between sheets of fixed prompts; 0: none", low=0, resumable=True)
    checkpoint_every: int = setting(500, "steps between checkpoints", above=0, resumable=True)
    log_minutes: float = setting(1.0, "at most, between lines; 0: any", low=0, resumable=True, newer=True)
    checkpoint_minutes: float = setting(0.0, "between more; 0: none", low=0, resumable=True, newer=True)
    keep: int = setting(1, "checkpoints to keep, the last ones", above=0, resumable=True, newer=True)

    def __post_init__(self):
        for name, rule in rules(TrainConfig).items():
            rule.check(flag_name(name), getattr(self, name))
        if len(self.unet_channels) != 2 or min(self.unet_channels) < 1:
            raise ValueError(f"--unet-channels is {self.unet_channels}; it takes two positive numbers: 48,96")
        side, patch, numbers = self.image_size, self.latent_patch, 3 * self.latent_patch**2
        if not self.vae and side % (2 * patch):
            raise ValueError(f"--image-size {side} is not a multiple of twice --latent-patch {patch}")
        if not self.vae and self.latent_channels > numbers:
            raise ValueError(f"--latent-channels {self.latent_channels}: a patch has {numbers} numbers")
        if self.lr_text_ratio == 0 and (self.text_batch or self.from_scratch):
            flag = "--text-batch" if self.text_batch else "--from-scratch"
            raise ValueError(f"{flag} trains nothing while the text is frozen: give --lr-text-ratio as well")
        if self.text_data and not self.text_batch:
            raise ValueError(f"--text-data {self.text_data} goes with --text-batch")
        if self.edit_drop + self.edit_empty > 1:
            shares = f"--edit-drop {self.edit_drop} and --edit-empty {self.edit_empty}"
            raise ValueError(f"{shares} are more than 1 together")
        parse_stages(self.stages)
        parse_tasks(self.task or "caption")

    def model_overrides(self, channels: int, factor: int) -> dict:
        """The fields of ModelConfig that this run sets, for latents of so many channels and pixels a side."""
        if self.image_size % (2 * factor):
            raise ValueError(f"--image-size {self.image_size} is no multiple of {2 * factor} (VAE)")
        own = ("separation", "unet_channels", "unet_attention", "patch_positions")
        latents = dict(latent_channels=channels, latent_size=self.image_size // factor)
        return latents | {name: getattr(self, name) for name in own}

    @functools.cached_property
    def diffusion(self) -> Diffusion:
        """The noise schedule, and what UNet-Up's output means."""
        return Diffusion(self.schedule_shift, self.prediction)

    @functools.cached_property
    def tasks(self) -> dict[str, float]:
        """The share of each task. Without --task: captions before pictures, and pictures before captions."""
        if self.task:
            return parse_tasks(self.task)
        shares = {"generate": self.caption_first, "caption": 1 - self.caption_first}
        return {task: share for task, share in shares.items() if share}


def lr_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from 1 to lr_final / lr over the rest of the run (Section 4.1)."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    low = min(1.0, config.lr_final / config.lr)
    return low + (1 - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def paper(base: str, **changes: object) -> TrainConfig:
    """The paper's recipe (Section 4.1) on a stock checkpoint.

    Our choice: 1M tokens a step, as 256 sequences of 4,096 with about 14 captioned pictures each. The paper
    gives 0.25T image-caption tokens in 250,000 steps; its other half, text alone, trains nothing here.
    """
    common = dict(data="", vae="stabilityai/sd-vae-ft-mse", batch_size=3584, pack=4096, dtype="bfloat16")
    common |= dict(activation_checkpointing=True, compile=True, device="cuda", micro_batch=56, val_every=1000)
    common |= dict(edit_empty=0.05)
    return TrainConfig(base=base, **{**common, **changes})


# A laptop CPU, minutes. What differs from the paper's recipe, and why, is a table in small/README.md.
SMALL = TrainConfig(
    **dict(image_size=64, latent_patch=8, latent_channels=36, whiten=0.5),
    **dict(unet_channels=(48, 96), unet_attention=False, patch_positions=True),
    **dict(prediction="x", loss_weighting="x", schedule_shift=2.0, noise_limit=200),
    **dict(steps=3600, batch_size=64, warmup=100, weight_decay=0.01, edit_empty=0.05, sheet_every=200),
    **dict(optimizer="muon", muon_lr=8e-3, lr=1e-3, lr_final=3e-5),
)
CHAT = dict(init_from="runs/small", task="generate=2,caption=1,edit=3,chat=6", draw_lr_ratio=10.0)
CONFIGS = {
    "small": SMALL,
    "small-chat": dataclasses.replace(SMALL, **CHAT, out="runs/small-chat", micro_batch=16, steps=2000),
    "qwen3-0.6b": paper("Qwen/Qwen3-0.6B", out="runs/qwen3-0.6b"),
    "qwen3-1.7b": paper("Qwen/Qwen3-1.7B", out="runs/qwen3-1.7b"),
    "qwen3-4b": paper("Qwen/Qwen3-4B", out="runs/qwen3-4b", micro_batch=28),
    "qwen3-8b": paper("Qwen/Qwen3-8B", out="runs/qwen3-8b", micro_batch=14),
}


def restore_config(saved: object, source: Path) -> dict:
    """The fields of TrainConfig in a checkpoint; ValueError: one is unknown, wrong, or missing."""
    if not isinstance(saved, dict):
        raise ValueError(f"{source}: config is missing or not a JSON object")
    default = dataclasses.asdict(TrainConfig())
    needed = {name for name, rule in rules(TrainConfig).items() if not rule.newer}
    for name in sorted(needed - set(saved)):
        raise ValueError(f"{source}: field {name} of config is missing")
    for name, value in saved.items():
        if name not in default:
            raise ValueError(f"{source}: field {name} of config is unknown")
        kind = {tuple: list, float: (int, float)}.get(type(default[name]), type(default[name]))
        if not isinstance(value, kind):
            raise ValueError(f"{source}: field {name} of config is {value!r}")
    restored = default | saved
    return restored | {"unet_channels": tuple(restored["unet_channels"])}


def resumed_config(saved: dict, given: dict) -> TrainConfig:
    """The configuration of a run that goes on; ValueError for a flag that may not change."""
    for name, rule in rules(TrainConfig).items():
        if name in given and not rule.resumable and given[name] != saved[name]:
            raise ValueError(f"--resume: {name} was {saved[name]} and cannot become {given[name]}")
    return TrainConfig(**saved | given)


def inherited_config(config: TrainConfig, info: dict, saved: dict, given: dict) -> TrainConfig:
    """The configuration of a second stage: what the model is comes from the checkpoint of --init-from.

    info: its checkpoint.json; saved: the "config" in it, restored. ValueError for a flag that contradicts it.
    """
    inherited = {name: saved[name] for name, rule in rules(TrainConfig).items() if rule.inherited}
    for name, value in inherited.items():
        if name in given and given[name] != value:
            change = f"{name} was {value} there and cannot become {given[name]}"
            raise ValueError(f"--init-from {config.init_from}: {change}")
    if "base" not in given:
        inherited["base"] = info.get("base", "")
    if "vae" not in given:  # another path is fine: the fingerprint tells
        inherited["vae"] = (info.get("vae") or {}).get("path", "")
    return dataclasses.replace(config, **given | inherited)


# ---- Command lines ----


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that states a default where there is one to state."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, "", [])
        return action.help if silent else super()._get_help_string(action)


class HelpAll(argparse.Action):
    """--help-all: the help with that of rare flags."""

    def __call__(self, parser: Parser, *_: object) -> None:
        for action, text in parser.rare:
            action.help = text
        parser.epilog = None
        parser.print_help()
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse that knows near misses, not abbreviations. Flags with rare=True stand in --help-all alone.

    A flag of text is a path, in which a ~ at the start is the home folder, unless its metavar is TEXT.
    """

    def __init__(self, **kwargs: typing.Any):
        self.rare: list[tuple[argparse.Action, str]] = []
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def add_argument(self, *names: str, rare: bool = False, **kwargs: typing.Any) -> argparse.Action:
        action = super().add_argument(*names, **kwargs)
        if action.type is None and action.metavar != "TEXT":  # no shell expands the ~ of --out=~/run
            action.type = os.path.expanduser
        if rare:
            hidden = argparse.SUPPRESS
            if not self.rare:
                super().add_argument("--help-all", action=HelpAll, nargs=0, default=hidden, help=hidden)
            self.rare.append((action, action.help))
            action.help = hidden
            self.epilog = f"--help-all shows {len(self.rare)} more flags."
        return action

    def parse_args(self, args: list[str] | None = None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else args
        for text in args:
            if any("\ud800" <= c <= "\udfff" for c in text):  # how Python keeps a byte that is none
                self.error(f"{text!r} is not UTF-8")
        namespace, unknown = self.parse_known_args(args)
        if unknown:
            flags = [s for a in self._actions for s in a.option_strings if s.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=3, cutoff=0.7)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {' '.join(sorted(flags))}"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return namespace


def boolean(text: str) -> bool:
    """The value of a yes/no flag."""
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def integers(text: str) -> tuple[int, ...]:
    """The value of a flag that takes several whole numbers, "48,96"."""
    try:
        return tuple(int(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 48,96") from None


def add_fields(parser: Parser, cls: type) -> None:
    """A flag for every field of a dataclass, by its annotation and its rule; None where it is not given."""
    hints, some_common = typing.get_type_hints(cls), any(rule.common for rule in rules(cls).values())
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kind = {bool: boolean, int: int, float: float, str: None}.get(hint, integers)
        rule, default = field.metadata["rule"], field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        parser.add_argument(
            flag_name(field.name),
            dest=field.name,
            type=kind,
            default=None,
            choices=rule.choices,
            help=rule.help + (f" [{shown}]" if shown != "" else ""),
            metavar=None if rule.choices else field.name.upper(),
            rare=some_common and not rule.common,
        )


class Bar(tqdm):
    """A progress bar on a terminal; elsewhere, as in a log file, a line a minute. quiet: neither."""

    def __init__(self, iterable: Iterable | None = None, quiet: bool = False, **kwargs: typing.Any):
        super().__init__(iterable, disable=True if quiet else None, **kwargs)  # None: unless on a terminal
        self.in_lines, self.what = self.disable and not quiet, (kwargs["desc"], kwargs.get("unit"))
        self.first, self.began, self.postfix = self.n, time.monotonic(), None
        self.said = self.began

    def __iter__(self) -> Iterator:
        for x in super().__iter__():
            yield x
            if self.disable:  # tqdm counts only what it draws
                self.update()

    def update(self, n: int = 1) -> None:
        super().update(n)
        if not self.disable:
            return
        self.n, now = self.n + n, time.monotonic()
        if self.in_lines and now - self.said >= 60:
            self.said, (desc, unit) = now, self.what
            left = (now - self.began) / (self.n - self.first) * (self.total - self.n)
            done = f"{desc}: {self.n} of {self.total}{f' {unit}s' if unit else ''}"
            parts = (done, f"{self.format_interval(left)} left", self.postfix)
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def check_range(args: argparse.Namespace, **bounds: tuple[float, float]) -> None:
    """ValueError for the first flag whose value is not within its (least, most)."""
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be from {low} to {high}")


def tune_torch(keep_memory: bool = False) -> None:
    """Settings that make small models on CPUs about three times as fast; on GPUs the first means TF32.

    "medium" hands float32 products to oneDNN, which is twice as fast as MKL on AMD processors and as exact
    there. On processors with AMX it rounds their inputs to bfloat16, and is no faster for models of this
    size: where a product comes out rounded, the setting is taken back. Gradients that fade out become
    denormal numbers, with which arithmetic is slow; they are flushed to zero. Of the attention kernels on
    GPUs, cuDNN's builds a plan anew for every length, and is left out.

    oneDNN keeps what it prepares for 1,024 shapes of products. Each batch of texts of other lengths brings
    70 new ones; between them the heap falls to pieces: after 3,000 steps of pretraining 4.4 GB, of which a
    quarter of the time goes into searching. 256 are enough for some steps.

    keep_memory: glibc gives freed memory back to the system and gets it again, page by page, for every tensor
    of some size. Told to keep it, it paints in a fifth less time; but training takes a tenth more.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # read at the first product
    torch.backends.cuda.enable_cudnn_sdp(False)
    if keep_memory and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: up to 32 MiB
    torch.set_float32_matmul_precision("medium")
    x = torch.full((256, 256), 1 + 2.0**-12)  # bfloat16 would make it 1
    if not torch.cuda.is_available() and not torch.equal(x @ torch.eye(256), x):
        torch.set_float32_matmul_precision("highest")
    torch.set_flush_denormal(True)


def read_text(path: str, name: str = "") -> str:
    """A text of the user's, in UTF-8, with line ends \\n; ValueError, which names it by `name` or its path.

    Lines are what \\n ends: `splitlines` would also cut at a form feed or U+2028, which stand inside of one.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name or path}: {reason}") from None


@functools.cache
def say_once(line: str) -> None:
    """A line on stderr, the first time alone."""
    print(line, file=sys.stderr)


def is_deliberate(error: ValueError) -> bool:
    """Whether a `raise` of this project made the error: that is how it speaks to a user.

    What a library raises, or a built-in function within a line of ours, is a mistake of ours.
    """
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code, root = last.tb_frame.f_code, Path(__file__).resolve().parent
    folder = Path(code.co_filename).resolve().parent  # of an environment below the root: deeper
    return root in (folder, folder.parent) and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def run_command(main: Callable[[], None]) -> typing.NoReturn:
    """Run a command; a user's mistake ends in one line and status 2, an interrupt in status 130.

    An error that nobody raised for the user keeps its traceback, behind a line that says it may be a bug.
    """
    gc.freeze()  # what the imports made stays: to look through all of it for garbage takes half a second
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a caption may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted{': ' + str(stop) if str(stop) else ''}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        reason = " ".join(str(error).splitlines())
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", reason):
            first = str(error).partition("\n")[0] or "MemoryError"
            reason = f"not enough memory for this ({first})"
        elif not isinstance(error, OSError) and not (isinstance(error, ValueError) and is_deliberate(error)):
            print("this was not expected, and may be a bug of this program:", file=sys.stderr)
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
