"""small/shapes.py: the built-in pictures as a source; training and validation share no combination."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from test_world import TRAIN, check_edit, differing

from small import pretrain, shapes
from small.dialogues import THINK_PROMPT, Shot
from small.shapes import Shapes
from small.world import COLORS, PIXELS, PLACES, Edit, all_scenes, render


def test_training_never_shows_a_held_out_combination_and_validation_shows_nothing_else():
    validation, test = ({s.caption for s in all_scenes(split)} for split in ("validation", "test"))
    rng, seen = random.Random(0), Counter()
    for _ in range(20):
        seen.update(Shapes().sample(500, rng)[1])
    assert not (validation | test) & set(seen)
    assert len(seen) > 0.9 * len(all_scenes("train"))  # and nearly all of the others
    assert {caption for _, caption in Shapes().validation(10**6)} == validation


def test_validation_pictures_are_the_same_ones_whenever_asked():
    found = Shapes().validation(50)
    assert found == Shapes().validation(50) and len({caption for _, caption in found}) == 50
    assert all(caption == shot.scene.caption and shot.scene.split == "validation" for shot, caption in found)
    assert len({shot.shift for shot, _ in found}) == 9
    assert Shapes().prompts() == [caption for _, caption in Shapes().validation(18)]


def test_sampled_pictures_show_what_their_captions_say():
    pictures, captions = Shapes().sample(200, random.Random(1))
    scenes = {s.caption: s for s in all_scenes("train")}
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
    assert pixels.shape == (20, 3, PIXELS, PIXELS) and pixels.dtype == torch.uint8
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
    assert found == again and len(found) == 96
    for before, after, instruction in found:
        check_shots(before, after, instruction)
        assert after.scene.split == "validation"
    assert len({before.shift for before, *_ in found}) == 9


def test_two_fifths_of_the_built_in_conversations_are_with_thoughts():
    rng, n = random.Random(0), 1500
    prompts = [Shapes().conversation(rng)[0] for _ in range(n)]
    thinking = [p == {"role": "system", "content": THINK_PROMPT} for p in prompts]
    assert sum(thinking) / n == pytest.approx(0.4, abs=0.05)
    assert all(p["role"] == "user" for p, t in zip(prompts, thinking, strict=True) if not t)


def test_other_scenes_or_another_recipe_have_another_fingerprint(monkeypatch):
    sources = Shapes(), pretrain.BuiltInText(None)
    before = [source.fingerprint() for source in sources]
    monkeypatch.setattr(shapes, "all_scenes", lambda split: all_scenes(split)[1:])
    monkeypatch.setattr(pretrain, "RECIPE", pretrain.RECIPE + 1)
    assert not set(before) & {source.fingerprint() for source in sources}
