"""model.py: who sees whom, caching, separation, where gradients go, and what work is done.

Every model here has all its parameters perturbed (see conftest.py). Where two ways of computing must agree,
it has float64 weights: what is left is rounding below 1e-6, and a wrong rule is off by far more. A sequence
is a list of token ids in which IMAGE stands for one whole image, as in `Tokens.rows`.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex_file
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import attention as attention_file
import model as model_file
from attention import IMAGE, PAD, Cache, Layout, Tokens, attention, hybrid_mask, make_block_mask
from data import split_phases
from model import Hidden, LMFusion, ModelConfig, RMSNorm, replace, rope_angles
from unet import UNetDown, UNetUp

BOI, EOI = 1, 2  # conftest.TINY
TOLERANCE = dict(rtol=0, atol=1e-5)
STORY = [5, 6, BOI, IMAGE, EOI, 7, 8, BOI, IMAGE, IMAGE, EOI, 9]  # two images of it touch
SEPARATIONS = pytest.mark.parametrize("separation", ("deep", "shallow", "none"))


def draw(model: LMFusion, images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random latents (M, C, h, w), in the model's dtype, and timesteps (M,)."""
    generator, c = torch.Generator().manual_seed(seed), model.config
    latents = torch.randn(images, c.latent_channels, c.latent_size, c.latent_size, generator=generator)
    latents = latents.to(model.boi_head.dtype)
    return latents, torch.randint(1000, (images,), generator=generator)


def count_images(row: list[int]) -> int:
    return row.count(IMAGE)


def to_slots(hidden: Hidden, tokens: Tokens) -> Tensor:
    """Features of both modalities in the slots they came from (B, N, D); zeros at padding."""
    D, dtype = next((x.shape[1], x.dtype) for x in (hidden.text, hidden.image) if x is not None)
    out = torch.zeros(*tokens.ids.shape, D, dtype=dtype)
    if hidden.text is not None:
        out[tokens.ids >= 0] = hidden.text
    if hidden.image is not None:
        out[tokens.ids == IMAGE] = hidden.image
    return out


@torch.no_grad()
def features(
    model: LMFusion, rows: list[list[int]], latents: Tensor | None = None, t: Tensor | None = None
) -> Tensor:
    """Features (B, N, D) of sequences in one encode."""
    tokens = Tokens.rows(rows, model.config.num_patches)
    return to_slots(model.encode(tokens, latents, t), tokens)


def make_layout(tokens: Tokens, cache: Cache | None, config: ModelConfig) -> Layout:
    return Layout(tokens, cache, torch.device("cpu"), *rope_angles(tokens.position.flatten(), config))


class PatchesAsGiven(nn.Module):
    """Stands in for UNet-Down, which mixes the patches of an image: the patches are what the test says."""

    def __init__(self, patches: Tensor):
        super().__init__()
        self.patches = patches  # (M, P, D)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.patches, []


# ---- (1) the hybrid mask ----


def pack(documents: list[list[int]], num_patches: int, width: int, restart: bool) -> Tokens:
    """One row that holds several documents one behind the other, and padding; written with loops."""
    ids, image, position, document, images = [], [], [], [], 0
    for d, row in enumerate(documents):
        start = 0 if restart else len(ids)
        first = len(ids)
        images = 0 if restart else images
        for i in row:
            images += i == IMAGE
            for _ in range(num_patches if i == IMAGE else 1):
                ids.append(i)
                image.append(images if i == IMAGE else 0)
                position.append(start + len(ids) - 1 - first)
                document.append(d)
    for _ in range(width - len(ids)):
        ids.append(PAD)
        image.append(0)
        position.append(len(ids) - 1)
        document.append(-1)
    return Tokens(*(torch.tensor([x]) for x in (ids, image, position, document)))


def brute_force_mask(documents: list[list[int]], num_patches: int, width: int) -> Tensor:
    """The rule in words, slot by slot (width, width); padding sees padding that is not behind it."""
    slots = []  # (document, number of the image in the row or None)
    images = 0
    for d, row in enumerate(documents):
        for i in row:
            images += i == IMAGE
            slots += [(d, images)] * num_patches if i == IMAGE else [(d, None)]
    slots += [("padding", None)] * (width - len(slots))
    mask = torch.zeros(width, width, dtype=torch.bool)
    for i, (document_i, image_i) in enumerate(slots):
        for j, (document_j, image_j) in enumerate(slots):
            together = image_i is not None and image_i == image_j
            mask[i, j] = document_i == document_j and (j <= i or together)
    return mask


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


def test_rows_lay_tokens_out_as_documented():
    tokens = Tokens.rows(
        [[5, IMAGE, 6], [IMAGE, IMAGE, 7, 8]], num_patches=2, start=[3, 10], images_before=[0, 4]
    )
    assert tokens.ids.tolist() == [[5, -1, -1, 6, PAD, PAD], [-1, -1, -1, -1, 7, 8]]
    assert tokens.image.tolist() == [[0, 1, 1, 0, 0, 0], [5, 5, 6, 6, 0, 0]]
    assert tokens.position[0, :4].tolist() == [3, 4, 5, 6] and tokens.position[1].tolist() == list(
        range(10, 16)
    )
    assert tokens.document.tolist() == [[0, 0, 0, 0, -1, -1], [0] * 6]


