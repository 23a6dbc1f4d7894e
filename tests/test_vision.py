"""vision.py: sees what transformers sees, and names whatever does not fit.

The fixtures were written by transformers (`fixtures/make_vision.py`). Its image processors with Pillow
are the measure; those with torchvision resize a little differently. Errors are shown on a good folder that is
broken in one place.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_tensors
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from load_qwen3 import read_json
from vision import FAMILIES, Fields, Seen, Vision, best_pinpoint, load_vision, on_white

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FOLDERS = ("llava_clip", "llava_siglip", "llava_next", "qwen3_vl")
UNUSED = ("post_layernorm", "layers.2.", "head.")  # of the fixtures with CLIP: layer -2 of 3 is read
REMOVED = ...  # a field taken out of a file


def copy(to: Path, name: str = "llava_clip") -> Path:
    return Path(shutil.copytree(FIXTURES / name, to))


def edit(path: Path, **fields) -> None:
    """`vision_config__hidden_size=8` sets hidden_size within vision_config."""
    raw = json.loads(path.read_text())
    for name, value in fields.items():
        *parts, last = name.split("__")
        part = raw
        for p in parts:
            part = part[p]
        part[last] = value
        if value is REMOVED:
            del part[last]
    path.write_text(json.dumps(raw))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def expected_of(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / name / "expected.safetensors")


def random_picture(w: int, h: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (h, w, len(mode)) if len(mode) > 1 else (h, w)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return Image.fromarray(x.numpy(), mode)


# ---- parity with transformers ----


def parts(seen: Seen) -> dict[str, Tensor]:
    """All that is seen of a picture, as the fixtures name it."""
    found = {"features": seen.features}
    if seen.grid is not None:
        assert len(seen.features) == seen.grid[0] * seen.grid[1]
        found["grid"] = torch.tensor(seen.grid)
    return found | {f"deepstack_{i}": x for i, x in enumerate(seen.deepstack or [])}


def assert_parity(folder: Path, expected: dict[str, Tensor]) -> None:
    """Pixels to 1e-6, tower, features and the rest to 1e-5, as many placeholders."""
    vision = load_vision(folder)
    for size in sorted({name.split(".")[0] for name in expected}):
        e = {name.split(".")[1]: x for name, x in expected.items() if name.startswith(f"{size}.")}
        picture = Image.fromarray(e["picture"].numpy())
        pixels = vision.model.pixels(picture)
        ours = {"pixels": pixels, **parts(vision.look(picture))}
        if "tower" in e:
            ours["tower"] = torch.cat(vision.model.vision_tower(pixels, vision.model.config.behind), dim=-1)
        assert ours.keys() == e.keys() - {"picture"}
        for name, x in ours.items():
            assert x.shape == e[name].shape, (size, name)
            limit = 1e-6 if name == "pixels" else 1e-5
            assert (x - e[name]).abs().max() < limit, (size, name)


@pytest.mark.parametrize("name", FOLDERS)
def test_pixels_tower_and_features_equal_what_transformers_gave(name):
    assert_parity(FIXTURES / name, expected_of(name))


@pytest.mark.parametrize("name", FOLDERS)
def test_every_tensor_of_a_fixture_matters(name):
    """Without any one of them, parity would be lost by far; pictures differ as well."""
    vision, expected = load_vision(FIXTURES / name), expected_of(name)
    picture = Image.fromarray(expected["37x90.picture"].numpy())
    unused = {"llava_siglip": UNUSED[:1], "qwen3_vl": ()}.get(name, UNUSED)
    for n, p in vision.model.named_parameters():
        kept = p.clone()
        p.data.zero_()
        found = parts(vision.look(picture))
        p.data.copy_(kept)
        change = max((x - expected[f"37x90.{part}"]).abs().max() for part, x in found.items())
        # a bias of keys adds the same to all scores of a row
        used = not any(x in n for x in unused) and not n.endswith("k_proj.bias")
        assert (change > 1e-2) if used else (change < 1e-5), n
    other = vision.look(Image.fromarray(expected["64x64.picture"].numpy())).features
    assert (other[:4] - expected["37x90.features"][:4]).abs().max() > 0.1


def test_the_next_fixture_cuts_padding_off_both_ways():
    """Counts by hand: 9 of the whole picture, then rows times (columns + 1)."""
    vision, expected = load_vision(FIXTURES / "llava_next"), expected_of("llava_next")
    counts = {n.split(".")[0]: len(x) for n, x in expected.items() if n.endswith("features")}
    assert counts == {"37x90": 9 + 9 * 3 + 1, "90x37": 9 + 3 * 8, "64x64": 9 + 6 * 7}
    assert [vision.look(random_picture(*size)).features.shape for size in ((37, 90), (90, 37))] == [
        (counts["37x90"], 20),
        (counts["90x37"], 20),
    ]


def test_of_sizes_that_keep_as_much_the_one_with_least_padding_is_taken_and_of_equals_the_first():
    sizes = [[36, 36], [12, 36], [36, 12], [24, 24]]
    assert best_pinpoint((10, 10), sizes) == [12, 36]  # 100 pixels fit into each
    assert best_pinpoint((30, 30), sizes) == [36, 36]
    assert best_pinpoint((20, 20), sizes) == [24, 24]


def test_padding_is_counted_as_with_exact_numbers():
    """Of 47 x 94 pixels on 3 x 9 patches 6 rows are picture: 94 * (3 / 47) is less by rounding."""
    model = load_vision(FIXTURES / "llava_next").model
    model.config = dataclasses.replace(model.config, pinpoints=[[36, 12]])
    assert int(94 * (3 / 47)) == 5
    assert len(model.pack(torch.zeros(4, 9, 20), (47, 94))) == 9 + (9 - 2 * 1) * (3 + 1)


LIVE = {
    "several layers": lambda m: (m.llava(m.CLIP, vision_feature_layer=[-3, 3, 0]), m.clip_processor(12)),
    "the class token kept": lambda m: (
        m.llava(m.CLIP, vision_feature_select_strategy="full", vision_feature_layer=1),
        m.clip_processor(12, size={"shortest_edge": 17}),
    ),
    "no biases, other activations": lambda m: (
        m.llava(
            dict(m.CLIP, hidden_act="gelu", layer_norm_eps=0.1),
            multimodal_projector_bias=False,
            projector_hidden_act="gelu_pytorch_tanh",
        ),
        m.clip_processor(12, resample=2, image_mean=[0.1, 0.2, 0.3], rescale_factor=0.01),
    ),
    "SigLIP with its head, the first patch dropped": lambda m: (m.llava(m.SIGLIP), m.siglip_processor(14)),
    "tiles for SigLIP": lambda m: (
        m.llava_next(m.SIGLIP, [[14, 42], [28, 28]], vision_feature_select_strategy="full"),
        m.next_processor(14, [[14, 42], [28, 28]]),
    ),
    "many tiles": lambda m: (
        m.llava_next(dict(m.CLIP, image_size=20), [[20, 100], [60, 40], [40, 60], [100, 20], [60, 60]]),
        m.next_processor(20, [[20, 100], [60, 40], [40, 60], [100, 20], [60, 60]]),
    ),
    "Qwen with pictures made larger, smaller, and left": lambda m: (
        m.qwen3_vl(),
        m.qwen_processor(900, 9000),
    ),
    "Qwen with almost all pictures made larger": lambda m: (m.qwen3_vl(), m.qwen_processor(6000, 8000)),
    "Qwen with other numbers": lambda m: (
        m.qwen3_vl(
            dict(m.QWEN, spatial_merge_size=3, temporal_patch_size=3, patch_size=3, num_heads=4)
            | dict(hidden_act="gelu", deepstack_visual_indexes=[], num_position_embeddings=9)
        ),
        m.qwen_processor(10, 2000, 3, merge_size=3, temporal_patch_size=3, image_mean=[0, 0.5, 0.9]),
    ),
}
ODD = ((37, 90), (90, 37), (64, 64), (1, 150), (150, 1), (13, 12), (61, 23), (7, 5), (200, 199))


@pytest.mark.parametrize("case", LIVE)
def test_parity_with_transformers_live(tmp_path, monkeypatch, case):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FIXTURES))
    m = pytest.importorskip("make_vision")
    torch.manual_seed(100)
    assert_parity(tmp_path / "v", m.make(tmp_path / "v", *LIVE[case](m), sizes=ODD))


STOCK = {  # as the hub's folders say it: most is left to transformers' defaults
    "llava-1.5-7b": dict(
        model_type="llava",
        vision_config=dict(
            model_type="clip_vision_model",
            hidden_size=1024,
            image_size=336,
            intermediate_size=4096,
            num_attention_heads=16,
            num_hidden_layers=24,
            patch_size=14,
            projection_dim=768,
            vocab_size=32000,
        ),
        text_config=dict(model_type="llama", vocab_size=32064),
        ignore_index=-100,
        pad_token_id=32001,
    ),
    "no tower described": dict(model_type="llava_next", text_config=dict(model_type="mistral")),
    "little of a tower": dict(model_type="llava", vision_config={}, text_config=dict(hidden_size=64)),
    "little of a SigLIP": dict(
        model_type="llava",
        vision_config=dict(model_type="siglip_vision_model", image_size=384, patch_size=14),
        text_config=dict(model_type="qwen2"),
    ),
    "Qwen3-VL-4B": dict(
        model_type="qwen3_vl",
        image_token_id=151655,
        tie_word_embeddings=True,
        text_config=dict(model_type="qwen3_vl_text", hidden_size=2560),
        video_token_id=151656,
        vision_config=dict(
            deepstack_visual_indexes=[5, 11, 17],
            depth=24,
            hidden_act="gelu_pytorch_tanh",
            hidden_size=1024,
            in_channels=3,
            initializer_range=0.02,
            intermediate_size=4096,
            model_type="qwen3_vl",
            num_heads=16,
            num_position_embeddings=2304,
            out_hidden_size=2560,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        vision_end_token_id=151653,
        vision_start_token_id=151652,
    ),
    "little of a Qwen3-VL": dict(
        model_type="qwen3_vl", vision_config={}, text_config=dict(hidden_size=3584, num_attention_heads=28)
    ),
}


@pytest.mark.parametrize("case", STOCK)
def test_what_stock_configurations_leave_out_is_as_transformers_has_it(tmp_path, case):
    """The same tensors of the same shapes, the same placeholder."""
    transformers = pytest.importorskip("transformers")
    raw = STOCK[case]
    side = raw.get("vision_config", {"image_size": 336}).get("image_size", 224)
    square = {"height": side, "width": side}
    kind = {"llava": "CLIP", "llava_next": "LlavaNext", "qwen3_vl": "Qwen2VL"}[raw["model_type"]]
    processor = dict(image_processor_type=f"{kind}ImageProcessor", crop_size=square, size=square)
    if kind == "Qwen2VL":
        processor = dict(image_processor_type="Qwen2VLImageProcessorFast", patch_size=16)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with torch.device("meta"):
        fields = Fields(tmp_path / "config.json", raw)
        model, placeholder = FAMILIES[raw["model_type"]](tmp_path, fields)
        config = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))
        config.text_config.num_hidden_layers = 1
        theirs = transformers.AutoModelForImageTextToText.from_config(config).model.state_dict()
    theirs = {n: tuple(x.shape) for n, x in theirs.items() if not n.startswith("language_model.")}
    theirs = {n.replace("vision_tower.vision_model.", "vision_tower."): x for n, x in theirs.items()}
    assert {n: tuple(x.shape) for n, x in model.state_dict().items()} == theirs
    if kind == "Qwen2VL":
        c = model.config
        assert placeholder == config.image_token_id and c.num_heads == config.vision_config.num_heads
        assert (c.deepstack, c.hidden_act) == (
            list(config.vision_config.deepstack_visual_indexes),
            config.vision_config.hidden_act,
        )
        return
    assert placeholder == config.image_token_index
    assert model.vision_tower.encoder["layers"][0].heads == config.vision_config.num_attention_heads
    assert model.config.tower.hidden_act == config.vision_config.hidden_act


# ---- pictures ----


def test_any_mode_of_a_picture_is_seen_in_rgb_and_what_is_transparent_on_white():
    rgb, gray = random_picture(30, 20), random_picture(30, 20, "L")
    vision = load_vision(FIXTURES / "llava_clip")
    plain = vision.look(gray.convert("RGB")).features
    assert vision.look(gray).features.equal(plain)
    assert vision.look(rgb.convert("P")).features.equal(vision.look(rgb.convert("P").convert("RGB")).features)
    clear = rgb.copy()
    clear.putalpha(0)
    assert on_white(clear).getcolors() == [(600, (255, 255, 255))]
    rgb.putalpha(255)
    assert vision.look(rgb).features.equal(vision.look(rgb.convert("RGB")).features)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (201, 1)])
def test_a_picture_too_thin_is_one_line(name, size):
    with pytest.raises(ValueError, match=rf"^a picture of {size[0]} x {size[1]} pixels .* 200 to 1[^\n]*$"):
        load_vision(FIXTURES / name).look(Image.new("RGB", size))


@pytest.mark.parametrize("name", ("llava_next", "qwen3_vl"))
def test_nothing_is_trained_and_another_dtype_is_near(name):
    vision, half = (load_vision(FIXTURES / name, dtype) for dtype in (torch.float32, torch.bfloat16))
    picture = random_picture(40, 25)
    seen, rough = vision.look(picture).features, half.look(picture).features
    assert not any(p.requires_grad for p in vision.model.parameters()) and not vision.model.training
    assert not seen.requires_grad and rough.dtype == torch.bfloat16
    assert (seen - rough.float()).abs().max() < 0.1 * seen.abs().max()
    assert isinstance(vision, Vision) and vision.placeholder_id == 7


# ---- what a folder may look like ----


def renamed(name: str, vision: str, text: str, head: str, top: str) -> str:
    for old, new in (
        ("vision_tower.", vision),
        ("language_model.model.", text),
        ("language_model.lm_head.", head),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return top + name


@pytest.mark.parametrize("shards", (1, 3))
@pytest.mark.parametrize(
    "names",
    [
        ("vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.", ""),
        ("model.vision_tower.vision_model.", "model.language_model.", "lm_head.", "model."),
        ("model.vision_tower.", "model.language_model.", "lm_head.", "model."),
    ],
)
def test_every_layout_of_names_gives_the_same(tmp_path, names, shards):
    folder = copy(tmp_path / "v", "llava_next")
    tensors = {renamed(n, *names): x for n, x in load_file(folder / "model.safetensors").items()}
    tensors[f"{names[0]}embeddings.position_ids"] = torch.arange(10)[None]  # old exports have it
    assert any(n.startswith(names[1]) for n in tensors) and f"{names[2]}weight" in tensors
    (folder / "model.safetensors").unlink()
    save_tensors(folder, tensors, shards)
    assert_parity(folder, expected_of("llava_next"))


def test_settings_of_the_image_processor_are_found_in_either_file(tmp_path):
    """transformers 5 writes one file; beside an old one it is the first that counts."""
    folder = copy(tmp_path / "v")
    old, new = folder / "preprocessor_config.json", folder / "processor_config.json"
    new.write_text(json.dumps({"processor_class": "LlavaProcessor", "patch_size": 4}))
    assert_parity(folder, expected_of("llava_clip"))  # only the old one has any
    new.write_text(json.dumps({"image_processor": read_json(old)}))
    edit(old, image_mean=[0.5, 0.5, 0.5])
    assert_parity(folder, expected_of("llava_clip"))
    old.unlink()
    assert_parity(folder, expected_of("llava_clip"))
    new.unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json: no such file"):
        load_vision(folder)


def test_the_other_name_of_the_placeholder_and_null_are_understood(tmp_path):
    folder = copy(tmp_path / "v")
    edit(folder / "config.json", image_token_index=REMOVED, image_token_id=9, vision_feature_layer=None)
    edit(folder / "preprocessor_config.json", image_processor_type="CLIPImageProcessorFast", device=None)
    assert load_vision(folder).placeholder_id == 9
    assert_parity(folder, expected_of("llava_clip"))


def test_older_names_of_the_numbers_of_pixels_count_more(tmp_path):
    folder = copy(tmp_path / "v", "qwen3_vl")
    size = {"shortest_edge": 9, "longest_edge": 99}
    edit(folder / "preprocessor_config.json", size=size, min_pixels=500, max_pixels=1200)
    assert_parity(folder, expected_of("qwen3_vl"))


NEXT = "llava_next"
BAD_CONFIG = [
    ("llava_clip", dict(model_type="qwen3"), 'model_type = "qwen3"'),
    ("llava_clip", dict(model_type=REMOVED), "model_type = null"),
    ("llava_clip", dict(vision_config=[]), "vision_config is not"),
    ("llava_clip", dict(vision_config__model_type="dinov2"), "vision_config.model_type"),
    ("llava_clip", dict(vision_config__hidden_size=0), "vision_config.hidden_size"),
    ("llava_clip", dict(vision_config__num_attention_heads=3), "vision_config.num_attention_heads"),
    ("llava_clip", dict(vision_config__num_hidden_layers="3"), "vision_config.num_hidden_layers"),
    ("llava_clip", dict(vision_config__hidden_act="relu6"), "vision_config.hidden_act"),
    ("llava_clip", dict(vision_config__num_channels=1), "vision_config.num_channels"),
    ("llava_clip", dict(vision_config__layer_norm_eps=0), "vision_config.layer_norm_eps"),
    ("llava_clip", dict(vision_config__image_size=3), "vision_config.image_size"),
    ("llava_clip", dict(vision_config__use_registers=True), "vision_config.use_registers"),
    ("llava_clip", dict(vision_feature_layer=-5), "vision_feature_layer = -5"),
    ("llava_clip", dict(vision_feature_layer=[]), "vision_feature_layer"),
    ("llava_clip", dict(vision_feature_select_strategy="cls"), "vision_feature_select_strategy"),
    ("llava_clip", dict(projector_hidden_act="swish"), "projector_hidden_act"),
    ("llava_clip", dict(multimodal_projector_bias=1), "multimodal_projector_bias"),
    ("llava_clip", dict(image_token_index=-1), "image_token_index"),
    ("llava_clip", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("llava_clip", dict(text_config=dict(model_type="gemma")), "text_config.hidden_size"),
    (NEXT, dict(use_image_newline_parameter=False), "use_image_newline_parameter"),
    (NEXT, dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy"),
    (NEXT, dict(image_grid_pinpoints=[[12, 25]]), "image_grid_pinpoints"),
    (NEXT, dict(image_grid_pinpoints=[]), "image_grid_pinpoints"),
    (NEXT, dict(image_grid_pinpoints=[[12, 24]]), "image_grid_pinpoints"),  # the image processor's differ
]
QWEN = "qwen3_vl"
BAD_CONFIG += [
    (QWEN, dict(vision_config__model_type="qwen2_5_vl"), "vision_config.model_type"),
    (QWEN, dict(vision_config__depth=0), "vision_config.depth"),
    (QWEN, dict(vision_config__num_heads=3), "vision_config.num_heads"),
    (QWEN, dict(vision_config__in_channels=4), "vision_config.in_channels"),
    (QWEN, dict(vision_config__rope_parameters__rope_theta=500), "vision_config.rope_parameters"),
    (QWEN, dict(vision_config__num_position_embeddings=37), "vision_config.num_position_embeddings"),
    (QWEN, dict(vision_config__deepstack_visual_indexes=[1, 0]), "vision_config.deepstack_visual_indexes"),
    (QWEN, dict(vision_config__deepstack_visual_indexes=[3]), "vision_config.deepstack_visual_indexes"),
    (QWEN, dict(vision_config__fullatt_block_indexes=[1]), "vision_config.fullatt_block_indexes"),
    (QWEN, dict(vision_config__out_hidden_size=24), "vision_config.out_hidden_size"),
    (QWEN, dict(image_token_id="<image>"), "image_token_id"),
]
SQUARE = {"height": 24, "width": 24}
BAD_PROCESSOR = [
    ("llava_clip", dict(image_processor_type="ViTImageProcessor"), "image_processor_type"),
    (NEXT, dict(image_processor_type="CLIPImageProcessor"), "image_processor_type"),
    ("llava_clip", dict(crop_size=SQUARE), "crop_size .* tiles of 12 x 12"),
    ("llava_clip", dict(size={"shortest_edge": 11}), "size .* tiles of 12 x 12"),
    ("llava_clip", dict(do_center_crop=False), "size .* tiles of 12 x 12"),
    ("llava_siglip", dict(size=SQUARE), "size .* tiles of 14 x 14"),
    ("llava_siglip", dict(size={"height": 14, "width": 15}), "size"),
    (NEXT, dict(size={"shortest_edge": 24}), "size .* tiles of 12 x 12"),
    (NEXT, dict(crop_size=SQUARE), "crop_size .* tiles of 12 x 12"),
    ("llava_clip", dict(size=12), "size = 12"),
    ("llava_clip", dict(do_resize=False), "do_resize"),
    ("llava_clip", dict(do_pad=True), "do_pad"),
    ("llava_clip", dict(resample=9), "resample"),
    ("llava_clip", dict(image_mean=[0.5]), "image_mean"),
    ("llava_clip", dict(image_mean=["", 0.5, 0.5]), "image_mean"),
    ("llava_clip", dict(image_std=[0.5, 0, 0.5]), "image_std"),
    ("llava_clip", dict(rescale_factor="1/255"), "rescale_factor"),
    ("llava_clip", dict(do_flip=True), "do_flip"),
    (QWEN, dict(image_processor_type="CLIPImageProcessor"), "image_processor_type"),
    (QWEN, dict(patch_size=8), "patch_size = 8 .* vision_config has 4"),
    (QWEN, dict(merge_size=1), "merge_size"),
    (QWEN, dict(temporal_patch_size=1), "temporal_patch_size"),
    (QWEN, dict(size={"shortest_edge": 224}), "size"),
    (QWEN, dict(min_pixels=2000), "max_pixels"),  # more than the most
    (QWEN, dict(max_frames=3), "max_frames"),
]


@pytest.mark.parametrize("name, fields, words", BAD_CONFIG, ids=lambda x: str(x)[:40])
def test_a_config_that_does_not_fit_is_one_line_with_its_field(tmp_path, name, fields, words):
    edit(copy(tmp_path / "v", name) / "config.json", **fields)
    with pytest.raises(ValueError, match=rf"^[^\n]*config.json: {words}[^\n]*$"):
        load_vision(tmp_path / "v")


@pytest.mark.parametrize("name, fields, words", BAD_PROCESSOR, ids=lambda x: str(x)[:40])
def test_a_processor_that_does_not_fit_is_one_line_with_its_field(tmp_path, name, fields, words):
    edit(copy(tmp_path / "v", name) / "preprocessor_config.json", **fields)
    with pytest.raises(ValueError, match=rf"^[^\n]*preprocessor_config.json: {words}[^\n]*$"):
        load_vision(tmp_path / "v")


LINEAR = "multi_modal_projector.linear_1.weight"
BAD_TENSORS = [
    (lambda t: t.pop(LINEAR), f"{LINEAR} is missing"),
    (lambda t: t.update({LINEAR: t[LINEAR][:-1].clone()}), rf"{LINEAR} is F16 \(19, 16\), not .*\(20, 16\)"),
    (lambda t: t.update({LINEAR: t[LINEAR].int()}), f"{LINEAR} is I32"),
    (lambda t: t.update({"vision_tower.head.probe": torch.ones(1)}), "vision_tower.head.probe is not one"),
    (lambda t: t.update({"visual.x": torch.ones(1)}), "visual.x is not one"),
    (lambda t: t.update({f"model.{LINEAR}": t[LINEAR].clone()}), f"{LINEAR} is there twice"),
    (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("vision_tower.")],
        "vision_tower.embeddings.class_embedding is missing",
    ),
]


@pytest.mark.parametrize("change, words", BAD_TENSORS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_tensor_that_does_not_fit_is_one_line_with_its_name(tmp_path, change, words):
    edit_tensors(copy(tmp_path / "v"), change)
    with pytest.raises(ValueError, match=rf"^[^\n]*tensor (model\.)?{words}[^\n]*$"):
        load_vision(tmp_path / "v")


def test_a_folder_of_a_language_model_has_no_eyes(write_qwen3, tmp_path):
    with pytest.raises(ValueError, match='^[^\n]*model_type = "qwen3" is not supported; only "llava"[^\n]*$'):
        load_vision(write_qwen3(tmp_path / "q"))
    with pytest.raises(ValueError, match="no such folder"):
        load_vision(tmp_path / "nowhere")
