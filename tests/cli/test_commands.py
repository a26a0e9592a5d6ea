"""What each command does, prints and writes."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
from command_line import (
    COMPARE,
    DOWNS,
    MODEL,
    PRUNE,
    SAMPLE,
    arguments,
    record,
    told,
)
from PIL import Image

import tp_amp
from tp_amp.cli.main import main

pytestmark = pytest.mark.usefixtures("here")


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "inspect", *MODEL)
    assert text.startswith("VisionTransformer: 0.03 M parameters")
    assert "blocks.*.mlp (2 times): 96 channels, fc1 -> fc2" in text
    found = record(capsys, "inspect", *MODEL)
    assert [mlp["down"] for mlp in found["mlps"]] == DOWNS
    model = timm.create_model("vit_tiny_patch16_224", **arguments())
    assert found["shares"]["total"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_checkpoint_that_nothing_needs_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "--checkpoint", "run"]) == 0
    assert "--checkpoint is left out: nothing is searched" in capsys.readouterr().err
    assert not os.path.exists("run")


def test_prune_says_and_saves_what_it_did(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    found = record(capsys, *PRUNE)
    # With both MLPs of one width timm opens it too.
    kept = {width["kept"] for width in found["widths"].values()}
    alone = ["config.json"] if len(kept) == 1 else []
    assert sorted(os.listdir("small")) == [
        *("README.md", *alone, "model.safetensors", "plan.json", "prune.json", "report.json"),
        "source.json",
    ]
    assert os.listdir(here) == ["small"]
    model = tp_amp.create_model("small")
    parameters = sum(p.numel() for p in model.parameters())
    dense = timm.create_model("vit_tiny_patch16_224", **arguments())
    before, after = found["before"], found["after"]
    assert before["parameters"] == sum(p.numel() for p in dense.parameters())
    assert after["parameters"] == parameters
    assert 0.78 < parameters / before["parameters"] <= 0.8
    assert after["macs"] < before["macs"]
    widths = {name: model.get_submodule(name).in_features for name in DOWNS}
    assert {name: width["kept"] for name, width in found["widths"].items()} == widths
    assert json.loads(Path("small/prune.json").read_text()) == found
    report = tp_amp.Report.from_json(Path("small/report.json").read_text())
    assert report.after.parameters == parameters
    assert report.after.macs == after["macs"]
    assert before["cosine to the dense model"] == pytest.approx(1)
    assert 0 < after["cosine to the dense model"] < 1


def test_prune_tells_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, *PRUNE)
    following = re.search(r"next: tp-amp (.*)", text)
    assert following is not None
    again = told(capsys, *following[1].split())
    assert all(down in again for down in DOWNS)
    assert re.search(r"parameters: 0\.0\d\d M -> 0\.0\d\d M \((79\.\d|80\.0)%\)", text)
    assert re.search(r"blocks\.0\.mlp\.fc2 +96 +\d+ +\d+%", text)
    assert "cosine to the dense model: 1.0000 -> " in text


def test_the_same_command_gives_the_same_plan(saved: Path) -> None:
    assert main(PRUNE) == 0
    assert main([*PRUNE[:-1], "other", "--seed", "1"]) == 0
    for name in ("plan.json", "model.safetensors"):
        first, again, other = (
            (folder / name).read_bytes() for folder in (saved, Path("small"), Path("other"))
        )
        assert first == again != other


def test_activation_checkpointing_is_refused_where_nothing_would_be_done(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert main([*PRUNE, "--importance", "taylor", "--activation-checkpointing"]) == 2
    assert "is for --importance reconstruction and entropy" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_compare_takes_an_objective(capsys: pytest.CaptureFixture[str]) -> None:
    """Of few channels, which stay depends on what errors count by."""
    command = (*COMPARE, "--importance", "reconstruction", "--keep", "0.1", "--objective")
    kinds = ("auto", "prediction", "similarity", "reconstruction")
    values = [record(capsys, *command, kind)["rows"][0]["value"] for kind in kinds]
    assert values[0] == values[1]
    assert len({*values}) == 3


def test_a_saved_model_is_a_model(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    plan = tp_amp.PruningPlan.from_json((saved / "plan.json").read_text())
    found = record(capsys, "inspect", str(saved))
    assert {mlp["down"]: mlp["width"] for mlp in found["mlps"]} == plan.widths
    command = ("prune", str(saved), *SAMPLE, "--target", "params=0.95", "--output", "smaller")
    smaller = record(capsys, *command)
    again = tp_amp.PruningPlan.from_json(Path("smaller/plan.json").read_text())
    for name, kept in again.keep.items():
        assert set(kept) <= set(plan.keep[name])
    assert smaller["widths"][DOWNS[0]]["dense"] == 96
    model = tp_amp.create_model("smaller")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == smaller["after"]["parameters"] < smaller["before"]["parameters"]
    assert DOWNS[0] in told(capsys, "report", "smaller")


def test_report(capsys: pytest.CaptureFixture[str], saved: Path, here: Path) -> None:
    found = record(capsys, "report", str(saved))
    assert found == json.loads((saved / "report.json").read_text())
    # A plan alone, as save_pruned leaves it.
    shutil.copy(saved / "plan.json", here)
    alone = record(capsys, "report", ".")
    assert alone["layers"] == found["layers"]
    assert alone["before"] is None
    assert "Parameters" not in told(capsys, "report", ".")
    assert "drawn: page.html" in told(capsys, "report", str(saved), "--html", "page.html")
    assert DOWNS[0] in Path("page.html").read_text().replace("<wbr>", "")


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    command = (*COMPARE, "--keep", "0.5", "--importance", "entropy", "magnitude")
    found = record(capsys, *command, "--plot", "plot.png")
    assert [row["importance"] for row in found["rows"]] == ["entropy", "magnitude"]
    assert len({row["parameters"] for row in found["rows"]}) == 1
    with Image.open("plot.png") as picture:
        assert picture.size[0] > 100
    text = told(capsys, *command)
    assert f"{found['rows'][1]['value']:.4f}" in text
