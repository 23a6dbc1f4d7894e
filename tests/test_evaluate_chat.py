"""chat/evaluate.py: each figure is what it says, for models that are right, wrong, or wrong in one thing."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator

import helpers
import pytest
import torch
from PIL import Image
from test_world import differing, told

from attention import IMAGE
from chat import conversation as chat
from chat import evaluate as chat_evaluate
from chat.conversation import ChatPicture, replace_images
from chat.evaluate import chat_table, evaluate_chat, painted, reply, seen
from chat.template import Picture, apply_chat_template, encode
from checkpoint import Trained, load_trained
from generate import GenerationConfig, encode_pictures
from load_qwen3 import encode_plain
from small.dialogues import THINK_PROMPT, Shot
from small.world import ATTRIBUTES, SPLITS, VALUES, Edit, Scene, all_scenes, draw_edit, read_scenes, render

N = 24
EVERY = {s.caption: s for split in SPLITS for s in all_scenes(split)}
TEXT = {
    "dtype": "float32",
    "perplexity_base": 2.5,
    "perplexity_trained": 2.5,
    "tensors": 24,
    "tensors_changed": [],
    "logits_bit_equal": True,
}


def long_context(trained: Trained) -> Trained:
    trained.model.config = dataclasses.replace(trained.model.config, max_position_embeddings=2048)
    return trained


@pytest.fixture
def trained() -> Trained:
    return long_context(helpers.perturbed())


def other(scene: Scene, but: str = "") -> Scene:
    """A scene that differs in every attribute, or in every one but one."""
    values = {}
    for a in ATTRIBUTES:
        used = (getattr(scene, a), scene.color, scene.background, *values.values())
        values[a] = getattr(scene, a) if a == but else next(v for v in VALUES[a] if v not in used)
    return Scene(**values)


def show(scene: Scene, shift: tuple[int, int] = (0, 0)) -> dict:
    return {"type": "image", "image": ChatPicture(render([scene], shifts=[shift])[0], torch.zeros(1))}


def message(*parts: dict) -> dict:
    return {"role": "assistant", "content": list(parts)}


def shots(m: dict) -> list[Shot]:
    return [p["image"] for p in m["content"] if "image" in p] if isinstance(m["content"], list) else []


class Model:
    """One that is right in everything; what it would say or paint can be spoilt before it is counted.

    It knows the answers of every case that was drawn, and remembers what it was asked.
    """

    def __init__(self, monkeypatch):
        self.known: dict[str, dict] = {}
        self.edits: dict[tuple[Scene, str], Edit] = {}
        self.asked: list[tuple[list[dict], bool, GenerationConfig]] = []
        self.say: Callable = lambda right, messages, thinking: right
        self.paint: Callable = lambda scene: scene
        self.edit: Callable = lambda edit: edit.target
        self.back: Callable = lambda scene: scene
        self.conversation = chat_evaluate.conversation
        for name in ("conversation", "draw_edit", "reply", "generate_images", "edit_images", "text_report"):
            monkeypatch.setattr(chat_evaluate, name, getattr(self, f"do_{name}"))

    def do_conversation(self, *args, **kwargs) -> list[dict]:
        messages = self.conversation(*args, **kwargs)
        self.known[repr(messages[:-1])] = messages[-1]
        return messages

    def do_draw_edit(self, *args, **kwargs) -> Edit:
        edit = draw_edit(*args, **kwargs)
        self.edits[edit.source, edit.instruction] = edit
        return edit

    def do_reply(self, trained, messages: list[dict], thinking: bool, options: GenerationConfig) -> dict:
        self.asked.append((messages, thinking, options))
        return self.say(self.right(messages), messages, thinking)

    def right(self, messages: list[dict]) -> dict:
        """The right answer, its pictures painted."""
        known, question = self.known.get(repr(messages)), messages[-1]["content"]
        if known is not None:
            parts = [show(p["image"].scene) if "image" in p else p for p in known["content"]]
            return known | {"content": parts}
        if isinstance(question, str):
            return message(show(EVERY[question.removeprefix("draw ")]))
        shot, instruction = question[0]["image"], question[1]["text"]
        return message(show(self.edits[shot.scene, instruction].target, shot.shift))

    def do_generate_images(self, trained, prompts, seeds, steps, cfg, sampler) -> torch.Tensor:
        assert len(prompts) == len(set(seeds)) and (steps, cfg, sampler) == (1, 3.0, "ddim")
        return render([self.paint(EVERY[p]) for p in prompts])

    def do_edit_images(self, trained, pictures, instructions, seeds, steps, cfg, sampler) -> torch.Tensor:
        assert len(pictures) == len(instructions) == len(set(seeds))
        assert (steps, cfg, sampler) == (1, 3.0, "ddim")
        out = []
        for picture, scene, words in zip(pictures, read_scenes(pictures), instructions, strict=True):
            after = self.edit(self.edits[scene, words]) if words else self.back(scene)
            out.append(picture if after == scene else render([after])[0])
        return torch.stack(out)

    def do_text_report(self, trained, documents: list[str]) -> dict:
        assert len(documents) == 200
        return TEXT


class Folder:
    """Of a model only this is looked at where `Model` answers."""

    folder, info = "runs/x", {"step": 7}


@pytest.fixture
def model(monkeypatch) -> Model:
    return Model(monkeypatch)


def figures_of(n: int = N, seed: int = 0) -> dict:
    return evaluate_chat(Folder, n, GenerationConfig(steps=1, seed=seed))


def edits_of() -> dict:
    return chat_evaluate.edits(Folder, N, GenerationConfig(steps=1), "test")[0]


def scores(part: dict) -> set[float]:
    """The shares of a `prompt_match`."""
    return {v for k, v in part.items() if k != "residual"}


def shares(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Every share in a report and its name; counts, residuals and the text's figures are none."""
    if isinstance(value, dict):
        for k, v in value.items():
            if k != "text":
                yield from shares(v, f"{name}.{k}".lstrip("."))
    elif isinstance(value, float) and "rms" not in name and "residual" not in name:
        yield name, value


