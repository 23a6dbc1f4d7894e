"""Use a trained model: text -> image, image -> text, editing, chat. The work is in generate.py and chat/.

python sample.py --prompt "a big red circle in the center on a blue background"
python sample.py --caption sample.png
python sample.py --edit sample.png --prompt "make the circle green" --out edited.png
python sample.py --chat
python sample.py --text "what color is the sky? "

Shapes: n pictures; pictures are uint8 (n, 3, S, S).
"""

import argparse
import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from chat.conversation import answer_last, check_folder, read_messages, talk
from checkpoint import Trained, check_device, load_trained, locked, write_atomic
from config import Bar, Parser, check_range, read_text, run_command, tune_torch
from diffusion import SAMPLERS, T
from generate import (
    GenerationConfig,
    derive_seed,
    describe_images,
    edit_images,
    generate_images,
    generate_text,
    read_picture,
)
from lab import figures


def parse(args: list[str] | None = None) -> argparse.Namespace:
    """The flags as they were given; `check` looks at their values."""
    parser = Parser(prog="sample.py", usage="python sample.py [FLAG ...]")
    add = parser.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="paint this (repeatable)")
    add("--prompts", metavar="FILE", help="paint every line of this file")
    add("--edit", metavar="IMAGE", help="change this picture as each --prompt says")
    add("--caption", action="append", default=[], metavar="IMAGE", help="describe this picture (repeatable)")
    how = "continue this with the language model (repeatable)"
    add("--text", action="append", default=[], metavar="TEXT", help=how)
    add("--chat", action="store_true", help="talk with the model in the terminal")
    add("--chat-file", metavar="FILE", help="answer the last of the messages in this JSON file")
    add("--think", action="store_true", help="in a chat: think before answering")
    add("--checkpoint", metavar="DIR", help="run, checkpoint, hub id; else the last small run or the shipped")
    add("--out", metavar="PATH", help="file (sample.png), or folder (of a chat: runs/talk)")
    add("--n", type=int, default=1, metavar="N", help="pictures a prompt")
    add("--steps", type=int, metavar="N", help="denoising steps (default: 25; 250 for ddpm)")
    add("--cfg", type=float, metavar="S", help="guidance scale; 1 is none (1.5; edits and chat: 3)")
    add("--seed", type=int, default=0, metavar="N", help="same seed and arguments: same file")
    add("--labels", action="store_true", help="write each prompt below its picture")
    add("--gif", metavar="FILE", help="also write a film of the denoising")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add = partial(add, rare=True)
    add("--sampler", choices=SAMPLERS, default="ddim", help="ddpm is the paper's, with 250 steps")
    add("--cfg-image", type=float, default=3.0, help="guidance over the picture of --edit; 1 is none")
    add("--scale", type=int, help="pixels a side (256; 128 with --labels); 0, or in a folder: as painted")
    add("--max-tokens", type=int, help="longest text to write (default: 64; 256 an answer in a chat)")
    add("--max-images", type=int, default=4, help="in a chat: pictures an answer")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="sample among the k likeliest tokens (0: all)")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest that hold this probability")
    add("--base", help="where the base language model lies, if it was moved since training")
    add("--vae", help="where the VAE lies, if it was moved since training")
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
        lines = read_text(args.prompts, f"--prompts {args.prompts}").split("\n")
        args.prompt = args.prompt + [line.strip() for line in lines if line.strip()]
        if not args.prompt:
            raise ValueError(f"--prompts {args.prompts}: no line with text")
    if args.edit is None and any(not p.strip() for p in args.prompt):
        raise ValueError("--prompt is empty")
    if args.out is None:
        args.out = "runs/talk" if talking else "sample.png"
    args.folder = None if talking or Path(args.out).suffix else Path(args.out)
    if args.max_tokens is None:
        args.max_tokens = 256 if talking else 64
    if args.steps is None:
        args.steps = 250 if args.sampler == "ddpm" else 25
    if args.cfg is None:
        args.cfg = 3.0 if talking or args.edit else 1.5
    if args.scale is None:
        args.scale = 0 if args.folder else 128 if args.labels else 256
    check_range(args, scale=(0, 4096), n=(1, 10000), steps=(1, T), max_tokens=(1, 10**6))
    check_range(args, max_images=(0, 10**6), top_k=(0, 10**9), cfg=(-100, 100), cfg_image=(-100, 100))
    check_range(args, temperature=(0, 100), top_p=(1e-9, 1), seed=(0, 2**63 - 1))
    args.messages = read_messages(args.chat_file) if args.chat_file is not None else None
    check_device(args.device)
    args.locks = Path(args.out) if talking else args.folder if args.prompt else None  # of many files


