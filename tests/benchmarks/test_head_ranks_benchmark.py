"""The benchmark on random models: what it writes, and that its columns are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import head_ranks
import pytest
import reference
import torch
from random_data import random_images, random_labels, random_reference, write_parquet


@pytest.mark.slow
def test_head_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_reference("vit")
    reference.save_reference(model, "vit", {}, tmp_path)
    for split, count in (("train", 24), ("test", 40)):
        write_parquet(tmp_path, split, random_images(count, 0), random_labels(count, 0))
    arguments = ["--data", str(tmp_path), "--checkpoints", str(tmp_path), "--output", str(tmp_path)]
    head_ranks.main([*arguments, "--models", "vit", "--seeds", "0", "--images", "16"])
    record = json.loads((tmp_path / "head_ranks.json").read_text())
    assert head_ranks.report(record) in capsys.readouterr().out
    rows = record["models"]["vit"]["rows"]
    assert [row["kept"] for row in rows] == head_ranks.CUTS
    # Half of q and k is a quarter of an attention's qkv and its biases.
    width, depth = 128, len(model.blocks)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert rows[0]["parameters_kept"] == pytest.approx(1 - depth * width * (width + 1) / whole)
    images = torch.randn(16, 3, 32, 32)
    cut = head_ranks.variants(model, images, {"qk": 0.5}, 0)
    assert list(cut) == list(head_ranks.COLUMNS)
    with torch.no_grad():
        dense = model(images)
        lost = [float((found(images) - dense).square().mean()) for found in cut.values()]
    assert lost[1] < lost[0]
