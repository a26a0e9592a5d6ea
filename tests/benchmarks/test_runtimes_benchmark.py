"""The benchmark on tiny models: its rows, that it goes on where it ended, and its tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runtimes


@pytest.mark.slow
def test_rows_are_measured_once_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    # Far from what is just reachable on such a small model, and one that never is.
    monkeypatch.setattr(runtimes, "TARGETS", (0.95, 0.85, 0.001))
    monkeypatch.setattr(runtimes, "SIZES", (1, 3))
    options = ["--fast", "--repeats", "2", "--threads", "1", "--output", str(tmp_path)]
    options += ["--runtimes", "eager", "onnxruntime"]
    runtimes.main([*options, "--parts", "throughput", "--minutes", "0"])
    assert "2 rows are left" in capsys.readouterr().out
    runtimes.main([*options, "--parts", "throughput", "targets"])
    options.remove("onnxruntime")
    runtimes.main([*options, "--parts", "steps"])
    text = (tmp_path / "runtimes.json").read_text()
    rows = json.loads(text)["rows"]
    assert len(rows) == 2 + 1 + 6
    found = rows["throughput, onnxruntime"]
    for side in ("dense", "pruned"):
        assert [size for size, _ in found[side]["speeds"]] == [1, 3]
        assert found[side]["exported_parameters"] == found[side]["parameters"]
    assert found["pruned"]["macs"] < found["dense"]["macs"]
    assert rows["steps, eager"]["to_widest"][0] == [1, 1, 1]
    for runtime in ("eager", "onnxruntime"):
        wide, narrow = (rows[f"targets, ViT-S/16, {runtime}, {share}"] for share in (0.95, 0.85))
        assert wide["target"] == pytest.approx(0.95 * wide["dense"])
        assert sum(narrow["widths"].values()) < sum(wide["widths"].values())
        beyond = rows[f"targets, ViT-S/16, {runtime}, 0.001"]
        assert "can't be met: reachable are" in beyond["out_of_reach"]
    printed = capsys.readouterr().out
    for row in (
        "| onnxruntime | 3 |",
        "| ViT-S/16 | onnxruntime |",
        "as in the plan",
        "out of reach |",
    ):
        assert row in printed
    runtimes.main(options)
    assert (tmp_path / "runtimes.json").read_text() == text
    with pytest.raises(ValueError, match="was measured with"):
        runtimes.main([*options, "--repeats", "3"])


def test_what_was_not_run_says_so() -> None:
    assert runtimes.report(None) == runtimes.NOT_RUN
    assert runtimes.report({"rows": {}}).count(runtimes.NOT_RUN) == 3
    row = {"dense": 50.0, "target": 45.0, "measured": 45.5, "again": 44.0, "widths": {}}
    text = runtimes.report({"rows": {"targets, Swin-T, openvino, 0.9": row}})
    assert "| Swin-T | openvino | 50.0 | 91.0 %, 88.0 % |  |  |  |  |" in text
