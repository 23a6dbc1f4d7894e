"""scale/vae.py: the linear latents, and what a run makes latents with."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from config import SMALL
from scale.vae import PatchPCA, load_vae, make_codec
from small.shapes import Shapes
from small.world import all_scenes, render


def fit(whiten: float = 0.5) -> PatchPCA:
    return PatchPCA.fit(Shapes().sample(1000, random.Random(0))[0], channels=16, patch=4, whiten=whiten)


@pytest.mark.parametrize("whiten", (0.0, 0.5, 1.0))
def test_latents_have_about_unit_variance(whiten):
    z = fit(whiten).encode(render(list(all_scenes("test")), random.Random(1)))  # (M, C, h, w)
    assert z.shape[1:] == (16, 16, 16)
    assert 0.85 < z.square().mean() < 1.15
    per_channel = z.square().mean((0, 2, 3))
    if whiten == 1:  # all components alike
        assert per_channel.min() > 0.5 and per_channel.max() < 2
    else:
        assert per_channel.argmax() == 0 and per_channel[0] > 2 * per_channel[-1]


def test_the_round_trip_of_held_out_pictures_is_nearly_exact():
    codec, pictures = fit(), render(list(all_scenes("test")), random.Random(1))
    error = (codec.decode(codec.encode(pictures)).float() - pictures.float()).square().mean()
    assert error < 0.01 * pictures.float().var()  # 10 channels of 48 would not do
    assert fit_channels(48).decode(fit_channels(48).encode(pictures)).sub(pictures.float()).abs().max() <= 1


def fit_channels(channels: int) -> PatchPCA:
    return PatchPCA.fit(Shapes().sample(200, random.Random(0))[0], channels, patch=4, whiten=0.0)


def test_the_bound_is_the_largest_latent_of_the_pictures_it_was_fitted_on():
    pictures = Shapes().sample(1000, random.Random(0))[0]
    codec = fit()
    z = codec.encode(pictures).abs().amax((0, 2, 3))
    assert codec.bound.shape == (16, 1, 1)
    assert torch.allclose(z, codec.bound.flatten(), rtol=1e-4, atol=1e-4)
    held_out = codec.encode(render(list(all_scenes("test")))).abs().amax((0, 2, 3))
    assert (held_out < 1.25 * codec.bound.flatten()).all()


def test_encoding_inverts_decoding_within_the_rounding_to_whole_levels():
    codec = fit()
    z = 0.2 * torch.randn(20, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    z[:, 3:] *= 0.3
    pictures = codec.decode(z)
    inside = (
        ((pictures > 0) & (pictures < 255)).unflatten(2, (16, 4)).unflatten(4, (16, 4)).all(5).all(3).all(1)
    )
    assert inside.float().mean() > 0.3  # patches that no clamping touched
    limit = 0.5 / 127.5 * codec.basis.abs().sum(0) * codec.scale  # every pixel off by half a level
    error = (codec.encode(pictures) - z).abs() / limit[:, None, None]
    assert error.amax(1)[inside].max() < 1.01


def test_a_patch_stays_where_it_is():
    codec = fit()
    black = codec.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    dotted = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    dotted[0, :, 8:12, 20:24] = 255
    changed = (codec.encode(dotted) != black).any(1)[0].nonzero().tolist()
    assert changed == [[2, 5]]  # row 8 / 4, column 20 / 4


# ---- what a run makes latents with ----

VAE = Path(__file__).resolve().parent / "fixtures" / "vae_sd"  # 4 channels, 2 pixels a latent


def test_the_linear_latents_of_a_run_follow_from_its_seed_and_are_fitted_to_training_pictures():
    drawn = []

    def sample(n, rng):
        drawn.append(Shapes().sample(n // 20, rng))
        return drawn[-1]

    config = dataclasses.replace(SMALL, latent_channels=5, whiten=0.3)
    (entry, codec), (_, again) = (make_codec(config, sample, "cpu") for _ in range(2))
    assert entry is None and (codec.channels, codec.patch) == (5, 8)
    assert all(torch.equal(x, again.tensors()[n]) for n, x in codec.tensors().items())
    wanted = PatchPCA.fit(drawn[0][0], channels=5, patch=8, whiten=0.3)
    assert all(torch.equal(x, wanted.tensors()[n]) for n, x in codec.tensors().items())
    _, other = make_codec(dataclasses.replace(config, seed=1), sample, "cpu")
    assert not torch.equal(codec.mean, other.mean) and drawn[2][1] != drawn[0][1] == drawn[1][1]


def test_a_vae_is_named_with_its_fingerprint_and_bound_by_training_pictures():
    config = dataclasses.replace(SMALL, vae=str(VAE))
    entry, codec = make_codec(config, Shapes().sample, "cpu")
    assert entry == {"path": str(VAE), "fingerprint": load_vae(VAE).fingerprint()}
    z = codec.encode(Shapes().sample(64, random.Random(0))[0])
    assert codec.bound.shape == (4, 1, 1) and torch.equal(codec.bound.flatten(), z.abs().amax((0, 2, 3)))


@pytest.mark.parametrize(
    "size, n", ((16, 4000), (32, 4000), (48, 1777), (64, 1000), (128, 250), (256, 64), (512, 64))
)
def test_components_are_of_fewer_pictures_where_these_are_large(size, n, monkeypatch):
    """24 pictures of 128 pixels took 5 GB; those of `small` are as many as they were."""
    asked = []
    monkeypatch.setattr(PatchPCA, "fit", lambda pictures, *how: asked.append(pictures))
    config = dataclasses.replace(SMALL, image_size=size)
    make_codec(config, lambda n, rng: (n, rng.getstate()), "cpu")
    assert asked == [n]
