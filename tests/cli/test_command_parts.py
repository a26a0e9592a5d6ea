"""What commands do alike: models, devices, images and labels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from command_line import (
    MODEL,
    PRUNE,
    SAMPLE,
    arguments,
    fails,
    photos,
    record,
    told,
)

import tp_amp
from tp_amp.cli.main import main

pytestmark = pytest.mark.usefixtures("here")


def test_open_clip_and_warnings_that_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    vision = 'vision_cfg={"image_size":32,"layers":2,"width":128,"patch_size":8}'
    text = 'text_cfg={"layers":1,"width":32,"heads":2,"vocab_size":50,"context_length":8}'
    model = ("open_clip:ViT-B-32/openai", "--model-args", "embed_dim=16", vision, text)
    size = ("--max-increase", "0.01", "--prune-num-heads", "--output", "small")
    assert main(["prune", *model, *SAMPLE, *size]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(set(lines))
    assert [line for line in lines if "random" in line] == [lines[0]]
    again = ("--max-increase", "0.01", "--output", "smaller")
    assert main(["prune", "small", *SAMPLE, *again]) == 0
    assert "random" not in capsys.readouterr().err
    tp_amp.create_model("smaller")


def test_a_saved_model_keeps_its_precision(capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, *PRUNE, "--dtype", "bfloat16")
    again = ("prune", "small", *SAMPLE, "--max-increase", "0.1", "--output", "smaller")
    told(capsys, *again)
    assert next(tp_amp.create_model("smaller").parameters()).dtype == torch.bfloat16


def test_labels_are_used_where_they_are_the_models(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    photos(here / "four", classes=4)
    photos(here / "three", classes=3)
    command = ["compare", *MODEL, "--keep", "0.5", "--json", "--data"]
    found = record(capsys, *command, "four")
    names = [row["importance"] for row in found["rows"]]
    assert found["metric"] == "accuracy"
    assert {"taylor", "hessian", "entropy", "random"} <= set(names)
    assert not found["failures"]
    assert main([*command, "three"]) == 0
    output = capsys.readouterr()
    assert "the labels of three are left out: 3 classes, the model has 4" in output.err
    found = json.loads(output.out)
    assert found["metric"] == "cosine to the dense model"
    assert "taylor" not in [row["importance"] for row in found["rows"]]
    size = ("--importance", "taylor", "--max-increase", "0.1", "--output", "small")
    assert record(capsys, "prune", *MODEL, "--data", "four", *size)["importance"] == "taylor"


def test_weights_from_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", **arguments())
    safetensors.torch.save_file(model.state_dict(), "w.safetensors")
    assert main([*PRUNE, "--weights", "w.safetensors"]) == 0
    assert "random weights" not in capsys.readouterr().err
    assert torch.equal(tp_amp.create_model("small").head.weight, model.head.weight)
    assert main([*PRUNE, "--overwrite"]) == 0
    assert "has random weights, good for trying commands only" in capsys.readouterr().err


def test_corrupt_images_are_skipped_when_asked(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    photos(here / "photos")
    (here / "photos" / "3.png").write_bytes(b"half")
    size = ("--max-increase", "0.01", "--output", "small", "--skip-corrupt")
    assert main(["prune", *MODEL, "--data", "photos", *size]) == 0
    assert "1 corrupt images are left out: photos/3.png" in capsys.readouterr().err


def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, (*PRUNE, "--device", f"cuda:{torch.cuda.device_count()}"))
    assert re.search("is not there .*--device cpu", line)
