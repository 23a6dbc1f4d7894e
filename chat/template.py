"""Qwen3's chat template in plain Python: messages -> what the model reads, text and pictures.

    pieces = apply_chat_template([{"role": "user", "content": "Name a colour."}])
    text_of(pieces)                  # "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"
    encode(tokenizer, pieces, ...)   # token ids

Character for character what the Jinja template in Qwen3's tokenizer_config.json makes of the roles system,
user and assistant (tools are not built). The paper has no conversations: pictures in messages are our choice,
`[{"type": "text", "text": "What is"}, {"type": "image", "image": ...}]` as for Qwen-VL.

What the template itself writes is kept apart from what stands in the messages: the first are `Control`
pieces and become control tokens; "<|im_end|>" typed by a user is text, and its ids are those of text.
"""

import reprlib
from dataclasses import dataclass
from itertools import groupby

from tokenizers import Tokenizer

from attention import IMAGE
from load_qwen3 import encode_plain


class Control(str):
    """A control token of the template. Everything else in a rendered conversation is text."""


@dataclass
class Picture:
    """A picture that stands in a message."""

    content: object  # path, tensor, ...: the caller's


Piece = Control | str | Picture

IM_START, IM_END = Control("<|im_start|>"), Control("<|im_end|>")
THINK, END_THINK = Control("<think>"), Control("</think>")
VISION = "<|vision_start|><|image_pad|><|vision_end|>"  # a picture, in Qwen-VL's template
ROLES = ("system", "user", "assistant")
KEYS = ("role", "content", "reasoning_content")


def text_part(text: str) -> dict:
    """A text as a part of a message."""
    return {"type": "text", "text": text}


def image_part(image: object) -> dict:
    """A picture as a part of a message."""
    return {"type": "image", "image": image}


def parts_of(message: dict) -> list[dict]:
    """The parts of a message, also of one whose content is a string."""
    content = message["content"]
    return content if isinstance(content, list) else [text_part(content)]


def check_messages(messages: list[dict], context: str = "") -> None:
    """ValueError in one line, with the number (from 1) of the first message that is wrong.

    A message is {"role": system, user or assistant, "content": a string or a list of parts}; an assistant's
    may have "reasoning_content", a string or None. A part is {"type": "text", "text": a string} or, but for
    system messages, {"type": "image", "image": anything}. The error reads "context: message 2 ...".
    """
    prefix = f"{context}: " if context else ""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{prefix}messages must be a list of at least one message, not {short(messages)}")
    for number, message in enumerate(messages, start=1):
        if wrong := message_fault(message):
            raise ValueError(f"{prefix}message {number} {wrong}")


def short(value: object) -> str:
    """A value for an error: one line, cut short."""
    return " ".join(reprlib.repr(value).split())


def message_fault(message: object) -> str | None:
    """What is wrong with a message, or None."""
    if not isinstance(message, dict):
        return f"is {short(message)}, not an object with role and content"
    for key in KEYS[:2]:
        if key not in message:
            return f"has no {key}; it must have role and content"
    for key in message:
        if key not in KEYS:
            return f"has the key {short(key)}; it takes {', '.join(KEYS)} (tools are not built)"
    role, content, thoughts = (message.get(key) for key in KEYS)
    if role not in ROLES:
        return f"has role {short(role)}; it must be one of {', '.join(ROLES)} (tools are not built)"
    if thoughts is not None and role != "assistant":
        return f"has reasoning_content, but role {role}; only an assistant's message takes it"
    if not isinstance(thoughts, str | None):
        return f"has reasoning_content {short(thoughts)}; it must be a string"
    if not isinstance(content, str | list):
        return f"has content {short(content)}; it must be a string or a list of parts"
    texts = [thoughts or "", content if isinstance(content, str) else ""]
    for number, part in enumerate(content if isinstance(content, list) else [], start=1):
        form = part.get("type") if isinstance(part, dict) else None
        known = form in ("text", "image") and set(part) == {"type", form}
        if not known or (form == "text" and not isinstance(part["text"], str)):
            forms = '{"type": "text", "text": a string} or {"type": "image", "image": ...}'
            return f"has as part {number} {short(part)}; it must be {forms}"
        if form == "image" and role == "system":
            return f"has an image as part {number}, but role system; it must be a user's or an assistant's"
        texts.append(part["text"] if form == "text" else "")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:  # JSON can spell it, no tokenizer takes it
        return "has text that is not UTF-8: it holds half a surrogate pair"


