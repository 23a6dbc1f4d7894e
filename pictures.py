"""Real pictures with captions, from folders, metadata.jsonl files and WebDataset tars (Section 4.1's data).

    folder      DIR with name.png (or .jpg, .jpeg, .webp) and name.txt side by side
    metadata    DIR/metadata.jsonl, each line {"file_name": "name.png", "text": "a caption"}, relative to DIR
    tars        DIR/train-00000.tar or "DIR/train-*.tar"; members whose paths agree up to the first dot of the
                file name are one sample: `.png` (...) is its picture, `.txt` its caption

Everything is decoded once, at the start, into one uint8 tensor: an epoch then costs no decoding, and a broken
file is found before the first step, not in the middle of the night. A bad sample is left out and named.
latents.py goes through the same samples one by one, by `list_samples` and `read_sample`.

Shapes: M pictures, S pixels a side.
"""

from __future__ import annotations

import glob
import io
import json
import os
import sys
import tarfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

FIELDS = {"png": "picture", "jpg": "picture", "jpeg": "picture", "webp": "picture", "txt": "caption"}
FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow knows many more, some of which start other programs
MAX_PIXELS = 64_000_000  # of one picture, by its header
MAX_FILE = 2**28  # bytes of one picture
MAX_CAPTION = 10_000  # characters
MAX_MEMORY = 2**33  # bytes of all decoded pictures


@dataclass
class Pictures:
    """Captioned pictures, and what was left out of them."""

    pixels: Tensor  # (M, 3, S, S) uint8
    captions: list[str]
    names: list[str]
    skipped: list[tuple[str, str]]  # name, reason


@dataclass
class Span:
    """Bytes of a file: all of it, or a member of a tar."""

    path: Path
    start: int = 0
    size: int | None = None

    def read(self, what: str, limit: int) -> bytes:
        """The bytes; ValueError if there are more than `limit` or no such file."""
        if not self.path.is_file():
            raise ValueError("no such file")
        size = self.path.stat().st_size if self.size is None else self.size
        if size > limit:
            raise ValueError(f"{what} longer than {limit:,} bytes")
        with open(self.path, "rb") as f:
            f.seek(self.start)
            return f.read(size)


@dataclass
class Sample:
    """Where the two halves of a sample are, unread; or the problem with it."""

    name: str
    picture: Span | None = None
    caption: Span | str | None = None
    problem: str = ""


def load_pictures(source: str | list[str], size: int, max_memory: int = MAX_MEMORY) -> Pictures:
    """Every captioned picture of `source`, (M, 3, S, S) uint8 with S = `size`, always in the same order.

    source: a folder, a metadata.jsonl, a tar, a glob of these, or a list. Pictures are turned upright,
    put on white where transparent, cropped to the square in their middle and resized. A bad sample is left
    out, listed in `skipped`, and named in one line on stderr.
    ValueError: nothing there, not a tar, no good sample at all, or more than `max_memory` bytes of pixels.
    """
    if size < 1:
        raise ValueError(f"size is {size}; a picture has at least 1 pixel a side")
    sources = [source] if isinstance(source, str) else list(source)
    samples = list_samples(sources)
    memory = len(samples) * 3 * size**2
    if memory > max_memory:
        raise ValueError(
            f"{', '.join(sources)}: {len(samples):,} pictures of {size} x {size} pixels take "
            f"{memory / 2**30:.2f} GiB, and {max_memory / 2**30:.2f} are allowed; make it fewer or smaller"
        )
    pixels = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
    result = Pictures(pixels, captions=[], names=[], skipped=[])
    for sample in tqdm(samples, desc="pictures", unit="picture", disable=None):
        try:
            pixels[len(result.names)], caption = read_sample(sample, size)
        except (ValueError, OSError) as e:
            result.skipped.append((sample.name, str(e)))
            continue
        result.captions.append(caption)
        result.names.append(sample.name)
    bad = f"{len(result.skipped):,} of {len(samples):,} samples: {listing(result.skipped)}"
    if not result.names:
        reason = f"; skipped {bad}" if samples else " (name.png + name.txt, metadata.jsonl, or tars by name)"
        raise ValueError(f"{', '.join(sources)}: no captioned pictures{reason}")
    if result.skipped:
        print(f"skipped {bad}", file=sys.stderr)
    result.pixels = pixels[: len(result.names)]
    return result


def listing(skipped: list[tuple[str, str]], most: int = 10) -> str:
    """The first names and reasons, on one line whatever characters they hold."""
    text = ", ".join(f"{name[:100]} ({reason[:200]})" for name, reason in skipped[:most])
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(skipped) <= most else f"{text} and {len(skipped) - most:,} more"


# ---- one sample ----


def read_sample(sample: Sample, size: int) -> tuple[Tensor, str]:
    """The picture (3, S, S) uint8 and the caption; ValueError or OSError says what is wrong with it."""
    caption = read_caption(sample)  # first: it is the cheaper half
    return decode_picture(sample.picture.read("file", MAX_FILE), size), caption


