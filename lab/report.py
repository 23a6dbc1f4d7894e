"""Figures and tables of the ablations (ablate.py), from the JSON files in results/.

Numbers are means over seeds, with the smallest and the largest in brackets. A claim is about a difference of
two cells, taken seed by seed. It "holds" if the difference is above zero in every seed, "does not" if it is
below in every seed, and is "not clear" otherwise. For a claim that one cell is not behind another, a little
below zero (MARGIN) stands in the place of zero.
"""

import random
from collections import Counter
from pathlib import Path
from statistics import mean

from checkpoint import write_atomic
from evaluate import caption_report
from lab import figures
from lab.metrics import frechet
from load_qwen3 import read_json
from small.world import SPLITS, VALUES, all_scenes, render

# Our choice, as a share of the other cell's figure, from the paper alone: the least difference that it counts
# as a gain is 3.6%, and the largest one between what it calls equal 1.6% (both FID in Table 1).
MARGIN = 0.03
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
PANELS = {
    "knowledge": "facts of the text world, right",
    "reasoning": "edits in words, right",
    "cider": "captions: CIDEr",
    "attributes": "pictures: attributes right",
}
COMPARED = {  # name: path in a result, as `figure` takes it
    "images": {"CIDEr": "captions/cider", "attributes": "pictures/1.55/attributes"},
    "captions": {"CIDEr": "captions/cider"},
    "text": {"reasoning": "text/reasoning", "knowledge": "text/knowledge"},
    "lost": {"reasoning": "lost/reasoning", "knowledge": "lost/knowledge"},
}
# Claim | the paper's numbers | the cell that is ahead > the one behind it | what is compared. With >= it is
# enough not to be behind; "> 0" is about the number itself.
CLAIMS = tuple(
    tuple(line.split(" | "))
    for line in """\
a dense model at ratio 1 forgets text (Fig. 4) | HellaSwag -15%, then -7% | none-1 > 0 | lost
ratio 0.1 forgets less (Fig. 4) | -7% becomes -2% | none-0.1 > none-1 | text
... but learns images less well (Fig. 4) | a lower curve | none-1 > none-0.1 | images
frozen, a dense model learns images less well (Fig. 4) | "significantly impairs" | none-1 > none-0 | images
... captions weighing alike (Fig. 4) | as above | none-1 > none-0-light | images
shallow beats none, text frozen (Fig. 5) | clearly | shallow-0 > none-0 | images
deep beats shallow, text frozen (Fig. 5) | most in generation | deep-0 > shallow-0 | images
frozen deep beats dense at ratio 1 (5.1.2) | a higher curve | deep-0 > none-1 | images
... captions weighing alike (5.1.2) | as above | deep-0-light > none-1 | images
frozen deep is not behind deep at ratio 1 (Fig. 6) | "strong performance" | deep-0 >= deep-1 | images
... captions weighing alike (Fig. 6) | as above | deep-0-light >= deep-1 | images
half the FLOPs beat Transfusion (Table 1) | CIDEr +20%, FID -3.6% (guided +0.6%) | \
deep-0 > transfusion | images
... captions weighing alike (Table 1) | as above | deep-0-light > transfusion | images
... with better text (Table 1) | +9.0, +5.8, +8.5 points | deep-0 > transfusion | text
half the FLOPs are not behind as many (Table 1) | CIDEr 38.3 and 38.4, FID 13.9 and 14.0 (guided 8.75 and \
8.61) | deep-0 >= deep-0-equal | images
a noise limit helps captions (Transfusion) | 33.7 to 35.2 | deep-0 > deep-0-no-limit | captions""".split("\n")
)
VERDICTS = {"holds": "hold", "does not": "do not", "not clear": "are not clear"}
OVERVIEW = {  # column: path, digits
    "perplexity": ("text/perplexity", 4),
    "knowledge": ("text/knowledge", 3),
    "reasoning": ("text/reasoning", 3),
    "CIDEr": ("captions/cider", 3),
    "attributes at 1.0": ("pictures/1.0/attributes", 3),
    "attributes at 1.55": ("pictures/1.55/attributes", 3),
    "all five at 1.55": ("pictures/1.55/match", 3),
    "strict at 1.55": ("pictures/1.55/strict", 3),  # this and the next: not in the oldest results
    "residual at 1.55": ("pictures/1.55/residual", 1),
    "Frechet at 1.55": ("pictures/1.55/frechet", 3),
}


def read_results(folder: Path) -> Results:
    """All results of a folder."""
    found: Results = {}
    for row in map(read_json, sorted(folder.glob("*.json"))):
        found.setdefault(row["cell"], {})[row["seed"]] = row
    return found


def read(found: dict, name: str) -> float | None:
    """A figure; "attributes" is the mean of the five, which says more than "match" while that is near 0."""
    if name in ("strict", "residual"):
        return found.get(name)
    return mean(found[k] for k in VALUES) if name == "attributes" else found[name]


