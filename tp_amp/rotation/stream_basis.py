"""Coordinates of a residual stream in which leading channels hold the most. Pure algebra."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StreamBasis:
    """New coordinates of a stream.

    Attributes:
        rotation: what the stream is multiplied by, orthogonal, `(width, width)`.
        errors: second moment that is lost if this many leading channels are kept, `(width + 1,)`.
    """

    rotation: Tensor
    errors: Tensor


def stream_basis(moments: Tensor, *, centred: bool) -> StreamBasis:
    """The rotation after which cutting trailing channels is truncating principal components.

    Where a LayerNorm reads the stream, the rotation Q must leave the all-ones vector in place. With
    the principal directions V orthogonal to it, the first one first, and the Helmert matrix H,
    Q = H^T [V, 1/sqrt(d)]^T: component j lies in channels 1 to j + 1 alone, so that k channels hold
    the first k - 1 components; of all others a multiple of the all-ones vector is left, which the
    norm takes out. Elsewhere Q holds the principal directions themselves.

    Args:
        moments: second moments of the stream, as it is read, `(width, width)`.
        centred: whether a LayerNorm reads it.

    Example:
        >>> basis = stream_basis(torch.diag(torch.tensor([1.0, 4.0, 1.0])), centred=False)
        >>> basis.errors
        tensor([6., 2., 1., 0.])
        >>> turned = stream_basis(torch.diag(torch.tensor([1.0, 4.0, 1.0])), centred=True)
        >>> torch.allclose(turned.rotation @ torch.ones(3), torch.ones(3))
        True
    """
    width = len(moments)
    if not centred:
        values, vectors = torch.linalg.eigh(moments)
        return StreamBasis(vectors.flip(-1).mT, _errors(values.flip(-1)))
    rows = helmert(width).to(moments)
    inside = rows[:-1] @ moments @ rows[:-1].mT  # in the coordinates of what sums to zero
    values, vectors = torch.linalg.eigh(inside)
    principal = torch.cat([vectors.flip(-1).mT @ rows[:-1], rows[-1:]])
    lost = _errors(values.flip(-1))
    return StreamBasis(rows.mT @ principal, torch.cat([lost[:1], lost]))


def helmert(width: int) -> Tensor:
    """The orthogonal matrix with rows (1, ..., 1, -j, 0, ..., 0) / sqrt(j (j + 1)), ones last.

    Example:
        >>> helmert(2)
        tensor([[ 0.7071, -0.7071],
                [ 0.7071,  0.7071]], dtype=torch.float64)
    """
    order = torch.arange(1, width, dtype=torch.double)
    rows = torch.ones(width, width, dtype=torch.double).tril()[: width - 1]
    rows = torch.cat([rows, rows.new_ones(1, width)])
    rows[torch.arange(width - 1), torch.arange(1, width)] = -order
    return rows / rows.square().sum(1, keepdim=True).sqrt()


def _errors(values: Tensor) -> Tensor:
    """What is lost with each number of leading components."""
    lost = values.clamp_min(0).flip(-1).cumsum(-1).flip(-1)
    return torch.cat([lost, lost.new_zeros(1)])
