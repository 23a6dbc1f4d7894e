"""config.py: flags, bounds, named configurations, a second stage, and what may change on resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import helpers
import pytest

import config
import evaluate
import sample
import train
from config import (
    CONFIGS,
    Rule,
    TrainConfig,
    flag_name,
    inherited_config,
    parse_stages,
    parse_tasks,
    restore_config,
    resumed_config,
    rules,
)


def flags_of(values: dict) -> list[str]:
    """A configuration as a command line gives it."""
    texts = {k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in values.items()}
    return [x for name, text in texts.items() for x in (flag_name(name), text)]


# ---- flags ----


def other_values() -> dict:
    """For every field another value than `small` has; together they are a configuration."""
    values = dict(base="b", data="d", val_data="v", device="meta", out="o", vae="w", init_from="first")
    values |= dict(task="edit", text_data="t", stages="0:*", dtype="bfloat16", separation="shallow")
    values |= dict(unet_channels=(6, 10), prediction="eps", loss_weighting="none", optimizer="adamw")
    values |= dict(image_size=48, latent_patch=4, latent_channels=40, lm_mean="all")
    for i, (name, value) in enumerate(asdict(CONFIGS["small"]).items()):
        if name not in values and isinstance(value, bool):
            values[name] = not value
        elif name not in values:
            values[name] = value + 1 + i if isinstance(value, int) else min(value / 2 + 0.125, 0.75)
    assert all(value != getattr(CONFIGS["small"], name) for name, value in values.items())
    return values


def test_every_field_of_the_configuration_is_a_flag(tmp_path):
    values = other_values()
    with helpers.inside(tmp_path):  # what the first stage was and what is asked for are the same
        Path("first").mkdir()
        Path("first/checkpoint.json").write_text(json.dumps({"config": values}))
        config, name, resuming, dry = train.parse(["--config", "small", *flags_of(values)])
    assert asdict(config) == values and (name, resuming, dry) == ("small", False, False)


def test_the_paper_s_recipe_is_the_default():
    config = TrainConfig()
    recipe = (config.lr, config.lr_final, config.warmup, config.weight_decay, config.clip, config.lambda_ddpm)
    assert recipe == (1e-4, 1.5e-5, 4000, 0.1, 1.0, 5.0) and config.lr_text_ratio == 0
    assert config.tasks == pytest.approx({"generate": 0.8, "caption": 0.2}) and config.caption_drop == 0.1
    assert (config.noise_limit, config.diffusion.prediction) == (500, "eps")
    for name in CONFIGS:
        if name.startswith("qwen3"):
            given = asdict(train.parse(["--config", name])[0])
            for field in ("lr", "lr_final", "warmup", "weight_decay", "clip", "lambda_ddpm", "lr_text_ratio"):
                assert given[field] == getattr(config, field), (name, field)


@pytest.mark.parametrize(
    "rule, fits, breaks, words",
    (
        (dict(above=0), (1, 0.5), (0, -1, float("nan")), "above 0"),
        (dict(low=0), (0, 7), (-1, -0.1, float("nan")), "at least 0"),
        (dict(low=0, high=1), (0, 0.5, 1), (-0.1, 1.5, float("nan")), "at least 0 and at most 1"),
        (dict(low=0, below=1), (0, 0.9), (-0.1, 1, float("nan")), "at least 0 and below 1"),
        (dict(above=0, high=1000), (1, 1000), (0, 1001), "above 0 and at most 1000"),
        (dict(choices=("adamw", "muon")), ("muon",), ("sgd", ""), "one of adamw, muon"),
    ),
)
def test_a_value_outside_of_its_rule_is_refused_in_the_words_of_the_rule(rule, fits, breaks, words):
    for value in fits:
        Rule("help", **rule).check("--flag", value)
    for value in breaks:
        with pytest.raises(ValueError) as error:
            Rule("help", **rule).check("--flag", value)
        shown = repr(value) if isinstance(value, str) else value
        assert str(error.value) == f"--flag is {shown}; it must be {words}"


def test_no_number_of_a_configuration_may_be_negative():
    for name, value in asdict(TrainConfig()).items():
        if type(value) in (int, float):
            with pytest.raises(ValueError, match=f"{flag_name(name)} is -1; it must be (above|at least) 0"):
                dataclasses.replace(TrainConfig(), **{name: -1})


# ---- stages and tasks ----


def test_stages_are_read_as_steps_and_patterns():
    assert parse_stages("") == parse_stages(" ") == []
    assert parse_stages("0:*") == [(0, ["*"])]
    text = " 0 : unet_* ;500:unet_*, *.self_attn.*,;900:*"
    assert parse_stages(text) == [(0, ["unet_*"]), (500, ["unet_*", "*.self_attn.*"]), (900, ["*"])]


@pytest.mark.parametrize("text", ("unet_*", "0", "0:", "0: , ", ":*", "x:*", "-1:*", "0.5:*", "²:*", "0:*;"))
def test_a_stage_of_another_form_is_refused(text):
    with pytest.raises(ValueError) as error:
        TrainConfig(stages=text)
    last_item = text.split(";")[-1].strip()
    assert str(error.value) == f"--stages: {last_item!r} is not of the form STEP:PATTERN,PATTERN"


@pytest.mark.parametrize("text", ("5:*", "1:unet_*;0:*", "0:unet_*;0:*", "0:*;9:unet_*;5:*"))
def test_stages_begin_with_the_first_step_and_follow_each_other(text):
    with pytest.raises(ValueError, match="--stages .*: the steps must begin with 0 and grow") as error:
        TrainConfig(stages=text)
    assert text in str(error.value)


def test_tasks_are_read_as_shares_and_a_first_stage_is_a_mixture_of_two():
    assert parse_tasks("edit") == {"edit": 1}
    assert parse_tasks("generate=2, caption=1,edit = 3,chat=6.0") == pytest.approx(
        {"generate": 1 / 6, "caption": 1 / 12, "edit": 1 / 4, "chat": 1 / 2}
    )
    assert parse_tasks("caption,generate=3") == {"caption": 0.25, "generate": 0.75}
    assert TrainConfig(caption_first=0.7).tasks == pytest.approx({"generate": 0.7, "caption": 0.3})
    assert TrainConfig(caption_first=1).tasks == TrainConfig(task="generate").tasks == {"generate": 1}
    assert TrainConfig(caption_first=0).tasks == TrainConfig(task="caption").tasks == {"caption": 1}


# ---- what a checkpoint holds ----


def test_a_configuration_comes_back_from_a_checkpoint_and_a_newer_field_gets_its_default(monkeypatch):
    values = other_values()
    saved = json.loads(json.dumps(values))
    assert restore_config(saved, Path("x")) == values
    del saved["stages"], saved["micro_batch"]
    with pytest.raises(ValueError, match="x: field micro_batch of config is missing"):
        restore_config(saved, Path("x"))
    newer = {n: replace(r, newer=n in ("stages", "micro_batch")) for n, r in rules(TrainConfig).items()}
    monkeypatch.setattr(config, "rules", lambda cls: newer)  # as if the checkpoint were older than these two
    assert restore_config(saved, Path("x")) == values | {"stages": "", "micro_batch": 0}


def test_a_checkpoint_of_before_lm_mean_and_edit_empty_trains_as_it_did_and_can_begin_a_second_stage():
    saved = json.loads(json.dumps(asdict(CONFIGS["small"])))
    del saved["lm_mean"], saved["edit_empty"]
    restored = restore_config(saved, Path("x"))
    assert (restored["lm_mean"], restored["edit_empty"]) == ("learned", 0.0)
    again = resumed_config(restored, {})
    assert (again.lm_mean, again.edit_empty) == ("learned", 0.0)
    second = inherited_config(CONFIGS["small-chat"], {"base": "b"}, restored, {"edit_empty": 0.1})
    assert second.edit_empty == 0.1 and second.lm_mean == "learned"


def test_a_checkpoint_of_before_long_runs_keeps_one_checkpoint_and_none_by_the_minute():
    saved = json.loads(json.dumps(asdict(CONFIGS["small"])))
    for name in ("log_minutes", "checkpoint_minutes", "keep"):
        del saved[name]
    restored = restore_config(saved, Path("x"))
    assert restored == asdict(CONFIGS["small"])
    assert (restored["checkpoint_minutes"], restored["keep"]) == (0, 1)


@pytest.mark.parametrize(
    "change, words",
    (
        (dict(colour=3), "field colour of config is unknown"),
        (dict(steps="many"), "field steps of config is 'many'"),
        (dict(steps=0.5), "field steps of config is 0.5"),
        (dict(unet_channels="8,12"), "field unet_channels of config is '8,12'"),
        (dict(base=None), "field base of config is None"),
    ),
)
def test_a_field_that_is_unknown_or_of_another_type_is_named(change, words):
    with pytest.raises(ValueError) as error:
        restore_config(asdict(TrainConfig()) | {"unet_channels": [8, 12]} | change, Path("x.json"))
    assert str(error.value) == f"x.json: {words}"
    for none in (None, [], "config"):
        with pytest.raises(ValueError, match="x.json: config is missing or not a JSON object"):
            restore_config(none, Path("x.json"))


# Where the data and the base lie, how the work is divided, how long it goes on, and what is written.
FREE = {"base", "data", "val_data", "text_data", "vae", "init_from", "out", "device", "dtype", "steps"}
FREE |= {"micro_batch", "pack", "activation_checkpointing", "compile", "threads"}
FREE |= {"log_every", "val_every", "sheet_every", "checkpoint_every"}
FREE |= {"log_minutes", "checkpoint_minutes", "keep"}


@pytest.mark.parametrize("field", rules(TrainConfig))
def test_what_a_step_computes_may_not_change_when_a_run_is_resumed(field):
    saved, other = other_values(), getattr(CONFIGS["small"], field)
    assert asdict(resumed_config(saved, {field: saved[field]})) == saved  # to say it again is no change
    if field in FREE:
        assert asdict(resumed_config(saved, {field: other})) == saved | {field: other}
    else:
        with pytest.raises(ValueError) as error:
            resumed_config(saved, {field: other})
        assert str(error.value) == f"--resume: {field} was {saved[field]} and cannot become {other}"


# ---- a second stage ----

OF_THE_MODEL = dict(
    separation="shallow",
    image_size=48,
    latent_patch=6,
    latent_channels=5,
    whiten=0.25,
    unet_channels=(12, 20),
    unet_attention=True,
    patch_positions=False,
    prediction="eps",
    loss_weighting="none",
    schedule_shift=3.0,
    noise_limit=77,
)


@pytest.fixture
def odd_first(tmp_path) -> Path:
    """A folder with the checkpoint.json of a first stage of which every field is another than `small` has."""
    config = asdict(CONFIGS["small"]) | OF_THE_MODEL | dict(steps=77, lr=0.5, seed=9, ema=0.5)
    folder = tmp_path / "first"
    folder.mkdir()
    vae = {"path": "/its/vae", "fingerprint": "0"}
    (folder / "checkpoint.json").write_text(json.dumps({"config": config, "base": "/its/base", "vae": vae}))
    return folder


def test_a_second_stage_takes_over_what_the_model_is_and_nothing_else(odd_first):
    assert all(getattr(CONFIGS["small-chat"], f) != value for f, value in OF_THE_MODEL.items())
    config, name, resume, dry = train.parse(["--config", "small-chat", "--init-from", str(odd_first)])
    assert (name, resume, dry) == ("small-chat", False, False)
    taken = OF_THE_MODEL | {"base": "/its/base", "vae": "/its/vae", "init_from": str(odd_first)}
    assert asdict(config) == asdict(CONFIGS["small-chat"]) | taken
    flags = ["--config", "small", "--init-from", str(odd_first), "--base", "b", "--vae", "w", "--seed", "3"]
    moved = asdict(CONFIGS["small"]) | taken | {"base": "b", "vae": "w", "seed": 3}
    assert asdict(train.parse(flags)[0]) == moved


@pytest.mark.parametrize("field", OF_THE_MODEL)
def test_what_the_first_stage_was_may_be_said_again_and_not_be_contradicted(odd_first, field):
    same = {"image_size": 48, "latent_patch": 6}  # the two must fit together
    start = ["--config", "small", "--init-from", str(odd_first), *flags_of(same)]
    parsed = train.parse([*start, *flags_of({field: OF_THE_MODEL[field]})])[0]
    assert getattr(parsed, field) == OF_THE_MODEL[field]
    other = {"image_size": 24, "latent_patch": 4}.get(field) or getattr(CONFIGS["small"], field)
    with pytest.raises(ValueError, match=f"first: {field} was .* there and cannot become ") as error:
        train.parse([*start, *flags_of({field: other})])
    assert str(OF_THE_MODEL[field]) in str(error.value) and str(other) in str(error.value)


# ---- bars ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that `Bar` sees."""
    now = [100.0]
    monkeypatch.setattr(config.time, "monotonic", lambda: now[0])
    return now


