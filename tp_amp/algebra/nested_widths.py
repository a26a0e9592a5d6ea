"""Errors of widths that are given up block by block, in an order that is fixed. Pure algebra."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the mean diagonal: what makes a covariance of few tokens positive definite.
_JITTER = 1e-10


def nested_errors(covariance: Tensor, weight: Tensor, order: Tensor) -> Tensor:
    """The output error with the first 0, 1, ... inputs kept and the others rebuilt from them.

    `y = W h` with covariance `C = L L^T` of `h`, in the order in which inputs are kept. Column `j`
    of `L` is what input `j` adds to all inputs beyond those before it, so that without the inputs
    from `k` on the best affine reconstruction leaves `sum over j >= k of |W L_:j|^2`.

    Args:
        covariance: of the inputs, `(inputs, inputs)`.
        weight: of the layer that reads them, `(outputs, inputs)`.
        order: the inputs, those kept longest first, `(inputs,)`.

    Returns:
        The mean squared error of the output, `(inputs + 1,)`.

    Example:
        >>> covariance = torch.diag(torch.tensor([1.0, 4.0]))
        >>> errors = nested_errors(covariance, torch.eye(2), torch.tensor([1, 0]))
        >>> errors.round(decimals=6).tolist()
        [5.0, 1.0, 0.0]
    """
    order = order.to(covariance.device)
    ordered = _definite(covariance.double()[order][:, order])
    added = weight.to(ordered)[:, order] @ torch.linalg.cholesky(ordered)
    gains = added.square().sum(0)
    left = gains.flip(0).cumsum(0).flip(0)
    return torch.cat([left, left.new_zeros(1)])


def block_order(covariance: Tensor, weight: Tensor, width: int) -> Tensor:
    """Order blocks of inputs so that each next one removes most of the output error that is left.

    As `reconstruction_order` does with single inputs: with `R` the covariance that those kept leave
    of all inputs, block `b` lowers the error by `tr(W R_:b R_bb^-1 R_b: W^T)`.

    Args:
        covariance: of the inputs, `(inputs, inputs)`, block after block.
        weight: of the layer that reads them, `(outputs, inputs)`.
        width: inputs of each block.

    Returns:
        The blocks, the best first, `(inputs / width,)`; of gains that are equal the lower index.

    Example:
        >>> covariance = torch.diag(torch.tensor([1.0, 1.0, 4.0, 1.0]))
        >>> block_order(covariance, torch.eye(4), 2).tolist()
        [1, 0]
    """
    residual = _definite(covariance.double())
    weight = weight.to(residual)
    left = list(range(len(residual) // width))
    order: list[int] = []
    while left:
        taken = []  # of each block, what it would take of all inputs
        for block in left:
            own = slice(block * width, (block + 1) * width)
            factor = torch.linalg.cholesky(_definite(residual[own, own]))
            taken.append(torch.linalg.solve_triangular(factor, residual[own], upper=False))
        gains = [float((weight @ rows.mT).square().sum()) for rows in taken]
        best = max(range(len(gains)), key=gains.__getitem__)
        residual = residual - taken[best].mT @ taken[best]
        order.append(left.pop(best))
    return torch.tensor(order)


def _definite(covariance: Tensor) -> Tensor:
    """A covariance of few tokens with its smallest directions lifted over the rounding."""
    scale = covariance.diagonal().clamp_min(0).mean().clamp_min(torch.finfo(torch.double).tiny)
    return covariance + _JITTER * scale * torch.eye(len(covariance)).to(covariance)
