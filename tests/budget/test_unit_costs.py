"""What is counted once and what twice."""

from __future__ import annotations

import pytest
import torch

from tp_amp.budget.unit_costs import UnitCosts

# Two layers of 5 x 7 and 7 x 3 weights: the first width is shared by both.
COSTS = UnitCosts(56.0, {"outer": 7.0, "inner": 8.0}, {("inner", "outer"): 1.0})


@pytest.mark.parametrize(("inner", "outer"), [(0, 0), (1, 2), (6, 4)])
def test_sites_with_a_layer_in_common_save_its_corner_once(inner: int, outer: int) -> None:
    """Of a 5 x 7 matrix and a 7 x 3 one, by the sizes that are left."""
    left = (5 - outer) * (7 - inner) + (7 - inner) * 3
    alone = 8.0 * inner + 7.0 * outer
    assert 56 - alone + COSTS.twice("inner", 8.0 * inner, {"outer": outer}) == left
    assert 56 - alone + COSTS.twice("outer", 7.0 * outer, {"inner": inner}) == left


def test_all_savings_at_once_and_in_other_units() -> None:
    milliseconds = torch.tensor([0.0, 0.8, 1.6])
    torch.testing.assert_close(
        COSTS.twice("inner", milliseconds, {"outer": 2}), torch.tensor([0.0, 0.2, 0.4])
    )
    assert COSTS.twice("inner", 3.0, {"another": 2}) == 0
