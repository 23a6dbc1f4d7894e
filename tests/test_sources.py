"""scale/sources.py: what is set aside for validation is never trained on, for pictures, edits and latents."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import re
import reprlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import helpers
import pytest
import torch
from test_latents import GOOD, config, encoded, linear, source, without_newer_tensors
from torch import Tensor

import train
from chat.template import check_messages
from config import TrainConfig
from load_qwen3 import load_tokenizer
from scale.latents import LatentShards, encode_source
from scale.pictures import Pictures, load_edits, load_pictures
from scale.sources import LatentSource, PictureSource
from scale.vae import PatchPCA

# ---- real pictures ----


def some_pictures(n: int) -> Pictures:
    """Pictures as bright as their numbers, and 200."""
    pixels = 200 + torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 16, 16)
    return Pictures(pixels, [f"photo {i}" for i in range(n)], [f"p{i}" for i in range(n)], [])


def check_pair(picture: Tensor, caption: str) -> str:
    """The caption of a picture that it belongs to."""
    assert picture.shape == (3, 16, 16) and (picture == 200 + int(caption.split()[-1])).all()
    return caption


def test_every_twentieth_picture_is_set_aside_and_each_keeps_its_caption():
    source, rng = PictureSource(some_pictures(45), None), random.Random(0)
    captions, held_out = {f"photo {i}" for i in range(45)}, {"photo 0", "photo 20", "photo 40"}
    assert {check_pair(*source.captioned(rng)) for _ in range(800)} == captions - held_out
    pixels, words = source.sample(800, rng)
    assert pixels.shape == (800, 3, 16, 16) and pixels.dtype == torch.uint8
    assert {check_pair(*pair) for pair in zip(pixels, words, strict=True)} == captions - held_out
    found = source.validation(96)
    assert len(found) == 3 and {check_pair(*pair) for pair in found} == held_out
    assert [check_pair(*pair) for pair in source.validation(2)] == [words for _, words in found][:2]
    prompts = source.prompts()
    assert len(prompts) == 12 and not held_out & set(prompts[:9]) and set(prompts[9:]) == held_out


def test_pictures_of_their_own_for_validation_leave_all_others_to_training(tmp_path):
    first = load_pictures(str(helpers.write_photos(tmp_path / "a", n=21)), 16)
    second = load_pictures(str(helpers.write_photos(tmp_path / "b", n=3, seed=1)), 16)
    source, rng = PictureSource(first, second), random.Random(0)
    assert {source.captioned(rng)[1] for _ in range(500)} == set(first.captions)
    found, again = source.validation(96), source.validation(96)
    assert sorted(caption for _, caption in found) == sorted(second.captions)
    for (picture, caption), (same, words) in zip(found, again, strict=True):
        assert torch.equal(picture, second.pixels[second.captions.index(caption)])
        assert torch.equal(picture, same) and caption == words


def test_one_picture_alone_is_an_error():
    with pytest.raises(ValueError, match="too few pictures"):
        PictureSource(some_pictures(1), None)
    assert len(PictureSource(some_pictures(1), some_pictures(1)).validation(9)) == 1


def write_rows(folder: Path, rows: list[dict]) -> Path:
    """A metadata.jsonl in a folder of pictures."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def five_captions(folder: Path, n: int = 12) -> Path:
    """n pictures of five captions each, all first captions before all second ones; some spelled otherwise."""
    helpers.write_photos(folder, n)
    spelled = ("{:03d}.png", "./{:03d}.png", "{:03d}.png", "x/../{:03d}.png", "{:03d}.png")
    names = [(form.format(i), i, k) for k, form in enumerate(spelled) for i in range(n)]
    return write_rows(folder, [{"file_name": f, "text": f"photo {i}, caption {k}"} for f, i, k in names])


def numbers(captions: Iterable[str]) -> set[int]:
    """Which pictures captions speak of."""
    return {int(c.split(",")[0].split()[1]) for c in captions}


def test_all_captions_of_a_picture_stand_on_one_side(tmp_path):
    found = load_pictures(str(five_captions(tmp_path / "data", 21)), 16)
    source, rng = PictureSource(found, None), random.Random(0)
    drawn = {source.captioned(rng)[1] for _ in range(2000)}
    assert len(drawn) == 19 * 5 and numbers(drawn) == set(range(21)) - {0, 20}
    assert numbers(source.sample(500, rng)[1]) == set(range(21)) - {0, 20}
    held_out = [caption for _, caption in source.validation(96)]
    assert sorted(held_out) == ["photo 0, caption 0", "photo 20, caption 0"]  # each picture once
    assert not numbers(source.prompts()[:9]) & {0, 20}
    few = PictureSource(load_pictures(str(five_captions(tmp_path / "few")), 16), None)
    assert numbers(few.captioned(rng)[1] for _ in range(500)) == set(range(1, 12))
    own = PictureSource(found, load_pictures(str(tmp_path / "few"), 16))
    assert len(own.validation(96)) == 12  # of 60 rows


