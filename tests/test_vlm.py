"""Section 5.3: a stock vision-language model as the text side: it answers as transformers does, patches of
painted pictures see what it is shown, and it stays what it was.

`fixtures/vlm_*` were written by transformers (`fixtures/make_vlm.py`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sequences import TOLERANCE, draw, with_gradient
from test_vision import edit, edit_tensors, random_picture, renamed
from torch import Tensor

from attention import IMAGE, Cache, Tokens, hybrid_mask, rope_positions
from load_qwen3 import base_fingerprint, load_qwen3, read_config, text_names
from model import LMFusion, ModelConfig
from vision import Seen, load_vision

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FOLDERS = ("vlm_llava_next", "vlm_qwen3_vl")
IMAGE_SIDE = dict(latent_size=8, unet_channels=(16, 32))  # 16 patches
PLACEHOLDER, WORDS = 269, 264
BOI, EOI = 267, 268


def expected_of(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / name / "expected.safetensors")


def look(folder: Path, expected: dict[str, Tensor]) -> list[Seen]:
    vision = load_vision(folder)
    return [vision.look(Image.fromarray(expected[f"picture_{i}"].numpy())) for i in range(2)]


def pieces(ids: list[int], seen: list[Seen]) -> list[tuple[list[int], list[Seen]]]:
    """A conversation of words, a picture, words, a picture, words, in turns as a chat reads it."""
    first = ids.index(PLACEHOLDER)
    second = ids.index(PLACEHOLDER, first + len(seen[0].features))
    parts = [ids[:first], ids[first : second - 2], ids[second - 2 : -1], ids[-1:]]
    assert [x.count(PLACEHOLDER) for x in parts] == [0, len(seen[0].features), len(seen[1].features), 0]
    return list(zip(parts, ([], seen[:1], seen[1:], []), strict=True))


@torch.no_grad()
def greedy(model: LMFusion, ids: list[int], seen: list[Seen], steps: int, cached: bool) -> list[int]:
    """The greedy continuation: everything again for every token, or in turns against a cache."""
    cache, start, new = None, 0, []
    if not cached:
        for _ in range(steps):
            new.append(model.text_logits(torch.tensor([ids + new]), seen)[0, -1, :WORDS].argmax().item())
        return new
    turns = pieces(ids, seen)
    for step in range(len(turns) + steps - 1):
        part, shown = turns[step] if step < len(turns) else (new[-1:], [])
        hidden = model.encode(Tokens.text(torch.tensor([part]), start).show(shown), cache=cache)
        cache, start = hidden.cache if cache is None else cache.extend(hidden.cache), start + len(part)
        if step >= len(turns) - 1:
            new.append(model.logits(hidden.text)[-1, :WORDS].argmax().item())
    return new


def assert_parity(folder: Path, expected: dict[str, Tensor]) -> None:
    model, seen, ids = load_qwen3(folder, **IMAGE_SIDE), look(folder, expected), expected["ids"]
    with torch.no_grad():
        difference = (model.text_logits(ids, seen) - expected["logits"]).abs().max().item()
    assert difference < 1e-4
    if "positions" in expected:
        assert rope_positions(Tokens.text(ids).show(seen), None).equal(expected["positions"])
    answer = expected["greedy"][0].tolist()
    for cached in (False, True):
        assert greedy(model, ids[0].tolist(), seen, len(answer), cached) == answer


# ---- parity with transformers ----


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_greedy_ids_with_two_pictures_equal_those_that_transformers_gave(name):
    assert_parity(FIXTURES / name, expected_of(name))


@pytest.mark.parametrize("case", range(8))
def test_parity_with_transformers_live(tmp_path, monkeypatch, case):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FIXTURES))
    make_vlm = pytest.importorskip("make_vlm")
    assert len(make_vlm.LIVE) == 8
    torch.manual_seed(case)
    assert_parity(tmp_path / "v", make_vlm.make(tmp_path / "v", *list(make_vlm.LIVE.values())[case]()))


@torch.no_grad()
def test_the_fixtures_are_hard_enough():
    """Varied answers; pictures, their order, their deepstack features and their positions all matter."""
    for name in FOLDERS:
        e, model = expected_of(name), load_qwen3(FIXTURES / name, **IMAGE_SIDE)
        seen = look(FIXTURES / name, e)
        assert len(e["greedy"].unique()) > 4
        others = [[dataclasses.replace(s, features=s.features.flip(0)) for s in seen]]
        if name == "vlm_qwen3_vl":
            assert [s.grid[0] != s.grid[1] for s in seen] == [True, True]
            others += [[dataclasses.replace(s, deepstack=s.deepstack[::-1]) for s in seen]]
            others += [[dataclasses.replace(s, deepstack=s.deepstack[:1]) for s in seen]]
            others += [[dataclasses.replace(s, grid=None) for s in seen]]
            others += [[dataclasses.replace(s, grid=s.grid[::-1]) for s in seen]]
        for other in others:
            assert (model.text_logits(e["ids"], other) - e["logits"])[0, -1].abs().max() > 1e-2
        assert (model.text_logits(e["ids"]) - e["logits"])[0, -1].abs().max() > 1e-2  # nothing shown


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_of_a_batch_and_packed_documents_are_as_each_alone(name):
    """Two documents with pictures in one row, one in the other; of both phases of training as well."""
    e, model = expected_of(name), load_qwen3(FIXTURES / name, **IMAGE_SIDE)
    a, b = look(FIXTURES / name, e)
    one = [5, *[PLACEHOLDER] * len(a.features), 6, 7]
    two = [8, 9, 10, *[PLACEHOLDER] * len(b.features), 11]
    with torch.no_grad():
        tokens = Tokens.packed([[one, two], [two, one]], 16).show([a, b, b, a])
        found = model.encode(tokens).text.unflatten(0, (2, -1))
        alone = [model.encode(Tokens.rows([x], 16).show([s])).text for x, s in ((one, a), (two, b))]
        assert torch.allclose(found[0], torch.cat(alone), **TOLERANCE)
        assert torch.allclose(found[1], torch.cat(alone[::-1]), **TOLERANCE)
        # cut behind the placeholders of each document: what follows stands in a second rectangle
        cuts = [len(one) - 2, len(two) - 1]
        first = Tokens.packed([[one[: cuts[0]], two[: cuts[1]]]], 16).show([a, b])
        rest = Tokens.packed([[one[cuts[0] :], two[cuts[1] :]]], 16, [cuts])
        cache = model.encode(first).cache
        for layout in (None, model.layout(rest, first)):
            hidden = model.encode(rest, cache=cache, layout=layout)
            wanted = torch.cat((alone[0][-2:], alone[1][-1:]))
            assert torch.allclose(hidden.text, wanted, **TOLERANCE)


# ---- what a folder may look like ----


@pytest.mark.parametrize(
    "names",
    [
        ("vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.", ""),
        ("model.vision_tower.vision_model.", "model.language_model.", "lm_head.", "model."),
        ("model.vision_tower.", "model.language_model.", "lm_head.", "model."),
    ],
)
def test_every_layout_of_names_gives_the_same_model(tmp_path, names):
    folder = Path(shutil.copytree(FIXTURES / "vlm_llava_next", tmp_path / "v"))
    tensors = {renamed(n, *names): x for n, x in load_file(folder / "model.safetensors").items()}
    tensors |= {f"{names[1]}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # of old exports
    save_file(tensors, folder / "model.safetensors")
    assert_parity(folder, expected_of("vlm_llava_next"))
    assert base_fingerprint(folder) == base_fingerprint(FIXTURES / "vlm_llava_next")


STOCK = {  # as the hub's folders say it: most is left to transformers' defaults
    "llava-1.5-7b": dict(
        model_type="llava",
        image_token_index=32000,
        text_config=dict(
            model_type="llama", max_position_embeddings=4096, rms_norm_eps=1e-5, vocab_size=32064
        ),
        tie_word_embeddings=False,
    ),
    "llava-v1.6-mistral-7b": dict(
        model_type="llava_next",
        text_config=dict(
            model_type="mistral",
            max_position_embeddings=32768,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            sliding_window=None,
            vocab_size=32064,
        ),
    ),
    "llama3-llava-next-8b": dict(
        model_type="llava_next",
        image_token_index=128256,
        text_config=dict(
            model_type="llama",
            bos_token_id=128000,
            eos_token_id=128009,
            intermediate_size=14336,
            max_position_embeddings=8192,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            vocab_size=128320,
        ),
    ),
    "a Qwen2, tied": dict(
        model_type="llava",
        text_config=dict(model_type="qwen2", hidden_size=1024, rope_theta=1e6, tie_word_embeddings=True),
    ),
    "a text side that says nothing": dict(model_type="llava"),
    "Qwen3-VL-4B": dict(
        model_type="qwen3_vl",
        tie_word_embeddings=True,
        text_config=dict(
            model_type="qwen3_vl_text",
            eos_token_id=151645,
            head_dim=128,
            hidden_size=2560,
            intermediate_size=9728,
            max_position_embeddings=262144,
            num_attention_heads=32,
            num_hidden_layers=36,
            num_key_value_heads=8,
            rope_scaling=dict(mrope_interleaved=True, mrope_section=[24, 20, 20], rope_type="default"),
            rope_theta=5000000,
            vocab_size=151936,
        ),
    ),
}


@pytest.mark.parametrize("case", STOCK)
def test_what_a_stock_text_config_leaves_out_is_as_transformers_has_it(tmp_path, case):
    """The same tensors of the same shapes, RoPE, end of text and length of context."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(STOCK[case]))
    fields = read_config(tmp_path)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(STOCK[case])))
    text = theirs.text_config
    config = ModelConfig(**fields | dict(num_hidden_layers=1), **IMAGE_SIDE)
    assert fields["num_hidden_layers"] == text.num_hidden_layers
    assert config.rms_norm_eps == text.rms_norm_eps and config.num_attention_heads == text.num_attention_heads
    assert config.rope_theta == text.rope_parameters["rope_theta"]
    assert config.max_position_embeddings == text.max_position_embeddings
    assert config.eos_id == text.eos_token_id
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert (config.mrope_section is not None) == (theirs.model_type == "qwen3_vl")
    text.num_hidden_layers = 1
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(theirs).model.language_model
        state = LMFusion(config).state_dict()
    names = {n: tuple(state[own].shape) for n, own in text_names(config).items() if n != "lm_head.weight"}
    assert {f"model.{n}": tuple(p.shape) for n, p in model.state_dict().items()} == names


