"""What the model reads: captioned shapes, text, and real pictures; latents; batches.

    shapes     the built-in pictures of world.py
    pictures   a folder of name.png + name.txt, a metadata.jsonl, or WebDataset tars
    batches    sequences of text ids and IMAGE, cut into the two phases of model.py
    tasks      caption, generate, edit, chat: what the second stage of training mixes

`python data.py encode --data ... --vae ... --base ... --out DIR` makes real pictures into shards of latents
and token ids, once, so that training decodes no picture again (latents.py).

Shapes: M pictures, S pixels a side; pictures are uint8 (M, 3, S, S); latents (M, C, h, w).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from attention import IMAGE, PAD, Tokens
from chat.template import IM_START, Picture, apply_chat_template, assistant_mask, encode
from diffusion import Diffusion, T
from model import ModelConfig
from scale.pictures import Edits, Pictures
from small.dialogues import KINDS, Shot, conversation, picture_conversation
from small.world import PIXELS, all_scenes, draw_edit, draw_shift, render

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
    max_t: Tensor  # (M,) exclusive upper end of the training timesteps; 0: stays clean, has no diffusion loss

    def noised(self, diffusion: Diffusion, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Eq. (2), where clean images stay clean and have t = 0: x_t, t, and the numbers of the others.

        Those are None if all are noisy. If none is, they are the first alone, whose loss must not count.
        """
        x_t, noisy = diffusion.q_sample(self.latents, t, eps), self.max_t > 0  # the latter in main memory
        if noisy.all():
            return x_t, t, None
        which = noisy.nonzero().squeeze(1) if noisy.any() else torch.tensor([0])
        keep = noisy.to(t.device)
        x_t = torch.where(keep[:, None, None, None], x_t, self.latents)
        return x_t, t * keep, which.to(t.device)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.prefix, self.rest, self.latents.to(device), self.max_t)


def split_phases(
    sequences: list[list[int]],
    num_patches: int,
    pack: int = 0,
    loss_mask: list[list[bool]] | None = None,
) -> tuple[Tokens, Tokens]:
    """Sequences of ids and IMAGE -> prefix and rest (see LMFusion.forward); `loss_mask` as in `Tokens`.

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
    cut = [s.index(IMAGE) if IMAGE in s else len(s) for s in sequences]

    def part(values: list[list], begins: bool) -> list[list[list]]:
        """What stands before each cut, or behind it, row by row."""
        return [[values[i][: cut[i]] if begins else values[i][cut[i] :] for i in row] for row in rows]

    own = [part(loss_mask, begins) if loss_mask else None for begins in (True, False)]
    prefix = Tokens.packed(part(sequences, True), num_patches, loss_mask=own[0])
    start = [[cut[i] for i in row] for row in rows]
    return prefix, Tokens.packed(part(sequences, False), num_patches, start, loss_mask=own[1])


def next_tokens(tokens: Tokens, boi_id: int) -> tuple[Tensor, Tensor]:
    """What each text token of `tokens` is to predict, in the order of `Hidden.text`: two tensors (T_text,).

    First the id of the next text token for L_LM, -100 where there is none to learn: no loss where the input
    is BOI, none at the end of a document or before padding, none where the next token is another speaker's,
    and BOI itself is no target of the frozen head.
    Second whether an image starts next (1, 0, or -100 at BOI and at the end), for the row that decides when
    to draw.
    """
    following = torch.full_like(tokens.ids, PAD)
    same = tokens.document[:, 1:] == tokens.document[:, :-1]
    following[:, :-1] = torch.where(same, tokens.ids[:, 1:], PAD)
    known = (tokens.ids >= 0) & (tokens.ids != boi_id) & (following >= 0)
    if tokens.loss_mask is not None:
        known[:, :-1] &= tokens.loss_mask[:, 1:]
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


# ------------------------------------------------------------------------------------------------------------
# Tasks of the second stage (Section 5.2; train.py --init-from DIR --task ...)

TASKS = ("caption", "generate", "edit", "chat")


def parse_tasks(text: str) -> dict[str, float]:
    """ "edit" or "generate=2,edit=1" -> the share of each task; ValueError names the choices."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, weight = (x.strip() for x in item.partition("="))
        if name not in TASKS:
            raise ValueError(f"--task {text}: {name!r} is not one of {', '.join(TASKS)}")
        try:
            shares[name] = float(weight) if "=" in item else 1.0
        except ValueError:
            raise ValueError(f"--task {text}: the weight {weight!r} of {name} is not a number") from None
        if not 0 < shares[name] < math.inf:
            raise ValueError(f"--task {text}: the weight of {name} must be positive")
    total = sum(shares.values())
    return {name: weight / total for name, weight in shares.items()}