def split_content(message: dict) -> tuple[str, list[str | Picture]]:
    """The text before the first picture of a message, and all from that picture on."""
    # str(): a Control that somebody handed in as content is text
    parts = [str(p["text"]) if p["type"] == "text" else Picture(p["image"]) for p in parts_of(message)]
    n = next((i for i, p in enumerate(parts) if isinstance(p, Picture)), len(parts))
    return "".join(parts[:n]), parts[n:]


def apply_chat_template(messages: list[dict], thinking: bool = True, generate: bool = True) -> list[Piece]:
    """A conversation as Qwen3 reads it: control tokens, text between them, pictures.

    `generate`: ends with the beginning of an answer (the template's add_generation_prompt); `thinking` =
    False: of an answer whose thoughts are over (enable_thinking). Thoughts stand in "reasoning_content" or in
    the content before "</think>"; they are shown after the last question only. Neighbouring texts are one
    piece, and none is empty. ValueError as from `check_messages`.
    """
    check_messages(messages)
    end = len(messages) - 1
    last_question = max((i for i, m in enumerate(messages) if is_question(m)), default=end)
    pieces: list[Piece] = []
    for i, message in enumerate(messages):
        head, rest = split_content(message)
        pieces += [IM_START, f"{message['role']}\n"]
        if message["role"] == "assistant":
            thoughts = message.get("reasoning_content")
            if thoughts is None:
                thoughts, head = split_thoughts(head)
            if i > last_question and (i == end or thoughts):
                pieces += [THINK, "\n" + thoughts.strip("\n") + "\n", END_THINK, "\n\n"]
                head = head.lstrip("\n")
        pieces += [head, *rest, IM_END, "\n"]
    if generate:
        pieces += [IM_START, "assistant\n"]
        if not thinking:
            pieces += [THINK, "\n\n", END_THINK, "\n\n"]
    return merge(pieces)


def is_question(message: dict) -> bool:
    """Is it a user's message, and not what a tool answered?"""
    head, rest = split_content(message)
    text = text_of([head, *rest])
    tool = text.startswith("<tool_response>") and text.endswith("</tool_response>")
    return message["role"] == "user" and not tool


def split_thoughts(text: str) -> tuple[str, str]:
    """The thoughts in an assistant's text ("" without "</think>"), and the answer."""
    if END_THINK not in text:
        return "", text
    first, *_, last = text.split(END_THINK)
    return first.rstrip("\n").split(THINK)[-1].lstrip("\n"), last.lstrip("\n")


def merge(pieces: list[Piece]) -> list[Piece]:
    """The same pieces, neighbouring texts joined and empty ones left out."""
    merged: list[Piece] = []
    for is_text, group in groupby(pieces, key=lambda p: isinstance(p, str) and not isinstance(p, Control)):
        run = list(group)
        if not is_text:
            merged += run
        elif any(run):
            merged.append("".join(run))
    return merged


def text_of(pieces: list[Piece]) -> str:
    """The string that the template writes; a picture is "<|vision_start|><|image_pad|><|vision_end|>"."""
    return "".join(VISION if isinstance(piece, Picture) else piece for piece in pieces)


def encode(tokenizer: Tokenizer, pieces: list[Piece], boi_id: int, eoi_id: int) -> list[int]:
    """Token ids of a rendered conversation; a picture is boi_id, IMAGE, eoi_id.

    ValueError without <|im_start|> or <|im_end|> in the vocabulary; other controls are then read as text.
    """
    controls = {piece: tokenizer.token_to_id(piece) for piece in pieces if isinstance(piece, Control)}
    for piece in (IM_START, IM_END):
        if piece in controls and controls[piece] is None:
            raise ValueError(f"this base has no chat tokens: {piece} is not in its vocabulary")
    ids: list[int] = []
    for piece in merge([str(p) if isinstance(p, Control) and controls[p] is None else p for p in pieces]):
        if isinstance(piece, Picture):
            ids += [boi_id, IMAGE, eoi_id]
        else:
            ids += [controls[piece]] if isinstance(piece, Control) else encode_plain(tokenizer, piece)
    return ids


def assistant_mask(tokenizer: Tokenizer, ids: list[int]) -> list[bool]:
    """Of each id, whether an assistant says it: from behind its "<|im_start|>" on; of plain text, all."""
    start, end = tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END)
    assistant = encode_plain(tokenizer, "assistant\n")[0]
    if start not in ids:
        return [True] * len(ids)
    out, own = [], False
    for i, token in enumerate(ids):
        if token == start:
            own = ids[i + 1 : i + 2] == [assistant]
        out.append(own and token != start)
        if token == end:
            own = False
    return out
