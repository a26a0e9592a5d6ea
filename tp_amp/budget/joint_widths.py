"""The widths of all kinds within one budget, with the smallest sum of foreseen errors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from torch import Tensor

from tp_amp.budget.allocation import allocate, width_choices
from tp_amp.budget.budget import Budget

# A stream's widths to choose from: so many, from such a share of it up.
_POINTS = 24
_LEAST = 1 / 8
_ROUNDS = 3  # through all streams, each in turn
_Widths = dict[str, int]


def smallest(budget: Budget, streams: Collection[str] = ()) -> _Widths:
    """The smallest widths that may be chosen."""
    return {
        name: stream_choices(width, budget.steps[name])[0]
        if name in streams
        else int(width_choices(width, budget.steps[name], budget.least[name])[0])
        for name, width in budget.widths.items()
    }


def stream_choices(width: int, step: int) -> list[int]:
    """Widths of a stream: multiples, evenly spread, and the dense one.

    Example:
        >>> stream_choices(16, 4)
        [4, 8, 12, 16]
    """
    points = (_LEAST + (1 - _LEAST) * i / _POINTS for i in range(_POINTS))
    multiples = {max(1, round(width * share / step)) * step for share in points}
    return sorted({max(2, kept) for kept in multiples if kept < width} | {width})


def joint_widths(
    budget: Budget, errors: Mapping[str, Tensor], streams: Collection[str] = ()
) -> _Widths:
    """The widths within a budget of the smallest sum of errors.

    What a channel costs depends on how wide the stream is that it reads and writes: so for each
    width of the stream on a grid all others are chosen anew, and the best mix is taken. Of several
    streams (one for each stage of a Swin) all keep the same share first, and then each is chosen in
    turn.

    Args:
        budget: what the widths cost, and how much they may.
        errors: name -> error with 0, 1, ... channels or heads kept, `(width + 1,)`.
        streams: those of them that are residual streams.

    Raises:
        ValueError: no widths are within the budget.
    """
    if not streams:
        return _within(budget, errors, {})
    choices = {name: stream_choices(budget.widths[name], budget.steps[name]) for name in streams}
    points = max(map(len, choices.values()))
    alike = [
        {n: kept[i * len(kept) // points] for n, kept in choices.items()} for i in range(points)
    ]
    best = _best(budget, errors, alike)
    for _ in range(_ROUNDS if len(choices) > 1 else 0):
        before = best
        for name, kept in choices.items():
            fixed = {stream: best[stream] for stream in choices}
            best = _best(budget, errors, [fixed, *({**fixed, name: width} for width in kept)])
        if best == before:
            break
    return best


def _best(budget: Budget, errors: Mapping[str, Tensor], tried: list[_Widths]) -> _Widths:
    """Of some widths of the streams those with which all others lose least."""
    found: list[tuple[float, int, _Widths]] = []
    least = smallest(budget)
    for place, fixed in enumerate(tried):
        if budget.cost({**least, **fixed}) > budget.amount:
            continue
        widths = _within(budget, errors, fixed)
        lost = math.fsum(float(errors[name][width]) for name, width in widths.items())
        found.append((lost, place, widths))
    return min(found)[2]


def _within(budget: Budget, errors: Mapping[str, Tensor], fixed: _Widths) -> _Widths:
    """The widths of all others where those of the streams are fixed.

    Where two of them share layers, what they save alone is too much: they are given as much less as
    it takes for all of them together.
    """
    free = {name: curve for name, curve in errors.items() if name not in fixed}
    if not free:
        return fixed
    costs = {name: budget.costs(name, fixed) for name in free}
    spent = budget.separate_cost({**fixed, **dict.fromkeys(free, 0)}, fixed)

    def within(amount: float) -> _Widths:
        left = amount - spent
        found = allocate(free, costs, left, budget.steps, budget.least, budget.together)
        return {**fixed, **found}

    widths, high = within(budget.amount), budget.amount
    if budget.cost(widths) <= budget.amount * (1 + 1e-9):
        return widths
    widths = {**smallest(budget), **fixed}
    low = budget.separate_cost(widths, fixed)
    for _ in range(60):
        middle = (low + high) / 2
        found = within(middle)
        if budget.cost(found) <= budget.amount:
            low, widths = middle, found
        else:
            high = middle
    return widths
