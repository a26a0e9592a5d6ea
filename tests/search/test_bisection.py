import math
import random

import pytest

from tp_amp.reports.numbers import Probe
from tp_amp.search.bisection import accepted, search_width


def paper_search(entropy, hidden, reference, max_increase, steps):
    """The algorithm as the paper's code has it, transcribed from its description."""
    left, right, result = 0, hidden, hidden
    for _ in range(steps):
        mid = (left + right) // 2
        if mid in (left, right):
            break
        if entropy(mid) - reference <= max_increase:
            right = result = mid
        else:
            left = mid
    return result


@pytest.mark.parametrize("seed", range(50))
def test_equals_the_papers_loop(seed: int) -> None:
    generator = random.Random(seed)
    hidden = generator.randint(1, 300)
    noise = [generator.gauss(0, 0.2) for _ in range(hidden + 1)]  # not monotone
    steps, allowed = generator.randint(1, 10), generator.random()

    def entropy(width: int) -> float:
        return 3 * (1 - width / hidden) + noise[width]

    probes = search_width(entropy, hidden, reference=0.1, max_increase=allowed, steps=steps)
    best = accepted(probes)
    found = best.width if best else hidden
    assert found == paper_search(entropy, hidden, 0.1, allowed, steps)
    assert len(probes) <= steps


def test_decrease_is_accepted_without_tolerance() -> None:
    probes = search_width(lambda width: width / 8, 8, reference=1.0, max_increase=0.0, steps=6)
    assert [probe.width for probe in probes] == [4, 2, 1]


def test_monotone_entropy_gives_the_smallest_width_within_tolerance() -> None:
    for limit in range(1, 64):
        probes = search_width(
            lambda width, limit=limit: 0.0 if width >= limit else 1.0,
            64,
            reference=0.0,
            max_increase=0.5,
            steps=10,
        )
        assert accepted(probes).width == limit


def test_worked_example_of_the_poster() -> None:
    probes = search_width(lambda w: float(w < 5), 8, reference=0.0, max_increase=0.5)
    assert probes == [Probe(4, 1.0, False), Probe(6, 0.0, True), Probe(5, 0.0, True)]


@pytest.mark.parametrize("round_to", [1, 3, 8, 16, 100])
@pytest.mark.parametrize("minimum", [1, 7, 20, 61])
def test_rounding_and_minimum(round_to: int, minimum: int) -> None:
    probes = search_width(
        lambda _: 0.0,
        61,
        reference=0.0,
        max_increase=0.0,
        steps=20,
        minimum=minimum,
        round_to=round_to,
    )
    assert all(p.width % round_to == 0 and minimum <= p.width < 61 for p in probes)
    allowed = [w for w in range(minimum, 61) if w % round_to == 0]
    best = accepted(probes)
    assert (best.width if best else None) == (min(allowed) if allowed else None)


def test_nan_is_rejected() -> None:
    probes = search_width(lambda _: math.nan, 8, reference=0.0, max_increase=1.0)
    assert accepted(probes) is None


@pytest.mark.parametrize("first", [1, 5, 12, 20, 40])
def test_the_foreseen_width_is_tried_first(first: int) -> None:
    """Where the entropy falls with the width, the same width is found from any start."""
    tried = search_width(
        lambda width: 1.0 / width, 20, reference=0.0, max_increase=0.1, steps=20, first=first
    )
    assert tried[0].width == min(first, 19)
    assert min(probe.width for probe in tried if probe.accepted) == 10


def test_most_probes_are_at_least_those_of_any_search() -> None:
    from tp_amp.search.bisection import most_probes, search_width

    for width in range(2, 40):
        for steps in (1, 3, 6):
            for first in (None, 1, width // 2, width):
                most = most_probes(width, steps=steps, first=first)
                for goal in range(width):
                    tried = search_width(
                        lambda w, goal=goal: float(w < goal),
                        width,
                        reference=0.0,
                        max_increase=0.5,
                        steps=steps,
                        first=first,
                    )
                    assert len(tried) <= most
