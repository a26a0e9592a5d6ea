"""Gains against the hull found by trying every price of a channel."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tp_amp.algebra.falling_gains import falling_gains


def errors_of(seed: int, width: int, share_of_nothing: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    falls = torch.rand(width, generator=generator, dtype=torch.float64) ** 3
    falls[torch.rand(width, generator=generator) < share_of_nothing] = 0
    return torch.cat([falls.sum()[None], falls.sum() - falls.cumsum(0)]).clamp_min(0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("nothing", [0.0, 0.4])
def test_channels_above_a_price_are_the_width_that_is_best_at_it(seed: int, nothing: float) -> None:
    errors = errors_of(seed, 12, nothing)
    gains = falling_gains(errors)
    for price in torch.linspace(1e-3, 1.1, 97, dtype=torch.float64):
        best = int((errors + price * torch.arange(13)).argmin())
        assert int((gains > price).sum()) == best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "errors",
    [
        [5.0, 5.0, 5.0],
        [3.0, 2.0, 1.0, 0.0],
        [0.0, 0.0],
        [9.0, 8.0, 1.0, 0.5, 0.5, 0.5],
        [1.0, 2.0, 0.0],
        [1e-20, 5e-21, 0.0],
    ],
)
def test_gains_fall_strictly_also_where_they_are_equal_or_nothing(
    errors: list[float], dtype: torch.dtype
) -> None:
    gains = falling_gains(torch.tensor(errors, dtype=dtype))
    assert bool((gains[1:] < gains[:-1]).all())
    assert torch.isfinite(gains).all()
    assert float(gains.clamp_min(0).sum()) == pytest.approx(max(0, errors[0] - errors[-1]))


def test_one_threshold_leaves_the_smallest_sum_of_the_hulls() -> None:
    """Of two layers, by trying all pairs of widths with as many channels together."""
    one, two = errors_of(1, 9), errors_of(2, 7)
    hulls = [torch.cat([e[:1], e[0] - falling_gains(e).cumsum(0)]) for e in (one, two)]
    scores = torch.cat([falling_gains(one), falling_gains(two)])
    for count in range(17):
        threshold = scores.sort(descending=True).values[:count]
        kept = [int(torch.isin(g, threshold).sum()) for g in scores.split([9, 7])]
        left = float(hulls[0][kept[0]] + hulls[1][kept[1]])
        pairs = itertools.product(range(10), range(8))
        best = min(float(hulls[0][a] + hulls[1][b]) for a, b in pairs if a + b == count)
        assert left == pytest.approx(best, abs=1e-9)