REMOVED = ...
BAD = [
    ("vlm_llava_next", dict(text_config=[]), "text_config.model_type"),
    ("vlm_llava_next", dict(text_config__model_type="gemma"), 'text_config.model_type = "gemma" .*"mistral"'),
    ("vlm_llava_next", dict(text_config__model_type=["llama"]), "text_config.model_type"),
    ("vlm_llava_next", dict(text_config__model_type="mistral"), "text_config.sliding_window"),
    ("vlm_llava_next", dict(text_config__hidden_size=None), "missing text_config.hidden_size"),
    ("vlm_llava_next", dict(text_config__vocab_size="x"), 'text_config.vocab_size = "x"'),
    ("vlm_llava_next", dict(text_config__mlp_bias=True), "text_config.mlp_bias"),
    ("vlm_llava_next", dict(text_config__head_dim=7), "text_config.head_dim"),
    ("vlm_llava_next", dict(tie_word_embeddings="yes"), "text_config.tie_word_embeddings"),
    ("vlm_qwen3_vl", dict(text_config__model_type="qwen3"), "text_config.model_type"),
    ("vlm_qwen3_vl", dict(text_config__rope_parameters__rope_theta=REMOVED), "text_config.rope_theta"),
    ("vlm_qwen3_vl", dict(text_config__rope_parameters__mrope_section=[4, 4]), "text_config.rope_parameters"),
    (
        "vlm_qwen3_vl",
        dict(text_config__rope_parameters__mrope_interleaved=False),
        "text_config.rope_parameters",
    ),
]


