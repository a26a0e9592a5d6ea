"""What a long run takes: told before it, and checked against what it then took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.distributed import is_first
from tp_amp.running.restoring import replaced_forward

logger = logging.getLogger(__name__)

LONG = 10.0  # seconds; of shorter runs nothing is told above DEBUG level
FACTOR = 2.0  # above this many times the estimate, a warning
clock = time.perf_counter


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        seconds: of its forward passes, and of scoring its backward passes.
        bytes: of all that it keeps from batch to batch; the model and one batch come on top.

    Example:
        >>> import tp_amp
        >>> print(tp_amp.Estimate(seconds=5400, bytes=3 * 10**9))
        1.5 h, 3.00 GB
    """

    seconds: float
    bytes: int

    def __str__(self) -> str:
        return f"{duration(self.seconds)}, {self.bytes / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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


class Stopwatch:
    """Adds up the seconds between entries and exits."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = clock()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += clock() - self._start


class BatchWatch:
    """Tells after the first of some batches what all of them take, and at the end what they took.

    Args:
        what: names the run.
        batches: how many, None where nobody knows.
        device: what works on them.
        size: bytes that are kept from batch to batch, known after the first.
    """

    def __init__(
        self, what: str, batches: int | None, device: torch.device, size: Callable[[], int]
    ) -> None:
        self.what, self.batches, self.device, self.size = what, batches, device, size
        self._watch = Stopwatch()
        self._estimate: Estimate | None = None

    @contextmanager
    def batch(self) -> Iterator[None]:
        """One batch runs meanwhile."""
        with self._watch:
            yield
            _wait(self.device)
        if self._estimate is None and self.batches is not None:
            self._estimate = Estimate(self._watch.seconds * self.batches, self.size())
            tell(self.what, self._estimate)

    def end(self) -> None:
        """All batches are done."""
        if self._estimate is not None:
            check(self.what, self._estimate, Estimate(self._watch.seconds, self.size()))


@contextmanager
def profiled(model: nn.Module, names: Sequence[str]) -> Iterator[Profile]:
    """Take the time of what runs meanwhile, and of some modules in it."""
    profile = Profile(0.0, [0.0] * len(names), [0] * len(names), batches=0)
    watch = Stopwatch()

    def timed(place: int) -> Callable[[Any], Any]:
        def make(own: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                _wait(args[0].device)  # of a step of the chain, that is its state
                start = clock()
                output = own(*args, **kwargs)
                _wait(args[0].device)
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


def _wait(device: torch.device) -> None:
    """Let an accelerator do what is left; a call only hands it the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def _last_that_fit(sizes: Sequence[int], limit: int) -> set[int]:
    fit: set[int] = set()
    for step in reversed(range(len(sizes))):
        limit -= sizes[step]
        if limit < 0:
            break
        fit.add(step)
    return fit


def tell(what: str, estimate: Estimate) -> None:
    """Log an estimate before a run, on one rank."""
    if not is_first():
        return
    logger.log(_level(estimate.seconds), "%s takes at most about %s", what, estimate)


def check(what: str, estimate: Estimate, taken: Estimate) -> None:
    """Log what a run took beside its estimate; warn where it took far longer."""
    if not is_first():
        return
    text = "%s took %s; estimated were %s"
    if taken.seconds > max(LONG, FACTOR * estimate.seconds):
        text += ": the machine was busy, out of memory, or the first batch was not like the others"
        logger.warning(text, what, taken, estimate)
    else:
        logger.log(_level(taken.seconds), text, what, taken, estimate)


def _level(seconds: float) -> int:
    return logging.INFO if seconds >= LONG else logging.DEBUG
