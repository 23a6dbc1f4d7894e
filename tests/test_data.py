"""data.py: targets, sequences, packing, noise; which documents a step has, and what their seeds decide."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import reprlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from conftest import build_tokenizer
from tokenizers import AddedToken, Tokenizer, normalizers

from attention import IMAGE, Tokens
from chat.template import apply_chat_template, encode, text_of
from config import CONFIGS, SMALL, TASKS, TrainConfig, parse_tasks, say_once
from data import (
    CAPTION_DROPPED,
    CAPTION_FIRST,
    IMAGE_FIRST,
    Batch,
    Document,
    Documents,
    Paragraphs,
    caption_document,
    chat_document,
    collate,
    context_length,
    draw_noise,
    edit_document,
    find_targets,
    make_batches,
    next_tokens,
    permuted,
    split_phases,
)
from diffusion import Diffusion, T
from load_qwen3 import encode_plain
from model import ModelConfig
from scale.parallel import Team
from small.shapes import Shapes

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=8,
    boi_id=1,
    eoi_id=2,
    eos_id=3,
    latent_size=4,
)  # 4 patches an image
BOI, EOI, EOS, P = 1, 2, 3, 4


def document(ids: list[int], own: list[bool] | None = None) -> Document:
    """A document with noisy images, of which everything is learned, or what is the model's `own`."""
    n = ids.count(IMAGE)
    return Document(ids, [None] * n, [T] * n, own or [True] * len(ids))


def phases(sequences: list[list[int]], pack: int = 0) -> tuple[Tokens, Tokens]:
    return split_phases([document(ids) for ids in sequences], P, pack)


# ---- targets ----


def brute_force_targets(row: list[int], own: list[bool] | None = None) -> tuple[list[int], list[int]]:
    """Of each text token of a sequence: the next text token, and whether an image starts next.

    Only where the next token is the model's `own`.
    """
    words, draws = [], []
    for i, token in enumerate(row):
        if token == IMAGE:
            continue
        last = i + 1 == len(row)
        if last or token == BOI or row[i + 1] == IMAGE or not (own is None or own[i + 1]):
            words.append(-100)
            draws.append(-100)
        elif row[i + 1] == BOI:
            words.append(-100)
            draws.append(1)
        else:
            words.append(row[i + 1])
            draws.append(0)
    return words, draws


def random_rows(rng: random.Random, n: int) -> list[list[int]]:
    pieces = ([BOI, IMAGE, EOI], [BOI, IMAGE], [IMAGE], [EOS], [BOI])
    rows = []
    for _ in range(n):
        row: list[int] = []
        for _ in range(rng.randint(1, 5)):
            row += rng.choice(pieces) if rng.random() < 0.5 else [rng.randint(4, 63) for _ in range(3)]
        rows.append(row)
    return rows


def test_targets_equal_a_loop_over_the_sequences():
    rng = random.Random(0)
    for _ in range(50):
        rows = random_rows(rng, 4)  # ragged: the shorter ones are padded
        word, draw = next_tokens(Tokens.rows(rows, P), BOI)
        expected = [brute_force_targets(row) for row in rows]
        assert word.tolist() == [x for words, _ in expected for x in words]
        assert draw.tolist() == [x for _, draws in expected for x in draws]


def test_targets_of_a_captioned_picture_written_out():
    """BOI | patches EOI 7 8 EOS: nothing at BOI, no patch predicts EOI, nothing behind EOS or at padding."""
    _, rest = phases([[BOI, IMAGE, EOI, 7, 8, EOS], [BOI, IMAGE, EOI, 9, EOS]])
    word, draw = next_tokens(rest, BOI)
    assert word.tolist() == [7, 8, EOS, -100, 9, EOS, -100]  # one for each text token, none for a patch
    assert draw.tolist() == [0, 0, 0, -100, 0, 0, -100]


def test_targets_of_a_caption_before_its_picture_written_out():
    prefix, rest = phases([[7, 8, 9, BOI, IMAGE], [BOI, IMAGE]])
    word, draw = next_tokens(prefix, BOI)
    assert word.tolist() == [8, 9, -100, -100, -100]  # BOI is no target of the frozen head
    assert draw.tolist() == [0, 0, 1, -100, -100]  # but of the row that decides when to draw
    assert [len(x) for x in next_tokens(rest, BOI)] == [0, 0]


def test_targets_of_packed_documents_are_those_of_each_alone():
    rng = random.Random(1)
    for _ in range(50):
        rows = [random_rows(rng, rng.randint(1, 4)) for _ in range(3)]
        word, draw = next_tokens(Tokens.packed(rows, P), BOI)
        expected = [brute_force_targets(document) for row in rows for document in row]
        assert word.tolist() == [x for words, _ in expected for x in words]
        assert draw.tolist() == [x for _, draws in expected for x in draws]


def test_what_others_say_is_no_target():
    rng = random.Random(2)
    for _ in range(50):
        rows = [random_rows(rng, rng.randint(1, 4)) for _ in range(3)]
        own = [[[rng.random() < 0.5 for _ in document] for document in row] for row in rows]
        word, draw = next_tokens(Tokens.packed(rows, P, loss_mask=own), BOI)
        pairs = [pair for row in zip(rows, own, strict=True) for pair in zip(*row, strict=True)]
        expected = [brute_force_targets(*pair) for pair in pairs]
        assert word.tolist() == [x for words, _ in expected for x in words]
        assert draw.tolist() == [x for _, draws in expected for x in draws]


def test_targets_of_two_speakers_written_out():
    """5 6 7 are another's, 8 9 and the picture the model's, and so are 10 and EOS behind it."""
    row = [5, 6, 7, 8, 9, BOI, IMAGE, EOI, 10, EOS, 11]
    own = [False] * 3 + [True] * 7 + [False]
    prefix, rest = split_phases([document(row, own)], P)
    word, draw = next_tokens(prefix, BOI)
    assert word.tolist() == [-100, -100, 8, 9, -100, -100] and draw.tolist() == [-100, -100, 0, 0, 1, -100]
    word, draw = next_tokens(rest, BOI)
    assert word.tolist() == [10, EOS, -100, -100] and draw.tolist() == [0, 0, -100, -100]
    nobody = split_phases([document(row, [False] * len(row))], P)
    assert all((x == -100).all() for tokens in nobody for x in next_tokens(tokens, BOI))


def taught(batch: Batch, boi_id: int) -> list[torch.Tensor]:
    """The targets of both phases."""
    both = (next_tokens(tokens, boi_id) for tokens in (batch.prefix, batch.rest))
    return [torch.cat(x) for x in zip(*both, strict=True)]


