"""What a model trained on chat and edits can do, on built-in cases that training never showed.

python -m chat.evaluate                               # the last run of --config small-chat
python -m chat.evaluate --n 200 --json results.json --edits edits.png --thoughts thoughts.png

decisions  mixed conversations: as many pictures as were asked for, and none where none was
direct     plain requests through chat, against the same captions as plain text to image
indirect   requests that name things instead of attributes, with and without a thought
edits      the changed attribute and every other one, read off the picture; and the source without instruction
stories    text, picture, text, picture, text from one message, each picture the one it should be

The paper has no conversations; editing is its Section 5.2. A picture is right if all five attributes are, as
small/world.py reads them, and strictly right if it hardly differs from a rendering of them. A *case* is a
conversation whose last message is the right answer.

Shapes: n cases; pictures are uint8 (n, 3, 64, 64).
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from chat.conversation import ChatPicture, Conversation, replace_images
from chat.template import image_part, parts_of, text_part
from checkpoint import Trained, load_trained, write_atomic
from config import Bar, Parser, check_range, run_command, tune_torch
from evaluate import check_shapes, in_batches, percentages, text_line, text_report, unseen_documents
from generate import GenerationConfig, derive_seed, edit_images, encode_pictures, generate_images
from lab import figures
from small.dialogues import THINK_PROMPT, Shot, conversation
from small.world import SPLITS, all_scenes, draw_edit, draw_shift, prompt_match, read_scenes, render


def seen(trained: Trained, shot: Shot) -> ChatPicture:
    """A built-in picture, as a conversation holds it."""
    pixels = render([shot.scene], shifts=[shot.shift])
    return ChatPicture(pixels[0], encode_pictures(trained, pixels)[0])


def reply(trained: Trained, messages: list[dict], thinking: bool, options: GenerationConfig) -> dict:
    """What the model answers to the last of some messages, whose pictures are `Shot`s."""
    *before, last = replace_images(messages, partial(seen, trained))
    return Conversation(trained, options, thinking, before).answer(last["content"])


def answer_all(
    trained: Trained, what: str, cases: list, thinking: list[bool], options: GenerationConfig
) -> list[dict]:
    """The model's answer in each case, with a thought or without, and with a seed of its own."""
    todo = zip(Bar(cases, desc=what), thinking, itertools.count(options.seed))
    return [reply(trained, c[:-1], think, replace(options, seed=seed)) for c, think, seed in todo]


def question(content: str | list[dict]) -> list[dict]:
    """A case of one user's message, whose right answer is not looked at."""
    return [{"role": "user", "content": content}, {"role": "assistant", "content": ""}]


def pictures_of(message: dict) -> list:
    """The pictures of a message, in order."""
    return [p["image"] for p in parts_of(message) if "image" in p]


def words_of(message: dict) -> str:
    """The text of a message."""
    return "".join(p.get("text", "") for p in parts_of(message))


def painted(message: dict, n: int = 1) -> list[Tensor | None]:
    """The n pictures of a message, uint8 (3, 64, 64); n times None if there are fewer or more."""
    found = [p.pixels for p in pictures_of(message)]
    return found if len(found) == n else [None] * n


def share(flags: Iterable[bool]) -> float:
    """Share of what is true; 0 of nothing."""
    flags = list(flags)
    return sum(flags) / max(1, len(flags))


def decisions(trained: Trained, n: int, options: GenerationConfig, split: str) -> dict:
    """Share of mixed conversations whose answer has as many pictures as it should."""
    rng = random.Random(f"decisions {options.seed}")
    thinking = [i % 2 == 0 for i in range(n)]
    cases = [conversation(rng, t, split=split) for t in thinking]
    answers = answer_all(trained, "deciding", cases, thinking, options)
    wanted = [len(pictures_of(c[-1])) for c in cases]
    right = [w == len(pictures_of(a)) for w, a in zip(wanted, answers, strict=True)]
    words = [words_of(c[-1]) == words_of(a) for c, a in zip(cases, answers, strict=True)]
    quiet = [i for i, w in enumerate(wanted) if not w]
    return {
        "conversations": n,
        "to_draw": n - len(quiet),
        "right": share(right),
        "right_where_no_picture_was_wanted": share(right[i] for i in quiet),
        "words_exactly_right": share(words),
        "words_of_answers_without_picture": share(words[i] for i in quiet),
    }


def direct(trained: Trained, n: int, options: GenerationConfig, split: str) -> dict:
    """Prompt match of held-out captions as plain text to image, and asked for in a conversation."""
    scenes = random.Random(options.seed).sample(all_scenes(split), n)
    captions = [s.caption for s in scenes]
    seeds = [derive_seed(options.seed, i) for i in range(n)]
    how = dict(steps=options.steps, cfg=options.cfg, sampler=options.sampler)
    plain = in_batches(partial(generate_images, trained, **how), "painting", 76, captions, seeds)
    out = {"prompts": n, "plain": prompt_match(scenes, plain)}
    for key, thinking in (("chat", False), ("chat_thinking", True)):
        system = [{"role": "system", "content": THINK_PROMPT}] if thinking else []
        cases = [system + question(f"draw {c}") for c in captions]
        answers = answer_all(trained, key.replace("_", " "), cases, [thinking] * n, options)
        out[key] = prompt_match(scenes, [p for a in answers for p in painted(a)])
    return out