def repainted(right: dict, by: Callable) -> dict:
    """The same message with by(scene) in the place of every scene."""
    parts = right["content"]
    return right | {"content": [show(by(seen_in(p))) if "image" in p else p for p in parts]}


def seen_in(part: dict) -> Scene:
    return read_scenes(part["image"].pixels[None])[0]


def thinking_else(right: dict) -> dict:
    """The same message after a wrong thought, where it has one."""
    return right | ({"reasoning_content": "hm"} if "reasoning_content" in right else {})


def spoilt(right: dict) -> dict:
    """Another word, another thought, and pictures of something quite different."""
    parts = repainted(right, other)["content"]
    parts = [p if "image" in p else p | {"text": f"{p['text']} or so"} for p in parts]
    return thinking_else(right) | {"content": parts}


# ---- figures ----


def test_a_model_that_is_right_in_everything_gets_full_marks(model):
    report = figures_of()
    found = dict(shares(report))
    assert set(found.values()) == {1.0} and len(found) > 30
    assert report["edits"]["rms_to_source_without_instruction"] == 0.0
    assert (report["checkpoint"], report["step"], report["text"]) == ("runs/x", 7, TEXT)
    counts = [report["decisions"]["conversations"], report["indirect"]["prompts"], report["edits"]["edits"]]
    assert counts == [N] * 3 and report["stories"]["stories"] == N // 4 and report["direct"]["prompts"] == 27
    assert 0 < report["decisions"]["to_draw"] < N
    json.dumps({k: v for k, v in report.items() if not k.endswith("_sheet")})
    assert chat_table(report).count("100.0%") == 16 + 9 + len(report["edits"]["by_attribute"])


def test_a_model_that_is_wrong_in_everything_gets_none(model):
    """But for when to draw and the order of text and pictures, which it has right."""
    model.say = lambda right, *_: spoilt(right)
    model.paint = model.back = other
    model.edit = lambda edit: other(edit.target)
    report = figures_of()
    found = dict(shares(report))
    right = {k for k, v in found.items() if v}
    assert right == {"decisions.right", "decisions.right_where_no_picture_was_wanted", "stories.in_order"}
    assert all(found[k] == 1.0 for k in right)
    assert report["edits"]["rms_to_source_without_instruction"] > 20


