"""Coordinates of an attention's heads in which leading channels hold the most. Pure algebra."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Directions in which nothing was seen have this share of the largest eigenvalue.
_LEAST = 1e-7


@dataclass(frozen=True)
class Basis:
    """New coordinates of each head.

    Attributes:
        first: what queries, or values, are multiplied by, `(heads, width, width)`.
        second: the same for keys; or what the projection is multiplied by from the right.
        errors: mean squared error of the logits before scaling, or of the projection's output, if
            this many leading channels are kept, summed over the heads: `(width + 1,)`.
    """

    first: Tensor
    second: Tensor
    errors: Tensor


def query_key_basis(queries: Tensor, keys: Tensor) -> Basis:
    """The coordinates in which the first r channels give the logits of least squared error.

    With queries and keys drawn independently of each other, E (q.k - q'.k')^2 of rank r is least
    for the r largest singular values of Gq^1/2 Gk^1/2 = A S B^T; q' = S^1/2 A^T Gq^-1/2 q and
    k' = S^1/2 B^T Gk^-1/2 k. With all channels q'.k' = q.k.

    Args:
        queries: second moments Gq of each head, `(heads, width, width)`.
        keys: Gk; around their mean, since the softmax does not see what all keys share.

    Example:
        >>> basis = query_key_basis(torch.eye(2)[None], torch.diag(torch.tensor([1.0, 4.0]))[None])
        >>> basis.errors
        tensor([5., 1., 0.])
    """
    (root, inverse), (other, _) = _root(queries), _root(keys)
    left, values, _ = torch.linalg.svd(root @ other)
    scale = torch.maximum(values, _least(values)).sqrt()[..., None]
    # S^1/2 B^T Gk^-1/2 is the inverse of the other, transposed: exactly so in this form.
    return Basis(scale * (left.mT @ inverse), (left.mT @ root) / scale, _errors(values.square()))


def value_output_basis(averages: Tensor, projection: Tensor) -> Basis:
    """The coordinates in which the first r channels give the projection's output of least error.

    Reduced-rank regression of each head's part of the output on its own input a: with the SVD of
    Wo Ga^1/2 = A S B^T, v' = B^T Ga^-1/2 v and Wo' = A S.

    Args:
        averages: second moments Ga of each head's averaged values, `(heads, width, width)`.
        projection: its part of the projection's weight, `(heads, outputs, width)`.

    Example:
        >>> basis = value_output_basis(torch.eye(2)[None], torch.tensor([[[0.0, 3.0], [1.0, 0.0]]]))
        >>> basis.errors
        tensor([10.,  1.,  0.])
    """
    root, inverse = _root(averages)
    weighed = projection @ root
    squares, vectors = torch.linalg.eigh(weighed.mT @ weighed)
    right = vectors.flip(-1)
    return Basis(right.mT @ inverse, root @ right, _errors(squares.flip(-1).clamp_min(0)))


def _root(moments: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric square root of each matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(moments)
    scale = torch.maximum(values, _least(values)).sqrt()[..., None, :]
    return (vectors * scale) @ vectors.mT, (vectors / scale) @ vectors.mT


def _least(values: Tensor) -> Tensor:
    """What each head's values are raised to; 1 where all of them are zero."""
    largest = values.amax(-1, keepdim=True)
    return torch.where(largest > 0, largest * _LEAST, 1.0)


def _errors(squares: Tensor) -> Tensor:
    """What is lost with each number of leading channels, of squared singular values."""
    lost = squares.flip(-1).cumsum(-1).flip(-1).sum(0)
    return torch.cat([lost, lost.new_zeros(1)])
