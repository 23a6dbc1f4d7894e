"""What a model trained on chat and edits can do, on built-in cases that training never showed.

python -m chat.evaluate                               # the last run of --config small-chat
python -m chat.evaluate --n 200 --json results.json --edits edits.png --thoughts thoughts.png

decisions  mixed conversations: as many pictures as were asked for, and none where none was
direct     plain requests through chat, against the same captions as plain text to image
indirect   requests that name things instead of attributes, with and without a thought
edits      the changed attribute and every other one, read off the picture; and the source without instruction
stories    text, picture, text, picture, text from one message, each picture the one it should be
answers    questions about pictures and about the world, word for word

A picture is right if all five attributes are, read by template matching (evaluate.py).
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from chat.conversation import ChatPicture, Conversation
from checkpoint import Trained, load_trained, write_atomic
from config import Parser, run_command, tune_torch
from evaluate import in_batches, prompt_match, read_scenes, text_line, text_report
from generate import Style, edit_images, encode_pictures, generate_images
from lab import figures
from small.dialogues import THINK_PROMPT, Shot, conversation
from small.world import ATTRIBUTES, Scene, all_scenes, draw_edit, draw_shift, render, text_document


def seen(trained: Trained, shot: Shot) -> ChatPicture:
    """A built-in picture, as a conversation holds it."""
    pixels = render([shot.scene], shifts=[shot.shift])
    return ChatPicture(pixels[0], encode_pictures(trained, pixels)[0])


def with_pictures(trained: Trained, messages: list[dict]) -> list[dict]:
    """The same messages with their pictures rendered."""
    out = []
    for m in messages:
        content = m["content"]
        if isinstance(content, list):
            content = [p | {"image": seen(trained, p["image"])} if "image" in p else p for p in content]
        out.append(m | {"content": content})
    return out


def pictures_of(message: dict) -> list:
    """The pictures of a message, in order."""
    return [p["image"] for p in message["content"] if isinstance(p, dict) and "image" in p]


def words_of(message: dict) -> str:
    """The text of a message."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(p.get("text", "") for p in content)


def reply(trained: Trained, messages: list[dict], thinking: bool, style: Style) -> dict:
    """What the model answers to the last of some messages."""
    *before, last = with_pictures(trained, messages)
    return Conversation(trained, style, thinking, before).answer(last["content"])


def answer_all(trained: Trained, what: str, cases: list[list[dict]], thinking, style: Style) -> list[dict]:
    """The answers to the last question of each conversation, whose last message is the right answer."""
    bar = tqdm(enumerate(cases), total=len(cases), desc=what, disable=None)
    think = thinking if isinstance(thinking, list) else [thinking] * len(cases)
    return [reply(trained, c[:-1], think[i], replace(style, seed=style.seed + i)) for i, c in bar]


def share(flags: list[bool]) -> float:
    """Share of what is true; 0 of nothing."""
    return sum(flags) / max(1, len(flags))


def painted(message: dict) -> Scene | None:
    """The scene of the one picture of a message; None if there is none, or there are several."""
    found = pictures_of(message)
    return read_scenes(found[0].pixels[None])[0] if len(found) == 1 else None


def decisions(trained: Trained, n: int, style: Style) -> dict:
    """Share of mixed conversations whose answer has as many pictures as it should."""
    rng = random.Random(f"decisions {style.seed}")
    thinking = [i % 2 == 0 for i in range(n)]
    cases = [conversation(rng, t, held_out=True) for t in thinking]
    answers = answer_all(trained, "deciding", cases, thinking, style)
    wanted = [len(pictures_of(c[-1])) for c in cases]
    got = [len(pictures_of(a)) for a in answers]
    right = [a == b for a, b in zip(wanted, got, strict=True)]
    words = [words_of(c[-1]) == words_of(a) for c, a in zip(cases, answers, strict=True)]
    quiet = [r for r, w in zip(right, wanted, strict=True) if not w]
    return {
        "conversations": n,
        "to_draw": sum(w > 0 for w in wanted),
        "right": share(right),
        "right_where_no_picture_was_wanted": share(quiet),
        "words_exactly_right": share(words),
        "words_of_answers_without_picture": share([x for x, w in zip(words, wanted, strict=True) if not w]),
    }


