"""ablate.py: every cell runs, is what its name says, can be stopped and gone on with, and is counted rightly.

Most cells are run once, for a few steps, and most tests read what they left. The others differ from these in
the value of a flag alone.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import helpers
import pytest
import torch
from conftest import perturb_parameters, write_qwen3_folder
from torch.utils.flop_counter import FlopCounterMode

import train
from config import CONFIGS, TrainConfig, parse_stages, tune_torch
from lab import ablate
from lab.ablate import QUICK, STAGED, Plan, cells, configure, count_flops, run_cell
from lab.report import FIGURES, LABELS
from load_qwen3 import load_qwen3
from model import replace
from small.world import all_scenes, read_scenes, render
from train import Run

NAMES = tuple(cells(QUICK))
LEFT_OUT = ("none-0-light", "deep-0-light", "deep-0-no-limit")
RUN = tuple(name for name in NAMES if name not in LEFT_OUT)
FROZEN = tuple(name for name in RUN if not cells(QUICK)[name]["lr_text_ratio"])
LEARNING = tuple(name for name in RUN if name not in FROZEN)
RESULTS = Path("runs/ablate-quick/results")
WRITTEN = [f"{RESULTS}/{n}.png" for n in ("figure4", "figure5", "figure6", "table1")] + [
    f"{RESULTS}/tables.md"
]
TIMES = ("seconds_per_step", "cell_seconds")


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    """Where `python -m lab.ablate --quick` was called with patterns that fit the cells in RUN."""
    folder = tmp_path_factory.mktemp("grid")
    for pattern, n in (("*[01]", 7), ("transfusion", 1), ("deep-0-[ehs]*", 3)):
        out = helpers.good(ablate, "--quick", "--cell", pattern, folder=folder)
        assert out.startswith(f"{n} of {n} cells to do; results in {RESULTS}\n")
    assert out.splitlines()[-5:] == WRITTEN
    return folder


def read(folder: Path, name: str, seed: int = 0) -> dict:
    return json.loads((folder / RESULTS / f"{name}-{seed}.json").read_text())


def timeless(result: dict) -> dict:
    """A result without how long it took, and without the commit, which may move while tests run."""
    return {k: v for k, v in result.items() if k not in (*TIMES, "made_by")}


def work(folder: Path, plan: Plan, name: str, seed: int = 0) -> None:
    """run_cell as the command calls it."""
    with helpers.inside(folder):
        tune_torch()
        run_cell(plan, name, seed)


@pytest.fixture
def beside(grid, tmp_path, monkeypatch) -> Path:
    """An empty place to work in, with the base of the grid."""
    shutil.copytree(grid / QUICK.runs / "base", tmp_path / QUICK.runs / "base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(name: str, seed: int = 0, plan: Plan = QUICK) -> TrainConfig:
    return configure(plan, name, seed, Path(QUICK.runs) / "base")


# ---- the grid ----


def test_every_cell_leaves_a_result(grid):
    assert set(NAMES) == set(cells(Plan())) == set(LABELS)
    assert {p.name for p in (grid / RESULTS).glob("*.json")} == {f"{name}-0.json" for name in RUN}
    assert not list((grid / QUICK.runs).rglob("*.tmp"))
    assert {p.name for p in (grid / QUICK.runs).iterdir()} == {
        "base",
        "results",
        *(f"{name}-0" for name in RUN),  # what FLOPs were counted on leaves nothing
    }


@pytest.mark.parametrize("name", RUN)
def test_a_result_says_what_was_done_and_found(grid, name):
    result = read(grid, name)
    assert (result["cell"], result["seed"]) == (name, 0)
    made, config = result["made_by"], result["config"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", made["commit"])
    assert made["command"].startswith(f"python -m lab.ablate --cell {name} --seed 0")
    small_config = json.loads(json.dumps(dataclasses.asdict(CONFIGS["small"])))
    own = {"steps": config["steps"], "batch_size": 4, "unet_channels": [8, 12], "warmup": 1, "sheet_every": 0}
    own |= {"log_every": 2, "val_every": 2, "checkpoint_every": 2} | {
        k: v for k, v in cells(QUICK)[name].items() if k != "steps"
    }
    assert config == {k: v for k, v in (small_config | own).items() if k not in ("base", "out")}
    steps = config["steps"]
    assert result["pictures_seen"] == 4 * steps and all(result[k] > 0 for k in TIMES)
    assert result["flops"] == result["flops_per_step"] * steps > 0
    assert [p["step"] for p in result["curve"]] == [*range(2, steps, 2), steps]
    for point in [*result["curve"], result["final"]["text"] | result["final"]["captions"]]:
        assert point["perplexity"] > 1 and point["cider"] >= 0
        assert all(0 <= point[k] <= 1 for k in ("knowledge", "reasoning", "captions_exact"))
    for point in [*result["curve"], *result["final"]["pictures"].values()]:
        assert point["frechet"] > 0
        assert all(0 <= point[k] <= 1 for k in ("match", "background", "color", "place", "shape", "size"))
    assert all(len(p["val"]["right"]) == len(p["val"]["permuted"]) == 5 for p in result["curve"])
    whole = name == "deep-0"
    assert list(result["final"]["pictures"]) == ["1.0", "1.55", *(["3.0", "5.0"] if whole else [])]
    assert ("samplers" in result["final"]) == whole
    if whole:
        painted = result["final"]["samplers"]
        assert list(painted) == ["ddpm 5", "ddim 1", "ddim 2", "ddim 4"]
        assert painted["ddim 2"] == result["final"]["pictures"]["1.55"]  # the very same
        assert len({p["frechet"] for p in painted.values()}) == 4


def test_the_command_of_a_quick_result_is_a_quick_one(grid):
    assert "--quick" in read(grid, "none-0")["made_by"]["command"]


def test_the_commit_says_whether_code_differs_from_it_and_not_whether_results_do(tmp_path):
    assert ablate.commit(tmp_path) == "unknown"  # no repository, or no git
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    code, result = tmp_path / "a.py", tmp_path / "results.json"
    code.write_text("1\n"), result.write_text("{}\n")
    if not shutil.which("git"):
        pytest.skip("there is no git")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    head = ablate.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{12}", head)
    result.unlink()
    assert ablate.commit(tmp_path) == head
    code.write_text("2\n")
    assert ablate.commit(tmp_path) == head + "+"
    code.write_text("1\n"), (tmp_path / "b.py").write_text("")
    assert ablate.commit(tmp_path) == head + "+"


def test_all_cells_start_from_the_same_base_and_text(grid):
    results = [read(grid, name) for name in RUN]
    assert len({r["base_fingerprint"] for r in results}) == 1
    assert all(r["final"]["text_of_base"] == results[0]["final"]["text_of_base"] for r in results)


@pytest.mark.parametrize("name", FROZEN)
def test_a_cell_with_frozen_text_keeps_it_to_the_last_bit(grid, name):
    result = read(grid, name)
    assert result["final"]["text"] == result["final"]["text_of_base"]
    assert result["final"]["text_tensors_changed"] == 0
    assert {p["perplexity"] for p in result["curve"]} == {result["final"]["text_of_base"]["perplexity"]}
    assert result["config"]["text_batch"] == 0


def test_captions_behind_pictures_are_a_tenth_of_the_words_that_a_learning_text_side_learns_from(beside):
    words = {}  # a step, on average: of captions, of text alone
    for name in ("deep-0", "none-1"):
        run, found = Run(configured(name, plan=Plan()), name), [0, 0]
        for run.step in range(10):
            for batch in run.batches():
                counts = train.count_targets(run.model, batch, run.config)
                found[not counts["ddpm_loss"]] += counts["lm_loss"] / 10
        words[name] = found
    assert words["deep-0"][1] == 0  # frozen: captions behind pictures are all of it
    total = sum(words["none-1"])
    assert 0.08 < words["deep-0"][0] / total < 0.12 and 0.55 < words["none-1"][1] / total < 0.65


@pytest.mark.parametrize("name", LEARNING)
def test_a_cell_with_a_ratio_changes_its_text_and_reads_some(grid, name):
    result, base = read(grid, name), load_qwen3(grid / QUICK.runs / "base", unet_channels=(4, 4))
    kept = name != "transfusion"  # the final norm, which from nothing is learned as well
    assert result["final"]["text_tensors_changed"] == len(base.text_parameters()) - kept
    assert result["final"]["text"]["perplexity"] != result["final"]["text_of_base"]["perplexity"]
    assert result["config"]["text_batch"] == QUICK.text_batch > 0


def test_a_tenth_of_the_ratio_moves_the_text_less(grid):
    for kind in ("none", "deep"):
        base = read(grid, f"{kind}-1")["final"]["text_of_base"]["perplexity"]
        moved = [abs(read(grid, f"{kind}-{r}")["final"]["text"]["perplexity"] - base) for r in ("0.1", "1")]
        assert 0 < moved[0] < moved[1]


def test_without_separation_modules_are_shared_and_shallow_shares_attention(grid):
    parameters = {name: read(grid, name)["parameters"] for name in RUN}
    none, shallow, deep = (parameters[f"{kind}-0"] for kind in ("none", "shallow", "deep"))
    assert none["all"] < shallow["all"] < deep["all"]
    model = load_qwen3(grid / QUICK.runs / "base", unet_channels=(4, 4))
    layers, D = model.config.num_hidden_layers, model.config.hidden_size
    expert = sum(p.numel() for n, p in model.named_parameters() if n.startswith("layers.0.image."))
    attention = sum(
        p.numel() for n, p in model.named_parameters() if n.startswith("layers.0.image.self_attn")
    )
    assert deep["all"] - none["all"] == layers * expert + D  # experts, and a final norm of the image's own
    assert deep["all"] - shallow["all"] == layers * (attention + D)  # attention, and the norm before it
    for a, b in ((none, shallow), (shallow, deep)):  # what there is more learns, too
        assert b["trained"] - a["trained"] == b["all"] - a["all"]
    assert parameters["none-1"]["trained"] == parameters["none-1"]["all"] - D  # but the text's final norm
    assert parameters["transfusion"]["trained"] == parameters["none-1"]["all"]
    assert parameters["deep-1"]["all"] == deep["all"]


def test_cells_are_what_their_names_say():
    for plan in (QUICK, Plan()):
        for name, changes in cells(plan).items():
            kind, ratio = ("none", "1") if name == "transfusion" else name.split("-")[:2]
            config = configure(plan, name, 3, Path("b")) if name != "deep-0-equal" else None
            assert (changes["separation"], changes["lr_text_ratio"]) == (kind, float(ratio))
            assert changes["text_batch"] == (plan.text_batch if float(ratio) else 0)
            assert config is None or (config.seed, config.steps, config.base) == (3, plan.steps, "b")
        more = {"separation", "lr_text_ratio", "text_batch", "steps"}
        extra = {n: {k: v for k, v in c.items() if k not in more} for n, c in cells(plan).items()}
        stages = extra["deep-0-staged"].pop("stages")
        assert {n: e for n, e in extra.items() if e} == {
            "transfusion": {"from_scratch": True},
            "none-0-light": {"lambda_ddpm": 50, "clip": 10},
            "deep-0-light": {"lambda_ddpm": 50, "clip": 10},
            "deep-0-no-limit": {"noise_limit": 1000},
            "deep-0-half": {"caption_first": 0.5},
        }
        assert parse_stages(stages)[-1][0] < plan.steps
    assert configure(Plan(), "deep-0", 0, Path("b")).unet_channels == CONFIGS["small"].unet_channels
    assert len({configure(QUICK, n, s, Path("b")).out for n in NAMES[:6] for s in range(3)}) == 18


def test_what_the_papers_figures_show_is_run_before_anything_else_and_seed_by_seed(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(ablate, "run_all", lambda plan, wanted, *rest: asked.extend(wanted))
    monkeypatch.setattr(ablate, "write_report", lambda folder: [])
    helpers.good(ablate, "--seeds", 2, folder=tmp_path)
    shown = {name for names in FIGURES.values() for name in names}
    assert len(shown) == 9 and len(asked) == 28 and set(asked) == {(n, s) for n in NAMES for s in (0, 1)}
    assert asked == sorted(asked, key=lambda cell: (cell[0] not in shown, cell[1]))


# ---- the same pictures ----


def test_all_cells_of_a_seed_see_the_same_pictures_noise_and_captions(grid, monkeypatch):
    """Whether or not they read text besides; only the order of captions and pictures is another in two."""
    monkeypatch.chdir(grid)
    for step in (0, 3):
        first, text = None, None
        for name in NAMES:
            if name == "deep-0-equal":  # which is deep-0, for longer
                continue
            run = Run(configured(name), "test")
            run.step = step
            batch, *more = run.batches()
            drawn = [batch.latents, batch.u, batch.eps]
            captions = [batch.prefix.ids, batch.rest.ids]
            if first is None:
                first, first_captions = drawn, captions
            assert all(map(torch.equal, drawn, first)), name
            if name != "deep-0-half":
                assert all(map(torch.equal, captions, first_captions)), name
            assert len(more) == (run.config.lr_text_ratio > 0)
            for batch in more:
                text = batch.rest.ids if text is None else text
                assert torch.equal(text, batch.rest.ids), name
        assert text is not None
    other = Run(configured("none-0", seed=1), "test").batches()[0]
    assert not torch.equal(other.eps, first[2]) and not torch.equal(other.latents, first[0])


# ---- FLOPs ----


def test_flops_are_those_of_a_plain_training_step(grid, monkeypatch):
    """The third step and the fourth, counted in a run of its own; the first two make optimizers' states."""
    monkeypatch.chdir(grid)
    run, counted = Run(configured("deep-0.1"), "test"), []
    run.train_step(), run.train_step()
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            run.train_step()
        counted.append(counter.get_total_flops())
    assert counted[0] > 0 and counted[0] != counted[1]
    assert read(grid, "deep-0.1")["flops_per_step"] == counted[0]
    assert count_flops(run, 2)["flops_per_step"] == sum(counted) / 2


