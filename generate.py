"""Every direction: text -> image, image and text -> image, image -> text, text, and all of it in turns.

    generate_images   a picture a prompt, with classifier-free guidance (Section 2.2)
    edit_images       a picture and an instruction -> a picture (Section 5.2)
    describe_images   a picture -> its caption
    generate_text     the frozen language model alone
    generate          one loop over a growing cache: text until the model decides to draw, a picture, text

What stands before a picture is encoded once. Every denoising step computes the picture's patches alone: they
attend to the keys and values of the rest, conditional and unconditional as one batch, and never enter the
cache. The finished picture is then read once more, clean, at t = 0.

Shapes: n images, C, h, w channels, height and width of a latent, S pixels a side, B sequences, V vocabulary,
D hidden. A row is a list of token ids in which IMAGE stands for the P patches of one picture.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention import IMAGE, Cache, Tokens
from chat.template import END_THINK, IM_END, THINK
from checkpoint import Trained
from diffusion import guide, sample
from load_qwen3 import encode_plain
from model import LMFusion
from scale.pictures import decode_picture

Predict = Callable[[Tensor, Tensor], Tensor]  # x_t (n, C, h, w), t (n,) -> eps (n, C, h, w)
Watch = Callable[[Tensor], None] | None  # is called with x_t after every step of denoising


@torch.inference_mode()
def generate_images(
    trained: Trained,
    prompts: list[str],
    seeds: list[int],
    steps: int = 25,
    cfg: float = 1.5,
    sampler: str = "ddim",
    watch: Watch = None,
) -> Tensor:
    """Paint a picture a prompt, uint8 (n, 3, S, S), from the noise of its seed, whatever its neighbours.

    cfg: guidance scale s of eps = eps_u + s (eps_c - eps_u); 1 is none. watch(x_t) is called after every
    step. ValueError for a prompt that does not fit.
    """
    config = trained.model.config
    rows = [encode_text(trained, p, room=config.num_patches + 1) + [config.boi_id] for p in prompts]
    scales = [] if cfg == 1.0 else [cfg]
    if scales:  # what training dropped is what is nulled here: the whole caption, never BOI
        rows += [[config.boi_id]] * len(prompts)
    predict = read_rows(trained, rows, None, scales)
    return trained.codec.decode(denoise(trained, predict, seeds, steps, sampler, watch).cpu())


def read_rows(trained: Trained, rows: list[list[int]], context: Tensor | None, scales: list) -> Predict:
    """Encode rows that end in BOI, once; the `predictor` of the pictures behind them.

    context (M, C, h, w): the clean latents of the images in `rows`, in order.
    """
    model, P = trained.model, trained.model.config.num_patches
    t = None if context is None else context.new_zeros(len(context), dtype=torch.long)
    cache = model.encode(Tokens.rows(rows, P), context, t).cache
    before = [row.count(IMAGE) for row in rows]
    start = [len(row) + n * (P - 1) for row, n in zip(rows, before, strict=True)]
    return predictor(trained, cache, start, before, scales)


def predictor(trained: Trained, cache: Cache, start: list[int], before: list[int], scales: list) -> Predict:
    """predict(x, t) -> guided noise (n, C, h, w), for images behind the rows of `cache`.

    The rows are n of each kind, from the most to the least conditional. scales[i] guides from kind i + 1 to
    kind i; without scales there is one kind, and no guidance. `start` and `before` say how many tokens and
    how many images each row holds.
    """
    model, P, kinds = trained.model, trained.model.config.num_patches, len(scales) + 1
    patches = Tokens.rows([[IMAGE]] * len(start), P, start, before)
    # All that does not change from step to step: who stands where and sees whom, and room for their keys.
    layout, cache = model.layout(patches, cache), cache.reserve(P)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        hidden = model.encode(patches, x, t, cache, False, layout)  # the cache stays as it is
        xx, tt = x.repeat(kinds, 1, 1, 1), t.repeat(kinds)
        eps = trained.diffusion.eps_from_output(model.unet_output(hidden), xx, tt).chunk(kinds)
        if not scales:
            return eps[0]
        guided = guide(eps[-2], eps[-1], scales[-1])
        return guided if kinds == 2 else guided + scales[0] * (eps[0] - eps[1])

    return predict


def denoise(
    trained: Trained, predict: Predict, seeds: list[int], steps: int, sampler: str, watch: Watch
) -> Tensor:
    """Latents (n, C, h, w) from the noise of each seed."""
    config, device = trained.model.config, trained.model.device
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    return sample(trained.diffusion, predict, noise, steps, sampler, trained.codec.bound, generators, watch)


def encode_text(trained: Trained, text: str, room: int) -> list[int]:
    """Token ids of a user's text, special tokens in it as plain text; ValueError if it is too long."""
    ids = encode_plain(trained.tokenizer, text)  # "<|vision_start|>" typed by a user is text, not an image
    limit = trained.model.config.max_position_embeddings - room
    if len(ids) > limit:
        length = f"{len(ids)} tokens long; the context has room for {limit}"
        raise ValueError(f"the text {text[:40]!r}... is {length}")
    return ids