def figure(result: dict, path: str) -> float | None:
    """A final figure, like "pictures/1.55/match"; "lost/NAME": by how much the text fell below the base's.

    None for one that is newer than the result.
    """
    *parts, name = path.split("/")
    found = result["final"]
    if parts == ["lost"]:
        return found["text_of_base"][name] - found["text"][name]
    for part in parts:
        found = found[part]
    return read(found, name)


def over_seeds(values: list[float], digits: int = 3, sign: str = "") -> str:
    """ "0.912 (0.900 to 0.925)": mean, smallest and largest; "-" of none. With sign "+" all have one."""
    if not values:
        return "-"
    low, middle, high = (f"{x:{sign}.{digits}f}" for x in (min(values), mean(values), max(values)))
    return f"{middle} ({low} to {high})"


def spread(results: Results, cell: str, path: str, digits: int = 3) -> str:
    """A figure of a cell over its seeds."""
    found = (figure(r, path) for r in results.get(cell, {}).values())
    return over_seeds([x for x in found if x is not None], digits)


def differences(results: Results, a: str, b: str, path: str) -> list[float]:
    """A figure of cell a less that of cell b, seed by seed; that of a itself if b is "0"."""
    ours, theirs = results.get(a, {}), results.get(b, {})
    if b == "0":
        return [figure(ours[s], path) for s in sorted(ours)]
    return [figure(ours[s], path) - figure(theirs[s], path) for s in sorted(ours.keys() & theirs.keys())]


def verdict(values: list[float], margin: float = 0.0) -> str:
    """Whether every difference is above -margin, or every one below it."""
    if not values:
        return "not run"
    if all(v < -margin for v in values):
        return "does not"
    return "holds" if all(v > -margin for v in values) else "not clear"


