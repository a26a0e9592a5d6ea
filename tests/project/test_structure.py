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


def test_every_module_of_some_length_has_a_test_file_of_its_name() -> None:
    """In the folder of the same name; shorter ones are tested with what calls them."""
    tests = HOUSE.parent / "tests"
    long = [path for path in HOUSE.rglob("*.py") if len(path.read_text().splitlines()) > 100]
    missing = [
        str(path.relative_to(HOUSE))
        for path in long
        if not path.stem.startswith("__")
        and not (tests / path.relative_to(HOUSE).with_name(f"test_{path.name}")).is_file()
    ]
    assert missing == []


def test_tests_lie_in_the_folders_of_what_they_test() -> None:
    """Beside them: what is tested as a whole, and what lies outside the package."""
    tests = HOUSE.parent / "tests"
    others = {"project", "upstream", "examples", "benchmarks"}
    found = {name_of_tests(path.parent, tests) for path in tests.rglob("test_*.py")}
    assert found - others <= {name_of(folder) for folder in FOLDERS}


def name_of_tests(folder: Path, tests: Path) -> str:
    return str(folder.relative_to(tests)).replace("/", ".")
