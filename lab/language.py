"""What the language model knows (Section 4.3): perplexity, and multiple choice by log-likelihood.

    perplexity        of documents
    multiple_choice   the form that HellaSwag, PIQA, SIQA and WinoGrande take, from JSON lines:
                      {"context": "the cow says", "choices": ["moo", "woof"], "label": 0}
    knowledge         built-in questions about facts that no caption states
    reasoning         a scene in words and an instruction: what comes of it
    puzzles           two or three sentences about people, and a question

Shapes: B rows, N tokens, D hidden, V vocabulary.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from attention import Tokens
from config import Bar, read_text
from model import LMFusion
from small import world


@dataclass(frozen=True)
class Question:
    """A text, what may follow it, and the number of the choice that should."""

    context: str
    choices: tuple[str, ...]
    label: int


def read_questions(path: str) -> list[Question]:
    """The questions of a JSONL file; ValueError names the file, the line and what is wrong there."""
    questions = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
        if wrong := question_fault(row):
            raise ValueError(f"{path}: line {number} {wrong}")
        questions.append(Question(row["context"], tuple(row["choices"]), row["label"]))
    if not questions:
        raise ValueError(f"{path}: no question in it")
    return questions


def question_fault(row: object) -> str | None:
    """What is wrong with a line of questions, or None."""
    if not isinstance(row, dict):
        return 'is no object with "context", "choices" and "label"'
    for key in ("context", "choices", "label"):
        if key not in row:
            return f'has no "{key}"; it takes "context", "choices" and "label"'
    context, choices, label = row["context"], row["choices"], row["label"]
    if not isinstance(context, str) or not context.strip():
        return f'has as "context" {context!r:.40}; it must be a text'
    if not isinstance(choices, list) or len(choices) < 2:
        return f'has as "choices" {choices!r:.40}; it must be a list of two texts at least'
    if not all(isinstance(c, str) and c.strip() for c in choices):
        return f'has "choices" that are no texts: {choices!r:.60}'
    if any("\ud800" <= c <= "\udfff" for text in (context, *choices) for c in text):
        return "has text that is not UTF-8: it holds half a surrogate pair"
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        return f'has as "label" {label!r:.40}; it must be a number from 0 to {len(choices) - 1}'
    return None


def cut(encode: Callable[[str], list[int]], context: str, choice: str) -> tuple[list[int], int]:
    """Ids of context and choice as one text, and how many are the context's alone; a space joins the two."""
    context = context.rstrip()
    whole, alone = encode(f"{context} {choice.strip()}"), encode(context)
    same = 0
    while same < min(len(whole) - 1, len(alone)) and whole[same] == alone[same]:
        same += 1
    return whole, same


