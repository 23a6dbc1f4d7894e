"""dialogues.py: conversations are well formed, their answers right, and nothing held out slips in."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator

import pytest
from test_world import HELD_OUT, TRAIN, check_edit, differing, told

from chat.template import Picture, apply_chat_template, check_messages, text_of
from small import dialogues
from small.dialogues import (
    DESCRIBE,
    GREETINGS,
    KINDS,
    REQUESTS,
    STORIES,
    THINK_PROMPT,
    Shot,
    as_text,
    conversation,
    fact_question,
    indirect,
    picture_conversation,
)
from small.world import (
    ATTRIBUTES,
    COLOR_THINGS,
    COLORS,
    CORNERS,
    FACTS,
    MIXED,
    OPPOSITE,
    PLACES,
    QUESTIONS,
    SHAPE_THINGS,
    SHAPES,
    SIZE_THINGS,
    SIZES,
    Edit,
    Scene,
    all_scenes,
)

BOTH = pytest.mark.parametrize("thinking", (True, False))
SOLVING = {*FACTS, "the middle is the center"}  # what a thought may use


def drawn(n: int, thinking: bool, *kinds: str, split: str = "train", seed: int = 0) -> Iterator[list[dict]]:
    """n conversations, of the given kinds or of any."""
    rng = random.Random(f"{seed}-{thinking}-{kinds}")
    for _ in range(n):
        yield conversation(rng, thinking, list(kinds) or None, split)


def parts(message: dict) -> list[str | Shot]:
    """Texts and Shots of a message."""
    content = message["content"]
    return [content] if isinstance(content, str) else [p[p["type"]] for p in content]


def shots(*messages: dict) -> list[Shot]:
    return [p for m in messages for p in parts(m) if isinstance(p, Shot)]


def words(message: dict) -> str:
    return "".join(p for p in parts(message) if isinstance(p, str))


def asked_for(request: str) -> set[str]:
    """What a message asks to be drawn, in the words of any of the requests."""
    patterns = [re.escape(r).replace(r"\{x\}", "(.+)") for r in REQUESTS]
    return {m[1] for m in (re.fullmatch(p, request) for p in patterns) if m}


# ---- the form ----


@BOTH
def test_every_conversation_is_well_formed_and_renders(thinking):
    lengths, where = Counter(), Counter()
    for messages in drawn(600, thinking):
        check_messages(messages)
        system, *turns = messages if thinking else [None, *messages]
        assert system == ({"role": "system", "content": THINK_PROMPT} if thinking else None)
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)
        lengths[len(turns) // 2] += 1
        for m in turns:
            assert ("reasoning_content" in m) == (thinking and m["role"] == "assistant")
            assert all(p for p in parts(m)) and words(m)
            assert "{" not in words(m) + m.get("reasoning_content", "")
            where.update(m["role"] for _ in shots(m))
        pieces = apply_chat_template(messages, generate=False)
        assert [p.content for p in pieces if isinstance(p, Picture)] == shots(*messages)
        asked = text_of(apply_chat_template(messages[:-1], thinking))
        assert text_of(pieces).startswith(asked)  # training reads what sampling will
        assert ("<think>\n\n</think>" in asked) == (not thinking)
    assert set(lengths) == {1, 2, 3} and set(where) == {"user", "assistant"}


def test_what_a_user_says_without_thinking_is_what_a_user_says_with_it():
    for plain, thoughtful in zip(
        (conversation(random.Random(n), False) for n in range(200)),
        (conversation(random.Random(n), True) for n in range(200)),
        strict=True,
    ):
        assert plain[::2] == thoughtful[1:][::2]
        assert [shots(m) for m in plain] == [shots(m) for m in thoughtful[1:]]


def test_conversations_follow_from_the_rng():
    first, again = (list(drawn(50, True, seed=7)) for _ in range(2))
    assert first == again != list(drawn(50, True, seed=8))


def test_turns_and_their_kinds_are_as_frequent_as_they_should_be(monkeypatch):
    kinds = []
    for name in ("draw_turn", "story_turn", "ask_turn", "edit_turn"):
        real = getattr(dialogues, name)

        def noted(*args, name=name, real=real, **kwargs):
            kinds.append("indirect" if kwargs.get("hinted") else name.removesuffix("_turn"))
            return real(*args, **kwargs)

        monkeypatch.setattr(dialogues, name, noted)
    n, lengths, pictured = 4000, Counter(), Counter()
    for messages in drawn(n, False):
        lengths[len(messages) // 2] += 1
    count = Counter(kinds)
    assert {k: v / n for k, v in lengths.items()} == pytest.approx({1: 0.7, 2: 0.25, 3: 0.05}, abs=0.03)
    wanted = {"draw": 4, "indirect": 4, "story": 2, "ask": 3, "edit": 3}
    assert set(wanted) == set(KINDS)
    assert {k: v / len(kinds) for k, v in count.items()} == pytest.approx(
        {k: v / 16 for k, v in wanted.items()}, abs=0.03
    )
    for user, _ in drawn(n, False, "ask"):
        pictured[bool(shots(user))] += 1
    assert pictured[True] / n == pytest.approx(0.4, abs=0.03)


# ---- requests for a picture ----


@BOTH
def test_a_picture_asked_for_in_plain_words_is_the_one_that_comes(thinking):
    requests = set()
    for *_, user, answer in drawn(300, thinking, "draw"):
        (shot,) = shots(answer)
        assert isinstance(user["content"], list) and not shots(user)
        (asked,) = asked_for(words(user))
        assert told(asked) == {shot.scene} and shot.scene in TRAIN
        requests.add(words(user).replace(asked, "{x}"))
        text, _ = parts(answer)  # in this order
        if thinking:
            assert text == f"here is {shot.scene.caption}:"
            assert answer["reasoning_content"] == f"so: {shot.scene.caption}"
        else:
            assert text == f"here is {asked}:"
    assert requests == set(REQUESTS)


INDIRECT = re.compile(
    r"a (?P<shape>.+?) (?P<size>that is [a-z]+|the size of .+?), in (?P<color>.+?), "
    r"(?P<place>in the .+?|across from the .+?), with (?P<background>.+) behind it"
)


def said_by(table: dict, form: str, text: str) -> set[str]:
    """The values of which a table has a thing that `form` makes into this text."""
    return {value for value, things in table.items() for t in things if form.format(t) == text}


def solve(request: str) -> tuple[dict[str, set[str]], set[str]]:
    """What each attribute can be by an indirect description, and which attributes it hides."""
    slots = INDIRECT.fullmatch(request).groupdict()
    size = slots["size"].removeprefix("that is ")
    plain = dict(size={size} & {*SIZES}, shape={slots["shape"]} & {*SHAPES})
    plain |= {k: {slots[k]} & {*COLORS} for k in ("color", "background")}
    plain["place"] = {slots["place"].removeprefix("in the ")} & {*PLACES}
    mixed = {c: (f"{a} and {b}",) for c, (a, b) in MIXED.items()}
    corners = {shape: (text,) for shape, text in CORNERS.items()}
    likely = {
        "size": said_by(SIZE_THINGS, "the size of {}", slots["size"]),
        "shape": said_by(SHAPE_THINGS, "shape like {}", slots["shape"])
        | said_by(corners, "shape with {}", slots["shape"]),
        "place": said_by({b: (a,) for a, b in OPPOSITE.items()}, "across from the {}", slots["place"])
        | ({"center"} if slots["place"] == "in the middle" else set()),
    }
    for k in ("color", "background"):
        likely[k] = said_by(COLOR_THINGS, "the color of {}", slots[k])
        likely[k] |= said_by(mixed, "the mix of {}", slots[k])
    return {k: plain[k] or likely[k] for k in ATTRIBUTES}, {k for k in ATTRIBUTES if not plain[k]}


def proves(fact: str, attribute: str, value: str) -> bool:
    """Does a fact end in the value of an attribute, or is it about that shape?"""
    if attribute == "shape":
        return fact.endswith(f" is a {value}") or fact.startswith(f"a {value} has ")
    if attribute == "place" and value == "center":
        return fact == "the middle is the center"
    return fact.endswith((f" is {value}", f" make {value}"))


def test_an_indirect_description_has_one_solution_and_its_facts_are_the_way_there():
    rng, hides, numbers, used = random.Random(0), Counter(), Counter(), set()
    for scene in rng.choices(all_scenes("train"), k=3000):
        text, thought = indirect(scene, rng)
        found, hidden = solve(text)
        assert found == {k: {getattr(scene, k)} for k in ATTRIBUTES}, text
        facts = thought.split(". ")
        assert set(facts) <= SOLVING and len(facts) == len(hidden) >= 2
        order = [k for k in ("shape", "size", "color", "place", "background") if k in hidden]
        for fact, attribute in zip(facts, order, strict=True):  # as the words come
            assert proves(fact, attribute, getattr(scene, attribute)), (fact, attribute)
        # No hidden value stands in the words; a mix names two other colours.
        rest = re.sub(r"the mix of [a-z]+ and [a-z]+", "", text)
        for attribute in hidden:
            assert not re.search(rf"\b{getattr(scene, attribute)}\b", rest), text
        hides.update(hidden)
        numbers[len(hidden)] += 1
        used |= set(facts)
    assert set(numbers) == {2, 3, 4} and min(numbers.values()) > 800
    assert set(hides) == set(ATTRIBUTES) and min(hides.values()) > 1500  # 3/5 of 3000
    unused = {f for f in SOLVING - used if not f.startswith("the opposite of")}
    assert not unused  # every fact but some of the opposites is needed now and then


def test_colors_that_can_be_mixed_are_mixed_now_and_then():
    rng, count = random.Random(0), Counter()
    for scene in rng.choices([s for s in all_scenes("train") if s.color in MIXED], k=1500):
        slot = INDIRECT.fullmatch(indirect(scene, rng)[0])["color"]
        count[slot.split()[1] if " " in slot else "plain"] += 1
    assert set(count) == {"plain", "mix", "color"}
    assert count["mix"] / (count["mix"] + count["color"]) == pytest.approx(0.3, abs=0.06)


@BOTH
def test_an_indirect_request_is_solved_by_the_thought_or_said_again(thinking):
    for *_, user, answer in drawn(300, thinking, "indirect"):
        (shot,) = shots(answer)
        (asked,) = (x for x in asked_for(words(user)) if INDIRECT.fullmatch(x))
        found, hidden = solve(asked)
        assert found == {k: {getattr(shot.scene, k)} for k in ATTRIBUTES} and len(hidden) >= 2
        text, _ = parts(answer)
        if thinking:
            facts, so, caption = answer["reasoning_content"].rpartition(". so: ")
            assert so and caption == shot.scene.caption and text == f"here is {caption}:"
            assert set(facts.split(". ")) <= SOLVING and len(facts.split(". ")) == len(hidden)
        else:
            assert text == f"here is {asked}:"
            assert not told(words(user) + text)  # nowhere is the solution


# ---- stories ----


@BOTH
def test_a_story_is_text_picture_text_picture_text(thinking):
    forms = {tuple(form) for form in STORIES}
    seen = set()
    for *_, user, answer in drawn(200, thinking, "story"):
        assert [isinstance(p, Shot) for p in parts(answer)] == [False, True, False, True, False]
        first, second = (s.scene for s in shots(answer))
        a, b = first.caption, second.caption
        found = [words(user), *parts(answer)[::2]]
        (form,) = (f for f in forms if [x.format(a=a, b=b) for x in f] == found)
        seen.add(form)
        assert words(user).index(a) < words(user).rindex(b)
        assert told(parts(answer)[0]) == {first} and told(parts(answer)[2]) == {second}
        if thinking:
            assert answer["reasoning_content"] == f"two pictures. {a}. {b}"
    assert seen == forms


# ---- questions ----


def right_answers() -> dict[str, set[str]]:
    """Every question about the world, and its answers."""
    out: dict[str, set[str]] = {}

    def add(question: str, answer: str) -> None:
        out.setdefault(question, set()).add(answer)

    for color, things in COLOR_THINGS.items():
        for thing in things:
            add(f"what color is {thing}?", f"{thing} is {color}.")
    for shape, things in SHAPE_THINGS.items():
        for thing in things:
            add(f"what shape is {thing}?", f"{thing} is a {shape}.")
        add(f"what does a {shape} have?", f"a {shape} has {CORNERS[shape]}.")
    for size, things in SIZE_THINGS.items():
        for thing in things:
            add(f"how big is {thing}?", f"{thing} is {size}.")
    for color, (a, b) in MIXED.items():
        add(f"what do {a} and {b} make?", f"{a} and {b} make {color}.")
    for a, b in OPPOSITE.items():
        add(f"what is the opposite of {a}?", f"the opposite of {a} is {b}.")
    return out


def test_questions_about_the_world_have_one_right_answer_each():
    rng, right, asked = random.Random(0), right_answers(), Counter()
    for _ in range(2000):
        question, answer = fact_question(rng)
        assert right[question] == {answer}
        asked[question] += 1
    assert set(asked) == set(right)


@BOTH
def test_an_answer_is_right_and_has_no_picture(thinking):
    right, kinds = right_answers(), Counter()
    for *_, user, answer in drawn(1500, thinking, "ask"):
        assert not shots(answer)
        greeting = (words(user), words(answer)) in GREETINGS
        if thinking:
            what = "no question" if greeting else "a question"
            assert answer["reasoning_content"] == f"{what}, no picture"
        if shots(user):
            shown, question = parts(user)  # the picture first
            scene, kind = shown.scene, "picture"
        elif told(words(user)):
            (scene,) = told(words(user))
            question, kind = words(user).removeprefix(f"{scene.caption}. "), "words"
            assert question != words(user)
        else:
            kinds["greeting" if greeting else "world"] += 1
            assert greeting or right[words(user)] == {words(answer)}
            continue
        if question in DESCRIBE:
            assert kind == "picture" and words(answer) == f"{scene.caption}."
            kinds["describe"] += 1
        else:
            (attribute,) = (a for q, a in QUESTIONS if f"{q.format(shape=scene.shape)}?" == question)
            assert words(answer) == f"{getattr(scene, attribute)}."
            kinds[kind, attribute] += 1
    assert set(kinds) == {"greeting", "world", "describe"} | {
        (k, a) for k in ("picture", "words") for a in ATTRIBUTES
    }
    shares = {k: kinds[k] / 1500 for k in ("greeting", "world", "describe")}
    assert shares == pytest.approx({"greeting": 0.12, "world": 0.24, "describe": 0.16}, abs=0.04)


# ---- edits ----


def check_edit_turn(before: Shot, user: dict, answer: dict) -> None:
    """One attribute of a picture is changed, as asked, and its shape stays where it is."""
    (after,) = shots(answer)
    assert after.shift == before.shift
    (attribute,) = differing(before.scene, after.scene)
    check_edit(Edit(before.scene, after.scene, attribute, words(user)))
    text, _ = parts(answer)
    if "reasoning_content" in answer:
        assert text == f"here is {after.scene.caption}:"
        thought = f"it is {before.scene.caption}. so: {after.scene.caption}"
        assert answer["reasoning_content"] == thought
    else:
        assert text == "here it is:"


@BOTH
def test_an_edit_changes_one_attribute_of_the_picture_shown(thinking):
    shifts = set()
    for *_, user, answer in drawn(200, thinking, "edit"):
        before, instruction = parts(user)  # the picture first
        assert isinstance(instruction, str)
        check_edit_turn(before, user, answer)
        shifts.add(before.shift)
    assert len(shifts) == 9


@BOTH
@pytest.mark.parametrize("first", ("draw", "indirect", "story", "edit", "ask"))
def test_half_the_edits_behind_a_picture_are_of_that_very_picture(thinking, first):
    of_the_last = of_another = 0
    for messages in drawn(150, thinking, first, "edit"):
        *earlier, user, answer = messages
        if shots(user):
            check_edit_turn(*shots(user), user, answer)
            of_another += bool(shots(*earlier))
        else:
            check_edit_turn(shots(*earlier)[-1], user, answer)  # the last one, be it shown or painted
            of_the_last += 1
    assert of_the_last / (of_the_last + of_another) == pytest.approx(0.5, abs=0.16)
    if first == "ask":
        assert of_the_last + of_another < 150  # where nothing was shown there is nothing to change


def test_an_edit_of_an_edit():
    chained = 0
    for messages in drawn(100, False, "draw", "edit", "edit"):
        for i in (3, 5):
            user, answer = messages[i - 1 : i + 1]
            before = shots(user) or shots(*messages[: i - 1])[-1:]
            check_edit_turn(*before, user, answer)
        chained += not shots(*messages[2::2])
    assert chained > 10


# ---- held out ----


def scenes_in(*messages: dict) -> set[Scene]:
    """Every scene that is shown or described."""
    texts = [words(m) + ". " + m.get("reasoning_content", "") for m in messages]
    return {s.scene for s in shots(*messages)} | set().union(*map(told, texts))


@BOTH
def test_training_conversations_have_nothing_held_out(thinking):
    found = set()
    for messages in drawn(2500, thinking):
        found |= scenes_in(*messages)
    assert not found & HELD_OUT and len(found) > 0.6 * len(TRAIN)


@BOTH
def test_what_is_painted_last_is_held_out_and_nothing_before_it(thinking):
    seen = Counter()
    for kinds in (["draw"], ["indirect"], ["story"], ["edit"], ["draw", "indirect"], ["edit", "story"]):
        for messages in drawn(60, thinking, *kinds, split="test"):
            *earlier, _, answer = messages
            painted = {s.scene for s in shots(answer)}
            assert painted and {s.split for s in painted} == {"test"}
            assert not scenes_in(*earlier) & HELD_OUT
    for messages in drawn(400, thinking, "ask", split="test"):
        seen[bool(scenes_in(messages[-2]))] += 1
        assert scenes_in(*messages[-2:]) <= HELD_OUT
    assert seen[True] > 200


def test_an_edit_in_a_test_conversation_is_always_to_a_test_scene():
    kept = 0
    for messages in drawn(400, False, "draw", "edit", split="test"):
        user, answer = messages[-2:]
        (after,) = shots(answer)
        assert after.scene.split == "test"
        kept += not shots(user)  # the last picture, where a test scene is one edit away from it
    assert 100 < kept < 300


# ---- in text alone, and around real pictures ----


@BOTH
def test_the_same_conversation_in_text_alone(thinking):
    for messages in drawn(300, thinking):
        plain = as_text(messages)
        check_messages(plain)
        assert [m["role"] for m in plain] == [m["role"] for m in messages]
        for m, text in zip(messages, plain, strict=True):
            assert isinstance(text["content"], str) and set(text) == set(m)
            assert text.get("reasoning_content") == m.get("reasoning_content")
            if m["role"] == "user":  # captions stand for the pictures
                spelled = [f"{p.scene.caption}. " if isinstance(p, Shot) else p for p in parts(m)]
                assert text["content"] == "".join(spelled)
            else:
                assert text["content"] == words(m)
    assert not any(isinstance(p, Picture) for p in apply_chat_template(plain))


def test_a_real_picture_is_painted_or_described():
    rng, forms, n = random.Random(0), Counter(), 400
    for _ in range(n):
        messages = picture_conversation(rng, "cat.png", "a cat on a mat", None)
        check_messages(messages)
        user, answer = messages
        assert (user["role"], answer["role"]) == ("user", "assistant")
        if answer["content"] == [{"type": "image", "image": "cat.png"}]:
            (request,) = user["content"]
            assert asked_for(request["text"]) == {"a cat on a mat"}
            forms["painted", request["text"]] += 1
        else:
            assert answer["content"] == [{"type": "text", "text": "a cat on a mat"}]
            image, question = user["content"]
            assert image == {"type": "image", "image": "cat.png"} and question["text"] in DESCRIBE
            forms["described", question["text"]] += 1
        assert "reasoning_content" not in answer
    assert len(forms) == len(REQUESTS) + len(DESCRIBE)
    painted = sum(v for (kind, _), v in forms.items() if kind == "painted")
    assert painted / n == pytest.approx(0.5, abs=0.1)


def test_a_real_edit_is_the_picture_the_instruction_and_the_picture_after():
    rng = random.Random(0)
    for _ in range(20):
        messages = picture_conversation(rng, "cat.png", "a cat", ("day.png", "night.png", "make it night"))
        check_messages(messages)
        assert [parts(m) for m in messages] == [["day.png", "make it night"], ["night.png"]]
        assert [p["type"] for m in messages for p in m["content"]] == ["image", "text", "image"]
