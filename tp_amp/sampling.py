"""Means of a finite population, from some of its values. Pure: it knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 24  # values before the first look: fewer tell too little of the skewness
GROWTH = 2.0  # from look to look


class Estimate(NamedTuple):
    """The mean of a population, estimated from some of its values."""

    mean: float
    spread: float  # variance of the mean, by that of the residuals
    residuals: Tensor  # `(n,)`
    freedom: int
    slopes: Tensor  # by which the known variables enter, `(variables,)`

    @property
    def variance(self) -> float:
        """Of the mean."""
        return self.spread * float(self.residuals @ self.residuals) / self.freedom


class Difference(NamedTuple):
    """The difference of two means of a population."""

    mean: float
    error: float  # standard error
    skewness: float  # of the error
    freedom: int

    def distance(self, limit: float) -> float:
        """How far the difference lies above a limit, as a Student's t.

        With Hall's correction of the skewness (J. R. Stat. Soc. B 54, 1992, 221-228): the few
        images that lose most are often missing in a small sample, which then seems too sure.
        """
        gap = self.mean - limit
        if self.error == 0:
            return math.copysign(math.inf, gap) if gap else 0.0
        t, skewed = gap / self.error, self.skewness
        return t + skewed * t**2 / 3 + skewed**2 * t**3 / 27 + skewed / 6


def t_quantile(probability: float, freedom: int) -> float:
    """Upper quantile of Student's t, to 1 % from 8 degrees of freedom on.

    The expansion around the normal quantile (Abramowitz and Stegun 1964, 26.7.5).

    Example:
        >>> round(t_quantile(0.025, 20), 2)
        2.09
    """
    z = -NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def estimate_mean(values: Tensor, known: Tensor, means: Tensor, total: int) -> Estimate:
    """Estimate the mean of a finite population of which some values are drawn, none twice.

    The linear regression estimator with the finite-population correction (Cochran, Sampling
    Techniques, 1977, 2.8 and 7.1 to 7.3).

    Args:
        values: drawn, `(n,)`.
        known: variables of the same, `(n, variables)`; without variables the sample mean.
        means: of the variables in the population, `(variables,)`.
        total: size of the population.

    Example:
        >>> import torch
        >>> values, nothing = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 0)
        >>> found = estimate_mean(values, nothing, torch.zeros(0), total=3)
        >>> round(found.mean, 6), found.spread
        (2.0, 0.0)
    """
    count, values = len(values), values.double()
    ones = torch.ones(count, 1, dtype=torch.float64)
    columns = torch.cat([ones, known.double() - means], 1)
    inverse = torch.linalg.pinv(columns)
    fitted = inverse @ values
    residuals = values - columns @ fitted
    # Below 1e-12 it is rounding.
    spread = float(inverse[0] @ inverse[0]) - 1 / total
    spread = spread if spread * count > 1e-12 else 0.0
    return Estimate(float(fitted[0]), spread, residuals, count - columns.shape[1], fitted[1:])


def difference(new: Tensor, old: Tensor, known: Tensor) -> Difference:
    """Estimate the difference of two means of one population.

    The variable that was drawn less often is regressed on the other too, which counts as known but
    for its own error: errors in common cancel (maximum likelihood where each sample holds the
    next, Anderson, J. Am. Stat. Assoc. 52, 1957, 200-203).

    Args:
        new: drawn, `(n,)`.
        old: drawn, the same first, `(m,)`.
        known: variables of the whole population, those drawn first, `(total, variables)`.

    Example:
        >>> import torch
        >>> values, nothing = torch.tensor([1.0, 3.0, 2.0, 7.0]), torch.zeros(9, 0)
        >>> found = difference(values + 1, values, nothing)
        >>> round(found.mean, 6), round(found.error, 6)
        (1.0, 0.0)
    """
    few, many, sign = (new, old, 1.0) if len(new) <= len(old) else (old, new, -1.0)
    total, means = len(known), known.double().mean(0)
    other = estimate_mean(many, known[: len(many)], means, total)
    both = torch.cat([known[: len(few)].double(), many[: len(few), None].double()], 1)
    center = torch.cat([means, torch.tensor([other.mean], dtype=torch.float64)])
    found = estimate_mean(few, both, center, total)
    left = float(found.slopes[-1]) - 1  # of the other's error
    variance = found.variance + left**2 * other.variance
    influence = left * other.spread * other.residuals
    influence[: len(few)] += found.spread * found.residuals
    square = float(influence @ influence)
    skewness = sign * float(influence.pow(3).sum()) / square**1.5 if square else 0.0
    return Difference(
        sign * (found.mean - other.mean),
        math.sqrt(variance),
        skewness,
        found.freedom,
    )


def looks(sizes: Sequence[int]) -> list[int]:
    """After which batches a verdict may come: the numbers of values grow geometrically.

    Fewer looks each have more of the error probability.

    Args:
        sizes: values of each batch.

    Example:
        >>> looks([16] * 16)
        [2, 4, 8]
    """
    found, wanted = [], float(SMALLEST)
    for batches, seen in enumerate(accumulate(sizes[:-1]), 1):
        if seen >= wanted:
            found.append(batches)
            wanted = GROWTH * seen
    return found
