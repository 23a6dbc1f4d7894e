"""The built-in pictures as a source of training data (see data.Source): `--data shapes`.

A picture is a `Shot`: a scene, and by how many pixels its shape is off. It is rendered when a batch needs it.
"""

import random
from collections.abc import Iterator

from torch import Tensor

from config import TrainConfig
from model import ModelConfig
from scale.vae import AutoencoderKL, PatchPCA, make_codec
from small.dialogues import KINDS, Shot, conversation
from small.world import all_scenes, draw_edit, draw_shift, render

# Shares of dialogues.KINDS. Our choice: many stories, for nowhere else does a caption stand behind a picture
# that it does not describe.
TURNS = (3, 4, 8, 3, 3)


class Shapes:
    """One shape on a plain background: 1,779 scenes to train on, 233 to validate with, 228 to test."""

    def captioned(self, rng: random.Random) -> tuple[Shot, str]:
        scene = rng.choice(all_scenes("train"))
        return Shot(scene, draw_shift(rng)), scene.caption

    def edited(self, rng: random.Random) -> tuple[Shot, Shot, str]:
        edit, shift = draw_edit(rng), draw_shift(rng)
        return Shot(edit.source, shift), Shot(edit.target, shift), edit.instruction

    def conversation(self, rng: random.Random) -> list[dict]:
        """One to three turns, with a thought before the answer in 40%."""
        kinds = rng.choices(KINDS, TURNS, k=rng.choices((1, 2, 3), (70, 25, 5))[0])
        return conversation(rng, thinking=rng.random() < 0.4, kinds=kinds)

    def validation(self, n: int) -> list[tuple[Shot, str]]:
        rng = random.Random(0)
        scenes = rng.sample(all_scenes("validation"), min(n, len(all_scenes("validation"))))
        return [(Shot(scene, draw_shift(rng)), scene.caption) for scene in scenes]

    def validation_edits(self, n: int) -> list[tuple[Shot, Shot, str]]:
        """Edits to scenes that training does not show."""
        rng = random.Random(0)
        edits = [(draw_edit(rng, "validation"), draw_shift(rng)) for _ in range(n)]
        return [(Shot(e.source, shift), Shot(e.target, shift), e.instruction) for e, shift in edits]

    def words(self) -> Iterator[tuple[str, bool]]:
        """Not the instructions, which are shorter than captions."""
        return ((scene.caption, False) for scene in all_scenes("train"))

    def prompts(self) -> list[str]:
        """Captions that training does not show."""
        return [caption for _, caption in self.validation(18)]

    def pixels(self, pictures: list[Shot]) -> Tensor:
        return render([s.scene for s in pictures], shifts=[s.shift for s in pictures])

    def latents(self, pictures: list[Shot], codec: PatchPCA | AutoencoderKL) -> Tensor:
        return codec.encode(self.pixels(pictures)).cpu()

    def sample(self, n: int, rng: random.Random) -> tuple[Tensor, list[str]]:
        """n training pictures (n, 3, S, S), uint8, drawn with replacement, and their captions."""
        scenes = rng.choices(all_scenes("train"), k=n)
        return render(scenes, rng), [s.caption for s in scenes]

    def make_codec(self, config: TrainConfig, device: str) -> tuple[dict | None, PatchPCA | AutoencoderKL]:
        return make_codec(config, self.sample, device)

    def check(self, config: TrainConfig, model: ModelConfig, base: str) -> None:
        """Any model will do."""

    def fingerprint(self) -> bytes:
        return repr(all_scenes("train")).encode()