@dataclass
class Document:
    """One sequence to train on, and what its images are."""

    ids: list[int]  # IMAGE stands for a picture
    pictures: list  # one for each IMAGE: what `pixels` of the source takes
    max_t: list[int]  # of each picture, as in `Batch`
    loss_mask: list[bool]  # of each id: whether the model is to say it

    def __len__(self) -> int:
        """Ids from the first picture on: what carries a gradient."""
        return len(self.ids) - (self.ids.index(IMAGE) if IMAGE in self.ids else len(self.ids))


def caption_document(
    picture, caption: list[int], order: str, config: ModelConfig, recipe: Recipe
) -> Document:
    """Caption and picture in one of the three orders, as in `arrange`; nothing is said about when to draw."""
    if order == BEHIND:
        ids = [config.boi_id, IMAGE, config.eoi_id, *caption, config.eos_id]
        return Document(ids, [picture], [recipe.noise_limit], [False] * 2 + [True] * (len(ids) - 2))
    ids = [*(caption if order == FIRST else []), config.boi_id, IMAGE]
    return Document(ids, [picture], [T], [False] * len(ids))


def edit_document(source, target, instruction: list[int], dropped: bool, config: ModelConfig) -> Document:
    """Section 5.2:  BOI | source | EOI instruction BOI | target.

    Our choice: without the instruction there is nothing to change, and the source itself is the target. That
    is what guidance compares with, so it strengthens the change and keeps the rest.
    """
    ids = [config.boi_id, IMAGE, config.eoi_id, *([] if dropped else instruction), config.boi_id, IMAGE]
    return Document(ids, [source, source if dropped else target], [0, T], [False] * len(ids))


def chat_document(
    messages: list[dict], dropped: bool, tokenizer: Tokenizer, config: ModelConfig, rng: random.Random
) -> Document:
    """A conversation up to a picture of its last message, which is to be painted; the others are clean.

    So training sees of every picture what sampling will: one noisy image, which comes last. A conversation
    that ends in words, and a quarter of the others, is read to its end with all pictures clean, for the text
    behind them and the decision to draw. dropped: BOI and the picture alone, for guidance.
    """
    pieces = apply_chat_template(messages, generate=False)
    pictures = [p.content for p in pieces if isinstance(p, Picture)]
    ids = encode(tokenizer, pieces, config.boi_id, config.eoi_id)
    own = assistant_mask(tokenizer, ids)
    places = [i for i, token in enumerate(ids) if token == IMAGE]
    last_turn = max(i for i, token in enumerate(ids) if token == tokenizer.token_to_id(IM_START))
    painted = [n for n, i in enumerate(places) if i > last_turn]  # in the assistant's last message
    if not painted or (rng.random() < 0.25 and not dropped):
        return Document(ids, pictures, [0] * len(pictures), own)
    n = max(rng.choice(painted), rng.choice(painted))  # rather a later one: words stand before it
    if dropped:
        return Document([config.boi_id, IMAGE], [pictures[n]], [T], [False] * 2)
    end = places[n] + 1
    return Document(ids[:end], pictures[: n + 1], [0] * n + [T], own[:end])


def collate(documents: list[Document], latents: Tensor, config: ModelConfig, pack: int = 0) -> Batch:
    """A batch of documents and the latents (M, C, h, w) of their pictures, in order.

    Every batch has an image, for the gradient of every module must exist in every process: where there is
    none, an empty clean one of its own.
    """
    sequences = [d.ids for d in documents]
    own, max_t = [d.loss_mask for d in documents], [t for d in documents for t in d.max_t]
    if not max_t:
        sequences, own, max_t = [*sequences, [config.boi_id, IMAGE]], [*own, [False, False]], [0]
        latents = torch.zeros(1, config.latent_channels, config.latent_size, config.latent_size)
    return Batch(*split_phases(sequences, config.num_patches, pack, own), latents, torch.tensor(max_t))


# ------------------------------------------------------------------------------------------------------------
# Sources


ALL = slice(None)  # of a batch: what one process does, where there is only one


# Shares of dialogues.KINDS in the second stage. Our choice: many stories, for nowhere else does a caption
# stand behind a picture that it does not describe.
TURNS = (3, 4, 8, 3, 3)


