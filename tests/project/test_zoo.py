"""Pruning half of every MLP of every family equals masking the same neurons of the dense model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import TIMM
from zoo_checks import GROUPS, check
from zoo_dense import further_models


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    make, inputs, count = TIMM[name]
    torch.manual_seed(0)
    check(name, make(), inputs, count)


SLOW = {"open_clip": pytest.mark.slow}  # towers that timm makes are as large as the real ones


@pytest.mark.parametrize("group", [pytest.param(g, marks=SLOW.get(g, ())) for g in GROUPS])
def test_other_libraries(group: str) -> None:
    for name, (make, inputs, count) in GROUPS[group]().items():
        torch.manual_seed(0)
        check(name, make(), inputs, count)


def test_the_table_of_models_is_of_this_zoo() -> None:
    """`make zoo` writes it; a model added here must be measured again."""
    page = Path(__file__).parents[2] / "docs" / "models.md"
    table = page.read_text().split("<!-- zoo -->")[1]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
    measured = {row[0].replace("(cut by hand)", "").strip(): row for row in rows}
    entries = {**TIMM}
    for group in GROUPS.values():
        entries |= group()
    entries |= further_models()
    assert measured.keys() == {f"`{name}`" for name in entries}
    for name, (_, _, count) in entries.items():
        row = measured[f"`{name}`"]
        assert int(row[1]) == count
        assert float(row[2]) < 1e-5
