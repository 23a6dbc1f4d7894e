"""checkpoint.py: what a checkpoint holds and gives back, exact resumption, second stages, damage, kills."""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import BaseContext
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import helpers
import pytest
import torch
from PIL import Image
from runs import EDITS, FIXTURES, TASKS, Killed, last, metrics_without_clocks, new_run, take_steps
from safetensors.torch import load_file, save_file

import checkpoint
import evaluate
import sample
import train
from checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_trained,
    read_metrics,
    read_tensors,
    resume,
    save_run,
    start_from,
    write_atomic,
    write_folder,
)
from load_qwen3 import load_qwen3, tokenizer_identity
from scale import latents
from scale.vae import load_vae
from train import Run

FILES = ("model.safetensors", "optimizer.safetensors", "latents.safetensors", "checkpoint.json")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Runs leave their name in runs/last-small: below the test's folder, not in the user's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def whole(tmp_path) -> Path:
    """A checkpoint of one's own to break, with a moving average."""
    source = last(helpers.shapes_run())
    return Path(shutil.copytree(source, tmp_path / "run" / source.name))


@pytest.fixture
def make_run(tmp_path):
    """make_run(*flags) -> a Run on the tiny photos."""
    return functools.partial(new_run, tmp_path, perturb=0)


@pytest.fixture
def photo_checkpoint(tmp_path) -> Path:
    """A checkpoint of one's own to break that resumes quickly."""
    source = last(helpers.photo_run())
    return Path(shutil.copytree(source, tmp_path / "run" / source.name))


@functools.cache
def idle_run() -> Run:
    """A run like the one of `photo_checkpoint`, to resume."""
    run = new_run(Path(helpers.session.name))
    run.out.mkdir()
    return run


# ---- what it holds ----


@pytest.mark.parametrize("separation", ("deep", "shallow", "none"))
def test_only_trained_tensors_are_stored(make_run, separation):
    run = make_run("--separation", separation, "--ema", 0.5)
    run.train_step()
    save_run(run)
    folder = last(run.out)
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
    save_run(run)
    stored = set(load_file(last(run.out) / "model.safetensors"))
    assert stored == set(dict(run.model.named_parameters())) - {"norm_text.weight"}
    loaded = load_trained(run.out)  # the fingerprint is of the base, not of the trained text
    for name, p in run.model.named_parameters():
        assert torch.equal(p, dict(loaded.model.named_parameters())[name]), name


