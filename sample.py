"""Use a trained model: text -> image, image -> text, text -> text.

    python sample.py --prompt "a big red circle in the center on a blue background"
    python sample.py --caption out.png
    python sample.py --text "what color is the sky? "

The prompt is encoded once. Every denoising step computes the image's patches alone: they attend to the
prompt's keys and values, conditional and unconditional as one batch, and never enter the cache. In the other
direction the clean image (t = 0) is read once, and the frozen language model writes behind it.

Shapes: n images, C, h, w channels, height and width of a latent, B sequences, V vocabulary.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cli
import figures
from checkpoint import Trained, check_device, load_trained
from diffusion import T, guide, sample
from model import IMAGE, Cache, LMFusion, Tokens
from pictures import decode_picture


def encode_text(trained: Trained, text: str, room: int) -> list[int]:
    """Token ids of a user's text, special tokens in it as plain text; ValueError if it is too long."""
    tokenizer = trained.tokenizer
    tokenizer.encode_special_tokens = True  # "<|vision_start|>" typed by a user is text, not an image
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    limit = trained.model.config.max_position_embeddings - room
    if len(ids) > limit:
        raise ValueError(
            f"the text {text[:40]!r}... is {len(ids)} tokens long; the context has room for {limit}"
        )
    return ids


# ------------------------------------------------------------------------------------------------------------
# Text -> image


@torch.inference_mode()
def generate_images(
    trained: Trained,
    prompts: list[str],
    seeds: list[int],
    steps: int = 25,
    cfg: float = 3.0,
    sampler: str = "ddim",
    watch=None,
) -> Tensor:
    """Paint a picture a prompt, uint8 (n, 3, S, S), from the noise of its seed, whatever its neighbours.

    cfg: guidance scale; 1 is none. watch(x_t) is called after every step. ValueError for a prompt that does
    not fit.
    """
    model, config = trained.model, trained.model.config
    device, P = model.boi_head.device, config.num_patches
    rows = [encode_text(trained, p, room=P + 1) + [config.boi_id] for p in prompts]
    if cfg != 1.0:  # what training dropped is what is nulled here: the whole caption, never BOI
        rows += [[config.boi_id]] * len(prompts)
    cache = model.encode(Tokens.rows(rows, P)).cache  # the prompts, once
    patches = Tokens.rows([[IMAGE]] * len(rows), P, start=[len(r) for r in rows])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise (n, C, h, w), guided."""
        copies = len(rows) // len(x)
        xx, tt = x.repeat(copies, 1, 1, 1), t.repeat(copies)
        hidden = model.encode(patches, xx, tt, cache, keep=False)  # the cache stays as it is
        eps = trained.diffusion.eps_from_output(model.unet_output(hidden), xx, tt)
        return eps if copies == 1 else guide(*eps.chunk(2), cfg)

    generators = [torch.Generator().manual_seed(s) for s in seeds]
    shape = (config.latent_channels, config.latent_size, config.latent_size)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    latents = sample(
        trained.diffusion, predict, noise, steps, sampler, trained.codec.bound, generators, watch
    )
    return trained.codec.decode(latents.cpu())


# ------------------------------------------------------------------------------------------------------------
# Text


def choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Next ids (B,) from logits (B, V). temperature 0 is greedy; top_k 0 and top_p 1 keep everything."""
    if temperature < 1e-5:  # nothing but the largest would be left
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # the first token is always inside
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(logits.device)