def run_bar(clock: list[float], bar: config.Bar) -> None:
    """Eight steps of 25 seconds, some by hand and some by iterating."""
    for number, _ in enumerate(bar):
        bar.set_postfix_str(f"loss {number}")
        clock[0] += 25
    bar.close()


def test_without_a_terminal_there_is_a_line_a_minute_and_none_in_a_short_run(clock, capsys):
    run_bar(clock, config.Bar(range(8), desc="encoding", unit="picture"))
    done = "encoding: {} of 8 pictures, {} left, loss {}\n"
    assert capsys.readouterr().err == done.format(3, "02:05", 2) + done.format(6, "00:50", 5)
    bar = config.Bar(total=12, initial=4, desc="training", unit="step")
    for _ in range(4):
        clock[0] += 20
        bar.update()
    assert capsys.readouterr().err == "training: 7 of 12 steps, 01:40 left\n"
    run_bar(clock, config.Bar(range(2), desc="short"))
    run_bar(clock, config.Bar(range(8), desc="quiet", quiet=True))
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_and_no_line(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run_bar(clock, config.Bar(range(8), desc="encoding", unit="picture"))
    run_bar(clock, config.Bar(range(8), desc="quiet", quiet=True))
    text = terminal.getvalue()
    assert "encoding: 100%" in text and "8/8" in text and "loss 7" in text
    assert " of 8" not in text and "quiet" not in text


# ---- what a shell hands over, and what it shows ----


def test_a_tilde_is_the_home_folder_in_every_flag_of_a_path_and_in_no_text(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = [f"--{x}=~/x" for x in ("out", "base", "data", "val-data", "vae", "text-data")]
    made, *_ = train.parse(["--config", "small", *flags, "--text-batch=1", "--lr-text-ratio=1"])
    places = [getattr(made, x) for x in ("out", "base", "data", "val_data", "vae", "text_data")]
    assert places == [str(tmp_path / "x")] * 6
    args = sample.parse("--edit ~/a --caption ~/b --prompts ~/c --gif ~/d --prompt ~/e --text ~/f".split())
    assert (args.edit, args.caption, args.prompts) == (f"{tmp_path}/a", [f"{tmp_path}/b"], f"{tmp_path}/c")
    assert args.gif == f"{tmp_path}/d" and args.prompt == ["~/e"] and args.text == ["~/f"]
    args = evaluate.parse("--text ~/a --choices ~/b --json ~/new/c".split())
    assert (args.text, args.choices, args.json) == (f"{tmp_path}/a", [f"{tmp_path}/b"], f"{tmp_path}/new/c")


@pytest.mark.parametrize("flags", ("--prompt=caf\udce9", "--out=runs/caf\udce9", "--text=\udcff", "\udce9"))
def test_an_argument_that_is_not_utf_8_is_one_line(flags, tmp_path):
    for module in (sample, train):
        result = helpers.call(module, "--config", "small", flags, folder=tmp_path)
        assert result.status == 2 and "is not UTF-8" in result.err.splitlines()[-1]
        assert "Traceback" not in result.err and ascii(flags)[1:-1] in result.err


def run_in_shell(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Python code that ends in run_command(main), in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(helpers.ROOT)!r})\nfrom config import run_command\n{code}"
    file = folder / "code.py"
    file.write_text(code, encoding="utf-8")
    environment = os.environ | environment
    return subprocess.run([sys.executable, file], cwd=folder, env=environment, capture_output=True)


@pytest.mark.parametrize("environment", ({"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}))
def test_a_caption_that_the_terminal_cannot_show_is_shown_escaped(tmp_path, environment):
    code = "def main(): print('a caf\\u00e9 \\u7334 \\ud800'); print('\\u7334', file=sys.stderr)"
    result = run_in_shell(f"{code}\nrun_command(main)", tmp_path, **environment)
    assert result.returncode == 0 and b"\\u7334 \\ud800" in result.stdout and b"\\u7334" in result.stderr


def library(kind: type, words: str):
    """A function that raises as a library does: in a file that is not the project's."""
    scope: dict = {"kind": kind, "words": words}
    exec(
        compile("def fail(*_):\n    raise kind(words)", "/usr/lib/python3/site-packages/lib.py", "exec"),
        scope,
    )
    return scope["fail"]


def on_purpose():
    raise ValueError("--steps is 0")


def behind_a_library():
    try:
        library(RuntimeError, "inner words")()
    except RuntimeError as error:
        raise ValueError("the file x is cut") from error


def in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(on_purpose).result()


def in_a_block():
    with contextlib.suppress(KeyError):
        try:
            on_purpose()
        finally:
            int("3")


@pytest.mark.parametrize(
    "main, line",
    (
        (on_purpose, "--steps is 0"),
        (behind_a_library, "the file x is cut"),
        (in_a_thread, "--steps is 0"),
        (in_a_block, "--steps is 0"),
        (lambda: open("/gone/x"), "[Errno 2] No such file or directory: '/gone/x'"),
        (library(OSError, "disk full"), "disk full"),
    ),
)
def test_what_is_raised_for_the_user_is_one_line(capsys, main, line):
    with pytest.raises(SystemExit) as stop:
        config.run_command(main)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    "main, kind",
    (
        (library(ValueError, "cannot reshape array"), ValueError),
        (lambda: int("x"), ValueError),  # a built-in function in a line of the project
        (lambda: [].index(3), ValueError),
        (lambda: json.loads("{"), ValueError),
        (lambda: {}["x"], KeyError),
        (library(RuntimeError, "NCCL error: invalid usage"), RuntimeError),
        (library(TypeError, "no"), TypeError),
    ),
)
def test_what_nobody_raised_for_the_user_keeps_its_traceback(capsys, main, kind):
    with pytest.raises(kind):
        config.run_command(main)
    assert capsys.readouterr().err == "this was not expected, and may be a bug of this program:\n"


def test_a_library_in_an_environment_below_the_root_is_no_part_of_the_project():
    scope: dict = {}
    place = helpers.ROOT / ".venv" / "lib" / "python3" / "site-packages" / "lib.py"
    exec(compile("def fail():\n    raise ValueError('no')", str(place), "exec"), scope)
    with pytest.raises(ValueError) as found:
        scope["fail"]()
    assert not config.is_deliberate(found.value)
