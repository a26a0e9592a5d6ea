"""Verdicts of the width search on as few images as are certain enough: a sequential test."""

from __future__ import annotations

from itertools import accumulate

import torch

from tp_amp.sampling import EstimatedMean, estimate_mean, looks, t_quantile
from tp_amp.sequential import SequentialTest

KNOWN = 3  # complete states that others are regressed on: more tell little new


class Verdicts:
    """Judges the probes of one search on as few calibration images as it can.

    The entropies of a model, image by image, are a sample without replacement of all of them. At
    each look a width is accepted or rejected if a confidence bound of the rise over the last
    accepted model allows; after all images it is exact. Each look has a part of the probe's error
    probability, by the images that it adds, so that they add up to it (Bonferroni). The bounds are
    those of a mean that is near normal but for its skewness: bounds without that assumption would
    need nearly all images.

    Near widths give near entropies: once a probe has run on all images, the others are estimated
    by regression on it. What is accepted last for a layer is settled on all images: the next layer
    is compared with that, and a wrong verdict comes out.

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
        self._settled: set[str] = set()
        self._found: dict[str, float] = {}

    def begin(
        self, reference: str, entropy: float, max_increase: float, width: int, step: float
    ) -> None:
        """Go on to the next layer.

        Args:
            reference: the last accepted state, settled.
            entropy: of the reference (nats), as told before.
            max_increase: allowed increase of the entropy (nats).
            width: of the layer as it is.
            step: of the bisection, in channels.
        """
        self.reference, self.entropy, self.max_increase = reference, entropy, max_increase
        self.step = step
        self._right, self._rise = width, 0.0  # the last accepted width, and how much it rose by

    def judge(self, state: str, width: int) -> float | None:
        """The entropy (nats) of a state as soon as it is certain enough on which side it lies.

        None if more batches are needed.
        """
        if state in self._found:
            return self._found[state]
        while (found := self._verdict(state, width)) is None:
            if not self._extend(state):
                return None
        self._found[state], rise = found, found - self.entropy
        if rise <= self.max_increase:
            self._right, self._rise = width, rise
        return found

    def measure(self, state: str, width: int) -> None:
        """Run the model, which `state` names, until it is judged."""
        self.test.measure(state, lambda: self.judge(state, width) is not None)

    def settle(self, state: str) -> None:
        """From now on a state is judged by all images alone."""
        self._settled.add(state)
        self._found.pop(state, None)

    def is_exact(self, state: str) -> bool:
        """Whether a state has been judged by all images."""
        return self._used.get(state) == self._ends[-1]

    def _verdict(self, state: str, width: int) -> float | None:
        limit = self.max_increase
        if self.is_exact(state):
            return self.test.mean(state)
        if state not in self._used or state in self._settled:
            return None
        rise = self._risen(state)
        needed = t_quantile(self._share(state), rise.freedom)
        # Judged either way so near to the tolerance.
        steps = max(1.0, (self._right - width) / self.step)
        near = max(0.0, limit - self._rise) / steps
        if rise.mean > limit:
            sure = rise.distance(limit - near) > needed
        else:
            sure = rise.distance(limit + near) < -needed
        return self.entropy + rise.mean if sure else None

    def _share(self, state: str) -> float:
        """The error probability of the look that a state is at."""
        end = self._ends.index(self._used[state])
        before = self._counts[self._ends[end - 1]] if end else 0
        added = self._counts[self._ends[end]] - before
        return self.test.error_probability * added / self._counts[self._ends[-2]]

    def _extend(self, state: str) -> bool:
        """Let verdicts rest on more images of a state, if it has run on them."""
        used = self._used.get(state, 0)
        following = next(end for end in self._ends if end > used)
        if self.test.measured(state) < following:
            return False
        self._used[state] = following
        if self.is_exact(state):
            self._complete.append(state)
        return True

    def _risen(self, state: str) -> EstimatedMean:
        """The rise over the reference, by regression on it and others that ran on all images."""
        names = [*self._complete[-KNOWN:], self.reference]
        known = torch.stack([self.test.values(name, self._ends[-1]) for name in names], 1)
        values = self.test.values(state, self._used[state])
        return estimate_mean(values - known[: len(values), -1], known)
