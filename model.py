"""LMFusion: a frozen language model and an image expert that share one attention (Section 3 of the paper).

Every layer holds two experts with the same structure. Text tokens go through the text expert, image patches
through the image expert, and the two meet only in one softmax attention under a hybrid mask:

    text  --norm--> QKV_text --+                                +--> O_text --> FFN_text --> text
                               +--> one attention, hybrid mask --+
    image --norm--> QKV_img  --+                                +--> O_img  --> FFN_img  --> image

Names inside an expert are those of Hugging Face's Qwen3, so that loading a checkpoint is a prefix swap and
initialising an image expert is one `load_state_dict`.

Shapes: B batch, N tokens of a sequence, S slots of the key/value cache, T tokens of one modality in the whole
batch (the gathered form in which the experts work), D hidden, H query heads, K key/value heads, d head_dim,
V vocabulary, M images in the batch, P patches of an image; C, h, w channels, height and width of a latent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from scale.parallel import fill, full_tensor
from unet import UNetDown, UNetUp

IMAGE, PAD = -1, -2  # what stands in `Tokens.ids` where there is no text token
SEPARATIONS = ("deep", "shallow", "none")
DENSE = 2**19  # up to this many scores a head and row, the mask is made in full
WRITTEN_OUT = (2**20, 2**17)  # likewise, attention is written out on a CPU: in bfloat16 and in float32


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

    boi_id: int = 0  # <|vision_start|>; a text token, outside the image's block
    eoi_id: int = 0  # <|vision_end|>; likewise
    eos_id: int = 0  # ends a document
    separation: str = "deep"  # Section 5.1: deep | shallow | none
    latent_channels: int = 4
    latent_size: int = 32  # height and width of the latent
    unet_channels: tuple[int, int] = (640, 1792)  # at full and half resolution: 0.27B at 8B (Section 4.1)
    unet_attention: bool = True  # self-attention at the low resolution
    patch_positions: bool = False  # Our choice: a learned vector for each patch; see unet.py

    def __post_init__(self):
        if self.separation not in SEPARATIONS:
            raise ValueError(f"separation is {self.separation!r}; choose one of {', '.join(SEPARATIONS)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.latent_size % 2:
            raise ValueError(f"latent_size = {self.latent_size} is odd; the U-Net halves it once")
        c1, c2 = self.unet_channels
        if min(c1, c2) < 4 or c1 % 4 or c2 % 4 or (self.unet_attention and c2 % max(1, c2 // 64)):
            raise ValueError(
                f"unet_channels = {self.unet_channels}: multiples of 4, with attention the second one of 64"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; RoPE turns pairs of components")

    @property
    def num_patches(self) -> int:
        """P: the U-Net has one stride of 2 (Section 4.1: 32 x 32 latents become 256 patches)."""
        return (self.latent_size // 2) ** 2


# ------------------------------------------------------------------------------------------------------------
# The Qwen3 layer, once per modality


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 whatever the dtype of x, as Qwen3 does."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


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
    """Cosines and sines (..., 1, d/2), in float32, of the rotary embedding at integer positions (...)."""
    angle = position.float()[..., None] * rope_frequencies(config).to(position.device)  # (..., d/2)
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
        """x (T, D) -> queries and keys (T, H + K, d), values (T, K, d): Eq. (7) for text, (8) for images."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, d)
        qk = apply_rope(torch.cat((self.q_norm(q), self.k_norm(k)), dim=1), rope)  # (T, H + K, d)
        return qk, v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Eq. (9, 10): q (B, H, N, d), k and v (B, K, S, d) -> (B, H, N, d), one softmax for both modalities.

    mask (B, 1, N, S) is True where M is 0 and False where it is -infinity; None if nothing is masked, and
    `causal` if the N = S tokens only look back. Query head i shares key/value head i // (H/K). The paper
    writes M inside the division by sqrt(d), which makes no difference to 0 and -infinity.
    """
    (B, H, N, d), (K, S) = q.shape, k.shape[1:3]
    if q.device.type == "cuda" or N * S > WRITTEN_OUT[q.dtype == torch.float32]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=H != K)
    # Short sequences on a CPU: two batched products, up to several times faster than torch's fused kernel.
    if causal:
        mask = torch.ones(N, S, dtype=torch.bool, device=q.device).tril()
    # the query heads of a group one below the other: (B * K, H/K * N, d)
    q = (q * d**-0.5).unflatten(1, (K, H // K)).reshape(B * K, H // K * N, d)
    scores = torch.bmm(q, k.reshape(B * K, S, d).transpose(1, 2))  # (B * K, H/K * N, S)
    if mask is not None:
        scores = scores.view(B, H, N, S).masked_fill(~mask, -torch.inf).view(B * K, H // K * N, S)
    return torch.bmm(scores.softmax(-1), v.reshape(B * K, S, d)).view(B, H, N, d)


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
        """x (T, D) -> queries and keys (T, H + K, d), values (T, K, d)."""
        return self.self_attn.qkv(self.input_layernorm(x), rope)

    def output(self, x: Tensor, attended: Tensor) -> Tensor:
        """x (T, D), attended (T, H * d) -> (T, D): O of Eq. (9, 10), then the FFN of Eq. (11, 12)."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


