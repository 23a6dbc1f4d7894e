"""Pictures as latents on disk: encoded once by a VAE, then read at random by memory map (Section 4.1's data).

    python data.py encode --data "photos/train-*.tar" --vae VAE --base Qwen/Qwen3-0.6B --out latents/train

    OUT/shard-00000.safetensors   latents (n, C, h, w)
                                  ids (all tokens,) int32, offsets (n + 1,) int64: the tokens of caption i are
                                  ids[offsets[i] : offsets[i + 1]]
                                  text (bytes,) uint8, text_offsets (n + 1,) int64: the captions, likewise
                                  kinds (n,) uint8: 0 a captioned picture; 1 the picture before an edit, with
                                  no words, and behind it 2, the one after it, with the instruction
                                  pictures (n,) int64: of the pixels, what tells one picture from another
    OUT/index.json                what made them and how many there are; written last

A shard is whole or not there. After a kill the same command goes on behind the last whole one, and writes,
bit by bit, what an undisturbed run writes. A sample that cannot be decoded is left out and named.

With --part I/N a process encodes the I-th of N parts of the samples, into a folder of its own. --data takes
the parts together: "latents/part-*".

Shapes: n pictures of a shard, M of a batch, S pixels a side; latents (M, C, h, w), h = w = S / factor.
"""

from __future__ import annotations

import bisect
import glob
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from checkpoint import check_device, locked, write_atomic
from config import Bar, Parser, add_fields, flag_name, rules, setting
from load_qwen3 import address, encode_plain, load_tokenizer, open_safetensors, read_json, resolve
from scale.pictures import (
    NAMED,
    Sample,
    expand_braces,
    list_samples,
    nothing_to_load,
    read_edit,
    read_sample,
    skipped_line,
)
from scale.vae import AutoencoderKL, load_vae

FORMAT = 1  # of index.json and of the shards
INDEX = "index.json"
CAPTIONED, SOURCE, TARGET = range(3)  # what a row of a shard is
# alike in all folders that are read together
JOINED = ("vae_fingerprint", "tokenizer_fingerprint", "image_size", "channels", "vocab_size")
STORE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}  # torch's name -> safetensors'
REMEDY = "the flags it was begun with go on with it, another --out starts elsewhere"


@dataclass(frozen=True)
class EncodeConfig:
    """The flags of `python data.py encode`."""

    data: str = setting("", "folder, metadata.jsonl, tar, or a glob of these")
    vae: str = setting("", "folder or hub id of the VAE")
    base: str = setting("", "folder or hub id of the Qwen3 whose tokenizer reads the captions")
    out: str = setting("", "folder of the shards")
    part: str = setting("1/1", "I/N: the I-th of N parts of the samples, each in a folder of its own")
    image_size: int = setting(256, "pixels a side", low=1)
    shard_size: int = setting(1024, "pictures a shard", low=1)
    batch_size: int = setting(8, "pictures the VAE takes at once", low=1)
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

    def check_equal(self, made: dict, path: Path, remedy: str) -> None:
        """ValueError names the first field in which `path`, whose JSON is `made`, differs from these."""
        for name, value in asdict(self).items():
            if made.get(name) != value:
                raise ValueError(f"{path}: made with {name} = {made.get(name)}, not {value}; {remedy}")


@dataclass
class Piece:
    """What a shard holds: the good ones of the samples start .. end - 1; part of its header."""

    start: int
    end: int
    count: int
    skipped_count: int
    skipped: list[tuple[str, str]]  # name and reason of the first few
    bound: list[float]  # of each channel, the largest latent


def tokenizer_fingerprint(folder_or_hub_id: str | Path) -> str:
    """SHA-256 of tokenizer.json: whether two bases read captions alike."""
    path = resolve(folder_or_hub_id, weights=False) / "tokenizer.json"
    return sha256(path.read_bytes()).hexdigest()


