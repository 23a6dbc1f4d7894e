"""ship.py: a run's last checkpoint becomes what the repository ships."""

from __future__ import annotations

import json

import helpers
import torch
from runs import last

from checkpoint import load_trained, saved_config
from config import TrainConfig
from small import ship


def test_a_run_becomes_what_is_shipped_and_says_how_it_was_made(tmp_path, monkeypatch):
    run, figures = helpers.shapes_run(), {name: 0.5 for name in ship.FIGURES}
    (tmp_path / "figures.json").write_text(json.dumps(figures | {"pictures": "other things"}))
    flags = (run, "--figures", "figures.json", "--out", "shipped")
    result = helpers.call(ship, *flags, folder=tmp_path)
    assert result.status == 2 and "was trained with other flags than --config small has" in result.err
    monkeypatch.setitem(ship.CONFIGS, "small", TrainConfig(**saved_config(last(run))))
    helpers.good(ship, *flags, folder=tmp_path)
    names = {p.name for p in (tmp_path / "shipped").iterdir()}
    assert "optimizer.safetensors" not in names and {"ema.safetensors", "MADE.json"} <= names
    made = json.loads((tmp_path / "shipped/MADE.json").read_text())
    assert made["command"] == "python train.py --config small" and made["figures"] == figures
    ours, theirs = (load_trained(f).model.state_dict() for f in (tmp_path / "shipped", run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    result = helpers.call(ship, *flags, folder=tmp_path)
    assert result.status == 2 and "shipped is there already" in result.err