def test_the_cases_are_held_out_and_differ_by_the_seed(model):
    figures_of()
    wanted = [s.scene for last in model.known.values() for s in shots(last)]
    assert len(wanted) > 3 * N and {s.split for s in wanted} == {"test"}
    assert len(model.edits) == N and all(e.target.split == "test" for e in model.edits.values())
    direct = [m[-1]["content"] for m, *_ in model.asked if isinstance(m[-1]["content"], str)]
    plain = {question.removeprefix("draw ") for question in direct}
    assert len(plain) == 27 and all(EVERY[c].split == "test" for c in plain)
    first, known = [repr(m) for m, *_ in model.asked], set(model.known)
    model.asked.clear()
    figures_of()
    assert [repr(m) for m, *_ in model.asked] == first and set(model.known) == known
    model.known.clear()
    figures_of(seed=1)
    assert len(known & set(model.known)) < 10


def test_every_question_is_asked_in_its_mode_and_with_a_seed_of_its_own(model):
    figures_of()
    for messages, thinking, options in model.asked:
        assert messages[-1]["role"] == "user"
        assert (messages[0] == {"role": "system", "content": THINK_PROMPT}) == thinking
        assert options.steps == 1 and options.cfg == GenerationConfig().cfg
    # decisions; direct with and without; indirect with and without; edits; stories
    lengths = (N, 27, 27, N, N, N, N // 4)
    assert len(model.asked) == sum(lengths)
    start, thoughts = 0, []
    for n in lengths:
        part = model.asked[start : start + n]
        assert [s.seed for *_, s in part] == list(range(n))
        thoughts.append({t for _, t, _ in part})
        start += n
    assert thoughts == [{True, False}, {False}, {True}, {True}, {False}, {False}, {False}]
    assert [t for _, t, _ in model.asked[:N]] == [True, False] * (N // 2)
    # an indirect request is the same one with a thought and without
    a, b = (model.asked[sum(lengths[:k]) : sum(lengths[: k + 1])] for k in (3, 4))
    assert [m[-1] for m, *_ in a] == [m[-1] for m, *_ in b]
    assert not any(told(chat_evaluate.words_of(m[-1])) for m, *_ in a)  # and never a plain one


def test_a_model_that_never_draws(model):
    model.say = lambda right, *_: right | {"content": [p for p in right["content"] if "text" in p]}
    report = figures_of()
    d, s = report["decisions"], report["stories"]
    assert d["right"] == (N - d["to_draw"]) / N and d["right_where_no_picture_was_wanted"] == 1.0
    assert d["words_exactly_right"] == 1.0
    for part in ("chat", "chat_thinking"):
        assert scores(report["direct"][part]) == {0.0}
    assert scores(report["direct"]["plain"]) == {1.0}
    assert scores(report["indirect"]["thinking"]) == {0.0}
    assert report["indirect"]["thought_exactly_right"] == 1.0
    assert report["edits"]["right_in_chat"] == 0.0 and report["edits"]["right"] == 1.0
    assert s["words_exactly_right"] == 1.0 and s["in_order"] == s["pictures_right"] == 0.0


def test_a_model_that_always_draws_one_picture_more(model):
    """Two pictures are as wrong as none, even if the first is the right one."""
    extra = show(next(iter(all_scenes("test"))))
    model.say = lambda right, *_: right | {"content": [*right["content"], extra]}
    report = figures_of()
    d = report["decisions"]
    assert d["right"] == d["right_where_no_picture_was_wanted"] == 0.0 and d["words_exactly_right"] == 1.0
    for part in (
        report["direct"]["chat"],
        report["indirect"]["thinking"],
        report["indirect"]["not_thinking"],
    ):
        assert scores(part) == {0.0}
    assert report["edits"]["right_in_chat"] == 0.0
    assert report["stories"]["in_order"] == report["stories"]["pictures_right"] == 0.0


def test_a_model_that_is_right_with_a_thought_only(model):
    model.say = lambda right, messages, thinking: right if thinking else spoilt(right)
    report = figures_of()
    direct, indirect, d = report["direct"], report["indirect"], report["decisions"]
    assert scores(direct["chat_thinking"]) == scores(direct["plain"]) == {1.0}
    assert scores(direct["chat"]) == scores(indirect["not_thinking"]) == {0.0}
    assert scores(indirect["thinking"]) == {1.0} and indirect["thought_exactly_right"] == 1.0
    assert d["words_exactly_right"] == 0.5 and d["right"] == 1.0


def test_a_model_that_paints_the_right_thing_after_a_wrong_thought(model):
    model.say = lambda right, *_: thinking_else(right)
    report = figures_of()
    assert {k for k, v in shares(report) if v != 1.0} == {"indirect.thought_exactly_right"}
    assert report["indirect"]["thought_exactly_right"] == 0.0


def test_words_without_a_picture_are_counted_on_their_own(model):
    def say(right: dict, *_) -> dict:
        return right if any("image" in p for p in right["content"]) else spoilt(right)

    model.say = say
    d = chat_evaluate.decisions(Folder, N, GenerationConfig(steps=1), "test")
    assert d["words_of_answers_without_picture"] == 0.0 and d["right"] == 1.0
    assert d["words_exactly_right"] == d["to_draw"] / N


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_one_attribute_wrong_is_that_attribute_and_all(model, attribute):
    def near(scene: Scene) -> Scene:
        return dataclasses.replace(scene, **{attribute: getattr(other(scene), attribute)})

    model.paint = near
    model.say = lambda right, *_: repainted(right, near)
    report = figures_of(8)
    wanted = {a: float(a != attribute) for a in ATTRIBUTES} | {"all": 0.0, "strict": 0.0}
    found = [report["direct"][k] for k in ("plain", "chat", "chat_thinking")]
    found += [report["indirect"][k] for k in ("thinking", "not_thinking")]
    assert all(part.pop("residual") > 15 for part in found) and found == [wanted] * 5


def test_plain_text_to_image_is_counted_apart(model):
    model.paint = other
    report = figures_of()
    wrong = {k for k, v in shares(report) if v != 1.0}
    assert wrong == {f"direct.plain.{k}" for k in (*ATTRIBUTES, "all", "strict")}


def test_an_edit_that_does_nothing(model):
    model.edit = lambda edit: edit.source
    report = edits_of()
    assert (report["changed"], report["others_kept"], report["right"]) == (0.0, 1.0, 0.0)
    assert report["source_back_without_instruction"] == report["right_in_chat"] == 1.0
    assert set(report["by_attribute"].values()) == {0.0}


def test_an_edit_that_changes_everything_else_as_well(model):
    model.edit = lambda edit: other(edit.target, but=edit.attribute)
    report = edits_of()
    assert (report["changed"], report["others_kept"], report["right"]) == (1.0, 0.0, 0.0)


def test_an_edit_that_changes_one_thing_too_many(model):
    def edit(edit: Edit) -> Scene:
        a = "size" if edit.attribute != "size" else "shape"
        return dataclasses.replace(edit.target, **{a: getattr(other(edit.target), a)})

    model.edit = edit
    report = edits_of()
    assert (report["changed"], report["others_kept"], report["right"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_edits_are_counted_by_attribute(model, attribute):
    model.edit = lambda edit: edit.target if edit.attribute == attribute else other(edit.target)
    report = edits_of()
    of_it = sum(e.attribute == attribute for e in model.edits.values())
    assert 0 < of_it < N
    assert report["by_attribute"] == {a: float(a == attribute) for a in report["by_attribute"]}
    assert report["right"] == report["changed"] == of_it / N


def test_a_source_that_does_not_come_back(model):
    model.back = lambda scene: dataclasses.replace(scene, size=other(scene).size)
    report = edits_of()
    assert report["source_back_without_instruction"] == 0.0 and report["right"] == 1.0
    assert report["rms_to_source_without_instruction"] > 1


def test_the_pictures_of_the_edits_are_shown_before_and_after_with_their_words(model):
    report, pictures, labels = chat_evaluate.edits(Folder, 5, GenerationConfig(steps=1, seed=3), "test")
    assert report["edits"] == 5 and pictures.shape == (10, 3, 64, 64) and labels[::2] == [""] * 5
    for i, edit in enumerate(model.edits.values()):
        assert read_scenes(pictures[2 * i : 2 * i + 2]) == [edit.source, edit.target]
        assert labels[2 * i + 1] == edit.instruction and len(differing(edit.source, edit.target)) == 1
    shifts = [s.shift for m, *_ in model.asked for s in shots(m[-1])]
    sources = [e.source for e in model.edits.values()]
    assert torch.equal(pictures[::2], render(sources, shifts=shifts)) and len(set(shifts)) > 1


def story(spoil: Callable) -> Callable:
    """Spoils the parts of stories and of nothing else."""

    def say(right: dict, *_) -> dict:
        parts = right["content"]
        return right | {"content": spoil(list(parts))} if sum("image" in p for p in parts) == 2 else right

    return say


@pytest.mark.parametrize(
    ("spoil", "order", "words", "pictures", "all_right"),
    [
        (lambda p: p, 1.0, 1.0, 1.0, 1.0),
        (lambda p: [p[0], p[3], p[2], p[1], p[4]], 1.0, 1.0, 0.0, 0.0),  # the other picture first
        (lambda p: [p[0], p[1], p[2], show(other(seen_in(p[3]))), p[4]], 1.0, 1.0, 0.5, 0.0),
        (lambda p: [p[0], p[2], p[1], p[3], p[4]], 0.0, 1.0, 1.0, 0.0),  # both pictures in one place
        (lambda p: p[:4], 0.0, 0.0, 1.0, 0.0),  # the end is missing
        (lambda p: p[:3] + p[4:], 0.0, 1.0, 0.0, 0.0),  # one picture alone
        (lambda p: [{"type": "text", "text": "well:"}, *p[1:]], 1.0, 0.0, 1.0, 1.0),
    ],
)
def test_stories(model, spoil, order, words, pictures, all_right):
    model.say = story(spoil)
    report = chat_evaluate.stories(Folder, N // 4, GenerationConfig(steps=1), "test")
    assert report == {
        "stories": N // 4,
        "in_order": order,
        "words_exactly_right": words,
        "pictures_right": pictures,
        "pictures_strict": pictures,
        "in_order_and_both_pictures_right": all_right,
        "in_order_and_both_pictures_strict": all_right,
    }


def test_noise_on_every_picture_is_seen_by_the_strict_figures_alone(model, monkeypatch):
    """Noise of which the reader of scenes takes no notice, in plain pictures, edits, chat and stories."""
    generator, noise = torch.Generator().manual_seed(0), 40

    def noisy(pictures: torch.Tensor) -> torch.Tensor:
        x = pictures + noise * torch.randn(pictures.shape, generator=generator)
        return x.round().clamp(0, 255).to(torch.uint8)

    for name in ("generate_images", "edit_images"):
        clean = getattr(chat_evaluate, name)
        monkeypatch.setattr(chat_evaluate, name, lambda *a, clean=clean, **k: noisy(clean(*a, **k)))
    monkeypatch.setattr(chat_evaluate, "painted", lambda *a: [noisy(x) for x in painted(*a)])
    found = dict(shares(figures_of(12)))
    strict = {k: v for k, v in found.items() if "strict" in k}
    assert len(strict) == 5 + 3 + 2 and set(strict.values()) == {0.0}
    assert min(v for k, v in found.items() if k not in strict) > 0.9


def test_no_case_of_the_validation_tenth_wants_a_scene_of_the_test_tenth(model, monkeypatch):
    judged = []
    real = chat_evaluate.prompt_match
    monkeypatch.setattr(
        chat_evaluate, "prompt_match", lambda wanted, *a: judged.append(wanted) or real(wanted, *a)
    )
    report = evaluate_chat(Folder, N, GenerationConfig(steps=1), "validation")
    assert report["split"] == "validation"
    sources = {e.source for e in model.edits.values()}
    wanted = {scene for scenes in judged for scene in scenes}
    assert len(wanted) > 50 and {s.split for s in wanted - sources} == {"validation"}
    assert "test" not in {s.split for s in sources}


def test_figures_of_one_case_each(model):
    """Also where none of the conversations wants no picture, or none wants one."""
    for seed in range(6):
        found = dict(shares(figures_of(1, seed)))
        assert all(0 <= v <= 1 for v in found.values()) and found["decisions.right"] == 1.0


def test_the_table_says_each_figure_in_its_row():
    def numbers(*names: str) -> dict:
        return {name: next(counter) / 1000 for name in names}

    counter = iter(range(101, 200))
    both = ("all", "strict")
    report = {
        "decisions": {"conversations": 40}
        | numbers("right", "right_where_no_picture_was_wanted", "words_of_answers_without_picture"),
        "direct": {"prompts": 50, "plain": numbers(*both) | {"residual": 12.34}, "chat": numbers(*both)}
        | {"chat_thinking": numbers(*both)},
        "indirect": {"prompts": 60, "thinking": numbers(*both), "not_thinking": numbers(*both)}
        | numbers("thought_exactly_right"),
        "edits": {"edits": 70, "by_attribute": {"color": 0.25, "size": 0.5}, "residual": 5.67}
        | numbers("right", "strict", "changed", "others_kept", "right_in_chat", "strict_in_chat")
        | numbers("source_back_without_instruction", "source_back_strict"),
        "stories": {"stories": 80}
        | numbers("in_order", "in_order_and_both_pictures_right", "in_order_and_both_pictures_strict"),
        "text": TEXT,
    }
    lines = chat_table(report).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:18]]
    shown = [value for row in rows for value in row[1:] if value]
    assert shown == [f"{10 + i / 10:.1f}%" for i in range(1, 26)]
    words = ("decision", "no picture", "word for word", "text to image", "chat", "chat, with a thought")
    words += ("indirect", "without", "thought", "edits", "changed", "others", "chat", "source", "stories")
    for (what, *_), word in zip(rows, (*words, "both"), strict=True):
        assert word in what
    for row, count in ((0, "40"), (3, "50"), (6, "60"), (9, "70"), (14, "80")):
        assert count in rows[row][0]
    assert lines[18:20] == ["", "Edits by attribute: color 25.0%, size 50.0%."]
    assert lines[21] == "Median residual, of 255: prompts 12.3, edits 5.7."
    assert lines[-1].startswith("Text perplexity: base 2.5") and "equal to the last bit" in lines[-1]


# ---- asking a model ----

CONVERSATION = [
    {"role": "system", "content": THINK_PROMPT},
    {"role": "user", "content": [{"type": "image", "image": Shot(all_scenes("test")[3], (1, -1))}]},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "here:"},
            {"type": "image", "image": Shot(all_scenes("test")[9], (0, 1))},
        ],
        "reasoning_content": "so",
    },
    {"role": "user", "content": [{"type": "text", "text": "again"}]},
]


