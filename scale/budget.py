"""What a run needs, before it is started: memory of one process, and floating-point operations.

    report = budget.report(model_config, train_config, step, world_size)
    print(budget.budget_table(report))

The functions that train and sample run on a model of fake tensors, which have shapes and no memory. Every
tensor made is entered in the books with its size and taken out when it dies; products and convolutions are
counted. What is kept in which dtype, and what FSDP divides and gathers, follows from formulas.

The books say what a perfect allocator needs; the predicted peak adds gradients and activations, for the holes
of a heap (measured on CPUs). What a kernel needs inside is in neither, nor validation, VAE and pictures.
"""

import math
import os
import random
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from attention import IMAGE, Layout, Tokens
from config import TrainConfig
from data import CAPTION_DROPPED, CAPTION_FIRST, IMAGE_FIRST, Batch, caption_document, collate
from load_qwen3 import known_config
from model import LMFusion, ModelConfig, replace, rope_angles
from scale.vae import read_vae_config, resolve_vae
from small.pretrain import tiny_config, train_tokenizer

DDIM_STEPS = 25  # for a picture
PROMPT = 512  # tokens, for the figures of text alone
PROCESS = 120 * 2**20  # bytes that Python and torch's libraries take after the import, on a CPU; measured
ORDERS = (CAPTION_FIRST, CAPTION_DROPPED, IMAGE_FIRST)
KEPT = 4  # bytes a number of weights, gradients and optimizer: in float32, whatever layers compute in
aten = torch.ops.aten


def attention_flops(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
    """q (B, H, N, d), k and v (B, K, S, d): two products."""
    return 2 * q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3])


def attention_backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_, **__) -> int:
    """Five products: the scores once more, and the gradients of both sides of both products."""
    return 2 * q.shape[:3].numel() * k.shape[2] * (3 * q.shape[3] + 2 * v.shape[3])


@dataclass(frozen=True)
class TrainingStep:
    """What train.py does in a step. It hands this in, for it imports this file."""

    loss: Callable[[LMFusion, Batch, TrainConfig], Tensor]
    optimizers: Callable[[LMFusion, TrainConfig], list[torch.optim.Optimizer]]


# Torch's kernels of attention, for the `custom_mapping` of its FlopCounterMode: of the one for CPUs it knows
# nothing, and of the others not that heads can share keys.
attention_flops._get_raw = attention_backward_flops._get_raw = True  # it is to hand over tensors, not shapes
ATTENTION = {}
for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention"):
    ATTENTION[getattr(aten, f"_scaled_dot_product_{kernel}")] = attention_flops
    ATTENTION[getattr(aten, f"_scaled_dot_product_{kernel}_backward")] = attention_backward_flops
FLOPS = {**flop_registry, **ATTENTION}


class Books(TorchDispatchMode):
    """Inside, whatever touches a fake tensor is faked, and the bytes of all tensors made are added up.

    What touches none is small and is computed: ids, masks, timesteps. Shapes depend on their values.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.size: dict[int, float] = {}  # of each living storage, by its id
        self.watch: dict[int, weakref.ref] = {}
        self.live = self.peak = 0.0
        self.flops = 0

    def __torch_dispatch__(
        self, func: Callable, types: Sequence, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            if func in (aten.index.Tensor, aten.index_put.default, aten._index_put_impl_.default):
                args = (args[0], sum(map(positions, args[1]), []), *args[2:])
            with self.fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if func._overloadpacket in FLOPS:
            self.flops += FLOPS[func._overloadpacket](*args, **kwargs, out_val=out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in self.size:
                self.enter(x, x.untyped_storage().nbytes())
        return out

    def enter(self, x: Tensor, size: float) -> None:
        """The storage of x counts as `size` bytes from now on."""
        storage = x.untyped_storage()
        key = id(storage)
        if key not in self.size:
            self.watch[key] = weakref.ref(storage, lambda _: self.remove(key))
        self.live += size - self.size.get(key, 0.0)
        self.size[key] = size
        self.peak = max(self.peak, self.live)

    def remove(self, key: int) -> None:
        self.live -= self.size.pop(key)
        del self.watch[key]

    def model(self, config: ModelConfig, train: TrainConfig, dtype: str = "") -> LMFusion:
        """The model of a run without memory, in the dtype it computes in; its parameters count as nothing."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype or train.dtype))
        try:
            with self.fake:
                model = LMFusion(config)
        finally:
            torch.set_default_dtype(before)
        for p in model.parameters():
            self.enter(p, 0.0)
        model.freeze_text(train.lr_text_ratio == 0)
        model.activation_checkpointing = train.activation_checkpointing
        if train.device.startswith("cuda"):
            model.layout = lambda tokens, past=None: GpuLayout(self, model, tokens, past)
        return model

    def latents(self, n: int, config: ModelConfig) -> Tensor:
        with self.fake:
            return torch.empty(n, config.latent_channels, config.latent_size, config.latent_size)


