"""The paper's ablations (Section 5.1) and Table 1 at the size of `small`.

    python -m lab.ablate                    # every cell, three seeds; a cell that has a result is left out
    python -m lab.ablate --jobs 2           # the same, two cells at a time, one core each
    python -m lab.ablate --cell deep-0 --seed 1
    python -m lab.ablate --quick            # every cell for a few steps, in under a minute
    python -m lab.ablate --tables           # figures and tables of the results that are there

A cell is the `small` configuration with a few flags changed. All cells of a seed train on the same pictures
in the same order, from one pretrained tiny Qwen3. A result is one JSON file: the curve over training (without
guidance, as in the paper's Figure 3), the final figures, the FLOPs of a step, the commit and the command.

A text side that learns also reads text alone (Section 5.1.1), until its step takes about twice the FLOPs of
ours. The captions of a frozen one are then ten times as much of its loss: in the cells "light" a tenth of it.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import (
    Trained,
    commit,
    list_checkpoints,
    locked,
    read_metrics,
    resume,
    saved_config,
    write_atomic,
)
from config import CONFIGS, Bar, Parser, TrainConfig, run_command, tune_torch
from evaluate import caption_report, in_batches, load_base, text_parameters_changed
from generate import describe_images, encode_text, generate_images
from lab.language import knowledge, multiple_choice, perplexity, reasoning
from lab.metrics import frechet
from lab.report import FIGURES, write_report
from lab.watch import as_trained
from load_qwen3 import ROOT, encode_plain
from model import LMFusion
from small import pretrain
from small.world import all_scenes, prompt_match, render, text_document
from train import Run, train


@dataclass(frozen=True)
class Plan:
    """How long a cell trains and how closely it is measured."""

    steps: int = 480
    batch_size: int = 32  # half that of `small`: more steps from as much arithmetic
    every: int = 120  # steps between the points of a curve
    pictures: int = 64  # painted and described at a point of a curve
    final: int = len(all_scenes("test"))  # painted and described at the end
    questions: int = 200  # of reasoning
    documents: int = 200  # of unseen text, for its perplexity
    text_batch: int = 12  # documents a step; with them Transfusion's step takes twice the FLOPs of ours
    counted: int = 8  # steps whose FLOPs are counted
    seeds: int = 3
    ddpm: int = 250  # steps, tried on `deep-0`
    ddim: tuple[int, int, int] = (10, 25, 50)  # likewise; the middle one is that of all other figures
    base_steps: int = 2600  # of pretraining: the base of results/; `small` takes pretrain.STEPS
    runs: str = "runs/ablate"
    out: str = "lab/results"
    quick: bool = False


TINY = dict(steps=4, batch_size=4, every=2, pictures=2, final=3, questions=4, documents=4, text_batch=1)
TINY |= dict(counted=1, seeds=1, ddpm=5, ddim=(1, 2, 4), runs="runs/ablate-quick")
QUICK = Plan(**TINY, out="runs/ablate-quick/results", quick=True)
# The staged recipe that circulates for LMFusion: projections, then attention from the top layers down, then
# all. Shares of the run.
STAGED = (
    (0.0, "unet_*,boi_head"),
    (0.15, "unet_*,boi_head,layers.[45].image.self_attn.*"),
    (0.30, "unet_*,boi_head,layers.[2345].image.self_attn.*"),
    (0.45, "unet_*,boi_head,layers.*.image.self_attn.*"),
    (0.60, "*"),
)


def cells(plan: Plan) -> dict[str, dict]:
    """Name -> what differs from `small`."""

    def cell(separation: str, ratio: float, **changes) -> dict:
        text = plan.text_batch if ratio else 0
        return dict(separation=separation, lr_text_ratio=ratio, text_batch=text, steps=plan.steps) | changes

    # ten times the other loss, and ten times the clip: a tenth of the language-model loss
    small = CONFIGS["small"]
    light = dict(lambda_ddpm=10 * small.lambda_ddpm, clip=10 * small.clip)
    stages = ";".join(f"{round(share * plan.steps)}:{patterns}" for share, patterns in STAGED)
    return {
        "none-0": cell("none", 0.0),  # Figures 4 and 5
        "none-0.1": cell("none", 0.1),
        "none-1": cell("none", 1.0),
        "shallow-0": cell("shallow", 0.0),
        "deep-0": cell("deep", 0.0),  # ours: Figures 5 and 6; Table 1 at half of Transfusion's FLOPs
        "deep-0.1": cell("deep", 0.1),
        "deep-1": cell("deep", 1.0),
        "transfusion": cell("none", 1.0, from_scratch=True),  # Table 1
        "deep-0-equal": cell("deep", 0.0),  # Table 1 at equal FLOPs: its steps are computed
        "none-0-light": cell("none", 0.0, **light),
        "deep-0-light": cell("deep", 0.0, **light),
        "deep-0-no-limit": cell("deep", 0.0, noise_limit=1000),
        "deep-0-half": cell("deep", 0.0, caption_first=0.5),
        "deep-0-staged": cell("deep", 0.0, stages=stages if plan.steps >= 20 else "0:unet_*;2:*"),
    }


def configure(plan: Plan, name: str, seed: int, base: Path) -> TrainConfig:
    """The configuration of a cell; for "deep-0-equal" FLOPs are counted first."""
    own = dict(base=str(base), seed=seed, out=f"{plan.runs}/{name}-{seed}", batch_size=plan.batch_size)
    own |= dict(val_every=plan.every, checkpoint_every=plan.every, log_every=plan.every, sheet_every=0)
    own |= dict(unet_channels=(8, 12), warmup=1) if plan.quick else dict(warmup=plan.steps // 10)
    own |= cells(plan)[name]
    if name == "deep-0-equal":
        own["steps"] = equal_steps(plan, base)
    return dataclasses.replace(CONFIGS["small"], **own)


def ensure_lab_base(plan: Plan) -> Path:
    """The one base of all cells, pretrained unless a former run has left it; a quick plan has a quick one."""
    folder, how = Path(f"runs/base-small-v{pretrain.RECIPE}-0-{plan.base_steps}"), {"steps": plan.base_steps}
    if plan.quick:
        folder = Path(plan.runs) / "base"
        how = dict(steps=2, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    if not folder.is_dir():
        with locked(folder.with_name(f".{folder.name}.making")):
            print(f"pretraining a tiny Qwen3 on built-in text, once, into {folder}", flush=True)
            pretrain.pretrain_base(folder, **how)
    return folder


def count_flops(run: Run, steps: int) -> dict[str, float]:
    """FLOPs and seconds a step: each, from the third on, is timed and done again to be counted; it trains."""
    run.step, run.stages, flops, seconds = 2, [], 0.0, 0.0
    for _ in range(steps):
        start = time.perf_counter()
        run.train_step()
        seconds += time.perf_counter() - start
        run.step -= 1  # the very same batch
        with FlopCounterMode(display=False) as counter:
            run.train_step()
        flops += counter.get_total_flops()
    return {"flops_per_step": flops / steps, "seconds_per_step": seconds / steps}


@cache
def equal_steps(plan: Plan, base: Path) -> int:
    """Steps of "deep-0" that take as many FLOPs as "transfusion", for all seeds those of the first one."""
    theirs, ours = (
        count_flops(Run(configure(plan, name, 0, base), "ablation"), plan.counted)["flops_per_step"]
        for name in ("transfusion", "deep-0")
    )
    return round(plan.steps * theirs / ours)


def open_run(config: TrainConfig) -> Run:
    """A run at its start, or at its last checkpoint; ValueError if that is of another configuration."""
    run = Run(config, "ablation")
    if found := list_checkpoints(run.out):
        saved = saved_config(found[-1])
        if saved != dataclasses.asdict(config) | {"out": saved["out"], "base": saved["base"]}:
            raise ValueError(f"{run.out} holds a run of another configuration; delete it to start over")
        resume(run, found[-1])
    else:
        run.out.mkdir(parents=True, exist_ok=True)
        write_atomic(run.out / "metrics.jsonl", "")
    return run


def run_cell(plan: Plan, name: str, seed: int) -> None:
    """Train and measure one cell, or go on where it stopped; its result is written when it is whole."""
    config = configure(plan, name, seed, ensure_lab_base(plan))
    with locked(Path(config.out)):
        measure_cell(plan, name, seed, config)


def measure_cell(plan: Plan, name: str, seed: int, config: TrainConfig) -> None:
    start, run = time.perf_counter(), open_run(config)
    trained = sum(p.numel() for p in run.trained.values())
    if run.step < config.steps:
        train(run, watch=lambda run: measure(as_trained(run), plan, seed))
    lines = read_metrics(run.out / "metrics.jsonl")
    final = final_figures(as_trained(run), plan, name, seed)
    counted = count_flops(run, plan.counted)  # last, for it trains
    result = {
        "cell": name,
        "seed": seed,
        "made_by": {"commit": commit(), "command": f"python {command(plan, name, seed)}"},
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("base", "out")},
        "base_fingerprint": run.fingerprint,
        "parameters": {"trained": trained, "all": sum(p.numel() for p in run.model.parameters())},
        **counted,
        "flops": counted["flops_per_step"] * config.steps,
        "pictures_seen": config.steps * config.batch_size,
        "curve": [{"step": x["step"], **x["watched"], "val": x["val"]} for x in lines if "watched" in x],
        "final": final,
        "cell_seconds": round(time.perf_counter() - start, 1),
    }
    Path(plan.out).mkdir(parents=True, exist_ok=True)
    write_atomic(result_file(plan, name, seed), json.dumps(result, indent=1) + "\n")


def measure_text(model: LMFusion, trained: Trained, plan: Plan) -> dict[str, float]:
    """What the language model knows; documents and questions are the same for every cell and seed."""
    rng = random.Random("held-out text")
    ids = [encode_text(trained, text_document(rng), room=0) for _ in range(plan.documents)]
    found = {"perplexity": perplexity(model, [row + [model.config.eos_id] for row in ids])}
    for name, questions in (("knowledge", knowledge()), ("reasoning", reasoning(plan.questions))):
        asked = questions[:: len(questions) // 4] if plan.quick else questions
        asking = multiple_choice(model, lambda text: encode_plain(trained.tokenizer, text), asked, name)
        found[name] = asking["accuracy"]
    return found


def measure_pictures(trained: Trained, n: int, seed: int, cfg: float, sampler: str, steps: int) -> dict:
    """n held-out prompts painted: `prompt_match`, with "match" for all five; and the Frechet distance."""
    scenes = random.Random("prompts").sample(all_scenes("test"), n)
    seeds = [random.Random(f"{seed}-{i}").getrandbits(63) for i in range(n)]
    paint = partial(generate_images, trained, steps=steps, cfg=cfg, sampler=sampler)
    pictures = torch.stack(in_batches(paint, "painting", 64, [s.caption for s in scenes], seeds))
    found, real = prompt_match(scenes, pictures), render(scenes, random.Random(0))
    return {"match": found.pop("all"), **found, "frechet": frechet(pictures, real)}


def measure_captions(trained: Trained, n: int) -> dict[str, float]:
    """Captions of n held-out pictures: CIDEr and the share that is right word for word."""
    scenes = random.Random("pictures").sample(all_scenes("test"), n)
    describe = partial(describe_images, trained, max_tokens=32)
    written = in_batches(describe, "describing", 64, render(scenes, random.Random(1)))
    report = caption_report(written, [[s.caption] for s in scenes])
    return {"cider": report["cider"], "captions_exact": report["exact"]}


def measure(trained: Trained, plan: Plan, seed: int) -> dict[str, float]:
    """A point of a curve."""
    found = measure_text(trained.model, trained, plan) | measure_captions(trained, plan.pictures)
    return found | measure_pictures(trained, plan.pictures, seed, 1.0, "ddim", plan.ddim[1])


def final_figures(trained: Trained, plan: Plan, name: str, seed: int) -> dict:
    """All figures at the end of a run; those of `deep-0` under more guidance and by all samplers as well."""
    base, full = load_base(trained), name == "deep-0"

    def pictures(cfg: float, sampler: str = "ddim", steps: int = plan.ddim[1]) -> dict[str, float]:
        return measure_pictures(trained, plan.final, seed, cfg, sampler, steps)

    found = {
        "text": measure_text(trained.model, trained, plan),
        "text_of_base": measure_text(base, trained, plan),
        "text_tensors_changed": len(text_parameters_changed(trained.model, base)),
        "captions": measure_captions(trained, plan.final),
        "pictures": {str(cfg): pictures(cfg) for cfg in (1.0, 1.55, *((3.0, 5.0) if full else ()))},
    }
    if full:
        kinds = [("ddpm", plan.ddpm), *(("ddim", steps) for steps in plan.ddim)]
        found["samplers"] = {f"{kind} {steps}": pictures(1.55, kind, steps) for kind, steps in kinds}
    return found


def result_file(plan: Plan, name: str, seed: int) -> Path:
    return Path(plan.out) / f"{name}-{seed}.json"


def command(plan: Plan, name: str, seed: int) -> str:
    """What makes the result of a cell, behind "python"."""
    return f"-m lab.ablate --cell {name} --seed {seed}" + " --quick" * plan.quick


def run_all(plan: Plan, wanted: list[tuple[str, int]], jobs: int) -> None:
    """The cells that have no result yet; several at once are processes that share the cores."""
    todo = [(name, seed) for name, seed in wanted if not result_file(plan, name, seed).is_file()]
    print(f"{len(todo)} of {len(wanted)} cells to do; results in {plan.out}")
    if jobs == 1:
        for name, seed in Bar(todo, desc="cells"):
            run_cell(plan, name, seed)
        return
    ensure_lab_base(plan)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}  # for `-m`
    Path(plan.runs).mkdir(parents=True, exist_ok=True)

    def work(cell: tuple[str, int]) -> None:
        name, seed = cell
        with open(Path(plan.runs) / f"{name}-{seed}.log", "wb") as log:
            args = [sys.executable, *command(plan, name, seed).split()]
            status = subprocess.run(args, env=environment, stdout=log, stderr=log).returncode
        if status:
            raise ValueError(f"cell {name} of seed {seed} ended with status {status}; see {log.name}")

    with ThreadPoolExecutor(jobs) as pool:
        list(Bar(pool.map(work, todo), total=len(todo), desc="cells"))


def parse(args: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the plan and the names of the cells that it means."""
    parser = Parser(prog="python -m lab.ablate", description="The paper's ablations at laptop size.")
    add = parser.add_argument
    add("--quick", action="store_true", help="a few steps of every cell, into runs/ablate-quick")
    add("--cell", help="only this cell, or those that fit a pattern like 'deep-*'")
    add("--seed", type=int, help="only this seed")
    add("--seeds", type=int, help="how many seeds (3; with --quick 1)")
    add("--jobs", type=int, default=1, help="cells at a time")
    add("--tables", action="store_true", help="only draw figures and write tables of the results there are")
    args = parser.parse_args(args)
    args.plan = QUICK if args.quick else Plan()
    args.seeds = args.plan.seeds if args.seeds is None else args.seeds
    args.names = fnmatch.filter(cells(args.plan), args.cell or "*")
    if not args.names:
        raise ValueError(f"--cell {args.cell} fits none of {', '.join(cells(args.plan))}")
    for flag, value, low in (("seed", args.seed, 0), ("seeds", args.seeds, 1), ("jobs", args.jobs, 1)):
        if value is not None and not low <= value < 1000:
            raise ValueError(f"--{flag} is {value}; it must be from {low} to 999")
    return args


def main() -> None:
    """Run what is missing, the cells of the paper's figures first; then draw and write the report."""
    args = parse()
    tune_torch()
    seeds = [args.seed] if args.seed is not None else list(range(args.seeds))
    shown = {name for names in FIGURES.values() for name in names}
    wanted = [(name, seed) for seed in seeds for name in args.names]
    wanted.sort(key=lambda cell: cell[0] not in shown)
    if not args.tables:
        run_all(args.plan, wanted, args.jobs)
    for path in write_report(Path(args.plan.out)):
        print(path)


if __name__ == "__main__":
    run_command(main)
