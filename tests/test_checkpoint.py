"""checkpoint.py: what a checkpoint holds, that it gives back the very model, and that damage is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import train
from checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_trained,
    read_tensors,
    write_atomic,
    write_folder,
)
from train import Run

FILES = ("model.safetensors", "optimizer.safetensors", "latents.safetensors", "checkpoint.json")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs leave their name in runs/last-small: below the test's folder, not in the user's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def whole(tmp_path) -> Path:
    """A checkpoint of one's own to break, with a moving average."""
    source = list_checkpoints(helpers.shapes_run())[-1]
    return Path(shutil.copytree(source, tmp_path / "run" / source.name))


@pytest.fixture
def make_run(tmp_path):
    def make(*flags: object) -> Run:
        with helpers.inside(tmp_path):
            torch.manual_seed(0)
            return Run(helpers.photo_config(tmp_path / "run", *flags), "small")

    return make


def resume(checkpoint_folder: Path) -> None:
    """Resume the shapes run from a (damaged) copy."""
    info = json.loads((checkpoint_folder.parent.parent / "info.json").read_text())
    config = {**info["config"], "out": str(checkpoint_folder.parent)}
    config["unet_channels"] = tuple(config["unet_channels"])
    with helpers.inside(checkpoint_folder.parent):
        Run(train.TrainConfig(**config), "small").resume(checkpoint_folder)


@pytest.fixture
def photo_checkpoint(tmp_path) -> Path:
    """A checkpoint that resumes quickly."""
    source = list_checkpoints(helpers.photo_run())[-1]
    shutil.copy(source / "checkpoint.json", tmp_path / "info.json")
    return Path(shutil.copytree(source, tmp_path / "run" / source.name))


# ---- what it holds ----


@pytest.mark.parametrize("separation", ("deep", "shallow", "none"))
def test_only_trained_tensors_are_stored(make_run, separation):
    run = make_run("--separation", separation, "--ema", 0.5)
    run.train_step()
    run.save()
    folder = list_checkpoints(run.out)[-1]
    for name in ("model", "ema"):
        assert set(load_file(folder / f"{name}.safetensors")) == set(run.model.image_parameters())
    text = set(run.model.text_parameters())
    state = load_file(folder / "optimizer.safetensors")
    assert state and not {n.split("/")[1] for n in state} & text
    info = json.loads((folder / "checkpoint.json").read_text())
    assert info["trained"] == sorted(run.model.image_parameters()) and info["step"] == 1


def test_text_that_was_trained_is_stored_too(make_run):
    run = make_run("--lr-text-ratio", 0.1)
    run.train_step()
    run.save()
    stored = set(load_file(list_checkpoints(run.out)[-1] / "model.safetensors"))
    assert stored == set(dict(run.model.named_parameters())) - {"norm_text.weight"}
    loaded = load_trained(run.out)  # the fingerprint is of the base, not of the trained text
    for name, p in run.model.named_parameters():
        assert torch.equal(p, dict(loaded.model.named_parameters())[name]), name