# ---- (2) who influences whom, through the whole model ----


def story_units(P: int) -> list[tuple[int, list[int]]]:
    """Index into STORY and the slots it takes."""
    units, used = [], 0
    for n, i in enumerate(STORY):
        width = P if i == IMAGE else 1
        units.append((n, list(range(used, used + width))))
        used += width
    return units


@SEPARATIONS
def test_changing_an_input_changes_exactly_the_outputs_that_may_see_it(make_model, separation):
    """So: nothing earlier changes, everything later does, and all patches of an image do."""
    model = make_model(separation=separation)
    P = model.config.num_patches
    latents, t = draw(model, count_images(STORY))
    before = features(model, [STORY], latents, t)[0]
    mask = brute_force_mask([STORY], P, len(before))
    images = 0
    for n, slots in story_units(P):
        row, changed = list(STORY), latents.clone()
        if STORY[n] == IMAGE:
            changed[images] += 0.5
            images += 1
        else:
            row[n] = 33
        difference = (features(model, [row], changed, t)[0] - before).abs().amax(1)  # (N,)
        sees = mask[:, slots].any(1)
        assert (difference[sees] > 1e-5).all(), f"item {n}: something that sees it did not change"
        assert (difference[~sees] == 0).all(), f"item {n}: something that does not see it changed"


