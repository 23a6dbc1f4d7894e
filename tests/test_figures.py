"""figures.py: sheets of pictures with words, and where everything lies on them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageFont

from lab import figures
from lab.figures import PAPER, SERIES, curves, sheet, to_image, training_curves, wrap

RED, BLUE = ((255, 0, 0), (0, 0, 255))


def plain(color: tuple[int, int, int], side: int = 8) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, side, side)


def colors(page: Image.Image, box: tuple[int, int, int, int]) -> set[tuple[int, int, int]]:
    """Of a box (left, top, right, bottom)."""
    part = page.crop(box)
    return {color for _, color in part.getcolors(part.width * part.height)}


def test_a_picture_becomes_an_image_with_every_pixel_in_its_place():
    picture = torch.randint(256, (3, 5, 5), dtype=torch.uint8)
    image = to_image(picture, 15)
    assert image.size == (15, 15)
    for y, x in ((0, 0), (1, 4), (4, 2)):
        assert image.getpixel((3 * x + 1, 3 * y + 1)) == tuple(picture[:, y, x].tolist())


def test_a_sheet_puts_captions_below_pictures_row_by_row():
    pictures = torch.stack([plain(RED), plain(BLUE), plain(RED)])
    page = sheet(pictures, ["red", "", "red again"], columns=2, side=40)
    assert page.size == (2 * 50 + 10, 2 * (40 + 56 + 10) + 10)
    for i, color in enumerate((RED, BLUE, RED)):
        x, y = 10 + 50 * (i % 2), 10 + 106 * (i // 2)
        assert colors(page, (x, y, x + 40, y + 40)) == {color}
        assert (colors(page, (x, y + 42, x + 40, y + 96)) == {PAPER}) == (i == 1)
    assert colors(page, (60, 116, 110, 222)) == {PAPER}


def test_text_is_broken_between_words_and_cut_with_an_ellipsis():
    font = ImageFont.load_default(11)
    text = "one two three four five six seven eight nine ten"
    whole = wrap(text, font, 60, 99)
    assert " ".join(whole) == text and all(font.getlength(line) <= 70 for line in whole) and len(whole) > 3
    cut = wrap(text, font, 60, 2)
    assert cut[0] == whole[0] and cut[1].endswith(" ...") and len(cut) == 2
    assert wrap("", font, 60, 2) == []
    assert wrap("ab cdefghijklm", font, 1, 9) == ["ab cdefg", "hijklm"]  # however narrow


def test_a_bad_place_is_an_error_before_the_work(tmp_path):
    with pytest.raises(ValueError, match=r"the ending '.txt' is not one of .png"):
        figures.check_place(tmp_path / "x.txt", figures.FORMATS)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        figures.check_place(tmp_path / "file" / "x.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(OSError, match="it is a folder"):
        figures.check_place(tmp_path / "x.png")
    figures.check_place(tmp_path / "new" / "x.png", figures.FORMATS)
    assert (tmp_path / "new").is_dir()


# ---- curves ----

SIZE = (420, 280)


def place(x: float, y: float, largest: tuple[float, float]) -> tuple[int, int]:
    """Where a point lies on a panel whose axes reach from 0 to `largest`."""
    return round(52 + x / largest[0] * (420 - 66)), round(280 - 26 - y / largest[1] * (280 - 56))


def column(page: Image.Image, x: int) -> list[tuple[int, int, int]]:
    return [page.getpixel((x, y)) for y in range(30, page.height - 24)]


def hues(page: Image.Image) -> set[tuple[int, int, int]]:
    """Colours of a plot that are no shade of grey."""
    return {c for c in colors(page, (0, 0, 420, 280)) if max(c) - min(c) > 5}


def test_curves_of_plain_points_are_lines_in_one_colour_each_and_nothing_else():
    lines = {"rising": [(0, 1.0), (50, 2.0), (100, 4.0)], "falling": [(0, 3.0), (100, 0.0)]}
    page = curves([("both", lines), ("none", {}), ("again", lines)], SIZE)
    assert page.size == (3 * 420, 320)  # the names of two lines below
    first, last = page.crop((0, 0, 420, 280)), page.crop((840, 0, 1260, 280))
    assert colors(page, (420, 0, 840, 320)) == {PAPER}
    for x in (0, 840):
        assert {SERIES[i] in colors(page, (x, 280 + 16 * i, x + 420, 296 + 16 * i)) for i in (0, 1)} == {True}
    assert hues(first) == set(SERIES[:2]) == hues(last)
    for series, color in zip(lines.values(), SERIES, strict=False):
        for x, y in series[:-1]:
            i, j = place(x + 1, y, (100, 4))
            assert color in colors(first, (i - 2, j - 4, i + 3, j + 5)), (x, y)


def test_panels_stand_in_rows_of_as_many_as_said():
    lines = {"rising": [(0, 1.0), (100, 4.0)]}
    page = curves([(name, lines) for name in "abc"], SIZE, columns=2)
    assert page.size == (2 * 420, 2 * 304) and colors(page, (420, 304, 840, 608)) == {PAPER}
    assert all(SERIES[0] in colors(page, (x, y, x + 420, y + 280)) for x, y in ((0, 0), (420, 0), (0, 304)))


def test_a_band_lies_in_a_lighter_colour_behind_its_line_from_low_to_high():
    banded = [(0, 2.0, 1.0, 4.0), (100, 2.0, 1.0, 4.0)]
    page = curves([("one", {"banded": banded, "plain": [(0, 0.5), (100, 4.0)]})], SIZE)
    light = hues(page) - set(SERIES[:2])
    assert len(light) == 1
    light = light.pop()
    assert all(SERIES[0][i] < light[i] < 255 for i in range(3)) and light[0] < light[1] < light[2]  # bluish
    i = place(30, 0, (100, 4))[0]
    shown = column(page, i)
    rows = [30 + j for j, color in enumerate(shown) if color == light]
    assert abs(min(rows) - place(0, 4, (100, 4))[1]) <= 1 and abs(max(rows) - place(0, 1, (100, 4))[1]) <= 1
    line = [30 + j for j, color in enumerate(shown) if color == SERIES[0]]
    assert len(line) == 2 and abs(line[0] - place(0, 2, (100, 4))[1]) <= 1  # before it
    assert len(rows) == max(rows) - min(rows) + 1 - len(line) - shown.count(SERIES[1])
    assert SERIES[1] in shown and min(rows) < 30 + shown.index(SERIES[1]) < max(rows)  # all lines are


def test_a_band_is_drawn_only_where_points_have_one():
    points = [(0, 1.0), (40, 1.0), (60, 1.0, 0.5, 1.5), (100, 1.0, 0.5, 1.5)]
    page = curves([("half", {"a": points})], SIZE)
    (light,) = hues(page) - {SERIES[0]}
    shown = {x: column(page, place(x, 0, (100, 1.5))[0]) for x in (5, 30, 58, 65, 80, 95)}
    assert {x for x, colors in shown.items() if light in colors} == {65, 80, 95}
    assert all(SERIES[0] in colors for colors in shown.values())
    alone = curves([("half", {"a": [(0, 1.0), (60, 1.0, 0.5, 1.5), (100, 1.0)]})], SIZE)
    assert hues(alone) == {SERIES[0]}  # one point has no width


def test_the_axis_reaches_to_the_ends_of_a_band():
    narrow, wide = [(0, 1.0), (100, 1.0)], [(0, 1.0, -1.0, 3.0), (100, 1.0, -1.0, 3.0)]
    heights = []
    for points in (narrow, wide):
        shown = column(curves([("x", {"a": points})], SIZE), 150)
        heights.append(30 + shown.index(SERIES[0]))
    assert abs(heights[0] - 30) <= 1 and abs(heights[1] - (30 + 224 / 2)) <= 1  # 1 of 1; 1 of -1 .. 3


@pytest.mark.parametrize(
    "span, step",
    ((4, 1), (3.92, 1), (0.991, 0.25), (0.645, 0.2), (480, 200), (11.9, 5), (8e-3, 2e-3), (41, 20)),
)
def test_an_axis_has_round_steps_at_most_four(span, step):
    assert figures.round_step(span) == pytest.approx(step)


def test_an_axis_ends_at_a_round_number():
    shown = column(curves([("x", {"a": [(0, 0.645), (100, 0.645)]})], SIZE), 150)
    assert abs(30 + shown.index(SERIES[0]) - place(0, 0.645, (100, 0.8))[1]) <= 1


# ---- of training ----


def test_training_curves_show_both_losses_and_two_validation_errors():
    val = {"right": [9.0, 0.5, 9.0, 9.0, 0.25], "permuted": [9.0, 2.0, 9.0, 9.0, 1.0]}
    lines = [
        {"step": 10, "ddpm_loss": 1.0, "lm_loss": None},
        {"step": 20, "ddpm_loss": 0.5, "lm_loss": 4.0, "val": val},
        {"step": 40, "ddpm_loss": 0.25, "lm_loss": 2.0, "val": val},
    ]
    want = [
        (
            "training loss by step",
            {"ddpm_loss": [(10, 1.0), (20, 0.5), (40, 0.25)], "lm_loss": [(20, 4.0), (40, 2.0)]},
        ),
        (
            "validation error at t = 3 by step",
            {"right caption": [(20, 0.5), (40, 0.5)], "permuted caption": [(20, 2.0), (40, 2.0)]},
        ),
        (
            "validation error at t = 9 by step",
            {"right caption": [(20, 0.25), (40, 0.25)], "permuted caption": [(20, 1.0), (40, 1.0)]},
        ),
    ]
    assert training_curves(lines, (1, 3, 5, 7, 9)).tobytes() == curves(want).tobytes()
    for line in lines[1:]:  # where there is no other caption
        line["val"] = {"right": val["right"]}
    for _, lines_shown in want[1:]:
        lines_shown["permuted caption"] = []
    assert training_curves(lines, (1, 3, 5, 7, 9)).tobytes() == curves(want).tobytes()
    assert training_curves([], (1, 3, 5, 7, 9)).size == (3 * 420, 320)  # before there is anything
