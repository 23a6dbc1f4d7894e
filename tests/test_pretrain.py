"""pretrain.py: the base is an ordinary Qwen3 folder, the same for a seed, and knows the words of captions."""

from __future__ import annotations

import functools
import json
import math
import random

import helpers
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from lab.language import knowledge, multiple_choice, puzzles, reasoning
from load_qwen3 import (
    BOI,
    EOI,
    STOCK,
    base_fingerprint,
    encode_plain,
    known_config,
    load_qwen3,
    load_tokenizer,
)
from small import pretrain
from small.pretrain import SPECIAL, draw_document, init_text, pretrain_base, random_base, save_base
from small.world import COLORS, all_scenes, text_document


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder made by pretrain_base, and the model it was saved from."""
    kept, folder = {}, tmp_path_factory.mktemp("pretrain") / "base"
    with pytest.MonkeyPatch.context() as patch, helpers.inside(folder.parent):
        patch.setattr(
            pretrain, "save_base", lambda m, t, f: kept.update(model=m, tokenizer=t) or save_base(m, t, f)
        )
        pretrain_base(folder, steps=2, **helpers.SIZES)
    return folder, kept["model"].float(), kept["tokenizer"]  # it was stored in bfloat16


def test_the_folder_holds_what_a_hugging_face_folder_holds(saved):
    folder, model, _ = saved
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["architectures"] == ["Qwen3ForCausalLM"]
    assert all(config[k] == v for k, v in helpers.SIZES.items())
    assert config["tie_word_embeddings"] is True and config["rope_theta"] == 1e4
    with safe_open(folder / "model.safetensors", "pt") as f:
        names = set(f.keys())
    assert "model.layers.1.self_attn.q_norm.weight" in names and len(names) == 2 + 2 * 11
    assert not any("image" in n or "unet" in n or "boi" in n for n in names)


@torch.no_grad()
def test_the_loaded_model_has_the_logits_of_the_one_it_was_saved_from(saved):
    folder, model, _ = saved
    loaded = load_qwen3(folder, latent_size=2, unet_channels=(4, 4))
    ids = torch.randint(loaded.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.text_logits(ids), model.text_logits(ids))
    assert loaded.text_logits(ids).std() > 0.05
    assert loaded.text_is_frozen


def test_the_loaded_special_tokens_are_those_of_the_tokenizer(saved):
    folder, _, tokenizer = saved
    config, ids = load_qwen3(folder, latent_size=2, unet_channels=(4, 4)).config, tokenizer.token_to_id
    assert (config.boi_id, config.eoi_id) == (ids("<|vision_start|>"), ids("<|vision_end|>"))
    assert config.eos_id == ids("<|endoftext|>")
    assert len({ids(t) for t in SPECIAL}) == 7 and config.vocab_size == tokenizer.get_vocab_size()


def test_the_base_is_the_same_for_a_seed_and_another_for_another(saved, tmp_path):
    with helpers.inside(tmp_path):
        torch.manual_seed(99)  # the global generators have no say in it
        random.seed(99)
        pretrain_base(tmp_path / "again", steps=2, **helpers.SIZES)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved[0] / name).read_bytes(), name
    assert (helpers.other_base() / "model.safetensors").read_bytes() != (
        saved[0] / "model.safetensors"
    ).read_bytes()


def test_every_word_of_a_caption_is_one_token(saved):
    tokenizer = load_tokenizer(saved[0])
    for scene in all_scenes("test") + all_scenes("train")[::7]:
        assert len(tokenizer.encode(scene.caption).ids) == len(scene.caption.split()), scene.caption
    assert {len(tokenizer.encode(f" {color}").ids) for color in COLORS} == {1}


@pytest.mark.parametrize(
    "text", ("grass is green.", "Ünïcödé 漢字 🎈", "  two  blanks\n\ttab", "<|vision_start|> a")
)
def test_any_text_comes_back_from_its_tokens(saved, text):
    tokenizer = load_tokenizer(saved[0])
    tokenizer.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_documents_fit_the_context_of_the_real_base(saved):
    tokenizer, rng = load_tokenizer(saved[0]), random.Random(0)
    lengths = [len(tokenizer.encode(text_document(rng)).ids) for _ in range(500)]
    assert max(lengths) < pretrain.SIZES["max_position_embeddings"]
    captions = [len(tokenizer.encode(c).ids) for c in helpers.held_out_pictures(100)[1]]
    assert max(captions) < 20


@pytest.fixture(scope="module")
def thirty_steps(tmp_path_factory):
    """What 30 steps of pretraining read, were to learn and lost, and which optimizer had which parameters."""
    folder = tmp_path_factory.mktemp("thirty")
    losses, read, learned, groups = [], [], [], {}
    real, next_tokens = F.cross_entropy, pretrain.next_tokens

    def reading(tokens, boi_id):
        read.append(tokens)
        learned.append(next_tokens(tokens, boi_id)[0])
        return learned[-1], None

    def recorded(kind):
        return lambda parameters, *a, **how: (
            groups.update({kind.__name__: parameters}) or kind(parameters, *a, **how)
        )

    with pytest.MonkeyPatch.context() as patch, helpers.inside(folder):
        patch.setattr(pretrain.F, "cross_entropy", lambda *a, **k: losses.append(real(*a, **k)) or losses[-1])
        patch.setattr(pretrain, "next_tokens", reading)
        patch.setattr(pretrain, "WARMUP", 2)
        patch.setattr(torch.optim, "AdamW", recorded(torch.optim.AdamW))
        patch.setattr(pretrain, "Muon", recorded(pretrain.Muon))
        pretrain_base(folder / "base", steps=30, **helpers.SIZES)
    return load_tokenizer(folder / "base"), losses, read, learned, groups


def test_training_starts_near_the_entropy_of_a_guess_and_gets_better(thirty_steps):
    """The loss is a real one: about log V at first, clearly below after some steps."""
    tokenizer, losses, *_ = thirty_steps
    assert abs(losses[0].item() - math.log(tokenizer.get_vocab_size())) < 1
    # a batch of conversations is another thing than one of documents
    assert sum(losses[-10:]) / 10 < losses[0] - 0.5


def test_documents_come_first_and_conversations_later_of_which_the_assistant_s_part_is_learned(thirty_steps):
    tokenizer, _, read, learned, _ = thirty_steps
    start, end, assistant = (tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>", "assistant"))
    talks = []
    for tokens, wanted in zip(read, learned, strict=True):
        wanted = iter(wanted.tolist())
        for row in tokens.ids.tolist():
            ids = [i for i in row if i >= 0]
            own, targets, talk = not (talk := start in ids), [], talk
            for i, token in enumerate(ids[1:], start=1):
                if talk and ids[i - 1] == start:
                    own = token == assistant
                targets.append(token if own and (not talk or token != start) else -100)
                own = own and (not talk or token != end)
            assert [next(wanted) for _ in ids] == [*targets, -100]
            talks.append(talk)
        assert next(wanted, None) is None
    shares = [sum(talks[i : i + 32]) / 32 for i in range(0, len(talks), 32)]
    assert len(shares) == 30 and shares[:16] == [0.0] * 16  # a pool is 16 batches; it was drawn at step 0
    assert abs(sum(shares[16:]) / 14 - pretrain.TALK) < 4 * (pretrain.TALK * 0.3 / (14 * 32)) ** 0.5


def test_muon_has_the_matrices_of_the_layers_and_adamw_all_else(thirty_steps, saved):
    groups, model = thirty_steps[-1], saved[1]
    shapes = {n: p.shape for n, p in model.text_parameters().items()}
    layers = [s for n, s in shapes.items() if n.startswith("layers.") and n.endswith("_proj.weight")]
    assert sorted(p.shape for p in groups["Muon"]) == sorted(layers) and len(layers) == 14
    assert len(groups["AdamW"]) == len(shapes) - 14
    assert not {id(p) for p in groups["Muon"]} & {id(p) for p in groups["AdamW"]}


def test_a_document_is_plain_text_and_a_conversation_has_turns_and_no_picture(saved):
    tokenizer, rng = load_tokenizer(saved[0]), random.Random(0)
    eos, start, boi, eoi, think, system = (
        tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", BOI, EOI, "<think>", "system")
    )
    for talk in (0.0, 1.0):
        drawn = [draw_document(rng, tokenizer, talk) for _ in range(200)]
        for ids, own in drawn:
            assert ids[-1] == eos and ids.count(eos) == 1 and min(ids) >= 0 and not {boi, eoi} & {*ids}
            assert (ids[0] == start) == (talk == 1) and len(own) == len(ids)
            assert 0 < sum(own) < len(own) if talk else all(own)
        assert max(len(ids) for ids, _ in drawn) <= pretrain.SIZES["max_position_embeddings"]
        if talk:  # half of them with a request to think; the template always writes the tokens
            assert 70 < sum(ids[1] == system for ids, _ in drawn) < 130
        assert {think in ids for ids, _ in drawn} == {talk == 1}
    kinds = [start in draw_document(rng, tokenizer, 0.7)[0] for _ in range(300)]
    assert 180 < sum(kinds) < 240


def test_initialisation_reaches_every_matrix_and_of_the_norms_that_of_queries_alone(saved):
    folder, model, _ = saved
    fresh = type(model)(model.config)
    before = {n: p.detach().clone() for n, p in fresh.text_parameters().items()}
    with torch.random.fork_rng(devices=[]):
        init_text(fresh)
    for name, p in fresh.text_parameters().items():
        if p.dim() == 1:
            assert (p == (2 if name.endswith("self_attn.q_norm.weight") else 1)).all(), name
        else:
            assert not torch.equal(p, before[name]), name
    assert sum(bool((p == 2).all()) for p in fresh.text_parameters().values()) == len(fresh.layers)


def test_a_folder_that_cannot_be_written_is_named_and_nothing_stays(saved, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoint.save_file", full)
    with pytest.raises(OSError, match="base could not be written.*No space left"):
        save_base(saved[1], saved[2], tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


# ---- random weights in a stock shape ----

TINY = "Qwen/Qwen3-tiny"


@pytest.fixture
def tiny_stock(monkeypatch):
    """One more stock shape: hidden, intermediate, layers, heads, tied; the vocabulary is the real one."""
    monkeypatch.setitem(STOCK, TINY, (16, 24, 2, 16, False))


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "new" / "base"
    with pytest.MonkeyPatch.context() as patch, helpers.inside(folder.parent.parent):
        patch.setitem(STOCK, TINY, (16, 24, 2, 16, False))
        out = helpers.good(pretrain, "--random", TINY, "--out", "new/base", folder=folder.parent.parent)
    return folder, out


def test_a_random_base_has_the_stock_shape_and_loads_like_any_other(random_folder, tiny_stock):
    folder, _ = random_folder
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in folder.iterdir()} == names
    config, stock = load_qwen3(folder, latent_size=2, unet_channels=(4, 4)).config, known_config(TINY)
    ids = load_tokenizer(folder).token_to_id
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim") + (
        "num_attention_heads",
        "num_key_value_heads",
        "rope_theta",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "qk_norm",
        "attention_bias",
    ):
        assert getattr(config, field) == getattr(stock, field), field
    assert (config.vocab_size, config.hidden_size, config.head_dim) == (151936, 16, 128)
    assert (config.boi_id, config.eoi_id, config.eos_id) == (ids(BOI), ids(EOI), ids("<|endoftext|>"))


@torch.no_grad()
def test_random_weights_are_bfloat16_small_and_different_in_every_matrix(random_folder, tiny_stock):
    folder, _ = random_folder
    with safe_open(folder / "model.safetensors", "pt") as f:
        tensors = {n: f.get_tensor(n) for n in f.keys()}
    assert len(tensors) == 3 + 2 * 11
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    firsts = set()
    for name, x in tensors.items():
        assert x.dtype == torch.bfloat16
        if x.dim() == 1:
            assert (x == 1).all(), name
        else:
            assert abs(x.float().std() - 0.02) < 0.002 and abs(x.float().mean()) < 0.002, name
            firsts.add(tuple(x[0, :8].tolist()))
    assert len(firsts) == 2 + 2 * 7
    model = load_qwen3(folder, latent_size=2, unet_channels=(4, 4))
    logits = model.text_logits(torch.arange(12).view(2, 6))
    assert logits.isfinite().all() and logits.std() > 1e-3


def test_random_weights_follow_from_the_seed(random_folder, tiny_stock, tmp_path):
    torch.manual_seed(99)  # the global generators have no say in it
    random.seed(99)
    for seed in (0, 1):
        random_base(TINY, tmp_path / str(seed), seed)
    first, second = (load_file(tmp_path / s / "model.safetensors") for s in "01")
    assert all(torch.equal(x, first[n]) for n, x in load_file(random_folder[0] / "model.safetensors").items())
    assert any(not torch.equal(x, first[n]) for n, x in second.items())


@pytest.mark.parametrize("content", ("file", "folder"))
def test_an_out_that_is_there_is_refused_and_left_alone(tiny_stock, tmp_path, content):
    out = tmp_path / "base"
    out.mkdir() if content == "folder" else out.write_text("mine")
    before = helpers.files(tmp_path)
    result = helpers.call(pretrain, "--random", TINY, "--out", out, folder=tmp_path)
    assert result.status == 2 and "--out" in result.err and str(out) in result.err
    assert helpers.files(tmp_path) == before and list(tmp_path.iterdir()) == [out]


def test_a_shape_that_is_not_stock_is_refused_with_the_choices(tmp_path):
    result = helpers.call(pretrain, "--random", "Qwen/Qwen9", "--out", tmp_path / "x", folder=tmp_path)
    assert result.status == 2 and "Qwen/Qwen9" in result.err and "Qwen/Qwen3-0.6B" in result.err
    assert not (tmp_path / "x").exists()


# ---- the base that the repository ships ----


def test_the_shipped_base_is_what_its_record_says():
    folder = helpers.ROOT / "small" / "base"
    made = json.loads((folder / "MADE.json").read_text())
    assert made["recipe"] == pretrain.RECIPE and made["fingerprint"] == base_fingerprint(folder)
    model, tokenizer = load_qwen3(folder), load_tokenizer(folder)
    sets = {"knowledge": knowledge(), "reasoning": reasoning(60), "puzzles": puzzles(60)}
    for what, questions in sets.items():
        found = multiple_choice(model, functools.partial(encode_plain, tokenizer), questions)["accuracy"]
        assert found == pytest.approx(made["accuracy"][what], abs=0.02 if what == "knowledge" else 0.15)


def test_the_shipped_tokenizer_is_that_of_today_s_text():
    """A change to the text without another RECIPE, and another base, shows here."""
    tokenizer = pretrain.train_tokenizer(random.Random(0))
    shipped = load_tokenizer(helpers.ROOT / "small" / "base")
    assert json.loads(tokenizer.to_str()) == json.loads(shipped.to_str())


def test_the_command_makes_a_base_and_says_how(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "SIZES", pretrain.SIZES | helpers.SIZES)
        patch.setattr(pretrain, "reasoning", lambda n: reasoning(4))
        patch.setattr(pretrain, "puzzles", lambda n: puzzles(4))
        helpers.good(pretrain, "--out", "base", "--steps", 1, folder=tmp_path)
        result = helpers.call(pretrain, "--out", "base", "--steps", 1, folder=tmp_path)
    assert result.status == 2 and "--out base is there already" in result.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    made = json.loads((tmp_path / "base/MADE.json").read_text())
    assert made["command"].startswith("python -m small.pretrain") and made["recipe"] == pretrain.RECIPE
    assert made["fingerprint"] == base_fingerprint(tmp_path / "base") and set(made["accuracy"]) == {
        "knowledge",
        "reasoning",
        "puzzles",
    }
