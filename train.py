"""Train the image side of an LMFusion (Sections 2.3 and 4.1 of the paper).

    python train.py --config small                                   # built-in tiny Qwen3, built-in pictures
    python train.py --config small --data "photos/train-*.tar" --val-data photos/val.tar --out runs/photos
    torchrun --nproc-per-node 8 train.py --config qwen3-8b --data latents/train        # scale/README.md
    python train.py --config qwen3-8b --dry-run                                        # memory and FLOPs

Every field of `TrainConfig` (config.py) is a flag of the same name. A run's folder holds metrics.jsonl,
sheets of fixed prompts, curves.png, and the last checkpoints (checkpoint.py). All randomness of a step comes
from the seed and the number of the step, so that a resumed run goes on exactly as if it had never stopped.
"""

import dataclasses
import fnmatch
import json
import math
import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from checkpoint import (
    check_device,
    find_checkpoint,
    first_stage,
    list_checkpoints,
    locked,
    resume,
    save_run,
    saved_config,
    start_from,
    write_atomic,
)
from config import (
    CONFIGS,
    Parser,
    TrainConfig,
    add_fields,
    inherited_config,
    lr_factor,
    parse_stages,
    resumed_config,
    run_command,
    tune_torch,
)
from data import Ahead, Batch, Documents, make_batches
from lab.watch import Progress, Stopwatch, asking_to_stop, draw_curves, draw_sheets, model_card, validate
from load_qwen3 import base_fingerprint, load_qwen3, load_tokenizer, read_json, resolve, tokenizer_identity
from model import LMFusion
from scale.muon import Muon
from scale.parallel import Team, end_processes, full_tensor, init_processes, own_device, peer_lost, shard
from scale.sources import find_base, init_from_scratch, open_source, open_text

# ---- The loss ----

PARTS = ("ddpm_loss", "lm_loss", "draw_loss")
LOGITS = 2**26  # at once, at the most: 256 MiB in float32