def test_patches_of_one_image_see_each_other_both_ways_and_no_patch_of_another_before_it(make_model):
    model = make_model()
    P, D = model.config.num_patches, model.config.hidden_size
    latents, t = draw(model, 3)
    patches = torch.randn(3, P, D, generator=torch.Generator().manual_seed(1))
    slots = [slots for n, slots in story_units(P) if STORY[n] == IMAGE]
    model.unet_down = PatchesAsGiven(patches)
    before = features(model, [STORY], latents, t)[0]
    for m in range(3):
        for p in (0, P // 2, P - 1):
            changed = patches.clone()
            changed[m, p] += 0.5
            model.unet_down = PatchesAsGiven(changed)
            difference = (features(model, [STORY], latents, t)[0] - before).abs().amax(1)
            first = slots[m][0]
            assert (
                difference[first:] > 1e-6
            ).all()  # all patches of this image, those before p too; all behind it
            assert (difference[:first] == 0).all()


def test_text_after_an_image_sees_it_and_an_image_never_sees_text_after_it(make_model):
    model = make_model()
    P = model.config.num_patches
    latents, t = draw(model, 1)
    row = [5, BOI, IMAGE, EOI, 6]
    before = features(model, [row], latents, t)[0]
    other_text = features(model, [[5, BOI, IMAGE, EOI, 40]], latents, t)[0]
    other_eoi = features(model, [[5, BOI, IMAGE, 41, 6]], latents, t)[0]
    other_image = features(model, [row], latents + 0.5, t)[0]
    other_time = features(model, [row], latents, t + 100)[0]
    image, after = slice(2, 2 + P), slice(2 + P, None)
    assert torch.equal(other_text[image], before[image]) and torch.equal(other_eoi[image], before[image])
    assert not torch.equal(other_text[-1], before[-1])
    for changed in (other_image, other_time):
        assert ((changed[after] - before[after]).abs().amax(1) > 1e-4).all()
        assert torch.equal(changed[:2], before[:2])  # text before it, and its BOI


def test_padding_changes_nothing(make_model):
    model = make_model(dtype=torch.float64)
    latents, t = draw(model, 3)
    alone = features(model, [STORY], latents, t)
    for padding in (1, 7, 40):
        longer = features(model, [STORY, [5] * (alone.shape[1] + padding)], latents, t)
        torch.testing.assert_close(longer[:1, : alone.shape[1]], alone, **TOLERANCE)
        assert not longer[0, alone.shape[1] :].any()


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


def test_each_patch_takes_one_position_in_the_order_of_the_words_it_stands_for(make_model):
    """In a dense model of one layer, keys and values depend on inputs alone: patches that are the embeddings
    of words look to whatever sees all of them exactly like those words.
    """
    model = make_model(separation="none", num_hidden_layers=1, dtype=torch.float64)
    P = model.config.num_patches
    words = list(range(20, 20 + P))
    model.unet_down = PatchesAsGiven(model.embed_tokens.weight[None, 20 : 20 + P])
    image = features(model, [[5, BOI, IMAGE, EOI, 6]], *draw(model, 1))[0]
    text = features(model, [[5, BOI, *words, EOI, 6]])[0]
    alike = [0, 1, *range(1 + P, 4 + P)]  # before the image, its last patch, behind it
    torch.testing.assert_close(image[alike], text[alike], **TOLERANCE)
    assert (
        (image - text)[2 : 1 + P].abs().amax(1) > 1e-3
    ).all()  # the other patches see more than the words do


def test_the_timestep_enters_through_the_unet_and_nowhere_else(make_model):
    model = make_model()
    latents, t = draw(model, 1)
    rows = [[5, BOI, IMAGE, EOI]]
    assert not torch.equal(features(model, rows, latents, t), features(model, rows, latents, t + 1))
    model.unet_down = PatchesAsGiven(torch.randn(1, model.config.num_patches, model.config.hidden_size))
    assert torch.equal(features(model, rows, latents, t), features(model, rows, latents, t + 1))


# ---- (3) caching and batching ----


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


def test_text_logits_with_a_cache_equal_text_logits_without(make_model):
    model = make_model(dtype=torch.float64)
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = model.text_logits(ids)
    for cut in (1, 7, 19):
        cache = model.encode(Tokens.text(ids[:, :cut])).cache
        rest = model.logits(model.encode(Tokens.text(ids[:, cut:], start=cut), cache=cache).text)
        torch.testing.assert_close(rest.unflatten(0, (2, -1)), whole[:, cut:], **TOLERANCE)


RAGGED = [
    STORY,
    [5, BOI, IMAGE],
    [4] * 9 + [BOI, IMAGE, EOI, 6, 7, 8],
    [BOI, IMAGE, IMAGE, EOI],
    [5, 6, 7, BOI, IMAGE, EOI, BOI, IMAGE, EOI, 3],
]


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


@SEPARATIONS
def test_forward_in_two_phases_equals_one_encode_of_each_whole_sequence(make_model, separation):
    model = make_model(separation=separation, dtype=torch.float64)
    P = model.config.num_patches
    latents, t = draw(model, sum(map(count_images, RAGGED)))
    prefix, rest = split_phases(RAGGED, P)
    with torch.no_grad():
        before, after = model(prefix, rest, latents, t)
        noise = model.unet_output(after)
    first = 0
    for b, row in enumerate(RAGGED):
        here = slice(first, first + count_images(row))
        tokens = Tokens.rows([row], P)
        with torch.no_grad():
            hidden = model.encode(tokens, latents[here], t[here])
            torch.testing.assert_close(noise[here], model.unet_output(hidden), **TOLERANCE)
        alone, cut = to_slots(hidden, tokens)[0], row.index(IMAGE)
        torch.testing.assert_close(to_slots(before, prefix)[b, :cut], alone[:cut], **TOLERANCE)
        torch.testing.assert_close(to_slots(after, rest)[b, : len(alone) - cut], alone[cut:], **TOLERANCE)
        first = here.stop


def test_forward_without_a_prefix_reads_the_rest_alone(make_model):
    model = make_model()
    latents, t = draw(model, 1)
    rest = Tokens.rows([[IMAGE, EOI, 5]], model.config.num_patches)
    before, after = model(None, rest, latents, t)
    assert before is None
    assert torch.equal(to_slots(after, rest), features(model, [[IMAGE, EOI, 5]], latents, t))


def test_a_batch_whose_sequences_all_begin_with_their_image_can_be_read(make_model):
    model = make_model()
    latents, t = draw(model, 2)
    prefix, rest = split_phases([[IMAGE, EOI], [IMAGE, EOI, 5]], model.config.num_patches)
    after = model(prefix, rest, latents, t)[1]
    assert torch.equal(to_slots(after, rest), features(model, [[IMAGE, EOI], [IMAGE, EOI, 5]], latents, t))


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


# ---- (4) separation ----


def expert_size(config: ModelConfig, whole: bool) -> int:
    """Parameters of an expert, or of only its FFN and the FFN's norm."""
    D, d = config.hidden_size, config.head_dim
    ffn = 3 * D * config.intermediate_size + D
    own_attention = 2 * D * d * (config.num_attention_heads + config.num_key_value_heads) + 2 * d + D
    return ffn + (own_attention if whole else 0)


@SEPARATIONS
@pytest.mark.parametrize("tied", (True, False))
def test_parameter_counts_tell_the_truth(make_model, separation, tied):
    model = make_model(separation=separation, tie_word_embeddings=tied)
    c = model.config
    text = (
        c.num_hidden_layers * expert_size(c, True) + c.hidden_size + c.vocab_size * c.hidden_size * (2 - tied)
    )
    image = {
        "deep": c.num_hidden_layers * expert_size(c, True) + c.hidden_size,
        "shallow": c.num_hidden_layers * expert_size(c, False) + c.hidden_size,
        "none": 0,
    }[separation]
    unet = sum(p.numel() for part in (model.unet_down, model.unet_up) for p in part.parameters())
    sizes = [
        sum(p.numel() for p in part.values()) for part in (model.text_parameters(), model.image_parameters())
    ]
    assert sizes == [text, image + unet + c.hidden_size]  # the last: the row that decides when to draw
    assert sum(p.numel() for p in model.parameters()) == sum(sizes)
    both = [*model.text_parameters().values(), *model.image_parameters().values()]
    assert {id(p) for p in both} == {id(p) for p in model.parameters()} and len(both) == len(
        set(map(id, both))
    )


def test_what_is_shared_is_the_same_object_and_nothing_else_is(make_model):
    parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    shared = {"deep": (), "shallow": ("input_layernorm", "self_attn"), "none": parts}
    for separation, expected in shared.items():
        model = make_model(separation=separation)
        for block in model.layers:
            assert (block.image is block.text) == (separation == "none")
            assert tuple(p for p in parts if getattr(block.image, p) is getattr(block.text, p)) == expected
            text, image = (dict(e.named_parameters()) for e in (block.text, block.image))
            for name, p in image.items():
                own = not name.startswith(expected) if expected else True
                assert (p is not text[name]) == own and (p.data_ptr() != text[name].data_ptr()) == own
        assert (model.norm_image is model.norm_text) == (separation == "none")


def test_text_logits_are_identical_across_all_separations(make_model):
    deep = make_model(seed=0)
    ids = torch.randint(64, (2, 15), generator=torch.Generator().manual_seed(0))
    expected = deep.text_logits(ids)
    for separation in ("shallow", "none"):
        model = make_model(seed=1, separation=separation)
        assert not torch.equal(model.text_logits(ids), expected)
        assert model.text_parameters().keys() == deep.text_parameters().keys()
        with torch.no_grad():
            for name, p in model.text_parameters().items():
                p.copy_(deep.text_parameters()[name])
        assert torch.equal(model.text_logits(ids), expected)


def test_text_logits_do_not_depend_on_any_image_parameter(make_model):
    model = make_model()
    ids = torch.randint(64, (2, 15), generator=torch.Generator().manual_seed(0))
    expected = model.text_logits(ids)
    with torch.no_grad():
        for p in model.image_parameters().values():
            p.fill_(torch.nan)
    assert torch.equal(model.text_logits(ids), expected)


# ---- (5) gradients ----


def caption_loss(model: LMFusion, hidden: Hidden) -> Tensor:
    """Cross-entropy of every text token of the second phase with some next token."""
    logits = model.logits(hidden.text)
    return F.cross_entropy(logits, torch.arange(len(logits)) + 20)


def ddpm_loss(model: LMFusion, hidden: Hidden, eps: Tensor) -> Tensor:
    return F.mse_loss(model.unet_output(hidden), eps)


def with_gradient(model: LMFusion) -> set[str]:
    """Parameters that a loss reached: a gradient is there, and not zero."""
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def two_phases(model: LMFusion, rows: list[list[int]]) -> tuple[Hidden, Hidden, Tensor]:
    latents, t = draw(model, sum(map(count_images, rows)))
    before, after = model(*split_phases(rows, model.config.num_patches), latents, t)
    return before, after, latents


@pytest.mark.parametrize(
    "rows",
    [[[BOI, IMAGE, EOI, 6, 7, 8]], [[5, 6, BOI, IMAGE, EOI, 6, 7, 8], [BOI, IMAGE, 9]]],
    ids=("image first", "text before, ragged"),
)
@pytest.mark.parametrize("patch_positions", (False, True))
def test_a_caption_reaches_all_of_the_image_side_that_its_tokens_see_and_no_text_parameter(
    make_model, rows, patch_positions
):
    """Text after an image reads the keys and values of every layer: all of UNet-Down, every image expert up
    to the last one's keys and values. The last image output, the image final norm and UNet-Up come later.
    """
    model = make_model(patch_positions=patch_positions)
    caption_loss(model, two_phases(model, rows)[1]).backward()
    last = f"layers.{model.config.num_hidden_layers - 1}.image."
    keys_and_values = ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
    expected = {n for n in model.image_parameters() if n.startswith(("unet_down.", "layers."))}
    expected -= {
        n for n in expected if n.startswith(last) and not n.removeprefix(last).startswith(keys_and_values)
    }
    assert with_gradient(model) == expected
    assert sum(n.startswith(last) for n in expected) == 4 and "unet_down.conv_in.weight" in expected
    assert all(p.grad is None for p in model.text_parameters().values())


@SEPARATIONS
def test_the_ddpm_loss_reaches_every_image_parameter_but_the_drawing_row(make_model, separation):
    model = make_model(separation=separation, patch_positions=True)
    _, after, latents = two_phases(model, [[5, 6, BOI, IMAGE, EOI, 7], [BOI, IMAGE]])
    ddpm_loss(model, after, latents).backward()
    assert with_gradient(model) == set(model.image_parameters()) - {"boi_head"}
    assert all(p.grad is None for p in model.text_parameters().values())


def test_with_shared_attention_a_caption_trains_the_image_ffns_below_the_last(make_model):
    model = make_model(separation="shallow")
    caption_loss(model, two_phases(model, [[BOI, IMAGE, EOI, 6]])[1]).backward()
    last = f"layers.{model.config.num_hidden_layers - 1}."
    assert with_gradient(model) == {
        n
        for n in model.image_parameters()
        if n.startswith(("unet_down.", "layers.")) and not n.startswith(last)
    }


def test_text_with_no_image_before_it_has_no_gradient_so_the_prefix_runs_without_a_graph(make_model):
    model = make_model()
    before, after, _ = two_phases(model, [[5, 6, BOI, IMAGE, EOI, 7]])
    assert before.text.grad_fn is None and not any(x.requires_grad for x in before.cache.k + before.cache.v)
    assert after.text.requires_grad and after.image.requires_grad
    whole = model.encode(
        Tokens.text(torch.tensor([[5, 6, 7]]))
    )  # and even with a graph there is none to keep
    assert not whole.text.requires_grad


def test_with_trainable_text_the_prefix_keeps_its_graph_and_is_trained(make_model):
    model = make_model()
    model.freeze_text(False)
    before, after, latents = two_phases(model, [[5, 6, BOI, IMAGE, EOI, 7]])
    assert before.text.requires_grad and all(x.requires_grad for x in before.cache.k + before.cache.v)
    ddpm_loss(model, after, latents).backward()
    last = f"layers.{model.config.num_hidden_layers - 1}.text."
    reached = with_gradient(model) & set(model.text_parameters())
    assert {
        "embed_tokens.weight",
        "layers.0.text.mlp.up_proj.weight",
        last + "self_attn.k_proj.weight",
    } <= reached
    assert last + "mlp.up_proj.weight" not in reached and "norm_text.weight" not in reached
    with torch.no_grad():
        assert not two_phases(model, [[5, BOI, IMAGE]])[0].text.requires_grad


def test_two_phases_give_the_gradients_of_one_encode(make_model):
    model = make_model(dtype=torch.float64)
    rows = [[5, 6, BOI, IMAGE, EOI, 7, 8]]
    _, after, latents = two_phases(model, rows)
    (caption_loss(model, after) + ddpm_loss(model, after, latents)).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = model.encode(Tokens.rows(rows, model.config.num_patches), *draw(model, 1))
    after = Hidden(hidden.text[3:], hidden.image, hidden.unet, hidden.cache)
    (caption_loss(model, after) + ddpm_loss(model, after, latents)).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-4 * scale)


