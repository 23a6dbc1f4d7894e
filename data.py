"""What the model reads: documents, and the one way from a document to a batch (Sections 2.3 and 4.1).

    source  --draws-->  captioned picture, edit, conversation, text
            --caption_document, edit_document, chat_document-->  Document
            --collate-->  Batch, cut into the two phases of LMFusion.forward

A *source* has the examples: the built-in shapes (small/shapes.py), real pictures, or latents on disk (both
scale/sources.py). Whatever it holds and whatever is trained, every example becomes a `Document` here, and
every document enters a batch through `collate`.

Shapes: M pictures of a batch, P patches of a picture; latents are (M, C, h, w).
"""

from __future__ import annotations

import json
import random
import reprlib
import sys
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from attention import IMAGE, PAD, Tokens, send
from chat.template import IM_END, IM_START, Picture, apply_chat_template, assistant_mask, encode
from config import Bar, TrainConfig, run_command, say_once
from diffusion import Diffusion, T
from load_qwen3 import encode_plain
from model import ModelConfig

if TYPE_CHECKING:
    from scale.parallel import Team

CAPTION_FIRST, CAPTION_DROPPED, IMAGE_FIRST = "caption first", "caption dropped", "image first"


class Source(Protocol):
    """Examples to train on. A `picture` is whatever `latents` of the same source takes."""

    # a training picture and its caption, as text or as token ids
    def captioned(self, rng: random.Random) -> tuple[Any, str | list[int]]: ...
    # a training picture before and after an edit, and the instruction
    def edited(self, rng: random.Random) -> tuple[Any, Any, str]: ...
    # messages (see chat/template.py) with training pictures in them
    def conversation(self, rng: random.Random) -> list[dict]: ...
    # up to n captioned pictures, or edits, that training never shows; the same ones whenever asked
    def validation(self, n: int) -> list[tuple[Any, str | list[int]]]: ...
    def validation_edits(self, n: int) -> list[tuple[Any, Any, str]]: ...
    # every caption, as text or as token ids, and every instruction that training may draw, the latter marked
    def words(self) -> Iterator[tuple[str | list[int], bool]]: ...
    # what the sheets of a run show
    def prompts(self) -> list[str]: ...
    # pictures -> clean latents (M, C, h, w), float32, in main memory; and -> uint8 (M, 3, S, S)
    def latents(self, pictures: list, codec: Any) -> Tensor: ...
    def pixels(self, pictures: list) -> Tensor: ...
    # what turns pixels into latents and back, after what a checkpoint says of a VAE (None: PatchPCA)
    def make_codec(self, config: TrainConfig, device: str) -> tuple[dict | None, Any]: ...
    # ValueError unless the source serves these tasks, and fits this model on the base `base`
    def check(self, config: TrainConfig, model: ModelConfig, base: str) -> None: ...
    # what tells one source from another: every process of a run must read the same
    def fingerprint(self) -> bytes: ...


class TextSource(Protocol):
    """Text alone, which only a text side that learns has use for (Section 4.2)."""

    # the ids of a text, with EOS, and which of them are learned
    def draw(self, rng: random.Random) -> tuple[list[int], list[bool]]: ...
    def fingerprint(self) -> bytes: ...


# ---- Documents ----


@dataclass
class Document:
    """One sequence to train on, and what its images are."""

    ids: list[int]  # IMAGE stands for a picture
    pictures: list  # one for each IMAGE: what `Source.latents` takes
    max_t: list[int]  # of each picture: its training timesteps are below this; 0: it is clean, without a loss
    loss_mask: list[bool]  # of each id: whether the model is to say it
    seed: int = 0  # of the pictures' noise


def caption_document(
    picture: Any,
    caption: list[int],
    order: str,
    config: ModelConfig,
    noise_limit: int = T,
    learn_caption: bool = True,
) -> Document:
    """A picture and its caption (ids), in one of three orders (Sections 2.3 and 4.1).

    caption first:    caption BOI | patches
    caption dropped:          BOI | patches
    image first:              BOI | patches EOI caption EOS      and timesteps below `noise_limit`

    Our choice: no EOI in the first two, for nothing behind their image has a loss. learn_caption = False: no
    loss on a caption before its picture, nor on the decision to draw there.
    """
    if order == IMAGE_FIRST:
        ids = [config.boi_id, IMAGE, config.eoi_id, *caption, config.eos_id]
        return Document(ids, [picture], [noise_limit], [True] * len(ids))
    ids = [*(caption if order == CAPTION_FIRST else []), config.boi_id, IMAGE]
    return Document(ids, [picture], [T], [learn_caption] * len(ids))