def test_a_run_holds_safetensors_json_and_pictures_and_nothing_that_runs_code():
    kinds = {p.suffix for p in helpers.shapes_run().rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json", ".jsonl", ".png"}
    for path in helpers.shapes_run().rglob("*.safetensors"):
        assert load_file(path)
    for path in helpers.shapes_run().rglob("*.json"):
        assert isinstance(json.loads(path.read_text()), dict)


# ---- what it gives back ----


@pytest.mark.parametrize("ema", (0, 0.7))
@pytest.mark.parametrize("separation", ("deep", "shallow", "none"))
def test_a_loaded_model_is_the_trained_one_bit_for_bit(make_run, ema, separation):
    run = make_run("--ema", ema, "--separation", separation)
    for _ in range(2):
        run.train_step()
    run.save()
    loaded = load_trained(run.out)
    wanted = {n: p.detach() for n, p in run.model.named_parameters()} | (run.average or {})
    got = dict(loaded.model.named_parameters())
    assert set(got) == set(wanted)
    for name, p in got.items():
        assert torch.equal(p, wanted[name]), name
        assert not p.requires_grad
    if ema:
        assert not torch.equal(got["unet_up.conv_out.weight"], run.model.unet_up.conv_out.weight)
    assert not loaded.model.training and loaded.model.config == run.model.config
    assert torch.equal(loaded.diffusion.alpha_bar, run.diffusion.alpha_bar)
    assert loaded.diffusion.prediction == run.diffusion.prediction
    for name, x in run.codec.tensors().items():
        assert torch.equal(loaded.codec.tensors()[name], x), name
    assert loaded.tokenizer.to_str() == run.tokenizer.to_str()


def test_a_run_and_its_checkpoint_name_the_same_model():
    whole = list_checkpoints(helpers.shapes_run())[-1]
    assert (
        find_checkpoint(helpers.shapes_run())
        == find_checkpoint(whole)
        == find_checkpoint(str(whole))
        == whole
    )


def test_the_last_of_several_checkpoints_is_found_by_its_number(tmp_path):
    for name in ("step-000900", "step-1000000", "step-999999", ".step-2000000.tmp", "step-3000000"):
        (tmp_path / name).mkdir()
        if name != "step-3000000":  # half removed: not a checkpoint
            (tmp_path / name / "checkpoint.json").write_text("{}")
    names = [p.name for p in list_checkpoints(tmp_path)]
    assert names == ["step-000900", "step-999999", "step-1000000"]
    assert find_checkpoint(tmp_path).name == "step-1000000"


# ---- what does not fit ----


def test_another_base_is_refused_by_its_fingerprint(whole):
    with pytest.raises(ValueError, match="is not the language model that .* was trained on.*--base"):
        load_trained(whole, base=str(helpers.other_base()))
    load_trained(whole, base=str(helpers.base()))


def test_one_changed_bit_of_the_base_is_refused(whole, tmp_path):
    base = shutil.copytree(helpers.base(), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    tensors[name][3] = torch.nextafter(tensors[name][3], torch.tensor(9.0))
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match="fingerprint"):
        load_trained(whole, base=str(base))


@pytest.mark.parametrize("name", ("model", "ema"))
def test_only_the_file_that_is_asked_for_matters(whole, name):
    (whole / f"{'model' if name == 'ema' else 'ema'}.safetensors").unlink()
    if name == "ema":
        load_trained(whole)
    else:
        info = json.loads((whole / "checkpoint.json").read_text())
        (whole / "checkpoint.json").write_text(json.dumps({**info, "ema": False}))
        load_trained(whole)


def damage(path: Path, how: str) -> str:
    """Break a file; returns what the error must name."""
    if how == "missing":
        path.unlink()
        return path.name
    if how in ("cut", "empty", "noise"):
        data = path.read_bytes()
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": bytes(range(256)) * 8}[how])
        return path.name
    tensors = load_file(path)
    name = sorted(n for n in tensors if tensors[n].dim())[0]
    if how == "missing tensor":
        del tensors[name]
    elif how == "extra tensor":
        name = "of.nobody"
        tensors[name] = torch.ones(3)
    else:
        tensors[name] = torch.cat((tensors[name], tensors[name]))
    save_file(tensors, path)
    return name


DAMAGES = ("missing", "cut", "empty", "noise", "missing tensor", "extra tensor", "wrong shape")


def expect_error(name: str, work) -> None:
    with pytest.raises(ValueError) as error:
        work()
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_weights_are_named(whole, how):
    name = damage(whole / "ema.safetensors", how)
    expect_error(name, lambda: load_trained(whole))


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_latents_are_named(whole, how):
    name = damage(whole / "latents.safetensors", how)
    expect_error(name, lambda: load_trained(whole))


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_weights_are_named_when_a_run_is_resumed(photo_checkpoint, how):
    resume(photo_checkpoint)  # it can be resumed as long as it is whole
    name = damage(photo_checkpoint / "model.safetensors", how)
    expect_error(name, lambda: resume(photo_checkpoint))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_optimizer_is_named_when_a_run_is_resumed(photo_checkpoint, how):
    name = damage(photo_checkpoint / "optimizer.safetensors", how)
    expect_error(name, lambda: resume(photo_checkpoint))


@pytest.mark.parametrize("how", ("cut", "empty", "noise"))
def test_a_damaged_checkpoint_json_is_named(whole, how):
    damage(whole / "checkpoint.json", how)
    expect_error("checkpoint.json", lambda: load_trained(whole))


def test_a_folder_without_checkpoint_json_is_no_checkpoint(whole):
    (whole / "checkpoint.json").unlink()
    for folder in (whole, whole.parent):
        expect_error(str(folder), lambda folder=folder: load_trained(folder))


@pytest.mark.parametrize("field", ("base", "model", "diffusion", "fingerprint", "trained"))
def test_a_field_missing_from_checkpoint_json_is_named(whole, field):
    info = json.loads((whole / "checkpoint.json").read_text())
    del info[field]
    (whole / "checkpoint.json").write_text(json.dumps(info))
    expect_error(field, lambda: load_trained(whole))


def test_a_trained_tensor_that_the_model_does_not_have_is_named(whole):
    info = json.loads((whole / "checkpoint.json").read_text())
    info["trained"].append("layers.9.image.mlp.up_proj.weight")
    (whole / "checkpoint.json").write_text(json.dumps(info))
    expect_error("layers.9.image.mlp.up_proj.weight", lambda: load_trained(whole))


def test_an_unknown_field_of_the_model_is_named(whole):
    info = json.loads((whole / "checkpoint.json").read_text())
    info["model"]["colour"] = 3
    (whole / "checkpoint.json").write_text(json.dumps(info))
    expect_error("colour", lambda: load_trained(whole))


def test_read_tensors_takes_exactly_what_is_expected(tmp_path):
    path, x = tmp_path / "x.safetensors", torch.arange(6.0).view(2, 3)
    save_file({"a": x, "b": x[0].clone()}, path)
    assert torch.equal(read_tensors(path, {"a": x, "b": x[0]})["a"], x)
    expect_error("b is not expected", lambda: read_tensors(path, {"a": x}))
    expect_error("c is missing", lambda: read_tensors(path, {"a": x, "b": x[0], "c": x}))
    expect_error("a is (2, 3), not (3, 2)", lambda: read_tensors(path, {"a": x.T, "b": x[0]}))


# ---- disks that are full ----


def test_a_disk_that_runs_full_leaves_nothing_half_written(tmp_path):
    folder, tensors = tmp_path / "step-000001", {"model.safetensors": {"x": torch.zeros(50_000)}}
    with helpers.small_disk(100_000), pytest.raises(OSError) as error:
        write_folder(folder, tensors, {"step": 1}, "checkpoint.json")
    assert str(folder) in str(error.value) and "could not be written" in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with helpers.small_disk(1_000_000):
        write_folder(folder, tensors, {"step": 1}, "checkpoint.json")
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "checkpoint.json"}


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_atomic(path, "old\n")
    with helpers.small_disk(100), pytest.raises(OSError, match="File too large"):
        write_atomic(path, "new\n" * 1000)
    assert path.read_text() == "old\n"
    write_atomic(path, "new\n")
    assert path.read_text() == "new\n"


