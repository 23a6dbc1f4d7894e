"""Pictures for people: sheets of captioned samples, films of the denoising, and curves. Pillow only.

Shapes: n pictures of S pixels a side; pictures are uint8 (n, 3, S, S).
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch import Tensor

from checkpoint import write_atomic
from scale.pictures import PAGE

INK, GREY, PAPER = (30, 30, 30), (150, 150, 150), (255, 255, 255)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
FILMS = {k: v for k, v in FORMATS.items() if v != "JPEG"}
Lines = dict[str, list[tuple[float, ...]]]  # of a plot: label -> points
SERIES = ((31, 97, 180), (214, 92, 34), (46, 139, 87), (130, 70, 160), (120, 120, 120))


def to_image(picture: Tensor, side: int | None = None) -> Image.Image:
    """uint8 (3, S, S) -> a Pillow image; enlarged without smoothing to `side` pixels if given."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return image if side is None else image.resize((side, side), Image.Resampling.NEAREST)


def check_place(path: str | Path, kinds: dict[str, str] | None = None) -> None:
    """Make the folder of a file to be written later; ValueError for its ending, OSError for its place."""
    path = Path(path)
    if kinds is not None and path.suffix.lower() not in kinds:
        raise ValueError(f"{path}: the ending {path.suffix!r} is not one of {' '.join(kinds)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.filename}: {error.strerror}") from None
    if path.is_dir():
        raise OSError(f"{path} cannot be written: it is a folder")


def save_image(image: Image.Image, path: str | Path, **options) -> None:
    """Write an image beside and rename it; the format follows the ending. Errors as in `check_place`."""
    path = Path(path)
    check_place(path, FORMATS)
    buffer = io.BytesIO()
    if image.getexif():
        options["exif"] = image.getexif()
    image.save(buffer, format=FORMATS[path.suffix.lower()], **options)
    write_atomic(path, buffer.getvalue())


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Break text into at most `lines` lines of about `width` pixels; the rest is "..."."""
    letters = int(width * len(text) / max(1.0, font.getlength(text)))
    return textwrap.wrap(text, max(8, letters), max_lines=lines, placeholder=" ...")


def blank_page(width: int, height: int) -> Image.Image:
    """A page for several pictures; its file says so, and is refused where a picture is wanted."""
    page = Image.new("RGB", (width, height), PAPER)
    page.getexif()[ExifTags.Base.ImageDescription] = PAGE
    return page


def sheet(pictures: Sequence[Tensor], captions: list[str], columns: int = 6, side: int = 128) -> Image.Image:
    """Pictures, uint8 (3, S, S) each, in a grid with their captions below."""
    font, gap, lines = ImageFont.load_default(11), 10, 4
    height = side + 14 * lines + gap
    rows = -(-len(captions) // columns)
    page = blank_page(columns * (side + gap) + gap, rows * height + gap)
    draw = ImageDraw.Draw(page)
    for i, caption in enumerate(captions):
        x, y = gap + i % columns * (side + gap), gap + i // columns * height
        page.paste(to_image(pictures[i], side), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=GREY)
        for j, line in enumerate(wrap(caption, font, side, lines)):
            draw.text((x, y + side + 3 + 14 * j), line, INK, font)
    return page


def grid(pictures: Tensor, side: int | None = None) -> Image.Image:
    """Pictures (n, 3, S, S), uint8, side by side without captions, about as many rows as columns."""
    columns, side = max(1, round(len(pictures) ** 0.5 + 0.49)), side or pictures.shape[-1]
    if len(pictures) == 1:
        return to_image(pictures[0], side)
    page = blank_page(columns * side, -(-len(pictures) // columns) * side)
    for i, picture in enumerate(pictures):
        page.paste(to_image(picture, side), (i % columns * side, i // columns * side))
    return page


def save_gif(frames: list[Image.Image], path: str | Path, milliseconds: int = 80) -> None:
    """A film that holds its last frame for two seconds."""
    times = [milliseconds] * (len(frames) - 1) + [2000]
    save_image(frames[0], path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def round_step(span: float) -> float:
    """The step of an axis that reaches over `span` in at most four: 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * 4 >= span * (1 - 1e-9))


