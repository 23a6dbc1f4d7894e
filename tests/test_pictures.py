"""pictures.py: every kind of source, every kind of bad sample, and what happens to the pixels.

All files are written by the tests themselves.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from config import say_once
from scale import pictures
from scale.pictures import decode_picture, list_samples, load_edits, load_pictures, read_sample

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def plain(color: tuple[int, ...] = RED, size: tuple[int, int] = (8, 8), form: str = "PNG") -> bytes:
    """A picture of one color, in a form without loss."""
    return encode(Image.new("RGB", size, color), form, **({"lossless": True} if form == "WEBP" else {}))


def noise(form: str = "PNG") -> bytes:
    """A picture that does not compress, so that half of its file is not all of it."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), form)


def header(width: int, height: int) -> bytes:
    """The beginning of a PNG of that size."""
    size = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size))
    return start + struct.pack(">I", 99999) + b"IDAT" + bytes(10)


def write_folder(folder: Path, files: dict[str, bytes | str]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(folder)


def write_tar(path: Path, files: dict[str, bytes | str] | list[tuple[str, bytes | str]], **options) -> str:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            data = data if isinstance(data, bytes) else data.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def write_jsonl(folder: Path, rows: list, files: dict[str, bytes]) -> str:
    """rows: dictionaries, or whole lines as bytes."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    write_folder(folder, {**files, "metadata.jsonl": b"\n".join(lines)})
    return str(folder)


def colors(pixels: torch.Tensor) -> list[tuple[int, ...]]:
    """Pictures of one color each -> those colors."""
    assert (pixels == pixels[:, :, :1, :1]).all()
    return [tuple(p[:, 0, 0].tolist()) for p in pixels]


SAMPLES = {"b.png": plain(RED), "b.txt": "red", "a.png": plain(GREEN), "a.txt": " a green one\n"}


# ---- sources ----


def test_folder_pairs_pictures_with_captions_by_name_sorted(tmp_path):
    found = load_pictures(write_folder(tmp_path, SAMPLES), 4)
    assert found.pixels.shape == (2, 3, 4, 4) and found.pixels.dtype == torch.uint8
    assert found.names == ["a.png", "b.png"] and found.captions == ["a green one", "red"]
    assert colors(found.pixels) == [GREEN, RED] and found.skipped == []


def test_folder_takes_every_extension_in_either_case_and_dots_in_names(tmp_path):
    forms = {
        "a.png": "PNG",
        "b.jpg": "JPEG",
        "c.jpeg": "JPEG",
        "d.webp": "WEBP",
        "E.JPG": "JPEG",
        "f.v2.png": "PNG",
    }
    files = {name: plain((128, 128, 128), form=form) for name, form in forms.items()}
    captions = {name.rpartition(".")[0] + ".txt": f"caption of {name}" for name in forms}
    found = load_pictures(write_folder(tmp_path, {**files, **captions}), 4)
    assert found.names == sorted(forms) and found.captions == [f"caption of {name}" for name in sorted(forms)]


def test_folder_ignores_other_files_hidden_files_and_folders(tmp_path, capsys):
    others = {
        "notes.md": "x",
        "._a.png": b"x",
        ".DS_Store": b"x",
        "a.gif": b"x",
        "sub/z.png": plain(),
        "x.png/y": "x",
    }
    found = load_pictures(write_folder(tmp_path, {**SAMPLES, **others}), 4)
    assert found.names == ["a.png", "b.png"] and found.skipped == [] and capsys.readouterr().err == ""


def test_metadata_jsonl_by_its_folder_or_its_own_path_in_the_order_of_its_lines(tmp_path):
    rows = [{"file_name": "two/b.png", "text": "red"}, {"file_name": "a.png", "text": "grün ", "more": 1}]
    files = {"two/b.png": plain(RED), "a.png": plain(GREEN), "a.txt": b"not this one", "c.png": plain(BLUE)}
    folder = write_jsonl(tmp_path, rows, files)
    for source in (folder, f"{folder}/metadata.jsonl"):
        found = load_pictures(source, 4)
        assert found.names == ["two/b.png", "a.png"] and found.captions == ["red", "grün"]
        assert colors(found.pixels) == [RED, GREEN] and found.skipped == []


def test_metadata_jsonl_may_have_blank_lines_windows_line_ends_and_a_mark_at_the_start(tmp_path):
    line = json.dumps({"file_name": "a.png", "text": "green"}).encode()
    found = load_pictures(
        write_jsonl(tmp_path, [b"\xef\xbb\xbf" + line + b"\r", b"", b"  ", line + b"\r"], SAMPLES), 4
    )
    assert found.captions == ["green", "green"] and found.skipped == []


def test_metadata_jsonl_may_go_up_inside_its_folder(tmp_path):
    rows = [{"file_name": "two/../a.png", "text": "x"}, {"file_name": "./b.png", "text": "y"}]
    assert colors(load_pictures(write_jsonl(tmp_path, rows, SAMPLES), 4).pixels) == [GREEN, RED]


def test_tar_samples_share_the_path_up_to_the_first_dot_of_the_file_name_in_the_order_of_members(tmp_path):
    files = {
        "v1.0/b.txt": "red",
        "v1.0/b.PNG": plain(RED),
        "v1.0/b.mask.png": plain(BLUE),
        "b.png": plain(GREEN),
        "b.json": "{}",
        "__index__": "x",
        "._b.png": "x",
        "b.txt": "green",
    }
    found = load_pictures(write_tar(tmp_path / "t.tar", files), 4)
    assert found.captions == ["red", "green"] and found.names == ["t.tar/v1.0/b.PNG", "t.tar/b.png"]
    assert colors(found.pixels) == [RED, GREEN] and found.skipped == []


def test_names_hold_the_folder_or_tar_that_files_lie_in(tmp_path):
    """So no two files have one name, and a file has one, however it is spelled."""
    write_folder(tmp_path / "cats", SAMPLES)
    write_jsonl(tmp_path / "dogs", [CAPTIONED, {**CAPTIONED, "file_name": "./two/../b.png"}], SAMPLES)
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        write_tar(tmp_path / place / "t.tar", SAMPLES)
    names = [sample.name for sample in list_samples([str(tmp_path / "*s"), str(tmp_path / "*" / "t.tar")])]
    tars = [f"{place}/t.tar/{name}.png" for place in ("one", "two") for name in "ba"]
    assert names == ["cats/a.png", "cats/b.png", "dogs/b.png", "dogs/b.png", *tars]
    assert [s.name for s in list_samples(str(tmp_path / "one" / "*.tar"))] == ["t.tar/b.png", "t.tar/a.png"]
    assert [s.name for s in list_samples(str(tmp_path / "cats"))] == ["a.png", "b.png"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_long_and_foreign_names(tmp_path, form):
    name = "verzeichnis/" * 12 + "ä" if form != tarfile.USTAR_FORMAT else "verzeichnis/" * 8 + "b"
    path = write_tar(tmp_path / "t.tar", {f"{name}.png": plain(RED), f"{name}.txt": "red"}, format=form)
    assert load_pictures(path, 4).names == [f"t.tar/{name}.png"]


def test_glob_takes_tars_sorted_whatever_the_order_in_which_they_were_written(tmp_path):
    for i in (2, 0, 1):
        write_tar(
            tmp_path / f"train-{i}.tar",
            {"z.png": plain(), "z.txt": f"z{i}", "a.png": plain(), "a.txt": f"a{i}"},
        )
    write_tar(tmp_path / "val-0.tar", {"a.png": plain(), "a.txt": "val"})
    assert load_pictures(f"{tmp_path}/train-*.tar", 4).captions == ["z0", "a0", "z1", "a1", "z2", "a2"]


def test_list_of_sources_is_read_in_its_order_each_path_once(tmp_path):
    tars = [write_tar(tmp_path / f"{i}.tar", {"a.png": plain(), "a.txt": f"tar {i}"}) for i in range(3)]
    folder = write_folder(tmp_path / "folder", SAMPLES)
    found = load_pictures([tars[2], folder, f"{tmp_path}/*.tar"], 4)
    assert found.captions == ["tar 2", "a green one", "red", "tar 0", "tar 1"]


def test_home_folder_and_literal_brackets_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tar(tmp_path / "train[1].tar", {"a.png": plain(), "a.txt": "x"})
    assert load_pictures("~/train[1].tar", 4).captions == load_pictures("~/*.tar", 4).captions == ["x"]


def test_one_by_one_the_samples_are_those_that_are_loaded_together(tmp_path):
    bad = {"0.txt": "no picture", "c.png": b"x", "c.txt": "broken"}
    folder = write_folder(tmp_path / "a", {**SAMPLES, **bad})
    sources = [folder, write_tar(tmp_path / "b.tar", {"z.png": plain(BLUE), "z.txt": "blue"})]
    found = load_pictures(sources, 4)
    pixels, captions, skipped = [], [], []
    for sample in list_samples(sources):
        try:
            picture, caption = read_sample(sample, 4)
        except ValueError as error:
            skipped.append((sample.name, str(error)))
            continue
        pixels.append(picture)
        captions.append(caption)
    assert torch.equal(torch.stack(pixels), found.pixels) and captions == found.captions
    assert skipped == found.skipped and len(skipped) == 2 and len(captions) == 3


def test_listing_reads_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.Span, "read", None)
    names = [sample.name for sample in list_samples(write_folder(tmp_path, SAMPLES))]
    assert names == ["a.png", "b.png"]


def test_twice_the_same_source_gives_twice_the_same(tmp_path):
    files = {f"{i}.png": noise() for i in range(5)} | {f"{i}.txt": str(i) for i in range(5)} | {"9.txt": "x"}
    a, b = (load_pictures(write_folder(tmp_path, files), 7) for _ in range(2))
    assert torch.equal(a.pixels, b.pixels) and vars(a) | {"pixels": 0} == vars(b) | {"pixels": 0}


# ---- bad samples ----

BAD = {  # what stands beside a good sample, and why it is left out
    "truncated png": ({"x.png": noise()[:2000], "x.txt": "x"}, "x.png", "truncated image"),
    "truncated jpeg": ({"x.jpg": noise("JPEG")[:-300], "x.txt": "x"}, "x.jpg", "truncated image"),
    "truncated webp": ({"x.webp": noise("WEBP")[:-300], "x.txt": "x"}, "x.webp", "image"),
    "damaged png": (
        {"x.png": noise()[:200] + bytes(60) + noise()[260:], "x.txt": "x"},
        "x.png",
        "damaged image",
    ),
    "empty picture": ({"x.png": b"", "x.txt": "x"}, "x.png", "not a PNG, JPEG or WebP image"),
    "not an image": ({"x.png": b"<html>404</html>", "x.txt": "x"}, "x.png", "not a PNG, JPEG or WebP image"),
    "other format": ({"x.png": encode(Image.new("RGB", (8, 8)), "BMP"), "x.txt": "x"}, "x.png", "not a PNG"),
    "no pixels": ({"x.png": header(0, 8), "x.txt": "x"}, "x.png", "image"),
    "huge": ({"x.png": header(8001, 8001), "x.txt": "x"}, "x.png", "over 64 megapixels"),
    "of a size that Pillow warns of": (
        {"x.png": header(10_000, 10_000), "x.txt": "x"},
        "x.png",
        "over 64 meg",
    ),
    "of a size that Pillow refuses": (
        {"x.png": header(200_000, 200_000), "x.txt": "x"},
        "x.png",
        "over 64 megapixels",
    ),
    "no caption": ({"x.png": plain()}, "x.png", "no caption"),
    "no picture": ({"x.txt": "x"}, "x.txt", "no picture"),
    "empty caption": ({"x.png": plain(), "x.txt": ""}, "x.png", "empty caption"),
    "blank caption": ({"x.png": plain(), "x.txt": " \n\t"}, "x.png", "empty caption"),
    "latin-1 caption": (
        {"x.png": plain(), "x.txt": "grün".encode("latin-1")},
        "x.png",
        "caption is not UTF-8",
    ),
    "long caption": (
        {"x.png": plain(), "x.txt": "x" * 10_001},
        "x.png",
        "caption longer than 10,000 characters",
    ),
    "endless caption": (
        {"x.png": plain(), "x.txt": "x" * 80_001},
        "x.png",
        "caption longer than 80,000 bytes",
    ),
    "two pictures": ({"x.jpg": plain(), "x.png": plain(), "x.txt": "x"}, "x.png", "a second picture"),
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_left_out_alone_and_named_once(tmp_path, capfd, kind, case):
    bad, name, reason = BAD[case]
    files = {**bad, "y.png": plain(GREEN), "y.txt": "green"}
    source = write_folder(tmp_path, files) if kind == "folder" else write_tar(tmp_path / "t.tar", files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_pictures(source, 4)
    name = f"t.tar/{name}" if kind == "tar" else name
    assert found.captions == ["green"] and colors(found.pixels) == [GREEN]
    assert len(found.skipped) == 1
    assert found.skipped[0][0] == name and reason in found.skipped[0][1]
    out, err = capfd.readouterr()
    assert out == "" and err == f"skipped 1 of 2 samples: {name} ({found.skipped[0][1]})\n"


def test_a_caption_may_begin_with_a_byte_order_mark(tmp_path):
    found = load_pictures(write_folder(tmp_path, {"x.png": plain(), "x.txt": b"\xef\xbb\xbfgr\xc3\xbcn"}), 4)
    assert found.captions == ["grün"]


def test_a_caption_of_just_ten_thousand_characters_is_kept(tmp_path):
    found = load_pictures(write_folder(tmp_path, {"x.png": plain(), "x.txt": "語" * 10_000}), 4)
    assert len(found.captions[0]) == 10_000


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_FILE", 500)
    found = load_pictures(write_folder(tmp_path, {**SAMPLES, "x.png": noise(), "x.txt": "x"}), 4)
    assert found.skipped == [("x.png", "file longer than 500 bytes")]


BAD_LINES = [
    (b"[1, 2]", "metadata.jsonl:2", "not {"),
    (b"{'file_name': 'a.png', 'text': 'x'}", "metadata.jsonl:2", "not {"),
    (b'{"file_name": "a.png"', "metadata.jsonl:2", "not {"),
    (b"[" * 100_000, "metadata.jsonl:2", "not {"),
    (b'{"file_name": "a.png", "text": "gr\xfcn"}', "metadata.jsonl:2", "not {"),
    ({"file_name": "a.png"}, "metadata.jsonl:2", "not {"),
    ({"text": "x"}, "metadata.jsonl:2", "not {"),
    ({"file_name": "a.png", "text": 7}, "metadata.jsonl:2", "not {"),
    ({"file_name": None, "text": "x"}, "metadata.jsonl:2", "not {"),
    ({"file_name": "a.png", "text": ""}, "a.png", "empty caption"),
    ({"file_name": "a.png", "text": "\ud800"}, "a.png", "caption is not UTF-8"),
    ({"file_name": "a.png", "text": "x" * 10_001}, "a.png", "caption longer than"),
    ({"file_name": "nowhere.png", "text": "x"}, "nowhere.png", "no such file"),
    ({"file_name": "a\0.png", "text": "x"}, "a\0.png", "no such file"),
    ({"file_name": "", "text": "x"}, ".", "no such file"),
    ({"file_name": "../secret.png", "text": "x"}, "../secret.png", "not inside"),
    ({"file_name": "two/../../secret.png", "text": "x"}, "../secret.png", "not inside"),
    ({"file_name": "..", "text": "x"}, "..", "not inside"),
]


@pytest.mark.parametrize("line, name, reason", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_of_metadata_jsonl_is_left_out_alone(tmp_path, capfd, line, name, reason):
    write_folder(tmp_path, {"secret.png": plain(BLUE)})
    good = {"file_name": "b.png", "text": "red"}
    found = load_pictures(write_jsonl(tmp_path / "data", [good, line, good], SAMPLES), 4)
    assert found.captions == ["red", "red"] and colors(found.pixels) == [RED, RED]
    assert len(found.skipped) == 1 and found.skipped[0][0] == name and reason in found.skipped[0][1]
    assert capfd.readouterr().err.count("\n") == 1


def test_an_absolute_path_in_metadata_jsonl_is_left_out_even_if_it_exists(tmp_path):
    folder = tmp_path / "data"
    rows = [{"file_name": "b.png", "text": "red"}, {"file_name": str(folder / "a.png"), "text": "green"}]
    found = load_pictures(write_jsonl(folder, rows, SAMPLES), 4)
    assert found.captions == ["red"] and "not inside" in found.skipped[0][1]


def test_the_log_line_names_ten_and_counts_the_rest(tmp_path, capfd):
    files = {f"{i:02}.png": plain() for i in range(13)} | SAMPLES
    found = load_pictures(write_folder(tmp_path, files), 4)
    err = capfd.readouterr().err
    assert len(found.skipped) == 13 and err.startswith(
        "skipped 13 of 15 samples: 00.png (no caption), 01.png"
    )
    assert err.count("no caption") == 10 and err.endswith("09.png (no caption) and 3 more\n")


def test_the_log_line_is_one_line_whatever_the_names_hold(tmp_path, capfd):
    files = [*SAMPLES.items(), ("bad\n\x1b[31mname.png", plain()), ("\udcff.png", plain())]
    load_pictures(write_tar(tmp_path / "t.tar", files), 4)
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "\x1b" not in err and "bad??[31mname.png" in err


def test_a_pipe_is_no_picture(tmp_path):
    """Reading one may wait for ever (not here: the test holds the other end)."""
    os.mkfifo(tmp_path / "x.png")
    other_end = os.open(tmp_path / "x.png", os.O_RDWR)
    write_folder(tmp_path, SAMPLES | {"x.txt": "x"})
    assert load_pictures(str(tmp_path), 4).skipped == [("x.txt", "no picture")]
    write_jsonl(tmp_path, [{"file_name": n, "text": "x"} for n in ("a.png", "x.png")], {})
    assert load_pictures(str(tmp_path), 4).skipped == [("x.png", "no such file")]
    os.close(other_end)


# ---- tars: links, damage ----


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
@pytest.mark.parametrize("target", ["secret.png", "a.png"])
def test_only_regular_members_count_and_no_link_is_followed(tmp_path, monkeypatch, kind, target):
    write_folder(tmp_path, {"secret.png": plain(BLUE)})
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in {"a.png": plain(RED), "a.txt": b"red", "x.txt": b"a link"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = kind, target
        tar.addfile(link)
    found = load_pictures("t.tar", 4)
    assert found.captions == ["red"] and found.skipped == [("t.tar/x.txt", "no picture")]


def test_nothing_is_written_to_disk_whatever_the_names_of_members(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    path = write_tar(tmp_path / "t.tar", {n: d for a in ("../up", "/tmp/abs", "in") for n, d in
                                          ((f"{a}.png", plain()), (f"{a}.txt", a))})  # fmt: skip
    monkeypatch.chdir(tmp_path / "deep")
    before = sorted(tmp_path.rglob("*"))
    assert load_pictures(path, 4).captions == ["../up", "/tmp/abs", "in"]
    assert sorted(tmp_path.rglob("*")) == before and not os.path.exists("/tmp/abs.png")


def three_in_a_tar(path: Path) -> tuple[bytes, list[int]]:
    """A tar of three samples, and where the header of each of its six members begins."""
    files = [
        (f"{i}.{kind}", noise() if kind == "png" else f"caption {i}")
        for i in range(3)
        for kind in ("png", "txt")
    ]
    write_tar(path, files, format=tarfile.USTAR_FORMAT)
    with tarfile.open(path) as tar:
        return path.read_bytes(), [member.offset for member in tar]


@pytest.mark.parametrize("member", range(1, 6))
@pytest.mark.parametrize(
    "where", ["at its header", "in its header", "behind its header", "in its data", "garbled header"]
)
def test_a_tar_that_breaks_off_yields_the_samples_that_are_whole_and_one_bad_entry(
    tmp_path, capfd, member, where
):
    data, offsets = three_in_a_tar(tmp_path / "t.tar")
    at = offsets[member]
    data = {
        "at its header": data[:at],
        "in its header": data[: at + 100],
        "behind its header": data[: at + 512],
        "in its data": data[: at + 512 + 5],
        "garbled header": data[:at] + b"\xff" * 512 + data[at + 512 :],
    }[where]
    (tmp_path / "t.tar").write_bytes(data)
    write_tar(tmp_path / "u.tar", {"a.png": plain(), "a.txt": "another tar"})
    found = load_pictures([f"{tmp_path}/t.tar", f"{tmp_path}/u.tar"], 4)
    assert found.captions == [f"caption {i}" for i in range(member // 2)] + ["another tar"]
    assert [name for name, _ in found.skipped] == ["t.tar"] and "truncated or damaged" in found.skipped[0][1]
    assert capfd.readouterr().err.count("\n") == 1


def test_a_tar_without_its_closing_zeros_loses_no_sample(tmp_path):
    data, _ = three_in_a_tar(tmp_path / "t.tar")
    (tmp_path / "t.tar").write_bytes(data.rstrip(b"\0"))
    assert load_pictures(str(tmp_path / "t.tar"), 4).captions == ["caption 0", "caption 1", "caption 2"]


@pytest.mark.parametrize("content", ["garbage", "empty", "gzip", "picture", "first header"])
def test_what_is_no_tar_is_an_error_that_names_it(tmp_path, content):
    data, _ = three_in_a_tar(tmp_path / "t.tar")
    broken = {"garbage": b"\xff" * 9999, "empty": b"", "gzip": gzip.compress(data), "picture": noise(),
              "first header": data[:300]}  # fmt: skip
    (tmp_path / "broken.tar").write_bytes(broken[content])
    with pytest.raises(ValueError, match=r"broken\.tar: not an uncompressed tar") as e:
        load_pictures(f"{tmp_path}/*.tar", 4)
    assert "\n" not in str(e.value)


# ---- errors ----


def test_missing_paths_and_globs_without_a_match_are_errors_that_name_them(tmp_path):
    for source in (f"{tmp_path}/nowhere", f"{tmp_path}/train-*.tar", f"{tmp_path}/metadata.jsonl"):
        for form in (source, [write_folder(tmp_path / "good", SAMPLES), source]):
            with pytest.raises(ValueError, match="no such file or folder") as e:
                load_pictures(form, 4)
            assert source in str(e.value)


def test_a_source_without_one_good_sample_is_an_error_that_lists_the_reasons(tmp_path):
    folder = write_folder(tmp_path, {"a.png": plain(), "b.png": b"?", "b.txt": "b", "c.txt": "c"})
    with pytest.raises(
        ValueError, match=r"skipped 3 of 3 samples: a.png \(no caption\), b.png \(not a .* c.txt"
    ) as e:
        load_pictures(folder, 4)
    assert folder in str(e.value) and "\n" not in str(e.value)


def test_a_source_without_any_sample_is_an_error_that_says_what_is_expected(tmp_path):
    write_tar(tmp_path / "t.tar", {})
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "jsonl", [], {})
    for source in ("t.tar", "folder", "jsonl"):
        with pytest.raises(
            ValueError, match=f"{source}: no captioned pictures .*name.txt, metadata.jsonl, or tars"
        ):
            load_pictures(str(tmp_path / source), 4)


def test_more_memory_than_allowed_is_an_error_that_says_how_much_before_anything_is_decoded(
    tmp_path, monkeypatch
):
    folder = write_folder(tmp_path, SAMPLES)
    assert len(load_pictures(folder, 16, max_memory=2 * 3 * 16 * 16).names) == 2
    monkeypatch.setattr(pictures, "decode_picture", None)
    with pytest.raises(ValueError, match="2 pictures of 16 x 16 pixels .* make it fewer or smaller"):
        load_pictures(folder, 16, max_memory=2 * 3 * 16 * 16 - 1)
    with pytest.raises(ValueError, match="pixels take 24.00 GiB, 8.00 are allowed"):
        load_pictures(folder, 65536)


# ---- pixels ----


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("size", [4, 32, 50])
def test_the_square_in_the_middle_is_kept(across, size):
    """Three bands, of which the middle one is a square: nothing of the outer ones bleeds in."""
    bands = np.zeros((32, 32 + 2 * 41, 3), dtype=np.uint8)
    bands[:, :41], bands[:, 41:73], bands[:, 73:] = RED, GREEN, BLUE
    picture = Image.fromarray(bands if across else bands.transpose(1, 0, 2))
    assert colors(decode_picture(encode(picture), size)[None]) == [GREEN]


def test_an_odd_remainder_is_cropped_to_within_a_pixel_of_the_middle():
    row = np.arange(9, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2) * 20
    kept = decode_picture(encode(Image.fromarray(row)), 4)[0, 0].tolist()
    assert kept in ([40, 60, 80, 100], [60, 80, 100, 120])


def test_a_picture_of_the_right_size_is_kept_bit_by_bit():
    pixels = np.asarray(Image.open(io.BytesIO(noise())))
    for form in ("PNG", "WEBP"):
        data = encode(Image.fromarray(pixels), form, **({"lossless": True} if form == "WEBP" else {}))
        assert torch.equal(decode_picture(data, 32), torch.from_numpy(pixels.copy()).permute(2, 0, 1))


def test_making_smaller_averages_and_does_not_alias():
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert (decode_picture(encode(Image.fromarray(checks)), 16).int() - 127).abs().max() <= 2
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::8] = 255  # one column in eight: nearest-neighbour keeps all or nothing of it
    assert decode_picture(encode(Image.fromarray(stripes)), 8).float().mean() == pytest.approx(255 / 8, abs=2)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_resizing_keeps_a_slope_in_its_place(form):
    """Left to right 0 to 255, red; top to bottom, green: orientation, channels and geometry in one."""
    slope = np.linspace(0, 255, 256).round()
    picture = np.stack(np.broadcast_arrays(slope[None, :], slope[:, None], np.float64(7)), -1).astype(
        np.uint8
    )
    for size in (8, 64):
        small = decode_picture(
            encode(Image.fromarray(picture), form, **({"quality": 95} if form == "JPEG" else {})), size
        )
        middles = (torch.arange(size) + 0.5) * 256 / size - 0.5
        edge = slice(1, -1)  # a filter of four taps bends the ends of a slope
        assert (small[0] - middles)[:, edge].abs().max() < 6 and (small[1] - middles[:, None])[
            edge
        ].abs().max() < 6
        assert (small[2].int() - 7).abs().max() < 8


def test_a_large_jpeg_keeps_its_detail():
    """It may be decoded at a fraction of its size, but the result is that of decoding all of it."""
    detail = np.random.default_rng(0).integers(64, 192, (128, 128), dtype=np.uint8)
    large = Image.fromarray(detail.repeat(4, 0).repeat(4, 1))
    jpeg, png = decode_picture(encode(large, "JPEG", quality=95), 128), decode_picture(encode(large), 128)
    assert (jpeg.float() - png.float()).abs().mean() < 3


def test_a_small_picture_is_made_larger():
    assert colors(decode_picture(plain(BLUE, (1, 1)), 16)[None]) == [BLUE]
    assert colors(decode_picture(plain(BLUE, (1, 500)), 16)[None]) == [BLUE]


def test_transparency_is_put_on_white():
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :2] = (255, 0, 0, 0)  # red, but invisible
    pixels[:, 2:4] = (255, 0, 0, 255)
    pixels[:, 4:6] = (0, 0, 0, 128)
    pixels[:, 6:] = (0, 0, 0, 255)
    for form in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        row = decode_picture(encode(Image.fromarray(pixels), form, **options), 8)[:, 3].T.tolist()
        assert row[0] == [255, 255, 255] and row[2] == [255, 0, 0] and row[7] == [0, 0, 0]
        assert row[4] == [127, 127, 127]


def test_transparency_does_not_bleed_when_resized():
    """Invisible black beside white: white all over, at every size."""
    pixels = np.full((64, 64, 4), 255, dtype=np.uint8)
    pixels[:, :32] = 0
    assert colors(decode_picture(encode(Image.fromarray(pixels)), 6)[None]) == [(255, 255, 255)]


def test_other_kinds_of_transparency_are_put_on_white():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert colors(decode_picture(encode(palette), 4)[None]) == [(10, 20, 30)]
    assert colors(decode_picture(encode(palette, transparency=1), 4)[None]) == [(255, 255, 255)]
    grey = Image.new("LA", (8, 8), (100, 0))
    assert colors(decode_picture(encode(grey), 4)[None]) == [(255, 255, 255)]
    assert colors(decode_picture(encode(Image.new("RGB", (8, 8), RED), transparency=RED), 4)[None]) == [
        (255, 255, 255)
    ]


def test_grey_one_bit_and_cmyk_become_rgb():
    assert colors(decode_picture(encode(Image.new("L", (8, 8), 77)), 4)[None]) == [(77, 77, 77)]
    assert colors(decode_picture(encode(Image.new("1", (8, 8), 1)), 4)[None]) == [(255, 255, 255)]
    cmyk = encode(Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK"), "JPEG", quality=100)
    found = decode_picture(cmyk, 4).float().mean((1, 2))
    assert (found - torch.tensor([200.0, 30.0, 30.0])).abs().max() < 4


def test_sixteen_bits_a_channel_keep_their_brightness():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    found = decode_picture(encode(Image.fromarray(ramp)), 16)
    expected = torch.arange(256).view(16, 16).expand(3, 16, 16)
    assert (found.int() - expected).abs().max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_undone(orientation, form):
    """An upright picture, stored as a camera would for this orientation, comes back upright."""
    upright = np.zeros((64, 64, 3), dtype=np.uint8)
    upright[:32, :32], upright[:32, 32:], upright[32:, :32] = RED, GREEN, BLUE
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),  # the camera's top is the scene's right
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[form]
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif, **options)
    found = decode_picture(data, 64).permute(1, 2, 0).numpy().astype(int)
    corners = np.abs(found - upright)[[8, 8, 56, 56], [8, 56, 8, 56]]
    assert corners.max() < 12


# ---- edits ----

EDIT = {"source": "a.png", "text": " make it red\n", "file_name": "b.png"}
CAPTIONED = {"file_name": "b.png", "text": "red"}


def edit(source: str, target: str, text: str = "x") -> dict[str, str]:
    return {"source": source, "text": text, "file_name": target}


def test_edits_are_two_pictures_and_an_instruction_in_the_order_of_their_lines(tmp_path, capfd):
    rows = [edit("b.png", "two/c.png", "grün "), {**EDIT, "more": 1}, edit("a.png", "./two/../a.png")]
    found = load_edits(write_jsonl(tmp_path, rows, {**SAMPLES, "two/c.png": plain(BLUE)}), 4)
    for pixels in (found.sources, found.pixels):
        assert pixels.shape == (3, 3, 4, 4) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert colors(found.sources) == [RED, GREEN, GREEN] and colors(found.pixels) == [BLUE, RED, GREEN]
    assert found.captions == ["grün", "make it red", "x"] and found.skipped == []
    assert found.names == ["two/c.png", "b.png", "a.png"]
    out, err = capfd.readouterr()
    assert out == "" and "skipped" not in err


def test_both_pictures_of_an_edit_are_put_upright_on_white_and_cropped(tmp_path):
    """Each is what load_pictures makes of the same file, and not of the other."""
    bands = np.zeros((48, 32, 4), dtype=np.uint8)  # stored lying: the camera's top is the scene's right
    bands[:8], bands[8:24], bands[40:] = (*RED, 255), (*GREEN, 255), (*BLUE, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {"1.png": encode(Image.fromarray(bands), exif=exif), "2.png": noise()}
    folder = write_jsonl(tmp_path, [edit("1.png", "2.png"), edit("2.png", "1.png")], files)
    first = torch.full((3, 32, 32), 255)  # turned: blue is left, red right; both are cropped away
    first[:, :, 16:] = torch.tensor(GREEN)[:, None, None]
    second = torch.from_numpy(np.array(Image.open(io.BytesIO(noise())))).permute(2, 0, 1)
    found = load_edits(folder, 32)
    assert torch.equal(found.sources, torch.stack([first, second]).to(torch.uint8))
    assert torch.equal(found.pixels, torch.stack([second, first]).to(torch.uint8))


def test_captioned_pictures_and_edits_of_one_file_are_told_apart(tmp_path, capfd):
    """None is lost, none is taken for the other kind, and none of the other kind is counted as bad."""
    rows = [EDIT, CAPTIONED, edit("b.png", "a.png", "green"), {"file_name": "a.png", "text": "y"}, EDIT]
    folder = write_jsonl(tmp_path, rows, SAMPLES)
    captioned, edits = load_pictures(folder, 4), load_edits(folder, 4)
    assert captioned.captions == ["red", "y"] and colors(captioned.pixels) == [RED, GREEN]
    assert edits.captions == ["make it red", "green", "make it red"]
    assert edits.names == ["b.png", "a.png", "b.png"] and colors(edits.sources) == [GREEN, RED, GREEN]
    assert captioned.skipped == edits.skipped == [] and "skipped" not in capfd.readouterr().err


def test_listing_tells_the_kinds_apart_and_opens_no_picture(tmp_path, monkeypatch):
    folder = write_jsonl(tmp_path, [EDIT, CAPTIONED, b"?", edit("../x.png", "b.png")], SAMPLES)
    monkeypatch.setattr(pictures.Span, "read", None)
    samples = list_samples(folder)
    assert [sample.kind for sample in samples] == ["edit", "caption", "", "edit"]
    assert samples[0].source.path == tmp_path / "a.png" and samples[0].picture.path == tmp_path / "b.png"
    assert [sample.source for sample in samples[1:]] == [None] * 3


@pytest.mark.parametrize("bad_kind", ["caption", "edit"])
def test_the_bad_ones_of_a_kind_are_named_with_that_kind_alone(tmp_path, capfd, bad_kind):
    bad = {"caption": {"file_name": "0.png", "text": "x"}, "edit": edit("0.png", "b.png")}[bad_kind]
    folder = write_jsonl(tmp_path, [EDIT, bad, CAPTIONED], SAMPLES)
    skipped = {"caption": load_pictures(folder, 4).skipped, "edit": load_edits(folder, 4).skipped}
    assert len(skipped.pop(bad_kind)) == 1 and list(skipped.values()) == [[]]
    assert capfd.readouterr().err.count("skipped 1 of 2 ") == 1


def test_a_line_that_could_be_either_is_named_with_both(tmp_path):
    folder = write_jsonl(tmp_path, [EDIT, b'{"source": "a.png"', CAPTIONED], SAMPLES)
    for found in (load_pictures(folder, 4), load_edits(folder, 4)):
        assert len(found.names) == len(found.skipped) == 1
        assert found.skipped[0][0] == "metadata.jsonl:2" and "not {" in found.skipped[0][1]


NOT_AN_EDIT = 'not {"source": "...", "text": "...", "file_name": "..."}'
BAD_EDITS = [
    (edit("nowhere.png", "b.png"), "b.png", "source: no such file"),
    (edit("", "b.png"), "b.png", "source: no such file"),
    (edit("a\0.png", "b.png"), "b.png", "source: no such file"),
    (edit("folder", "b.png"), "b.png", "source: no such file"),
    (edit("page.png", "b.png"), "b.png", "source: not a PNG, JPEG or WebP image"),
    (edit("half.png", "b.png"), "b.png", "source: truncated image"),
    (edit("huge.png", "b.png"), "b.png", "source: over 64 megapixels"),
    (edit("../secret.png", "b.png"), "b.png", "source: not inside"),
    (edit("folder/../../secret.png", "b.png"), "b.png", "source: not inside"),
    (edit("..", "b.png"), "b.png", "source: not inside"),
    (edit("a.png", "nowhere.png"), "nowhere.png", "no such file"),
    (edit("a.png", ""), ".", "no such file"),
    (edit("a.png", "half.png"), "half.png", "truncated image"),
    (edit("a.png", "../secret.png"), "../secret.png", "not inside"),
    (edit("nowhere.png", "half.png"), "half.png", "truncated image"),
    ({**EDIT, "source": None}, "metadata.jsonl:2", NOT_AN_EDIT),
    ({**EDIT, "source": 7}, "metadata.jsonl:2", NOT_AN_EDIT),
    ({**EDIT, "source": ["a.png"]}, "metadata.jsonl:2", NOT_AN_EDIT),
    ({**EDIT, "text": None}, "metadata.jsonl:2", NOT_AN_EDIT),
    ({**EDIT, "file_name": 7}, "metadata.jsonl:2", NOT_AN_EDIT),
    ({"source": "a.png", "text": "x"}, "metadata.jsonl:2", NOT_AN_EDIT),
    ({"source": "a.png", "file_name": "b.png"}, "metadata.jsonl:2", NOT_AN_EDIT),
    ({**EDIT, "text": ""}, "b.png", "empty instruction"),
    ({**EDIT, "text": " \n"}, "b.png", "empty instruction"),
    ({**EDIT, "text": "\ud800"}, "b.png", "instruction is not UTF-8"),
    ({**EDIT, "text": "x" * 10_001}, "b.png", "instruction longer than 10,000 characters"),
]


@pytest.mark.parametrize("line, name, reason", BAD_EDITS, ids=range(len(BAD_EDITS)))
def test_a_bad_edit_is_left_out_alone_named_once_and_no_captioned_picture(
    tmp_path, capfd, line, name, reason
):
    broken = {"page.png": b"<html>", "half.png": noise()[:2000], "huge.png": header(8001, 8001)}
    write_folder(tmp_path, {"secret.png": plain(BLUE)})
    files = {**SAMPLES, **broken, "folder/x": b""}
    folder = write_jsonl(tmp_path / "data", [EDIT, line, EDIT, CAPTIONED], files)
    found = load_edits(folder, 4)
    assert found.captions == ["make it red"] * 2 and found.names == ["b.png"] * 2
    assert colors(found.sources) == [GREEN] * 2 and colors(found.pixels) == [RED] * 2
    assert len(found.skipped) == 1 and found.skipped[0][0] == name
    assert found.skipped[0][1].startswith(reason)
    out, err = capfd.readouterr()
    shown = name.replace("\0", "?")
    assert out == "" and err == f"skipped 1 of 3 edits: {shown} ({found.skipped[0][1]})\n"
    captioned = load_pictures(folder, 4)
    assert captioned.captions == ["red"] and captioned.skipped == [] and capfd.readouterr().err == ""


def test_an_absolute_source_is_left_out_even_if_it_exists(tmp_path):
    found = load_edits(write_jsonl(tmp_path, [EDIT, edit(str(tmp_path / "a.png"), "b.png")], SAMPLES), 4)
    assert found.names == ["b.png"] and found.skipped == [("b.png", f"source: not inside {tmp_path}")]


def test_an_instruction_of_just_ten_thousand_characters_is_kept(tmp_path):
    found = load_edits(write_jsonl(tmp_path, [{**EDIT, "text": "語" * 10_000}], SAMPLES), 4)
    assert len(found.captions[0]) == 10_000


def test_a_huge_source_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_FILE", 500)
    folder = write_jsonl(tmp_path, [EDIT, edit("x.png", "b.png")], {**SAMPLES, "x.png": noise()})
    assert load_edits(folder, 4).skipped == [("b.png", "source: file longer than 500 bytes")]


@pytest.mark.parametrize("name", ["x.png", "y.png"])
def test_an_edit_with_a_picture_that_may_not_be_opened_is_left_out(tmp_path, monkeypatch, name):
    read = pictures.Span.read

    def refuse(span: pictures.Span, *args) -> bytes:
        if span.path.name == name:
            raise PermissionError(13, "Permission denied", name)
        return read(span, *args)

    monkeypatch.setattr(pictures.Span, "read", refuse)
    files = {**SAMPLES, "x.png": plain(), "y.png": plain()}
    found = load_edits(write_jsonl(tmp_path, [edit("x.png", "y.png"), EDIT], files), 4)
    assert found.names == ["b.png"] and found.skipped == [
        ("y.png", f"[Errno 13] Permission denied: '{name}'")
    ]


def test_edits_of_several_metadata_files_come_in_the_order_of_their_sources(tmp_path):
    """Each file's paths are relative to its own folder, whichever way the source is spelt."""
    for i, (before, after) in enumerate([(RED, GREEN), (GREEN, BLUE), (BLUE, RED)]):
        files = {"a.png": plain(before), "b.png": plain(after)}
        write_jsonl(tmp_path / f"part-{i}", [{**EDIT, "text": str(i)}, {**CAPTIONED, "text": "c"}], files)
    write_folder(tmp_path / "photos", SAMPLES)
    for source in (f"{tmp_path}/part-*", f"{tmp_path}/part-*/metadata.jsonl"):
        found = load_edits(source, 4)
        assert found.captions == ["0", "1", "2"] and colors(found.pixels) == [GREEN, BLUE, RED]
        assert colors(found.sources) == [RED, GREEN, BLUE]
    sources = [f"{tmp_path}/part-2", f"{tmp_path}/photos", f"{tmp_path}/part-0/metadata.jsonl"]
    assert load_edits(sources, 4).captions == ["2", "0"]
    assert load_pictures(sources, 4).captions == ["c", "a green one", "red", "c"]


def test_twice_the_same_source_gives_twice_the_same_edits(tmp_path):
    files = {f"{i}.png": noise() if i % 2 else plain() for i in range(6)}
    rows = [edit(f"{i}.png", f"{i + 1}.png", str(i)) for i in range(6)]  # the last has no target
    a, b = (load_edits(write_jsonl(tmp_path, rows, files), 7) for _ in range(2))
    assert torch.equal(a.sources, b.sources) and torch.equal(a.pixels, b.pixels)
    assert a.captions == b.captions == list("01234") and a.names == b.names
    assert a.skipped == b.skipped == [("6.png", "no such file")]


def test_edits_alone_are_no_captioned_pictures_and_the_error_says_what_they_are_for(tmp_path):
    folder = write_jsonl(tmp_path, [EDIT, edit("nowhere.png", "b.png"), EDIT], SAMPLES)
    with pytest.raises(ValueError) as e:
        load_pictures(folder, 4)
    wanted = f"{folder}: no captioned pictures; 3 edits (lines with a source), which are for --task edit"
    assert str(e.value) == wanted
    write_jsonl(tmp_path, [EDIT, {"file_name": "nowhere.png", "text": "x"}], SAMPLES)
    with pytest.raises(ValueError, match=r"skipped 1 of 1 samples: .* file\); 1 edits .* --task edit$"):
        load_pictures(folder, 4)


def test_no_good_edit_is_an_error_that_says_what_is_expected(tmp_path):
    captions = write_folder(tmp_path / "photos", {**SAMPLES, "x.png": b"broken"})
    tar = write_tar(tmp_path / "t.tar", SAMPLES)
    lines = write_jsonl(tmp_path / "lines", [CAPTIONED, {"file_name": "nowhere.png", "text": "x"}], SAMPLES)
    nothing = write_jsonl(tmp_path / "nothing", [], {})
    bad = write_jsonl(tmp_path / "bad", [edit("nowhere.png", "b.png"), CAPTIONED], SAMPLES)
    expected = "no edits: rows of a metadata.jsonl with source, text and file_name"
    for source in (captions, tar, lines, nothing):
        with pytest.raises(ValueError) as e:
            load_edits(source, 4)
        assert str(e.value) == f"{source}: {expected}"
    with pytest.raises(ValueError) as e:
        load_edits([bad, tar], 4)
    reason = "skipped 1 of 1 edits: bad/b.png (source: no such file)"
    assert str(e.value) == f"{bad}, {tar}: {expected}; {reason}"


def test_both_pictures_of_an_edit_count_as_memory_and_the_other_kind_does_not(tmp_path, monkeypatch):
    one = 3 * 16 * 16  # bytes of a picture
    folder = write_jsonl(tmp_path, [EDIT, EDIT, CAPTIONED, CAPTIONED, CAPTIONED], SAMPLES)
    assert len(load_edits(folder, 16, max_memory=4 * one).names) == 2
    assert len(load_pictures(folder, 16, max_memory=3 * one).names) == 3
    monkeypatch.setattr(pictures, "decode_picture", None)
    with pytest.raises(ValueError, match="4 pictures of 16 x 16 pixels .* make it fewer or smaller"):
        load_edits(folder, 16, max_memory=4 * one - 1)
    with pytest.raises(ValueError, match="3 pictures of 16 x 16 pixels"):
        load_pictures(folder, 16, max_memory=3 * one - 1)


def test_a_tar_holds_captioned_pictures_alone_whatever_its_members_are_called(tmp_path):
    line = json.dumps(EDIT)
    files = {"metadata.jsonl": line, **SAMPLES, "a.source.png": plain(BLUE), "a.json": line}
    tar = write_tar(tmp_path / "t.tar", files)
    found = load_pictures(tar, 4)
    assert found.captions == ["red", "a green one"] and colors(found.pixels) == [RED, GREEN]
    assert found.skipped == [] and [sample.kind for sample in list_samples(tar)] == ["caption"] * 2
    with pytest.raises(ValueError, match="no edits"):
        load_edits(tar, 4)


def test_a_tar_that_breaks_off_is_no_bad_edit(tmp_path):
    tar = Path(write_tar(tmp_path / "t.tar", SAMPLES))
    tar.write_bytes(tar.read_bytes()[:2500])
    folder = write_jsonl(tmp_path / "lines", [EDIT], SAMPLES)
    assert load_edits([str(tar), folder], 4).skipped == []
    assert "truncated" in load_pictures([str(tar), write_folder(tmp_path / "c", SAMPLES)], 4).skipped[0][1]


# ---- colour profiles ----

# XYZ of the primaries under D50, as the profiles of the standards have them
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
ADOBE = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
D50 = (0.9642, 1.0, 0.8249)


def fixed(*values: float) -> bytes:
    """Numbers as ICC's s15Fixed16."""
    return struct.pack(f">{len(values)}i", *(round(65536 * v) for v in values))


def icc(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2, from its tags."""
    about = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)}
    tags = about | {b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": b"XYZ " + bytes(4) + fixed(*D50)} | tags
    start, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    form = start + len(body), b"", 0x02400000, kind, space, pcs, b"", b"acsp", b""
    head = struct.pack(">I4sI4s4s4s12s4s4s", *form)
    return (head + bytes(20) + struct.pack(">I", 0) + fixed(*D50)).ljust(128, b"\0") + table + body


def curve(gamma: float) -> bytes:
    """x ** gamma."""
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))


def matrix_profile(primaries: tuple, gamma: float) -> bytes:
    """An RGB profile as cameras and phones embed."""
    each = zip((b"r", b"g", b"b"), primaries, strict=True)
    tags = {c + b"XYZ": b"XYZ " + bytes(4) + fixed(*xyz) for c, xyz in each}
    return icc(b"RGB ", tags | {c + b"TRC": curve(gamma) for c in (b"r", b"g", b"b")})


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", {b"kTRC": curve(gamma)})


def ink_profile(inks: dict[int, tuple]) -> bytes:
    """A CMYK profile whose corners (bits: C 8, M 4, Y 2, K 1) have these Lab colours; others are black."""
    lab = [inks.get(i, (0, 0, 0)) for i in range(16)]
    nodes = bytes(x for L, a, b in lab for x in (round(L * 2.55), a + 128, b + 128))
    line = bytes(range(256))
    identity = fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + line * 4 + nodes + line * 3
    return icc(b"CMYK", {b"A2B0": lut}, b"Lab ", b"prtr")


def srgb_of(xyz: np.ndarray) -> list[int]:
    """XYZ under D50 -> sRGB of 8 bits, clipped."""
    x = np.clip(np.linalg.solve(np.array(SRGB).T, xyz), 0, 1)
    return (255 * np.where(x < 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)).round().tolist()


def seen(image: Image.Image, profile: bytes, form: str = "PNG", **more: object) -> torch.Tensor:
    """The colour of a picture of one colour."""
    return decode_picture(encode(image, form, icc_profile=profile, **more), 4).float().mean((1, 2))


COLORS = (
    (200, 40, 40),
    (40, 200, 60),
    (70, 80, 220),
    (0, 0, 0),
    (255, 255, 255),
    (128, 128, 128),
    (255, 0, 0),
)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("primaries, gamma", ((ADOBE, 2.2), (P3, 2.2), (SRGB, 1.8)))
def test_a_colour_profile_is_followed(form, primaries, gamma):
    """Every colour is what the standard's matrices make of it."""
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    differs = 0.0
    for color in COLORS:
        xyz = np.array(primaries).T @ (np.array(color) / 255) ** (round(256 * gamma) / 256)
        found = seen(Image.new("RGB", (16, 16), color), matrix_profile(primaries, gamma), form, **options)
        assert (found - torch.tensor(srgb_of(xyz))).abs().max() <= 3, color
        differs = max(differs, (found - torch.tensor(color)).abs().max().item())
    assert differs > 12


def test_a_profile_of_srgb_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = np.asarray(Image.open(io.BytesIO(noise())))
    found = decode_picture(encode(Image.fromarray(pixels), icc_profile=profile), 32)
    assert (found.int() - torch.from_numpy(pixels.copy()).permute(2, 0, 1)).abs().max() <= 1


def test_grey_has_a_profile_of_its_own():
    for color in (0, 60, 128, 255):
        expected = srgb_of(np.array(D50) * (color / 255) ** (461 / 256))
        for image in (
            Image.new("L", (8, 8), color),
            Image.fromarray(np.full((8, 8), color * 257, np.uint16)),
        ):
            found = seen(image, grey_profile(1.8))
            assert (found - torch.tensor(expected)).abs().max() <= 2
    clear = Image.new("LA", (8, 8), (60, 128))
    opaque = srgb_of(np.array(D50) * (60 / 255) ** (461 / 256))[0]
    assert abs(seen(clear, grey_profile(1.8))[0].item() - (opaque * 128 + 255 * 127) / 255) <= 2


def test_inks_are_what_their_profile_says():
    inks = {0: (100, 0, 0), 8: (50, 60, 40), 4: (60, -50, 30), 2: (40, 10, -60)}  # not cyan, magenta, yellow
    for bits, (L, a, b) in inks.items():
        ink = tuple(255 * bool(bits & x) for x in (8, 4, 2, 1))
        f = np.array([(L + 16) / 116 + a / 500, (L + 16) / 116, (L + 16) / 116 - b / 200])
        xyz = np.array(D50) * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
        found = seen(Image.new("CMYK", (16, 16), ink), ink_profile(inks), "JPEG", quality=100)
        assert (found - torch.tensor(srgb_of(xyz))).abs().max() <= 5, ink


def test_a_profile_and_transparency_and_a_palette_go_together():
    """Colours are brought to sRGB, then put on white."""
    profile = matrix_profile(ADOBE, 2.2)
    opaque = seen(Image.new("RGB", (8, 8), (40, 200, 60)), profile)
    half = seen(Image.new("RGBA", (8, 8), (40, 200, 60, 128)), profile)
    assert (half - (opaque * 128 + 255 * 127) / 255).abs().max() <= 1
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 40, 200, 60])
    assert torch.equal(seen(palette, profile), opaque)
    assert seen(palette, profile, transparency=1).tolist() == [255] * 3