# ------------------------------------------------------------------------------------------------------------
# Sequences, the hybrid mask and the key/value cache


@dataclass
class Tokens:
    """A rectangle of slots for the transformer to process: B sequences, N slots each, padded on the right.

    It is a plan, and stays in main memory whatever the device of the model.

    ids       (B, N)  id of a text token, IMAGE where a patch stands, PAD where nothing does
    image     (B, N)  number of the image within its sequence, from 1, in order; 0 at text and padding
    position  (B, N)  RoPE position within the document; one a token, image patches in row-major order
    document  (B, N)  tokens see only their own document; -1 at padding
    loss_mask    (B, N)  of a conversation: whether the model is to say this token; None: all of them
    """

    ids: Tensor
    image: Tensor
    position: Tensor
    document: Tensor
    loss_mask: Tensor | None = None

    @staticmethod
    def text(ids: Tensor, start: int = 0) -> Tokens:
        """Plain text (B, N) without padding, from position `start` on."""
        ids = ids.cpu()
        position = torch.arange(start, start + ids.shape[1]).expand_as(ids)
        return Tokens(ids, torch.zeros_like(ids), position, torch.zeros_like(ids))

    @staticmethod
    def rows(
        rows: list[list[int]],
        num_patches: int,
        start: list[int] | None = None,
        images_before: list[int] | None = None,
    ) -> Tokens:
        """Sequences of ids in which each IMAGE stands for all P patches of one image; ragged, of any mixture.

        `start` and `images_before` say for each row how many positions and images an earlier part already
        took.
        """
        wrap = [[x] for x in start] if start else None
        return Tokens.packed([[r] for r in rows], num_patches, wrap, images_before)

    @staticmethod
    def packed(
        rows: list[list[list[int]]],
        num_patches: int,
        start: list[list[int]] | None = None,
        images_before: list[int] | None = None,
        loss_mask: list[list[list[bool]]] | None = None,
    ) -> Tokens:
        """Like `rows`, with several documents behind one another in a row; each has positions of its own.

        `loss_mask` says of each id, and of each IMAGE, whether it is the model's to say.
        """
        P, columns = num_patches, []
        for r, documents in enumerate(rows):
            ids, image, position, document, own = ([] for _ in range(5))
            for number, row in enumerate(documents):
                count = images_before[r] if images_before else 0
                before = len(ids)
                for i, mine in zip(
                    row, loss_mask[r][number] if loss_mask else [True] * len(row), strict=True
                ):
                    count += i == IMAGE
                    ids += [IMAGE] * P if i == IMAGE else [i]
                    image += [count] * P if i == IMAGE else [0]
                    own += [mine] * (P if i == IMAGE else 1)
                first = start[r][number] if start else 0
                position += range(first, first + len(ids) - before)
                document += [number] * (len(ids) - before)
            columns.append((ids, image, position, document, own))
        width = max(len(ids) for ids, *_ in columns)
        for ids, image, position, document, own in columns:  # padding, on the right
            n = width - len(ids)
            position += range(position[-1] + 1 if position else 0, (position[-1] + 1 if position else 0) + n)
            ids += [PAD] * n
            image += [0] * n
            document += [-1] * n
            own += [False] * n
        *parts, own = (torch.tensor(x, dtype=torch.long) for x in zip(*columns, strict=True))
        tokens = Tokens(*(x.view(len(rows), width) for x in parts))
        return (
            dataclasses.replace(tokens, loss_mask=own.view(len(rows), width).bool()) if loss_mask else tokens
        )


