"""load_qwen3.py: the text half equals transformers' Qwen3, Llama and Qwen2; a misfit is an error naming it.

`fixtures/qwen3_*`, `llama3_rope` and `qwen2_biases` were written by transformers itself
(`fixtures/make_qwen3.py`). Errors are shown on a good folder that is broken in one place;
`test_an_unbroken_folder_loads` keeps those tests honest.
"""

from __future__ import annotations

import ast
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

import load_qwen3 as load_qwen3_file
import train
from attention import Tokens
from config import SMALL
from data import CAPTION_FIRST, IMAGE_FIRST, caption_document, collate
from load_qwen3 import (
    BOI,
    EOI,
    PAIRS,
    address,
    base_fingerprint,
    load_qwen3,
    load_tokenizer,
    materialise,
    resolve,
)
from model import LMFusion, rope_frequencies

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FOLDERS = ("qwen3_tied", "qwen3_untied_sharded")
LLAMA, QWEN2 = "llama3_rope", "qwen2_biases"
IMAGE_SIDE = dict(latent_size=8, unet_channels=(16, 32))  # keeps the U-Net tiny


# ---- parity with transformers ----


@torch.no_grad()
def greedy(model: LMFusion, ids: torch.Tensor, steps: int, cached: bool) -> torch.Tensor:
    """The greedy continuation (B, steps): every step reads everything again, or one token against a cache."""
    sequence, cache, read = ids, None, 0
    for _ in range(steps):
        hidden = model.encode(Tokens.text(sequence[:, read:], start=read), cache=cache)
        if cached:
            cache = hidden.cache if cache is None else cache.extend(hidden.cache)
            read = sequence.shape[1]
        last = model.logits(hidden.text).unflatten(0, (len(ids), -1))[:, -1]  # (B, V)
        sequence = torch.cat((sequence, last.argmax(-1, keepdim=True)), dim=1)
    return sequence[:, ids.shape[1] :]


def assert_parity(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    model = load_qwen3(folder, **IMAGE_SIDE)
    with torch.no_grad():
        difference = (model.text_logits(expected["ids"]) - expected["logits"]).abs().max().item()
    assert difference < 1e-4
    for cached in (False, True):
        assert greedy(model, expected["ids"], expected["greedy"].shape[1], cached).equal(expected["greedy"])


@pytest.mark.parametrize("name", (*FOLDERS, LLAMA, QWEN2))
def test_logits_and_greedy_ids_equal_those_that_transformers_gave(name):
    assert_parity(FIXTURES / name, load_file(FIXTURES / name / "expected.safetensors"))


def test_the_fixtures_are_hard_enough():
    """Own head_dim, grouped heads, perturbed norms; tied in one file and untied in shards; varied answers."""
    for name in FOLDERS:
        config = json.loads((FIXTURES / name / "config.json").read_text())
        assert config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]
        assert config["num_key_value_heads"] < config["num_attention_heads"]
        assert config["tie_word_embeddings"] == (name == "qwen3_tied")
        norms = {
            n: p
            for n, p in load_qwen3(FIXTURES / name, **IMAGE_SIDE).text_parameters().items()
            if "norm" in n
        }
        assert len(norms) == 1 + 4 * config["num_hidden_layers"]
        assert all((p - 1).abs().max() > 0.2 for p in norms.values())
        assert len(load_file(FIXTURES / name / "expected.safetensors")["greedy"].unique()) > 6
    assert (FIXTURES / "qwen3_tied" / "model.safetensors").is_file()
    assert len(list((FIXTURES / "qwen3_untied_sharded").glob("model-*.safetensors"))) == 2


@torch.no_grad()
def logits_without(folder: Path, ids: torch.Tensor, **overrides) -> torch.Tensor:
    return load_qwen3(folder, **IMAGE_SIDE, **overrides).text_logits(ids)


def test_the_llama_fixture_has_pairs_of_all_three_kinds_and_each_kind_matters():
    """Kept, interpolated and slowed down; a context that is several times the original one."""
    folder, expected = FIXTURES / LLAMA, load_file(FIXTURES / LLAMA / "expected.safetensors")
    config = load_qwen3(folder, **IMAGE_SIDE).config
    assert not config.qk_norm and not config.attention_bias and config.tie_word_embeddings
    factor, low, high, context = config.rope_scaling
    turns = context * config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim) / math.tau
    kinds = [
        int(x) for x in ((turns > high).sum(), ((turns > low) & (turns < high)).sum(), (turns < low).sum())
    ]
    assert kinds == [1, 1, 4] and expected["ids"].shape[1] == 4 * context
    assert len(expected["greedy"].unique()) > 6
    for other in (None, (factor, low, 4.0, context), (factor, 0.9, high, context), (factor, low, high, 64)):
        wrong = logits_without(folder, expected["ids"], rope_scaling=other)
        assert (wrong - expected["logits"]).abs().amax(-1)[0, context:].min() > 1e-2, other


def test_the_qwen2_fixture_has_biases_that_matter():
    folder, expected = FIXTURES / QWEN2, load_file(FIXTURES / QWEN2 / "expected.safetensors")
    model = load_qwen3(folder, **IMAGE_SIDE)
    assert model.config.attention_bias and not model.config.qk_norm and not model.config.tie_word_embeddings
    biases = [n for n in model.text_parameters() if n.endswith(".bias")]
    assert len(biases) == 3 * model.config.num_hidden_layers
    assert len(expected["greedy"].unique()) > 6
    for name in biases:  # each of them
        with torch.no_grad():
            bias = model.get_parameter(name)
            kept = bias.clone()
            bias.zero_()
            assert (model.text_logits(expected["ids"]) - expected["logits"]).abs().max() > 1e-2, name
            bias.copy_(kept)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ("one head a key", "all heads on one key", "tied shards"))
