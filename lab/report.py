"""Figures and tables of the ablations (ablate.py), from the JSON files it left.

Numbers are means over seeds, with the smallest and largest behind them. A claim of the paper "holds" here if
the difference it speaks of has its sign in every seed, "does not" if it has the other sign in every seed, and
is "not clear" else; differences are taken seed by seed. A claim that one is not behind the other fails only
if every seed says that it is. Nothing is computed anew but what guessing would get (`guess`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from checkpoint import write_atomic
from evaluate import caption_report
from lab import figures
from lab.metrics import frechet
from small.world import VALUES, all_scenes, render

Results = dict[str, dict[int, dict]]  # cell -> seed -> its JSON
FIGURES = {
    "figure4": ("none-0", "none-0.1", "none-1"),
    "figure5": ("none-0", "shallow-0", "deep-0"),
    "figure6": ("deep-0", "deep-0.1", "deep-1"),
    "table1": ("transfusion", "deep-0", "deep-0-equal"),
}
LABELS = {
    "none-0": "no separation, frozen text",
    "none-0.1": "no separation, ratio 0.1",
    "none-1": "no separation, ratio 1",
    "shallow-0": "shallow, frozen text",
    "deep-0": "deep, frozen text",
    "deep-0.1": "deep, ratio 0.1",
    "deep-1": "deep, ratio 1",
    "transfusion": "Transfusion, from scratch",
    "deep-0-equal": "deep, frozen, equal FLOPs",
    "none-0-light": "no separation, frozen, captions at a tenth",
    "deep-0-light": "deep, frozen, captions at a tenth",
    "deep-0-no-limit": "deep, frozen, no noise limit",
    "deep-0-half": "deep, frozen, captions first in 50%",
    "deep-0-staged": "deep, frozen, staged",
}
PANELS = (
    ("knowledge", "facts of the text world, right"),
    ("reasoning", "edits in words, right"),
    ("cider", "captions: CIDEr"),
    ("attributes", "pictures: attributes right"),
)


def read_results(folder: Path) -> Results:
    """All results of a folder; ValueError names a file that is none."""
    found: Results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            row["final"]["text_of_base"], row["curve"], row["flops"]
            found.setdefault(row["cell"], {})[row["seed"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no result of ablate.py: {error!r}") from None
    return found


# ------------------------------------------------------------------------------------------------------------
# Numbers of one result

GUIDED = "1.55"  # the paper's guidance


def text(key: str) -> Callable[[dict], float]:
    return lambda r: r["final"]["text"][key]


def lost(key: str) -> Callable[[dict], float]:
    """By how much a figure of the text fell below the base's."""
    return lambda r: r["final"]["text_of_base"][key] - r["final"]["text"][key]


def read(found: dict, key: str) -> float:
    """A figure; "attributes" is the mean of the five, which says more than "match" while that is near 0."""
    return mean(found[name] for name in VALUES) if key == "attributes" else found[key]


def pictures(key: str, cfg: str = GUIDED) -> Callable[[dict], float]:
    return lambda r: read(r["final"]["pictures"][cfg], key)


def by_sampler(name: str, key: str) -> Callable[[dict], float]:
    return lambda r: read(r["final"]["samplers"][name], key)


def caption(r: dict) -> float:
    return r["final"]["captions"]["cider"]


def over_seeds(values: list[float], digits: int = 3) -> str:
    """ "0.912 (0.900 to 0.925)": mean, smallest and largest; "-" of none."""
    if not values:
        return "-"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def spread(results: Results, cell: str, number: Callable[[dict], float], digits: int = 3) -> str:
    """A figure of a cell over its seeds."""
    return over_seeds([number(r) for r in results.get(cell, {}).values()], digits)


def differences(results: Results, a: str, b: str, number: Callable[[dict], float]) -> list[float]:
    """number(a) - number(b), seed by seed; number(a) if b is empty."""
    ours, theirs = results.get(a, {}), results.get(b, {})
    if not b:
        return [number(ours[s]) for s in sorted(ours)]
    return [number(ours[s]) - number(theirs[s]) for s in sorted(ours.keys() & theirs.keys())]


def verdict(values: list[float], equal_is_enough: bool = False) -> str:
    """Whether every difference is positive or every one negative; for equality, only the latter counts."""
    if not values:
        return "not run"
    if all(v < 0 for v in values):
        return "does not"
    return "holds" if equal_is_enough or all(v > 0 for v in values) else "not clear"


def said(values: list[float]) -> str:
    """ "+0.120 (+0.100 to +0.150)", or "-"."""
    if not values:
        return "-"
    return f"{mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})"


# ------------------------------------------------------------------------------------------------------------
# Tables


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