def direct(trained: Trained, n: int, style: Style) -> dict:
    """Prompt match of held-out captions as plain text to image, and asked for in a conversation."""
    scenes = random.Random(style.seed).sample(all_scenes(held_out=True), n)
    captions = [s.caption for s in scenes]
    seeds = [random.Random(f"{style.seed}-{i}").getrandbits(63) for i in range(n)]
    plain = in_batches(
        lambda i, j: generate_images(
            trained, captions[i:j], seeds[i:j], style.steps, style.cfg, style.sampler
        ),
        n,
        76,
        "painting",
    )
    out = {"prompts": n, "plain": prompt_match(scenes, torch.stack(plain))}
    for key, thinking in (("chat", False), ("chat_thinking", True)):
        system = [{"role": "system", "content": THINK_PROMPT}] if thinking else []
        end = {"role": "assistant", "content": ""}
        cases = [[*system, {"role": "user", "content": f"draw {c}"}, end] for c in captions]
        answers = answer_all(trained, key.replace("_", " "), cases, thinking, style)
        out[key] = match(scenes, [painted(a) for a in answers])
    return out


def match(wanted: list[Scene], got: list[Scene | None]) -> dict[str, float]:
    """Share of scenes that are right, by attribute and "all"; a missing one is wrong in everything."""
    pairs = list(zip(wanted, got, strict=True))
    out = {k: share([g is not None and getattr(w, k) == getattr(g, k) for w, g in pairs]) for k in ATTRIBUTES}
    return out | {"all": share([w == g for w, g in pairs])}


def indirect_requests(trained: Trained, n: int, style: Style) -> tuple[dict, list]:
    """Prompt match of indirect requests with a thought and without; and each (request, answer) with both."""
    out, shown = {"prompts": n}, []
    for key, thinking in (("thinking", True), ("not_thinking", False)):
        rng = random.Random(f"indirect {style.seed}")
        cases = [conversation(rng, thinking, ["indirect"], held_out=True) for _ in range(n)]
        answers = answer_all(trained, f"indirect, {key.replace('_', ' ')}", cases, thinking, style)
        scenes = [pictures_of(c[-1])[0].scene for c in cases]
        out[key] = match(scenes, [painted(a) for a in answers])
        if thinking:
            right = [
                c[-1]["reasoning_content"] == a.get("reasoning_content")
                for c, a in zip(cases, answers, strict=True)
            ]
            out["thought_exactly_right"] = share(right)
        shown.append([(words_of(c[-2]), a) for c, a in zip(cases, answers, strict=True)])
    return out, list(zip(*shown, strict=True))