def test_parity_with_transformers_live(tmp_path, monkeypatch, seed, shape):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FIXTURES))
    make_qwen3 = pytest.importorskip("make_qwen3")
    fields = {
        "one head a key": dict(num_attention_heads=3, num_key_value_heads=3, head_dim=12, rope_theta=1e4),
        "all heads on one key": dict(
            num_attention_heads=4, num_key_value_heads=1, head_dim=6, num_hidden_layers=3
        ),
        "tied shards": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, shard_size="50KB"),
    }[shape]
    fields = {"rope_theta": 1e6, "tie_word_embeddings": shape == "tied shards", **fields}
    expected = make_qwen3.make(
        tmp_path / "q", 100 + seed, hidden_size=32, intermediate_size=40, rms_norm_eps=1e-5, **fields
    )
    assert_parity(tmp_path / "q", expected)


LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=0.5,
    high_freq_factor=2.5,
    original_max_position_embeddings=20,
)
OTHERS = {
    "llama as its first version": dict(
        kind="llama", num_attention_heads=4, num_key_value_heads=4, rope_theta=1e4
    ),
    "llama with its own head_dim": dict(
        kind="llama", num_attention_heads=4, num_key_value_heads=2, head_dim=10, rope_theta=5e5
    ),
    "llama 3.1": dict(
        kind="llama", num_attention_heads=4, num_key_value_heads=1, rope_theta=30.0, rope=LLAMA3, length=70
    ),
    "llama 3.1 in tied shards": dict(
        kind="llama",
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_theta=1e3,
        rope={**LLAMA3, "factor": 32.0, "high_freq_factor": 4.0},
        tie_word_embeddings=True,
        shard_size="50KB",
        length=50,
    ),
    "qwen2": dict(kind="qwen2", num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6),
    "qwen2 with all heads on one key": dict(
        kind="qwen2", num_attention_heads=2, num_key_value_heads=1, rope_theta=1e4, tie_word_embeddings=True
    ),
    "qwen3 with llama's rope": dict(
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, rope_theta=50.0, rope=LLAMA3, length=50
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", OTHERS)
def test_parity_with_transformers_live_on_other_models(tmp_path, monkeypatch, seed, shape):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FIXTURES))
    make_qwen3 = pytest.importorskip("make_qwen3")
    fields = {"hidden_size": 32, "intermediate_size": 40, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    expected = make_qwen3.make(tmp_path / "q", 200 + seed, **fields | OTHERS[shape])
    assert_parity(tmp_path / "q", expected)


# A real Llama folder (a small one: SmolLM2-135M, say) may be named in the environment.
NO_LLAMA = pytest.mark.skipif(
    "LLAMA_FOLDER" not in os.environ, reason="LLAMA_FOLDER names no folder of a real Llama"
)
REAL_TEXT = """The tide had gone out overnight, and the harbour lay grey and quiet under a thin rain. Three
boats leaned against the wall, their ropes slack; a fourth, painted blue in 1962 and never since, had been
hauled up on the shingle. "She won't float again," said the old man, "not with that hole in her." He counted
on his fingers: planks, nails, tar, at least 40 hours of work. Where would anyone find the money? Yet every
evening his granddaughter came down with a lamp, a plane and a notebook, and every evening the hole was a
little smaller. By the first week of March there was nothing left to repair, so they waited for a spring tide
(the 21st, by the almanac), greased the rollers, and pushed. The boat moved, stopped, moved again, and then,
quite suddenly, it"""


@NO_LLAMA
def test_a_real_llama_has_transformers_logits_and_goes_on_with_a_text_like_it():
    transformers = pytest.importorskip("transformers")
    folder = os.environ["LLAMA_FOLDER"]
    model, tokenizer = load_qwen3(folder, **IMAGE_SIDE), load_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode(REAL_TEXT, add_special_tokens=False).ids])
    assert tokenizer.decode(ids[0].tolist()) == REAL_TEXT and ids.shape[1] > 150
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (model.text_logits(ids) - expected).abs().max() < 1e-3
        answer = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=60,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert greedy(model, ids, 60, cached=True).equal(answer[:, ids.shape[1] :])
    # it is a real model, whose text the names of its tensors fit
    assert torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:]) < 5


def train_image_side(model: LMFusion, captions: list[list[int]], steps: int) -> list[float]:
    """AdamW on the image side alone, on random latents; returns the losses."""
    generator, rng, c = torch.Generator().manual_seed(0), random.Random(0), model.config
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1
    )
    history = []
    for _ in range(steps):
        latents = torch.randn(
            len(captions), c.latent_channels, c.latent_size, c.latent_size, generator=generator
        )
        orders = rng.choices((CAPTION_FIRST, IMAGE_FIRST), k=len(captions))
        documents = [caption_document(None, x, o, c, 200) for x, o in zip(captions, orders, strict=True)]
        for document in documents:
            document.seed = rng.getrandbits(63)
        out = train.losses(model, collate(documents, latents, c), SMALL)
        train.total_loss(out, SMALL).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(out["ddpm_loss"].item())
    return history


def check_text_stays(folder: Path, ids: torch.Tensor, captions: list[list[int]], steps: int) -> None:
    model = load_qwen3(folder, **IMAGE_SIDE)
    with torch.no_grad():
        logits = model.text_logits(ids)
    text = {n: p.detach().clone() for n, p in model.text_parameters().items()}
    image = {n: p.detach().clone() for n, p in model.image_parameters().items()}
    losses = train_image_side(model, captions, steps)
    assert all(map(math.isfinite, losses))
    assert all(not torch.equal(p, image[n]) for n, p in model.image_parameters().items())
    assert all(torch.equal(p, text[n]) for n, p in model.text_parameters().items())
    with torch.no_grad():
        assert torch.equal(model.text_logits(ids), logits)


