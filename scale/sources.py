"""Real pictures, and latents of them on disk, as sources of training data (see data.Source): `--data PATH`.

    PictureSource   pictures in memory (pictures.py); a picture is uint8 (3, S, S)
    LatentSource    shards of latents, mapped (latents.py); a picture is a number

Without --val-data every 20th picture is set aside for validation, with all its captions; two files that show
the same are one picture. Edits are set aside by the picture before them. Their pictures are not trained on,
and an edit that has one picture there and one in training is left out.
"""

import hashlib
import json
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from config import TrainConfig
from data import Paragraphs, Source, TextSource, context_length
from evaluate import read_paragraphs
from load_qwen3 import SHIPPED, init_image, resolve
from model import LMFusion, ModelConfig
from scale.latents import CAPTIONED, TARGET, LatentShards, latent_folders, tokenizer_fingerprint
from scale.parallel import Team
from scale.pictures import Pictures, list_samples, load_edits, load_pictures
from scale.vae import AutoencoderKL, PatchPCA, load_vae, make_codec, vae_entry
from small.dialogues import picture_conversation
from small.pretrain import BuiltInText, init_text
from small.shapes import Shapes
from small.world import PIXELS


def open_source(config: TrainConfig) -> Source:
    """What --data and --val-data name; ValueError if it is nothing that can be trained on."""
    if not config.data:
        what = "pictures (a folder, a metadata.jsonl, WebDataset tars), or latents that `data.py encode` made"
        raise ValueError(f"--data is missing: {what}")
    if config.data == "shapes":
        if config.val_data:
            raise ValueError(f"--val-data {config.val_data} is for --data: the shapes hold out their own")
        if config.image_size != PIXELS:
            raise ValueError(f"the built-in shapes have {PIXELS} pixels; --image-size is {config.image_size}")
        return Shapes()
    if latent_folders(config.data):
        val = LatentShards(config.val_data) if config.val_data else None
        return LatentSource(LatentShards(config.data), val)
    has_edits = "chat" in config.tasks and any(s.kind == "edit" for s in list_samples([config.data]))
    edits = load_edits(config.data, config.image_size) if "edit" in config.tasks or has_edits else None
    alone = set(config.tasks) == {"edit"}
    if alone and config.val_data:
        instead = "of edits alone, every 20th edit of --data is set aside"
        raise ValueError(f"--val-data {config.val_data} goes with captioned pictures; {instead}")
    val = load_pictures(config.val_data, config.image_size) if config.val_data else None
    return PictureSource(None if alone else load_pictures(config.data, config.image_size), val, edits)


def open_text(config: TrainConfig, tokenizer: Tokenizer, model: ModelConfig) -> TextSource:
    """What --text-data names: paragraphs of a file, or the built-in text."""
    if not config.text_data:
        return BuiltInText(tokenizer)
    paragraphs = read_paragraphs(config.text_data, "--text-data")
    return Paragraphs(paragraphs, tokenizer, model.eos_id, context_length(config, model))


def find_base(config: TrainConfig, team: Team, former: object = None) -> str:
    """The base: --base, or that of the run that is resumed, or the tiny one; one process downloads it."""
    base = config.base or (former if isinstance(former, str) else "") or SHIPPED[0]
    team.main_first(lambda: resolve(base))
    return base


def init_from_scratch(model: LMFusion) -> None:
    """Random text weights in the base's place, and image experts copied from them, as Transfusion begins."""
    init_text(model)
    init_image(model)


