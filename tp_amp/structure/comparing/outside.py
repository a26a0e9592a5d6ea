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
_NOISE = 10  # times as far as the model itself is from what it gives when it rounds otherwise


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
    once, on the model itself, and told apart only where that differs. Where random numbers for each
    channel, choices or rounding decide what the model gives, it can't tell and all count as right.

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


@dataclass(frozen=True)
class _Given:
    """What a pass gave, and where the generator of random numbers stood after it."""

    tensors: list[Tensor]
    drawn: Tensor

    def like(self, other: _Given) -> bool:
        return len(self.tensors) == len(other.tensors) and torch.equal(self.drawn, other.drawn)

    def gaps(self, other: _Given) -> list[float]:
        return list(map(distance, self.tensors, other.tensors))


def _difference(model: nn.Module, run: Callable[[], Any], trials: Sequence[Trial]) -> str | None:
    def given(*changes: Change) -> _Given:
        with given_back(model), ExitStack() as stack, seeded(0):
            for change in changes:
                change(stack)
            return _Given(_compared(run()), torch.get_rng_state())

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
    # Who draws a number for each channel draws fewer once they are cut, and others afterwards.
    if not found.like(expected) or not expected.tensors:
        return None
    rounding = max(_ROUNDING, *(64 * torch.finfo(t.dtype).eps for t in expected.tensors))
    gaps = found.gaps(expected)
    if max(gaps) <= rounding:
        return None
    dense, rounded = given(), given(*zeros, lambda _: _round_otherwise(model))
    if not len(dense.tensors) == len(rounded.tensors) == len(gaps):
        return None
    # What is of other sizes each time is infinitely far, and counts as right too.
    limits = [
        max(rounding, _SHARE * change, _NOISE * noise)
        for change, noise in zip(dense.gaps(expected), rounded.gaps(expected), strict=True)
    ]
    if not any(limit < gap < 1e30 for limit, gap in zip(limits, gaps, strict=True)):
        return None
    return (
        "with half of it the model does not give what it gives with the other half at zero: "
        "something outside of it, or a hook, reads how wide it is"
    )


def _compared(output: Any) -> list[Tensor]:
    """The numbers a model gives, with zero for what is infinite or NaN."""
    numbers = [t for t in all_tensors(output) if t.is_floating_point() or t.is_complex()]
    return [torch.where(tensor.isfinite(), tensor, 0) for tensor in numbers]


def _round_otherwise(model: nn.Module) -> None:
    """Add to what each layer gives about as much as rounding takes from it.

    A model may make much of little: it rounds to half a precision inside, normalises what is zero
    but for rounding, or takes the largest of what is equal. How much can only be tried.
    """
    generator = torch.Generator().manual_seed(0)

    def rounded(output: Any) -> Any:
        if type(output) is tuple:
            return tuple(map(rounded, output))
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
            return output
        last = torch.finfo(output.dtype).eps * output.abs().max()
        signs = torch.rand(output.shape, generator=generator).to(output.device) * 2 - 1
        return output + (last * signs).to(output.dtype)

    for module in model.modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            module.register_forward_hook(lambda _, __, output: rounded(output))
