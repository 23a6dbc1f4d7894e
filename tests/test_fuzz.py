"""Random bad input: each is an answer or one line, never a traceback, a hang, or a changed file.

A case is a number. It says which kind of file is damaged, and how: some bytes, some values of its JSON, its
lines, or its header. What is damaged is read as a command would read it, and used, inside `run_command`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import test_latents
import torch
from conftest import write_qwen3_folder
from PIL import Image

import evaluate
import sample
import train
from chat.conversation import answer_last, read_messages
from checkpoint import list_checkpoints, load_trained, read_metrics
from config import run_command
from generate import GenerationConfig, generate_images, generate_text
from lab import figures
from lab.language import multiple_choice, read_questions
from load_qwen3 import encode_plain, load_qwen3, load_tokenizer
from scale.latents import LatentShards
from scale.pictures import load_edits, load_pictures
from scale.vae import load_vae

FEW, ALL = 20, 500
SECONDS = 30  # of one case; the slowest takes about one
IMAGE_SIDE = dict(latent_channels=8, latent_size=4, unet_channels=(8, 12), unet_attention=False)
STRANGE = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2**31,
        2**63,
        10**30,
        -(10**30),
        0.5,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        "x",
        "0",
        "../x",
        "/",
        "\0",
        "\ud800",
        "a" * 5000,
        "\u2028\x0c",
        "<|im_end|>",
        [],
        {},
        [[]],
        [None],
    ),
    *([1, "x"], {"x": 1}, {"": {}}, [10**30], ["\ud800"]),
)


# ---- damage ----


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut, changed, added, taken out, doubled."""
    for _ in range(rng.choice((1, 1, 1, 3))):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 8, 1000)))
        noise = bytes(rng.choices(range(256), k=b - a))
        data = rng.choice(
            (
                data[:a],
                data[:a] + data[b:],
                data[:a] + noise + data[b:],
                data[:a] + noise + data[a:],
                data[:b] + data[a:b] + data[b:],
                data[:a] + bytes(b - a) + data[b:],
                data[a:],
            )
        )
    return data


def damage_json(rng: random.Random, value: object) -> object:
    """One value somewhere in it is another, or gone, or there twice."""
    while isinstance(value, (dict, list)) and value and rng.random() < 0.97:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, what = rng.choice(keys), rng.random()
        if what < 0.1:
            del value[key]
        elif what < 0.15 and isinstance(value, list):
            value.append(value[key])
        elif what < 0.2 and isinstance(value, dict):
            value[rng.choice(("x", "", "type", "\u2028"))] = value.pop(key)
        elif what < 0.5 or not isinstance(value[key], (dict, list)):
            value[key] = copy.deepcopy(rng.choice(STRANGE))
        else:
            value[key] = damage_json(rng, value[key])
        return value
    return copy.deepcopy(rng.choice(STRANGE))


