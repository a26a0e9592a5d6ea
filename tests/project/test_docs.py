"""The pages know every public name and every module, their links lead somewhere, and what they tell
to type works; `make docs` builds them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import foreseen
import gpu_report
import head_ranks
import pytest
import quantised_report
import real_report
import resource_report
import runtimes
import streams
import timm
import width_rivals
import widths
from docs_blocks import commands, pages, python_blocks, run_python, shell_blocks
from pages import between

import tp_amp
from tp_amp.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs"
README = ROOT / "README.md"
ENTRY = ("tp_amp", "__init__")
PROSE = [README, ROOT / "CONTRIBUTING.md", ROOT / "UPSTREAM.md", *pages()]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules() -> list[tuple[str, str]]:
    """Every module with its folder, as they are written in the table of modules."""
    paths = [path.relative_to(ROOT / "tp_amp") for path in (ROOT / "tp_amp").rglob("*.py")]
    found = [(str(path.parent), path.stem) for path in paths if path.stem != "__init__"]
    return sorted([*((folder.replace(".", "tp_amp"), name) for folder, name in found), ENTRY])


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_reference_has_every_public_name_once() -> None:
    page = (PAGES / "reference.rst").read_text()
    listed = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(tp_amp.__all__)


def test_architecture_has_every_module_once() -> None:
    page = (PAGES / "architecture.md").read_text()
    listed = re.findall(r"^\| ([a-z_/]+) \| `(\w+)` \| .+ \|$", page, re.MULTILINE)
    assert sorted(listed) == modules()


def test_the_picture_names_modules_and_names_that_exist() -> None:
    picture = (PAGES / "architecture.svg").read_text()
    written = re.findall(r'class="code"[^>]*>([^<]+)<', picture)
    words = {word for text in written for word in re.findall(r"\w+", text)}
    known = {word for folder, module in modules() for word in (*folder.split("/"), module)}
    assert words
    assert words <= known | set(tp_amp.__all__)


def test_contributing_names_commands_and_files_that_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"\bmake ([a-z-]+)", page))
    files = {word for word in re.findall(r"`([\w./]+)`", page) if "/" in word or ".md" in word}
    files = {file for file in files if Path(file).suffix}
    assert named
    assert named <= targets()
    assert {"tests/zoo.py", "tests/importance/test_importances.py"} <= files
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", PROSE, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if link.startswith(("http", "mailto")):
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if place:
            assert place in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The places of a page that can be linked to, as GitHub and myst name them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


# Page and result of a name -> what writes its table.
TABLES = {
    "gpu": gpu_report.report,
    "foreseen": foreseen.report,
    "head_ranks": head_ranks.report,
    "quantised": quantised_report.report,
    "real": real_report.report,
    "resources": resource_report.report,
    "runtimes": runtimes.report,
    "streams": streams.report,
    "width_rivals": width_rivals.report,
    "widths": widths.report,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_its_result(name: str) -> None:
    """Also where there is no result yet, which the page says then."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    record = json.loads(path.read_text()) if path.is_file() else None
    text = (PAGES / "results" / f"{name}.md").read_text()
    assert between(text, name) == TABLES[name](record)


WITH_PYTHON = [page for page in (README, *pages()) if python_blocks(page)]


def runnable(page: Path) -> tuple[str, ...]:
    """The commands of a page, but for those that are marked not to be run."""
    blocks = [source for _, source, reason in shell_blocks(page) if reason is None]
    return tuple(command for source in blocks for command in commands(source))


# Of pages that tell the same commands, one.
WITH_SHELL = list({runnable(page): page for page in (*pages(), README)}.values())


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
@pytest.mark.usefixtures("code_of_folders")
@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run(page: Path, here: Path) -> None:
    expected = sum(reason is None for _, _, reason in python_blocks(page))
    assert run_python(page) == expected


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_SHELL, ids=named)
def test_commands_run(
    page: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the README as they are, others on models of fewer blocks."""
    if page != README:
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda *a, **n: create(*a, **{"depth": 2} | n))
    for command in runnable(page):
        program, *arguments = command.split()
        assert program == "tp-amp", command
        assert main(arguments) == 0, (command, capsys.readouterr().err)
