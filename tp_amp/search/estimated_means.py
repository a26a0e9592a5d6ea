"""Means of a finite population, from some of its values. Pure: it knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 24  # values before the first look: fewer tell too little of the skewness
GROWTH = 1.5  # from look to look


class EstimatedMean(NamedTuple):
    """The mean of a population, estimated from some of its values."""

    mean: float
    error: float  # standard error
    skewness: float  # of the error
    freedom: int

    def distance(self, limit: float) -> float:
        """How far the mean lies above a limit, as a Student's t.

        With Hall's correction of the skewness (J. R. Stat. Soc. B 54, 1992, 221-228): the few
        images that lose most are often missing in a small sample, which then seems too sure.
        """
        gap = self.mean - limit
        if self.error == 0:
            return math.copysign(math.inf, gap) if gap else 0.0
        t, skewed = gap / self.error, self.skewness
        return t + skewed * t**2 / 3 + skewed**2 * t**3 / 27 + skewed / 6


def t_quantile(probability: float, freedom: int) -> float:
    """Upper quantile of Student's t.

    Example:
        >>> round(t_quantile(0.025, 20), 2)
        2.09
    """
    from scipy.special import stdtrit

    return -float(stdtrit(freedom, probability))


def estimate_mean(values: Tensor, known: Tensor) -> EstimatedMean:
    """Estimate the mean of a finite population of which some values are drawn, none twice.

    The linear regression estimator with the finite-population correction (Cochran, Sampling
    Techniques, 1977, 2.8 and 7.1 to 7.3).

    Args:
        values: drawn, `(n,)`.
        known: variables of the whole population, those drawn first, `(total, variables)`; without
            variables the sample mean.

    Example:
        >>> import torch
        >>> values, nothing = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 0)
        >>> found = estimate_mean(values, nothing)
        >>> round(found.mean, 6), found.error
        (2.0, 0.0)
    """
    count, values, known = len(values), values.double(), known.double()
    ones = torch.ones(count, 1, dtype=torch.float64)
    columns = torch.cat([ones, known[:count] - known.mean(0)], 1)
    inverse = torch.linalg.pinv(columns)
    fitted = inverse @ values
    residuals = values - columns @ fitted
    # Below 1e-12 it is rounding.
    spread = float(inverse[0] @ inverse[0]) - 1 / len(known)
    spread = spread if spread * count > 1e-12 else 0.0
    freedom, square = count - columns.shape[1], float(residuals @ residuals)
    skewness = float(residuals.pow(3).sum()) / square**1.5 if spread and square else 0.0
    return EstimatedMean(float(fitted[0]), math.sqrt(spread * square / freedom), skewness, freedom)


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