# ---- sequences ----


def row_ids(tokens: Tokens, r: int) -> list[int]:
    """Ids of a row without padding, patches as IMAGE."""
    return [i for i in tokens.ids[r].tolist() if i >= IMAGE]


def alike(a: Tokens, b: Tokens) -> bool:
    """Do two plans agree?"""
    pairs = ((x, vars(b)[name]) for name, x in vars(a).items())
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def documents_of(prefix: Tokens, rest: Tokens) -> list[list[list[int]]]:
    """The documents of each row, put together again from both phases; patches as P times IMAGE."""
    out = []
    for r in range(len(rest.ids)):
        count = int(torch.cat((prefix.document[r], rest.document[r])).max()) + 1
        out.append([[] for _ in range(count)])
        for tokens in (prefix, rest):
            for i, d in zip(tokens.ids[r].tolist(), tokens.document[r].tolist(), strict=True):
                if d >= 0:
                    out[-1][d].append(i)
    return out


def spread(row: list[int], num_patches: int = P) -> list[int]:
    return [i for token in row for i in ([IMAGE] * num_patches if token == IMAGE else [token])]


def captioned(rng: random.Random, n: int) -> list[list[int]]:
    out = []
    for _ in range(n):
        caption = [rng.randint(4, 63) for _ in range(rng.randint(0, 12))]
        behind = [BOI, IMAGE, EOI, *caption, EOS]
        out.append(
            rng.choice(([*caption, BOI, IMAGE], behind, [*caption, BOI, IMAGE, IMAGE, EOI, BOI, IMAGE]))
        )
    return out


def test_positions_and_image_numbers_go_on_where_the_first_phase_ended():
    rows = [[5, 6, 7, BOI, IMAGE, EOI, 8, BOI, IMAGE], [BOI, IMAGE, EOS], [9, BOI, IMAGE, IMAGE]]
    prefix, rest = phases(rows)
    whole = Tokens.rows(rows, P)
    for r in range(len(rows)):
        for field in ("ids", "image", "position", "document"):
            halves = [getattr(t, field)[r][t.document[r] >= 0] for t in (prefix, rest)]
            assert torch.equal(torch.cat(halves), getattr(whole, field)[r][whole.document[r] >= 0]), field
    assert not (prefix.ids == IMAGE).any()
    assert (rest.ids[:, 0] == IMAGE).all()


def test_what_is_the_models_own_goes_with_its_tokens_into_both_phases():
    rng = random.Random(3)
    for pack in (0, 40):
        rows = captioned(rng, 8)
        own = [[rng.random() < 0.5 for _ in row] for row in rows]
        prefix, rest = split_phases(list(map(document, rows, own)), P, pack)
        for tokens in (prefix, rest):
            assert tokens.loss_mask.shape == tokens.ids.shape
            assert not tokens.loss_mask[tokens.document < 0].any()
        halves = [
            flags
            for r, row in enumerate(documents_of(prefix, rest))
            for d in range(len(row))
            for flags in [[x for t in (prefix, rest) for x in t.loss_mask[r][t.document[r] == d].tolist()]]
        ]
        wanted = [
            [x for i, x in zip(row, mine, strict=True) for _ in range(P if i == IMAGE else 1)]
            for row, mine in zip(rows, own, strict=True)
        ]
        assert halves == wanted


def test_a_sequence_without_a_picture_is_all_in_the_first_phase():
    prefix, rest = phases([[5, 6, 7], [8, BOI, IMAGE, EOI], [9]])
    assert [row_ids(prefix, r) for r in range(3)] == [[5, 6, 7], [8, BOI], [9]]
    assert [row_ids(rest, r) for r in range(3)] == [[], [IMAGE] * P + [EOI], []]
    assert (rest.document[[0, 2]] == -1).all() and len(prefix.ids) == len(rest.ids) == 3
    assert next_tokens(prefix, BOI)[0].tolist() == [6, 7, -100, -100, -100, -100]
    packed = phases([[5, 6, 7], [8, BOI, IMAGE, EOI], [9]], pack=40)
    assert documents_of(*packed) == [[[5, 6, 7], [8, BOI, *[IMAGE] * P, EOI], [9]]]
    assert rest.position[1, : P + 1].tolist() == list(range(2, P + 3))
    own = packed[1].document[0] == 1
    assert packed[1].position[0][own].tolist() == list(range(2, P + 3))


# ---- packing ----


def span(row: list[int]) -> int:
    return len(row) + (P - 1) * row.count(IMAGE)


def test_packing_fills_rows_in_order_as_long_as_there_is_room():
    rng = random.Random(0)
    for pack in (1, 5, 17, 24, 60, 200, 10**6):
        for _ in range(10):
            sequences = captioned(rng, 12)
            prefix, rest = phases(sequences, pack)
            rows = documents_of(prefix, rest)
            assert [d for row in rows for d in row] == [
                spread(s) for s in sequences
            ]  # order, images' as well
            lengths = [sum(map(len, row)) for row in rows]
            for row, length, below in zip(rows, lengths, rows[1:] + [None], strict=True):
                assert length <= pack or len(row) == 1  # one that is too long has a row of its own
                assert below is None or length + len(below[0]) > pack  # the next did not fit
            following = iter(sequences)
            whole = Tokens.packed([[next(following) for _ in row] for row in rows], P)
            for field in ("ids", "image", "position"):  # of every document, both phases together
                for r, row in enumerate(rows):
                    for d in range(len(row)):
                        halves = [getattr(t, field)[r][t.document[r] == d] for t in (prefix, rest)]
                        assert torch.equal(
                            torch.cat(halves), getattr(whole, field)[r][whole.document[r] == d]
                        )


@pytest.mark.parametrize(
    ("pack", "rows"), [(0, [1, 1, 1, 1]), (1, [1, 1, 1, 1]), (12, [2, 1, 1]), (13, [2, 1, 1]), (14, [2, 2])]
)
def test_rows_of_packed_documents_written_out(pack, rows):
    sequences = [
        [BOI, IMAGE],
        [9, BOI, IMAGE],
        [8, BOI, IMAGE, EOI],
        [9, BOI, IMAGE, EOI],
    ]  # 5, 6, 7, 7 tokens
    assert [span(s) for s in sequences] == [5, 6, 7, 7]
    assert [len(row) for row in documents_of(*phases(sequences, pack))] == rows


