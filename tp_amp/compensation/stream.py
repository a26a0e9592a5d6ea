"""Layers that write to a residual stream, and where the stream is once they have written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.algebra.closed_form import Correction
from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import Stop, hooks
from tp_amp.running.watching import first_tensor, tokens_of

# The stream is read soon after a layer wrote to it; so many calls are looked at.
_CALLS = 16
# What the stream may differ by from the output added, relative, before rounding.
_TOLERANCE = 1e-3
_ROUNDING = 1e-5  # of a scale of one
# Of the largest scale of a channel.
_REACHING = 1e-4


@dataclass(frozen=True)
class Place:
    """Where a layer's output has just been added to a residual stream.

    Attributes:
        name: path of the module that is called with the stream there; empty for the output of the
            module that is run.
        scale: what each channel of the layer's output is multiplied by on its way (LayerScale),
            `(outputs,)`.
    """

    name: str
    scale: Tensor

    def as_output(self, correction: Correction) -> Correction:
        """The correction of a layer that adds to the stream what a given one would.

        Channels that hardly reach the stream stay as they are: no output of theirs could.

        Args:
            correction: solved for what the stream lacks; its errors stay the stream's.
        """
        reaching = self.scale.abs() > _REACHING * self.scale.abs().max()
        share = torch.where(reaching, 1 / self.scale, torch.zeros_like(self.scale))
        share = share.to(correction.weight)
        bias = None if correction.bias is None else share * correction.bias
        return replace(correction, weight=share[:, None] * correction.weight, bias=bias)


def find_place(
    module: nn.Module,
    model: nn.Module,
    name: str,
    inputs: Inputs,
    weights: Callable[[int], Tensor | None],
) -> Place | None:
    """Find where a layer writes to a residual stream: by running a part of the model twice.

    Once as it is, once with the layer's output zeroed. At a place of the stream the difference is
    the layer's output at the same token, times one number for each channel, and something else is
    left without it. So a norm behind the layer, a gate, or tokens in another order (Swin's windows)
    are no writers.

    Args:
        module: is run: the model or a part of it, without gradients.
        model: holds the layer.
        name: path of the layer in the model.
        inputs: of the module.
        weights: takes how many tokens the layer gives and gives their weights `(tokens,)`, or None;
            what padding holds must not matter.

    Returns:
        The first such place; None where the layer writes to no stream.
    """
    run = partial(_written_and_read, module, model, name, inputs)
    output, with_it = run(zeroed=False)
    without = dict(run(zeroed=True)[1])
    known = weights(len(output))
    seen = torch.arange(len(output)) if known is None else known.nonzero().flatten()
    output = output[seen.to(output.device)]
    for place, state in with_it:
        if place not in without:
            continue
        state, rest = (x[seen.to(x.device)] for x in (state, without[place]))
        if not bool(rest.any()):
            continue
        added = state.double() - rest.double()
        scale = (added * output).sum(0) / output.square().sum(0).clamp_min(1e-30)
        rounding = 4 * torch.finfo(state.dtype).eps * float(state.double().norm())
        allowed = _TOLERANCE * float(added.norm()) + rounding
        if float((added - output * scale).norm()) <= allowed < 0.1 * float(added.norm()):
            plain = bool(((scale - 1).abs() < _ROUNDING).all())  # no LayerScale
            return Place(place, torch.ones_like(scale) if plain else scale)
    return None


def _written_and_read(
    module: nn.Module, model: nn.Module, name: str, inputs: Inputs, *, zeroed: bool
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """What a layer gives, and what the modules called after it read, where that has its shape.

    Args:
        module: is run: the model or a part of it.
        model: holds the layer.
        name: path of the layer in the model.
        inputs: of the module.
        zeroed: let the layer give zeros.
    """
    layer = model.get_submodule(name)
    found: list[tuple[str, Tensor]] = []
    written: list[Tensor] = []

    def wrote(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        written.append(tokens_of(layer, output).double())
        return torch.zeros_like(output) if zeroed else output

    def reads(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(path, args[0] if args else None)

        return hook

    def see(path: str, value: Any) -> None:
        if not written or not isinstance(value, Tensor) or value.dim() < 2:
            return
        rows = tokens_of(layer, value.detach())
        if rows.shape == written[0].shape and all(path != known for known, _ in found):
            found.append((path, rows.clone()))
            if len(found) == _CALLS:
                raise Stop

    own = {part for part in module.modules() if part not in set(layer.modules())}
    handles = [
        part.register_forward_pre_hook(reads(path))
        for path, part in model.named_modules()
        if path and part in own and part is not module
    ]
    handles.append(layer.register_forward_hook(wrote))
    with hooks(handles), suppress(Stop):
        see("", first_tensor(inputs.call(module)))
    if not written:
        raise ValueError(f"{name} was not called on a batch; check the batches")
    return written[0], found
