"""vae.py: equals diffusers' AutoencoderKL, is a codec for uint8 pictures, and names whatever does not fit.

`fixtures/vae_*` were written by diffusers itself (`fixtures/make_vae.py`). Errors are shown on a good folder
that is broken in one place.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scale.vae import WEIGHTS, AutoencoderKL, VAEConfig, load_vae, read_vae_config

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FOLDERS = ("vae_sd", "vae_flux")
REMOVED = object()  # a field taken out of config.json


def copy(to: Path, name: str = "vae_sd") -> Path:
    return Path(shutil.copytree(FIXTURES / name, to))


def edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not REMOVED}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def expected_of(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / name / "expected.safetensors")


def random_pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- parity with diffusers ----


@torch.no_grad()
def assert_parity(folder: Path, expected: dict[str, Tensor]) -> None:
    vae = load_vae(folder)
    mean, logvar = vae.moments(expected["pictures"].float() / 127.5 - 1)
    ours = {"mean": mean, "logvar": logvar, "decoded": vae.pixels(expected["z"])}
    ours["latents"] = vae.encode(expected["pictures"])
    for name, x in ours.items():
        assert x.shape == expected[name].shape, name
        assert (x - expected[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("name", FOLDERS)
def test_encoder_and_decoder_equal_what_diffusers_gave(name):
    assert_parity(FIXTURES / name, expected_of(name))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_fixtures_are_hard_enough(name):
    """Every tensor is off its initial value, outputs vary, and attention looks at some places only."""
    vae, expected = load_vae(FIXTURES / name), expected_of(name)
    for n, p in vae.named_parameters():
        assert (p - (1.0 if "norm" in n and n.endswith("weight") else 0.0)).abs().max() > 0.1, n
    for n in ("mean", "logvar", "decoded"):
        assert expected[n].std() > 0.3, n
    assert (expected["mean"] - expected["logvar"]).abs().mean() > 0.3
    assert expected["logvar"].abs().max() < 20  # the clamp has a test of its own
    attention = vae.encoder.mid_block.attentions[0]
    scores = []
    attention.to_q.register_forward_hook(lambda _, x, q: scores.append(q @ attention.to_k(x[0]).mT))
    vae.encode(expected["pictures"])
    weights = (scores[0] / len(attention.to_q.bias) ** 0.5).softmax(-1)  # (M, hw, hw)
    assert weights.amax(-1).mean() > 3 / weights.shape[-1]


def test_the_fixtures_differ_in_what_the_config_can_say():
    sd, flux = (read_vae_config(FIXTURES / name / "config.json") for name in FOLDERS)
    assert (sd.use_quant_conv, sd.use_post_quant_conv, sd.shift_factor, sd.layers_per_block) == (
        True,
        True,
        0,
        2,
    )
    assert (flux.use_quant_conv, flux.use_post_quant_conv, flux.layers_per_block) == (False, False, 1)
    assert flux.shift_factor > 0 and flux.latent_channels == 16 and len(flux.block_out_channels) == 3


LIVE = {
    "no attention": dict(block_out_channels=(4, 8), mid_block_add_attention=False),
    "one block": dict(block_out_channels=(8,), shift_factor=-0.5, scaling_factor=1.5305),
    "only quant_conv": dict(block_out_channels=(8, 4, 8), use_post_quant_conv=False, layers_per_block=3),
    "only post_quant_conv": dict(block_out_channels=(4, 4), use_quant_conv=False, norm_num_groups=4),
    "four blocks": dict(block_out_channels=(4, 8, 16, 16), layers_per_block=2, latent_channels=3),
}


@pytest.mark.parametrize("case", LIVE)
def test_parity_with_diffusers_live(tmp_path, monkeypatch, case):
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(FIXTURES))
    fields = dict(layers_per_block=1, latent_channels=4, norm_num_groups=2)
    expected = pytest.importorskip("make_vae").make(tmp_path / "v", 100, **{**fields, **LIVE[case]})
    assert_parity(tmp_path / "v", expected)


def test_the_sd_vae_has_exactly_its_published_size():
    config = VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert (vae.patch, vae.channels, vae.bound) == (8, 4, None)


# ---- the codec ----


@pytest.mark.parametrize("name", FOLDERS)
def test_a_codec_of_uint8_pictures(name):
    vae, expected = load_vae(FIXTURES / name), expected_of(name)
    f, C = vae.patch, vae.channels
    assert (f, C) == {"vae_sd": (2, 4), "vae_flux": (4, 16)}[name]
    z = vae.encode(random_pictures(3, 3, 16, 16))
    assert z.shape == (3, C, 16 // f, 16 // f) and z.dtype == torch.float32
    pictures = vae.decode(z)
    assert pictures.shape == (3, 3, 16, 16) and pictures.dtype == torch.uint8
    x = (expected["decoded"] + 1) * 127.5
    z = (expected["z"] - vae.config.shift_factor) * vae.config.scaling_factor
    assert (vae.decode(z).float() - x.clamp(0, 255)).abs().max() < 0.501  # rounded, not cut
    assert x.min() < -1 and x.max() > 256  # and clamped, not wrapped around


def test_scale_and_shift_are_honoured_on_both_sides(tmp_path):
    plain = load_vae(FIXTURES / "vae_flux")
    plain.config = replace(plain.config, scaling_factor=1.0, shift_factor=0.0)
    edit(copy(tmp_path / "v", "vae_flux"), scaling_factor=0.25, shift_factor=3)
    vae, pictures = load_vae(tmp_path / "v"), random_pictures(2, 3, 8, 8)
    mean, _ = vae.moments(pictures.float() / 127.5 - 1)
    assert torch.allclose(plain.encode(pictures), mean, atol=1e-6)
    assert torch.allclose(vae.encode(pictures), (mean - 3) * 0.25, atol=1e-6)
    assert vae.decode((mean - 3) * 0.25).equal(plain.decode((mean - 3) * 0.25 / 0.25 + 3))
    assert not vae.decode(mean).equal(plain.decode(mean))


def test_the_default_scale_is_stable_diffusions_and_a_null_shift_is_zero(tmp_path):
    edit(copy(tmp_path / "v"), scaling_factor=REMOVED, shift_factor=None)
    config = load_vae(tmp_path / "v").config
    assert (config.scaling_factor, config.shift_factor) == (0.18215, 0.0)


def test_an_early_config_without_the_later_fields_loads_with_diffusers_defaults(tmp_path):
    """As the one of sd-vae-ft-mse."""
    folder, later = copy(tmp_path / "v"), ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    later += ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    edit(folder, _diffusers_version="0.4.2", **dict.fromkeys(later, REMOVED))
    assert load_vae(folder).config == load_vae(FIXTURES / "vae_sd").config


@pytest.mark.parametrize("name", FOLDERS)
def test_sub_batches_equal_one_by_one(name):
    vae, pictures, seen = load_vae(FIXTURES / name), random_pictures(5, 3, 8, 12), []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    z = vae.encode(pictures)
    back = vae.decode(z)
    assert seen == [4, 1, 4, 1]
    one_by_one = torch.cat([vae.encode(p[None]) for p in pictures])
    assert torch.allclose(z, one_by_one, atol=1e-5)
    assert torch.allclose(z, vae.encode(pictures, batch=2), atol=1e-5)
    apart = [torch.cat([vae.decode(x[None]) for x in z]), vae.decode(z, batch=3)]
    assert all((x.int() - back.int()).abs().max() <= 1 for x in apart)  # a sum's order may tip a rounding
    assert z.std(0).min() > 1e-4  # five different pictures
    assert vae.encode(pictures[:0]).shape == (0, *z.shape[1:]) and len(vae.decode(z[:0])) == 0


def test_log_variance_is_clamped():
    vae, x = load_vae(FIXTURES / "vae_flux"), torch.zeros(1, 3, 8, 8)
    mean, _ = vae.moments(x)
    for push, limit in ((1e3, 20.0), (-1e3, -30.0)):
        with torch.no_grad():
            vae.encoder.conv_out.bias[16:] = push
        assert (vae.moments(x)[1] == limit).all() and torch.equal(vae.moments(x)[0], mean)


def test_no_gradient_is_tracked():
    vae = load_vae(FIXTURES / "vae_sd")
    assert not vae.training and not any(m.training for m in vae.modules())
    assert not any(p.requires_grad for p in vae.parameters())
    z = vae.encode(random_pictures(1, 3, 8, 8))
    assert not z.requires_grad and not vae.decode(z.requires_grad_()).requires_grad
    assert not vae.moments(torch.zeros(1, 3, 8, 8))[0].requires_grad
    vae.requires_grad_(True)
    tracked = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_hook(lambda _, x, y: tracked.append(y.requires_grad))
    vae.decode(vae.encode(random_pictures(1, 3, 8, 8)))
    assert tracked == [False, False]


@pytest.mark.parametrize("name", FOLDERS)
def test_bfloat16_is_near_float32(name):
    full, half = load_vae(FIXTURES / name), load_vae(FIXTURES / name, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in full.parameters()} == {torch.float32}  # though stored as float16
    pictures = random_pictures(2, 3, 16, 16)
    z = full.encode(pictures)
    assert half.encode(pictures).dtype == torch.float32
    assert (half.encode(pictures) - z).abs().max() < 0.1 * z.abs().max()
    assert (half.decode(z).float() - full.decode(z).float()).abs().mean() < 3


def test_inputs_move_to_the_vaes_device_and_results_come_back():
    """The meta device stands in for a GPU, two stubs for what would compute there."""
    vae, went = load_vae(FIXTURES / "vae_flux", torch.bfloat16, device="meta"), []
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in vae.parameters())

    def stub(*shape: int):
        return lambda x: went.append((x.device.type, x.dtype)) or torch.zeros(shape, dtype=x.dtype)

    vae.encoder.forward, vae.decoder.forward = stub(1, 32, 2, 2), stub(1, 3, 8, 8)
    z = vae.encode(random_pictures(1, 3, 8, 8))
    pictures = vae.decode(z)
    assert went == [("meta", torch.bfloat16)] * 2
    assert (z.device.type, z.dtype) == ("cpu", torch.float32)
    assert (pictures.device.type, pictures.dtype) == ("cpu", torch.uint8)


@pytest.mark.parametrize("shape", [(1, 3, 8, 10), (1, 3, 6, 8), (2, 3, 0, 8)])
def test_pictures_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=rf"{shape[-2]}.*{shape[-1]}"):
        load_vae(FIXTURES / "vae_flux").encode(random_pictures(*shape))


def test_pictures_that_are_not_uint8_and_latents_of_other_channels_are_a_bug():
    vae = load_vae(FIXTURES / "vae_sd")
    for wrong in (torch.zeros(1, 3, 8, 8), random_pictures(1, 4, 8, 8), random_pictures(3, 8, 8)):
        with pytest.raises(AssertionError):
            vae.encode(wrong)
    with pytest.raises(AssertionError):
        vae.decode(torch.zeros(1, 16, 4, 4))


def test_the_bound_is_the_callers_and_no_tensor_of_the_model():
    vae = load_vae(FIXTURES / "vae_sd")
    assert vae.bound is None
    vae.bound = torch.ones(4, 1, 1)
    assert vae.bound.shape == (4, 1, 1) and "bound" not in vae.state_dict()


# ---- the file ----


def test_the_state_dict_is_the_file():
    """Names, shapes and, as float16 fits into float32, every value."""
    for name in FOLDERS:
        stored, ours = load_file(FIXTURES / name / WEIGHTS), load_vae(FIXTURES / name).state_dict()
        assert stored.keys() == ours.keys()
        assert all(torch.equal(stored[n].float(), p) for n, p in ours.items())


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("convolution", [False, True])
def test_old_attention_names_load_equal(tmp_path, convolution):
    def age(tensors):
        for name in [n for n in tensors if ".attentions.0.to_" in n]:
            x, old = tensors.pop(name), name
            for new, former in OLD.items():
                old = old.replace(f".{new}.", f".{former}.")
            tensors[old] = x[:, :, None, None].contiguous() if convolution and x.dim() == 2 else x
        assert sum(n.endswith("proj_attn.weight") for n in tensors) == 2

    edit_tensors(copy(tmp_path / "v"), age)
    assert_parity(tmp_path / "v", expected_of("vae_sd"))
    new, old = load_vae(FIXTURES / "vae_sd"), load_vae(tmp_path / "v")
    assert all(torch.equal(p, old.state_dict()[n]) for n, p in new.state_dict().items())
    assert old.fingerprint() == new.fingerprint()


def test_a_subfolder_vae_is_taken_if_the_folder_has_no_weights_itself(tmp_path):
    copy(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    fingerprint = load_vae(str(tmp_path / "pipeline")).fingerprint()
    assert fingerprint == load_vae(FIXTURES / "vae_sd").fingerprint()
    shutil.copytree(FIXTURES / "vae_flux", tmp_path / "pipeline", dirs_exist_ok=True)
    assert load_vae(tmp_path / "pipeline").channels == 16


@pytest.mark.parametrize("inside", ["", "vae"])
def test_a_hub_id_downloads_two_safe_files_only(tmp_path, monkeypatch, inside):
    copy(tmp_path / "snapshot" / inside)
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: calls.append((a, k)) or tmp_path / "snapshot"
    )
    assert load_vae("owner/name").channels == 4
    wanted = ["config.json", WEIGHTS, "vae/config.json", f"vae/{WEIGHTS}"]
    assert calls == [(("owner/name",), {"allow_patterns": wanted})]


def test_the_fingerprint_is_that_of_configuration_names_and_bits(tmp_path):
    vae = load_vae(FIXTURES / "vae_sd")
    fingerprint = vae.fingerprint()
    assert len(fingerprint) == 64 and fingerprint == load_vae(copy(tmp_path / "same")).fingerprint()
    assert fingerprint == load_vae(FIXTURES / "vae_sd", torch.bfloat16).fingerprint()  # of the file
    built = AutoencoderKL(vae.config).half()
    built.load_state_dict(load_file(FIXTURES / "vae_sd" / WEIGHTS))
    assert built.fingerprint() == fingerprint  # or, without a file, of the tensors at the first call
    edit(copy(tmp_path / "scaled"), scaling_factor=0.18216)
    edit_tensors(
        copy(tmp_path / "bit"), lambda x: x["decoder.conv_out.bias"].view(torch.int16)[0].bitwise_xor_(1)
    )
    edit_tensors(
        copy(tmp_path / "swapped"), lambda x: swap(x, "encoder.conv_in.bias", "decoder.conv_norm_out.bias")
    )
    prints = {load_vae(tmp_path / n).fingerprint() for n in ("same", "scaled", "bit", "swapped")}
    assert len(prints) == 4


def swap(tensors: dict[str, Tensor], a: str, b: str) -> None:
    assert tensors[a].shape == tensors[b].shape
    tensors[a], tensors[b] = tensors[b], tensors[a]


# ---- what is refused ----


def assert_refused(folder: Path | str, *names: str) -> None:
    with pytest.raises(ValueError) as error:
        load_vae(folder)
    for name in names:
        assert name in str(error.value)


REFUSED_FIELDS = [
    ("_class_name", "AutoencoderTiny"),
    ("_class_name", "VQModel"),
    ("in_channels", 4),
    ("out_channels", 1),
    ("act_fn", "relu"),
    ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
    ("down_block_types", ["DownEncoderBlock2D"]),
    ("down_block_types", REMOVED),
    ("up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]),
    ("up_block_types", ["UpDecoderBlock2D"] * 3),
    ("up_block_types", "UpDecoderBlock2D"),
    ("block_out_channels", []),
    ("block_out_channels", 12),
    ("block_out_channels", [6, 0]),
    ("block_out_channels", [6, 12.0]),
    ("block_out_channels", [6, 13]),
    ("layers_per_block", 0),
    ("layers_per_block", "2"),
    ("layers_per_block", [2, 2]),
    ("latent_channels", 4.0),
    ("latent_channels", True),
    ("norm_num_groups", None),
    ("norm_num_groups", -3),
    ("scaling_factor", 0),
    ("scaling_factor", None),
    ("scaling_factor", "0.18215"),
    ("scaling_factor", float("nan")),
    ("shift_factor", [0.1]),
    ("shift_factor", float("inf")),
    ("shift_factor", False),
    ("use_quant_conv", "false"),
    ("use_post_quant_conv", 0),
    ("mid_block_add_attention", None),
    ("latents_mean", [0.0] * 4),
    ("latents_std", [1.0] * 4),
    ("norm_type", "spatial"),
]


@pytest.mark.parametrize(
    ("field", "value"),
    REFUSED_FIELDS,
    ids=[f"{f}={'REMOVED' if v is REMOVED else v}" for f, v in REFUSED_FIELDS],
)
def test_a_config_that_is_not_built_is_refused_by_field_and_value(tmp_path, field, value):
    edit(copy(tmp_path / "v"), **{field: value})
    shown = "null" if value is REMOVED else json.dumps(value)
    assert_refused(tmp_path / "v", str(tmp_path / "v" / "config.json"), f"{field} = {shown}")


@pytest.mark.parametrize("field, value", [("sample_size", [512, 512]), ("force_upcast", False), ("_odd", 1)])
def test_a_field_that_changes_nothing_is_let_be(tmp_path, field, value):
    edit(copy(tmp_path / "v"), **{field: value})
    assert load_vae(tmp_path / "v").fingerprint() == load_vae(FIXTURES / "vae_sd").fingerprint()


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null"])
def test_a_config_file_that_is_no_json_object_is_named(tmp_path, text):
    (copy(tmp_path / "v") / "config.json").write_text(text)
    assert_refused(tmp_path / "v", "config.json")


@pytest.mark.parametrize("file", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(tmp_path, file):
    (copy(tmp_path / "v") / file).unlink()
    assert_refused(tmp_path / "v", str(tmp_path / "v"), file)


@pytest.mark.parametrize("inside", ["", "vae"])
@pytest.mark.parametrize("file", ["diffusion_pytorch_model.bin", "vae-ft-mse.ckpt", "x.pt"])
def test_a_pickle_is_refused_and_why(tmp_path, file, inside):
    folder = copy(tmp_path / "v" / inside)
    (folder / WEIGHTS).rename(folder / file)
    assert_refused(
        tmp_path / "v", str(folder), file, "a pickle, which runs code when loaded; convert it to safetensors"
    )


@pytest.mark.parametrize("name", ["nobody/nothing-at-all", "no-such-folder", "./a/b", "../x/y", ""])
def test_neither_a_folder_nor_a_hub_id_that_can_be_had(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert_refused(name or tmp_path / "none", name or "none")


CONV, QUERY = "decoder.up_blocks.0.resnets.2.conv2.weight", "encoder.mid_block.attentions.0.to_q.weight"
OLD_QUERY = QUERY.replace("to_q", "query")
BROKEN_TENSORS = [
    ("missing", lambda x: x.pop(CONV), CONV),
    ("missing attention", lambda x: x.pop(QUERY), QUERY),
    ("missing quant_conv", lambda x: x.pop("quant_conv.bias"), "quant_conv.bias"),
    ("foreign", lambda x: x.update({"loss.logvar": torch.zeros(1)}), "loss.logvar"),
    ("extra layer", lambda x: x.update({CONV.replace("s.2", "s.3"): torch.zeros(12, 12, 3, 3)}), "resnets.3"),
    ("twice", lambda x: x.update({OLD_QUERY: x[QUERY].clone()}), QUERY),
    ("one channel less", lambda x: x.update({CONV: x[CONV][:-1].contiguous()}), "(11, 12, 3, 3)"),
    ("5 x 5", lambda x: x.update({CONV: torch.zeros(12, 12, 5, 5)}), CONV),
    ("3 x 3 query", lambda x: x.update({QUERY: torch.zeros(12, 12, 3, 3)}), QUERY),
    ("flat quant_conv", lambda x: x.update({"quant_conv.weight": torch.zeros(8, 8)}), "quant_conv.weight"),
    ("whole numbers", lambda x: x.update({CONV: x[CONV].int()}), CONV),
]


@pytest.mark.parametrize(
    ("change", "name"), [b[1:] for b in BROKEN_TENSORS], ids=[b[0] for b in BROKEN_TENSORS]
)
def test_every_tensor_is_accounted_for_by_name_shape_and_type(tmp_path, change, name):
    edit_tensors(copy(tmp_path / "v"), change)
    assert_refused(tmp_path / "v", str(tmp_path / "v" / WEIGHTS), name)


@pytest.mark.parametrize(
    ("name", "field", "value", "tensor"),
    [
        ("vae_sd", "use_quant_conv", False, "quant_conv"),
        ("vae_sd", "mid_block_add_attention", False, "attentions.0"),
        ("vae_sd", "layers_per_block", 1, "resnets"),
        ("vae_flux", "use_post_quant_conv", True, "post_quant_conv"),
        ("vae_flux", "latent_channels", 4, "conv"),
    ],
)
def test_a_config_that_disagrees_with_the_file_is_refused_by_tensor(tmp_path, name, field, value, tensor):
    edit(copy(tmp_path / "v", name), **{field: value})
    assert_refused(tmp_path / "v", WEIGHTS, tensor)


@pytest.mark.parametrize(
    "content",
    [lambda b: b"", lambda b: b[:200], lambda b: b[:-1], lambda b: b"\xff" * 64],
    ids=["empty", "200 bytes", "one byte short", "garbage"],
)
def test_a_corrupt_or_truncated_file_is_named(tmp_path, content):
    file = copy(tmp_path / "v") / WEIGHTS
    file.write_bytes(content(file.read_bytes()))
    assert_refused(tmp_path / "v", str(file))
