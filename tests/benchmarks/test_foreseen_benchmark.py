"""Foreseen and measured losses, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import foreseen
import pytest
import torch

OPTIONS = ["--fast", "--images", "32", "--test-images", "30", "--threads", "1"]


def test_losses_are_divergences() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, cut = (torch.randn(7, 4, generator=generator).double().log_softmax(1) for _ in range(2))
    expected = torch.nn.functional.kl_div(cut, dense, reduction="batchmean", log_target=True)
    assert foreseen.lost(dense, cut) == pytest.approx(float(expected))
    assert foreseen.lost(dense, dense) == 0


def test_each_mlp_and_each_plan_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    foreseen.main([*OPTIONS, "--fractions", "0.5", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "foreseen.json").read_text())
    assert [(row["layer"], row["kept"]) for row in record["alone"]] == [
        (f"blocks.{block}.mlp.fc2", share) for block in (0, 1) for share in (0.5, 0.25)
    ]
    for row in record["alone"]:
        assert row["foreseen"] > 0
        assert row["lost"]["cut layers"] > 0
    half, quarter = record["alone"][:2]
    assert quarter["foreseen"] > half["foreseen"]
    (whole,) = record["together"]
    assert whole["lost"].keys() == {"cut layers", "every Linear"}
    assert (tmp_path / "foreseen.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert f"| 50 % | {whole['foreseen']:.3f} |" in printed
