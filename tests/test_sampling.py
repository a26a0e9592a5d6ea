"""Estimates of means, against scipy, least squares and many draws."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from tp_amp.sampling import Estimate, difference, estimate_mean, looks, t_quantile

NOTHING = torch.zeros(10**6, 0)  # no variable is known of a large population


def estimated(values: Tensor, known: Tensor) -> Estimate:
    means = known.double().mean(0)
    return estimate_mean(values, known[: len(values)], means, len(known))


@pytest.mark.parametrize("freedom", [8, 9, 15, 40, 1000])
@pytest.mark.parametrize("probability", [0.2, 0.05, 0.005, 0.001])
def test_quantiles_are_those_of_scipy(probability: float, freedom: int) -> None:
    expected = scipy.stats.t.isf(probability, freedom)
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=0.02)


def population(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two known variables, and two that go with them and with each other."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    old = known @ torch.tensor([1.0, -0.5], dtype=torch.float64) + noise[:, 0]
    new = old + 0.3 * known[:, 0] + 0.5 * noise[:, 1]
    return known, new, old


def test_estimate_is_that_of_least_squares() -> None:
    known, values, _ = population(0, 50)
    columns = torch.cat([torch.ones(20, 1), known[:20] - known.mean(0)], 1)
    fit = torch.linalg.lstsq(columns, values[:20, None])
    residuals = values[:20] - (columns @ fit.solution)[:, 0]
    spread = torch.linalg.inv(columns.T @ columns)[0, 0] - 1 / 50
    found = estimated(values[:20], known)
    assert found.mean == pytest.approx(float(fit.solution[0]))
    assert found.spread == pytest.approx(float(spread))
    assert found.variance == pytest.approx(float(spread * residuals.square().sum() / 17))
    torch.testing.assert_close(found.residuals, residuals)
    torch.testing.assert_close(found.slopes, fit.solution[1:, 0])
    assert found.freedom == 17


def test_variables_that_are_the_same_do_not_matter() -> None:
    known, values, _ = population(0, 50)
    once = estimated(values[:20], known[:, :1])
    twice = estimated(values[:20], known[:, [0, 0]])
    assert twice.mean == pytest.approx(once.mean)
    assert twice.spread == pytest.approx(once.spread)


def test_of_the_whole_population_the_mean_is_known() -> None:
    known, values, other = population(1, 20)
    found = estimated(values, known)
    assert found.mean == pytest.approx(float(values.mean()))
    assert found.variance == 0
    both = difference(values, other, known)
    assert both.mean == pytest.approx(float((values - other).mean()))
    assert both.error == 0


def test_what_differs_by_a_constant_is_certain_from_a_few() -> None:
    known, values, _ = population(3, 200)
    for few, many in ((12, 12), (12, 60)):
        found = difference(values[:few] + 2, values[:many], known)
        assert (found.mean, found.error) == (pytest.approx(2), pytest.approx(0, abs=1e-9))
        found = difference(values[:many], values[:few] + 2, known)
        assert (found.mean, found.error) == (pytest.approx(-2), pytest.approx(0, abs=1e-9))


ZEROS = torch.zeros(20)  # constant, and so no help


def test_distance_without_skewness_is_students_t() -> None:
    values = torch.linspace(-1, 1, 20, dtype=torch.float64)
    expected = scipy.stats.ttest_1samp(values.numpy(), 0.25).statistic
    found = difference(values, ZEROS, NOTHING)
    # One variable more is fitted: one degree of freedom less.
    assert found.distance(0.25) == pytest.approx(expected * math.sqrt(18 / 19), rel=1e-4)


def test_skewness_is_that_of_the_mean() -> None:
    """A sum of independent terms has the sum of their third moments."""
    values = torch.tensor([0.0] * 19 + [1.0], dtype=torch.float64)
    expected = scipy.stats.skew(values.numpy()) / math.sqrt(20)
    assert difference(values, ZEROS, NOTHING).skewness == pytest.approx(expected, rel=1e-6)
    assert difference(ZEROS, values, NOTHING).skewness == pytest.approx(-expected, rel=1e-6)


@pytest.mark.parametrize(("drawn", "before"), [(30, 30), (30, 70), (70, 30), (120, 30), (30, 120)])
@pytest.mark.parametrize("variables", [0, 2])
def test_error_is_that_of_many_draws(drawn: int, before: int, variables: int) -> None:
    known, new, old = population(2, 120)
    generator = torch.Generator().manual_seed(3)
    errors, squares = [], []
    for _ in range(2000):
        order = torch.randperm(120, generator=generator)
        found = difference(new[order[:drawn]], old[order[:before]], known[order, :variables])
        errors.append(found.mean - float((new - old).mean()))
        squares.append(found.error**2)
    variance = torch.tensor(errors).square().mean()
    # The standard error of a variance of 2000 draws is 3 %.
    assert float(torch.tensor(squares).mean()) == pytest.approx(float(variance), rel=0.12)
    assert abs(float(torch.tensor(errors).mean())) < 4 * math.sqrt(float(variance) / 2000)


def test_looks_grow_geometrically_and_never_come_after_the_last_batch() -> None:
    assert looks([3] * 70) == [8, 16, 32, 64]
    assert looks([64, 64]) == [1]
    assert looks([16, 8]) == []