def test_a_step_that_reads_text_takes_more_flops(grid, monkeypatch):
    monkeypatch.chdir(grid)
    run = Run(dataclasses.replace(configured("deep-1"), text_batch=0), "test")
    without = count_flops(run, 1)["flops_per_step"]
    flops = {name: read(grid, name)["flops_per_step"] for name in RUN}
    assert flops["deep-0"] < without < flops["deep-1"]  # a frozen text needs no gradient
    assert flops["deep-0.1"] == flops["deep-1"] and flops["none-1"] == flops["transfusion"]


def test_the_cell_of_equal_flops_has_as_many_as_transfusion(grid):
    theirs, ours, plain = (read(grid, name) for name in ("transfusion", "deep-0-equal", "deep-0"))
    steps = ours["config"]["steps"]
    assert steps == round(QUICK.steps * theirs["flops_per_step"] / ours["flops_per_step"]) > QUICK.steps
    assert abs(ours["flops"] - theirs["flops"]) <= ours["flops_per_step"] / 2
    assert ours["flops_per_step"] == plain["flops_per_step"]
    assert ours["config"] == plain["config"] | {"steps": steps}


def test_all_seeds_of_the_cell_of_equal_flops_take_as_many_steps(grid, monkeypatch):
    """Though a step of another seed, with other captions, takes other FLOPs."""
    monkeypatch.chdir(grid)
    assert configured("deep-0-equal", seed=1).steps == read(grid, "deep-0-equal")["config"]["steps"]
    counted = count_flops(Run(configured("deep-0", seed=1), "test"), 1)["flops_per_step"]
    assert counted != read(grid, "deep-0")["flops_per_step"]