def hybrid_mask(query: Tokens, key: Tokens | Cache) -> Tensor:
    """M of Eq. (9, 10) as booleans (B, N, S): may slot i of `query` see slot j of `key`?

    True iff both belong to one document, and j does not come after i or both are patches of one image.
    Padding is a document of its own, so that no row of the softmax is empty and nothing else sees it.
    """
    same_document = query.document[:, :, None] == key.document[:, None, :]
    causal = key.position[:, None, :] <= query.position[:, :, None]
    same_image = (query.image[:, :, None] == key.image[:, None, :]) & (query.image[:, :, None] > 0)
    return same_document & (causal | same_image)


def append_slots(past: Tensor, length: int, new: Tensor) -> Tensor:
    """Past keys or values, of which the first `length` slots count, and new ones: (B, K, S + N, d).

    Where there is room behind the past (`Cache.reserve`) the new ones are written there; else all is copied.
    """
    end = length + new.shape[2]
    if past.shape[2] < end:
        return torch.cat((past[:, :, :length], new), dim=2)
    past[:, :, length:end] = new
    return past[:, :, :end]


@dataclass
class Cache:
    """Keys and values (B, K, S, d) of each layer for S slots already read, and what the mask needs."""

    k: list[Tensor]  # behind the S slots there may be room for more
    v: list[Tensor]
    image: Tensor  # (B, S), and the next two: in main memory
    position: Tensor  # (B, S)
    document: Tensor  # (B, S)

    @property
    def length(self) -> int:
        """S."""
        return self.position.shape[1]

    @property
    def room(self) -> int:
        """How many slots can be added without copying those that are there."""
        return self.k[0].shape[2] - self.length

    def reserve(self, n: int) -> Cache:
        """A copy with room for n more slots. What attends to it, or extends it, writes into the room."""

        def grow(x: Tensor) -> Tensor:
            B, K, _, d = x.shape
            roomy = x.new_empty(B, K, self.length + n, d)
            roomy[:, :, : self.length] = x[:, :, : self.length]
            return roomy

        return dataclasses.replace(self, k=[grow(k) for k in self.k], v=[grow(v) for v in self.v])

    def extend(self, new: Cache) -> Cache:
        """A cache with the slots of `new` behind these. Without room, both stay as they are."""
        S, k, v = self.length, self.k, self.v
        if not self.room or k[0][:, :, S:].data_ptr() != new.k[0].data_ptr():  # else it stands there already
            k = [append_slots(a, S, b) for a, b in zip(k, new.k, strict=True)]
            v = [append_slots(a, S, b) for a, b in zip(v, new.v, strict=True)]
            if self.room >= new.length:
                k, v = self.k, self.v
        fields = ("image", "position", "document")
        return Cache(k, v, *(torch.cat((getattr(self, f), getattr(new, f)), dim=1) for f in fields))

    def keep(self, n: int) -> Cache:
        """The first n slots; the others become room."""
        return Cache(self.k, self.v, self.image[:, :n], self.position[:, :n], self.document[:, :n])

    def stack(self, other: Cache) -> Cache:
        """The sequences of both, padded on the right."""
        S = max(self.length, other.length)

        def both(a: Tensor, b: Tensor, value: int = 0) -> Tensor:
            """Two tensors (B, ..., slots[, d]) as one; what is filled in is `value`."""
            dim = min(2, a.dim() - 1)
            out = a.new_full((len(a) + len(b), *a.shape[1:dim], S, *a.shape[dim + 1 :]), value)
            out[: len(a)].narrow(dim, 0, self.length).copy_(a.narrow(dim, 0, self.length))
            out[len(a) :].narrow(dim, 0, other.length).copy_(b.narrow(dim, 0, other.length))
            return out

        return Cache(
            [both(a, b) for a, b in zip(self.k, other.k, strict=True)],
            [both(a, b) for a, b in zip(self.v, other.v, strict=True)],
            both(self.image, other.image),
            both(self.position, other.position),
            both(self.document, other.document, -1),
        )

    def rows(self, index: Tensor) -> Cache:
        """The sequences `index`, in that order; one may come up several times."""
        index = index.cpu()
        return Cache(
            [k[index.to(k.device)] for k in self.k],
            [v[index.to(v.device)] for v in self.v],
            self.image[index],
            self.position[index],
            self.document[index],
        )