@pytest.mark.parametrize("name, fields, words", BAD, ids=lambda x: str(x)[:40])
def test_a_text_config_that_does_not_fit_is_one_line_with_its_field(tmp_path, name, fields, words):
    folder = Path(shutil.copytree(FIXTURES / name, tmp_path / "v"))
    rope = fields.pop("text_config__rope_parameters__rope_theta", None)
    edit(folder / "config.json", **fields)
    if rope is REMOVED:
        edit(folder / "config.json", text_config__rope_parameters={"rope_type": "default"})
    with pytest.raises(ValueError, match=rf"^[^\n]*config.json: {words}[^\n]*$"):
        load_qwen3(folder, **IMAGE_SIDE)


BAD_TENSORS = [
    (lambda t: t.pop("language_model.model.norm.weight"), "model.norm.weight is missing"),
    (
        lambda t: t.update({"language_model.model.norm.weight": torch.ones(3)}),
        "language_model.model.norm.weight is F32",
    ),
    (lambda t: t.update({"language_model.visual.x": torch.ones(3)}), "language_model.visual.x is not one"),
    (
        lambda t: t.update({"model.language_model.norm.weight": torch.ones(32)}),
        "model.language_model.norm.weight is there twice",
    ),
]


@pytest.mark.parametrize("change, words", BAD_TENSORS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_tensor_of_the_text_that_does_not_fit_is_one_line_with_its_name(tmp_path, change, words):
    folder = Path(shutil.copytree(FIXTURES / "vlm_llava_next", tmp_path / "v"))
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=rf"^[^\n]*tensor (language_)?(model\.)*{words}[^\n]*$"):
        load_qwen3(folder, **IMAGE_SIDE)


