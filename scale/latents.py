"""Pictures as latents on disk: encoded once by a VAE, then read at random by memory map (Section 4.1's data).

    python data.py encode --data "photos/train-*.tar" --vae VAE --base Qwen/Qwen3-0.6B --out latents/train

    OUT/shard-00000.safetensors   latents (n, C, h, w)
                                  ids (all tokens,) int32, offsets (n + 1,) int64: the tokens of caption i are
                                  ids[offsets[i] : offsets[i + 1]]
                                  text (bytes,) uint8, text_offsets (n + 1,) int64: the captions, likewise
    OUT/index.json                what made them and how many there are; written last

A shard is whole or not there: a kill loses the one in work. The same command goes on behind the last whole
one, and what comes out is, bit by bit, what an undisturbed run writes. Each shard's header says how it was
made and where in the source it begins and ends. A sample that cannot be decoded is left out and named.
Lines of a metadata.jsonl that are edits (see pictures.py) are left out and counted.

Shapes: n pictures of a shard, M of a batch, S pixels a side; latents (M, C, h, w), h = w = S / factor.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import random
import sys
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from checkpoint import check_device, write_atomic
from config import Parser, add_fields, setting
from load_qwen3 import encode_plain, load_tokenizer, open_safetensors, read_json, resolve
from scale.pictures import Sample, list_samples, listing, no_pictures, read_sample
from scale.vae import load_vae

FORMAT = 1  # of index.json and of the shards
INDEX = "index.json"
STORE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # torch's name -> safetensors'
NAMED = 10  # skipped samples that are named; the others are counted
REMEDY = "the flags it was begun with go on with it, another --out starts elsewhere"


@dataclass(frozen=True)
class EncodeConfig:
    """The flags of `python data.py encode`."""

    data: str = setting("", "folder, metadata.jsonl, tar, or a glob of these")
    vae: str = setting("", "folder or hub id of the VAE")
    base: str = setting("", "folder or hub id of the Qwen3 whose tokenizer reads the captions")
    out: str = setting("", "folder of the shards")
    image_size: int = setting(256, "pixels a side")
    shard_size: int = setting(1024, "pictures a shard")
    batch_size: int = setting(8, "pictures the VAE takes at once")
    device: str = setting("cpu", "where the VAE computes: cpu, cuda, ...")
    dtype: str = setting("float32", "what the VAE computes in", ("float32", "bfloat16"))
    # Our choice: float16, half the bytes; it rounds latents of about unit variance by less than 0.001
    store: str = setting("float16", "how latents are stored", tuple(STORE))


@dataclass(frozen=True)
class Settings:
    """All on which latents and ids depend, alike in the index and in every shard of a folder."""

    vae_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int  # of the tokenizer
    channels: int
    factor: int  # pixels a latent, each way
    image_size: int
    shard_size: int
    dtype: str
    store: str
    samples: int  # of the source, good and bad
    sample_names: str  # SHA-256
    format: int = FORMAT

    @property
    def latent_size(self) -> int:
        return self.image_size // self.factor

    @classmethod
    def parse(cls, raw: Any, path: Path) -> Settings:
        """From JSON; ValueError names the field that is missing or not as it should be."""
        check_fields(raw, {"format": int}, path)
        if raw["format"] != FORMAT:
            raise ValueError(f"{path}: of format {raw['format']}, and this program reads format {FORMAT}")
        check_fields(raw, {f.name: {"int": int, "str": str}[f.type] for f in fields(cls)}, path)
        settings = cls(**{f.name: raw[f.name] for f in fields(cls)})
        for name, value in asdict(settings).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{path}: {name} = {value} is not positive")
        if settings.store not in STORE:
            raise ValueError(f"{path}: store = {settings.store!r} is none of {', '.join(STORE)}")
        return settings

    def check_equal(self, wanted: Settings, path: Path, remedy: str) -> None:
        """ValueError names the first field in which `path`, made with these settings, is another."""
        for name, value in asdict(wanted).items():
            if (own := getattr(self, name)) != value:
                raise ValueError(f"{path}: made with {name} = {own}, not {value}; {remedy}")


def check_fields(raw: Any, kinds: dict[str, type], path: Path) -> None:
    """ValueError unless `raw`, of a file, is a JSON object with fields of these types."""
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__} where a JSON object should be")
    for name, kind in kinds.items():
        if type(raw.get(name)) is not kind:
            found = f"is a {type(raw[name]).__name__}" if name in raw else "is missing"
            raise ValueError(f"{path}: {name} {found} and should be of type {kind.__name__}")


def tokenizer_fingerprint(folder_or_hub_id: str | Path) -> str:
    """SHA-256 of tokenizer.json: whether two bases read captions alike."""
    path = resolve(folder_or_hub_id, weights=False) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Writing


def encode_source(config: EncodeConfig, codec) -> LatentShards:
    """Write the shards of `config.data` that `config.out` does not hold yet, then its index.

    codec: a vae.AutoencoderKL, or what else has `encode`, `patch`, `channels` and `fingerprint` like it.
    In memory are one shard and one batch at most. ValueError: no good sample; `out` was begun with other
    settings; a latent that is not finite. OSError: `out` cannot be written.
    """
    for name in ("image_size", "shard_size", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}; at least 1 is needed")
    if config.image_size % codec.patch:
        raise ValueError(f"--image-size {config.image_size} is not a multiple of the VAE's {codec.patch}")
    listed, tokenizer, out = list_samples(config.data), load_tokenizer(config.base), Path(config.out)
    samples = [sample for sample in listed if sample.kind != "edit"]
    names = json.dumps([sample.name for sample in samples])
    settings = Settings(
        vae_fingerprint=codec.fingerprint(),
        tokenizer_fingerprint=tokenizer_fingerprint(config.base),
        vocab_size=tokenizer.get_vocab_size(),
        channels=codec.channels,
        factor=codec.patch,
        image_size=config.image_size,
        shard_size=config.shard_size,
        dtype=config.dtype,
        store=config.store,
        samples=len(samples),
        sample_names=hashlib.sha256(names.encode()).hexdigest(),
    )
    if (out / INDEX).is_file():
        shards = LatentShards(out)
        shards.settings.check_equal(settings, out / INDEX, REMEDY)
        return shards
    out.mkdir(parents=True, exist_ok=True)
    pieces = whole_shards(out, settings)
    start = pieces[-1]["end"] if pieces else 0
    with tqdm(total=len(samples), initial=start, desc="encoding", unit="picture", disable=None) as bar:
        while start < len(samples):
            tensors, piece = encode_shard(samples, start, codec, tokenizer, config, bar)
            if tensors:  # metadata of one key, for the order of several is left to chance
                data = save(tensors, {"lmfusion": json.dumps(asdict(settings) | piece)})
                write_atomic(out / shard_name(len(pieces)), data)
            start = piece["end"]
            pieces.append(piece)
    count, skipped = sum(p["skipped_count"] for p in pieces), [x for p in pieces for x in p["skipped"]]
    edits = len(listed) - len(samples)
    bad = f"skipped {count:,} of {len(samples):,} samples: {listing(skipped[:NAMED])}"
    bad += f" and {count - NAMED:,} more" if count > NAMED else ""
    if not any(piece["count"] for piece in pieces):
        raise ValueError(f"{config.data}: {no_pictures(bad if count else '', edits)}")
    if edits:
        print(f"left out {edits:,} edits (lines with a source)", file=sys.stderr)
    if count:
        print(bad, file=sys.stderr)
    write_index(config, settings, pieces)
    return LatentShards(out)


def encode_shard(
    samples: list[Sample], start: int, codec, tokenizer: Tokenizer, config: EncodeConfig, bar: tqdm
) -> tuple[dict[str, Tensor], dict]:
    """The next `shard_size` good samples from `start` on: tensors ({} if there are none), and the header."""
    latents, ids, texts, skipped = [], [], [], []
    batch: list[tuple[str, Tensor]] = []  # begins anew with every shard, as after a kill
    end = start
    while end < len(samples) and len(texts) < config.shard_size:
        name, end = samples[end].name, end + 1
        bar.update()
        try:
            picture, caption = read_sample(samples[end - 1], config.image_size)
        except (ValueError, OSError) as error:
            skipped.append((name, str(error)))
            continue
        batch.append((name, picture))
        texts.append(caption.encode())
        ids.append(encode_plain(tokenizer, caption))  # "<|im_end|>" in a caption is text
        if len(batch) == config.batch_size:
            latents.append(encode_batch(batch, codec, config))
            batch = []
    if batch:
        latents.append(encode_batch(batch, codec, config))
    piece = {"start": start, "end": end, "count": len(texts)}
    piece |= {"skipped_count": len(skipped), "skipped": skipped[:NAMED]}
    if not texts:
        return {}, piece
    z = torch.cat(latents).contiguous()  # (n, C, h, w)
    piece["bound"] = [x.abs().max().item() for x in z.unbind(1)]
    piece["sum"] = [x.double().sum().item() for x in z.unbind(1)]
    piece["squares"] = [x.double().square().sum().item() for x in z.unbind(1)]
    tensors = {
        "latents": z,
        "ids": torch.tensor(list(chain(*ids)), dtype=torch.int32),
        "offsets": torch.tensor([0, *accumulate(map(len, ids))]),
        "text": torch.tensor(list(chain(*texts)), dtype=torch.uint8),
        "text_offsets": torch.tensor([0, *accumulate(map(len, texts))]),
    }
    return tensors, piece


def encode_batch(batch: list[tuple[str, Tensor]], codec, config: EncodeConfig) -> Tensor:
    """Names and pictures (3, S, S) -> latents (M, C, h, w) as they are stored; ValueError: not finite."""
    pictures = torch.stack([picture for _, picture in batch])  # (M, 3, S, S)
    z = codec.encode(pictures.to(config.device), config.batch_size).cpu()  # (M, C, h, w)
    stored = z.to(getattr(torch, config.store))
    for (name, _), x, y in zip(batch, z, stored, strict=True):
        if not y.isfinite().all():
            flag = f"--store {config.store}" if x.isfinite().all() else f"--dtype {config.dtype}"
            largest = f"its largest latent is {x.abs().max():g}"
            raise ValueError(f"{name}: {largest}, which {flag} cannot hold")
    return stored


def write_index(config: EncodeConfig, settings: Settings, pieces: list[dict]) -> None:
    """OUT/index.json, from what the shards are; a last piece may have no pictures and no file."""
    out, skipped = Path(config.out), [x for piece in pieces for x in piece["skipped"]]
    full = [piece for piece in pieces if piece["count"]]
    files = [out / shard_name(i) for i in range(len(full))]
    n = sum(piece["count"] for piece in full) * settings.latent_size**2
    mean = [sum(x) / n for x in zip(*(piece["sum"] for piece in full), strict=True)]
    squares = [sum(x) / n for x in zip(*(piece["squares"] for piece in full), strict=True)]
    index = (
        asdict(settings)
        | {
            "vae": address(config.vae),
            "base": address(config.base),
            "latent_size": settings.latent_size,
            "pictures": sum(piece["count"] for piece in full),
            "bound": [max(x) for x in zip(*(piece["bound"] for piece in full), strict=True)],
            "mean": mean,  # this and the next for information
            "std": [math.sqrt(max(0.0, s - m**2)) for s, m in zip(squares, mean, strict=True)],
            "skipped_count": sum(piece["skipped_count"] for piece in pieces),
            "skipped": skipped[:NAMED],
            "shards": [
                {"file": file.name, "count": piece["count"], "bytes": file.stat().st_size}
                for file, piece in zip(files, full, strict=True)
            ],
        }
    )
    write_atomic(out / INDEX, json.dumps(index, indent=1) + "\n")


def address(folder_or_hub_id: str) -> str:
    """A folder's whole path; a hub id as it is."""
    return str(Path(folder_or_hub_id).resolve()) if Path(folder_or_hub_id).is_dir() else folder_or_hub_id


