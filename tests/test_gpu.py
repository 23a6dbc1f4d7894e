"""On a card: what a CPU computes, in its kernels, precisions and processes.

    python -m pytest -m gpu tests/test_gpu.py

Skipped without one. LMFUSION_GPU_TESTS_ON=cpu runs all that can be run on a CPU, in less of it: a test of
these tests. Differences are relative, |ours - wanted| / |wanted| over a whole tensor; a NaN passes nowhere.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import conftest
import helpers
import pytest
import torch
from runs import SHAPES
from safetensors.torch import load_file
from sequences import BOI, EOI
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import attention as attention_file
import train
from attention import IMAGE, Layout, Tokens, hybrid_mask, make_block_mask
from checkpoint import list_checkpoints, read_metrics
from data import CAPTION_DROPPED, CAPTION_FIRST, IMAGE_FIRST, caption_document, collate
from generate import describe_images, generate_text
from model import LMFusion, ModelConfig

ON_CPU = os.environ.get("LMFUSION_GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 is float32: no TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # as config.tune_torch has it
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def difference(ours: Tensor, wanted: Tensor) -> float:
    """|ours - wanted| / |wanted|, in float64; infinite where anything is not finite."""
    ours, wanted = ours.detach().cpu().double(), wanted.detach().cpu().double()
    if not (ours.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    return ((ours - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def small_model() -> LMFusion:
    """The sizes of `small`, every parameter perturbed."""
    sizes = dict(vocab_size=600, hidden_size=128, intermediate_size=384, num_hidden_layers=6, head_dim=32)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, latent_channels=16, latent_size=8)
    sizes |= dict(unet_channels=(48, 96), unet_attention=False, patch_positions=True)
    model = conftest.build_model(**sizes)
    with torch.no_grad():
        for p in model.parameters():  # perturbed by 0.15 they say nothing at this width
            p.mul_(0.3) if p.dim() > 1 else None
    return model


def captioned(config: ModelConfig, n: int, seed: int = 0):
    """n documents of all three orders, with captions of unlike lengths, and their latents."""
    rng, orders = random.Random(seed), (CAPTION_FIRST, IMAGE_FIRST, CAPTION_DROPPED)
    captions = [[rng.randrange(10, config.vocab_size) for _ in range(rng.randint(3, 40))] for _ in range(n)]
    documents = [caption_document(i, c, orders[i % 3], config) for i, c in enumerate(captions)]
    for i, document in enumerate(documents):
        document.seed = 1000 * seed + i
    shape = n, config.latent_channels, config.latent_size, config.latent_size
    return documents, torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: LMFusion) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pack", (0, 300))
def test_features_losses_and_gradients_of_small_are_those_of_the_cpu(pack):
    model, config = small_model(), train.CONFIGS["small"]
    batch = collate(*captioned(model.config, 9), model.config, pack)
    found = []
    for device in ("cpu", DEVICE):
        here, there = copy.deepcopy(model).to(device), batch.to(device)
        parts = train.losses(here, there, config)
        train.total_loss(parts, config).backward()
        t = torch.full((9,), 400, device=device)
        features = here(there.prefix, there.rest, there.latents, t)[1]
        found.append((parts, gradients(here), features))
    (parts, wanted, features), (ours, got, our_features) = found
    assert difference(our_features.text, features.text) < 1e-4
    assert difference(our_features.image, features.image) < 1e-4
    for name, value in parts.items():
        assert difference(ours[name], value) < 1e-4, name
    assert got.keys() == wanted.keys() and len(got) > 100
    for name, value in wanted.items():
        assert difference(got[name], value) < 2e-3, name


def packed_row(lengths: list[tuple[int, int]], P: int) -> Tokens:
    """One row of documents (words before the image, words behind it)."""
    rows = [[[5] * a + [BOI, IMAGE, EOI] + [6] * b for a, b in lengths]]
    return Tokens.packed(rows, P)


def test_compiled_flex_attention_is_the_dense_mask_forward_and_backward_on_three_shapes(monkeypatch):
    """One after another in one process: a mask that depends on the batch, under dynamic shapes."""
    if ON_CPU:
        monkeypatch.setattr(attention_file, "compiled", lambda function: flex_attention)
    P, H, K, d = (16, 4, 2, 32) if ON_CPU else (256, 16, 8, 128)
    shapes = ([(3, 9)] * 5, [(40, 0), (7, 30)], [(1, 1), (90, 2), (5, 60)])
    for round_ in range(2):
        for i, lengths in enumerate(shapes):
            tokens = packed_row(lengths, P)
            N = tokens.ids.shape[1]
            generator = torch.Generator().manual_seed(10 * round_ + i)
            q, k, v = (
                torch.randn(1, heads, N, d, generator=generator)
                .to(DEVICE)
                .requires_grad_(not ON_CPU)  # torch has no backward of it on a CPU
                for heads in (H, K, K)
            )
            layout = object.__new__(Layout)
            layout.block_mask, layout.segments = make_block_mask(tokens, tokens, DEVICE), None
            out = layout.attend(q, k, v)
            weight = torch.randn(out.shape, generator=generator).to(DEVICE)
            ours = [out] if ON_CPU else [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]
            q, k, v = (x.detach().cpu().double().requires_grad_() for x in (q, k, v))
            scores = q @ k.repeat_interleave(H // K, 1).mT * d**-0.5
            scores = scores.masked_fill(~hybrid_mask(tokens, tokens)[:, None], -torch.inf)
            out = scores.softmax(-1) @ v.repeat_interleave(H // K, 1)
            wanted = out, *torch.autograd.grad((out * weight.cpu()).sum(), (q, k, v))
            for name, a, b in zip(("output", "q", "k", "v"), ours, wanted, strict=False):
                assert difference(a, b) < 1e-3, (round_, i, name)


def test_bfloat16_is_near_float32_at_the_layers_of_qwen3_0_6b():
    wide = dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8)
    wide |= dict(head_dim=128, num_hidden_layers=1 if ON_CPU else 2, vocab_size=1000, latent_size=8)
    wide |= dict(unet_channels=(64, 128)) if ON_CPU else dict(unet_channels=(640, 1792), latent_size=32)
    config = ModelConfig(**{**conftest.TINY, **wide})
    torch.manual_seed(0)
    model = LMFusion(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=p[0].numel() ** -0.5)
    model.freeze_text()
    paper = train.CONFIGS["qwen3-0.6b"]
    batch = collate(*captioned(config, 3 if ON_CPU else 12), config, 4096).to(DEVICE)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        here = copy.deepcopy(model).to(DEVICE, dtype)
        parts = train.losses(here, batch, paper)
        train.total_loss(parts, paper).backward()
        found.append((parts, gradients(here)))
        assert all(g.isfinite().all() for g in found[-1][1].values())
    (parts, wanted), (ours, got) = found
    for name, value in parts.items():
        assert difference(ours[name], value) < 2e-2, name
    names = [n for n, g in wanted.items() if g.numel() > 10_000 and g.norm() > 0]
    assert len(names) > 10
    far = {n: difference(got[n], wanted[n]) for n in names}
    assert max(far.values()) < 0.2 and sum(far.values()) / len(far) < 0.05, far


def test_writing_with_a_cache_is_writing_without():
    trained = helpers.perturbed()
    trained.model.to(DEVICE)
    config, ids = trained.model.config, [20, 30, 40, 50]
    prompt = trained.tokenizer.decode(ids)
    ids = trained.tokenizer.encode(prompt, add_special_tokens=False).ids
    with torch.inference_mode():
        row = list(ids)
        for _ in range(12):
            new = trained.model.text_logits(torch.tensor([row], device=DEVICE))[0, -1].argmax().item()
            if new == config.eos_id:
                break
            row.append(new)
    assert generate_text(trained, prompt, max_tokens=12) == trained.tokenizer.decode(row[len(ids) :])
    pictures = helpers.held_out_pictures(3)[0]
    ours = describe_images(trained, pictures, max_tokens=8)
    trained.model.to("cpu")
    assert ours == describe_images(trained, pictures, max_tokens=8)


def launch(folder: Path, *flags: object) -> str:
    """train.py as torchrun starts the only process of a run: over NCCL on a GPU."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    environment = os.environ | {k: str(v) for k, v in world.items()}
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_step_a_checkpoint_and_a_resumption_in_one_process_of_a_team(tmp_path, dtype):
    """Steps 3 and 4 again from the checkpoint at 2: the same weights; on a GPU, up to the order of sums."""
    out, where = tmp_path / "run", ("--device", DEVICE.type, "--dtype", dtype)
    flags = ("--pack", 64, "--activation-checkpointing", True, "--keep", 2, "--checkpoint-every", 2)
    launch(tmp_path, *helpers.photo_flags(out, *where, *flags, "--steps", 4))
    last = out / "step-000004"
    whole = load_file(last / "model.safetensors")
    assert [c.name for c in list_checkpoints(out)] == ["step-000002", last.name]
    shutil.rmtree(last)
    launch(tmp_path, *helpers.photo_flags(out, *where, "--resume"))
    again = load_file(last / "model.safetensors")
    before = load_file(out / "step-000002" / "model.safetensors")
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        assert difference(again[name], value) <= (0 if ON_CPU else 1e-3), name
    assert any(difference(before[n], value) > 1e-3 for n, value in whole.items())


def test_two_hundred_steps_of_small_end_where_those_of_the_cpu_end(tmp_path):
    """Within 2%, the mean of the last quarter; on a base of two steps of pretraining, pictures of `small`."""
    steps, ends = 8 if ON_CPU else 200, []
    for device in ("cpu", DEVICE.type):
        out = tmp_path / f"{device}-run"
        flags = ("--config", "small", *SHAPES, "--base", helpers.base(), "--out", out, "--steps", steps)
        flags += ("--batch-size", 8 if ON_CPU else 16, "--warmup", 10, "--log-every", 1, "--val-every", 10**6)
        flags += (
            "--device",
            device,
            "--sheet-every",
            0,
            "--checkpoint-every",
            10**6,
            "--unet-channels",
            "16,32",
        )
        helpers.good(train, *flags, folder=tmp_path)
        losses = [m["loss"] for m in read_metrics(out / "metrics.jsonl")]
        assert len(losses) == steps
        ends.append(sum(losses[-steps // 4 :]) / len(losses[-steps // 4 :]))
        if ON_CPU:  # once is enough
            ends *= 2
            break
    assert abs(ends[1] / ends[0] - 1) < 0.02, ends
