"""Sequences of text and images for tests of model.py and attention.py, and what a model makes of them.

A sequence is a list of token ids in which IMAGE stands for one whole image, as in `Tokens.rows`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import IMAGE, PAD, Tokens
from data import Document, split_phases
from model import Hidden, LMFusion

BOI, EOI = 1, 2  # conftest.TINY
TOLERANCE = dict(rtol=0, atol=1e-5)
STORY = [5, 6, BOI, IMAGE, EOI, 7, 8, BOI, IMAGE, IMAGE, EOI, 9]  # two images of it touch
SEPARATIONS = pytest.mark.parametrize("separation", ("deep", "shallow", "none"))


def draw(model: LMFusion, images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random latents (M, C, h, w), in the model's dtype, and timesteps (M,)."""
    generator, c = torch.Generator().manual_seed(seed), model.config
    latents = torch.randn(images, c.latent_channels, c.latent_size, c.latent_size, generator=generator)
    latents = latents.to(model.boi_head.dtype)
    return latents, torch.randint(1000, (images,), generator=generator)


def count_images(row: list[int]) -> int:
    return row.count(IMAGE)


def to_slots(hidden: Hidden, tokens: Tokens) -> Tensor:
    """Features of both modalities in the slots they came from (B, N, D); zeros at padding."""
    D, dtype = next((x.shape[1], x.dtype) for x in (hidden.text, hidden.image) if x is not None)
    out = torch.zeros(*tokens.ids.shape, D, dtype=dtype)
    if hidden.text is not None:
        out[tokens.ids >= 0] = hidden.text
    if hidden.image is not None:
        out[tokens.ids == IMAGE] = hidden.image
    return out


@torch.no_grad()
def features(
    model: LMFusion, rows: list[list[int]], latents: Tensor | None = None, t: Tensor | None = None
) -> Tensor:
    """Features (B, N, D) of sequences in one encode."""
    tokens = Tokens.rows(rows, model.config.num_patches)
    return to_slots(model.encode(tokens, latents, t), tokens)


class PatchesAsGiven(nn.Module):
    """Stands in for UNet-Down, which mixes the patches of an image: the patches are what the test says."""

    def __init__(self, patches: Tensor):
        super().__init__()
        self.patches = patches  # (M, P, D)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.patches, []


def pack(documents: list[list[int]], num_patches: int, width: int, restart: bool) -> Tokens:
    """One row that holds several documents one behind the other, and padding; written with loops."""
    ids, image, position, document, images = [], [], [], [], 0
    for d, row in enumerate(documents):
        start = 0 if restart else len(ids)
        first = len(ids)
        images = 0 if restart else images
        for i in row:
            images += i == IMAGE
            for _ in range(num_patches if i == IMAGE else 1):
                ids.append(i)
                image.append(images if i == IMAGE else 0)
                position.append(start + len(ids) - 1 - first)
                document.append(d)
    for _ in range(width - len(ids)):
        ids.append(PAD)
        image.append(0)
        position.append(len(ids) - 1)
        document.append(-1)
    return Tokens(*(torch.tensor([x]) for x in (ids, image, position, document)))


def brute_force_mask(documents: list[list[int]], num_patches: int, width: int) -> Tensor:
    """The rule in words, slot by slot (width, width); padding sees padding that is not behind it."""
    slots = []  # (document, number of the image in the row or None)
    images = 0
    for d, row in enumerate(documents):
        for i in row:
            images += i == IMAGE
            slots += [(d, images)] * num_patches if i == IMAGE else [(d, None)]
    slots += [("padding", None)] * (width - len(slots))
    mask = torch.zeros(width, width, dtype=torch.bool)
    for i, (document_i, image_i) in enumerate(slots):
        for j, (document_j, image_j) in enumerate(slots):
            together = image_i is not None and image_i == image_j
            mask[i, j] = document_i == document_j and (j <= i or together)
    return mask


RAGGED = [
    STORY,
    [5, BOI, IMAGE],
    [4] * 9 + [BOI, IMAGE, EOI, 6, 7, 8],
    [BOI, IMAGE, IMAGE, EOI],
    [5, 6, 7, BOI, IMAGE, EOI, BOI, IMAGE, EOI, 3],
]


def caption_loss(model: LMFusion, hidden: Hidden) -> Tensor:
    """Cross-entropy of every text token of the second phase with some next token."""
    logits = model.logits(hidden.text)
    return F.cross_entropy(logits, torch.arange(len(logits)) + 20)


def ddpm_loss(model: LMFusion, hidden: Hidden, eps: Tensor) -> Tensor:
    return F.mse_loss(model.unet_output(hidden), eps)


def with_gradient(model: LMFusion) -> set[str]:
    """Parameters that a loss reached: a gradient is there, and not zero."""
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def in_phases(rows: list[list[int]], num_patches: int, pack: int = 0) -> tuple[Tokens, Tokens]:
    """Rows of ids as the two phases of `LMFusion.forward`; every token may be learned."""
    documents = [Document(row, [], [], [True] * len(row)) for row in rows]
    return split_phases(documents, num_patches, pack)
