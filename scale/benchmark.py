"""How close to the machine's limit, in one process: `python -m scale.benchmark`, with nothing else running.

step   A training step at the shape of a stock Qwen3's layers: its FLOPs, counted by torch.utils.flop_counter
       on that very step, over its time, against the fastest matrix product this process can do.
text   Prefill and decode by the frozen language model, against transformers' Qwen3 on the same weights, in
       runs that alternate. Needs transformers, which nothing else here does.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from attention import Tokens
from checkpoint import check_device
from config import Parser, run_command, tune_torch
from data import BEHIND, DROPPED, FIRST, arrange
from diffusion import Diffusion
from generate import continue_text
from load_qwen3 import STOCK, known_config, materialise, text_names
from model import LMFusion
from small.pretrain import init_text
from train import CONFIGS, draw_noise, losses, make_optimizers


def best(work, seconds: float = 3.0) -> float:
    """Shortest time of one run, in seconds, over about `seconds` of trying."""
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def product_peak(dtype: torch.dtype, device: str, sizes: tuple[int, ...] = (1024, 2048, 3072)) -> float:
    """FLOP/s of the fastest square product."""
    rates = []
    for n in sizes:
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        rates.append(2 * n**3 / best(lambda a=a, b=b: a @ b, 1.5))
    return max(rates)


def training_step(
    stock: str, layers: int, pictures: int, dtype: torch.dtype, device: str
) -> tuple[float, float]:
    """FLOPs and shortest time of a step, optimizer included."""
    config = dataclasses.replace(
        known_config(stock), num_hidden_layers=layers, vocab_size=8192, boi_id=0, eoi_id=1
    )
    config = dataclasses.replace(config, eos_id=2)
    train = dataclasses.replace(CONFIGS[stock.rpartition("/")[2].lower()], device=device)
    torch.manual_seed(0)
    model = LMFusion(config)
    init_text(model)
    model.init_image_from_text()
    model.to(device=device, dtype=dtype)
    model.freeze_text()
    optimizers = make_optimizers(model, train)
    orders = [(FIRST, FIRST, FIRST, BEHIND, FIRST, DROPPED)[i % 6] for i in range(pictures)]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(pictures, config.latent_channels, config.latent_size, config.latent_size)
    batch = arrange([[7] * 32] * pictures, latents.to(device), orders, config, 500)
    noise = draw_noise(latents.shape, generator)

    def step() -> None:
        out = losses(model, Diffusion(), batch, train, noise)
        (out["loss"] + out.get("draw_loss", 0.0)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step()
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops(), best(step, 20)


def text_against_transformers(
    stock: str, layers: int, dtype: torch.dtype, prompt: int, new: int, runs: int
) -> dict:
    """Medians of seconds, ours and theirs, of prefill and of decoding one token; runs alternate."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        raise ValueError("the text part compares with transformers, which is not installed") from None

    c = dataclasses.replace(
        known_config(stock), num_hidden_layers=layers, latent_size=2, unet_channels=(4, 4)
    )
    c = dataclasses.replace(
        c, unet_attention=False, separation="none"
    )  # no image experts: text is all we time
    fields = {
        f: getattr(c, f) for f in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    fields |= {f: getattr(c, f) for f in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    torch.manual_seed(0)
    with torch.device("meta"):
        ours, theirs = (
            LMFusion(c),
            Qwen3ForCausalLM(
                Qwen3Config(**fields, tie_word_embeddings=c.tie_word_embeddings, rope_parameters=rope)
            ),
        )
    random = {}
    generator = torch.Generator().manual_seed(0)

    for name, p in ours.text_parameters().items():
        value = torch.empty(p.shape).normal_(std=0.02, generator=generator)
        random[name] = (value + 1 if p.dim() == 1 else value).to(dtype)
    materialise(ours, random.__getitem__, dtype)
    state = {t: random[o] for t, o in text_names(c).items() if o in random}
    theirs.to_empty(device="cpu").to(dtype)
    theirs.load_state_dict(state, strict=False)
    theirs.tie_weights()
    rotary = theirs.model.rotary_emb  # its buffer was on the meta device
    rotary.inv_freq = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    rotary.original_inv_freq = rotary.inv_freq
    theirs.eval()
    ids = torch.randint(3, 1000, (1, prompt), generator=generator)
    times: dict[str, list[float]] = {
        k: [] for k in ("our prefill", "their prefill", "our token", "their token")
    }
    with torch.inference_mode():
        for i in range(runs + 1):
            begin = time.perf_counter()
            hidden = ours.encode(Tokens.text(ids))
            a = ours.logits(hidden.text[-1:])
            middle = time.perf_counter()
            mine = continue_text(ours, hidden.text[-1:], hidden.cache, new + 1)
            end = time.perf_counter()
            if i:  # the first round warms up
                times["our prefill"].append(middle - begin)
                times["our token"].append((end - middle) / new)
            begin = time.perf_counter()
            out = theirs(ids, use_cache=True, logits_to_keep=1)
            b = out.logits[:, -1]
            middle = time.perf_counter()
            written = [b.argmax(-1)]
            for _ in range(new):
                out = theirs(written[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
                written.append(out.logits[:, -1].argmax(-1))
            end = time.perf_counter()
            if i:
                times["their prefill"].append(middle - begin)
                times["their token"].append((end - middle) / new)
    agree = mine[0] == [int(w) for w in written]
    return {k: statistics.median(v) for k, v in times.items()} | {
        "difference": (a - b).abs().max().item(),
        "agree": agree,
    }


def main() -> None:
    parser = Parser(
        prog="python -m scale.benchmark", description="Measured speed against the machine's limit."
    )
    add = parser.add_argument
    add("what", choices=("step", "text", "both"), nargs="?", default="both", help="which part")
    add("--stock", choices=tuple(STOCK), default="Qwen/Qwen3-0.6B", help="whose shape")
    add("--layers", type=int, default=4, help="layers in the step")
    add("--pictures", type=int, default=8, help="pictures in the step, of 256 patches each")
    add("--text-layers", type=int, default=28, help="layers of the language model")
    add("--prompt", type=int, default=512, help="tokens of the prompt")
    add("--new", type=int, default=24, help="tokens to write")
    add("--runs", type=int, default=5, help="alternating runs")
    add("--device", default="cpu", help="of the step: cpu, cuda, ...")
    args = parser.parse_args()
    check_device(args.device)
    tune_torch()
    if args.what in ("step", "both"):
        for dtype in (torch.float32, torch.bfloat16):
            peak = product_peak(dtype, args.device)
            flops, seconds = training_step(args.stock, args.layers, args.pictures, dtype, args.device)
            rate, name = flops / seconds, str(dtype).removeprefix("torch.")
            print(
                f"step, {name}: {flops / 1e12:.3f} TFLOP in {seconds:.2f} s = {rate / 1e9:.0f} GFLOP/s, "
                f"{100 * rate / peak:.0f}% of {peak / 1e9:.0f}"
            )
    if args.what in ("text", "both"):
        for dtype in (torch.float32, torch.bfloat16):
            r = text_against_transformers(
                args.stock, args.text_layers, dtype, args.prompt, args.new, args.runs
            )
            name, ours, theirs = str(dtype).removeprefix("torch."), r["our prefill"], r["their prefill"]
            our_token, their_token = 1e3 * r["our token"], 1e3 * r["their token"]
            print(
                f"text, {name}: prefill of {args.prompt} tokens {ours:.3f} s, transformers {theirs:.3f} s "
                f"({theirs / ours:.2f} x); a token {our_token:.1f} ms, transformers {their_token:.1f} ms "
                f"({their_token / our_token:.2f} x); logits differ by {r['difference']:.1e}, "
                f"ids {'agree' if r['agree'] else 'DIFFER'}"
            )


if __name__ == "__main__":
    run_command(main)