def read_caption(sample: Sample) -> str:
    """The caption without surrounding blanks; ValueError says what is wrong with the sample."""
    if sample.problem:
        raise ValueError(sample.problem)
    if sample.picture is None or sample.caption is None:
        raise ValueError("no picture" if sample.picture is None else "no caption")
    try:
        if isinstance(sample.caption, str):  # JSON can spell half a surrogate pair, which no tokenizer takes
            text = sample.caption.encode().decode().strip()
        else:
            text = sample.caption.read("caption", 8 * MAX_CAPTION).decode("utf-8-sig").strip()
    except UnicodeError:
        raise ValueError("caption is not UTF-8") from None
    if not text:
        raise ValueError("empty caption")
    if len(text) > MAX_CAPTION:
        raise ValueError(f"caption longer than {MAX_CAPTION:,} characters")
    return text


def decode_picture(data: bytes, size: int) -> Tensor:
    """A PNG, JPEG or WebP file -> (3, S, S) uint8; ValueError says what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large picture, of odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header alone
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return torch.from_numpy(np.array(square_rgb(image, size))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise ValueError("not a PNG, JPEG or WebP image") from None
    except Image.DecompressionBombError:
        raise ValueError(f"over {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as e:  # Pillow raises nearly anything on a damaged file
        raise ValueError("truncated image" if "truncated" in str(e) else f"damaged image: {e}") from None


def square_rgb(image: Image.Image, size: int) -> Image.Image:
    """Upright, the square in the middle, on white, RGB, `size` pixels a side."""
    image.draft("RGB", (2 * size, 2 * size))  # a much larger JPEG is decoded at a fraction of its size
    image = ImageOps.exif_transpose(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))  # resize's own `box` lets the outside in
    if image.mode.startswith("I"):  # 16-bit grey
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


# ---- where the samples are ----


def list_samples(source: str | list[str]) -> list[Sample]:
    """Every sample of `source` (see load_pictures), unread, in its fixed order; ValueError: no such file."""
    sources = [source] if isinstance(source, str) else list(source)
    return [sample for path in expand(sources) for sample in find_samples(path)]


def expand(sources: list[str]) -> list[Path]:
    """Paths and globs -> existing paths, each once, a glob's matches sorted."""
    paths = []
    for source in map(os.path.expanduser, sources):
        found = [source] if os.path.exists(source) else sorted(glob.glob(source))
        if not found:
            raise ValueError(f"{source}: no such file or folder, and as a pattern it matches nothing")
        paths += map(Path, found)
    return list(dict.fromkeys(paths))


def find_samples(path: Path) -> list[Sample]:
    """The samples of a folder, metadata.jsonl or tar, unread, in a fixed order. ValueError: not a tar."""
    if (path / "metadata.jsonl").is_file():
        path = path / "metadata.jsonl"
    if path.suffix == ".jsonl":
        lines = enumerate(path.read_bytes().split(b"\n"), start=1)
        return [jsonl_sample(line, f"{path.name}:{i}", path.parent) for i, line in lines if line.strip()]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file()]
        return pair((file.name, file.stem, file.suffix[1:], Span(file)) for file in files)
    return tar_samples(path)


def pair(files: Iterable[tuple[str, str, str, Span]]) -> list[Sample]:
    """(name, stem, extension, bytes) of each file -> samples by stem, in the order of their first files."""
    samples: dict[str, Sample] = {}
    for name, stem, extension, span in files:
        field = FIELDS.get(extension.lower().rpartition(".")[2])
        if field is None or os.path.basename(name).startswith("."):
            continue
        sample = samples.setdefault(stem, Sample(name))
        if "." in extension:  # 1.mask.png beside 1.png: in a WebDataset, a field of another name
            continue
        if getattr(sample, field) is not None:
            sample.problem = f"a second {field}, {name}"
        setattr(sample, field, span)
        if field == "picture":
            sample.name = name
    return list(samples.values())


def jsonl_sample(line: bytes, number: str, folder: Path) -> Sample:
    """One line of a metadata.jsonl; `number` names it where it does not name a file."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
        return Sample(number, problem='not {"file_name": "...", "text": "..."}')
    path = os.path.normpath(row["file_name"])
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        return Sample(row["file_name"], problem=f"not inside {folder}")
    return Sample(row["file_name"], Span(folder / path), row["text"])


def tar_samples(path: Path) -> list[Sample]:
    """The samples of a WebDataset tar in the order of its members; follows no link. ValueError: not a tar.

    A tar that breaks off yields the samples that are whole, and a bad one with the tar's name.
    """
    try:
        tar = tarfile.open(path, "r:")
    except (tarfile.TarError, ValueError, EOFError) as e:
        raise ValueError(f"{path}: not an uncompressed tar ({e})") from None
    files, length = [], path.stat().st_size
    with tar:
        try:
            for member in tar:
                if member.isreg() and not member.issparse() and member.offset_data + member.size <= length:
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    span = Span(path, member.offset_data, member.size)
                    files.append((f"{path.name}/{member.name}", folder + slash + stem, extension, span))
        except (tarfile.TarError, ValueError, EOFError):
            pass  # the check below sees it
        tar.fileobj.seek(tar.offset)  # where the next header would be: only zeros end a tar
        whole = tar.fileobj.read(512) == bytes(512)
    samples = pair(files)
    if not whole:
        if samples and None in (samples[-1].picture, samples[-1].caption):
            samples.pop()  # the one it broke off in
        samples.append(Sample(path.name, problem=f"tar is truncated or damaged behind byte {tar.offset:,}"))
    return samples
