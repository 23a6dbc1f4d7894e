"""A conversation with a trained model, in the terminal or from a file (`sample.py --chat`, `--chat-file`).

The paper has no conversations; all of this is our choice. Messages are those of template.py; the pictures in
them are `ChatPicture`. Every turn renders the whole conversation in Qwen3's template and reads only what the
context does not hold yet: the template drops the thoughts of earlier turns, so a little is read again.
Ctrl-C drops the answer that is being written; at the prompt it ends the conversation.

Shapes: C, h, w channels, height and width of a latent, S pixels a side.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from chat import template
from checkpoint import Trained, write_atomic
from config import is_deliberate, read_text
from generate import Context, GenerationConfig, Watch, encode_pictures, generate, read_picture
from lab import figures
from small.dialogues import THINK_PROMPT

HELP = "/image PATH shows a picture with the next message; /save [FILE.md]; /new; /help; /quit"
SIDE = 256  # pixels a side, at least, of the files that pictures are written to


@dataclass
class ChatPicture:
    """A picture of a conversation, shown or painted."""

    pixels: Tensor  # uint8 (3, S, S)
    latent: Tensor  # (C, h, w), clean
    names: dict[Path, str] = field(default_factory=dict)  # of its files, by their folders


Show = Callable[[str | ChatPicture, bool], None]  # is called with what comes, and whether it is a thought


def see(trained: Trained, path: Path) -> ChatPicture:
    """A picture file; ValueError if it is none."""
    pixels = read_picture(trained, path)
    return ChatPicture(pixels[0], encode_pictures(trained, pixels)[0])


class Conversation:
    """Messages, and what the model has read of them. ValueError for a base without chat tokens."""

    def __init__(self, trained: Trained, options: GenerationConfig, thinking: bool, messages: list[dict]):
        self.trained, self.options, self.thinking = trained, options, thinking
        self.messages = list(messages)
        self.context = Context(trained)
        self.files: set[Path] = set()  # that it was saved in
        if thinking and not any(m["role"] == "system" for m in self.messages):
            self.messages.insert(0, {"role": "system", "content": THINK_PROMPT})
        template.encode(trained.tokenizer, [template.IM_START, template.IM_END], 0, 0)

    @torch.inference_mode()
    def answer(self, content: str | list[dict], show: Show | None = None, watch: Watch = None) -> dict:
        """The model's message after one of the user's; both are kept, or neither: ValueError if too long.

        show(what, thought) is called as it comes, watch after each step of denoising.
        """
        tokenizer, config = self.trained.tokenizer, self.trained.model.config
        messages = [*self.messages, {"role": "user", "content": content}]
        pieces = template.apply_chat_template(messages, self.thinking)
        latents = [p.content.latent for p in pieces if isinstance(p, template.Picture)]
        ids = template.encode(tokenizer, pieces, config.boi_id, config.eoi_id)
        features = self.context.read(*self.context.rewind(ids, latents))
        thoughts, parts = "", []
        for what, thought in self.spell(generate(self.trained, self.context, features, self.options, watch)):
            if show is not None:
                show(what, thought)
            if isinstance(what, ChatPicture):
                parts.append(template.image_part(what))
            elif thought:
                thoughts += what
            elif parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += what
            else:
                parts.append(template.text_part(what))
        if parts and parts[0]["type"] == "text":  # behind a thought the template begins without a line break
            parts[0]["text"] = parts[0]["text"].lstrip("\n")
        message = {"role": "assistant", "content": parts}
        if thoughts.strip("\n"):
            message["reasoning_content"] = thoughts.strip("\n")
        self.messages = [*messages, message]
        return message

    def spell(self, events: Iterable[int | Tensor]) -> Iterator[tuple[str | ChatPicture, bool]]:
        """Ids and latents -> text, character by character, and pictures; and whether it is a thought."""
        tokenizer = self.trained.tokenizer
        think, end_think = tokenizer.token_to_id(template.THINK), tokenizer.token_to_id(template.END_THINK)
        run, shown, thought = [], "", False
        for event in itertools.chain(events, [None]):  # None: the end
            word = isinstance(event, int) and event not in (think, end_think)
            if word:
                run.append(event)
            text = tokenizer.decode(run)
            if text != shown and not (word and text.endswith("\ufffd")):  # half a character
                yield text[len(shown) :], thought
                shown = text
            if not word:
                run, shown = [], ""
            if isinstance(event, Tensor):
                yield ChatPicture(self.trained.codec.decode(event[None].cpu())[0], event), False
            elif event is not None and not word:
                thought = event == think


def file_in(picture: ChatPicture, folder: Path) -> str:
    """The name of a picture's file in a folder. If it has none, it is written under the next free number."""
    place, side = folder.resolve(), picture.pixels.shape[-1]
    if place not in picture.names:
        names = (f"picture-{number:03d}.png" for number in itertools.count(1))
        name = next(n for n in names if not (folder / n).exists())
        figures.save_image(figures.to_image(picture.pixels, side * -(-SIDE // side)), folder / name)
        picture.names[place] = name
    return picture.names[place]


def replace_images(messages: list[dict], by: Callable[[Any], Any]) -> list[dict]:
    """The same messages with by(image) in the place of every image."""
    out = []
    for m in messages:
        if isinstance(m["content"], list):
            m = m | {"content": [p | {"image": by(p["image"])} if "image" in p else p for p in m["content"]]}
        out.append(m)
    return out


def as_markdown(messages: list[dict]) -> str:
    """Messages with names of files as Markdown: roles in bold, thoughts quoted, pictures in their places."""
    blocks = []
    for m in messages:
        thoughts = (m.get("reasoning_content") or "").strip("\n")
        lines = thoughts.split("\n") if thoughts else []
        blocks += [f"**{m['role']}**", "\n".join(f"> {line}".rstrip() for line in lines)]
        for p in template.parts_of(m):
            blocks.append(p["text"] if p["type"] == "text" else f"![{p['image']}]({p['image']})")
    return "\n\n".join(block.strip("\n") for block in blocks if block.strip("\n")) + "\n"


def save(conversation: Conversation, path: Path) -> None:
    """Write FILE.md, FILE.json, and the pictures beside them. ValueError for files of something else."""
    figures.check_place(path, {".md": "Markdown"})
    other = path.with_suffix(".json")
    if path.resolve() not in conversation.files and (path.exists() or other.exists()):
        raise ValueError(f"{path if path.exists() else other} exists already; name another file")
    messages = replace_images(conversation.messages, lambda picture: file_in(picture, path.parent))
    write_atomic(other, json.dumps(messages, indent=1, ensure_ascii=False) + "\n")
    conversation.files.add(path.resolve())
    write_atomic(path, as_markdown(messages))


def check_folder(folder: Path) -> None:
    """Make the folder of a conversation; OSError if it cannot be, ValueError if it holds another one."""
    figures.check_place(folder / "chat.md")
    taken = (folder / "chat.md", folder / "chat.json", *folder.glob("picture-*.png"))
    if any(path.exists() for path in taken):
        raise ValueError(f"{folder} holds another conversation; name another folder with --out")


def read_messages(path: str) -> list[dict]:
    """The messages of a JSON file, images as paths; ValueError unless the last is the user's."""
    text = read_text(path)
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    template.check_messages(messages, context=path)
    for number, m in enumerate(messages, start=1):
        for part in template.parts_of(m):
            if part["type"] == "image" and not isinstance(part["image"], str):
                raise ValueError(f"{path}: message {number} has an image that is not the path of a file")
    if messages[-1]["role"] != "user":
        raise ValueError(f"{path}: the last message is the {messages[-1]['role']}'s; it must be the user's")
    return replace_images(messages, lambda name: Path(path).parent / name)


class Printer:
    """Prints an answer as it comes, and writes its pictures to a folder."""

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps = folder, steps
        self.bar: tqdm | None = None
        self.thought, self.line_is_empty = False, True

    def write(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
            self.line_is_empty = text.endswith("\n")

    def end_line(self) -> None:
        self.write("" if self.line_is_empty else "\n")

    def watch(self, _: Tensor) -> None:
        """One step of denoising; the bar has a line of its own."""
        if self.bar is None:
            self.end_line()
            self.bar = tqdm(total=self.steps, desc="painting", unit="step", leave=False, disable=None)
        self.bar.update()

    def turn(self, thought: bool) -> None:
        """No bar from here on, and a thought or none."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if thought != self.thought:
            self.write(template.THINK if thought else template.END_THINK)
            self.thought = thought

    def show(self, what: str | ChatPicture, thought: bool) -> None:
        """A piece of text, or a picture as the name of its file."""
        self.turn(thought)
        self.write(what if isinstance(what, str) else f"[{self.folder / file_in(what, self.folder)}]")


def respond(conversation: Conversation, content: str | list[dict], folder: Path) -> None:
    """Print the answer to a message as it comes; errors as in `Conversation.answer`."""
    printer = Printer(folder, conversation.options.steps)
    try:
        conversation.answer(content, printer.show, printer.watch)
    finally:
        printer.turn(False)
        printer.end_line()


def answer_last(
    trained: Trained, options: GenerationConfig, thinking: bool, messages: list, folder: Path
) -> None:
    """Answer the last message, the user's; images are paths. All of it is written to `folder`."""
    *before, last = replace_images(messages, lambda path: see(trained, path))
    conversation = Conversation(trained, options, thinking, before)
    respond(conversation, last["content"], folder)
    save(conversation, folder / "chat.md")


def read_line() -> str | None:
    """What the user types; None at the end of the input and at Ctrl-C."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    except UnicodeDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        return ""


def talk(trained: Trained, options: GenerationConfig, thinking: bool, folder: Path) -> None:
    """A conversation, line by line, until /quit or the end of the input; an error costs one line."""
    conversation = Conversation(trained, options, thinking, [])
    waiting: list[dict] = []  # pictures for the next message
    print(HELP)
    while (line := read_line()) not in (None, "/quit"):
        command, _, rest = line.partition(" ")
        try:
            if command == "/help":
                print(HELP)
            elif command == "/new":
                conversation, waiting = Conversation(trained, options, thinking, []), []
            elif command == "/image":
                waiting.append(template.image_part(see(trained, Path(os.path.expanduser(rest.strip())))))
            elif command == "/save":
                path = Path(os.path.expanduser(rest.strip() or folder / "chat.md"))
                save(conversation, path)
                print(path)
            elif command.startswith("/"):
                raise ValueError(f"{command} is no command: {HELP}")
            elif line or waiting:
                content = [*waiting, template.text_part(line)] if waiting else line
                respond(conversation, content, folder)
                waiting = []
        except KeyboardInterrupt:
            print("interrupted: that message and its answer are dropped", file=sys.stderr)
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) and not is_deliberate(error):
                raise
            print(f"error: {error}", file=sys.stderr)
