"""Estimates of means, against scipy, least squares and many draws."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from tp_amp.search.estimated_means import estimate_mean, looks, t_quantile

NOTHING = torch.zeros(10**6, 0)  # no variable is known of a large population


@pytest.mark.parametrize("probability", [0.7, 0.2, 0.05, 0.001])
def test_quantiles_are_those_of_the_closed_forms(probability: float) -> None:
    """Cauchy's distribution with one degree of freedom, and the algebraic one with two."""
    p = probability
    assert t_quantile(p, 1) == pytest.approx(1 / math.tan(math.pi * p))
    assert t_quantile(p, 2) == pytest.approx((1 - 2 * p) / math.sqrt(2 * p * (1 - p)))


def population(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Two known variables, and one that goes with them."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    old = known @ torch.tensor([1.0, -0.5], dtype=torch.float64) + noise[:, 0]
    return known, old + 0.3 * known[:, 0] + 0.5 * noise[:, 1]


def test_estimate_is_that_of_least_squares() -> None:
    known, values = population(0, 50)
    columns = torch.cat([torch.ones(20, 1), known[:20] - known.mean(0)], 1)
    fit = torch.linalg.lstsq(columns, values[:20, None])
    residuals = values[:20] - (columns @ fit.solution)[:, 0]
    spread = torch.linalg.inv(columns.T @ columns)[0, 0] - 1 / 50
    found = estimate_mean(values[:20], known)
    assert found.mean == pytest.approx(float(fit.solution[0]))
    assert found.error**2 == pytest.approx(float(spread * residuals.square().sum() / 17))
    # A sum of independent terms has the sum of their third moments.
    skewness = scipy.stats.skew(residuals.numpy()) / math.sqrt(20)
    assert found.skewness == pytest.approx(skewness, rel=1e-6)
    assert found.freedom == 17


def test_variables_that_are_the_same_do_not_matter() -> None:
    known, values = population(0, 50)
    once = estimate_mean(values[:20], known[:, :1])
    twice = estimate_mean(values[:20], known[:, [0, 0]])
    assert twice.mean == pytest.approx(once.mean)
    scale = math.sqrt(once.freedom / twice.freedom)  # one degree of freedom less
    assert twice.error == pytest.approx(scale * once.error)


def test_of_the_whole_population_the_mean_is_known() -> None:
    known, values = population(1, 20)
    found = estimate_mean(values, known)
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.error == 0


def test_what_follows_from_the_known_is_certain_from_a_few() -> None:
    known, _ = population(3, 200)
    found = estimate_mean(known[:12, 0] + 2, known)
    assert found.mean == pytest.approx(2 + float(known[:, 0].mean()))
    assert found.error == pytest.approx(0, abs=1e-9)


def test_distance_without_skewness_is_students_t() -> None:
    values = torch.linspace(-1, 1, 20, dtype=torch.float64)
    expected = scipy.stats.ttest_1samp(values.numpy(), 0.25).statistic
    assert estimate_mean(values, NOTHING).distance(0.25) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("drawn", [30, 70, 119])
@pytest.mark.parametrize("variables", [0, 2])
def test_error_is_that_of_many_draws(drawn: int, variables: int) -> None:
    known, values = population(2, 120)
    generator = torch.Generator().manual_seed(3)
    errors, squares = [], []
    for _ in range(2000):
        order = torch.randperm(120, generator=generator)
        found = estimate_mean(values[order[:drawn]], known[order, :variables])
        errors.append(found.mean - float(values.mean()))
        squares.append(found.error**2)
    variance = torch.tensor(errors).square().mean()
    # The standard error of a variance of 2000 draws is 3 %.
    assert float(torch.tensor(squares).mean()) == pytest.approx(float(variance), rel=0.12)
    assert abs(float(torch.tensor(errors).mean())) < 4 * math.sqrt(float(variance) / 2000)


def test_looks_grow_geometrically_and_never_come_after_the_last_batch() -> None:
    assert looks([3] * 70) == [8, 12, 18, 27, 41, 62]
    assert looks([64, 64]) == [1]
    assert looks([16, 8]) == []
