"""The width search of AMP: bisection on the entropy. Pure: it knows no model."""

from __future__ import annotations

from collections.abc import Callable

from tp_amp.reports.numbers import Probe


def search_width(
    entropy: Callable[[int], float],
    width: int,
    *,
    reference: float,
    max_increase: float,
    steps: int = 6,
    minimum: int = 1,
    round_to: int = 1,
    first: int | None = None,
) -> list[Probe]:
    """Bisect for the smallest width whose entropy exceeds `reference` by at most `max_increase`.

    The AMP search: left=0, right=width; `steps` times mid=(left+right)//2; accepted: right=mid,
    else left=mid. With `round_to`, left, mid and right count multiples of it.

    Args:
        entropy: gives the entropy (nats) of the model with that many hidden channels.
        width: of the dense layer, which is never tried.
        reference: entropy (nats) of the last accepted model.
        max_increase: allowed increase (nats), signed: a decrease is always accepted.
        steps: how many widths are tried at most.
        minimum: the smallest width to try.
        round_to: widths tried are multiples of it.
        first: the width to try first, where one is foreseen, instead of the middle.

    Returns:
        The probes in the order tried; the last accepted one holds the width found, and without an
        accepted one the layer stays dense.

    Example:
        >>> probes = search_width(lambda w: 1.0 / w, 8, reference=0.0, max_increase=0.2)
        >>> [(probe.width, probe.accepted) for probe in probes]
        [(4, False), (6, True), (5, True)]
    """
    left, right = _ends(width, minimum, round_to)
    probes: list[Probe] = []
    while len(probes) < steps and right - left > 1:
        middle = (left + right) // 2
        if first is not None and not probes:
            middle = _within(first, left, right, round_to)
        value = entropy(middle * round_to)
        accepted = value - reference <= max_increase
        probes.append(Probe(middle * round_to, value, accepted))
        left, right = (left, middle) if accepted else (middle, right)
    return probes


def most_probes(
    width: int, *, steps: int, minimum: int = 1, round_to: int = 1, first: int | None = None
) -> int:
    """How many widths `search_width` tries at most."""
    left, right = _ends(width, minimum, round_to)
    if right - left <= 1:
        return 0
    halvings = (right - left - 1).bit_length()
    if first is not None:
        middle = _within(first, left, right, round_to)
        halvings = 1 + (max(middle - left, right - middle) - 1).bit_length()
    return min(steps, halvings)


def _ends(width: int, minimum: int, round_to: int) -> tuple[int, int]:
    """Between which two multiples of `round_to` the width lies; the second is the dense one."""
    return -(-minimum // round_to) - 1, -(-width // round_to)


def _within(first: int, left: int, right: int, round_to: int) -> int:
    return min(max(-(-first // round_to), left + 1), right - 1)


def accepted(probes: list[Probe]) -> Probe | None:
    """Give the narrowest accepted probe, or None."""
    return next((probe for probe in reversed(probes) if probe.accepted), None)