# Claim; the paper's numbers; the cell that should be ahead, and the one behind it ("": the number itself
# should be positive); what is compared; whether being equal is enough.
BOTH = (("CIDEr", caption), ("attributes", pictures("attributes")))
TEXT = (("reasoning", text("reasoning")), ("knowledge", text("knowledge")))
LOST = (("reasoning", lost("reasoning")), ("knowledge", lost("knowledge")))
CLAIMS = (
    ("a dense model at ratio 1 forgets text (Fig. 4)", "HellaSwag -15%, then -7%", "none-1", "", LOST, False),
    ("ratio 0.1 forgets less (Fig. 4)", "-7% becomes -2%", "none-0.1", "none-1", TEXT, False),
    ("... but learns images less well (Fig. 4)", "a lower curve", "none-1", "none-0.1", BOTH, False),
    (
        "frozen, a dense model learns images less well (Fig. 4)",
        '"significantly impairs"',
        "none-1",
        "none-0",
        BOTH,
        False,
    ),
    ("... captions weighing alike (Fig. 4)", "as above", "none-1", "none-0-light", BOTH, False),
    ("shallow beats none, text frozen (Fig. 5)", "clearly", "shallow-0", "none-0", BOTH, False),
    ("deep beats shallow, text frozen (Fig. 5)", "most in generation", "deep-0", "shallow-0", BOTH, False),
    ("frozen deep beats dense at ratio 1 (5.1.2)", "a higher curve", "deep-0", "none-1", BOTH, False),
    ("... captions weighing alike (5.1.2)", "as above", "deep-0-light", "none-1", BOTH, False),
    (
        "frozen deep is not behind deep at ratio 1 (Fig. 6)",
        '"strong performance"',
        "deep-0",
        "deep-1",
        BOTH,
        True,
    ),
    ("... captions weighing alike (Fig. 6)", "as above", "deep-0-light", "deep-1", BOTH, True),
    (
        "half the FLOPs beat Transfusion (Table 1)",
        "CIDEr +20%, FID -3.6% (guided +0.6%)",
        "deep-0",
        "transfusion",
        BOTH,
        False,
    ),
    ("... captions weighing alike (Table 1)", "as above", "deep-0-light", "transfusion", BOTH, False),
    ("... with better text (Table 1)", "+9.0, +5.8, +8.5 points", "deep-0", "transfusion", TEXT, False),
    (
        "half the FLOPs are not behind as many (Table 1)",
        "CIDEr 38.3 and 38.4, FID 13.9 and 14.0 (guided 8.75 and 8.61)",
        "deep-0",
        "deep-0-equal",
        BOTH,
        True,
    ),
    (
        "a noise limit helps captions (Transfusion)",
        "33.7 to 35.2",
        "deep-0",
        "deep-0-no-limit",
        BOTH[:1],
        False,
    ),
)


def claims(results: Results) -> str:
    """Claim in the paper | their number | ours | is the sign theirs in every seed?"""
    rows = []
    for claim, theirs, ahead, behind, numbers, equal_is_enough in CLAIMS:
        found = {unit: differences(results, ahead, behind, number) for unit, number in numbers}
        verdicts = {unit: verdict(values, equal_is_enough) for unit, values in found.items()}
        holds = ", ".join(f"{unit}: {v}" for unit, v in verdicts.items())
        if len(set(verdicts.values())) == 1:
            holds = next(iter(verdicts.values()))
        ours = "; ".join(f"{unit} {said(values)}" for unit, values in found.items())
        what = f"{LABELS[ahead]} - {LABELS[behind]}" if behind else f"what {LABELS[ahead]} lost"
        rows.append([claim, theirs, f"{what}: {ours}", holds])
    done = [r["final"] for r in results.get("deep-0", {}).values()]
    equal = [f["text"] == f["text_of_base"] and not f["text_tensors_changed"] for f in done]
    ours = f"{sum(equal)} of {len(equal)} seeds: no tensor changed, every figure the base's to the last digit"
    holds = "not run" if not equal else "holds" if all(equal) else "does not"
    first = next(i for i, claim in enumerate(CLAIMS) if "(Fig. 6)" in claim[0])
    rows.insert(first, ["deep with frozen text keeps the text exactly (Fig. 6)", "unchanged", ours, holds])
    return markdown(["claim", "paper", "ours: mean (least to most) over seeds", "holds?"], rows)


def guess(seed: int) -> dict[str, float]:
    """What captions and pictures get in which the background is right and all else is guessed.

    A background is the first thing to be learned, and the wording of captions the second: this is the floor.
    """
    scenes, rng = all_scenes(held_out=True), random.Random(seed)
    every = [*scenes, *all_scenes(held_out=False)]
    guessed = [rng.choice([g for g in every if g.background == s.background]) for s in scenes]
    pairs = list(zip(guessed, scenes, strict=True))
    right = [sum(getattr(g, k) == getattr(s, k) for g, s in pairs) / len(pairs) for k in VALUES]
    return {
        "cider": caption_report([g.caption for g in guessed], [[s.caption] for s in scenes])["cider"],
        "attributes": mean(right),
        "match": sum(g == s for g, s in pairs) / len(pairs),
        "frechet": frechet(render(guessed, rng), render(list(scenes), random.Random(0))),
    }