class PictureSource:
    """Captioned pictures, and edits (image, instruction, image) as well, or edits alone."""

    def __init__(self, train: Pictures | None, val: Pictures | None, edits: Pictures | None = None):
        train = train or edits  # edits alone: the pictures after them, and what was asked for
        self.train, self.val, self.edits = train, val or train, edits
        shown, others = digests(train.pixels), digests(val.pixels) if val else []
        before, after = (digests(edits.sources), digests(edits.pixels)) if edits else ([], [])
        self.digests = [*shown, *others, *before, *after]
        found = split_examples(shown, list(zip(before, after, strict=True)), others, "")
        self.rows, self.val_rows, self.edit_rows, self.val_edit_rows = found

    def captioned(self, rng: random.Random) -> tuple[Tensor, str]:
        i = rng.choice(self.rows)
        return self.train.pixels[i], self.train.captions[i]

    def edit(self, i: int) -> tuple[Tensor, Tensor, str]:
        return self.edits.sources[i], self.edits.pixels[i], self.edits.captions[i]

    def edited(self, rng: random.Random) -> tuple[Tensor, Tensor, str]:
        return self.edit(rng.choice(self.edit_rows))

    def conversation(self, rng: random.Random) -> list[dict]:
        """One turn around a captioned picture or, as often where there are some, an edit."""
        edit = self.edited(rng) if self.edits and rng.random() < 0.5 else None
        return picture_conversation(rng, *self.captioned(rng), edit)

    def validation(self, n: int) -> list[tuple[Tensor, str]]:
        rows = random.Random(0).sample(self.val_rows, min(n, len(self.val_rows)))
        return [(self.val.pixels[i], self.val.captions[i]) for i in rows]

    def validation_edits(self, n: int) -> list[tuple[Tensor, Tensor, str]]:
        return [self.edit(i) for i in self.val_edit_rows[:n]]

    def words(self) -> Iterator[tuple[str, bool]]:
        yield from ((self.train.captions[i], False) for i in self.rows)
        if self.edits:
            yield from ((self.edits.captions[i], True) for i in self.edit_rows)

    def prompts(self) -> list[str]:
        """Captions of training pictures, then of validation pictures."""
        seen = random.Random(0).sample(self.rows, min(9, len(self.rows)))
        return [self.train.captions[i] for i in seen] + [caption for _, caption in self.validation(9)]

    def sample(self, n: int, rng: random.Random) -> tuple[Tensor, list[str]]:
        """n training pictures (n, 3, S, S), uint8, drawn with replacement, and their captions."""
        rows = rng.choices(self.rows, k=n)
        return self.train.pixels[rows], [self.train.captions[i] for i in rows]

    def pixels(self, pictures: list[Tensor]) -> Tensor:
        return torch.stack(list(pictures))

    def latents(self, pictures: list[Tensor], codec: PatchPCA | AutoencoderKL) -> Tensor:
        return codec.encode(self.pixels(pictures)).cpu()

    def make_codec(self, config: TrainConfig, device: str) -> tuple[dict | None, PatchPCA | AutoencoderKL]:
        return make_codec(config, self.sample, device)

    def check(self, config: TrainConfig, model: ModelConfig, base: str) -> None:
        """Any model; what the tasks need was loaded, or was an error."""

    def fingerprint(self) -> bytes:
        texts = [self.train.captions, self.val.captions, self.edits.captions if self.edits else []]
        return hashlib.sha256(json.dumps(texts).encode() + b"".join(self.digests)).digest()


