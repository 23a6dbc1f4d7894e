"""The built-in world of `small`: one shape on a plain background, and text about it.

    pictures   "a small red circle in the top left on a blue background", 64 x 64 pixels
    reading    the scene that a picture shows, by template matching that knows nothing of the model
    text       captions in several wordings, questions about them, and some facts: what small/pretrain.py
               trains the tiny language model on

It stands in for the paper's data. Shapes: M pictures; pictures are uint8 (M, 3, S, S), S = PIXELS.
"""

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from statistics import median

import torch
from torch import Tensor

# ---- Pictures ----

COLORS = dict(red=(222, 40, 40), green=(40, 160, 60), blue=(40, 80, 225), yellow=(248, 220, 50))
COLORS |= dict(orange=(246, 138, 30), purple=(140, 56, 180), white=(246, 246, 246), black=(18, 18, 18))
SHAPES = ("circle", "square", "triangle", "cross")
PIXELS = 64  # a side
SIZES = {"small": 11.0, "big": 18.0}  # radius in pixels
PLACES = {"center": (32, 32), "top left": (20, 20), "top right": (20, 44)}  # row and column of the middle
PLACES |= {"bottom left": (44, 20), "bottom right": (44, 44)}
JITTER = 1  # a shape's middle is off by up to this many pixels each way
SPLITS = ("train", "validation", "test")
STRICT = 15.0  # of 255: a picture with a smaller residual shows its scene and nothing beside it


@dataclass(frozen=True)
class Scene:
    """The five attributes of a built-in picture."""

    size: str
    color: str
    shape: str
    place: str
    background: str

    @property
    def caption(self) -> str:
        """The scene in words, as training pairs them with the picture."""
        return WORDINGS[0].format(**vars(self))

    @property
    def split(self) -> str:
        """What the combination is for, by a hash of its caption; training shows neither of the two tenths.

        Choices (guidance, learning rates, ...) are made on "validation"; "test" is for what is reported.
        """
        number = hashlib.sha256(self.caption.encode()).digest()[0] % 10
        return {0: "test", 1: "validation"}.get(number, "train")


ATTRIBUTES = ("background", "color", "place", "shape", "size")


@lru_cache
def all_scenes(split: str) -> tuple[Scene, ...]:
    """Every combination whose two colours differ, of one of SPLITS."""
    assert split in SPLITS, split
    scenes = (Scene(*values) for values in product(SIZES, COLORS, SHAPES, PLACES, COLORS))
    return tuple(s for s in scenes if s.color != s.background and s.split == split)


@lru_cache
def coverage() -> Tensor:
    """Each shape's share of each pixel: (shape, size, place, jitter row, jitter column, S, S), 0 .. 1."""
    sub = 4  # sub-pixels a side, for smooth edges
    grid = (torch.arange(PIXELS * sub) + 0.5) / sub
    shifts, masks = range(-JITTER, JITTER + 1), []
    for shape, r, (row, column), dy, dx in product(SHAPES, SIZES.values(), PLACES.values(), shifts, shifts):
        y, x = (grid - row - dy)[:, None], (grid - column - dx)[None, :]
        if shape == "circle":
            inside = y**2 + x**2 <= r**2
        elif shape == "square":
            inside = torch.maximum(y.abs(), x.abs()) <= 0.88 * r
        elif shape == "triangle":
            inside = (y <= 0.8 * r) & (2 * x.abs() - y <= r)
        else:
            inside = (torch.minimum(y.abs(), x.abs()) <= 0.3 * r) & (torch.maximum(y.abs(), x.abs()) <= r)
        masks.append(inside.float().view(PIXELS, sub, PIXELS, sub).mean((1, 3)))
    return torch.stack(masks).view(*map(len, (SHAPES, SIZES, PLACES, shifts, shifts)), PIXELS, PIXELS)


def draw_shift(rng: random.Random) -> tuple[int, int]:
    """By how many pixels the middle of a shape is off, down and to the right."""
    return rng.randrange(2 * JITTER + 1) - JITTER, rng.randrange(2 * JITTER + 1) - JITTER


