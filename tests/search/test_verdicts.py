"""Verdicts on populations whose means are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tp_amp.importance.objectives import Objective
from tp_amp.search.bisection import accepted, search_width
from tp_amp.search.estimated_means import looks, t_quantile
from tp_amp.search.sequential_test import SequentialTest
from tp_amp.search.verdicts import Verdicts

LIMIT, WIDTH, STEP = 1.0, 64, 1.0


class Measured(SequentialTest):
    """A test whose entropies are given, image by image, and that tells how many were read."""

    def __init__(self, entropies: Callable[[str], Tensor], images: int, error: float) -> None:
        super().__init__(nn.Identity(), [], Objective("prediction"), error, {})
        self.entropies, self._images = entropies, [16] * (images // 16)
        self.ends = looks(self._images)
        self.measure("")

    def measure(self, state: str, enough: Callable[[], bool] = lambda: False) -> None:
        batches = self.entropies(state).split(16)
        while not self.complete(state):
            self._values[state] = list(batches[: self.measured(state) + 1])
            if self.measured(state) in self.ends and enough():
                return


def judged(verdicts: Verdicts, state: str, width: int) -> float:
    while (found := verdicts.judge(state, width)) is None:
        verdicts.measure(state, width)
    return found


def skewed(generator: torch.Generator, count: int) -> Tensor:
    """Of mean 0: a few images lose most."""
    values = torch.randn(count, generator=generator, dtype=torch.float64).square()
    return values - values.mean()


@pytest.mark.parametrize("error", [0.05, 0.2])
@pytest.mark.parametrize("way", ["alone", "near one is known", "reference of few images"])
def test_error_rate_is_at_most_the_bound(error: float, way: str) -> None:
    """The rise is farther from the tolerance than what a step changes, 1 / 32."""
    wrong, stopped, count = 0, 0, 400
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        off = (-0.1, -0.05, 0.05, 0.1)[seed % 4]
        base = torch.randn(512, generator=generator, dtype=torch.float64)
        noise, part = 0.5 * skewed(generator, 512), 0.15 * skewed(generator, 512)
        states = {"": base, "new": base + noise + LIMIT + off}
        states["near"] = states["new"] + part - off
        states["old"] = base + 0.5 * skewed(generator, 512)
        test = Measured(states.__getitem__, 512, error)
        verdicts, entropy = Verdicts(test), 0.0
        verdicts.begin("", entropy, LIMIT, WIDTH, STEP)
        if way == "near one is known":
            test.error_probability = 1e-300
            judged(verdicts, "near", 33)
            test.error_probability = error
            verdicts.begin("", 0.0, LIMIT, WIDTH, STEP)
        elif way == "reference of few images":
            states["new"] += states["old"] - base
            entropy = judged(verdicts, "old", 32)
            verdicts.begin("old", entropy, LIMIT, WIDTH, STEP)
        wrong += (judged(verdicts, "new", 32) - entropy <= LIMIT) != (off <= 0)
        stopped += test.forwards.used < test.forwards.plain
    # Three standard errors of the rate above the bound would be more than chance.
    assert wrong / count <= error + 3 * math.sqrt(error * (1 - error) / count)
    assert stopped > 0.2 * count


def curve(width: int, crossing: float) -> float:
    """Falls with the width, and ever slower; 1 at the crossing and 0 at `WIDTH`."""
    rate = 4 / WIDTH
    scale = math.exp(-rate * crossing) - math.exp(-rate * WIDTH)
    return (math.exp(-rate * width) - math.exp(-rate * WIDTH)) / scale


@pytest.mark.parametrize("crossing", [4.5, 20.3, 31.9, 32.1, 40.0, 57.5])
def test_width_is_within_a_step(crossing: float) -> None:
    """Five probes matter, each wrong with a probability of 0.01 at most."""
    far, used, plain, searches = 0, 0, 0, 40
    for seed in range(searches):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(1024, generator=generator, dtype=torch.float64)
        walk = [skewed(generator, 1024) for _ in range(WIDTH)]

        def entropies(state: str, base: Tensor = base, walk: list[Tensor] = walk) -> Tensor:
            """The nearer two widths, the nearer their entropies."""
            if not state:
                return base
            noise = torch.stack(walk[int(state) :]).sum(0) / 8
            return base + curve(int(state), crossing) * (1 + noise)

        test = Measured(entropies, 1024, 0.01)
        verdicts, dense = Verdicts(test), test.mean("")
        verdicts.begin("", dense, LIMIT, WIDTH, STEP)

        def entropy(width: int, verdicts: Verdicts = verdicts) -> float:
            return judged(verdicts, str(width), width)

        found = accepted(search_width(entropy, WIDTH, reference=dense, max_increase=LIMIT))
        assert found is not None
        far += abs(found.width - math.ceil(crossing)) > 1
        used, plain = used + test.forwards.used, plain + test.forwards.plain
    assert far / searches <= 0.05
    assert used < 0.7 * plain


def test_next_to_no_error_is_exact() -> None:
    base = torch.linspace(0, 1, 64, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    states = {"": base, "new": base + LIMIT - 1e-9 + skewed(generator, 64)}
    test = Measured(states.__getitem__, 64, 1e-300)
    verdicts = Verdicts(test)
    verdicts.begin("", test.mean(""), LIMIT, WIDTH, STEP)
    assert judged(verdicts, "new", 32) == test.mean("new")
    assert test.complete("new")


@pytest.mark.parametrize(("accepted_rise", "images"), [(LIMIT - 1e-9, 1024), (0.0, 32)])
def test_near_the_tolerance_is_judged_by_how_steep_the_entropy_is(
    accepted_rise: float, images: int
) -> None:
    """At the tolerance itself: only what a step changes tells how many images are needed."""
    base = torch.zeros(1024, dtype=torch.float64)
    noise = 0.1 * torch.randn(1024, generator=torch.Generator().manual_seed(0)).double()
    states = {"": base, "right": base + accepted_rise, "new": LIMIT + noise - noise.mean()}
    test = Measured(states.__getitem__, 1024, 0.05)
    verdicts = Verdicts(test)
    verdicts.begin("", 0.0, LIMIT, WIDTH, STEP)
    judged(verdicts, "right", 40)
    judged(verdicts, "new", 36)
    assert 16 * test.measured("new") == images


def random(seed: int, count: int = 1024) -> Tensor:
    """Of mean 0."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).double()
    return values - values.mean()