def indirect_requests(trained: Trained, n: int, options: GenerationConfig, split: str) -> tuple[dict, list]:
    """Prompt match of indirect requests with a thought and without; and each (request, answer) with both."""
    out, shown = {"prompts": n}, []
    for key, thinking in (("thinking", True), ("not_thinking", False)):
        rng = random.Random(f"indirect {options.seed}")
        cases = [conversation(rng, thinking, ["indirect"], split=split) for _ in range(n)]
        answers = answer_all(trained, f"indirect, {key.replace('_', ' ')}", cases, [thinking] * n, options)
        pairs = list(zip(cases, answers, strict=True))
        wanted = [pictures_of(c[-1])[0].scene for c in cases]
        out[key] = prompt_match(wanted, [p for a in answers for p in painted(a)])
        if thinking:
            same = (c[-1]["reasoning_content"] == a.get("reasoning_content") for c, a in pairs)
            out["thought_exactly_right"] = share(same)
        shown.append([(words_of(c[-2]), a) for c, a in pairs])
    return out, list(zip(*shown, strict=True))


def edits(trained: Trained, n: int, options: GenerationConfig, split: str) -> tuple[dict, Tensor, list[str]]:
    """Edits to held-out scenes, plain and in chat; also the pictures before and after, and their labels."""
    rng = random.Random(f"edits {options.seed}")
    cases = [draw_edit(rng, split) for _ in range(n)]
    shifts = [draw_shift(rng) for _ in cases]
    before = render([e.source for e in cases], shifts=shifts)
    seeds = [derive_seed(options.seed, "edit", i) for i in range(n)]
    how = dict(steps=options.steps, cfg=options.cfg, sampler=options.sampler)
    edit = partial(edit_images, trained, **how)
    words = [e.instruction for e in cases]
    after = torch.stack(in_batches(edit, "editing", 50, before, words, seeds))
    same = torch.stack(in_batches(edit, "editing without instruction", 50, before, [""] * n, seeds))
    shots = [Shot(e.source, shift) for e, shift in zip(cases, shifts, strict=True)]
    talked = [question([image_part(s), text_part(w)]) for s, w in zip(shots, words, strict=True)]
    answers = answer_all(trained, "editing in chat", talked, [False] * n, options)
    pairs = list(zip(read_scenes(after), cases, strict=True))
    sources, targets = [e.source for e in cases], [e.target for e in cases]
    plain, back = prompt_match(targets, after), prompt_match(sources, same)
    chat = prompt_match(targets, [p for a in answers for p in painted(a)])
    attributes = sorted({e.attribute for e in cases})
    by_attribute = {a: share(got == e.target for got, e in pairs if e.attribute == a) for a in attributes}
    report = {
        "edits": n,
        "changed": share(getattr(got, e.attribute) == getattr(e.target, e.attribute) for got, e in pairs),
        "others_kept": share(
            replace(got, **{e.attribute: getattr(e.target, e.attribute)}) == e.target for got, e in pairs
        ),
        "right": plain["all"],
        "strict": plain["strict"],
        "residual": plain["residual"],
        "by_attribute": by_attribute,
        "source_back_without_instruction": back["all"],
        "source_back_strict": back["strict"],
        "rms_to_source_without_instruction": (same.float() - before.float()).square().mean().sqrt().item(),
        "right_in_chat": chat["all"],
        "strict_in_chat": chat["strict"],
    }
    pictures = torch.stack((before, after), 1).flatten(0, 1)  # (2n, 3, 64, 64)
    return report, pictures, [x for e in cases for x in ("", e.instruction)]


def stories(trained: Trained, n: int, options: GenerationConfig, split: str) -> dict:
    """Two requests in one message: the order of text and pictures, and each picture."""
    rng = random.Random(f"stories {options.seed}")
    cases = [conversation(rng, False, ["story"], split=split) for _ in range(n)]
    answers = answer_all(trained, "telling stories", cases, [False] * n, options)
    pairs = list(zip(cases, answers, strict=True))
    order = [[p["type"] for p in a["content"]] == "text image text image text".split() for a in answers]
    judged = [prompt_match([shot.scene for shot in pictures_of(c[-1])], painted(a, 2)) for c, a in pairs]
    right, strict = ([both[k] for both in judged] for k in ("all", "strict"))  # 0, 0.5 or 1 each
    return {
        "stories": n,
        "in_order": share(order),
        "words_exactly_right": share(words_of(c[-1]) == words_of(a) for c, a in pairs),
        "pictures_right": sum(right) / n,
        "pictures_strict": sum(strict) / n,
        "in_order_and_both_pictures_right": share(o and r == 1 for o, r in zip(order, right, strict=True)),
        "in_order_and_both_pictures_strict": share(o and r == 1 for o, r in zip(order, strict, strict=True)),
    }


