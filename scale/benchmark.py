"""How close to the machine's limit: `python -m scale.benchmark --device cuda`, with nothing else running.

ceilings  a large product in each precision, and a large copy: what nothing here can be faster than
step      training steps of `qwen3-0.6b` (packed 4,096, computed in bfloat16), with and without activation
          checkpointing: pictures a second, share of the fastest product, memory against `--dry-run`
denoise   guided denoising steps of 0.6B behind 8 and behind 512 tokens of prompt
text      prefill and decode by 0.6B, beside transformers on the same weights (which must be installed)
small     training steps of `--config small`

Weights are random: speed does not depend on them. Every time is the median of runs after two that warm up;
what is compared runs in turns. FLOPs are those that `--dry-run` counts without activation checkpointing, for
what is computed twice is no more work done. `--quick` takes small shapes, to try out that all of it runs.
"""

import gc
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor, nn

from attention import Tokens
from checkpoint import check_device, write_atomic
from config import CONFIGS, Parser, TrainConfig, run_command, tune_torch
from diffusion import Diffusion
from generate import continue_text, read_rows
from load_qwen3 import COUNTS, load_qwen3, model_config, text_names
from model import LMFusion
from scale.budget import TrainingStep, training_bytes, training_flops
from scale.parallel import end_processes, init_processes
from small.pretrain import pretrain_base, random_base
from train import Run, make_optimizers, step_loss

PARTS = ("ceilings", "step", "denoise", "text", "small")
STEP = TrainingStep(step_loss, make_optimizers)
Row = dict[str, object]  # part, what, value, unit, and whatever else there is to say