def test_two_files_that_show_the_same_are_one_picture():
    pictures = some_pictures(45)
    pictures.pixels = pictures.pixels.contiguous()
    pictures.pixels[[7, 33]] = pictures.pixels[0].clone()  # which is set aside
    source, rng = PictureSource(pictures, None), random.Random(0)
    trained = {source.captioned(rng)[1] for _ in range(2000)}
    assert trained == {f"photo {i}" for i in range(45) if i not in (0, 7, 33, 21, 42)}
    assert sorted(caption for _, caption in source.validation(9)) == ["photo 0", "photo 21", "photo 42"]


def test_validation_pictures_that_training_has_as_well_are_counted(capsys):
    PictureSource(some_pictures(30), some_pictures(3))
    assert capsys.readouterr().err == "3 pictures of --val-data are in --data as well, and trained on\n"
    edits = dataclasses.replace(some_edits(40))
    edits.sources[7] = edits.pixels[9] = 201
    PictureSource(some_pictures(1), dataclasses.replace(some_pictures(3)), edits)
    assert capsys.readouterr().err.startswith("2 pictures of --val-data are in --data")
    other = some_pictures(3)
    PictureSource(some_pictures(30), dataclasses.replace(other, pixels=other.pixels - 100))
    assert capsys.readouterr().err == ""


# ---- edits of real pictures ----


def some_edits(n: int) -> Pictures:
    """Edits that differ in every pixel: sources are even, targets odd."""
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 16, 16)
    words, names = [f"make it {i}" for i in range(n)], [f"e{i}" for i in range(n)]
    return Pictures(2 * pixels + 1, words, names, [], 2 * pixels)


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
    found = source.validation_edits(96)
    assert [words for *_, words in found] == [f"make it {i}" for i in sorted(held_out)]
    assert [int(before[0, 0, 0]) for before, *_ in found] == [0, 40, 80]
    assert [int(after[0, 0, 0]) for _, after, _ in found] == [1, 41, 81]
    assert [words for *_, words in source.validation_edits(2)] == ["make it 0", "make it 20"]
    captions = {source.captioned(rng)[1] for _ in range(1500)}  # the pictures are set aside on their own
    assert captions == {f"photo {i}" for i in range(40) if i % 20}


def check_sides(source: PictureSource) -> tuple[set[bytes], set[bytes]]:
    """The pictures that training shows and those of validation; ValueError if one is on either side."""
    rng, train, val = random.Random(0), [], []
    for _ in range(3000):
        train += [source.captioned(rng)[0], *source.edited(rng)[:2]]
    val += [picture for picture, _ in source.validation(1000)]
    val += [picture for edit in source.validation_edits(1000) for picture in edit[:2]]
    train, val = ({x.numpy().tobytes() for x in pictures} for pictures in (train, val))
    assert train and val and not train & val
    return train, val