@pytest.mark.parametrize("config", checkpoint.LAST_RUNS)
def test_the_last_run_file_is_read_and_a_run_that_is_gone_is_named(tmp_path, config):
    with helpers.inside(tmp_path):
        with pytest.raises(ValueError, match=f"no --checkpoint given, and no run of .*--config {config}`"):
            find_checkpoint(None, config)
        last, *others = sorted(checkpoint.LAST_RUNS.values(), key=lambda p: p != checkpoint.LAST_RUNS[config])
        last.parent.mkdir()
        last.write_text(f"{helpers.shapes_run()}\n")
        for other in others:  # another configuration's
            other.write_text(f"{helpers.photo_run()}\n")
        assert find_checkpoint(None, config).parent == helpers.shapes_run()
        assert load_trained(None, config=config).folder.parent == helpers.shapes_run()
        last.write_text("runs/deleted\n")
        with pytest.raises(ValueError, match="runs/deleted: no such checkpoint folder"):
            find_checkpoint(None, config)


def test_the_last_run_of_small_is_the_default(tmp_path):
    with helpers.inside(tmp_path):
        checkpoint.LAST_RUNS["small"].parent.mkdir()
        checkpoint.LAST_RUNS["small"].write_text(f"{helpers.shapes_run()}\n")
        assert find_checkpoint(None).parent == load_trained(None).folder.parent == helpers.shapes_run()


# ---- parts of several processes ----


@pytest.mark.parametrize("count", (1, 2, 3))
def test_what_two_processes_write_is_read_back_however_few_the_tensors(tmp_path, count):
    """One tensor, the range of a VAE's latents, is one file: no part may be missing for want of tensors."""
    group = {f"t{i}": torch.randn(3) for i in range(count)}
    for rank in range(2):  # neither is_main, so that the folder stays where both write it
        team = SimpleNamespace(rank=rank, size=2, is_main=False, wait=lambda: None, total=lambda x: x)
        write_folder(tmp_path / "step", {"group.safetensors": group}, {}, "info.json", team=team)
    folder = tmp_path / ".step.tmp"
    assert len(list(folder.iterdir())) == (1 if count == 1 else 2)
    read = read_tensors(folder / "group.safetensors", group)
    assert all(torch.equal(read[name], x) for name, x in group.items())


def test_a_copied_run_goes_on_where_it_lies_now(tmp_path):
    helpers.good(train, *helpers.photo_flags(Path("old"), "--steps", 1), folder=tmp_path)
    before = helpers.files(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    flags = ("--config", "small", "--resume", "--out", "new", "--steps", "2")
    helpers.good(train, *flags, folder=tmp_path)
    assert helpers.files(tmp_path / "old") == before
    assert [p.name for p in list_checkpoints(tmp_path / "new")] == ["step-000002"]