def derive_seed(*parts: object) -> int:
    """A seed from a run's seed and what tells one picture of it from the others."""
    return random.Random("-".join(map(str, parts))).getrandbits(63)


@torch.inference_mode()
def edit_images(
    trained: Trained,
    pictures: Tensor,
    instructions: list[str],
    seeds: list[int],
    steps: int = 25,
    cfg: float = 3.0,
    sampler: str = "ddim",
    watch: Watch = None,
    cfg_image: float = 3.0,
) -> Tensor:
    """Change pictures, uint8 (n, 3, S, S), as the instructions say; "" gives a picture back as it is.

    Our choice, after Brooks et al. 2023 (InstructPix2Pix), Eq. (3): guidance over the picture and over the
    instruction, from BOI alone to the source to the source with the instruction:

        eps = eps_0 + cfg_image (eps_source - eps_0) + cfg (eps_edit - eps_source)

    With cfg_image = 1 it is over the instruction alone. ValueError for an instruction that does not fit.
    """
    config, n = trained.model.config, len(instructions)
    source = [config.boi_id, IMAGE, config.eoi_id]
    texts = [encode_text(trained, i, room=2 * config.num_patches + 3) for i in instructions]
    rows = [[*source, *ids, config.boi_id] for ids in texts]
    context, scales = encode_pictures(trained, pictures), []
    if cfg != cfg_image:  # else eps_source cancels
        rows, scales = rows + [[*source, config.boi_id]] * n, [cfg]
    context = context.repeat(len(rows) // n, 1, 1, 1)
    if cfg_image != 1.0:
        rows, scales = rows + [[config.boi_id]] * n, [*scales, cfg_image]
    predict = read_rows(trained, rows, context, scales)
    return trained.codec.decode(denoise(trained, predict, seeds, steps, sampler, watch).cpu())


def encode_pictures(trained: Trained, pictures: Tensor) -> Tensor:
    """Pictures uint8 (n, 3, S, S) -> latents (n, C, h, w); ValueError for another size than the model's."""
    config = trained.model.config
    latents = trained.codec.encode(pictures).to(trained.model.device)
    size = tuple(latents.shape[1:])
    if size != (config.latent_channels, config.latent_size, config.latent_size):
        raise ValueError(f"pictures of {tuple(pictures.shape[2:])} pixels give latents of {size}")
    return latents


def picture_size(trained: Trained) -> int:
    """Pixels a side of the model's pictures."""
    return trained.model.config.latent_size * trained.codec.patch


def read_picture(trained: Trained, path: str | Path) -> Tensor:
    """A picture file as uint8 (1, 3, S, S), centre-cropped and resized; ValueError if it is not one."""
    try:
        return decode_picture(Path(path).read_bytes(), picture_size(trained))[None]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error.strerror if isinstance(error, OSError) else error}") from None


@torch.inference_mode()
def describe_images(trained: Trained, pictures: Tensor, max_tokens: int = 64, **how: Any) -> list[str]:
    """Pictures uint8 (n, 3, S, S) -> captions; `how` as in `choose`. ValueError if one cannot fit.

    The clean image is read at t = 0 between BOI and EOI.
    """
    config, n = trained.model.config, len(pictures)
    limit = config.max_position_embeddings - config.num_patches - 2
    if max_tokens > limit:
        raise ValueError(f"behind a picture the context has room for {limit} tokens, not {max_tokens}")
    latents = encode_pictures(trained, pictures)
    tokens = Tokens.rows([[config.boi_id, IMAGE, config.eoi_id]] * n, config.num_patches)
    hidden = trained.model.encode(tokens, latents, latents.new_zeros(n, dtype=torch.long))
    after_eoi = hidden.text.view(n, 2, -1)[:, 1]  # (n, D); the text of each row is BOI, EOI
    ids = continue_text(trained.model, after_eoi, hidden.cache, max_tokens, **how)
    return [trained.tokenizer.decode(row) for row in ids]


