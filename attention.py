"""Who sees whom, and the one softmax in which text and images meet (Eq. 9, 10 of the paper).

`hybrid_mask` is the paper's M: text looks back, the patches of one image see one another. `attention` is the
softmax. `Tokens` says what stands in each slot, `Cache` holds keys and values already read, and `Layout`
gathers each modality for its expert and gives the mask its cheapest form.

Shapes: B batch, N slots of a sequence, S slots that can be seen, T tokens of one modality in the whole batch,
H query heads, K key/value heads, d head_dim, P patches of an image; A heads of whatever kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from scale.cuda import Gather, compiled, make_block_mask, send

if TYPE_CHECKING:
    from vision import Seen

IMAGE, PAD = -1, -2  # what stands in `Tokens.ids` where there is no text token
DENSE = 2**19  # up to this many scores a head and row, the mask is made in full
SLOTS = ("image", "position", "document", "mrope")  # what is known of a slot, in `Tokens` and in `Cache`
WRITTEN_OUT = (2**20, 2**17)  # likewise, attention is written out on a CPU: in bfloat16 and in float32


def hybrid_mask(query: Tokens, key: Tokens | Cache) -> Tensor:
    """M of Eq. (9, 10) as booleans (B, N, S): may slot i of `query` see slot j of `key`?

    True iff both belong to one document, and j does not come after i or both are patches of one image.
    Padding is a document of its own, so that no row of the softmax is empty and nothing else sees it.
    """
    same_document = query.document[:, :, None] == key.document[:, None, :]
    causal = key.position[:, None, :] <= query.position[:, :, None]
    same_image = (query.image[:, :, None] == key.image[:, None, :]) & (query.image[:, :, None] > 0)
    return same_document & (causal | same_image)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Eq. (9, 10): q (B, H, N, d), k and v (B, K, S, d) -> (B, H, N, d), one softmax for both modalities.

    mask (B, 1, N, S), or (B, 1, 1, S) where all queries see the same, is True where M is 0 and False where it
    is -infinity; None if nothing is masked, and `causal` if the N = S tokens only look back. Query head i
    shares key/value head i // (H/K). The paper writes M inside the division by sqrt(d), which makes no
    difference to 0 and -infinity.
    """
    (B, H, N, d), (K, S) = q.shape, k.shape[1:3]
    if q.device.type == "cuda" or N * S > WRITTEN_OUT[q.dtype == torch.float32]:
        if causal:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
        # The query heads of a group as so many more queries of its key/value head: of the fused kernels, none
        # takes a mask and heads that share keys at once.
        if mask is not None and H != K and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, H // K, 1)
        q = q.unflatten(1, (K, H // K)).reshape(B, K, H // K * N, d)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(B, H, N, d)
    # Short sequences on a CPU: two batched products, up to several times faster than torch's fused kernel.
    if causal:
        mask = torch.ones(N, S, dtype=torch.bool, device=q.device).tril()
    # the query heads of a group one below the other: (B * K, H/K * N, d)
    q = (q * d**-0.5).unflatten(1, (K, H // K)).reshape(B * K, H // K * N, d)
    scores = torch.bmm(q, k.reshape(B * K, S, d).transpose(1, 2))  # (B * K, H/K * N, S)
    if mask is not None:
        scores = scores.view(B, H, N, S).masked_fill(~mask, -torch.inf).view(B * K, H // K * N, S)
    return torch.bmm(scores.softmax(-1), v.reshape(B * K, S, d)).view(B, H, N, d)


@dataclass
class Tokens:
    """A rectangle of slots for the transformer to process: B sequences, N slots each, padded on the right.

    It is a plan, and stays in main memory whatever the device of the model.

    ids        (B, N)  id of a text token, IMAGE where a patch stands, PAD where nothing does
    image      (B, N)  number of the image within its sequence, from 1, in order; 0 at text and padding
    position   (B, N)  place within the document, patches in row-major order; RoPE's too, but for `mrope`
    document   (B, N)  tokens see only their own document; -1 at padding
    mrope   (B, N, 3)  where pictures are shown to Qwen3-VL: see `rope_positions`; 0 elsewhere
    loss_mask  (B, N)  of a conversation: whether the model is to say this token; None: all of them
    seen               pictures shown, at the slots `shown` (n,) of the B * N: see `show`
    """

    ids: Tensor
    image: Tensor
    position: Tensor
    document: Tensor
    mrope: Tensor | None = None
    loss_mask: Tensor | None = None
    seen: Sequence[Seen] = ()
    shown: Tensor | None = None

    def __post_init__(self):
        if self.mrope is None:
            self.mrope = torch.zeros(*self.document.shape, 3, dtype=torch.long)

    def show(self, seen: Sequence[Seen]) -> Tokens:
        """With pictures shown at the placeholders, row by row in order; ValueError if they do not fit there.

        Placeholders are text: causal, read by the text experts, whatever is shown.
        """
        if not seen:
            return self
        slots = (self.ids.flatten() == seen[0].placeholder_id).nonzero().squeeze(1)  # (n,)
        sizes, N = [len(s.features) for s in seen], self.ids.shape[1]
        runs = slots.split(sizes) if len(slots) == sum(sizes) else ()
        if not runs or any(r[-1] - r[0] >= len(r) or r[0] // N != r[-1] // N for r in runs):
            wanted = " and ".join(map(str, sizes))
            raise ValueError(f"{len(slots)} placeholders in the text; its pictures take {wanted} in a row")
        mrope = self.mrope.flatten(0, 1).index_copy(0, slots, torch.cat([s.mrope for s in seen]))
        return dataclasses.replace(self, mrope=mrope.view_as(self.mrope), seen=seen, shown=slots)

    def slots(self, n: int) -> Tokens:
        """The first n slots of each row."""
        return Tokens(*(x[:, :n] for x in (self.ids, self.image, self.position, self.document)))

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

        `start` and `images_before`: how many positions and images an earlier part of each row took.
        """
        each = [[x] for x in start] if start else None
        return Tokens.packed([[row] for row in rows], num_patches, each, images_before)

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
        table = []  # of each row, its slots: id, image, position, document, loss mask
        for r, documents in enumerate(rows):
            slots: list[tuple[int, int, int, int, bool]] = []
            for d, ids in enumerate(documents):
                position, images = start[r][d] if start else 0, images_before[r] if images_before else 0
                for i, own in zip(ids, loss_mask[r][d] if loss_mask else [True] * len(ids), strict=True):
                    n = num_patches if i == IMAGE else 1
                    images += i == IMAGE
                    number = images if i == IMAGE else 0
                    slots += [(i, number, p, d, own) for p in range(position, position + n)]
                    position += n
            table.append(slots)
        width = max(map(len, table))
        for slots in table:  # padding, on the right
            end = slots[-1][2] + 1 if slots else 0
            slots += [(PAD, 0, end + i, -1, False) for i in range(width - len(slots))]
        *parts, own = (
            torch.tensor([[slot[c] for slot in slots] for slots in table], dtype=torch.long) for c in range(5)
        )  # (B, N) each
        return Tokens(*parts, loss_mask=own.bool() if loss_mask else None)


@dataclass
class Cache:
    """Keys and values (B, K, S, d) of each layer for S slots already read, and what the mask needs."""

    k: list[Tensor]  # behind the S slots there may be room for more
    v: list[Tensor]
    image: Tensor  # (B, S), and the next three: in main memory
    position: Tensor  # (B, S)
    document: Tensor  # (B, S)
    mrope: Tensor | None = None  # (B, S, 3)

    __post_init__ = Tokens.__post_init__  # zeros, if not given

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
            k = [append_slots(a, S, b)[0] for a, b in zip(k, new.k, strict=True)]
            v = [append_slots(a, S, b)[0] for a, b in zip(v, new.v, strict=True)]
            if self.room >= new.length:
                k, v = self.k, self.v
        return Cache(k, v, *seen_slots(self, new))

    def keep(self, n: int) -> Cache:
        """The first n slots; the others become room."""
        return Cache(self.k, self.v, *(getattr(self, f)[:, :n] for f in SLOTS))

    def stack(self, other: Cache) -> Cache:
        """The sequences of both, padded on the right."""
        S = max(self.length, other.length)

        def both(a: Tensor, b: Tensor, dim: int = 1, value: int = 0) -> Tensor:
            """Two tensors with the slots along `dim` as one; what is filled in is `value`."""
            out = a.new_full((len(a) + len(b), *a.shape[1:dim], S, *a.shape[dim + 1 :]), value)
            out[: len(a)].narrow(dim, 0, self.length).copy_(a.narrow(dim, 0, self.length))
            out[len(a) :].narrow(dim, 0, other.length).copy_(b.narrow(dim, 0, other.length))
            return out

        k = [both(a, b, 2) for a, b in zip(self.k, other.k, strict=True)]
        v = [both(a, b, 2) for a, b in zip(self.v, other.v, strict=True)]
        slots = {f: both(getattr(self, f), getattr(other, f), value=-(f == "document")) for f in SLOTS}
        return Cache(k, v, **slots)

    def rows(self, index: Tensor) -> Cache:
        """The sequences `index`, in that order; one may come up several times."""
        index = index.cpu()
        k, v = ([x[index.to(x.device)] for x in xs] for xs in (self.k, self.v))
        return Cache(k, v, *(getattr(self, f)[index] for f in SLOTS))


def append_slots(past: Tensor, length: int, new: Tensor) -> tuple[Tensor, Tensor]:
    """Past keys or values, of which the first `length` slots count, and new ones: (B, K, S + N, d).

    Where there is room behind the past (`Cache.reserve`) the new ones are written there; else all is copied.
    Also returns the new ones (B, K, N, d), where they are to be found now.
    """
    end = length + new.shape[2]
    if past.shape[2] < end:
        return torch.cat((past[:, :, :length], new), dim=2), new
    past[:, :, length:end] = new
    return past[:, :, :end], past[:, :, length:end]


def seen_slots(past: Tokens | Cache, new: Tokens | Cache) -> tuple[Tensor, ...]:
    """SLOTS of a cache and of what stands behind it: (B, S + N) each, mrope (B, S + N, 3)."""
    return tuple(torch.cat((getattr(past, f), getattr(new, f)), dim=1) for f in SLOTS)


def rope_positions(tokens: Tokens, past: Tokens | Cache | None) -> Tensor:
    """RoPE positions (B * N,) of tokens; (B * N, 3) if they or the past hold pictures shown to Qwen3-VL.

    It counts time, row and column. Text has three equal ones. All n placeholders of a picture have the time t
    of the first; their row and column count from t as well. What comes behind goes on at the largest + 1.
    `mrope` holds 1 - (how far time moves on at this slot), row and column within the picture.
    """
    key = tokens if past is None else Tokens(None, *seen_slots(past, tokens))
    if not key.mrope.any():
        return tokens.position.flatten()
    saved, lag = key.mrope[..., 0], torch.zeros_like(key.document)
    for document in key.document.unique():
        own = key.document == document
        lag += own * ((saved * own).cumsum(1) - saved)  # what earlier slots of the document saved
    time = (tokens.position - lag[:, -tokens.ids.shape[1] :])[..., None]
    return (time + F.pad(tokens.mrope[..., 1:], (1, 0))).flatten(0, 1)


# ---- The modalities apart, and together under the mask ----


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

    The mask takes the cheapest form there is; at most one of these is set.

    causal      Unpacked text with nothing before it: a flag, and the kernel draws the triangle itself.
    mask        Few slots: `hybrid_mask` as it is, (B, 1, N, S). Patches of one image a row, while it is
                denoised, all see the same: (B, 1, 1, S).
    block_mask  Many slots on CUDA: FlexAttention evaluates the rule in its kernel and skips empty blocks.
    segments    Many slots elsewhere: each image and each run of text attends to just the runs that it sees.
    none        Every query sees every slot: one token behind its past, or one image behind its text.
    """

    def __init__(
        self, tokens: Tokens, past: Tokens | Cache | None, device: torch.device, rope: Callable[..., tuple]
    ):
        """`past`: what was read before. rope(positions (T,)) -> cosines and sines (T, 1, d/2) of RoPE."""
        ids, position = tokens.ids.flatten(), rope_positions(tokens, past)
        self.shape = tokens.ids.shape
        text, image = (ids >= 0).nonzero().squeeze(1), (ids == IMAGE).nonzero().squeeze(1)
        n_text, n_image = len(text), len(image)
        self.text, self.image = send(text, device), send(image, device)  # (T_text,), (T_image,)
        self.ids = send(ids[text], device)  # (T_text,)
        # (n,): which of the T_text are placeholders of pictures
        self.shown = send(torch.searchsorted(text, tokens.shown), device) if tokens.seen else None
        self.whole = max(n_text, n_image) == ids.numel()  # one modality and no padding: nothing to move
        if not self.whole:
            self.slots = send(torch.cat((text, image)), device)  # (T_text + T_image,)
        self.rope_text = rope(send(position[text], device))  # (T_text, 1, d/2) each
        self.rope_image = rope(send(position[image], device))  # (T_image, 1, d/2) each
        self.choose_mask(tokens, past, device)

    def choose_mask(self, tokens: Tokens, past: Tokens | Cache | None, device: torch.device) -> None:
        """Set one of `causal`, `mask`, `block_mask` and `segments`, or none of them."""
        self.causal, self.mask, self.block_mask, self.segments = False, None, None, None
        key = tokens if past is None else Tokens(None, *seen_slots(past, tokens))
        N, S = tokens.ids.shape[1], key.document.shape[1]
        one = (tokens.image == tokens.image[:, :1]) & (tokens.document == tokens.document[:, :1])
        alike = N == 1 or bool((one & (tokens.image > 0)).all())  # all queries of a row see the same
        if tokens.document[0, 0] >= 0 and (key.document == tokens.document[:1, :1]).all():
            # one document, no padding
            if alike:
                return
            if past is None and not tokens.image.any():
                self.causal = True
                return
        if alike or N * S <= DENSE:
            mask = hybrid_mask(tokens.slots(1) if alike else tokens, key)
            self.mask = None if bool(mask.all()) else send(mask.unsqueeze(1), device)  # (B, 1, N or 1, S)
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
            keys, segments = old + queries, []
            starts = [0, *accumulate(keys)]
            for i, n in enumerate(queries, start=len(old)):
                document, image = k_document[starts[i]], k_image[starts[i]]
                seen = [j for j in range(i + 1) if k_document[starts[j]] == document]
                past = sum(keys[j] for j in seen) - n
                text = bool(document >= 0 and not image)
                mask = torch.ones(1, 1, n, past + n, dtype=torch.bool).tril(past) if text and past else None
                segments.append(Segment(seen, causal=text and not past, mask=mask))
            self.segments.append((queries, keys, segments))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, N, d), k and v (B, K, S, d) -> (B, H, N, d), under the mask in whatever form it has."""
        if self.block_mask is not None:
            gqa = q.shape[1] != k.shape[1]  # FlexAttention is fast only when compiled
            return compiled(flex_attention)(q, k, v, block_mask=self.block_mask, enable_gqa=gqa)
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
        x = torch.cat([x for x in (text, image) if x is not None])
        if not self.whole:
            x = x.new_zeros(self.shape.numel(), *x.shape[1:]).index_copy_(0, self.slots, x)
        return x.unflatten(0, self.shape).transpose(1, 2)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, A, N, d) -> (T_text, A * d), (T_image, A * d): the inverse of `merge`."""
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)  # (B * N, A * d)
        if self.whole:
            return (x, x[:0]) if len(self.text) else (x[:0], x)
        return Gather.apply(x, self.slots).tensor_split((len(self.text),))
