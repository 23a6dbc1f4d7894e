"""data.py: sources, the linear latents, targets, sequences and their proportions, documents of tasks."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections import Counter

import helpers
import pytest
import torch
from conftest import build_tokenizer
from test_world import HELD_OUT, TRAIN, check_edit, differing
from tokenizers import AddedToken, Tokenizer

import data
from attention import IMAGE, Tokens
from chat.template import apply_chat_template, check_messages, encode, text_of
from data import (
    BEHIND,
    DROPPED,
    FIRST,
    TASKS,
    Batch,
    Document,
    PatchPCA,
    PictureSource,
    Recipe,
    Shapes,
    arrange,
    caption_document,
    chat_document,
    collate,
    edit_document,
    make_batch,
    next_tokens,
    parse_tasks,
    split_phases,
)
from diffusion import Diffusion
from model import ModelConfig
from scale.pictures import Edits, Pictures, load_pictures
from small.dialogues import THINK_PROMPT, Shot
from small.world import COLORS, PLACES, Edit, all_scenes, render

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


# ---- the built-in pictures as a source ----


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


def test_one_picture_of_the_built_in_world_and_its_caption():
    rng, seen, shifts = random.Random(0), set(), set()
    for _ in range(1000):
        shot, caption = Shapes().captioned(rng)
        assert caption == shot.scene.caption and shot.scene in TRAIN
        seen.add(shot.scene)
        shifts.add(shot.shift)
    assert len(seen) > 700 and len(shifts) == 9


def test_shots_are_rendered_where_they_say():
    shots = [Shapes().captioned(random.Random(n))[0] for n in range(20)]
    pixels = Shapes().pixels(shots)
    assert pixels.shape == (20, 3, 32, 32) and pixels.dtype == torch.uint8
    for shot, picture in zip(shots, pixels, strict=True):
        assert torch.equal(picture, render([shot.scene])[0].roll(shot.shift, (1, 2)))


def check_shots(before: Shot, after: Shot, instruction: str) -> None:
    """An edit moves nothing but what it says."""
    assert before.shift == after.shift
    check_edit(Edit(before.scene, after.scene, *differing(before.scene, after.scene), instruction))


def test_built_in_edits_are_of_training_pictures():
    rng, shifts = random.Random(0), set()
    for _ in range(300):
        before, after, instruction = Shapes().edited(rng)
        check_shots(before, after, instruction)
        assert {before.scene, after.scene} <= TRAIN
        shifts.add(before.shift)
    assert len(shifts) == 9


def test_built_in_validation_edits_lead_to_held_out_scenes_and_stay_the_same():
    found, again = Shapes().validation_edits(96), Shapes().validation_edits(96)
    assert found == again and [len(x) for x in found] == [96] * 3
    for before, after, instruction in zip(*found, strict=True):
        check_shots(before, after, instruction)
        assert after.scene in HELD_OUT
    assert len({s.shift for s in found[0]}) == 9


def test_two_fifths_of_the_built_in_conversations_are_with_thoughts():
    rng, n = random.Random(0), 1500
    prompts = [Shapes().conversation(rng)[0] for _ in range(n)]
    thinking = [p == {"role": "system", "content": THINK_PROMPT} for p in prompts]
    assert sum(thinking) / n == pytest.approx(0.4, abs=0.05)
    assert all(p["role"] == "user" for p, t in zip(prompts, thinking, strict=True) if not t)


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


def brute_force_targets(row: list[int], own: list[bool] | None = None) -> tuple[list[int], list[int]]:
    """Of each text token of a sequence: the next text token, and whether an image starts next.

    Only where the next token is the model's `own`.
    """
    words, draws = [], []
    for i, token in enumerate(row):
        if token == IMAGE:
            continue
        last = i + 1 == len(row)
        if last or token == BOI or row[i + 1] == IMAGE or not (own is None or own[i + 1]):
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


def test_what_others_say_is_no_target():
    rng = random.Random(2)
    for _ in range(50):
        rows = [random_rows(rng, rng.randint(1, 4)) for _ in range(3)]
        own = [[[rng.random() < 0.5 for _ in document] for document in row] for row in rows]
        word, draw = next_tokens(Tokens.packed(rows, P, loss_mask=own), BOI)
        pairs = [pair for row in zip(rows, own, strict=True) for pair in zip(*row, strict=True)]
        expected = [brute_force_targets(*pair) for pair in pairs]
        assert word.tolist() == [x for words, _ in expected for x in words]
        assert draw.tolist() == [x for _, draws in expected for x in draws]


def test_targets_of_two_speakers_written_out():
    """5 6 7 are another's, 8 9 and the picture the model's, and so are 10 and EOS behind it."""
    row = [5, 6, 7, 8, 9, BOI, IMAGE, EOI, 10, EOS, 11]
    own = [False] * 3 + [True] * 7 + [False]
    prefix, rest = split_phases([row], P, loss_mask=[own])
    word, draw = next_tokens(prefix, BOI)
    assert word.tolist() == [-100, -100, 8, 9, -100, -100] and draw.tolist() == [-100, -100, 0, 0, 1, -100]
    word, draw = next_tokens(rest, BOI)
    assert word.tolist() == [10, EOS, -100, -100] and draw.tolist() == [0, 0, -100, -100]
    nobody = split_phases([row], P, loss_mask=[[False] * len(row)])
    assert all((x == -100).all() for tokens in nobody for x in next_tokens(tokens, BOI))


def taught(batch: Batch, boi_id: int) -> list[torch.Tensor]:
    """The targets of both phases."""
    both = (next_tokens(tokens, boi_id) for tokens in (batch.prefix, batch.rest))
    return [torch.cat(x) for x in zip(*both, strict=True)]


# ---- sequences ----


def row_ids(tokens: Tokens, r: int) -> list[int]:
    """Ids of a row without padding, patches as IMAGE."""
    return [i for i in tokens.ids[r].tolist() if i >= IMAGE]


def alike(a: Tokens, b: Tokens, but: str = "") -> bool:
    """Do two plans agree, apart from one field?"""
    pairs = [(x, vars(b)[name]) for name, x in vars(a).items() if name != but]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


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
            assert alike(tokens, wanted)


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


def test_what_is_the_models_own_goes_with_its_tokens_into_both_phases():
    rng = random.Random(3)
    for pack in (0, 40):
        rows = captioned(rng, 8)
        own = [[rng.random() < 0.5 for _ in row] for row in rows]
        prefix, rest = split_phases(rows, P, pack, own)
        for tokens in (prefix, rest):
            assert (
                tokens.loss_mask.shape == tokens.ids.shape and not tokens.loss_mask[tokens.document < 0].any()
            )
        halves = [
            flags
            for r, row in enumerate(documents_of(prefix, rest))
            for d in range(len(row))
            for flags in [[x for t in (prefix, rest) for x in t.loss_mask[r][t.document[r] == d].tolist()]]
        ]
        wanted = [
            [x for i, x in zip(row, mine, strict=True) for _ in range(P if i == IMAGE else 1)]
            for row, mine in zip(rows, own, strict=True)
        ]
        assert halves == wanted
    plain = split_phases(rows, P, pack)
    for tokens, with_own in zip(plain, (prefix, rest), strict=True):
        assert tokens.loss_mask is None
        assert alike(tokens, with_own, but="loss_mask")


def test_a_sequence_without_a_picture_is_all_in_the_first_phase():
    prefix, rest = split_phases([[5, 6, 7], [8, BOI, IMAGE, EOI], [9]], P)
    assert [row_ids(prefix, r) for r in range(3)] == [[5, 6, 7], [8, BOI], [9]]
    assert [row_ids(rest, r) for r in range(3)] == [[], [IMAGE] * P + [EOI], []]
    assert (rest.document[[0, 2]] == -1).all() and len(prefix.ids) == len(rest.ids) == 3
    assert next_tokens(prefix, BOI)[0].tolist() == [6, 7, -100, -100, -100, -100]
    packed = split_phases([[5, 6, 7], [8, BOI, IMAGE, EOI], [9]], P, pack=40)
    assert documents_of(*packed) == [[[5, 6, 7], [8, BOI, *[IMAGE] * P, EOI], [9]]]
    assert rest.position[1, : P + 1].tolist() == list(range(2, P + 3))
    own = packed[1].document[0] == 1
    assert packed[1].position[0][own].tolist() == list(range(2, P + 3))


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
            assert alike(tokens, wanted)


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
    pictures = load_pictures(str(helpers.write_photos(tmp_path / "many", n=45)), 16)
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
    first = load_pictures(str(helpers.write_photos(tmp_path / "a", n=21)), 16)
    second = load_pictures(str(helpers.write_photos(tmp_path / "b", n=3, seed=1)), 16)
    source = PictureSource(first, second)
    assert source.train.names == first.names
    assert sorted(source.validation(96)[1]) == sorted(second.captions)
    assert torch.equal(source.validation(2)[0], source.validation(2)[0])


def test_one_picture_alone_is_an_error():
    one = load_pictures(str(helpers.photos()), 16)
    with pytest.raises(ValueError, match="one picture is too few"):
        PictureSource(data.pick(one, [0]), None)


# ---- noise ----


def noisy_batch(max_t: list[int]) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(max_t))
    x, eps = torch.randn(2, len(max_t), 3, 4, 4, generator=generator)
    t = torch.randint(1, 1000, (len(max_t),), generator=generator)
    batch = Batch(*split_phases([[BOI] + [IMAGE] * len(max_t)], P), x, torch.tensor(max_t))
    return batch, t, eps


def test_clean_images_stay_clean_and_the_others_get_noise():
    batch, t, eps = noisy_batch([0, 1000, 0, 500, 1, 0])
    diffusion = Diffusion()
    x_t, times, which = batch.noised(diffusion, t, eps)
    assert which.tolist() == [1, 3, 4]
    for i, limit in enumerate(batch.max_t.tolist()):
        if limit:
            a = diffusion.alpha_bar[t[i]].item()
            expected = math.sqrt(a) * batch.latents[i] + math.sqrt(1 - a) * eps[i]
            assert torch.allclose(x_t[i], expected, atol=1e-6) and times[i] == t[i]
        else:
            assert torch.equal(x_t[i], batch.latents[i]) and times[i] == 0


def test_where_all_images_are_noisy_nothing_is_picked_out():
    batch, t, eps = noisy_batch([1000, 500])
    x_t, times, which = batch.noised(Diffusion(), t, eps)
    assert which is None and torch.equal(times, t)
    assert torch.equal(x_t, Diffusion().q_sample(batch.latents, t, eps))


def test_where_no_image_is_noisy_the_first_stands_for_them_and_all_are_clean():
    batch, t, eps = noisy_batch([0, 0, 0])
    x_t, times, which = batch.noised(Diffusion(), t, eps)
    assert which.tolist() == [0] and torch.equal(x_t, batch.latents) and times.tolist() == [0] * 3


# ---- tasks ----


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("edit", {"edit": 1.0}),
        ("generate=2,edit=1,chat=1", {"generate": 0.5, "edit": 0.25, "chat": 0.25}),
        ("caption,chat", {"caption": 0.5, "chat": 0.5}),
        (" generate = 3 , edit ", {"generate": 0.75, "edit": 0.25}),
        ("edit=0.001,chat=0.003", {"edit": 0.25, "chat": 0.75}),
    ],
)
def test_tasks_and_their_shares(text, shares):
    assert parse_tasks(text) == pytest.approx(shares) and list(parse_tasks(text)) == list(shares)


def test_every_task_can_be_named():
    assert set(TASKS) == {"caption", "generate", "edit", "chat"}
    assert parse_tasks(",".join(TASKS)) == dict.fromkeys(TASKS, 0.25)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "'' is not one of caption, generate, edit, chat"),
        ("edits", "'edits' is not one of"),
        ("edit,", "'' is not one of"),
        ("=2", "'' is not one of"),
        ("Edit", "'Edit' is not one of"),
        ("edit=", "the weight '' of edit is not a number"),
        ("chat=much", "the weight 'much' of chat is not a number"),
        ("chat=1=2", "the weight '1=2' of chat is not a number"),
        ("edit=0", "the weight of edit must be positive"),
        ("edit=1,chat=-1", "the weight of chat must be positive"),
        ("edit=nan", "the weight of edit must be positive"),
        ("edit=inf", "the weight of edit must be positive"),
    ],
)
def test_wrong_tasks_are_errors_in_words(text, what):
    with pytest.raises(ValueError, match=re.escape(what)) as error:
        parse_tasks(text)
    assert str(error.value).startswith(f"--task {text}: ")


@pytest.mark.parametrize("order", (FIRST, DROPPED, BEHIND))
def test_a_captioned_picture_is_the_same_document_in_both_stages(order):
    recipe, captions = Recipe(noise_limit=321), [[10, 11, 12], [20], []]
    documents = [caption_document(f"{c}", c, order, CONFIG, recipe) for c in captions]
    x = torch.randn(3, 4, 4, 4)
    batch, wanted = collate(documents, x, CONFIG), arrange(captions, x, [order] * 3, CONFIG, 321)
    assert torch.equal(batch.latents, x) and torch.equal(batch.max_t, wanted.max_t)
    for phase in ("prefix", "rest"):
        assert alike(getattr(batch, phase), getattr(wanted, phase), but="loss_mask")
    assert [d.pictures for d in documents] == [["[10, 11, 12]"], ["[20]"], ["[]"]]
    word, draw = taught(batch, BOI)
    assert not (draw == 1).any()  # nothing is said about when to draw
    learned = word[word >= 0].tolist()
    assert learned == ([10, 11, 12, EOS, 20, EOS, EOS] if order == BEHIND else [])


def test_documents_of_a_captioned_picture_written_out():
    forms = {o: caption_document("x", [10, 11], o, CONFIG, Recipe()) for o in (FIRST, DROPPED, BEHIND)}
    assert forms[FIRST] == Document([10, 11, BOI, IMAGE], ["x"], [1000], [False] * 4)
    assert forms[DROPPED] == Document([BOI, IMAGE], ["x"], [1000], [False] * 2)
    assert forms[BEHIND].ids == [BOI, IMAGE, EOI, 10, 11, EOS] and forms[BEHIND].max_t == [500]
    assert forms[BEHIND].loss_mask[3:] == [True] * 3  # of what stands before these nothing can be learned
    assert [len(forms[o]) for o in forms] == [1, 1, 5]


def test_an_edit_written_out():
    document = edit_document("before", "after", [10, 11], False, CONFIG)
    assert document.ids == [BOI, IMAGE, EOI, 10, 11, BOI, IMAGE]
    assert document.pictures == ["before", "after"] and document.max_t == [0, 1000]
    assert document.loss_mask == [False] * 7 and len(document) == 6
    dropped = edit_document("before", "after", [10, 11], True, CONFIG)  # nothing to change: the source again
    assert dropped == Document([BOI, IMAGE, EOI, BOI, IMAGE], ["before"] * 2, [0, 1000], [False] * 5)


def test_a_batch_of_documents_holds_them_in_order():
    documents = [
        edit_document("a", "b", [10, 11], False, CONFIG),
        Document([5, 6, 7], [], [], [False, True, True]),
        caption_document("c", [12], BEHIND, CONFIG, Recipe(noise_limit=7)),
    ]
    x = torch.randn(3, 4, 4, 4)
    for pack in (0, 60):
        batch = collate(documents, x, CONFIG, pack)
        assert [d for row in documents_of(batch.prefix, batch.rest) for d in row] == [
            spread(d.ids) for d in documents
        ]
        assert torch.equal(batch.latents, x) and batch.max_t.tolist() == [0, 1000, 7]
        learned = [next_tokens(t, BOI)[0] for t in (batch.prefix, batch.rest)]
        assert [w[w >= 0].tolist() for w in learned] == [[6, 7], [12, EOS]]
    assert len(batch.rest.ids) == 1


def test_a_batch_without_a_picture_gets_an_empty_clean_one():
    documents = [Document([5, 6, 7], [], [], [False, True, True]), Document([8], [], [], [True])]
    for pack in (0, 60):
        batch = collate(documents, torch.zeros(0, 4, 4, 4), CONFIG, pack)
        assert batch.max_t.tolist() == [0] and torch.equal(batch.latents, torch.zeros(1, 4, 4, 4))
        found = [d for row in documents_of(batch.prefix, batch.rest) for d in row]
        assert found == [[5, 6, 7], [8], [BOI] + [IMAGE] * P]
        word, draw = next_tokens(batch.prefix, BOI)
        assert word.tolist() == [6, 7] + [-100] * 3 and draw.tolist() == [0, 0] + [-100] * 3
    assert documents[0].ids == [5, 6, 7] and len(documents) == 2  # and the caller's are what they were
    assert [len(d) for d in documents] == [0, 0]


# ---- conversations ----


def chat_tokenizer() -> Tokenizer:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return tokenizer


TOKENIZER = chat_tokenizer()
CHAT = dataclasses.replace(
    CONFIG,
    vocab_size=TOKENIZER.get_vocab_size(),
    boi_id=TOKENIZER.token_to_id("<|vision_start|>"),
    eoi_id=TOKENIZER.token_to_id("<|vision_end|>"),
)


def said(ids: list[int]) -> str:
    """Token ids as text, with <|image_pad|> for a picture."""
    groups = itertools.groupby(ids, key=lambda i: i == IMAGE)
    return "".join(
        "<|image_pad|>" * len(list(run)) if image else TOKENIZER.decode(list(run), skip_special_tokens=False)
        for image, run in groups
    )


def image(name: str) -> dict:
    return {"type": "image", "image": name}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


TWO_TURNS = [
    {"role": "system", "content": "think."},
    {"role": "user", "content": [image("shown"), text("paint it red")]},
    {"role": "assistant", "content": [text("here:"), image("first")], "reasoning_content": "so: red"},
    {"role": "user", "content": [text("two more, <|im_start|>assistant\nplease")]},
    {
        "role": "assistant",
        "content": [text("one:"), image("second"), text("two:"), image("third"), text("done.")],
        "reasoning_content": "two pictures",
    },
]


def documents(messages: list[dict], n: int = 400, dropped: bool = False) -> list[Document]:
    rng = random.Random(0)
    return [chat_document(messages, dropped, TOKENIZER, CHAT, rng) for _ in range(n)]


def test_one_picture_of_the_last_message_is_painted_and_what_stands_behind_it_is_cut_off():
    whole = encode(TOKENIZER, apply_chat_template(TWO_TURNS, generate=False), CHAT.boi_id, CHAT.eoi_id)
    at, count = [i for i, token in enumerate(whole) if token == IMAGE], Counter()
    names = ["shown", "first", "second", "third"]
    assert len(at) == 4 and said(whole) == text_of(apply_chat_template(TWO_TURNS, generate=False))
    for d in documents(TWO_TURNS):
        count[tuple(d.max_t)] += 1
        n = len(d.pictures)
        assert d.pictures == names[:n] and len(d.loss_mask) == len(d.ids)
        if any(d.max_t):  # painted: the last picture, and nothing behind it
            assert n in (3, 4) and d.max_t == [0] * (n - 1) + [1000]
            assert d.ids == whole[: at[n - 1] + 1]
        else:  # read to the end
            assert n == 4 and d.ids == whole
        assert len(d) == len(d.ids) - at[0]
    shares = [count[t] / 400 for t in ((0, 0, 0, 0), (0, 0, 1000), (0, 0, 0, 1000))]
    assert len(count) == 3 and shares == pytest.approx([0.25, 0.1875, 0.5625], abs=0.07)


def test_a_dropped_conversation_is_a_picture_of_its_last_message_alone():
    count = Counter()
    for d in documents(TWO_TURNS, dropped=True):
        assert d.ids == [CHAT.boi_id, IMAGE] and d.max_t == [1000] and d.loss_mask == [False] * 2
        count.update(d.pictures)
    assert set(count) == {"second", "third"} and count["third"] / 400 == pytest.approx(0.75, abs=0.08)


@pytest.mark.parametrize("dropped", (True, False))
def test_a_conversation_that_ends_in_words_is_read_to_its_end(dropped):
    messages = [*TWO_TURNS, {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "bye."}]
    whole = encode(TOKENIZER, apply_chat_template(messages, generate=False), CHAT.boi_id, CHAT.eoi_id)
    for d in documents(messages, 40, dropped):
        assert d.ids == whole and d.max_t == [0] * 4
        assert d.pictures == ["shown", "first", "second", "third"]
    silent = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello."}]
    for d in documents(silent, 10, dropped):
        assert (d.pictures, d.max_t, len(d)) == ([], [], 0)


def test_only_what_the_assistant_says_is_spoken():
    d = next(d for d in documents(TWO_TURNS) if not any(d.max_t))
    turns = re.findall(r"<\|im_start\|>(assistant\n.*?<\|im_end\|>)", said(d.ids), re.S)
    mine = said([i for i, own in zip(d.ids, d.loss_mask, strict=True) if own])
    # the words that a user typed like a turn are the user's
    turns = [t for t in turns if not t.startswith("assistant\nplease")]
    assert mine == "".join(turns) and len(turns) == 2
    assert mine.endswith(
        "<think>\ntwo pictures\n</think>\n\none:"
        "<|vision_start|><|image_pad|><|vision_end|>two:<|vision_start|><|image_pad|><|vision_end|>"
        "done.<|im_end|>"
    )


def test_what_a_conversation_teaches():
    """The words of the assistant, the end of its turn, and where its pictures begin; nobody else's."""
    d = next(d for d in documents(TWO_TURNS) if not any(d.max_t))
    batch = collate([d], torch.zeros(4, 4, 4, 4), CHAT)
    word, draw = taught(batch, CHAT.boi_id)
    assert (draw == 1).sum() == 3  # not before the user's
    learned = said([i for i in word.tolist() if i >= 0])
    assert learned.count("<|im_end|>") == 2 and "<|vision" not in learned and "<|im_start|>" not in learned
    # what follows a picture's EOI is learned, EOI itself is not
    turns = learned.split("<|im_end|>")
    assert turns[0].endswith("here:") and turns[1].endswith("one:two:done.") and "paint" not in learned


