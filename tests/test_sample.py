"""sample.py: the command, and what it writes."""

from __future__ import annotations

import random
import re
import shlex
from pathlib import Path

import helpers
import pytest
import torch
from PIL import Image

import evaluate
import sample
from chat import evaluate as chat_evaluate
from checkpoint import Trained, locked
from generate import edit_images, generate_text
from scale.pictures import load_pictures
from small.pretrain import sample_text

PROMPTS = ["a red circle", "on a white background, in the top left, a small blue cross"]


@pytest.fixture
def trained() -> Trained:
    return helpers.perturbed()


def run(*args: object, folder: Path) -> str:
    return helpers.good(sample, "--checkpoint", helpers.shapes_run(), *map(str, args), folder=folder)


@pytest.mark.parametrize("sampler", ("ddim", "ddpm"))
def test_the_same_seed_and_arguments_write_the_same_file_byte_for_byte(tmp_path, sampler):
    flags = ("--prompt", PROMPTS[0], "--n", 3, "--steps", 4, "--sampler", sampler)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*flags, "--seed", seed, "--out", f"{name}.png", "--gif", f"{name}.gif", folder=tmp_path)
    for kind in ("png", "gif"):
        a, b, c = ((tmp_path / f"{name}.{kind}").read_bytes() for name in "abc")
        assert a == b != c


def test_several_pictures_become_a_grid_each_with_its_own_noise(tmp_path):
    out = run(
        "--prompt",
        PROMPTS[0],
        "--n",
        4,
        "--steps",
        2,
        "--scale",
        0,
        "--out",
        "deep/er/grid.png",
        folder=tmp_path,
    )
    assert "deep/er/grid.png: 4 pictures, 128 x 128 pixels" in out
    with Image.open(tmp_path / "deep/er/grid.png") as image:
        assert image.format == "PNG" and image.size == (128, 128)
        tiles = [image.crop((x, y, x + 64, y + 64)).tobytes() for y in (0, 64) for x in (0, 64)]
    assert len(set(tiles)) == 4


def test_scale_enlarges_without_smoothing(tmp_path):
    for scale in (0, 128):
        run("--prompt", "red", "--steps", 1, "--scale", scale, "--out", f"{scale}.png", folder=tmp_path)
    with Image.open(tmp_path / "0.png") as a, Image.open(tmp_path / "128.png") as b:
        assert a.size == (64, 64) and b.size == (128, 128)
        assert a.resize((128, 128), Image.Resampling.NEAREST).tobytes() == b.tobytes()


def test_labels_are_written_below_their_pictures(tmp_path):
    flags = ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--steps", 1)
    run(*flags, "--labels", "--out", "with.png", folder=tmp_path)
    with Image.open(tmp_path / "with.png") as page:
        assert page.width == 2 * 138 + 10 and page.height > 128 + 20
        below = page.crop((10, 10 + 128 + 2, page.width, page.height)).convert("L")
        assert below.getextrema()[0] < 100  # there is ink


def test_a_film_shows_the_noise_becoming_the_picture(tmp_path):
    out = run(
        *("--prompt", PROMPTS[1], "--prompt", PROMPTS[0], "--steps", 5, "--scale", 64),
        *("--gif", "film.gif", "--out", "last.png"),
        folder=tmp_path,
    )
    assert "film.gif: 5 frames" in out
    with Image.open(tmp_path / "film.gif") as film, Image.open(tmp_path / "last.png") as last:
        assert film.format == "GIF" and film.size == last.size and 2 <= film.n_frames <= 5
        film.seek(film.n_frames - 1)
        frame, wanted = (
            torch.frombuffer(bytearray(x.convert("RGB").tobytes()), dtype=torch.uint8).float()
            for x in (film, last)
        )
        assert (frame - wanted).abs().mean() < 25  # a GIF has 256 colours


def test_prompts_from_a_file_are_painted_line_by_line_behind_those_of_flags(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text(
        "a red circle\n\n   a café  \r\nsecond: 50% “off”\n", encoding="utf-8"
    )
    seen = []
    paint = sample.generate_images
    monkeypatch.setattr(
        sample, "generate_images", lambda t, prompts, *a: seen.extend(prompts) or paint(t, prompts, *a)
    )
    run("--prompt", "first", "--prompts", "prompts.txt", "--steps", 1, "--n", 2, folder=tmp_path)
    assert seen[::2] == seen[1::2] == ["first", "a red circle", "a café", "second: 50% “off”"]
    assert (tmp_path / "sample.png").is_file()  # the name without --out


def test_more_prompts_than_fit_a_batch_are_painted_as_if_they_did(trained, tmp_path):
    args = sample.parse(["--prompt", "red", "--n", "5", "--steps", "2", "--gif", "film.gif"])
    sample.check(args)
    with helpers.inside(tmp_path):
        for batch, name in ((64, "one.png"), (2, "three.png")):
            args.out = name
            sample.paint_prompts(trained, args, batch)
            with Image.open("film.gif") as film:
                assert film.n_frames == 2
    with Image.open(tmp_path / "one.png") as a, Image.open(tmp_path / "three.png") as b:
        a, b = (torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).int() for x in (a, b))
        assert (a - b).abs().max() <= 1