def test_stages_change_nothing_of_what_is_counted(grid, monkeypatch):
    """A stage trains a part for a few steps; counted is the step that trains everything."""
    monkeypatch.chdir(grid)
    run = Run(dataclasses.replace(configured("deep-0-staged"), stages="0:unet_*"), "test")
    found = count_flops(run, 1)["flops_per_step"]
    assert found == read(grid, "deep-0-staged")["flops_per_step"] == read(grid, "deep-0")["flops_per_step"]


# ---- stages ----


def test_a_staged_cell_trains_what_its_stage_names_and_nothing_else(tmp_path):
    """The stages of the real plan over six layers, in 20 steps; every parameter is perturbed first."""
    base = write_qwen3_folder(tmp_path / "base", num_hidden_layers=6)
    plan = dataclasses.replace(QUICK, steps=20)
    config = configure(plan, "deep-0-staged", 0, base)
    stages = [(round(share * 20), patterns.split(",")) for share, patterns in STAGED]
    assert parse_stages(config.stages) == stages and [s for s, _ in stages] == [0, 3, 6, 9, 12]
    run = Run(config, "test")
    perturb_parameters(run.model)
    attention = "layers.{}.image.self_attn.{}.weight"
    added = [
        {n for n in run.trained if n.startswith("unet_")} | {"boi_head"},
        *(
            {attention.format(i, part) for i in layers for part in ("q_proj", "k_proj", "v_proj", "o_proj")}
            | {attention.format(i, norm) for i in layers for norm in ("q_norm", "k_norm")}
            for layers in ((4, 5), (2, 3), (0, 1))
        ),
    ]
    added.append(set(run.trained) - set().union(*added))
    assert {n for n in added[-1] if "self_attn" in n} == set() and "norm_image.weight" in added[-1]
    text = {n: p.clone() for n, p in run.model.text_parameters().items()}
    learning: set[str] = set()
    for step in range(20):
        if step in dict(stages):
            learning |= added[[s for s, _ in stages].index(step)]
        before = {n: p.detach().clone() for n, p in run.trained.items()}
        run.train_step()
        changed = {n for n, p in run.trained.items() if not torch.equal(p, before[n])}
        assert changed == learning, (step, changed ^ learning)
    assert learning == set(run.trained)
    assert all(torch.equal(p, text[n]) for n, p in run.model.text_parameters().items())


