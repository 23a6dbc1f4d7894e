"""LMFusion: a frozen language model and an image expert that share one attention (Section 3 of the paper).

Every layer holds two experts with the same structure. Text tokens go through the text expert, image patches
through the image expert, and the two meet only in one softmax attention under a hybrid mask:

    text  --norm--> QKV_text --+                                +--> O_text --> FFN_text --> text
                               +--> one attention, hybrid mask --+
    image --norm--> QKV_img  --+                                +--> O_img  --> FFN_img  --> image

Names inside an expert are those of Hugging Face's Qwen3, so that loading a checkpoint, and copying a text
expert into an image expert, is a prefix swap. The mask and the attention are in attention.py.

Shapes: B batch, N tokens of a sequence, S slots of the key/value cache, T tokens of one modality in the whole
batch (the gathered form in which the experts work), D hidden, H query heads, K key/value heads, d head_dim,
V vocabulary, M images in the batch, P patches of an image; C, h, w channels, height and width of a latent.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention import SLOTS, Cache, Layout, Tokens, append_slots, compiled
from unet import UNetDown, UNetUp, check_sizes, unet_at_start

SEPARATIONS = ("deep", "shallow", "none")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model: first a Qwen3 `config.json`, field by field, then the image side."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int  # its own number: Qwen3-0.6B has 16 heads x 128 over a hidden size of 1024
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 40960
    # Switches of the same layer: Qwen3 has the first, Qwen2 the second, Llama 3 (the paper's) the third.
    qk_norm: bool = True
    attention_bias: bool = False  # on Q, K and V
    rope_scaling: tuple[float, float, float, int] | None = None  # see `rope_frequencies`
    mrope_section: tuple[int, int, int] | None = None  # of Qwen3-VL: see `rope_angles`

    boi_id: int = 0  # <|vision_start|>; a text token, outside the image's block
    eoi_id: int = 0  # <|vision_end|>; likewise
    eos_id: int = 0  # ends a document
    end_ids: tuple[int, ...] = ()  # others that end a text when it is generated
    separation: str = "deep"  # Section 5.1: deep | shallow | none
    latent_channels: int = 4
    latent_size: int = 32  # height and width of the latent
    unet_channels: tuple[int, int] = (640, 1792)  # at full and half resolution: 0.27B at 8B (Section 4.1)
    unet_attention: bool = True  # self-attention at the low resolution
    patch_positions: bool = False  # Our choice: a learned vector for each patch; see unet.py

    def __post_init__(self):
        if self.separation not in SEPARATIONS:
            raise ValueError(f"separation is {self.separation!r}; choose one of {', '.join(SEPARATIONS)}")
        H, K = self.num_attention_heads, self.num_key_value_heads
        if H % K:
            raise ValueError(f"num_attention_heads = {H} is not a multiple of num_key_value_heads = {K}")
        check_sizes(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; RoPE turns pairs of components")

    @property
    def num_patches(self) -> int:
        """P: the U-Net has one stride of 2 (Section 4.1: 32 x 32 latents become 256 patches)."""
        return (self.latent_size // 2) ** 2


# ---- The Qwen3 layer, once per modality ----


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the quotient is computed in float32 and rounded to the dtype of x, as in Qwen3."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps) * self.weight


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position (d/2,), float32, of each pair of components.

    Llama 3.1 stretches the slow ones, for contexts longer than it was first trained on: with `rope_scaling`
    (factor, low, high, context), a pair that turns less than `low` times in `context` positions turns
    `factor` times slower, one that turns more than `high` times stays, and those between are interpolated.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequency
    factor, low, high, context = config.rope_scaling
    turns = context * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # share of the unscaled frequency
    return keep * frequency + (1 - keep) * frequency / factor


def rope_angles(position: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., 1, d/2), in float32, of the rotary embedding at integer positions (...).

    Of Qwen3-VL they may be (T, 3): time, row and column, each of which turns every third pair as far as its
    section goes; time turns the rest.
    """
    position = position.float()[..., None]
    if config.mrope_section and position.dim() == 3:
        axis = torch.zeros(config.head_dim // 2, dtype=torch.long, device=position.device)
        for i in (1, 2):
            axis[i : 3 * config.mrope_section[i] : 3] = i
        position = position[:, axis, 0]  # (T, d/2)
    angle = position * rope_frequencies(config).to(position.device)  # (..., d/2)
    return angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (T, heads, d): component i turns together with i + d/2 (the half-split form of Qwen3)."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)  # (T, heads, d/2) each
    a_turned = torch.addcmul(a * cos, b, sin, value=-1)
    b_turned = torch.addcmul(b * cos, a, sin)
    return torch.cat((a_turned, b_turned), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """The projections of one modality around the shared attention; QK-norm per head, before RoPE."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(D, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, D, bias=False)
        self.q_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.head_dim = d

    def qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Eq. (7) for text, Eq. (8) for images: x (T, D) -> queries, keys (T, H + K, d), values (T, K, d)."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, d)
        qk = apply_rope(torch.cat((self.q_norm(q), self.k_norm(k)), dim=1), rope)  # (T, H + K, d)
        return qk, v


class MLP(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Expert(nn.Module):
    """One modality's half of a layer: everything of a Qwen3 layer except the softmax itself."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def qkv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Eq. (7, 8): x (T, D) -> queries and keys (T, H + K, d), values (T, K, d)."""
        return self.self_attn.qkv(self.input_layernorm(x), rope)

    def output(self, x: Tensor, attended: Tensor) -> Tensor:
        """x (T, D), attended (T, H * d) -> (T, D)."""
        x = x + self.self_attn.o_proj(attended)  # O of Eq. (9) for text, Eq. (10) for images
        return x + self.mlp(self.post_attention_layernorm(x))  # Eq. (11), Eq. (12)


# ---- The model ----


class Block(nn.Module):
    """One layer: a text expert, an image expert, and the attention in which they meet."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.text = Expert(config)
        # "none" is one dense model: the very same module
        self.image = self.text if config.separation == "none" else Expert(config)
        if config.separation == "shallow":  # separate FFNs and their norms only
            self.image.input_layernorm = self.text.input_layernorm
            self.image.self_attn = self.text.self_attn
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv, self.output = Expert.qkv, Expert.output  # or compiled: `LMFusion.compile_experts`

    def forward(
        self, text: Tensor | None, image: Tensor | None, layout: Layout, past: tuple | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """text (T_text, D) and image (T_image, D), or None; past keys, values (B, K, S, d) and S, or None.

        Returns both streams after the layer, and this call's own keys and values (B, K, N, d).
        """
        of_text = of_image = None, None
        if text is not None:
            of_text = self.qkv(self.text, text, layout.rope_text)  # Eq. (7)
        if image is not None:
            of_image = self.qkv(self.image, image, layout.rope_image)  # Eq. (8)
        qk, v_new = map(layout.merge, of_text, of_image)  # (B, H + K, N, d), (B, K, N, d)
        q, k_new = qk.split(self.heads, dim=1)  # (B, H, N, d), (B, K, N, d)
        k, v = k_new, v_new
        if past is not None:  # the concatenation of Eq. (9, 10): (B, K, S + N, d)
            k, k_new = append_slots(past[0], past[2], k_new)
            v, v_new = append_slots(past[1], past[2], v_new)
        to_text, to_image = layout.split(layout.attend(q, k, v))  # Eq. (9, 10): (T, H * d) each
        if text is not None:
            text = self.output(self.text, text, to_text)  # Eq. (9, 11)
        if image is not None:
            image = self.output(self.image, image, to_image)  # Eq. (10, 12)
        return text, image, k_new, v_new


@dataclass
class Hidden:
    """What the transformer made of a `Tokens`: features of each modality, and what goes into the cache."""

    text: Tensor | None  # (T_text, D), after the text final norm, in the order of the slots
    image: Tensor | None  # (T_image, D), after the image final norm
    unet: tuple[Tensor, list[Tensor], Tensor] | None  # h_in, the skips and t, for UNet-Up
    cache: Cache | None  # of these tokens alone


class LMFusion(nn.Module):
    """A frozen Qwen3, an image expert beside every layer, and a U-Net around the image stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        size = config.vocab_size, config.hidden_size
        # For a draw on the meta device, of nothing, torch would import its compiler: a second.
        empty = torch.empty(size) if torch.get_default_device().type == "meta" else None
        self.embed_tokens = nn.Embedding(*size, _weight=empty)  # Proj_text of Eq. (5)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm_text = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Our choice: the final norm belongs to the last layer's output: separate wherever anything is.
        shared = config.separation == "none"
        self.norm_image = self.norm_text if shared else RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # of Eq. (13)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # Our choice: *when to draw* is one more row of the head, on frozen features; see `draw_logit`.
        self.boi_head = nn.Parameter(torch.zeros(config.hidden_size))
        self.unet_down = UNetDown(config)
        self.unet_up = UNetUp(config)
        self.activation_checkpointing = False  # recompute each layer in the backward pass: less memory
        self.text_is_frozen = False  # as `freeze_text` left it

    # ---- parameters ----

    @property
    def device(self) -> torch.device:
        return self.boi_head.device

    @property
    def dtype(self) -> torch.dtype:
        """What layers compute in."""
        return self.boi_head.dtype

    def text_parameters(self) -> dict[str, nn.Parameter]:
        """The language model: everything that a text-only Qwen3 has. Shared modules count here."""
        own = ("embed_tokens.", "norm_text.", "lm_head.")
        return {n: p for n, p in self.named_parameters() if n.startswith(own) or ".text." in n}

    def image_parameters(self) -> dict[str, nn.Parameter]:
        """Everything else: image experts, image final norm, U-Net, and the row that decides when to draw."""
        text = self.text_parameters()
        return {n: p for n, p in self.named_parameters() if n not in text}

    def freeze_text(self, frozen: bool = True, norm: bool = True) -> None:
        """Freeze or thaw the language model; its final norm stays frozen, for the text's sake.

        norm = False thaws that too: where the text is learned from nothing, there is none to keep.
        """
        self.text_is_frozen = frozen
        for name, p in self.text_parameters().items():
            p.requires_grad_(not frozen and not (norm and name == "norm_text.weight"))

    def compile_experts(self) -> None:
        """Make one kernel of the elementwise work in an expert; the first step waits for that."""
        for block in self.layers:
            block.qkv, block.output = compiled(Expert.qkv), compiled(Expert.output)

    @torch.no_grad()
    def image_at_start(self, text: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """First value of every image parameter, by name; `text(name)` gives that of a text parameter.

        Section 3.1: image experts start as copies of the text experts, the U-Net afresh. It is made on the
        CPU: the same numbers whatever the device.
        """
        # Our choice: patches enter the residual stream as large as words do, as the copied layers expect.
        rms = text("embed_tokens.weight").float().pow(2).mean().sqrt().item()
        fresh = {"boi_head": torch.zeros(self.config.hidden_size), **unet_at_start(self.config, rms)}
        for name in self.image_parameters():
            copied = name.replace(".image.", ".text.").replace("norm_image", "norm_text")
            yield name, fresh[name] if name in fresh else text(copied)

    # ---- the transformer ----

    def layout(self, tokens: Tokens, past: Tokens | Cache | None = None) -> Layout:
        """The layout of `tokens` behind `past`, for `encode`; depends on no weight and no value."""
        return Layout(tokens, past, self.device, partial(rope_angles, config=self.config))

    def encode(
        self,
        tokens: Tokens,
        latents: Tensor | None = None,
        t: Tensor | None = None,
        cache: Cache | None = None,
        keep: bool = True,
        layout: Layout | None = None,
    ) -> Hidden:
        """Run the transformer over `tokens`, attending to `cache` as well; the cache itself is not changed.

        latents (M, C, h, w) and timesteps t (M,): the images of `tokens`, row by row, in order; M may be a
        part of their number, and then comes again until all have one. A clean image has t = 0. keep: return
        keys and values, for a cache. layout: that of these tokens behind this cache, if it is made already.
        """
        layout = layout or self.layout(tokens, cache)
        text = image = unet = None
        deepstack = ()
        if len(layout.text):
            text = self.embed_tokens(layout.ids)  # Eq. (5): (T_text, D)
        if tokens.seen:  # Section 5.3: pictures in place of words; (n, D) each
            parts = zip(*((s.features, *(s.deepstack or ())) for s in tokens.seen), strict=True)
            features, *deepstack = (torch.cat(x).to(text) for x in parts)
            text = text.index_copy(0, layout.shown, features)
        if len(layout.image):
            P = self.config.num_patches
            assert latents is not None and t is not None and len(layout.image) % (len(latents) * P) == 0
            h_in, skips = self.unet_down(latents.to(self.dtype), t)  # Eq. (6): (M, P, D)
            if (n := len(layout.image) // (len(latents) * P)) > 1:  # under guidance: once for all contexts
                h_in, t = h_in.repeat(n, 1, 1), t.repeat(n)
                skips = [skip.repeat(n, 1, 1, 1) for skip in skips]
            unet = (h_in, skips, t)
            image = h_in.flatten(0, 1)  # (T_image, D)
        keys, values = [], []
        for i, block in enumerate(self.layers):
            past = None if cache is None else (cache.k[i], cache.v[i], cache.length)
            if self.activation_checkpointing and torch.is_grad_enabled():
                text, image, k, v = checkpoint(block, text, image, layout, past, use_reentrant=False)
            else:
                text, image, k, v = block(text, image, layout, past)
            if i < len(deepstack):
                text = text.index_add(0, layout.shown, deepstack[i])
            if keep:
                keys.append(k)
                values.append(v)
        text = None if text is None else self.norm_text(text)
        image = None if image is None else self.norm_image(image)
        cache = Cache(keys, values, *(getattr(tokens, f) for f in SLOTS)) if keep else None
        return Hidden(text, image, unet, cache)

    def logits(self, text: Tensor) -> Tensor:
        """Text features (..., D) -> logits over the vocabulary (..., V)."""
        return self.lm_head(text)  # Eq. (13)

    def draw_logit(self, text: Tensor) -> Tensor:
        """Log-odds (...) that an image starts next, from text features (..., D).

        This is the extra head row for BOI: with logit_BOI = logsumexp(all other logits) + draw_logit, the
        softmax over the vocabulary and BOI gives BOI the probability sigmoid(draw_logit). Written so, it is
        trained without a projection to the vocabulary, and in text-only mode it is simply absent.
        """
        return text.detach() @ self.boi_head

    def unet_output(self, hidden: Hidden, which: Tensor | None = None) -> Tensor:
        """Image features -> F (M, C, h, w), float32, of all images or of some (their numbers).

        F is the noise, or gives it: see `Diffusion.eps_from_output`.
        """
        h_in, skips, t = hidden.unet
        image = hidden.image.view_as(h_in)
        if which is not None:
            image, h_in, t, skips = image[which], h_in[which], t[which], [s[which] for s in skips]
        return self.unet_up(image, t, h_in, skips).float()  # Eq. (14)

    def text_logits(self, ids: Tensor, seen: Sequence = ()) -> Tensor:
        """The frozen language model alone: ids (B, N) -> logits (B, N, V).

        seen: a `vision.Seen` for each picture that the placeholders in ids stand for, row by row.
        """
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must be (B, N) with N >= 1, not {tuple(ids.shape)}")
        bad = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(bad):
            raise ValueError(f"ids hold {bad[0].item()}; the vocabulary is 0 .. {self.config.vocab_size - 1}")
        if seen and (n := ids.shape[1]) > (most := self.config.max_position_embeddings):
            raise ValueError(f"text and pictures are {n} tokens long; the context has room for {most}")
        return self.logits(self.encode(Tokens.text(ids).show(seen)).text).unflatten(0, tuple(ids.shape))

    def layouts(self, prefix: Tokens | None, rest: Tokens) -> tuple[Layout | None, Layout]:
        """Those of both phases of `forward`; what prepares a batch can make them ahead."""
        first = prefix if prefix is not None and prefix.ids.shape[1] else None
        return first and self.layout(first), self.layout(rest, first)

    def forward(
        self, prefix: Tokens | None, rest: Tokens, latents: Tensor, t: Tensor, layouts: tuple | None = None
    ) -> tuple[Hidden | None, Hidden]:
        """Read a batch in two phases, and return the features of both; layouts: of `layouts`, if made ahead.

        *Prefill*: `prefix` holds the text that precedes every image of its sequence. With frozen text no
        gradient can reach it, so it runs without a graph and leaves only keys and values. *Decode*: `rest`
        holds everything from the first image on and attends to them. A caption behind an image sends its loss
        through the frozen text layers to the image's keys and values: frozen is not detached.
        """
        before, encode = None, partial(LMFusion.encode, self)  # as it stands here, not as `shard` wraps it
        first, second = layouts or self.layouts(prefix, rest)
        if first is not None:  # there is none where every sequence begins with its image
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.text_is_frozen):
                before = encode(prefix, layout=first)
        return before, encode(rest, latents, t, before and before.cache, keep=False, layout=second)


def replace(config: ModelConfig, **changes) -> ModelConfig:
    """A configuration with some fields changed; an unknown name is an error that lists the choices."""
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    unknown = sorted(set(changes) - set(names))
    if unknown:
        raise ValueError(f"no such field of the model: {', '.join(unknown)}; choose from {', '.join(names)}")
    return dataclasses.replace(config, **changes)
