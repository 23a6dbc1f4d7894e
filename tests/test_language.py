"""language.py: likelihoods are those of a plain loop, the right choice is counted, questions have answers."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections import Counter
from types import SimpleNamespace

import helpers
import pytest
import torch
from conftest import build_tokenizer
from test_world import differing
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from attention import Tokens
from lab.language import (
    Question,
    cut,
    knowledge,
    log_likelihoods,
    multiple_choice,
    perplexity,
    puzzles,
    read_questions,
    reasoning,
)
from load_qwen3 import encode_plain, load_tokenizer
from small.world import (
    COLOR_THINGS,
    DAYS,
    FACTS,
    LORE,
    NUMBERS,
    OPPOSITE,
    SHAPE_THINGS,
    SIZE_THINGS,
    SOUNDS,
    SPLITS,
    VALUES,
    all_scenes,
)

# ---- where a context ends and a choice begins ----


def tokenizers(name: str) -> Tokenizer:
    return load_tokenizer(helpers.base()) if name == "words" else build_tokenizer()


def merging() -> Tokenizer:
    """A byte-level BPE that does not split at spaces: "s " is one token, and so is " m"."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("s", "Ġ"), ("Ġ", "m")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize("name", ("words", "bytes"))
@pytest.mark.parametrize("context", ("the cow says", "red and blue make", "what is it?", "ä"))
@pytest.mark.parametrize("choice", ("moo", "bottom right", "on a red", "7"))
def test_context_and_choice_are_one_text_with_one_space_which_is_the_choices(name, context, choice):
    tokenizer = tokenizers(name)

    def encode(text: str) -> list[int]:
        return encode_plain(tokenizer, text)

    ids, n = cut(encode, context, choice)
    assert ids == encode(f"{context} {choice}")
    assert tokenizer.decode(ids[:n]) == context and tokenizer.decode(ids[n:]) == f" {choice}"
    for before, after in ((" ", ""), ("\n\t ", " "), ("", "  "), ("  ", "\n")):
        assert cut(encode, context + before, after + choice + after) == (ids, n)


def test_a_token_that_reaches_over_the_border_is_the_choices():
    tokenizer = merging()

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    ids, n = cut(encode, "it says", "moo")
    assert [tokenizer.decode([i]) for i in ids[n - 1 :]] == ["y", "s ", "m", "o", "o"]
    ids, n = cut(encode, "it say", "moo")  # nothing merges with "y"
    assert [tokenizer.decode([i]) for i in ids[n - 1 :]] == ["y", " m", "o", "o"]


def test_the_last_token_is_always_the_choices():
    """Also where the context alone gives as many tokens and the same ones."""
    for whole in ([4], [4, 5], [4, 5, 6]):
        assert cut(lambda text, ids=whole: ids, "a", "b") == (whole, len(whole) - 1)


# ---- likelihoods ----