def test_the_stages_of_the_quick_cell_are_two(grid, monkeypatch):
    monkeypatch.chdir(grid)
    run = Run(configured("deep-0-staged"), "test")
    perturb_parameters(run.model)
    for step in range(4):
        before = {n: p.detach().clone() for n, p in run.trained.items()}
        run.train_step()
        changed = {n for n, p in run.trained.items() if not torch.equal(p, before[n])}
        assert changed == set(run.trained if step >= 2 else fnmatch.filter(run.trained, "unet_*"))


# ---- stopped, and gone on with ----


def test_what_is_done_is_not_done_again(grid, monkeypatch):
    asked = []
    monkeypatch.setattr(ablate, "run_cell", lambda plan, name, seed: asked.append((name, seed)))
    kept = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (grid / "runs").rglob("*") if p.is_file()}
    out = helpers.good(ablate, "--quick", folder=grid)
    assert out.startswith("3 of 14 cells to do") and sorted(asked) == sorted((n, 0) for n in LEFT_OUT)
    for path, (time, content) in kept.items():
        drawn = path.suffix in (".png", ".md")  # these are, and are the same again
        assert path.read_bytes() == content and (drawn or path.stat().st_mtime_ns == time), path
    assert {p for p in (grid / "runs").rglob("*") if p.is_file()} == set(kept)


