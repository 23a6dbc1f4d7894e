"""figures.py: sheets of pictures with words, and where everything lies on them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageFont

import figures
from figures import INK, PAPER, cases, sheet, to_image, wrap

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


def test_cases_put_every_picture_under_its_title_and_the_words_beside_them():
    rows = [
        ([plain(RED), plain(BLUE)], ["a red one", "a second paragraph"]),
        ([plain(BLUE), plain(RED)], [""]),
    ]
    page = cases(rows, ["first", "second"], side=40, width=400)
    assert page.size == (400, 26 + 2 * 50)
    for i, pair in enumerate(((RED, BLUE), (BLUE, RED))):
        y = 26 + 50 * i
        for j, color in enumerate(pair):
            x = 10 + 50 * j
            assert colors(page, (x, y, x + 40, y + 40)) == {color}
            assert colors(page, (x - 1, y - 1, x, y + 40)) == {figures.GREY}  # framed
    assert len(colors(page, (10, 0, 50, 20))) > 1 and len(colors(page, (60, 0, 100, 20))) > 1  # titles
    words = colors(page, (110, 26, 400, 42)), colors(page, (110, 42, 400, 58))
    assert INK in words[0] and figures.GREY in words[1] and INK not in words[1]
    assert colors(page, (110, 76, 400, 126)) == {PAPER}  # nothing was said of the second


def test_long_words_of_a_case_stay_beside_their_own_pictures():
    long = "a word and another " * 40
    rows = [([plain(RED)], [long, long, long]), ([plain(RED)], [""])]
    page = cases(rows, ["only"], side=64, width=300)
    assert colors(page, (84, 26, 300, 26 + 64)) != {PAPER}
    assert colors(page, (84, 26 + 74, 300, page.height)) == {PAPER}
    assert colors(page, (295, 26, 300, page.height)) == {PAPER}  # a margin on the right


def test_cases_of_nothing_are_titles_alone():
    assert cases([], ["first"]).size == (900, 26)


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
    assert " ".join(whole) == text and all(font.getlength(line) <= 60 for line in whole) and len(whole) > 3
    cut = wrap(text, font, 60, 2)
    assert cut == [whole[0], whole[1] + " ..."]
    assert wrap("", font, 60, 2) == [""]


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
