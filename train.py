"""Train the image side of an LMFusion (Sections 2.3 and 4.1 of the paper).

    python train.py --config small                                   # built-in tiny Qwen3, built-in pictures
    python train.py --config small --data "photos/train-*.tar" --val-data photos/val.tar --out runs/photos
    torchrun --nproc-per-node 8 train.py --config qwen3-8b --data latents/train        # see parallel.py
    python train.py --config qwen3-8b --dry-run                                        # memory and FLOPs

Every field of `TrainConfig` is a flag of the same name. A run's folder holds metrics.jsonl, sheets of fixed
prompts, curves.png, and the last checkpoint (see checkpoint.py). All randomness of a step comes from the seed
and the number of the step, so that a resumed run goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm

import cli
from attention import Tokens
from chat.template import IM_END, IM_START
from checkpoint import (
    LAST_RUNS,
    Trained,
    check_device,
    find_checkpoint,
    list_checkpoints,
    load_codec,
    read_tensors,
    write_atomic,
    write_folder,
)
from cli import setting
from data import (
    BEHIND,
    DROPPED,
    FIRST,
    Batch,
    Document,
    PatchPCA,
    PictureSource,
    Recipe,
    Shapes,
    arrange,
    caption_document,
    chat_document,
    collate,
    edit_document,
    next_tokens,
    parse_tasks,
)
from diffusion import Diffusion
from evaluate import TIMESTEPS, errors_by_timestep, read_paragraphs
from generate import edit_images, generate_images
from lab import figures
from load_qwen3 import (
    encode_plain,
    fingerprint,
    init_image,
    known_config,
    load_qwen3,
    load_tokenizer,
    read_json,
    resolve,
)
from model import SEPARATIONS, Hidden, LMFusion, replace
from scale.latents import INDEX, LatentShards, LatentSource
from scale.muon import Muon
from scale.parallel import (
    Team,
    alike,
    end_processes,
    fill,
    full_tensor,
    init_processes,
    own_device,
    release,
    shard,
)
from scale.pictures import list_samples, load_edits, load_pictures
from scale.vae import AutoencoderKL, load_vae, read_vae_config, resolve_vae
from small import pretrain


def parse_stages(text: str) -> list[tuple[int, list[str]]]:
    """ "0:unet_*;500:unet_*,*.self_attn.*;900:*" -> steps, and patterns of what trains from there on.

    ValueError unless the steps begin with 0 and grow.
    """
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


@dataclass(frozen=True)
class TrainConfig:
    """A run; defaults are the paper's recipe (Section 4.1), `CONFIGS` holds the named ones."""

    # what to train on
    base: str = setting("", "Hugging Face folder or hub id of a Qwen3; empty: pretrain the tiny one")
    data: str = setting(
        "shapes",
        "'shapes', latents that `data.py encode` made, a folder, a metadata.jsonl, or WebDataset tars "
        "(a path or a glob)",
    )
    val_data: str = setting("", "likewise, for validation; empty: every 20th picture of --data")
    init_from: str = setting("", "run or checkpoint whose image side this run starts from (second stage)")
    task: str = setting(
        "",
        "caption, generate, edit, chat, or a mixture with weights (generate=2,chat=3); empty: captioned "
        "pictures, as --caption-first has it",
    )
    text_data: str = setting("", "file of text for --text-batch, in paragraphs; empty: the built-in text")
    from_scratch: bool = setting(
        False, "random text weights in the base's place: with --separation none it is Transfusion (Table 1)"
    )
    out: str = setting("runs/small", "folder of the run")
    seed: int = setting(0, "of everything random")
    device: str = setting("cpu", "cpu, cuda, ...")
    dtype: str = setting(
        "float32", "of the computation; weights that learn stay float32", ("float32", "bfloat16")
    )
    # the image side of the model
    separation: str = setting("deep", "Section 5.1", SEPARATIONS)
    image_size: int = setting(256, "pixels a side, after centre crop and resize")
    vae: str = setting("", "diffusers folder or hub id of the VAE; empty: linear latents")
    latent_patch: int = setting(8, "linear latents: pixels a side of what becomes one latent position")
    latent_channels: int = setting(4, "linear latents: channels")
    whiten: float = setting(0.5, "of the linear latents: 1 makes all components alike, 0 leaves them")
    unet_channels: tuple[int, ...] = setting((640, 1792), "of the U-Net, at full and at half resolution")
    unet_attention: bool = setting(True, "self-attention at the low resolution of the U-Net")
    patch_positions: bool = setting(False, "a learned vector for each patch")
    # diffusion and losses
    prediction: str = setting("eps", "what UNet-Up's output is", ("eps", "v"))
    loss_weighting: str = setting(
        "none", "of the diffusion loss by timestep; v: divided by alpha_bar", ("none", "v")
    )
    schedule_shift: float = setting(
        1.0, "divides the signal-to-noise ratio of the cosine schedule by its square"
    )
    lambda_ddpm: float = setting(5.0, "lambda of Eq. (4)")
    caption_first: float = setting(0.8, "share of samples with the caption before the picture")
    caption_drop: float = setting(0.1, "share of those whose caption is dropped, for guidance")
    edit_drop: float = setting(0.2, "share of edits whose instruction is dropped: the source comes back")
    noise_limit: int = setting(500, "timesteps of a picture before its caption are below this")
    # optimisation
    steps: int = setting(250_000, "training steps")
    batch_size: int = setting(64, "pictures a step, over all processes")
    text_batch: int = setting(0, "documents of text alone beside them, where the text side learns")
    micro_batch: int = setting(0, "pictures a process computes at once; 0: its whole share of the batch")
    pack: int = setting(0, "documents share sequences of up to this many tokens; 0: one document a sequence")
    activation_checkpointing: bool = setting(False, "recompute layers in the backward pass: less memory")
    optimizer: str = setting(
        "adamw", "adamw, or muon for the experts' matrices and adamw for the rest", ("adamw", "muon")
    )
    lr: float = setting(1e-4, "peak learning rate of the image side")
    lr_final: float = setting(1.5e-5, "learning rate at the end of the cosine")
    muon_lr: float = setting(8e-3, "peak learning rate of the matrices under muon")
    stages: str = setting(
        "",
        "what trains when: STEP:PATTERN,...;STEP:PATTERN,... (patterns of parameter names: 'unet_*', '*'); "
        "empty: everything, always",
    )
    lr_text_ratio: float = setting(
        0.0, "learning rate of the text side over that of the image side; 0 freezes it"
    )
    draw_lr_ratio: float = setting(1.0, "learning rate of the row that decides when to draw, over --lr")
    warmup: int = setting(4000, "steps of linear warm-up")
    weight_decay: float = setting(0.1, "on matrices")
    clip: float = setting(1.0, "largest norm of the gradient")
    ema: float = setting(0.0, "decay of a moving average of the trained weights; 0: none")
    # what is written, and when
    log_every: int = setting(20, "steps between lines of metrics.jsonl")
    val_every: int = setting(500, "steps between validations")
    sheet_every: int = setting(500, "steps between sheets of fixed prompts; 0: none")
    checkpoint_every: int = setting(500, "steps between checkpoints")

    def __post_init__(self):
        positive = (
            "image_size",
            "latent_patch",
            "latent_channels",
            "steps",
            "batch_size",
            "noise_limit",
            "log_every",
            "val_every",
            "checkpoint_every",
            "lr",
            "schedule_shift",
            "clip",
            "muon_lr",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")
        for name in (
            "lr_final",
            "lr_text_ratio",
            "draw_lr_ratio",
            "warmup",
            "weight_decay",
            "lambda_ddpm",
            "whiten",
            "text_batch",
            "micro_batch",
            "pack",
            "sheet_every",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}; it must not be negative"
                )
        for name in ("caption_first", "caption_drop", "edit_drop", "ema"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "ema" and value == 1):
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must lie between 0 and 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; it must be from 0 to 2^63 - 1")
        if len(self.unet_channels) != 2 or min(self.unet_channels) < 1:
            raise ValueError(
                f"--unet-channels is {self.unet_channels}; it takes two positive numbers, like 48,96"
            )
        if not self.vae and self.image_size % (2 * self.latent_patch):
            raise ValueError(
                f"--image-size {self.image_size} is not a multiple of twice --latent-patch "
                f"{self.latent_patch}"
            )
        if not self.vae and self.latent_channels > 3 * self.latent_patch**2:
            raise ValueError(
                f"--latent-channels {self.latent_channels} is more than the {3 * self.latent_patch**2} "
                "numbers of a patch"
            )
        if self.task:
            parse_tasks(self.task)
        if self.lr_text_ratio == 0 and (self.text_batch or self.from_scratch):
            raise ValueError(
                f"{'--text-batch' if self.text_batch else '--from-scratch'} trains nothing while the text is "
                "frozen: give --lr-text-ratio as well"
            )
        if self.text_data and not self.text_batch:
            raise ValueError(f"--text-data {self.text_data} goes with --text-batch")
        parse_stages(self.stages)
        if self.noise_limit > 1000:
            raise ValueError(f"--noise-limit is {self.noise_limit}; there are 1000 timesteps")

    def model_overrides(self, channels: int, factor: int) -> dict:
        """The fields of ModelConfig that this run sets, for latents of so many channels and pixels a side."""
        if self.image_size % (2 * factor):
            raise ValueError(
                f"--image-size {self.image_size} is not a multiple of {2 * factor}, twice the VAE's"
            )
        return dict(
            separation=self.separation,
            latent_channels=channels,
            latent_size=self.image_size // factor,
            unet_channels=tuple(self.unet_channels),
            unet_attention=self.unet_attention,
            patch_positions=self.patch_positions,
        )

    @property
    def tasks(self) -> dict[str, float]:
        """The share of each task; none in the first stage."""
        return parse_tasks(self.task) if self.task else {}

    @property
    def recipe(self) -> Recipe:
        """With only captions and pictures to make, a task is a recipe of the first stage."""
        simple = self.tasks and set(self.tasks) <= {"caption", "generate"}
        first = self.tasks.get("generate", 0.0) if simple else self.caption_first
        return Recipe(first, self.caption_drop, self.noise_limit)


