"""attention.py: who sees whom in every form of the mask, packing, and caching.

Every model here has all its parameters perturbed (see conftest.py). Where two ways of computing must agree,
it has float64 weights: what is left is rounding below 1e-6, and a wrong rule is off by far more. A sequence
is a list of token ids in which IMAGE stands for one whole image, as in `Tokens.rows`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sequences import (
    BOI,
    EOI,
    RAGGED,
    SEPARATIONS,
    STORY,
    TOLERANCE,
    brute_force_mask,
    count_images,
    draw,
    features,
    in_phases,
    pack,
    to_slots,
    with_gradient,
)
from torch import Tensor
from torch.nn.attention import flex_attention as flex_file
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode

import attention as attention_file
from attention import IMAGE, PAD, Cache, Gather, Layout, Tokens, attention, hybrid_mask, make_block_mask
from model import LMFusion, ModelConfig, rope_angles


def make_layout(tokens: Tokens, cache: Cache | None, config: ModelConfig) -> Layout:
    return Layout(tokens, cache, torch.device("cpu"), partial(rope_angles, config=config))


def test_the_mask_of_a_worked_example():
    tokens = Tokens.rows([[5, BOI, IMAGE, EOI, IMAGE, 6]], num_patches=2)
    expected = [
        "X.......",  # text
        "XX......",  # BOI is text: it does not see its image
        "XXXX....",  # first patch sees the second
        "XXXX....",
        "XXXXX...",  # EOI sees the image
        "XXXXXXX.",  # the next image: its own block, not the text after it
        "XXXXXXX.",
        "XXXXXXXX",
    ]
    assert ["".join("X" if x else "." for x in row) for row in hybrid_mask(tokens, tokens)[0]] == expected


ROWS = {
    "text": [5, 6, 7],
    "one image": [5, BOI, IMAGE, EOI, 6],
    "image alone": [IMAGE],
    "two images that touch": [5, BOI, IMAGE, IMAGE, EOI, 6],
    "two images with EOI BOI between": [BOI, IMAGE, EOI, BOI, IMAGE, EOI],
    "three images": STORY,
    "nothing": [],
}


@pytest.mark.parametrize("num_patches", (1, 4))
@pytest.mark.parametrize("name", ROWS)
def test_the_mask_equals_the_rule_slot_by_slot_with_padding(name, num_patches):
    width = 30
    for padding_row in ([5] * width, [IMAGE] * (28 // num_patches) + [5] * 2):  # the other row sets the width
        tokens = Tokens.rows([ROWS[name], padding_row], num_patches)
        mask = hybrid_mask(tokens, tokens)
        for b, row in enumerate((ROWS[name], padding_row)):
            assert torch.equal(mask[b], brute_force_mask([row], num_patches, width))
        assert mask.any(2).all()  # no empty row: its softmax would be NaN


@pytest.mark.parametrize("restart", (True, False), ids=("positions restart", "positions go on"))
@pytest.mark.parametrize(
    "pair",
    [
        ("one image", "two images that touch"),
        ("two images that touch", "image alone"),
        ("image alone", "image alone"),
        ("text", "three images"),
        ("three images", "text"),
    ],
)
def test_packed_documents_do_not_see_each_other(pair, restart):
    documents, width = [ROWS[name] for name in pair], 40
    tokens = pack(documents, 3, width, restart)
    mask = hybrid_mask(tokens, tokens)[0]
    assert torch.equal(mask, brute_force_mask(documents, 3, width))
    assert mask.any(1).all()


@pytest.mark.parametrize("cut", range(1, len(STORY)))
def test_the_mask_towards_a_cache_is_a_part_of_the_whole_mask(cut):
    P = 3
    first, second = STORY[:cut], STORY[cut:]
    prefix = Tokens.rows([first], P)
    rest = Tokens.rows([second], P, start=[prefix.ids.shape[1]], images_before=[count_images(first)])
    cache = Cache([], [], prefix.image, prefix.position, prefix.document)
    mask = torch.cat((hybrid_mask(rest, cache), hybrid_mask(rest, rest)), dim=2)[0]
    whole = brute_force_mask([STORY], P, mask.shape[1])
    assert torch.equal(mask, whole[prefix.ids.shape[1] :])


def test_padding_is_finite_inside_the_cache(make_model):
    model = make_model()
    hidden = model.encode(Tokens.rows([[5], [5] * 9, []], model.config.num_patches))
    assert all(x.isfinite().all() for x in (hidden.text, *hidden.cache.k, *hidden.cache.v))


def test_packed_documents_give_what_they_give_alone(make_model):
    model = make_model(dtype=torch.float64)
    P = model.config.num_patches
    documents = [[5, BOI, IMAGE, EOI, 6], [7, 8, BOI, IMAGE, IMAGE]]
    latents, t = draw(model, 3)
    for restart in (True, False):  # RoPE tells only distances
        tokens = pack(documents, P, 4 * P, restart)
        with torch.no_grad():
            packed = to_slots(model.encode(tokens, latents, t), tokens)[0]
        parts = (
            features(model, documents[:1], latents[:1], t[:1])[0],
            features(model, documents[1:], latents[1:], t[1:])[0],
        )
        expected = torch.cat(parts)
        torch.testing.assert_close(packed[: len(expected)], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def encode_in_parts(model: LMFusion, row: list[int], cuts: list[int], latents: Tensor, t: Tensor) -> Tensor:
    """Features (N, D) of one sequence, read part by part against a growing cache."""
    cache, out, slots, images = None, [], 0, 0
    for a, b in zip([0, *cuts], [*cuts, len(row)], strict=True):
        part = row[a:b]
        tokens = Tokens.rows([part], model.config.num_patches, start=[slots], images_before=[images])
        here = slice(images, images + count_images(part))
        hidden = model.encode(tokens, latents[here], t[here], cache)
        out.append(to_slots(hidden, tokens)[0])
        cache = hidden.cache if cache is None else cache.extend(hidden.cache)
        slots, images = slots + tokens.ids.shape[1], here.stop
    return torch.cat(out)


CUTS = [[1], [3], [4], [6], [8], [9], [11], [3, 8], [2, 4, 5, 9, 10], list(range(1, len(STORY)))]


@SEPARATIONS
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_cached_equals_uncached_however_the_sequence_is_cut(make_model, separation, cuts):
    model = make_model(separation=separation, dtype=torch.float64)
    latents, t = draw(model, 3)
    whole = features(model, [STORY], latents, t)[0]
    parts = encode_in_parts(model, STORY, cuts, latents, t)
    torch.testing.assert_close(parts, whole, **TOLERANCE)
    text = torch.tensor([i != IMAGE for i in STORY]).repeat_interleave(
        torch.tensor([model.config.num_patches if i == IMAGE else 1 for i in STORY])
    )
    with torch.no_grad():
        torch.testing.assert_close(model.logits(parts[text]), model.logits(whole[text]), **TOLERANCE)


def test_a_ragged_batch_equals_its_sequences_one_by_one(make_model):
    model = make_model(dtype=torch.float64)
    rows = [*RAGGED, [5, 6, 7]]  # one without an image
    latents, t = draw(model, sum(map(count_images, rows)))
    batch = features(model, rows, latents, t)
    first = 0
    for b, row in enumerate(rows):
        here = slice(first, first + count_images(row))
        alone = features(model, [row], latents[here], t[here])[0]
        torch.testing.assert_close(batch[b, : len(alone)], alone, **TOLERANCE)
        first = here.stop


def test_a_ragged_batch_read_in_ragged_parts_equals_its_sequences_one_by_one(make_model):
    """Padding in the middle of a growing cache belongs to nobody."""
    model = make_model(dtype=torch.float64)
    P = model.config.num_patches
    parts = [
        [[5, BOI], [6, 7, 8, 9, BOI, IMAGE]],
        [[IMAGE, EOI, 4], [EOI]],
        [[BOI, IMAGE, IMAGE], [6]],
        [[EOI, 7], [BOI, IMAGE, EOI, 5]],
    ]
    used, images, cache = [0, 0], [0, 0], None
    rows: list[list[int]] = [[], []]
    latents, t = draw(model, 5)
    mine = [[1, 2, 3], [0, 4]]  # which of the five images are whose, in the order in which they are read
    drawn, out = 0, [[], []]
    with torch.no_grad():
        for part in parts:
            tokens = Tokens.rows(part, P, start=used, images_before=images)
            here = slice(drawn, drawn + sum(map(count_images, part)))
            hidden = model.encode(tokens, latents[here], t[here], cache)
            cache = hidden.cache if cache is None else cache.extend(hidden.cache)
            drawn, slots = here.stop, to_slots(hidden, tokens)
            for b, row in enumerate(part):
                length = len(row) + (P - 1) * count_images(row)
                out[b].append(slots[b, :length])
                rows[b] += row
                used[b] += length
                images[b] += count_images(row)
    for b in range(2):
        alone = features(model, [rows[b]], latents[mine[b]], t[mine[b]])[0]
        torch.testing.assert_close(torch.cat(out[b]), alone, **TOLERANCE)


def clone_cache(cache: Cache) -> Cache:
    return Cache(
        [x.clone() for x in cache.k],
        [x.clone() for x in cache.v],
        cache.image.clone(),
        cache.position.clone(),
        cache.document.clone(),
    )


def assert_same_cache(a: Cache, b: Cache) -> None:
    pairs = zip(
        [*a.k, *a.v, a.image, a.position, a.document],
        [*b.k, *b.v, b.image, b.position, b.document],
        strict=True,
    )
    assert all(torch.equal(x, y) for x, y in pairs)


@torch.no_grad()
def test_extend_rows_and_encode_leave_the_cache_they_are_given_as_it_is(make_model):
    model = make_model()
    P = model.config.num_patches
    cache = model.encode(Tokens.rows([[5, 6, 7], [8]], P)).cache
    new = Tokens.rows([[9, IMAGE], [9, IMAGE]], P, start=[3, 1])
    saved = clone_cache(cache)
    hidden = model.encode(new, *draw(model, 2), cache)
    assert_same_cache(cache, saved)
    saved_new = clone_cache(hidden.cache)
    longer = cache.extend(hidden.cache)
    picked = longer.rows(torch.tensor([1, 0, 1]))
    for tensor in (*longer.k, *longer.v, *picked.k, *picked.v, longer.image, picked.position):
        tensor.add_(1)  # what comes out shares no memory with what went in
    assert_same_cache(cache, saved)
    assert_same_cache(hidden.cache, saved_new)
    assert hidden.cache.k[0].shape == (2, model.config.num_key_value_heads, 1 + P, model.config.head_dim)


@torch.no_grad()
def test_rows_of_a_cache_serve_several_continuations(make_model):
    """One prompt, three pictures; and the sequences of a batch in another order."""
    model = make_model(dtype=torch.float64)
    P = model.config.num_patches
    prompts = [[5, 6, BOI], [7, BOI]]
    cache = model.encode(Tokens.rows(prompts, P)).cache
    index = [1, 0, 1]
    latents, t = draw(model, 3)
    tokens = Tokens.rows([[IMAGE]] * 3, P, start=[len(prompts[i]) for i in index])
    hidden = model.encode(tokens, latents, t, cache.rows(torch.tensor(index)))
    for m, i in enumerate(index):
        alone = features(model, [[*prompts[i], IMAGE]], latents[m : m + 1], t[m : m + 1])[0]
        torch.testing.assert_close(hidden.image.unflatten(0, (3, P))[m], alone[-P:], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("room", (1, 5, 100))
def test_a_cache_with_room_gives_what_one_without_gives(make_model, room):
    """Text, an image denoised in several steps that are not kept, the image itself, and text again."""
    model = make_model(dtype=torch.float64)
    P, latents = model.config.num_patches, draw(model, 2)[0]
    plain = roomy = model.encode(Tokens.rows([[5, 6, BOI], [7, 8, BOI]], P)).cache
    roomy = roomy.reserve(room)
    assert roomy.room == room and plain.room == 0
    image = Tokens.rows([[IMAGE], [IMAGE]], P, start=[3, 3])
    for step in (900, 500, 0):
        t = torch.full((2,), step)
        one, other = model.encode(image, latents, t, plain), model.encode(image, latents, t, roomy)
        assert torch.equal(one.image, other.image)
    plain, roomy = plain.extend(one.cache), roomy.extend(other.cache)
    for word in (9, 10, 11):
        if not roomy.room:
            roomy = roomy.reserve(2)
        tokens = Tokens.text(torch.full((2, 1), word), start=plain.length)
        one, other = model.encode(tokens, cache=plain), model.encode(tokens, cache=roomy)
        assert torch.equal(one.text, other.text)
        plain, roomy = plain.extend(one.cache), roomy.extend(other.cache)
    assert roomy.length == plain.length and torch.equal(plain.position, roomy.position)
    for a, b in zip(plain.k + plain.v, roomy.k + roomy.v, strict=True):
        assert torch.equal(a, b[:, :, : roomy.length])


@pytest.mark.parametrize("heads", ((4, 4), (4, 2), (6, 1)), ids=("MHA", "GQA", "MQA"))
@pytest.mark.parametrize(("N", "S"), ((1, 1), (1, 9), (7, 7), (5, 12), (257, 260)))
def test_attention_equals_torchs_scaled_dot_product_attention(heads, N, S):
    generator = torch.Generator().manual_seed(N * S)
    (H, K), B, d = heads, 3, 8
    q, k, v = (
        torch.randn(B, n, h, d, generator=generator).transpose(1, 2) for n, h in ((N, H), (S, K), (S, K))
    )
    mask = torch.rand(B, 1, N, S, generator=generator) < 0.5
    mask[..., 0] |= ~mask.any(-1)
    for m in (mask, mask & (torch.arange(S) <= torch.arange(N)[:, None]) | (torch.arange(S) == 0), None):
        each = [x.repeat_interleave(H // K, dim=1) for x in (k, v)]  # a key/value head for each query head
        expected = F.scaled_dot_product_attention(q, *each, attn_mask=m)
        torch.testing.assert_close(attention(q, k, v, m), expected, **TOLERANCE)


def test_both_ways_of_computing_attention_are_taken(monkeypatch):
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention_file.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or fused(*a, **k)
    )
    for n, expected in ((362, 0), (363, 1)):  # 362² <= 2^17 < 363²
        x = torch.randn(1, 1, n, 4)
        attention(x, x, x, None)
        assert len(calls) == expected


def test_attention_takes_what_a_kernel_leaves_in_another_order(monkeypatch):
    """Those of GPUs lay the heads of a token side by side in memory."""
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    wanted, fused = attention(q, k, v), F.scaled_dot_product_attention

    def kernel(*args, **kwargs):
        return fused(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(attention_file.F, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(attention_file, "WRITTEN_OUT", (0, 0))
    torch.testing.assert_close(attention(q, k, v), wanted, **TOLERANCE)


def test_gathered_rows_and_their_gradient_are_those_of_index_select():
    x, index = torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True), torch.tensor([7, 0, 4, 8])
    assert torch.equal(Gather.apply(x, index), x.index_select(0, index))
    weight = torch.randn(4, 2, 3, dtype=torch.float64)
    wanted = torch.autograd.grad((x.index_select(0, index) * weight).sum(), x)[0]
    assert torch.equal(torch.autograd.grad((Gather.apply(x, index) * weight).sum(), x)[0], wanted)
    assert torch.autograd.gradcheck(lambda x: Gather.apply(x, index), x)


def test_attention_has_the_gradients_of_torchs(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, h, 6, 8, generator=generator).requires_grad_() for h in (4, 2, 2)]
    mask = torch.rand(2, 1, 6, 6, generator=generator) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    weight = torch.randn(2, 4, 6, 8, generator=generator)
    ours = torch.autograd.grad((attention(*inputs, mask) * weight).sum(), inputs)
    q, k, v = inputs
    out = F.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask
    )
    for a, b in zip(ours, torch.autograd.grad((out * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


SLOTS = ("ids", "image", "position", "document")


def assert_same_tokens(a: Tokens, b: Tokens) -> None:
    assert a.loss_mask is b.loss_mask is None
    for name in SLOTS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("num_patches", (1, 4))
def test_one_document_a_row_packed_is_rows(num_patches):
    for rows in (RAGGED, [STORY], [[], [5]], [[IMAGE], [5, 6]], [[]]):
        packed = Tokens.packed([[row] for row in rows], num_patches)
        assert_same_tokens(packed, Tokens.rows(rows, num_patches))
        n = len(rows)
        start, before = list(range(3, 3 + n)), list(range(n))
        packed = Tokens.packed([[r] for r in rows], num_patches, [[x] for x in start], before)
        assert_same_tokens(packed, Tokens.rows(rows, num_patches, start, before))


def test_packed_lays_documents_out_as_documented():
    tokens = Tokens.packed(
        [[[5, IMAGE], [IMAGE, IMAGE, 6], [7]], [[8, 9]], [[], [IMAGE], []]],
        num_patches=2,
        start=[[0, 10, 3], [4], [0, 6, 0]],
        images_before=[0, 1, 2],
    )
    gone = [PAD] * 7
    assert tokens.ids.tolist() == [[5, -1, -1, -1, -1, -1, -1, 6, 7], [8, 9, *gone], [-1, -1, *gone]]
    assert tokens.image.tolist() == [[0, 1, 1, 1, 1, 2, 2, 0, 0], [0] * 9, [3, 3] + [0] * 7]
    assert tokens.position[0].tolist() == [0, 1, 2, 10, 11, 12, 13, 14, 3]
    assert tokens.position[1].tolist() == list(range(4, 13)) and tokens.position[2, :2].tolist() == [6, 7]
    assert tokens.document.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 0] + [-1] * 7, [1, 1] + [-1] * 7]


def test_packed_says_of_every_slot_whose_it_is():
    rows = [[[5, IMAGE, 6], [7], [IMAGE]], [[8, 9]], [[]]]
    loss_mask = [[[False, True, True], [True], [False]], [[True, False]], [[]]]
    start, before = [[4, 0, 2], [1], [0]], [1, 0, 5]
    tokens = Tokens.packed(rows, 2, start, before, loss_mask)
    assert tokens.loss_mask.dtype == torch.bool
    assert tokens.loss_mask.int().tolist() == [
        [0, 1, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],  # padding is nobody's
        [0] * 7,
    ]
    plain = Tokens.packed(rows, 2, start, before)
    assert plain.loss_mask is None
    for name in SLOTS:
        assert torch.equal(getattr(tokens, name), getattr(plain, name)), name
    with pytest.raises(ValueError):
        Tokens.packed([[[5, 6]]], 2, loss_mask=[[[True]]])


def test_whose_a_token_is_changes_nothing_that_the_model_computes(make_model):
    model = make_model()
    loss_mask = [[[i % 2 == 0 for i in range(len(row))]] for row in RAGGED]
    latents, t = draw(model, sum(map(count_images, RAGGED)))
    plain, own = (
        Tokens.packed([[row] for row in RAGGED], model.config.num_patches, loss_mask=x)
        for x in (None, loss_mask)
    )
    with torch.no_grad():
        a, b = (model.encode(tokens, latents, t) for tokens in (plain, own))
    assert torch.equal(a.text, b.text) and torch.equal(a.image, b.image)
    assert torch.equal(hybrid_mask(plain, plain), hybrid_mask(own, own))


def test_packed_equals_a_loop_over_the_documents():
    rng = random.Random(0)
    for _ in range(50):
        documents = [random_document(rng) for _ in range(rng.randint(1, 5))]
        width = sum(map(len, documents)) + 2 * sum(map(count_images, documents)) + rng.randint(0, 3)
        tokens = Tokens.packed([documents, [[5] * width]], 3)
        one, loop = Tokens(*(getattr(tokens, f)[:1] for f in SLOTS)), pack(documents, 3, width, True)
        assert torch.equal(one.ids, loop.ids) and torch.equal(one.document, loop.document)
        assert torch.equal(one.image, loop.image)
        real = loop.document >= 0
        assert torch.equal(one.position[real], loop.position[real])
        assert torch.equal(hybrid_mask(one, one)[0], brute_force_mask(documents, 3, width))


def random_document(rng: random.Random, text: int = 4) -> list[int]:
    """Text and images in any order, images side by side as well, text before, between and behind."""
    pieces = [[IMAGE], [BOI, IMAGE, EOI], [IMAGE, IMAGE]]
    out: list[int] = []
    images = rng.choice((0, 0.5, 0.5, 0.5))
    for _ in range(rng.randint(0, 4)):
        out += rng.choice(pieces) if rng.random() < images else [rng.randint(4, 60)] * rng.randint(1, text)
    return out or [rng.choice((IMAGE, 7))]


Parts = list[list[list[list[int]]]]  # what is read in each part: rows of documents


def lay_out(parts: Parts, num_patches: int) -> list[Tokens]:
    """Parts that are read one after another, each against a cache of those before; documents go on."""
    rows = range(len(parts[0]))
    start = [[0] * len(documents) for documents in parts[0]]
    images, out = [0 for _ in rows], []
    for part in parts:
        out.append(Tokens.packed(part, num_patches, [list(x) for x in start], list(images)))
        for r in rows:
            for d, document in enumerate(part[r]):
                start[r][d] += len(document) + (num_patches - 1) * count_images(document)
            images[r] += max(map(count_images, part[r]))  # above every number that was given
    return out


def cut_documents(rows: list[list[list[int]]], rng: random.Random, cuts: int) -> Parts:
    """Every document cut in `cuts` + 1 parts, at random places; some parts are empty, but not in all rows."""
    parts: Parts = [[] for _ in range(cuts + 1)]
    for documents in rows:
        each = []
        for document in documents:
            at = sorted(rng.choices(range(len(document) + 1), k=cuts))
            each.append([document[a:b] for a, b in zip([0, *at], [*at, len(document)], strict=True)])
        for i, part in enumerate(parts):
            part.append([pieces[i] for pieces in each])
    return [part for part in parts if any(document for row in part for document in row)]


def random_parts(rng: random.Random, text: int = 4) -> Parts:
    rows, most = [], rng.choice((1, 4))
    for _ in range(rng.randint(1, 3)):
        rows.append([random_document(rng, text) for _ in range(rng.randint(1, most))])
    return cut_documents(rows, rng, rng.choice((0, 0, 1, 2, 3)))


def with_cache(tokens: Tokens, past: list[Tokens]) -> Tokens:
    """All that `tokens` may look at: what a cache of `past` holds, and themselves."""
    fields = ("image", "position", "document")
    return Tokens(None, *(torch.cat([getattr(x, f) for x in (*past, tokens)], 1) for f in fields))


def cache_of(past: list[Tokens]) -> Cache | None:
    if not past:
        return None
    joined = with_cache(past[-1], past[:-1])
    return Cache([], [], joined.image, joined.position, joined.document)


def assert_mask(found: Tensor, tokens: Tokens, key: Tokens) -> None:
    """`found` (B, N, S) is the hybrid mask wherever a token stands; padding sees padding alone, and some."""
    wanted = hybrid_mask(tokens, key)
    real = tokens.document >= 0
    assert torch.equal(found[real], wanted[real])
    somebodys = (key.document >= 0)[:, None].expand_as(found)
    assert found.any(2).all() and not (found & somebodys)[~real].any()


def dense_of_segments(layout: Layout, N: int, S: int) -> Tensor:
    """The booleans (B, N, S) that a layout's segments stand for."""
    out = torch.zeros(len(layout.segments), N, S, dtype=torch.bool)
    for row, (query_runs, key_runs, segments) in enumerate(layout.segments):
        assert sum(query_runs) == N and sum(key_runs) == S and len(segments) == len(query_runs)
        columns = torch.arange(S).split(key_runs)
        begin = 0
        for n, part in zip(query_runs, segments, strict=True):
            seen = torch.cat([columns[j] for j in part.keys])
            assert not (part.causal and part.mask is not None)
            inside = torch.ones(n, len(seen), dtype=torch.bool)
            if part.causal:
                assert len(seen) == n
                inside = inside.tril()
            elif part.mask is not None:
                assert part.mask.shape == (1, 1, *inside.shape)
                inside = part.mask[0, 0]
            out[row, begin : begin + n, seen] = inside
            begin += n
    return out


