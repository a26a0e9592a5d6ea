"""Corrections judged on the half of the images that they were not solved on. Pure algebra."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import torch
from torch import Tensor

from tp_amp.algebra.closed_form import RIDGE, Correction, Method, correct
from tp_amp.algebra.moments import Halves, Moments

# Multiples of the ridge that are tried where tokens are few.
STRONGER = (1.0, 30.0, 1e3, 3e4)
# Shares of a layer's width that are judged on images held out, beside none of it.
_JUDGED = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
# Of an error on the images fitted: up to there, others are fitted as well.
_ALIKE = 1.5
Solve = Callable[[Moments], Correction]


def expected_error(correction: Correction, moments: Moments) -> float:
    """Mean squared error of a corrected layer's output on any tokens, from their moments alone.

    With `D` and `s` what is added to weight and bias, `E |r - D x - s|^2` is
    `tr(C_rr) - 2 tr(D C_xr) + tr(D C_xx D^T)` around the means, and what is left of the means.
    """
    added, moved = correction.weight, moments.mean_residuals.square().sum()
    spread = (added * (added @ moments.inputs - 2 * moments.cross)).sum()
    left = moments.mean_residuals - added @ moments.mean_inputs
    if correction.bias is not None:
        left = left - correction.bias
    return moments.squares + float(spread - moved + left.square().sum())


def held_out_error(solve: Solve, halves: Halves) -> float:
    """The error on each half of what is solved on the other, the mean over all tokens.

    Returns:
        The error; infinite where one half has no tokens, so that nothing could be judged.
    """
    first, second = halves.each
    if not first.count or not second.count:
        return math.inf
    errors = expected_error(solve(second), first), expected_error(solve(first), second)
    return (errors[0] * first.count + errors[1] * second.count) / (first.count + second.count)


def solvers(method: Method, *, bias: bool, ridge: float, name: str) -> list[Solve]:
    """How a layer may be corrected: as asked for, with stronger ridges, by means alone, not."""

    def solver(method: Method, ridge: float) -> Solve:
        return lambda moments: correct(moments, method, bias=bias, ridge=ridge, name=name)

    asked = [solver(method, (ridge or RIDGE) * factor) for factor in STRONGER]
    if ridge == 0:
        asked.insert(0, solver(method, 0.0))
    return [*asked, solver("mean", 0.0), solver("none", 0.0)]


def best_correction(
    halves: Halves, method: Method, *, bias: bool = True, ridge: float = RIDGE, name: str = ""
) -> Correction:
    """Solve as asked for, or as errs least on images held out where these are fitted worse.

    Few tokens are fitted exactly and others badly, and tokens of one image that are much alike
    count as few. So the ridge, the means alone, or no correction at all is chosen by
    `held_out_error`, and then solved on all tokens. Where a single image is all there is, nothing
    can be held out; if it has few tokens, the means alone are corrected.

    Args:
        halves: of the cut layer.
        method: `"none"`, `"mean"` or `"affine"`.
        bias: whether the layer has a bias to correct.
        ridge: the smallest lambda, relative to the mean diagonal of the inputs' second moment.
        name: module path, for the log.

    Raises:
        ValueError: the moments are of no tokens.
    """
    whole = halves.whole
    asked = solvers(method, bias=bias, ridge=ridge, name=name)
    as_asked = asked[0](whole)
    if method != "affine":
        return as_asked
    error = held_out_error(asked[0], halves)
    if not math.isfinite(error):
        return correct(whole, "mean", bias=bias, name=name) if halves.few else as_asked
    if error <= _ALIKE * as_asked.error:
        return as_asked
    errors = [error, *(held_out_error(solve, halves) for solve in asked[1:])]
    return asked[errors.index(min(errors))](whole)


def foreseen_errors(errors: Tensor, order: Tensor, halves: Halves, weight: Tensor) -> Tensor:
    """What every width is foreseen to leave on other images than those that foresee it.

    Where tokens are few, `errors` promises too much: as many channels as tokens rebuild these
    exactly. There some widths are fitted on one half of the images and judged on the other, and
    between them what has to be added is interpolated. A wider layer is never foreseen worse.

    Args:
        errors: of every width on the images themselves, `(hidden + 1,)`.
        order: the channels, the best first, `(hidden,)`.
        halves: of all channels.
        weight: of the layer that reads them, `(outputs, hidden)`.
    """
    if not halves.few:
        return errors
    hidden = len(order)
    widths = sorted({0} | {max(1, int(hidden * share)) for share in _JUDGED} - {hidden})
    added = []
    for width in widths:
        cut = halves.after_cut(weight, order[:width].tolist())
        judged = min(
            held_out_error(solve, cut)
            for solve in solvers("affine", bias=True, ridge=RIDGE, name=halves.name)
        )
        if not math.isfinite(judged):  # a single image
            judged = correct(cut.whole, "mean").error
        added.append(max(0.0, judged - float(errors[width])))
    # Where nothing is cut, nothing is lost on any images.
    missing = numpy.interp(range(hidden + 1), [*widths, hidden], [*added, 0.0])
    return (errors + torch.from_numpy(missing).to(errors)).cummin(0).values
