"""What a long run takes: told before it, and checked against what it then took."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tp_amp.running.distributed import is_first
from tp_amp.running.inputs import Inputs

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
            wait(self.device)
        if self._estimate is None and self.batches is not None:
            self._estimate = Estimate(self._watch.seconds * self.batches, self.size())
            tell_estimate(self.what, self._estimate)

    def end(self) -> None:
        """All batches are done."""
        if self._estimate is not None:
            check_estimate(self.what, self._estimate, Estimate(self._watch.seconds, self.size()))


def seconds(run: Callable[..., Any], inputs: Inputs, device: torch.device) -> float:
    """How long one forward pass takes on a device, all of its work done."""
    wait(device)
    start = clock()
    inputs.call(run)
    wait(device)
    return clock() - start


def wait(device: torch.device) -> None:
    """Wait for what an accelerator still has to do; a call only hands it the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()


def tell_estimate(what: str, estimate: Estimate) -> None:
    """Log an estimate before a run, on one rank."""
    if not is_first():
        return
    logger.log(_level(estimate.seconds), "%s takes at most about %s", what, estimate)


def check_estimate(what: str, estimate: Estimate, taken: Estimate) -> None:
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
