"""model.py: who sees whom, caching, separation, where gradients go, and what work is done.

Every model here has all its parameters perturbed (see conftest.py). Where two ways of computing must agree,
it has float64 weights: what is left is rounding below 1e-6, and a wrong rule is off by far more. A sequence
is a list of token ids in which IMAGE stands for one whole image, as in `Tokens.rows`.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import model as model_file
from data import split_phases
from model import (
    IMAGE,
    PAD,
    Cache,
    Hidden,
    LMFusion,
    ModelConfig,
    RMSNorm,
    Tokens,
    attention,
    hybrid_mask,
    replace,
)
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
        model_file.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or fused(*a, **k)
    )
    for n, expected in ((724, 0), (725, 1)):  # 724² <= DENSE < 725²
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


# ---- (8) what is refused, what stays frozen ----


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


# ---- the parts of a layer, and (9) sizes ----


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
