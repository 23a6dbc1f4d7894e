"""What the model reads: captioned shapes, text, and real pictures; latents; batches.

    shapes     "a small red circle in the top left on a blue background" and a 32 x 32 picture of it
    text       captions in several wordings, questions about them, and a little knowledge: what `train.py`
               pretrains the tiny language model of `small` on
    pictures   a folder of name.png + name.txt, a metadata.jsonl, or WebDataset tars
    batches    sequences of text ids and IMAGE, cut into the two phases of model.py

`python data.py encode --data ... --vae ... --base ... --out DIR` makes real pictures into shards of latents
and token ids, once, so that training decodes no picture again (latents.py).

Shapes: M pictures, S pixels a side; pictures are uint8 (M, 3, S, S); latents (M, C, h, w).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import T
from model import IMAGE, PAD, ModelConfig, Tokens
from pictures import Pictures

# ------------------------------------------------------------------------------------------------------------
# The built-in world: one shape on a plain background

COLORS = {
    "red": (222, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 225),
    "yellow": (248, 220, 50),
    "orange": (246, 138, 30),
    "purple": (140, 56, 180),
    "white": (246, 246, 246),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 5.5, "big": 9.0}  # radius in pixels of a 32 x 32 picture
PLACES = {
    "center": (16, 16),
    "top left": (10, 10),
    "top right": (10, 22),
    "bottom left": (22, 10),
    "bottom right": (22, 22),
}  # row and column of the middle
JITTER = 1  # a shape's middle is off by up to this many pixels each way
PIXELS = 32


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
        return (
            f"a {self.size} {self.color} {self.shape} in the {self.place} on a {self.background} background"
        )


ATTRIBUTES = ("background", "color", "place", "shape", "size")


@lru_cache
def all_scenes(held_out: bool) -> tuple[Scene, ...]:
    """Every combination whose two colours differ: nine tenths to train on, one tenth held out."""
    scenes = [
        Scene(size, color, shape, place, background)
        for size in SIZES
        for color in COLORS
        for shape in SHAPES
        for place in PLACES
        for background in COLORS
        if color != background
    ]
    return tuple(s for s in scenes if (hashlib.sha256(s.caption.encode()).digest()[0] % 10 == 0) == held_out)


@lru_cache
def coverage() -> Tensor:
    """Each shape's share of each pixel: (shape, size, place, jitter row, jitter column, 32, 32), 0 .. 1."""
    sub = 8  # sub-pixels a side, for smooth edges
    grid = (torch.arange(PIXELS * sub) + 0.5) / sub
    masks = []
    for shape in SHAPES:
        for r in SIZES.values():
            for row, column in PLACES.values():
                for dy in range(-JITTER, JITTER + 1):
                    for dx in range(-JITTER, JITTER + 1):
                        y, x = (grid - row - dy)[:, None], (grid - column - dx)[None, :]
                        if shape == "circle":
                            inside = y**2 + x**2 <= r**2
                        elif shape == "square":
                            inside = torch.maximum(y.abs(), x.abs()) <= 0.88 * r
                        elif shape == "triangle":
                            inside = (y <= 0.8 * r) & (2 * x.abs() - y <= r)
                        else:
                            arm = torch.minimum(y.abs(), x.abs()) <= 0.3 * r
                            inside = arm & (torch.maximum(y.abs(), x.abs()) <= r)
                        masks.append(inside.float().view(PIXELS, sub, PIXELS, sub).mean((1, 3)))
    side = 2 * JITTER + 1
    return torch.stack(masks).view(len(SHAPES), len(SIZES), len(PLACES), side, side, PIXELS, PIXELS)


