"""The benchmark of large models, on a small one of the same kind."""

import json
import subprocess
import sys

import pytest
import scale
from toys import judges_shapes


def test_benchmark(tmp_path, capsys, monkeypatch):
    changes = {"layers": 4, "width": 64, "head_width": 16, "image_size": 28}
    monkeypatch.setattr(scale, "CHANGES", changes)
    towers = {"dense": 4e9, "AMP": 2e9, "DGMR": 1e9, "seconds": 5.0, "peak_gb": 0.8}
    monkeypatch.setattr(scale, "planned", lambda name: towers)
    options = "--threads 1 --images 4 --search-images 4 --repeats 1 --max-increase 10"
    scale.main([*options.split(), "--output", str(tmp_path)])

    record = json.loads((tmp_path / "scale.json").read_text())
    assert capsys.readouterr().out.strip().endswith(scale.report(record).strip())
    found = record["pruned"]
    assert found["same_scores"]
    assert found["hidden"]["before"] == 279
    # Two halvings, all accepted.
    assert found["hidden"]["after"] == [69] * 4
    cut = 4 * (279 - 69) * (64 + 1 + 64)
    assert found["parameters"]["before"] - found["parameters"]["after"] == cut
    assert list(found["stages"]) == [
        *("build", "find", "score, activation checkpointing", "score, plain"),
        *("trace", "estimate", "search", "cut"),
    ]
    assert found["estimated_seconds"] > 0
    assert set(found["images_per_second"]) == {"dense", "279"}
    assert record["planned"] == dict.fromkeys(scale.PLANNED, towers)


@pytest.mark.slow
@judges_shapes
@pytest.mark.skipif(sys.platform == "win32", reason="has no resource")
def test_a_tower_is_planned_without_weights():
    output = subprocess.run(
        [sys.executable, scale.__file__, "--plan", "ViT-g-14", "--threads", "1"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = json.loads(output)
    # DGMR's 0.477 and AMP's 0.62 billion.
    assert found["DGMR"] / 1e9 == pytest.approx(0.477, rel=0.01)
    assert found["AMP"] / 1e9 == pytest.approx(0.62, rel=0.01)