def test_a_painted_picture_can_be_described(tmp_path):
    run("--prompt", PROMPTS[0], "--steps", 1, "--out", "out.png", folder=tmp_path)
    out = run("--caption", "out.png", "--max-tokens", 4, folder=tmp_path)
    assert out.startswith("out.png: ")


@pytest.mark.parametrize("kind", ("png", "jpg", "webp"))
def test_a_page_of_several_pictures_is_not_read_as_one(tmp_path, kind):
    run("--prompt", "red", "--n", 2, "--steps", 1, "--out", f"grid.{kind}", folder=tmp_path)
    run("--prompt", "red", "--labels", "--steps", 1, "--out", f"sheet.{kind}", folder=tmp_path)
    run("--prompt", "red", "--steps", 1, "--out", f"one.{kind}", folder=tmp_path)
    said = "page of several pictures; with --out FOLDER, sample.py writes each alone\n"
    for name, status in (("grid", 2), ("sheet", 2), ("one", 0)):
        for flags in (("--caption",), ("--prompt", "green", "--steps", 1, "--out", "edited.png", "--edit")):
            args = ("--checkpoint", helpers.shapes_run(), "--max-tokens", 4, *flags, f"{name}.{kind}")
            result = helpers.call(sample, *map(str, args), folder=tmp_path)
            assert result.status == status and (said in result.err) == (status == 2)


@pytest.mark.parametrize("page", ("README.md", "small/README.md"))
def test_the_commands_of_a_readme_work_one_after_another(tmp_path, page):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "last-small").write_text(f"{helpers.shapes_run()}\n")
    text = (helpers.ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"^python (sample|evaluate)\.py\b(.*)$", text, re.M)
    assert len(commands) >= 5 and any("--caption" in words for _, words in commands)
    less = {"sample": "--steps 1 --max-tokens 4", "evaluate": "--steps 1 --n 2"}
    for name, words in commands:
        args = shlex.split(words, comments=True) + less[name].split()
        helpers.good({"sample": sample, "evaluate": evaluate}[name], *args, folder=tmp_path)


def test_words_that_the_built_in_text_does_not_have_get_a_note(tmp_path, trained):
    flags = ("--checkpoint", helpers.shapes_run(), "--text", "what color is snow, Ünal?", "--max-tokens", 1)
    args = (*flags, "--prompt", "a photo of a red cat", "--prompt", "a Red photo", "--steps", 1)
    said = helpers.call(sample, *map(str, args), folder=tmp_path).err
    assert said.splitlines()[0] == "note: words that this model has never read: photo, Red, Ünal"
    texts = [*sample_text(random.Random(5), 2000), "red", "circle, blue"]
    assert sample.unread_words(trained, texts) == []
    assert sample.unread_words(trained, ["photo"]) == ["photo"]
    trained.info = {"config": {"data": "photos"}}
    assert sample.unread_words(trained, ["photo"]) == []


def test_text_alone_is_continued_by_the_frozen_model(trained, tmp_path):
    out = run("--text", "the sky is", "--max-tokens", 5, folder=tmp_path)
    wanted = generate_text(sample.load_trained(helpers.shapes_run()), "the sky is", max_tokens=5)
    assert out == f"the sky is{wanted}\n"


def test_sampled_text_repeats_for_a_seed_and_differs_for_another(tmp_path):
    flags = ("--text", "the sky is", "--max-tokens", 12, "--temperature", 1)
    a, b, c = (run(*flags, "--seed", s, folder=tmp_path) for s in (1, 1, 2))
    assert a == b != c