def damage_text(rng: random.Random, data: bytes) -> bytes:
    """A JSON file: its values, mostly, or its bytes."""
    if rng.random() < 0.25:
        return damage_bytes(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = damage_json(rng, value)
    return json.dumps(value).encode()


def damage_lines(rng: random.Random, data: bytes) -> bytes:
    """A file of JSON lines: one of them, mostly."""
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = damage_text(rng, lines[i])
    return rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(lines)


def damage_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file: its header, mostly."""
    if rng.random() < 0.3:
        return damage_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header = damage_text(rng, data[8 : 8 + size])
    size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63, len(data)))
    return size.to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :]


def damage_file(path: Path, how: Callable, rng: random.Random) -> None:
    path.write_bytes(how(rng, path.read_bytes()))


# ---- what is read, and what with ----


@torch.no_grad()
def use_base(folder: Path) -> None:
    model, tokenizer = load_qwen3(folder, **IMAGE_SIDE), load_tokenizer(folder)
    model.text_logits(torch.tensor([encode_plain(tokenizer, "a red circle")]))
    tokenizer.decode([1, 2, 3])


def base(name: str, how: Callable, rng: random.Random, here: Path) -> Callable:
    folder = Path(shutil.copytree(helpers.base(), here / "base"))
    if not (folder / name).is_file():
        (folder / name).write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    damage_file(folder / name, how, rng)
    return partial(use_base, folder)


def sharded(rng: random.Random, here: Path) -> Callable:
    folder = write_qwen3_folder(here / "base", shards=2)
    damage_file(folder / "model.safetensors.index.json", damage_text, rng)
    return partial(use_base, folder)


def use_run(folder: Path) -> None:
    trained = load_trained(folder)
    generate_images(trained, ["red"], [0], steps=1)
    generate_text(trained, "red", 2)


def run(name: str, how: Callable, rng: random.Random, here: Path) -> Callable:
    folder = Path(shutil.copytree(helpers.photo_run(), here / "run"))
    damage_file(list_checkpoints(folder)[-1] / name, how, rng)
    return partial(use_run, folder)


def resumed(rng: random.Random, here: Path) -> Callable:
    """A step of a run whose last checkpoint is damaged."""
    folder = Path(shutil.copytree(helpers.photo_run(), here / "run"))
    name, how = rng.choice((("checkpoint.json", damage_text), ("optimizer.safetensors", damage_tensors)))
    damage_file(list_checkpoints(folder)[-1] / name, how, rng)

    def resume() -> None:
        config, name, *_ = train.parse(["--config", "small", "--resume", "--out", str(folder)])
        with contextlib.redirect_stdout(io.StringIO()):
            train.work(config, name, list_checkpoints(folder)[-1], train.Team())

    return resume


def tar(rng: random.Random, here: Path) -> Callable:
    with tarfile.open(here / "x.tar", "w") as file:
        for path in sorted(helpers.photos().iterdir())[:12]:
            file.add(path, path.name)
    damage_file(here / "x.tar", damage_bytes, rng)
    return partial(load_pictures, str(here / "x.tar"), 16)


def jsonl(rng: random.Random, here: Path) -> Callable:
    folder = Path(shutil.copytree(helpers.edits(), here / "edits"))
    name = rng.choice(("metadata.jsonl", "all.jsonl"))
    damage_file(folder / name, damage_lines, rng)
    load = load_edits if name == "metadata.jsonl" else load_pictures
    return partial(load, str(folder / name), 16)


def picture(rng: random.Random, here: Path) -> Callable:
    form = rng.choice(("PNG", "JPEG", "WEBP"))
    pixels = np.random.default_rng(rng.randrange(100)).integers(0, 255, (24, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(rng.choice(("RGB", "RGB", "L")))
    image.save(here / f"a.{form.lower()}", form, icc_profile=rng.choice((None, b"x" * 300)))
    damage_file(here / f"a.{form.lower()}", damage_bytes, rng)
    (here / "a.txt").write_bytes(b"a caption" if rng.random() < 0.8 else damage_bytes(rng, b"a caption"))
    return partial(load_pictures, str(here), 8)


def chat(rng: random.Random, here: Path) -> Callable:
    Image.new("RGB", (8, 8)).save(here / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what is it?"}]
    thought = {"role": "assistant", "content": "a red one", "reasoning_content": "red"}
    system = {"role": "system", "content": "be kind"}
    messages = [system, {"role": "user", "content": "hello"}, thought, {"role": "user", "content": parts}]
    (here / "chat.json").write_text(json.dumps(messages))
    damage_file(here / "chat.json", damage_text, rng)

    def ask() -> None:
        messages = read_messages(str(here / "chat.json"))
        options = GenerationConfig(max_tokens=2, max_images=1, steps=1)
        with contextlib.redirect_stdout(io.StringIO()):
            answer_last(load_trained(helpers.shapes_run()), options, False, messages, here / "answer")

    return ask


def prompts(rng: random.Random, here: Path) -> Callable:
    (here / "prompts.txt").write_bytes(damage_bytes(rng, "a réd circle\n\na blue cross\r\n".encode() * 3))
    flags = ["--prompts", str(here / "prompts.txt"), "--out", str(here / "new.png")]

    def paint() -> None:
        args = sample.parse(flags)
        sample.check(args)
        generate_images(load_trained(helpers.photo_run()), args.prompt, [0] * len(args.prompt), 1)

    return paint


def questions(rng: random.Random, here: Path) -> Callable:
    row = {"context": "the sky is", "choices": [" blue", " red"], "label": 0}
    (here / "q.jsonl").write_text((json.dumps(row) + "\n") * 3)
    damage_file(here / "q.jsonl", damage_lines, rng)

    def ask() -> None:
        trained = load_trained(helpers.photo_run())
        encode = partial(encode_plain, trained.tokenizer)
        multiple_choice(trained.model, encode, read_questions(str(here / "q.jsonl")))

    return ask


def paragraphs(rng: random.Random, here: Path) -> Callable:
    text = "the sky is blue and the grass is green.\n\nthe opposite of big is small, they say.\n"
    (here / "t.txt").write_bytes(damage_bytes(rng, text.encode()))

    def read() -> None:
        evaluate.text_report(load_trained(helpers.photo_run()), evaluate.read_paragraphs(str(here / "t.txt")))

    return read


def latents(rng: random.Random, here: Path) -> Callable:
    folder = Path(shutil.copytree(test_latents.encoded(), here / "latents"))
    shard = rng.choice(sorted(folder.glob("shard-*")))
    name, how = rng.choice((("index.json", damage_text), (shard.name, damage_tensors)))
    damage_file(folder / name, how, rng)

    def read() -> None:
        shards = LatentShards(folder)
        shards.read(list(range(len(shards))))
        [shards.caption(i) for i in range(len(shards))]

    return read


def metrics(rng: random.Random, here: Path) -> Callable:
    (here / "m.jsonl").write_bytes((helpers.photo_run() / "metrics.jsonl").read_bytes())
    damage_file(here / "m.jsonl", damage_bytes, rng)
    return lambda: figures.training_curves(read_metrics(here / "m.jsonl"), evaluate.TIMESTEPS)


def vae(rng: random.Random, here: Path) -> Callable:
    folder = Path(shutil.copytree(test_latents.VAE, here / "vae"))
    weights = "diffusion_pytorch_model.safetensors"
    name, how = rng.choice((("config.json", damage_text), (weights, damage_tensors)))
    damage_file(folder / name, how, rng)
    return lambda: load_vae(folder).encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def flags(rng: random.Random, here: Path) -> Callable:
    """Flags that there are, with values of all kinds."""
    module = rng.choice((train, sample, evaluate))
    known = {
        train: [f"--{f.replace('_', '-')}" for f in vars(train.TrainConfig())] + ["--resume", "--dry-run"],
        sample: "--prompt --prompts --edit --caption --text --chat-file --out --n --steps --cfg --seed --gif "
        "--device --sampler --cfg-image --scale --max-tokens --temperature --top-k --top-p --dtype".split(),
        evaluate: "--n --steps --cfg --seed --json --sheet --text --choices --data --device --split "
        "--captions --max-tokens".split(),
    }[module]
    given = [x for x in STRANGE if isinstance(x, (int, float, str)) and "\0" not in str(x)]
    args = ["--config", "small"] if module is train else []
    for _ in range(rng.randrange(1, 5)):
        args.append(
            f"{rng.choice(known)}={rng.choice(given)}" if rng.random() < 0.8 else str(rng.choice(given))
        )

    def parse() -> None:
        with helpers.inside(here):
            parsed = module.parse(args)
            if module is sample:
                sample.check(parsed)
                sample.check_places(parsed)

    return parse


KINDS: dict[str, Callable[[random.Random, Path], Callable]] = {
    "config.json": partial(base, "config.json", damage_text),
    "flags": flags,
    "tokenizer.json": partial(base, "tokenizer.json", damage_text),
    "weights": partial(base, "model.safetensors", damage_tensors),
    "index of weights": sharded,
    "checkpoint.json": partial(run, "checkpoint.json", damage_text),
    "weights of a checkpoint": partial(run, "model.safetensors", damage_tensors),
    "latents of a checkpoint": partial(run, "latents.safetensors", damage_tensors),
    "resumed": resumed,
    "tar": tar,
    "JSONL": jsonl,
    "picture": picture,
    "chat file": chat,
    "prompts": prompts,
    "questions": questions,
    "paragraphs": paragraphs,
    "latents": latents,
    "metrics.jsonl": metrics,
    "VAE": vae,
    "generation_config.json": partial(base, "generation_config.json", damage_text),
}


class Hangs(BaseException):
    """Nothing in the code under test may catch it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hangs(f"took more than {seconds} seconds")

    former = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def check_case(number: int, here: Path, capfd: pytest.CaptureFixture) -> None:
    rng, kind = random.Random(f"bad input {number}"), list(KINDS)[number % len(KINDS)]
    use = KINDS[kind](rng, here)
    # all but what a resumed run goes on with
    inputs = [
        *here.glob("[!r]*"),
        *here.glob("run/step-*"),
        helpers.base(),
        helpers.photos(),
        helpers.photo_run(),
        helpers.shapes_run(),
    ]
    before = helpers.files(*inputs)
    capfd.readouterr()
    with at_most(SECONDS), pytest.raises(SystemExit) as stop, torch.random.fork_rng(devices=[]):
        run_command(use)
    said = capfd.readouterr().err
    after = helpers.files(*inputs)
    assert {k: after.get(k) for k in before} == before, kind
    assert "Traceback" not in said and stop.value.code in (0, 2)
    if stop.value.code == 2:
        lines = [x for x in said.strip().split("\n") if not x.startswith(("usage: ", " ", "note: "))]
        (line,) = [x for x in lines if not x.startswith(("skipped ", "left out "))]
        assert "error: " in line and len(line) < 6000, line


@pytest.mark.parametrize("number", range(FEW))
def test_a_random_bad_input_is_an_answer_or_one_line(number, tmp_path, capfd):
    check_case(number, tmp_path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(FEW, ALL))
def test_five_hundred_random_bad_inputs_are_answers_or_one_line(number, tmp_path, capfd):
    check_case(number, tmp_path, capfd)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_an_answer_where_nothing_is_damaged(kind, tmp_path, monkeypatch):
    """Else its cases might all be errors for a reason of this file's own."""
    monkeypatch.setitem(globals(), "damage_file", lambda path, how, rng: None)
    monkeypatch.setitem(globals(), "damage_bytes", lambda rng, data: data)
    use = KINDS[kind](random.Random("good input 2"), tmp_path)
    if kind != "flags":  # which are random as they are
        with pytest.raises(SystemExit) as stop, torch.random.fork_rng(devices=[]):
            run_command(use)
        assert stop.value.code == 0


def test_damage_changes_what_it_is_given():
    data = json.dumps({"a": [1, {"b": "c"}], "d": {"e": 2.5}}).encode()
    tensors = len(data).to_bytes(8, "little") + data + bytes(50)
    lines = b"\n".join([data] * 3)
    cases = ((damage_bytes, data), (damage_text, data), (damage_tensors, tensors), (damage_lines, lines))
    for how, given in cases:
        found = {how(random.Random(seed), given) for seed in range(100)}
        assert len(found) > 70 and len(found - {given}) > 70, how
