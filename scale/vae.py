"""Pictures to latents and back: diffusers' AutoencoderKL with its weights, and a linear stand-in for it.

    vae = load_vae("stabilityai/sd-vae-ft-mse")    # a hub id or a folder
    latents = vae.encode(pictures)                 # uint8 (M, 3, S, S) -> (M, C, S/f, S/f)
    pictures = vae.decode(latents)                 # and back

The paper diffuses in the latent space of a pretrained VAE (Section 2.2) and never trains it. Modules have
diffusers' names, so that its weights load without renaming. `PatchPCA` stands in for the VAE where none is at
hand (`--config small`). Both have `encode`, `decode`, `patch`, `channels` and `bound`.

Shapes: M pictures, S pixels a side, f downsampling factor (8 for four blocks), C latent channels,
h = w = S/f; c, c_in, c_out channels within.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import TrainConfig
from load_qwen3 import address, match_tensors, open_safetensors, read_json, resolve

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "a pickle, which runs code when loaded; convert it to safetensors"
UNUSED = ("sample_size", "force_upcast")  # for tiling and for half precision; they change no weight
OLD_NAME = re.compile(r"(mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.")
NEW_NAME = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class VAEConfig:
    """The fields of diffusers' config.json that decide what is computed, with its defaults."""

    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


def conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class ResnetBlock(nn.Module):
    """(M, c_in, h, w) -> (M, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=1e-6), conv3(c_in, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=1e-6), conv3(c_out, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class VAEAttention(nn.Module):
    """Self-attention over all positions of a map (M, c, h, w): one head of all channels."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (M, hw, c)
        q, k, v = (proj(y)[:, None] for proj in (self.to_q, self.to_k, self.to_v))  # (M, 1, hw, c) each
        y = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])  # (M, hw, c)
        return x + y.transpose(1, 2).reshape(x.shape)


class Resample(nn.Module):
    """Half or double the resolution: (M, c, h, w) -> (M, c, h/2, w/2) or (M, c, 2h, 2w)."""

    def __init__(self, c: int, down: bool):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(c, c, 3, stride=2) if down else conv3(c, c)

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and below only
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VAEBlock(nn.Module):
    """Residual layers at one resolution, attention behind the first, then a change of resolution, if any."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, attend: bool = False, then: str = ""):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out, groups) for i in range(layers))
        self.attentions = nn.ModuleList([VAEAttention(c_out, groups)] if attend else [])
        self.downsamplers = nn.ModuleList([Resample(c_out, down=True)] if then == "down" else [])
        self.upsamplers = nn.ModuleList([Resample(c_out, down=False)] if then == "up" else [])

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.resnets[0], *self.attentions, *self.resnets[1:], *self.downsamplers, *self.upsamplers)
        for layer in layers:
            x = layer(x)
        return x


def blocks(widths: tuple[int, ...], layers: int, groups: int, then: str) -> nn.ModuleList:
    """One VAEBlock a width, with a change of resolution behind all but the last."""
    found = nn.ModuleList()
    for i, (c_in, c_out) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        found.append(VAEBlock(c_in, c_out, layers, groups, then=then if i < len(widths) - 1 else ""))
    return found


class Encoder(nn.Module):
    """Pictures (M, 3, S, S) -> (M, 2C, h, w)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv3(3, widths[0])
        self.down_blocks = blocks(widths, config.layers_per_block, groups, "down")
        self.mid_block = VAEBlock(widths[-1], widths[-1], 2, groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = conv3(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # (M, c, S, S)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (M, C, h, w) -> pictures (M, 3, S, S)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv3(config.latent_channels, widths[0])
        self.mid_block = VAEBlock(widths[0], widths[0], 2, groups, config.mid_block_add_attention)
        self.up_blocks = blocks(widths, config.layers_per_block + 1, groups, "up")
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = conv3(widths[-1], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))  # (M, c, h, w)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """diffusers' VAE, frozen. Latents are scaled and shifted by the numbers of its config.json."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        C = config.latent_channels
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if config.use_post_quant_conv else nn.Identity()
        self.patch = 2 ** (len(config.block_out_channels) - 1)  # f
        self.channels = C
        self.bound: Tensor | None = None  # (C, 1, 1): the largest latent seen, set by who has seen them
        self._fingerprint: str | None = None

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (M, 3, S, S) in -1 .. 1 -> mean and log-variance (M, C, h, w) of q(z|x), unscaled."""
        h = self.quant_conv(self.encoder(x.to(self.encoder.conv_in.weight)))  # (M, 2C, h, w)
        mean, logvar = h.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def pixels(self, z: Tensor) -> Tensor:
        """Unscaled latents (M, C, h, w) -> pictures (M, 3, S, S), about -1 .. 1."""
        return self.decoder(self.post_quant_conv(z.to(self.decoder.conv_in.weight)))

    @torch.no_grad()
    def encode(self, pictures: Tensor, batch: int = 4) -> Tensor:
        """uint8 (M, 3, S, S) -> latents (M, C, h, w), float32; ValueError if S is no multiple of f."""
        assert pictures.dtype == torch.uint8 and pictures.dim() == 4 and pictures.shape[1] == 3
        H, W = pictures.shape[2:]
        if H % self.patch or W % self.patch or not H or not W:
            raise ValueError(f"pictures of {H} x {W} pixels: not multiples of {self.patch}, as the VAE needs")
        latents = []
        for x in pictures.split(batch):
            # Our choice: the posterior's mean, without noise. A picture has one latent, computed once.
            mean, _ = self.moments(x.float() / 127.5 - 1)
            mean = mean.to(pictures.device, torch.float32)
            latents.append((mean - self.config.shift_factor) * self.config.scaling_factor)
        return torch.cat(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 4) -> Tensor:
        """(M, C, h, w) -> uint8 (M, 3, S, S) on the same device, `batch` at a time."""
        assert latents.dim() == 4 and latents.shape[1] == self.channels, latents.shape
        pictures = []
        for z in latents.split(batch):
            x = self.pixels(z.float() / self.config.scaling_factor + self.config.shift_factor).float()
            pictures.append(((x + 1) * 127.5).round().clamp(0, 255).to(latents.device, torch.uint8))
        return torch.cat(pictures)

    def fingerprint(self) -> str:
        """SHA-256 of configuration and tensors: which VAE made a latent. By `load_vae`, of what is stored."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
            for name, p in sorted(self.state_dict().items()):
                digest.update(f"\n{name} {tuple(p.shape)} {p.dtype}\n".encode())
                digest.update(p.contiguous().flatten().view(torch.uint8).cpu().numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def resolve_vae(folder_or_hub_id: str | Path) -> Path:
    """The folder with the VAE's two files, downloaded if it is a hub id; or ValueError."""
    files = ["config.json", WEIGHTS, "vae/config.json", f"vae/{WEIGHTS}"]
    folder = resolve(folder_or_hub_id, files=files)
    if not (folder / WEIGHTS).is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    if not (folder / WEIGHTS).is_file():
        names = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".ckpt", ".pt", ".pth")]
        raise ValueError(f"{folder}: has no {WEIGHTS}" + (f", only {names[0]}: {PICKLE}" if names else ""))
    return folder