def test_the_drawing_row_trains_on_frozen_features_alone(make_model):
    model = make_model()
    _, after, _ = two_phases(model, [[BOI, IMAGE, EOI, 6, 7]])
    F.binary_cross_entropy_with_logits(model.draw_logit(after.text), torch.tensor([0.0, 1.0, 0.0])).backward()
    assert with_gradient(model) == {"boi_head"}


# ---- (6) work, in floating-point operations ----


class WorkByWeight(TorchDispatchMode):
    """Counts floating-point operations by the parameter they multiply with; None where none is involved.

    The formulas of torch's FlopCounterMode, but this also tells whose weights a backward pass goes through.
    """

    def __init__(self, model: LMFusion):
        super().__init__()
        self.names = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters()}
        self.work: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            pointers = [x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)]
            owner = next((self.names[x] for x in pointers if x in self.names), None)
            self.work[owner] += formula(*args, **(kwargs or {}), out_val=out)
        return out

    def on(self, *parts: str) -> int:
        """Work on parameters whose name contains one of `parts`."""
        return sum(n for name, n in self.work.items() if name and any(part in name for part in parts))


TEXT = (".text.", "embed_tokens.", "lm_head.", "norm_text.")


def work_of(model: LMFusion, run) -> WorkByWeight:
    with WorkByWeight(model) as counter:
        run()
    return counter


def matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)


def encode_work(model: LMFusion, rows: list[list[int]]) -> WorkByWeight:
    latents, t = draw(model, sum(map(count_images, rows)))
    return work_of(model, lambda: features(model, rows, latents, t))


def test_the_counter_agrees_with_torchs_own(make_model):
    model = make_model()
    latents, t = draw(model, 3)
    with FlopCounterMode(display=False) as torchs:
        features(model, [STORY], latents, t)
    assert sum(encode_work(model, [STORY]).work.values()) == torchs.get_total_flops() > 0


def test_each_token_costs_the_work_of_its_own_expert_and_none_of_the_others(make_model):
    model = make_model()
    P = model.config.num_patches
    per_text = 2 * sum(matrices(block.text) for block in model.layers)
    per_patch = 2 * sum(matrices(block.image) for block in model.layers)
    for rows in (
        [[5, BOI, IMAGE, EOI]],
        [[5] * 33 + [BOI, IMAGE, EOI]],
        [[5, BOI, IMAGE, IMAGE, IMAGE, EOI]],
        [[5, 6, 7]],
        [[IMAGE]],
        RAGGED,
    ):
        work = encode_work(model, rows)
        images = sum(map(count_images, rows))
        assert work.on(".text.") == per_text * (sum(map(len, rows)) - images)  # padding costs nothing either
        assert work.on(".image.") == per_patch * images * P
        assert work.on("lm_head", "embed_tokens") == 0