def dense_of_blocks(mask: BlockMask, N: int, S: int) -> Tensor:
    """The booleans (B, N, S) that FlexAttention makes of a block mask: all of a full block, `mask_mod` in a
    partial one, nothing elsewhere."""
    B, (height, width) = mask.shape[0], mask.BLOCK_SIZE
    rows, columns = -(-N // height), -(-S // width)
    inside = torch.zeros(B, rows * height, columns * width, dtype=torch.bool)
    fine = torch.zeros_like(inside)
    fine[:, :N, :S] = create_mask(mask.mask_mod, B, None, N, S, device="cpu")[:, 0]
    for kind, counts, indices in (
        ("partial", mask.kv_num_blocks, mask.kv_indices),
        ("full", mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for b in range(B):
            for i in range(rows):
                for j in indices[b, 0, i, : counts[b, 0, i]].tolist():
                    block = b, slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                    inside[block] = fine[block] if kind == "partial" else True
    return inside[:, :N, :S]


def layouts(seed: int, n: int, P: int, text: int) -> Iterator[tuple[Tokens, Tokens, Cache | None]]:
    """Every step of reading n random things: (tokens, what they may look at, the cache)."""
    rng = random.Random(seed)
    for _ in range(n):
        steps = lay_out(random_parts(rng, text), P)
        for i, tokens in enumerate(steps):
            yield tokens, with_cache(tokens, steps[:i]), cache_of(steps[:i])


@pytest.mark.parametrize(("P", "text"), ((1, 2), (4, 4), (16, 30)))
def test_segments_stand_for_the_hybrid_mask_whatever_the_layout(make_config, monkeypatch, P, text):
    config, seen = make_config(), Counter()
    monkeypatch.setattr(attention_file, "DENSE", 0)
    with monkeypatch.context() as patch:
        whole = attention_file.hybrid_mask

        def one_row(query: Tokens, key: Tokens) -> Tensor:
            assert query.ids.shape[1] == 1  # never made in full
            return whole(query, key)

        patch.setattr(attention_file, "hybrid_mask", one_row)
        found = [(x, make_layout(x[0], x[2], config)) for x in layouts(P, 100, P, text)]
    for (tokens, key, cache), layout in found:
        (B, N), S = tokens.ids.shape, key.document.shape[1]
        assert layout.block_mask is None
        if layout.mask is not None:
            assert layout.mask.shape == (B, 1, 1, S) and layout.segments is None
            dense = layout.mask[:, 0].expand(B, N, S)
        elif layout.segments is not None:
            dense = dense_of_segments(layout, N, S)
            for query_runs, _, segments in layout.segments:
                for n, part in zip(query_runs, segments, strict=True):
                    past = part.mask is not None and part.mask.shape[3] > n
                    assert part.mask is None or past  # no mask for an image, or for text with no past
        else:
            dense = torch.ones(B, N, S, dtype=torch.bool)
            dense = dense.tril() if layout.causal else dense
        seen["causal" if layout.causal else "segments" if layout.segments else "none"] += 1
        seen["cached", layout.segments is not None] += cache is not None
        assert_mask(dense, tokens, key)
    assert seen["causal"] and seen["none"] and min(seen["cached", True], seen["segments"]) > 50, seen


@pytest.mark.parametrize(("P", "text"), ((1, 2), (4, 4), (16, 30)))
def test_short_sequences_take_the_hybrid_mask_or_a_cheaper_form_of_it(make_config, P, text):
    config, seen = make_config(), Counter()
    for tokens, key, cache in layouts(10 + P, 100, P, text):
        layout = make_layout(tokens, cache, config)
        assert layout.segments is None and layout.block_mask is None
        wanted = hybrid_mask(tokens, key)
        if layout.mask is not None:
            assert torch.equal(layout.mask[:, 0].expand_as(wanted), wanted)
            assert not wanted.all() and not layout.causal
        elif layout.causal:
            assert torch.equal(wanted, torch.ones_like(wanted).tril())
        else:
            assert wanted.all()
        seen["mask" if layout.mask is not None else "causal" if layout.causal else "none"] += 1
    assert seen["mask"] > 50 and seen["causal"] and seen["none"], seen


def test_pictures_behind_prompts_of_different_lengths_need_one_row_of_the_mask(make_model):
    """While denoising: every patch of a row sees the same slots."""
    model, P = make_model().double(), 16
    prompts = Tokens.rows([[5, 6, BOI], [5, BOI], [BOI]], P)
    patches = Tokens.rows([[IMAGE]] * 3, P, start=[3, 2, 1])
    cache = model.encode(prompts).cache
    layout = model.layout(patches, cache)
    wanted = hybrid_mask(patches, with_cache(patches, [prompts]))
    assert layout.mask.shape == (3, 1, 1, 3 + P) and torch.equal(layout.mask[:, 0].expand_as(wanted), wanted)
    latents, t = draw(model, 3)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "full")
        whole = model.encode(patches, latents, t, cache).image
    for kernel in (attention_file.WRITTEN_OUT, (0, 0)):  # written out, and the fused kernel
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_file, "WRITTEN_OUT", kernel)
            assert torch.allclose(
                model.encode(patches, latents, t, cache, layout=layout).image, whole, **TOLERANCE
            )


@pytest.mark.parametrize(("P", "text"), ((4, 60), (100, 200)))
def test_the_block_mask_is_the_hybrid_mask_whatever_the_layout(P, text):
    """Blocks are 128 x 128: most layouts end inside one, some have full and empty ones."""
    seen = Counter()
    for tokens, key, cache in layouts(20 + P, 10, P, text):
        mask = make_block_mask(tokens, key, torch.device("cpu"))
        N, S = tokens.ids.shape[1], key.document.shape[1]
        assert tuple(mask.shape) == (len(tokens.ids), 1, N, S)
        assert torch.equal(dense_of_blocks(mask, N, S), hybrid_mask(tokens, key))
        seen["ends inside a block"] += N % 128 > 0
        seen["several blocks"] += min(N, S) > 128
        seen["full"] += int(mask.full_kv_num_blocks.sum())
        seen["skipped"] += mask.sparsity() > 0
        seen["cached"] += cache is not None
    assert min(seen["ends inside a block"], seen["cached"]) > 5, seen
    if P == 100:
        assert min(seen["several blocks"], seen["full"], seen["skipped"]) > 5, seen


# the same mask, written out in full; the cheapest form there is; segments; FlexAttention
FORMS = ("full", "chosen", "segments", "segments, short", "flex")


def force(patch: pytest.MonkeyPatch, form: str) -> None:
    """Give every Layout the mask in this form. "segments": as the code itself chooses it for long rows, and
    with the kernel it uses there; "segments, short": wherever the code would write out a mask.
    """
    if form == "segments":
        patch.setattr(attention_file, "DENSE", 0)
    if form in ("full", "flex", "segments, short"):

        def choose_mask(self, tokens, cache, device):
            self.causal, self.mask, self.block_mask, self.segments = False, None, None, None
            key = tokens if cache is None else with_cache(tokens, [cache])
            if form == "full":
                self.mask = hybrid_mask(tokens, key)[:, None]
            elif form == "flex":
                self.block_mask = make_block_mask(tokens, key, device)
            else:
                self.make_segments(tokens, key)

        patch.setattr(Layout, "choose_mask", choose_mask)
        patch.setattr(attention_file, "compiled", lambda function: function)
        # its eager form, not traced first: many times faster on tensors as small as these
        patch.setattr(flex_file, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


@dataclass
class Reading:
    """What a model made of parts read one after another."""

    features: list[Tensor] = field(default_factory=list)  # (B, N, D) of each part
    keys: list[Tensor] = field(default_factory=list)  # and values, of each part and layer, without padding
    loss: Tensor | float = 0.0  # some number that depends on all of it

    def tensors(self) -> list[Tensor]:
        return [*self.features, *self.keys]


def read(model: LMFusion, parts: Parts, seed: int = 0) -> Reading:
    P, out, cache = model.config.num_patches, Reading(), None
    images = sum(count_images(document) for part in parts for row in part for document in row)
    latents, t = draw(model, images, seed)
    generator, first = torch.Generator().manual_seed(seed), 0
    for tokens in lay_out(parts, P):
        here = slice(first, first := first + int((tokens.ids == IMAGE).sum()) // P)
        hidden = model.encode(tokens, latents[here], t[here], cache)
        slots = to_slots(hidden, tokens)
        out.features.append(slots)
        real = (tokens.document >= 0)[:, None, :, None]
        out.keys += [x * real for x in (*hidden.cache.k, *hidden.cache.v)]
        weight = torch.randn(slots.shape, generator=generator).to(slots)
        out.loss = out.loss + (weight * slots).sum()
        if hidden.image is not None:
            out.loss = out.loss + model.unet_output(hidden).square().mean()
        cache = hidden.cache if cache is None else cache.extend(hidden.cache)
    return out


DOCUMENTS = [[5, BOI, IMAGE, EOI, 6], [7, 8, BOI, IMAGE, IMAGE], [IMAGE], [9, 10, 11], [IMAGE, 12]]
LAYOUTS: dict[str, Parts] = {
    "text": [[[[5, 6, 7, 8]]]],
    "ragged text": [[[[5, 6, 7, 8]], [[9]]]],
    "an image alone": [[[[IMAGE]], [[IMAGE]]]],
    "a token alone": [[[[5]]]],
    "a story": [[[STORY]]],
    "ragged": [[[row] for row in RAGGED]],
    "packed": [[DOCUMENTS]],
    "packed, ragged": [[DOCUMENTS[:2], DOCUMENTS[2:], [STORY]]],
    "packed images": [[[[IMAGE]] * 3, [[IMAGE], [IMAGE, IMAGE]]]],
    "packed text": [[[[5, 6], [7, 8, 9], [10]], [[11]]]],
    "prefix, rest": [[[[5, 6, BOI]], [[7, BOI]]], [[[IMAGE, EOI, 8]], [[IMAGE]]]],
    "packed prefix, packed rest": [
        [[[5, 6, BOI], [BOI]], [[7, BOI], [8, 9, 10, BOI], [BOI]]],
        [[[IMAGE, EOI, 8], [IMAGE]], [[IMAGE, IMAGE], [IMAGE, EOI, 11, IMAGE], [IMAGE]]],
    ],
    "prefix, image, text, image": [[[[5, 6, BOI]]], [[[IMAGE]]], [[[EOI, 7, BOI]]], [[[IMAGE]]]],
    "token by token": [[[[5, 6]]], [[[7]]], [[[IMAGE]]], [[[8]]], [[[9]]]],
    "text behind text": [[[[5, 6]], [[7, 8]]], [[[9, 10, 11]], [[12, 13, 14]]]],
    "packed text behind packed text": [[[[5, 6], [7]]], [[[9, 10], [12, 13, 14]]], [[[15], [16]]]],
    "documents that pause": [
        [[[5], [6, IMAGE]], [[], [7]]],
        [[[IMAGE, 8], []], [[IMAGE], [IMAGE, 9]]],
        [[[], [10, 11]], [[12], []]],
    ],
}


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_forms_of_the_mask_give_the_same_features_keys_and_values(make_model, name, form):
    model = make_model(dtype=torch.float64)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        force(patch, "full")
        expected = read(model, LAYOUTS[name]).tensors()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        force(patch, form)
        for found, wanted in zip(read(model, LAYOUTS[name]).tensors(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def gradients(model: LMFusion, parts: Parts) -> dict[str, Tensor]:
    read(model, parts).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 20
    for name, x in wanted.items():
        assert (found[name] - x).abs().max() <= tolerance * x.abs().max().clamp(min=1e-3), name


GRADIENT_LAYOUTS = [n for n, parts in LAYOUTS.items() if "image" in n or IMAGE in sum(sum(parts[-1], []), [])]


@pytest.mark.parametrize("frozen", (True, False), ids=("frozen text", "trained text"))
@pytest.mark.parametrize("form", ("chosen", "segments", "segments, short"))
@pytest.mark.parametrize("name", (*GRADIENT_LAYOUTS, "documents that pause"))
def test_all_forms_of_the_mask_give_the_same_gradients(make_model, name, form, frozen):
    model = make_model(dtype=torch.float64, num_hidden_layers=2)
    model.freeze_text(frozen)
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "full")
        expected = gradients(model, LAYOUTS[name])
    with pytest.MonkeyPatch.context() as patch:
        force(patch, form)
        assert_same_gradients(gradients(model, LAYOUTS[name]), expected, 1e-6)


@torch.no_grad()
def test_all_forms_of_the_mask_agree_on_random_layouts_in_float32(make_model):
    model, rng = make_model(num_hidden_layers=2), random.Random(0)
    for seed in range(6):
        parts, found = random_parts(rng), {}
        for form in FORMS:
            with pytest.MonkeyPatch.context() as patch:
                force(patch, form)
                found[form] = read(model, parts, seed).tensors()
        for form in FORMS[1:]:
            for a, b in zip(found[form], found["full"], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)  # features are of the order of 10


def changed_document(which: int, how: str) -> tuple[Parts, Tensor]:
    """DOCUMENTS in two rows with one changed, and which of the images are its."""
    documents = [list(x) for x in DOCUMENTS]
    if how == "other ids":
        documents[which] = [i if i == IMAGE else (i + 17) % 60 for i in documents[which]]
    owners = [d for d, document in enumerate(DOCUMENTS) for _ in range(count_images(document))]
    return [[documents[:3], documents[3:]]], torch.tensor(owners) == which


CHANGES = [(form, how) for form in FORMS for how in ("other ids", "other latents")]
CHANGES += [("segments", "nan"), ("segments, short", "nan")]  # under a mask of the scores, 0 * nan is nan


@torch.no_grad()
@pytest.mark.parametrize(("form", "how"), CHANGES)
@pytest.mark.parametrize("which", range(len(DOCUMENTS)))
def test_what_stands_in_a_document_changes_no_bit_of_its_neighbours(
    make_model, monkeypatch, form, how, which
):
    model = make_model(num_hidden_layers=2)
    force(monkeypatch, form)
    parts, mine = changed_document(which, how)
    if how != "other ids" and not mine.any():
        how, parts = "other ids", changed_document(which, "other ids")[0]  # a document without an image
    tokens = lay_out(parts, model.config.num_patches)[0]
    own = torch.zeros(tokens.ids.shape, dtype=torch.bool)
    row, number = (0, which) if which < 3 else (1, which - 3)
    own[row] = tokens.document[row] == number
    latents, t = draw(model, len(mine))
    before_tokens = lay_out(changed_document(which, "")[0], model.config.num_patches)[0]
    before = to_slots(model.encode(before_tokens, latents, t), before_tokens)
    if how != "other ids":
        latents = latents.clone()
        latents[mine] = torch.nan if how == "nan" else latents[mine] + 1
    after = to_slots(model.encode(tokens, latents, t), tokens)
    assert torch.equal(after[~own], before[~own]) and before[~own].isfinite().all()
    if how != "other ids" or any(i != IMAGE for i in DOCUMENTS[which]):
        assert not torch.equal(after[own], before[own])


class Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self):
        super().__init__()
        self.largest, self.operation = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.numel() > self.largest:
                self.largest, self.operation = x.numel(), func
        return out


LONG = {
    "packed": [[7, 8, 9, BOI, IMAGE], [BOI, IMAGE, EOI, 10, 11, 12], [BOI, IMAGE]] * 5,
    "text": [[5] * 4096],
    "text behind an image": [[5] * 1800, [IMAGE, *[6] * 64]] * 2,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_row_makes_no_tensor_of_queries_times_keys(make_model, monkeypatch, name):
    """4,096 tokens, forward and backward: 16.8 million booleans, or scores of each head, are never there."""
    model = make_model(latent_size=32, unet_channels=(4, 4), unet_attention=False, num_hidden_layers=2)
    monkeypatch.setattr(attention_file, "hybrid_mask", None)  # not called
    documents = LONG[name]
    tokens = Tokens.packed([documents], model.config.num_patches)
    N = tokens.ids.shape[1]
    assert N > 3500
    model.freeze_text(False)
    with Sizes() as sizes:
        hidden = model.encode(tokens, *draw(model, sum(map(count_images, documents))))
        loss = sum(x.square().mean() for x in (hidden.text, hidden.image) if x is not None)
        loss.backward()
    layout = make_layout(tokens, None, model.config)
    assert layout.causal == (name == "text") and layout.mask is None and layout.block_mask is None
    if name == "packed":
        assert [s.mask is None for s in layout.segments[0][2]] == [
            True,
            True,
            True,
            True,
            False,
            True,
            True,
        ] * 5
    assert 0 < sizes.largest < N * N / 20, (sizes.operation, sizes.largest)
    assert with_gradient(model) >= {"embed_tokens.weight", "layers.0.text.self_attn.q_proj.weight"}


def test_the_switch_to_segments_is_by_the_number_of_scores(make_config):
    """DENSE = 2^19 of a row, whether its queries or its cache are many."""
    config = make_config()
    for n, cached, dense in ((724, 0, True), (725, 0, False), (8, 2**16 - 8, True), (8, 2**16 - 7, False)):
        tokens = Tokens.packed([[[5] * (n - 1), [6]]], 1)
        cache = cache_of([Tokens.text(torch.ones(1, cached, dtype=torch.long))]) if cached else None
        layout = make_layout(tokens, cache, config)
        assert ((layout.mask is None), (layout.segments is None)) == (
            (False, True) if dense else (True, False)
        )


@pytest.mark.parametrize("heads", ((4, 4), (4, 2), (6, 1)), ids=("MHA", "GQA", "MQA"))
@pytest.mark.parametrize("fused", (True, False), ids=("fused", "written out"))
def test_causal_attention_is_attention_under_a_triangle(monkeypatch, heads, fused):
    generator = torch.Generator().manual_seed(0)
    H, K = heads
    q, k, v = (torch.randn(2, h, 37, 8, generator=generator) for h in (H, K, K))
    monkeypatch.setattr(attention_file, "WRITTEN_OUT", (0, 0) if fused else (2**20, 2**20))
    triangle = torch.ones(1, 1, 37, 37, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v, causal=True), attention(q, k, v, triangle), **TOLERANCE)
    assert not torch.allclose(attention(q, k, v), attention(q, k, v, triangle), atol=1e-2)


@SEPARATIONS
@pytest.mark.parametrize("form", ("chosen", "segments"))
def test_two_phases_packed_equal_one_encode_of_each_sequence(make_model, monkeypatch, separation, form):
    model = make_model(separation=separation, dtype=torch.float64)
    P = model.config.num_patches
    latents, t = draw(model, sum(map(count_images, RAGGED)))
    expected, first = [], 0
    with torch.no_grad():
        for row in RAGGED:
            here = slice(first, first := first + count_images(row))
            hidden = model.encode(Tokens.rows([row], P), latents[here], t[here])
            expected.append((hidden, model.unet_output(hidden), row.index(IMAGE)))
        force(monkeypatch, form)
        for size in (0, 1, 60, 120, 1000):  # 0: a row each
            prefix, rest = in_phases(RAGGED, P, pack=size)
            before, after = model(prefix, rest, latents, t)
            noise = torch.cat([noise for _, noise, _ in expected])
            torch.testing.assert_close(model.unet_output(after), noise, **TOLERANCE)
            for found, wanted in (
                (before.text, [h.text[:cut] for h, _, cut in expected]),
                (after.text, [h.text[cut:] for h, _, cut in expected]),
                (after.image, [h.image for h, _, _ in expected]),
            ):
                torch.testing.assert_close(found, torch.cat(wanted), **TOLERANCE)