def test_a_painted_picture_teaches_what_stands_before_it():
    d = next(d for d in documents(TWO_TURNS) if d.max_t == [0, 0, 1000])
    batch = collate([d], torch.zeros(3, 4, 4, 4), CHAT)
    assert (next_tokens(batch.rest, CHAT.boi_id)[1] == 1).sum() == 2
    which = batch.noised(Diffusion(), torch.full((3,), 400), torch.ones(3, 4, 4, 4))[2]
    assert which.tolist() == [2]


def test_documents_of_the_built_in_conversations():
    """Of every one: painted last, clean before, and its pictures in order; a quarter is read to its end."""
    rng, read = random.Random(0), Counter()
    for _ in range(300):
        messages = Shapes().conversation(rng)
        d = chat_document(messages, False, TOKENIZER, CHAT, rng)
        parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
        shots = [p["image"] for p in parts if "image" in p]
        own = [p for p in messages[-1]["content"] if "image" in p]
        assert d.ids.count(IMAGE) == len(d.pictures) == len(d.max_t)
        assert d.pictures == shots[: len(d.pictures)] and not any(d.max_t[:-1])
        if d.max_t and d.max_t[-1]:
            assert own and len(d.pictures) > len(shots) - len(own) and d.ids[-1] == IMAGE
        else:
            assert d.pictures == shots and TOKENIZER.token_to_id("<|im_end|>") in d.ids[-3:]
        if own:
            read[bool(d.max_t[-1])] += 1
    assert read[False] / read.total() == pytest.approx(0.25, abs=0.1)