def render(scenes: list[Scene], rng: random.Random | None = None, shifts: list | None = None) -> Tensor:
    """Pictures (M, 3, S, S), uint8, with given shifts, or those that `rng` draws, or none."""
    shapes, sizes, places = list(SHAPES), list(SIZES), list(PLACES)
    if shifts is None:
        shifts = [draw_shift(rng) if rng else (0, 0) for _ in scenes]
    kinds = [(shapes.index(s.shape), sizes.index(s.size), places.index(s.place)) for s in scenes]
    index = [(*k, dy + JITTER, dx + JITTER) for k, (dy, dx) in zip(kinds, shifts, strict=True)]
    mask = coverage()[tuple(torch.tensor(index).T)][:, None]  # (M, 1, S, S)
    color = torch.tensor([COLORS[s.color] for s in scenes], dtype=torch.float32)[:, :, None, None]
    background = torch.tensor([COLORS[s.background] for s in scenes], dtype=torch.float32)[:, :, None, None]
    return (background + mask * (color - background)).round().to(torch.uint8)


def read_scenes(pictures: Tensor) -> list[Scene]:
    """The scenes whose renderings are nearest, in squared error, to pictures uint8 (M, 3, S, S).

    A rendering is a c + (1 - a) b with coverage a, colour c and background b. Its distance to x is quadratic
    in c and b, so sums over pixels with weights a and 1 - a do.
    """
    x = pictures.double().flatten(2)  # (M, 3, pixels)
    a = coverage().double().flatten(0, 4).flatten(1)  # (m, pixels)
    colors = torch.tensor(list(COLORS.values()), dtype=torch.float64)  # (8, 3)
    xa = torch.einsum("ncp,mp->nmc", x, a)  # sums over the shape
    xb = x.sum(2)[:, None] - xa  # sums over the background
    aa, bb, ab = (a * a).sum(1), ((1 - a) ** 2).sum(1), (a * (1 - a)).sum(1)  # (m,)
    square, mixed = (colors**2).sum(1), colors @ colors.T
    distance = (  # (M, m, 8, 8), less the constant |x|^2
        -2 * (xa @ colors.T)[..., :, None]
        - 2 * (xb @ colors.T)[..., None, :]
        + aa[:, None, None] * square[:, None]
        + bb[:, None, None] * square
        + 2 * ab[:, None, None] * mixed
    )
    distance.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)  # a shape in its background's colour is none
    shift = range((2 * JITTER + 1) ** 2)
    names = [list(values) for values in (SHAPES, SIZES, PLACES, shift, COLORS, COLORS)]
    best = torch.unravel_index(distance.flatten(1).argmin(1), [len(values) for values in names])
    found = []
    for index in zip(*(i.tolist() for i in best), strict=True):
        shape, size, place, _, color, background = (n[i] for n, i in zip(names, index, strict=True))
        found.append(Scene(size, color, shape, place, background))
    return found


def residuals(wanted: list[Scene], pictures: Tensor) -> Tensor:
    """How far pictures uint8 (M, 3, S, S) are from the wanted scenes: root mean squares (M,), of 255.

    Of a scene's renderings, one a shift, the nearest counts. `read_scenes` must choose some scene, and finds
    the right one in noise and beside a second shape as well: this tells.
    """
    shifts = product(range(-JITTER, JITTER + 1), repeat=2)
    drawn = torch.stack([render(wanted, shifts=[shift] * len(wanted)) for shift in shifts])  # (9, M, ...)
    return (drawn.float() - pictures.float()).square().mean((2, 3, 4)).sqrt().amin(0)


def prompt_match(wanted: list[Scene], pictures: Sequence[Tensor | None]) -> dict[str, float | None]:
    """Share of pictures uint8 (3, S, S) that show the scene they should; None is no picture.

    By attribute, as `read_scenes` has it; "all" at once; "strict": all, and a residual below STRICT. Beside
    them "residual", the median of the pictures that are there, or None.
    """
    assert len(wanted) == len(pictures)
    there = [i for i, picture in enumerate(pictures) if picture is not None]
    scenes, got, off = [wanted[i] for i in there], [], []
    if there:
        shown = torch.stack([pictures[i] for i in there])
        got, off = read_scenes(shown), residuals(scenes, shown).tolist()
    judged = list(zip(scenes, got, off, strict=True))
    right = {k: sum(getattr(w, k) == getattr(g, k) for w, g, _ in judged) for k in ATTRIBUTES}
    right |= {"all": sum(w == g for w, g, _ in judged)}
    right |= {"strict": sum(w == g and r < STRICT for w, g, r in judged)}
    return {k: n / len(wanted) for k, n in right.items()} | {"residual": median(off) if off else None}