def evaluate_chat(trained: Trained, n: int, options: GenerationConfig, split: str = "test") -> dict:
    """All figures, on scenes of a split, and under "edit_sheet" and "thought_sheet" the pages to look at."""
    report = {"checkpoint": str(trained.folder), "step": trained.info["step"], "split": split}
    report["decisions"] = decisions(trained, n, options, split)
    report["direct"] = direct(trained, min(n + n // 7, len(all_scenes(split))), options, split)
    report["indirect"], shown = indirect_requests(trained, n, options, split)
    report["edits"], pictures, labels = edits(trained, n, options, split)
    report["stories"] = stories(trained, max(1, n // 4), options, split)
    report["text"] = text_report(trained, unseen_documents(options.seed))
    report["edit_sheet"] = figures.sheet(pictures[:36], labels[:36], columns=12, side=96)
    report["thought_sheet"] = thought_sheet(shown[:8])
    return report


def thought_sheet(cases: list) -> Image.Image:
    """Indirect requests: the picture after a thought, above the thought; and the one without one."""
    pictures, words = [], []
    white = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    for (request, thoughtful), (_, quick) in cases:
        found = [pictures_of(a) for a in (thoughtful, quick)]
        pictures += [f[0].pixels if f else white for f in found]
        words += [f"<think> {thoughtful.get('reasoning_content', '')} </think>", request]
    return figures.sheet(pictures, words, columns=4, side=320)


def chat_table(r: dict) -> str:
    """The figures as Markdown."""
    both = itemgetter("all", "strict")
    d, p, i, e, s = (r[k] for k in ("decisions", "direct", "indirect", "edits", "stories"))
    back = e["source_back_without_instruction"], e["source_back_strict"]
    told = s["in_order_and_both_pictures_right"], s["in_order_and_both_pictures_strict"]
    rows = [
        (f"decision to draw or not, {d['conversations']} mixed conversations", d["right"]),
        ("... of those that wanted no picture", d["right_where_no_picture_was_wanted"]),
        ("... answers without picture, word for word", d["words_of_answers_without_picture"]),
        (f"direct prompts ({p['prompts']}): plain text to image, all five", *both(p["plain"])),
        ("... through chat", *both(p["chat"])),
        ("... through chat, with a thought", *both(p["chat_thinking"])),
        (f"indirect prompts ({i['prompts']}), with a thought: all five", *both(i["thinking"])),
        ("... without", *both(i["not_thinking"])),
        ("... thought right, word for word", i["thought_exactly_right"]),
        (f"edits ({e['edits']}): the whole scene", e["right"], e["strict"]),
        ("... the changed attribute", e["changed"]),
        ("... all others kept", e["others_kept"]),
        ("... asked for in chat: the whole scene", e["right_in_chat"], e["strict_in_chat"]),
        ("... instruction dropped: the source comes back", *back),
        (f"stories ({s['stories']}): text, picture, text, picture, text", s["in_order"]),
        ("... and both pictures right in all five", *told),
    ]
    attributes = ", ".join(f"{k} {100 * v:.1f}%" for k, v in e["by_attribute"].items())
    off = f"Median residual, of 255: prompts {p['plain']['residual']:.1f}, edits {e['residual']:.1f}."
    more = ["", f"Edits by attribute: {attributes}.", "", off, "", text_line(r["text"])]
    return "\n".join([*percentages(rows), *more])


def parse(args: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked: ValueError for a value out of bounds, OSError for a file that cannot be written."""
    parser = Parser(prog="chat.evaluate", usage="python -m chat.evaluate [FLAG ...]")
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="without it, the last run of --config small-chat")
    add("--base", help="where the base language model lies, if it was moved since training", rare=True)
    add("--split", choices=SPLITS[1:], default="test", help="validation: to choose; test: to report")
    add("--n", type=int, default=200, metavar="N", help="cases of each kind; a quarter of it: stories")
    add("--steps", type=int, default=25, metavar="N", help="denoising steps")
    add("--cfg", type=float, default=3.0, metavar="S", help="guidance scale; 1 is none")
    add("--seed", type=int, default=0, metavar="N", help="of the cases and of all noise")
    add("--json", metavar="FILE", help="write the figures here as well")
    add("--edits", metavar="FILE", help="write a sheet of edits here")
    add("--thoughts", metavar="FILE", help="write a sheet of indirect requests here")
    args = parser.parse_args(args)
    check_range(args, n=(1, 10_000), steps=(1, 1000), cfg=(-100, 100))
    for file, kinds in ((args.json, None), (args.edits, figures.FORMATS), (args.thoughts, figures.FORMATS)):
        if file:
            figures.check_place(file, kinds)
    return args


def main() -> None:
    args = parse()
    tune_torch(keep_memory=True)
    trained = load_trained(args.checkpoint, args.base, config="small-chat")
    check_shapes(trained)
    options = GenerationConfig(steps=args.steps, cfg=args.cfg, seed=args.seed)
    report = evaluate_chat(trained, args.n, options, args.split)
    for place, name in ((args.edits, "edit_sheet"), (args.thoughts, "thought_sheet")):
        page = report.pop(name)
        if place:
            figures.save_image(page, place)
    print(chat_table(report))
    if args.json:
        write_atomic(Path(args.json), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
