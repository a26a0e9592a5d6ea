"""Commands of `tp-amp` on a small model, and what they print and write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tp_amp.cli.main import main
from tp_amp.data.images import open_images

SMALL = ("img_size=32", "embed_dim=24", "depth=2", "num_heads=2", "num_classes=4")
MODEL = ("timm:vit_tiny_patch16_224", "--model-args", *SMALL)
SAMPLE = ("--data", "sample", "--images", "16", "--search-images", "8")
PRUNE = ("prune", *MODEL, *SAMPLE, "--target", "params=0.8", "--output", "small")
COMPARE = ("compare", *MODEL, *SAMPLE)
SIZE = ("--target", "params=0.8", "--output", "small")
DOWNS = ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def record(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(told(capsys, *arguments, "--json"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def photos(folder: Path, classes: int = 1, each: int = 6) -> None:
    for number in range(classes * each):
        place = folder / f"class{number % classes}" if classes > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        open_images("sample").read(number)[0].save(place / f"{number}.png")


def arguments() -> dict[str, int]:
    return {name: int(value) for name, value in (text.split("=") for text in SMALL)}


def without(option: str, *command: str) -> list[str]:
    place = command.index(option)
    return [*command[:place], *command[place + 2 :]]


def fails(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> str:
    assert main(command) == 2
    [line] = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
    return line


def tells_the_mistake(
    command: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line tells what was wrong, and nothing in the folder is another."""
    before = files(here)
    assert main(command) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, output.err
    assert lines[0].startswith("tp-amp: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert files(here) == before
