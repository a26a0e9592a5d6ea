"""Rounding costs and speeds, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quantised
import quantised_report
import quantising
import torch

ROUTES = ["float32", "bfloat16"]
OPTIONS = ["--fast", "--images", "32", "--threads", "1", "--test-images", "50", "--repeats", "2"]
OPTIONS += ["--calibration", "16", "--routes", *ROUTES]


def test_each_route_is_a_row_measured_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*OPTIONS, "--output", str(tmp_path)]
    quantised.main(options)
    first = json.loads((tmp_path / "quantised.json").read_text())
    assert [(row["route"], row["model"]) for row in first["rows"]] == [
        (route, model) for route in ROUTES for model in ("dense", "pruned")
    ]
    for row in first["rows"]:
        assert quantised_report.right(row, 50).mean() == pytest.approx(row["accuracy"])
    dense, pruned = first["rows"][:2]
    assert pruned["parameters"] < dense["parameters"]
    assert "| bfloat16 | " in capsys.readouterr().out

    monkeypatch.setattr(quantised, "accuracy", lambda *_: pytest.fail("measured again"))
    quantised.main([*options, "--what", "accuracy", "speed"])
    second = json.loads((tmp_path / "quantised.json").read_text())
    assert second["rows"] == first["rows"]
    assert [(row["route"], row["compiled"]) for row in second["speeds"]] == [
        (route, False) for route in ROUTES
    ]
    assert all(row["pruned"]["ratio"] > 0 for row in second["speeds"])
    with pytest.raises(SystemExit, match="is of images 32, not 16; choose another"):
        quantised.main([*options, "--images", "16"])


def test_costs_are_of_the_same_images() -> None:
    labels = torch.zeros(9, dtype=torch.long)
    answers = {
        ("float32", "dense"): [0, 0, 0, 0, 0, 0, 0, 0, 1],
        ("float32", "pruned"): [0, 0, 0, 0, 0, 0, 0, 1, 1],
        ("int8", "dense"): [1, 0, 0, 0, 0, 0, 0, 0, 0],
        ("int8", "pruned"): [1, 1, 1, 0, 0, 0, 0, 1, 1],
    }
    rows = [
        {"route": route, "model": model}
        | quantised.judged(torch.nn.functional.one_hot(torch.tensor(found), 2), labels)
        for (route, model), found in answers.items()
    ]
    found = quantised_report.costs({"rows": rows, "test_images": 9})["int8"]
    assert found["dense lost"] == pytest.approx((0, (2 / 81) ** 0.5))
    assert found["pruned lost"][0] == pytest.approx(3 / 9)
    more = torch.tensor([0.0, 1, 1, 0, 0, 0, 0, 0, 1])
    assert found["more"] == pytest.approx((float(more.mean()), float(more.std(correction=0)) / 3))


def test_routes_leave_the_model_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images = torch.randn(2, 3, 2, 2)
    call = quantising.ROUTES["bfloat16"](model, [images])
    assert model[1].weight.dtype == torch.float32
    torch.testing.assert_close(call(images), model(images), rtol=0.05, atol=0.05)
