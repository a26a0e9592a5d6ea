"""What a comparison found: one table, one picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch_pruning as tp
from comparisons import LastFirst, compare


def test_table_json_and_picture(tmp_path: Path) -> None:
    found = compare({"one": LastFirst(), "two": tp.importance.LAMPImportance()})
    lines = str(found).splitlines()
    assert lines[1].split() == ["MLP", "channels", "kept", "100%", "50%", "20%"]
    assert lines[3].split() == ["one", "1.0000", *(f"{r.value:.4f}" for r in found.rows[:2])]
    record = json.loads(found.to_json())
    assert [row["value"] for row in record["rows"]] == [row.value for row in found.rows]
    found.plot(tmp_path / "plot.svg")
    picture = (tmp_path / "plot.svg").read_text()
    assert "<!-- one -->" in picture
    assert "<!-- two -->" in picture
    with pytest.raises(ValueError, match="not supported"):
        found.plot(tmp_path / "plot.unknown")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.svg"]


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare({"one": LastFirst()}, fractions=[0.5])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"install tp-amp\[cli\]"):
        found.plot("never.png")