class BlockAttention(torch.autograd.Function):
    """Attention under a block mask, without a number in it: what it makes, keeps and computes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pairs: int, books: Books) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.flops, ctx.books = 2 * pairs * q.shape[1] * q.shape[3], books  # of one of its products
        books.flops += 2 * ctx.flops
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ctx.books.flops += 5 * ctx.flops
        return *map(torch.empty_like, ctx.saved_tensors[:3]), None, None


class GpuLayout(Layout):
    """As a GPU has it: attention in long rows is one kernel a layer, and not a call for each segment."""

    def __init__(self, books: Books, model: LMFusion, tokens: Tokens, past: Tokens | None):
        super().__init__(tokens, past, torch.device("cpu"), partial(rope_angles, config=model.config))
        self.books, self.pairs = books, 0  # of a query and a key that it may see
        for queries, keys, segments in self.segments or ():
            for n, segment in zip(queries, segments, strict=True):
                self.pairs += n * sum(keys[j] for j in segment.keys)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.segments is None:
            return super().attend(q, k, v)
        return BlockAttention.apply(q, k, v, self.pairs, self.books)


def positions(index: Tensor | None) -> list[Tensor | None]:
    """A boolean index as positions of what is True: how many there are is the shape of the result."""
    return [index] if index is None or index.dtype != torch.bool else list(index.nonzero().unbind(1))


def ordinary_id(config: ModelConfig) -> int:
    """A token without a meaning of its own."""
    return next(i for i in range(4) if i not in (config.boi_id, config.eoi_id, config.eos_id))


def numel(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def count_parameters(model: LMFusion) -> dict[str, int]:
    """Numbers of parameters; what both modalities share counts as text."""
    image = model.image_parameters()
    unet = numel(p for n, p in image.items() if n.startswith("unet_"))
    return {
        "text": numel(model.text_parameters().values()),
        "image_experts": numel(image.values()) - unet,  # with their final norm and the row for BOI
        "unet": unet,
        "total": numel(model.parameters()),
        "trained": numel(p for p in model.parameters() if p.requires_grad),
    }


def fake_batch(books: Books, config: ModelConfig, train: TrainConfig, counts: tuple, tokens: int) -> Batch:
    """Pictures with captions of so many tokens. counts: of each of ORDERS."""
    orders = [order for order, k in zip(ORDERS, counts, strict=True) for _ in range(k)]
    caption = [ordinary_id(config)] * tokens
    documents = [caption_document(None, caption, order, config) for order in orders]
    return collate(documents, books.latents(len(orders), config), config, train.pack)


def order_shares(train: TrainConfig) -> tuple[float, float, float]:
    """How often a run draws each of ORDERS; all other tasks count as captioned pictures."""
    generate, caption = (train.tasks.get(name, 0.0) for name in ("generate", "caption"))
    first = generate / (generate + caption) if generate + caption else train.caption_first
    drop = train.caption_drop
    return first * (1 - drop), first * drop, 1 - first


def training_flops(config: ModelConfig, train: TrainConfig, step: TrainingStep, tokens: int) -> dict:
    """FLOPs of a picture, on average over the recipe's orders, and of a whole step of all processes.

    "prefill" is what `LMFusion.forward` does first, without a graph if the text is frozen; what activation
    checkpointing computes again is part of "backward".
    """
    flops = dict.fromkeys(("prefill", "forward", "backward"), 0.0)
    for counts, share in zip(((1, 0, 0), (0, 1, 0), (0, 0, 1)), order_shares(train), strict=True):
        if share == 0:
            continue
        books = Books()
        model = books.model(config, train)
        batch = fake_batch(books, config, train, counts, tokens)
        with books:
            if batch.prefix.ids.shape[1]:
                model.encode(batch.prefix)
            prefill, books.flops = books.flops, 0
            loss = step.loss(model, batch, train)
            forward, books.flops = books.flops - prefill, 0
            loss.backward()
        for name, n in zip(flops, (prefill, forward, books.flops), strict=True):
            flops[name] += share * n
    flops["picture"] = sum(flops.values())
    flops["step"] = flops["picture"] * train.batch_size
    return flops


def micro_batch(train: TrainConfig, world_size: int) -> int:
    """Pictures that one process computes at once."""
    share = train.batch_size // world_size
    return min(train.micro_batch or share, share)


def optimizer_bytes(config: ModelConfig, train: TrainConfig, step: TrainingStep) -> tuple[float, float]:
    """The optimizers' state, and the most that a later step takes beside it."""
    books = Books()
    model = books.model(config, train, "float32")
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p)  # made outside of the books: not counted
    optimizers = step.optimizers(model, train)
    for _ in range(2):  # the first step makes the state
        state = books.peak = books.live
        with books:
            for optimizer in optimizers:
                optimizer.step()
    return state, books.peak - state


