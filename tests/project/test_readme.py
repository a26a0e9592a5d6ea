"""The README is short, and every figure in it is that of a committed result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Without code blocks, code, the targets of links, versions and names of papers.
PROSE = re.sub(
    r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv [\d.]+|Python [\d.]+|1x1", " ", README, flags=re.S
)
FIGURE = r"\d[\d,]*(?:\.\d+)?"


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def shares() -> list[str]:
    """Of ViTs of one width throughout, in percent: the smallest and the largest."""
    found = [row["parameters"] for name, row in result("shares").items()]
    return [f"{100 * min(found):.0f}", f"{100 * max(found):.0f}"]


# What the README says, with a group for each figure, and where these come from.
CLAIMS: list[tuple[str, Callable[[], list[str]]]] = [
    (rf"In a usual ViT ({FIGURE}) to ({FIGURE}) % of the parameters lie in the MLPs", shares),
]


@pytest.mark.parametrize(("text", "source"), CLAIMS, ids=[text[:30] for text, _ in CLAIMS])
def test_a_figure_is_that_of_its_result(text: str, source: Callable[[], list[str]]) -> None:
    [match] = re.finditer(re.sub(" ", r"\\s+", text), PROSE)
    assert list(match.groups()) == source()


def test_no_figure_is_without_a_result() -> None:
    left = PROSE
    for text, _ in CLAIMS:
        left = re.sub(re.sub(" ", r"\\s+", text), " ", left)
    assert re.findall(rf"[^\n]*?{FIGURE}[^\n]*", left) == []


def test_it_is_read_in_a_minute() -> None:
    assert len(README.splitlines()) < 150
    assert len(README.encode()) < 9000


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []
