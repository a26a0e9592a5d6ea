"""What errors cost, against quadratic forms by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tp_amp.compensation.costs import cost_factor, spread


@pytest.mark.parametrize("sizes", [[50], [7, 30, 13]])
def test_spread_is_the_sum_of_squares_around_the_mean(sizes: list[int]) -> None:
    values = 100 + torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    expected = float(np.var(values.double().numpy(), axis=0).sum() * 50)
    assert spread(values.split(sizes)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("known", [False, True])
def test_costs_are_those_of_the_sensitivity(known: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    sensitivity = root @ root.T if known else None
    factor = cost_factor(sensitivity, 5, torch.ones(()))
    error = torch.randn(5, generator=generator, dtype=torch.float64)
    expected = error @ error
    if sensitivity is not None:
        mean = sensitivity.diagonal().mean()
        expected = (error @ sensitivity @ error) / mean + 0.1 * expected
    assert float((error @ factor.double()).square().sum()) == pytest.approx(float(expected))


def test_what_is_scaled_on_its_way_costs_what_is_seen_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([2.0, -0.5, 1.0, 0.0], dtype=torch.float64)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    seen = root @ root.T
    seen[3], seen[:, 3] = 0, 0
    factor = cost_factor(seen * torch.outer(scale, scale), 4, scale)
    expected = seen / seen.diagonal().mean() + 0.1 * torch.eye(4)
    torch.testing.assert_close(factor @ factor.T, expected)