def check_places(args: argparse.Namespace) -> None:
    """See that what will be written can be; ValueError if something else lies there."""
    if args.prompt and args.folder:
        check_picture_folder(args.folder, args.labels)
    elif args.prompt:
        figures.check_place(args.out, figures.FORMATS)
    if args.prompt and args.gif:
        figures.check_place(args.gif, figures.FILMS)
    if args.chat or args.messages:
        check_folder(Path(args.out))


def unread_words(trained: Trained, texts: list[str]) -> list[str]:
    """Words that the built-in text does not have; none is named where a model learned from other text.

    To the tokenizer of the tiny base, of at most 1,024 tokens, every word of its text is one token.
    """
    if trained.tokenizer.get_vocab_size() > 1024 or trained.info["config"].get("data") != "shapes":
        return []
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", " ".join(texts)))
    return [w for w in words if all(len(trained.tokenizer.encode(x).ids) > 1 for x in (w, f" {w}"))]


def check_picture_folder(folder: Path, labels: bool) -> None:
    """Make the folder of many pictures; OSError if it cannot be, ValueError if something lies in it."""
    if labels:
        raise ValueError(f"--labels is for a sheet; --out {folder} is a folder (a sheet has an ending: .png)")
    figures.check_place(folder / "000000.png")
    if any(p.name != ".lock" for p in folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name another folder with --out")


def paint_prompts(trained: Trained, args: argparse.Namespace, batch: int = 64) -> None:
    """A picture for every prompt, n times, painted anew or --edit changed, into one file; and the film."""
    source = None if args.edit is None else read_picture(trained, args.edit)
    prompts = [p for p in args.prompt for _ in range(args.n)]
    seeds = [derive_seed(args.seed, i) for i in range(len(prompts))]
    pictures, films = [], []
    bar = Bar(total=-(-len(prompts) // batch) * args.steps, unit="step", desc="denoising")

    def watch(x: Tensor) -> None:
        bar.update()
        if args.gif:
            films[-1].append(trained.codec.decode(x.cpu()))

    for i in range(0, len(prompts), batch):
        part = slice(i, i + batch)
        films.append([])
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
    bar.close()
    what = "each beside its prompt" if args.folder else save_page(torch.cat(pictures), prompts, args)
    print(f"{args.folder or args.out}: {len(prompts)} picture{'s' * (len(prompts) > 1)}, {what}")
    if args.gif:
        save_film(films, args)


def save_page(everything: Tensor, prompts: list[str], args: argparse.Namespace) -> str:
    """Write all pictures in one file, a grid or a sheet with their prompts; says how large it is."""
    side = args.scale or everything.shape[-1]
    if args.labels:
        page = figures.sheet(everything, prompts, columns=min(6, len(prompts)), side=side)
    else:
        page = figures.grid(everything, side)
    figures.save_image(page, args.out)
    return f"{page.width} x {page.height} pixels"


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
    names = "max_tokens max_images temperature top_k top_p steps cfg sampler seed".split()
    max_thought = max(1, args.max_tokens * 3 // 4)  # the rest is for the answer
    options = GenerationConfig(max_thought=max_thought, **{name: getattr(args, name) for name in names})
    if args.chat:
        talk(trained, options, args.think, Path(args.out))
    else:
        answer_last(trained, options, args.think, args.messages, Path(args.out))


def use_model(args: argparse.Namespace) -> None:
    """All that the flags ask for."""
    tune_torch(keep_memory=True)
    task = "chat" if args.chat or args.messages else "edit" if args.edit is not None else ""
    dtype, config = getattr(torch, args.dtype), "small-chat" if task else "small"
    trained = load_trained(args.checkpoint, args.base, args.device, dtype, args.vae, config=config)
    if task not in trained.info["config"].get("task", ""):
        print(f"note: {trained.folder} was not trained with --task {task}", file=sys.stderr)
    if words := unread_words(trained, args.prompt + args.text):
        print(f"note: words that this model has never read: {', '.join(words)}", file=sys.stderr)
    if task == "chat":
        converse(trained, args)
        return
    how = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    how["generator"] = torch.Generator().manual_seed(args.seed)
    for text in args.text:
        print(text + generate_text(trained, text, args.max_tokens, **how))
    for path in args.caption:
        picture = read_picture(trained, path)
        print(f"{path}: {describe_images(trained, picture, args.max_tokens, **how)[0]}")
    if args.prompt:
        paint_prompts(trained, args)


def main() -> None:
    args = parse()
    check(args)
    with locked(args.locks) if args.locks else nullcontext():
        check_places(args)
        use_model(args)


if __name__ == "__main__":
    run_command(main)