def test_a_row_that_holds_one_document_is_that_of_a_batch_without_packing():
    sequences = captioned(random.Random(0), 10)
    for tokens, wanted in zip(phases(sequences, 1), phases(sequences), strict=True):
        assert alike(tokens, wanted)


def test_a_packed_batch_holds_what_an_unpacked_one_holds():
    rng, orders = random.Random(0), (CAPTION_FIRST, CAPTION_DROPPED, IMAGE_FIRST)
    documents = [
        caption_document("x", caption, rng.choice(orders), CONFIG, 321)
        for caption in [[10, 11], [12, 13, 14], [], [15]] * 5
    ]
    for number, d in enumerate(documents):
        d.seed = number
    x = torch.randn(20, 4, 4, 4)
    alone, packed = (collate(documents, x, CONFIG, pack) for pack in (0, 40))
    for name in ("latents", "max_t", "u", "eps"):
        assert torch.equal(getattr(packed, name), getattr(alone, name)), name
    assert set(packed.max_t.tolist()) == {321, 1000} and 1 < len(packed.rest.ids) < 10
    assert [d for row in documents_of(packed.prefix, packed.rest) for d in row] == [
        row[0] for row in documents_of(alone.prefix, alone.rest)
    ]
    for phase in ("prefix", "rest"):  # and the same things are learned
        found, wanted = (next_tokens(getattr(batch, phase), BOI) for batch in (packed, alone))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ---- noise ----


def noisy_batch(max_t: list[int]) -> tuple[Batch, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(max_t))
    x, eps = torch.randn(2, len(max_t), 3, 4, 4, generator=generator)
    t = torch.randint(1, 1000, (len(max_t),), generator=generator)
    u = torch.zeros(len(max_t))  # t is given
    parts = phases([[BOI] + [IMAGE] * len(max_t)])
    targets = (find_targets(part, BOI) for part in parts)
    return Batch(*parts, x, torch.tensor(max_t), u, eps, *targets), t


def test_clean_images_stay_clean_and_the_others_get_noise():
    batch, t = noisy_batch([0, 1000, 0, 500, 1, 0])
    diffusion = Diffusion()
    x_t, times, which = batch.noised(diffusion, t)
    assert which.tolist() == [1, 3, 4]
    for i, limit in enumerate(batch.max_t.tolist()):
        if limit:
            a = diffusion.alpha_bar[t[i]].item()
            expected = math.sqrt(a) * batch.latents[i] + math.sqrt(1 - a) * batch.eps[i]
            assert torch.allclose(x_t[i], expected, atol=1e-6) and times[i] == t[i]
        else:
            assert torch.equal(x_t[i], batch.latents[i]) and times[i] == 0


def test_where_all_images_are_noisy_nothing_is_picked_out():
    batch, t = noisy_batch([1000, 500])
    x_t, times, which = batch.noised(Diffusion(), t)
    assert which is None and torch.equal(times, t)
    assert torch.equal(x_t, Diffusion().q_sample(batch.latents, t, batch.eps))


def test_where_no_image_is_noisy_the_first_stands_for_them_and_all_are_clean():
    batch, t = noisy_batch([0, 0, 0])
    x_t, times, which = batch.noised(Diffusion(), t)
    assert which.tolist() == [0] and torch.equal(x_t, batch.latents) and times.tolist() == [0] * 3


# ---- tasks ----


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("edit", {"edit": 1.0}),
        ("generate=2,edit=1,chat=1", {"generate": 0.5, "edit": 0.25, "chat": 0.25}),
        ("caption,chat", {"caption": 0.5, "chat": 0.5}),
        (" generate = 3 , edit ", {"generate": 0.75, "edit": 0.25}),
        ("edit=0.001,chat=0.003", {"edit": 0.25, "chat": 0.75}),
    ],
)
def test_tasks_and_their_shares(text, shares):
    assert parse_tasks(text) == pytest.approx(shares) and list(parse_tasks(text)) == list(shares)


def test_every_task_can_be_named():
    assert set(TASKS) == {"caption", "generate", "edit", "chat"}
    assert parse_tasks(",".join(TASKS)) == dict.fromkeys(TASKS, 0.25)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "'' is not one of caption, generate, edit, chat"),
        ("edits", "'edits' is not one of"),
        ("edit,", "'' is not one of"),
        ("=2", "'' is not one of"),
        ("Edit", "'Edit' is not one of"),
        ("edit=", "the weight '' of edit is not a number"),
        ("chat=much", "the weight 'much' of chat is not a number"),
        ("chat=1=2", "the weight '1=2' of chat is not a number"),
        ("edit=0", "the weight of edit must be positive"),
        ("edit=1,chat=-1", "the weight of chat must be positive"),
        ("edit=nan", "the weight of edit must be positive"),
        ("edit=inf", "the weight of edit must be positive"),
    ],
)
def test_wrong_tasks_are_errors_in_words(text, what):
    with pytest.raises(ValueError, match=re.escape(what)) as error:
        parse_tasks(text)
    assert str(error.value).startswith(f"--task {text}: ")


# ---- documents of captioned pictures and edits ----


def test_documents_of_a_captioned_picture_written_out():
    forms = {
        order: caption_document("x", [10, 11], order, CONFIG, 321)
        for order in (CAPTION_FIRST, CAPTION_DROPPED, IMAGE_FIRST)
    }
    assert forms[CAPTION_FIRST] == Document([10, 11, BOI, IMAGE], ["x"], [1000], [True] * 4)
    assert forms[CAPTION_DROPPED] == Document([BOI, IMAGE], ["x"], [1000], [True] * 2)
    # only a picture before its caption has the noise limit
    assert forms[IMAGE_FIRST] == Document([BOI, IMAGE, EOI, 10, 11, EOS], ["x"], [321], [True] * 6)


def test_what_captions_say_about_when_to_draw_is_learned_unless_conversations_do():
    for learn in (True, False):
        for order in (CAPTION_FIRST, CAPTION_DROPPED, IMAGE_FIRST):
            d = caption_document("x", [10, 11], order, CONFIG, learn_caption=learn)
            word, draw = taught(collate([d], torch.zeros(1, 4, 4, 4), CONFIG), BOI)
            words = {CAPTION_FIRST: [11] * learn, CAPTION_DROPPED: [], IMAGE_FIRST: [10, 11, EOS]}[order]
            assert word[word >= 0].tolist() == words
            # one decision, that a picture comes next; behind a picture, only that none does
            decisions = {CAPTION_FIRST: [0, 1] * learn, CAPTION_DROPPED: [], IMAGE_FIRST: [0] * 3}[order]
            assert draw[draw >= 0].tolist() == decisions