def after_few_images(states: dict[str, Tensor], error: float = 0.05) -> tuple[Measured, Verdicts]:
    """The first accepted state, `"old"`, is the reference; 32 of 1,024 images told."""
    test = Measured({"": torch.zeros(1024).double(), **states}.__getitem__, 1024, error)
    verdicts = Verdicts(test)
    verdicts.begin("", 0.0, LIMIT, WIDTH, STEP)
    entropy = judged(verdicts, "old", 40)
    assert 16 * test.measured("old") == 32
    verdicts.begin("old", entropy, LIMIT, 40, STEP)
    return test, verdicts


@pytest.mark.parametrize("off", [-1e-6, 1e-6])
def test_what_no_sample_tells_is_exact_on_all_images(off: float) -> None:
    """What is accepted right at the tolerance leaves nothing to judge either way."""
    old = 0.1 * random(0)
    right = old + LIMIT
    new = right + random(1) + off
    test, verdicts = after_few_images({"old": old, "right": right, "new": new})
    judged(verdicts, "right", 39)
    rise = judged(verdicts, "new", 38) - verdicts.entropy
    assert test.complete("new")
    assert test.complete("old")
    assert rise == pytest.approx(LIMIT + off, abs=1e-9)
    assert (rise <= LIMIT) == (off < 0)


def test_one_probe_on_all_images_tells_those_near_it() -> None:
    """Then neither the reference nor a near probe needs all of them."""
    old, shared = 0.1 * random(0), random(1)
    first = old + LIMIT + 0.05 + shared
    second = old + LIMIT - 0.05 + shared + 0.05 * random(2)
    test, verdicts = after_few_images({"old": old, "first": first, "second": second})
    assert judged(verdicts, "first", 20) - verdicts.entropy > LIMIT
    assert test.complete("first")
    assert judged(verdicts, "second", 30) - verdicts.entropy <= LIMIT
    assert test.measured("second") < 16
    assert test.measured("old") < 32


def test_looks_share_the_error_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before and after a near probe is known, and with more images of the reference."""
    asked: list[float] = []

    def quantile(probability: float, freedom: int) -> float:
        asked.append(probability)
        return t_quantile(probability, freedom)

    old, shared = 0.1 * random(0), random(1)
    states = {"old": old, "first": old + LIMIT + 0.01 + shared}
    states["second"] = states["first"] - 0.02 + 0.1 * random(2)
    test, verdicts = after_few_images(states)
    monkeypatch.setattr("tp_amp.search.verdicts.t_quantile", quantile)
    verdicts.begin("old", verdicts.entropy, LIMIT, 40, 1e-6)
    for name, width in {"first": 20, "second": 30}.items():
        asked.clear()
        judged(verdicts, name, width)
        assert len(set(asked)) > 4
        assert sum(set(asked)) <= 0.05 + 1e-12
    assert test.complete("first")
    assert 16 < test.measured("second") <= test.measured("old") < 64


def test_what_a_step_changes_is_not_overrated() -> None:
    """The last accepted width may have risen by more than a few images told of it.

    At the tolerance itself, where only the steepness tells; 0.9 below it would be told by 48.
    """
    old, right = 0.01 * random(0), 0.1 + 1.6 * random(3)
    states = {"old": old, "right": old + right, "new": old + LIMIT + 0.4 * random(4)}
    test, verdicts = after_few_images(states)
    judged(verdicts, "right", 39)
    assert test.measured("right") < 32
    judged(verdicts, "new", 38)
    assert 16 * test.measured("new") > 96