def render(scenes: list[Scene], rng: random.Random | None = None) -> Tensor:
    """Pictures (M, 3, 32, 32), uint8; without `rng` every shape sits exactly in its place."""
    shapes, sizes, places = list(SHAPES), list(SIZES), list(PLACES)
    index = [
        (
            shapes.index(s.shape),
            sizes.index(s.size),
            places.index(s.place),
            *(rng.randrange(2 * JITTER + 1) if rng else JITTER for _ in range(2)),
        )
        for s in scenes
    ]
    mask = coverage()[tuple(torch.tensor(index).T)][:, None]  # (M, 1, 32, 32)
    color = torch.tensor([COLORS[s.color] for s in scenes], dtype=torch.float32)[:, :, None, None]
    background = torch.tensor([COLORS[s.background] for s in scenes], dtype=torch.float32)[:, :, None, None]
    return (background + mask * (color - background)).round().to(torch.uint8)


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
FACTS = (
    "grass is green",
    "the sky is blue",
    "snow is white",
    "coal is black",
    "a lemon is yellow",
    "blood is red",
    "a carrot is orange",
    "a plum is purple",
    "a triangle has three corners",
    "a square has four corners",
    "a circle has no corners",
    "a cross has four arms",
    "a ball is a circle",
    "a wheel is a circle",
    "a window is a square",
    "a roof is a triangle",
    "the opposite of small is big",
    "the opposite of big is small",
    "the opposite of top is bottom",
    "the opposite of left is right",
    "the opposite of right is left",
    "the opposite of black is white",
    "red and yellow make orange",
    "blue and yellow make green",
    "red and blue make purple",
)


def text_document(rng: random.Random) -> str:
    """One document of built-in text: to go on with it, a model must remember what a caption said."""
    if rng.random() < 0.1:
        return ". ".join(rng.sample(FACTS, 4)) + "."
    words = vars(rng.choice(all_scenes(held_out=False)))
    text = rng.choice(WORDINGS).format(**words)
    for question, attribute in rng.sample(QUESTIONS, rng.randint(1, 4)):
        text += f". {question.format(**words)}? {words[attribute]}"
    return text + ". " + rng.choice(WORDINGS).format(**words) + "."


# ------------------------------------------------------------------------------------------------------------
# Latents


class PatchPCA:
    """A linear stand-in for the VAE: each p x p patch of a picture on its C principal components.

    (M, 3, S, S) uint8 <-> (M, C, S/p, S/p), about unit variance. Component k is divided by its standard
    deviation to the power `whiten` (1: all components alike; 0: as they are), then all by one number.
    """

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor, bound: Tensor):
        self.mean, self.basis, self.scale = mean, basis, scale  # (3pp,), (3pp, C), (C,)
        self.bound = bound  # (C, 1, 1): the largest latent seen, to which samplers clamp
        self.patch, self.channels = math.isqrt(len(mean) // 3), len(scale)

    @classmethod
    def fit(cls, pictures: Tensor, channels: int, patch: int, whiten: float) -> PatchPCA:
        x = cls.patches(pictures, patch).transpose(1, 2).flatten(0, 1).double()  # (M * hw, 3pp)
        mean = x.mean(0)
        variance, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        variance, basis = variance.flip(0)[:channels].clamp(min=1e-8), vectors.flip(1)[:, :channels]
        scale = variance.sqrt() ** -whiten
        scale = scale / (variance * scale**2).mean().sqrt()
        z = ((x - mean) @ basis * scale).abs().amax(0)
        return cls(mean.float(), basis.float(), scale.float(), z.float()[:, None, None])

    @staticmethod
    def patches(pictures: Tensor, patch: int) -> Tensor:
        """uint8 (M, 3, S, S) -> float (M, 3pp, hw) in -1 .. 1."""
        return F.unfold(pictures.float() / 127.5 - 1, patch, stride=patch)

    def encode(self, pictures: Tensor) -> Tensor:
        """uint8 (M, 3, S, S) -> (M, C, S/p, S/p)."""
        h, w = (s // self.patch for s in pictures.shape[2:])
        x = self.patches(pictures, self.patch).transpose(1, 2) - self.mean  # (M, hw, 3pp)
        return (x @ self.basis * self.scale).transpose(1, 2).unflatten(2, (h, w))

    def decode(self, z: Tensor) -> Tensor:
        """(M, C, h, w) -> uint8 (M, 3, S, S)."""
        h, w = z.shape[2:]
        x = (z.float().flatten(2).transpose(1, 2) / self.scale) @ self.basis.T + self.mean  # (M, hw, 3pp)
        x = F.fold(x.transpose(1, 2), (h * self.patch, w * self.patch), self.patch, stride=self.patch)
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "basis": self.basis.contiguous(), "scale": self.scale, "bound": self.bound}


# ------------------------------------------------------------------------------------------------------------
# Batches


@dataclass
class Batch:
    """Sequences cut into the two phases, and their images in row order."""

    prefix: Tokens  # all text before the first image
    rest: Tokens  # the first image and everything after it
    latents: Tensor  # (M, C, h, w), clean
    max_t: Tensor  # (M,) exclusive upper end of the training timesteps

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.prefix, self.rest, self.latents.to(device), self.max_t)


