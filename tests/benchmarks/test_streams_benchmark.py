"""The benchmark on a random model: what it writes, and that its columns are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reference
import streams
import torch
from random_data import random_images, random_labels, random_reference, write_parquet
from torch import nn


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_reference("vit")
    reference.save_reference(model, "vit", {}, tmp_path)
    for split, count in (("train", 24), ("test", 40)):
        write_parquet(tmp_path, split, random_images(count, 0), random_labels(count, 0))
    arguments = ["--data", str(tmp_path), "--checkpoints", str(tmp_path), "--output", str(tmp_path)]
    streams.main([*arguments, "--seeds", "0", "--images", "16"])
    record = json.loads((tmp_path / "streams.json").read_text())
    assert streams.report(record) in capsys.readouterr().out
    assert [row["kept"] for row in record["rows"]] == list(streams.KEPT)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    cut = streams.variants(model, images, labels, 0.5)
    assert list(cut) == list(streams.COLUMNS)
    for found in cut.values():
        assert sum(p.numel() for p in found.parameters()) == record["rows"][-1]["parameters"]
        assert found.patch_embed.proj.out_channels == 64  # type: ignore[union-attr]
        assert found.blocks[0].mlp.fc1.out_features == 512  # type: ignore[index]
    with torch.no_grad():
        dense = model(images)
        lost = [float((found(images) - dense).square().mean()) for found in cut.values()]
    assert lost[3] < min(lost[:3])


def test_variances_are_those_of_what_norms_give() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3))
    x = torch.tensor([[[1.0, 2.0, 6.0], [0.0, 4.0, 2.0]]])
    first = (x - x.mean(-1, keepdim=True)) / x.var(-1, unbiased=False, keepdim=True).sqrt()
    expected = 2 * first.square().mean((0, 1))  # the second norm changes nothing
    assert torch.allclose(streams.variances(model, x), expected, atol=1e-4)
