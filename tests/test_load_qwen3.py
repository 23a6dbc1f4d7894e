"""load_qwen3.py: the text half equals transformers' Qwen3, and what does not fit is an error that names it.

`fixtures/qwen3_*` were written by transformers itself (`fixtures/make_qwen3.py`). Errors are shown on a good
folder that is broken in one place; `test_an_unbroken_folder_loads` keeps those tests honest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from load_qwen3 import BOI, EOI, fingerprint, load_qwen3, load_tokenizer
from model import LMFusion, Tokens

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FOLDERS = ("qwen3_tied", "qwen3_untied_sharded")
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


@pytest.mark.parametrize("name", FOLDERS)
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


def test_the_fingerprint_is_that_of_the_text_alone_and_of_every_bit_of_it(tmp_path, write_qwen3):
    model = load_qwen3(write_qwen3(tmp_path / "q"), **IMAGE_SIDE)
    before = fingerprint(model)
    with torch.no_grad():
        for p in model.image_parameters().values():
            p.add_(1.0)
        assert fingerprint(model) == before
        model.layers[1].text.self_attn.k_norm.weight[3] += 1e-6
    assert fingerprint(model) != before


def test_a_tokenizer_reads_back_what_it_wrote_and_keeps_special_tokens_whole(tmp_path, write_qwen3):
    tokenizer = load_tokenizer(write_qwen3(tmp_path / "q"))
    text = "a red circle on a blue background"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text and len(ids) < len(text)
    assert tokenizer.encode(f"x{BOI}{EOI}").ids[1:] == [
        tokenizer.token_to_id(BOI),
        tokenizer.token_to_id(EOI),
    ]


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