def edit_document(
    before: Any, after: Any, instruction: list[int], config: ModelConfig, dropped: bool = False
) -> Document:
    """Section 5.2:  BOI | before | EOI instruction BOI | after.

    Our choice: without the instruction there is nothing to change, and the picture before is the target. That
    is what guidance compares with, so it strengthens the change and keeps the rest.
    """
    ids = [config.boi_id, IMAGE, config.eoi_id, *([] if dropped else instruction), config.boi_id, IMAGE]
    return Document(ids, [before, before if dropped else after], [0, T], [False] * len(ids))


def chat_document(
    messages: list[dict], tokenizer: Tokenizer, config: ModelConfig, rng: random.Random, dropped: bool = False
) -> Document:
    """A conversation up to a picture of its last message, which is to be painted; the others are clean.

    So training sees of every picture what sampling will: one noisy image, which comes last. A conversation
    that ends in words, and a quarter of the others, is read to its end with all pictures clean, for the text
    behind them and the decision to draw. dropped: BOI and the picture alone, for guidance.
    """
    pieces = apply_chat_template(messages, generate=False)
    pictures = [p.content for p in pieces if isinstance(p, Picture)]
    ids = encode(tokenizer, pieces, config.boi_id, config.eoi_id)
    loss_mask = assistant_mask(tokenizer, ids)
    places = [i for i, token in enumerate(ids) if token == IMAGE]
    if len(ids) + len(places) * (config.num_patches - 1) > config.max_position_embeddings:
        known = f"{config.max_position_embeddings} tokens for which the base was made"
        say_once(f"note: a conversation is longer than the {known}; such are trained on whole")
    last_turn = max(i for i, token in enumerate(ids) if token == tokenizer.token_to_id(IM_START))
    painted = [n for n, i in enumerate(places) if i > last_turn]  # in the assistant's last message
    if not painted or (rng.random() < 0.25 and not dropped):
        return Document(ids, pictures, [0] * len(pictures), loss_mask)
    n = max(rng.choice(painted), rng.choice(painted))  # rather a later one: words stand before it
    if dropped:
        return Document([config.boi_id, IMAGE], [pictures[n]], [T], [False] * 2)
    end = places[n] + 1
    return Document(ids[:end], pictures[: n + 1], [0] * n + [T], loss_mask[:end])