def test_a_dropped_caption_leaves_no_trace():
    empty = collate([caption_document("x", [], CAPTION_FIRST, CONFIG)], torch.zeros(1, 4, 4, 4), CONFIG)
    for caption in ([10, 11, 12], [20], []):
        dropped = [caption_document("x", caption, CAPTION_DROPPED, CONFIG)]
        batch = collate(dropped, torch.zeros(1, 4, 4, 4), CONFIG)
        assert alike(batch.prefix, empty.prefix) and alike(batch.rest, empty.rest)


def test_an_edit_written_out():
    d = edit_document("before", "after", [10, 11], CONFIG)
    assert d.ids == [BOI, IMAGE, EOI, 10, 11, BOI, IMAGE]
    assert d.pictures == ["before", "after"] and d.max_t == [0, 1000]
    assert d.loss_mask == [False] * 7
    dropped = edit_document("before", "after", [10, 11], CONFIG, dropped=True)  # nothing to change
    assert dropped == Document([BOI, IMAGE, EOI, BOI, IMAGE], ["before"] * 2, [0, 1000], [False] * 5)


def test_a_batch_of_documents_holds_them_in_order():
    documents = [
        edit_document("a", "b", [10, 11], CONFIG),
        Document([5, 6, 7], [], [], [False, True, True]),
        caption_document("c", [12], IMAGE_FIRST, CONFIG, 7),
    ]
    x = torch.randn(3, 4, 4, 4)
    for pack in (0, 60):
        batch = collate(documents, x, CONFIG, pack)
        assert [d for row in documents_of(batch.prefix, batch.rest) for d in row] == [
            spread(d.ids) for d in documents
        ]
        assert torch.equal(batch.latents, x) and batch.max_t.tolist() == [0, 1000, 7]
        learned = [next_tokens(t, BOI)[0] for t in (batch.prefix, batch.rest)]
        assert [w[w >= 0].tolist() for w in learned] == [[6, 7], [12, EOS]]
    assert len(batch.rest.ids) == 1


def test_a_batch_without_a_picture_gets_an_empty_clean_one():
    documents = [Document([5, 6, 7], [], [], [False, True, True]), Document([8], [], [], [True])]
    for pack in (0, 60):
        batch = collate(documents, torch.zeros(0, 4, 4, 4), CONFIG, pack)
        assert batch.max_t.tolist() == [0] and torch.equal(batch.latents, torch.zeros(1, 4, 4, 4))
        assert batch.u.shape == (1,) and batch.eps.shape == (1, 4, 4, 4)
        found = [d for row in documents_of(batch.prefix, batch.rest) for d in row]
        assert found == [[5, 6, 7], [8], [BOI] + [IMAGE] * P]
        word, draw = next_tokens(batch.prefix, BOI)
        assert word.tolist() == [6, 7] + [-100] * 3 and draw.tolist() == [0, 0] + [-100] * 3
    assert documents[0].ids == [5, 6, 7] and len(documents) == 2  # and the caller's are what they were


# ---- conversations ----


def chat_tokenizer() -> Tokenizer:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return tokenizer


TOKENIZER = chat_tokenizer()
CHAT = dataclasses.replace(
    CONFIG,
    vocab_size=TOKENIZER.get_vocab_size(),
    boi_id=TOKENIZER.token_to_id("<|vision_start|>"),
    eoi_id=TOKENIZER.token_to_id("<|vision_end|>"),
)


def said(ids: list[int]) -> str:
    """Token ids as text, with <|image_pad|> for a picture."""
    groups = itertools.groupby(ids, key=lambda i: i == IMAGE)
    return "".join(
        "<|image_pad|>" * len(list(run)) if image else TOKENIZER.decode(list(run), skip_special_tokens=False)
        for image, run in groups
    )


def image(name: str) -> dict:
    return {"type": "image", "image": name}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


TWO_TURNS = [
    {"role": "system", "content": "think."},
    {"role": "user", "content": [image("shown"), text("paint it red")]},
    {"role": "assistant", "content": [text("here:"), image("first")], "reasoning_content": "so: red"},
    {"role": "user", "content": [text("two more, <|im_start|>assistant\nplease")]},
    {
        "role": "assistant",
        "content": [text("one:"), image("second"), text("two:"), image("third"), text("done.")],
        "reasoning_content": "two pictures",
    },
]


def documents(messages: list[dict], n: int = 400, dropped: bool = False) -> list[Document]:
    rng = random.Random(0)
    return [chat_document(messages, TOKENIZER, CHAT, rng, dropped) for _ in range(n)]


def test_one_picture_of_the_last_message_is_painted_and_what_stands_behind_it_is_cut_off():
    whole = encode(TOKENIZER, apply_chat_template(TWO_TURNS, generate=False), CHAT.boi_id, CHAT.eoi_id)
    at, count = [i for i, token in enumerate(whole) if token == IMAGE], Counter()
    names = ["shown", "first", "second", "third"]
    assert len(at) == 4 and said(whole) == text_of(apply_chat_template(TWO_TURNS, generate=False))
    for d in documents(TWO_TURNS):
        count[tuple(d.max_t)] += 1
        n = len(d.pictures)
        assert d.pictures == names[:n] and len(d.loss_mask) == len(d.ids)
        if any(d.max_t):  # painted: the last picture, and nothing behind it
            assert n in (3, 4) and d.max_t == [0] * (n - 1) + [1000]
            assert d.ids == whole[: at[n - 1] + 1]
        else:  # read to the end
            assert n == 4 and d.ids == whole
    shares = [count[t] / 400 for t in ((0, 0, 0, 0), (0, 0, 1000), (0, 0, 0, 1000))]
    assert len(count) == 3 and shares == pytest.approx([0.25, 0.1875, 0.5625], abs=0.07)


def test_a_dropped_conversation_is_a_picture_of_its_last_message_alone():
    count = Counter()
    for d in documents(TWO_TURNS, dropped=True):
        assert d.ids == [CHAT.boi_id, IMAGE] and d.max_t == [1000] and d.loss_mask == [False] * 2
        count.update(d.pictures)
    assert set(count) == {"second", "third"} and count["third"] / 400 == pytest.approx(0.75, abs=0.08)