def split_phases(sequences: list[list[int]], num_patches: int, pack: int = 0) -> tuple[Tokens, Tokens]:
    """Sequences of ids and IMAGE, each with at least one IMAGE -> prefix and rest (see LMFusion.forward).

    pack > 0: neighbours share a row, as documents of their own, as long as they have `pack` tokens together.
    Their order stays, so that their images stay in row order.
    """
    rows: list[list[int]] = []
    room = 0
    for i, s in enumerate(sequences):
        length = sum(num_patches if token == IMAGE else 1 for token in s)
        if length > room:
            rows.append([])
            room = pack
        rows[-1].append(i)
        room -= length
    cut = [s.index(IMAGE) for s in sequences]
    prefix = Tokens.packed([[sequences[i][: cut[i]] for i in row] for row in rows], num_patches)
    rest = [[sequences[i][cut[i] :] for i in row] for row in rows]
    return prefix, Tokens.packed(rest, num_patches, start=[[cut[i] for i in row] for row in rows])


def next_tokens(tokens: Tokens, boi_id: int) -> tuple[Tensor, Tensor]:
    """What each text token of `tokens` is to predict, in the order of `Hidden.text`: two tensors (T_text,).

    First the id of the next text token for L_LM, -100 where there is none to learn: no loss where the input
    is BOI, none at the end of a document or before padding, and BOI itself is no target of the frozen head.
    Second whether an image starts next (1, 0, or -100 at BOI and at the end), for the row that decides when
    to draw.
    """
    following = torch.full_like(tokens.ids, PAD)
    same = tokens.document[:, 1:] == tokens.document[:, :-1]
    following[:, :-1] = torch.where(same, tokens.ids[:, 1:], PAD)
    known = (tokens.ids >= 0) & (tokens.ids != boi_id) & (following >= 0)
    word = torch.where(known & (following != boi_id), following, -100)
    draw = torch.where(known, (following == boi_id).long(), -100)
    text = tokens.ids >= 0
    return word[text], draw[text]


FIRST, DROPPED, BEHIND = "caption first", "caption dropped", "image first"


@dataclass(frozen=True)
class Recipe:
    """How a captioned picture becomes a sequence (Sections 2.3 and 4.1 of the paper)."""

    caption_first: float = 0.8  # else the picture comes first and its caption is to be predicted
    caption_drop: float = 0.1  # of the captions before pictures, for guidance: BOI and the picture remain
    noise_limit: int = 500  # timesteps of a picture that comes before its caption are below this

    def draw(self, n: int, rng: random.Random) -> list[str]:
        """The order of each of n samples."""
        orders = []
        for _ in range(n):
            if rng.random() < self.caption_first:
                orders.append(DROPPED if rng.random() < self.caption_drop else FIRST)
            else:
                orders.append(BEHIND)
        return orders


