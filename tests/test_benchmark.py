"""scale/benchmark.py: what is timed, what is counted, and that the compared models are one model."""

from __future__ import annotations

import json

import helpers
import pytest
import torch

from load_qwen3 import load_qwen3
from scale import benchmark
from scale.benchmark import in_turns, row, rows_table


def test_works_run_in_turns_after_a_round_that_warms_up(monkeypatch):
    now, done = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])

    def work(name: str, seconds: float):
        def run() -> None:
            done.append(name)
            now[0] += seconds

        return run

    times = in_turns({"a": work("a", 1.0), "b": work("b", 0.5)}, "cpu", 6.0)
    assert len(times["a"]) == len(times["b"]) >= 5 and done == ["a", "b"] * (len(done) // 2)
    assert len(done) > 2 * len(times["a"])  # the first rounds are in no figure
    assert set(times["a"]) == {1.0} and set(times["b"]) == {0.5}
    assert len(in_turns({"slow": work("slow", 100.0)}, "cpu", 1.0)["slow"]) == 2


def test_a_row_is_a_rate_with_the_slowest_and_the_fastest_run():
    found = row("part", "what", 12, "things/s", [4.0, 1.0, 2.0], note="n")
    assert (found["value"], found["least"], found["most"]) == (6.0, 3.0, 12.0) and found["note"] == "n"


def test_the_table_has_all_rows_and_says_what_could_not_be_measured():
    rows = [row("step", "a step", 10, "pictures/s", [2.0], share_of_product=0.25, bytes=2**30)]
    rows[0]["bytes_predicted"] = 2**31
    rows.append({"part": "text", "what": "text", "problem": "ValueError: no"})
    page = rows_table({"machine": {"device": "D", "torch": "T", "cuda": None}, "quick": True, "rows": rows})
    assert "| a step | 5 pictures/s (5 to 5) | 25% of the product; 1.0 GiB, predicted 2.0 |" in page
    assert "| text | ValueError: no |" in page and page.startswith("D, torch T, CUDA None, quick")


def test_a_part_that_fails_does_not_stop_the_others_and_is_an_error_at_the_end(tmp_path, monkeypatch):
    def fail(*_: object) -> list:
        raise ValueError("it broke")

    monkeypatch.setattr(
        benchmark, "ceilings", lambda device, quick: [row("c", "product", 1, "TFLOP/s", [1.0])]
    )
    monkeypatch.setattr(benchmark, "small_step", fail)
    monkeypatch.setattr(benchmark, "random_base", lambda *a, **k: None)
    monkeypatch.setattr(benchmark, "load_qwen3", lambda *a, **k: pytest.fail("not reached"))
    monkeypatch.setattr(benchmark, "training_step", lambda *a: [row("step", "done", 1, "x", [1.0])])
    out = helpers.call(benchmark, "step", "small", "--json", tmp_path / "b.json", folder=tmp_path)
    found = json.loads((tmp_path / "b.json").read_text())
    assert [r["what"] for r in found["rows"]] == ["product", "done", "small"]
    assert out.status == 2 and "not all of it could be measured" in out.err and "it broke" in out.out
    wrong = helpers.call(benchmark, "steps", folder=tmp_path)
    assert wrong.status == 2 and "steps is no part; choose from ceilings, step" in wrong.err


def test_transformers_model_is_ours():
    pytest.importorskip("transformers")
    ours = load_qwen3(helpers.base()).eval()
    theirs = benchmark.their_model(ours, "cpu")
    ids = torch.randint(10, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(theirs(ids).logits, ours.text_logits(ids), atol=1e-4)


@pytest.mark.slow
def test_all_of_it_runs_in_small(tmp_path):
    parts = ("ceilings", "step", "denoise", "small")
    helpers.good(benchmark, *parts, "--quick", "--json", tmp_path / "b.json", folder=tmp_path)
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert {r["part"] for r in rows} == set(parts) and all(r["value"] > 0 for r in rows)
    assert len(rows) == 3 + 2 + 2 + 1