def split_examples(
    shown: list, pairs: list[tuple], others: list, where: str
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Numbers of what trains and what validates, of captioned pictures `shown` and of edits `pairs`.

    All are digests of pictures; no picture is on both sides. `others` are those of --val-data, if it is
    given: then they validate, and of --data edits alone are set aside. ValueError if a side has nothing.
    """
    before = every_20th(source for source, _ in pairs)
    held_out = {x for pair in pairs if pair[0] in before for x in pair}
    if not others:
        edited = set(chain(*pairs))
        held_out |= every_20th(x for x in shown if x not in edited)
        if held_out.isdisjoint(shown):  # all of them are pictures of edits to train on
            held_out.add(shown[0])
    rows = [i for i, x in enumerate(shown) if x not in held_out]
    val_rows = first_rows(others or [x if x in held_out else None for x in shown])
    edit_rows = [i for i, pair in enumerate(pairs) if held_out.isdisjoint(pair)]
    val_edit_rows = [i for i, pair in enumerate(pairs) if held_out.issuperset(pair)]
    if pairs:
        check_split(edit_rows, val_edit_rows, f"edits{where}")
    check_split(rows, val_rows, f"pictures{where}")
    if n := len(pairs) - len(edit_rows) - len(val_edit_rows):
        left = f"left out {n:,} of {len(pairs):,} edits"
        print(f"{left}: one picture is validation's, one training's", file=sys.stderr)
    trained = {shown[i] for i in rows}.union(*(pairs[i] for i in edit_rows))
    if n := len(trained.intersection(others)):
        print(f"{n:,} pictures of --val-data are in --data as well, and trained on", file=sys.stderr)
    return rows, val_rows, edit_rows, val_edit_rows


def digests(pictures: Iterable[Tensor]) -> list[bytes]:
    """Of each picture or latent what tells it from others: the same for the same numbers."""
    return [hashlib.sha256(x.numpy().tobytes()).digest() for x in pictures]


def rows_of(shards: LatentShards) -> tuple[list[int], list[int]]:
    """Rows of captioned pictures, and of the pictures after edits; of edits alone, these are both."""
    kinds = shards.column("kinds") or [CAPTIONED] * len(shards)
    captioned, targets = ([i for i, k in enumerate(kinds) if k == kind] for kind in (CAPTIONED, TARGET))
    return captioned or targets, targets


def picture_digests(shards: LatentShards) -> list:
    """Of each row what tells its picture from others.

    Shards of before it was stored have the latents alone, which are rounded: in another batch a VAE may give
    a picture slightly other numbers.
    """
    if found := shards.column("pictures"):
        return found
    while len(found) < len(shards):
        z = shards.find(len(found))[0]["latents"][:].float()  # of one shard, (n, C, h, w)
        found += digests((32 * F.adaptive_avg_pool2d(z, 4)).round().to(torch.int16))
    return found


def every_20th(pictures: Iterable[bytes]) -> set[bytes]:
    """Every 20th of different pictures, in the order in which they first come."""
    return set(list(dict.fromkeys(pictures))[::20])


def first_rows(pictures: Iterable[bytes | None]) -> list[int]:
    """The number of the first row of each picture, in order; None is no picture."""
    rows: dict[bytes, int] = {}
    for i, picture in enumerate(pictures):
        if picture is not None:
            rows.setdefault(picture, i)
    return list(rows.values())


def check_split(train: list[int], val: list[int], what: str) -> None:
    """ValueError if one side has nothing."""
    if not train or not val:
        need = "training and validation need at least one each, without a picture in common"
        raise ValueError(f"too few {what}: {need}")


class LatentSource:
    """Latents on disk. A training picture is its number i, a validation picture -1 - i."""

    def __init__(self, train: LatentShards, val: LatentShards | None = None):
        self.train, self.val = train, val or train
        for name in ("vae_fingerprint", "tokenizer_fingerprint", "image_size"):
            ours, theirs = getattr(self.train, name), getattr(self.val, name)
            if ours != theirs:
                found = f"{name} is {ours} and {theirs}"
                raise ValueError(f"{train.folder} and {self.val.folder} were not encoded alike: {found}")
        shown, targets = rows_of(train)
        others = rows_of(val)[0] if val else []
        same, known = picture_digests(train), picture_digests(val) if val else []
        ours, theirs = [same[i] for i in shown], [known[i] for i in others]
        pairs = [(same[i - 1], same[i]) for i in targets]
        rows, val_rows, edits, val_edits = split_examples(ours, pairs, theirs, f" in {train.folder}")
        self.rows = [shown[i] for i in rows]
        self.edit_rows, self.val_edit_rows = [targets[i] for i in edits], [targets[i] for i in val_edits]
        self.val_rows = [(others if val else shown)[i] for i in val_rows]

    def captioned(self, rng: random.Random) -> tuple[int, list[int]]:
        i = rng.choice(self.rows)
        return i, self.train.part(i, "ids", "offsets")

    def edited(self, rng: random.Random) -> tuple[int, int, list[int]]:
        i = rng.choice(self.edit_rows)
        return i - 1, i, self.train.part(i, "ids", "offsets")

    def conversation(self, rng: random.Random) -> list[dict]:
        """As of pictures: `PictureSource.conversation`."""
        edit = None
        if self.edit_rows and rng.random() < 0.5:
            i = rng.choice(self.edit_rows)
            edit = i - 1, i, self.train.caption(i)
        i = rng.choice(self.rows)
        return picture_conversation(rng, i, self.train.caption(i), edit)

    def validation_edits(self, n: int) -> list[tuple[int, int, list[int]]]:
        return [(i - 1, i, self.train.part(i, "ids", "offsets")) for i in self.val_edit_rows[:n]]

    def pixels(self, pictures: list[int]) -> Tensor:
        """What the VAE makes of the latents."""
        return self.codec.decode(self.latents(pictures, self.codec))

    def validation(self, n: int) -> list[tuple[int, list[int]]]:
        rows = random.Random(0).sample(self.val_rows, min(n, len(self.val_rows)))
        return [(-1 - i, self.val.part(i, "ids", "offsets")) for i in rows]

    def words(self) -> Iterator[tuple[list[int], bool]]:
        rows = chain(((i, False) for i in self.rows), ((i, True) for i in self.edit_rows))
        return ((self.train.part(i, "ids", "offsets"), of_edit) for i, of_edit in rows)

    def prompts(self) -> list[str]:
        """Captions of training pictures, then of validation pictures."""
        seen = random.Random(0).sample(self.rows, min(9, len(self.rows)))
        captions = [self.train.caption(i) for i in seen]
        return captions + [self.val.caption(-1 - i) for i, _ in self.validation(9)]

    def latents(self, pictures: list[int], codec: AutoencoderKL) -> Tensor:
        if pictures[0] < 0:
            return self.val.read([-1 - i for i in pictures])[0]
        return self.train.read(pictures)[0]

    def make_codec(self, config: TrainConfig, device: str) -> tuple[dict | None, AutoencoderKL]:
        path = config.vae or self.train.vae
        codec = load_vae(path, device=device)
        if codec.fingerprint() != self.train.vae_fingerprint:
            made = f"the latents of {config.data}, {self.train.vae}"
            raise ValueError(f"--vae {path} is not the one that made {made}")
        codec.bound = self.train.bound
        self.codec = codec
        return vae_entry(path, codec), codec

    def check(self, config: TrainConfig, model: ModelConfig, base: str) -> None:
        """What the tasks need, of the model's size and tokenizer; `make_codec` has compared the VAE."""
        if "edit" in config.tasks and not self.edit_rows:
            raise ValueError(f"--task {config.task}: {config.data} holds no edits")
        if config.image_size != self.train.image_size:
            found = f"{config.data} holds pictures of {self.train.image_size} pixels"
            raise ValueError(f"{found}; --image-size is {config.image_size}")
        if self.train.tokenizer_fingerprint != tokenizer_fingerprint(base):
            theirs = f"captions by the tokenizer of {self.train.base}"
            raise ValueError(f"{config.data}: {theirs}, and that of {base} is another (--base)")
        if self.train.vocab_size > model.vocab_size:
            theirs = f"a vocabulary of {self.train.vocab_size} tokens"
            raise ValueError(f"{config.data}: {theirs}, the model has {model.vocab_size} (--base)")

    def fingerprint(self) -> bytes:
        return b"".join(path.read_bytes() for s in (self.train, self.val) for path in s.indices)
