"""Cholesky's factorisation of a covariance whose pivots lower the output error most, in panels."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-12  # a pivot below this share of the largest variance is rounding
PANEL = 64
TIED = 1e-12  # gains that agree this far are equal, and the lower index comes first
WORN = 1e-3  # what subtraction may wear down to this share is computed afresh where it matters
SHRUNK = 0.75  # matrices are copied without the neurons taken once no more than this is left


def gain_pivots(covariance: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Pivot on the neuron with the largest gain `|W R_:j|^2 / R_jj`, until all of `R` is rounding.

    A pivot changes `R` and `W R` by a matrix of rank one. Those of a panel are made together, by
    two products of matrices: memory is then read once for each panel, not for each pivot.

    Args:
        covariance: `C`, `(hidden, hidden)`, float64.
        product: `C W^T`, `(hidden, outputs)`, float64; it is overwritten.

    Returns:
        The pivots, the first one first, and the gain of each.
    """
    left, residual = covariance.diagonal().clone(), covariance.clone()
    smallest = left.max().clamp_min(0) * ROUNDING
    index = torch.arange(len(left), device=left.device)
    pivots, gains = [index[:0]], [left[:0]]
    while True:
        rest = (left > smallest).nonzero().flatten()
        if len(rest) <= SHRUNK * len(left):
            index, left, product = index[rest], left[rest], product[rest]
            residual = residual[rest][:, rest]
        panel = _Panel(residual, product, left, smallest)
        while panel.has_room() and (pivot := panel.best()) is not None:
            panel.take(pivot)
        factor, gained = panel.rows()
        if not len(factor):
            return torch.cat(pivots), torch.cat(gains)
        pivots.append(index[panel.taken])
        gains.append(gained.square().sum(1))
        residual.addmm_(factor.T, factor, alpha=-1)
        product.addmm_(factor.T, gained, alpha=-1)


class _Panel:
    """Pivots that have not been subtracted from `residual` and `product` yet; `left` is current.

    The rows of a pivot `p` are `f = R_p: / sqrt(R_pp)` and `g = W R_:p / sqrt(R_pp)`; the others go
    on with `R - f f^T` and `W R_:j - f_j g`. Only diagonal and squared norms are carried along:
    `|W R_:j - f_j g|^2 = |W R_:j|^2 - 2 f_j g . W R_:j + f_j^2 |g|^2`.
    """

    def __init__(self, residual: Tensor, product: Tensor, left: Tensor, smallest: Tensor) -> None:
        self.residual, self.product, self.left = residual, product, left
        self.smallest = smallest
        self.squares = _squares(product)
        self.peaks = self.squares.clone()  # largest so far: the rounding in `squares` is of theirs
        size = min(PANEL, len(left))
        self.factor = left.new_empty(size, len(left))
        self.gained = left.new_empty(size, product.shape[1])
        self.taken: list[int] = []

    def has_room(self) -> bool:
        return len(self.taken) < len(self.factor)

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.factor[: len(self.taken)], self.gained[: len(self.taken)]

    def best(self) -> int | None:
        """The neuron with the largest gain; None where there is none."""
        while True:
            free = self.left > self.smallest
            gain = torch.where(free, self.squares / self.left, -1)
            best = gain.max()
            worn = free & (WORN * self.peaks > best * self.left)
            first = (gain >= (1 - TIED) * best).int().argmax()
            # One transfer from the device.
            found = torch.stack([best, first.to(best), worn.any().to(best)]).tolist()
            if found[2]:
                self._compute_afresh(worn.nonzero().flatten())
            else:
                return int(found[1]) if found[0] >= 0 else None

    def _compute_afresh(self, neurons: Tensor) -> None:
        factor, gained = self.rows()
        now = self.product[neurons].addmm_(factor[:, neurons].T, gained, alpha=-1)
        self.squares[neurons] = self.peaks[neurons] = _squares(now)

    def take(self, pivot: int) -> None:
        factor, gained = self.rows()
        at, scale = factor[:, pivot], self.left[pivot].sqrt()
        f = (self.residual[pivot] - at @ factor) / scale
        g = (self.product[pivot] - at @ gained) / scale
        across = self.product @ g - (gained @ g) @ factor
        self.squares += f * (f * g.dot(g) - 2 * across)
        torch.maximum(self.peaks, self.squares, out=self.peaks)
        self.left -= f.square()
        self.left[pivot] = 0
        self.factor[len(self.taken)], self.gained[len(self.taken)] = f, g
        self.taken.append(pivot)


def _squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square()


def reconstruction_order(covariance: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Order neurons so that each next one removes most of the output error that is left.

    `y = W h` with covariance `C` of `h`. With the kept set `S`, the best affine reconstruction of
    the rest leaves the error `tr(W R W^T)`, `R = C - C_:S C_SS^-1 C_S:`. Taking neuron `j` as well
    lowers it by `|W R_:j|^2 / R_jj`. That is a Cholesky factorisation of `C` whose pivot is the
    neuron with the largest gain, made in panels of 64 pivots. Of gains that agree to twelve digits
    the lower index comes first. Beside its arguments it takes about three matrices of `C`'s size.

    Args:
        covariance: of the hidden activation, `(hidden, hidden)`.
        weight: of the layer that reads it, `(outputs, hidden)`.

    Returns:
        The neurons, the best first, `(hidden,)`; those that add nothing last, by index. And the
        mean squared error of the output with the first 0, 1, ... kept, `(hidden + 1,)`.

    Example:
        >>> import torch, tp_amp
        >>> covariance = torch.diag(torch.tensor([1.0, 4.0]))
        >>> order, errors = tp_amp.reconstruction_order(covariance, torch.eye(2))
        >>> order.tolist(), errors.tolist()
        ([1, 0], [5.0, 1.0, 0.0])
    """
    covariance, weight = covariance.double(), weight.to(covariance.device).double()
    product = covariance @ weight.T
    error = (product * weight.T).sum()
    first, gains = gain_pivots(covariance, product)
    rest = torch.ones(len(covariance), dtype=torch.bool, device=first.device)
    rest[first] = False
    falls = gains.new_zeros(len(covariance) + 1)
    falls[0], falls[1 : len(gains) + 1] = error, -gains
    # A sum that is made in parallel may rise by rounding.
    errors = falls.cumsum(0).cummin(0).values.clamp_min(0)
    return torch.cat([first, rest.nonzero().flatten()]).cpu(), errors