@torch.inference_mode()
def generate_text(trained: Trained, prompt: str, max_tokens: int = 64, **how: Any) -> str:
    """Continue a text with the frozen language model alone; `how` as in `choose`.

    ValueError for a text that is empty or does not fit.
    """
    ids = encode_text(trained, prompt, room=max_tokens)
    if not ids:
        raise ValueError("the text to continue is empty")
    hidden = trained.model.encode(Tokens.text(torch.tensor([ids])))
    new = continue_text(trained.model, hidden.text[-1:], hidden.cache, max_tokens, **how)
    return trained.tokenizer.decode(new[0])


@torch.inference_mode()
def continue_text(model: LMFusion, text: Tensor, cache: Cache, max_tokens: int, **how: Any) -> list[list]:
    """Write on from the features (B, D) of the last token of sequences of equal length; stops at EOS.

    The cache holds those sequences; `how` is temperature, top_k, top_p and generator, as in `choose`. Returns
    the new ids of each, without the one that ended it.
    """
    alive = torch.ones(len(text), dtype=torch.bool, device=text.device)
    position, ids = int(cache.position[0, -1]) + 1, []
    ends = torch.tensor([model.config.eos_id, *model.config.end_ids], device=text.device)
    for step in range(max_tokens):
        new = choose(model.logits(text), **how)
        alive = alive & ~torch.isin(new, ends)
        ids.append(torch.where(alive, new, -1))
        if not alive.any() or step + 1 == max_tokens:
            break
        if not cache.room:
            cache = cache.reserve(min(max_tokens - step, 256))
        hidden = model.encode(Tokens.text(new[:, None], position + step), cache=cache)
        cache, text = cache.extend(hidden.cache), hidden.text
    return [[i for i in row if i >= 0] for row in torch.stack(ids, 1).tolist()] if ids else [[] for _ in text]