def paper(base: str, **changes) -> TrainConfig:
    """The paper's recipe (Section 4.1) on a stock checkpoint.

    Our choice: 1M tokens a step, as 256 sequences of 4,096 with about 14 captioned pictures each. The paper
    gives 0.25T image-caption tokens in 250,000 steps; its other half, text alone, trains nothing here.
    """
    common = dict(data="", vae="stabilityai/sd-vae-ft-mse", batch_size=3584, pack=4096, dtype="bfloat16")
    common |= dict(activation_checkpointing=True, device="cuda", micro_batch=56, val_every=1000)
    return TrainConfig(base=base, **{**common, **changes})


CONFIGS = {
    "qwen3-0.6b": paper("Qwen/Qwen3-0.6B", out="runs/qwen3-0.6b"),
    "qwen3-1.7b": paper("Qwen/Qwen3-1.7B", out="runs/qwen3-1.7b"),
    "qwen3-4b": paper("Qwen/Qwen3-4B", out="runs/qwen3-4b", micro_batch=28),
    "qwen3-8b": paper("Qwen/Qwen3-8B", out="runs/qwen3-8b", micro_batch=14),
    # A laptop CPU, minutes. What differs from the paper's recipe, and why, is a table in the README.
    "small": TrainConfig(
        image_size=32,
        latent_patch=4,
        latent_channels=16,
        whiten=0.8,
        unet_channels=(48, 96),
        unet_attention=False,
        patch_positions=True,
        prediction="v",
        loss_weighting="v",
        schedule_shift=2.0,
        noise_limit=200,
        steps=3600,
        batch_size=64,
        optimizer="muon",
        muon_lr=8e-3,
        lr=1e-3,
        lr_final=3e-5,
        warmup=100,
        weight_decay=0.01,
    ),
}
CONFIGS["small-chat"] = dataclasses.replace(
    CONFIGS["small"],
    init_from="runs/small",
    task="generate=2,caption=1,edit=3,chat=6",
    out="runs/small-chat",
    micro_batch=16,
    draw_lr_ratio=10.0,
    steps=2000,
)
# What a second stage takes from the first, unless told the same again.
INHERITED = (
    "separation",
    "image_size",
    "latent_patch",
    "latent_channels",
    "whiten",
    "unet_channels",
    "unet_attention",
    "patch_positions",
    "prediction",
    "loss_weighting",
    "schedule_shift",
    "noise_limit",
)
FREE_ON_RESUME = {
    "base",
    "init_from",
    "out",
    "steps",
    "device",
    "log_every",
    "val_every",
    "sheet_every",
    "checkpoint_every",
    "data",
    "val_data",
    "text_data",
    "vae",
    "micro_batch",
    "pack",
    "activation_checkpointing",
    "dtype",
}


# ------------------------------------------------------------------------------------------------------------
# The loss