def test_pictures_of_a_conversation_are_rendered_where_they_stand(trained):
    before = repr(CONVERSATION)
    shown = replace_images(CONVERSATION, lambda shot: seen(trained, shot))
    assert repr(CONVERSATION) == before  # that is left as it was
    assert [set(m) for m in shown] == [set(m) for m in CONVERSATION]
    for m, number, shift in ((shown[1], 3, (1, -1)), (shown[2], 9, (0, 1))):
        (there,) = shots(m)
        picture = render([all_scenes("test")[number]])[0].roll(shift, (1, 2))
        assert torch.equal(there.pixels, picture)
        assert torch.equal(there.latent, encode_pictures(trained, picture[None])[0])
    assert [shown[0], shown[3]] == [CONVERSATION[0], CONVERSATION[3]]
    assert shown[2]["content"][0] == CONVERSATION[2]["content"][0]


@pytest.mark.parametrize("thinking", (True, False))
def test_a_model_is_asked_in_the_words_and_pictures_of_the_case(trained, monkeypatch, thinking):
    read = []

    def scripted(trained, context, features, options, watch=None):
        read.append((list(context.ids), list(context.latents), options))
        yield from encode_plain(trained.tokenizer, "here it is:")
        yield torch.ones(36, 8, 8)

    monkeypatch.setattr(chat, "generate", scripted)
    options = GenerationConfig(steps=3, seed=11)
    answer = reply(trained, CONVERSATION, thinking, options)
    ((ids, latents, got),) = read
    shown, config = replace_images(CONVERSATION, lambda shot: seen(trained, shot)), trained.model.config
    pieces = apply_chat_template(shown, thinking)
    assert ids == encode(trained.tokenizer, pieces, config.boi_id, config.eoi_id) and got == options
    wanted = [p.content.latent for p in pieces if isinstance(p, Picture)]
    assert ids.count(IMAGE) == 2 and all(torch.equal(a, b) for a, b in zip(latents, wanted, strict=True))
    assert chat_evaluate.words_of(answer) == "here it is:" and len(chat_evaluate.pictures_of(answer)) == 1


