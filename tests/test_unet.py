"""unet.py: shapes, patch order, what starts at zero, what the output depends on, and what each flag adds.

The last convolution starts at zero: what is shown about outputs is shown with all parameters perturbed.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from model import ModelConfig
from unet import AttentionBlock, ResBlock, TimeMLP, UNetDown, UNetUp, group_norm, timestep_embedding

C, SIZE, D = 3, 8, 24  # channels and size of the latent, hidden size
C1, C2 = 16, 32  # channels at full and at half resolution
P = (SIZE // 2) ** 2


def config(**changes) -> ModelConfig:
    text = dict(vocab_size=8, hidden_size=D, intermediate_size=8, num_hidden_layers=1)
    heads = dict(num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    image = dict(latent_channels=C, latent_size=SIZE, unet_channels=(C1, C2))
    flags = dict(unet_attention=True, patch_positions=True)
    return ModelConfig(**{**text, **heads, **image, **flags, **changes})


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def perturbed(module: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """The module with every parameter drawn anew (norm weights around one), double precision."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        p.normal_(std=std, generator=g)
        if "norm" in name and name.endswith("weight"):
            p.add_(1)
    return module.double()


def halves(**changes) -> tuple[UNetDown, UNetUp]:
    return perturbed(UNetDown(config(**changes))), perturbed(UNetUp(config(**changes)))


