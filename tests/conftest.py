"""What the tests share: the repository on sys.path, tiny perturbed models, tiny Qwen3 folders.

Equivalence at initialisation proves nothing (norms of one, image experts that equal the text experts, layers
of zeros), so `make_model` adds noise to every parameter before a test sees the model.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network
os.environ["XDG_CACHE_HOME"] = str(Path(tempfile.gettempdir()) / "lmfusion-cache")  # nor the user's cache
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import helpers
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from load_qwen3 import init_image
from model import LMFusion, ModelConfig
from scale import sources, vae
from small import shapes

gc.freeze = lambda: None  # commands run in this process, and what tests have left must not stay in memory
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # tiny tensors: more threads only wait

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
TINY = dict(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    boi_id=1,
    eoi_id=2,
    eos_id=3,
    latent_channels=4,
    latent_size=8,
    unet_channels=(16, 32),
)  # head_dim is not hidden_size / heads; 16 patches an image
TINY_QWEN3 = dict(
    model_type="qwen3",
    architectures=["Qwen3ForCausalLM"],
    hidden_act="silu",
    attention_bias=False,
    vocab_size=288,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1000000,
    rope_scaling=None,
    max_position_embeddings=512,
    max_window_layers=2,
    sliding_window=None,
    use_sliding_window=False,
    tie_word_embeddings=True,
    torch_dtype="float32",
    bos_token_id=None,
)


@torch.no_grad()
def perturb_parameters(model: torch.nn.Module, std: float = 0.15, seed: int = 0) -> None:
    """Add noise to every parameter: norms, biases and zero-initialised layers included."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator), alpha=std)


def build_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> LMFusion:
    """A tiny LMFusion: image experts copied from the text's, then every parameter perturbed; text frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LMFusion(ModelConfig(**{**TINY, **changes}))
        init_image(model)
    perturb_parameters(model, seed=seed)
    model.freeze_text()
    return model.to(dtype)


def build_tokenizer() -> Tokenizer:
    """A byte-level BPE of 256 bytes, a few merges, and Qwen3's special tokens behind them: 269 tokens."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [
        ("Ġ", "a"),
        ("r", "e"),
        ("re", "d"),
        ("Ġ", "b"),
        ("l", "u"),
        ("lu", "e"),
        ("o", "n"),
        ("Ġ", "on"),
    ]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def random_qwen3_tensors(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under Hugging Face's names for a `config.json`; norms are not one."""
    D, V, mlp = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    H, K, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "self_attn.q_norm": (d,),
            "self_attn.k_norm": (d,),
            "self_attn.q_proj": (H * d, D),
            "self_attn.k_proj": (K * d, D),
            "self_attn.v_proj": (K * d, D),
            "self_attn.o_proj": (D, H * d),
            "mlp.gate_proj": (mlp, D),
            "mlp.up_proj": (mlp, D),
            "mlp.down_proj": (D, mlp),
        }
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(s, generator=generator) * 0.15 + (1.0 if "norm" in n else 0.0)
        for n, s in shapes.items()
    }


def save_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """`model.safetensors`, or shards and their index, as Hugging Face writes them."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map, names = {}, list(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in names[i::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def write_qwen3_folder(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, shards: int = 1, **changes
) -> Path:
    """A tiny Qwen3 as transformers 4 writes it; `changes` go to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = {**TINY_QWEN3, "eos_token_id": tokenizer.token_to_id("<|im_end|>"), **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save(str(folder / "tokenizer.json"))
    save_tensors(folder, {n: x.to(dtype) for n, x in random_qwen3_tensors(config, seed).items()}, shards)
    return folder


@pytest.fixture
def make_config() -> Callable[..., ModelConfig]:
    """make_config(**changes) -> a tiny ModelConfig."""
    return lambda **changes: ModelConfig(**{**TINY, **changes})


@pytest.fixture
def make_model() -> Callable[..., LMFusion]:
    """make_model(seed=0, dtype=float32, **changes of the config) -> a tiny perturbed model, text frozen."""
    return build_model


@pytest.fixture
def perturb() -> Callable[..., None]:
    """perturb(module, std=0.15, seed=0) adds noise to every parameter."""
    return perturb_parameters


@pytest.fixture
def write_qwen3() -> Callable[..., Path]:
    """write_qwen3(folder, seed=0, dtype=float32, shards=1, **changes of config.json) -> the folder."""
    return write_qwen3_folder


@pytest.fixture(scope="session")
def forks() -> BaseContext:
    """Where processes are forked from: one that has imported train.py and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_parallel"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in helpers.environment().items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="session", autouse=True)
def one_codec_a_seed() -> Iterator[None]:
    """PatchPCA is fitted once for each seed and size to the pictures that tests share, not by every run."""
    fitted, fit = {}, vae.make_codec

    def fit_once(config, sample, device):
        shared = config.data == "shapes" or config.data.startswith(helpers.session.name)
        if config.vae or not shared:
            return fit(config, sample, device)
        edits_alone = set(config.tasks) == {"edit"}
        of_pictures = (config.data, config.val_data, edits_alone, config.image_size, config.seed)
        key = (*of_pictures, config.latent_channels, config.latent_patch, config.whiten, device)
        if key not in fitted:
            fitted[key] = fit(config, sample, device)
        return fitted[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (shapes, sources):
            patch.setattr(module, "make_codec", fit_once)
        yield
