"""Mistakes of a user: each ends in one line that names the thing, a status that is not 0, and nothing broken.

A case is a command line, what its one line on stderr must say, and what to prepare. `@base`, `@run`,
`@shapes`, `@photos` and `@edits` stand for the folders of small.py; other paths are relative to a fresh
folder, and `~` is a blank.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import helpers
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from checkpoint import list_checkpoints
from small import pretrain

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@dataclass
class Case:
    """A mistake: the words its message must hold, and what to do to a fresh folder before."""

    module: ModuleType
    args: str
    says: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda here: None


def expand(args: str) -> list[str]:
    """`@name` -> a folder, `~` inside a word -> a blank, `''` -> an empty word."""
    folders = {"@base": helpers.base, "@other": helpers.other_base, "@photos": helpers.photos}
    folders |= {"@run": helpers.photo_run, "@shapes": helpers.shapes_run, "@edits": helpers.edits}
    words = [str(folders[w]()) if w in folders else w for w in args.split()]
    return ["" if w == "''" else w.replace("~", " ") for w in words]


def one_line(result: helpers.Result) -> str:
    """The only line of an error, without argparse's usage in front of it."""
    assert "Traceback" not in result.err
    lines = [x for x in result.err.splitlines() if x.strip()]
    while lines and (lines[0].startswith(("usage:", " ", "skipped "))):
        lines.pop(0)
    assert len(lines) == 1, result.err
    assert len(lines[0]) < 1500
    return lines[0]


def good_files(here: Path) -> dict[str, str]:
    ours = (
        helpers.base,
        helpers.other_base,
        helpers.photos,
        helpers.edits,
        helpers.photo_run,
        helpers.shapes_run,
    )
    return helpers.files(here, *(folder() for folder in ours))


def check(case: Case, here: Path) -> helpers.Result:
    case.prepare(here)
    args = expand(case.args)
    before = good_files(here)
    result = helpers.call(case.module, *args, folder=here)
    after = good_files(here)
    assert result.status not in (0, None), result.out
    line = one_line(result)
    for words in case.says:
        assert words in line, line
    assert {k: after.get(k) for k in before} == before
    assert not [name for name in after if name.endswith(".tmp")]
    if case.module is train:
        assert after.keys() == before.keys()
    return result


# ---- what the folders look like ----


def copy_base(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        change(Path(shutil.copytree(helpers.base(), here / "base")))

    return prepare


def base_config(**changes: object) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        raw = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**raw, **changes}))

    return copy_base(change)


