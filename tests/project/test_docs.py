"""The pages know every public name and every module; `make docs` builds them."""

from __future__ import annotations

import re
from pathlib import Path

import tp_amp

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs"


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_reference_has_every_public_name_once() -> None:
    page = (PAGES / "reference.rst").read_text()
    listed = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(tp_amp.__all__)


def test_architecture_has_every_module_once() -> None:
    page = (PAGES / "architecture.md").read_text()
    listed = re.findall(r"^\| [a-z ]+ \| `(\w+)` \| .+ \|$", page, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "tp_amp").glob("*.py"))


def test_the_picture_names_modules_and_names_that_exist() -> None:
    picture = (PAGES / "architecture.svg").read_text()
    named = re.findall(r'class="code"[^>]*>([^<]+)<', picture)
    words = {word for text in named for word in re.findall(r"\w+", text)}
    modules = {path.stem for path in (ROOT / "tp_amp").glob("*.py")}
    assert words
    assert words <= modules | set(tp_amp.__all__)


def test_contributing_names_commands_and_files_that_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    commands = set(re.findall(r"\bmake ([a-z]+)", page))
    files = {word for word in re.findall(r"`([\w./]+)`", page) if "/" in word or ".md" in word}
    assert commands
    assert commands <= targets()
    assert {"tests/zoo.py", "tests/importance/test_importances.py"} <= files
    assert all((ROOT / file).exists() for file in files), files
