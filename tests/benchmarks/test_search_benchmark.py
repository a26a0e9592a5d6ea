"""The benchmark of the search on random images and weights."""

import json

import pytest
import reference
import search
from random_data import random_images, random_labels, random_reference, write_parquet


def test_steps_off():
    dense = {"a": 64, "b": 640}
    assert search.steps_off({"a": 40, "b": 320}, {"a": 41, "b": 300}, dense) == 2.0


@pytest.mark.slow
def test_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search, "STEPS", 2)
    reference.save_reference(random_reference("vit"), "vit", {}, tmp_path)
    write_parquet(tmp_path / "data", "train", random_images(80, 2), random_labels(80, 2))
    options = "--models vit --scoring 8 --images 64 72 --cached-from 64 --batch-size 8"
    options += " --error-probability 0.2"
    paths = ["--data", tmp_path / "data", "--checkpoints", tmp_path, "--output", tmp_path / "out"]
    search.main([*options.split(), *map(str, paths)])

    record = json.loads((tmp_path / "out" / "search.json").read_text())
    assert capsys.readouterr().out.strip().endswith(search.report(record).strip())
    ways = record["models"]["vit"]["64"]
    plain, prefix = ways["plain"], ways["from the cut on"]
    # Every image of every probe, and the first batch to see what the model ends in.
    assert plain["images"] <= 64 * (1 + 2 * 6) + 8
    assert plain["mlp_runs"] == plain["images"]
    assert prefix["widths"] == plain["widths"]
    assert prefix["mlp_runs"] < plain["mlp_runs"]
    fewer, both = ways["sequential, 0.2"], ways["sequential, 0.2, from the cut on"]
    assert fewer["widths"] == both["widths"]
    assert fewer["images"] < plain["images"]
    assert plain["forwards"] == plain["images"] == prefix["forwards"]
    assert fewer["forwards"] == fewer["images"] == both["forwards"]
    assert fewer["forwards_to_plain"] == fewer["forwards"] / plain["forwards"]
    assert set(record["models"]["vit"]["72"]) == {name for name in ways if "cut" in name}
    assert fewer["images_to_plain"] == pytest.approx(fewer["images"] / plain["images"])
