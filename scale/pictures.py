"""Real pictures with captions, from folders, metadata.jsonl files and WebDataset tars (Section 4.1's data).

    folder      DIR with name.png (or .jpg, .jpeg, .webp) and name.txt side by side
    metadata    DIR/metadata.jsonl, each line {"file_name": "name.png", "text": "a caption"}, relative to DIR
    edits       the same file, {"source": "before.png", "text": "make the sky red", "file_name": "after.png"}:
                image, instruction, image; only `load_edits` loads these lines, and no others
    tars        DIR/train-00000.tar, "DIR/train-*.tar" or "DIR/train-{00000..00099}.tar"; members whose paths
                agree up to the first dot of the file name are one sample: `.png` (...) is its picture, `.txt`
                its caption

Everything is decoded once, at the start, into one uint8 tensor; latents.py goes through the same samples one
by one. A bad sample is left out and named: ValueError or OSError says what is wrong with it.

Shapes: M pictures or edits, S pixels a side.
"""

import glob
import io
import json
import os
import re
import sys
import tarfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from config import Bar, say_once

FIELDS = {"png": "picture", "jpg": "picture", "jpeg": "picture", "webp": "picture", "txt": "caption"}
DECODED = ("PNG", "JPEG", "WEBP")  # Pillow knows many more, some of which start other programs
PAGE = "a page of several pictures"  # what grids and sheets say of themselves, in their Exif data
MAX_PIXELS = 64_000_000  # of one picture, by its header
MAX_FILE = 2**28  # bytes of one picture
MAX_CAPTION = 10_000  # characters
MAX_MEMORY = 2**33  # bytes of all decoded pictures
MAX_NAMES = 100_000  # that a pair of braces may stand for
NAMED = 10  # bad samples that are named; the others are counted
Skipped = list[tuple[str, str]]  # name and reason of what was left out


@dataclass
class Pictures:
    """Captioned pictures, or edits (image, instruction, image), and what was left out of them."""

    pixels: Tensor  # (M, 3, S, S) uint8; of edits, after them
    captions: list[str]  # of edits, the instructions
    names: list[str]
    skipped: Skipped
    sources: Tensor | None = None  # (M, 3, S, S) uint8: before the edits


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
    """Where the parts of a sample are, unread; or the problem with it."""

    name: str
    picture: Span | None = None  # of an edit, the one after it
    caption: Span | str | None = None  # of an edit, the instruction
    source: Span | None = None  # the picture before an edit; None for a captioned picture
    problem: str = ""
    kind: str = "caption"  # or "edit"; "" for a line that does not say which


def load_pictures(source: str | list[str], size: int, max_memory: int = MAX_MEMORY) -> Pictures:
    """Every captioned picture of `source`, (M, 3, S, S) uint8 with S = `size`, always in the same order.

    source: a folder, a metadata.jsonl, a tar, a glob of these, or a list. Pictures are turned upright,
    brought from their colour profile to sRGB, put on white where transparent, cropped to the square in their
    middle and resized. A bad sample is left out, listed in `skipped`, and named in one line on stderr. Edits
    are passed over.
    ValueError: nothing there, not a tar, no good sample at all, or more than `max_memory` bytes of pixels.
    """
    return load_samples("caption", source, size, max_memory)


def load_edits(source: str | list[str], size: int, max_memory: int = MAX_MEMORY) -> Pictures:
    """Every edit of `source`, as `load_pictures` has pictures; bad if either picture or the words are."""
    return load_samples("edit", source, size, max_memory)


