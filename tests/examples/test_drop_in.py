"""The benchmark of the examples: their originals, and sizes that agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")
pytest.importorskip("transformers", minversion="5")
import drop_in
from hugging_face import load_hugging_face
from reference import load_reference

SOURCE = """import torch
import tp_amp  # tp_amp


def prune(x):
    # tp_amp: was importance = 1
    # tp_amp: was for i in range(3):
    # tp_amp: was     importance += i
    importance = 2  # tp_amp
    return importance + x  # stays
"""
ORIGINAL = """import torch


def prune(x):
    importance = 1
    for i in range(3):
        importance += i
    return importance + x  # stays
"""


def test_original_turns_the_marked_lines_around() -> None:
    assert drop_in.original(SOURCE) == ORIGINAL
    assert drop_in.changed_lines(SOURCE) == 2
    assert drop_in.load_script(ORIGINAL).prune(1) == 5


def ratios(script: Any, model: Any, data: Any, ratio: float) -> None:
    """Cut a Linear by the square of the ratio, as if the widths were chosen."""
    if ratio > 0.9:
        raise ValueError("smaller than the smallest size")
    model.weight = nn.Parameter(model.weight[round(1000 * ratio**2) :])


CASE = drop_in.Case("toy", "Taylor", "toy", ratios, 0.95, free=True)


@pytest.mark.parametrize("size", [250, 640, 900])
def test_size_is_met_within_one_percent(size: int) -> None:
    model = drop_in.cut_to_size(CASE, SimpleNamespace(), nn.Linear(1, 1000, False), None, size)
    assert abs(drop_in.parameters(model) / size - 1) <= 0.01


def test_size_that_is_not_met_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="toy met no 10 parameters"):
        drop_in.cut_to_size(CASE, SimpleNamespace(), nn.Linear(1, 1000, False), None, 10)


@pytest.mark.parametrize("model", ["vit", "swin"])
def test_hugging_face_models_are_the_reference_models(model: str) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_reference(model)(images)
        actual = load_hugging_face(model)(images).logits
    assert torch.allclose(actual, expected, atol=1e-4)


def test_report_has_a_row_for_each_record() -> None:
    record = {"script": "prune_x", "title": "global", "model": "ViT", "lines": 2, "was": "Taylor"}
    record |= {"dense_parameters": 200, "parameters": [100, 100], "dense": [0.8, 0.8]}
    record |= {"before": [0.5, 0.7], "after": [0.6, 0.6]}
    header, row = drop_in.report([record]).splitlines()
    assert header.split()[0] == "script"
    cells = ("prune_x (global)", "ViT", "2", "50 %", "80.0", "Taylor", "60.0 ±14.1", "60.0 ±0.0")
    assert re.split(r"  +", row) == list(cells)


def test_accuracy_counts() -> None:
    class Digits(nn.Module):
        """Says the label that the first pixel holds, in an output of Hugging Face's kind."""

        def forward(self, images: Tensor) -> Any:
            return SimpleNamespace(logits=torch.eye(3)[images[:, 0, 0, 0].long()])

    images = torch.tensor([0.0, 1.0, 2.0, 2.0]).view(4, 1, 1, 1)
    assert drop_in.accuracy(Digits(), (images, torch.tensor([0, 1, 2, 0]))) == 0.75


def test_record_holds_both_scripts_at_one_size(monkeypatch: Any, tmp_path: Path) -> None:
    def few(folder: Path, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(len(split))
        images = torch.randint(256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return images, torch.randint(10, (40,), generator=generator)

    monkeypatch.setattr(drop_in, "load_split", few)
    output = tmp_path / "drop_in.json"
    before = [{"script": name} for name in ("prune_resnet", "prune_timm_swin")]
    output.write_text(json.dumps({"results": before}))
    monkeypatch.setattr(drop_in, "report", lambda records: f"{len(records)} records")
    drop_in.main(
        ["--data", str(tmp_path), "--scripts", "prune_timm_swin", "--seeds", "1", "--images", "8",
         "--training", "8", "--test", "20", "--output", str(output)]
    )  # fmt: skip
    [kept, record] = json.loads(output.read_text())["results"]
    assert kept == before[0]  # what was measured of other scripts stays
    assert record["script"] == "prune_timm_swin"
    assert record["lines"] == 3
    [theirs], [ours] = record["parameters"], record["our_parameters"]
    assert theirs < 0.8 * record["dense_parameters"]
    assert abs(ours / theirs - 1) <= 0.01
    assert all(0 <= value <= 1 for key in ("before", "after") for value in record[key])