def test_what_was_painted_is_read_only_where_there_is_one_picture():
    a, b = all_scenes("test")[3:5]
    assert read_scenes(torch.stack(painted(message(show(a, (1, 1)))))) == [a]
    (picture,) = painted(message({"type": "text", "text": "here:"}, show(b)))
    assert read_scenes(picture[None]) == [b]
    assert painted(message()) == painted(message(show(a), show(a))) == [None]
    assert len(painted(message(show(a), show(b)), 2)) == 2 and painted(message(show(a)), 2) == [None] * 2


# ---- all of it ----


def test_a_model_that_was_hardly_trained(trained):
    """From the first to the last figure, with nothing in its place."""
    report = evaluate_chat(
        trained, 2, GenerationConfig(steps=1, max_tokens=10, max_thought=5, max_images=2, seed=1)
    )
    found = dict(shares(report))
    assert len(found) > 30 and all(0 <= v <= 1 for v in found.values())
    assert report["text"]["tensors_changed"] != []  # noise was put on every parameter
    assert isinstance(report["edit_sheet"], Image.Image) and isinstance(report["thought_sheet"], Image.Image)
    assert "%" in chat_table(report)


def test_the_sheet_of_thoughts_shows_both_pictures_of_each_request(model, monkeypatch):
    given, real = [], chat_evaluate.figures.sheet
    monkeypatch.setattr(chat_evaluate.figures, "sheet", lambda *a, **how: given.append(a) or real(*a, **how))
    more = show(all_scenes("test")[0])  # of several pictures the first is shown

    def say(right: dict, messages: list[dict], thinking: bool) -> dict:
        wrong = spoilt(right)
        return right if thinking else wrong | {"content": [*wrong["content"], more]}

    model.say = say
    figures_of(12)
    _, (pictures, words) = given  # the first is of edits
    assert len(pictures) == len(words) == 16
    _, shown = chat_evaluate.indirect_requests(Folder, 12, GenerationConfig(steps=1), "test")
    for i, pair in enumerate(shown[:8]):
        first, second = read_scenes(torch.stack(pictures[2 * i : 2 * i + 2]))
        thought, request = words[2 * i : 2 * i + 2]
        (right,) = (m for k, m in model.known.items() if request in k and "reasoning_content" in m)
        assert (first, second) == (shots(right)[0].scene, other(first))
        assert thought == f"<think> {right['reasoning_content']} </think>" and pair[0][0] == request
    model.say = lambda right, *_: right | {"content": []}
    given.clear()
    figures_of(2)
    pictures, _ = given[1]  # where none was painted, an empty one
    assert len(pictures) == 4 and all((p == 255).all() for p in pictures)