def shard_name(i: int) -> str:
    return f"shard-{i:05d}.safetensors"


def whole_shards(out: Path, settings: Settings) -> list[dict]:
    """What a killed run has left. ValueError: it had other settings, or a shard is missing or damaged."""
    pieces: list[dict] = []
    for i, path in enumerate(sorted(out.glob("shard-*"))):
        if path.name != shard_name(i):
            raise ValueError(f"{path}: lies where {shard_name(i)} should be; another --out starts elsewhere")
        pieces.append(read_shard(path, settings, REMEDY))
        if pieces[i]["start"] != (pieces[i - 1]["end"] if i else 0):
            raise ValueError(f"{path}: does not begin where the shard before it ends; delete it to go on")
    return pieces


# ------------------------------------------------------------------------------------------------------------
# Reading


def read_shard(path: Path, settings: Settings, remedy: str) -> dict:
    """What a shard is, by its header. ValueError for all that is not as it should be; reads no latents."""
    with open_safetensors(path) as f:
        try:
            piece = json.loads((f.metadata() or {})["lmfusion"])
        except (KeyError, ValueError, RecursionError):
            raise ValueError(f"{path}: not a shard that `data.py encode` has written") from None
        Settings.parse(piece, path).check_equal(settings, path, remedy)
        kinds = dict.fromkeys(("start", "end", "count", "skipped_count"), int)
        check_fields(piece, kinds | dict.fromkeys(("skipped", "bound", "sum", "squares"), list), path)
        n, side = piece["count"], settings.latent_size
        shapes = {
            "latents": (n, settings.channels, side, side),
            "offsets": (n + 1,),
            "text_offsets": (n + 1,),
        }
        kinds = {"latents": STORE[settings.store], "ids": "I32", "text": "U8"}
        kinds |= {"offsets": "I64", "text_offsets": "I64"}
        for name in sorted(set(kinds) ^ set(f.keys())):
            raise ValueError(
                f"{path}: tensor {name} is {'missing' if name in kinds else 'not one of a shard'}"
            )
        slices = {name: f.get_slice(name) for name in kinds}
        for name, x in slices.items():
            shape = tuple(x.get_shape())
            wanted = shapes.get(name, shape[:1] or (0,))  # ids and text are as long as they are
            if x.get_dtype() != kinds[name] or shape != wanted:
                found = f"{x.get_dtype()} {shape}"
                raise ValueError(f"{path}: tensor {name} is {found}, not {kinds[name]} {wanted}")
        for name, offsets in (("ids", "offsets"), ("text", "text_offsets")):
            at, length = f.get_tensor(offsets), slices[name].get_shape()[0]  # (n + 1,)
            if at[0] != 0 or at[-1] != length or (at.diff() < 0).any():
                raise ValueError(
                    f"{path}: tensor {offsets} does not go up from 0 to {length}, as {name} does"
                )
        ids = f.get_tensor("ids")
        if len(ids) and not 0 <= ids.min() <= ids.max() < settings.vocab_size:
            found = f"{ids.min()} to {ids.max()}"
            raise ValueError(f"{path}: ids from {found}, of a vocabulary of {settings.vocab_size} tokens")
    return piece


