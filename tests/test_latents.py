"""latents.py: what is read equals encoding directly, a killed run goes on, and each error names its cause.

Most tests encode with the linear codec, which is quick; the command itself is run with a tiny VAE.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import shutil
import tarfile
import weakref
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
import data
from checkpoint import locked
from load_qwen3 import load_tokenizer
from scale import latents
from scale.latents import EncodeConfig, LatentShards, encode_source
from scale.pictures import load_edits, load_pictures
from scale.vae import PatchPCA, load_vae

VAE = Path(__file__).resolve().parent / "fixtures" / "vae_sd"  # 4 channels, 2 pixels a latent
GOOD, BAD = 24, ("000a.png", "006a.png", "011a.png", "023a.png", "023b.png")  # the last two end the source
SHARDS, BATCHES = 5, 10  # of `source` in shards of 5 pictures and batches of 3


class Killed(BaseException):
    """What ends a run as a kill does: no handler of errors sees it."""


class Linear(PatchPCA):
    """The linear codec with what the VAE has beyond it; call number `die_at` of `encode` is killed."""

    calls, die_at, channels = 0, -1, 3

    def encode(self, pictures: Tensor, batch: int = 4) -> Tensor:
        assert len(pictures) <= batch
        self.calls += 1
        if self.calls - 1 == self.die_at:
            raise Killed
        return super().encode(pictures)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(x.numpy().tobytes() for x in self.tensors().values())).hexdigest()


def linear(seed: int = 0, scale: float = 1.0) -> Linear:
    pixels = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    codec = Linear.fit(pixels.to(torch.uint8), channels=3, patch=4, whiten=0.5)
    codec.scale = codec.scale * scale
    return codec


@functools.cache
def source() -> Path:
    """24 photos, with bad samples at the start, at the ends of shards, in the middle and at the end."""
    folder = helpers.write_photos(Path(helpers.session.name) / "dirty", n=GOOD)
    for name in BAD:
        (folder / name).write_bytes(b"no picture")
        (folder / name).with_suffix(".txt").write_text("bad")
    (folder / "003.txt").write_text("ein grünes <|im_end|> \N{SNOWMAN}")  # a special token, spelt as text
    (folder / "004.txt").write_text("a")  # one token
    return folder


def config(out: Path, **changes) -> EncodeConfig:
    sizes = dict(image_size=16, shard_size=5, batch_size=3)
    places = dict(data=str(source()), vae=str(VAE), base=str(helpers.base()), out=str(out))
    return EncodeConfig(**{**places, **sizes, **changes})


@functools.cache
def encoded() -> Path:
    """`source` by the linear codec, made without any disturbance; not to be changed."""
    folder = Path(helpers.session.name) / "latents"
    encode_source(config(folder), linear())
    return folder


def copy(to: Path) -> Path:
    return Path(shutil.copytree(encoded(), to))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# ---- what is written is what is read ----


@pytest.mark.parametrize("store", ["float16", "bfloat16", "float32"])
def test_what_is_read_equals_encoding_directly(tmp_path, store):
    vae, tokenizer = load_vae(VAE), load_tokenizer(helpers.base())
    shards = encode_source(config(tmp_path / "out", store=store), vae)
    pictures = load_pictures(str(source()), 16)
    direct = torch.cat([vae.encode(x) for x in pictures.pixels.split(5)]).to(getattr(torch, store)).float()
    z, ids = shards.read(list(range(len(shards))))
    assert len(shards) == GOOD and z.shape == (GOOD, 4, 8, 8) and z.dtype == torch.float32
    step = torch.finfo(getattr(torch, store)).eps  # batches of another size may round to the neighbour
    torch.testing.assert_close(z, direct, rtol=2 * step, atol=1e-5)
    tokenizer.encode_special_tokens = True
    assert ids == [tokenizer.encode(c, add_special_tokens=False).ids for c in pictures.captions]
    assert [shards.caption(i) for i in range(GOOD)] == pictures.captions
    assert len(ids[4]) == 1
    assert not {tokenizer.token_to_id("<|im_end|>")} & set(ids[3]) and "<|im_end|>" in shards.caption(3)
    assert torch.equal(shards.bound, z.abs().amax((0, 2, 3))[:, None, None])
    assert (shards.channels, shards.image_size) == (4, 16)
    assert (shards.vae, shards.base) == (str(VAE), str(helpers.base().resolve()))
    assert shards.vae_fingerprint == vae.fingerprint()
    assert shards.vocab_size == tokenizer.get_vocab_size()


def test_any_rows_are_read_in_the_order_asked_for():
    shards = LatentShards(encoded())
    whole, ids = shards.read(list(range(GOOD)))
    rows = random.Random(0).choices(range(GOOD), k=100)
    z, some = LatentShards(encoded()).read(rows)
    assert torch.equal(z, whole[rows]) and some == [ids[i] for i in rows]
    assert len({x.numpy().tobytes() for x in whole}) == GOOD  # each picture is another


def test_a_tar_gives_the_same_latents_as_its_folder(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for path in sorted(source().iterdir()):
            tar.add(path, path.name)
    tars = config(tmp_path / "out", data=str(tmp_path / "train-*.tar"))
    z = encode_source(tars, linear()).read(list(range(GOOD)))[0]
    assert torch.equal(z, LatentShards(encoded()).read(list(range(GOOD)))[0])


def test_shards_are_full_and_bad_samples_are_named_and_counted(tmp_path, capfd):
    encode_source(config(tmp_path), linear())
    index = json.loads((tmp_path / "index.json").read_text())
    assert [s["count"] for s in index["shards"]] == [5, 5, 5, 5, 4]
    assert [name for name, _ in index["skipped"]] == list(BAD) and index["skipped_count"] == len(BAD)
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"skipped 5 of 29 samples: {BAD[0]} (not a PNG, JPEG or WebP image), {BAD[1]}")


def test_ten_bad_samples_are_named_and_the_rest_is_counted(tmp_path, capfd):
    folder = helpers.write_photos(tmp_path / "photos", n=30)
    for i in range(30):
        if i % 4:
            (folder / f"{i:03d}.png").write_bytes(b"x")
    encode_source(config(tmp_path / "out", data=str(folder)), linear())
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert index["skipped_count"] == 22 and len(index["skipped"]) == 10 and index["pictures"] == 8
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("skipped 22 of 30 samples: 001.png ") and line.endswith(" and 12 more")


def write_lines(folder: Path, every_edit: int) -> str:
    """The pictures of `source` by a metadata.jsonl that begins with a broken line.

    Unless `every_edit` is 0, an edit follows each `every_edit`th picture, and a bad edit ends the file.
    """
    shutil.copytree(source(), folder)
    lines: list = ["neither of both"]
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        lines.append({"file_name": path.name, "text": path.with_suffix(".txt").read_text()})
        if every_edit and i % every_edit == 0:
            lines.append({"source": "001.png", "text": "make it green", "file_name": path.name})
    if every_edit:
        lines.append({"source": None, "text": "make it red", "file_name": "001.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_an_edit_is_two_rows_the_picture_before_it_and_the_one_after_it(tmp_path, capfd):
    mixed = config(tmp_path / "out", data=write_lines(tmp_path / "mixed", 4))
    shards = encode_source(mixed, linear())
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith("skipped 9 of 39 samples: metadata")
    kinds, shown = shards.column("kinds"), shards.column("pictures")
    edits = load_edits(mixed.data, 16)
    targets = [i for i, kind in enumerate(kinds) if kind == latents.TARGET]
    assert len(targets) == len(edits.captions) == 6 and len(shards) == GOOD + 2 * 6
    for n, i in enumerate(targets):
        assert kinds[i - 1] == latents.SOURCE and shards.caption(i - 1) == "" and shown[i - 1] == shown[1]
        assert shards.caption(i) == edits.captions[n] == "make it green"
        z, (before, after) = shards.read([i - 1, i])
        wanted = PatchPCA.encode(linear(), torch.stack((edits.sources[n], edits.pixels[n])))
        torch.testing.assert_close(z, wanted, rtol=1e-3, atol=1e-3)
        assert not before and after
    assert len({shown[i] for i, kind in enumerate(kinds) if kind == latents.CAPTIONED}) == GOOD
    codec = linear()
    assert len(encode_source(mixed, codec)) == len(shards) and codec.calls == 0


def test_edits_alone_are_encoded_too(tmp_path):
    folder = helpers.write_photos(tmp_path / "photos", n=2)
    line = {"source": "000.png", "text": "x", "file_name": "001.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    assert encode_source(config(tmp_path / "out", data=str(folder)), linear()).column("kinds") == [1, 2]


def without_newer_tensors(folder: Path) -> LatentShards:
    """As the first program that wrote shards left them."""
    for path in folder.glob("shard-*.safetensors"):
        tensors, metadata = load_file(path), safe_open(path, "pt").metadata()
        for name in ("kinds", "pictures"):
            del tensors[name]
        save_file(tensors, path, metadata)
    return LatentShards(folder)


def test_shards_of_before_there_were_edits_in_them_are_read(tmp_path):
    shards = without_newer_tensors(copy(tmp_path / "old"))
    assert shards.column("kinds") == [] and len(shards) == GOOD
    assert torch.equal(shards.read([3, 20])[0], LatentShards(encoded()).read([3, 20])[0])


@pytest.mark.parametrize(("parts", "killed"), ((2, 1), (3, -1)))
def test_parts_by_several_processes_are_read_together(tmp_path, parts, killed):
    for i in reversed(range(parts)):
        one = config(tmp_path / f"part-{i}", part=f"{i + 1}/{parts}")
        if i == 0 and killed >= 0:
            codec = linear()
            codec.die_at = killed
            with pytest.raises(Killed):
                encode_source(one, codec)
        encode_source(one, linear())
    joined, whole = LatentShards(tmp_path / "part-*"), LatentShards(encoded())
    assert len(joined) == len(whole) == GOOD and torch.equal(joined.bound, whole.bound)
    assert [joined.caption(i) for i in range(GOOD)] == [whole.caption(i) for i in range(GOOD)]
    z, ids = joined.read([*range(GOOD)])
    assert (
        torch.allclose(z, whole.read([*range(GOOD)])[0], atol=2e-3) and ids == whole.read([*range(GOOD)])[1]
    )
    two = sum(len(LatentShards(tmp_path / f"part-{i}")) for i in range(2))
    assert len(LatentShards(str(tmp_path / "part-{0..1}"))) == two
    encode_source(config(tmp_path / "part-x"), linear(seed=1))
    with pytest.raises(ValueError, match="part-x was not encoded as the others: vae_fingerprint is"):
        LatentShards(tmp_path / "part-*")


@pytest.mark.parametrize("part", ("0/2", "3/2", "1", "a/b", "-1/2", "1/0"))
def test_a_part_is_one_of_so_many(tmp_path, part):
    with pytest.raises(ValueError, match=re.escape(f"--part is {part!r}; it takes I/N")):
        encode_source(config(tmp_path / "out", part=part), linear())


def test_no_more_pictures_than_a_batch_are_in_memory(tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    most, read = 0, latents.read_sample

    def watched(sample, size):
        nonlocal most
        picture, caption = read(sample, size)
        alive.append(weakref.ref(picture))
        most = max(most, sum(ref() is not None for ref in alive))
        return picture, caption

    monkeypatch.setattr(latents, "read_sample", watched)
    encode_source(config(tmp_path, shard_size=20), linear())
    assert len(alive) == GOOD and most <= 3 + 1  # a batch, and the one just read


def test_opening_and_reading_take_no_tensor_of_latents_whole_and_keep_no_file_open(monkeypatch):
    taken = []

    class Watched:
        def __init__(self, f):
            self.f = f

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_tensor(self, name):
            taken.append(name)
            return self.f.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.f, name)

    real = latents.open_safetensors
    monkeypatch.setattr(latents, "open_safetensors", lambda path: Watched(real(path)))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    shards = LatentShards(encoded())
    assert "latents" not in taken and taken
    del taken[:]
    shards.read([0, 7, 23])
    assert taken == [] and sorted(shards.slices) == [0, 1, 4]  # and only the shards that were asked for
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


# ---- killed and resumed ----


def resume(out: Path) -> int:
    """Run the same command again: the folder must become that of an undisturbed run. Returns the batches."""
    codec = linear()
    halves = (".shard-00001.safetensors.7.tmp", ".index.json.7.tmp")
    for name in (*halves * (not (out / "index.json").exists()), ".mine.7.tmp"):
        (out / name).touch()
    encode_source(config(out), codec)
    (out / ".mine.7.tmp").unlink()  # the only one that is not of a killed run
    assert contents(out) == contents(encoded())
    return codec.calls


@pytest.mark.parametrize("call", range(BATCHES))
def test_killed_while_encoding_it_goes_on_and_comes_out_bit_by_bit_the_same(tmp_path, call):
    codec = linear()
    codec.die_at = call
    with pytest.raises(Killed):
        encode_source(config(tmp_path), codec)
    whole = call // 2  # a shard is a batch of 3 and one of 2
    assert sorted(contents(tmp_path)) == [latents.shard_name(i) for i in range(whole)]
    with pytest.raises(ValueError, match="no such file; .* run it again" if whole else "makes a folder"):
        LatentShards(tmp_path)
    assert resume(tmp_path) == BATCHES - 2 * whole  # whole shards are not encoded again


@pytest.mark.parametrize("write", range(SHARDS + 1))
@pytest.mark.parametrize(
    "moment", ["before the file is there", "with half a file", "before the renaming", "after"]
)
def test_killed_while_writing_it_goes_on_and_comes_out_bit_by_bit_the_same(
    tmp_path, monkeypatch, write, moment
):
    real, count = os.replace, 0

    def replace(beside, path):
        nonlocal count
        count += 1
        if count - 1 < write:
            return real(beside, path)
        if moment.startswith("before the file"):
            Path(beside).unlink()
        elif "half" in moment:
            os.truncate(beside, Path(beside).stat().st_size // 2)
        elif moment == "after":
            real(beside, path)
        raise Killed

    with monkeypatch.context() as m:
        m.setattr(checkpoint.os, "replace", replace)
        with pytest.raises(Killed):
            encode_source(config(tmp_path), linear())
    whole = write + (moment == "after")
    assert sum(name.startswith("shard-") for name in contents(tmp_path)) == min(whole, SHARDS)
    assert resume(tmp_path) == max(0, BATCHES - 2 * whole)


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    folder = copy(tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    codec = linear()
    assert len(encode_source(config(folder), codec)) == GOOD and codec.calls == 0
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def more_photos(folder: Path) -> str:
    shutil.copytree(source(), folder)
    (folder / "zzz.txt").write_text("without a picture")
    return str(folder)


def renamed_photo(folder: Path) -> str:
    shutil.copytree(source(), folder)
    (folder / "010.png").rename(folder / "010x.png")
    (folder / "010.txt").rename(folder / "010x.txt")
    return str(folder)


OTHERS: dict[str, Callable[[Path], dict]] = {
    "image_size = 16, not 8": lambda here: {"image_size": 8},
    "shard_size = 5, not 4": lambda here: {"shard_size": 4},
    "store = float16, not float32": lambda here: {"store": "float32"},
    "dtype = float32, not bfloat16": lambda here: {"dtype": "bfloat16"},
    "tokenizer_fingerprint = ": lambda here: {"base": str(helpers.other_base())},
    "samples = 29, not 30": lambda here: {"data": more_photos(here / "photos")},
    "sample_names = ": lambda here: {"data": renamed_photo(here / "photos")},
    "vae_fingerprint = ": lambda here: {},  # and another codec
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("says", OTHERS)
def test_what_was_begun_with_other_settings_is_not_gone_on_with(tmp_path, says, finished):
    folder = copy(tmp_path / "out")
    if not finished:
        (folder / "index.json").unlink()
    before = contents(folder)
    codec = linear(seed=int(says.startswith("vae")))
    with pytest.raises(ValueError) as error:
        encode_source(config(folder, **OTHERS[says](tmp_path)), codec)
    name = "index.json" if finished else latents.shard_name(0)
    assert str(error.value).startswith(f"{folder / name}: made with {says}") and "--out" in str(error.value)
    assert contents(folder) == before and codec.calls == 0


def test_batch_size_may_become_another(tmp_path):
    codec = linear()
    codec.die_at = 5
    with pytest.raises(Killed):
        encode_source(config(tmp_path), codec)
    z = encode_source(config(tmp_path, batch_size=1), linear()).read(list(range(GOOD)))[0]
    torch.testing.assert_close(z, LatentShards(encoded()).read(list(range(GOOD)))[0], rtol=1e-3, atol=1e-3)


def test_two_do_not_encode_into_one_folder(tmp_path):
    with locked(tmp_path / "out"):
        result = helpers.call(latents, *flags("out"), folder=tmp_path)
        assert result.status == 2 and f"another process ({os.getpid()}) writes there" in result.err
        assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]
    helpers.good(latents, *flags("out"), folder=tmp_path)


def test_a_copy_of_a_shard_is_no_shard(tmp_path):
    folder = copy(tmp_path / "out")
    before = helpers.files(folder)
    shutil.copy(folder / latents.shard_name(1), folder / "shard-00001-good.safetensors")
    (folder / "index.json").unlink()
    encode_source(config(folder), linear())
    after = helpers.files(folder)
    assert after.pop(str(folder / "shard-00001-good.safetensors")) and after == before


def test_a_missing_or_foreign_shard_is_named(tmp_path):
    folder = copy(tmp_path / "out")
    (folder / "index.json").unlink()
    (folder / latents.shard_name(1)).unlink()
    with pytest.raises(
        ValueError, match="shard-00002.safetensors: lies where shard-00001.safetensors should"
    ):
        encode_source(config(folder), linear())
    shutil.copy(folder / latents.shard_name(2), folder / latents.shard_name(1))
    with pytest.raises(ValueError, match="shard-00001.safetensors: does not begin where .* delete it"):
        encode_source(config(folder), linear())


# ---- errors while encoding ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_name_their_sample(tmp_path, value):
    class Broken(Linear):
        def encode(self, pictures, batch=4):
            z = super().encode(pictures, batch)
            if self.calls == 4:  # the second batch of the second shard: the tenth good sample last
                z[1, 2, 3, 1] = value
            return z

    broken = Broken(*linear().tensors().values())
    with pytest.raises(ValueError, match=f"^009.png: .* is {value}, which --dtype float32 cannot"):
        encode_source(config(tmp_path), broken)


def test_latents_too_large_for_float16_name_the_flag_that_helps(tmp_path):
    with pytest.raises(ValueError, match=r"^000.png: its largest latent is .*, which --store float16"):
        encode_source(config(tmp_path / "a"), linear(scale=1e5))
    assert encode_source(config(tmp_path / "b", store="bfloat16"), linear(scale=1e5)).bound.max() > 65504


def empty(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def all_bad(folder: Path) -> str:
    (helpers.write_photos(folder, n=1) / "000.png").write_bytes(b"x")
    return str(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda here: {"data": empty(here / "a")}, "no captioned pictures (name.png + name.txt"),
        (
            lambda here: {"data": all_bad(here / "a")},
            "no captioned pictures; skipped 1 of 1 samples: 000.png",
        ),
        (lambda here: {"data": "nowhere"}, "nowhere: no such file or folder"),
        (lambda here: {"base": "nowhere"}, "nowhere: no such folder, and not a hub id"),
        (lambda here: {"image_size": 18}, "--image-size 18 is not a multiple of the VAE's 4"),
        (lambda here: {"image_size": 0}, "--image-size is 0"),
        (lambda here: {"batch_size": -1}, "--batch-size is -1"),
        (lambda here: {"shard_size": 0}, "--shard-size is 0"),
    ],
)
def test_a_mistake_ends_in_one_line_and_leaves_no_index(tmp_path, change, says):
    with pytest.raises(ValueError) as error:
        encode_source(config(tmp_path / "out", **change(tmp_path)), linear())
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out/index.json").exists()


# ---- errors while reading ----


def edit_index(**changes) -> Callable[[Path], None]:
    """Other values in index.json; `shards__0__file` is index["shards"][0]["file"], ... takes a field out."""

    def change(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        for key, value in changes.items():
            at, *path = index, *key.split("__")
            for k in path[:-1]:
                at = at[int(k) if isinstance(at, list) else k]
            k = int(path[-1]) if isinstance(at, list) else path[-1]
            at[k] = value
            if value is ...:
                del at[k]
        (folder / "index.json").write_text(json.dumps(index))

    return change


def edit_shard(**changes) -> Callable[[Path], None]:
    """Other tensors in the second shard."""

    def change(folder: Path) -> None:
        path = folder / latents.shard_name(1)
        with safe_open(str(path), "pt") as f:
            metadata = f.metadata()
        tensors = load_file(path)
        for name, value in changes.items():
            tensors[name] = value(tensors[name]) if name in tensors else value(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path, metadata)

    return change


def put(index: int, value: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


def pickled(folder: Path) -> None:
    torch.save({"latents": torch.zeros(1)}, folder / latents.shard_name(1))


def cut(folder: Path) -> None:
    path = folder / latents.shard_name(1)
    os.truncate(path, path.stat().st_size - 1)


def longer(folder: Path) -> None:
    with open(folder / latents.shard_name(1), "ab") as f:
        f.write(b"x")


def of_another_vae(folder: Path) -> None:
    encode_source(config(folder.parent / "other"), linear(seed=1))
    shutil.copy(folder.parent / "other" / latents.shard_name(1), folder)


def twice(folder: Path) -> None:
    shutil.copy(folder / latents.shard_name(0), folder / latents.shard_name(1))


def plain_safetensors(folder: Path) -> None:
    save_file({"latents": torch.zeros(1)}, folder / latents.shard_name(1))


def write(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "index.json").write_text(text) and None


SECOND = "shard-00001.safetensors: "
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda f: (f / "index.json").unlink(), "index.json: no such file; `python data.py encode"),
    "no folder": (lambda f: shutil.rmtree(f), "index.json: no such file; `python data.py encode"),
    "not JSON": (write("{"), "index.json: cannot be read as JSON"),
    "a list": (write("[1]"), "index.json: holds a list, not a JSON object"),
    "newer": (edit_index(format=2), "index.json: of format 2, and this program reads 1"),
    "no format": (edit_index(format=...), "index.json: of format None, and this program reads 1"),
    "channels missing": (edit_index(channels=...), "index.json: not an index that `data.py encode` has"),
    "no VAE": (edit_index(vae=...), "index.json: not an index that `data.py encode` has written: 'vae'"),
    "shards a number": (edit_index(shards=5), "index.json: not an index that `data.py encode` has written"),
    "other settings": (edit_index(channels=4), "made with channels = 3, not 4; index.json says otherwise"),
    "factor 0": (edit_index(factor=0), "made with factor = 4, not 0; index.json says otherwise"),
    "no shards": (edit_index(shards=[]), "index.json: pictures is 24, but the shards hold 0"),
    "one too few": (edit_index(shards__4=...), "index.json: pictures is 24, but the shards hold 20"),
    "one too many": (edit_index(shards=[{}] * 6), "shard-00005.safetensors: no such file"),
    "gone": (lambda f: (f / latents.shard_name(1)).unlink(), SECOND + "no such file"),
    "twice": (twice, SECOND + "does not begin where the shard before it ends"),
    "pickle": (pickled, SECOND + "not a whole safetensors file"),
    "cut": (cut, SECOND + "not a whole safetensors file"),
    "longer": (longer, SECOND + "not a whole safetensors file"),
    "another's": (of_another_vae, SECOND + "made with vae_fingerprint = "),
    "no header": (plain_safetensors, SECOND + "not a shard that `data.py encode`"),
    "no ids": (edit_shard(ids=lambda x: None), SECOND + "tensor ids is None, not ['I32', 0]"),
    "one more": (edit_shard(more=lambda x: torch.zeros(1)), SECOND + "tensor more is ['F32', 1], not None"),
    "rows": (edit_shard(latents=lambda x: x[:, :, 1:]), "is ['F16', 5, 3, 3, 4], not ['F16', 5, 3, 4, 4]"),
    "few latents": (edit_shard(latents=lambda x: x[1:]), "is ['F16', 4, 3, 4, 4], not ['F16', 5, 3, 4, 4]"),
    "dtype": (edit_shard(latents=lambda x: x.float()), SECOND + "tensor latents is ['F32', "),
    "ids long": (edit_shard(ids=lambda x: x.long()), SECOND + "tensor ids is ['I64', "),
    "ids flat": (edit_shard(ids=lambda x: x[None]), SECOND + "tensor ids is ['I32', 1, "),
    "few offsets": (edit_shard(offsets=lambda x: x[1:]), "tensor offsets is ['I64', 5], not ['I64', 6]"),
    "back": (edit_shard(offsets=put(2, 10**6)), SECOND + "tensor offsets does not go up from 0"),
    "late": (edit_shard(offsets=put(0, 1)), SECOND + "tensor offsets does not go up from 0"),
    "ids short": (edit_shard(ids=lambda x: x[1:]), SECOND + "tensor offsets does not go up from 0"),
    "text": (edit_shard(text_offsets=put(-1, 10**6)), SECOND + "tensor text_offsets does not go up from 0"),
    "large id": (edit_shard(ids=put(3, 10**6)), "to 1000000, of a vocabulary of "),
    "negative id": (edit_shard(ids=put(3, -1)), SECOND + "ids from -1 to "),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_an_error_that_names_the_file_and_the_fault(tmp_path, case):
    folder = copy(tmp_path / "out")
    assert len(LatentShards(folder)) == GOOD
    change, says = BROKEN[case]
    change(folder)
    with pytest.raises(ValueError) as error:
        LatentShards(folder)
    message = str(error.value)
    assert says in message and message.startswith(str(folder)) and "\n" not in message, message


def test_a_flipped_byte_is_an_error_of_ours_or_no_error_at_all(tmp_path):
    folder, rng = copy(tmp_path / "out"), random.Random(0)
    for name, span in (("index.json", 3000), (latents.shard_name(0), 2200)):
        path = folder / name
        good = path.read_bytes()
        for _ in range(150):
            bad = bytearray(good)
            bad[rng.randrange(min(span, len(bad)))] = rng.randrange(256)
            path.write_bytes(bad)
            try:
                LatentShards(folder)
            except ValueError:
                pass
        path.write_bytes(good)


# ---- the command ----


def flags(out: object, *more: object) -> list[str]:
    words = ("encode", "--data", source(), "--vae", VAE, "--base", helpers.base(), "--out", out)
    return [*map(str, (*words, "--image-size", 16, "--shard-size", 5, "--batch-size", 3, *more))]


def test_the_command_encodes_once_and_says_what_there_is(tmp_path):
    done = helpers.call(data, *flags("latents", "--dtype", "bfloat16"), folder=tmp_path)
    assert done.status == 0 and done.out == "latents: 24 pictures, in 5 shards\n"
    assert "skipped 5 of 29 samples" in done.err
    before = contents(tmp_path / "latents")
    again = helpers.good(data, *flags("latents", "--dtype", "bfloat16"), folder=tmp_path)
    assert again == "latents: 24 pictures, there already; nothing was changed\n"
    assert contents(tmp_path / "latents") == before
    exact = encode_source(config(tmp_path / "exact"), load_vae(VAE))
    z, wanted = (s.read(list(range(GOOD)))[0] for s in (LatentShards(tmp_path / "latents"), exact))
    assert exact.vae_fingerprint == LatentShards(tmp_path / "latents").vae_fingerprint
    error = (z - wanted).square().mean() / wanted.square().mean()
    assert 0 < error < 1e-3  # bfloat16 was computed in, and hardly matters


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "the following arguments are required: command"),
        (["decode"], "invalid choice: 'decode'"),
        (["encode"], "--data is needed: folder, metadata.jsonl, tar, or a glob"),
        (["encode", "--imagesize", "3"], "unknown argument --imagesize; did you mean --image-size"),
        (flags("out", "--vae", "nowhere"), "nowhere: no such folder"),
        (flags("out", "--device", "abacus"), "--device abacus"),
        (flags("out", "--store", "int8"), "invalid choice: 'int8'"),
        (flags("out", "--image-size", "17"), "--image-size 17 is not a multiple of the VAE's 2"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_line(tmp_path, args, says):
    result = helpers.call(data, *args, folder=tmp_path)
    assert result.status == 2 and says in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_loses_nothing_that_is_whole(tmp_path):
    big = config(tmp_path / "out", shard_size=1)
    limit = 2200  # bytes; the first shards are smaller than index.json
    with pytest.raises(OSError, match="index.json could not be written"), helpers.small_disk(limit):
        encode_source(big, linear())
    codec = linear()
    assert len(encode_source(big, codec)) == GOOD and codec.calls == 0


def test_pixels_of_any_shape_become_squares(tmp_path):
    folder = helpers.write_photos(tmp_path / "photos", n=2)
    Image.new("RGB", (50, 20), "red").save(folder / "000.png")
    z = encode_source(config(tmp_path / "out", data=str(folder)), linear()).read([0])[0]
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 16, 16)
    torch.testing.assert_close(z, PatchPCA.encode(linear(), red.contiguous()), rtol=1e-3, atol=1e-3)


def test_the_flags_have_a_help_text_each():
    assert all(f.metadata["rule"].help for f in dataclasses.fields(EncodeConfig))
