"""What single layers read and give while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import Stop, hooks


def watch(
    module: nn.Module, model: nn.Module, name: str, inputs: Inputs, *, stop: bool
) -> tuple[tuple[Tensor, Tensor], Any]:
    """Run a module; give a layer's input and output as `(tokens, channels)`, and the output.

    Args:
        module: is run: the model or a part of it.
        model: holds the layer.
        name: path of the layer in the model.
        inputs: of the module.
        stop: whether to end the pass at the layer; the output is None then.

    Raises:
        ValueError: the layer is not called.
    """
    layer = model.get_submodule(name)
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((_tokens(layer, args[0]), _tokens(layer, output)))
        if stop:
            raise Stop

    output = None
    with hooks([layer.register_forward_hook(see)]), suppress(Stop):
        output = inputs.call(module)
    if not seen:
        raise ValueError(f"{name} was not called on a batch; check the batches")
    return seen[0], output


def called_with(module: nn.Module, part: nn.Module, inputs: Inputs) -> Inputs | None:
    """Run a module up to a part of it; give what the part is called with, None if it is not."""
    seen: list[Inputs] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Inputs(args, kwargs))
        raise Stop

    with hooks([part.register_forward_pre_hook(see, with_kwargs=True)]), suppress(Stop):
        inputs.call(module)
    return seen[0] if seen else None


def calls_in_order(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> list[str]:
    """Run a model; give the names of some of its modules, one for each call."""
    called: list[str] = []
    with hooks(
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, _a, name=name: called.append(name)
        )
        for name in names
    ):
        inputs.call(model)
    return called


def _tokens(layer: nn.Module, values: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        values = values.movedim(1, -1)
    return values.reshape(-1, values.shape[-1])
