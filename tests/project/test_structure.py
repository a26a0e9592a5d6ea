"""The house: one folder for each question, small enough to be read, and said in its first lines."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "tp_amp"
FOLDERS = sorted(path.parent for path in HOUSE.rglob("__init__.py") if path.parent != HOUSE)


def modules(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))


def text(folder: Path) -> str:
    return ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""


def public(folder: Path) -> list[str]:
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def imported(path: Path) -> set[str]:
    """Modules of ours that a file takes something from, as `folder.module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tp_amp."):
            found.add(str(node.module).removeprefix("tp_amp."))
    return found


def name_of(folder: Path) -> str:
    return str(folder.relative_to(HOUSE)).replace("/", ".")


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_folder_says_what_it_answers_and_names_each_module(folder: Path) -> None:
    question, _, way = text(folder).partition("\n\n")
    assert question.endswith("?")
    patterns = re.findall(r"`([\w*]+)`", way)
    named = {m for m in modules(folder) for p in patterns if re.fullmatch(p.replace("*", ".*"), m)}
    assert named == set(modules(folder))
    assert len(modules(folder)) <= 14


def test_few_modules_lie_at_the_top() -> None:
    assert len(modules(HOUSE)) <= 8


def test_folders_keep_to_what_others_offer() -> None:
    """What is not in a folder's `__all__` is private to it."""
    offered = {f"{name_of(folder)}.{module}" for folder in FOLDERS for module in public(folder)}
    for path in HOUSE.rglob("*.py"):
        own = name_of(path.parent) if path.parent != HOUSE else ""
        strange = {n for n in imported(path) if "." in n and n.rpartition(".")[0] != own}
        assert strange <= offered, path


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_what_a_folder_offers_is_used(folder: Path) -> None:
    used = {n for path in HOUSE.rglob("*.py") if path.parent != folder for n in imported(path)}
    used |= {n.removeprefix("tp_amp.") for n in re.findall(r'"([\w.]+)",', entry())}
    if folder.name == "cli":
        used.add("cli.main")
    assert {f"{name_of(folder)}.{module}" for module in public(folder)} <= used


def entry() -> str:
    return (HOUSE / "__init__.py").read_text()