def test_a_run_holds_safetensors_json_pictures_and_a_card_and_nothing_that_runs_code():
    kinds = {p.suffix for p in helpers.shapes_run().rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json", ".jsonl", ".png", ".md"}
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
    save_run(run)
    loaded = load_trained(run.out)
    wanted = {n: p.detach() for n, p in run.model.named_parameters()} | (run.ema or {})
    got = dict(loaded.model.named_parameters())
    assert set(got) == set(wanted)
    for name, p in got.items():
        assert torch.equal(p, wanted[name]), name
        assert not p.requires_grad
    if ema:
        assert not torch.equal(got["unet_up.conv_out.weight"], run.model.unet_up.conv_out.weight)
    assert not loaded.model.training and loaded.model.config == run.model.config
    assert torch.equal(loaded.diffusion.alpha_bar, run.config.diffusion.alpha_bar)
    assert loaded.diffusion.prediction == run.config.diffusion.prediction
    for name, x in run.codec.tensors().items():
        assert torch.equal(loaded.codec.tensors()[name], x), name
    assert loaded.tokenizer.to_str() == run.documents.tokenizer.to_str()


def test_a_run_and_its_checkpoint_name_the_same_model():
    whole = last(helpers.shapes_run())
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
    tensors[name].view(torch.int16)[3] ^= 1  # of bfloat16
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
    name = damage(photo_checkpoint / "model.safetensors", how)
    expect_error(name, lambda: resume(idle_run(), photo_checkpoint))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_optimizer_is_named_when_a_run_is_resumed(photo_checkpoint, how):
    name = damage(photo_checkpoint / "optimizer.safetensors", how)
    expect_error(name, lambda: resume(idle_run(), photo_checkpoint))


def test_a_whole_checkpoint_is_resumed(photo_checkpoint):
    resume(idle_run(), photo_checkpoint)
    assert idle_run().step == 2


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
    expect_error("b is not one", lambda: read_tensors(path, {"a": x}))
    expect_error("c is missing", lambda: read_tensors(path, {"a": x, "b": x[0], "c": x}))
    expect_error("a is F32 (2, 3), not floats (3, 2)", lambda: read_tensors(path, {"a": x.T, "b": x[0]}))


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
        if config == "small":
            assert find_checkpoint(None) == helpers.ROOT / "small" / "checkpoint"
        else:
            with pytest.raises(
                ValueError, match=f"no --checkpoint given, and no run of .*--config {config}`"
            ):
                find_checkpoint(None, config)
        last, *others = sorted(checkpoint.LAST_RUNS.values(), key=lambda p: p != checkpoint.LAST_RUNS[config])
        last.parent.mkdir()
        last.write_text(f"{helpers.shapes_run()}\n")
        for other in others:  # another configuration's
            other.write_text(f"{helpers.photo_run()}\n")
        assert find_checkpoint(None, config).parent == helpers.shapes_run()
        assert load_trained(None, config=config).folder.parent == helpers.shapes_run()
        assert (find_checkpoint(None).parent == helpers.shapes_run()) == (config == "small")  # the default
        last.write_text("runs/deleted\n")
        with pytest.raises(ValueError, match="runs/deleted: no such folder"):
            find_checkpoint(None, config)


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


# ---- resuming ----


def killed_at(monkeypatch, step: int):
    """train_step that dies before its `step`-th step."""
    train_step = Run.train_step

    def dying(run):
        if run.step + 1 == step:
            raise Killed
        return train_step(run)

    monkeypatch.setattr(Run, "train_step", dying)


KINDS = {
    "adamw": ("--optimizer", "adamw"),
    "average": ("--optimizer", "muon", "--ema", 0.8, "--lr-text-ratio", 0.1),
    "tasks": ("--init-from", "first", "--task", TASKS, "--micro-batch", 4, "--ema", 0.8, *EDITS),
    # the last checkpoint lies in the middle of the second stage, and some tensors have not moved by then
    "stages": ("--optimizer", "muon", "--ema", 0.8, "--stages", "0:unet_*;1:unet_down.*,*.image.mlp.*;3:*"),
    "scratch": ("--optimizer", "muon", "--from-scratch", True, "--lr-text-ratio", 1, "--text-batch", 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_a_kill_and_two_more_equal_four_bit_for_bit(tmp_path, monkeypatch, kind):
    flags = (*KINDS[kind], "--steps", 5, "--checkpoint-every", 2, "--val-every", 2, "--sheet-every", 0)
    shutil.copytree(helpers.photo_run(), tmp_path / "first")
    helpers.good(train, *helpers.photo_flags(Path("whole"), *flags), folder=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=4)  # step 3 is done and logged, but the last checkpoint is of step 2
        helpers.call(train, *helpers.photo_flags(Path("cut"), *flags), folder=tmp_path)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert last(cut).name == "step-000002"
    assert [m["step"] for m in read_metrics(cut / "metrics.jsonl")] == [1, 2, 3]
    (cut / "metrics.jsonl").open("a").write('{"step": 4, "lo')  # and a line that the kill cut short
    shutil.rmtree(tmp_path / "first")  # no more needed
    again = ("--resume", *(EDITS if kind == "tasks" else ()))
    helpers.good(train, *helpers.photo_flags(Path("cut"), *again), folder=tmp_path)
    files = {p.name for p in last(whole).iterdir()}
    assert files == {p.name for p in last(cut).iterdir()}
    assert ("ema.safetensors" in files) == ("--ema" in KINDS[kind])
    for name in files - {"checkpoint.json"}:
        assert (last(cut) / name).read_bytes() == (last(whole) / name).read_bytes(), name
    assert metrics_without_clocks(cut) == metrics_without_clocks(whole)
    assert [m["step"] for m in read_metrics(cut / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    info = [json.loads((last(f) / "checkpoint.json").read_text()) for f in (cut, whole)]
    assert {k for k in info[0] if info[0][k] != info[1][k]} == {"config"}
    assert {k for k in info[0]["config"] if info[0]["config"][k] != info[1]["config"][k]} == {"out"}


def test_a_run_that_was_asked_to_stop_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """Without --checkpoint-every's help: the step in which the signal came is kept."""
    flags, train_step = ("--steps", 5, "--sheet-every", 0, "--ema", 0.8), Run.train_step

    def asked(run):
        if run.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return train_step(run)

    helpers.good(train, *helpers.photo_flags(Path("whole"), *flags), folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", asked)
        assert helpers.call(train, *helpers.photo_flags(Path("cut"), *flags), folder=tmp_path).status == 130
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert last(cut).name == "step-000003"
    helpers.good(train, *helpers.photo_flags(Path("cut"), "--resume"), folder=tmp_path)
    for name in ("model", "ema", "optimizer"):
        file = f"{name}.safetensors"
        assert (last(cut) / file).read_bytes() == (last(whole) / file).read_bytes(), name
    assert metrics_without_clocks(cut) == metrics_without_clocks(whole)


def test_the_last_checkpoints_are_kept_and_as_many_as_asked_for(tmp_path):
    flags = ("--steps", 5, "--checkpoint-every", 1, "--keep", 3, "--sheet-every", 0)
    helpers.good(train, *helpers.photo_flags(Path("run"), *flags), folder=tmp_path)
    names = [p.name for p in list_checkpoints(tmp_path / "run")]
    assert names == ["step-000003", "step-000004", "step-000005"]
    assert all(load_trained(tmp_path / "run" / name).info["step"] == int(name[5:]) for name in names)
    again = ("--resume", "--steps", 6, "--keep", 2)
    helpers.good(train, *helpers.photo_flags(Path("run"), *again), folder=tmp_path)
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-000005", "step-000006"]


@pytest.fixture
def begun(tmp_path) -> Path:
    """A copy of the run of two steps, below the folder of the test."""
    return Path(shutil.copytree(helpers.photo_run(), tmp_path / "some" / "run"))


def test_a_copied_run_goes_on_where_it_lies_now_and_may_be_made_longer(tmp_path, begun):
    before = helpers.files(helpers.photo_run())
    flags = ("--config", "small", "--resume", "--out", "some/run", "--checkpoint-every", 1)
    out = helpers.good(train, *flags, "--steps", 4, folder=tmp_path)
    assert "2 steps" in out and helpers.files(helpers.photo_run()) == before
    assert [p.name for p in list_checkpoints(begun)] == ["step-000004"]  # the last one alone is kept
    assert (tmp_path / "runs" / "last-small").read_text() == "some/run\n"
    before = helpers.files(tmp_path)
    out = helpers.good(train, *flags, folder=tmp_path)
    assert "nothing is left" in out and helpers.files(tmp_path) == before


def test_resuming_on_other_data_keeps_the_latents_of_the_run(tmp_path, begun):
    before = (last(begun) / "latents.safetensors").read_bytes()
    helpers.write_photos(tmp_path / "others", seed=7)
    flags = ("--config", "small", "--resume", "--out", "some/run", "--steps", 3, "--data", "others")
    helpers.good(train, *flags, folder=tmp_path)
    assert last(begun).name == "step-000003"
    assert (last(begun) / "latents.safetensors").read_bytes() == before


# ---- a second stage ----


def begin(monkeypatch, folder: Path, *flags: object) -> Run:
    """The run of a command, as it stands before its first step."""
    runs = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", runs.append)
        helpers.good(train, *flags, folder=folder)
    return runs[0]


@pytest.mark.parametrize("first", (helpers.photo_run, helpers.shapes_run), ids=("weights", "average"))
def test_a_second_stage_starts_from_exactly_the_image_side_and_the_latents_of_the_first(
    tmp_path, monkeypatch, first
):
    folder = last(first())
    averaged = (folder / "ema.safetensors").is_file()
    assert averaged == (first is helpers.shapes_run)
    data = "shapes" if averaged else helpers.write_photos(tmp_path / "others", seed=7)
    flags = ("--config", "small", "--init-from", first(), "--out", "second", "--data", data)
    run = begin(monkeypatch, tmp_path, *flags, "--seed", 5, "--ema", 0.5)
    wanted, plain = (
        load_file(folder / f"{n}.safetensors") for n in ("ema" if averaged else "model", "model")
    )
    assert run.step == 0 and run.trained.keys() == wanted.keys() == run.model.image_parameters().keys()
    for name, p in run.trained.items():
        assert torch.equal(p, wanted[name]) and torch.equal(run.ema[name], p), name
        assert run.ema[name].data_ptr() != p.data_ptr() and p.requires_grad
    assert averaged == any(not torch.equal(x, plain[n]) for n, x in wanted.items())
    base = load_qwen3(helpers.base())
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in run.model.text_parameters().items())
    codec, source = load_file(folder / "latents.safetensors"), run.documents.source
    assert all(torch.equal(x, codec[n]) for n, x in run.codec.tensors().items())
    assert not torch.equal(source.make_codec(run.config, "cpu")[1].basis, run.codec.basis)
    assert not any(o.state for o in run.optimizers)


def test_a_first_stage_that_trained_other_tensors_is_refused(make_run):
    runs = {ratio: make_run("--lr-text-ratio", ratio) for ratio in (0, 0.1)}
    for ratio, run in runs.items():
        run.out = run.out / str(ratio)
        run.train_step()
        save_run(run)
    with pytest.raises(ValueError, match="tensor .*(text|embed_tokens).* is not one"):
        start_from(runs[0], last(runs[0.1].out))
    with pytest.raises(ValueError, match="tensor .*(text|embed_tokens).* is missing"):
        start_from(runs[0.1], last(runs[0].out))
    start_from(runs[0], last(runs[0].out))


def test_a_first_stage_on_latents_gives_its_vae_to_a_second_on_pictures(tmp_path, monkeypatch):
    vae = FIXTURES / "vae_sd"
    words = ("encode", "--data", helpers.photos(), "--vae", vae, "--base", helpers.base(), "--image-size", 16)
    helpers.good(latents, *words, "--out", "encoded", folder=tmp_path)
    flags = (*helpers.SHAPES_FLAGS, "--base", helpers.base(), "--image-size", 16, "--steps", 1)
    helpers.good(train, *flags, "--data", "encoded", "--out", "first", "--val-every", 9, folder=tmp_path)
    flags = ("--config", "small", "--init-from", "first", "--data", helpers.edits(), "--task", "edit")
    for more in ((), ("--vae", shutil.copytree(vae, tmp_path / "moved"))):
        run = begin(monkeypatch, tmp_path, *flags, *more)
        assert run.codec.fingerprint() == load_vae(vae).fingerprint()
        assert torch.equal(
            run.codec.bound, load_file(last(tmp_path / "first") / "latents.safetensors")["bound"]
        )


def test_a_second_stage_is_remembered_by_the_name_of_its_configuration(tmp_path):
    flags = ("--config", "small-chat", "--init-from", helpers.shapes_run(), "--steps", 1, "--batch-size", 4)
    helpers.good(train, *flags, "--sheet-every", 0, "--out", "second", folder=tmp_path)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["last-small-chat"]
    info = load_trained(None, config="small-chat").info
    assert info["name"] == "small-chat" and info["config"]["task"] == TASKS
    assert info["config"]["init_from"] == str(helpers.shapes_run()) and info["step"] == 1


# ---- kills ----


@pytest.mark.parametrize("moment", ("optimizer.safetensors", "checkpoint.json", "rename"))
@pytest.mark.parametrize("kind", (OSError, Killed))
def test_a_crash_while_a_checkpoint_is_written_leaves_the_last_one(tmp_path, monkeypatch, moment, kind):
    with helpers.inside(tmp_path):
        torch.manual_seed(0)
        run = Run(helpers.photo_config(tmp_path / "run"), "small")
        take_steps(run, 1)
        save_run(run)
        before, good = (
            helpers.files(tmp_path / "run"),
            {n: p.detach().clone() for n, p in run.trained.items()},
        )
        take_steps(run, 1)
        with monkeypatch.context() as patch:
            break_writing(patch, moment, kind)
            with pytest.raises(kind):
                save_run(run)
        whole = {k: v for k, v in helpers.files(tmp_path / "run").items() if "/." not in k}
        assert whole == before
        if kind is OSError:  # a process that lives on cleans up behind itself
            assert helpers.files(tmp_path / "run") == before
        again = Run(run.config, "small")
        resume(again, last(tmp_path / "run"))
        assert again.step == 1 and all(torch.equal(again.trained[n], x) for n, x in good.items())
        again.train_step()
        save_run(again)  # what the crash left lying does not stand in the way
        assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(("step", "."))] == [
            "step-000002"
        ]


def break_writing(patch, moment: str, kind: type[BaseException]) -> None:
    """Writing a checkpoint fails at `moment`, half-way through a file; a killed process cleans nothing up."""
    save_file, write_bytes, rmtree, dead = checkpoint.save_file, Path.write_bytes, shutil.rmtree, []

    def fail():
        dead.append(kind is Killed)
        raise kind("No space left on device")

    patch.setattr(shutil, "rmtree", lambda *a, **k: None if any(dead) else rmtree(*a, **k))

    def broken_save(tensors, path, **options):
        save_file(tensors, path, **options)
        if Path(path).name == moment:
            data = Path(path).read_bytes()
            write_bytes(Path(path), data[: len(data) // 2])
            fail()

    def broken_write(path, content):
        if path.name == moment:
            write_bytes(path, content[: len(content) // 2])
            fail()
        return write_bytes(path, content)

    patch.setattr(checkpoint, "save_file", broken_save)
    patch.setattr(Path, "write_bytes", broken_write)
    if moment == "rename":
        patch.setattr(checkpoint.os, "rename", lambda *_: fail())


KILL_FLAGS = ("--steps", 20, "--checkpoint-every", 1, "--sheet-every", 0, "--ema", 0.8)
# how a run is ended, one after another, and the status that it may end with; 0 if it was faster
ENDS = dict(second=[-signal.SIGKILL], disk=[2], kill=[-signal.SIGKILL, 0], term=[130, -signal.SIGTERM, 0])


def newest(folder: Path) -> int:
    """The step of the last whole checkpoint; 0 if there is none."""
    return max([0, *(int(p.name.removeprefix("step-")) for p in list_checkpoints(folder / "run"))])


def end_at_a_random_moment(forks: BaseContext, folder: Path, rng: random.Random, how: str) -> None:
    """Start or resume training in a process of its own, and end it some checkpoints and moments later."""
    first = newest(folder)
    wanted = first + (rng.randint(0, 2) if how in ("kill", "term") else 1)
    flags = helpers.photo_flags(Path("run"), *KILL_FLAGS, *["--resume"] * (first > 0))
    disk = rng.randrange(200_000) if how == "disk" else resource.RLIM_INFINITY  # the optimizer needs more
    pipe, theirs = forks.Pipe(duplex=False)
    args = folder, flags, disk, theirs, torch.get_num_threads()
    process = forks.Process(target=helpers.train_apart, args=args)
    process.start()
    theirs.close()
    try:
        for _ in range(10_000):
            if not process.is_alive() or newest(folder) >= wanted:
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        if how == "second":  # while the first one is in the middle of something
            os.kill(process.pid, signal.SIGSTOP)
            result = helpers.call(train, *flags, folder=folder)
            assert f"run: another process ({process.pid}) writes there" in result.err
        process.terminate() if how == "term" else process.kill()  # unless it has ended
        process.join(60)
    finally:
        process.kill()
    said = b"".join(iter(lambda: os.read(pipe.fileno(), 2**16), b"")).decode()
    assert process.exitcode in ENDS[how], said
    assert how != "disk" or re.search("(cannot|could not) be written", said.splitlines()[-1]), said


@functools.cache
def undisturbed() -> Path:
    """The folder of a run that nothing ended."""
    folder = Path(helpers.session.name) / "undisturbed"
    folder.mkdir()
    helpers.good(train, *helpers.photo_flags(Path("run"), *KILL_FLAGS), folder=folder)
    return folder / "run"


def check_ends(forks: BaseContext, run: Path, seed: int) -> None:
    rng, steps = random.Random(seed), []
    for how in ENDS:
        end_at_a_random_moment(forks, run.parent, rng, how)
        steps.append(newest(run.parent))
        assert load_trained(run).info["step"] == steps[-1]
    assert 0 < steps[0] < 20, "the first end came too late to show anything"
    helpers.good(train, *helpers.photo_flags(Path("run"), *KILL_FLAGS, "--resume"), folder=run.parent)
    for name in ("model", "ema", "optimizer", "latents"):
        file = f"step-000020/{name}.safetensors"
        assert (run / file).read_bytes() == (undisturbed() / file).read_bytes(), file
    assert metrics_without_clocks(run) == metrics_without_clocks(undisturbed())
    assert [p.name for p in list_checkpoints(run)] == ["step-000020"]
    assert not [*run.glob(".*")]


def test_a_run_that_is_ended_in_every_way_goes_on_as_if_it_had_not_been(forks, tmp_path):
    check_ends(forks, tmp_path / "run", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_twenty_ends_at_random_moments_leave_no_trace(forks, tmp_path, seed):
    check_ends(forks, tmp_path / "run", seed=100 + seed)


def test_what_is_written_is_synced_through_a_handle_that_may_write(tmp_path, monkeypatch):
    """Windows refuses to sync a file that was opened to be read."""
    modes, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda f: (modes.append(fcntl.fcntl(f, fcntl.F_GETFL) & os.O_ACCMODE), fsync(f))
    )
    write_folder(tmp_path / "x", {"a.safetensors": {"a": torch.zeros(1)}}, {}, "info.json")
    checkpoint.write_atomic(tmp_path / "y", "text")
    assert len(modes) == 3 and all(mode in (os.O_RDWR, os.O_WRONLY) for mode in modes)


def test_a_line_of_metrics_ends_at_a_line_feed_alone(tmp_path):
    """One that a person added a note to, in JSON without escapes."""
    rows = [{"step": 1, "note": "a\u2028b\x85c"}, {"step": 2}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert checkpoint.read_metrics(tmp_path / "metrics.jsonl") == rows


def test_a_moved_project_is_told_how_to_say_where_the_base_is(tmp_path):
    shutil.copytree(helpers.base(), tmp_path / "old")
    run = tmp_path / "run"
    flags = helpers.photo_flags(Path("run"), "--base", "old", "--steps", 1)
    helpers.good(train, *flags, folder=tmp_path)
    os.rename(tmp_path / "old", tmp_path / "new")
    asked = ("--checkpoint", run, "--prompt", "red", "--steps", 1, "--out", "p.png")
    again = ("--config", "small", "--resume", "--out", "run", "--steps", 2)
    for module, line in ((sample, asked), (evaluate, ("--checkpoint", run)), (train, again)):
        result = helpers.call(module, *line, folder=tmp_path)
        assert result.status == 2 and len(result.err.splitlines()) == 1
        assert "old: no such folder" in result.err and "if it was moved, say with --base" in result.err
    helpers.good(sample, *asked, "--base", "new", folder=tmp_path)
    helpers.good(train, *again, "--base", "new", folder=tmp_path)


@pytest.mark.parametrize(
    "field, value",
    (
        *(("base", False), ("base", []), ("fingerprint", 7), ("model", "x"), ("model", [1]), ("step", "2")),
        *(
            ("trained", {}),
            ("trained", [[]]),
            ("optimizer", [7]),
            ("vae", 7),
            ("vae", {"path": 3}),
            ("config", []),
        ),
        *(("config", {"latent_patch": [4]}), ("config", {"latent_patch": 10**30})),
    ),
)
def test_a_field_of_checkpoint_json_of_another_kind_is_named(whole, field, value):
    info = json.loads((whole / "checkpoint.json").read_text()) | {field: value}
    (whole / "checkpoint.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="checkpoint.json: not a checkpoint of this program"):
        load_trained(whole)


@pytest.mark.parametrize(
    "line", (b"\xff\xfe", b"[1]", b"null", b'{"loss": 1.0}', b'{"step": "x"}', b"[" * 10**5)
)
def test_metrics_are_read_up_to_a_damaged_line(tmp_path, line):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]


# ---- what is ours, and what it was made with ----


def test_a_copy_of_a_checkpoint_under_a_name_of_the_users_is_neither_used_nor_removed(tmp_path):
    out = tmp_path / "run"
    helpers.good(train, *helpers.photo_flags(out, "--steps", 2), folder=tmp_path)
    copies = [
        shutil.copytree(out / "step-000002", out / name) for name in ("step-000002-good", "step-9", "step-x")
    ]
    before = helpers.files(*copies)
    helpers.good(train, *helpers.photo_flags(out, "--steps", 3, "--resume"), folder=tmp_path)
    assert [p.name for p in list_checkpoints(out)] == ["step-000003"]
    assert helpers.files(*copies) == before and not (out / "step-000002").exists()


@pytest.mark.parametrize("umask", (0o022, 0o077))
def test_all_files_have_the_mode_of_new_files(tmp_path, umask):
    former = os.umask(umask)
    try:
        helpers.good(train, *helpers.photo_flags(tmp_path / "run", "--steps", 1), folder=tmp_path)
    finally:
        os.umask(former)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert set(modes.values()) == {0o666 & ~umask} and "model.safetensors" in modes, modes


def test_a_base_that_reads_text_otherwise_is_another_base(tmp_path):
    base, out = shutil.copytree(helpers.base(), tmp_path / "base"), tmp_path / "run"
    flags = helpers.photo_flags(out, "--steps", 1)
    flags[flags.index("--base") + 1] = str(base)
    helpers.good(train, *flags, folder=tmp_path)
    path = base / "tokenizer.json"
    raw, vocab = json.loads(path.read_text(encoding="utf-8")), None
    path.write_text(json.dumps(raw | {"truncation": None}), encoding="utf-8")  # laid out otherwise
    tokenizer_identity.cache_clear()
    load_trained(out)
    vocab = raw["model"]["vocab"]
    a, b = list(vocab)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(raw), encoding="utf-8")
    tokenizer_identity.cache_clear()
    says = f"the tokenizer.json of {base} is not the one that {out / 'step-000001'} was trained with"
    with pytest.raises(ValueError, match=re.escape(says)):
        load_trained(out)
    for more in (["--resume", "--steps", "2"], ["--init-from", str(out), "--out", str(tmp_path / "second")]):
        result = helpers.call(train, *flags, *more, folder=tmp_path)
        assert result.status == 2 and says in result.err
    info = json.loads((out / "step-000001/checkpoint.json").read_text())
    del info["tokenizer"]  # as the first checkpoints are
    (out / "step-000001/checkpoint.json").write_text(json.dumps(info))
    load_trained(out)


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Run", lambda *a: pytest.fail("made"))
    (tmp_path / "file").touch()
    for out in (Path("/proc/x"), tmp_path / "file" / "run"):
        result = helpers.call(train, *helpers.photo_flags(out), folder=tmp_path)
        assert result.status == 2 and result.err.strip().splitlines()[-1].startswith(
            f"error: {out} cannot be"
        )


def test_a_checkpoint_asks_the_hub_for_nothing(make_run, monkeypatch):
    """A base by its hub id: the run has all that is recorded of it from its start."""
    run = make_run()
    monkeypatch.setattr(checkpoint, "resolve", lambda *a, **k: pytest.fail("asked"))
    run.base = "Qwen/Qwen3-0.6B"
    run.out.mkdir(parents=True, exist_ok=True)
    save_run(run)
    assert checkpoint.read_info(run.out / "step-000000")["base"] == "Qwen/Qwen3-0.6B"


# ---- two at once ----


def holder(folder: Path) -> subprocess.Popen:
    """A process that holds the lock of a folder until it is killed."""
    code = "import time; from pathlib import Path; from checkpoint import locked\n"
    code += f"with locked(Path({str(folder)!r})): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=helpers.ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_folder_has_one_writer_and_a_kill_sets_it_free(tmp_path):
    run = tmp_path / "run"
    with (first := holder(run)):
        shutil.copytree(last(helpers.photo_run()), run / "step-000002")
        for more in ((), ("--resume",)):
            result = helpers.call(train, *helpers.photo_flags(run, "--steps", 3, *more), folder=tmp_path)
            says = f"error: {run}: another process ({first.pid}) writes there"
            assert result.status == 2 and result.err.splitlines()[-1].startswith(says)
        first.kill()
    assert (run / ".lock").is_file()  # what a kill has left
    helpers.good(train, *helpers.photo_flags(run, "--steps", 3, "--resume"), folder=tmp_path)


def test_what_a_lock_made_and_left_empty_goes(tmp_path):
    out = tmp_path / "a" / "b"
    with checkpoint.locked(out):
        assert (out / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / "a").exists()
    with pytest.raises(RuntimeError), checkpoint.locked(out):
        (out / "kept").touch()
        raise RuntimeError
    assert {p.name for p in out.iterdir()} == {"kept"}
    with checkpoint.locked(out):
        shutil.rmtree(tmp_path / "a")  # by somebody else
    assert not (tmp_path / "a").exists()


def test_one_whose_lock_was_just_removed_locks_another(tmp_path, monkeypatch):
    """The first removes its lock as the second is about to lock it: a third must see the new one."""
    out, plain, opened = tmp_path / "out", checkpoint.lock, []

    def lock(file: IO) -> bool:
        if not opened:
            opened.append(file)
            shutil.rmtree(out)
        return plain(file)

    monkeypatch.setattr(checkpoint, "lock", lock)
    with checkpoint.locked(out):
        with pytest.raises(ValueError, match="another process"), checkpoint.locked(out):
            pass
    assert not out.exists()


def test_a_full_disk_is_told_before_the_work(tmp_path):
    with pytest.raises(OSError, match="out cannot be written: "), helpers.small_disk(0):
        with checkpoint.locked(tmp_path / "out"):
            pytest.fail("began")
    assert not [*tmp_path.iterdir()]


def test_without_locks_of_files_work_goes_on(tmp_path, monkeypatch):
    """Windows, and some file systems of clusters."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with checkpoint.locked(tmp_path), checkpoint.locked(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)  # an ImportError
    with checkpoint.locked(tmp_path), checkpoint.locked(tmp_path):
        pass


def test_what_a_killed_removal_has_left_is_no_checkpoint_and_goes(tmp_path, make_run, monkeypatch):
    """At any file of it: the oldest of three checkpoints is whole or not there."""
    run = make_run("--keep", 1)
    run.out.mkdir(parents=True)
    save_run(run)
    run.step = 1

    def killed(path: Path, **_: object) -> None:
        if list_checkpoints(run.out)[-1].name == "step-000001":
            next(path.glob("*.safetensors")).unlink()
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", killed)
        save_run(run)
    assert [p.name for p in list_checkpoints(run.out)] == ["step-000001"]
    assert [p.name for p in run.out.glob(".step*")] == [".step-000000.tmp"]
    run.step = 2
    for name in (".curves.png.7.tmp", ".sheet-000001.png.7.tmp", ".metrics.jsonl.7.tmp", ".mine.tmp"):
        (run.out / name).touch()
    save_run(run)
    assert {p.name for p in run.out.iterdir()} == {"step-000002", ".mine.tmp"}


# ---- what goes on otherwise ----


def test_what_a_resumed_run_does_otherwise_is_said_in_one_line(tmp_path):
    photos = helpers.write_photos(tmp_path / "photos")
    flags = helpers.photo_flags(Path("run"), "--data", photos)
    helpers.good(train, *flags, "--steps", 2, folder=tmp_path)
    again = (*flags, "--resume")
    said = helpers.good(train, *again, "--steps", 4, "--keep", 2, folder=tmp_path).splitlines()
    changed = "--steps 4 (was 2), --keep 2 (was 1), learning rate 0.000758 (was 3e-05)"
    assert f"run/step-000002 goes on otherwise: {changed}" in said
    assert "otherwise" not in helpers.good(train, *again, folder=tmp_path)
    Image.new("RGB", (16, 16), "red").save(photos / "new.png")
    (photos / "new.txt").write_text("one more")
    said = helpers.good(train, *again, "--log-every", 2, folder=tmp_path)
    data = "--data holds something else, of which other parts train and validate"
    assert f"run/step-000004 goes on otherwise: --log-every 2 (was 1), {data}\n" in said
    info = last(tmp_path / "run") / "checkpoint.json"
    info.write_text(json.dumps({k: v for k, v in json.loads(info.read_text()).items() if k != "sources"}))
    assert "otherwise" not in helpers.good(train, *again, folder=tmp_path)  # the first ones did not record it


# ---- what older versions wrote ----


def test_a_checkpoint_of_an_older_version_paints_goes_on_and_begins_a_second_stage(tmp_path):
    """tests/fixtures/make_version.py: before formats, tokenizers and sources were recorded."""
    old = Path(shutil.copytree(FIXTURES / "version_d556526", tmp_path / "old"))
    base, run = ("--base", old / "base"), old / "run"
    assert "format" not in json.loads((last(run) / "checkpoint.json").read_text())
    flags = "--prompt red --steps 3 --cfg 2 --seed 5 --out painted.png".split()
    helpers.good(sample, "--checkpoint", run, *base, *flags, folder=tmp_path)
    ours, theirs = (
        torch.tensor(list(Image.open(f / "painted.png").convert("RGB").tobytes()), dtype=torch.float32)
        for f in (tmp_path, old)
    )
    assert ours.std() > 20 and (ours - theirs).abs().max() <= 1  # of 255: another processor may round
    second = ("--config", "small", *base, "--init-from", run, "--data", helpers.edits(), "--task", "edit")
    helpers.good(train, *second, "--steps", 1, "--sheet-every", 0, "--out", "second", folder=tmp_path)
    goes_on = ("--config", "small", *base, "--resume", "--out", run, "--data", helpers.photos(), "--steps", 4)
    said = helpers.good(train, *goes_on, folder=tmp_path)
    assert "step-000002 goes on otherwise: " in said and "--steps 4 (was 2)" in said
    assert [m["step"] for m in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert load_trained(run, base=str(old / "base")).info["format"] == checkpoint.FORMAT


def test_a_checkpoint_of_a_newer_version_is_one_line(tmp_path):
    run = Path(shutil.copytree(FIXTURES / "version_d556526" / "run", tmp_path / "run"))
    info = last(run) / "checkpoint.json"
    newer = {**json.loads(info.read_text()), "format": checkpoint.FORMAT + 1, "whatever": "it holds"}
    info.write_text(json.dumps(newer))
    said = f"checkpoint.json: of format {checkpoint.FORMAT + 1}, and this program reads format"
    for command in (
        (sample, "--checkpoint", run, "--prompt", "red"),
        (train, "--config", "small", "--resume", "--out", run),
        (train, "--config", "small", "--init-from", run, "--out", "second"),
    ):
        result = helpers.call(*command, folder=tmp_path)
        assert result.status == 2 and said in result.err and result.err.count("\n") == 1


# ---- the hub ----


@pytest.fixture
def hub(monkeypatch) -> list:
    """huggingface_hub.snapshot_download knows "owner/name" alone; the list holds its calls."""
    calls = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        calls.append((repo, allow_patterns))
        if repo != "owner/name":
            raise OSError("401 Client Error\nlong advice")
        return str(last(helpers.shapes_run()))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def test_a_checkpoint_may_be_a_hub_id_of_which_all_but_the_optimizer_is_downloaded(tmp_path, hub):
    flags = ("--checkpoint", "owner/name", "--prompt", "red", "--steps", 1)
    helpers.good(sample, *map(str, flags), folder=tmp_path)
    ((repo, patterns),) = hub
    files = {p.name for p in last(helpers.shapes_run()).iterdir()}
    found = {name for name in files if any(fnmatch.fnmatch(name, p) for p in patterns)}
    assert repo == "owner/name" and found == {*FILES, "ema.safetensors"} - {"optimizer.safetensors"}
    second = ("--config", "small", "--init-from", "owner/name", "--steps", 1, "--out", "second")
    helpers.good(train, *map(str, second), *("--sheet-every", "0"), folder=tmp_path)
    (tmp_path / "owner").mkdir()  # a folder of that name is meant
    shutil.copytree(FIXTURES / "version_d556526" / "run", tmp_path / "owner" / "name")
    count = len(hub)
    with helpers.inside(tmp_path):
        assert find_checkpoint("owner/name") == Path("owner/name/step-000002")
    assert len(hub) == count


@pytest.mark.parametrize("name, asked", (("other/name", True), ("runs/gone", False), ("a/b/c", False)))
def test_a_checkpoint_that_is_nowhere_is_one_line(tmp_path, hub, name, asked):
    """A path that may be one of our own runs is never asked for on the hub."""
    for command in (
        (sample, "--prompt", "red", "--checkpoint", name),
        (evaluate, "--checkpoint", name),
        (train, "--config", "small", "--init-from", name),
    ):
        result = helpers.call(*command, folder=tmp_path)
        assert result.status == 2 and f"{name}: no such folder" in result.err and result.err.count("\n") == 1
        assert ("could not be downloaded from the hub: 401 Client Error" in result.err) == asked
    assert bool(hub) == asked