def test_a_removed_result_is_made_again_from_what_was_trained(grid, monkeypatch):
    want = read(grid, "deep-0.1")
    (grid / RESULTS / "deep-0.1-0.json").unlink()
    monkeypatch.setattr(train, "save_run", None)
    out = helpers.good(ablate, "--quick", "--cell", "deep-0.[12]", "--seed", 0, folder=grid)
    assert out.startswith("1 of 1 cells to do")
    assert timeless(read(grid, "deep-0.1")) == timeless(want)


@pytest.mark.parametrize("where", ("training", pytest.param("measuring", marks=pytest.mark.slow)))
def test_a_cell_that_was_killed_goes_on_as_if_it_had_not_been(grid, beside, monkeypatch, where):
    """While it trains, behind a checkpoint; and while it measures the last point."""
    train_step, measure, measured = Run.train_step, ablate.measure, []

    def step(run: Run):
        if where == "training" and run.step == 2:
            raise KeyboardInterrupt
        return train_step(run)

    def look(*args):
        measured.append(args)
        if where == "measuring" and len(measured) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", step)
        patch.setattr(ablate, "measure", look)
        with pytest.raises(KeyboardInterrupt):
            work(beside, QUICK, "deep-1")
    left = [p.name for p in (beside / QUICK.runs / "deep-1-0").glob("step-*")]
    assert left == ["step-000002"] and not (beside / RESULTS).exists()
    helpers.good(ablate, "--quick", "--cell", "deep-1", folder=beside)
    assert timeless(read(beside, "deep-1")) == timeless(read(grid, "deep-1"))


