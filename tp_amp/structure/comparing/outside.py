"""Compare a whole model with parts of it cut to one where what is cut is zero."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.restoring import evaluating, seeded
from tp_amp.running.snapshot import given_back
from tp_amp.running.watching import all_tensors
from tp_amp.structure.comparing.copies import distance

logger = logging.getLogger(__name__)

_ROUNDING = 1e-4  # of float32, through all layers
_SHARE = 0.02  # of what the zeros change


Change = Callable[[ExitStack], Any]


@dataclass(frozen=True)
class Trial:
    """Half of some part of a model taken away, in two ways that should give the same.

    What they put into the stack ends with the pass, after which the model gets back what it held.

    Attributes:
        cut: cuts the part.
        zero: lets the same channels be zero.
    """

    cut: Change
    zero: Change


@torch.inference_mode(False)
@torch.no_grad()
def outside_differences(
    model: nn.Module, run: Callable[[], Any], trials: Mapping[str, Trial]
) -> dict[str, str]:
    """Tell with which parts cut the whole model gives something else than with these at zero.

    Each part was checked by itself before; but its parent, a hook or who reads its second output
    may know how wide it is, and then the model runs once it is cut, and is wrong. All are cut at
    once, on the model itself, and told apart only where that differs. Where random numbers, choices
    or a half precision decide what the model gives, it can't tell and all count as right.

    Args:
        model: with values; afterwards as it was.
        run: runs it on the example inputs.
        trials: by the name of the part.

    Returns:
        Name -> why the part can't be cut.
    """
    found: dict[str, str] = {}

    def judge(names: Sequence[str]) -> None:
        reason = _difference(model, run, [trials[name] for name in names]) if names else None
        if reason is None:
            return
        if len(names) == 1:
            found[names[0]] = reason
            logger.debug("%s can't be cut: %s", names[0], reason)
            return
        half = len(names) // 2
        judge(names[:half])
        judge(names[half:])

    with evaluating(model, trainable=False):
        judge(list(trials))
    return found


def _difference(model: nn.Module, run: Callable[[], Any], trials: Sequence[Trial]) -> str | None:
    def given(*changes: Change) -> list[Tensor]:
        with given_back(model), ExitStack() as stack, seeded(0):
            for change in changes:
                change(stack)
            return [tensor for tensor in all_tensors(run()) if tensor.is_floating_point()]

    zeros = [trial.zero for trial in trials]
    try:
        expected = given(*zeros)
    except Exception as error:
        logger.debug("the model can't be compared: %s", error)
        return None
    try:
        found = given(*(trial.cut for trial in trials))
    except Exception as error:
        return f"with half of it the model no longer runs ({error})"
    if len(found) != len(expected) or not expected:
        return None
    rounding = max(_ROUNDING, *(64 * torch.finfo(tensor.dtype).eps for tensor in expected))
    if _gap(found, expected) <= rounding:
        return None
    change, noise = _gap(given(), expected), _gap(given(*zeros), expected)
    # So that what is NaN or of other sizes each time counts as right too.
    if not (noise <= rounding and max(rounding, _SHARE * change) < _gap(found, expected) < 1e30):
        return None
    return (
        "with half of it the model does not give what it gives with the other half at zero: "
        "something outside of it, or a hook, reads how wide it is"
    )


def _gap(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(map(distance, some, others), default=0.0)
