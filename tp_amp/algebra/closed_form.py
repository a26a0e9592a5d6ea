"""Closed-form compensation: what cut channels said, rebuilt from the kept ones. Pure algebra."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tp_amp.algebra.moments import Moments

logger = logging.getLogger(__name__)

Method = Literal["none", "mean", "affine"]
METHODS = ("none", "mean", "affine")
RIDGE = 1e-4
# A spread below this share of the mean is rounding in float32: what is fitted to it takes weights
# so large that nothing of the sums is left.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Correction:
    """What to add to a cut layer, and the mean squared error that it leaves.

    Attributes:
        weight: `(outputs, inputs)`.
        bias: `(outputs,)`, None where there is none to add to.
        error_before: mean squared error without the correction, of the layer's output or of the
            residual stream that it adds to; `error`: with it, as it was solved for (what is refined
            afterwards has another).
        ridge: the lambda used, relative to the mean diagonal.
    """

    weight: Tensor
    bias: Tensor | None
    error_before: float
    error: float
    ridge: float = 0.0

    def plus(self, added: Mapping[str, Tensor]) -> Correction:
        """The correction with more added; its errors stay those of the solution before.

        Args:
            added: what to add to `"weight"` and maybe to `"bias"`, as the layer's own have it.
        """
        bias = added.get("bias", self.bias)
        if self.bias is not None and "bias" in added:
            bias = self.bias + added["bias"]
        return replace(self, weight=self.weight + added["weight"].view_as(self.weight), bias=bias)


def correct(
    moments: Moments, method: Method, *, bias: bool = True, ridge: float = RIDGE, name: str = ""
) -> Correction:
    """Solve for the correction of a cut layer that leaves the smallest output error.

    `mean`: b += mean of r. `affine`: with B the ridge regression of r on x, W += B and
    b += mean of r - B (mean of x), which for r = W_P h_P is the centred solution of CORP
    (arXiv 2602.05243); without a bias, the uncentred one of GRAIL.

    Args:
        moments: of the cut layer.
        method: `"none"`, `"mean"` or `"affine"`.
        bias: whether the layer has a bias to correct.
        ridge: lambda relative to the mean diagonal of the inputs' second moment.
        name: module path, for the log.

    Raises:
        ValueError: the moments are of no tokens, or not finite.
    """
    if not moments.count:
        raise ValueError(f"{name} was given no tokens to fit on; check the token weights")
    inputs, cross = moments.inputs, moments.cross
    if not bool(torch.isfinite(inputs).all() and torch.isfinite(cross).all()):
        raise ValueError(
            f"what {name} reads, or should give, is not finite; check the images for NaN"
        )
    nothing = torch.zeros_like(cross)
    before = moments.squares
    if method == "none" or (method == "mean" and not bias):
        return Correction(nothing, None, before, before)
    mean_squares = float(moments.mean_residuals.square().sum())
    if method == "mean":
        return Correction(nothing, moments.mean_residuals, before, before - mean_squares)
    if bias:
        spread = inputs.diagonal()
        varies = (spread > (_ROUNDING * moments.mean_inputs).square()).to(spread)
        inputs = inputs * varies * varies[:, None]
        cross, left = cross * varies, before - mean_squares
    else:
        inputs = inputs + torch.outer(moments.mean_inputs, moments.mean_inputs)
        cross = cross + torch.outer(moments.mean_residuals, moments.mean_inputs)
        left = before
    solution, ridge = _solve(inputs, cross, ridge, name)
    gained = 2 * (solution * cross).sum() - ((solution @ inputs) * solution).sum()
    shift = moments.mean_residuals - solution @ moments.mean_inputs if bias else None
    return Correction(solution, shift, before, left - float(gained), ridge)


def _solve(second: Tensor, cross: Tensor, ridge: float, name: str) -> tuple[Tensor, float]:
    """Solve B (second + lambda I) = cross; lambda grows tenfold until Cholesky succeeds."""
    diagonal = float(second.diagonal().mean()) if len(second) else 0.0
    if diagonal <= 0:  # the kept channels are constant, or none: nothing can be rebuilt from them
        return torch.zeros_like(cross), ridge
    used = ridge
    while True:
        raised = second.clone()
        raised.diagonal().add_(used * diagonal)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not int(failed):
            break
        used = max(10 * used, 1e-12)
    if used != ridge:
        logger.warning("%s: the ridge was raised from %g to %g for a solution", name, ridge, used)
    solution: Tensor = torch.cholesky_solve(cross.T, factor).T
    return solution, used