def draw_noise(shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For M latents of `shape` (M, C, h, w): u (M,) uniform in 0 .. 1, which becomes t, and eps."""
    return torch.rand(shape[0], generator=generator), torch.randn(shape, generator=generator)


def losses(
    model: LMFusion, diffusion: Diffusion, batch: Batch, config: TrainConfig, noise: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """L = L_LM + lambda L_DDPM, Eq. (4), and its parts. One t a picture goes to the noising and to the U-Net.

    noise: as `draw_noise` gives it. "draw_loss" belongs to the BOI row alone: it is a logistic loss on
    detached features and shares no parameter with the others.
    """
    x0 = batch.latents
    t = (noise[0] * batch.max_t).long().to(x0.device)  # uniform below each picture's limit
    eps = noise[1].to(x0)
    x_t, t, which = batch.noised(diffusion, t, eps)  # Eq. (2)
    before, hidden = model(batch.prefix, batch.rest, x_t, t)
    output = model.unet_output(hidden, which)
    if which is not None:
        x_t, t, eps = x_t[which], t[which], eps[which]
    eps_pred = diffusion.eps_from_output(output, x_t, t)
    out = {"ddpm_loss": diffusion.loss(eps_pred, eps, t, config.loss_weighting)}  # Eq. (3)
    if not (batch.max_t > 0).any():  # a mean over nothing
        out["ddpm_loss"] = 0.0 * out["ddpm_loss"]

    def of_text(part: Hidden | None, tokens: Tokens) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Features (T, D), next words (T,), and whether an image comes next (T,), if there is text."""
        if part is None or part.text is None:
            return []
        return [(part.text, *next_tokens(tokens, model.config.boi_id))]

    def pick(features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Those with something to learn; `wanted` is in main memory, and no device has to be waited for."""
        i = (wanted >= 0).nonzero().squeeze(1)
        return features[i.to(features.device)], wanted[i].to(features.device)

    # Eq. (1): text behind an image. If the text is frozen, none before it carries a gradient: no logits.
    behind = of_text(hidden, batch.rest)
    everywhere = behind + of_text(before, batch.prefix)
    learned = [pick(h, w) for h, w, _ in (behind if model.text_is_frozen else everywhere)]
    drawing = [pick(h, d) for h, _, d in everywhere]
    # A mean over nothing is 0, with a gradient of 0: all processes must have one of the same parameters.
    if learned:
        features, words = map(torch.cat, zip(*learned, strict=True))
        logits = model.logits(features).float()
        out["lm_loss"] = F.cross_entropy(logits, words, reduction="sum") / max(1, len(words))
    if drawing:
        features, draw = map(torch.cat, zip(*drawing, strict=True))
        logit, n = model.draw_logit(features).float(), max(1, len(draw))
        out["draw_loss"] = F.binary_cross_entropy_with_logits(logit, draw.float(), reduction="sum") / n
    out["loss"] = out.get("lm_loss", 0.0) + config.lambda_ddpm * out["ddpm_loss"]
    return out


PARTS = ("ddpm_loss", "lm_loss", "draw_loss")


def count_targets(model: LMFusion, batch: Batch) -> list[int]:
    """How many things each of PARTS is a mean over: pictures, words to predict, decisions to draw."""
    boi = model.config.boi_id
    (words, draw), (words_before, draw_before) = next_tokens(batch.rest, boi), next_tokens(batch.prefix, boi)
    learned = words if model.text_is_frozen else torch.cat((words, words_before))
    counts = (learned >= 0).sum().item(), (torch.cat((draw, draw_before)) >= 0).sum().item()
    return [int((batch.max_t > 0).sum()), *counts]


# ------------------------------------------------------------------------------------------------------------
# Optimisation


def make_optimizers(model: LMFusion, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Section 3.1: the text at `lr_text_ratio` times the image's rate; weight decay on matrices.

    A group's "peak" is its learning rate at the height of the schedule. At ratio 0 the text is in no group.
    """
    text = set(model.text_parameters())
    matrices, adamw = [], {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        ratio = config.lr_text_ratio if name in text else 1.0
        if name == "boi_head":
            ratio = config.draw_lr_ratio
        if config.optimizer == "muon" and p.dim() == 2 and name.startswith("layers."):
            matrices.append({"params": [p], "peak": config.muon_lr * ratio})
        else:
            decay = config.weight_decay if p.dim() > 1 else 0.0
            adamw.setdefault((ratio, decay), []).append(p)
    groups = [
        {"params": ps, "peak": config.lr * ratio, "weight_decay": decay}
        for (ratio, decay), ps in adamw.items()
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=0.0, weight_decay=config.weight_decay))
    return optimizers


def lr_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from 1 to lr_final / lr over the rest of the run (Section 4.1)."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    low = min(1.0, config.lr_final / config.lr)
    return low + (1 - low) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def optimizer_tensors(
    parameters: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """The optimizers' state by parameter: {"exp_avg/unet_up.conv_out.bias": ...}."""
    names = {p: n for n, p in parameters.items()}
    return {
        f"{key}/{names[p]}": value
        for o in optimizers
        for p, state in o.state.items()
        for key, value in state.items()
    }


def restore_optimizers(
    file: Path,
    names: list[str],
    parameters: dict[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Put back what `optimizer_tensors` gave; `file` must hold exactly `names`, or ValueError names one."""
    owner = {p: o for o in optimizers for g in o.param_groups for p in g["params"]}
    expected = {}
    for name in names:
        key, _, parameter = name.partition("/")
        p = parameters.get(parameter)
        if p not in owner:
            raise ValueError(f"{file}: tensor {name} belongs to no trained parameter")
        expected[name] = torch.empty((), device="meta") if key == "step" else p
    for name, value in read_tensors(file, expected).items():
        key, _, parameter = name.partition("/")
        p = parameters[parameter]
        owner[p].state[p][key] = alike(p, value).clone()  # of a fused optimizer, the step as well


# ------------------------------------------------------------------------------------------------------------
# A run


class Run:
    """Everything that one run of training holds."""

    def __init__(self, config: TrainConfig, name: str, team: Team | None = None, former: str | None = None):
        self.config, self.name, self.out = config, name, Path(config.out)
        self.team = team or Team(device=config.device)
        for flag, size in (("batch-size", config.batch_size), ("text-batch", config.text_batch)):
            if size % self.team.size:
                raise ValueError(f"--{flag} {size} is not a multiple of {self.team.size} processes")
        self.source = open_source(config)
        self.vae, self.codec = open_codec(config, self.source, self.team.device)
        alone = self.team.size == 1
        self.team.agree("what --data holds", b"" if alone else content(self.source))
        self.paragraphs = read_paragraphs(config.text_data, "--text-data") if config.text_data else []
        self.team.agree("what --text-data holds", b"" if alone else json.dumps(self.paragraphs).encode())
        base = self.find_base(former)
        self.team.agree("the base language model", b"" if alone else base_content(resolve(base)))
        dtype = getattr(torch, config.dtype)
        overrides = config.model_overrides(self.codec.channels, self.codec.patch)
        torch.manual_seed(config.seed)  # of the U-Net, whether or not a base was just pretrained
        self.model = load_qwen3(
            base, device=self.team.device, prepare=lambda model: shard(model, self.team, dtype), **overrides
        )
        self.model.activation_checkpointing = config.activation_checkpointing
        self.overrides, self.base, self.fingerprint = overrides, str(base), fingerprint(self.model)
        if config.from_scratch:
            pretrain.init_text(self.model)
            init_image(self.model)
        self.model.freeze_text(config.lr_text_ratio == 0, norm=not config.from_scratch)
        self.tokenizer: Tokenizer = load_tokenizer(base)
        context, P = self.model.config.max_position_embeddings, self.model.config.num_patches
        if config.pack:
            context = min(context, config.pack)
        if context < P + 4:
            raise ValueError(
                f"{base}: a context of {context} tokens (max_position_embeddings, --pack) leaves no room for "
                f"a caption beside the {P} patches of a picture"
            )
        self.room = context - P - 3  # for a caption
        self.tasks = {} if set(config.tasks) <= {"caption", "generate"} else config.tasks
        if self.tasks:
            check_tasks(self.tasks, self.source, self.tokenizer, config.data)
        if isinstance(self.source, LatentSource):
            model = self.model.config
            for shards in (self.source.train, self.source.val):
                shards.check_fits(model.latent_channels, model.latent_size, model.vocab_size, base)
        self.diffusion = Diffusion(config.schedule_shift, config.prediction)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() for n, p in self.trained.items()} if config.ema else None
        self.optimizers = make_optimizers(self.model, config)
        self.stages = [(step, self.matching(patterns)) for step, patterns in parse_stages(config.stages)]
        self.step, self.seconds = 0, 0.0
        self.ids: dict[str, list[int]] = {}  # captions already tokenised
        self.validation = self.make_validation()

    def find_base(self, former: str | None) -> str | Path:
        """Where the base language model lies. One process fetches or pretrains it, the others wait.

        former: where the tiny one was when the run that is resumed began.
        """
        base: str | Path = ""
        for first in (True, False):
            if self.team.is_main == first:
                if self.config.base:
                    base = resolve(self.config.base)
                elif isinstance(former, str) and Path(former).is_dir():
                    base = Path(former)
                else:
                    base = ensure_base(self.config.seed)
            self.team.wait()
        return self.config.base or base

    def tokenise(self, caption: str) -> list[int]:
        """Token ids of a caption; one that leaves no room for the picture in the context is cut."""
        if caption not in self.ids:
            self.ids[caption] = encode_plain(self.tokenizer, caption)[: self.room]
        return self.ids[caption]

    def tokenise_edit(self, instruction: str) -> list[int]:
        """Likewise for an instruction, which leaves room for two pictures."""
        return self.tokenise(instruction)[: max(1, self.room - self.model.config.num_patches - 1)]

    def fits(self, caption: str) -> bool:
        """Whether `tokenise` leaves a caption whole."""
        return len(self.tokenise(caption)) == len(encode_plain(self.tokenizer, caption))

    def matching(self, patterns: list[str]) -> set[str]:
        """Names of the trained parameters that a stage trains; ValueError for a pattern that fits none."""
        found: set[str] = set()
        for pattern in patterns:
            names = fnmatch.filter(self.trained, pattern)
            if not names:
                examples = ", ".join(list(self.trained)[:: max(1, len(self.trained) // 4)])
                raise ValueError(f"--stages: {pattern} fits no trained parameter; some are {examples}")
            found |= set(names)
        return found

    def resting(self) -> list[nn.Parameter]:
        """The parameters that the current stage leaves as they are."""
        now = [names for step, names in self.stages if step <= self.step]
        return [p for n, p in self.trained.items() if n not in now[-1]] if now else []

    def load(self, n: int, rng: random.Random, share: slice) -> tuple[Tensor, list[list[int]]]:
        """`share` of n training samples: latents (M, C, h, w) and captions as ids."""
        if isinstance(self.source, LatentSource):
            latents, ids = self.source.load(self.source.indices(n, rng)[share])
            return latents, [row[: self.room] for row in ids]
        pictures, captions = self.source.sample(n, rng, share)
        return self.codec.encode(pictures), [self.tokenise(c) for c in captions]

    def draw_batches(self) -> list[tuple[Batch, tuple[Tensor, Tensor]]]:
        """This process's share of a step, in micro batches, each with its noise.

        All that is random follows from the seed and the step's number, and is drawn for the whole batch: it
        does not depend on how many processes share it, or on the size of the micro batches.
        """
        batches = self.draw_task_batches() if self.tasks else self.draw_captioned_batches()
        return batches + self.draw_text_batches()

    def draw_captioned_batches(self) -> list[tuple[Batch, tuple[Tensor, Tensor]]]:
        """The first stage's: captioned pictures."""
        config, rng = self.config, random.Random(f"{self.config.seed}-{self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        share = self.team.share(config.batch_size)
        latents, ids = self.load(config.batch_size, rng, share)
        orders = config.recipe.draw(config.batch_size, rng)[share]
        noise = [x[share] for x in draw_noise((config.batch_size, *latents.shape[1:]), generator)]
        size = config.micro_batch or len(ids)
        batches = []
        for i in range(0, len(ids), size):
            part = slice(i, i + size)
            batch = arrange(
                ids[part], latents[part], orders[part], self.model.config, config.noise_limit, config.pack
            )
            batches.append((batch.to(self.team.device), (noise[0][part], noise[1][part])))
        return batches

    def draw_task_batches(self) -> list[tuple[Batch, tuple[Tensor, Tensor]]]:
        """Likewise for a mixture of tasks: each document follows from the seed, the step and its number."""
        config, model = self.config, self.model.config
        shape = (model.latent_channels, model.latent_size, model.latent_size)
        drawn = []
        for number in range(config.batch_size)[self.team.share(config.batch_size)]:
            rng = random.Random(f"{config.seed}-{self.step}-{number}")
            drawn.append((self.draw_document(rng), rng.getrandbits(63)))
        size = config.micro_batch or len(drawn)
        if size < len(drawn):  # those of like length together: less padding
            drawn.sort(key=lambda x: len(x[0]) + len(x[0].pictures) * (model.num_patches - 1))
        batches = []
        for i in range(0, len(drawn), size):
            documents, seeds = zip(*drawn[i : i + size], strict=True)
            pictures = [p for d in documents for p in d.pictures]
            latents = self.codec.encode(self.source.pixels(pictures)) if pictures else torch.zeros(0, *shape)
            batch = collate(documents, latents, model, config.pack)
            noise = [
                draw_noise((len(d.pictures), *shape), torch.Generator().manual_seed(seed))
                for d, seed in zip(documents, seeds, strict=True)
            ]
            if not pictures:  # `collate` put one there
                noise = [(torch.zeros(1), torch.zeros(1, *shape))]
            u, eps = (torch.cat(x) for x in zip(*noise, strict=True))
            batches.append((batch.to(self.team.device), (u, eps)))
        return batches

    def draw_document(self, rng: random.Random) -> Document:
        """One document of a mixture of tasks."""
        config, model = self.config, self.model.config
        task = rng.choices(list(self.tasks), list(self.tasks.values()))[0]
        dropped = rng.random() < (config.edit_drop if task == "edit" else config.caption_drop)
        if task == "chat":
            return chat_document(self.source.conversation(rng), dropped, self.tokenizer, model, rng)
        if task == "edit":
            source, target, instruction = self.source.edited(rng)
            return edit_document(source, target, self.tokenise_edit(instruction), dropped, model)
        picture, caption = self.source.captioned(rng)
        order = BEHIND if task == "caption" else DROPPED if dropped else FIRST
        return caption_document(picture, self.tokenise(caption), order, model, config.recipe)

    def draw_text_batches(self) -> list[tuple[Batch, tuple[Tensor, Tensor]]]:
        """Text alone, beside the pictures: what only a text side that learns has use for (Section 4.2)."""
        config, model, batches = self.config, self.model.config, []
        documents = []
        for number in range(config.text_batch)[self.team.share(config.text_batch)]:
            documents.append(self.draw_text(random.Random(f"text {config.seed}-{self.step}-{number}")))
        documents.sort(key=lambda d: len(d.ids))
        size = config.micro_batch or max(1, len(documents))
        for i in range(0, len(documents), size):
            batch = collate(documents[i : i + size], torch.zeros(0), model, config.pack)
            noise = torch.zeros(1), torch.zeros_like(batch.latents)  # of the empty picture it puts there
            batches.append((batch.to(self.team.device), noise))
        return batches

    def draw_text(self, rng: random.Random) -> Document:
        """A paragraph of --text-data, or built-in text and conversations as the tiny base was made of."""
        if self.paragraphs:
            ids = encode_plain(self.tokenizer, rng.choice(self.paragraphs)) + [self.model.config.eos_id]
            own = [True] * len(ids)
        else:
            ids, own = pretrain.draw_document(rng, self.tokenizer, pretrain.TALK)
        context = self.model.config.max_position_embeddings
        room = min(context, self.config.pack or context)
        return Document(ids[:room], [], [], own[:room])

    def train_step(self) -> dict[str, float]:
        """One step; returns the losses of the whole batch."""
        config, team = self.config, self.team
        batches = self.draw_batches()
        counts = [count_targets(self.model, batch) for batch, _ in batches]
        totals = team.total([float(sum(c)) for c in zip(*counts, strict=True)])
        means: dict[str, Tensor | float] = dict.fromkeys(PARTS, 0.0)
        for (batch, noise), count in zip(batches, counts, strict=True):
            out = losses(self.model, self.diffusion, batch, config, noise)
            # a mean over this micro batch -> its share of the mean over all
            share = {
                k: n / max(1, total) for k, n, total in zip(PARTS, count, totals, strict=True) if k in out
            }
            loss = out.get("lm_loss", 0.0) * share.get("lm_loss", 0.0)
            loss = loss + config.lambda_ddpm * out["ddpm_loss"] * share["ddpm_loss"]
            loss = loss + out.get("draw_loss", 0.0) * share.get("draw_loss", 0.0)
            (loss * team.size).backward()  # gradients of the processes are averaged
            for k in share:
                means[k] = means[k] + out[k].detach().double() * share[k]
        for p in self.resting():  # no gradient: in no norm, no step, no decay
            p.grad = None
        means = team.total([float(m) for m in means.values()])
        result = {k: m for k, m, total in zip(PARTS, means, totals, strict=True) if total}
        result["loss"] = result.get("lm_loss", 0.0) + config.lambda_ddpm * result.get("ddpm_loss", 0.0)
        norm = full_tensor(nn.utils.clip_grad_norm_(self.trained.values(), config.clip)).item()
        for what, value in (("loss", result["loss"]), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                raise ValueError(
                    f"the {what} is {value} at step {self.step + 1}; the last checkpoint is untouched. "
                    f"A smaller --lr or --muon-lr usually helps"
                )
        factor = lr_factor(self.step, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        if self.average is not None:
            decay = min(config.ema, self.step / (self.step + 10))  # forgets the random start
            torch._foreach_lerp_(
                list(self.average.values()), [p.detach() for p in self.trained.values()], 1 - decay
            )
        return result

    # ---- watching ----

    def make_validation(self) -> dict:
        """Fixed latents, noise and captions; every process holds and computes the same.

        Where edits are all that is trained, they are edits: the context is the picture before.
        """
        context = None
        if isinstance(self.source, LatentSource):
            latents, ids, _ = self.source.validation(96)
            ids = [row[: self.room] for row in ids]
        elif set(self.tasks) == {"edit"}:
            before, after, words = self.source.validation_edits(96)
            context, latents = (self.codec.encode(self.source.pixels(x)) for x in (before, after))
            ids = [self.tokenise_edit(w) for w in words]
        else:
            pictures, captions = self.source.validation(96)
            latents, ids = self.codec.encode(pictures), [self.tokenise(c) for c in captions]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
        size = self.config.micro_batch or len(ids)  # what fits in memory
        tensors = {"latents": latents, "noise": noise, "context": context}
        return {"ids": ids, "size": size} | {
            k: v if v is None else v.to(self.team.device) for k, v in tensors.items()
        }

    def validation_batch(self, rows: list[list[int]], part: slice) -> tuple[Batch, Tensor]:
        """Some of the validation pictures under these captions or instructions; and the noise."""
        latents, noise, context = (self.validation[k] for k in ("latents", "noise", "context"))
        latents, noise, model = latents[part], noise[part], self.model.config
        if context is None:
            return arrange(rows[part], latents, [FIRST] * len(latents), model), noise
        documents = [edit_document(None, None, row, False, model) for row in rows[part]]
        both = torch.stack((context[part], latents), 1).flatten(0, 1)  # before, after, before, ...
        return collate(documents, both, model), noise.repeat_interleave(2, 0)

    def validate(self) -> dict:
        """The training error of fixed pictures under the right and under another caption, by timestep."""
        ids, size, n = self.validation["ids"], self.validation["size"], len(self.validation["ids"])
        out: dict[str, list] = {"t": list(TIMESTEPS)}
        for key, rows in (("right", ids), ("permuted", ids[1:] + ids[:1])):
            errors = torch.zeros(len(TIMESTEPS), dtype=torch.float64)
            for i in range(0, n, size):
                batch, noise = self.validation_batch(rows, slice(i, i + size))
                weighting = self.config.loss_weighting
                found = errors_by_timestep(self.model, self.diffusion, batch, noise, weighting)
                errors += torch.tensor(found, dtype=torch.float64) * min(size, n - i)
            out[key] = (errors / n).tolist()
        release(self.model)
        return out

    def draw_sheet(self) -> None:
        """OUT/sheet-STEP.png: fixed prompts, painted with fixed noise; OUT/edits-STEP.png: fixed edits."""
        if "edit" in self.tasks:
            self.draw_edits()
        if set(self.tasks) == {"edit"}:
            return
        # a caption that training cuts would be an error in sampling
        prompts = [p for p in self.source.prompts() if self.fits(p)]
        if not prompts:
            return
        trained = Trained(self.model, self.tokenizer, self.diffusion, self.codec, {}, self.out)
        with self.averaged():
            pictures = generate_images(trained, prompts, seeds=list(range(len(prompts))))
            release(self.model)
        if self.team.is_main:
            figures.save_image(figures.sheet(pictures, prompts), self.out / f"sheet-{self.step:06d}.png")

    def draw_edits(self) -> None:
        """OUT/edits-STEP.png: pictures of the validation set before and after, as the model edits them."""
        before, _, words = self.source.validation_edits(9)
        before = self.source.pixels(before)
        trained = Trained(self.model, self.tokenizer, self.diffusion, self.codec, {}, self.out)
        words = [self.tokenizer.decode(self.tokenise_edit(w)) for w in words]  # cut as in training
        with self.averaged():
            after = edit_images(trained, before, words, seeds=list(range(len(words))))
            release(self.model)
        if self.team.is_main:
            pictures = torch.stack((before, after), 1).flatten(0, 1)
            page = figures.sheet(pictures, [x for w in words for x in ("", w)])
            figures.save_image(page, self.out / f"edits-{self.step:06d}.png")

    def averaged(self):
        """A context in which the model has the averaged weights, if there are any."""
        return Swapped(self.trained, self.average)

    def draw_curves(self) -> None:
        """OUT/curves.png from metrics.jsonl."""
        lines = read_metrics(self.out / "metrics.jsonl")
        val = [m for m in lines if "val" in m]
        panels = [
            (
                "training loss by step",
                {
                    k: [(m["step"], m[k]) for m in lines if m.get(k) is not None]
                    for k in ("ddpm_loss", "lm_loss")
                },
            )
        ]
        for key in (1, 4):
            panels.append(
                (
                    f"validation error at t = {TIMESTEPS[key]} by step",
                    {
                        f"{which} caption": [(m["step"], m["val"][which][key]) for m in val]
                        for which in ("right", "permuted")
                    },
                )
            )
        figures.save_image(figures.curves(panels), self.out / "curves.png")

    # ---- checkpoints ----

    def save(self) -> None:
        """OUT/step-STEP, whole or not at all; the older one goes when the new one stands."""
        tensors = {
            "model.safetensors": self.trained,
            "latents.safetensors": {"bound": self.codec.bound} if self.vae else self.codec.tensors(),
            "optimizer.safetensors": optimizer_tensors(self.trained, self.optimizers),
        }
        if self.average is not None:
            tensors["ema.safetensors"] = self.average
        info = {
            "step": self.step,
            "name": self.name,
            "base": str(Path(self.base).resolve()) if Path(self.base).is_dir() else self.base,
            "fingerprint": self.fingerprint,
            "vae": self.vae,
            "model": self.overrides,
            "diffusion": {"shift": self.config.schedule_shift, "prediction": self.config.prediction},
            "ema": self.average is not None,
            "trained": sorted(self.trained),
            "optimizer": sorted(tensors["optimizer.safetensors"]),
            "config": dataclasses.asdict(self.config),
        }
        write_folder(self.out / f"step-{self.step:06d}", tensors, info, "checkpoint.json", team=self.team)
        if not self.team.is_main:
            return
        for old in list_checkpoints(self.out)[:-1]:
            shutil.rmtree(old, ignore_errors=True)
        if self.name in LAST_RUNS:
            last = LAST_RUNS[self.name]
            last.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(last, str(self.out) + "\n")

    def fill_from(self, folder: Path, info: dict, weights: Path) -> None:
        """The trained tensors and the codec of a checkpoint, in place of this run's own."""
        tensors = read_tensors(weights, self.trained)
        with torch.no_grad():
            for name, p in self.trained.items():
                fill(p, tensors[name])
        ours, theirs = ((x or {}).get("fingerprint") for x in (self.vae, info.get("vae")))
        if ours != theirs:
            raise ValueError(
                f"the latents of --data {self.config.data} are not by the VAE that {folder} was trained with"
            )
        self.codec = load_codec(folder, info, self.codec.channels, self.config.vae, self.team.device)
        self.validation = self.make_validation()  # by that codec, whatever --data is now

    def start_from(self, folder: Path) -> None:
        """Begin a second stage: the image side of a checkpoint (its moving average, if it has one)."""
        info = read_json(folder / "checkpoint.json")
        if info.get("fingerprint") != self.fingerprint:
            raise ValueError(f"{self.base} is not the language model that {folder} was trained on")
        self.fill_from(folder, info, folder / ("ema.safetensors" if info.get("ema") else "model.safetensors"))
        if self.average is not None:
            self.average = {n: p.detach().clone() for n, p in self.trained.items()}

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint, exactly."""
        info = read_json(folder / "checkpoint.json")
        for name, kind in {"step": int, "optimizer": list}.items():
            if not isinstance(info.get(name), kind):
                raise ValueError(f"{folder / 'checkpoint.json'}: {name} is missing or no {kind.__name__}")
        if info.get("fingerprint") != self.fingerprint:
            raise ValueError(f"{self.base} is not the language model that {folder} was trained on")
        average = read_tensors(folder / "ema.safetensors", self.trained) if self.average is not None else {}
        self.fill_from(folder, info, folder / "model.safetensors")
        with torch.no_grad():
            for name, value in average.items():
                fill(self.average[name], value)
        restore_optimizers(folder / "optimizer.safetensors", info["optimizer"], self.trained, self.optimizers)
        self.step = info["step"]
        metrics = self.out / "metrics.jsonl"  # lines of steps that the kill took with it
        kept = [m for m in read_metrics(metrics) if m["step"] <= self.step]
        if self.team.is_main:
            write_atomic(metrics, "".join(json.dumps(m) + "\n" for m in kept))
        self.seconds = kept[-1]["seconds"] if kept else 0.0


class Swapped:
    """with Swapped(parameters, values): inside, the parameters hold the values."""

    def __init__(self, parameters: dict[str, nn.Parameter], values: dict[str, Tensor] | None):
        self.parameters, self.values = parameters, values or {}

    @torch.no_grad()
    def __enter__(self) -> None:
        self.kept = {name: self.parameters[name].clone() for name in self.values}
        for name, value in self.values.items():
            self.parameters[name].copy_(value)

    @torch.no_grad()
    def __exit__(self, *_) -> None:
        for name, value in self.kept.items():
            self.parameters[name].copy_(value)


def append(path: Path, text: str) -> None:
    """Write at the end of a file; OSError with its name if that cannot be done."""
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror}") from None


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def open_source(config: TrainConfig) -> Shapes | PictureSource | LatentSource:
    """What --data and --val-data name."""
    if not config.data:
        raise ValueError(
            "--data is missing: latents that `python data.py encode` made, or pictures (a folder, a "
            "metadata.jsonl, WebDataset tars)"
        )
    if config.data == "shapes":
        if config.val_data:
            raise ValueError(
                f"--val-data {config.val_data} goes with --data only; the built-in shapes hold out their own"
            )
        if config.image_size != Shapes.size:
            raise ValueError(
                f"the built-in shapes are {Shapes.size} pixels a side; --image-size is {config.image_size}"
            )
        return Shapes()
    folder = Path(config.data)
    if (folder / INDEX).is_file() or any(folder.glob("shard-*.safetensors")):
        val = LatentShards(config.val_data) if config.val_data else None
        return LatentSource(LatentShards(config.data), val)
    has_edits = "chat" in config.tasks and any(s.kind == "edit" for s in list_samples([config.data]))
    edits = load_edits(config.data, config.image_size) if "edit" in config.tasks or has_edits else None
    alone = set(config.tasks) == {"edit"}
    if alone and config.val_data:
        raise ValueError(
            f"--val-data {config.val_data} goes with captioned pictures; of edits alone, every 20th edit of "
            "--data is set aside"
        )
    val = load_pictures(config.val_data, config.image_size) if config.val_data else None
    return PictureSource(None if alone else load_pictures(config.data, config.image_size), val, edits)


def content(source: Shapes | PictureSource | LatentSource) -> bytes:
    """What tells one source from another: every process of a run must read the same."""
    if isinstance(source, LatentSource):
        return b"".join((s.folder / INDEX).read_bytes() for s in (source.train, source.val))
    if isinstance(source, Shapes):
        return b"shapes"
    digest = hashlib.sha256()
    for part in (source.train, source.val):
        digest.update(json.dumps(part.captions).encode())
        digest.update(part.pixels.numpy())
    if source.edits is not None:
        digest.update(json.dumps(source.edits.instructions).encode())
        digest.update(source.edits.sources.numpy())
        digest.update(source.edits.targets.numpy())
    return digest.digest()


def base_content(folder: Path) -> bytes:
    """What tells one base from another: its files, for of a cut model each process has a slice only."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in ("config.json", "tokenizer.json") or path.suffix == ".safetensors":
            digest.update(path.name.encode())
            with open(path, "rb") as f:
                while block := f.read(2**24):
                    digest.update(block)
    return digest.digest()


def open_codec(
    config: TrainConfig, source: Shapes | PictureSource | LatentSource, device: str
) -> tuple[dict | None, PatchPCA | AutoencoderKL]:
    """What makes latents of pictures and back: a VAE, and what a checkpoint says of it; or PatchPCA."""
    shards = source.train if isinstance(source, LatentSource) else None
    if shards is None and not config.vae:
        pictures, _ = source.sample(4000, random.Random(config.seed))
        return None, PatchPCA.fit(pictures, config.latent_channels, config.latent_patch, config.whiten)
    path = config.vae or shards.vae
    codec = load_vae(path, device=device)
    if shards is None:
        pictures, _ = source.sample(64, random.Random(config.seed))
        codec.bound = codec.encode(pictures).abs().amax((0, 2, 3))[:, None, None]
    else:
        if codec.fingerprint() != shards.vae_fingerprint:
            raise ValueError(
                f"--vae {path} is not the one that made the latents of {config.data}, {shards.vae}"
            )
        if config.image_size != shards.image_size:
            raise ValueError(
                f"{config.data} holds pictures of {shards.image_size} pixels; --image-size is "
                f"{config.image_size}"
            )
        codec.bound = shards.bound
    place = str(Path(path).resolve()) if Path(path).is_dir() else path
    return {"path": place, "fingerprint": codec.fingerprint()}, codec


def ensure_base(seed: int, steps: int = pretrain.STEPS) -> Path:
    """The tiny Qwen3, pretrained unless a former run has left it."""
    folder = Path("runs") / f"base-small-v{pretrain.RECIPE}-{seed}"
    if steps != pretrain.STEPS:
        folder = folder.with_name(f"{folder.name}-{steps}")
    if not folder.is_dir():
        print(f"pretraining a tiny Qwen3 on built-in text, once, into {folder}", flush=True)
        pretrain.pretrain_base(folder, seed, steps)
    return folder


def saved_config(path: Path) -> dict:
    """The fields of TrainConfig in a checkpoint.json; ValueError names one that does not fit."""
    saved, default = read_json(path).get("config"), dataclasses.asdict(TrainConfig())
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: config is missing or not a JSON object")
    for name in sorted(set(saved) ^ set(default)):
        raise ValueError(f"{path}: field {name} of config is missing or unknown")
    for name, value in default.items():
        kind = {tuple: list, float: (int, float)}.get(type(value), type(value))
        if not isinstance(saved[name], kind):
            raise ValueError(f"{path}: field {name} of config is {saved[name]!r}")
    return saved | {"unet_channels": tuple(saved["unet_channels"])}


def parse(args: list[str] | None = None) -> tuple[TrainConfig, str, bool, bool]:
    """The configuration, its name, whether to resume, and whether only to print what it would take."""
    parser = cli.Parser(
        prog="train.py",
        description="Train the image side of an LMFusion. Flags that are not given "
        "keep the value of the named configuration; the paper's recipe stands in brackets.",
    )
    parser.add_argument(
        "--config", choices=tuple(CONFIGS), required=True, help="named configuration to start from"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of --out")
    parser.add_argument(
        "--dry-run", action="store_true", help="print memory and FLOPs, without making the model, and stop"
    )
    cli.add_fields(parser, TrainConfig)
    given = {k: v for k, v in vars(parser.parse_args(args)).items() if v is not None}
    name, resume, dry = given.pop("config"), given.pop("resume"), given.pop("dry_run")
    config = CONFIGS[name]
    if resume:
        out = Path(given.get("out", config.out))
        found = list_checkpoints(out)
        if not found:
            raise ValueError(f"--resume: {out} holds no checkpoint; leave --resume out to start there")
        saved = saved_config(found[-1] / "checkpoint.json")
        for field in sorted(set(given) - FREE_ON_RESUME):
            if given[field] != saved[field]:
                raise ValueError(
                    f"--resume: {field} was {saved[field]} in this run and cannot become {given[field]}"
                )
        config = TrainConfig(**saved | {"out": str(out)})  # where it lies now
    elif given.get("init_from", config.init_from):
        config = inherit(dataclasses.replace(config, **given), given)
        given = {}
    return dataclasses.replace(config, **given), name, resume, dry


def inherit(config: TrainConfig, given: dict) -> TrainConfig:
    """The configuration of a second stage: what the model is comes from the checkpoint of --init-from."""
    try:
        folder = find_checkpoint(config.init_from)
    except ValueError as error:
        raise ValueError(f"--init-from {error}; train a first stage there, or name another") from None
    info, saved = read_json(folder / "checkpoint.json"), saved_config(folder / "checkpoint.json")
    for field in INHERITED:
        if field in given and given[field] != saved[field]:
            raise ValueError(
                f"--init-from {config.init_from}: {field} was {saved[field]} there and cannot become "
                f"{given[field]}"
            )
    changes = {field: saved[field] for field in INHERITED}
    if "base" not in given:
        changes["base"] = info.get("base", "")
    if "vae" not in given:  # another path is fine: the fingerprint tells
        changes["vae"] = (info.get("vae") or {}).get("path", "")
    return dataclasses.replace(config, **changes)


def check_tasks(tasks: dict[str, float], source, tokenizer: Tokenizer, where: str) -> None:
    """ValueError for tasks that the data or the tokenizer do not give."""
    if isinstance(source, LatentSource):
        raise ValueError(f"--task {','.join(tasks)}: {where} holds captioned latents; this takes pictures")
    if "edit" in tasks:
        source.edited(random.Random(0))
    if "chat" in tasks:
        for token in (IM_START, IM_END):
            if tokenizer.token_to_id(token) is None:
                raise ValueError(
                    f"--task chat: the base has no chat tokens: {token} is not in its vocabulary"
                )


def train(run: Run, watch: Callable[[Run], dict] | None = None) -> None:
    """The loop. What `watch` says of the model at each validation goes into metrics.jsonl as "watched"."""
    config, start, first = run.config, time.perf_counter(), run.step
    window: list[dict[str, float]] = []
    window_start, waited = start, 0.0  # images per second count training alone, without sheets and validation
    is_main = run.team.is_main
    bar = tqdm(
        total=config.steps,
        initial=run.step,
        unit="step",
        desc="training",
        disable=None if is_main else True,  # None: only on a terminal
    )
    while run.step < config.steps:
        window.append(run.train_step())
        bar.update()
        pause = time.perf_counter()
        last = run.step == config.steps
        line = {}
        if last or run.step % config.val_every == 0:
            line["val"] = run.validate()
            if watch is not None:
                line["watched"] = watch(run)
        if config.sheet_every and (last or run.step % config.sheet_every == 0):
            run.draw_sheet()
        waited += time.perf_counter() - pause
        if last or line or run.step % config.log_every == 0:
            now = time.perf_counter()
            mean = {
                k: sum(w[k] for w in window if k in w) / n if (n := sum(k in w for w in window)) else None
                for k in ("loss", "lm_loss", "ddpm_loss", "draw_loss")
            }
            rate = len(window) * config.batch_size / max(1e-9, now - window_start - waited)
            line = {
                "step": run.step,
                **mean,
                "lr": config.lr * lr_factor(run.step - 1, config),
                "images_per_second": round(rate, 1),
                "seconds": round(run.seconds + now - start, 2),
                **line,
            }
            if is_main:
                append(run.out / "metrics.jsonl", json.dumps(line) + "\n")
            if is_main and "val" in line:
                middle = len(TIMESTEPS) // 2
                right, permuted = line["val"]["right"][middle], line["val"]["permuted"][middle]
                bar.write(
                    f"step {run.step}: ddpm {mean['ddpm_loss'] or math.nan:.4f}, "
                    f"lm {mean['lm_loss'] or math.nan:.4f}; "
                    f"validation at t = {TIMESTEPS[middle]}: {right:.4f} under the right caption, "
                    f"{permuted:.4f} under another; {rate:.0f} pictures/s"
                )
            bar.set_postfix(
                ddpm=f"{mean['ddpm_loss'] or math.nan:.4f}",
                lm=f"{mean['lm_loss'] or math.nan:.3f}",
                ips=f"{rate:.0f}",
            )
            window, window_start, waited = [], now, 0.0
        if last or run.step % config.checkpoint_every == 0:
            pause = time.perf_counter()
            run.save()
            if is_main:
                run.draw_curves()
            waited += time.perf_counter() - pause
    bar.close()
    seconds = time.perf_counter() - start
    if not is_main:
        return
    print(
        f"{run.step - first} steps, {(run.step - first) * config.batch_size} pictures in {seconds:.0f} s; "
        f"checkpoint and sheets in {run.out}"
    )


def dry_run(config: TrainConfig) -> None:
    """Print what a run would take of memory and arithmetic; no model is made, and no stock one fetched."""
    from scale import budget  # which imports this file

    if config.base:
        model = known_config(config.base)
    else:
        model = pretrain.tiny_config(pretrain.train_tokenizer(random.Random(config.seed)))
    channels, factor = (4, 8) if config.vae else (config.latent_channels, config.latent_patch)
    if config.vae and Path(config.vae).is_dir():
        vae = read_vae_config(resolve_vae(config.vae) / "config.json")
        channels, factor = vae.latent_channels, 2 ** (len(vae.block_out_channels) - 1)
    model = replace(model, **config.model_overrides(channels, factor))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not set(config.tasks) <= {"caption", "generate"}:
        print(f"of captioned pictures; --task {config.task} has more text, and clean pictures as well\n")
    if config.text_batch:
        print(f"without the {config.text_batch} documents of text beside the pictures\n")
    print(budget.budget_table(budget.report(model, config, size)))


def main() -> None:
    config, name, resume, dry = parse()
    if dry:
        return dry_run(config)
    out = Path(config.out)
    found = list_checkpoints(out)
    if found and not resume:
        raise ValueError(
            f"{out} already holds a run ({found[-1].name}); --resume continues it, another --out starts "
            "elsewhere, and deleting the folder starts over"
        )
    check_device(own_device(config.device))
    cli.tune_torch()
    # SIGTERM comes from a scheduler that ends a job, and from torchrun when another process has died
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    team = init_processes(config.device, config.dtype)
    try:
        work(config, name, found[-1] if resume else None, team)
    except RuntimeError as error:
        if team.size == 1 or not re.search("(?i)peer|gloo|nccl|socket|connection|timed out", str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, of which the line below says more
        last = list_checkpoints(out)
        raise ValueError(
            "another process of this run has ended, and none can go on alone; "
            + (f"{last[-1]} is whole: --resume goes on from it" if last else "no checkpoint was written yet")
        ) from None
    finally:
        end_processes(team)


def work(config: TrainConfig, name: str, checkpoint: Path | None, team: Team) -> None:
    """A run from its start or from a checkpoint to its end."""
    out = Path(config.out)
    team.agree("their configuration", json.dumps(dataclasses.asdict(config)).encode())
    former = read_json(checkpoint / "checkpoint.json").get("base") if checkpoint else None
    run = Run(config, name, team, former)
    if checkpoint:
        run.resume(checkpoint)
        if run.step >= config.steps:
            if team.is_main:
                print(f"{checkpoint} is at step {run.step} already; nothing is left of {config.steps} steps")
            return
    elif config.init_from:
        run.start_from(find_checkpoint(config.init_from))
    out.mkdir(parents=True, exist_ok=True)
    if not checkpoint and team.is_main:
        write_atomic(out / "metrics.jsonl", "")
    try:
        train(run)
    except KeyboardInterrupt:
        last = list_checkpoints(out)
        raise KeyboardInterrupt(
            f"at step {run.step}; "
            + (f"--resume goes on from {last[-1].name}" if last else "no checkpoint had been written yet")
        ) from None


if __name__ == "__main__":
    cli.run(main)