def test_without_a_checkpoint_the_last_small_run_is_used(tmp_path):
    flags = ("--prompt", "red", "--steps", 1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "last-small").write_text(f"{helpers.shapes_run()}\n")
    helpers.good(sample, *flags, "--out", "a.png", folder=tmp_path)
    run(*flags, "--out", "b.png", folder=tmp_path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# ---- a folder of pictures ----


def contents(folder: Path) -> dict[str, torch.Tensor | str]:
    """Every file of a folder: pictures as uint8 (3, S, S), texts as they are."""
    return {
        p.name: p.read_text(encoding="utf-8") if p.suffix == ".txt" else pixels_of(p)
        for p in sorted(folder.iterdir())
    }


def pixels_of(path: Path) -> torch.Tensor:
    """A PNG as uint8 (3, height, width)."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return data.view(image.height, image.width, 3).permute(2, 0, 1)


def test_a_name_without_an_ending_is_a_folder_of_pictures_each_beside_its_prompt(tmp_path):
    flags = ("--prompt", PROMPTS[0], "--prompt", "a café", "--n", 2, "--steps", 2, "--seed", 4)
    out = run(*flags, "--out", "deep/er/pictures", folder=tmp_path)
    assert out == "deep/er/pictures: 4 pictures, each beside its prompt\n"
    found = contents(tmp_path / "deep/er/pictures")
    assert list(found) == [f"{i:06d}.{kind}" for i in range(4) for kind in ("png", "txt")]
    assert [found[f"{i:06d}.txt"] for i in range(4)] == [f"{PROMPTS[0]}\n"] * 2 + ["a café\n"] * 2
    run(*flags, "--scale", 0, "--out", "grid.png", folder=tmp_path)
    page = pixels_of(tmp_path / "grid.png")  # 2 x 2 pictures, row by row
    tiles = [page[:, y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64)]
    assert all(torch.equal(found[f"{i:06d}.png"], tile) for i, tile in enumerate(tiles))
    assert len({x.numpy().tobytes() for x in tiles}) == 4
    back = load_pictures(str(tmp_path / "deep/er/pictures"), 64)
    assert back.captions == [PROMPTS[0]] * 2 + ["a café"] * 2 and back.skipped == []
    assert torch.equal(back.pixels, torch.stack(tiles))


def test_pictures_of_a_folder_are_numbered_through_all_batches_and_written_as_they_come(
    trained, tmp_path, monkeypatch
):
    words = ["--prompt", "red", "--prompt", "blue", "--n", "3", "--steps", "2", "--gif", "film.gif"]
    paint, there = sample.generate_images, []

    def watched(*args):
        there.append(len(list(Path(name).glob("*.png"))))
        return paint(*args)

    monkeypatch.setattr(sample, "generate_images", watched)
    with helpers.inside(tmp_path):
        for batch, name in ((64, "one"), (4, "two")):
            args = sample.parse([*words, "--out", name])
            sample.check(args)
            sample.paint_prompts(trained, args, batch)
            with Image.open("film.gif") as film:
                assert film.n_frames == 2 and film.size == (3 * 64, 2 * 64)
    assert there == [0, 0, 4]
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 12
    assert [two[f"{i:06d}.txt"] for i in range(6)] == ["red\n"] * 3 + ["blue\n"] * 3
    for name, picture in one.items():
        if name.endswith(".png"):
            assert (picture.int() - two[name].int()).abs().max() <= 1


def test_pictures_of_a_folder_are_as_large_as_generated_unless_told_otherwise(tmp_path):
    (tmp_path / "large").mkdir()  # an empty one may be there
    for name, flags in (("plain", ()), ("large", ("--scale", 128))):
        out = run("--prompt", "red", "--steps", 1, "--out", name, *flags, folder=tmp_path)
        assert out == f"{name}: 1 picture, each beside its prompt\n"
    plain, large = (pixels_of(tmp_path / name / "000000.png") for name in ("plain", "large"))
    assert plain.shape == (3, 64, 64)
    assert torch.equal(large, plain.repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.parametrize(
    "flags, error",
    (
        ("--out full", "full is not empty"),
        ("--out taken", "taken"),
        ("--out taken/pictures", "taken"),
        ("--out new --labels", "--labels is for a sheet; --out new is a folder"),
        ("--out full --labels", "--labels is for a sheet"),
    ),
)
def test_a_folder_that_cannot_take_the_pictures_is_named_before_the_work(tmp_path, monkeypatch, flags, error):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.md").write_text("mine")
    (tmp_path / "taken").write_text("")
    before, files = sorted(tmp_path.rglob("*")), helpers.files(tmp_path)
    painted = []
    monkeypatch.setattr(sample, "generate_images", lambda *a: painted.append(a))
    words = ("--checkpoint", helpers.shapes_run(), "--prompt", "red", *flags.split())
    result = helpers.call(sample, *words, folder=tmp_path)
    assert result.status == 2 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith("error: ") and error in result.err
    assert not painted and sorted(tmp_path.rglob("*")) == before and helpers.files(tmp_path) == files


@pytest.mark.parametrize("flags", ("--prompt red --steps 1", "--chat"))
def test_a_folder_of_pictures_or_of_a_chat_has_one_writer(tmp_path, monkeypatch, flags):
    words = (*flags.split(), "--out", "out")
    with locked(tmp_path / "out"), monkeypatch.context() as patch:
        patch.setattr(sample, "load_trained", None)
        result = helpers.call(sample, *words, folder=tmp_path)
        assert result.status == 2 and result.err.startswith("error: out: another process (")
        assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()  # a kill has left it
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    run(*words, folder=tmp_path)
    assert not (tmp_path / "out" / ".lock").exists()


# ---- editing ----


@pytest.fixture
def source(tmp_path) -> Path:
    """A picture to edit."""
    path = tmp_path / "source.png"
    Image.fromarray(helpers.held_out_pictures(1)[0][0].permute(1, 2, 0).contiguous().numpy()).save(path)
    return path


def test_an_edit_writes_what_edit_images_paints(trained, tmp_path, source, monkeypatch):
    monkeypatch.setattr(sample, "load_trained", lambda *a, **k: trained)
    flags = ("--prompt", "make it green", "--prompt", "", "--n", 2, "--steps", 3, "--cfg", 2, "--seed", 5)
    out = run("--edit", source, *flags, "--scale", 0, "--gif", "film.gif", folder=tmp_path)
    assert out.splitlines() == ["sample.png: 4 pictures, 128 x 128 pixels", "film.gif: 3 frames"]
    seeds = [random.Random(f"5-{i}").getrandbits(63) for i in range(4)]
    picture, prompts = sample.read_picture(trained, source), ["make it green"] * 2 + [""] * 2
    wanted = edit_images(trained, picture.expand(4, -1, -1, -1), prompts, seeds, steps=3, cfg=2.0)
    with Image.open(tmp_path / "sample.png") as page:
        for i, tile in enumerate(wanted):
            x, y = i % 2 * 64, i // 2 * 64
            pixels = torch.frombuffer(
                bytearray(page.crop((x, y, x + 64, y + 64)).tobytes()), dtype=torch.uint8
            )
            assert (pixels.view(64, 64, 3).permute(2, 0, 1).int() - tile.int()).abs().max() <= 1
    before = (tmp_path / "sample.png").read_bytes()
    run("--edit", source, *flags, "--scale", 0, folder=tmp_path)
    assert (tmp_path / "sample.png").read_bytes() == before
    run("--edit", source, *flags, "--scale", 0, "--seed", 6, folder=tmp_path)
    assert (tmp_path / "sample.png").read_bytes() != before


def test_more_edits_than_fit_a_batch_are_painted_as_if_they_did(trained, tmp_path, source):
    args = sample.parse(["--edit", str(source), "--prompt", "red", "--n", "5", "--steps", "2", "--labels"])
    sample.check(args)
    pages = []
    for batch in (64, 2):
        args.out = str(tmp_path / f"{batch}.png")
        sample.paint_prompts(trained, args, batch)
        with Image.open(args.out) as page:
            pages.append(torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).int())
    assert (pages[0] - pages[1]).abs().max() <= 1


def test_edits_may_go_into_a_folder_as_well(tmp_path, source):
    flags = ("--prompt", "make it green", "--prompt", "make it big", "--steps", 2, "--scale", 0)
    for out in ("edits", "edits.png"):
        run("--edit", source, *flags, "--out", out, folder=tmp_path)
    found, page = contents(tmp_path / "edits"), pixels_of(tmp_path / "edits.png")
    assert [found[f"{i:06d}.txt"] for i in range(2)] == ["make it green\n", "make it big\n"]
    assert torch.equal(torch.cat((found["000000.png"], found["000001.png"]), 2), page)


def test_instructions_may_come_from_a_file(tmp_path, source):
    (tmp_path / "edits.txt").write_text("make it green\nmake it big\n")
    out = run("--edit", source, "--prompts", "edits.txt", "--steps", 1, folder=tmp_path)
    assert "sample.png: 2 pictures" in out


@pytest.mark.parametrize("task, noted", (("", True), ("generate=2,chat=6", True), ("edit=3,chat=6", False)))
def test_a_checkpoint_that_was_not_trained_to_edit_is_noted(tmp_path, source, monkeypatch, task, noted):
    trained, asked = sample.load_trained(helpers.shapes_run()), []
    trained.info["config"]["task"] = task
    monkeypatch.setattr(sample, "load_trained", lambda *a, **k: asked.append(k) or trained)
    result = helpers.call(sample, "--edit", source, "--prompt", "red", "--steps", 1, folder=tmp_path)
    note = f"note: {trained.folder} was not trained with --task edit\n"
    assert result.status == 0 and result.err == (note if noted else "")
    for flags in (("--prompt", "red", "--steps", 1), ("--text", "red")):
        assert "note" not in helpers.call(sample, *flags, folder=tmp_path).err
    assert asked == [{"config": "small-chat"}, {"config": "small"}, {"config": "small"}]


# ---- flags that do not go together ----

BAD_FLAGS = {
    "nothing to do": (
        "",
        "nothing to do: give one of --prompt, --prompts, --caption, --text, --chat, --chat-file",
    ),
    "an edit of nothing": ("--edit p.png", "--edit needs an instruction"),
    "an edit without an instruction": ("--edit p.png --caption p.png", "--edit needs an instruction"),
    "an edit of no picture": ("--edit p.png --prompt red --checkpoint @run", "p.png: No such file"),
    "an edit with an unknown ending": ("--edit p.png --prompt red --out p.xyz", "p.xyz"),
    "an empty prompt": ("--prompt ~", "--prompt is empty"),
    "an empty prompt beside another": ("--prompt red --prompt ~", "--prompt is empty"),
    "a file of prompts without a name": ("--prompts ~", "--prompts"),
    "a chat and a picture": ("--chat --prompt red", "--prompt and --chat do not go together"),
    "a chat and a caption": ("--chat --caption p.png", "--caption and --chat do not go together"),
    "a chat and a text": ("--chat-file m.json --text red", "--text and --chat-file do not go together"),
    "a chat and an edit": ("--chat --edit p.png --prompt red", "--prompt and --edit and --chat do not"),
    "both chats": ("--chat --chat-file m.json", "--chat and --chat-file do not go together"),
    "thinking without a chat": ("--prompt red --think", "--think is for --chat and --chat-file"),
    "a negative number of pictures": ("--chat --max-images -1", "--max-images is -1; it must be from 0"),
    "no tokens": ("--chat --max-tokens 0", "--max-tokens is 0; it must be from 1"),
    "a chat below a file": ("--chat --out file/chat", "file/chat"),
    "a chat in a file": ("--chat --out file", "file"),
    "a file of messages without a name": ("--chat-file ~", "Is a directory"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_flags_that_make_no_sense_are_one_line_of_error(tmp_path, name):
    flags, error = BAD_FLAGS[name]
    (tmp_path / "file").write_text("")
    words = [{"~": "", "@run": str(helpers.shapes_run())}.get(w, w) for w in flags.split()]
    result = helpers.call(sample, *words, folder=tmp_path)
    line = result.err.splitlines()[-1]
    assert result.status == 2 and result.out == "" and line.startswith("error: ") and error in line
    assert result.err.count("\n") == 1 + result.err.startswith("note: ")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file"]


def test_defaults_that_depend_on_what_is_done(tmp_path):
    for flags, out, tokens in (
        ("--prompt red", "sample.png", 64),
        ("--text red", "sample.png", 64),
        ("--chat", "runs/talk", 256),
        ("--chat --max-tokens 7 --out x", "x", 7),
        ("--text red --out y", "y", 64),
    ):
        with helpers.inside(tmp_path):
            args = sample.parse(flags.split())
            sample.check(args)
        assert (args.out, args.max_tokens, args.max_images) == (out, tokens, 4)
    assert not (tmp_path / "y").exists()  # nothing is painted


@pytest.mark.parametrize("module", (sample, evaluate, chat_evaluate))
def test_help_is_one_screen_and_help_all_has_every_flag(tmp_path, monkeypatch, module):
    monkeypatch.setenv("COLUMNS", "80")
    short = helpers.good(module, "--help", folder=tmp_path)
    lines = short.splitlines()
    assert len(lines) <= 24 and all(len(line) <= 80 for line in lines) and "--checkpoint" in short
    long = helpers.good(module, "--help-all", folder=tmp_path)
    for flag in ("--base", "--cfg", "--seed"):
        assert flag in long
    assert "--base" not in short and "--help-all shows" in short and "--help-all" not in long


@pytest.mark.parametrize("mark", ("\u2028", "\u2029", "\x0c", "\x0b", "\x1c", "\x1d", "\x1e", "\x85", "\r"))
def test_a_line_of_prompts_ends_at_a_line_feed_alone(tmp_path, mark):
    (tmp_path / "p.txt").write_bytes(f"a red{mark}circle\r\n\r\na cross\n".encode())
    args = sample.parse(["--prompts", str(tmp_path / "p.txt")])
    sample.check(args)
    assert args.prompt == [f"a red{mark}circle", "a cross"]