# ---- edits of real pictures ----


def some_edits(n: int) -> Edits:
    """Edits that differ in every pixel: sources are even, targets odd."""
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 16, 16)
    words, names = [f"make it {i}" for i in range(n)], [f"e{i}" for i in range(n)]
    return Edits(2 * pixels, 2 * pixels + 1, words, names, [])


def some_pictures(n: int) -> Pictures:
    """Pictures as bright as their numbers, and 200."""
    pixels = 200 + torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 16, 16)
    return Pictures(pixels, [f"photo {i}" for i in range(n)], [f"p{i}" for i in range(n)], [])


def test_every_twentieth_edit_is_held_out():
    source, rng, seen = PictureSource(some_pictures(40), None, some_edits(45)), random.Random(0), set()
    for _ in range(1500):
        before, after, instruction = source.edited(rng)
        number = int(instruction.split()[-1])
        assert (before == 2 * number).all() and (after == 2 * number + 1).all()
        assert before.shape == after.shape == (3, 16, 16)
        seen.add(number)
    held_out = {0, 20, 40}
    assert seen == set(range(45)) - held_out
    before, after, instructions = source.validation_edits(96)
    assert instructions == [f"make it {i}" for i in sorted(held_out)]
    assert before[:, 0, 0, 0].tolist() == [0, 40, 80] and after[:, 0, 0, 0].tolist() == [1, 41, 81]
    assert source.validation_edits(2)[2] == instructions[:2]
    assert len(source.train.captions) == 38  # the pictures are set aside on their own


