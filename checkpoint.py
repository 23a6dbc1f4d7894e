"""Checkpoints: only what was trained, as safetensors and JSON, written beside and renamed.

    OUT/step-002000/model.safetensors       trained tensors: the image side (and the text, if it was trained)
                    ema.safetensors         their moving average, if it was asked for
                    optimizer.safetensors   the optimizer's state, by the names of the parameters
                    latents.safetensors     the linear stand-in for the VAE
                    checkpoint.json         step, configuration, and the fingerprint of the base

A folder `step-*` is whole or not there at all: a kill at any moment leaves the last good one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from data import PatchPCA
from diffusion import Diffusion
from load_qwen3 import fingerprint, load_qwen3, load_tokenizer, open_safetensors, read_json
from model import LMFusion

LAST_RUN = Path("runs/last-small")  # names the folder of the last run of `train.py --config small`


@dataclass
class Trained:
    """A model with all that belongs to it."""

    model: LMFusion
    tokenizer: Tokenizer
    diffusion: Diffusion
    codec: PatchPCA
    info: dict  # checkpoint.json
    folder: Path


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a small file beside and rename it; OSError with the name of the file if that cannot be done."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror}") from None


def check_device(name: str) -> None:
    """ValueError for a device that is not there or does not compute."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def write_folder(
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    info: dict,
    info_name: str,
    extra: dict[str, str] | None = None,
) -> None:
    """Write a folder of safetensors, one JSON file and `extra` texts beside its final place, then rename it.

    Raises OSError with the name of the folder if that cannot be done (a full disk); nothing half-written
    stays.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name, group in tensors.items():
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in group.items()},
                str(beside / name),
                metadata={"format": "pt"},
            )
        for name, text in {info_name: json.dumps(info, indent=1) + "\n", **(extra or {})}.items():
            (beside / name).write_text(text, encoding="utf-8")
        for file in beside.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        os.rename(beside, folder)
    except BaseException as error:  # safetensors has an error type of its own for input and output
        shutil.rmtree(beside, ignore_errors=True)
        if not isinstance(error, Exception):  # Ctrl-C
            raise
        raise OSError(f"{folder} could not be written: {error}") from None


def list_checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [p for p in out.glob("step-*") if (p / "checkpoint.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")) if p.name[5:].isdigit() else -1)


def find_checkpoint(folder: str | Path | None) -> Path:
    """A checkpoint's own folder; a run's last one; with None, the last run of `small`."""
    if folder is None:
        if not LAST_RUN.is_file():
            raise ValueError(
                "no --checkpoint given, and no run of `python train.py --config small` to take it from"
            )
        folder = LAST_RUN.read_text().strip()
    folder = Path(folder)
    if (folder / "checkpoint.json").is_file():
        return folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    found = list_checkpoints(folder)
    if not found:
        raise ValueError(f"{folder}: holds no checkpoint (no checkpoint.json, no step-* folder with one)")
    return found[-1]


def read_tensors(path: Path, expected: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All tensors of a file; names and shapes must be those `expected`, or ValueError names the tensor."""
    with open_safetensors(path) as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    if expected is not None:
        for name in sorted(set(tensors) ^ set(expected)):
            raise ValueError(f"{path}: tensor {name} is {'missing' if name in expected else 'not expected'}")
        for name, tensor in tensors.items():
            if tensor.shape != expected[name].shape:
                raise ValueError(
                    f"{path}: tensor {name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
                )
    return tensors


def load_codec(path: Path, channels: int, patch: int) -> PatchPCA:
    """The linear latents of a checkpoint: `channels` numbers for `patch` x `patch` pixels."""
    shapes = {
        "mean": (3 * patch**2,),
        "basis": (3 * patch**2, channels),
        "scale": (channels,),
        "bound": (channels, 1, 1),
    }
    return PatchPCA(**read_tensors(path, {n: torch.empty(s, device="meta") for n, s in shapes.items()}))


def load_trained(
    checkpoint: str | Path | None,
    base: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Trained:
    """The model of a checkpoint, on the base it was trained on (`base`: where that lies now, if moved).

    Takes the moving average of the weights where there is one. ValueError for a base with another fingerprint
    and for whatever is missing, cut short or of another shape.
    """
    folder = find_checkpoint(checkpoint)
    info = read_json(folder / "checkpoint.json")
    try:
        base, overrides = base or info["base"], dict(info["model"])
        diffusion, wanted, trained = Diffusion(**info["diffusion"]), info["fingerprint"], info["trained"]
        overrides["unet_channels"] = tuple(overrides["unet_channels"])
        patch = info["config"]["latent_patch"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'checkpoint.json'}: not a checkpoint of this program: {error}") from None
    model = load_qwen3(base, **overrides)
    if fingerprint(model) != wanted:
        raise ValueError(
            f"{base} is not the language model that {folder} was trained on (fingerprint "
            f"{fingerprint(model)[:12]}, expected {wanted[:12]}); name the right one with --base"
        )
    own = model.state_dict()
    for name in trained:
        if name not in own:
            raise ValueError(f"{folder / 'checkpoint.json'}: trained tensor {name} is not one of the model's")
    file = folder / ("ema.safetensors" if info.get("ema") else "model.safetensors")
    model.load_state_dict(read_tensors(file, {n: own[n] for n in trained}), strict=False)
    model.requires_grad_(False).to(device=device, dtype=dtype).eval()
    codec = load_codec(folder / "latents.safetensors", model.config.latent_channels, patch)
    return Trained(model, load_tokenizer(base), diffusion, codec, info, folder)