def test_a_denoising_step_over_a_cached_prompt_costs_the_same_projections_whatever_the_prompts_length(
    make_model,
):
    model = make_model()
    latents, t = draw(model, 1)
    work = {}
    for length in (8, 512):
        with torch.no_grad():
            cache = model.encode(Tokens.text(torch.full((1, length), 5))).cache
            tokens = Tokens.rows([[IMAGE]], model.config.num_patches, start=[length])
            work[length] = work_of(
                model,
                lambda tokens=tokens, cache=cache: model.unet_output(model.encode(tokens, latents, t, cache)),
            )
    attention_work = {length: counter.work.pop(None) for length, counter in work.items()}
    assert work[8].work == work[512].work and work[8].on(".image.") > 0 and work[8].on(*TEXT) == 0
    assert attention_work[512] > attention_work[8]


def training_step(model: LMFusion, rows: list[list[int]]) -> tuple[WorkByWeight, WorkByWeight]:
    """Work forward and backward of a step with captions before images: the diffusion loss alone."""
    latents, t = draw(model, sum(map(count_images, rows)))
    phases, losses = split_phases(rows, model.config.num_patches), []
    forward = work_of(model, lambda: losses.append(ddpm_loss(model, model(*phases, latents, t)[1], latents)))
    return forward, work_of(model, losses[0].backward)


@pytest.mark.parametrize("tied", (True, False))
def test_a_caption_first_step_projects_nothing_to_the_vocabulary_and_does_not_go_back_through_text(
    make_model, tied
):
    model = make_model(tie_word_embeddings=tied)
    rows = [[5, 6, 7, 8, BOI, IMAGE], [5, 6, BOI, IMAGE]]
    forward, backward = training_step(model, rows)
    assert forward.on(".text.") == 2 * sum(matrices(block.text) for block in model.layers) * 8
    assert forward.on("lm_head", "embed_tokens") == backward.on(*TEXT) == 0
    assert backward.on(".image.") > 0 and backward.on("unet_down.") > 0 and backward.on("unet_up.") > 0
    model.freeze_text(False)  # the counter would have seen it
    assert training_step(model, rows)[1].on(".text.") > 0


# ---- (7) the attention itself ----


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


# ---- (8) packing, and the forms of the mask ----


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


@pytest.mark.parametrize("attention", (True, False), ids=("attention", "convolutions"))
@pytest.mark.parametrize("which", ([0], [3, 1], [1, 1, 4], [0, 1, 2, 3, 4]), ids=str)
def test_the_output_of_some_images_is_that_of_all_of_them_at_their_places(make_model, which, attention):
    model = make_model(dtype=torch.float64, unet_attention=attention)
    latents, t = draw(model, 5)
    tokens, index = Tokens.rows([[BOI, IMAGE, EOI, IMAGE], [IMAGE] * 3], 16), torch.tensor(which)
    hidden, wanted, gradients = model.encode(tokens, latents, t), torch.randn(len(which), 4, 8, 8), []
    outputs = [model.unet_output(hidden, index), model.unet_output(hidden)[index]]
    for output in outputs:
        model.zero_grad()
        (output * wanted).sum().backward(retain_graph=True)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*outputs, **TOLERANCE)
    assert outputs[0].dtype == torch.float32 and outputs[0].std() > 1e-3
    assert (
        gradients[0].keys() == gradients[1].keys() >= dict(model.unet_up.named_parameters("unet_up")).keys()
    )
    for name, x in gradients[0].items():
        torch.testing.assert_close(x, gradients[1][name], rtol=1e-4, atol=1e-6)


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


def layouts(seed: int, n: int, P: int, text: int):
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
        patch.setattr(attention_file, "hybrid_mask", None)  # not called
        found = [(x, make_layout(x[0], x[2], config)) for x in layouts(P, 100, P, text)]
    for (tokens, key, cache), layout in found:
        (B, N), S = tokens.ids.shape, key.document.shape[1]
        assert layout.mask is None and layout.block_mask is None
        if layout.segments is not None:
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
            assert torch.equal(layout.mask[:, 0], wanted) and not wanted.all() and not layout.causal
        elif layout.causal:
            assert torch.equal(wanted, torch.ones_like(wanted).tril())
        else:
            assert wanted.all()
        seen["mask" if layout.mask is not None else "causal" if layout.causal else "none"] += 1
    assert seen["mask"] > 50 and seen["causal"] and seen["none"], seen


