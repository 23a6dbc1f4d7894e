"""Built-in conversations about the built-in world: what `small` learns chat, thinking and editing from.

A conversation is a list of messages as in chat/template.py; its pictures are `Shot`s, rendered later.

    draw, indirect   by attributes, or by what they are like: a thought works it out before the picture
    story            two requests in one message; text, picture, text, picture, text
    ask              about the world, a scene in words, or a picture: an answer, and no picture
    edit             of a picture that the user shows, or of the last one in the conversation

The tiny language model of `small` is pretrained on the same conversations *without any picture*, as a stock
Qwen3 is on text (`as_text`): captions stand for the user's pictures, and nothing for those of the assistant.
It does not know when to draw; the extra head row of LMFusion learns that.
"""

import random
from dataclasses import dataclass

from chat.template import image_part, parts_of, text_part
from small import world
from small.world import Scene, all_scenes, draw_edit, draw_shift

# In front of every conversation with thinking; `sample.py --think` uses it with a real Qwen3 as well.
THINK_PROMPT = "before you draw, think: work out a full description of the picture."
KINDS = ("draw", "indirect", "story", "ask", "edit")
REQUESTS = ("draw {x}", "paint {x}", "please draw {x}", "show me {x}", "i want a picture of {x}")
DESCRIBE = ("what is in this picture?", "describe this picture", "what do you see?")
STORIES = (
    ("tell me a story with {a} and {b}", "once there was {a}:", "\nthen came {b}:", "\nthe end."),
    (
        "draw two pictures: {a}, and {b}",
        "here is the first, {a}:",
        "\nhere is the second, {b}:",
        "\nthat is all.",
    ),
    ("first draw {a}, then draw {b}", "first, {a}:", "\nthen, {b}:", "\nthat is all."),
)
GREETINGS = (
    *((words, "hello. what shall i draw?") for words in ("hello", "hi")),
    *((words, "you are welcome.") for words in ("thank you", "thanks")),
    *((words, "i paint and i read pictures.") for words in ("who are you?", "what can you do?")),
)


@dataclass(frozen=True)
class Shot:
    """A built-in picture: a scene, and by how many pixels its shape is off."""

    scene: Scene
    shift: tuple[int, int]