def choose(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Next ids (B,) from logits (B, V). temperature 0 is greedy; top_k 0 and top_p 1 keep everything."""
    if temperature < 1e-5:  # nothing but the largest would be left
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # the first token is always inside
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(logits.device)


class Context:
    """What the model has read of one conversation: ids, IMAGE for a picture; and the cache of it all.

    Shapes: latents (C, h, w) each, clean.
    """

    def __init__(self, trained: Trained):
        self.trained = trained
        self.ids: list[int] = []
        self.latents: list[Tensor] = []
        self.cache: Cache | None = None

    def __len__(self) -> int:
        """Tokens read so far, patches included."""
        return len(self.ids) + len(self.latents) * (self.trained.model.config.num_patches - 1)

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.trained.model.config.max_position_embeddings - len(self)

    @torch.inference_mode()
    def read(self, ids: list[int], latents: list[Tensor] | tuple = ()) -> Tensor:
        """Read on, clean pictures at t = 0; the features (D,) of the last token, which must be text.

        ValueError if it does not fit.
        """
        model, P = self.trained.model, self.trained.model.config.num_patches
        length = len(ids) + len(latents) * (P - 1)
        if length > self.room:
            room = f"the context has room for {model.config.max_position_embeddings}"
            raise ValueError(f"the conversation is {len(self) + length} tokens long; {room}")
        tokens = Tokens.rows([ids], P, [len(self)], [len(self.latents)])
        t = torch.zeros(len(latents), dtype=torch.long, device=model.device)
        if self.cache is not None and self.cache.room < length:
            self.cache = self.cache.reserve(max(256, length))
        hidden = model.encode(tokens, torch.stack(tuple(latents)) if latents else None, t, self.cache)
        self.cache = hidden.cache if self.cache is None else self.cache.extend(hidden.cache)
        self.ids, self.latents = self.ids + ids, self.latents + list(latents)
        return hidden.text[-1]

    def rewind(self, ids: list[int], latents: list[Tensor]) -> tuple[list[int], list[Tensor]]:
        """Forget all but the longest beginning of this sequence, and return what is still to be read of it.

        At least its last token is: the features behind it are not kept.
        """
        same = images = 0
        for ours, theirs in zip(self.ids, ids[:-1], strict=False):
            if ours != theirs or (ours == IMAGE and not torch.equal(self.latents[images], latents[images])):
                break
            same, images = same + 1, images + (ours == IMAGE)
        self.ids, self.latents = self.ids[:same], self.latents[:images]
        self.cache = self.cache.keep(len(self)) if same else None
        return ids[same:], latents[images:]

    @torch.inference_mode()
    def predictor(self, cfg: float) -> Predict:
        """predict(x, t) for a picture behind what was read, which ends in BOI.

        Guidance is over the whole conversation: the unconditional row is BOI alone, as in training.
        """
        if cfg == 1.0:
            return predictor(self.trained, self.cache, [len(self)], [len(self.latents)], [])
        config = self.trained.model.config
        null = self.trained.model.encode(Tokens.rows([[config.boi_id]], config.num_patches)).cache
        both = self.cache.stack(null)
        return predictor(self.trained, both, [len(self), 1], [len(self.latents), 0], [cfg])


@dataclass(frozen=True)
class GenerationConfig:
    """How a turn is generated."""

    max_tokens: int = 256  # of text, thoughts included
    max_thought: int = 192  # of those, inside <think>; then the thought is ended
    max_images: int = 4
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    steps: int = 25
    cfg: float = 3.0
    sampler: str = "ddim"
    seed: int = 0


@torch.inference_mode()
def generate(
    trained: Trained, context: Context, features: Tensor, options: GenerationConfig, watch: Watch = None
) -> Iterator[int | Tensor]:
    """Go on behind what `context` has read, to the end of the turn: yields ids, and latents (C, h, w).

    features (D,): of the last token read. Before each token the extra head row says whether a picture comes
    here; inside a thought it is not asked. A finished picture is read clean, with EOI, and text goes on. The
    end is <|im_end|>, EOS or another of `end_ids`, `max_tokens`, or a full context. watch: called after each
    denoising step.
    """
    model, config, tokenizer = trained.model, trained.model.config, trained.tokenizer
    think, end_think = tokenizer.token_to_id(THINK), tokenizer.token_to_id(END_THINK)
    ends = {config.eos_id, *config.end_ids, tokenizer.token_to_id(IM_END)}
    generator = torch.Generator().manual_seed(options.seed)
    forced: list[int] = []  # what ends a thought that grows too long
    thought, words, images = -1, 0, 0  # tokens inside the thought; -1 outside
    while words < options.max_tokens and context.room > 1:
        asked = thought < 0 and not forced and images < options.max_images
        asked = asked and context.room > config.num_patches + 2
        if asked and draws(model.draw_logit(features), options.temperature, generator):
            context.read([config.boi_id])
            seed = derive_seed(options.seed, len(context.latents))
            predict = context.predictor(options.cfg)
            latent = denoise(trained, predict, [seed], options.steps, options.sampler, watch)[0]
            features = context.read([IMAGE, config.eoi_id], [latent])
            images += 1
            yield latent
            continue
        if forced:
            new = forced.pop(0)
        else:
            logits = model.logits(features)[None].clone()
            logits[:, [config.boi_id, config.eoi_id]] = -torch.inf  # the extra row's to say
            new = choose(logits, options.temperature, options.top_k, options.top_p, generator).item()
            if new in ends:
                return
        yield new
        features = context.read([new])
        words += 1
        if new == think and thought < 0:
            thought = 0
        elif new == end_think:
            thought = -1
        elif thought >= 0:
            thought += 1
            if thought == options.max_thought:
                forced = [*encode_plain(tokenizer, "\n"), end_think, *encode_plain(tokenizer, "\n\n")]


def draws(logit: Tensor, temperature: float, generator: torch.Generator) -> bool:
    """Whether a picture comes here, from the log-odds of it: the likelier, or at a temperature by chance."""
    if temperature < 1e-5:
        return logit.item() > 0
    return torch.rand((), generator=generator).item() < torch.sigmoid(logit.float() / temperature).item()
