"""The tiny Qwen3 of `small`: a tokenizer and a language model made from the built-in text.

The result is an ordinary Hugging Face folder (config.json, model.safetensors, tokenizer.json), which
`load_qwen3` reads like any other. Nothing of LMFusion is in it: no image, no BOI, no U-Net.
"""

import json
import math
import random
import shlex
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from attention import Tokens
from chat.template import END_THINK, IM_END, IM_START, THINK, apply_chat_template, assistant_mask, encode
from checkpoint import commit, locked, write_atomic, write_folder
from config import Bar, Parser, run_command, tune_torch
from data import next_tokens
from lab.language import knowledge, multiple_choice, puzzles, reasoning
from load_qwen3 import (
    BOI,
    EOI,
    STOCK,
    base_fingerprint,
    encode_plain,
    known_config,
    load_qwen3,
    load_tokenizer,
    text_names,
)
from model import LMFusion, ModelConfig, replace
from scale.muon import Muon
from scale.parallel import fill
from small.dialogues import as_text, conversation
from small.world import text_document

EOS = "<|endoftext|>"
SPECIAL = (EOS, IM_START, IM_END, BOI, EOI, THINK, END_THINK)
SIZES = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=32, rope_theta=1e4, tie_word_embeddings=True)
SIZES |= dict(max_position_embeddings=1024)
NO_IMAGES = dict(latent_size=2, unet_channels=(4, 4), unet_attention=False)  # next to nothing of that side
# Which recipe a base was made by. Raise it with any change to the text, the tokenizer, the sizes or the
# training below, and make small/base again: its MADE.json names the recipe, and a test compares them.
RECIPE = 3
STEPS, BATCH, LR, MUON_LR, WARMUP = 6000, 32, 2e-3, 8e-3, 50
PLAIN, TALK = 0.3, 0.6  # for this share of the steps documents alone, then this share of conversations


def train_tokenizer(rng: random.Random) -> Tokenizer:
    """Byte-level BPE like Qwen3's: every word of the built-in text is a token, the rest is bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    how = dict(special_tokens=list(SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    trainer = trainers.BpeTrainer(vocab_size=1024, show_progress=False, **how)
    tokenizer.train_from_iterator(sample_text(rng, 5000), trainer)
    return tokenizer


def sample_text(rng: random.Random, n: int) -> Iterator[str]:
    """n documents and the messages of n conversations, without control tokens."""
    yield from ("system\n", "user\n", "assistant\n")
    for _ in range(n):
        yield text_document(rng)
        for message in as_text(conversation(rng, thinking=rng.random() < 0.5)):
            yield message["content"]
            yield message.get("reasoning_content", "")


def draw_document(rng: random.Random, tokenizer: Tokenizer, talk: float) -> tuple[list[int], list[bool]]:
    """A document or, with probability `talk`, a conversation: its ids, with EOS, and which to learn."""
    if rng.random() >= talk:
        pieces = [text_document(rng)]
    else:
        pieces = apply_chat_template(as_text(conversation(rng, thinking=rng.random() < 0.5)), generate=False)
    token = tokenizer.token_to_id
    ids = encode(tokenizer, pieces, token(BOI), token(EOI)) + [token(EOS)]
    return ids, assistant_mask(tokenizer, ids)


class BuiltInText:
    """Documents and conversations as the tiny base was made of, as a data.TextSource."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def draw(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        return draw_document(rng, self.tokenizer, TALK)

    def fingerprint(self) -> bytes:
        return f"built-in text {RECIPE}".encode()


