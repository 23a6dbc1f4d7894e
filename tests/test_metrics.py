"""metrics.py: CIDEr-D is pycocoevalcap's, the Fréchet distance that of Gaussians whose distance is known."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lab.metrics import (
    caption_tokens,
    cider,
    exact_match,
    frechet,
    frechet_distance,
    frechet_of_gaussians,
    shape_features,
)
from small.world import COLORS, Scene, all_scenes, render

FIXTURE = Path(__file__).parent / "fixtures" / "cider.json"


def split(*captions: str) -> list[list[str]]:
    return [c.split() for c in captions]


# ---- CIDEr ----


def test_cider_is_that_of_pycocoevalcap_on_every_image_of_the_fixture():
    fixture = json.loads(FIXTURE.read_text())
    images = fixture["images"]
    assert len(images) == 200 and {len(i["references"]) for i in images} == {2, 3, 4, 5}
    corpus, scores = cider([i["candidate"] for i in images], [i["references"] for i in images])
    assert corpus == pytest.approx(fixture["score"], abs=1e-6)
    assert scores == pytest.approx([i["score"] for i in images], abs=1e-6)


@pytest.mark.parametrize("images", (1, 2, 3, 40))
def test_cider_is_that_of_pycocoevalcap_live(images):
    """On random words of a few letters, where most n-grams repeat, and some captions are empty."""
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    rng = random.Random(images)
    captions = [[rng.choices("abcdé", k=rng.randrange(14)) for _ in range(4)] for _ in range(images)]
    candidates, references = [c[0] for c in captions], [c[1 : rng.randint(2, 4)] for c in captions]
    for candidate, group in zip(candidates, references, strict=True):
        scorer += (" ".join(candidate), [" ".join(s) for s in group])
    want, each = scorer.compute_score()
    corpus, scores = cider(candidates, references)
    assert corpus == pytest.approx(want, abs=1e-6) and scores == pytest.approx(each.tolist(), abs=1e-6)


def test_cider_by_hand():
    """Two images: a word of one image weighs ln 2, "a" stands in both and weighs nothing.

    The first candidate is its reference, but has no four-word run: 10 (1 + 1 + 1 + 0) / 4. Of the second's
    words (blue, cross) one of two is right, and no pair: 10 (1/2 + 0 + 0 + 0) / 4.
    """
    references = [split("a red circle"), split("a green cross")]
    corpus, scores = cider(split("a red circle", "a blue cross"), references)
    assert scores == pytest.approx([7.5, 1.25]) and corpus == pytest.approx(4.375)


def test_cider_counts_only_as_many_as_the_reference_has():
    """Too much red: words (3, 1) against (1, 1), pairs (2, 1) against (0, 1), clipped to the latter."""
    references = [split("red circle"), split("blue cross")]
    score = cider(split("red red red circle", "x"), references)[1][0]
    words, pairs = (1 + 1) / math.sqrt(10 * 2), 1 / math.sqrt(5)
    assert score == pytest.approx(10 * (words + pairs) / 4 * math.exp(-(2**2) / 72))


def test_cider_gives_nothing_for_saying_a_word_again():
    """One red and three are as far from two words, with the same plain cosine; clipped, it is a third."""
    references = [split("red circle"), split("blue cross")]
    once, thrice = (cider([candidate, ["x"]], references)[1][0] for candidate in (["red"], ["red"] * 3))
    assert once == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72)) and thrice == pytest.approx(
        once / 3
    )


@pytest.mark.parametrize("more", (0, 1, 6, 15))
def test_cider_penalises_another_length_by_a_gaussian(more):
    """Both images have f, so it weighs nothing: saying it again only makes a caption longer."""
    references = [split("red", "f"), split("blue", "f")]
    score = cider([["red"] + ["f"] * more, ["blue"]], references)[1][0]
    assert score == pytest.approx(10 / 4 / 2 * math.exp(-(more**2) / (2 * 6**2)))


def test_a_word_of_every_image_counts_nothing_and_a_rare_one_more_than_a_common_one():
    references = [split("f r x"), split("f c"), split("f c"), split("f")]
    scores = cider(split("f", "f c", "f", "f"), references)[1]
    assert scores[0] == scores[2] == scores[3] == 0 and scores[1] > 0
    rare, common = (cider([[w], *split("f", "f", "f")], [split("r c"), *references[1:]])[1][0] for w in "rc")
    weights = math.log(4), math.log(4) - math.log(3)  # in one image of four, in three of four
    for score, weight in zip((rare, common), weights, strict=True):
        assert score == pytest.approx(10 / 4 * weight / math.hypot(*weights) * math.exp(-1 / 72))


def test_document_frequency_counts_images_and_not_captions():
    """A word in every reference of one image is no commoner than a word in one of them."""
    once = [split("red circle", "red circle"), split("blue cross")]
    assert cider(split("red circle", "x"), once)[1] == pytest.approx([5, 0])
    assert cider(split("red circle", "x"), [once[0] * 3, once[1]])[1] == pytest.approx([5, 0])


def test_a_single_image_an_empty_candidate_and_unknown_words_score_nothing():
    assert cider(split("red"), [split("red")]) == (0, [0])
    assert cider(split("", "so what"), [split("red"), split("blue")]) == (0, [0, 0])


def test_the_score_of_an_image_is_the_mean_over_its_references():
    """No n-gram is in both images, so its weight is ln 2, whichever references are given."""
    group, other = split("a red circle", "over a red roof", "red"), split("blue cross")
    apart = [cider(split("a red circle", "x"), [[s], other])[1][0] for s in group]
    together = cider(split("a red circle", "x"), [group, other])[1][0]
    assert len(set(apart)) == 3 and together == pytest.approx(sum(apart) / 3)


def test_exact_match_is_the_share_of_candidates_among_their_references():
    references = [split("a red circle", "one"), split("b", "a blue cross"), split("two"), split("")]
    assert exact_match(split("a red circle", "a blue cross", "two", ""), references) == 1
    assert exact_match(split("one", "blue a cross", "two two", "x"), references) == 0.25
    assert exact_match([("one",), ["B"], ["tw", "o"], []], references) == 0.5


def test_caption_tokens_are_lower_case_words_without_punctuation():
    text = "A small, RED circle (in the top-left)."
    assert caption_tokens(text) == "a small red circle in the top-left".split()
    assert caption_tokens("It’s 'quoted'--red/blue; ¿qué? «да»…") == "it's quoted red blue qué да".split()
    assert caption_tokens("Cafe\u0301\n🟥\u00a0圆。") == ["caf\u00e9", "🟥", "圆"]
    assert caption_tokens(" ?!- ") == []
    scene = all_scenes("test")[0]
    assert caption_tokens(scene.caption) == scene.caption.split()


# ---- the Fréchet distance ----


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q


def features(n: int, d: int, seed: int) -> Tensor:
    """Rows of a Gaussian that is neither round nor at the origin."""
    return normal(n, d, seed=seed) @ normal(d, d, seed=seed + 1) + normal(d, seed=seed + 2)


def by_eigenvalues(a: Tensor, b: Tensor) -> float:
    """The definition with numpy's covariances and the eigenvalues of A B, which is not symmetric."""
    A, B = (torch.from_numpy(np.cov(x.double().numpy(), rowvar=False)) for x in (a, b))
    root = torch.linalg.eigvals(A @ B).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root.real).item()