def test_a_run_of_another_plan_is_not_gone_on_with(grid, beside):
    shutil.copytree(grid / QUICK.runs / "none-0-0", beside / QUICK.runs / "none-0-0")  # four steps
    with pytest.raises(ValueError, match="none-0-0 holds a run of another configuration; delete it"):
        work(beside, dataclasses.replace(QUICK, steps=2), "none-0")
    assert not (beside / RESULTS).exists()


def test_another_seed_is_another_run_from_the_same_base(grid, beside):
    (beside / RESULTS).mkdir()
    shutil.copy(grid / RESULTS / "none-0-0.json", beside / RESULTS)
    out = helpers.good(ablate, "--quick", "--cell", "none-0", "--seeds", 2, folder=beside)
    assert out.startswith("1 of 2 cells to do")
    one, two = read(beside, "none-0"), read(beside, "none-0", 1)
    assert two["base_fingerprint"] == one["base_fingerprint"] and two["config"]["seed"] == 1
    assert two["final"]["text_of_base"] == one["final"]["text_of_base"]
    assert two["final"]["pictures"] != one["final"]["pictures"]
    assert "| no separation, frozen text | 2 |" in (beside / RESULTS / "tables.md").read_text()


# ---- several at once ----


@pytest.mark.parametrize(
    "names", (["deep-0-half"], pytest.param(["deep-0-half", "deep-0-staged"], marks=pytest.mark.slow))
)
def test_cells_in_processes_of_their_own_give_what_they_give_here(grid, beside, names):
    pattern = "deep-0-half" if len(names) == 1 else "deep-0-[hs]*"
    out = helpers.good(ablate, "--quick", "--jobs", 2, "--cell", pattern, folder=beside)
    assert out.startswith(f"{len(names)} of {len(names)} cells to do")
    for name in names:
        assert timeless(read(beside, name)) == timeless(read(grid, name))
        assert "4 steps, 16 pictures" in (beside / QUICK.runs / f"{name}-0.log").read_text()


def test_a_cell_that_fails_is_named_with_its_log(beside, monkeypatch):
    monkeypatch.setattr(ablate.sys, "executable", "/bin/false")
    result = helpers.call(ablate, "--quick", "--jobs", 2, "--cell", "none-0", folder=beside)
    log = f"{QUICK.runs}/none-0-0.log"
    assert result.status == 2
    assert result.err.splitlines()[-1] == f"error: cell none-0 of seed 0 ended with status 1; see {log}"
    assert (beside / log).is_file() and not (beside / RESULTS).exists()


# ---- the command ----