def gathered_bytes(model: LMFusion, world_size: int) -> float:
    """What `parallel.shard` adds to the slices, in the dtype of the computation.

    Whole: all that is neither a layer nor a U-Net half; the unit at work and the next one (with one process
    all of them); the gradient of one, also a second time, in float32, on its way to the slices. A process
    alone in float32 needs none.
    """
    item = model.boi_head.itemsize
    if world_size == 1 and item == KEPT:
        return 0.0
    units = [list(m.parameters()) for m in (*model.layers, model.unet_down, model.unet_up)]
    rest = numel(model.parameters()) - sum(map(numel, units))
    gradient = max(numel(p for p in unit if p.requires_grad) for unit in units)
    whole = 2 * max(map(numel, units)) if world_size > 1 else sum(map(numel, units))
    return item * (rest + whole) + (item + KEPT) * gradient


def training_bytes(
    config: ModelConfig, train: TrainConfig, step: TrainingStep, world_size: int, tokens: int
) -> dict[str, float]:
    """Bytes of one of `world_size` processes, in a step that finds the optimizer's state there.

    "activations" is what lives between forward and backward; "computing" the most that activations, the
    gradients so far and whatever backward needs on the way take together; "optimizer_step" what an optimizer
    needs on the way. "least_peak" is what the tensors need, "peak" what a process will (see above).
    """
    books, _ = Books(), train.diffusion  # the table of the schedule is no activation
    model = books.model(config, train)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    kept = KEPT * numel(trained) / world_size
    for p in trained:  # a gradient that is whole counts as what is kept of it
        p.register_post_accumulate_grad_hook(lambda p: books.enter(p.grad, KEPT * p.numel() / world_size))
    micro = micro_batch(train, world_size)
    behind = math.ceil(micro * order_shares(train)[2])  # rather one too many: they keep more
    counts = micro - behind, 0, behind
    activations = 0.0
    for _ in range(1 if micro * world_size == train.batch_size else 2):  # the second adds to gradients
        before = books.live
        with books:
            loss = step.loss(model, fake_batch(books, config, train, counts, tokens), train)
            activations = books.live - before
            loss.backward()
            del loss
    state, temporary = optimizer_bytes(config, train, step)
    steady = {
        "process": PROCESS if train.device == "cpu" else 0.0,
        "frozen_weights": KEPT * numel(frozen) / world_size,
        "trained_weights": kept,
        "moving_average": kept if train.ema else 0.0,
        "optimizer": state / world_size,
        "gathered": gathered_bytes(model, world_size),
    }
    needs = {"gradients": kept, "activations": activations}
    needs |= {"computing": books.peak, "optimizer_step": temporary}
    least = sum(steady.values()) + max(books.peak, kept + temporary)
    peak = max(least, sum(steady.values()) + kept + activations)
    return steady | needs | {"least_peak": least, "peak": peak}


@torch.no_grad()  # in inference mode, products would reach the books under names not counted
def sampling(config: ModelConfig, train: TrainConfig, tokens: int) -> dict[str, float]:
    """FLOPs and bytes of one picture as `generate.generate_images` paints it: with a caption and without."""
    books, P = Books(), config.num_patches
    model = books.model(config, train)
    rows = [[ordinary_id(config)] * tokens + [config.boi_id], [config.boi_id]]
    patches = Tokens.rows([[IMAGE]] * 2, P, start=[len(r) for r in rows])
    with books:
        cache = model.encode(Tokens.rows(rows, P)).cache
        once, books.flops = books.flops, 0
        t = torch.zeros(1, dtype=torch.long)
        model.unet_output(model.encode(patches, books.latents(1, config), t, cache))
    often = books.flops
    weights = model.boi_head.itemsize * numel(model.parameters())
    flops = {"prefill_flops": once, "step_flops": often, "picture_flops": once + DDIM_STEPS * often}
    kept = float(sum(x.nbytes for x in cache.k + cache.v))
    return flops | {"weights": weights, "cache": kept, "peak": weights + books.peak}