def wait(device: str) -> None:
    """Until a GPU has done all it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def in_turns(works: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of each run of each work, in turns, after two rounds that warm up; two runs at least."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in itertools.count():
        if number == 2:
            start = time.perf_counter()
        for name, work in works.items():
            wait(device)
            begin = time.perf_counter()
            work()
            wait(device)
            times[name].append(time.perf_counter() - begin)
        if number > 2 and time.perf_counter() - start > seconds:
            return {name: found[2:] for name, found in times.items()}


def row(part: str, what: str, amount: float, unit: str, times: list[float], **more: object) -> Row:
    """`amount` of something in each of the times, as a rate; with the slowest and the fastest."""
    rates = {name: amount / t for name, t in (("least", max(times)), ("most", min(times)))}
    found = {"part": part, "what": what, "value": amount / statistics.median(times), "unit": unit}
    return found | rates | more


def ceilings(device: str, quick: bool) -> list[Row]:
    """The fastest square product in each precision, and a copy (bytes read and bytes written)."""
    gpu, rows = torch.device(device).type == "cuda", []
    for dtype in (torch.bfloat16, torch.float32):
        n = 8192 if gpu else 512 if quick else 2048
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        times = in_turns({"": lambda a=a, b=b: a @ b}, device, 1.0)[""]
        name = str(dtype).removeprefix("torch.")
        rows.append(row("ceilings", f"product {n} x {n} x {n}, {name}", 2e-12 * n**3, "TFLOP/s", times))
    x = torch.randn(2**29 if gpu else 2**24, device=device)
    y = torch.empty_like(x)
    times = in_turns({"": lambda: y.copy_(x)}, device, 1.0)[""]
    return [*rows, row("ceilings", f"copy of {x.nbytes / 2**20:.0f} MiB", 2e-9 * x.nbytes, "GB/s", times)]


def write_noise(folder: Path, n: int, side: int) -> Path:
    """n pictures of coarse noise, with captions."""
    folder.mkdir()
    for i in range(n):
        noise = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((side, side)).save(folder / f"{i:03d}.png")
        words = " ".join(f"picture number {i} of coarse noise in many colors" for _ in range(3))
        (folder / f"{i:03d}.txt").write_text(words, encoding="utf-8")
    return folder


@contextmanager
def made_run(config: TrainConfig):  # noqa: ANN201
    """A run of training as train.py makes it, and the end of its processes."""
    team = init_processes(config.device, config.dtype)
    try:
        yield Run(config, "benchmark", team)
    finally:
        end_processes(team)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def training_step(base: Path, folder: Path, device: str, quick: bool, peak: float) -> list[Row]:
    """Steps of `qwen3-0.6b` as train.py takes them, of four micro batches; `peak` in TFLOP/s."""
    rows, side, micro = [], 32 if quick else 256, 2 if quick else 56
    data = write_noise(folder / "pictures", 44, side)
    config = replace(CONFIGS["qwen3-0.6b"], base=str(base), data=str(data), vae="", image_size=side)
    config = replace(config, device=device, micro_batch=micro, batch_size=4 * micro, warmup=10, seed=1)
    config = replace(config, unet_channels=(64, 128), latent_patch=4) if quick else config
    overrides = config.model_overrides(config.latent_channels, config.latent_patch)
    model = model_config(base, **overrides)
    plain = replace(config, activation_checkpointing=False)
    flops = training_flops(model, plain, STEP, 32)["picture"]
    for checkpointing in (True, False):
        one = replace(config, activation_checkpointing=checkpointing)
        what = f"training step, {'with' if checkpointing else 'without'} activation checkpointing"
        predicted = training_bytes(model, one, STEP, 1, 32)["peak"]
        try:
            with made_run(one) as run:
                if torch.device(device).type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times = in_turns({"": run.train_step}, device, 2.0 if quick else 8.0)[""]
                used = torch.cuda.max_memory_allocated() if torch.device(device).type == "cuda" else None
        except torch.OutOfMemoryError:
            rows.append({"part": "step", "what": what, "problem": "out of memory", "predicted": predicted})
            continue
        found = row("step", what, one.batch_size, "pictures/s", times)
        found["share_of_product"] = found["value"] * flops * 1e-12 / peak
        found |= {"tflop_a_picture": flops * 1e-12, "bytes": used, "bytes_predicted": predicted}
        rows.append(found)
    return rows


def denoising(model: LMFusion, device: str, quick: bool) -> list[Row]:
    """Guided steps of a batch of pictures, behind short and long prompts."""
    n, works = 2 if quick else 16, {}
    trained = SimpleNamespace(model=model, diffusion=Diffusion())
    c = model.config
    x = torch.randn(n, c.latent_channels, c.latent_size, c.latent_size, device=device)
    t = torch.full((n,), 500, device=device)
    with torch.inference_mode():
        for length in (8, 512):
            prompt = [*range(10, 10 + length), c.boi_id]
            predict = read_rows(trained, [prompt] * n + [[c.boi_id]] * n, None, [3.0])
            works[f"{length} tokens of prompt"] = partial(predict, x, t)
        times = in_turns(works, device, 2.0 if quick else 6.0)
    return [row("denoise", f"{n} guided pictures, {k}", 1, "steps/s", v) for k, v in times.items()]


def their_model(ours: LMFusion, device: str) -> nn.Module:
    """transformers' Qwen3 with the text weights of ours."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        raise ValueError("the part text compares with transformers, which is not installed") from None
    c = ours.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    fields = {name: getattr(c, name) for name in (*COUNTS, "tie_word_embeddings", "rms_norm_eps")}
    with torch.device(device):
        theirs = Qwen3ForCausalLM(Qwen3Config(**fields, rope_parameters=rope)).to(ours.dtype).eval()
    weights = ours.text_parameters()
    values = {theirs_name: weights[name] for theirs_name, name in text_names(c).items()}
    missing, unknown = theirs.load_state_dict(values, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    return theirs


def text_alone(model: LMFusion, device: str, quick: bool) -> list[Row]:
    """Reading 512 tokens and writing behind them, ours and transformers' in turns."""
    theirs, (prompt, new) = their_model(model, device), (32, 4) if quick else (512, 64)
    ids = torch.randint(10, 1000, (1, prompt), generator=torch.Generator().manual_seed(1)).to(device)
    eos, written = model.config.eos_id, {}

    def our_prefill() -> tuple[Tensor, object]:
        hidden = model.encode(Tokens.text(ids))
        return model.logits(hidden.text[-1:]), hidden

    def their_prefill() -> tuple[Tensor, object]:
        out = theirs(ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def our_decode() -> None:
        _, hidden = our_prefill()
        written["ours"] = continue_text(model, hidden.text[-1:], hidden.cache, new + 1)[0]

    def their_decode() -> None:
        logits, past = their_prefill()
        found = [logits.argmax(-1)]
        for _ in range(new):
            out = theirs(found[-1][:, None], past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out.logits[:, -1].argmax(-1))
        written["transformers"] = torch.cat(found).tolist()

    works = {"ours": our_prefill, "transformers": their_prefill}
    with torch.inference_mode():
        read = in_turns(works, device, 1.0 if quick else 3.0)
        both = in_turns({"ours": our_decode, "transformers": their_decode}, device, 1.0 if quick else 8.0)
        a, b = our_prefill()[0].float(), their_prefill()[0].float()
    rows = []
    for who in read:
        rows.append(row("text", f"prefill of {prompt}, {who}", prompt, "tokens/s", read[who]))
        once = statistics.median(read[who])
        tokens = new if eos not in written[who] else max(1, written[who].index(eos))
        rest = [max(1e-9, t - once) for t in both[who]]
        rows.append(row("text", f"decode of {tokens}, {who}", tokens, "tokens/s", rest))
    rows[-1]["logits_differ_by"] = ((a - b).norm() / b.norm()).item()
    return rows


def small_step(folder: Path, device: str, quick: bool) -> list[Row]:
    """Steps of `--config small` on a base of one step of pretraining."""
    pretrain_base(folder / "tiny", steps=1)
    config = replace(CONFIGS["small"], base=str(folder / "tiny"), device=device, warmup=1)
    with made_run(config) as run:
        times = in_turns({"": run.train_step}, device, 2.0 if quick else 8.0)[""]
    return [row("small", "training step of small, batch 64", config.batch_size, "pictures/s", times)]


def machine(device: str) -> Row:
    """What was measured on."""
    gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    found = {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version()}
    return found | {"torch": torch.__version__, "cuda": torch.version.cuda if gpu else None}


def rows_table(found: dict) -> str:
    """All rows as Markdown."""
    m = found["machine"]
    lines = [f"{m['device']}, torch {m['torch']}, CUDA {m['cuda']}{', quick' if found['quick'] else ''}", ""]
    lines += ["| what | median (least to most) | beside it |", "|---|---:|---|"]
    for r in found["rows"]:
        beside = []
        if "share_of_product" in r:
            beside.append(f"{100 * r['share_of_product']:.0f}% of the product")
        if r.get("bytes"):
            beside.append(f"{r['bytes'] / 2**30:.1f} GiB, predicted {r['bytes_predicted'] / 2**30:.1f}")
        if "logits_differ_by" in r:
            beside.append(f"logits differ by {r['logits_differ_by']:.1e}")
        if "problem" in r:
            value = r["problem"]
        else:
            value = f"{r['value']:.4g} {r['unit']} ({r['least']:.4g} to {r['most']:.4g})"
        lines.append(f"| {r['what']} | {value} | {'; '.join(beside)} |")
    return "\n".join(lines)


def benchmark(parts: list[str], device: str, quick: bool, file: str | None = None) -> dict:
    """The rows of these parts, in order, and in `file` as far as they are there.

    Every part that fails says so in a row, and the others go on.
    """
    found: dict = {"machine": machine(device), "quick": quick, "rows": ceilings(device, quick)}
    peak = found["rows"][0]["value"]  # of bfloat16
    with tempfile.TemporaryDirectory() as place:
        folder, base = Path(place), Path(place) / "base"
        if {"step", "denoise", "text"} & set(parts):
            smaller = dict(num_hidden_layers=2, vocab_size=8192) if quick else {}
            random_base("Qwen/Qwen3-0.6B", base, **smaller)

        def whole() -> LMFusion:
            side = dict(latent_size=8, unet_channels=(64, 128)) if quick else {}
            model = load_qwen3(base, **side).to(device, torch.bfloat16).eval()
            return model.requires_grad_(False)

        works = {
            "step": lambda: training_step(base, folder, device, quick, peak),
            "denoise": lambda: denoising(whole(), device, quick),
            "text": lambda: text_alone(whole(), device, quick),
            "small": lambda: small_step(folder, device, quick),
        }
        for part in [p for p in works if p in parts]:
            try:
                found["rows"] += works[part]()
            except Exception as error:  # noqa: BLE001
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                found["rows"].append({"part": part, "what": part, "problem": problem})
            if file:
                write_atomic(Path(file), json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    parser = Parser(prog="python -m scale.benchmark", description="Speed against the machine's limit.")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help="what to measure; all, if none is named")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--quick", action="store_true", help="small shapes, to try out that all of it runs")
    add("--json", metavar="FILE", help="write the figures here as well")
    args = parser.parse_args()
    check_device(args.device)
    tune_torch()
    if unknown := sorted(set(args.parts) - set(PARTS)):
        raise ValueError(f"{unknown[0]} is no part; choose from {', '.join(PARTS)}")
    found = benchmark(args.parts or list(PARTS), args.device, args.quick, args.json)
    print(rows_table(found))
    if any("problem" in r for r in found["rows"]):
        raise ValueError("not all of it could be measured: see the table")


if __name__ == "__main__":
    run_command(main)
