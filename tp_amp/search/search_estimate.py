"""What the forward passes of a search take, foreseen from one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tp_amp.running.restoring import replaced_forward
from tp_amp.running.timing import Estimate, Stopwatch, clock, wait


@dataclass
class Profile:
    """One pass of a model over all batches.

    Attributes:
        seconds: of the whole pass.
        steps: seconds of each of some modules that run one after another.
        bytes: of what each of them gives.
        batches: how many batches they ran on.
    """

    seconds: float = 0.0
    steps: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    batches: float = 1

    def times(self, count: float) -> Profile:
        """The profile of as many times the batches."""
        return Profile(
            self.seconds * count,
            [seconds * count for seconds in self.steps],
            [round(size * count) for size in self.bytes],
            self.batches * count,
        )


@contextmanager
def profiled(model: nn.Module, names: Sequence[str]) -> Iterator[Profile]:
    """Take the time of what runs meanwhile, and of some modules in it."""
    profile = Profile(0.0, [0.0] * len(names), [0] * len(names), batches=0)
    watch = Stopwatch()

    def timed(place: int) -> Callable[[Any], Any]:
        def make(own: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                wait(args[0].device)  # of a step of the chain, that is its state
                start = clock()
                output = own(*args, **kwargs)
                wait(args[0].device)
                profile.steps[place] += clock() - start
                profile.batches += not place
                profile.bytes[place] += output.nbytes if isinstance(output, Tensor) else 0
                return output

            return forward

        return make

    with ExitStack() as stack:
        for place, name in enumerate(names):
            stack.enter_context(replaced_forward(model.get_submodule(name), timed(place)))
        stack.enter_context(watch)
        yield profile
    profile.seconds = watch.seconds


def estimate_search(
    profile: Profile, places: Sequence[int | None], probes: Sequence[float], limit: int
) -> Estimate:
    """What the forward passes of a search take where each starts at the block at hand.

    Layers are counted as wide as in the dense model, so that it is an upper bound.

    Args:
        profile: of one pass over all batches.
        places: of the layers to search, in its order, the step that each lies in; None where the
            whole model is run.
        probes: how many widths are tried for each of them; parts where not all batches are run.
        limit: bytes that may be kept of what the steps give.
    """
    seconds, kept, most = 0.0, set[int](), 0
    outside = profile.seconds - sum(profile.steps)
    batches = max(1, profile.batches)
    for place, count in zip(places, probes, strict=True):
        if not count:
            continue
        kept = {step for step in kept if place is not None and step < place}
        if place and place - 1 not in kept:
            kept = _last_that_fit(profile.bytes[:place], limit)
            seconds += outside + sum(profile.steps[:place])
            most = max(most, sum(profile.bytes[step] for step in kept))
        if place is None or (place and place - 1 not in kept):
            seconds += count * profile.seconds
        else:  # once more to keep what runs before the layer in its block, one batch to the end
            rest = sum(profile.steps[place:])
            seconds += outside + profile.steps[place] + (rest - profile.steps[place]) / batches
            seconds += count * (outside + rest)
    return Estimate(seconds, most)


def over_passes(one: Estimate, profile: Profile, passes: int) -> Estimate:
    """What several passes of a search take, from what one takes, and what is run beside them.

    Widths that are filled up to a target are of no pass, and are judged on the whole model.
    """
    return Estimate(passes * one.seconds + (passes > 1) * profile.seconds, one.bytes)


def _last_that_fit(sizes: Sequence[int], limit: int) -> set[int]:
    fit: set[int] = set()
    for step in reversed(range(len(sizes))):
        limit -= sizes[step]
        if limit < 0:
            break
        fit.add(step)
    return fit