# ---- the command ----


@pytest.fixture
def quick(monkeypatch) -> None:
    """A long context, and short answers."""
    monkeypatch.setattr(chat_evaluate, "load_trained", lambda *a, **k: long_context(load_trained(*a, **k)))
    short = functools.partial(GenerationConfig, max_tokens=6, max_thought=3, max_images=1)
    monkeypatch.setattr(chat_evaluate, "GenerationConfig", short)


def test_the_command_prints_a_table_and_writes_json_and_sheets(tmp_path, quick):
    out = helpers.good(
        chat_evaluate,
        *("--checkpoint", helpers.shapes_run(), "--n", 2, "--steps", 1, "--cfg", 1, "--seed", 3),
        *("--json", "new/chat.json", "--edits", "new/edits.png", "--thoughts", "new/thoughts.webp"),
        folder=tmp_path,
    )
    report = json.loads((tmp_path / "new" / "chat.json").read_text())
    assert report["step"] == 3 and report["edits"]["edits"] == 2
    assert not any(k.endswith("_sheet") for k in report)
    assert report["text"]["tensors_changed"] == [] and report["text"]["logits_bit_equal"] is True
    assert out == chat_table(report) + "\n" and "0 of 24 tensors changed" in out
    for name, kind in (("edits.png", "PNG"), ("thoughts.webp", "WEBP")):
        with Image.open(tmp_path / "new" / name) as page:
            assert page.format == kind
            page.load()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["chat.json", "edits.png", "thoughts.webp"]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--n 0", "--n is 0; it must be from 1 to 10000"),
        ("--n 10001", "--n is 10001; it must be from 1"),
        ("--steps 0", "--steps is 0; it must be from 1 to 1000"),
        ("--steps 1001", "--steps is 1001"),
        ("--cfg 101", "--cfg is 101.0; it must be from -100 to 100"),
        ("--cfg nan", "--cfg is nan"),
        ("--n two", "invalid int value: 'two'"),
        ("--edit x.png", "did you mean --edits"),
        ("--edits sheet.txt", "sheet.txt: the ending '.txt' is not one of"),
        ("--thoughts sheet", "sheet: the ending '' is not one of"),
        ("--json .", "it is a folder"),
    ],
)
def test_bad_flags_are_errors_before_anything_is_loaded(tmp_path, monkeypatch, flags, what):
    monkeypatch.setattr(chat_evaluate, "load_trained", lambda *a, **k: pytest.fail("loaded"))
    result = helpers.call(chat_evaluate, *flags.split(), folder=tmp_path)
    assert result.status == 2 and what in result.err and "Traceback" not in result.err