def test_a_folder_without_a_tower_is_one_line(tmp_path):
    """Its text side is whole, but it cannot see."""
    folder = Path(shutil.copytree(FIXTURES / "vlm_llava_next", tmp_path / "v"))
    edit_tensors(folder, lambda t: [t.pop(n) for n in list(t) if n.startswith("vision_tower.")])
    load_qwen3(folder, **IMAGE_SIDE)
    with pytest.raises(ValueError, match=r"^[^\n]*tensor vision_tower\.[\w.]* is missing$"):
        load_vision(folder)


# ---- pictures that do not fit the text ----


def seen_of(name: str, size: tuple[int, int] = (37, 90)) -> Seen:
    return load_vision(FIXTURES / name).look(random_picture(*size))


@pytest.mark.parametrize("name", FOLDERS)
def test_placeholders_that_do_not_match_the_pictures_are_one_line(name):
    model, seen = load_qwen3(FIXTURES / name, **IMAGE_SIDE), seen_of(name)
    n = len(seen.features)
    slots = [PLACEHOLDER] * n
    bad = [
        ([5, *slots[1:], 6], [seen]),  # one less
        ([5, *slots, PLACEHOLDER], [seen]),
        ([5, 6, 7], [seen]),  # none
        ([5, *slots, 6], [seen, seen]),
        ([5, *slots, 6, *slots], [seen]),
        ([5, *slots[1:], 6, PLACEHOLDER], [seen]),  # as many, but with a word between
        ([5, *slots[1:], 6, *slots, PLACEHOLDER], [seen, seen]),
    ]
    for ids, pictures in bad:
        with pytest.raises(ValueError, match=rf"^\d+ placeholders in the text; its pictures take {n}[^\n]*$"):
            model.text_logits(torch.tensor([ids]), pictures)
    with pytest.raises(ValueError, match="placeholders"):  # of two rows
        Tokens.text(torch.tensor([slots[1:] + [PLACEHOLDER] * 2, slots[1:] + [5, 6]])).show([seen, seen])
    both = model.text_logits(torch.tensor([[5, *slots, *slots, 6]]), [seen, seen])  # side by side
    assert both.shape[1] == 2 * n + 2


def test_more_pictures_than_the_context_holds_are_one_line():
    model = load_qwen3(FIXTURES / "vlm_llava_next", **IMAGE_SIDE, max_position_embeddings=100)
    seen = seen_of("vlm_llava_next")
    ids = torch.tensor([[PLACEHOLDER] * len(seen.features) * 3])
    with pytest.raises(ValueError, match=r"^text and pictures are 111 tokens long; [^\n]* room for 100$"):
        model.text_logits(ids, [seen] * 3)


# ---- shown and painted pictures ----


def story(seen: Seen) -> tuple[Tokens, Tokens]:
    """Words, a shown picture, a word, BOI; and behind these a painted picture and its caption."""
    before = [5, 6, *[PLACEHOLDER] * len(seen.features), 7, BOI]
    rest = Tokens.rows([[IMAGE, EOI, 8, 9]], 16, [len(before)])
    return Tokens.rows([before], 16).show([seen]), rest