@pytest.mark.parametrize("image", (Image.new("RGB", (8, 8), RED), Image.new("L", (8, 8), 9)))
def test_a_profile_that_cannot_be_used_is_ignored_with_one_line(image, capsys):
    say_once.cache_clear()
    plain_colors = colors(decode_picture(encode(image), 4)[None])
    whole = matrix_profile(ADOBE, 2.2)
    for profile in (b"x", b"not a profile" * 50, whole[:200], whole[:40], ink_profile({}), bytes(128)):
        found = decode_picture(encode(image, icc_profile=profile), 4)
        assert colors(found[None]) == plain_colors
    assert capsys.readouterr().err.count("a colour profile cannot be used") == 1


def test_the_first_frame_of_a_film_is_the_picture():
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
        assert colors(decode_picture(data, 4)[None]) == [RED]


# ---- braces ----


@pytest.mark.parametrize(
    "pattern, expected",
    (
        ("a", ["a"]),
        ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{000008..000010}", ["000008", "000009", "000010"]),
        ("{train,val}-{0..1}", ["train-0", "train-1", "val-0", "val-1"]),
        ("{a,}x", ["ax", "x"]),
        ("{a}{", ["{a}{"]),
    ),
)
def test_braces_stand_for_several_names(pattern, expected):
    assert pictures.expand_braces(pattern) == expected


def test_tars_in_braces_are_read_in_order_and_one_that_is_missing_is_named(tmp_path):
    for i in range(3):
        shutil.copytree(write_folder(tmp_path / "made", SAMPLES), tmp_path / f"part-{i:06d}")
        shutil.rmtree(tmp_path / "made")
    found = list_samples(str(tmp_path / "part-{000000..000002}"))
    assert len(found) == 3 * len(list_samples(str(tmp_path / "part-000000")))
    assert len(list_samples(str(tmp_path / "part-{000000..000001}*"))) == len(found) * 2 // 3
    with pytest.raises(ValueError, match="part-000003: no such file"):
        list_samples(str(tmp_path / "part-{000000..000003}"))
    for far in ("{5..1}", "{0..999999999999}"):
        with pytest.raises(ValueError, match="must count up"):
            list_samples(f"x-{far}")
    (tmp_path / "{0..1}").mkdir()  # a folder of that very name is itself
    assert list_samples(str(tmp_path / "{0..1}")) == []