def arrange(
    captions: list[list[int]],
    latents: Tensor,
    orders: list[str],
    config: ModelConfig,
    noise_limit: int = T,
    pack: int = 0,
) -> Batch:
    """One sequence a caption (ids) and latent (M, C, h, w), in the order that `Recipe.draw` gave it.

    caption first:    caption BOI | patches
    caption dropped:          BOI | patches
    image first:              BOI | patches EOI caption EOS

    Our choice: no EOI in the first two, for nothing behind their image has a loss.
    """
    sequences, max_t = [], []
    for caption, order in zip(captions, orders, strict=True):
        if order == BEHIND:
            sequences.append([config.boi_id, IMAGE, config.eoi_id] + caption + [config.eos_id])
            max_t.append(noise_limit)
        else:
            sequences.append((caption if order == FIRST else []) + [config.boi_id, IMAGE])
            max_t.append(T)
    return Batch(*split_phases(sequences, config.num_patches, pack), latents, torch.tensor(max_t))


def make_batch(
    captions: list[list[int]], latents: Tensor, recipe: Recipe, config: ModelConfig, rng: random.Random
) -> Batch:
    """`arrange`, each sample in an order of its own."""
    return arrange(captions, latents, recipe.draw(len(captions), rng), config, recipe.noise_limit)


ALL = slice(None)  # of a batch: what one process does, where there is only one


class Shapes:
    """The built-in pictures as a data source."""

    size = PIXELS

    def sample(self, n: int, rng: random.Random, share: slice = ALL) -> tuple[Tensor, list[str]]:
        """`share` of n training pictures (n, 3, 32, 32), uint8, and captions; the draw is that of all n."""
        scenes = rng.choices(all_scenes(held_out=False), k=n)
        return render(scenes, rng)[share], [s.caption for s in scenes[share]]

    def validation(self, n: int) -> tuple[Tensor, list[str]]:
        """n held-out combinations; the same ones whenever asked."""
        rng = random.Random(0)
        scenes = rng.sample(all_scenes(held_out=True), min(n, len(all_scenes(held_out=True))))
        return render(scenes, rng), [s.caption for s in scenes]

    def prompts(self) -> list[str]:
        """What the sheets of a run show: held-out combinations."""
        return self.validation(18)[1]


def pick(pictures: Pictures, index: Sequence[int]) -> Pictures:
    """Some of the pictures."""
    return Pictures(
        pictures.pixels[list(index)],
        [pictures.captions[i] for i in index],
        [pictures.names[i] for i in index],
        [],
    )


class PictureSource:
    """Real pictures as a data source; without others for validation, every 20th is set aside."""

    def __init__(self, train: Pictures, val: Pictures | None):
        if val is None:
            n = len(train.captions)
            if n < 2:
                raise ValueError("one picture is too few: training and validation need one each at least")
            val = pick(train, range(0, n, 20))
            train = pick(train, [i for i in range(n) if i % 20])
        self.train, self.val, self.size = train, val, train.pixels.shape[-1]

    def sample(self, n: int, rng: random.Random, share: slice = ALL) -> tuple[Tensor, list[str]]:
        """`share` of n training pictures (n, 3, S, S), uint8, drawn with replacement, and their captions."""
        index = rng.choices(range(len(self.train.captions)), k=n)[share]
        return self.train.pixels[index], [self.train.captions[i] for i in index]

    def validation(self, n: int) -> tuple[Tensor, list[str]]:
        """n validation pictures; the same ones whenever asked."""
        order = random.Random(0).sample(range(len(self.val.captions)), min(n, len(self.val.captions)))
        return self.val.pixels[order], [self.val.captions[i] for i in order]

    def prompts(self) -> list[str]:
        """What the sheets of a run show: captions of training pictures, then of validation pictures."""
        seen = random.Random(0).sample(self.train.captions, min(9, len(self.train.captions)))
        return seen + self.validation(9)[1]


def main() -> None:
    """`python data.py encode ...`: see latents.py, which imports this file."""
    import latents

    latents.main()


if __name__ == "__main__":
    import cli

    cli.run(main)