def copy_run(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A copy of the photo run as `run`, with a change to its checkpoint folder."""

    def prepare(here: Path) -> None:
        change(list_checkpoints(Path(shutil.copytree(helpers.photo_run(), here / "run")))[-1])

    return prepare


def run_info(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        info = json.loads((folder / "checkpoint.json").read_text())
        info |= changes
        (folder / "checkpoint.json").write_text(json.dumps(info))

    return copy_run(change)


def run_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        info = json.loads((folder / "checkpoint.json").read_text())
        info["config"] |= changes
        (folder / "checkpoint.json").write_text(json.dumps(info))

    return copy_run(change)


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


def write(name: str, data: bytes = b"") -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(data)

    return prepare


def without_chat_tokens(base: Path) -> None:
    text = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|im_begin|>"))


def broken_pictures(here: Path) -> None:
    helpers.write_photos(here / "broken", n=3)
    for path in (here / "broken").glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])


def half_picture(here: Path) -> None:
    Image.effect_noise((64, 64), 80).save(here / "half.png")
    (here / "half.png").write_bytes((here / "half.png").read_bytes()[:1500])


# ---- the table ----

TINY = "--config small --unet-channels 8,12 --batch-size 2 --steps 1 --out new"
FEW = f"{TINY} --image-size 16 --latent-patch 4 --latent-channels 8"
PHOTO = f"{FEW} --data @photos --base"
TEXT = "--lr-text-ratio 0.1 --text-batch 2 --text-data"
TRAIN = {
    # flags
    "no configuration": ("", ("required", "--config")),
    "unknown configuration": ("--config huge", ("huge", "small")),
    "a flag with a letter swapped": ("--config small --stpes 5", ("--stpes", "--steps")),
    "an abbreviated flag": ("--config small --batch 5", ("--batch", "--batch-size")),
    "a flag like no other": ("--config small --frobnicate 5", ("--frobnicate", "--lr-text-ratio")),
    "a word without a flag": ("--config small now", ("now",)),
    "a flag without its value": ("--config small --steps", ("--steps", "one argument")),
    "text for a whole number": ("--config small --steps many", ("--steps", "many")),
    "a fraction for a whole number": ("--config small --batch-size 2.5", ("--batch-size", "2.5")),
    "text for a number": ("--config small --lr fast", ("--lr", "fast")),
    "neither yes nor no": ("--config small --unet-attention maybe", ("--unet-attention", "maybe", "true")),
    "no list of numbers": ("--config small --unet-channels 8x16", ("--unet-channels", "8x16", "48,96")),
    "unknown choice of dtype": ("--config small --dtype float16", ("--dtype", "float16", "bfloat16")),
    "unknown separation": ("--config small --separation wide", ("--separation", "wide", "shallow")),
    "unknown optimizer": ("--config small --optimizer sgd", ("--optimizer", "sgd", "muon")),
    # values
    "no steps": ("--config small --steps 0", ("--steps is 0", "above 0")),
    "a negative batch": ("--config small --batch-size -4", ("--batch-size is -4", "above 0")),
    "a learning rate of zero": ("--config small --lr 0", ("--lr is 0", "above 0")),
    "a learning rate that is no number": ("--config small --lr nan", ("--lr is nan",)),
    "a negative warm-up": ("--config small --warmup -1", ("--warmup is -1", "at least 0")),
    "a negative weight decay": ("--config small --weight-decay -0.1", ("--weight-decay is -0.1",)),
    "a share above one": (
        "--config small --caption-first 1.5",
        ("--caption-first is 1.5", "at least 0 and at most 1"),
    ),
    "a negative share": ("--config small --caption-drop -0.1", ("--caption-drop is -0.1",)),
    "a share of edits above one": ("--config small --edit-drop 2", ("--edit-drop is 2.0",)),
    "a negative rate of the row for BOI": ("--config small --draw-lr-ratio -1", ("--draw-lr-ratio is -1",)),
    "an average that never moves": ("--config small --ema 1", ("--ema is 1",)),
    "an average beyond one": ("--config small --ema 2", ("--ema is 2",)),
    "a negative number of texts": ("--config small --text-batch -1", ("--text-batch is -1", "at least 0")),
    "text alone for a text that is frozen": (
        "--config small --text-batch 8",
        ("--text-batch trains nothing", "frozen", "--lr-text-ratio"),
    ),
    "random text weights that stay so": (
        "--config small --from-scratch true",
        ("--from-scratch trains nothing", "frozen", "--lr-text-ratio"),
    ),
    "a file of text for nothing": (
        "--config small --text-data words.txt",
        ("--text-data words.txt goes with --text-batch",),
    ),
    "stages without a step": ("--config small --stages unet_*", ("--stages", "'unet_*'", "STEP:PATTERN")),
    "stages that start late": ("--config small --stages 5:*", ("--stages 5:*", "begin with 0")),
    "a stage of nothing": (
        f"{PHOTO} @base --stages 0:*;2:none.*",
        ("--stages: none.* fits no trained parameter; some are ", "unet_"),
    ),
    "more timesteps than there are": ("--config small --noise-limit 1001", ("--noise-limit is 1001", "1000")),
    "a size that is no multiple": ("--config small --image-size 30", ("--image-size 30", "--latent-patch 8")),
    "more channels than numbers": ("--config small --latent-channels 193", ("--latent-channels 193", "192")),
    "one width for two": ("--config small --unet-channels 8", ("--unet-channels", "two positive numbers")),
    "a width of zero": ("--config small --unet-channels 0,8", ("--unet-channels", "positive")),
    "a width that is odd": (f"{PHOTO} @base --unet-channels 7,8", ("unet_channels", "7")),
    "a width that no group divides": (f"{PHOTO} @base --unet-channels 8,9", ("unet_channels", "9")),
    "a width that no head divides": (
        f"{PHOTO} @base --unet-channels 8,196 --unet-attention true",
        ("unet_channels", "196"),
    ),
    "shapes of another size": (
        "--config small --image-size 32 --base @base",
        ("64 pixels", "--image-size is 32"),
    ),
    "an unknown device": (f"{PHOTO} @base --device tpu", ("--device tpu",)),
    "a device that is not there": (f"{PHOTO} @base --device cuda", ("--device cuda",)),
    "a device that computes nothing": (f"{PHOTO} @base --device meta", ("--device meta",)),
    "a seed beyond 64 bits": (f"{PHOTO} @base --seed {10**30}", ("--seed", str(10**30))),
    # the base
    "no such base": (f"{PHOTO} nowhere", ("nowhere: no such folder", "hub id")),
    "a hub id without a network": (f"{PHOTO} nobody/nothing", ("nobody/nothing", "could not be downloaded")),
    "a base that is empty": (
        f"{PHOTO} base",
        ("base/config.json: no such file",),
        lambda h: (h / "base").mkdir(),
    ),
    "a base whose config is cut": (f"{PHOTO} base", ("config.json", "JSON"), copy_base(cut("config.json"))),
    "a mixture of experts": (f"{PHOTO} base", ("num_experts = 8",), base_config(num_experts=8)),
    "another architecture": (f"{PHOTO} base", ("model_type", "gemma"), base_config(model_type="gemma")),
    "stretched RoPE": (
        f"{PHOTO} base",
        ("rope_scaling", "yarn"),
        base_config(rope_scaling={"rope_type": "yarn"}),
    ),
    "a sliding window": (
        f"{PHOTO} base",
        ("use_sliding_window = true",),
        base_config(use_sliding_window=True),
    ),
    "quantised weights": (
        f"{PHOTO} base",
        ("quantization_config",),
        base_config(quantization_config={"bits": 4}),
    ),
    "sizes that do not fit": (
        f"{PHOTO} base",
        ("tensor model.", "not floats ("),
        base_config(intermediate_size=50),
    ),
    "a negative size": (f"{PHOTO} base", ("hidden_size = -32",), base_config(hidden_size=-32)),
    "heads that do not group": (
        f"{PHOTO} base",
        ("num_key_value_heads = 3",),
        base_config(num_key_value_heads=3),
    ),
    "a context too short for a picture": (
        f"{PHOTO} base",
        ("max_position_embeddings",),
        base_config(max_position_embeddings=6),
    ),
    "a base whose weights are cut": (
        f"{PHOTO} base",
        ("model.safetensors", "not a whole"),
        copy_base(cut("model.safetensors")),
    ),
    "a base without weights": (
        f"{PHOTO} base",
        ("neither model.safetensors nor",),
        copy_base(lambda b: (b / "model.safetensors").unlink()),
    ),
    "a base without a tokenizer": (
        f"{PHOTO} base",
        ("tokenizer.json: no such file",),
        copy_base(lambda b: (b / "tokenizer.json").unlink()),
    ),
    "a tokenizer that is cut": (
        f"{PHOTO} base",
        ("tokenizer.json: not a tokenizer file",),
        copy_base(cut("tokenizer.json")),
    ),
    # data
    "no such data": (f"{FEW} --base @base --data nowhere", ("nowhere: no such file or folder",)),
    "a pattern that matches nothing": (
        f"{FEW} --base @base --data none-*.tar",
        ("none-*.tar", "matches nothing"),
    ),
    "a folder without pictures": (
        f"{FEW} --base @base --data empty",
        ("empty: no captioned pictures",),
        lambda h: (h / "empty").mkdir(),
    ),
    "no good sample": (
        f"{FEW} --base @base --data broken",
        ("broken: no captioned pictures", "3 of 3", "000.png"),
        broken_pictures,
    ),
    "one picture": (
        f"{FEW} --base @base --data one",
        ("too few pictures",),
        lambda h: helpers.write_photos(h / "one", n=1),
    ),
    "a file that is no tar": (
        f"{FEW} --base @base --data x.tar",
        ("x.tar: not an uncompressed tar",),
        write("x.tar", b"x" * 2000),
    ),
    "no such validation data": (f"{PHOTO} @base --val-data nowhere", ("nowhere: no such file or folder",)),
    "validation data for the built-in shapes": (f"{TINY} --base @base --val-data nowhere", ("--val-data",)),
    "no such file of text": (f"{PHOTO} @base {TEXT} none.txt", ("--text-data none.txt", "No such file")),
    "a folder for a file of text": (f"{PHOTO} @base {TEXT} .", ("--text-data .", "directory")),
    "a file of text that is empty": (
        f"{PHOTO} @base {TEXT} empty.txt",
        ("--text-data empty.txt: no paragraph in it",),
        write("empty.txt"),
    ),
    "a file of text that is not UTF-8": (
        f"{PHOTO} @base {TEXT} odd.txt",
        ("--text-data odd.txt", "utf-8"),
        write("odd.txt", b"caf\xe9 " * 20),
    ),
    # runs
    "a run that is already there": (
        "--config small --base @base --out run",
        ("run already holds a run (step-000002)", "--resume"),
        copy_run(lambda _: None),
    ),
    "nothing to resume": ("--config small --resume --out new", ("--resume: new holds no checkpoint",)),
    "another batch size on resuming": (
        "--config small --resume --out run --batch-size 7",
        ("--resume: batch_size was 6", "cannot become 7"),
        copy_run(lambda _: None),
    ),
    "another separation on resuming": (
        "--config small --resume --out run --separation none",
        ("separation was deep", "none"),
        copy_run(lambda _: None),
    ),
    "another base on resuming": (
        "--config small --resume --out run --base @other --steps 3",
        ("is not the language model", "other-base"),
        copy_run(lambda _: None),
    ),
    "half a checkpoint.json on resuming": (
        "--config small --resume --out run --steps 3",
        ("checkpoint.json", "JSON"),
        copy_run(cut("checkpoint.json")),
    ),
    "half the weights on resuming": (
        "--config small --resume --out run --steps 3",
        ("model.safetensors: not a whole safetensors file",),
        copy_run(cut("model.safetensors")),
    ),
    "no optimizer on resuming": (
        "--config small --resume --out run --steps 3",
        ("optimizer.safetensors: no such file",),
        copy_run(lambda f: (f / "optimizer.safetensors").unlink()),
    ),
    "a configuration without a field on resuming": (
        "--config small --resume --out run --steps 3",
        ("checkpoint.json", "activation_checkpointing"),
        run_info(config={}),
    ),
    "a configuration that is none on resuming": (
        "--config small --resume --out run --steps 3",
        ("checkpoint.json",),
        run_info(config=None),
    ),
    "a number that is a word on resuming": (
        "--config small --resume --out run --steps 3",
        ("checkpoint.json", "warmup"),
        run_config(warmup="few"),
    ),
    "a step that is no number on resuming": (
        "--config small --resume --out run --steps 3",
        ("checkpoint.json", "step"),
        run_info(step="two"),
    ),
    # tasks
    "an unknown task": ("--config small --task paint", ("--task paint", "caption, generate, edit, chat")),
    "an unknown task among others": ("--config small --task edit=2,draw=1", ("'draw' is not one of",)),
    "a task too few": ("--config small --task edit,", ("--task edit,", "'' is not one of")),
    "a weight without its task": ("--config small --task =2", ("'' is not one of",)),
    "a weight that is a word": ("--config small --task edit=much", ("the weight 'much' of edit",)),
    "a weight that is missing": ("--config small --task edit=", ("the weight '' of edit",)),
    "a weight of zero": ("--config small --task edit=0,chat=1", ("weight of edit must be positive",)),
    "a negative weight": ("--config small --task chat=-1", ("weight of chat must be positive",)),
    "a weight without bounds": ("--config small --task chat=inf", ("weight of chat must be positive",)),
    "a weight that is no number": ("--config small --task chat=nan", ("weight of chat must be positive",)),
    "edits without sources": (
        f"{PHOTO} @base --task edit",
        ("no edits: rows of a metadata.jsonl with source, text and file_name",),
    ),
    "a mixture with edits without sources": (f"{PHOTO} @base --task generate,edit", ("no edits",)),
    "one edit": (
        f"{FEW} --base @base --data one --task edit",
        ("too few edits",),
        lambda h: helpers.write_edits(h / "one", n=1),
    ),
    "captions of edits": (
        f"{FEW} --base @base --data @edits --task caption",
        ("no captioned pictures", "24 edits", "--task edit"),
    ),
    "conversations about edits alone": (
        f"{FEW} --base @base --data @edits --task chat",
        ("no captioned pictures", "24 edits"),
    ),
    "other edits for validation": (
        f"{FEW} --base @base --data @edits --task edit --val-data @edits",
        ("--val-data", "every 20th edit of --data"),
    ),
    "conversations on a base without chat tokens": (
        f"{PHOTO} base --task chat",
        ("--task chat", "no chat tokens (<|im_start|>)"),
        copy_base(without_chat_tokens),
    ),
    # the first stage
    "the second stage without the first": (
        "--config small-chat",
        ("--init-from runs/small: no such folder", "train a first stage"),
    ),
    "no such first stage": (f"{PHOTO} @base --init-from nowhere", ("--init-from nowhere: no such folder",)),
    "a first stage that is a file": (
        f"{PHOTO} @base --init-from file",
        ("--init-from file: no such folder",),
        write("file", b"x"),
    ),
    "a first stage that has no checkpoint": (
        f"{PHOTO} @base --init-from empty",
        ("--init-from empty: holds no checkpoint",),
        lambda h: (h / "empty").mkdir(),
    ),
    "half a checkpoint.json of the first stage": (
        f"{PHOTO} @base --init-from run",
        ("run/step-000002/checkpoint.json", "JSON"),
        copy_run(cut("checkpoint.json")),
    ),
    "a first stage of another program": (
        f"{PHOTO} @base --init-from run",
        ("checkpoint.json: config is missing",),
        copy_run(lambda f: (f / "checkpoint.json").write_text("{}")),
    ),
    "a field too few in the first stage": (
        f"{PHOTO} @base --init-from run",
        ("checkpoint.json: field activation_checkpointing of config is missing",),
        run_info(config={}),
    ),
    "half the weights of the first stage": (
        f"{PHOTO} @base --init-from run",
        ("run/step-000002/model.safetensors: not a whole safetensors file",),
        copy_run(cut("model.safetensors")),
    ),
    "a first stage without its latents": (
        f"{PHOTO} @base --init-from run",
        ("latents.safetensors: no such file",),
        copy_run(lambda f: (f / "latents.safetensors").unlink()),
    ),
    "another base than the first stage's": (
        f"{PHOTO} @other --init-from @run",
        ("other-base is not the language model that", "was trained on"),
    ),
    "the base of the first stage is gone": (
        f"{FEW} --data @photos --init-from run",
        ("/gone: no such folder",),
        run_info(base="/gone"),
    ),
    "another model than the first stage's": (
        f"{PHOTO} @base --init-from @run --prediction eps",
        ("--init-from", "prediction was x there and cannot become eps"),
    ),
    "other sizes than the first stage's": (
        f"{PHOTO} @base --init-from @run --unet-channels 8,16",
        ("unet_channels was (8, 12) there and cannot become (8, 16)",),
    ),
    "latents of a VAE in the first stage, linear ones in the second": (
        f"{PHOTO} @base --init-from run --vae ''",
        ("--data", "are not by the VAE that run/step-000002 was trained with"),
        run_info(vae={"path": "/gone", "fingerprint": "0"}),
    ),
    "linear latents of the first stage, a VAE of the second": (
        f"{PHOTO} @base --init-from @run --vae nowhere",
        ("nowhere",),
    ),
    # places
    "an output folder that is a file": (f"{PHOTO} @base --out taken", ("taken",), write("taken")),
    "an output folder below a file": (f"{PHOTO} @base --out taken/run", ("taken",), write("taken")),
}
SAMPLE = {
    "nothing to do": ("", ("nothing to do", "--prompt")),
    "a mistyped flag": ("--promt red", ("--promt", "--prompt")),
    "a prompt without its flag": ("red circle", ("red",)),
    "an empty prompt": ("--prompt ''", ("--prompt is empty",)),
    "a prompt of blanks": ("--prompt ~~~", ("--prompt is empty",)),
    "no such file of prompts": ("--prompts none.txt", ("--prompts none.txt", "No such file")),
    "an empty file of prompts": (
        "--prompts p.txt",
        ("--prompts p.txt", "no line with text"),
        write("p.txt", b"\n  \n"),
    ),
    "a folder for a file of prompts": ("--prompts .", ("--prompts .", "directory")),
    "prompts that are not UTF-8": (
        "--prompts p.txt",
        ("--prompts p.txt", "utf-8"),
        write("p.txt", b"caf\xe9 \xff\n"),
    ),
    "no pictures": ("--prompt red --n 0", ("--n is 0", "from 1")),
    "text for a count": ("--prompt red --n two", ("--n", "two")),
    "no steps": ("--prompt red --steps 0", ("--steps is 0",)),
    "too many steps": ("--prompt red --steps 1001", ("--steps is 1001", "1000")),
    "guidance that is no number": ("--prompt red --cfg nan", ("--cfg is nan",)),
    "guidance beyond reason": ("--prompt red --cfg 1e9", ("--cfg is 1000000000.0",)),
    "a negative seed": ("--prompt red --seed -1", ("--seed is -1",)),
    "no probability": ("--text red --top-p 0", ("--top-p is 0.0",)),
    "a negative k": ("--text red --top-k -1", ("--top-k is -1",)),
    "a negative temperature": ("--text red --temperature -1", ("--temperature is -1.0",)),
    "no tokens": ("--text red --max-tokens 0", ("--max-tokens is 0",)),
    "an unknown sampler": ("--prompt red --sampler euler", ("--sampler", "euler", "ddim")),
    "an unknown device": ("--prompt red --checkpoint @run --device tpu", ("--device tpu",)),
    "a device that is not there": ("--prompt red --checkpoint @run --device cuda", ("--device cuda",)),
    "a device that computes nothing": ("--prompt red --checkpoint @run --device meta", ("--device meta",)),
    "no last run": ("--chat", ("no --checkpoint given", "train.py --config small-chat")),
    "no such checkpoint": ("--prompt red --checkpoint gone", ("gone: no such folder",)),
    "a folder without a checkpoint": ("--prompt red --checkpoint .", ("holds no checkpoint",)),
    "half a checkpoint": (
        "--prompt red --checkpoint run",
        ("model.safetensors: not a whole",),
        copy_run(cut("model.safetensors")),
    ),
    "a checkpoint without latents": (
        "--prompt red --checkpoint run",
        ("latents.safetensors: no such file",),
        copy_run(lambda f: (f / "latents.safetensors").unlink()),
    ),
    "a checkpoint of another program": (
        "--prompt red --checkpoint run",
        ("checkpoint.json: not a checkpoint",),
        copy_run(lambda f: (f / "checkpoint.json").write_text("{}")),
    ),
    "a checkpoint whose base is gone": (
        "--prompt red --checkpoint run",
        ("/gone: no such folder", "if it was moved", "--base"),
        run_info(base="/gone"),
    ),
    "another base": ("--prompt red --checkpoint @run --base @other", ("is not the language model", "--base")),
    "a prompt longer than the context": (
        f"--checkpoint @run --prompt {'~'.join(['red'] * 100)}",
        ("red red", "100 tokens long", "room for 91"),
    ),
    "a text longer than the context": (
        f"--checkpoint @run --text {'~'.join(['red'] * 100)} --max-tokens 10",
        ("100 tokens long", "room for 86"),
    ),
    "an empty text": ("--checkpoint @run --text ''", ("the text to continue is empty",)),
    "no such picture": ("--checkpoint @run --caption none.png", ("none.png: No such file",)),
    "a caption of a text file": (
        "--checkpoint @run --caption p.png",
        ("p.png: not a PNG, JPEG or WebP",),
        write("p.png", b"red"),
    ),
    "a caption of half a picture": (
        "--checkpoint @run --caption half.png",
        ("half.png: ", "image"),
        half_picture,
    ),
    "a caption of a folder": ("--checkpoint @run --caption .", (".: Is a directory",)),
    "an unknown ending": ("--checkpoint @run --prompt red --steps 1 --out p.xyz", ("p.xyz", ".xyz")),
    "a folder that is not empty": (
        "--checkpoint @run --prompt red --steps 1 --out full",
        ("full is not empty", "--out"),
        write("full/notes.md", b"mine"),
    ),
    "a file in the place of a folder": (
        "--checkpoint @run --prompt red --steps 1 --out taken",
        ("taken",),
        write("taken"),
    ),
    "labels in a folder": (
        "--checkpoint @run --prompt red --steps 1 --out pictures --labels",
        ("--labels is for a sheet", "pictures is a folder"),
    ),
    "an ending that can only be read": (
        "--checkpoint @run --prompt red --steps 1 --out p.psd",
        ("p.psd", ".psd"),
    ),
    "a film without motion": ("--checkpoint @run --prompt red --steps 2 --gif f.jpg", ("f.jpg", ".jpg")),
    "a folder for a picture": (
        "--checkpoint @run --prompt red --steps 1 --out p.png",
        ("p.png", "folder"),
        lambda h: (h / "p.png").mkdir(),
    ),
    "a caption longer than the context": (
        "--checkpoint @run --caption p.png --max-tokens 91",
        ("room for 90 tokens", "91"),
        lambda h: Image.new("RGB", (20, 20)).save(h / "p.png"),
    ),
    "an unknown ending of the film": (
        "--checkpoint @run --prompt red --steps 1 --gif f.xyz",
        ("f.xyz", ".xyz"),
    ),
    "a picture below a file": (
        "--checkpoint @run --prompt red --steps 1 --out taken/p.png",
        ("taken",),
        write("taken"),
    ),
}
EVALUATE = {
    "a mistyped flag": ("--chekpoint run", ("--chekpoint", "--checkpoint")),
    "no prompts": ("--n 0", ("--n is 0",)),
    "more prompts than there are": ("--n 100000", ("--n is 100000", "held-out combinations")),
    "text for a number": ("--cfg strong", ("--cfg", "strong")),
    "no such checkpoint": ("--checkpoint gone", ("gone: no such folder",)),
    "no steps": ("--checkpoint @shapes --n 1 --steps 0", ("--steps", "0")),
    "an unknown device": ("--checkpoint @shapes --n 1 --steps 1 --device tpu", ("--device tpu",)),
    "a device that is not there": ("--checkpoint @shapes --n 1 --steps 1 --device cuda", ("--device cuda",)),
    "guidance that is no number": ("--checkpoint @shapes --n 1 --steps 1 --cfg nan", ("--cfg is nan",)),
    "pictures of another size": ("--checkpoint @run", ("16 pixels", "64")),
    "another base": ("--checkpoint @shapes --base @other", ("is not the language model",)),
    "figures below a file": (
        "--checkpoint @shapes --n 1 --steps 1 --json taken/r.json",
        ("taken",),
        write("taken"),
    ),
    "a sheet with an unknown ending": ("--checkpoint @shapes --n 1 --steps 1 --sheet s.xyz", ("s.xyz",)),
    # files of one's own
    "captions of nothing": ("--checkpoint @run --captions c.json", ("--captions c.json goes with --data",)),
    "captions below a file": (
        "--checkpoint @run --data @photos --captions taken/c.json",
        ("taken",),
        write("taken"),
    ),
    "captions without words": ("--checkpoint @run --data @photos --max-tokens 0", ("--max-tokens is 0",)),
    "captions longer than the context": (
        "--checkpoint @run --data @photos --max-tokens 91",
        ("room for 90 tokens", "91"),
    ),
    "no such pictures": ("--checkpoint @run --data nowhere", ("nowhere: no such file or folder",)),
    "no captioned pictures": ("--checkpoint @run --data @edits", ("no captioned pictures", "24 edits")),
    "no such text": ("--checkpoint @run --text none.txt", ("--text none.txt", "No such file")),
    "an empty text": (
        "--checkpoint @run --text t.txt",
        ("--text t.txt: no paragraph in it",),
        write("t.txt", b"\n\nshort\n\n"),
    ),
    "a paragraph longer than the context": (
        "--checkpoint @run --text t.txt",
        ("red and blue", "tokens long", "room for 96"),
        write("t.txt", b"red and blue " * 50),
    ),
    "no such questions": ("--checkpoint @run --choices none.jsonl", ("none.jsonl: No such file",)),
    "a question without its label": (
        "--checkpoint @run --choices q.jsonl",
        ("q.jsonl: line 2", '"label"'),
        write("q.jsonl", b'\n{"context": "a", "choices": ["b", "c"]}\n'),
    ),
    "no questions": (
        "--checkpoint @run --choices q.jsonl",
        ("q.jsonl: no question in it",),
        write("q.jsonl"),
    ),
}
CASES = [
    pytest.param(
        Case(module, *row),
        id=f"{module.__name__}: {name}",
        marks=[NO_CUDA] if name == "a device that is not there" else [],
    )
    for module, table in ((train, TRAIN), (sample, SAMPLE), (evaluate, EVALUATE))
    for name, row in table.items()
]


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_in_one_line_that_names_it(case, tmp_path):
    check(case, tmp_path)


def test_the_table_is_long_enough():
    assert len(CASES) >= 40


# ---- what happens on the way ----


def start(here: Path, *more: object) -> helpers.Result:
    return helpers.call(train, *helpers.photo_flags(Path("run"), "--steps", 6, *more), folder=here)


@pytest.mark.parametrize("after", (0, 3))
@pytest.mark.parametrize(
    "signals, saves",
    (("SIGINT", True), ("SIGTERM", True), ("SIGTERM SIGTERM", True), ("SIGINT SIGINT", False)),
)
def test_an_interrupt_ends_in_one_line_that_says_where_it_goes_on(
    tmp_path, monkeypatch, signals, saves, after
):
    """Asked once, a run ends with a checkpoint of the step it was in; after a second Ctrl-C, at once."""
    train_step = train.Run.train_step

    def interrupted(run):
        if run.step == after:
            for name in signals.split():
                signal.raise_signal(getattr(signal, name))
        return train_step(run)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process may ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(train.Run, "train_step", interrupted)
            result = start(tmp_path, "--checkpoint-every", 2)
    finally:
        signal.signal(signal.SIGINT, former)
    step = after + saves
    line, left = one_line(result), [p.name for p in list_checkpoints(tmp_path / "run")]
    assert result.status == 130 and line.startswith(f"interrupted: at step {step}; ")
    if step:
        name = f"step-{step if saves else 2:06d}"
        assert line.endswith(f"--resume goes on from {name}") and left == [name]
        assert start(tmp_path, "--resume", "--checkpoint-every", 2).status == 0
    else:
        assert line.endswith("no checkpoint had been written yet") and not left
        assert start(tmp_path).status == 0  # nothing stands in the way of a fresh start


def test_a_job_in_the_background_that_ignores_ctrl_c_goes_on_ignoring_it(tmp_path, monkeypatch):
    train_step, former = train.Run.train_step, signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupted = lambda run: (signal.raise_signal(signal.SIGINT), train_step(run))[1]  # noqa: E731
    try:
        monkeypatch.setattr(train.Run, "train_step", interrupted)
        assert start(tmp_path).status == 0 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_ctrl_c_while_the_base_is_made_leaves_no_half_base(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("small.pretrain.train_tokenizer", interrupted)
    result = helpers.call(pretrain, "--out", "a/base", folder=tmp_path)
    assert result.status == 130 and one_line(result) == "interrupted"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module, name", ((sample, "generate_images"), (evaluate, "generate_images")))
def test_ctrl_c_while_painting_writes_nothing(tmp_path, monkeypatch, module, name):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, interrupted)
    flags = ("--prompt", "red", "--out", "out.png") if module is sample else ("--json", "out.json")
    result = helpers.call(module, "--checkpoint", helpers.shapes_run(), *flags, folder=tmp_path)
    assert result.status == 130 and one_line(result) == "interrupted"
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_ends_in_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    assert start(tmp_path, "--steps", 2).status == 0
    before = helpers.files(tmp_path / "run" / "step-000002")
    real = train.losses
    monkeypatch.setattr(train, "losses", lambda *a: {k: v * math.nan for k, v in real(*a).items()})
    result = helpers.call(train, *helpers.photo_flags(Path("run"), "--resume", "--steps", 4), folder=tmp_path)
    assert result.status == 2 and "the loss is nan at step 3" in one_line(result)
    assert helpers.files(tmp_path / "run" / "step-000002") == before
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-000002"]


def test_a_disk_full_at_a_checkpoint_ends_in_one_line_and_keeps_the_last_one(tmp_path, monkeypatch):
    assert start(tmp_path, "--steps", 2).status == 0
    before = helpers.files(tmp_path / "run" / "step-000002")
    monkeypatch.setattr(train, "draw_sheets", lambda run: None)
    with helpers.small_disk(50_000):
        result = helpers.call(
            train, *helpers.photo_flags(Path("run"), "--resume", "--steps", 4), folder=tmp_path
        )
    line = one_line(result)
    assert result.status == 2 and "run/step-000004 could not be written" in line and "too large" in line
    assert helpers.files(tmp_path / "run" / "step-000002") == before
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-000002"]
    assert not list((tmp_path / "run").glob(".*"))
    flags = helpers.photo_flags(Path("run"), "--resume", "--steps", 4)
    assert helpers.call(train, *flags, folder=tmp_path).status == 0


def test_a_disk_full_at_a_sheet_or_a_line_of_metrics_is_named(tmp_path):
    assert start(tmp_path, "--steps", 2).status == 0
    for limit, name in ((5_000, "sheet-000004.png"), (200, "metrics.jsonl")):
        flags = helpers.photo_flags(Path("run"), "--resume", "--steps", 4)
        with helpers.small_disk(limit):
            result = helpers.call(train, *flags, folder=tmp_path)
        assert result.status == 2 and name in one_line(result)
        assert not list((tmp_path / "run").glob(".*"))


def test_a_disk_full_at_a_picture_names_it_and_keeps_the_old_one(tmp_path):
    flags = ("--checkpoint", helpers.shapes_run(), "--prompt", "red", "--steps", 1, "--out", "p.png")
    helpers.good(sample, *flags, folder=tmp_path)
    before = helpers.files(tmp_path)
    with helpers.small_disk(1000):
        result = helpers.call(sample, *flags, "--seed", 1, folder=tmp_path)
    assert result.status == 2 and "p.png" in one_line(result)
    assert helpers.files(tmp_path) == before


@pytest.mark.parametrize(
    "flags",
    (
        ("--out", "p.xyz"),
        ("--out", "taken"),
        ("--out", "taken/p.png"),
        ("--gif", "f.xyz"),
        ("--gif", "taken/f.gif"),
    ),
)
def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch, flags):
    (tmp_path / "taken").write_text("")
    painted = []
    monkeypatch.setattr(sample, "generate_images", lambda *a: painted.append(a))
    result = helpers.call(
        sample, "--checkpoint", helpers.shapes_run(), "--prompt", "red", *flags, folder=tmp_path
    )
    assert result.status == 2 and flags[1].split("/")[0] in one_line(result)
    assert not painted


def test_a_good_picture_stays_when_the_film_beside_it_cannot_be_written(tmp_path):
    flags = ("--checkpoint", helpers.shapes_run(), "--prompt", "red", "--steps", 1, "--out", "p.png")
    helpers.good(sample, *flags, folder=tmp_path)
    before = helpers.files(tmp_path)
    result = helpers.call(sample, *flags, "--gif", "p.png/film.gif", folder=tmp_path)
    assert result.status == 2 and "p.png" in one_line(result)
    assert helpers.files(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.31 GiB.\nMore lines"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: ...\nMore"
        ),
        MemoryError(),
    ),
)
def test_too_little_memory_ends_in_one_line(tmp_path, monkeypatch, error):
    def full(run):
        raise error

    monkeypatch.setattr(train.Run, "train_step", full)
    result = start(tmp_path)
    assert result.status == 2 and "memory" in one_line(result).lower()


def test_a_bug_of_ours_is_not_disguised_as_a_mistake(tmp_path, monkeypatch):
    def broken(run):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train.Run, "train_step", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        start(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_bytes("red\n".encode("utf-8-sig"))
    args = sample.parse(["--prompts", str(tmp_path / "p.txt")])
    sample.check(args)
    assert args.prompt == ["red"]