@pytest.mark.parametrize(("P", "text"), ((4, 60), (64, 60), (100, 200)))
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
        patch.setattr(attention_file, "compiled_flex", lambda: flex_attention)
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
@pytest.mark.parametrize("frozen", (True, False), ids=("frozen text", "trained text"))
@pytest.mark.parametrize("form", ("chosen", "segments"))
def test_activation_checkpointing_changes_no_loss_and_no_gradient_and_keeps_less(
    make_model, monkeypatch, separation, frozen, form
):
    model = make_model(separation=separation)
    model.freeze_text(frozen)
    force(monkeypatch, form)
    phases = split_phases(RAGGED, model.config.num_patches, pack=120)
    latents, t = draw(model, sum(map(count_images, RAGGED)))
    found = []
    for on in (False, True):
        model.activation_checkpointing = on
        saved: dict[int, int] = {}

        def keep(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            after = model(*phases, latents, t)[1]
            loss = ddpm_loss(model, after, latents) + caption_loss(model, after)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        found.append((loss.item(), grads, sum(n for x, n in saved.items() if x not in own)))
    (loss, grads, bytes_), (loss_on, grads_on, bytes_on) = found
    assert loss_on == loss and grads_on.keys() == grads.keys()
    for name, x in grads.items():
        torch.testing.assert_close(grads_on[name], x, rtol=1e-6, atol=1e-6 * x.abs().max().item())
    assert bytes_on < 0.6 * bytes_


def test_activation_checkpointing_is_off_where_no_gradient_is_wanted(make_model, monkeypatch):
    model, calls = make_model(), []
    model.activation_checkpointing = True
    real = model_file.checkpoint
    monkeypatch.setattr(model_file, "checkpoint", lambda *a, **k: calls.append(a) or real(*a, **k))
    with torch.no_grad():
        features(model, [STORY], *draw(model, 3))
    assert not calls
    model.encode(Tokens.rows([STORY], model.config.num_patches), *draw(model, 3))
    assert len(calls) == model.config.num_hidden_layers


def test_encode_keeps_keys_and_values_only_if_it_is_asked_to(make_model):
    model = make_model()
    tokens, images = Tokens.rows([STORY], model.config.num_patches), draw(model, 3)
    kept, dropped = model.encode(tokens, *images), model.encode(tokens, *images, keep=False)
    assert dropped.cache is None and len(kept.cache.k) == len(kept.cache.v) == model.config.num_hidden_layers
    assert torch.equal(kept.text, dropped.text) and torch.equal(kept.image, dropped.image)
    after = model(*split_phases([STORY], model.config.num_patches), *images)[1]
    assert after.cache is None


@torch.no_grad()
@pytest.mark.parametrize("keep", (True, False))
def test_keys_and_values_that_are_not_kept_are_gone_with_their_layer(make_model, keep):
    model, alive = make_model(), []
    first, last = model.layers[0], model.layers[-1]
    first.register_forward_hook(lambda m, a, out: alive.extend(map(weakref.ref, out[2:])))
    last.register_forward_pre_hook(lambda m, a: alive.append([x() is not None for x in alive]))
    model.encode(Tokens.rows([STORY], model.config.num_patches), *draw(model, 3), keep=keep)
    assert alive[-1] == [keep, keep]


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
        for size in (1, 60, 120, 1000):
            prefix, rest = split_phases(RAGGED, P, pack=size)
            before, after = model(prefix, rest, latents, t)
            noise = torch.cat([noise for _, noise, _ in expected])
            torch.testing.assert_close(model.unet_output(after), noise, **TOLERANCE)
            for found, wanted in (
                (before.text, [h.text[:cut] for h, _, cut in expected]),
                (after.text, [h.text[cut:] for h, _, cut in expected]),
                (after.image, [h.image for h, _, _ in expected]),
            ):
                torch.testing.assert_close(found, torch.cat(wanted), **TOLERANCE)


# ---- (9) what is refused, what stays frozen ----


@SEPARATIONS
def test_the_text_final_norm_never_trains(make_model, separation):
    model = make_model(separation=separation)
    for frozen in (True, False, True, False):
        model.freeze_text(frozen)
        assert not model.norm_text.weight.requires_grad
        assert model.text_is_frozen == frozen
        for name, p in model.text_parameters().items():
            assert p.requires_grad == (not frozen and name != "norm_text.weight")
        assert all(p.requires_grad for p in model.image_parameters().values())


@pytest.mark.parametrize("shape", ((), (5,), (1, 0), (2, 3, 4)))
def test_ids_that_are_no_batch_of_sequences_are_refused(make_model, shape):
    with pytest.raises(ValueError, match="ids"):
        make_model().text_logits(torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("bad", (IMAGE, PAD, 64))
def test_ids_outside_the_vocabulary_are_refused(make_model, bad):
    with pytest.raises(ValueError, match=f"{bad}"):
        make_model().text_logits(torch.tensor([[5, bad]]))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(separation="Deep"), ("separation", "Deep", "deep", "shallow", "none")),
        (dict(num_key_value_heads=3), ("num_attention_heads", "num_key_value_heads", "3")),
        (dict(latent_size=7), ("latent_size", "7")),
        (dict(head_dim=15), ("head_dim", "15")),
    ],
)
def test_a_bad_configuration_names_the_field_and_the_choices(make_config, changes, names):
    with pytest.raises(ValueError) as error:
        make_config(**changes)
    assert all(name in str(error.value) for name in names)


def test_replace_changes_fields_and_names_the_choices_for_a_typo(make_config):
    config = make_config()
    changed = replace(config, latent_size=16)
    assert (changed.latent_size, changed.num_patches, config.latent_size) == (16, 64, 8)
    with pytest.raises(ValueError, match="latentsize.*latent_size"):
        replace(config, latentsize=16)