def by_chance(comparisons: list[tuple[list[float], str]]) -> str:
    """How many comparisons there are, what came of them, and how many would hold by chance alone."""
    found = Counter(holds for values, holds in comparisons if values)
    chance = sum(0.5 ** len(values) for values, _ in comparisons if values)
    kinds = ", ".join(f"{found[kind]} {word}" for kind, word in VERDICTS.items())
    made = f"{len(CLAIMS)} claims, {found.total()} comparisons: {kinds}"
    alike = f"all cells alike (or, for one that is to be not behind, {100 * MARGIN:g}% behind)"
    return f"{made}. Were {alike}, about {chance:.1f} of them would hold by chance."


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def without_gaps(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns in which no row has a number: what the results are too old for."""
    keep = [i for i in range(len(head)) if {row[i] for row in rows} - {"", "-"}] if rows else range(len(head))
    return [head[i] for i in keep], [[row[i] for i in keep] for row in rows]


def claims(results: Results) -> str:
    """A line about chance, and: claim in the paper | their number | ours | is it so in every seed?"""
    rows, comparisons = [], []
    for claim, theirs, comparison, compared in CLAIMS:
        ahead, sign, behind = comparison.split()
        found = {k: differences(results, ahead, behind, path) for k, path in COMPARED[compared].items()}
        verdicts = {}
        for k, values in found.items():
            others = [figure(r, COMPARED[compared][k]) for r in results.get(behind, {}).values()]
            verdicts[k] = verdict(values, MARGIN * mean(others) if sign == ">=" and others else 0.0)
        comparisons += zip(found.values(), verdicts.values(), strict=True)
        holds = ", ".join(f"{k}: {v}" for k, v in verdicts.items())
        if len(set(verdicts.values())) == 1:
            holds = next(iter(verdicts.values()))
        what = f"what {LABELS[ahead]} lost" if behind == "0" else f"{LABELS[ahead]} - {LABELS[behind]}"
        ours = "; ".join(f"{k} {over_seeds(values, sign='+')}" for k, values in found.items())
        rows.append([claim, theirs, f"{what}: {ours}", holds])
    done = [r["final"] for r in results.get("deep-0", {}).values()]
    equal = [f["text"] == f["text_of_base"] and not f["text_tensors_changed"] for f in done]
    ours = f"{sum(equal)} of {len(equal)} seeds: no tensor changed, every figure the base's to the last digit"
    holds = "not run" if not equal else "holds" if all(equal) else "does not"
    first = next(i for i, row in enumerate(rows) if "(Fig. 6)" in row[0])
    rows.insert(first, ["deep with frozen text keeps the text exactly (Fig. 6)", "unchanged", ours, holds])
    table = markdown(["claim", "paper", "ours: mean (least to most) over seeds", "holds?"], rows)
    return f"{by_chance(comparisons)}\n\n{table}"


def guess(seed: int) -> dict[str, float]:
    """The figures with the right background, which training learns first, and all else at random."""
    scenes, rng = all_scenes("test"), random.Random(seed)
    every = [scene for split in SPLITS for scene in all_scenes(split)]
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
    """Every cell and its final figures."""
    rows = []
    for cell in (cell for cell in LABELS if cell in results):
        done = list(results[cell].values())
        trained, flops = done[0]["parameters"]["trained"] / 1e6, mean(r["flops"] for r in done) / 1e12
        numbers = [spread(results, cell, path, digits) for path, digits in OVERVIEW.values()]
        rows.append([LABELS[cell], str(len(done)), f"{trained:.2f}", f"{flops:.1f}", *numbers])
    if rows:
        base = next(iter(next(iter(results.values())).values()))["final"]["text_of_base"]
        numbers = [f"{base['perplexity']:.4f}", f"{base['knowledge']:.3f}", f"{base['reasoning']:.3f}"]
        floor = [guess(seed) for seed in range(3)]
        cider, *rest = (over_seeds([f[k] for f in floor]) for k in floor[0])
        rows.insert(0, ["the base", "", "", "", *numbers, *[""] * 7])
        attributes, match, distance = rest
        guessed = [cider, "", attributes, match, "", "", distance]
        rows.insert(1, ["background right, all else guessed", "3", *[""] * 5, *guessed])
    return markdown(*without_gaps(["cell", "seeds", "trained (M)", "TFLOP", *OVERVIEW], rows))


def origin(results: Results) -> str:
    """Where the numbers come from, in a line; several commands, bases or commits are all named."""
    rows = [r for by_seed in results.values() for r in by_seed.values()]
    commands = sorted({r["made_by"]["command"].split(" --")[0] for r in rows})
    bases = sorted({r["base_fingerprint"][:12] for r in rows})
    commits = sorted({r["made_by"]["commit"] for r in rows})
    hours = sum(r["cell_seconds"] for r in rows) / 3600
    made = f"{len(rows)} runs of `{'`, `'.join(commands)}`, {hours:.1f} hours of one process in all"
    return f"{made}; base {', '.join(bases)}, commit {', '.join(commits)}."


def samplers(results: Results) -> str:
    """Guidance and samplers, on the model of `deep-0`."""
    done = results.get("deep-0", {})
    if not done:
        return ""
    final = next(iter(done.values()))["final"]
    names = list(final["samplers"])  # DDPM, and three of DDIM; the middle one has made all other pictures
    kinds = [(f"{names[2].upper()}, guidance {cfg}", f"pictures/{cfg}") for cfg in final["pictures"]]
    kinds += [(f"{name.upper()}, guidance 1.55", f"samplers/{name}") for name in names]
    keys = ("attributes", "match", "strict", "residual", "frechet")
    rows = [[label, *(spread(results, "deep-0", f"{path}/{k}") for k in keys)] for label, path in kinds]
    head = ["attributes", "all five", "strict", "residual", "Frechet"]
    return markdown(*without_gaps(["sampling from deep, frozen text", *head], rows))


def curve(by_seed: dict[int, dict], name: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, least, most) over seeds, from the start, where the text is the base's."""
    rows: dict[int, list[float]] = {}
    for r in by_seed.values():
        if name in r["final"]["text_of_base"] and not r["config"]["from_scratch"]:
            rows.setdefault(0, []).append(r["final"]["text_of_base"][name])
        for point in r["curve"]:
            rows.setdefault(point["step"], []).append(read(point, name))
    whole = max(map(len, rows.values()), default=0)
    return [(step, mean(v), min(v), max(v)) for step, v in sorted(rows.items()) if len(v) == whole]


def draw_figure(results: Results, name: str, shown: list[str]) -> figures.Image.Image:
    """Text and image abilities of some cells by step; by FLOPs for Table 1, where steps differ in them."""
    unit, each = "step", dict.fromkeys(shown, 1.0)
    if name == "table1":
        unit = "TFLOP"
        each = {c: mean(r["flops_per_step"] for r in results[c].values()) / 1e12 for c in shown}
    panels = []
    for key, title in PANELS.items():
        lines = {LABELS[c]: [(x * each[c], *y) for x, *y in curve(results[c], key)] for c in shown}
        panels.append((f"{title}, by {unit}", lines))
    return figures.curves(panels, (450, 280), columns=2)


def write_report(folder: Path) -> list[Path]:
    """Draw figures and write tables.md beside the results; the files written."""
    results, written = read_results(folder), []
    for name, chosen in FIGURES.items():
        if shown := [cell for cell in chosen if cell in results]:
            written.append(folder / f"{name}.png")
            figures.save_image(draw_figure(results, name, shown), written[-1])
    if results:
        tables = [origin(results), claims(results), overview(results), samplers(results)]
        written.append(folder / "tables.md")
        write_atomic(written[-1], "\n\n".join(t for t in tables if t) + "\n")
    return written