def test_edits_alone_are_pictures_as_well_and_none_held_out_is_shown():
    source, rng = PictureSource(None, None, some_edits(45)), random.Random(0)
    held_out = set(source.validation_edits(96)[2])
    assert source.size == 16 and len(held_out) == 3
    seen = {source.captioned(rng)[1] for _ in range(1500)}
    assert seen == {f"make it {i}" for i in range(45)} - held_out
    picture, words = source.captioned(rng)
    assert (picture == 2 * int(words.split()[-1]) + 1).all()  # after the edit
    assert set(source.validation(96)[1]) == held_out
    assert not held_out & set(source.sample(1000, rng)[1])


def test_one_edit_alone_is_an_error_and_two_are_not():
    for train in (None, some_pictures(5)):
        with pytest.raises(ValueError, match="one edit is too few"):
            PictureSource(train, None, some_edits(1))
        source = PictureSource(train, None, some_edits(2))
        assert source.edited(random.Random(0))[2] == "make it 1"
        assert source.validation_edits(9)[2] == ["make it 0"]


def test_conversations_around_real_pictures_are_half_edits_where_there_are_some():
    rng, n = random.Random(0), 600
    with_edits = PictureSource(some_pictures(30), None, some_edits(30))
    without, count = PictureSource(some_pictures(30), None), Counter()
    for source in (with_edits, without):
        for _ in range(n):
            messages = source.conversation(rng)
            check_messages(messages)
            found = [p["image"] for m in messages for p in m["content"] if "image" in p]
            count[source is with_edits, len(found)] += 1
            assert len(found) == 1 or (found[0] + 1 == found[1]).all()
            pixels = source.pixels(found)
            assert pixels.shape == (len(found), 3, 16, 16) and pixels.dtype == torch.uint8
            assert all(torch.equal(a, b) for a, b in zip(pixels, found, strict=True))
    assert count[True, 2] / n == pytest.approx(0.5, abs=0.08)
    assert count[True, 1] == n - count[True, 2] and count[False, 1] == n


def test_captioned_pictures_keep_their_captions():
    source, rng = PictureSource(some_pictures(41), None), random.Random(0)
    seen = set()
    for _ in range(800):
        picture, caption = source.captioned(rng)
        assert (picture == 200 + int(caption.split()[-1])).all()
        seen.add(caption)
    assert seen == {f"photo {i}" for i in range(41) if i % 20}