def init_text(model: LMFusion) -> None:
    """Scaled normal initialisation of the language model, in place, however its tensors are cut."""
    for name, p in model.text_parameters().items():
        value = torch.ones(p.shape)
        if name == "embed_tokens.weight":
            value.normal_(std=0.05)
        elif p.dim() == 2:
            value.normal_(std=p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # residual branches start small
                value /= math.sqrt(2 * model.config.num_hidden_layers)
        elif name.endswith("q_norm.weight"):  # attention that can pick one word out starts sooner
            value.fill_(2.0)
        elif name.endswith("bias"):
            value.zero_()
        fill(p, value)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens as fields of ModelConfig."""
    names = {"boi_id": BOI, "eoi_id": EOI, "eos_id": EOS}
    return {name: tokenizer.token_to_id(token) for name, token in names.items()}


def tiny_config(tokenizer: Tokenizer, **sizes) -> ModelConfig:
    """The tiny Qwen3."""
    sizes = {**SIZES, **sizes, "vocab_size": tokenizer.get_vocab_size()}
    return ModelConfig(**sizes, **special_ids(tokenizer), **NO_IMAGES)


def pretrain_base(folder: Path, seed: int = 0, steps: int = STEPS, **sizes) -> None:
    """Make the tokenizer, pretrain the language model for `steps` batches, and write `folder`."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = train_tokenizer(rng)
    config = tiny_config(tokenizer, **sizes)
    model = LMFusion(config)
    init_text(model)
    parameters = model.text_parameters()
    matrices = [p for n, p in parameters.items() if p.dim() == 2 and n.startswith("layers.")]
    others = [p for n, p in parameters.items() if p.dim() != 2 or not n.startswith("layers.")]
    optimizers = (
        torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
        Muon(matrices, MUON_LR, weight_decay=0.01),
    )

    def factor(i: int) -> float:
        """Warm-up, then a cosine to 3%."""
        return min(1.0, (i + 1) / WARMUP) * (0.03 + 0.97 * (1 + math.cos(math.pi * i / steps)) / 2)

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]
    bar = Bar(range(steps), desc="pretraining the tiny language model", unit="step")
    batches: list[list[tuple[list[int], list[bool]]]] = []
    for step in bar:
        if not batches:  # documents of like length together
            talk = 0.0 if step < PLAIN * steps else TALK
            pool = [draw_document(rng, tokenizer, talk) for _ in range(16 * BATCH)]
            pool.sort(key=lambda document: len(document[0]))
            batches = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
            rng.shuffle(batches)
        rows = [([ids], [own]) for ids, own in batches.pop()]
        tokens = Tokens.packed([r for r, _ in rows], num_patches=1, loss_mask=[s for _, s in rows])
        targets, _ = next_tokens(tokens, config.boi_id)
        learned = targets >= 0
        loss = F.cross_entropy(model.logits(model.encode(tokens).text[learned]), targets[learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.bfloat16()  # as Qwen3's own weights are stored: half the bytes
    save_base(model, tokenizer, folder)


def random_base(stock: str, folder: Path, seed: int = 0, **smaller: int) -> None:
    """A folder with a stock Qwen3's shape (or smaller), random bfloat16 weights, and the tiny tokenizer."""
    tokenizer = train_tokenizer(random.Random(seed))
    config = replace(known_config(stock), **special_ids(tokenizer), **NO_IMAGES, **smaller)
    with torch.device("meta"):
        model = LMFusion(config)
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, p in Bar(model.text_parameters().items(), desc="random weights"):
        value = torch.ones(p.shape) if p.dim() == 1 else torch.empty(p.shape)
        if p.dim() == 2:
            value.normal_(std=0.02, generator=generator)
        state[name] = value.to(torch.bfloat16)
    save_base(model, tokenizer, folder, state)


def save_base(model: LMFusion, tokenizer: Tokenizer, folder: Path, state: dict | None = None) -> None:
    """The text half of a model (or, in its place, of `state`) as a Hugging Face Qwen3 folder."""
    config, state = model.config, state or model.state_dict()
    dtype = str(state["embed_tokens.weight"].dtype).removeprefix("torch.")
    raw = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}
    raw |= {"attention_bias": False, "torch_dtype": dtype, "eos_token_id": config.eos_id}
    raw |= {name: getattr(config, name) for name in ("vocab_size", *SIZES, "rms_norm_eps")}
    tensors = {theirs: state[ours] for theirs, ours in text_names(config).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS}
    about |= {"model_max_length": config.max_position_embeddings}
    texts = {"tokenizer.json": tokenizer.to_str(pretty=True)}
    texts |= {"tokenizer_config.json": json.dumps(about, indent=1)}
    write_folder(folder, {"model.safetensors": tensors}, raw, "config.json", extra=texts)


def main() -> None:
    about = "Pretrain the tiny Qwen3 on built-in text, or write random weights in the shape of a stock one."
    parser = Parser(prog="python -m small.pretrain", description=about)
    parser.add_argument("--out", required=True, help="folder to write, which must not be there yet")
    parser.add_argument("--random", choices=tuple(STOCK), help="whose shape, to try sizes out")
    parser.add_argument("--steps", type=int, default=STEPS, help="of pretraining")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    out = Path(args.out)
    with locked(out.with_name(f".{out.name}.making")):
        if out.exists():
            raise ValueError(f"--out {out} is there already")
        if args.random:
            return random_base(args.random, out, args.seed)
        tune_torch()
        start = time.perf_counter()
        pretrain_base(out, args.seed, args.steps)
        write_made(out, time.perf_counter() - start)


def write_made(folder: Path, seconds: float) -> None:
    """MADE.json beside a base: by what it was made, and how it answers built-in questions."""
    model, tokenizer = load_qwen3(folder), load_tokenizer(folder)
    sets = {"knowledge": knowledge(), "reasoning": reasoning(300), "puzzles": puzzles(300)}
    found = {k: multiple_choice(model, partial(encode_plain, tokenizer), x, k) for k, x in sets.items()}
    made = {"commit": commit(), "command": shlex.join(["python", "-m", "small.pretrain", *sys.argv[1:]])}
    made |= {"recipe": RECIPE, "torch": torch.__version__, "seconds": round(seconds)}
    made["fingerprint"] = base_fingerprint(folder)
    made["accuracy"] = {k: x["accuracy"] for k, x in found.items()}
    write_atomic(folder / "MADE.json", json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
