"""Verdicts of the width search on as few images as are certain enough: a sequential test."""

from __future__ import annotations

from itertools import accumulate

import torch

from tp_amp.search.estimated_means import EstimatedMean, estimate_mean, looks, t_quantile
from tp_amp.search.sequential_test import SequentialTest

KNOWN = 5  # complete states that others are regressed on: more tell little new
HELD = 1 / 4  # of the images: where a probe is not told by them, one of the layer runs on all


class Verdicts:
    """Judges the probes of one search on as few calibration images as it can.

    The entropies of a model, image by image, are a sample without replacement of all of them. At
    each look a width is accepted or rejected if a confidence bound of the rise over the last
    accepted model, the reference, allows; compared are the images that both have run on. After
    all images of both it is exact. Each look has a part of the probe's error probability, by the
    images that it adds, so that they add up to it (Bonferroni). The bounds are those of a mean
    that is near normal but for its skewness: bounds without that assumption would need nearly all
    images.

    Near widths give near entropies. So the first probe of a layer that a quarter of the images do
    not tell is run on all: it and what is tried after it are then estimated by regression on it.
    Beyond the images that the reference has run on, both go on together.

    A width may be judged either way where that moves the plan by one step of the bisection: where
    it lies nearer to the tolerance than what the line to the last accepted width falls in a step.
    That holds if the entropy falls with the width, and ever slower.

    Args:
        test: holds and measures the entropies.
    """

    def __init__(self, test: SequentialTest) -> None:
        self.test = test
        # The images that the verdicts of this search rest on, and not what else was measured, so
        # that a run that goes on from a checkpoint comes to the same.
        sizes = test.sizes()
        self._ends = [*looks(sizes), len(sizes)]
        self._counts = [0, *accumulate(sizes)]
        self._used = {"": len(sizes)}
        self._complete = [""]
        # Of the error probability, by state: what went to its looks so far, and to the last one.
        self._spent: dict[str, float] = {}
        self._share: dict[str, float] = {}
        self._found: dict[str, float] = {}

    def begin(
        self, reference: str, entropy: float, max_increase: float, width: int, step: float
    ) -> None:
        """Go on to the next layer.

        Args:
            reference: the last accepted state.
            entropy: of the reference (nats), as told before.
            max_increase: allowed increase of the entropy (nats).
            width: of the layer as it is.
            step: of the bisection, in channels.
        """
        self.reference, self.entropy, self.max_increase = reference, entropy, max_increase
        self.step = step
        self._anchored = False  # whether a probe of this layer has run on all images
        self._right, self._rise = width, 0.0  # the last accepted width, and what it rose at most

    def judge(self, state: str, width: int) -> float | None:
        """The entropy (nats) of a state as soon as it is certain enough on which side it lies.

        None if more batches are needed, of the state that is `wanted`.
        """
        while state not in self._found and not self._judged(state, width):
            if not self._extend(state):
                return None
        return self._found[state]

    def wanted(self, state: str) -> str:
        """What to run next to judge a state: it, or the reference."""
        used, held = self._used.get(state, 0), self._used[self.reference]
        anchor = self._enough(held) and not self._anchored
        return state if used < held or (anchor and used < self._ends[-1]) else self.reference

    def measure(self, state: str, width: int) -> None:
        """Run the model, which is what is `wanted`, until another is or the state is judged."""
        name = self.wanted(state)
        self.test.measure(
            name, lambda: self.judge(state, width) is not None or self.wanted(state) != name
        )

    def _judged(self, state: str, width: int) -> bool:
        """Judge a state on the images so far, if they are enough."""
        if state not in self._used:
            return False
        complete = self._used[state] == self._used[self.reference] == self._ends[-1]
        rise = self._exact(state) if complete else self._estimated(state)
        needed = t_quantile(self._share[state], rise.freedom)
        # Judged either way so near to the tolerance.
        steps = max(1.0, (self._right - width) / self.step)
        near = max(0.0, self.max_increase - self._rise) / steps
        if rise.mean > self.max_increase:
            sure = rise.distance(self.max_increase - near) > needed
        else:
            sure = rise.distance(self.max_increase + near) < -needed
        if not (complete or sure):
            return False
        self._found[state] = self.entropy + rise.mean
        if rise.mean <= self.max_increase:
            self._right = width
            self._rise = rise.mean + (needed * rise.error if rise.error else 0.0)
        return True

    def _extend(self, state: str) -> bool:
        """Let the verdict rest on more images, if what is wanted has run on them."""
        name = self.wanted(state)
        used = self._used.get(name, 0)
        ends = [end for end in self._ends if end > used]
        if name == self.reference:
            following = next(end for end in ends if self._enough(end))
        else:
            following = ends[-1] if self._enough(used) and not self._anchored else ends[0]
        if self.test.measured(name) < following:
            return False
        self._used[name] = following
        if following == self._ends[-1]:
            self._complete.append(name)
            self._anchored |= name == state
        self._spend(state)
        return True

    def _spend(self, state: str) -> None:
        """Give the look that comes the error probability of the images that it adds."""
        images = sum(self._counts[self._used[name]] for name in (state, self.reference))
        share = self.test.error_probability * images / (2 * self._counts[-1])
        self._share[state] = share - self._spent.get(state, 0.0)
        self._spent[state] = share

    def _enough(self, batches: int) -> bool:
        return batches >= HELD * self._ends[-1]

    def _exact(self, state: str) -> EstimatedMean:
        """The rise over the reference on all images, as a search without the test takes it."""
        return EstimatedMean(self.test.mean(state) - self.test.mean(self.reference), 0.0, 0.0, 1)

    def _estimated(self, state: str) -> EstimatedMean:
        """The rise over the reference, by regression on what has run on all images."""
        complete = self._complete[-KNOWN:]
        known = torch.stack([self.test.values(name, self._ends[-1]) for name in complete], 1)
        both = min(self._used[state], self._used[self.reference])
        values, reference = (self.test.values(name, both) for name in (state, self.reference))
        return estimate_mean(values - reference, known)