def plot(title: str, lines: Lines, size: tuple[int, int], height: int) -> Image.Image:
    """One panel of `curves`: axes in `size`, the names of the lines below, in all `height` pixels high."""
    (w, h), left, top, bottom, right = size, 52, 30, 26, 14
    panel, font = Image.new("RGB", (w, height), PAPER), ImageFont.load_default(12)
    draw, points = ImageDraw.Draw(panel), [q for series in lines.values() for q in series]
    if not points:
        return panel
    x1 = max(max(q[0] for q in points), 1e-9)
    low, high = min(0.0, min(min(q[1:]) for q in points)), max(max(max(q[1:]) for q in points), 1e-9)
    x_step, y_step = round_step(x1), round_step(high - low)
    y0, y1 = math.floor(low / y_step) * y_step, math.ceil(high / y_step - 1e-9) * y_step

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / x1 * (w - left - right), h - bottom - (y - y0) / (y1 - y0) * (h - top - bottom)

    draw.text((left, 8), title, INK, font)
    for y in (y0 + i * y_step for i in range(round((y1 - y0) / y_step) + 1)):
        draw.line((*place(0, y), *place(x1, y)), fill=(228, 228, 228))
        draw.text((left - 8, place(0, y)[1]), f"{y:.4g}", GREY, font, anchor="rm")
    for x in (i * x_step for i in range(math.floor(x1 / x_step + 1e-9) + 1)):
        draw.text((place(x, y0)[0], h - bottom + 6), f"{x:.4g}", GREY, font, anchor="mt")
    colored = [(SERIES[i % len(SERIES)], *item) for i, item in enumerate(lines.items())]
    for color, _, series in colored:  # all bands lie behind all lines
        band = [q for q in series if len(q) == 4]
        if len(band) > 1:
            edge = [place(q[0], q[2]) for q in band] + [place(q[0], q[3]) for q in band[::-1]]
            draw.polygon(edge, fill=tuple((c + 4 * 255) // 5 for c in color))
    for i, (color, label, series) in enumerate(colored):
        places = [place(*q[:2]) for q in series]
        draw.line(places, fill=color, width=2)
        for x, y in places if len(places) <= 20 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
        draw.line((left, h + 16 * i + 7, left + 20, h + 16 * i + 7), fill=color, width=3)
        draw.text((left + 28, h + 16 * i), label, INK, font)
    return panel


def curves(panels: list[tuple[str, Lines]], size: tuple = (420, 280), columns: int = 3) -> Image.Image:
    """Line plots side by side; a panel is (title, {label: [(x, y), ...]}), and its y axis holds 0.

    A point may be (x, y, low, high): then a band from low to high lies behind its line. The names of the
    lines stand below each plot, outside `size`.
    """
    height = size[1] + 16 * max(len(lines) for _, lines in panels) + 8
    columns = min(columns, len(panels))
    page = Image.new("RGB", (size[0] * columns, height * -(-len(panels) // columns)), PAPER)
    for i, (title, lines) in enumerate(panels):
        page.paste(plot(title, lines, size, height), (i % columns * size[0], i // columns * height))
    return page


def training_curves(metrics: list[dict], timesteps: tuple[int, ...]) -> Image.Image:
    """Losses, and validation errors at the second and fifth of `timesteps`, from a run's metrics.jsonl."""

    def loss(key: str) -> list[tuple[float, ...]]:
        return [(m["step"], m[key]) for m in metrics if isinstance(m.get(key), float)]

    def error(which: str, i: int) -> list[tuple[float, ...]]:
        return [(m["step"], m["val"][which][i]) for m in metrics if which in (m.get("val") or {})]

    panels = [("training loss by step", {key: loss(key) for key in ("ddpm_loss", "lm_loss")})]
    for i in (1, 4):
        lines = {f"{which} caption": error(which, i) for which in ("right", "permuted")}
        panels.append((f"validation error at t = {timesteps[i]} by step", lines))
    return curves(panels)
