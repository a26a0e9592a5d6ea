"""What single layers read and give while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MemberDescriptorType, ModuleType
from typing import Any

from torch import Tensor, nn

from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import Stop, hooks, shapes_first


@dataclass(frozen=True)
class Seen:
    """One call of a layer.

    Attributes:
        inputs: `(tokens, inputs)`; `outputs`: `(tokens, outputs)`.
        later: what a module behind the layer was called with, or the output of the module that was
            run, `(tokens, outputs)`; None where it was not asked for.
    """

    inputs: Tensor
    outputs: Tensor
    later: Tensor | None = None

    @property
    def behind(self) -> Tensor:
        """What was seen later, or else the outputs."""
        return self.outputs if self.later is None else self.later


def watch(
    module: nn.Module,
    model: nn.Module,
    name: str,
    inputs: Inputs,
    *,
    stop: bool,
    later: str | None = None,
) -> tuple[Seen, Any]:
    """Run a module; give what a layer in it reads and gives, and the module's output.

    Args:
        module: is run: the model or a part of it.
        model: holds the layer.
        name: path of the layer in the model.
        inputs: of the module.
        stop: whether to end the pass once all is seen; the output is None then.
        later: path of a module that is called after the layer with as many values as the layer
            gives, maybe after other calls, or empty for the output, to see these too.

    Raises:
        ValueError: the layer is not called.
    """
    layer = model.get_submodule(name)
    seen: list[tuple[Tensor, Tensor]] = []
    after: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((tokens_of(layer, args[0]), tokens_of(layer, output)))
        if stop and later is None:
            raise Stop

    def see_later(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not seen or after or not args:
            return
        rows = tokens_of(layer, args[0])
        if rows.shape != seen[0][1].shape:
            return  # the module is called on other tokens too
        after.append(rows)
        if stop:
            raise Stop

    handles = [layer.register_forward_hook(see)]
    if later:
        handles.append(model.get_submodule(later).register_forward_pre_hook(see_later))
    output = None
    with hooks(handles), suppress(Stop):
        output = inputs.call(module)
    if not seen:
        raise ValueError(f"{name} was not called on a batch; check the batches")
    result = first_tensor(output)
    if later == "" and result is not None:
        after.append(tokens_of(layer, result))
    return Seen(*seen[0], after[0] if after else None), None if stop else output


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
    """Run a model; give the names of some of its modules, one for each call.

    Without values where it runs without any.
    """

    def run(given: Inputs, _: Any) -> list[str]:
        called: list[str] = []
        with hooks(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _m, _a, name=name: called.append(name)
            )
            for name in names
        ):
            given.call(model)
        return called

    return shapes_first(model, inputs, run)


def tokens_of(layer: nn.Module, values: Tensor) -> Tensor:
    """A layer's input or output as `(tokens, channels)`."""
    if isinstance(layer, nn.Conv2d):
        values = values.movedim(1, -1)
    # Not by the last size: an attention with narrow heads or a narrow input may say another one.
    return values.flatten(0, -2) if values.dim() > 1 else values[None]


def all_tensors(value: Any) -> list[Tensor]:
    """All tensors in nested arguments or outputs: containers, dataclasses and other objects."""
    return list(_tensors_in(value, set()))


def _tensors_in(value: Any, opened: set[int]) -> Iterator[Tensor]:
    """The tensors; each object is opened once, since objects may know each other."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        parts = [] if id(value) in opened else _attributes(value)
        opened.add(id(value))
    for part in parts:
        yield from _tensors_in(part, opened)


def _attributes(value: Any) -> list[Any]:
    """What an object holds; the tensors of models and classes are no outputs."""
    if isinstance(value, (nn.Module, type, ModuleType)):
        return []
    slots = [
        name
        for kind in type(value).__mro__
        if "__slots__" in vars(kind)
        for name, entry in vars(kind).items()
        if isinstance(entry, MemberDescriptorType)
    ]
    held = [getattr(value, name) for name in slots if hasattr(value, name)]
    return [*held, *getattr(value, "__dict__", {}).values()]


def first_tensor(output: Any) -> Tensor | None:
    """The state in a module's output: the output, or the first of several."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None