@pytest.mark.slow
@NO_LLAMA
def test_fifty_steps_of_image_training_leave_a_real_llamas_text_alone():
    folder = Path(os.environ["LLAMA_FOLDER"])
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(REAL_TEXT, add_special_tokens=False).ids])
    captions = [tokenizer.encode(x).ids for x in ("a boat on the shingle", "a lamp, a plane and a notebook")]
    check_text_stays(folder, ids, captions, steps=50)


@pytest.mark.parametrize("name", (LLAMA, QWEN2))
def test_image_training_leaves_the_text_of_other_models_alone(name):
    ids = torch.randint(288, (2, 20), generator=torch.Generator().manual_seed(0))
    check_text_stays(FIXTURES / name, ids, [[5, 6, 7], [8, 9, 10, 11]], steps=4)


# ---- what comes out ----


@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize("tied", (True, False))
def test_an_unbroken_folder_loads(tmp_path, write_qwen3, shards, tied):
    folder = write_qwen3(tmp_path / "q", shards=shards, tie_word_embeddings=tied)
    model = load_qwen3(folder, **IMAGE_SIDE)
    assert model.text_logits(torch.arange(6).view(2, 3)).shape == (2, 3, 288)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


def test_every_text_tensor_is_the_checkpoints_and_frozen(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q", tie_word_embeddings=False)
    stored, text = load_file(folder / "model.safetensors"), load_qwen3(folder, **IMAGE_SIDE).text_parameters()
    assert len(stored) == len(text)
    for name, p in text.items():
        theirs = {
            "embed_tokens.weight": "model.embed_tokens.weight",
            "norm_text.weight": "model.norm.weight",
        }.get(name, name if name == "lm_head.weight" else "model." + name.replace(".text.", "."))
        assert torch.equal(p, stored[theirs]) and not p.requires_grad and not p.is_meta, name


def test_image_experts_equal_text_experts_but_are_their_own_and_train(tmp_path, write_qwen3):
    model = load_qwen3(write_qwen3(tmp_path / "q"), **IMAGE_SIDE)
    pairs = [(model.norm_image.weight, model.norm_text.weight)]
    for block in model.layers:
        text = dict(block.text.named_parameters())
        assert len(text) == 11
        pairs += [(p, text[n]) for n, p in block.image.named_parameters()]
    assert len(pairs) == 1 + 11 * len(model.layers)
    for image, text in pairs:
        assert torch.equal(image, text) and image.data_ptr() != text.data_ptr() and image.requires_grad
    assert all(
        p.requires_grad and not p.is_meta and p.isfinite().all() for p in model.image_parameters().values()
    )
    assert not any(b.is_meta for b in model.buffers())


@pytest.mark.parametrize("separation", ("deep", "shallow", "none"))
@pytest.mark.parametrize("tied", (True, False))
def test_text_is_taken_as_it_is_read_and_the_image_side_has_memory_of_its_own(make_config, separation, tied):
    with torch.device("meta"):
        model = LMFusion(make_config(separation=separation, tie_word_embeddings=tied))
    names = [n for n, _ in model.named_parameters()]
    read = {n: torch.randn(p.shape) for n, p in model.text_parameters().items()}
    materialise(model, read.__getitem__, torch.float32)
    assert [n for n, _ in model.named_parameters()] == names  # what was shared is
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    for name, p in model.text_parameters().items():
        assert p.data_ptr() == read[name].data_ptr() and not p.requires_grad
    image = model.image_parameters().values()
    assert not {p.data_ptr() for p in image} & {x.data_ptr() for x in read.values()}
    assert all(p.requires_grad and not p.is_meta for p in image)


def test_a_command_imports_little_beside_torch():
    code = "import sys, torch; old = set(sys.modules); import sample, train, evaluate; "
    code += f"sample.load_trained({str(helpers.photo_run())!r}); "
    code += "print(set(sys.modules) - old)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=helpers.ROOT, capture_output=True, text=True, check=True
    )
    new = ast.literal_eval(done.stdout)
    assert {"sample", "train", "evaluate", "tokenizers", "PIL.Image"} <= new
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp")
    heavy += ("sympy", "huggingface_hub", "transformers", "diffusers")
    assert [m for m in sorted(new) if m.startswith(heavy)] == []


def test_a_loaded_model_runs_images(tmp_path, write_qwen3):
    model = load_qwen3(write_qwen3(tmp_path / "q"), **IMAGE_SIDE)
    tokens = Tokens.rows([[7, model.config.boi_id, -1, model.config.eoi_id]], model.config.num_patches)
    hidden = model.encode(tokens, torch.randn(1, 4, 8, 8), torch.tensor([5]))
    assert hidden.image.isfinite().all() and model.unet_output(hidden).shape == (1, 4, 8, 8)
    assert not model.unet_output(hidden).any()  # only the last convolution starts at zero
    assert [n for n, p in model.named_parameters() if n.endswith("weight") and not p.any()] == [
        "unet_up.conv_out.weight"
    ]