def inputs(M: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, C, h, w), t (M,), h (M, P, D)."""
    return normal(0, M, C, SIZE, SIZE).double(), torch.arange(M) * 400 + 100, normal(1, M, P, D).double()


# ---- shapes and order ----


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(
    "M, channels, size, hidden, c1, c2",
    [(2, 3, 8, 24, 16, 32), (1, 4, 12, 40, 8, 64), (3, 16, 2, 16, 48, 96)],
)
def test_shapes(attention, M, channels, size, hidden, c1, c2):
    image = dict(latent_channels=channels, latent_size=size, unet_channels=(c1, c2))
    down, up = halves(hidden_size=hidden, unet_attention=attention, **image)
    x, t = normal(0, M, channels, size, size).double(), torch.arange(M)
    h_in, skips = down(x, t)
    assert h_in.shape == (M, (size // 2) ** 2, hidden)
    assert [s.shape for s in skips] == [(M, c1, size, size), (M, c2, size // 2, size // 2)]
    assert up(torch.randn_like(h_in), t, h_in, skips).shape == x.shape


@torch.no_grad()
def sharpened(half: nn.Module) -> nn.Module:
    """No norms, in whose statistics all places meet, and kernels that look above all at their own place."""
    for m in list(half.modules()):
        for name, child in list(m.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(m, name, nn.Identity())
            elif isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
                child.weight.mul_(0.2)
                child.weight[:, :, 1, 1] *= 5
    return half


def test_patches_are_in_row_major_order():
    """Change the 2 x 2 corner of the latent that is patch p, in row r and column c: patch p changes most."""
    down = sharpened(halves(unet_attention=False)[0])
    x, t, _ = inputs(1)
    before, _ = down(x, t)
    for p in range(P):
        r, c = divmod(p, SIZE // 2)
        moved = x.unfold(2, 2, 2).unfold(3, 2, 2).clone()  # (1, C, h/2, w/2, 2, 2)
        moved[:, :, r, c] += normal(p, C, 2, 2)
        moved = moved.transpose(3, 4).reshape(x.shape)
        assert (down(moved, t)[0] - before)[0].norm(dim=1).argmax() == p


@pytest.mark.parametrize("which", ["h", "h_in"])
def test_patches_return_to_the_place_they_came_from(which):
    """Change patch p of the transformer's output or of h_in: p's 2 x 2 place of the noise changes most."""
    down, up = halves(unet_attention=False)
    up, (x, t, h) = sharpened(up), inputs(1)
    h_in, skips = down(x, t)
    before = up(h, t, h_in, skips)
    for p in range(P):
        args = {"h": h.clone(), "h_in": h_in.clone()}
        args[which][:, p] += normal(p, D)
        change = (up(args["h"], t, args["h_in"], skips) - before).square().sum(1)  # (1, h, w)
        assert change.unfold(1, 2, 2).unfold(2, 2, 2).sum((3, 4)).flatten().argmax() == p


# ---- initialisation ----


def fresh(rms: float = 0.02, **changes) -> tuple[UNetDown, UNetUp]:
    """Both halves as they are made on the meta device: zeros all over, then their own initialisation."""
    down, up = UNetDown(config(**changes)), UNetUp(config(**changes))
    with torch.no_grad():
        for p in [*down.parameters(), *up.parameters()]:
            p.zero_()
    torch.manual_seed(0)
    down.init_weights(rms)
    up.init_weights()
    return down, up


def test_only_the_last_convolution_starts_at_zero():
    down, up = fresh()
    assert not up.conv_out.weight.any() and not up.conv_out.bias.any()
    for half in (down, up):
        for name, p in half.named_parameters():
            if not name.startswith("conv_out"):
                if p.dim() > 1:
                    assert p.std() > 1e-3, name
                elif "norm" in name:
                    assert (p == (1 if name.endswith("weight") else 0)).all(), name


def test_predicted_output_is_exactly_zero_at_the_start_and_its_convolution_learns_first():
    down, up = fresh()
    x, t, h = (a.float() if a.is_floating_point() else a for a in inputs())
    out = up(h, t, *down(x, t))
    assert not out.any()
    (out - normal(2, *out.shape)).square().mean().backward()
    learning = {n for n, p in up.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"conv_out.weight", "conv_out.bias"}


@pytest.mark.parametrize("rms", [0.02, 1.0])
def test_patches_start_about_as_large_as_asked(rms):
    x, t = normal(0, 8, C, SIZE, SIZE), torch.arange(8) * 100
    down = fresh(rms, patch_positions=False)[0]
    assert down(x, t)[0].pow(2).mean().sqrt().item() == pytest.approx(rms, rel=0.3)
    assert fresh(rms)[0].position.pow(2).mean().sqrt().item() == pytest.approx(rms, rel=0.15)


# ---- what the output depends on ----


def test_timestep_changes_patches_and_both_skips():
    down, (x, t, _) = halves()[0], inputs()
    (a, skips_a), (b, skips_b) = down(x, t), down(x, t + 1)
    for u, v in zip((a, *skips_a), (b, *skips_b), strict=True):
        assert (u - v).flatten(1).norm(dim=1).min() > 1e-3


def test_timestep_changes_the_output_of_the_upper_half_by_itself():
    (down, up), (x, t, h) = halves(), inputs()
    rest = down(x, t)
    assert (up(h, t, *rest) - up(h, t + 1, *rest)).flatten(1).norm(dim=1).min() > 1e-3


def test_h_and_h_in_and_each_skip_change_the_output():
    (down, up), (x, t, h) = halves(), inputs()
    h_in, (full, half) = down(x, t)
    before = up(h, t, h_in, [full, half])
    for i in range(4):
        args = [h, h_in, full, half]
        args[i] = args[i] + 0.1 * normal(5, *args[i].shape)
        after = up(args[0], t, args[1], args[2:])
        assert (after - before).flatten(1).norm(dim=1).min() > 1e-3, ("h", "h_in", "full", "half")[i]
    swapped = up(h_in, t, h, [full, half])
    assert (swapped - before).norm() > 1e-3  # the two have weights of their own


def test_every_parameter_takes_part():
    (down, up), (x, t, h) = halves(), inputs()
    h_in, skips = down(x, t)
    assert all(out.requires_grad for out in (h_in, *skips))  # UNet-Down learns through each of them
    (up(h, t, h_in, skips) * normal(3, *x.shape)).sum().backward()
    for half in (down, up):
        for name, p in half.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 1e-9, name


def test_images_of_a_batch_do_not_mix_and_each_has_its_own_timestep():
    (down, up), (x, t, h) = halves(), inputs(3)
    together = up(h, t, *down(x, t))
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(together[one], up(h[one], t[one], *down(x[one], t[one])))


def test_bfloat16_weights_take_bfloat16_latents():
    (down, up), (x, t, h) = halves(), inputs()
    expected = up(h, t, *down(x, t))
    down, up, x, h = down.bfloat16(), up.bfloat16(), x.bfloat16(), h.bfloat16()
    out = up(h, t, *down(x, t))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.1 * expected.abs().max().item())


# ---- the parts ----


@pytest.mark.parametrize("size", [8, 48])
def test_timestep_embedding_is_cosines_then_sines_at_geometric_frequencies(size):
    times = [0, 1, 17, 500, 999]
    half = size // 2
    slow = [[f(t / 10000 ** (i / half)) for f in (math.cos, math.sin) for i in range(half)] for t in times]
    fast = timestep_embedding(torch.tensor(times), size)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, torch.tensor(slow), rtol=0, atol=3e-4)


def test_timestep_embedding_tells_all_timesteps_apart():
    embedding = timestep_embedding(torch.arange(1000), 16)
    assert (torch.cdist(embedding, embedding) + 9 * torch.eye(1000)).min() > 1e-2


def test_time_mlp_is_two_layers_to_four_times_the_size():
    mlp, t = perturbed(TimeMLP(8)), torch.tensor([3, 700])
    x = timestep_embedding(t, 8).double()
    for linear in (mlp.linear1, mlp.linear2):
        x = x @ linear.weight.T + linear.bias
        x = x / (1 + (-x).exp())  # SiLU
    assert x.shape == (2, 32)
    torch.testing.assert_close(mlp(t), x)


def test_res_block_adds_the_embedding_between_its_convolutions():
    block = perturbed(ResBlock(16, 24, 32))
    x, emb = normal(0, 2, 16, 4, 4).double(), normal(1, 2, 32).double()
    seen = {}
    block.conv1.register_forward_hook(lambda _, args, out: seen.update(conv1=out))
    block.norm2.register_forward_hook(lambda _, args, out: seen.update(norm2=args[0]))
    out = block(x, emb)
    shift = emb @ block.emb.weight.T + block.emb.bias  # (2, 24)
    torch.testing.assert_close(seen["norm2"] - seen["conv1"], shift[:, :, None, None].expand(2, 24, 4, 4))
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()
    torch.testing.assert_close(block(x, emb), block.skip(x))  # a residual block
    assert not torch.equal(out, block(x, emb))


def test_attention_block_is_softmax_attention_in_heads_of_64_channels():
    block, x = perturbed(AttentionBlock(128)), normal(0, 2, 128, 3, 5).double()
    assert block.heads == 2
    q, k, v = (y.flatten(2).detach() for y in block.qkv(block.norm(x)).chunk(3, dim=1))  # (2, 128, hw) each
    attended = torch.zeros(2, 128, 15, dtype=torch.float64)
    for m in range(2):
        for head in (slice(0, 64), slice(64, 128)):
            for i in range(15):
                weights = [math.exp((q[m, head, i] @ k[m, head, j]).item() / 8) for j in range(15)]
                attended[m, head, i] = sum(w * v[m, head, j] for j, w in enumerate(weights)) / sum(weights)
    expected = x + block.proj(attended.view(2, 128, 3, 5))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [4, 8, 16, 32, 48, 64, 96, 320, 512, 1024])
def test_norm_groups_hold_at_least_four_channels_and_are_at_most_32(channels):
    groups = group_norm(channels).num_groups
    assert channels % groups == 0 and channels // groups >= 4 and groups <= 32
    if channels % 128 == 0:
        assert groups == 32


# ---- flags and sizes ----


def shapes(half: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in half.named_parameters()}


def test_unet_attention_adds_one_attention_block_to_each_half_and_nothing_else():
    block = {
        "attention.norm.weight": (C2,),
        "attention.norm.bias": (C2,),
        "attention.qkv.weight": (3 * C2, C2, 1, 1),
        "attention.qkv.bias": (3 * C2,),
        "attention.proj.weight": (C2, C2, 1, 1),
        "attention.proj.bias": (C2,),
    }
    for half in (UNetDown, UNetUp):
        with_attention, without = shapes(half(config())), shapes(half(config(unet_attention=False)))
        assert with_attention == without | block and not without.keys() & block.keys()


def test_patch_positions_add_one_vector_a_patch_to_h_in_and_nothing_else():
    with_positions, without = shapes(UNetDown(config())), shapes(UNetDown(config(patch_positions=False)))
    assert with_positions == without | {"position": (P, D)} and "position" not in without
    assert shapes(UNetUp(config())) == shapes(UNetUp(config(patch_positions=False)))
    down, (x, t, _) = halves()[0], inputs()
    h_in, skips = down(x, t)
    vector = normal(4, D).double()
    with torch.no_grad():
        down.position[5] += vector
    moved, skips_moved = down(x, t)
    expected = torch.zeros_like(h_in)
    expected[:, 5] = vector
    torch.testing.assert_close(moved - h_in, expected)
    assert all(torch.equal(a, b) for a, b in zip(skips, skips_moved, strict=True))


def test_both_halves_together_hold_a_quarter_billion_parameters_at_qwen3_8b():
    """Section 4.1: 0.27B. Latents, channels and flags are the defaults, the hidden size is Qwen3-8B's."""
    sizes = ModelConfig(
        vocab_size=8,
        hidden_size=4096,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    with torch.device("meta"):
        count = sum(p.numel() for half in (UNetDown(sizes), UNetUp(sizes)) for p in half.parameters())
    assert count == pytest.approx(0.27e9, rel=0.05)


@pytest.mark.parametrize("size", [1, 7, 33])
def test_an_odd_latent_size_is_refused(size):
    with pytest.raises(ValueError, match=f"latent_size = {size} is odd"):
        config(latent_size=size)