@pytest.mark.parametrize("dropped", (True, False))
def test_a_conversation_that_ends_in_words_is_read_to_its_end(dropped):
    messages = [*TWO_TURNS, {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "bye."}]
    whole = encode(TOKENIZER, apply_chat_template(messages, generate=False), CHAT.boi_id, CHAT.eoi_id)
    for d in documents(messages, 40, dropped):
        assert d.ids == whole and d.max_t == [0] * 4
        assert d.pictures == ["shown", "first", "second", "third"]
    silent = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello."}]
    for d in documents(silent, 10, dropped):
        assert (d.pictures, d.max_t) == ([], []) and d.ids[-1] in d.ids[:-1]


def test_only_what_the_assistant_says_is_spoken():
    d = next(d for d in documents(TWO_TURNS) if not any(d.max_t))
    turns = re.findall(r"<\|im_start\|>(assistant\n.*?<\|im_end\|>)", said(d.ids), re.S)
    mine = said([i for i, own in zip(d.ids, d.loss_mask, strict=True) if own])
    # the words that a user typed like a turn are the user's
    turns = [t for t in turns if not t.startswith("assistant\nplease")]
    assert mine == "".join(turns) and len(turns) == 2
    assert mine.endswith(
        "<think>\ntwo pictures\n</think>\n\none:"
        "<|vision_start|><|image_pad|><|vision_end|>two:<|vision_start|><|image_pad|><|vision_end|>"
        "done.<|im_end|>"
    )


def test_what_a_conversation_teaches():
    """The words of the assistant, the end of its turn, and where its pictures begin; nobody else's."""
    d = next(d for d in documents(TWO_TURNS) if not any(d.max_t))
    batch = collate([d], torch.zeros(4, 4, 4, 4), CHAT)
    word, draw = taught(batch, CHAT.boi_id)
    assert (draw == 1).sum() == 3  # not before the user's
    learned = said([i for i in word.tolist() if i >= 0])
    assert learned.count("<|im_end|>") == 2 and "<|vision" not in learned and "<|im_start|>" not in learned
    # what follows a picture's EOI is learned, EOI itself is not
    turns = learned.split("<|im_end|>")
    assert turns[0].endswith("here:") and turns[1].endswith("one:two:done.") and "paint" not in learned


def test_a_painted_picture_teaches_what_stands_before_it():
    d = next(d for d in documents(TWO_TURNS) if d.max_t == [0, 0, 1000])
    batch = collate([d], torch.zeros(3, 4, 4, 4), CHAT)
    assert (next_tokens(batch.rest, CHAT.boi_id)[1] == 1).sum() == 2
    which = batch.noised(Diffusion(), torch.full((3,), 400))[2]
    assert which.tolist() == [2]


def test_documents_of_the_built_in_conversations():
    """Of every one: painted last, clean before, and its pictures in order; a quarter is read to its end."""
    rng, read = random.Random(0), Counter()
    for _ in range(300):
        messages = Shapes().conversation(rng)
        d = chat_document(messages, TOKENIZER, CHAT, rng)
        parts = [p for m in messages if isinstance(m["content"], list) for p in m["content"]]
        shots = [p["image"] for p in parts if "image" in p]
        own = [p for p in messages[-1]["content"] if "image" in p]
        assert d.ids.count(IMAGE) == len(d.pictures) == len(d.max_t)
        assert d.pictures == shots[: len(d.pictures)] and not any(d.max_t[:-1])
        if d.max_t and d.max_t[-1]:
            assert own and len(d.pictures) > len(shots) - len(own) and d.ids[-1] == IMAGE
        else:
            assert d.pictures == shots and TOKENIZER.token_to_id("<|im_end|>") in d.ids[-3:]
        if own:
            read[bool(d.max_t[-1])] += 1
    assert read[False] / read.total() == pytest.approx(0.25, abs=0.1)


# ---- which documents a step has ----


class Numbers:
    """A source whose pictures are numbers, and their latents these numbers everywhere."""

    def captioned(self, rng: random.Random) -> tuple[int, str]:
        i = rng.randrange(10**6)
        return i, " ".join(f"red {i}" for _ in range(1 + i % 7))

    def edited(self, rng: random.Random) -> tuple[int, int, str]:
        i = rng.randrange(10**6)
        return i, i + 1, f"make it {i}"

    def conversation(self, rng: random.Random) -> list[dict]:
        i, picture = rng.randrange(10**6), [image(rng.randrange(10**6))]
        question, answer = [text(f"paint {i}")], picture if i % 2 else [text("no")]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def words(self):
        yield from ((f"number {i}", False) for i in range(9))
        yield from ((f"make it {i}", True) for i in range(9))

    def validation(self, n: int) -> list[tuple[int, str]]:
        return [(i, f"number {i}") for i in range(min(n, 5))]

    def validation_edits(self, n: int) -> list[tuple[int, int, str]]:
        return [(10 * i, 10 * i + 1, f"make it {i}") for i in range(min(n, 5))]

    def latents(self, pictures: list[int], codec: object) -> torch.Tensor:
        return torch.tensor(pictures, dtype=torch.float32)[:, None, None, None].expand(-1, 4, 4, 4)


MIXTURE = "generate=2,caption=1,edit=3,chat=6"
PARAGRAPHS = [f"grass number {i} is {'green ' * (i % 9)}" for i in range(1000)]


def make_documents(source: object = None, model: ModelConfig = CHAT, **changes: object) -> Documents:
    config = dataclasses.replace(SMALL, lr_text_ratio=1.0, **changes)
    text = Paragraphs(PARAGRAPHS, TOKENIZER, model.eos_id, context_length(config, model))
    return Documents(config, model, TOKENIZER, source or Numbers(), text)


def kind(d: Document) -> str:
    """What became of a captioned picture."""
    if d.ids[:3] == [CHAT.boi_id, IMAGE, CHAT.eoi_id]:
        return IMAGE_FIRST
    assert d.ids[-2:] == [CHAT.boi_id, IMAGE] and d.ids.count(IMAGE) == 1
    return CAPTION_FIRST if len(d.ids) > 2 else CAPTION_DROPPED


def near(count: int, n: int, share: float) -> bool:
    return abs(count - n * share) < 4 * math.sqrt(share * (1 - share) * n)