class LatentShards:
    """A folder of latents. Opening it checks every shard but reads no latents; `read` maps what it needs.

    channels C, latent_size h, factor, image_size, vocab_size; bound (C, 1, 1), the largest latents there are,
    to which samplers clamp; vae and base, where these were; vae_fingerprint and tokenizer_fingerprint.
    """

    def __init__(self, folder: str | Path):
        """ValueError names the file, and what in it is not as `data.py encode` writes it."""
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            begun = any(self.folder.glob("shard-*"))
            hint = "has not come to its end: run it again" if begun else "makes a folder of latents"
            raise ValueError(f"{path}: no such file; `python data.py encode --out {folder}` {hint}")
        index = read_json(path)
        self.settings = Settings.parse(index, path)
        check_fields(index, {"vae": str, "base": str, "pictures": int, "bound": list, "shards": list}, path)
        self.vae, self.base = index["vae"], index["base"]
        self.vae_fingerprint = self.settings.vae_fingerprint
        self.tokenizer_fingerprint = self.settings.tokenizer_fingerprint
        self.vocab_size, self.channels = self.settings.vocab_size, self.settings.channels
        self.latent_size, self.factor = self.settings.latent_size, self.settings.factor
        self.image_size = self.settings.image_size
        numbers = [x if type(x) is float else math.nan for x in index["bound"]]
        self.bound = torch.tensor(numbers, dtype=torch.float32)[:, None, None]  # (C, 1, 1)
        if len(self.bound) != self.channels or not self.bound.isfinite().all():
            raise ValueError(f"{path}: bound should be {self.channels} finite numbers, one a channel")
        self.files, end = [], 0
        for entry in index["shards"]:
            file, piece = self.check_shard(entry, path)
            if piece["start"] != end:
                raise ValueError(f"{file}: does not begin where the shard before it ends")
            self.files.append(file)
            end = piece["end"]
        self.ends = list(accumulate(entry["count"] for entry in index["shards"]))
        if not self.ends or self.ends[-1] != index["pictures"]:
            n = self.ends[-1] if self.ends else 0
            raise ValueError(f"{path}: pictures is {index['pictures']}, but the shards hold {n}")
        self.slices: dict[int, dict[str, Any]] = {}

    def check_shard(self, entry: Any, index: Path) -> tuple[Path, dict]:
        """The file of an entry of index.json, and its header; ValueError if they do not agree."""
        check_fields(entry, {"file": str, "count": int, "bytes": int}, index)
        name = entry["file"]
        if Path(name).name != name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} is not the name of a .safetensors file beside it")
        path = self.folder / name
        if path.is_file() and path.stat().st_size != entry["bytes"]:
            found = f"{path.stat().st_size:,} bytes long"
            raise ValueError(
                f"{path}: {found}, but {entry['bytes']:,} by {INDEX}; it may have been cut short"
            )
        piece = read_shard(path, self.settings, f"{INDEX} says otherwise")
        if piece["count"] != entry["count"] or piece["count"] < 1:
            raise ValueError(f"{path}: holds {piece['count']} pictures, but {entry['count']} by {INDEX}")
        return path, piece

    def __len__(self) -> int:
        return self.ends[-1]

    def find(self, i: int) -> tuple[dict[str, Any], int]:
        """The tensors of picture i's shard, unread, and its row in them."""
        assert 0 <= i < len(self), i
        k = bisect.bisect_right(self.ends, i)
        if k not in self.slices:
            f = open_safetensors(self.files[k])  # a memory map; no file stays open
            self.slices[k] = {name: f.get_slice(name) for name in f.keys()}
        return self.slices[k], i - (self.ends[k - 1] if k else 0)

    def part(self, i: int, name: str, offsets: str) -> list[int]:
        """Picture i's part of a tensor that holds all pictures' parts one behind the other."""
        shard, row = self.find(i)
        start, end = shard[offsets][row : row + 2].tolist()
        return shard[name][start:end].tolist() if start < end else []

    def read(self, indices: list[int]) -> tuple[Tensor, list[list[int]]]:
        """Any pictures, in this order: latents (M, C, h, w) float32, and the ids of their captions."""
        rows = [shard["latents"][row] for shard, row in map(self.find, indices)]  # (C, h, w) each
        return torch.stack(rows).float(), [self.part(i, "ids", "offsets") for i in indices]

    def caption(self, i: int) -> str:
        return bytes(self.part(i, "text", "text_offsets")).decode(errors="replace")

    def check_fits(self, channels: int, latent_size: int, vocab_size: int, base: str | Path) -> None:
        """ValueError unless a model of these sizes, on the language model `base`, can be trained on this."""
        if self.channels != channels:
            found = f"latents of {self.channels} channels"
            raise ValueError(f"{self.folder}: {found}, the model takes {channels} (--latent-channels)")
        if self.latent_size != latent_size:
            found = f"latents of {self.latent_size} x {self.latent_size} ({self.image_size} pixels)"
            wanted = f"{latent_size} x {latent_size} (--image-size, --latent-patch)"
            raise ValueError(f"{self.folder}: {found}, the model takes {wanted}")
        if self.tokenizer_fingerprint != tokenizer_fingerprint(base):
            found = f"captions by the tokenizer of {self.base}"
            raise ValueError(f"{self.folder}: {found}, and that of {base} is another (--base)")
        if self.vocab_size > vocab_size:
            found = f"a vocabulary of {self.vocab_size} tokens"
            raise ValueError(f"{self.folder}: {found}, the model has {vocab_size} (--base)")