def test_checkpoints_that_will_not_do_are_refused_in_words(tmp_path):
    result = helpers.call(chat_evaluate, "--checkpoint", "nowhere", folder=tmp_path)
    assert result.status == 2 and "nowhere" in result.err
    result = helpers.call(chat_evaluate, folder=tmp_path)
    assert result.status == 2 and "small-chat" in result.err  # no run to take the last of
    result = helpers.call(chat_evaluate, "--checkpoint", helpers.photo_run(), folder=tmp_path)
    assert result.status == 2 and "paints 16 pixels a side" in result.err


def test_a_base_that_was_moved_is_the_one_that_the_text_is_compared_with(tmp_path, monkeypatch):
    shutil.copytree(helpers.base(), tmp_path / "moved")
    seen = []
    monkeypatch.setattr(chat_evaluate, "evaluate_chat", lambda *args: seen.append(args))
    monkeypatch.setattr(
        chat_evaluate, "load_trained", lambda *a, **k: seen.append((a, k)) or load_trained(*a, **k)
    )
    with pytest.raises(AttributeError):  # no report
        helpers.call(
            chat_evaluate,
            *("--checkpoint", helpers.shapes_run(), "--base", "moved", "--n", 5, "--steps", 9, "--cfg", 2),
            *("--seed", 4),
            folder=tmp_path,
        )
    (args, named), (trained, *given) = seen
    assert args[1] == "moved" and named == {"config": "small-chat"}
    assert trained.info["base"] == "moved" and given == [
        5,
        GenerationConfig(steps=9, cfg=2.0, seed=4),
        "test",
    ]