def test_four_fifths_of_the_captions_come_first_and_a_tenth_of_these_are_dropped():
    documents, n = make_documents(Shapes(), batch_size=80), 8000
    batches = [[kind(d) for d in documents.of_step(step, slice(None))] for step in range(n // 80)]
    count = Counter(itertools.chain(*batches))
    first = count[CAPTION_FIRST] + count[CAPTION_DROPPED]
    assert near(first, n, 0.8) and near(count[CAPTION_DROPPED], first, 0.1)
    # drawn for each sample: every batch holds both orders, and hardly any fails to hold a dropped caption
    assert all({CAPTION_FIRST, IMAGE_FIRST} <= set(batch) for batch in batches)
    assert sum(CAPTION_DROPPED in batch for batch in batches) > 95
    for number in range(0, 80, 8):  # whatever the place in the batch
        at = [batch[number] for batch in batches]
        assert near(at.count(CAPTION_FIRST), 100, 0.72) and near(at.count(IMAGE_FIRST), 100, 0.2)


def test_a_document_holds_the_caption_of_its_picture():
    documents = make_documents(Shapes(), batch_size=60)
    for d in documents.of_step(0, slice(None)):
        (shot,) = d.pictures
        caption = encode_plain(TOKENIZER, shot.scene.caption)
        assert [i for i in d.ids if i not in (CHAT.boi_id, CHAT.eoi_id, CHAT.eos_id, IMAGE)] in (caption, [])
        assert d.max_t == [200 if kind(d) == IMAGE_FIRST else 1000]


@pytest.mark.parametrize("task", ("generate", "caption"))
def test_a_task_of_captions_and_pictures_alone_is_a_recipe_of_the_first_stage(task):
    shares = make_documents(caption_first=float(task == "generate"), batch_size=30)
    named = make_documents(task=task, batch_size=30)
    drawn = named.of_step(0, slice(None))
    assert drawn == shares.of_step(0, slice(None))
    wanted = {IMAGE_FIRST} if task == "caption" else {CAPTION_FIRST, CAPTION_DROPPED}
    assert {kind(d) for d in drawn} == wanted
    assert make_documents(task="generate=4,caption=1").config.tasks == pytest.approx(TrainConfig().tasks)


def task_of(d: Document) -> str:
    """Which task of MIXTURE a document of `Numbers` came from."""
    words = said(d.ids)
    return "chat" if "<|im_start|>" in words else "edit" if d.max_t == [0, 1000] else kind(d)


def test_a_mixture_draws_its_tasks_in_proportion_and_drops_what_guidance_nulls():
    n = 3000
    documents = make_documents(task=MIXTURE, edit_drop=0.3, edit_empty=0, batch_size=n).of_step(
        0, slice(None)
    )
    count = Counter(map(task_of, documents))
    assert near(count[IMAGE_FIRST], n, 1 / 12) and near(count["edit"], n, 3 / 12)
    assert near(count[CAPTION_FIRST], n, 0.9 * 2 / 12)
    # half of the conversations end in a picture, which can be dropped as a caption can
    assert near(count["chat"], n, 6 / 12 * 0.95) and near(count[CAPTION_DROPPED], n, 0.1 * (2 + 3) / 12)
    edits = [d for d in documents if task_of(d) == "edit"]
    dropped = [d for d in edits if d.pictures[0] == d.pictures[1]]
    assert near(len(dropped), len(edits), 0.3) and {len(d.ids) for d in dropped} == {5}
    for d in edits:
        before, after = d.pictures
        assert d in dropped or (after == before + 1 and f"make it {before}" in said(d.ids))


def test_of_edits_alone_some_are_the_picture_after_alone_which_guidance_over_the_picture_subtracts():
    """The shares of both kinds, the same tokens as sampling nulls, and nothing else moved by it."""
    n = 3000
    plain, some = (
        make_documents(task="edit", edit_drop=0.3, edit_empty=share, batch_size=n).of_step(0, slice(None))
        for share in (0.0, 0.1)
    )
    alone = [d for d in some if len(d.pictures) == 1]
    assert near(len(alone), n, 0.1) and all(len(d.pictures) == 2 for d in plain)
    for d, former in zip(some, plain, strict=True):
        if d not in alone:
            assert d == former
            continue
        assert d.ids == [CHAT.boi_id, IMAGE] and d.max_t == [1000] and d.loss_mask == [False] * 2
        assert d.pictures == former.pictures[1:] and former.pictures[0] != former.pictures[1]
    dropped = [d for d in some if len(d.ids) == 5]
    assert near(len(dropped), n, 0.3)
    assert (
        CONFIGS["small"].edit_empty == CONFIGS["qwen3-8b"].edit_empty == 0.05
        and TrainConfig().edit_empty == 0
    )
    with pytest.raises(ValueError, match="--edit-drop 0.6 and --edit-empty 0.5 are more than 1 together"):
        TrainConfig(edit_drop=0.6, edit_empty=0.5)


@pytest.mark.parametrize(
    ("task", "learned"),
    [
        ("", True),
        ("generate", True),
        ("generate=1,caption=1", True),
        (MIXTURE, False),
        ("generate,edit", False),
    ],
)
def test_a_bare_caption_says_when_to_draw_in_the_first_stage_and_not_beside_other_tasks(task, learned):
    documents = make_documents(task=task, batch_size=200).of_step(0, slice(None))
    captions = [d for d in documents if task_of(d) == CAPTION_FIRST]
    assert len(captions) > 15
    batch = collate(captions, torch.zeros(len(captions), 4, 4, 4), CHAT)
    words, draw = taught(batch, CHAT.boi_id)
    assert (draw == 1).sum() == len(captions) * learned  # once for each
    assert ((draw == 0).sum() > 0) == ((words >= 0).sum() > 0) == learned


def every_draw(documents: Documents, step: int, shares: list[slice]) -> tuple[list[Document], list[Document]]:
    """Documents of all shares of a step, and those of text alone."""
    both = (documents.of_step, documents.text_of_step)
    return tuple([d for share in shares for d in of_step(step, share)] for of_step in both)


def test_a_document_follows_from_the_seed_the_step_and_its_number_alone():
    documents = make_documents(task=MIXTURE, batch_size=12, text_batch=12, micro_batch=3)
    whole, texts = every_draw(documents, 7, [slice(None)])
    assert len(whole) == len(texts) == 12 and len({d.seed for d in whole}) == 12
    assert len({str(d.ids) for d in texts}) == 12 and {str(d.pictures) for d in texts} == {"[]"}
    assert every_draw(documents, 7, [slice(None)]) == (whole, texts)  # whatever was drawn before
    for number in range(12):
        assert every_draw(documents, 7, [slice(number, number + 1)]) == ([whole[number]], [texts[number]])
    changes = dict(batch_size=24, text_batch=36, micro_batch=0, steps=9, val_every=3)
    larger = make_documents(task=MIXTURE, **changes)
    assert every_draw(larger, 7, [slice(0, 12)]) == (whole, texts)
    for others in (
        every_draw(documents, 8, [slice(None)]),
        every_draw(make_documents(task=MIXTURE, batch_size=12, text_batch=12, seed=1), 7, [slice(None)]),
        every_draw(larger, 7, [slice(12, 24)]),
    ):
        assert not {d.seed for d in others[0]} & {d.seed for d in whole}
        assert not {str(d.pictures) for d in others[0] if d.pictures} & {str(d.pictures) for d in whole}
        assert len({str(d.ids) for d in others[1]} & {str(d.ids) for d in texts}) <= 1  # of 1,000 paragraphs


@pytest.mark.parametrize("size", (2, 3, 6))
def test_what_processes_draw_together_is_what_one_draws(size):
    documents = make_documents(Shapes(), task=MIXTURE, batch_size=12, text_batch=6)
    pictures, texts = (
        [documents_of_share(step, Team(rank, size).share(n)) for rank in range(size)]
        for documents_of_share, n, step in ((documents.of_step, 12, 3), (documents.text_of_step, 6, 3))
    )
    assert [len(x) for x in pictures] == [12 // size] * size and [len(x) for x in texts] == [6 // size] * size
    alone = every_draw(documents, 3, [slice(None)])
    assert (list(itertools.chain(*pictures)), list(itertools.chain(*texts))) == alone


def test_text_alone_is_learned_word_by_word_and_cut_to_the_context():
    short = dataclasses.replace(CHAT, max_position_embeddings=40)
    for pack, room in ((0, 40), (30, 30), (400, 40)):
        documents = make_documents(model=short, text_batch=50, pack=pack).text_of_step(0, slice(None))
        whole = {tuple([*encode_plain(TOKENIZER, p), CHAT.eos_id]) for p in PARAGRAPHS}
        pieces = {ids[i : i + room] for ids in whole for i in range(0, len(ids), room)}
        assert {tuple(d.ids) for d in documents} <= pieces
        assert max(len(d.ids) for d in documents) == room and len({len(d.ids) for d in documents}) > 1
        assert all(d.loss_mask == [True] * len(d.ids) and d.max_t == [] for d in documents)


def test_a_caption_is_cut_where_it_leaves_no_room_for_its_pictures():
    documents = make_documents(model=dataclasses.replace(CHAT, max_position_embeddings=24))
    ids = encode_plain(TOKENIZER, "red blue " * 20)
    assert documents.tokenise("red blue " * 20) == documents.tokenise(ids) == ids[: 24 - P - 3]
    longest = caption_document("x", documents.tokenise(ids), IMAGE_FIRST, CHAT)
    assert len(spread(longest.ids)) == 24
    edit = edit_document("a", "b", documents.tokenise(ids, 2), CHAT)
    assert len(spread(edit.ids)) == 24 - 1  # it has no EOS
    assert documents.fits("red") and not documents.fits("red blue " * 20)
    says = "context of 7 tokens .* no room for a caption beside the 4 patches"
    for changes in (dict(model=dataclasses.replace(CHAT, max_position_embeddings=P + 3)), dict(pack=P + 3)):
        with pytest.raises(ValueError, match=says):
            make_documents(**changes)


def test_conversations_need_a_base_with_chat_tokens():
    half = Tokenizer.from_str(build_tokenizer().to_str().replace("<|im_end|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"--task chat: .* no chat tokens .*<\|im_end\|>"):
        Documents(dataclasses.replace(SMALL, task="generate,chat"), CHAT, half, Numbers())
    Documents(dataclasses.replace(SMALL, task="generate,edit"), CHAT, half, Numbers())


@pytest.mark.parametrize("task", ("", "edit", "generate,edit"))
def test_validation_shows_each_picture_under_its_own_caption_and_under_the_next_one_s(task):
    documents = make_documents(task=task)
    right, permuted = documents.validation(96)
    assert len(right) == len(permuted) == 5 and documents.validation(96) == (right, permuted)
    for number in range(5):
        other = (number + 1) % 5
        for d, words in ((right[number], number), (permuted[number], other)):
            if task == "edit":
                assert d.pictures == [10 * number, 10 * number + 1] and d.max_t == [0, 1000]
                assert f"<|vision_end|>make it {words}<|vision_start|>" in said(d.ids)
            else:
                assert d.pictures == [number] and d.max_t == [1000] and kind(d) == CAPTION_FIRST
                assert said(d.ids[:-2]) == f"number {words}"
        assert right[number].seed == permuted[number].seed == number  # and under the same noise
    assert len(documents.validation(2)[0]) == 2


@pytest.mark.parametrize("task", ("", "edit"))
def test_where_there_is_no_other_caption_nothing_is_shown_under_one(task):
    """A single picture, or several whose captions are alike, maybe only as far as the context reaches."""
    documents = make_documents(task=task)
    assert len(documents.validation(1)[0]) == 1 and documents.validation(1)[1] == []
    documents.room = 2 + (P + 1 if task else 0)  # "number 1" is cut before the number, "make it 1" as well
    right, others = documents.validation(96)
    assert len(right) == 5 and others == []


def test_another_caption_is_the_next_one_that_is_another():
    assert permuted(["a", "b", "c"]) == ["b", "c", "a"]
    assert permuted(["a", "a", "b", "a"]) == ["b", "b", "a", "b"]
    assert permuted([[1, 2], [1, 2], [1]]) == [[1], [1], [1, 2]]
    assert permuted(["a"]) == permuted(["a", "a"]) == permuted([]) == []


# ---- the noise of a document ----


def placed(batch: Batch) -> Iterator[tuple[list[int], list[int], slice]]:
    """Each document of a batch in order: its ids, the numbers its pictures are, and its images' rows."""
    first = 0
    for d in itertools.chain(*documents_of(batch.prefix, batch.rest)):
        here = slice(first, first + d.count(IMAGE) // P)
        first = here.stop
        yield d, [int(x) for x in batch.latents[here, 0, 0, 0]], here
    assert first == len(batch.latents) == len(batch.max_t) == len(batch.u) == len(batch.eps)


@pytest.mark.parametrize(("size", "pack"), [(0, 0), (1, 0), (5, 0), (0, 60), (5, 60)])
def test_everything_of_a_document_goes_with_it_through_sorting_and_packing(size, pack):
    documents = make_documents(task=MIXTURE, batch_size=32).of_step(0, slice(None))
    before = [dataclasses.replace(d) for d in documents]
    batches = make_batches(documents, Numbers(), None, CHAT, size, pack)
    assert len(batches) == (math.ceil(32 / size) if size else 1) and documents == before
    waiting, lengths, empty = list(documents), [], [CHAT.boi_id] + [IMAGE] * P
    for batch in batches:
        for ids, numbers, here in placed(batch):
            if ids == empty and numbers == [0]:  # of a batch without a picture
                assert size and batch.max_t.tolist() == [0]
                continue
            # a dropped caption is told by its picture
            (found,) = (d for d in waiting if spread(d.ids) == ids and d.pictures == numbers)
            waiting.remove(found)
            lengths.append(len(ids))
            assert batch.max_t[here].tolist() == found.max_t
            if numbers:
                u, eps = draw_noise((len(numbers), 4, 4, 4), found.seed)
                assert torch.equal(batch.u[here], u) and torch.equal(batch.eps[here], eps)
    assert not waiting
    if size:  # those of like length together, which saves padding
        assert lengths == sorted(lengths)
    else:
        assert lengths == [len(spread(d.ids)) for d in documents]


def test_noise_is_uniform_and_normal_and_another_for_each_seed_and_picture():
    u, eps = (torch.cat(x) for x in zip(*(draw_noise((2, 4, 4, 4), n) for n in range(500)), strict=True))
    assert u.shape == (1000,) and eps.shape == (1000, 4, 4, 4)
    assert len(set(u.tolist())) > 990 and len({str(x.tolist()) for x in eps[:, 0]}) == 1000
    assert ((u >= 0) & (u < 1)).all() and abs(u.mean() - 0.5) < 4 / math.sqrt(12 * 1000)
    assert u.sort().values.sub(torch.linspace(0, 1, 1000)).abs().max() < 0.06
    assert abs(eps.mean()) < 4 / math.sqrt(64000) and abs(eps.square().mean() - 1) < 4 * math.sqrt(2 / 64000)


# ---- what is longer than the context ----


def test_every_token_of_a_long_text_is_in_some_piece_and_pieces_are_drawn_alike():
    """One document of 5,000 lines beside short ones: the long one is not a single choice among them."""
    long = " ".join(f"line {i}" for i in range(5000))
    short = [f"a short paragraph of number {i}" for i in range(5)]
    context = 64
    source = Paragraphs([*short, long], TOKENIZER, CHAT.eos_id, context)
    pieces = [piece.tolist() for piece in source.pieces]
    assert all(len(piece) <= context for piece in pieces)
    assert pieces[:5] == [[*encode_plain(TOKENIZER, text), CHAT.eos_id] for text in short]
    assert list(itertools.chain(*pieces[5:])) == [*encode_plain(TOKENIZER, long), CHAT.eos_id]
    assert all(len(piece) == context for piece in pieces[5:-1])
    drawn = Counter(tuple(source.draw(random.Random(i))[0]) for i in range(20 * len(pieces)))
    assert drawn.keys() == set(map(tuple, pieces)) and max(drawn.values()) < 60


def test_texts_that_fit_are_drawn_as_they_were():
    source = Paragraphs(PARAGRAPHS, TOKENIZER, CHAT.eos_id, CHAT.max_position_embeddings)
    for i in range(20):
        ids, mask = source.draw(random.Random(i))
        assert ids == [*encode_plain(TOKENIZER, random.Random(i).choice(PARAGRAPHS)), CHAT.eos_id]
        assert mask == [True] * len(ids)


class LongText:
    """Ten documents as a `TextSource`, each of 100 ids that tell where they stand."""

    def draw(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        return list(range(100)), [i % 3 > 0 for i in range(100)]


def test_no_part_of_a_document_of_text_is_out_of_reach():
    """Built-in conversations on a base of a short context: their answers stand at the end."""
    documents = make_documents(model=dataclasses.replace(CHAT, max_position_embeddings=24), text_batch=40)
    documents.text = LongText()
    drawn = documents.text_of_step(0, slice(None))
    assert {d.ids[0] for d in drawn} == {0, 24, 48, 72, 96}
    for d in drawn:
        assert d.ids == list(range(100))[d.ids[0] : d.ids[0] + 24]
        assert d.loss_mask == [i % 3 > 0 for i in d.ids]


class Wordy(Numbers):
    """Captions and instructions of one to twelve words."""

    captions = [" ".join(["red"] * n) for n in range(1, 13)]

    def words(self):
        yield from ((text, False) for text in self.captions)
        yield from ((encode_plain(TOKENIZER, text), True) for text in self.captions)


@pytest.mark.parametrize(
    "task, what",
    (
        ("generate", "captions"),
        ("caption", "captions"),
        ("edit", "instructions"),
        ("chat", ""),
        ("", "captions"),
    ),
)
def test_how_many_captions_are_cut_and_which_is_the_first_is_said_once(capfd, task, what):
    model = dataclasses.replace(CHAT, max_position_embeddings=24)
    documents = make_documents(Wordy(), model, task=task)
    documents.tell_cuts()
    (line,) = capfd.readouterr().err.splitlines() or [""]
    limit = documents.limit(2 if what == "instructions" else 1)
    cut = [c for c in Wordy.captions if len(encode_plain(TOKENIZER, c)) > limit]
    assert 0 < len(cut) < 12
    start = f"note: {len(cut)} of 12 {what} are cut to their first {limit} tokens, the context being 24"
    assert line.startswith(start) and line.endswith(reprlib.repr(cut[0])) if what else not line
    make_documents(Wordy(), task=task).tell_cuts()
    assert not capfd.readouterr().err  # where all fit


def test_a_caption_of_few_letters_that_normalise_to_many_is_not_taken_for_short():
    """NFC makes three code points of some: a musical note of 4 bytes has 12."""
    tokenizer = build_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    model = dataclasses.replace(CHAT, max_position_embeddings=P + 3 + 40)
    documents = Documents(SMALL, model, tokenizer, Numbers())
    for n in range(1, 12):
        text = "\U0001d160" * n
        assert documents.fits(text) == (len(encode_plain(tokenizer, text)) <= 40)


def test_a_conversation_beyond_the_context_is_told_once_and_one_within_it_is_not(capfd):
    say_once.cache_clear()
    long = [len(spread(d.ids)) for d in make_documents(Shapes(), task="chat").of_step(0, slice(None))]
    assert not capfd.readouterr().err and max(long) > 100
    model = dataclasses.replace(CHAT, max_position_embeddings=100)
    make_documents(Shapes(), model, task="chat").of_step(0, slice(None))
    line = "note: a conversation is longer than the 100 tokens for which the base was made; such are "
    assert capfd.readouterr().err == line + "trained on whole\n"