# ---- Text ----

WORDINGS = (
    "a {size} {color} {shape} in the {place} on a {background} background",
    "on a {background} background, in the {place}, a {size} {color} {shape}",
    "the background is {background} and the {shape} in the {place} is {size} and {color}",
    "a {color} {shape} that is {size}, in the {place}, with {background} behind it",
)
QUESTIONS = (
    ("what color is the background", "background"),
    ("what color is the {shape}", "color"),
    ("where is the {shape}", "place"),
    ("what shape is it", "shape"),
    ("how big is the {shape}", "size"),
)
# What a color, a shape or a size is like: indirect requests name these (dialogues.py).
COLOR_THINGS = dict(red=("blood", "a tomato", "a cherry"), green=("grass", "a frog", "a pea"))
COLOR_THINGS |= dict(blue=("the sky", "the sea", "a sapphire"), yellow=("a lemon", "the sun", "a banana"))
COLOR_THINGS |= dict(orange=("a carrot", "a pumpkin", "a tiger"), purple=("a plum", "lavender", "a violet"))
COLOR_THINGS |= dict(white=("snow", "milk", "a swan"), black=("coal", "the night", "a raven"))
SHAPE_THINGS = dict(circle=("a ball", "a wheel", "a coin"), square=("a window", "a chessboard", "a tile"))
SHAPE_THINGS |= dict(triangle=("a roof", "a tent", "a slice of pizza"))
SHAPE_THINGS |= dict(cross=("a plus sign", "a crossroads", "a windmill"))
SIZE_THINGS = {"small": ("a mouse", "an ant", "a pea"), "big": ("an elephant", "a whale", "a house")}
CORNERS = dict(circle="no corners", square="four corners", triangle="three corners", cross="four arms")
MIXED = {"orange": ("red", "yellow"), "green": ("blue", "yellow"), "purple": ("red", "blue")}
OPPOSITE = dict(small="big", top="bottom", left="right", black="white")
OPPOSITE |= {"top left": "bottom right", "top right": "bottom left"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
FACTS = (
    *(f"{thing} is {color}" for color, things in COLOR_THINGS.items() for thing in things),
    *(f"{thing} is a {shape}" for shape, things in SHAPE_THINGS.items() for thing in things),
    *(f"{thing} is {size}" for size, things in SIZE_THINGS.items() for thing in things),
    *(f"a {shape} has {corners}" for shape, corners in CORNERS.items()),
    *(f"{a} and {b} make {color}" for color, (a, b) in MIXED.items()),
    *(f"the opposite of {a} is {b}" for a, b in OPPOSITE.items()),
)

# What no caption ever repeats: the text has this to lose (evaluate.py asks for it).
SOUNDS = dict(dog="woof", cat="meow", cow="moo", duck="quack")
SOUNDS |= dict(sheep="baa", owl="hoot", bee="buzz", lion="roar")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LORE = (
    *(f"the {animal} says {sound}" for animal, sound in SOUNDS.items()),
    *(f"after {DAYS[i - 1]} comes {DAYS[i]}" for i in range(len(DAYS))),
    *(f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}" for a in range(1, 10) for b in range(1, 11 - a)),
)
NAMES = ("ann", "ben", "eva", "max", "tom", "zoe")
ROOMS = ("kitchen", "garden", "cellar", "attic", "yard", "hall")

EDITS = {
    "color": ("make the {shape} {new}", "paint the {shape} {new}", "change the {shape} to {new}"),
    "place": ("move the {shape} to the {new}", "put the {shape} in the {new}"),
    "size": ("make the {shape} {new}", "change the {shape} to {new}"),
    "shape": ("turn the {shape} into a {new}", "replace the {shape} by a {new}"),
}
EDITS["background"] = tuple(wording.replace("{shape}", "background") for wording in EDITS["color"])
VALUES = dict(color=tuple(COLORS), background=tuple(COLORS), place=tuple(PLACES))
VALUES |= dict(size=tuple(SIZES), shape=SHAPES)


@dataclass(frozen=True)
class Edit:
    """One attribute of a scene changed, and the words that ask for it."""

    source: Scene
    target: Scene
    attribute: str
    instruction: str


def draw_edit(rng: random.Random, split: str = "train", source: Scene | None = None) -> Edit | None:
    """An edit to a scene of `split`; None if `source` is given and has none. Its own source trains, or is
    of that split as well."""
    start = source or rng.choice(all_scenes(split))
    ends = [  # the other end differs in one attribute, each as likely as the others
        (attribute, dataclasses.replace(start, **{attribute: value}))
        for attribute in rng.sample(ATTRIBUTES, len(ATTRIBUTES))
        for value in rng.sample(VALUES[attribute], len(VALUES[attribute]))
        if value != getattr(start, attribute)
    ]
    edits = [(a, start, end) if source else (a, end, start) for a, end in ends if end.color != end.background]
    wanted = (e for e in edits if e[2].split == split and (source or e[1].split in ("train", split)))
    if not (found := next(wanted, None)):
        return None
    attribute, before, after = found
    wording = rng.choice(EDITS[attribute])
    return Edit(before, after, attribute, wording.format(shape=before.shape, new=getattr(after, attribute)))


REPEAT, PUZZLE, KNOWLEDGE, SAME = 0.15, 0.5, 0.1, 0.5


def repeated_words(rng: random.Random) -> str:
    """Words in a random order, said twice: to go on, a model must find what followed the last time."""
    vocabulary = [*COLORS, *SHAPES, *SIZES, *sum((list(t) for t in COLOR_THINGS.values()), [])]
    words = " ".join(rng.choices(vocabulary, k=rng.randint(8, 20)))
    return f"{words}. again: {words}."


@dataclass(frozen=True)
class Puzzle:
    """Two or three sentences about people, and questions that one sentence alone does not answer."""

    premises: str
    questions: tuple[tuple[str, str], ...]  # and their answers
    choices: tuple[str, ...]  # what an answer may be


def draw_puzzle(rng: random.Random) -> Puzzle:
    """Whose thing has which colour (a fact besides), who is the oldest, or where somebody went."""
    a, b, c = rng.sample(NAMES, 3)
    kind = rng.choice(("color", "age", "room"))
    if kind == "color":
        colors = rng.sample(list(COLORS), 2)
        x, y = (rng.choice(COLOR_THINGS[color]) for color in colors)
        questions = [(f"what color is the thing of {who}", z) for who, z in zip((a, b), colors, strict=True)]
        premises, choices = f"{a} has {x}. {b} has {y}", tuple(COLORS)
    elif kind == "age":
        pair = [f"{a} is older than {b}", f"{b} is older than {c}"]
        questions = [("who is the oldest", a), ("who is the youngest", c)]
        premises, choices = ". ".join(rng.sample(pair, 2)), tuple(sorted((a, b, c)))
    else:
        here, there, new = rng.sample(ROOMS, 3)
        who = rng.choice((a, b))
        premises, choices = f"{a} is in the {here}. {b} is in the {there}. {who} goes to the {new}", ROOMS
        questions = [(f"where is {x}", new if x == who else old) for x, old in ((a, here), (b, there))]
    return Puzzle(premises, tuple(rng.sample(questions, 2)), choices)


def text_document(rng: random.Random) -> str:
    """One document of built-in text: to go on with it, a model must remember what a caption said."""
    if rng.random() < REPEAT:
        return repeated_words(rng)
    if rng.random() < PUZZLE:
        puzzle = draw_puzzle(rng)
        return ". ".join((puzzle.premises, *(f"{q}? {answer}" for q, answer in puzzle.questions))) + "."
    if rng.random() < KNOWLEDGE:
        return ". ".join(rng.sample(LORE, 4)) + "."
    if rng.random() < 0.1:
        return ". ".join(rng.sample(FACTS, 4)) + "."
    if rng.random() < 0.1:
        edit = draw_edit(rng)
        return f"{edit.source.caption}. {edit.instruction}: {edit.target.caption}."
    words = vars(rng.choice(all_scenes("train")))
    wording = rng.choice(WORDINGS)
    text = wording.format(**words)
    for question, attribute in rng.sample(QUESTIONS, rng.randint(1, 4)):
        text += f". {question.format(**words)}? {words[attribute]}"
    again = wording if rng.random() < SAME else rng.choice(WORDINGS)
    return text + ". " + again.format(**words) + "."