@torch.inference_mode()
def continue_text(
    model: LMFusion,
    text: Tensor,
    cache: Cache,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Write on from the features (B, D) of the last token of sequences of equal length; stops at EOS.

    The cache holds those sequences. Returns the new ids of each, without EOS.
    """
    alive = torch.ones(len(text), dtype=torch.bool, device=text.device)
    position, ids = int(cache.position[0, -1]) + 1, []
    for step in range(max_tokens):
        new = choose(model.logits(text), temperature, top_k, top_p, generator)
        alive = alive & (new != model.config.eos_id)
        ids.append(torch.where(alive, new, -1))
        if not alive.any() or step + 1 == max_tokens:
            break
        if not cache.room:
            cache = cache.reserve(min(max_tokens - step, 256))
        hidden = model.encode(Tokens.text(new[:, None], position + step), cache=cache)
        cache, text = cache.extend(hidden.cache), hidden.text
    return [[i for i in row if i >= 0] for row in torch.stack(ids, 1).tolist()] if ids else [[] for _ in text]


@torch.inference_mode()
def generate_text(trained: Trained, prompt: str, max_tokens: int = 64, **how) -> str:
    """Continue a text with the frozen language model alone; `how` as in `continue_text`."""
    ids = encode_text(trained, prompt, room=max_tokens)
    if not ids:
        raise ValueError("the text to continue is empty")
    model = trained.model
    hidden = model.encode(Tokens.text(torch.tensor([ids])))
    return trained.tokenizer.decode(
        continue_text(model, hidden.text[-1:], hidden.cache, max_tokens, **how)[0]
    )


@torch.inference_mode()
def describe_images(trained: Trained, pictures: Tensor, max_tokens: int = 64, **how) -> list[str]:
    """Pictures uint8 (n, 3, S, S) -> captions. The clean image is read at t = 0 between BOI and EOI."""
    model, config = trained.model, trained.model.config
    device, limit = model.boi_head.device, config.max_position_embeddings - config.num_patches - 2
    if max_tokens > limit:
        raise ValueError(f"behind a picture the context has room for {limit} tokens, not {max_tokens}")
    latents = trained.codec.encode(pictures).to(device)
    if latents.shape[1:] != (config.latent_channels, config.latent_size, config.latent_size):
        raise ValueError(
            f"pictures of {tuple(pictures.shape[2:])} pixels give latents of {tuple(latents.shape[1:])}"
        )
    tokens = Tokens.rows([[config.boi_id, IMAGE, config.eoi_id]] * len(pictures), config.num_patches)
    hidden = model.encode(tokens, latents, torch.zeros(len(pictures), dtype=torch.long, device=device))
    after_eoi = hidden.text.view(len(pictures), 2, -1)[:, 1]  # text of each row: BOI, EOI
    ids = continue_text(model, after_eoi, hidden.cache, max_tokens, **how)
    return [trained.tokenizer.decode(row) for row in ids]


def read_picture(path: str, side: int) -> Tensor:
    """A picture file as uint8 (1, 3, side, side), centre-cropped and resized; ValueError if it is not one."""
    try:
        return decode_picture(Path(path).read_bytes(), side)[None]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error.strerror if isinstance(error, OSError) else error}") from None


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="sample.py", description="Text to image, image to text, text to text.")
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="paint this (may be repeated)")
    add("--prompts", metavar="FILE", help="paint every line of this file")
    add(
        "--caption",
        action="append",
        default=[],
        metavar="IMAGE",
        help="describe this picture (may be repeated)",
    )
    add(
        "--text",
        action="append",
        default=[],
        help="continue this text with the language model alone (may be repeated)",
    )
    add(
        "--checkpoint",
        metavar="DIR",
        help="a run or a checkpoint; without it, the last run of --config small",
    )
    add("--base", help="where the base language model lies, if it was moved since training")
    add("--vae", help="where the VAE lies, if it was moved since training")
    add("--out", default="sample.png", help="where the picture goes; several become a grid")
    add("--n", type=int, default=1, help="pictures a prompt")
    add("--steps", type=int, default=None, help="denoising steps (default: 25 for ddim, 250 for ddpm)")
    add("--sampler", choices=("ddim", "ddpm"), default="ddim", help="ddpm is the paper's, with 250 steps")
    add("--cfg", type=float, default=3.0, help="guidance scale; 1 is none")
    add("--seed", type=int, default=0, help="same seed and arguments: same file")
    add("--labels", action="store_true", help="write each prompt below its picture")
    add("--scale", type=int, help="pixels a side; 0: as generated (default: 256, or 128 with --labels)")
    add("--gif", metavar="FILE", help="also write a film of the denoising")
    add("--max-tokens", type=int, default=64, help="longest text to write")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="sample among the likeliest tokens that hold this probability",
    )
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model's weights")
    return parser.parse_args(args)


def check(args: argparse.Namespace) -> None:
    """ValueError for values that argparse lets through."""
    if args.prompts:
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {args.prompts}: {error}") from None
        args.prompt = args.prompt + [line.strip() for line in lines if line.strip()]
        if not args.prompt:
            raise ValueError(f"--prompts {args.prompts}: no line with text")
    if not (args.prompt or args.caption or args.text):
        raise ValueError("nothing to do: give --prompt TEXT, --prompts FILE, --caption IMAGE or --text TEXT")
    if any(not p.strip() for p in args.prompt):
        raise ValueError("--prompt is empty")
    args.steps = args.steps if args.steps is not None else {"ddim": 25, "ddpm": 250}[args.sampler]
    if args.scale is None:
        args.scale = 128 if args.labels else 256
    limits = {
        "scale": (0, 4096),
        "n": (1, 10000),
        "steps": (1, T),
        "max_tokens": (1, 10**6),
        "top_k": (0, 10**9),
        "cfg": (-100, 100),
        "temperature": (0, 100),
        "top_p": (1e-9, 1),
        "seed": (0, 2**63 - 1),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be from {low} to {high}"
            )
    check_device(args.device)
    if args.prompt:
        figures.check_place(args.out, figures.FORMATS)
        if args.gif:
            figures.check_place(args.gif, figures.FILMS)


def paint(trained: Trained, args: argparse.Namespace, batch: int = 64) -> None:
    """Text to image for every prompt, n times, into one file; and the film."""
    prompts = [p for p in args.prompt for _ in range(args.n)]
    seeds = [random.Random(f"{args.seed}-{i}").getrandbits(63) for i in range(len(prompts))]
    pictures, films = [], []
    bar = tqdm(total=-(-len(prompts) // batch) * args.steps, unit="step", desc="denoising", disable=None)
    for i in range(0, len(prompts), batch):
        frames: list[Tensor] = []

        def watch(x: Tensor, frames=frames) -> None:
            bar.update()
            if args.gif:
                frames.append(trained.codec.decode(x.cpu()))

        pictures.append(
            generate_images(
                trained,
                prompts[i : i + batch],
                seeds[i : i + batch],
                args.steps,
                args.cfg,
                args.sampler,
                watch,
            )
        )
        films.append(frames)
    bar.close()
    everything = torch.cat(pictures)
    native = everything.shape[-1]
    if args.labels:
        page = figures.sheet(everything, prompts, columns=min(6, len(prompts)), side=args.scale or native)
    else:
        page = figures.grid(everything, args.scale or native)
    figures.save_image(page, args.out)
    print(
        f"{args.out}: {len(prompts)} picture{'s' * (len(prompts) > 1)}, {page.width} x {page.height} pixels"
    )
    if args.gif:
        frames = [figures.grid(torch.cat(step), args.scale or native) for step in zip(*films, strict=True)]
        figures.save_gif(frames, args.gif)
        print(f"{args.gif}: {len(frames)} frames")


def main() -> None:
    args = parse()
    check(args)
    cli.tune_cpu()
    trained = load_trained(args.checkpoint, args.base, args.device, getattr(torch, args.dtype), args.vae)
    how = dict(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=torch.Generator().manual_seed(args.seed),
    )
    for text in args.text:
        print(text + generate_text(trained, text, args.max_tokens, **how))
    for path in args.caption:
        side = trained.model.config.latent_size * trained.codec.patch
        print(f"{path}: {describe_images(trained, read_picture(path, side), args.max_tokens, **how)[0]}")
    if args.prompt:
        paint(trained, args)


if __name__ == "__main__":
    cli.run(main)
