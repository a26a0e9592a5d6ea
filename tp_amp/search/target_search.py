"""Meet a size in a few passes of the search: each tolerance is foreseen from the probes so far."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from tp_amp.budget.budget import Budget
from tp_amp.reports.numbers import Probe
from tp_amp.search.bisection import accepted
from tp_amp.search.width_search import Found, WidthSearch

logger = logging.getLogger(__name__)

PASSES = 3  # of the search, at most; the widths are then filled up to the target
CORRECTIONS = 2  # of widths whose latency is another than foreseen
_LEAST, _MOST = 1e-12, 1e6  # tolerances (nats)

Widths = dict[str, int]
# Width -> rise of the entropy over the model before it, from the dense width down, never falling.
Curve = list[tuple[int, float]]


def search_target(search: WidthSearch, budget: Budget, start: float) -> tuple[Found, float]:
    """Search with the tolerance that comes closest to a target, and fill widths up to it.

    Args:
        search: is run three times at most.
        budget: what widths cost, and how much they may.
        start: the tolerance to begin with (nats).

    Returns:
        What is kept, and the tolerance, infinite where the smallest widths were filled up.

    Raises:
        ValueError: the smallest widths cost more than they may.
    """
    smallest = search.tried.smallest(search.sites)
    budget.check(smallest)
    runs: dict[float, Found] = {}

    def run(increase: float) -> tuple[Widths, dict[str, list[Probe]]]:
        found = runs[increase] = search.run(budget.tolerances(increase))
        return found.widths, found.probes

    increase, widths = meet_target(
        budget,
        run,
        start=start,
        entropy=search.dense_entropy,
        smallest=smallest,
        steps=budget.steps,
    )
    # The smallest widths are of no pass; those of the last one come closest.
    found = runs.get(increase, runs[next(reversed(runs))])
    widths = corrected(budget, widths, found.best, smallest=smallest, steps=budget.steps)
    if widths != found.widths:
        found.keep = found.best(widths)
        logger.info(
            "no tolerance gives the target itself; with the widths between two of them the "
            "entropy is %.4f, that of the dense model %.4f",
            search.judge(found.keep),
            search.dense_entropy,
        )
    budget.confirm(found.keep)
    return found, increase


def meet_target(
    budget: Budget,
    run: Callable[[float], tuple[Widths, Mapping[str, Sequence[Probe]]]],
    *,
    start: float,
    entropy: float,
    smallest: Widths,
    steps: Mapping[str, int],
) -> tuple[float, Widths]:
    """Find the tolerance whose widths come closest to a target, and fill them up to it.

    Args:
        budget: what widths cost, and how much they may.
        run: searches with a tolerance (nats); gives the widths, and by layer the widths tried.
        start: the tolerance to begin with (nats).
        entropy: of the dense model (nats).
        smallest: the smallest widths that there are.
        steps: by layer, what its widths are multiples of.

    Returns:
        The tolerance of the widths that were filled up, infinite for the smallest ones, and the
        widths, of which one step more of any is above the target.
    """
    fails, meets = 0.0, math.inf
    wide, narrow = dict(budget.widths), dict(smallest)
    increase = start
    for left in reversed(range(PASSES)):
        widths, probes = run(increase)
        cost = budget.cost(widths)
        logger.info("max_increase %.3g gives %.4g %s", increase, cost, budget.unit)
        if cost <= budget.amount:
            if cost >= budget.cost(narrow):
                narrow, meets = widths, increase
            if budget.is_close(cost):
                break
        elif cost <= budget.cost(wide):
            wide, fails = widths, increase
        if left:
            increase = _next(budget, curves(probes, budget.widths, entropy), fails, meets)
    return meets, filled(budget, narrow, wide, steps)


def _next(budget: Budget, known: Mapping[str, Curve], fails: float, meets: float) -> float:
    """The tolerance at which the widths are foreseen to meet the target, between those known."""
    low, high = _LEAST, _MOST
    for _ in range(60):
        middle = math.sqrt(low * high)
        tolerances = budget.tolerances(middle)
        widths = {name: foreseen_width(known[name], tolerances[name]) for name in known}
        low, high = (low, middle) if budget.cost(widths) <= budget.amount else (middle, high)
    if fails < high < meets:
        return high
    if math.isinf(meets):
        return max(4 * fails, _LEAST)
    return math.sqrt(fails * meets) if fails else meets / 4


def curves(
    probes: Mapping[str, Sequence[Probe]], dense: Mapping[str, int], entropy: float
) -> dict[str, Curve]:
    """How the entropy rises as each layer gets narrower, from one pass of the search, in its order.

    Args:
        probes: by layer, the widths tried.
        dense: by layer, its width in the dense model.
        entropy: of the dense model (nats).
    """
    found: dict[str, Curve] = {}
    for name, tried in probes.items():
        curve: Curve = [(dense[name], 0.0)]
        for probe in sorted(tried, key=lambda probe: -probe.width):
            rise = probe.entropy - entropy if math.isfinite(probe.entropy) else math.inf
            curve.append((probe.width, max(rise, curve[-1][1])))
        found[name] = curve
        best = accepted(list(tried))
        entropy = best.entropy if best else entropy
    return found


def foreseen_width(curve: Curve, tolerance: float) -> int:
    """The smallest width whose rise is foreseen within a tolerance; linear between the probes."""
    for (wider, low), (narrower, high) in pairwise(curve):
        if high > tolerance:
            share = (tolerance - low) / (high - low)  # zero towards an infinite rise
            return math.ceil(wider - share * (wider - narrower))
    # Beyond the narrowest probe it goes on as between the last two.
    (wider, low), (narrower, high) = ([curve[0], *curve])[-2:]
    if high <= low:
        return 1
    slope = (high - low) / (wider - narrower)
    return max(1, math.ceil(narrower - (tolerance - high) / slope))


def filled(budget: Budget, narrow: Widths, wide: Widths, steps: Mapping[str, int]) -> Widths:
    """Widths between two, as wide as the budget allows: the same share of the way for each layer.

    Args:
        budget: what widths cost.
        narrow: widths that are within the budget.
        wide: widths that may be above it.
        steps: by layer, what its widths are multiples of.

    Returns:
        `narrow` itself where it is close to the target already.
    """
    if budget.is_close(budget.cost(narrow)):
        return narrow

    def between(share: float) -> Widths:
        return {
            name: _multiple(width + share * max(0, wide[name] - width), width, steps[name])
            for name, width in narrow.items()
        }

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _fits(budget, between(middle)) else (low, middle)
    widths = between(1.0 if _fits(budget, between(1.0)) else low)
    # What is left of the budget: a step more where one fits, the layers furthest from dense first.
    while True:
        wider = {
            name: min(width + steps[name], budget.widths[name])
            for name, width in sorted(
                widths.items(), key=lambda item: item[1] / budget.widths[item[0]]
            )
            if width < budget.widths[name]
        }
        step = next((n for n, w in wider.items() if _fits(budget, {**widths, n: w})), None)
        if step is None:
            return widths
        widths[step] = wider[step]


def corrected(
    budget: Budget,
    widths: Widths,
    keep: Callable[[Widths], Mapping[str, Sequence[int]]],
    *,
    smallest: Widths,
    steps: Mapping[str, int],
) -> Widths:
    """Widths whose latency as measured meets the target: each the same share narrower or wider.

    Args:
        budget: what widths cost; its table is corrected.
        widths: those found, that meet the target by the table.
        keep: gives the channels or heads to keep, by widths.
        smallest: the smallest widths that there are.
        steps: by layer, what its widths are multiples of.
    """
    for _ in range(CORRECTIONS):
        if not budget.correct(keep(widths)) or budget.cost(smallest) > budget.amount:
            break
        slow = budget.cost(widths) > budget.amount
        narrow, wide = (smallest, widths) if slow else (widths, budget.widths)
        widths = filled(budget, narrow, wide, steps)
    return widths


def _fits(budget: Budget, widths: Widths) -> bool:
    return budget.cost(widths) <= budget.amount


def _multiple(width: float, least: int, step: int) -> int:
    """The multiple of a step below a width, and no less than the width that is known to fit."""
    return max(least, math.floor(width / step + 1e-9) * step)