def test_overrides_and_the_checkpoints_own_fields_reach_the_config(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q", rope_theta=12345, rms_norm_eps=1e-3, max_position_embeddings=77)
    model = load_qwen3(
        folder,
        separation="shallow",
        latent_channels=3,
        latent_size=4,
        unet_channels=(8, 8),
        unet_attention=False,
        patch_positions=True,
    )
    config = model.config
    assert (config.separation, config.latent_channels, config.num_patches) == ("shallow", 3, 4)
    assert model.layers[0].image.self_attn is model.layers[0].text.self_attn
    assert model.unet_down.conv_in.weight.shape == (8, 3, 3, 3) and model.unet_down.position.shape == (4, 32)
    assert (config.rope_theta, config.rms_norm_eps, config.max_position_embeddings) == (12345.0, 1e-3, 77)
    tokenizer = load_tokenizer(folder)
    assert [config.boi_id, config.eoi_id, config.eos_id] == [
        tokenizer.token_to_id(t) for t in (BOI, EOI, "<|im_end|>")
    ]


def test_an_unknown_override_is_named(tmp_path, write_qwen3):
    with pytest.raises(ValueError, match="latent_chanels.*latent_channels"):
        load_qwen3(write_qwen3(tmp_path / "q"), latent_chanels=4)


@pytest.mark.parametrize("field", ("rope_scaling", "rope_parameters"))
def test_rope_theta_is_read_where_transformers_5_writes_it(tmp_path, write_qwen3, field):
    folder = write_qwen3(tmp_path / "q", **{field: {"rope_type": "default", "rope_theta": 5000.0}})
    edit(folder, rope_theta=REMOVED)
    assert load_qwen3(folder, **IMAGE_SIDE).config.rope_theta == 5000.0


def test_eos_falls_back_to_the_tokenizers_end_of_text(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q")
    edit(folder, eos_token_id=None)
    assert load_qwen3(folder, **IMAGE_SIDE).config.eos_id == load_tokenizer(folder).token_to_id(
        "<|endoftext|>"
    )
    edit(folder, eos_token_id=[9, 8])
    assert load_qwen3(folder, **IMAGE_SIDE).config.eos_id == 9


def test_bfloat16_checkpoints_load_as_float32_and_as_bfloat16(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q", dtype=torch.bfloat16)
    full, half = load_qwen3(folder, **IMAGE_SIDE), load_qwen3(folder, torch.bfloat16, **IMAGE_SIDE)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for name, p in half.text_parameters().items():
        assert torch.equal(p.float(), full.text_parameters()[name]), name
    ids = torch.arange(20).view(2, 10)
    expected = full.text_logits(ids)
    assert (half.text_logits(ids).float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_tied_copy_and_old_rotary_buffers_in_the_file_are_accepted(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q")
    tensors = load_file(folder / "model.safetensors")
    expected = load_qwen3(folder, **IMAGE_SIDE).text_logits(torch.arange(9)[None])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors")
    assert load_qwen3(folder, **IMAGE_SIDE).text_logits(torch.arange(9)[None]).equal(expected)


def test_the_fingerprint_is_that_of_every_bit_of_the_text_however_it_is_stored(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q")
    wanted = helpers.text_fingerprint(load_qwen3(folder, **IMAGE_SIDE))  # as the first checkpoints have it
    assert base_fingerprint(folder) == wanted
    tensors = load_file(folder / "model.safetensors")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "model.safetensors").unlink()
    tied = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    conftest.save_tensors(other, tensors | tied, shards=2)
    assert base_fingerprint(other) == wanted
    tensors["model.layers.1.self_attn.k_norm.weight"][3] += 1e-6
    save_file(tensors, folder / "model.safetensors")
    assert base_fingerprint(folder) != wanted


def test_the_fingerprint_is_computed_once_and_again_when_a_file_changes(tmp_path, write_qwen3, monkeypatch):
    folder, read = write_qwen3(tmp_path / "q"), []
    real = load_qwen3_file.text_tensors
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(load_qwen3_file, "text_tensors", lambda *a: read.append(1) or real(*a))
    first = base_fingerprint(folder)
    assert base_fingerprint(folder) == first and len(read) == 1
    (kept,) = (tmp_path / "cache" / "lmfusion").iterdir()
    kept.write_text("{}")  # not what we wrote
    assert base_fingerprint(folder) == first and len(read) == 2
    kept.write_text(json.dumps({"files": {}, "fingerprint": "0" * 64}))
    assert base_fingerprint(folder) == first and len(read) == 3
    os.utime(folder / "model.safetensors", ns=(1, 1))  # may be another file of the same size
    assert base_fingerprint(folder) == first and len(read) == 4
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: deny())
    kept.unlink()
    assert base_fingerprint(folder) == first and len(read) == 5 and not kept.exists()
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def deny() -> None:
    raise PermissionError(13, "Permission denied")


def test_a_tokenizer_reads_back_what_it_wrote_and_keeps_special_tokens_whole(tmp_path, write_qwen3):
    tokenizer = load_tokenizer(write_qwen3(tmp_path / "q"))
    text = "a red circle on a blue background"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text and len(ids) < len(text)
    assert tokenizer.encode(f"x{BOI}{EOI}").ids[1:] == [
        tokenizer.token_to_id(BOI),
        tokenizer.token_to_id(EOI),
    ]


# ---- Llama and Qwen2 ----


def copy_fixture(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, folder))


def test_a_llama_without_head_dim_takes_its_share_of_the_hidden_size(tmp_path):
    folder, expected = copy_fixture(LLAMA, tmp_path / "q"), FIXTURES / LLAMA / "expected.safetensors"
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 12
    for value in (REMOVED, None):
        edit(folder, head_dim=value)
        assert load_qwen3(folder, **IMAGE_SIDE).config.head_dim == 24 // 2
        assert_parity(folder, load_file(expected))


def test_a_qwen3_without_head_dim_has_128(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q", head_dim=128, num_hidden_layers=1)
    edit(folder, head_dim=REMOVED)
    assert load_qwen3(folder, **IMAGE_SIDE).config.head_dim == 128


def test_a_llama_without_a_number_of_key_heads_has_one_for_each_head(tmp_path):
    folder = copy_fixture(LLAMA, tmp_path / "q")
    edit(folder, num_key_value_heads=REMOVED)
    assert_refused(folder, "k_proj", "(24, 24)")


def test_llama3s_rope_is_read_where_transformers_4_writes_it(tmp_path):
    folder = copy_fixture(LLAMA, tmp_path / "q")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    for form in (rope, {"type": rope["rope_type"], **{k: v for k, v in rope.items() if k != "rope_type"}}):
        edit(folder, rope_parameters=REMOVED, rope_theta=theta, rope_scaling=form)
        assert load_qwen3(folder, **IMAGE_SIDE).config.rope_scaling == (8.0, 1.0, 2.0, 16)
        assert_parity(folder, load_file(folder / "expected.safetensors"))


def test_llama3s_rope_is_that_of_the_published_code(make_config):
    """Llama 3.1 8B's own numbers, in the words of its authors."""
    config = make_config(head_dim=128, rope_theta=5e5, rope_scaling=(8.0, 1.0, 4.0, 8192))
    kinds, expected = [0, 0, 0], []
    for i in range(64):
        frequency = 5e5 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            kinds[0] += 1
        elif wavelength > 8192 / 1:
            kinds[2] += 1
            frequency /= 8
        else:
            kinds[1] += 1
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        expected.append(frequency)
    assert min(kinds) > 5
    torch.testing.assert_close(rope_frequencies(config), torch.tensor(expected), rtol=1e-5, atol=0)


def test_qwen2s_biases_are_copied_into_the_image_experts_which_use_and_train_their_own():
    model = load_qwen3(FIXTURES / QWEN2, **IMAGE_SIDE)
    stored = load_file(FIXTURES / QWEN2 / "model.safetensors")
    tokens = Tokens.rows([[7, model.config.boi_id, -1, model.config.eoi_id]], model.config.num_patches)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(12).view(2, 6)

    @torch.no_grad()
    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        return model.encode(tokens, latents, torch.tensor([5])).image, model.text_logits(ids)

    image, logits = outputs()
    for i, block in enumerate(model.layers):
        for x in "qkv":
            text, own = (getattr(e.self_attn, f"{x}_proj").bias for e in (block.text, block.image))
            assert (
                torch.equal(text, stored[f"model.layers.{i}.self_attn.{x}_proj.bias"])
                and text.abs().min() > 0
            )
            assert torch.equal(text, own) and text.data_ptr() != own.data_ptr()
            assert own.requires_grad and not text.requires_grad
            with torch.no_grad():
                kept = own.clone()
                own.add_(torch.linspace(-1, 1, len(own)))
                changed, same = outputs()
                own.copy_(kept)
            assert (changed - image).abs().max() > 1e-3 and torch.equal(same, logits), (i, x)
        assert block.text.self_attn.o_proj.bias is None


@pytest.mark.parametrize("value", (True, False))
def test_qwen2_has_its_biases_whatever_the_config_says(tmp_path, value):
    folder = copy_fixture(QWEN2, tmp_path / "q")
    edit(folder, attention_bias=value)
    assert_parity(folder, load_file(folder / "expected.safetensors"))


def test_a_qwen2_without_a_bias_and_a_llama_with_one_are_refused_by_that_tensor(tmp_path):
    name = "model.layers.1.self_attn.v_proj.bias"
    qwen2, llama = copy_fixture(QWEN2, tmp_path / "q"), copy_fixture(LLAMA, tmp_path / "l")
    edit_tensors(qwen2, lambda x: x.pop(name))
    assert_refused(qwen2, name, "missing")
    edit_tensors(llama, lambda x: x.update({name: torch.zeros(12)}))
    assert_refused(llama, name)
    llama = copy_fixture(LLAMA, tmp_path / "norm")
    edit_tensors(llama, lambda x: x.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(12)}))
    assert_refused(llama, "q_norm")


ROPE3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0) | {
    "original_max_position_embeddings": 64
}
REFUSED_OF_OTHERS = [
    (LLAMA, "attention_bias", True, ()),
    (LLAMA, "mlp_bias", True, ()),
    (QWEN2, "mlp_bias", True, ()),
    (LLAMA, "model_type", "mistral", ("qwen3", "llama", "qwen2")),
    (QWEN2, "use_sliding_window", True, ()),
    (QWEN2, "layer_types", ["full_attention", "sliding_attention"], ()),
    (LLAMA, "hidden_act", "gelu", ()),
    (LLAMA, "rope_scaling", {"rope_type": "linear", "factor": 2.0}, ("linear", "llama3")),
    (LLAMA, "rope_scaling", {"type": "dynamic", "factor": 2.0}, ("dynamic",)),
    (LLAMA, "rope_parameters", {"rope_type": "yarn", "factor": 2.0}, ("yarn",)),
    (
        QWEN2,
        "rope_scaling",
        {"rope_type": "longrope", "short_factor": [1], "long_factor": [2]},
        ("longrope",),
    ),
    (LLAMA, "rope_scaling", ["llama3"], ()),
    *[
        (LLAMA, place, {**ROPE3, field: value}, ("factor", "original_max_position_embeddings"))
        for place, field, value in [
            ("rope_scaling", "factor", None),
            ("rope_scaling", "factor", 0),
            ("rope_scaling", "factor", "8"),
            ("rope_scaling", "factor", True),
            ("rope_parameters", "factor", math.nan),
            ("rope_parameters", "low_freq_factor", -1.0),
            ("rope_parameters", "low_freq_factor", 4.0),
            ("rope_scaling", "high_freq_factor", 0.5),
            ("rope_scaling", "high_freq_factor", None),
            ("rope_parameters", "original_max_position_embeddings", 0),
            ("rope_scaling", "original_max_position_embeddings", [64]),
        ]
    ],
]


@pytest.mark.parametrize(
    ("name", "field", "value", "words"),
    REFUSED_OF_OTHERS,
    ids=[f"{n}: {f}={v}" for n, f, v, _ in REFUSED_OF_OTHERS],
)
def test_a_llama_or_qwen2_that_is_not_built_is_refused_by_field(tmp_path, name, field, value, words):
    folder = copy_fixture(name, tmp_path / "q")
    edit(folder, **{field: value})
    assert_refused(folder, "config.json", field, *words)


def test_llama3_with_good_numbers_in_either_place_is_not_refused(tmp_path):
    for place in ("rope_scaling", "rope_parameters"):
        folder = copy_fixture(LLAMA, tmp_path / place)
        edit(folder, rope_parameters=REMOVED)
        edit(folder, **{place: ROPE3})
        assert load_qwen3(folder, **IMAGE_SIDE).config.rope_scaling == (8.0, 1.0, 4.0, 64)


# ---- which tokens stand around an image ----


def with_tokens(folder: Path, *tokens: str, plain: tuple[str, ...] = ()) -> Path:
    """The folder's tokenizer with these special tokens, in this order from 256 + 8 on, and no other; and with
    `plain` ones, which are added tokens but not special."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    form = raw["added_tokens"][0]
    raw["added_tokens"] = [
        {**form, "id": 264 + i, "content": token, "special": token in tokens}
        for i, token in enumerate((*tokens, *plain))
    ]
    path.write_text(json.dumps(raw))
    return folder


LLAMA_PAIR, SMOL_PAIR = PAIRS[1], PAIRS[2]


@pytest.mark.parametrize(
    ("tokens", "pair"),
    [
        ((BOI, EOI), PAIRS[0]),
        (LLAMA_PAIR, LLAMA_PAIR),
        (SMOL_PAIR, SMOL_PAIR),
        ((*SMOL_PAIR, *LLAMA_PAIR, EOI, BOI), PAIRS[0]),  # the first of PAIRS, whatever the order of the ids
        ((*SMOL_PAIR, *LLAMA_PAIR), LLAMA_PAIR),
        ((BOI, *LLAMA_PAIR), LLAMA_PAIR),  # half a pair does not count where there is a whole one
        ((EOI, LLAMA_PAIR[0], *SMOL_PAIR), SMOL_PAIR),
    ],
    ids=str,
)
def test_the_first_pair_of_special_tokens_stands_around_an_image(tmp_path, tokens, pair):
    assert len(PAIRS) == 3 and PAIRS[0] == (BOI, EOI)
    config = load_qwen3(with_tokens(copy_fixture(LLAMA, tmp_path / "q"), *tokens), **IMAGE_SIDE).config
    assert (config.boi_id, config.eoi_id) == tuple(264 + tokens.index(token) for token in pair)


@pytest.mark.parametrize(
    "tokens",
    ((), ("<|endoftext|>",), (LLAMA_PAIR[0], SMOL_PAIR[1]), (BOI, LLAMA_PAIR[1]), (EOI, SMOL_PAIR[0])),
    ids=str,
)
def test_without_any_pair_all_of_them_are_named(tmp_path, tokens):
    folder = with_tokens(copy_fixture(LLAMA, tmp_path / "q"), *tokens)
    assert_refused(folder, "tokenizer.json", BOI, *LLAMA_PAIR, *SMOL_PAIR)


def test_a_token_that_is_there_but_not_special_does_not_count(tmp_path):
    folder = with_tokens(copy_fixture(LLAMA, tmp_path / "a"), *SMOL_PAIR, plain=(BOI, EOI, *LLAMA_PAIR))
    config = load_qwen3(folder, **IMAGE_SIDE).config
    assert (config.boi_id, config.eoi_id) == (264, 265)
    folder = with_tokens(copy_fixture(LLAMA, tmp_path / "b"), BOI, plain=(EOI,))
    assert_refused(folder, BOI, EOI)
    folder = with_tokens(copy_fixture(LLAMA, tmp_path / "c"), plain=(BOI, EOI, *LLAMA_PAIR, *SMOL_PAIR))
    assert_refused(folder, BOI, *LLAMA_PAIR, *SMOL_PAIR)


# ---- what is refused ----

REMOVED = object()  # a field taken out of config.json


def edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not REMOVED}))


def edit_tensors(folder: Path, change, file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def assert_refused(folder: Path, *names: str) -> None:
    with pytest.raises(ValueError) as error:
        load_qwen3(folder, **IMAGE_SIDE)
    for name in names:
        assert name in str(error.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
REFUSED_FIELDS = [
    ("model_type", "gemma"),
    ("model_type", "qwen3_moe"),
    ("model_type", REMOVED),
    ("hidden_act", "gelu"),
    ("attention_bias", True),
    ("use_sliding_window", True),
    ("num_experts", 8),
    ("num_local_experts", 8),
    ("rope_scaling", YARN),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rope_parameters", YARN),
    ("rope_parameters", [1]),
    ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("quantization_config", {"bits": 4}),
    *[
        (f, REMOVED)
        for f in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    ],
    ("hidden_size", 32.5),
    ("hidden_size", 32.0),
    ("num_hidden_layers", "2"),
    ("vocab_size", True),
    ("head_dim", 0),
    ("num_key_value_heads", -2),
    ("intermediate_size", [48]),
    ("num_key_value_heads", 3),
    ("max_position_embeddings", 512.5),
    ("vocab_size", 260),
]


@pytest.mark.parametrize(
    ("field", "value"),
    REFUSED_FIELDS,
    ids=[f"{f}={'REMOVED' if v is REMOVED else v}" for f, v in REFUSED_FIELDS],
)
def test_a_config_that_is_not_built_is_refused_by_field(tmp_path, write_qwen3, field, value):
    folder = write_qwen3(tmp_path / "q")
    edit(folder, **{field: value})
    assert_refused(folder, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("num_attention_heads", None),
        ("rms_norm_eps", "tiny"),
        ("rope_theta", "big"),
        ("tie_word_embeddings", "false"),
        ("layer_types", 5),
        ("head_dim", 15),
        ("eos_token_id", -1),
        ("eos_token_id", ["<|endoftext|>"]),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_by_field(tmp_path, write_qwen3, field, value):
    folder = write_qwen3(tmp_path / "q")
    edit(folder, **{field: value})
    assert_refused(folder, field)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"qwen3"', "null", "\x00"])
def test_a_config_file_that_is_no_json_object_is_named(tmp_path, write_qwen3, text):
    folder = write_qwen3(tmp_path / "q")
    (folder / "config.json").write_text(text)
    assert_refused(folder, "config.json")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, write_qwen3, file):
    folder = write_qwen3(tmp_path / "q")
    (folder / file).unlink()
    assert_refused(folder, str(folder), file)


NORM, GATE = "model.layers.1.self_attn.q_norm.weight", "model.layers.0.mlp.gate_proj.weight"
BROKEN_TENSORS = [
    ("missing tensor", lambda x: x.pop(NORM), NORM),
    ("missing layer's tensor", lambda x: x.pop(GATE), GATE),
    ("missing embedding", lambda x: x.pop("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    ("bias", lambda x: x.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}), "q_proj.bias"),
    (
        "extra layer",
        lambda x: x.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}),
        "model.layers.2.",
    ),
    (
        "foreign tensor",
        lambda x: x.update({"visual.patch_embed.weight": torch.ones(3)}),
        "visual.patch_embed.weight",
    ),
    ("transposed", lambda x: x.update({GATE: x[GATE].T.contiguous()}), GATE),
    ("one row less", lambda x: x.update({"model.embed_tokens.weight": torch.ones(287, 32)}), "(287, 32)"),
    ("one axis more", lambda x: x.update({NORM: torch.ones(1, 16)}), NORM),
    ("whole numbers", lambda x: x.update({NORM: torch.ones(16, dtype=torch.int32)}), NORM),
    ("tied head that differs", lambda x: x.update({"lm_head.weight": torch.ones(288, 32)}), "lm_head.weight"),
]


@pytest.mark.parametrize(
    ("change", "name"), [b[1:] for b in BROKEN_TENSORS], ids=[b[0] for b in BROKEN_TENSORS]
)
def test_every_tensor_is_accounted_for_by_name_shape_and_type(tmp_path, write_qwen3, change, name):
    folder = write_qwen3(tmp_path / "q")
    edit_tensors(folder, change)
    assert_refused(folder, name)


def test_an_untied_model_without_its_head_is_refused(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q")
    edit(folder, tie_word_embeddings=False)
    assert_refused(folder, "lm_head.weight")


@pytest.mark.parametrize(
    "content",
    [
        lambda b: b"",
        lambda b: b[:5],
        lambda b: b[:200],
        lambda b: b[:-1],
        lambda b: b"\xff" * 64,
        lambda b: b[:8] + b"!" + b[9:],
    ],
    ids=["empty", "5 bytes", "200 bytes", "one byte short", "garbage", "broken header"],
)
def test_a_corrupt_or_truncated_file_is_named(tmp_path, write_qwen3, content):
    folder = write_qwen3(tmp_path / "q")
    file = folder / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    assert_refused(folder, str(file))


SHARD = "model-00002-of-00003.safetensors"
ELSEWHERE = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", 7]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_that_points_elsewhere_is_refused_by_that_name(tmp_path, write_qwen3, name):
    folder = write_qwen3(tmp_path / "q", shards=3)
    if name == "../x.safetensors":  # even where such a file exists
        (folder / SHARD).rename(tmp_path / "x.safetensors")
    edit_index(folder, lambda index: index["weight_map"].update({NORM: name}))
    assert_refused(folder, str(name), str(folder))


def test_a_missing_shard_is_named(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q", shards=3)
    (folder / SHARD).unlink()
    assert_refused(folder, SHARD)


def test_a_truncated_shard_is_named(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q", shards=3)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-4])
    assert_refused(folder, SHARD)


def test_a_tensor_that_is_not_in_the_index_is_named(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q", shards=3)
    edit_index(folder, lambda index: index["weight_map"].pop(NORM))
    assert_refused(folder, NORM, "index")


def test_a_tensor_of_the_index_that_no_file_holds_is_named(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q", shards=3)
    edit_index(folder, lambda index: index["weight_map"].update({"model.ghost": SHARD}))
    assert_refused(folder, "model.ghost")


def test_a_tensor_in_two_shards_is_named(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q", shards=3)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(f for f in sorted(set(weight_map.values())) if f != weight_map[NORM])
    edit_tensors(folder, lambda x: x.update({NORM: torch.ones(16)}), other)
    assert_refused(folder, NORM)


@pytest.mark.parametrize("index", [{"metadata": {}}, {"weight_map": None}, {"weight_map": [1]}])
def test_an_index_without_a_weight_map_is_named(tmp_path, write_qwen3, index):
    folder = write_qwen3(tmp_path / "q", shards=3)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(folder, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("token", (BOI, EOI))
def test_a_tokenizer_without_an_image_token_is_refused_by_that_token(tmp_path, write_qwen3, token):
    folder = write_qwen3(tmp_path / "q")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(token, "<|something_else|>"))
    assert_refused(folder, "tokenizer.json", token)


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json"])
def test_a_tokenizer_file_that_is_none_is_named(tmp_path, write_qwen3, text):
    folder = write_qwen3(tmp_path / "q")
    (folder / "tokenizer.json").write_text(text)
    assert_refused(folder, "tokenizer.json")


# ---- folders and the hub ----


class FakeHub:
    """Stands in for huggingface_hub.snapshot_download: remembers the calls, gives a folder or raises."""

    def __init__(self, answer: Path | Exception):
        self.answer, self.calls = answer, []

    def __call__(self, repo, **options):
        self.calls.append((repo, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def hub(monkeypatch):
    def install(answer: Path | Exception) -> FakeHub:
        fake = FakeHub(answer)
        monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
        return fake

    return install


STRANGE = [
    "no such folder",
    "/nowhere/at/all",
    "./owner/name",
    "../owner",
    "a/b/c",
    "ünï/cödé?",
    "owner/name/",
    "https://huggingface.co/Qwen/Qwen3-0.6B",
    "qwen3",
    "~/qwen3",
    "a b/c",
    "owner/na me\n",
]


@pytest.mark.parametrize("load", (load_qwen3, load_tokenizer))
@pytest.mark.parametrize("name", STRANGE)
def test_a_folder_that_does_not_exist_is_named_without_asking_the_hub(tmp_path, monkeypatch, hub, load, name):
    monkeypatch.chdir(tmp_path)
    fake = hub(RuntimeError("the hub was asked"))
    with pytest.raises(ValueError) as error:
        load(name)
    assert name in str(error.value) and not fake.calls


def test_a_hub_id_downloads_only_what_is_needed(tmp_path, monkeypatch, write_qwen3, hub):
    monkeypatch.chdir(tmp_path)
    fake = hub(write_qwen3(tmp_path / "cache"))
    assert load_qwen3("Qwen/Qwen3-0.6B", **IMAGE_SIDE).config.hidden_size == 32
    load_tokenizer("Qwen/Qwen3-0.6B")
    (repo, with_weights), (_, without) = fake.calls
    assert repo == "Qwen/Qwen3-0.6B" and "*.safetensors" in with_weights["allow_patterns"]
    assert "tokenizer.json" in without["allow_patterns"] and not any(
        "safetensors" in pattern for pattern in without["allow_patterns"]
    )


def test_a_folder_of_the_form_owner_name_wins_over_the_hub(tmp_path, monkeypatch, write_qwen3, hub):
    monkeypatch.chdir(tmp_path)
    fake = hub(RuntimeError("the hub was asked"))
    write_qwen3(tmp_path / "Qwen" / "Qwen3-0.6B")
    assert load_qwen3("Qwen/Qwen3-0.6B", **IMAGE_SIDE).config.hidden_size == 32 and not fake.calls


@pytest.mark.parametrize("reason", ["401 Client Error\nlong advice", ""])
def test_a_failed_download_is_one_line_that_names_the_id(tmp_path, monkeypatch, hub, reason):
    monkeypatch.chdir(tmp_path)
    fake = hub(OSError(reason))
    with pytest.raises(ValueError) as error:
        load_qwen3("Qwen/Qwen9")
    assert "Qwen/Qwen9" in str(error.value) and "\n" not in str(error.value) and len(fake.calls) == 1


@pytest.mark.skipif("QWEN3_FOLDER" not in os.environ, reason="QWEN3_FOLDER names no folder of a real Qwen3")
def test_the_real_tokenizer_gives_text_and_its_special_tokens_back():
    tokenizer = load_tokenizer(os.environ["QWEN3_FOLDER"])
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    assert [tokenizer.token_to_id(s) for s in special] == [151643, 151644, 151645, 151652, 151653]
    for text in (
        "Hello, wörld! 你好 \U0001f3a8\t x",
        "  blanks around  ",
        "".join(special) + "a red circle\n",
    ):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("".join(special)).ids == [151643, 151644, 151645, 151652, 151653]


@pytest.mark.parametrize(
    "config, generation, eos, ends",
    (
        (2, None, 2, (2,)),
        ([2, 0], None, 2, (2, 0)),
        (2, 0, 2, (2, 0)),
        (2, [0, 2, 7], 2, (2, 0, 7)),
        ([9, 2], [2], 9, (9, 2)),
        ([], [5], None, (5,)),
        (None, None, None, ()),
    ),
)
def test_every_id_that_ends_a_text_is_known(tmp_path, write_qwen3, config, generation, eos, ends):
    """Of config.json and of generation_config.json; the first of config.json ends documents."""
    folder = write_qwen3(tmp_path / "q", eos_token_id=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    found = load_qwen3(folder, **IMAGE_SIDE).config
    wanted = load_tokenizer(folder).token_to_id("<|endoftext|>") if eos is None else eos
    assert (found.eos_id, found.end_ids) == (wanted, ends)


@pytest.mark.parametrize("text", ('{"eos_token_id": ["x"]}', '{"eos_token_id": true}', "{", "[]", '"x"'))
def test_a_generation_config_that_makes_no_sense_is_named(tmp_path, write_qwen3, text):
    folder = write_qwen3(tmp_path / "q")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json: "):
        load_qwen3(folder, **IMAGE_SIDE)


def test_cutting_and_filling_that_a_tokenizer_file_stores_are_off(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q")
    plain = load_tokenizer(folder)
    stored = load_tokenizer(folder)
    stored.enable_truncation(4)
    stored.enable_padding(length=9)
    stored.save(str(folder / "tokenizer.json"))
    text = "a red boat on the shingle"
    assert load_tokenizer(folder).encode(text).ids == plain.encode(text).ids
    assert len(plain.encode(text).ids) > 9


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told_so(tmp_path, write_qwen3):
    folder = write_qwen3(tmp_path / "q")
    (folder / "model.safetensors").chmod(0)
    with pytest.raises(ValueError, match="model.safetensors: Permission denied"):
        load_qwen3(folder)


# ---- what the repository holds ----


def test_what_the_repository_holds_is_found_from_anywhere_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = helpers.ROOT / "small" / "base"
    assert resolve("small/base") == base and address(str(base)) == "small/base"
    assert address("small/base") == "small/base"  # not there from here: as it is
    (tmp_path / "small" / "base").mkdir(parents=True)  # the user's own of that name
    assert resolve("small/base") == Path("small/base")
    assert address("small/base") == str(tmp_path / "small" / "base")
