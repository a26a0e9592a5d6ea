"""Widths that meet a target size with the smallest loss, from the errors of every width."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch
from torch import Tensor


def allocate(
    errors: Mapping[str, Tensor],
    costs: Mapping[str, Tensor],
    budget: float,
    steps: Mapping[str, int] = MappingProxyType({}),
    least: Mapping[str, int] = MappingProxyType({}),
    together: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, int]:
    """Choose widths whose cost is within a budget, with the smallest sum of errors.

    With one price for a unit of cost, each layer takes the width that minimises its error plus what
    the width costs; the price is found by bisection. That is optimal among all widths on the lower
    convex hulls of the errors over the costs. What is left of the budget goes where it lowers the
    error most.

    Args:
        errors: name -> error with 0, 1, ... channels kept, `(width + 1,)`.
        costs: name -> cost of 0, 1, ... channels, `(width + 1,)`, never falling.
        budget: for the sum of the costs.
        steps: name -> what its widths are multiples of, where that is more than 1.
        least: name -> its smallest width, where that is not 1.
        together: name -> another that has no channel where it has none, and only there.

    Returns:
        Name -> width.

    Raises:
        ValueError: the budget is below the cost of the smallest widths.

    Example:
        >>> errors = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([1.0, 0.5, 0.0])}
        >>> allocate(errors, {"a": torch.arange(3.0), "b": torch.arange(3.0)}, budget=3)
        {'a': 2, 'b': 1}
    """
    choices = {
        n: width_choices(len(values) - 1, steps.get(n, 1), least.get(n, 1))
        for n, values in errors.items()
    }

    def widths(price: float) -> dict[str, int]:
        paid = {name: errors[name] + price * costs[name] for name in errors}
        best = {name: int(kept[paid[name][kept].argmin()]) for name, kept in choices.items()}
        for name, other in together.items():
            both = {n: choices[n][choices[n] > 0] for n in (name, other)}
            some = {n: int(kept[paid[n][kept].argmin()]) for n, kept in both.items()}
            none = sum(float(paid[n][0]) for n in some)
            goes = none <= sum(float(paid[n][width]) for n, width in some.items())
            best |= dict.fromkeys(some, 0) if goes else some
        return best

    def cost(price: float) -> float:
        return _total(costs, widths(price))

    low, high = 0.0, 1e-12
    while cost(high) > budget:
        low, high = high, 4 * high
        if high > 1e30:
            raise ValueError(
                f"a budget of {budget:.4g} can't be met: the smallest widths cost {cost(high):.4g}"
            )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > budget else (low, middle)
    return _filled(widths(high), errors, costs, budget, choices, {*together, *together.values()})


def _total(costs: Mapping[str, Tensor], widths: Mapping[str, int]) -> float:
    return math.fsum(float(costs[name][width]) for name, width in widths.items())


def _filled(
    widths: dict[str, int],
    errors: Mapping[str, Tensor],
    costs: Mapping[str, Tensor],
    budget: float,
    choices: Mapping[str, Tensor],
    together: Collection[str],
) -> dict[str, int]:
    """Widen one layer after the other by one step, as long as that fits the budget.

    What goes together with another stays away.
    """
    left = budget - _total(costs, widths)
    while True:
        best: tuple[float, str, int] | None = None
        for name, width in widths.items():
            wider = _next(choices[name], width)
            if wider is None or (not width and name in together):
                continue
            price = float(costs[name][wider] - costs[name][width])
            if price > left:
                continue
            gain = float(errors[name][width] - errors[name][wider]) / max(price, 1e-30)
            if best is None or gain > best[0]:
                best = gain, name, wider
        if best is None:
            return widths
        _, name, wide = best
        left -= float(costs[name][wide] - costs[name][widths[name]])
        widths[name] = wide


def _next(kept: Tensor, width: int) -> int | None:
    """The next larger width to choose."""
    place = int(torch.searchsorted(kept, width, right=True))
    return int(kept[place]) if place < len(kept) else None


def width_choices(width: int, step: int, least: int = 1) -> Tensor:
    """The widths to choose from: multiples from the smallest one on, and the dense one."""
    multiples = torch.arange(min(-(-least // step), width // step + 1), width // step + 1) * step
    return (
        multiples
        if len(multiples) and multiples[-1] == width
        else torch.cat([multiples, torch.tensor([width])])
    )