@dataclass
class Segment:
    """A run of slots of one row with the same mask: the patches of an image, or text without a break."""

    keys: list[int]  # runs of key slots it sees; its own comes last
    causal: bool  # text: nothing but itself to look at
    mask: Tensor | None  # (1, 1, n, s): text behind other things, all of which it sees


def slot_runs(image: Tensor, document: Tensor) -> list[int]:
    """Lengths of the runs of slots (N,) that belong to one document and to one image, or to no image."""
    code = document * (int(image.max()) + 1) + image
    return torch.unique_consecutive(code, return_counts=True)[1].tolist()


class Layout:
    """Where each modality's T tokens stand in the B x N slots (gathers, not selections), and who sees whom.

    The mask takes the cheapest form there is: none where everything is seen; a causal flag; booleans
    (B, 1, N, S + N) for short sequences; and for long ones FlexAttention's block mask on CUDA, elsewhere the
    segments of each row, which see their documents whole and need no mask but the triangle of their own text.
    """

    def __init__(self, tokens: Tokens, cache: Cache | None, config: ModelConfig, device: torch.device):
        ids = tokens.ids.flatten()
        self.shape = tokens.ids.shape
        text, image = (ids >= 0).nonzero().squeeze(1), (ids == IMAGE).nonzero().squeeze(1)
        n_text, n_image = len(text), len(image)
        self.text, self.image = text.to(device), image.to(device)  # (T_text,), (T_image,)
        self.ids = ids[text].to(device)  # (T_text,)
        self.whole = max(n_text, n_image) == ids.numel()  # one modality and no padding: nothing to move
        if not self.whole:
            # row of cat(text, image, one row of zeros) that belongs in each slot
            source = ids.new_full((ids.numel(),), n_text + n_image)
            source[text] = torch.arange(n_text)
            source[image] = torch.arange(n_text, n_text + n_image)
            self.source = source.to(device)
        cos, sin = rope_angles(tokens.position.flatten(), config)  # (B * N, 1, d/2)
        self.rope_text = cos[text].to(device), sin[text].to(device)
        self.rope_image = cos[image].to(device), sin[image].to(device)
        self.choose_mask(tokens, cache, device)

    def choose_mask(self, tokens: Tokens, cache: Cache | None, device: torch.device) -> None:
        """Set exactly one of `causal`, `mask`, `block_mask` and `segments`, or none of them."""
        self.causal, self.mask, self.block_mask, self.segments = False, None, None, None
        N, S = tokens.ids.shape[1], tokens.ids.shape[1] + (0 if cache is None else cache.document.shape[1])
        key = tokens
        if cache is not None:
            fields = ("image", "position", "document")
            key = Tokens(None, *(torch.cat((getattr(cache, f), getattr(tokens, f)), 1) for f in fields))
        if (key.document == tokens.document[:1, :1]).all() and tokens.document[0, 0] >= 0:
            # one document, no padding
            if N == 1 or (tokens.image > 0).all() and (tokens.image == tokens.image[:, :1]).all():
                return
            if cache is None and not tokens.image.any():
                self.causal = True
                return
        if N * S <= DENSE:
            mask = hybrid_mask(tokens, key)
            self.mask = None if bool(mask.all()) else mask.unsqueeze(1).to(device)  # (B, 1, N, S)
        elif device.type == "cuda":
            self.block_mask = make_block_mask(tokens, key, device)
        else:
            self.make_segments(tokens, key)

    def make_segments(self, tokens: Tokens, key: Tokens) -> None:
        """The segments of each row, and how its queries and keys are cut."""
        self.segments = []
        before = key.document.shape[1] - tokens.document.shape[1]  # slots of the cache
        for q_image, q_document, k_image, k_document in zip(
            tokens.image, tokens.document, key.image, key.document, strict=True
        ):
            old = slot_runs(k_image[:before], k_document[:before]) if before else []
            queries = slot_runs(q_image, q_document)
            keys, segments, begin = old + queries, [], 0
            starts = [sum(keys[:i]) for i in range(len(keys))]
            for i, n in enumerate(queries):
                document = q_document[begin]
                seen = [j for j in range(len(old) + i + 1) if k_document[starts[j]] == document]
                past = sum(keys[j] for j in seen) - n
                text = not q_image[begin] and document >= 0
                mask = torch.ones(1, 1, n, past + n, dtype=torch.bool).tril(past) if text and past else None
                segments.append(Segment(seen, causal=bool(text) and not past, mask=mask))
                begin += n
            self.segments.append((queries, keys, segments))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, N, d), k and v (B, K, S, d) -> (B, H, N, d), under the mask in whatever form it has."""
        if self.block_mask is not None:
            return compiled_flex()(q, k, v, block_mask=self.block_mask, enable_gqa=q.shape[1] != k.shape[1])
        if self.segments is None:
            return attention(q, k, v, self.mask, self.causal)
        rows = []
        for row, (query_runs, key_runs, segments) in enumerate(self.segments):
            # cut once with `split`: the gradient of each slice would be a tensor as large as the whole
            k_cut, v_cut = k[row : row + 1].split(key_runs, 2), v[row : row + 1].split(key_runs, 2)
            out = []
            for part, q_part in zip(segments, q[row : row + 1].split(query_runs, 2), strict=True):
                k_part = torch.cat([k_cut[j] for j in part.keys], 2)  # (1, K, s, d)
                v_part = torch.cat([v_cut[j] for j in part.keys], 2)
                mask = None if part.mask is None else part.mask.to(q.device)
                out.append(attention(q_part, k_part, v_part, mask, part.causal))
            rows.append(torch.cat(out, 2))
        return torch.cat(rows)

    def merge(self, text: Tensor | None, image: Tensor | None) -> Tensor:
        """(T_text, A, d) and (T_image, A, d) -> (B, A, N, d); zeros at padding."""
        parts = [x for x in (text, image) if x is not None]
        x = parts[0]
        if not self.whole:
            x = torch.cat(parts + [x.new_zeros(1, *x.shape[1:])]).index_select(0, self.source)
        return x.unflatten(0, self.shape).transpose(1, 2)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A, N, d) -> (T_text, A * d), (T_image, A * d): the inverse of `merge`."""
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)  # (B * N, A * d)
        if self.whole:
            return (x, x[:0]) if len(self.text) else (x[:0], x)
        return x.index_select(0, self.text), x.index_select(0, self.image)


