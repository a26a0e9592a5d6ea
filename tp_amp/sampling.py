"""Means of a finite population, from some of its values. Pure: it knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor

SMALLEST = 24  # values before the first look: fewer tell too little of the skewness
GROWTH = 1.5  # from look to look


class Estimate(NamedTuple):
    """The mean of a population, estimated from some of its values."""

    mean: float
    error: float  # standard error
    deviation: float  # standard deviation of the residuals
    skewness: float  # of the residuals
    freedom: int

    def distance(self, limit: float) -> float:
        """How far the mean lies above a limit, as a Student's t.

        With Hall's correction of the skewness (J. R. Stat. Soc. B 54, 1992, 221-228): the few
        images that lose most are often missing in a small sample, which then seems too sure.
        """
        gap = self.mean - limit
        if self.error == 0:
            return math.copysign(math.inf, gap) if gap else 0.0
        size = (self.deviation / self.error) ** 2  # of an infinite population's sample
        skewed, gap = self.skewness, gap / self.deviation
        gap += skewed * gap**2 / 3 + skewed**2 * gap**3 / 27 + skewed / (6 * size)
        return math.sqrt(size) * gap


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


def estimate_mean(values: Tensor, total: int, known: Tensor | None = None) -> Estimate:
    """Estimate the mean of a finite population of which some values are drawn, none twice.

    The sample mean with the finite-population correction, or with a variable that is known of the
    whole population, the linear regression estimator (Cochran, Sampling Techniques, 1977, 2.8 and
    7.1 to 7.3).

    Args:
        values: drawn, `(n,)`.
        total: size of the population.
        known: of the whole population, the n drawn first, `(total,)`.

    Example:
        >>> import torch
        >>> found = estimate_mean(torch.tensor([1.0, 2.0, 3.0]), total=3)
        >>> found.mean, found.error
        (2.0, 0.0)
    """
    count, values = len(values), values.double()
    mean, residuals = float(values.mean()), values - values.mean()
    spread, freedom = 1 / count, count - 1
    if known is not None:
        known = known.double()
        deviations = known[:count] - known[:count].mean()
        offset = float(known.mean() - known[:count].mean())
        squares = float(deviations @ deviations)
        if squares > 0:
            slope = float(deviations @ residuals) / squares
            residuals, freedom = residuals - slope * deviations, count - 2
            mean, spread = mean + slope * offset, spread + offset**2 / squares
    deviation = math.sqrt(float(residuals @ residuals) / freedom)
    skewness = float((residuals / deviation).pow(3).mean()) if deviation else 0.0
    error = deviation * math.sqrt(max(0.0, spread - 1 / total))
    return Estimate(mean, error, deviation, skewness, freedom)


def looks(sizes: Sequence[int]) -> list[int]:
    """After which batches a verdict may come: the numbers of values grow geometrically.

    Fewer looks each have more of the error probability.

    Args:
        sizes: values of each batch.

    Example:
        >>> looks([16] * 16)
        [2, 3, 5, 8, 12]
    """
    found, wanted = [], float(SMALLEST)
    for batches, seen in enumerate(accumulate(sizes[:-1]), 1):
        if seen >= wanted:
            found.append(batches)
            wanted = GROWTH * seen
    return found
