"""Real pictures, and latents of them on disk, as sources of training data (see data.Source): `--data PATH`.

    PictureSource   pictures in memory (pictures.py); a picture is uint8 (3, S, S)
    LatentSource    shards of latents, mapped (latents.py); a picture is a number

Without --val-data every 20th example is set aside for validation.
"""

import hashlib
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import TrainConfig
from data import Paragraphs, Source, TextSource
from evaluate import read_paragraphs
from load_qwen3 import init_image, resolve
from model import LMFusion, ModelConfig
from scale.latents import INDEX, LatentShards
from scale.parallel import Team
from scale.pictures import Edits, Pictures, list_samples, load_edits, load_pictures
from scale.vae import AutoencoderKL, PatchPCA, load_vae, make_codec, vae_entry
from small.dialogues import picture_conversation
from small.pretrain import BuiltInText, ensure_base, init_text
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
    folder = Path(config.data)
    if (folder / INDEX).is_file() or any(folder.glob("shard-*.safetensors")):
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


def open_text(config: TrainConfig, tokenizer: Tokenizer, eos_id: int) -> TextSource:
    """What --text-data names: paragraphs of a file, or the built-in text."""
    if not config.text_data:
        return BuiltInText(tokenizer)
    return Paragraphs(read_paragraphs(config.text_data, "--text-data"), tokenizer, eos_id)


def find_base(config: TrainConfig, team: Team, former: object = None) -> str:
    """The base (`former`: where a resumed run had the tiny one); one process makes it, the others wait."""
    base = config.base
    for main_first in (True, False):
        if team.is_main == main_first:
            if config.base:
                resolve(config.base)
            elif isinstance(former, str) and Path(former).is_dir():
                base = former
            else:
                base = str(ensure_base(config.seed))
        team.wait()
    return base


def init_from_scratch(model: LMFusion) -> None:
    """Random text weights in the base's place, and image experts copied from them, as Transfusion begins."""
    init_text(model)
    init_image(model)


class PictureSource:
    """Captioned pictures, and edits (image, instruction, image) as well, or edits alone."""

    def __init__(self, train: Pictures | None, val: Pictures | None, edits: Edits | None = None):
        if train is None:  # the pictures of the edits, and what was asked for
            train = Pictures(edits.targets, edits.instructions, edits.names, [])
        self.train, self.val, self.edits = train, val or train, edits
        found = set_aside(len(edits.instructions), "one edit") if edits else ([], [])
        self.edit_rows, self.val_edit_rows = found
        self.rows, self.val_rows = set_aside(len(train.captions), "one picture", val and len(val.captions))

    def captioned(self, rng: random.Random) -> tuple[Tensor, str]:
        i = rng.choice(self.rows)
        return self.train.pixels[i], self.train.captions[i]

    def edit(self, i: int) -> tuple[Tensor, Tensor, str]:
        return self.edits.sources[i], self.edits.targets[i], self.edits.instructions[i]

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
        train, val, edits = self.train, self.val, self.edits
        texts, pixels = [train.captions, val.captions], [train.pixels, val.pixels]
        if edits is not None:
            texts, pixels = [*texts, edits.instructions], [*pixels, edits.sources, edits.targets]
        digest = hashlib.sha256(json.dumps(texts).encode())
        for x in pixels:
            digest.update(x.numpy())
        return digest.digest()


def set_aside(n: int, one: str, others: int | None = None) -> tuple[list[int], list[int]]:
    """Numbers of the examples (of n) to train on, and to validate with: every 20th, or all `others`."""
    if others is not None:
        return list(range(n)), list(range(others))
    if n < 2:
        raise ValueError(f"{one} is too few: training and validation need one each at least")
    return [i for i in range(n) if i % 20], list(range(0, n, 20))


class LatentSource:
    """Latents on disk. A training picture is its number i, a validation picture -1 - i."""

    def __init__(self, train: LatentShards, val: LatentShards | None = None):
        self.train, self.val = train, val or train
        for name in ("vae_fingerprint", "tokenizer_fingerprint", "image_size"):
            ours, theirs = getattr(self.train, name), getattr(self.val, name)
            if ours != theirs:
                found = f"{name} is {ours} and {theirs}"
                raise ValueError(f"{train.folder} and {self.val.folder} were not encoded alike: {found}")
        self.rows, self.val_rows = set_aside(len(train), f"{train.folder}: one picture", val and len(val))

    def captioned(self, rng: random.Random) -> tuple[int, list[int]]:
        i = rng.choice(self.rows)
        return i, self.train.part(i, "ids", "offsets")

    edited = conversation = validation_edits = pixels = None  # `check` refuses the tasks that need them

    def validation(self, n: int) -> list[tuple[int, list[int]]]:
        rows = random.Random(0).sample(self.val_rows, min(n, len(self.val_rows)))
        return [(-1 - i, self.val.part(i, "ids", "offsets")) for i in rows]

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
        return vae_entry(path, codec), codec

    def check(self, config: TrainConfig, model: ModelConfig, base: str) -> None:
        """Captions and pictures alone, of the size, VAE and tokenizer that the model has."""
        if not set(config.tasks) <= {"caption", "generate"}:
            raise ValueError(f"--task {config.task}: {config.data} holds latents; this takes pictures")
        if config.image_size != self.train.image_size:
            found = f"{config.data} holds pictures of {self.train.image_size} pixels"
            raise ValueError(f"{found}; --image-size is {config.image_size}")
        for shards in (self.train, self.val):
            shards.check_fits(model.latent_channels, model.latent_size, model.vocab_size, base)

    def fingerprint(self) -> bytes:
        return b"".join((s.folder / INDEX).read_bytes() for s in (self.train, self.val))
