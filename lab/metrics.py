"""The two metrics of images in the paper's evaluation (Section 4.3), from their definitions: CIDEr for
captions, a Fréchet distance for pictures.

    cider              CIDEr-D of captions that are tokens already, as pycocoevalcap computes it (times 10)
    exact_match        share of captions that are one of their references, token by token
    frechet_distance   between Gaussians fitted to two sets of features; FID is this on InceptionV3's features
    frechet            the same between two sets of pictures, by any function from pictures to features

Neither the Penn Treebank tokenizer nor InceptionV3, which published numbers are computed with, is here:
`caption_tokens` and `shape_features` are our own, and their numbers compare only with each other.

Shapes: n, m pictures or rows of features, d features, S pixels a side; pictures are uint8 (n, 3, S, S).
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

NGRAM = 4  # n-grams of 1 to 4 tokens
SIGMA = 6.0  # of the length penalty, in tokens
CELLS = 4  # shape_features: cells a side
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, of red, green and blue


def caption_tokens(text: str) -> list[str]:
    """Lower-case words without punctuation, but for apostrophes and hyphens in them (see above)."""
    text = unicodedata.normalize("NFC", text.lower()).replace("’", "'").replace("--", " ")
    blanked = "".join(" " if unicodedata.category(c)[0] == "P" and c not in "'-" else c for c in text)
    return [word for word in (w.strip("'-") for w in blanked.split()) if word]


def count_ngrams(tokens: list[str]) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to NGRAM tokens occurs."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, NGRAM + 1) for i in range(len(tokens) - n + 1))


def tfidf(tokens: list[str], frequency: Counter, images: int) -> list[dict[tuple[str, ...], float]]:
    """The vectors g_1 .. g_4 of a caption: counts times log(images / images that have the n-gram)."""
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(NGRAM)]
    for ngram, count in count_ngrams(tokens).items():
        rarity = math.log(images) - math.log(max(1, frequency[ngram]))
        vectors[len(ngram) - 1][ngram] = count * rarity
    return vectors


def clipped_cosine(candidate: dict, reference: dict) -> float:
    """min(c, r) . r / (|c| |r|) of two sparse vectors; 0 if one of them is 0."""
    product = sum(min(w, reference[g]) * reference[g] for g, w in candidate.items() if g in reference)
    squares = [sum(w * w for w in v.values()) for v in (candidate, reference)]
    return product / (math.sqrt(squares[0]) * math.sqrt(squares[1])) if all(squares) else 0.0


def cider(candidates: list[list[str]], references: list[list[list[str]]]) -> tuple[float, list[float]]:
    """CIDEr-D (Vedantam, Zitnick and Parikh, 2015): the corpus score and the score of each image.

    Of a candidate c and the references s_1 .. s_m of its image, one of M images,

        CIDEr-D(c)   = 10/m sum_j exp(-(l(c) - l(s_j))^2 / (2 sigma^2)) 1/4 sum_n cos_n(c, s_j),   n = 1 .. 4
        cos_n(c, s)  = min(g_n(c), g_n(s)) . g_n(s) / (|g_n(c)| |g_n(s)|)
        g_n(s)[w]    = h_w(s) (log M - log max(1, df(w)))                      for every n-gram w

    l is the number of tokens, h_w how often a caption has w, df(w) in how many images a reference has w, and
    sigma is 6. The corpus score is the mean over images. What -D adds to CIDEr: weights are clipped at the
    reference's (min), so that a word gains nothing by being said more often than there; captions of another
    length are penalised by a Gaussian; and all is times 10. As in pycocoevalcap's CiderScorer h is a count,
    where the paper's Eq. (1) divides by the number of n-grams in the caption: under min that is not the same.

    A single image has log M = 0 and scores 0, whatever its caption.
    """
    frequency = Counter(w for group in references for w in {w for s in group for w in count_ngrams(s)})
    scores = []
    for candidate, group in zip(candidates, references, strict=True):
        g, total = tfidf(candidate, frequency, len(references)), 0.0
        for reference in group:
            cosines = map(clipped_cosine, g, tfidf(reference, frequency, len(references)))
            penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * SIGMA**2))
            total += penalty * sum(cosines) / NGRAM
        scores.append(10 * total / len(group))
    return sum(scores) / len(scores), scores


def exact_match(candidates: list[list[str]], references: list[list[list[str]]]) -> float:
    """Share of candidates that equal one of their references, token by token."""
    pairs = zip(candidates, references, strict=True)
    return sum(any(list(c) == list(s) for s in group) for c, group in pairs) / len(candidates)


def square_root(cov: Tensor) -> Tensor:
    """The symmetric root of a covariance (d, d). Eigenvalues that are mere rounding count as 0."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    largest = values.abs().max().item()
    rounding = largest * len(values) * torch.finfo(torch.float64).eps
    return (vectors * values.where(values > rounding, 0.0).sqrt()) @ vectors.T


def frechet_of_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with covariances A, B: means (d,), covariances (d, d).

    A B has the eigenvalues of R R^T with R = A^(1/2) B^(1/2), so the trace of its root is the sum of R's
    singular values. That needs no root of a matrix that is not symmetric, and covariances may be singular.
    """
    mean_a, cov_a, mean_b, cov_b = (x.detach().cpu().double() for x in (mean_a, cov_a, mean_b, cov_b))
    shared = torch.linalg.svdvals(square_root(cov_a) @ square_root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return max(distance.item(), 0.0)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of features (n, d) and (m, d), in float64; covariances divide by n - 1.

    It is biased: with few rows it is too large, so sets of different sizes do not compare.
    """
    assert a.dim() == 2 and a.shape[1:] == b.shape[1:] and min(len(a), len(b)) > 1, (a.shape, b.shape)
    assert a.isfinite().all() and b.isfinite().all(), "features that are not finite"
    a, b, d = a.detach().cpu().double(), b.detach().cpu().double(), a.shape[1]
    return frechet_of_gaussians(a.mean(0), a.T.cov().view(d, d), b.mean(0), b.T.cov().view(d, d))


def shape_features(pictures: Tensor) -> Tensor:
    """uint8 (n, 3, S, S) -> float64 (n, 64), in 0 .. 1: what lies where in a built-in picture.

    Of a grid of 4 x 4 cells, the mean colours (3 x 4 x 4 numbers) and the standard deviations of luminance
    within each cell (4 x 4). Our own, made up for the built-in shapes.
    """
    n, colors, side, width = pictures.shape
    assert pictures.dtype == torch.uint8 and colors == 3 and side == width, (pictures.dtype, pictures.shape)
    assert side > 0 and side % CELLS == 0, f"{side} pixels are not a multiple of {CELLS}"
    cell = side // CELLS
    x = pictures.double().div(255).view(n, 3, CELLS, cell, CELLS, cell).transpose(3, 4).flatten(4)
    weights = torch.tensor(LUMINANCE, dtype=x.dtype, device=x.device)
    luminance = torch.einsum("ncijp,c->nijp", x, weights)
    return torch.cat((x.mean(4).flatten(1), luminance.std(3, correction=0).flatten(1)), dim=1)


def frechet(pictures_a: Tensor, pictures_b: Tensor, features: Callable = shape_features) -> float:
    """The Fréchet distance of two sets of pictures, uint8 (n, 3, S, S); `features` maps each to (n, d)."""
    return frechet_distance(features(pictures_a), features(pictures_b))