class Shapes:
    """The built-in pictures as a data source."""

    size = PIXELS

    def sample(self, n: int, rng: random.Random, share: slice = ALL) -> tuple[Tensor, list[str]]:
        """`share` of n training pictures (n, 3, 32, 32), uint8, and captions; the draw is that of all n."""
        scenes = rng.choices(all_scenes(held_out=False), k=n)
        return render(scenes, rng)[share], [s.caption for s in scenes[share]]

    def captioned(self, rng: random.Random) -> tuple[Shot, str]:
        """One training picture and its caption."""
        scene = rng.choice(all_scenes(held_out=False))
        return Shot(scene, draw_shift(rng)), scene.caption

    def edited(self, rng: random.Random) -> tuple[Shot, Shot, str]:
        """A training picture, the same with one attribute changed, and the instruction."""
        edit, shift = draw_edit(rng), draw_shift(rng)
        return Shot(edit.source, shift), Shot(edit.target, shift), edit.instruction

    def conversation(self, rng: random.Random) -> list[dict]:
        """Messages with Shots in them, of one to three turns."""
        kinds = rng.choices(KINDS, TURNS, k=rng.choices((1, 2, 3), (70, 25, 5))[0])
        return conversation(rng, thinking=rng.random() < 0.4, kinds=kinds)

    def validation_edits(self, n: int) -> tuple[list[Shot], list[Shot], list[str]]:
        """n edits to held-out scenes, as in `edited`; the same ones whenever asked."""
        rng = random.Random(0)
        edits = [(draw_edit(rng, held_out=True), draw_shift(rng)) for _ in range(n)]
        shots = [[Shot(e.source, s) for e, s in edits], [Shot(e.target, s) for e, s in edits]]
        return shots[0], shots[1], [e.instruction for e, _ in edits]

    def pixels(self, shots: list[Shot]) -> Tensor:
        """Shots -> uint8 (M, 3, 32, 32)."""
        return render([s.scene for s in shots], shifts=[s.shift for s in shots])

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
    """Real pictures as a data source; without others for validation, every 20th is set aside.

    With `edits` there are (image, instruction, image) triples as well, or alone; of those, too, every 20th
    is set aside.
    """

    def __init__(self, train: Pictures | None, val: Pictures | None, edits: Edits | None = None):
        self.edits = edits
        self.order = list(range(len(edits.instructions))) if edits else []
        self.order, self.held_out = [i for i in self.order if i % 20], self.order[::20]
        if edits and not self.order:
            raise ValueError("one edit is too few: training and validation need one each at least")
        if train is None:  # the pictures of the edits, and what was asked for
            train = Pictures(edits.targets, edits.instructions, edits.names, [])
        if val is None:
            n = len(train.captions)
            if n < 2:
                raise ValueError("one picture is too few: training and validation need one each at least")
            val = pick(train, range(0, n, 20))
            train = pick(train, [i for i in range(n) if i % 20])
        self.train, self.val, self.size = train, val, train.pixels.shape[-1]

    def captioned(self, rng: random.Random) -> tuple[Tensor, str]:
        """One training picture (3, S, S), uint8, and its caption."""
        i = rng.randrange(len(self.train.captions))
        return self.train.pixels[i], self.train.captions[i]

    def edited(self, rng: random.Random) -> tuple[Tensor, Tensor, str]:
        """A picture before and after, and the instruction."""
        i = rng.choice(self.order)
        return self.edits.sources[i], self.edits.targets[i], self.edits.instructions[i]

    def validation_edits(self, n: int) -> tuple[Tensor, Tensor, list[str]]:
        """Up to n edits that training never shows: every 20th."""
        index = self.held_out[:n]
        return (
            self.edits.sources[index],
            self.edits.targets[index],
            [self.edits.instructions[i] for i in index],
        )

    def conversation(self, rng: random.Random) -> list[dict]:
        """Messages around a captioned picture or, as often where there are some, an edit."""
        edit = self.edited(rng) if self.edits and rng.random() < 0.5 else None
        return picture_conversation(rng, *self.captioned(rng), edit)

    def pixels(self, pictures: list[Tensor]) -> Tensor:
        """(M, 3, S, S), uint8."""
        return torch.stack(list(pictures))

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
    from scale import latents

    latents.main()


if __name__ == "__main__":
    import cli

    cli.run(main)
