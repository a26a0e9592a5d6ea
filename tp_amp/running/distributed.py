"""Several processes, each with its own images, that act as one: the same scores, the same plan.

Everything goes through one meeting of all ranks, `exchange`, at which a rank also tells that it
failed. Values are small (features of a batch, scores, moments), so they travel as objects over
gloo, which works on any machine and notices at once when a process is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tp_amp.running.fingerprints import some_values

if TYPE_CHECKING:
    from tp_amp.running.inputs import Inputs

logger = logging.getLogger(__name__)
T = TypeVar("T")

_BATCH = "the next batch"
# The default group and the gloo group of the same ranks.
_groups: tuple[Any, Any] = (None, None)


class RankError(RuntimeError):
    """Another rank failed, is somewhere else in the program, or is gone.

    Attributes:
        kinds: names of the exceptions' classes on the ranks that failed.
    """

    def __init__(self, message: str, kinds: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.kinds = kinds


@dataclass(frozen=True)
class Turn:
    """One step of all ranks: this rank's batch, None where it has no more.

    Attributes:
        inputs: the batch.
        images: how many images all ranks' batches hold together.
    """

    inputs: Inputs | None
    images: int


@dataclass(frozen=True)
class _Failure:
    kind: str
    message: str


def active() -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return not active() or dist.get_rank() == 0


@contextmanager
def together(where: str) -> Iterator[None]:
    """Let an exception on one rank end all of them, and no rank leave before the others.

    All ranks enter. Inside, the others learn of a failure when they next meet.

    Raises:
        RankError: on the ranks that did not fail themselves.
    """
    if not active():
        yield
        return
    try:
        yield
    except RankError:
        raise  # the others know
    except Exception as error:
        if not getattr(error, "told", False):
            _tell(where, error)
        raise
    exchange(f"the end of {where}", None)


def _tell(where: str, error: Exception) -> None:
    failure = _Failure(type(error).__name__, f"{type(error).__name__}: {error}")
    try:
        exchange(where, failure)
    except RankError as answer:
        logger.debug("told the other ranks: %s", answer)
    error.told = True  # type: ignore[attr-defined]


def exchange(where: str, value: T) -> list[T]:
    """Give every rank's value to all ranks, in the order of the ranks; tensors come on the CPU.

    Args:
        where: what the ranks are doing; ranks that meet at different places are told so.
        value: anything that can be pickled.

    Raises:
        RankError: a rank failed, is elsewhere, or is gone.
    """
    found: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(found, (where, _on_cpu(value)), group=_gloo())
    except RuntimeError as error:
        raise RankError(
            f"rank {dist.get_rank()} lost another process at {where}: it was killed, has ended or "
            f"did not answer within the process group's timeout; look for its own message ({error})"
        ) from error
    failed = {rank: sent for rank, (_, sent) in enumerate(found) if isinstance(sent, _Failure)}
    if failed:
        told = "; ".join(f"rank {rank} failed: {sent.message}" for rank, sent in failed.items())
        raise RankError(told, frozenset(sent.kind for sent in failed.values()))
    places = [place for place, _ in found]
    if len(set(places)) > 1:
        listed = ", ".join(f"rank {rank} at {place}" for rank, place in enumerate(places))
        raise RankError(f"the ranks do different things: {listed}; call the same on every rank")
    return [sent for _, sent in found]


def agree(where: str, value: T) -> T:
    """The first rank's value, so that what is decided by it is decided alike on all ranks."""
    return exchange(where, value if is_first() else None)[0] if active() else value  # type: ignore[return-value]


def of_each(where: str, value: T) -> T | list[T]:
    """The values of all ranks; without a process group, the value as it is."""
    return exchange(where, value) if active() else value


def check_same(where: str, value: Any, advice: str) -> None:
    """Raise ValueError on all ranks unless they have the same value."""
    if not active():
        return
    found = exchange(where, value)
    others = [rank for rank, other in enumerate(found) if other != found[0]]
    if others:
        raise _known(ValueError(f"{where} on ranks {others} differ from rank 0's; {advice}"))


def _known(error: ValueError) -> ValueError:
    """An error that every rank raises by itself, so that no other has to be told."""
    error.told = True  # type: ignore[attr-defined]
    return error


def check_same_weights(model: nn.Module) -> None:
    """Raise ValueError on all ranks unless they hold the same model."""
    if active():
        weights = [(name, some_values(p.detach())) for name, p in model.named_parameters()]
        check_same("the model's weights", weights, "load the same weights on every rank")


def warn_of_same_images(inputs: Inputs | None) -> None:
    """Warn where ranks read the same first batch, and so do the same work twice."""
    if not active():
        return
    found = exchange("the first batch", some_values(inputs.tensors()[0]) if inputs else b"")
    if is_first() and len(set(found)) < len(found):
        logger.warning(
            "some ranks read the same images; give each rank its own, with a DistributedSampler or "
            "by batches[rank::world_size]"
        )


def in_turns(batches: Iterator[Inputs]) -> Iterator[Turn]:
    """Walk through the batches of all ranks step by step, until no rank has any left."""
    if not active():
        for inputs in batches:
            yield Turn(inputs, inputs.images)
        return
    while True:
        own = next(batches, None)
        images = sum(exchange(_BATCH, 0 if own is None else own.images))
        if not images:
            return
        yield Turn(own, images)


def gather_rows(where: str, rows: Tensor | None) -> Tensor:
    """The rows of all ranks, one below the other, with the gradient of this rank's own.

    Every rank goes on to compute the same scalar from all rows. Its derivative by this rank's rows
    is complete on this rank: to add up what the other ranks find for the same rows, as the backward
    pass of `torch.distributed.nn.functional.all_gather` does, would count it once for each rank.

    Args:
        where: as for `exchange`.
        rows: `(rows, columns)`; None on a rank that has none.
    """
    found = exchange(where, None if rows is None else rows.detach())
    rank = dist.get_rank()
    device = "cpu" if rows is None else rows.device
    parts = [
        rows if number == rank else part.to(device)
        for number, part in enumerate(found)
        if part is not None
    ]
    return torch.cat([part for part in parts if part is not None])


def add_up(where: str, value: Tensor) -> Tensor:
    """The sum of all ranks' scalars, with the gradient of this rank's own."""
    found = exchange(where, float(value.detach()))
    return sum(found) + (value - value.detach())  # the same bits on every rank


def add_up_named(where: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of all ranks' tensors by name; in the order of the ranks, so alike on all."""
    if not active():
        return tensors
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    whole: dict[str, Tensor] = {}
    for part in exchange(where, tensors):
        for name, tensor in part.items():
            whole[name] = whole[name] + tensor if name in whole else tensor
    return {name: tensor.to(device) for name, tensor in whole.items()}


def _gloo() -> Any:
    """A gloo group of all ranks; all of them come here first at the same meeting."""
    global _groups
    world = dist.group.WORLD
    if _groups[0] is not world:
        own = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        _groups = (world, own)
    return _groups[1]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_on_cpu, value))
    return value