def test_no_picture_is_on_either_side_whatever_edits_share(capsys):
    """Chains of edits, several edits of one picture, one target of several, and captions of all of them."""
    rng = random.Random(0)
    for shared in ("chain", "source", "target", "any"):
        before = {"source": [i // 3 for i in range(60)], "any": rng.choices(range(40), k=60)}
        after = {"target": [100 + i // 3 for i in range(60)], "any": rng.choices(range(40), k=60)}
        after["chain"] = range(1, 61)
        pixels = torch.arange(200, dtype=torch.uint8)[:, None, None, None].expand(200, 3, 16, 16)
        sources, targets = (
            list(x) for x in (before.get(shared, range(60)), after.get(shared, range(100, 160)))
        )
        words = [f"make it {i}" for i in range(60)]
        edits = Pictures(pixels[targets].clone(), words, words, [], pixels[sources].clone())
        pictures = Pictures(pixels[:160].clone(), [f"photo {i}" for i in range(160)], words, [])
        source = PictureSource(pictures, None, edits)
        check_sides(source)
        check_sides(PictureSource(None, None, edits))
        left = 60 - len(source.edit_rows) - len(source.val_edit_rows)
        said = capsys.readouterr().err
        assert (
            (f"left out {left} of 60 edits" in said) == (left > 0) == (shared in ("chain", "target", "any"))
        )
        assert len(source.edit_rows) > (30 if shared == "any" else 50)


def test_edits_of_one_picture_alone_cannot_be_set_aside():
    edits = some_edits(30)
    with pytest.raises(ValueError, match="too few edits: .* without a picture in common"):
        PictureSource(some_pictures(30), None, dataclasses.replace(edits, sources=0 * edits.sources))


def test_captions_of_edited_pictures_alone_are_split_as_well():
    """Where all captioned pictures are of edits to train on, one of them is set aside with its edits."""
    edits = some_edits(45)
    pictures = Pictures(edits.pixels[3:6].clone(), list("abc"), list("abc"), [])
    source = PictureSource(pictures, None, edits)
    check_sides(source)
    assert [caption for _, caption in source.validation(9)] == ["a"] and 3 not in source.edit_rows


def test_edits_alone_are_pictures_as_well_and_none_held_out_is_shown():
    source, rng = PictureSource(None, None, some_edits(45)), random.Random(0)
    held_out = {words for *_, words in source.validation_edits(96)}
    assert len(held_out) == 3
    seen = {source.captioned(rng)[1] for _ in range(1500)}
    assert seen == {f"make it {i}" for i in range(45)} - held_out
    picture, words = source.captioned(rng)
    assert (picture == 2 * int(words.split()[-1]) + 1).all()  # after the edit
    assert {words for _, words in source.validation(96)} == held_out
    assert not held_out & set(source.sample(1000, rng)[1])


def test_one_edit_alone_is_an_error_and_two_are_not():
    for pictures in (None, some_pictures(5)):
        with pytest.raises(ValueError, match="too few edits"):
            PictureSource(pictures, None, some_edits(1))
        source = PictureSource(pictures, None, some_edits(2))
        assert source.edited(random.Random(0))[2] == "make it 1"
        assert [words for *_, words in source.validation_edits(9)] == ["make it 0"]


def test_conversations_around_real_pictures_are_half_edits_where_there_are_some():
    rng, n = random.Random(0), 600
    with_edits = PictureSource(some_pictures(30), None, some_edits(30))
    without, count = PictureSource(some_pictures(30), None), Counter()
    for ours in (with_edits, without):
        for _ in range(n):
            messages = ours.conversation(rng)
            check_messages(messages)
            found = [p["image"] for m in messages for p in m["content"] if "image" in p]
            count[ours is with_edits, len(found)] += 1
            assert len(found) == 1 or (found[0] + 1 == found[1]).all()
            pixels = ours.pixels(found)
            assert pixels.shape == (len(found), 3, 16, 16) and pixels.dtype == torch.uint8
            assert all(torch.equal(a, b) for a, b in zip(pixels, found, strict=True))
    assert count[True, 2] / n == pytest.approx(0.5, abs=0.08)
    assert count[True, 1] == n - count[True, 2] and count[False, 1] == n


def test_a_source_of_pictures_is_told_from_another_by_whatever_it_holds():
    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x[-1, -1, -1, -1] += 1
        return x

    pictures, val, edits = some_pictures(5), some_pictures(3), some_edits(4)
    sources = [
        (pictures, val, edits),
        (pictures, val),
        (pictures, pictures, edits),
        (dataclasses.replace(pictures, captions=list("abcde")), val, edits),
        (dataclasses.replace(pictures, pixels=changed(pictures.pixels)), val, edits),
        (pictures, dataclasses.replace(val, pixels=changed(val.pixels)), edits),
        (pictures, dataclasses.replace(val, captions=list("abc")), edits),
        (pictures, val, dataclasses.replace(edits, sources=changed(edits.sources))),
        (pictures, val, dataclasses.replace(edits, pixels=changed(edits.pixels))),
        (pictures, val, dataclasses.replace(edits, captions=list("abcd"))),
    ]
    found = [PictureSource(*parts).fingerprint() for parts in sources]
    assert len(set(found)) == len(sources)
    assert PictureSource(some_pictures(5), some_pictures(3), some_edits(4)).fingerprint() == found[0]


# ---- latents ----


@functools.cache
def second() -> tuple[Path, Path]:
    """Other photos, and their latents."""
    photos = helpers.write_photos(Path(helpers.session.name) / "second", n=7, seed=1)
    out = Path(helpers.session.name) / "second-latents"
    encode_source(config(out, data=str(photos), store="float32"), linear())
    return photos, out


@pytest.mark.parametrize("own", [False, True])
def test_the_source_draws_what_the_source_of_pictures_draws(own):
    photos, out = second()
    pictures = PictureSource(
        load_pictures(str(source()), 16), load_pictures(str(photos), 16) if own else None
    )
    ours = LatentSource(LatentShards(encoded()), LatentShards(out) if own else None)
    tokenizer = load_tokenizer(helpers.base())
    tokenizer.encode_special_tokens = True

    def check(z: Tensor, ids: list[list[int]], pixels: Tensor, captions: list[str]) -> None:
        torch.testing.assert_close(z, PatchPCA.encode(linear(), pixels), rtol=1e-3, atol=1e-3)
        assert ids == [tokenizer.encode(c, add_special_tokens=False).ids for c in captions]

    def unzip(examples: list[tuple]) -> list[list]:
        return [list(part) for part in zip(*examples, strict=True)]

    for seed in range(3):  # of training
        (numbers, ids), (pixels, captions) = (
            unzip([x.captioned(random.Random(100 * seed + i)) for i in range(40)]) for x in (ours, pictures)
        )
        check(ours.latents(numbers, None), ids, pictures.pixels(pixels), captions)
    for n in (1, 4, 96):
        (numbers, ids), (pixels, captions) = (unzip(x.validation(n)) for x in (ours, pictures))
        check(ours.latents(numbers, None), ids, pictures.pixels(pixels), captions)
    assert ours.prompts() == pictures.prompts()


def test_all_captions_of_a_latent_stand_on_one_side(tmp_path):
    """Encoded in batches of 8, the last of which is smaller, so that one picture is encoded in several."""
    data = five_captions(tmp_path / "data", 21)
    encode_source(config(tmp_path / "latents", data=str(data)), linear())
    shards = LatentShards(tmp_path / "latents")
    ours, rng = LatentSource(shards), random.Random(0)
    drawn = {shards.caption(ours.captioned(rng)[0]) for _ in range(2000)}
    assert len(shards) == 105 and len(drawn) == 95 and numbers(drawn) == set(range(21)) - {0, 20}
    held_out = [shards.caption(-1 - i) for i, _ in ours.validation(96)]
    assert sorted(held_out) == ["photo 0, caption 0", "photo 20, caption 0"]
    assert len(LatentSource(LatentShards(encoded()), shards).validation(96)) == 21


def test_latents_that_a_vae_rounded_otherwise_are_of_one_picture(tmp_path, monkeypatch):
    data = five_captions(tmp_path / "data", 21)
    out = config(tmp_path / "latents", data=str(data), store="float32")
    codec, generator = linear(), torch.Generator().manual_seed(0)
    clean = codec.encode
    monkeypatch.setattr(
        codec, "encode", lambda *a: (z := clean(*a)) + 1e-6 * torch.randn(z.shape, generator=generator)
    )
    shards = encode_source(out, codec)
    assert len(LatentSource(shards).validation(96)) == 2  # by their pixels
    assert len(LatentSource(without_newer_tensors(shards.folder)).validation(96)) == 2


def test_edits_and_conversations_from_latents_are_those_from_pictures(tmp_path):
    data = helpers.write_edits(tmp_path / "data", n=44) / "all.jsonl"
    encode_source(config(tmp_path / "latents", data=str(data)), linear())
    ours = LatentSource(LatentShards(tmp_path / "latents"))
    pictures = PictureSource(load_pictures(str(data), 16), None, load_edits(str(data), 16))
    tokenizer = load_tokenizer(helpers.base())

    def same(numbers: list[int], pixels: list[Tensor]) -> None:
        wanted = PatchPCA.encode(linear(), torch.stack(pixels))
        torch.testing.assert_close(ours.latents(numbers, None), wanted, rtol=1e-3, atol=1e-3)

    for drawn in (
        lambda x, seed: x.edited(random.Random(seed)),
        lambda x, seed: x.validation_edits(9)[seed % 2],
    ):
        for seed in range(30):
            (*numbers, ids), (*pixels, words) = drawn(ours, seed), drawn(pictures, seed)
            same(numbers, pixels)
            assert tokenizer.decode(ids) == words
    kinds = Counter()
    for seed in range(60):
        found = [x.conversation(random.Random(seed)) for x in (ours, pictures)]
        for mine, theirs in zip(*found, strict=True):
            parts = list(zip(mine["content"], theirs["content"], strict=True))
            for a, b in parts:
                if a["type"] == "image":
                    same([a["image"]], [b["image"]])
                else:
                    assert a == b
            kinds[tuple(p["type"] for p in mine["content"])] += 1
    assert len(kinds) >= 3
    ours.codec = linear()
    before, after, _ = zip(*ours.validation_edits(2), strict=True)
    assert ours.pixels(list(before)).shape == (2, 3, 16, 16)
    drawn = [(tokenizer.decode(ids), of_edit) for ids, of_edit in ours.words()]
    assert drawn == list(pictures.words()) and {of_edit for _, of_edit in drawn} == {True, False}
    targets = {x for i in ours.val_edit_rows for x in (i - 1, i)}
    assert not {ours.edited(random.Random(i))[1] for i in range(200)} & targets


def test_latents_set_aside_for_validation_are_never_trained_on():
    ours, rng = LatentSource(LatentShards(encoded())), random.Random(0)
    drawn = {ours.captioned(rng)[0] for _ in range(2000)}
    assert drawn == set(range(GOOD)) - {0, 20}
    held_out, trained = ([z.tolist() for z in ours.latents(x, None)] for x in ([-1, -21], list(drawn)))
    found = [z.tolist() for z in ours.latents([i for i, _ in ours.validation(96)], None)]
    assert sorted(found) == sorted(held_out) and not any(z in trained for z in found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "edit"}, "--task edit: {data} holds no edits"),
        ({"task": "generate,edit"}, "--task generate,edit: {data} holds no edits"),
        ({"image_size": 32}, "{data} holds pictures of 16 pixels; --image-size is 32"),
    ],
)
def test_what_latents_cannot_be_used_for_is_named(changes, says, make_config):
    run = TrainConfig(data=str(encoded()), **{"image_size": 16, **changes})
    vocabulary = load_tokenizer(helpers.base()).get_vocab_size()
    model = make_config(latent_channels=3, latent_size=4, vocab_size=vocabulary)
    ours = LatentSource(LatentShards(encoded()))
    with pytest.raises(ValueError, match=re.escape(says.format(data=encoded()))):
        ours.check(run, model, str(helpers.base()))
    ours.check(dataclasses.replace(run, task="caption", image_size=16), model, str(helpers.base()))
    good = dataclasses.replace(run, task="", image_size=16)
    ours.check(good, dataclasses.replace(model, vocab_size=vocabulary + 100), str(helpers.base()))
    with pytest.raises(
        ValueError, match=f"a vocabulary of {vocabulary} tokens, the model has {vocabulary - 1}"
    ):
        ours.check(good, dataclasses.replace(model, vocab_size=vocabulary - 1), str(helpers.base()))
    with pytest.raises(ValueError, match=f"the tokenizer of {helpers.base()}, and that of .* is another"):
        ours.check(good, model, str(helpers.other_base()))


def test_folders_that_were_not_encoded_alike_are_refused(tmp_path):
    train = LatentShards(encoded())
    for name, changes, codec in (
        ("vae_fingerprint", {}, linear(seed=1)),
        ("tokenizer_fingerprint", {"base": str(helpers.other_base())}, linear()),
        ("image_size", {"image_size": 8}, linear()),
    ):
        other = encode_source(config(tmp_path / name, **changes), codec)
        with pytest.raises(ValueError, match=f"{encoded()} and {tmp_path / name} were not .*: {name} is "):
            LatentSource(train, other)


def test_latents_of_one_picture_alone_are_an_error_that_names_the_folder(tmp_path):
    photos = helpers.write_photos(tmp_path / "photos", n=1)
    one = encode_source(config(tmp_path / "out", data=str(photos)), linear())
    with pytest.raises(ValueError, match="too few pictures in .*out: "):
        LatentSource(one)
    assert len(LatentSource(one, one).validation(9)) == 1


def test_the_words_that_may_be_cut_are_those_of_training(tmp_path):
    """A run says once how many captions its context cuts, of pictures and of latents alike."""
    folder = helpers.write_photos(tmp_path / "photos", n=8)
    for i in range(4):
        (folder / f"{i:03d}.txt").write_text("a big red photo " * 30)
    flags = helpers.photo_flags(Path("run"), "--data", folder, "--steps", 1)
    result = helpers.call(train, *flags, folder=tmp_path)
    first = reprlib.repr(("a big red photo " * 30).strip())
    (line,) = [x for x in result.err.splitlines() if x.startswith("note: ")]
    assert result.status == 0 and line.endswith(f"; the first is {first}")
    assert line.startswith("note: 3 of 7 captions are cut to their first 89 tokens, the context being 96 (")


def test_the_words_of_latents_are_the_ids_of_their_training_captions():
    shards = LatentShards(encoded())
    latents = LatentSource(shards)
    assert list(latents.words()) == [(shards.part(i, "ids", "offsets"), False) for i in latents.rows]