def overview(results: Results) -> str:
    """Every cell and what it reached."""
    rows = []
    for cell, label in LABELS.items():
        if cell not in results:
            continue
        some = next(iter(results[cell].values()))
        rows.append(
            [
                label,
                str(len(results[cell])),
                f"{some['parameters']['trained'] / 1e6:.2f}",
                f"{mean(r['flops'] for r in results[cell].values()) / 1e12:.1f}",
                spread(results, cell, text("perplexity"), 4),
                spread(results, cell, text("knowledge")),
                spread(results, cell, text("reasoning")),
                spread(results, cell, caption),
                spread(results, cell, pictures("attributes", "1.0")),
                spread(results, cell, pictures("attributes")),
                spread(results, cell, pictures("match")),
                spread(results, cell, pictures("frechet")),
            ]
        )
    some = next((r for by_seed in results.values() for r in by_seed.values()), None)
    if some:
        base = some["final"]["text_of_base"]
        numbers = [f"{base['perplexity']:.4f}", f"{base['knowledge']:.3f}", f"{base['reasoning']:.3f}"]
        floor = [guess(seed) for seed in range(3)]
        cider, *rest = (over_seeds([f[k] for f in floor]) for k in floor[0])
        rows.insert(0, ["the base", "", "", "", *numbers, *[""] * 5])
        rows.insert(1, ["background right, all else guessed", "3", *[""] * 5, cider, "", *rest])
    head = (
        "cell,seeds,trained (M),TFLOP,perplexity,knowledge,reasoning,CIDEr,attributes at 1.0,"
        "attributes at 1.55,all five at 1.55,Frechet at 1.55"
    )
    return markdown(head.split(","), rows)


def origin(results: Results) -> str:
    """Where the numbers come from, in a line; several bases or commits are all named."""
    rows = [r for by_seed in results.values() for r in by_seed.values()]
    bases = sorted({r["base_fingerprint"][:12] for r in rows})
    commits = sorted({r["made_by"]["commit"] for r in rows})
    hours = sum(r["cell_seconds"] for r in rows) / 3600
    made = f"{len(rows)} runs of `python -m lab.ablate`, {hours:.1f} hours of one process in all"
    return f"{made}; base {', '.join(bases)}, commit {', '.join(commits)}."


def samplers(results: Results) -> str:
    """Guidance and samplers, on the model of `deep-0`."""
    done = results.get("deep-0", {})
    if not done:
        return ""
    kinds = next(iter(done.values()))["final"]
    keys = ("attributes", "match", "frechet")
    rows = [
        [f"DDIM 25, guidance {cfg}", *(spread(results, "deep-0", pictures(k, cfg)) for k in keys)]
        for cfg in kinds["pictures"]
    ]
    for name in kinds["samplers"]:
        numbers = [spread(results, "deep-0", by_sampler(name, key)) for key in keys]
        rows.append([f"{name.upper()}, guidance {GUIDED}", *numbers])
    return markdown(["sampling from deep, frozen text", "attributes", "all five", "Frechet"], rows)


# ------------------------------------------------------------------------------------------------------------
# Figures


def curve(by_seed: dict[int, dict], key: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, least, most) over seeds, from the start, where the text is the base's."""
    rows: dict[int, list[float]] = {}
    for r in by_seed.values():
        if key in r["final"]["text_of_base"] and not r["config"]["from_scratch"]:
            rows.setdefault(0, []).append(r["final"]["text_of_base"][key])
        for point in r["curve"]:
            rows.setdefault(point["step"], []).append(read(point, key))
    whole = max(map(len, rows.values()), default=0)
    return [(step, mean(v), min(v), max(v)) for step, v in sorted(rows.items()) if len(v) == whole]


def write_report(folder: Path) -> list[Path]:
    """Draw figures and write tables.md beside the results; the files written."""
    results, written = read_results(folder), []
    for name, chosen in FIGURES.items():
        there = [cell for cell in chosen if cell in results]
        if not there:
            continue
        unit, each = "step", dict.fromkeys(there, 1.0)
        if name == "table1":  # what a step costs is not the same there
            unit = "TFLOP"
            each = {c: mean(r["flops_per_step"] for r in results[c].values()) / 1e12 for c in there}
        panels = [
            (
                f"{title}, by {unit}",
                {LABELS[c]: [(x * each[c], *y) for x, *y in curve(results[c], key)] for c in there},
            )
            for key, title in PANELS
        ]
        figures.save_image(figures.curves(panels, (450, 280), columns=2), folder / f"{name}.png")
        written.append(folder / f"{name}.png")
    if results:
        tables = [origin(results), claims(results), overview(results), samplers(results)]
        write_atomic(folder / "tables.md", "\n\n".join(t for t in tables if t) + "\n")
        written.append(folder / "tables.md")
    return written
