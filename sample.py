"""Use a trained model: text -> image, image -> text, editing, chat (the work is in generate.py and chat.py).

python sample.py --prompt "a big red circle in the center on a blue background"
python sample.py --caption out.png
python sample.py --edit out.png --prompt "make the circle green"
python sample.py --chat
python sample.py --text "what color is the sky? "
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from chat.conversation import answer_last, check_folder, read_messages, talk
from checkpoint import Trained, check_device, load_trained, write_atomic
from config import Parser, run_command, tune_torch
from diffusion import T
from generate import Style, describe_images, edit_images, generate_images, generate_text, read_picture
from lab import figures

# ------------------------------------------------------------------------------------------------------------
# Command line


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="sample.py", description="Text to image, image to text, editing, chat, text to text."
    )
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="paint this (may be repeated)")
    add("--prompts", metavar="FILE", help="paint every line of this file")
    add("--edit", metavar="IMAGE", help="change this picture as each --prompt says")
    add("--caption", action="append", default=[], metavar="IMAGE", help="describe this picture (repeatable)")
    add(
        "--text", action="append", default=[], help="continue this with the language model alone (repeatable)"
    )
    add("--chat", action="store_true", help="talk with the model in the terminal")
    add("--chat-file", metavar="FILE", help="answer the last of the messages in this JSON file")
    add("--think", action="store_true", help="in a chat: think before answering")
    add("--max-images", type=int, default=4, help="in a chat: pictures an answer")
    add(
        "--checkpoint",
        metavar="DIR",
        help="a run or a checkpoint; without it, the last run of --config small, for --edit and chats of "
        "small-chat",
    )
    add("--base", help="where the base language model lies, if it was moved since training")
    add("--vae", help="where the VAE lies, if it was moved since training")
    add(
        "--out",
        help="file of the picture, several in a grid (sample.png); without an ending, a folder: 000000.png "
        "and its prompt in 000000.txt, and so on; folder of a chat (chat)",
    )
    add("--n", type=int, default=1, help="pictures a prompt")
    add("--steps", type=int, default=None, help="denoising steps (default: 25 for ddim, 250 for ddpm)")
    add("--sampler", choices=("ddim", "ddpm"), default="ddim", help="ddpm is the paper's, with 250 steps")
    add("--cfg", type=float, default=3.0, help="guidance scale; 1 is none")
    add("--cfg-image", type=float, default=3.0, help="guidance over the picture of --edit; 1 is none")
    add("--seed", type=int, default=0, help="same seed and arguments: same file")
    add("--labels", action="store_true", help="write each prompt below its picture")
    add(
        "--scale",
        type=int,
        help="pixels a side; 0: as generated (default: 256, or 128 with --labels, or 0 in a folder)",
    )
    add("--gif", metavar="FILE", help="also write a film of the denoising")
    add("--max-tokens", type=int, help="longest text to write (default: 64; 256 an answer in a chat)")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest that hold this probability")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model's weights")
    return parser.parse_args(args)


def check(args: argparse.Namespace) -> None:
    """ValueError for values that argparse lets through; fills in the defaults that depend on others."""
    flags = "--prompt --prompts --edit --caption --text --chat --chat-file".split()
    given = [f for f in flags if getattr(args, f[2:].replace("-", "_")) not in (None, [], False)]
    talking = args.chat or args.chat_file is not None
    if not given:
        raise ValueError(f"nothing to do: give one of {', '.join(f for f in flags if f != '--edit')}")
    if talking and len(given) > 1:
        raise ValueError(f"{' and '.join(given)} do not go together: a chat is all that is done")
    if args.edit is not None and not (args.prompt or args.prompts):
        raise ValueError("--edit needs an instruction: give --prompt TEXT or --prompts FILE")
    if args.think and not talking:
        raise ValueError("--think is for --chat and --chat-file")
    if args.prompts is not None:
        try:
            lines = Path(args.prompts).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {args.prompts}: {error}") from None
        args.prompt = args.prompt + [line.strip() for line in lines if line.strip()]
        if not args.prompt:
            raise ValueError(f"--prompts {args.prompts}: no line with text")
    if args.edit is None and any(not p.strip() for p in args.prompt):
        raise ValueError("--prompt is empty")
    args.out = args.out if args.out is not None else "chat" if talking else "sample.png"
    args.max_tokens = args.max_tokens if args.max_tokens is not None else 256 if talking else 64
    args.steps = args.steps if args.steps is not None else {"ddim": 25, "ddpm": 250}[args.sampler]
    args.folder = Path(args.out) if not Path(args.out).suffix and not talking else None
    if args.scale is None:
        args.scale = 0 if args.folder else 128 if args.labels else 256
    limits = {
        "scale": (0, 4096),
        "n": (1, 10000),
        "steps": (1, T),
        "max_tokens": (1, 10**6),
        "max_images": (0, 10**6),
        "top_k": (0, 10**9),
        "cfg": (-100, 100),
        "cfg_image": (-100, 100),
        "temperature": (0, 100),
        "top_p": (1e-9, 1),
        "seed": (0, 2**63 - 1),
    }
    for name, (low, high) in limits.items():
        if not low <= getattr(args, name) <= high:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be from {low} to {high}"
            )
    args.messages = read_messages(args.chat_file) if args.chat_file is not None else None
    check_device(args.device)
    if args.prompt and args.folder:
        check_picture_folder(args.folder, args.labels)
    elif args.prompt:
        figures.check_place(args.out, figures.FORMATS)
    if args.prompt:
        if args.gif:
            figures.check_place(args.gif, figures.FILMS)
    if talking:
        check_folder(Path(args.out))


def check_picture_folder(folder: Path, labels: bool) -> None:
    """Make the folder of many pictures; OSError if it cannot be, ValueError if something lies in it."""
    if labels:
        raise ValueError(f"--labels is for a sheet; --out {folder} is a folder (a sheet has an ending: .png)")
    figures.check_place(folder / "000000.png")
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name another folder with --out")


def pixels(trained: Trained) -> int:
    """Pixels a side of the model's pictures."""
    return trained.model.config.latent_size * trained.codec.patch


