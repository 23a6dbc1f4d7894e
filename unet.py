"""The U-Net around the transformer: a noisy latent becomes patches, and patches become predicted noise.

    h_in, skips = UNet-Down(x_t, t)            Eq. (6)   (M, C, h, w) -> (M, P, D)
    F           = UNet-Up(h_FFN, t, h_in)      Eq. (14)  (M, P, D)    -> (M, C, h, w)

Two blocks down with one stride of 2, two blocks up, skip connections between them; the timestep enters here
and nowhere else. The blocks are those of Nichol & Dhariwal (2021) with the adaptive norm replaced by a plain
one, as in Transfusion: the timestep's embedding is added between the two convolutions.

Shapes: M images, C, h, w channels, height and width of the latent, D hidden size of the transformer,
P = (h/2)(w/2) patches in row-major order, c1 and c2 channels at full and at half resolution, E embedding
size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from model import ModelConfig


def check_sizes(config: ModelConfig) -> None:
    """ValueError for sizes of latents and U-Net that do not fit together."""
    sizes = (config.latent_channels, config.latent_size, *config.unet_channels)
    if len(sizes) != 4 or any(type(x) is not int or not 0 < x < 2**16 for x in sizes):
        names = "latent_channels, latent_size and two unet_channels"
        raise ValueError(f"{names} = {sizes}: these are positive whole numbers below {2**16}")
    if config.latent_size % 2:
        raise ValueError(f"latent_size = {config.latent_size} is odd; the U-Net halves it once")
    c1, c2 = config.unet_channels
    if min(c1, c2) < 4 or c1 % 4 or c2 % 4 or (config.unet_attention and c2 % max(1, c2 // 64)):
        raise ValueError(f"unet_channels = {c1, c2}: multiples of 4, the second of 64 with attention")


def timestep_embedding(t: Tensor, size: int) -> Tensor:
    """Cosines and sines (M, size), float32, of t (M,) at geometric frequencies from 1 to 1/10000."""
    frequency = torch.exp(-math.log(10000) * torch.arange(size // 2, device=t.device) / (size // 2))
    angle = t.float()[:, None] * frequency  # (M, size/2)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """As many groups as divide both 32 (the literature's number) and a quarter of the channels."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)


class TimeMLP(nn.Module):
    """t (M,) -> embedding (M, E)."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.linear1 = nn.Linear(size, 4 * size)
        self.linear2 = nn.Linear(4 * size, 4 * size)

    def forward(self, t: Tensor) -> Tensor:
        x = timestep_embedding(t, self.size).to(self.linear1.weight.dtype)
        return F.silu(self.linear2(F.silu(self.linear1(x))))


class ResBlock(nn.Module):
    """(M, c_in, h, w) -> (M, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, emb: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb, c_out)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.emb(emb)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a low-resolution map (M, c, h, w), heads of 64 channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // 64)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        M, c, h, w = x.shape
        # contiguous: the fused kernels take nothing else
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()  # (M, hw, 3c)
        q, k, v = qkv.view(M, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (M, heads, hw, d) each
        y = F.scaled_dot_product_attention(q, k, v)  # (M, heads, hw, d)
        return x + self.proj(y.transpose(1, 2).reshape(M, h, w, c).permute(0, 3, 1, 2))


def init_weights(module: nn.Module) -> None:
    """Torch's own initialisation of every convolution, linear layer and norm inside `module`."""
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
            m.reset_parameters()


class UNetDown(nn.Module):
    """Eq. (6): noisy latent and timestep -> patches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c1, c2 = config.unet_channels
        self.time = TimeMLP(c1)
        self.conv_in = nn.Conv2d(config.latent_channels, c1, 3, padding=1)
        self.block1 = ResBlock(c1, c1, 4 * c1)
        self.down = nn.Conv2d(c1, c2, 3, stride=2, padding=1)
        self.block2 = ResBlock(c2, c2, 4 * c1)
        self.attention = AttentionBlock(c2) if config.unet_attention else nn.Identity()
        self.norm_out = group_norm(c2)
        self.proj_out = nn.Linear(c2, config.hidden_size)
        # Our choice (a flag): convolutions see where they are only through the padding at the border, and
        # RoPE tells only distances. A vector per patch says it outright.
        P = config.num_patches
        self.position = nn.Parameter(torch.zeros(P, config.hidden_size)) if config.patch_positions else None

    @torch.no_grad()
    def init_weights(self, rms: float) -> None:
        """Initialise afresh, with patches of about this root mean square."""
        init_weights(self)
        self.proj_out.weight.normal_(std=rms / math.sqrt(self.proj_out.in_features))
        self.proj_out.bias.zero_()
        if self.position is not None:
            self.position.normal_(std=rms)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (M, C, h, w), t (M,) -> patches h_in (M, P, D) and the skips for UNet-Up."""
        emb = self.time(t)  # (M, E)
        if x.is_cuda:  # convolutions of bfloat16 are made for channels in the last place in memory
            x = x.contiguous(memory_format=torch.channels_last)
        full = self.block1(self.conv_in(x), emb)  # (M, c1, h, w)
        half = self.attention(self.block2(self.down(full), emb))  # (M, c2, h/2, w/2)
        h_in = self.proj_out(self.norm_out(half).flatten(2).transpose(1, 2))  # (M, P, D), row-major
        if self.position is not None:
            h_in = h_in + self.position
        return h_in, [full, half]


class UNetUp(nn.Module):
    """Eq. (14): the transformer's patches, the timestep and h_in -> predicted noise."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c1, c2 = config.unet_channels
        self.time = TimeMLP(c1)
        self.proj_in = nn.Linear(2 * config.hidden_size, c2)
        self.block1 = ResBlock(2 * c2, c2, 4 * c1)
        self.attention = AttentionBlock(c2) if config.unet_attention else nn.Identity()
        self.up = nn.Conv2d(c2, c1, 3, padding=1)
        self.block2 = ResBlock(2 * c1, c1, 4 * c1)
        self.norm_out = group_norm(c1)
        self.conv_out = nn.Conv2d(c1, config.latent_channels, 3, padding=1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise afresh; only the last convolution starts at zero."""
        init_weights(self)
        self.conv_out.weight.zero_()
        self.conv_out.bias.zero_()

    def forward(self, h: Tensor, t: Tensor, h_in: Tensor, skips: list[Tensor]) -> Tensor:
        """h and h_in (M, P, D), t (M,), skips of UNet-Down -> (M, C, h, w)."""
        emb = self.time(t)
        full, half = skips
        x = self.proj_in(torch.cat((h, h_in), dim=-1))  # (M, P, c2)
        x = x.transpose(1, 2).unflatten(2, half.shape[2:])  # (M, c2, h/2, w/2)
        x = self.attention(self.block1(torch.cat((x, half), dim=1), emb))
        x = self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (M, c1, h, w)
        x = self.block2(torch.cat((x, full), dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(x)))


def unet_at_start(config: ModelConfig, rms: float) -> dict[str, Tensor]:
    """First values of both halves' parameters; patches enter the transformer with this root mean square."""
    with torch.device("meta"):
        unet = nn.ModuleDict({"unet_down": UNetDown(config), "unet_up": UNetUp(config)})
    # `to_empty` would do the same, after half a second of imports
    unet.load_state_dict({n: torch.empty(p.shape) for n, p in unet.state_dict().items()}, assign=True)
    unet["unet_down"].init_weights(rms)
    unet["unet_up"].init_weights()
    return unet.state_dict()