def drawn_rows(n: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Rows of 2 to 12 ids, of which one at least is context and one at least is not."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        ids = [rng.randrange(64) for _ in range(rng.randint(2, 12))]
        rows.append((ids, rng.randint(1, len(ids) - 1)))
    return rows


def by_loop(model, ids: list[int], n: int) -> float:
    """log P(ids[n:] | ids[:n]), each token from a forward pass over those before it."""
    total = 0.0
    for i in range(n, len(ids)):
        with torch.no_grad():
            logits = model.text_logits(torch.tensor([ids[:i]]))[0, -1].double()
        total += (logits[ids[i]] - logits.logsumexp(0)).item()
    return total


@pytest.mark.parametrize("separation", ("deep", "shallow", "none"))
def test_log_likelihoods_are_those_of_a_loop_over_the_tokens(make_model, separation):
    model, rows = make_model(dtype=torch.float64, separation=separation), drawn_rows(12)
    want = [by_loop(model, ids, n) for ids, n in rows]
    assert log_likelihoods(model, rows) == pytest.approx(want, rel=1e-5)
    assert min(abs(a - b) for i, a in enumerate(want) for b in want[:i]) > 1e-3  # no two rows alike


def test_log_likelihoods_depend_neither_on_the_batch_nor_on_the_order(make_model):
    model, rows = make_model(), drawn_rows(23, seed=1)
    want = log_likelihoods(model, rows)
    for batch in (1, 2, 5, 22, 23):
        assert log_likelihoods(model, rows, batch) == pytest.approx(want, rel=1e-4)
    order = random.Random(2).sample(range(23), 23)
    for batch in (3, 32):
        found = log_likelihoods(model, [rows[i] for i in order], batch)
        assert found == pytest.approx([want[i] for i in order], rel=1e-4)


def test_log_likelihoods_of_the_parts_of_a_row_add_up(make_model):
    model, ids = make_model(), [3, 9, 1, 60, 22, 22, 5, 31, 40]
    whole, *parts = log_likelihoods(model, [(ids, 1), (ids[:5], 1), (ids, 5)])
    assert whole == pytest.approx(sum(parts), rel=1e-5)


def test_no_rows_have_no_likelihoods(make_model):
    assert log_likelihoods(make_model(), []) == []


@pytest.mark.parametrize("batch", (1, 3, 32))
def test_perplexity_is_that_of_a_loop_over_the_tokens(make_model, batch):
    model, documents = make_model(dtype=torch.float64), [ids for ids, _ in drawn_rows(8, seed=3)]
    terms = [-by_loop(model, ids, 1) for ids in documents]
    want = math.exp(sum(terms) / sum(len(ids) - 1 for ids in documents))
    assert perplexity(model, documents, batch) == pytest.approx(want, rel=1e-5)


def test_long_documents_weigh_more_in_the_perplexity(make_model):
    model, (long, short) = make_model(), ([3, 9, 1, 60, 22, 22, 5, 31], [7, 40])
    a, b = (math.log(perplexity(model, [ids])) for ids in (long, short))
    assert math.log(perplexity(model, [long, short])) == pytest.approx((7 * a + b) / 8, rel=1e-5)


# ---- multiple choice ----

BITS = {"a": 1, "b": 2, " ": 2}  # an even distribution of these three would have 1.58 each
LETTERS = list(BITS)


class Unigrams:
    """Stands for a model: every token is as likely after one text as after any other, 2^-BITS."""

    config = SimpleNamespace(max_position_embeddings=40)
    text = torch.tensor([-BITS[c] for c in LETTERS]) * math.log(2)

    def encode(self, tokens: Tokens, keep: bool) -> SimpleNamespace:
        return SimpleNamespace(text=torch.zeros(int((tokens.document >= 0).sum()), 1))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.text.expand(len(hidden), -1)


def letters(text: str) -> list[int]:
    return [LETTERS.index(c) for c in text]


def asked(*rows: tuple[tuple[str, ...], int]) -> list[Question]:
    return [Question("ab", choices, label) for choices, label in rows]


def test_the_two_accuracies_by_hand():
    """The space before a choice has 2 bits. "b" has 4 in all, and 4 a letter; "aaaa" has 6, and 1.5."""
    disagree, agree = ("b", "aaaa"), ("bb", "ab", "bbb")  # of the latter: 6, 5, 8 bits and 3, 2.5, 2.67
    for questions, normalised, plain in (
        (asked((disagree, 0)), 0, 1),
        (asked((disagree, 1)), 1, 0),
        (asked((agree, 1)), 1, 1),
        (asked((agree, 0)), 0, 0),
        (asked((agree, 2)), 0, 0),
        (asked((disagree, 1), (agree, 1), (agree, 0), (disagree, 1)), 0.75, 0.25),
    ):
        want = {"questions": len(questions), "accuracy": normalised, "accuracy_unnormalised": plain}
        assert multiple_choice(Unigrams(), letters, questions) == want


def test_spaces_around_a_choice_count_as_no_characters():
    """Were they characters of "b", it would have 0.4 bits each and be ahead of "aaaa"."""
    (question,) = asked((("b" + 9 * " ", "aaaa"), 1))
    assert multiple_choice(Unigrams(), letters, [question])["accuracy"] == 1


def test_many_questions_keep_their_answers_apart():
    """Of more choices than are computed at once, and of different numbers of choices."""
    rng, questions, right = random.Random(0), [], []
    for _ in range(400):
        choices = tuple("a" * rng.randint(1, 3) + "b" * rng.randint(0, 2) for _ in range(rng.randint(2, 4)))
        bits = [2 + sum(BITS[c] for c in choice) for choice in choices]
        questions.append(Question("ab", choices, rng.randrange(len(choices))))
        right.append(bits.index(min(bits)) == questions[-1].label)
    assert sum(len(q.choices) for q in questions) > 2 * 512
    found = multiple_choice(Unigrams(), letters, questions)
    assert found["accuracy_unnormalised"] == sum(right) / 400 and 0.2 < sum(right) / 400 < 0.5


def test_a_real_model_is_asked_as_a_loop_would():
    trained = helpers.perturbed()
    model = trained.model.double()

    def encode(text: str) -> list[int]:
        return encode_plain(trained.tokenizer, text)

    questions = knowledge()[::9] + puzzles(6)
    hits, plain_hits = 0, 0
    for q in questions:
        context, scores = encode(q.context), []
        for choice in q.choices:
            scores.append(by_loop(model, context + encode(" " + choice), len(context)))
        norm = [s / len(c) for s, c in zip(scores, q.choices, strict=True)]
        hits += norm.index(max(norm)) == q.label
        plain_hits += scores.index(max(scores)) == q.label
    found = multiple_choice(model, encode, questions)
    assert found == {
        "questions": len(questions),
        "accuracy": hits / len(questions),
        "accuracy_unnormalised": plain_hits / len(questions),
    }
    assert 0 < hits < len(questions)


def test_a_question_that_is_longer_than_the_context_is_named():
    whole, short = (
        Question("a" * 38, ("b", "a"), 0),
        Question("a", ("b", "a"), 0),
    )  # 38 + 2 letters: just fits
    assert multiple_choice(Unigrams(), letters, [short, whole])["questions"] == 2
    with pytest.raises(ValueError, match=r"question 2 \('aaaaaa.*is 41 tokens long.*takes 40 in all"):
        multiple_choice(Unigrams(), letters, [short, Question("a" * 38, ("a", "bb"), 0)])


def test_a_question_whose_context_melts_into_the_choice_is_refused():
    with pytest.raises(ValueError, match="question 1 .*0 of them context.*needs one of context"):
        multiple_choice(Unigrams(), lambda text: [0], asked((("a", "b"), 0)))


# ---- questions of one's own ----

GOOD = {"context": "the cow says", "choices": ["moo", "woof"], "label": 0}


def changed(**changes: object) -> str:
    return json.dumps(GOOD | changes)


def test_questions_are_read_from_lines_of_json(tmp_path):
    file = tmp_path / "q.jsonl"
    more = {"context": "zwölf ist", "choices": ["1", "2", "12"], "label": 2, "source": "of no interest"}
    text = "\ufeff" + json.dumps(GOOD) + "\r\n\n   \n" + json.dumps(more, ensure_ascii=False) + "\n"
    file.write_bytes(text.encode())
    assert read_questions(str(file)) == [
        Question("the cow says", ("moo", "woof"), 0),
        Question("zwölf ist", ("1", "2", "12"), 2),
    ]


def test_a_line_of_questions_ends_at_a_newline_and_nowhere_else(tmp_path):
    """U+2028, U+0085 and their like may stand inside a JSON text; str.splitlines would cut there."""
    file, row = tmp_path / "q.jsonl", GOOD | {"context": "one\u2028two\x85three", "choices": ["\u2029a", "b"]}
    file.write_text((json.dumps(row, ensure_ascii=False) + "\n") * 2, encoding="utf-8")
    assert read_questions(str(file)) == 2 * [Question("one\u2028two\x85three", ("\u2029a", "b"), 0)]


@pytest.mark.parametrize("changes", ({"context": "a \ud83d cow"}, {"choices": ["moo", "\udc00"]}))
def test_half_a_surrogate_pair_is_named(tmp_path, changes):
    file = tmp_path / "q.jsonl"
    file.write_text(json.dumps(GOOD | changes) + "\n")
    with pytest.raises(ValueError, match="q.jsonl: line 1 .*surrogate"):
        read_questions(str(file))


BAD_LINES = {
    "no JSON": ("{context: 1}", "is not JSON"),
    "half a line": (json.dumps(GOOD)[:-9], "is not JSON"),
    "JSON as deep as the sea": ("[" * 100_000, "is not JSON"),
    "a list": ("[1, 2]", 'is no object with "context"'),
    "a text": ('"moo"', 'is no object with "context"'),
    "no context": (json.dumps({k: GOOD[k] for k in ("choices", "label")}), 'has no "context"'),
    "no choices": (json.dumps({k: GOOD[k] for k in ("context", "label")}), 'has no "choices"'),
    "no label": (json.dumps({k: GOOD[k] for k in ("context", "choices")}), 'has no "label"'),
    "a context that is a number": (changed(context=12), '"context" 12; it must be a text'),
    "a blank context": (changed(context=" \n"), r"""has as "context" ' \\n'; it must be a text"""),
    "choices that are a text": (changed(choices="moo"), "'moo'; it must be a list of two texts at least"),
    "one choice": (changed(choices=["moo"]), r"\['moo'\]; it must be a list of two texts at least"),
    "a choice that is a number": (changed(choices=["moo", 3]), r"no texts: \['moo', 3\]"),
    "a blank choice": (changed(choices=["moo", " "]), r"no texts: \['moo', ' '\]"),
    "a label that is a bool": (changed(label=True), "True; it must be a number from 0 to 1"),
    "a label below": (changed(label=-1), "-1; it must be a number from 0 to 1"),
    "a label above": (changed(choices=["a", "b", "c"], label=3), "3; it must be a number from 0 to 2"),
    "a label that is a text": (changed(label="0"), "'0'; it must be a number"),
    "a label that is a fraction": (changed(label=1.0), "1.0; it must be a number"),
    "no label but null": (changed(label=None), "None; it must be a number"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path, case):
    line, words = BAD_LINES[case]
    file = tmp_path / "q.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    with pytest.raises(ValueError) as error:
        read_questions(str(file))
    assert str(error.value).startswith(f"{file}: line 3 ") and re.search(words, str(error.value))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200 + len(str(file))


@pytest.mark.parametrize(
    "content, words",
    (
        (None, "No such file or directory"),
        (b"", "no question in it"),
        (b" \n\n", "no question in it"),
        (json.dumps(GOOD).encode("utf-16"), "codec can't decode"),
    ),
)
def test_a_file_without_questions_is_named(tmp_path, content, words):
    file = tmp_path / "q.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_questions(str(file))
    assert str(error.value).startswith(f"{file}: ")


def test_a_folder_is_no_file_of_questions(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: Is a directory"):
        read_questions(str(tmp_path))


# ---- built-in questions ----


def said(q: Question, number: int) -> str:
    return f"{q.context} {q.choices[number]}"


def test_every_question_of_knowledge_has_one_true_answer():
    questions, true = knowledge(), {*FACTS, *LORE}
    assert len({(q.context, q.choices) for q in questions}) == len(questions) > 100
    for q in questions:
        assert len(set(q.choices)) == len(q.choices) >= 2
        assert [i for i in range(len(q.choices)) if said(q, i) in true] == [q.label], q


def test_knowledge_asks_for_every_thing_opposite_and_piece_of_lore_once():
    tables = ((COLOR_THINGS, "{} is {}"), (SHAPE_THINGS, "{} is a {}"), (SIZE_THINGS, "{} is {}"))
    want = [form.format(x, value) for table, form in tables for value, xs in table.items() for x in xs]
    want += [f"the opposite of {a} is {b}" for a, b in OPPOSITE.items()] + list(LORE)
    assert sorted(said(q, q.label) for q in knowledge()) == sorted(want)


def test_the_choices_are_all_values_of_the_same_kind():
    kinds = [set(x) for x in (COLOR_THINGS, SHAPE_THINGS, SIZE_THINGS, OPPOSITE, SOUNDS.values())]
    for q in knowledge():
        assert set(q.choices) in [*kinds, set(DAYS), set(NUMBERS)]


def test_sums_are_right_by_arithmetic():
    sums = [(re.fullmatch(r"(\w+) plus (\w+) is", q.context), q) for q in knowledge()]
    checked = 0
    for found, q in sums:
        if found:
            a, b = (NUMBERS.index(word) for word in found.groups())
            assert NUMBERS.index(q.choices[q.label]) == a + b
            checked += 1
    assert checked == 45


def test_no_answer_about_lore_stands_in_a_caption():
    words = {w for split in SPLITS for s in all_scenes(split) for w in s.caption.split()}
    lore = [q for q in knowledge() if said(q, q.label) in LORE]
    assert len(lore) == len(LORE)
    assert not words & {choice for q in lore for choice in q.choices}


def after_edit(context: str) -> str:
    """The caption that an instruction behind a caption makes of it."""
    caption, instruction = context.rstrip(":").split(". ")
    scene = next(s for split in SPLITS for s in all_scenes(split) if s.caption == caption)
    assert scene.shape in instruction or "background" in instruction
    kinds = [(a, v) for a in VALUES for v in VALUES[a] if instruction.endswith(f" {v}")]
    (attribute, new), *more = [x for x in kinds if ("background" in instruction) == (x[0] == "background")]
    assert not more
    return dataclasses.replace(scene, **{attribute: new}).caption


def test_the_answers_of_reasoning_are_what_the_instruction_makes():
    questions, attributes = reasoning(300), Counter()
    captions = {s.caption: s for split in SPLITS for s in all_scenes(split)}
    held_out = {s.caption for s in all_scenes("test")}
    for q in questions:
        assert q.choices[q.label] == after_edit(q.context) and q.choices[q.label] in held_out
        before = captions[q.context.split(". ")[0]]
        differences = [tuple(differing(before, captions[c])) for c in q.choices]
        (attribute,) = differences[q.label]
        wrong = [d for i, d in enumerate(differences) if i != q.label]
        assert sorted(map(len, wrong)) == [0, 1, 1] and len(set(q.choices)) == 4
        assert wrong.count((attribute,)) == (attribute != "size")  # of which there are only two
        attributes[attribute] += 1
    assert len(questions) == 300 and set(attributes) == set(VALUES) and min(attributes.values()) > 30
    labels = Counter(q.label for q in questions)
    assert set(labels) == set(range(4)) and min(labels.values()) > 45  # 75 +- 7.5 by chance


def follows(context: str) -> str:
    """What follows from the sentences of a puzzle, which are read one after the other."""
    *premises, question = context.rstrip("?").split(". ")
    place, thing, older = {}, {}, []
    for words in map(str.split, premises):
        if words[1:4] == ["is", "older", "than"]:
            older.append((words[0], words[-1]))
        elif words[1] == "has":
            thing[words[0]] = " ".join(words[2:])
        else:
            assert words[1:4] in (["is", "in", "the"], ["goes", "to", "the"])
            place[words[0]] = words[-1]
    who = question.split()[-1]
    if question.startswith("where is"):
        return place[who]
    if question.startswith("what color"):
        return next(color for color in COLOR_THINGS if f"{thing[who]} is {color}" in FACTS)
    (left,) = {pair[who == "youngest"] for pair in older} - {pair[who == "oldest"] for pair in older}
    return left


def test_the_answers_of_puzzles_follow_from_their_sentences():
    questions, kinds = puzzles(300), Counter()
    for q in questions:
        assert follows(q.context) == q.choices[q.label], q
        assert len(set(q.choices)) == len(q.choices) >= 3
        kinds[q.context.split(". ")[-1].split()[0]] += 1
    assert len(questions) == 300 and set(kinds) == {"what", "who", "where"} and min(kinds.values()) > 70
    for number in range(3):  # no place in the list is the right one more often than by chance
        assert 30 < sum(q.label == number for q in questions) < 150


@pytest.mark.parametrize("draw", (reasoning, puzzles))
def test_drawn_questions_repeat_themselves_for_a_seed_and_not_for_another(draw):
    assert draw(40, seed=3) == draw(40, seed=3) == draw(90, seed=3)[:40]
    assert draw(40, seed=3) != draw(40, seed=4)
    assert draw(5) == draw(5, seed=0) and draw(0) == []


def test_the_built_in_questions_fit_the_context_of_the_tiny_base():
    tokenizer = load_tokenizer(helpers.base())
    for q in knowledge() + reasoning(100) + puzzles(100):
        for choice in q.choices:
            ids, n = cut(lambda text: encode_plain(tokenizer, text), q.context, choice)
            assert 0 < n < len(ids) <= helpers.SIZES["max_position_embeddings"]


def test_a_line_of_questions_ends_at_a_line_feed_alone(tmp_path):
    row = {"context": "a\u2028b\x85c", "choices": ["d\u2029", "e"], "label": 0}
    text = json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row) + "\n"
    (tmp_path / "q.jsonl").write_bytes(text.encode())
    both = read_questions(str(tmp_path / "q.jsonl"))
    assert [q.context for q in both] == ["a\u2028b\x85c"] * 2 and both[0].choices == ("d\u2029", "e")