def load_samples(kind: str, source: str | list[str], size: int, max_memory: int) -> Pictures:
    """The samples of a kind, "caption" or "edit"."""
    read, parts, unit = (read_edit, 2, "edit") if kind == "edit" else (read_sample, 1, "picture")
    sources, listed = source if isinstance(source, str) else ", ".join(source), list_samples(source)
    samples = [sample for sample in listed if sample.kind in (kind, "")]
    memory = parts * len(samples) * 3 * size**2
    if memory > max_memory:
        take = f"{parts * len(samples):,} pictures of {size} x {size} pixels take {memory / 2**30:.2f} GiB"
        raise ValueError(f"{sources}: {take}, {max_memory / 2**30:.2f} are allowed; make it fewer or smaller")
    pixels = torch.empty(parts, len(samples), 3, size, size, dtype=torch.uint8)
    texts, names, skipped = [], [], []
    for sample in Bar(samples, desc=f"{unit}s", unit=unit):
        try:
            *images, text = read(sample, size)
        except (ValueError, OSError) as e:
            skipped.append((sample.name, str(e)))
            continue
        pixels[:, len(names)] = torch.stack(images)
        texts.append(text)
        names.append(sample.name)
    bad = skipped_line(skipped, len(skipped), len(samples), "edits" if kind == "edit" else "samples")
    if not names:
        edits = sum(sample.kind == "edit" for sample in listed)
        raise ValueError(f"{sources}: {nothing_to_load(kind, bad, edits)}")
    if bad:
        print(bad, file=sys.stderr)
    pixels = pixels[:, : len(names)]
    return Pictures(pixels[-1], texts, names, skipped, pixels[0] if kind == "edit" else None)


def skipped_line(skipped: Skipped, count: int, total: int, word: str = "samples") -> str:
    """How many samples are bad, and the first names and reasons, on one line; "" if none is."""
    text = ", ".join(f"{name[:100]} ({reason[:200]})" for name, reason in skipped[:NAMED])
    text = "".join(c if c.isprintable() else "?" for c in text)
    text += f" and {count - NAMED:,} more" if count > NAMED else ""
    return f"skipped {count:,} of {total:,} {word}: {text}" if count else ""


def nothing_to_load(kind: str, bad: str, edits: int) -> str:
    """What to say where no sample of a kind is good. `bad` tells of the bad ones; `edits`: how many edits."""
    reason = f"; {bad}" if bad else ""
    if kind == "edit":
        return f"no edits: rows of a metadata.jsonl with source, text and file_name{reason}"
    if edits:
        reason += f"; {edits:,} edits (lines with a source), which are for --task edit"
    return f"no captioned pictures{reason or ' (name.png + name.txt, metadata.jsonl, or tars by name)'}"


def read_sample(sample: Sample, size: int) -> tuple[Tensor, str]:
    """The picture (3, S, S) uint8 and the caption, or of an edit the picture after it and the instruction."""
    caption = read_caption(sample)  # first: it is the cheaper half
    return decode_picture(sample.picture.read("file", MAX_FILE), size), caption


def read_edit(sample: Sample, size: int) -> tuple[Tensor, Tensor, str]:
    """The pictures before and after an edit, (3, S, S) uint8 each, and the instruction."""
    target, instruction = read_sample(sample, size)
    try:
        source = decode_picture(sample.source.read("file", MAX_FILE), size)
    except ValueError as e:
        raise ValueError(f"source: {e}") from None
    return source, target, instruction


def read_caption(sample: Sample) -> str:
    """The caption or instruction without surrounding blanks; ValueError: what is wrong with the sample."""
    what = "instruction" if sample.kind == "edit" else "caption"
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
        raise ValueError(f"{what} is not UTF-8") from None
    if not text:
        raise ValueError(f"empty {what}")
    if len(text) > MAX_CAPTION:
        raise ValueError(f"{what} longer than {MAX_CAPTION:,} characters")
    return text