class LatentSource:
    """Latents as a data source, like data.PictureSource: every 20th is set aside, unless `val` is given."""

    def __init__(self, train: LatentShards, val: LatentShards | None):
        if val is None and len(train) < 2:
            raise ValueError(f"{train.folder}: one picture is too few: training and validation need one each")
        for name in ("vae_fingerprint", "tokenizer_fingerprint", "image_size") if val else ():
            ours, theirs = getattr(train, name), getattr(val, name)
            if ours != theirs:
                found = f"{name} is {ours} and {theirs}"
                raise ValueError(f"{train.folder} and {val.folder} were not encoded alike: {found}")
        self.train, self.val = train, val or train
        self.train_rows = range(len(train)) if val else [i for i in range(len(train)) if i % 20]
        self.val_rows = range(len(val)) if val else range(0, len(train), 20)

    def indices(self, n: int, rng: random.Random) -> list[int]:
        """n training pictures, drawn with replacement, for `load`."""
        return rng.choices(self.train_rows, k=n)

    def load(self, indices: list[int]) -> tuple[Tensor, list[list[int]]]:
        """Training pictures: latents (M, C, h, w) float32, and the ids of their captions."""
        return self.train.read(indices)

    def validation(self, n: int) -> tuple[Tensor, list[list[int]], list[str]]:
        """n validation pictures, the same ones whenever asked: latents, ids and captions."""
        rows = random.Random(0).sample(self.val_rows, min(n, len(self.val_rows)))
        return *self.val.read(rows), [self.val.caption(i) for i in rows]

    def prompts(self) -> list[str]:
        """What the sheets of a run show: captions of training pictures, then of validation pictures."""
        seen = random.Random(0).sample(self.train_rows, min(9, len(self.train_rows)))
        return [self.train.caption(i) for i in seen] + self.validation(9)[2]


def main() -> None:
    """`python data.py encode`."""
    parser = Parser(prog="data.py", description="Encode captioned pictures into shards of latents, once.")
    parser.add_argument("command", choices=("encode",), help="what to do")
    add_fields(parser, EncodeConfig)
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None and k != "command"}
    for name in ("data", "vae", "base", "out"):
        if not given.get(name):
            parser.error(f"--{name} is needed: {EncodeConfig.__dataclass_fields__[name].metadata['help']}")
    config = EncodeConfig(**given)
    check_device(config.device)
    whole = (Path(config.out) / INDEX).is_file()
    shards = encode_source(config, load_vae(config.vae, getattr(torch, config.dtype), config.device))
    state = "there already; nothing was changed" if whole else f"in {len(shards.files):,} shards"
    print(f"{shards.folder}: {len(shards):,} pictures, {state}")
