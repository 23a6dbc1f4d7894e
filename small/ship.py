"""What the repository ships as small/checkpoint: the last checkpoint of a run, without what resuming needs.

    python evaluate.py --checkpoint runs/small --json runs/figures.json
    python -m small.ship runs/small --figures runs/figures.json

MADE.json beside it says by which commit and command it was trained, for how long, and what it can do.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from checkpoint import commit, find_checkpoint, read_info, read_metrics, saved_config, write_atomic
from config import CONFIGS, Parser, TrainConfig, rules, run_command
from load_qwen3 import ROOT, SHIPPED, read_json

FIGURES = ("split", "prompts", "sampler", "steps", "cfg", "seed", "prompt_match", "strict", "residual")
FIGURES += ("frechet", "captions_exact", "captions_cider")  # of evaluate.py's report


def main() -> None:
    parser = Parser(prog="python -m small.ship", description="Make a run's last checkpoint the shipped one.")
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--figures", required=True, help="what evaluate.py --json wrote about it")
    parser.add_argument("--out", default=str(ROOT / SHIPPED[1]), help="folder to write")
    args = parser.parse_args()
    source, out, figures = find_checkpoint(args.run), Path(args.out), read_json(Path(args.figures))
    info, saved = read_info(source), saved_config(source)
    usual = dataclasses.asdict(CONFIGS[info["name"]])
    own = {name for name, rule in rules(TrainConfig).items() if rule.resumable} - {"base", "data"}
    if any(saved[name] != value for name, value in usual.items() if name not in own):
        raise ValueError(f"{source} was trained with other flags than --config {info['name']} has")
    if out.exists():
        raise ValueError(f"{out} is there already; remove it first")
    unneeded = {"optimizer.safetensors", "model.safetensors" if info["ema"] else ""}
    shutil.copytree(source, out, ignore=lambda _, names: unneeded & set(names))
    seconds = read_metrics(source.parent / "metrics.jsonl")[-1]["seconds"]
    longer = "" if saved["steps"] == usual["steps"] else f" --steps {saved['steps']}"
    made = {"commit": commit(), "command": f"python train.py --config {info['name']}{longer}"}
    made |= {"torch": torch.__version__, "seconds": round(seconds), "base": info["fingerprint"]}
    made |= {"figures": {k: figures[k] for k in FIGURES}}
    write_atomic(out / "MADE.json", json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
