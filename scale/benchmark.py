"""How close to the machine's limit, in one process: `python -m scale.benchmark`, with nothing else running.

step   A training step at the shape of a stock Qwen3's layers: its FLOPs, counted by torch.utils.flop_counter
       on that very step, over its time, against the fastest matrix product this process can do.
text   Prefill and decode by the frozen language model, against transformers' Qwen3 on the same weights, in
       runs that alternate. Needs transformers, which nothing else here does.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attention import Tokens
from checkpoint import check_device
from config import CONFIGS, Parser, TrainConfig, run_command, tune_torch
from data import CAPTION_DROPPED, CAPTION_FIRST, IMAGE_FIRST, caption_document, collate
from generate import continue_text
from lab.watch import best, product_peak
from load_qwen3 import COUNTS, STOCK, known_config, materialise, text_names
from model import LMFusion
from small.pretrain import init_text
from train import make_optimizers, step_loss


def make_loss(model: LMFusion, train: TrainConfig, pictures: int) -> Callable[[], Tensor]:
    """The loss of one batch of `pictures` with captions of 32 tokens, in all three orders."""
    c, first = model.config, CAPTION_FIRST
    orders = (first, first, first, IMAGE_FIRST, first, CAPTION_DROPPED)
    documents = [caption_document(None, [7] * 32, orders[i % 6], c, 500) for i in range(pictures)]
    latents = torch.randn(pictures, c.latent_channels, c.latent_size, c.latent_size)
    batch = collate(documents, latents, c).to(train.device)
    return lambda: step_loss(model, batch, train)


def training_step(stock: str, layers: int, pictures: int, dtype: torch.dtype, device: str) -> tuple:
    """FLOPs and shortest time of a step, optimizer included."""
    config = replace(known_config(stock), num_hidden_layers=layers, vocab_size=8192)
    config = replace(config, boi_id=0, eoi_id=1, eos_id=2)
    train = replace(CONFIGS[stock.rpartition("/")[2].lower()], device=device)
    torch.manual_seed(0)
    model = LMFusion(config)
    init_text(model)
    model.init_image_from_text()
    model.to(device=device, dtype=dtype)
    model.freeze_text()
    optimizers, loss = make_optimizers(model, train), make_loss(model, train, pictures)

    def step() -> None:
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops(), best(step, 20)


def two_models(stock: str, layers: int, dtype: torch.dtype) -> tuple[LMFusion, nn.Module]:
    """Ours and transformers', text alone, with the same random weights."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        raise ValueError("the text part compares with transformers, which is not installed") from None

    c = replace(known_config(stock), num_hidden_layers=layers, latent_size=2, unet_channels=(4, 4))
    c = replace(c, unet_attention=False, separation="none")  # no image experts: text is all we time
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    fields = {name: getattr(c, name) for name in (*COUNTS, "tie_word_embeddings")}
    torch.manual_seed(0)
    theirs = Qwen3ForCausalLM(Qwen3Config(**fields, rope_parameters=rope)).to(dtype).eval()
    with torch.device("meta"):
        ours = LMFusion(c)
    weights = {name: theirs.state_dict()[theirs_name] for theirs_name, name in text_names(c).items()}
    materialise(ours, weights.__getitem__, dtype)
    return ours, theirs


def text_against_transformers(
    stock: str, layers: int, dtype: torch.dtype, prompt: int, new: int, runs: int
) -> dict:
    """Medians of seconds, ours and theirs, of prefill and of decoding one token; runs alternate."""
    ours, theirs = two_models(stock, layers, dtype)
    ids = torch.randint(3, 1000, (1, prompt), generator=torch.Generator().manual_seed(1))

    def run_ours() -> tuple[Tensor, float, list[int]]:
        hidden = ours.encode(Tokens.text(ids))
        logits, read = ours.logits(hidden.text[-1:]), time.perf_counter()
        return logits, read, continue_text(ours, hidden.text[-1:], hidden.cache, new + 1)[0]

    def run_theirs() -> tuple[Tensor, float, list[int]]:
        out = theirs(ids, use_cache=True, logits_to_keep=1)
        logits, read = out.logits[:, -1], time.perf_counter()
        written = [logits.argmax(-1)]
        for _ in range(new):
            out = theirs(written[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
            written.append(out.logits[:, -1].argmax(-1))
        return logits, read, [int(w) for w in written]

    times: dict[str, list[float]] = {}
    found = {}
    with torch.inference_mode():
        for i in range(runs + 1):
            for who, run in (("our", run_ours), ("their", run_theirs)):
                begin = time.perf_counter()
                logits, read, written = run()
                end = time.perf_counter()
                found[who] = logits, written
                if i:  # the first round warms up
                    times.setdefault(f"{who} prefill", []).append(read - begin)
                    times.setdefault(f"{who} token", []).append((end - read) / new)
    (a, mine), (b, other) = found["our"], found["their"]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"difference": (a - b).abs().max().item(), "agree": mine == other}


def main() -> None:
    parser = Parser(prog="python -m scale.benchmark", description="Speed against the machine's limit.")
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
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, dtype in dtypes.items() if args.what != "text" else ():
        peak = product_peak(dtype, args.device, (1024, 2048, 3072), 1.5)
        flops, seconds = training_step(args.stock, args.layers, args.pictures, dtype, args.device)
        rate = f"{flops / seconds / 1e9:.0f} GFLOP/s, {100 * flops / seconds / peak:.0f}% of {peak / 1e9:.0f}"
        print(f"step, {name}: {flops / 1e12:.3f} TFLOP in {seconds:.2f} s = {rate}")
    for name, dtype in dtypes.items() if args.what != "step" else ():
        r = text_against_transformers(args.stock, args.text_layers, dtype, args.prompt, args.new, args.runs)
        ours, theirs = r["our prefill"], r["their prefill"]
        one, other = 1e3 * r["our token"], 1e3 * r["their token"]  # ms
        same = f"logits differ by {r['difference']:.1e}, ids {'agree' if r['agree'] else 'DIFFER'}"
        prompt = f"{args.prompt} tokens of prompt {ours:.3f} s, transformers {theirs:.3f} s"
        print(f"text, {name}: {prompt}; a token {one:.1f} ms, transformers {other:.1f} ms; {same}")


if __name__ == "__main__":
    run_command(main)