def paint_prompts(trained: Trained, args: argparse.Namespace, batch: int = 64) -> None:
    """A picture for every prompt, n times, painted anew or --edit changed, into one file; and the film."""
    source = None if args.edit is None else read_picture(args.edit, pixels(trained))
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

        part = slice(i, i + batch)
        how = (seeds[part], args.steps, args.cfg, args.sampler, watch)
        if source is None:
            painted = generate_images(trained, prompts[part], *how)
        else:
            copies = source.expand(len(prompts[part]), -1, -1, -1)
            painted = edit_images(trained, copies, prompts[part], *how, args.cfg_image)
        if args.folder:  # one by one, and no more of them in memory than a batch
            write_pictures(args.folder, i, painted, prompts[part], args.scale)
        else:
            pictures.append(painted)
        films.append(frames)
    bar.close()
    if args.folder:
        print(f"{args.folder}: {len(prompts)} picture{'s' * (len(prompts) > 1)}, each beside its prompt")
    else:
        save_page(torch.cat(pictures), prompts, args)
    if args.gif:
        save_film(films, args)


def save_page(everything: Tensor, prompts: list[str], args: argparse.Namespace) -> None:
    """All pictures in one file: a grid, or a sheet with their prompts."""
    native = everything.shape[-1]
    if args.labels:
        page = figures.sheet(everything, prompts, columns=min(6, len(prompts)), side=args.scale or native)
    else:
        page = figures.grid(everything, args.scale or native)
    figures.save_image(page, args.out)
    print(
        f"{args.out}: {len(prompts)} picture{'s' * (len(prompts) > 1)}, {page.width} x {page.height} pixels"
    )


def write_pictures(folder: Path, first: int, pictures: Tensor, prompts: list[str], scale: int) -> None:
    """Pictures from number `first` on, and their prompts beside them: what FID and CLIP score tools read."""
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True), start=first):
        figures.save_image(figures.to_image(picture, scale or None), folder / f"{number:06d}.png")
        write_atomic(folder / f"{number:06d}.txt", prompt + "\n")


def save_film(films: list[list[Tensor]], args: argparse.Namespace) -> None:
    """The steps of all batches side by side."""
    steps = [torch.cat(step) for step in zip(*films, strict=True)]
    frames = [figures.grid(step, args.scale or step.shape[-1]) for step in steps]
    figures.save_gif(frames, args.gif)
    print(f"{args.gif}: {len(frames)} frames")


def converse(trained: Trained, args: argparse.Namespace) -> None:
    """A conversation in the terminal, or the answer to one in a file."""
    style = Style(
        max_tokens=args.max_tokens,
        max_thought=max(1, args.max_tokens * 3 // 4),  # the rest is for the answer
        max_images=args.max_images,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        steps=args.steps,
        cfg=args.cfg,
        sampler=args.sampler,
        seed=args.seed,
    )
    if args.chat:
        talk(trained, style, args.think, Path(args.out))
    else:
        answer_last(trained, style, args.think, args.messages, Path(args.out))


def main() -> None:
    args = parse()
    check(args)
    tune_torch()
    task = "chat" if args.chat or args.messages else "edit" if args.edit is not None else ""
    trained = load_trained(
        args.checkpoint,
        args.base,
        args.device,
        getattr(torch, args.dtype),
        args.vae,
        config="small-chat" if task else "small",
    )
    if task not in trained.info["config"].get("task", ""):
        print(f"note: {trained.folder} was not trained with --task {task}", file=sys.stderr)
    if task == "chat":
        converse(trained, args)
        return
    how = dict(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=torch.Generator().manual_seed(args.seed),
    )
    for text in args.text:
        print(text + generate_text(trained, text, args.max_tokens, **how))
    for path in args.caption:
        picture = read_picture(path, pixels(trained))
        print(f"{path}: {describe_images(trained, picture, args.max_tokens, **how)[0]}")
    if args.prompt:
        paint_prompts(trained, args)


if __name__ == "__main__":
    run_command(main)