def losses(model: LMFusion, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """The parts of L = L_LM + lambda L_DDPM, Eq. (4): "lm_loss", "ddpm_loss", and "draw_loss".

    One t a picture goes to the noising and to the U-Net. "draw_loss" belongs to the BOI row alone: it is a
    logistic loss on detached features and shares no parameter with the others. A part that has nothing to be
    a mean of is missing or 0.
    """
    diffusion = config.diffusion
    t = (batch.u * batch.max_t.to(batch.u.device, non_blocking=True)).long()  # uniform below the limit
    x_t, t, which = batch.noised(diffusion, t)  # Eq. (2)
    before, hidden = model(batch.prefix, batch.rest, x_t, t, batch.layouts)
    output, eps = model.unet_output(hidden, which), batch.eps
    if which is not None:  # the clean pictures have no loss
        x_t, t, eps = x_t[which], t[which], eps[which]
    eps_pred = diffusion.eps_from_output(output, x_t, t)
    out = {"ddpm_loss": diffusion.loss(eps_pred, eps, t, config.loss_weighting)}  # Eq. (3)
    if not (batch.max_t > 0).any():
        out["ddpm_loss"] = 0.0 * out["ddpm_loss"]

    # Eq. (1): text behind an image. If the text is frozen, none before it carries a gradient: no logits.
    texts = [(hidden, batch.behind), (before, batch.before)]
    texts = [(part.text, targets) for part, targets in texts if part is not None and part.text is not None]
    learned = [(h[x.word_at], x.word) for h, x in texts if x is batch.behind or not model.text_is_frozen]
    drawing = [(h[x.draw_at], x.draw) for h, x in texts]
    # A mean over nothing is 0, with a gradient of 0: all processes must have one of the same parameters.
    if learned:
        features, words = map(torch.cat, zip(*learned, strict=True))
        n = len(batch.before.word) + len(batch.behind.word) if config.lm_mean == "all" else len(words)
        out["lm_loss"] = word_loss(model, features, words) / max(1, n)
    if drawing:
        features, draw = map(torch.cat, zip(*drawing, strict=True))
        logit, n = model.draw_logit(features).float(), max(1, len(draw))
        out["draw_loss"] = F.binary_cross_entropy_with_logits(logit, draw, reduction="sum") / n
    return out


def word_loss(model: LMFusion, features: Tensor, words: Tensor) -> Tensor:
    """The sum of -log P(word), of features (T, D) and words (T,).

    Logits (T, V) would be the largest tensor of a step. Where there are many, they are made for some words at
    a time, and once more in the backward pass.
    """

    def of_some(features: Tensor, words: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(features).float(), words, reduction="sum")

    n = max(1, LOGITS // model.config.vocab_size)
    if len(words) <= n:
        return of_some(features, words)
    parts = zip(features.split(n), words.split(n), strict=True)
    return sum(recomputed(of_some, *part, use_reentrant=False, preserve_rng_state=False) for part in parts)


def total_loss(parts: dict[str, Tensor | float], config: TrainConfig) -> Tensor | float:
    """Eq. (4), and the BOI row's own loss beside it."""
    loss = parts.get("lm_loss", 0.0) + config.lambda_ddpm * parts["ddpm_loss"]
    return loss + parts.get("draw_loss", 0.0)


def step_loss(model: LMFusion, batch: Batch, config: TrainConfig) -> Tensor:
    """What a step differentiates, of one batch alone."""
    return total_loss(losses(model, batch, config), config)


def count_targets(model: LMFusion, batch: Batch, config: TrainConfig) -> dict[str, int]:
    """How many things each part is a mean over: pictures, words to predict, decisions to draw."""
    behind_alone = model.text_is_frozen and config.lm_mean == "learned"
    words = len(batch.behind.word) + (0 if behind_alone else len(batch.before.word))
    draws = len(batch.behind.draw) + len(batch.before.draw)
    return {"ddpm_loss": int((batch.max_t > 0).sum()), "lm_loss": words, "draw_loss": draws}


# ---- Optimisation ----


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
    groups = [dict(params=ps, peak=config.lr * r, weight_decay=decay) for (r, decay), ps in adamw.items()]
    optimizers = [torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=0.0, weight_decay=config.weight_decay))
    return optimizers


# ---- A run ----


class Run:
    """Everything that one run of training holds.

    model, codec, documents (its data), optimizers; trained, the parameters that learn, and ema, their moving
    average or None; base, fingerprint, tokenizer_identity, vae, overrides and sources (fingerprints of the
    data), by which a checkpoint is recognised; step, seconds; clock, of the parts of a step.
    """

    def __init__(self, config: TrainConfig, name: str, team: Team | None = None, former: str | None = None):
        """former: where the tiny base lay when the run that is resumed began."""
        self.config, self.name, self.out = config, name, Path(config.out)
        self.team = team or Team(device=config.device)
        for flag, size in (("batch-size", config.batch_size), ("text-batch", config.text_batch)):
            if size % self.team.size:
                raise ValueError(f"--{flag} {size} is not a multiple of {self.team.size} processes")
        source = open_source(config)
        self.sources = {"--data": source.fingerprint()}
        self.vae, self.codec = source.make_codec(config, self.team.device)
        self.base = find_base(config, self.team, former)
        folder = resolve(self.base)
        self.fingerprint = self.team.main_first(lambda: base_fingerprint(folder))
        self.tokenizer_identity = tokenizer_identity(folder)
        self.team.agree("the base language model", self.fingerprint.encode())
        self.overrides = config.model_overrides(self.codec.channels, self.codec.patch)
        torch.manual_seed(config.seed)  # of the U-Net, whether or not a base was just pretrained
        cut = partial(shard, team=self.team, dtype=getattr(torch, config.dtype))
        self.model = load_qwen3(self.base, device=self.team.device, prepare=cut, **self.overrides)
        self.model.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            self.model.compile_experts()
        if config.from_scratch:
            init_from_scratch(self.model)
        self.model.freeze_text(config.lr_text_ratio == 0, norm=not config.from_scratch)
        source.check(config, self.model.config, self.base)
        tokenizer = load_tokenizer(self.base)
        text = open_text(config, tokenizer, self.model.config) if config.text_batch else None
        self.documents = Documents(config, self.model.config, tokenizer, source, text)
        if self.team.is_main:
            self.documents.tell_cuts()
        if text is not None:
            self.sources["--text-data"] = text.fingerprint()
        for flag, content in self.sources.items():
            self.team.agree(f"what {flag} holds", content)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.ema = {n: p.detach().clone() for n, p in self.trained.items()} if config.ema else None
        self.optimizers = make_optimizers(self.model, config)
        self.stages = [(step, self.matching(patterns)) for step, patterns in parse_stages(config.stages)]
        self.step, self.seconds, self.clock = 0, 0.0, Stopwatch(self.team.device)
        # what this process asks of all, and what any asked in the last step: see train_step
        self.asked, self.agreed = {"stop": False, "save": False}, set()
        # Beside the step on a GPU alone: a CPU that prepares is one that does not compute.
        self.ahead = Ahead(self.batches) if torch.device(self.team.device).type == "cuda" else None

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

    def batches(self, step: int | None = None) -> list[Batch]:
        """This process's share of a step (the next), in micro batches: pictures first, then text alone."""
        config, documents = self.config, self.documents
        how = documents.source, self.codec, self.model.config, config.micro_batch, config.pack
        parts = documents.share_of_step(self.step if step is None else step, self.team)
        batches = [batch for part in parts for batch in make_batches(part, *how)]
        for batch in batches:
            batch.layouts = self.model.layouts(batch.prefix, batch.rest)
        return [batch.to(self.team.device) for batch in batches]

    def train_step(self) -> dict[str, float]:
        """One step; returns the losses of the whole batch."""
        config, team, lap = self.config, self.team, self.clock.lap
        lap("")
        batches = self.ahead.take(self.step) if self.ahead else self.batches()
        lap("data")
        counts = [[*count_targets(self.model, batch, config).values()] for batch in batches]
        counts = torch.tensor(counts, dtype=torch.float64)  # (micro batches, PARTS)
        (totals,) = team.sum(counts.sum(0))
        shares = (counts.to(totals.device, non_blocking=True) / totals.clamp(min=1)).float()
        kind = torch.float32 if torch.device(team.device).type == "mps" else torch.float64
        means = torch.zeros(len(PARTS), dtype=kind, device=team.device)
        for batch, share in zip(batches, shares, strict=True):
            found = losses(self.model, batch, config)
            # a mean over this micro batch -> its share of the mean over all
            parts = {k: found[k] * s for k, s in zip(PARTS, share, strict=True) if k in found}
            lap("forward")
            (total_loss(parts, config) * team.size).backward()  # gradients of the processes are averaged
            for k, x in parts.items():
                means[PARTS.index(k)] += x.detach()
            lap("backward")
        for p in self.resting():  # no gradient: in no norm, no step, no decay
            p.grad = None
        norm = full_tensor(nn.utils.clip_grad_norm_(self.trained.values(), config.clip))
        means, asked = team.sum(means, torch.tensor([*self.asked.values()], dtype=torch.float64))
        # Here alone the device is waited for, and nothing has changed yet.
        found, totals = (dict(zip(PARTS, x.tolist(), strict=True)) for x in (means, totals))
        self.agreed = {name for name, n in zip(self.asked, asked.tolist(), strict=True) if n}
        norm, result = norm.item(), {k: x for k, x in found.items() if totals[k]}
        result["loss"] = found["lm_loss"] + config.lambda_ddpm * found["ddpm_loss"]  # Eq. (4)
        for what, value in (("loss", result["loss"]), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                hint = "the last checkpoint is untouched. A smaller --lr or --muon-lr usually helps"
                raise ValueError(f"the {what} is {value} at step {self.step + 1}; {hint}")
        factor = lr_factor(self.step, config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            decay = min(config.ema, self.step / (self.step + 10))  # forgets the random start
            now = [p.detach() for p in self.trained.values()]
            torch._foreach_lerp_(list(self.ema.values()), now, 1 - decay)
        lap("optimizer")
        return result


# ---- The loop ----


def train(run: Run, watch: Callable[[Run], dict] | None = None) -> None:
    """Train to the end. At each validation, what `watch` says goes into metrics.jsonl as "watched".

    Ctrl-C or SIGTERM, to any process: after the step a checkpoint, and then KeyboardInterrupt, in all.
    """
    config, progress = run.config, Progress(run, step_loss)
    with asking_to_stop(run):
        while run.step < config.steps:
            run.asked["save"] = progress.checkpoint_is_due()
            result, line = run.train_step(), {}
            last = run.step == config.steps
            stopped = "stop" in run.agreed and not last
            if not stopped:  # else there may be little time
                with progress.paused():
                    if last or run.step % config.val_every == 0:
                        line["val"] = validate(run)
                        if watch is not None:
                            line["watched"] = watch(run)
                    if config.sheet_every and (last or run.step % config.sheet_every == 0):
                        draw_sheets(run)
            progress.add(result, line, lr=config.lr * lr_factor(run.step - 1, config), last=last or stopped)
            if last or run.agreed or run.step % config.checkpoint_every == 0:
                with progress.paused():
                    save_run(run, model_card(run) if last and run.team.is_main else None)
                    draw_curves(run)
            if stopped:
                raise KeyboardInterrupt
    progress.close()


# ---- Command line ----


def parse(args: list[str] | None = None) -> tuple[TrainConfig, str, bool, bool]:
    """The configuration, its name, whether to resume, and whether only to print what it would take."""
    parser = Parser(
        prog="train.py",
        usage="python train.py --config NAME [FLAG ...]",
        description="Flags that are not given keep the value of the named configuration; the paper's recipe "
        "stands in brackets.",
    )
    add = parser.add_argument
    add("--config", choices=tuple(CONFIGS), required=True, help="named configuration to start from")
    add("--resume", action="store_true", help="go on from the last checkpoint of --out")
    add("--dry-run", action="store_true", help="print memory and FLOPs, without making the model, and stop")
    add_fields(parser, TrainConfig)
    given = {k: v for k, v in vars(parser.parse_args(args)).items() if v is not None}
    name, resuming, dry = (given.pop(k) for k in ("config", "resume", "dry_run"))
    config = CONFIGS[name]
    if resuming:
        out = given.setdefault("out", config.out)
        found = list_checkpoints(Path(out))
        if not found:
            raise ValueError(f"--resume: {out} holds no checkpoint; leave --resume out to start there")
        return resumed_config(saved_config(found[-1]), given), name, resuming, dry
    if first := given.get("init_from", config.init_from):
        config = dataclasses.replace(config, init_from=first)
        return inherited_config(config, *first_stage(first), given), name, resuming, dry
    return dataclasses.replace(config, **given), name, resuming, dry


def work(config: TrainConfig, name: str, checkpoint: Path | None, team: Team) -> None:
    """A run from its start or from a checkpoint to its end."""
    team.agree("their configuration", json.dumps(dataclasses.asdict(config)).encode())
    former = read_json(checkpoint / "checkpoint.json").get("base") if checkpoint else None
    run = Run(config, name, team, former)
    if checkpoint:
        resume(run, checkpoint)
        if run.step >= config.steps:
            if team.is_main:
                print(f"{checkpoint} is at step {run.step} already; nothing is left of {config.steps} steps")
            return
    elif config.init_from:
        start_from(run, find_checkpoint(config.init_from))
    run.out.mkdir(parents=True, exist_ok=True)
    if not checkpoint and team.is_main:
        write_atomic(run.out / "metrics.jsonl", "")
    try:
        train(run)
    except KeyboardInterrupt:
        last = list_checkpoints(run.out)
        where = f"--resume goes on from {last[-1].name}" if last else "no checkpoint had been written yet"
        raise KeyboardInterrupt(f"at step {run.step}; {where}") from None


def main() -> None:
    config, name, resuming, dry = parse()
    if dry:
        from scale.budget import TrainingStep, dry_run  # only here: it takes torch's fake tensors

        return dry_run(config, TrainingStep(step_loss, make_optimizers))
    out = Path(config.out)
    check_device(own_device(config.device))
    tune_torch()
    # SIGTERM comes from a scheduler that ends a job, and from torchrun when another process has died
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    team = init_processes(config.device, config.dtype)
    try:
        with locked(out) if team.is_main else nullcontext():
            found = list_checkpoints(out)
            if found and not resuming:
                hint = "--resume continues it, another --out starts elsewhere, deleting it starts over"
                raise ValueError(f"{out} already holds a run ({found[-1].name}); {hint}")
            work(config, name, found[-1] if resuming else None, team)
    except RuntimeError as error:
        if team.size == 1 or not peer_lost(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, of which the line below says more
        last = list_checkpoints(out)
        where = f"{last[-1]} is whole: --resume goes on from it" if last else "no checkpoint was written yet"
        raise ValueError(f"another process of this run has ended; none can go on alone; {where}") from None
    finally:
        end_processes(team)


if __name__ == "__main__":
    run_command(main)