def edits(trained: Trained, n: int, style: Style) -> tuple[dict, Tensor, list[str]]:
    """Edits to held-out scenes: right if the whole scene is; and what comes without an instruction."""
    rng = random.Random(f"edits {style.seed}")
    cases = [draw_edit(rng, held_out=True) for _ in range(n)]
    shifts = [draw_shift(rng) for _ in cases]
    before = render([e.source for e in cases], shifts=shifts)
    seeds = [random.Random(f"{style.seed}-edit-{i}").getrandbits(63) for i in range(n)]

    def edited(instructions: list[str], what: str) -> Tensor:
        return torch.stack(
            in_batches(
                lambda i, j: edit_images(
                    trained, before[i:j], instructions[i:j], seeds[i:j], style.steps, style.cfg, style.sampler
                ),
                n,
                50,
                what,
            )
        )

    after = edited([e.instruction for e in cases], "editing")
    same = edited([""] * n, "editing without instruction")
    got, kept = read_scenes(after), read_scenes(same)
    changed = [
        getattr(g, e.attribute) == getattr(e.target, e.attribute) for g, e in zip(got, cases, strict=True)
    ]
    others = [
        all(getattr(g, a) == getattr(e.target, a) for a in ATTRIBUTES if a != e.attribute)
        for g, e in zip(got, cases, strict=True)
    ]
    talked = []
    for edit, shift in zip(cases, shifts, strict=True):
        shown = {"type": "image", "image": Shot(edit.source, shift)}
        question = {"role": "user", "content": [shown, {"type": "text", "text": edit.instruction}]}
        talked.append([question, {"role": "assistant", "content": ""}])
    answers = answer_all(trained, "editing in chat", talked, False, style)
    report = {
        "edits": n,
        "changed": share(changed),
        "others_kept": share(others),
        "right": share([a and b for a, b in zip(changed, others, strict=True)]),
        "by_attribute": {
            a: share([g == e.target for g, e in zip(got, cases, strict=True) if e.attribute == a])
            for a in ATTRIBUTES
            if any(e.attribute == a for e in cases)
        },
        "source_back_without_instruction": share([k == e.source for k, e in zip(kept, cases, strict=True)]),
        "rms_to_source_without_instruction": (same.float() - before.float()).square().mean().sqrt().item(),
        "right_in_chat": share([painted(a) == e.target for a, e in zip(answers, cases, strict=True)]),
    }
    pictures = torch.stack([x for pair in zip(before, after, strict=True) for x in pair])
    labels = [x for e in cases for x in ("", e.instruction)]
    return report, pictures, labels


def stories(trained: Trained, n: int, style: Style) -> dict:
    """Two requests in one message: the order of text and pictures, and each picture."""
    rng = random.Random(f"stories {style.seed}")
    cases = [conversation(rng, False, ["story"], held_out=True) for _ in range(n)]
    answers = answer_all(trained, "telling stories", cases, False, style)
    order, words, each, both = [], [], [], []
    for c, a in zip(cases, answers, strict=True):
        kinds = [p["type"] for p in a["content"]]
        order.append(kinds == ["text", "image", "text", "image", "text"])
        words.append(words_of(a) == words_of(c[-1]))
        wanted = [s.scene for s in pictures_of(c[-1])]
        found = pictures_of(a)
        right = [False, False]
        if len(found) == 2:
            got = read_scenes(torch.stack([f.pixels for f in found]))
            right = [w == g for w, g in zip(wanted, got, strict=True)]
        each += right
        both.append(order[-1] and all(right))
    return {
        "stories": n,
        "in_order": share(order),
        "words_exactly_right": share(words),
        "pictures_right": share(each),
        "in_order_and_both_pictures_right": share(both),
    }