@torch.no_grad()  # in inference mode, products would reach the books under names not counted
def writing(config: ModelConfig, train: TrainConfig) -> dict[str, float]:
    """FLOPs and bytes of text alone: reading a prompt, and writing a token behind it.

    "read" is what one token reads from memory: all weights of the text side, and the cache.
    """
    books, n = Books(), min(PROMPT, config.max_position_embeddings - 1)
    model = books.model(config, train)
    with books:
        hidden = model.encode(Tokens.text(torch.full((1, n), ordinary_id(config))))
        model.logits(hidden.text[-1:])
        prefill, books.flops = books.flops, 0
        new = model.encode(Tokens.text(torch.full((1, 1), ordinary_id(config)), n), cache=hidden.cache)
        model.logits(new.text)
    item, cache = model.boi_head.itemsize, float(sum(x.nbytes for x in hidden.cache.k + hidden.cache.v))
    weights = item * numel(model.text_parameters().values())
    unread = 0 if config.tie_word_embeddings else item * model.embed_tokens.weight.numel()  # but one row
    flops = {"prefill_flops": prefill, "token_flops": books.flops}
    memory = {"weights": weights, "cache": cache, "read": weights - unread + cache}
    return {"prompt_tokens": n} | flops | memory | {"peak": weights + books.peak}


def report(
    config: ModelConfig, train: TrainConfig, step: TrainingStep, world_size: int = 1, tokens: int = 32
) -> dict[str, dict]:
    """Parameters; bytes and FLOPs of training, painting, and writing; ValueError for an uneven batch."""
    if world_size < 1 or train.batch_size % world_size:
        raise ValueError(f"batch_size = {train.batch_size} is not a multiple of world_size = {world_size}")
    pictures = {"pictures_a_step": train.batch_size, "pictures_at_once": micro_batch(train, world_size)}
    return {
        "setting": {"processes": world_size} | pictures | {"caption_tokens": tokens, "dtype": train.dtype},
        "parameters": count_parameters(Books().model(config, train)),
        "training_bytes": training_bytes(config, train, step, world_size, tokens),
        "training_flops": training_flops(config, train, step, tokens),
        "sampling": sampling(config, train, tokens),
        "text": writing(config, train),
    }


def budget_table(report: dict[str, dict]) -> str:
    """The report as Markdown: millions of parameters, GiB (2^30 bytes), TFLOP."""
    titles = {
        "setting": "setting",
        "parameters": "parameters",
        "training_bytes": "training: memory of one process",
        "training_flops": "training: work",
        "sampling": f"sampling: a picture in {DDIM_STEPS} guided steps",
        "text": "text alone",
    }
    lines = []
    for block, title in titles.items():
        lines += [f"| {title} | |", "|---|---:|"]
        for name, value in report[block].items():
            if block == "setting" or name == "prompt_tokens":
                shown = str(value)
            elif block == "parameters":
                shown = f"{value / 1e6:,.1f} M"
            elif "flops" in block + name:
                shown = f"{value / 1e12:.4g} TFLOP"
            else:
                shown = f"{value / 2**30:.2f} GiB"
            if value or block == "setting":
                lines.append(f"| {name.removesuffix('_flops').replace('_', ' ')} | {shown} |")
        lines.append("")
    peak = report["training_bytes"]["peak"] / 2**30
    return "\n".join([*lines, f"predicted peak of one process: {peak:.1f} GiB"])


def dry_run(config: TrainConfig, step: TrainingStep) -> None:
    """Print what a run would take of memory and arithmetic; no model is made, and no stock one fetched."""
    if config.base:
        model = known_config(config.base)
    else:
        model = tiny_config(train_tokenizer(random.Random(config.seed)))
    channels, factor = (4, 8) if config.vae else (config.latent_channels, config.latent_patch)
    if config.vae and Path(config.vae).is_dir():
        vae = read_vae_config(resolve_vae(config.vae) / "config.json")
        channels, factor = vae.latent_channels, 2 ** (len(vae.block_out_channels) - 1)
    if not set(config.tasks) <= {"caption", "generate"}:
        print(f"of captioned pictures; --task {config.task} has more text, and clean pictures as well\n")
    if config.text_batch:
        print(f"without the {config.text_batch} documents of text beside the pictures\n")
    model = replace(model, **config.model_overrides(channels, factor))
    print(budget_table(report(model, config, step, int(os.environ.get("WORLD_SIZE", "1")))))