@pytest.mark.parametrize(("n", "m", "d"), ((400, 300, 24), (30, 90, 8), (5, 5, 2)))
def test_the_distance_is_that_of_the_eigenvalues_of_a_b(n, m, d):
    a, b = features(n, d, seed=1), features(m, d, seed=5)
    want = by_eigenvalues(a, b)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9) and want > 1
    assert frechet_distance(a.float(), b.float()) == pytest.approx(want, rel=1e-5)


def test_the_distance_is_computed_in_float64():
    """Far from the origin, float32 would round the spread away."""
    a = (normal(200, 6, seed=1) + 5000).float()
    b = (1.5 * normal(200, 6, seed=2) + 5000).float()
    assert frechet_distance(a, b) == pytest.approx(by_eigenvalues(a.double(), b.double()), rel=1e-9)


def test_covariances_are_unbiased():
    """One feature: (mean - mean)^2 + (sd - sd)^2, and the variance of 0 and 2 is 2, not 1."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [5.0], [5.0]])
    assert frechet_distance(a, b) == pytest.approx(16 + 2)
    assert frechet_distance(a, 3 * a) == pytest.approx(4 + 4 * 2)


@pytest.mark.parametrize("turn", (torch.eye(3, dtype=torch.float64), rotation(3)))
def test_gaussians_whose_covariances_commute_have_a_closed_form(turn):
    """Along common axes: sum (mean - mean)^2 + (sd - sd)^2, and an axis without spread is no exception."""
    sd_a, sd_b = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.5]], dtype=torch.float64)
    mean_a, mean_b = torch.tensor([[0.0, 1.0, 4.0], [2.0, 1.0, 3.0]], dtype=torch.float64)
    A, B = (turn @ torch.diag(sd**2) @ turn.T for sd in (sd_a, sd_b))
    assert frechet_of_gaussians(mean_a, A, mean_b, B) == pytest.approx(5 + 4 + 0 + 0.25, abs=1e-12)


def test_gaussians_that_do_not_commute():
    """In the plane tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det(A B)))."""
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    B = torch.tensor([[5.0, -2.0], [-2.0, 1.0]], dtype=torch.float64)
    root = math.sqrt(10 - 2 - 2 + 3 + 2 * math.sqrt(5 * 1))
    zero = torch.zeros(2)
    assert frechet_of_gaussians(zero, A, zero, B) == pytest.approx(5 + 6 - 2 * root, rel=1e-12)


@pytest.mark.parametrize("n", (2, 7, 100))
def test_a_set_is_at_no_distance_from_itself_and_a_shift_costs_its_square(n):
    """With fewer rows than features, too, where the covariance is singular."""
    a, shift = features(n, 20, seed=3), normal(20, seed=9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), ((7, 9), (7, 300), (300, 7), (2, 2), (60, 59)))
def test_singular_covariances_have_the_distance_of_the_rows_themselves(n, m):
    """With centred rows X and Y, the eigenvalues of A B are the squared singular values of X Y^T, scaled."""
    a, b = features(n, 60, seed=1), features(m, 60, seed=5)
    x, y = ((r - r.mean(0)) / math.sqrt(len(r) - 1) for r in (a, b))
    want = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum()
    want = (want - 2 * torch.linalg.svdvals(x @ y.T).sum()).item()
    found = frechet_distance(a, b)
    assert math.isfinite(found) and found >= 0 and found == pytest.approx(want, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(found, rel=1e-9)


def test_the_distance_is_never_negative_and_constant_rows_have_no_spread():
    for seed in range(20):
        a = features(5, 12, seed=seed)
        assert frechet_distance(a, a.roll(1, 0)) >= 0
    assert frechet_distance(torch.zeros(3, 4), torch.zeros(2, 4)) == 0
    assert frechet_distance(torch.zeros(3, 4), torch.ones(2, 4)) == 4


@pytest.mark.parametrize(
    ("a", "b"),
    (
        (torch.zeros(1, 3), torch.zeros(2, 3)),
        (torch.zeros(2, 3), torch.zeros(0, 3)),
        (torch.zeros(6), torch.zeros(2, 3)),
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(2, 3), torch.tensor([[1.0, 2.0, math.nan]] * 2)),
        (torch.tensor([[0.0], [-math.inf]]), torch.zeros(2, 1)),
    ),
)
def test_features_that_have_no_distance_are_refused(a, b):
    with pytest.raises(AssertionError):
        frechet_distance(a, b)


# ---- pictures ----


def random_pictures(n: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, side, side), generator=generator, dtype=torch.uint8)


def test_shape_features_are_means_and_deviations_of_cells():
    pictures = random_pictures(3, 32)
    found = shape_features(pictures)
    assert found.shape == (3, 64) and found.dtype == torch.float64
    for n in range(3):
        for i in range(4):
            for j in range(4):
                cell = pictures[n, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].numpy() / 255
                means = found[n, :48].view(3, 4, 4)[:, i, j]
                assert means.tolist() == pytest.approx(cell.mean((1, 2)).tolist())
                luminance = 0.299 * cell[0] + 0.587 * cell[1] + 0.114 * cell[2]
                assert found[n, 48 + 4 * i + j].item() == pytest.approx(luminance.std())


def test_shape_features_lie_in_0_to_1():
    stripes = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 255
    plain = torch.full_like(stripes, 255)
    for pictures, means, deviation in ((stripes, 0.5, 0.5), (plain, 1, 0), (plain * 0, 0, 0)):
        found = shape_features(pictures)
        assert found.min() >= 0 and found.max() <= 1
        assert found[:, :48].numpy() == pytest.approx(means)
        assert found[:, 48:].numpy() == pytest.approx(deviation)


@pytest.mark.parametrize("change", (dict(place="top left"), dict(color="green"), dict(background="white")))
def test_the_distance_tells_a_moved_shape_and_another_colour_apart(change):
    """From other shifts of the same scenes, which is what two samples of one distribution are."""
    scene = dict(size="small", color="red", shape="circle", place="center", background="blue")
    right = [Scene(**scene)] * 60
    one, two = (render(right, random.Random(seed)) for seed in (0, 1))
    other = render([Scene(**{**scene, **change})] * 60, random.Random(2))
    assert frechet(one, one) == pytest.approx(0, abs=1e-10)
    assert 0 < 50 * frechet(one, two) < frechet(one, other)


def test_the_distance_sees_a_missing_kind_of_picture():
    scenes = list(all_scenes("test"))
    everything, again = (render(scenes, random.Random(seed)) for seed in (0, 1))
    half = render([s for s in scenes if s.background in list(COLORS)[:4]], random.Random(1))
    assert frechet(everything, again) < 0.1 * frechet(everything, half)


def test_frechet_takes_any_features():
    pictures = random_pictures(9, 10)
    darker = pictures // 2

    def mean_colours(p: Tensor) -> Tensor:
        return p.float().mean((2, 3))

    want = frechet_distance(mean_colours(pictures), mean_colours(darker))
    assert frechet(pictures, darker, mean_colours) == want > 100


@pytest.mark.parametrize(
    "pictures",
    (
        torch.zeros(2, 3, 32, 32),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 3, 32, 28, dtype=torch.uint8),
        torch.zeros(2, 3, 30, 30, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    ),
)
def test_pictures_of_another_kind_and_a_single_one_are_refused(pictures):
    good = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for pair in ((pictures, good), (good, pictures)):
        with pytest.raises(AssertionError):
            frechet(*pair)
