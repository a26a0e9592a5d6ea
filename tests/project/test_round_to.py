"""The benchmark of `round_to` on a model that takes no time."""

import json
from functools import partial

import pytest
import round_to
import timm


def test_widths():
    dense = {str(layer): 1536 for layer in range(200)}
    drawn = round_to.draw_widths(dense, 0)
    assert drawn == round_to.draw_widths(dense, 0)
    assert sum(drawn.values()) / 200 == pytest.approx(0.6 * 1536, rel=0.03)
    assert sum(width % 8 > 0 for width in drawn.values()) > 150
    assert round_to.rounded_up({"a": 1, "b": 64, "c": 65}, 64) == {"a": 64, "b": 64, "c": 128}


def test_ratios():
    spread = round_to.spread_of_ratios([2.0, 1.0, 4.0], [4.0, 4.0, 4.0])
    assert spread == {"median": 2.0, "lower_quartile": 1.5, "upper_quartile": 3.0}


def test_benchmark(tmp_path, capsys, monkeypatch):
    small = partial(timm.create_model, img_size=32, depth=2, embed_dim=48, num_heads=3)
    monkeypatch.setattr(round_to.timm, "create_model", small)
    monkeypatch.setattr(round_to, "PIXELS", 32)
    round_to.main(["--repeats", "2", "--images", "2", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "round_to.json").read_text())
    assert capsys.readouterr().out.strip() == round_to.report(record).strip()
    for multiple in round_to.MULTIPLES:
        entry = record["variants"][f"round_to={multiple}"]
        irregular = record["variants"]["round_to=1"]
        assert entry["ratio_to_dense"]["median"] > 0
        assert entry["macs"] >= irregular["macs"]
        for name, width in entry["widths"].items():
            assert width % multiple == 0
            assert 0 <= width - irregular["widths"][name] < multiple
    assert record["variants"]["dense"]["ratio_to_dense"]["median"] == 1
