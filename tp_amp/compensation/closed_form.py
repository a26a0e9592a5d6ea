"""Closed-form compensation: what cut channels said, rebuilt from the kept ones. Pure algebra."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Method = Literal["none", "mean", "affine"]
METHODS = ("none", "mean", "affine")
RIDGE = 1e-4
# A spread below this share of the mean is rounding in float32: what is fitted to it takes weights
# so large that nothing of the sums is left.
_ROUNDING = 1e-6


# Count, tokens, two means, and sums of products around the means.
State = tuple[float, int, tuple[Tensor, Tensor], tuple[Tensor, Tensor, float]]


class Moments:
    """Streaming moments of a cut layer's inputs x and of the residuals r that it leaves.

    r is what the layer should have given minus what it gives. All sums are in float64, so batches
    may be of any size, and no activation is kept.

    Args:
        name: module path of the layer, for errors.

    Attributes:
        count: number of tokens, or the sum of their weights.
        mean_inputs: `(inputs,)`; `mean_residuals`: `(outputs,)`.
        inputs: second moment of x around `mean_inputs`, `(inputs, inputs)`, divided by `count`.
        cross: of r and x, `(outputs, inputs)`.
        squares: mean of |r|^2.

    Example:
        >>> moments = Moments().add(torch.randn(50, 3), torch.randn(50, 2))
        >>> correct(moments, "affine").weight.shape
        torch.Size([2, 3])
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.count = 0.0
        self.tokens = 0
        self.squares = 0.0

    def add(self, inputs: Tensor, residuals: Tensor, weights: Tensor | None = None) -> Moments:
        """Add tokens: `(tokens, inputs)`, `(tokens, outputs)` and maybe weights `(tokens,)`.

        Raises:
            ValueError: the weights are not one for each token.
        """
        if weights is not None and weights.shape != (len(inputs),):
            raise ValueError(
                f"{self.name}: found {weights.numel()} weights for {len(inputs)} tokens; "
                "token_weights must give one for each token that the layer reads"
            )
        if weights is not None:  # what padding holds must not matter, be it NaN
            seen = weights > 0
            inputs, residuals, weights = inputs[seen], residuals[seen], weights[seen]
        x, r = inputs.double(), residuals.double()
        w = x.new_ones(len(x)) if weights is None else weights.to(x)
        count = float(w.sum())
        if count <= 0:
            return self
        means = (w @ x) / count, (w @ r) / count
        x, r = x - means[0], r - means[1]
        weighted = x * w[:, None]
        batch = weighted.T @ x, r.T @ weighted, float((w @ r.square()).sum())
        return self.merge((count, len(x), means, batch))

    def state(self) -> State | None:
        """Count, tokens, means and sums, for `merge`; None without any token."""
        return (self.count, self.tokens, self._means, self._sums) if self.count else None

    def merge(self, other: State) -> Moments:
        """Add other tokens by Chan's parallel update, which loses no digits to large means."""
        count, tokens, means, batch = other
        self.tokens += tokens
        if not self.count:
            self._means, self._sums, self.count = means, batch, count
        else:
            total = self.count + count
            x, r = means[0] - self._means[0], means[1] - self._means[1]
            share = self.count * count / total
            self._sums = (
                self._sums[0] + batch[0] + share * torch.outer(x, x),
                self._sums[1] + batch[1] + share * torch.outer(r, x),
                self._sums[2] + batch[2] + share * float(r @ r),
            )
            self._means = (
                self._means[0] + x * (count / total),
                self._means[1] + r * (count / total),
            )
            self.count = total
        self.mean_inputs, self.mean_residuals = self._means
        self.inputs, self.cross = (s / self.count for s in self._sums[:2])
        self.squares = self._sums[2] / self.count + float(self.mean_residuals.square().sum())
        return self

    def after_cut(self, weight: Tensor, keep: Sequence[int]) -> Moments:
        """The moments that a layer has once its inputs are cut, from those of all its inputs.

        Args:
            weight: of the dense layer, `(outputs, inputs)`.
            keep: indices of the inputs that stay.
        """
        weight = weight.detach().to(self.inputs)
        dropped = torch.ones(len(self.mean_inputs), dtype=torch.bool, device=weight.device)
        index = torch.as_tensor(keep, device=weight.device)
        dropped[index] = False
        lost = weight[:, dropped]
        cut = Moments(self.name)
        cut.count, cut.tokens = self.count, self.tokens
        cut.mean_inputs, cut.inputs = self.mean_inputs[index], self.inputs[index][:, index]
        cut.mean_residuals = lost @ self.mean_inputs[dropped]
        cut.cross = lost @ self.inputs[dropped][:, index]
        spread = ((lost @ self.inputs[dropped][:, dropped]) * lost).sum()
        cut.squares = float(spread + cut.mean_residuals.square().sum())
        return cut


@dataclass(frozen=True)
class Correction:
    """What to add to a cut layer, and the mean squared error of its output.

    Attributes:
        weight: `(outputs, inputs)`.
        bias: `(outputs,)`, None where there is none to add to.
        error_before: mean of |r|^2 without the correction; `error`: with it, as it was solved for
            (what is refined afterwards has another).
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
        ValueError: the moments are of no tokens.
    """
    if not moments.count:
        raise ValueError(f"{name} was given no tokens to fit on; check the token weights")
    nothing = torch.zeros_like(moments.cross)
    before = moments.squares
    if method == "none" or (method == "mean" and not bias):
        return Correction(nothing, None, before, before)
    mean_squares = float(moments.mean_residuals.square().sum())
    if method == "mean":
        return Correction(nothing, moments.mean_residuals, before, before - mean_squares)
    spread = moments.inputs.diagonal()
    varies = (spread > (_ROUNDING * moments.mean_inputs).square()).to(spread)
    second = moments.inputs * torch.outer(varies, varies)
    cross, left = moments.cross * varies, before - mean_squares
    if not bias:
        second = moments.inputs + torch.outer(moments.mean_inputs, moments.mean_inputs)
        cross = moments.cross + torch.outer(moments.mean_residuals, moments.mean_inputs)
        left = before
    solution, ridge = _solve(second, cross, ridge, name)
    gained = 2 * (solution * cross).sum() - ((solution @ second) * solution).sum()
    shift = moments.mean_residuals - solution @ moments.mean_inputs if bias else None
    return Correction(solution, shift, before, left - float(gained), ridge)


def _solve(second: Tensor, cross: Tensor, ridge: float, name: str) -> tuple[Tensor, float]:
    """Solve B (second + lambda I) = cross; lambda grows tenfold until Cholesky succeeds."""
    diagonal = float(second.diagonal().mean())
    if diagonal <= 0:  # the kept channels are constant: nothing can be rebuilt from them
        return torch.zeros_like(cross), ridge
    unit = torch.eye(len(second), dtype=second.dtype, device=second.device)
    used = ridge
    while True:
        factor, failed = torch.linalg.cholesky_ex(second + used * diagonal * unit)
        if not int(failed):
            break
        used = max(10 * used, 1e-12)
    if used != ridge:
        logger.warning("%s: the ridge was raised from %g to %g for a solution", name, ridge, used)
    solution: Tensor = torch.cholesky_solve(cross.T, factor).T
    return solution, used