def read_vae_config(path: Path) -> VAEConfig:
    """diffusers' `config.json`; ValueError names the field that is not built."""
    raw, fields = read_json(path), asdict(VAEConfig())

    def check(field: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{path}: {field} = {json.dumps(raw.get(field))} is not supported; {wanted} is")

    if raw.get("shift_factor", 0) is None:
        del raw["shift_factor"]
    for field, default in fields.items():
        value = fields[field] = raw.get(field, default)
        if isinstance(default, bool):
            check(field, type(value) is bool, "true or false")
        elif isinstance(default, int):
            check(field, type(value) is int and value > 0, "a positive whole number")
        elif isinstance(default, float):
            check(field, type(value) in (int, float) and abs(value) < 1e30, "a number")
            fields[field] = float(value)
    check("scaling_factor", fields["scaling_factor"] > 0, "a positive number")
    widths, groups = fields["block_out_channels"], fields["norm_num_groups"]
    good = isinstance(widths, (list, tuple)) and len(widths) > 0
    good = good and all(type(c) is int and c > 0 and c % groups == 0 for c in widths)
    check("block_out_channels", good, f"a list of multiples of norm_num_groups = {groups}")
    fields["block_out_channels"] = tuple(widths)

    fixed = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "act_fn": "silu"}
    fixed["down_block_types"] = ["DownEncoderBlock2D"] * len(widths)
    fixed["up_block_types"] = ["UpDecoderBlock2D"] * len(widths)
    for field, only in fixed.items():
        missing = only[:1] if isinstance(only, list) else only  # diffusers' default is one block
        check(field, raw.get(field, missing) == only, f"only {json.dumps(only)}")
    for field in raw.keys() - {*fields, *fixed, *UNUSED}:
        check(field, raw[field] is None or field.startswith("_"), "only null")
    return VAEConfig(**fields)


def load_vae(
    folder_or_hub_id: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AutoencoderKL:
    """A frozen VAE from a diffusers folder, its subfolder `vae`, or the hub; a ValueError otherwise."""
    folder = resolve_vae(folder_or_hub_id)
    with torch.device("meta"):  # shapes only; the file's tensors then take their places
        vae = AutoencoderKL(read_vae_config(folder / "config.json"))
    expected = {name: tuple(p.shape) for name, p in vae.state_dict().items()}
    file, path = open_safetensors(folder / WEIGHTS), folder / WEIGHTS
    # the published sd-vae-ft-mse still has the names that diffusers gave attention at first
    new_name = partial(OLD_NAME.sub, lambda m: f"{m[1]}.{NEW_NAME[m[2]]}.")
    where = dict.fromkeys(file.keys(), (path, file))
    # a linear layer may be stored as a 1 x 1 convolution
    found = match_tensors(where, expected, path, new_name, lambda a, b: a in (b, (*b, 1, 1)))
    state = {name: file.get_tensor(stored).reshape(expected[name]) for name, stored in found.items()}
    vae.load_state_dict(state, assign=True)
    vae.eval().requires_grad_(False)
    vae.fingerprint()
    return vae.to(device, dtype)


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


def make_codec(
    config: TrainConfig, sample: Callable[[int, random.Random], tuple[Tensor, list[str]]], device: str
) -> tuple[dict | None, PatchPCA | AutoencoderKL]:
    """What makes a run's latents, and a checkpoint's entry of it (None of PatchPCA).

    sample(n, rng): n training pictures, uint8 (n, 3, S, S), and captions; components or ranges are theirs.
    """
    rng = random.Random(config.seed)
    if not config.vae:
        # of large pictures fewer, for the memory that their patches take
        pictures, _ = sample(min(4000, max(64, 4000 * 32**2 // config.image_size**2)), rng)
        return None, PatchPCA.fit(pictures, config.latent_channels, config.latent_patch, config.whiten)
    codec = load_vae(config.vae, device=device)
    codec.bound = codec.encode(sample(64, rng)[0]).abs().amax((0, 2, 3))[:, None, None]
    return vae_entry(config.vae, codec), codec


def vae_entry(path: str, codec: AutoencoderKL) -> dict[str, str]:
    """What a checkpoint keeps of a VAE: where it lies, and its fingerprint."""
    return {"path": address(path), "fingerprint": codec.fingerprint()}