@pytest.mark.parametrize("name", FOLDERS)
def test_placeholders_are_causal_text_and_all_patches_of_a_painted_picture_see_them(name):
    seen = seen_of(name)
    before, rest = story(seen)
    n, shown = len(seen.features), (before.ids == PLACEHOLDER)[0]
    mask = hybrid_mask(before, before)[0]
    assert mask.equal(torch.ones_like(mask).tril())
    assert hybrid_mask(rest, before)[0, :16, shown].all() and shown.sum() == n
    # and they change what is painted, of which nothing changes them
    model = load_qwen3(FIXTURES / name, **IMAGE_SIDE)
    latents, t = draw(model, 1)
    with torch.no_grad():
        text, painted = model(before, rest, latents, t)
        other = dataclasses.replace(seen, features=seen.features.flip(0))
        repainted = model(before.show([other]), rest, latents, t)[1]
        assert (repainted.image - painted.image).abs().amax(1).min() > 1e-5
        last = dataclasses.replace(seen, features=seen.features.clone())
        last.features[-1] += 1
        changed = model(before.show([last]), rest, latents, t)[0].text
        assert changed[: 1 + n].equal(text.text[: 1 + n]) and not changed[1 + n].equal(text.text[1 + n])
        # the text expert alone reads them, whatever image experts are
        for p in model.image_parameters().values():
            p.add_(torch.randn_like(p))
        assert model(before, rest, latents, t)[0].text.equal(text.text)


def test_positions_of_a_painted_picture_go_on_behind_a_shown_one_one_by_one():
    seen = seen_of("vlm_qwen3_vl")
    before, rest = story(seen)
    (rows, columns), n = seen.grid, len(seen.features)
    start = 2 + max(rows, columns) + 2
    assert n == rows * columns and start < before.ids.shape[1]
    for past in (before, Cache([], [], before.image, before.position, before.document, before.mrope)):
        wanted = torch.arange(start, start + 19)[:, None].expand(-1, 3)
        assert rope_positions(rest, past).equal(wanted)
        cut = past.keep(2) if isinstance(past, Cache) else past.slots(2)  # before the picture
        assert rope_positions(rest, cut).equal(rest.position[0])


@torch.no_grad()
@pytest.mark.parametrize("name", FOLDERS)
def test_caches_with_pictures_are_stacked_reordered_and_cut_with_their_positions(name):
    """As guidance does it: a row with a picture beside one without."""
    model, seen = load_qwen3(FIXTURES / name, **IMAGE_SIDE), seen_of(name)
    before, _ = story(seen)
    one, other = model.encode(before).cache, model.encode(Tokens.rows([[BOI]], 16)).cache
    starts = [one.length, 1]
    latents, t = draw(model, 1)
    patches = Tokens.rows([[IMAGE]] * 2, 16, starts)
    both = model.encode(patches, latents, t, one.stack(other)).image.unflatten(0, (2, 16))
    turned = model.encode(
        Tokens.rows([[IMAGE]] * 2, 16, starts[::-1]), latents, t, one.stack(other).rows(torch.tensor([1, 0]))
    ).image.unflatten(0, (2, 16))
    for row, (cache, start) in enumerate(zip((one, other), starts, strict=True)):
        wanted = model.encode(Tokens.rows([[IMAGE]], 16, [start]), latents, t, cache).image
        assert torch.allclose(both[row], wanted, **TOLERANCE)
        assert torch.allclose(turned[1 - row], wanted, **TOLERANCE)


@pytest.mark.parametrize("name", FOLDERS)
def test_training_beside_shown_pictures_gives_the_model_no_gradient_and_leaves_every_answer(name):
    """Real steps of AdamW on a painted picture and its caption: the logits are the same to the last bit."""
    expected, vision = expected_of(name), load_vision(FIXTURES / name)
    model, pictures = load_qwen3(FIXTURES / name, **IMAGE_SIDE), look(FIXTURES / name, expected)
    with torch.no_grad():
        logits = model.text_logits(expected["ids"], pictures)
    kept = {n: p.clone() for n, p in model.text_parameters().items()}
    before, rest = story(vision.look(random_picture(37, 90)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(5):
        latents, t = draw(model, 1, seed=step)
        _, hidden = model(before, rest, latents, t)
        caption = torch.nn.functional.cross_entropy(model.logits(hidden.text), torch.tensor([8, 9, 10]))
        (model.unet_output(hidden).pow(2).mean() + caption).backward()
        reached = with_gradient(model)
        assert reached <= model.image_parameters().keys() and any(".image." in n for n in reached)
        optimizer.step()
        optimizer.zero_grad()
    assert not any(p.requires_grad or p.grad is not None for p in vision.model.parameters())
    assert all(p.grad is None and p.equal(kept[n]) for n, p in model.text_parameters().items())
    with torch.no_grad():
        assert model.text_logits(expected["ids"], look(FIXTURES / name, expected)).equal(logits)