def make_block_mask(query: Tokens, key: Tokens, device: torch.device) -> BlockMask:
    """`hybrid_mask` for FlexAttention, which skips the blocks in which nothing is seen."""
    q_image, q_position, q_document = (x.to(device) for x in (query.image, query.position, query.document))
    k_image, k_position, k_document = (x.to(device) for x in (key.image, key.position, key.document))

    def sees(b, h, i, j):
        same_image = (q_image[b, i] == k_image[b, j]) & (q_image[b, i] > 0)
        causal = k_position[b, j] <= q_position[b, i]
        return (q_document[b, i] == k_document[b, j]) & (causal | same_image)

    (B, N), S = query.document.shape, key.document.shape[1]
    return create_block_mask(sees, B, None, N, S, device=device)


@lru_cache
def compiled_flex() -> Callable:
    """FlexAttention, which is fast only when compiled."""
    return torch.compile(flex_attention, dynamic=True)


# ------------------------------------------------------------------------------------------------------------
# The model


class Block(nn.Module):
    """One layer: a text expert, an image expert, and the attention in which they meet."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.text = Expert(config)
        if config.separation == "none":  # one dense model: the very same module
            self.image = self.text
        else:
            self.image = Expert(config)
        if config.separation == "shallow":  # separate FFNs and their norms only
            self.image.input_layernorm = self.text.input_layernorm
            self.image.self_attn = self.text.self_attn
        self.heads = config.num_attention_heads, config.num_key_value_heads

    def forward(
        self,
        text: Tensor | None,
        image: Tensor | None,
        layout: Layout,
        past: tuple[Tensor, Tensor, int] | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """text (T_text, D) and image (T_image, D), or None; past keys, values (B, K, S, d) and S, or None.

        Returns both streams after the layer, and this call's own keys and values (B, K, N, d).
        """
        H, K = self.heads
        of_text = (None, None) if text is None else self.text.qkv(text, layout.rope_text)
        of_image = (None, None) if image is None else self.image.qkv(image, layout.rope_image)
        qk, v_new = map(layout.merge, of_text, of_image)  # (B, H + K, N, d), (B, K, N, d)
        q, k_new = qk.split((H, K), dim=1)
        k, v = k_new, v_new
        if past is not None:
            k, v = (
                append_slots(past[0], past[2], k_new),
                append_slots(past[1], past[2], v_new),
            )  # (B, K, S + N, d)
            if past[0].shape[2] >= k.shape[2]:  # written into the room of a cache: there it is to be found
                k_new, v_new = k[:, :, past[2] :], v[:, :, past[2] :]
        attended = layout.attend(q, k, v)  # (B, H, N, d)
        to_text, to_image = layout.split(attended)
        text = None if text is None else self.text.output(text, to_text)
        image = None if image is None else self.image.output(image, to_image)
        return text, image, k_new, v_new


@dataclass
class Hidden:
    """What the transformer made of a `Tokens`: features of each modality, and what goes into the cache."""

    text: Tensor | None  # (T_text, D), after the text final norm, in the order of the slots
    image: Tensor | None  # (T_image, D), after the image final norm
    unet: tuple | None  # h_in and the skips, for UNet-Up
    cache: Cache | None  # of these tokens alone


class LMFusion(nn.Module):
    """A frozen Qwen3, an image expert beside every layer, and a U-Net around the image stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)  # Proj_text of Eq. (5)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm_text = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Our choice: the final norm belongs to the last layer's output: separate wherever anything is.
        shared = config.separation == "none"
        self.norm_image = self.norm_text if shared else RMSNorm(config.hidden_size, config.rms_norm_eps)
        # LM-Head_text of Eq. (13)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # Our choice: *when to draw* is one more row of the head, on frozen features; see `draw_logit`.
        self.boi_head = nn.Parameter(torch.zeros(config.hidden_size))
        self.unet_down = UNetDown(config)
        self.unet_up = UNetUp(config)
        self.activation_checkpointing = False  # recompute each layer in the backward pass: less memory

    # ---- parameters ----

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
        for name, p in self.text_parameters().items():
            p.requires_grad_(not frozen and not (norm and name == "norm_text.weight"))

    @property
    def text_is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.text_parameters().values())

    @staticmethod
    def text_expert_names(config: ModelConfig) -> list[str]:
        """Names of an expert's tensors, as in Hugging Face's Qwen3 behind `model.layers.N.`."""
        with torch.device("meta"):
            return list(Expert(config).state_dict())

    def materialise(self, read: Callable[[str], Tensor], dtype: torch.dtype, device: str = "cpu") -> None:
        """Make a model of the meta device real: `read(name)` gives a text tensor, frozen; a fresh image side.

        Text tensors that have the dtype already are taken as they come, mapped from their file. A model that
        `parallel.shard` has cut gets its own slices.
        """
        text = self.text_parameters()
        if any(isinstance(p, DTensor) for p in text.values()):
            self.to_empty(device=device)
            for name, p in self.named_parameters():
                fill(p, read(name) if name in text else torch.zeros(p.shape))
        else:
            made: dict[nn.Parameter, nn.Parameter] = {}  # shared parameters stay shared
            for name, module in self.named_modules():
                for leaf, p in list(module.named_parameters(recurse=False)):
                    if p not in made:
                        full = f"{name}.{leaf}" if name else leaf
                        value = read(full).to(dtype) if full in text else torch.zeros(p.shape, dtype=dtype)
                        made[p] = nn.Parameter(value.to(device))
                    setattr(module, leaf, made[p])
        self.init_image_from_text()
        self.freeze_text()

    @torch.no_grad()
    def init_image_from_text(self) -> None:
        """Section 3.1: the image experts start as copies of the text experts; the U-Net starts afresh."""
        for block in self.layers:
            if block.image is not block.text:
                block.image.load_state_dict(block.text.state_dict())
        if self.norm_image is not self.norm_text:
            self.norm_image.load_state_dict(self.norm_text.state_dict())
        # Our choice: patches enter the residual stream as large as words do, as the copied layers expect.
        rms = full_tensor(self.embed_tokens.weight).float().pow(2).mean().sqrt().item()
        for part, kind, arguments in ((self.unet_down, UNetDown, (rms,)), (self.unet_up, UNetUp, ())):
            with torch.device("meta"):
                fresh = kind(self.config)
            fresh.to_empty(device="cpu")  # the same numbers whatever the device, and however `part` is cut
            fresh.init_weights(*arguments)
            for own, new in zip(part.parameters(), fresh.parameters(), strict=True):
                fill(own, new)

    # ---- the transformer ----

    def encode(
        self,
        tokens: Tokens,
        latents: Tensor | None = None,
        t: Tensor | None = None,
        cache: Cache | None = None,
        keep: bool = True,
    ) -> Hidden:
        """Run the transformer over `tokens`, attending to `cache` as well; the cache itself is not changed.

        latents (M, C, h, w) and timesteps t (M,): the images of `tokens`, row by row, in order. A clean image
        has t = 0. keep: return keys and values, for a cache.
        """
        layout = Layout(tokens, cache, self.config, self.boi_head.device)
        text = image = unet = None
        if len(layout.text):
            text = self.embed_tokens(layout.ids)  # Eq. (5): (T_text, D)
        if len(layout.image):
            P = self.config.num_patches
            assert latents is not None and t is not None and len(latents) * P == len(layout.image)
            h_in, skips = self.unet_down(latents.to(self.boi_head.dtype), t)  # Eq. (6): (M, P, D)
            unet = (h_in, skips, t)
            image = h_in.flatten(0, 1)  # (T_image, D)
        keys, values = [], []
        for i, block in enumerate(self.layers):
            past = None if cache is None else (cache.k[i], cache.v[i], cache.length)
            if self.activation_checkpointing and torch.is_grad_enabled():
                text, image, k, v = checkpoint(block, text, image, layout, past, use_reentrant=False)
            else:
                text, image, k, v = block(text, image, layout, past)
            if keep:
                keys.append(k)
                values.append(v)
        text = None if text is None else self.norm_text(text)
        image = None if image is None else self.norm_image(image)
        cache = Cache(keys, values, tokens.image, tokens.position, tokens.document) if keep else None
        return Hidden(text, image, unet, cache)

    def logits(self, text: Tensor) -> Tensor:
        """Eq. (13): text features (..., D) -> logits over the vocabulary (..., V)."""
        return self.lm_head(text)

    def draw_logit(self, text: Tensor) -> Tensor:
        """Log-odds (...) that an image starts next, from text features (..., D).

        This is the extra head row for BOI: with logit_BOI = logsumexp(all other logits) + draw_logit, the
        softmax over the vocabulary and BOI gives BOI the probability sigmoid(draw_logit). Written so, it is
        trained without a projection to the vocabulary, and in text-only mode it is simply absent.
        """
        return text.detach() @ self.boi_head

    def unet_output(self, hidden: Hidden, which: Tensor | None = None) -> Tensor:
        """Eq. (14): image features -> F (M, C, h, w), float32, of all images or of some (their numbers).

        See `Diffusion.eps_from_output`.
        """
        h_in, skips, t = hidden.unet
        image = hidden.image.view_as(h_in)
        if which is not None:
            image, h_in, t, skips = image[which], h_in[which], t[which], [s[which] for s in skips]
        return self.unet_up(image, t, h_in, skips).float()

    def text_logits(self, ids: Tensor) -> Tensor:
        """The frozen language model alone: ids (B, N) -> logits (B, N, V)."""
        if ids.dim() != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must be (B, N) with N >= 1, not {tuple(ids.shape)}")
        bad = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if len(bad):
            raise ValueError(f"ids hold {bad[0].item()}; the vocabulary is 0 .. {self.config.vocab_size - 1}")
        return self.logits(self.encode(Tokens.text(ids)).text).unflatten(0, tuple(ids.shape))

    def forward(
        self, prefix: Tokens | None, rest: Tokens, latents: Tensor, t: Tensor
    ) -> tuple[Hidden | None, Hidden]:
        """Read a batch in two phases, and return the features of both.

        *Prefill*: `prefix` holds the text that precedes every image of its sequence. With frozen text no
        gradient can reach it, so it runs without a graph and leaves only keys and values. *Decode*: `rest`
        holds everything from the first image on and attends to them. A caption behind an image sends its loss
        through the frozen text layers to the image's keys and values: frozen is not detached.
        """
        # the class's own `encode`, not the one that `parallel.shard` wraps: weights are gathered already
        before, encode = None, partial(LMFusion.encode, self)
        if prefix is not None and prefix.ids.shape[1]:  # no column where every sequence begins with its image
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.text_is_frozen):
                before = encode(prefix)
        return before, encode(rest, latents, t, before.cache if before else None, keep=False)


def replace(config: ModelConfig, **changes) -> ModelConfig:
    """A configuration with some fields changed; an unknown name is an error that lists the choices."""
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    unknown = sorted(set(changes) - set(names))
    if unknown:
        raise ValueError(f"no such field of the model: {', '.join(unknown)}; choose from {', '.join(names)}")
    return dataclasses.replace(config, **changes)