def test_tables_alone_computes_nothing(grid, tmp_path, monkeypatch):
    (tmp_path / RESULTS).mkdir(parents=True)
    for name in ("deep-0", "none-0"):
        shutil.copy(grid / RESULTS / f"{name}-0.json", tmp_path / RESULTS)
    monkeypatch.setattr(ablate, "run_all", None)
    out = helpers.good(ablate, "--quick", "--tables", folder=tmp_path)
    assert out.splitlines() == WRITTEN
    assert {p.name for p in (tmp_path / RESULTS).iterdir()} == {
        *("deep-0-0.json", "none-0-0.json"),
        *(Path(w).name for w in WRITTEN),
    }
    assert "| no separation, frozen text | 1 |" in (tmp_path / RESULTS / "tables.md").read_text()
    assert helpers.good(ablate, "--tables", folder=tmp_path) == ""  # of the real plan, there is nothing
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    "flags, words",
    (
        (("--cell", "deeper"), ("--cell deeper fits none of none-0,", "deep-0-staged")),
        (("--seed", "-1"), ("--seed is -1", "from 0 to 999")),
        (("--seed", "1000"), ("--seed is 1000",)),
        (("--seeds", "-2"), ("--seeds is -2", "from 1 to 999")),
        (("--seeds", "0"), ("--seeds is 0",)),
        (("--jobs", "0"), ("--jobs is 0", "from 1 to 999")),
        (("--jobs", "two"), ("--jobs", "invalid int value")),
        (("--sed", "1"), ("unknown argument --sed", "--seed")),
    ),
)
def test_a_bad_flag_is_an_error_in_one_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(ablate, "run_all", None)
    result = helpers.call(ablate, "--quick", "--tables", *flags, folder=tmp_path)
    assert result.status == 2 and not list(tmp_path.iterdir())
    assert all(word in result.err.splitlines()[-1] for word in words)
    assert len([line for line in result.err.splitlines() if "error" in line]) == 1


# ---- what is measured ----


def test_a_model_that_paints_and_describes_rightly_gets_full_marks(monkeypatch):
    """Over more pictures than are painted at once: each is compared with its own prompt."""
    captions = {s.caption: s for s in all_scenes("test")}
    seen: list[tuple] = []

    def paint(trained, prompts, seeds, steps, cfg, sampler):
        seen.append((prompts, seeds, steps, cfg, sampler))
        return render([captions[p] for p in prompts], random.Random(0))

    monkeypatch.setattr(ablate, "generate_images", paint)
    monkeypatch.setattr(
        ablate, "describe_images", lambda trained, pictures, **_: [s.caption for s in read_scenes(pictures)]
    )
    found = ablate.measure_pictures(None, 100, 5, 1.55, "ddpm", 7)
    assert found.pop("frechet") < 0.05 and found.pop("residual") == 0.0 and set(found.values()) == {1.0}
    assert list(found) == ["match", "background", "color", "place", "shape", "size", "strict"]
    assert [len(prompts) for prompts, *_ in seen] == [64, 36]
    assert {how for _, _, *how in map(lambda x: (x[0], x[1], x[2:]), seen) for how in how} == {
        (7, 1.55, "ddpm")
    }
    prompts, seeds = (sum((x[i] for x in seen), []) for i in (0, 1))
    assert len(set(prompts)) == len(set(seeds)) == 100
    report = ablate.measure_captions(None, 100)
    assert report["captions_exact"] == 1.0 and report["cider"] == pytest.approx(10)
    seen.clear()
    ablate.measure_pictures(None, 100, 6, 1.0, "ddim", 25)
    again, others = (sum((x[i] for x in seen), []) for i in (0, 1))
    assert again == prompts and not set(others) & set(seeds)  # the same prompts, other noise


def test_every_model_is_asked_the_same(monkeypatch):
    """Documents and questions follow neither from the run nor from its seed."""
    trained, heard = helpers.perturbed(), []
    monkeypatch.setattr(ablate, "perplexity", lambda model, ids: heard.append(ids) or 2.0)
    monkeypatch.setattr(
        ablate,
        "multiple_choice",
        lambda model, encode, questions, what: heard.append(questions) or {"accuracy": 0.5},
    )
    trained.model.config = replace(trained.model.config, max_position_embeddings=1024)
    for plan in (Plan(), Plan(seeds=7)):
        torch.manual_seed(plan.seeds), random.seed(plan.seeds)
        assert ablate.measure_text(trained.model, trained, plan)["knowledge"] == 0.5
    half = len(heard) // 2
    assert heard[:half] == heard[half:] and half >= 3
    assert len(heard[0]) == 200 and all(ids[-1] == trained.model.config.eos_id for ids in heard[0])
