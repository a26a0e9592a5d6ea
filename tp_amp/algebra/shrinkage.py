"""Second moments of few samples, drawn to their diagonal. Pure algebra."""

from __future__ import annotations

import torch
from torch import Tensor


class SampleMoments:
    """The mean of matrices S, one of each sample, and how far it can be trusted.

    A mean of few samples has large eigenvalues that are too large and small ones that are too
    small or nought, which would make errors in these directions free. Ledoit and Wolf (2004) mix it
    with a simple matrix, by as much as minimises the expected squared distance from the mean of
    endlessly many samples; that matrix is here its own diagonal (Schaefer and Strimmer 2005, target
    D), so that channels keep their scales. S may be any positive semi-definite matrix, here the sum
    over the tokens of one image.

    Attributes:
        count: number of samples.
        total: the sum of S, `(channels, channels)`; `squares`: of the squares beside its diagonal.

    Example:
        >>> rows = torch.randn(1000, 5, dtype=torch.double)
        >>> mean = SampleMoments().add(rows, 1000).shrunk()
        >>> bool((mean - torch.eye(5)).norm() < 0.5)
        True
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = self.squares = torch.zeros(())

    def add(self, rows: Tensor, samples: int) -> SampleMoments:
        """Add the rows of some samples, sample after sample; S is the sum of their products.

        Args:
            rows: `(rows, channels)`; where they are no whole samples, all are one.
            samples: how many they are of.
        """
        parts = samples if samples and len(rows) % samples == 0 else 1
        for part in rows.double().chunk(parts):
            product = part.T @ part
            self.total = self.total + product
            self.squares = self.squares + _beside(product)
        self.count += samples
        return self

    def shrunk(self) -> Tensor:
        """The mean of S, drawn to its diagonal; a single sample tells no more than that."""
        mean = self.total / self.count
        diagonal = torch.diag(mean.diagonal())
        away = _beside(mean)
        if self.count == 1 or not float(away) > 0:
            return diagonal
        # What the mean of so many samples varies by, from how far these lie from it.
        noise = (self.squares / self.count - away) / (self.count - 1)
        share = (noise / away).clamp(0, 1)
        return (1 - share) * mean + share * diagonal


def _beside(matrix: Tensor) -> Tensor:
    """The sum of squares beside the diagonal."""
    return matrix.square().sum() - matrix.diagonal().square().sum()