def evaluate_chat(trained: Trained, n: int, style: Style) -> dict:
    """All figures, and under "edit_sheet" and "thought_sheet" the pages to look at."""
    rng = random.Random(f"held-out text {style.seed}")
    report = {
        "checkpoint": str(trained.folder),
        "step": trained.info["step"],
        "decisions": decisions(trained, n, style),
        "direct": direct(trained, min(n + n // 7, len(all_scenes(held_out=True))), style),
    }
    report["indirect"], shown = indirect_requests(trained, n, style)
    report["edits"], pictures, labels = edits(trained, n, style)
    report["stories"] = stories(trained, max(1, n // 4), style)
    report["text"] = text_report(trained, [text_document(rng) for _ in range(200)])
    report["edit_sheet"] = figures.sheet(pictures[:36], labels[:36], columns=12, side=96)
    report["thought_sheet"] = thought_sheet(shown[:8])
    return report


def thought_sheet(cases: list) -> Image.Image:
    """Indirect requests: the picture after a thought, the one without, and the words beside them."""
    rows = []
    for (request, thoughtful), (_, quick) in cases:
        found = [pictures_of(a) for a in (thoughtful, quick)]
        pictures = [f[0].pixels if f else torch.full((3, 32, 32), 255, dtype=torch.uint8) for f in found]
        rows.append((pictures, [request, f"<think> {thoughtful.get('reasoning_content', '')} </think>"]))
    return figures.cases(rows, ["after the thought", "without one"])


def chat_table(r: dict) -> str:
    """The figures as Markdown."""

    def percent(x: float) -> str:
        return f"{100 * x:.1f}%"

    d, p, i, e, s = (r[k] for k in ("decisions", "direct", "indirect", "edits", "stories"))
    rows = [
        (f"decision to draw or not, {d['conversations']} mixed conversations", d["right"]),
        ("... of those that wanted no picture", d["right_where_no_picture_was_wanted"]),
        ("... answers without picture, word for word", d["words_of_answers_without_picture"]),
        (f"direct prompts ({p['prompts']}): plain text to image, all five", p["plain"]["all"]),
        ("... through chat", p["chat"]["all"]),
        ("... through chat, with a thought", p["chat_thinking"]["all"]),
        (f"indirect prompts ({i['prompts']}), with a thought: all five", i["thinking"]["all"]),
        ("... without", i["not_thinking"]["all"]),
        ("... thought right, word for word", i["thought_exactly_right"]),
        (f"edits ({e['edits']}): the whole scene", e["right"]),
        ("... the changed attribute", e["changed"]),
        ("... all others kept", e["others_kept"]),
        ("... asked for in chat: the whole scene", e["right_in_chat"]),
        ("... instruction dropped: the source comes back", e["source_back_without_instruction"]),
        (f"stories ({s['stories']}): text, picture, text, picture, text", s["in_order"]),
        ("... and both pictures right in all five", s["in_order_and_both_pictures_right"]),
    ]
    lines = ["| what | right |", "|---|---|", *(f"| {what} | {percent(x)} |" for what, x in rows)]
    attributes = ", ".join(f"{k} {percent(v)}" for k, v in e["by_attribute"].items())
    lines += ["", f"Edits by attribute: {attributes}.", "", text_line(r["text"])]
    return "\n".join(lines)


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m chat.evaluate", description="Figures of a model trained on built-in chat and edits."
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="without it, the last run of --config small-chat")
    add("--base", help="where the base language model lies, if it was moved since training")
    add("--n", type=int, default=200, help="cases of each kind (a quarter of that: stories)")
    add("--steps", type=int, default=25, help="denoising steps")
    add("--cfg", type=float, default=3.0, help="guidance scale; 1 is none")
    add("--seed", type=int, default=0, help="of the cases and of all noise")
    add("--json", metavar="FILE", help="write the figures here as well")
    add("--edits", metavar="FILE", help="write a sheet of edits here")
    add("--thoughts", metavar="FILE", help="write a sheet of indirect requests and their thoughts here")
    args = parser.parse_args(args)
    for name, low, high in (("n", 1, 10_000), ("steps", 1, 1000), ("cfg", -100, 100)):
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be from {low} to {high}")
    if args.json:
        figures.check_place(args.json)
    for sheet in (args.edits, args.thoughts):
        if sheet:
            figures.check_place(sheet, figures.FORMATS)
    return args


def main() -> None:
    args = parse()
    tune_torch()
    trained = load_trained(args.checkpoint, args.base, config="small-chat")
    if args.base:
        trained.info["base"] = args.base
    pixels = trained.model.config.latent_size * trained.codec.patch
    if pixels != 32:
        raise ValueError(f"{trained.folder} paints {pixels} pixels a side; the built-in shapes have 32")
    report = evaluate_chat(trained, args.n, Style(steps=args.steps, cfg=args.cfg, seed=args.seed))
    for place, name in ((args.edits, "edit_sheet"), (args.thoughts, "thought_sheet")):
        page = report.pop(name)
        if place:
            figures.save_image(page, place)
    print(chat_table(report))
    if args.json:
        write_atomic(Path(args.json), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