def parse_part(text: str) -> tuple[int, int]:
    """ "2/8" -> 2, 8."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise ValueError(f"--part is {text!r}; it takes I/N with I from 1 to N: 2/8")
    return part, parts


def encode_source(config: EncodeConfig, codec: AutoencoderKL) -> LatentShards:
    """Write the shards of `config.data` that `config.out` does not hold yet, then its index.

    ValueError: no good sample; `out` was begun with other settings; a latent that is not finite.
    """
    for name, rule in rules(EncodeConfig).items():
        rule.check(flag_name(name), getattr(config, name))
    if config.image_size % codec.patch:
        raise ValueError(f"--image-size {config.image_size} is not a multiple of the VAE's {codec.patch}")
    part, parts = parse_part(config.part)
    samples, tokenizer, out = list_samples(config.data), load_tokenizer(config.base), Path(config.out)
    samples = samples[len(samples) * (part - 1) // parts : len(samples) * part // parts]
    names = json.dumps([sample.name for sample in samples])
    made_by = codec.fingerprint(), tokenizer_fingerprint(config.base), tokenizer.get_vocab_size()
    flags = config.image_size, config.shard_size, config.dtype, config.store
    digest = sha256(names.encode()).hexdigest()
    settings = Settings(*made_by, codec.channels, codec.patch, *flags, len(samples), digest)
    if (out / INDEX).is_file():
        settings.check_equal(read_json(out / INDEX), out / INDEX, REMEDY)
        return LatentShards(out)
    out.mkdir(parents=True, exist_ok=True)
    for half in out.glob(".*.tmp"):  # a killed run's; its whole ones are kept
        if re.fullmatch(r"\.(shard-\d+\.safetensors|index\.json)\.\d+\.tmp", half.name):
            half.unlink()
    left = (p for p in out.glob("shard-*") if re.fullmatch(r"shard-\d{5,}\.safetensors", p.name))
    pieces = read_shards(sorted(left), settings, REMEDY)
    start = pieces[-1].end if pieces else 0
    shown = dict(total=len(samples), initial=start, desc="encoding", unit="picture")
    with Bar(samples[start:], **shown) as bar:
        todo = iter(bar)
        while start < len(samples):
            tensors, piece = encode_shard(todo, start, codec, tokenizer, config)
            if piece.count:  # metadata of one key, for the order of several is left to chance
                data = save(tensors, {"lmfusion": json.dumps(asdict(settings) | asdict(piece))})
                write_atomic(out / shard_name(len(pieces)), data)
            start = piece.end
            pieces.append(piece)
    skipped = [x for piece in pieces for x in piece.skipped]
    bad = skipped_line(skipped, sum(piece.skipped_count for piece in pieces), len(samples))
    if not any(piece.count for piece in pieces):
        raise ValueError(f"{config.data}: {nothing_to_load('caption', bad, 0)}")
    if bad:
        print(bad, file=sys.stderr)
    write_index(config, settings, pieces)
    return LatentShards(out)


def encode_shard(
    todo: Iterator[Sample], start: int, codec: AutoencoderKL, tokenizer: Tokenizer, config: EncodeConfig
) -> tuple[dict[str, Tensor], Piece]:
    """The next good samples with `shard_size` pictures, or one more; `start`: the number of the first of
    `todo`. {} if none is good."""
    latents, ids, texts, kinds, shown, skipped, read = [], [], [], [], [], [], 0
    batch: list[tuple[str, Tensor]] = []  # begins anew with every shard, as after a kill
    for sample in todo:
        read += 1
        try:
            edit = sample.kind == "edit"
            *pictures, words = (read_edit if edit else read_sample)(sample, config.image_size)
        except (ValueError, OSError) as error:
            skipped.append((sample.name, str(error)))
            continue
        for picture in pictures:
            batch.append((sample.name, picture))
            if len(batch) == config.batch_size:
                latents.append(encode_batch(batch, codec, config))
                batch = []
        shown += [int.from_bytes(sha256(x.numpy().tobytes()).digest()[:7], "big") for x in pictures]
        kinds += [SOURCE, TARGET] if edit else [CAPTIONED]
        texts += [b""] * edit + [words.encode()]
        ids += [[]] * edit + [encode_plain(tokenizer, words)]  # "<|im_end|>" in a caption is text
        if len(texts) >= config.shard_size:
            break
    if batch:
        latents.append(encode_batch(batch, codec, config))
    found = start, start + read, len(texts), len(skipped), skipped[:NAMED]
    if not texts:
        return {}, Piece(*found, [])
    z = torch.cat(latents).contiguous()  # (n, C, h, w)
    tensors = {
        "latents": z,
        "ids": torch.tensor(list(chain(*ids)), dtype=torch.int32),
        "offsets": torch.tensor([0, *accumulate(map(len, ids))]),
        "text": torch.tensor(list(chain(*texts)), dtype=torch.uint8),
        "text_offsets": torch.tensor([0, *accumulate(map(len, texts))]),
        "kinds": torch.tensor(kinds, dtype=torch.uint8),
        "pictures": torch.tensor(shown),
    }
    return tensors, Piece(*found, z.abs().amax((0, 2, 3)).tolist())


def encode_batch(batch: list[tuple[str, Tensor]], codec: AutoencoderKL, config: EncodeConfig) -> Tensor:
    """Names and pictures (3, S, S) -> latents (M, C, h, w) as they are stored; ValueError: not finite."""
    pictures = torch.stack([picture for _, picture in batch])  # (M, 3, S, S)
    z = codec.encode(pictures.to(config.device), config.batch_size).cpu()  # (M, C, h, w)
    stored = z.to(getattr(torch, config.store))
    for (name, _), x, y in zip(batch, z, stored, strict=True):
        if not y.isfinite().all():
            flag = f"--store {config.store}" if x.isfinite().all() else f"--dtype {config.dtype}"
            raise ValueError(f"{name}: its largest latent is {x.abs().max():g}, which {flag} cannot hold")
    return stored


def write_index(config: EncodeConfig, settings: Settings, pieces: list[Piece]) -> None:
    """OUT/index.json, from what the shards are; a last piece may have no pictures and no file."""
    out, skipped = Path(config.out), [x for piece in pieces for x in piece.skipped]
    full = [piece for piece in pieces if piece.count]
    sizes = {shard_name(i): (out / shard_name(i)).stat().st_size for i in range(len(full))}
    shards = [dict(file=f, count=p.count, bytes=n) for (f, n), p in zip(sizes.items(), full, strict=True)]
    index = {
        **asdict(settings),
        "vae": address(config.vae),
        "base": address(config.base),
        "latent_size": settings.latent_size,
        "pictures": sum(piece.count for piece in full),
        "bound": [max(x) for x in zip(*(piece.bound for piece in full), strict=True)],
        "skipped_count": sum(piece.skipped_count for piece in pieces),
        "skipped": skipped[:NAMED],
        "shards": shards,
    }
    write_atomic(out / INDEX, json.dumps(index, indent=1) + "\n")


def shard_name(i: int) -> str:
    return f"shard-{i:05d}.safetensors"


def read_shards(files: list[Path], settings: Settings, remedy: str) -> list[Piece]:
    """What each shard of a folder is. ValueError: one is missing, damaged, or made with other settings."""
    pieces: list[Piece] = []
    for i, path in enumerate(files):
        if path.name != shard_name(i):
            raise ValueError(f"{path}: lies where {shard_name(i)} should be; another --out starts elsewhere")
        pieces.append(read_shard(path, settings, remedy))
        if pieces[i].start != (pieces[i - 1].end if i else 0):
            raise ValueError(f"{path}: does not begin where the shard before it ends; delete it to go on")
    return pieces


def read_shard(path: Path, settings: Settings, remedy: str) -> Piece:
    """What a shard is, by its header. ValueError for all that is not as it should be; reads no latents."""
    with open_safetensors(path) as f:
        try:
            header = json.loads((f.metadata() or {})["lmfusion"])
            piece = Piece(**{field.name: header[field.name] for field in fields(Piece)})
        except (KeyError, TypeError, ValueError, RecursionError):
            raise ValueError(f"{path}: not a shard that `data.py encode` has written") from None
        settings.check_equal(header, path, remedy)
        found = {name: [f.get_slice(name).get_dtype(), *f.get_slice(name).get_shape()] for name in f.keys()}
        n, side = piece.count, settings.latent_size
        lengths = {name: found.get(name, [0])[-1] for name in ("ids", "text")}  # as long as they are
        wanted = {"latents": [STORE[settings.store], n, settings.channels, side, side]}
        wanted |= {"ids": ["I32", lengths["ids"]], "offsets": ["I64", n + 1]}
        wanted |= {"text": ["U8", lengths["text"]], "text_offsets": ["I64", n + 1]}
        if "kinds" in found:  # shards of before there were edits in them have neither
            wanted |= {"kinds": ["U8", n], "pictures": ["I64", n]}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ValueError(f"{path}: tensor {name} is {found.get(name)}, not {wanted.get(name)}")
        for offsets, length in zip(("offsets", "text_offsets"), lengths.values(), strict=True):
            at = f.get_tensor(offsets)  # (n + 1,)
            if at[0] != 0 or at[-1] != length or (at.diff() < 0).any():
                raise ValueError(f"{path}: tensor {offsets} does not go up from 0 to {length}")
        ids = f.get_tensor("ids")
        if len(ids) and not 0 <= ids.min() <= ids.max() < settings.vocab_size:
            some = f"ids from {ids.min()} to {ids.max()}"
            raise ValueError(f"{path}: {some}, of a vocabulary of {settings.vocab_size} tokens")
        kinds = f.get_tensor("kinds") if "kinds" in found else torch.zeros(n, dtype=torch.uint8)
        pairs = (kinds[:-1] == SOURCE) == (kinds[1:] == TARGET)
        if not pairs.all() or kinds[:1].tolist() == [TARGET] or kinds[-1:].tolist() == [SOURCE]:
            raise ValueError(f"{path}: tensor kinds has half of an edit alone")
        if (kinds > TARGET).any():
            raise ValueError(f"{path}: tensor kinds holds {kinds.max()}")
    return piece


def latent_folders(source: str | Path) -> list[Path]:
    """The folders of latents that a path or a pattern ("latents/part-*") names; [] if it names none."""
    names = [str(source)] if Path(source).exists() else expand_braces(str(source))
    paths = chain.from_iterable([name] if Path(name).exists() else sorted(glob.glob(name)) for name in names)
    found = [path for path in map(Path, paths) if path.is_dir()]
    return found if any((f / INDEX).is_file() or any(f.glob("shard-*.safetensors")) for f in found) else []


class LatentShards:
    """A folder of latents, or several. Opening checks every shard but reads no latents; `read` maps them.

    channels C, image_size, vocab_size; bound (C, 1, 1), the largest latents there are, to which samplers
    clamp; vae and base, where these were; vae_fingerprint and tokenizer_fingerprint.
    """

    def __init__(self, folder: str | Path):
        """ValueError names the file, and what in it is not as `data.py encode` writes it."""
        self.folder, self.indices = Path(folder), []  # and the index files
        self.files: list[Path] = []
        pieces: list[Piece] = []
        for one in latent_folders(folder) or [self.folder]:
            settings, more = self.read_folder(one)
            for name in JOINED:
                theirs = getattr(settings, name)
                ours = vars(self).setdefault(name, theirs)
                if ours != theirs:
                    found = f"{name} is {theirs}, and {ours} in {self.indices[0].parent}"
                    raise ValueError(f"{one} was not encoded as the others: {found}")
            pieces += more
        self.ends = list(accumulate(piece.count for piece in pieces))
        bounds = torch.tensor([piece.bound for piece in pieces], dtype=torch.float32)  # (shards, C)
        self.bound = bounds.amax(0)[:, None, None]  # (C, 1, 1)
        self.slices: dict[int, dict[str, Any]] = {}

    def read_folder(self, folder: Path) -> tuple[Settings, list[Piece]]:
        """The settings and the shards of one folder; its files are added to those that are there."""
        path = folder / INDEX
        if not path.is_file():
            begun = any(folder.glob("shard-*"))
            hint = "has not come to its end: run it again" if begun else "makes a folder of latents"
            raise ValueError(f"{path}: no such file; `python data.py encode --out {folder}` {hint}")
        index = read_json(path)
        if index.get("format") != FORMAT:
            raise ValueError(f"{path}: of format {index.get('format')}, and this program reads {FORMAT}")
        try:
            settings = Settings(**{field.name: index[field.name] for field in fields(Settings)})
            self.vae, self.base = index["vae"], index["base"]
            pictures, n = index["pictures"], len(index["shards"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not an index that `data.py encode` has written: {error}") from None
        files = [folder / shard_name(i) for i in range(n)]
        pieces = read_shards(files, settings, f"{INDEX} says otherwise")
        if not n or sum(piece.count for piece in pieces) != pictures:
            held = sum(piece.count for piece in pieces)
            raise ValueError(f"{path}: pictures is {pictures}, but the shards hold {held}")
        self.files, self.indices = self.files + files, [*self.indices, path]
        return settings, pieces

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

    def column(self, name: str) -> list[int]:
        """A tensor (n,) of all shards; [] if these were written before there was such a one."""
        values: list[int] = []
        while len(values) < len(self):
            shard, _ = self.find(len(values))
            if name not in shard:
                return []
            values += shard[name][:].tolist()
        return values

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
        """The text of picture i's caption."""
        return bytes(self.part(i, "text", "text_offsets")).decode(errors="replace")


def main() -> None:
    """`python data.py encode`."""
    parser = Parser(description="Encode captioned pictures into shards of latents, once.")
    parser.add_argument("command", choices=("encode",), help="what to do")
    add_fields(parser, EncodeConfig)
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None and k != "command"}
    for name in ("data", "vae", "base", "out"):
        if not given.get(name):
            parser.error(f"--{name} is needed: {rules(EncodeConfig)[name].help}")
    config = EncodeConfig(**given)
    check_device(config.device)
    with locked(Path(config.out)):
        finished = (Path(config.out) / INDEX).is_file()
        shards = encode_source(config, load_vae(config.vae, getattr(torch, config.dtype), config.device))
    state = "there already; nothing was changed" if finished else f"in {len(shards.files):,} shards"
    print(f"{shards.folder}: {len(shards):,} pictures, {state}")