def decode_picture(data: bytes, size: int) -> Tensor:
    """A PNG, JPEG or WebP file -> (3, S, S) uint8; ValueError says what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large picture, of odd metadata
            with Image.open(io.BytesIO(data), formats=DECODED) as image:  # reads the header alone
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if image.getexif().get(ExifTags.Base.ImageDescription) != PAGE:
                    return torch.from_numpy(np.array(square_rgb(image, size))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise ValueError("not a PNG, JPEG or WebP image") from None
    except Image.DecompressionBombError:
        raise ValueError(f"over {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as e:  # Pillow raises nearly anything on a damaged file
        raise ValueError("truncated image" if "truncated" in str(e) else f"damaged image: {e}") from None
    raise ValueError(f"{PAGE}; with --out FOLDER, sample.py writes each alone")


def square_rgb(image: Image.Image, size: int) -> Image.Image:
    """Upright, the square in the middle, on white, RGB, `size` pixels a side."""
    profile = image.info.get("icc_profile")
    image.draft("RGB", (2 * size, 2 * size))  # a much larger JPEG is decoded at a fraction of its size
    image = ImageOps.exif_transpose(image)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))  # resize's own `box` lets the outside in
    if image.mode.startswith("I"):  # 16-bit grey
        image = image.point(lambda value: value * (1 / 257)).convert("L")
        image.info.pop("transparency", None)  # of 16 bits as well
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.resize((size, size), Image.Resampling.BICUBIC)


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The colours that an ICC profile says, as sRGB: wide gamuts, Adobe RGB, CMYK, grey.

    Relative colorimetric with black point compensation: white stays white, and what sRGB can show keeps its
    colour. A profile that cannot be used is ignored: the numbers are taken as sRGB.
    """
    base = image.convert("L" if image.mode in ("1", "L", "LA") else "CMYK" if image.mode == "CMYK" else "RGB")
    how = dict(renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB")
    how |= dict(flags=ImageCms.Flags.BLACKPOINTCOMPENSATION)
    try:
        return ImageCms.profileToProfile(base, io.BytesIO(profile), ImageCms.createProfile("sRGB"), **how)
    except (ImageCms.PyCMSError, OSError, ValueError):
        say_once("note: a colour profile cannot be used (more may follow): its pictures are taken as sRGB")
        return base.convert("RGB")


def list_samples(source: str | list[str]) -> list[Sample]:
    """Every sample of `source`, unread, in a fixed order, each path once. ValueError: no such file or tar.

    No two files have one name: it is the path from the folder that all of them lie in, and of a tar's member
    that of the tar and its own.
    """
    paths: dict[str, None] = {}
    for name in map(os.path.expanduser, [source] if isinstance(source, str) else source):
        for path in [name] if os.path.exists(name) else expand_braces(name):
            found = [path] if os.path.exists(path) else sorted(glob.glob(path))
            if not found:
                raise ValueError(f"{path}: no such file or folder, and as a pattern it matches nothing")
            paths |= dict.fromkeys(found)
    homes = {path: os.path.abspath(path if path.is_dir() else path.parent) for path in map(Path, paths)}
    samples = []
    for path, home in homes.items():
        folder = os.path.relpath(home, os.path.commonpath(homes.values()))
        for sample in find_samples(path):
            sample.name = os.path.normpath(os.path.join(folder, sample.name))
            samples.append(sample)
    return samples


def expand_braces(pattern: str) -> list[str]:
    """a-{00..02}.tar -> a-00.tar, a-01.tar, a-02.tar; {train,val}.tar likewise, as WebDataset has them."""
    brace = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if brace is None:
        return [pattern]
    first, last, names = brace.groups()
    if names is None:
        if not 0 <= int(last) - int(first) < MAX_NAMES:
            raise ValueError(f"{pattern}: {brace[0]} must count up, over {MAX_NAMES:,} names at the most")
        parts = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    else:
        parts = names.split(",")
    rest = expand_braces(pattern[brace.end() :])
    return [pattern[: brace.start()] + part + end for part in parts for end in rest]


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
    """One line of a metadata.jsonl, an edit if it has a source; `number` names it where no file does."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        return Sample(number, problem='not {"file_name": "...", "text": "..."}', kind="")
    kind = "edit" if "source" in row else "caption"
    keys = ("source", "text", "file_name") if kind == "edit" else ("file_name", "text")
    if not all(isinstance(row.get(key), str) for key in keys):
        form = ", ".join(f'"{key}": "..."' for key in keys)
        return Sample(number, problem=f"not {{{form}}}", kind=kind)
    picture, problem = file_inside(folder, row["file_name"]), ""
    source = file_inside(folder, row["source"]) if kind == "edit" else None
    if picture is None or (kind == "edit" and source is None):
        problem = f"{'source: ' if picture is not None else ''}not inside {folder}"
    return Sample(row["file_name"], picture, row["text"], source, problem, kind)


def file_inside(folder: Path, name: str) -> Span | None:
    """A file by its path from `folder`; None if that leads out of it."""
    path = os.path.normpath(name)
    return None if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir else Span(folder / path)


def tar_samples(path: Path) -> list[Sample]:
    """The samples of a WebDataset tar in its order; follows no link. ValueError: not a tar.

    One that breaks off yields what is whole, and a bad sample with the tar's name.
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