@torch.inference_mode()
def log_likelihoods(model: LMFusion, rows: list[tuple[list[int], int]], batch: int = 32) -> list[float]:
    """log P(ids[n:] | ids[:n]) of each (ids, n), in nats; rows of like length are computed together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    out = [0.0] * len(rows)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        hidden = model.encode(Tokens.rows([rows[i][0] for i in part], 1), keep=False).text  # (T_text, D)
        begin = 0
        for i in part:
            ids, n = rows[i]
            predicting = hidden[begin + n - 1 : begin + len(ids) - 1]  # each from the token before
            logits = model.logits(predicting).float()
            target = torch.tensor(ids[n:], dtype=torch.long, device=logits.device)
            out[i] = -F.cross_entropy(logits, target, reduction="sum").item()
            begin += len(ids)
    return out


def multiple_choice(
    model: LMFusion, encode: Callable[[str], list[int]], questions: list[Question], what: str = "choosing"
) -> dict[str, float]:
    """Share of questions whose right choice is the likeliest, per character of the choice and in all.

    The first, "accuracy", is what the field calls acc_norm, the second, "accuracy_unnormalised", acc.
    encode: text -> ids. ValueError for a question that is longer than the context.
    """
    limit = model.config.max_position_embeddings
    rows = []
    for number, q in enumerate(questions):
        for choice in q.choices:
            ids, n = cut(encode, q.context, choice)
            if len(ids) > limit or not n:
                long = f"question {number + 1} ({q.context[:40]!r}...) is {len(ids)} tokens long, {n} of them"
                raise ValueError(f"{long} context; the model takes {limit} in all and needs one of context")
            rows.append((ids, n))
    found: list[float] = []
    for start in Bar(range(0, len(rows), 512), desc=what, leave=False):
        found += log_likelihoods(model, rows[start : start + 512])
    hits, values = [0, 0], iter(found)
    for q in questions:
        plain = [next(values) for _ in q.choices]
        per_character = [v / len(c.strip()) for v, c in zip(plain, q.choices, strict=True)]
        for k, scores in enumerate((per_character, plain)):
            hits[k] += scores.index(max(scores)) == q.label
    n = len(questions)
    return {"questions": n, "accuracy": hits[0] / n, "accuracy_unnormalised": hits[1] / n}


@torch.inference_mode()
def perplexity(model: LMFusion, documents: list[list[int]], batch: int = 32) -> float:
    """exp of the mean cross-entropy of every token but the first of each document (token ids)."""
    found = log_likelihoods(model, [(ids, 1) for ids in documents], batch)
    return math.exp(-sum(found) / sum(len(ids) - 1 for ids in documents))


def knowledge() -> list[Question]:
    """One question a fact of the text world, the choices being all values that such a fact can have."""
    kinds = ((" is", world.COLOR_THINGS), (" is a", world.SHAPE_THINGS), (" is", world.SIZE_THINGS))
    rows = [(x + be, value, tuple(table)) for be, table in kinds for value, xs in table.items() for x in xs]
    rows += [(f"the opposite of {a} is", b, tuple(world.OPPOSITE)) for a, b in world.OPPOSITE.items()]
    for fact in world.LORE:
        context, _, value = fact.rpartition(" ")
        values = next(v for v in (tuple(world.SOUNDS.values()), world.DAYS, world.NUMBERS) if value in v)
        rows.append((context, value, values))
    return [Question(context, choices, choices.index(value)) for context, value, choices in rows]


def reasoning(n: int, seed: int = 0, split: str = "test") -> list[Question]:
    """n scenes in words and an instruction: which scene comes of it? Neither sentence says so alone."""
    rng, out = random.Random(f"reasoning {seed}"), []
    while len(out) < n:
        edit = world.draw_edit(rng, split)
        others = [(a, v) for a in world.VALUES for v in world.VALUES[a] if v != getattr(edit.source, a)]
        changed = [(a, replace(edit.source, **{a: v})) for a, v in rng.sample(others, len(others))]
        changed = [(a, scene) for a, scene in changed if scene.color != scene.background]
        same = [scene for a, scene in changed if a == edit.attribute and scene != edit.target]
        elsewhere = [scene for a, scene in changed if a != edit.attribute]
        if not same:  # there are two sizes only
            same, elsewhere = elsewhere[:1], elsewhere[1:]
        scenes = rng.sample([edit.target, edit.source, same[0], elsewhere[0]], 4)
        context, choices = f"{edit.source.caption}. {edit.instruction}:", tuple(s.caption for s in scenes)
        out.append(Question(context, choices, scenes.index(edit.target)))
    return out


def puzzles(n: int, seed: int = 0) -> list[Question]:
    """n questions about people; the answer needs two of the sentences, or one and a fact."""
    rng, out = random.Random(f"puzzles {seed}"), []
    while len(out) < n:
        puzzle = world.draw_puzzle(rng)
        question, answer = puzzle.questions[0]
        out.append(Question(f"{puzzle.premises}. {question}?", puzzle.choices, puzzle.choices.index(answer)))
    return out
