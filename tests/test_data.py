"""data.py: the built-in world and its split, the linear latents, targets, sequences and their proportions."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest
import small
import torch

import data
from data import (
    ATTRIBUTES,
    COLORS,
    JITTER,
    PLACES,
    SHAPES,
    SIZES,
    PatchPCA,
    PictureSource,
    Recipe,
    Scene,
    Shapes,
    all_scenes,
    arrange,
    coverage,
    make_batch,
    next_tokens,
    render,
    split_phases,
    text_document,
)
from model import IMAGE, ModelConfig, Tokens
from pictures import load_pictures

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    boi_id=1,
    eoi_id=2,
    eos_id=3,
    latent_size=4,
)  # 4 patches an image
BOI, EOI, EOS, P = 1, 2, 3, 4


# ---- the built-in world ----


def test_there_are_enough_attributes_and_held_out_combinations():
    assert len(COLORS) >= 8 and len(SHAPES) >= 4 and len(SIZES) >= 2 and len(PLACES) >= 5
    scenes = all_scenes(True) + all_scenes(False)
    assert len({s.background for s in scenes}) >= 8
    assert len(all_scenes(held_out=True)) >= 200


def test_both_parts_together_are_every_combination_once():
    every = {
        (size, color, shape, place, background)
        for size in SIZES
        for color in COLORS
        for shape in SHAPES
        for place in PLACES
        for background in COLORS
        if color != background
    }
    got = [(s.size, s.color, s.shape, s.place, s.background) for s in all_scenes(True) + all_scenes(False)]
    assert len(got) == len(set(got)) and set(got) == every


@pytest.mark.parametrize("held_out", (True, False))
def test_every_value_of_every_attribute_occurs_in_each_part(held_out):
    wanted = dict(background=COLORS, color=COLORS, place=PLACES, shape=SHAPES, size=SIZES)
    for attribute in ATTRIBUTES:
        assert {getattr(s, attribute) for s in all_scenes(held_out)} == set(wanted[attribute])


def test_captions_name_their_scene_and_no_other():
    scenes = all_scenes(True) + all_scenes(False)
    assert len({s.caption for s in scenes}) == len(scenes)
    for s in scenes[::97]:
        assert all(getattr(s, attribute) in s.caption for attribute in ATTRIBUTES)


def test_training_never_shows_a_held_out_combination_and_validation_shows_nothing_else():
    held_out = {s.caption for s in all_scenes(held_out=True)}
    rng, seen = random.Random(0), Counter()
    for _ in range(20):
        seen.update(Shapes().sample(500, rng)[1])
    assert not held_out & set(seen)
    assert len(seen) > 0.9 * len(all_scenes(held_out=False))  # and nearly all of the others
    assert set(Shapes().validation(10**6)[1]) == held_out


def test_validation_pictures_are_the_same_ones_whenever_asked():
    first, again = Shapes().validation(50), Shapes().validation(50)
    assert first[1] == again[1] and torch.equal(first[0], again[0])
    assert len(set(first[1])) == 50


def test_sampled_pictures_show_what_their_captions_say():
    pictures, captions = Shapes().sample(200, random.Random(1))
    scenes = {s.caption: s for s in all_scenes(held_out=False)}
    for picture, caption in zip(pictures, captions, strict=True):
        scene = scenes[caption]
        assert tuple(picture[:, 0, 31].tolist()) == COLORS[scene.background]  # no shape reaches this corner
        middle = picture[:, PLACES[scene.place][0], PLACES[scene.place][1]]  # every shape covers its middle
        assert min(COLORS, key=lambda c: (middle - torch.tensor(COLORS[c])).square().sum()) == scene.color


def test_text_never_mentions_a_held_out_combination():
    patterns = [
        re.compile(
            re.sub(r"{(\w+)}", r"(?P<\1>[a-z ]+?)", re.escape(w).replace(r"\{", "{").replace(r"\}", "}"))
        )
        for w in data.WORDINGS
    ]
    held_out, rng, found = set(all_scenes(held_out=True)), random.Random(0), set()
    for _ in range(8000):
        for sentence in re.split(r"[.?] ?", text_document(rng)):
            for match in (p.fullmatch(sentence) for p in patterns):
                if match:
                    found.add(Scene(**match.groupdict()))
    assert not found & held_out
    assert len(found) > 0.9 * len(all_scenes(held_out=False))  # the patterns do find what is there


def test_questions_in_the_text_are_answered_rightly():
    rng, scenes, asked = random.Random(0), {s.caption: s for s in all_scenes(held_out=False)}, Counter()
    for _ in range(1000):
        caption, *rest = text_document(rng).split(". ")
        if caption not in scenes:  # another wording, or facts
            continue
        for sentence in rest[:-1]:
            question, answer = sentence.split("? ")
            attribute = {"background": "background", "what color": "color", "where": "place"} | {
                "what shape": "shape",
                "how big": "size",
            }
            kind = next(v for k, v in attribute.items() if k in question)
            assert answer == getattr(scenes[caption], kind)
            asked[kind] += 1
    assert set(asked) == set(ATTRIBUTES)


# ---- pictures ----


def centre_of_mass(mask: torch.Tensor) -> tuple[float, float]:
    """Row and column, in pixels from the upper left corner of the picture."""
    at = torch.arange(mask.shape[0], dtype=torch.float64) + 0.5
    mask = mask.double() / mask.double().sum()
    return (mask.sum(1) * at).sum().item(), (mask.sum(0) * at).sum().item()


def shown(pictures: torch.Tensor, scene: Scene) -> torch.Tensor:
    """How much of each pixel the shape covers, read off pictures of one scene."""
    a, b = torch.tensor(COLORS[scene.background]), torch.tensor(COLORS[scene.color])
    channel = int((b - a).abs().argmax())
    return (pictures[:, channel].float() - a[channel]) / (b[channel] - a[channel])


def test_without_rng_every_shape_sits_exactly_in_its_place():
    for shape in ("circle", "square", "cross"):  # their centre of mass is their middle
        for place, (row, column) in PLACES.items():
            scene = Scene("big", "black", shape, place, "white")
            y, x = centre_of_mass(shown(render([scene]), scene)[0])
            assert abs(y - row) < 0.02 and abs(x - column) < 0.02
    assert torch.equal(render([scene]), render([scene]))


def test_jitter_moves_a_shape_by_at_most_one_pixel_each_way_and_by_all_of_these():
    assert JITTER == 1
    for shape in SHAPES:
        scene, shifts = Scene("small", "white", shape, "top left", "black"), Counter()
        y0, x0 = centre_of_mass(shown(render([scene]), scene)[0])
        for mask in shown(render([scene] * 200, random.Random(0)), scene):
            y, x = centre_of_mass(mask)
            shifts[round(y - y0), round(x - x0)] += 1
            assert abs(y - y0 - round(y - y0)) < 0.02 and abs(x - x0 - round(x - x0)) < 0.02
        assert set(shifts) == {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


def test_no_shape_is_cut_off_by_the_border():
    area = coverage().sum((-2, -1)).flatten(2)  # (shape, size, place x jitter)
    assert torch.allclose(area, area[..., :1].expand_as(area), atol=0.05)


# ---- linear latents ----


def fit(whiten: float = 0.5) -> PatchPCA:
    return PatchPCA.fit(Shapes().sample(1000, random.Random(0))[0], channels=16, patch=4, whiten=whiten)


@pytest.mark.parametrize("whiten", (0.0, 0.5, 1.0))
def test_latents_have_about_unit_variance(whiten):
    z = fit(whiten).encode(render(list(all_scenes(held_out=True)), random.Random(1)))  # (M, C, h, w)
    assert z.shape[1:] == (16, 8, 8)
    assert 0.85 < z.square().mean() < 1.15
    per_channel = z.square().mean((0, 2, 3))
    if whiten == 1:  # all components alike
        assert per_channel.min() > 0.5 and per_channel.max() < 2
    else:
        assert per_channel.argmax() == 0 and per_channel[0] > 2 * per_channel[-1]


def test_the_round_trip_of_held_out_pictures_is_nearly_exact():
    codec, pictures = fit(), render(list(all_scenes(held_out=True)), random.Random(1))
    error = (codec.decode(codec.encode(pictures)).float() - pictures.float()).square().mean()
    assert error < 0.01 * pictures.float().var()  # 10 channels of 48 would not do
    assert fit_channels(48).decode(fit_channels(48).encode(pictures)).sub(pictures.float()).abs().max() <= 1


def fit_channels(channels: int) -> PatchPCA:
    return PatchPCA.fit(Shapes().sample(200, random.Random(0))[0], channels, patch=4, whiten=0.0)


def test_the_bound_is_the_largest_latent_of_the_pictures_it_was_fitted_on():
    pictures = Shapes().sample(1000, random.Random(0))[0]
    codec = fit()
    z = codec.encode(pictures).abs().amax((0, 2, 3))
    assert codec.bound.shape == (16, 1, 1)
    assert torch.allclose(z, codec.bound.flatten(), rtol=1e-4, atol=1e-4)
    held_out = codec.encode(render(list(all_scenes(held_out=True)))).abs().amax((0, 2, 3))
    assert (held_out < 1.25 * codec.bound.flatten()).all()


def test_encoding_inverts_decoding_within_the_rounding_to_whole_levels():
    codec = fit()
    z = 0.2 * torch.randn(20, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    z[:, 3:] *= 0.3
    pictures = codec.decode(z)
    inside = (
        ((pictures > 0) & (pictures < 255)).unflatten(2, (8, 4)).unflatten(4, (8, 4)).all(5).all(3).all(1)
    )
    assert inside.float().mean() > 0.3  # patches that no clamping touched
    limit = 0.5 / 127.5 * codec.basis.abs().sum(0) * codec.scale  # every pixel off by half a level
    error = (codec.encode(pictures) - z).abs() / limit[:, None, None]
    assert error.amax(1)[inside].max() < 1.01


def test_a_patch_stays_where_it_is():
    codec = fit()
    black = codec.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    dotted = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    dotted[0, :, 8:12, 20:24] = 255
    changed = (codec.encode(dotted) != black).any(1)[0].nonzero().tolist()
    assert changed == [[2, 5]]  # row 8 / 4, column 20 / 4


# ---- targets ----


def brute_force_targets(row: list[int]) -> tuple[list[int], list[int]]:
    """Of each text token of a sequence: the next text token, and whether an image starts next."""
    words, draws = [], []
    for i, token in enumerate(row):
        if token == IMAGE:
            continue
        last = i + 1 == len(row)
        if last or token == BOI or row[i + 1] == IMAGE:
            words.append(-100)
            draws.append(-100)
        elif row[i + 1] == BOI:
            words.append(-100)
            draws.append(1)
        else:
            words.append(row[i + 1])
            draws.append(0)
    return words, draws


def random_rows(rng: random.Random, n: int) -> list[list[int]]:
    pieces = ([BOI, IMAGE, EOI], [BOI, IMAGE], [IMAGE], [EOS], [BOI])
    rows = []
    for _ in range(n):
        row: list[int] = []
        for _ in range(rng.randint(1, 5)):
            row += rng.choice(pieces) if rng.random() < 0.5 else [rng.randint(4, 63) for _ in range(3)]
        rows.append(row)
    return rows


def test_targets_equal_a_loop_over_the_sequences():
    rng = random.Random(0)
    for _ in range(50):
        rows = random_rows(rng, 4)  # ragged: the shorter ones are padded
        word, draw = next_tokens(Tokens.rows(rows, P), BOI)
        expected = [brute_force_targets(row) for row in rows]
        assert word.tolist() == [x for words, _ in expected for x in words]
        assert draw.tolist() == [x for _, draws in expected for x in draws]


def test_targets_of_a_captioned_picture_written_out():
    """BOI | patches EOI 7 8 EOS: nothing at BOI, no patch predicts EOI, nothing behind EOS or at padding."""
    _, rest = split_phases([[BOI, IMAGE, EOI, 7, 8, EOS], [BOI, IMAGE, EOI, 9, EOS]], P)
    word, draw = next_tokens(rest, BOI)
    assert word.tolist() == [7, 8, EOS, -100, 9, EOS, -100]  # one for each text token, none for a patch
    assert draw.tolist() == [0, 0, 0, -100, 0, 0, -100]


def test_targets_of_a_caption_before_its_picture_written_out():
    prefix, rest = split_phases([[7, 8, 9, BOI, IMAGE], [BOI, IMAGE]], P)
    word, draw = next_tokens(prefix, BOI)
    assert word.tolist() == [8, 9, -100, -100, -100]  # BOI is no target of the frozen head
    assert draw.tolist() == [0, 0, 1, -100, -100]  # but of the row that decides when to draw
    assert [len(x) for x in next_tokens(rest, BOI)] == [0, 0]


def test_targets_of_packed_documents_are_those_of_each_alone():
    rng = random.Random(1)
    for _ in range(50):
        rows = [random_rows(rng, rng.randint(1, 4)) for _ in range(3)]
        word, draw = next_tokens(Tokens.packed(rows, P), BOI)
        expected = [brute_force_targets(document) for row in rows for document in row]
        assert word.tolist() == [x for words, _ in expected for x in words]
        assert draw.tolist() == [x for _, draws in expected for x in draws]


# ---- sequences ----


def row_ids(tokens: Tokens, r: int) -> list[int]:
    """Ids of a row without padding, patches as IMAGE."""
    return [i for i in tokens.ids[r].tolist() if i >= IMAGE]


def kinds(batch, captions: list[list[int]]) -> list[str]:
    """What became of each sample; fails for anything else."""
    out = []
    for r, caption in enumerate(captions):
        whole = row_ids(batch.prefix, r), row_ids(batch.rest, r)
        forms = {
            "first": (caption + [BOI], [IMAGE] * P),
            "dropped": ([BOI], [IMAGE] * P),
            "behind": ([BOI], [IMAGE] * P + [EOI] + caption + [EOS]),
        }
        out.append(next(name for name, form in forms.items() if form == whole))
    return out


def latents(n: int) -> torch.Tensor:
    return torch.zeros(n, 1, 1, 1)


def test_four_fifths_of_the_captions_come_first_and_a_tenth_of_these_are_dropped():
    rng, captions, count = random.Random(0), [[10, 11], [12, 13, 14]] * 40, Counter()
    batches = [kinds(make_batch(captions, latents(80), Recipe(), CONFIG, rng), captions) for _ in range(100)]
    for batch in batches:
        count.update(batch)
    n = sum(count.values())
    first = count["first"] + count["dropped"]
    assert abs(first / n - 0.8) < 4 * math.sqrt(0.8 * 0.2 / n)
    assert abs(count["dropped"] / first - 0.1) < 4 * math.sqrt(0.1 * 0.9 / first)
    # drawn for each sample: every batch holds both orders, and hardly any fails to hold a dropped caption
    assert all({"first", "behind"} <= set(batch) for batch in batches)
    assert sum("dropped" in batch for batch in batches) > 95


def test_order_and_drop_do_not_hang_together_with_the_place_in_the_batch():
    rng, captions = random.Random(0), [[10, 11]] * 20
    at = [Counter() for _ in captions]
    for _ in range(400):
        for counter, kind in zip(
            at, kinds(make_batch(captions, latents(20), Recipe(), CONFIG, rng), captions), strict=True
        ):
            counter[kind] += 1
    for counter in at:
        assert 0.65 < counter["first"] / 400 < 0.79 and 0.12 < counter["behind"] / 400 < 0.28


def test_only_a_picture_before_its_caption_has_the_noise_limit():
    rng, captions = random.Random(0), [[10, 11], [12, 13, 14]] * 40
    batch = make_batch(captions, latents(80), Recipe(noise_limit=321), CONFIG, rng)
    limits = {"first": 1000, "dropped": 1000, "behind": 321}
    assert batch.max_t.tolist() == [limits[k] for k in kinds(batch, captions)]
    assert set(batch.max_t.tolist()) == {1000, 321}


def test_a_dropped_caption_leaves_no_trace():
    always, never = Recipe(caption_first=1, caption_drop=1), Recipe(caption_first=1, caption_drop=0)
    dropped = [
        make_batch([c], latents(1), always, CONFIG, random.Random(0)) for c in ([10, 11, 12], [20], [])
    ]
    empty = make_batch([[]], latents(1), never, CONFIG, random.Random(0))
    for batch in dropped:
        for tokens, wanted in ((batch.prefix, empty.prefix), (batch.rest, empty.rest)):
            assert all(torch.equal(getattr(tokens, f), getattr(wanted, f)) for f in vars(wanted))


def test_positions_and_image_numbers_go_on_where_the_first_phase_ended():
    rows = [[5, 6, 7, BOI, IMAGE, EOI, 8, BOI, IMAGE], [BOI, IMAGE, EOS], [9, BOI, IMAGE, IMAGE]]
    prefix, rest = split_phases(rows, P)
    whole = Tokens.rows(rows, P)
    for r in range(len(rows)):
        for field in ("ids", "image", "position", "document"):
            halves = [getattr(t, field)[r][t.document[r] >= 0] for t in (prefix, rest)]
            assert torch.equal(torch.cat(halves), getattr(whole, field)[r][whole.document[r] >= 0]), field
    assert not (prefix.ids == IMAGE).any()
    assert (rest.ids[:, 0] == IMAGE).all()


# ---- packing ----


def span(row: list[int]) -> int:
    return len(row) + (P - 1) * row.count(IMAGE)


def documents_of(prefix: Tokens, rest: Tokens) -> list[list[list[int]]]:
    """The documents of each row, put together again from both phases; patches as P times IMAGE."""
    out = []
    for r in range(len(rest.ids)):
        count = int(torch.cat((prefix.document[r], rest.document[r])).max()) + 1
        out.append([[] for _ in range(count)])
        for tokens in (prefix, rest):
            for i, d in zip(tokens.ids[r].tolist(), tokens.document[r].tolist(), strict=True):
                if d >= 0:
                    out[-1][d].append(i)
    return out


def spread(row: list[int]) -> list[int]:
    return [i for token in row for i in ([IMAGE] * P if token == IMAGE else [token])]


def captioned(rng: random.Random, n: int) -> list[list[int]]:
    out = []
    for _ in range(n):
        caption = [rng.randint(4, 63) for _ in range(rng.randint(0, 12))]
        behind = [BOI, IMAGE, EOI, *caption, EOS]
        out.append(
            rng.choice(([*caption, BOI, IMAGE], behind, [*caption, BOI, IMAGE, IMAGE, EOI, BOI, IMAGE]))
        )
    return out


def test_packing_fills_rows_in_order_as_long_as_there_is_room():
    rng = random.Random(0)
    for pack in (1, 5, 17, 24, 60, 200, 10**6):
        for _ in range(10):
            sequences = captioned(rng, 12)
            prefix, rest = split_phases(sequences, P, pack)
            rows = documents_of(prefix, rest)
            assert [d for row in rows for d in row] == [
                spread(s) for s in sequences
            ]  # order, images' as well
            lengths = [sum(map(len, row)) for row in rows]
            for row, length, below in zip(rows, lengths, rows[1:] + [None], strict=True):
                assert length <= pack or len(row) == 1  # one that is too long has a row of its own
                assert below is None or length + len(below[0]) > pack  # the next did not fit
            following = iter(sequences)
            whole = Tokens.packed([[next(following) for _ in row] for row in rows], P)
            for field in ("ids", "image", "position"):  # of every document, both phases together
                for r, row in enumerate(rows):
                    for d in range(len(row)):
                        halves = [getattr(t, field)[r][t.document[r] == d] for t in (prefix, rest)]
                        assert torch.equal(
                            torch.cat(halves), getattr(whole, field)[r][whole.document[r] == d]
                        )


@pytest.mark.parametrize(
    ("pack", "rows"), [(0, [1, 1, 1, 1]), (1, [1, 1, 1, 1]), (12, [2, 1, 1]), (13, [2, 1, 1]), (14, [2, 2])]
)
def test_rows_of_packed_documents_written_out(pack, rows):
    sequences = [
        [BOI, IMAGE],
        [9, BOI, IMAGE],
        [8, BOI, IMAGE, EOI],
        [9, BOI, IMAGE, EOI],
    ]  # 5, 6, 7, 7 tokens
    assert [span(s) for s in sequences] == [5, 6, 7, 7]
    assert [len(row) for row in documents_of(*split_phases(sequences, P, pack))] == rows


def test_without_packing_each_document_has_its_row():
    sequences = captioned(random.Random(0), 10)
    for pack in (0, 1):
        for tokens, wanted in zip(split_phases(sequences, P, pack), split_phases(sequences, P), strict=True):
            assert all(torch.equal(getattr(tokens, f), getattr(wanted, f)) for f in vars(tokens))


def test_a_packed_batch_holds_what_an_unpacked_one_holds():
    rng, captions = random.Random(0), [[10, 11], [12, 13, 14], [], [15]] * 5
    orders, x = Recipe(0.6, 0.2).draw(20, rng), torch.randn(20, 1, 4, 4)
    alone, packed = (arrange(captions, x, orders, CONFIG, 321, pack) for pack in (0, 40))
    assert torch.equal(packed.latents, x) and torch.equal(packed.max_t, alone.max_t)
    assert set(packed.max_t.tolist()) == {321, 1000} and 1 < len(packed.rest.ids) < 10
    assert [d for row in documents_of(packed.prefix, packed.rest) for d in row] == [
        row[0] for row in documents_of(alone.prefix, alone.rest)
    ]
    for phase in ("prefix", "rest"):  # and the same things are learned
        found, wanted = (next_tokens(getattr(batch, phase), BOI) for batch in (packed, alone))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ---- real pictures as a source ----


def test_pictures_set_aside_for_validation_are_never_trained_on(tmp_path):
    pictures = load_pictures(str(small.write_photos(tmp_path / "many", n=45)), 16)
    source = PictureSource(pictures, None)
    assert len(source.val.captions) == 3 and len(source.train.captions) == 42
    assert sorted(source.val.names + source.train.names) == sorted(pictures.names)
    drawn = set()
    for seed in range(10):
        drawn |= set(source.sample(100, random.Random(seed))[1])
    assert drawn == set(source.train.captions) and not drawn & set(source.validation(96)[1])
    for part in (source.train, source.val):  # each picture keeps its caption
        for pixels, caption in zip(part.pixels, part.captions, strict=True):
            assert torch.equal(pixels, pictures.pixels[pictures.captions.index(caption)])


def test_pictures_of_their_own_for_validation_leave_all_others_to_training(tmp_path):
    first = load_pictures(str(small.write_photos(tmp_path / "a", n=21)), 16)
    second = load_pictures(str(small.write_photos(tmp_path / "b", n=3, seed=1)), 16)
    source = PictureSource(first, second)
    assert source.train.names == first.names
    assert sorted(source.validation(96)[1]) == sorted(second.captions)
    assert torch.equal(source.validation(2)[0], source.validation(2)[0])


def test_one_picture_alone_is_an_error():
    one = load_pictures(str(small.photos()), 16)
    with pytest.raises(ValueError, match="one picture is too few"):
        PictureSource(data.pick(one, [0]), None)