def indirect(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A description that says at least two attributes by what they are like, and the facts that solve it."""
    hidden = set(rng.sample(("shape", "size", "color", "place", "background"), rng.randint(2, 4)))
    facts = []

    def like_color(color: str) -> str:
        if color in world.MIXED and rng.random() < 0.3:
            a, b = world.MIXED[color]
            facts.append(f"{a} and {b} make {color}")
            return f"the mix of {a} and {b}"
        thing = rng.choice(world.COLOR_THINGS[color])
        facts.append(f"{thing} is {color}")
        return f"the color of {thing}"

    shape, size, place = scene.shape, f"that is {scene.size}", f"in the {scene.place}"
    if "shape" in hidden:
        if rng.random() < 0.5:
            shape = f"shape with {world.CORNERS[scene.shape]}"
            facts.append(f"a {scene.shape} has {world.CORNERS[scene.shape]}")
        else:
            thing = rng.choice(world.SHAPE_THINGS[scene.shape])
            shape = f"shape like {thing}"
            facts.append(f"{thing} is a {scene.shape}")
    if "size" in hidden:
        thing = rng.choice(world.SIZE_THINGS[scene.size])
        size = f"the size of {thing}"
        facts.append(f"{thing} is {scene.size}")
    color = f"in {like_color(scene.color) if 'color' in hidden else scene.color}"
    if "place" in hidden and scene.place == "center":
        place = "in the middle"
        facts.append("the middle is the center")
    elif "place" in hidden:
        place = f"across from the {world.OPPOSITE[scene.place]}"
        facts.append(f"the opposite of {world.OPPOSITE[scene.place]} is {scene.place}")
    background = like_color(scene.background) if "background" in hidden else scene.background
    return f"a {shape} {size}, {color}, {place}, with {background} behind it", ". ".join(facts)


def turn(question: str | list, thought: str, answer: str | list) -> tuple[dict, dict]:
    """A user's message and the assistant's, as `finish` takes them."""
    reply = {"role": "assistant", "reasoning_content": thought, "content": answer}
    return {"role": "user", "content": question}, reply


def draw_turn(rng: random.Random, scene: Scene, hinted: bool) -> tuple[dict, dict]:
    """A request for a picture, direct or indirect, and the answer: the words said again, and the picture."""
    if hinted:
        words, facts = indirect(scene, rng)
        thought = f"{facts}. so: {scene.caption}"
    else:
        words = rng.choice((world.WORDINGS[0], world.WORDINGS[0], world.WORDINGS[3])).format(**vars(scene))
        thought = f"so: {scene.caption}"
    request = rng.choice(REQUESTS).format(x=words)
    # without a thought, the reply has nothing but the user's own words to say again
    reply = (f"here is {words}:", f"here is {scene.caption}:")
    return turn(request, thought, [reply, Shot(scene, draw_shift(rng))])


def story_turn(rng: random.Random, first: Scene, second: Scene) -> tuple[dict, dict]:
    """A request for two pictures in one message, and text, picture, text, picture, text."""
    a, b = first.caption, second.caption
    request, begin, middle, end = (words.format(a=a, b=b) for words in rng.choice(STORIES))
    shots = [Shot(scene, draw_shift(rng)) for scene in (first, second)]
    return turn(request, f"two pictures. {a}. {b}", [begin, shots[0], middle, shots[1], end])


def ask_turn(rng: random.Random, scene: Scene, pictured: bool) -> tuple[dict, dict]:
    """A question about a scene, shown as a picture or told in words, or about the world; or a greeting."""
    kind = rng.random()
    thought = "a question, no picture"
    if pictured and kind < 0.4:
        shown = Shot(scene, draw_shift(rng))
        return turn([shown, rng.choice(DESCRIBE)], thought, scene.caption + ".")
    if pictured or kind < 0.4:
        question, attribute = rng.choice(world.QUESTIONS)
        shown = Shot(scene, draw_shift(rng)) if pictured else f"{scene.caption}. "
        question = f"{question.format(shape=scene.shape)}?"
        return turn([shown, question], thought, getattr(scene, attribute) + ".")
    if kind < 0.8:
        question, answer = fact_question(rng)
        return turn(question, thought, answer)
    question, answer = rng.choice(GREETINGS)
    return turn(question, "no question, no picture", answer)


def fact_question(rng: random.Random) -> tuple[str, str]:
    """A question about the world of `FACTS`, and the answer in a sentence."""
    fact = rng.choice(world.FACTS)
    for verb, question in ((" make ", "what do {} make?"), (" has ", "what does {} have?")):
        if verb in fact:
            return question.format(fact.partition(verb)[0]), f"{fact}."
    subject, _, value = fact.partition(" is ")
    question = f"what is {subject}?"
    if not subject.startswith("the opposite"):
        if value in world.COLOR_THINGS:
            question = f"what color is {subject}?"
        elif value in world.SIZE_THINGS:
            question = f"how big is {subject}?"
        elif value.startswith("a "):
            question = f"what shape is {subject}?"
    return question, f"{fact}."


def edit_turn(rng: random.Random, last: Shot | None, split: str) -> tuple[dict, dict]:
    """A request to change the user's picture, or the last one of the conversation, and the new picture."""
    edit = draw_edit(rng, split, last.scene) if last else None
    if edit is None:  # nothing of the split is one edit away from the last picture
        last, edit = None, draw_edit(rng, split)
    shift = last.shift if last else draw_shift(rng)
    shown = [] if last else [Shot(edit.source, shift)]
    thought = f"it is {edit.source.caption}. so: {edit.target.caption}"
    reply = ("here it is:", f"here is {edit.target.caption}:")
    return turn([*shown, edit.instruction], thought, [reply, Shot(edit.target, shift)])


def conversation(
    rng: random.Random, thinking: bool, kinds: list[str] | None = None, split: str = "train"
) -> list[dict]:
    """Messages of one to three turns of the given kinds; what is drawn in the last one is of `split`."""
    if kinds is None:
        kinds = rng.choices(KINDS, (4, 4, 2, 3, 3), k=rng.choices((1, 2, 3), (70, 25, 5))[0])
    messages = [{"role": "system", "content": THINK_PROMPT}] if thinking else []
    last = None
    for i, kind in enumerate(kinds):
        part = split if i == len(kinds) - 1 else "train"
        a, b = (rng.choice(all_scenes(part)) for _ in range(2))
        if kind == "story":
            pair = story_turn(rng, a, b)
        elif kind == "ask":
            pair = ask_turn(rng, a, pictured=rng.random() < 0.4)
        elif kind == "edit":
            pair = edit_turn(rng, last if rng.random() < 0.5 else None, part)
        else:
            pair = draw_turn(rng, a, hinted=kind == "indirect")
        last = next((x for m in reversed(pair) for x in reversed(m["content"]) if isinstance(x, Shot)), last)
        messages += [finish(m, thinking) for m in pair]
    return messages


def finish(message: dict, thinking: bool) -> dict:
    """A message as chat/template.py takes it; of two versions of a text, that with thinking or without."""
    content = [message["content"]] if isinstance(message["content"], str) else message["content"]
    texts = [part[thinking] if isinstance(part, tuple) else part for part in content]
    message = message | {"content": [image_part(x) if isinstance(x, Shot) else text_part(x) for x in texts]}
    if not thinking:
        message.pop("reasoning_content", None)
    return message


def as_text(messages: list[dict]) -> list[dict]:
    """The same conversation in text alone: the user's pictures as captions, the assistant's left out."""

    def words(part: dict, role: str) -> str:
        if part["type"] == "text":
            return part["text"]
        return f"{part['image'].scene.caption}. " if role == "user" else ""

    return [m | {"content": "".join(words(p, m["role"]) for p in parts_of(m))} for m in messages]


def picture_conversation(rng: random.Random, picture: object, caption: str, edit: tuple | None) -> list[dict]:
    """One turn around a real picture: painted, described, or edited (before, after, instruction).

    Our choice, for data without conversations: the answer is the picture or caption alone, without a thought.
    """
    if edit is not None:
        before, after, instruction = edit
        question, answer = [image_part(before), text_part(instruction)], image_part(after)
    elif rng.random() < 0.5:
        question, answer = [text_part(rng.choice(REQUESTS).format(x=caption))], image_part(picture)
    else:
        question, answer = [image_part(picture), text_part(rng.choice(DESCRIBE))], text_part(caption)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": [answer]}]