class Documents:
    """The training documents of a run: which example becomes what, and what of it is dropped.

    Everything random about a document follows from the seed of the run, the step, and the document's number
    in the batch. It does not depend on how many processes share the batch, or on micro batches.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        source: Source,
        text: TextSource | None = None,
    ):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.source, self.text = source, text
        self.context = context_length(config, model)
        self.room = self.context - model.num_patches - 3  # for a caption, beside BOI, EOI and EOS
        if self.room < 1:
            found = f"{config.base or 'the base'}: a context of {self.context} tokens (--pack, "
            need = f"leaves no room for a caption beside the {model.num_patches} patches of a picture"
            raise ValueError(f"{found}max_position_embeddings) {need}")
        for token in (IM_START, IM_END):
            if "chat" in config.tasks and tokenizer.token_to_id(token) is None:
                raise ValueError(f"--task chat: the base has no chat tokens ({token})")
        self.encode = lru_cache(2**16)(partial(encode_plain, tokenizer))  # captions come again

    def limit(self, pictures: int) -> int:
        """Tokens for which the context has room beside so many pictures, at least 1."""
        return max(1, self.room - (pictures - 1) * (self.model.num_patches + 1))

    def all_ids(self, caption: str | list[int]) -> list[int]:
        """Token ids of a caption."""
        return self.encode(caption) if isinstance(caption, str) else caption

    def tokenise(self, caption: str | list[int], pictures: int = 1) -> list[int]:
        """Token ids of a caption; one that leaves no room for `pictures` pictures in the context is cut."""
        return self.all_ids(caption)[: self.limit(pictures)]

    def fits(self, caption: str | list[int], pictures: int = 1) -> bool:
        """Whether `tokenise` leaves a caption whole."""
        # few bytes are few tokens, also after NFC, which makes three of one at most
        few = isinstance(caption, str) and 3 * len(caption.encode()) <= self.limit(pictures)
        return few or len(self.all_ids(caption)) <= self.limit(pictures)

    def tell_cuts(self) -> None:
        """Say on stderr how many captions and instructions are cut, where to, and which is the first."""
        kinds = ("captions", 1, {"caption", "generate"}), ("instructions", 2, {"edit"})
        for what, pictures, tasks in kinds:
            every = [text for text, of_edit in self.source.words() if of_edit == (pictures == 2)]
            drawn = not tasks.isdisjoint(self.config.tasks)
            if drawn and (cut := [text for text in every if not self.fits(text, pictures)]):
                first = cut[0] if isinstance(cut[0], str) else self.tokenizer.decode(cut[0])
                found = f"note: {len(cut):,} of {len(every):,} {what} are cut to their first"
                why = f"the context being {self.context} (--pack, or the base's)"
                limit = f"{self.limit(pictures)} tokens, {why}"
                print(f"{found} {limit}; the first is {reprlib.repr(first)}", file=sys.stderr)

    def draw(self, rng: random.Random) -> Document:
        """One document of the mixture of tasks.

        Our choice: some edits are BOI and the picture after alone (5%, as in InstructPix2Pix). Guidance over
        the picture subtracts that, and where edits are all that is trained, nothing else trains it.
        """
        config, source = self.config, self.source
        task = rng.choices(list(config.tasks), list(config.tasks.values()))[0]
        u = rng.random()
        dropped = u < (config.edit_drop if task == "edit" else config.caption_drop)
        if task == "chat":
            return chat_document(source.conversation(rng), self.tokenizer, self.model, rng, dropped)
        if task == "edit":
            before, after, instruction = source.edited(rng)
            if u > 1 - config.edit_empty:
                return caption_document(after, [], CAPTION_DROPPED, self.model, learn_caption=False)
            return edit_document(before, after, self.tokenise(instruction, 2), self.model, dropped)
        picture, caption = source.captioned(rng)
        order = IMAGE_FIRST if task == "caption" else CAPTION_DROPPED if dropped else CAPTION_FIRST
        alone = set(config.tasks) <= {"caption", "generate"}  # beside conversations, these say when to draw
        ids = self.tokenise(caption)
        return caption_document(picture, ids, order, self.model, config.noise_limit, learn_caption=alone)

    def of_step(self, step: int, share: slice) -> list[Document]:
        """A process's share of the documents of a step, each with the seed of its noise."""
        documents = []
        for number in range(self.config.batch_size)[share]:
            rng = random.Random(f"{self.config.seed}-{step}-{number}")
            documents.append(self.draw(rng))
            documents[-1].seed = rng.getrandbits(63)
        return documents

    def share_of_step(self, step: int, team: Team) -> tuple[list[Document], list[Document]]:
        """A process's documents of a step: those of `of_step`, and those of `text_of_step`."""
        pictures, text = team.share(self.config.batch_size), team.share(self.config.text_batch)
        return self.of_step(step, pictures), self.text_of_step(step, text)

    def text_of_step(self, step: int, share: slice) -> list[Document]:
        """Likewise the documents of text alone; of one longer than the context, a piece of that length."""
        documents = []
        for number in range(self.config.text_batch)[share]:
            rng = random.Random(f"text {self.config.seed}-{step}-{number}")
            ids, mask = self.text.draw(rng)
            start = self.context * rng.randrange(-(-len(ids) // self.context))
            piece = slice(start, start + self.context)
            documents.append(Document(ids[piece], [], [], mask[piece]))
        return documents

    def validation(self, n: int) -> tuple[list[Document], list[Document]]:
        """Up to n fixed documents under the right caption, and the same under another one, if there is one.

        Where edits are all that is trained, they are edits: the context is the picture before.
        """
        edits = set(self.config.tasks) == {"edit"}
        examples = self.source.validation_edits(n) if edits else self.source.validation(n)

        captions = [self.tokenise(caption, 2 if edits else 1) for *_, caption in examples]

        def make(number: int, caption: list[int]) -> Document:
            *pictures, _ = examples[number]
            if edits:
                document = edit_document(*pictures, caption, self.model)
            else:
                document = caption_document(*pictures, caption, CAPTION_FIRST, self.model)
            document.seed = number
            return document

        right, others = ([make(*x) for x in enumerate(ids)] for ids in (captions, permuted(captions)))
        return right, others


def permuted(captions: list) -> list:
    """In place of each caption the next one that is another; [] where all are alike."""
    if all(c == captions[0] for c in captions):
        return []
    return [next(c for c in captions[i:] + captions[:i] if c != own) for i, own in enumerate(captions)]


def context_length(config: TrainConfig, model: ModelConfig) -> int:
    """Tokens of the longest document: those of a sequence, or of the base's context."""
    return min(model.max_position_embeddings, config.pack or model.max_position_embeddings)


class Paragraphs:
    """Text of the user's own as a `TextSource`, in pieces of `context` tokens: all of it is read alike."""

    def __init__(self, paragraphs: list[str], tokenizer: Tokenizer, eos_id: int, context: int):
        self.paragraphs = paragraphs
        self.pieces: list[array[int]] = []  # 4 bytes a token
        for text in Bar(paragraphs, desc="text", unit="paragraph"):
            ids = array("i", [*encode_plain(tokenizer, text), eos_id])
            self.pieces += [ids[i : i + context] for i in range(0, len(ids), context)]

    def draw(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        ids = rng.choice(self.pieces).tolist()
        return ids, [True] * len(ids)

    def fingerprint(self) -> bytes:
        return json.dumps(self.paragraphs).encode()


# ---- Batches ----


@dataclass
class Targets:
    """What the text of a `Tokens` has to learn (see `next_tokens`), and at which rows of `Hidden.text`."""

    word_at: Tensor  # (W,)
    word: Tensor  # (W,) the id that comes next
    draw_at: Tensor  # (K,)
    draw: Tensor  # (K,) 1.0 where an image comes next, else 0.0


@dataclass
class Batch:
    """Sequences cut into the two phases of `LMFusion.forward`, their images in row order, and the noise."""

    prefix: Tokens  # all text before the first image
    rest: Tokens  # the first image and everything after it
    latents: Tensor  # (M, C, h, w), clean
    max_t: Tensor  # (M,) as in `Document`, in main memory
    u: Tensor  # (M,) uniform in 0 .. 1: the timestep is u max_t
    eps: Tensor  # (M, C, h, w) standard normal
    before: Targets  # of `prefix`
    behind: Targets  # of `rest`
    layouts: tuple | None = None  # of `LMFusion.layouts`, where they are made ahead

    def noised(self, diffusion: Diffusion, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Eq. (2), where clean images stay clean and have t = 0: x_t, t, and the numbers of the others.

        Those are None if all are noisy. If none is, they are the first alone, whose loss must not count.
        """
        x_t, noisy = diffusion.q_sample(self.latents, t, self.eps), self.max_t > 0
        if noisy.all():
            return x_t, t, None
        which = noisy.nonzero().squeeze(1) if noisy.any() else torch.tensor([0])
        keep = send(noisy, t.device)
        x_t = torch.where(keep[:, None, None, None], x_t, self.latents)
        return x_t, t * keep, send(which, t.device)

    def to(self, device: torch.device | str) -> Batch:
        """With latents, noise and targets on a device; tokens and max_t are a plan, and stay."""
        move = partial(send, device=device)
        latents, u, eps = map(move, (self.latents, self.u, self.eps))
        before, behind = (Targets(*map(move, vars(x).values())) for x in (self.before, self.behind))
        return Batch(self.prefix, self.rest, latents, self.max_t, u, eps, before, behind, self.layouts)


def draw_noise(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """For M latents of `shape` (M, C, h, w): u (M,) uniform in 0 .. 1, which becomes t, and eps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape[0], generator=generator), torch.randn(shape, generator=generator)


def collate(documents: list[Document], latents: Tensor, config: ModelConfig, pack: int = 0) -> Batch:
    """A batch of documents and the latents (M, C, h, w) of their pictures, in order.

    Every batch has an image, for the gradient of every module must exist in every process: where there is
    none, an empty clean one of its own.
    """
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    if not any(d.pictures for d in documents):
        documents = [*documents, Document([config.boi_id, IMAGE], [None], [0], [False, False])]
        latents = torch.zeros(1, *shape)
    noise = [draw_noise((len(d.pictures), *shape), d.seed) for d in documents if d.pictures]
    u, eps = (torch.cat(x) for x in zip(*noise, strict=True))
    max_t = torch.tensor([t for d in documents for t in d.max_t])
    prefix, rest = split_phases(documents, config.num_patches, pack)
    before, behind = find_targets(prefix, config.boi_id), find_targets(rest, config.boi_id)
    return Batch(prefix, rest, latents, max_t, u, eps, before, behind)


def make_batches(
    documents: list[Document], source: Source, codec: Any, config: ModelConfig, size: int = 0, pack: int = 0
) -> list[Batch]:
    """Documents in batches of `size` (0: one); those of like length together, which saves padding."""
    if 0 < size < len(documents):
        P = config.num_patches
        documents = sorted(documents, key=lambda d: len(d.ids) + len(d.pictures) * (P - 1))
    batches, size = [], size or max(1, len(documents))
    for i in range(0, len(documents), size):
        part = documents[i : i + size]
        pictures = [p for d in part for p in d.pictures]
        latents = source.latents(pictures, codec) if pictures else torch.zeros(0)
        batches.append(collate(part, latents, config, pack))
    return batches


class Ahead:
    """What `make(step)` gives, made by a thread of its own while the step before it computes."""

    def __init__(self, make: Callable[[int], list[Batch]]):
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else -1  # as in this thread
        self.make, self.thread = make, ThreadPoolExecutor(1, "", torch.cuda.set_device, (gpu,))
        self.step, self.future = -1, Future()

    def take(self, step: int) -> list[Batch]:
        """That of `step`, or the error that making it raised; that of the next one is begun."""
        if self.step != step:  # the first one, or not the one that was to be expected
            self.future = self.thread.submit(self.make, step)
        batches = self.future.result()
        self.step, self.future = step + 1, self.thread.submit(self.make, step + 1)
        return batches


def split_phases(documents: list[Document], num_patches: int, pack: int = 0) -> tuple[Tokens, Tokens]:
    """Documents -> prefix and rest, cut before each one's first IMAGE (see LMFusion.forward).

    pack > 0: neighbours share a row, as documents of their own, as long as they have `pack` tokens together.
    Their order stays, so that their images stay in row order.
    """
    rows: list[list[Document]] = []
    room = 0
    for document in documents:
        length = len(document.ids) + document.ids.count(IMAGE) * (num_patches - 1)
        if length > room:
            rows.append([])
            room = pack
        rows[-1].append(document)
        room -= length
    start = [[d.ids.index(IMAGE) if IMAGE in d.ids else len(d.ids) for d in row] for row in rows]

    def part(name: str, behind: bool) -> list[list[list]]:
        """Ids or loss masks from each cut on, or up to it."""
        both = (zip(row, cuts, strict=True) for row, cuts in zip(rows, start, strict=True))
        cut = (lambda x, i: x[i:]) if behind else (lambda x, i: x[:i])
        return [[cut(getattr(d, name), i) for d, i in row] for row in both]

    prefix = Tokens.packed(part("ids", False), num_patches, loss_mask=part("loss_mask", False))
    rest = Tokens.packed(part("ids", True), num_patches, start, loss_mask=part("loss_mask", True))
    return prefix, rest


def next_tokens(tokens: Tokens, boi_id: int) -> tuple[Tensor, Tensor]:
    """What each text token of `tokens` is to predict, in the order of `Hidden.text`: two tensors (T_text,).

    First the id of the next text token for L_LM, -100 where there is none to learn: no loss where the input
    is BOI, none at the end of a document or before padding, none where the loss mask excludes the next token,
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


def find_targets(tokens: Tokens, boi_id: int) -> Targets:
    """`next_tokens` where there is something to learn."""
    word, draw = next_tokens(tokens, boi_id)
    word_at, draw_at = ((x >= 0).nonzero().squeeze(1) for x in (word, draw))
    return Targets(word_at, word[word_at], draw_at, draw[draw_at].float())


def main() -> None:
    """`python data.py encode ...`: pictures into shards of latents and token ids, once (scale/latents.py)."""
    from scale import latents

    latents.main()


if __name__ == "__main__":
    run_command(main)