def test_the_drawing_row_gives_boi_its_probability_and_leaves_the_rest_in_proportion(make_model):
    model = make_model()
    hidden = model.encode(Tokens.text(torch.tensor([[5, 6, 7]])))
    logits, draw_logit = model.logits(hidden.text), model.draw_logit(hidden.text)  # (T, V), (T,)
    others = torch.cat((logits[:, :BOI], logits[:, BOI + 1 :]), dim=1)
    with_row = torch.cat((others, (others.logsumexp(1) + draw_logit)[:, None]), dim=1).softmax(1)
    torch.testing.assert_close(with_row[:, -1], torch.sigmoid(draw_logit))
    torch.testing.assert_close(with_row[:, :-1] / with_row[:, :-1].sum(1, keepdim=True), others.softmax(1))


# ---- the parts of a layer, and (10) sizes ----


def test_rms_norm_normalises_in_float32_and_scales_in_the_dtype_that_goes_in():
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(8, 1e-6).bfloat16()
    with torch.no_grad():
        norm.weight.add_(torch.randn(8, generator=generator))
    x = torch.randn(50, 8, generator=generator).bfloat16() * 300
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), expected.bfloat16() * norm.weight)


def test_image_experts_start_as_copies_and_draw_what_the_text_experts_would(make_model, perturb):
    """A deep model whose experts were just copied equals a dense one of the same text weights and U-Net."""
    deep, dense = make_model(), make_model(separation="none")
    deep.init_image_from_text()
    perturb(deep.unet_down), perturb(deep.unet_up)
    state = deep.state_dict()
    dense.load_state_dict(
        {
            n: state[n.replace(".image.", ".text.").replace("norm_image", "norm_text")]
            for n in dense.state_dict()
        }
    )
    latents, t = draw(deep, 3)
    assert torch.equal(features(deep, [STORY], latents, t), features(dense, [STORY], latents, t))


def test_patches_start_about_as_large_as_words(make_model, perturb):
    model = make_model(patch_positions=False)
    model.init_image_from_text()
    latents, t = draw(model, 32)
    patches = model.unet_down(latents, t)[0]
    ratio = (patches.pow(2).mean() / model.embed_tokens.weight.pow(2).mean()).sqrt().item()
    assert 0.7 < ratio < 1.4


def centre(change: Tensor) -> tuple[float, float]:
    """Row and column around which a map (h, w) has changed."""
    weight = change.square() / change.square().sum()
    rows, columns = (torch.arange(n, dtype=weight.dtype) for n in weight.shape)
    return (weight.sum(1) * rows).sum().item(), (weight.sum(0) * columns).sum().item()


@torch.no_grad()
def test_patches_are_in_row_major_order_on_the_way_down_and_up(make_model):
    model = make_model(latent_size=32, unet_channels=(8, 16), unet_attention=False)
    x, t = draw(model, 1)
    h_in, skips = model.unet_down(x, t)  # 16 x 16 patches
    changed = x.clone()
    changed[0, :, 8:10, 22:24] += 3
    difference = (model.unet_down(changed, t)[0] - h_in)[0].norm(dim=1).view(16, 16)
    assert centre(difference) == pytest.approx((4, 11), abs=2)
    h = h_in.clone()
    h[0, 4 * 16 + 11] += 3
    difference = (model.unet_up(h, t, h_in, skips) - model.unet_up(h_in, t, h_in, skips))[0].norm(dim=0)
    assert centre(difference) == pytest.approx((8.5, 22.5), abs=3)


@torch.no_grad()
def test_the_noise_depends_on_all_that_unet_up_is_given(make_model):
    """Eq. (14): h, t and h_in; and both skips."""
    model = make_model()
    latents, t = draw(model, 2)
    h_in, (full, half) = model.unet_down(latents, t)
    h = torch.randn(h_in.shape, generator=torch.Generator().manual_seed(1))
    before = model.unet_up(h, t, h_in, [full, half])
    assert before.shape == latents.shape
    for other in (
        model.unet_up(h + 1, t, h_in, [full, half]),
        model.unet_up(h, t + 100, h_in, [full, half]),
        model.unet_up(h, t, h_in + 1, [full, half]),
        model.unet_up(h, t, h_in, [full.flip(2), half]),
        model.unet_up(h, t, h_in, [full, half.flip(2)]),
    ):
        assert ((other - before).abs().amax((1, 2, 3)) > 1e-3).all()


def test_the_unet_of_the_8b_model_holds_a_quarter_billion_parameters():
    """Section 4.1 of the paper: "together containing 0.27 billion parameters"."""
    config = ModelConfig(
        vocab_size=8,
        hidden_size=4096,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    with torch.device("meta"):
        unet = nn.ModuleList([UNetDown(config), UNetUp(config)])
    size = sum(p.numel() for p in unet.parameters())
    assert abs(size / 0.27e9 - 1) < 0.05, (
        f"{size / 1e9:.4f} billion with unet_channels = {config.unet_channels}"
    )
