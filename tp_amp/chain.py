"""The modules of a model that run one after another, so that it can be walked step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp._state import evaluating, hooks
from tp_amp.batches import Inputs


@dataclass
class Step:
    """A module of the chain, and what it is called with besides the state.

    Attributes:
        name: its path; empty for the whole model.
        inputs: arguments after the first, the same for all batches.
    """

    name: str
    inputs: Inputs = field(default_factory=Inputs)


@dataclass
class _Call:
    name: str
    order: int
    source: Tensor
    rest: Inputs
    before: tuple[int, int]
    after: tuple[int, int] = (0, 0)
    result: Tensor | None = None


def find_chain(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> list[Step]:
    """Find the longest chain of modules that covers some layers.

    Each module of the chain is called once, its first argument is the very tensor that the module
    before it returned, untouched since, and nothing else that it is called with depends on the
    images or on how many they are. So the model from the first to the last of them is the modules
    one after another.

    Args:
        model: the model.
        inputs: of one call.
        names: module paths, each of which is or lies in one module of the chain.

    Returns:
        The chain; one step that is the whole model where there is none.
    """
    others = {call.name: call for call in _record(model, _others(inputs))}
    calls = [
        call
        for call in _record(model, inputs)
        if call.name in others and _same(call.rest, others[call.name].rest)
    ]
    best: dict[tuple[int, int], tuple[int, int, Any]] = {}
    top: tuple[int, int, Any] = (0, 0, None)
    for call in sorted(calls, key=lambda call: -call.order):
        covered = sum(name == call.name or name.startswith(f"{call.name}.") for name in names)
        after = best.get(call.after, (0, 0, None))
        path = (covered + after[0], 1 + after[1], (call, after[2]))
        if path[:2] > best.get(call.before, (0, 0, None))[:2]:
            best[call.before] = path
            top = max(top, path, key=lambda path: path[:2])
    if top[0] < len(names) or not names:
        return [Step("")]
    steps, rest = [], top[2]
    while rest:
        call, rest = rest
        steps.append(Step(call.name, call.rest))
    return steps


def _record(model: nn.Module, inputs: Inputs) -> list[_Call]:
    """Record the calls that may be steps; what depends on the images requires a gradient."""
    names = {module: name for name, module in model.named_modules() if name}
    calls: list[_Call] = []
    running: dict[nn.Module, _Call | None] = {}
    counts: dict[str, int] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[module]
        counts[name] = counts.get(name, 0) + 1
        rest = Inputs(args[1:], kwargs)
        plain = bool(args) and isinstance(args[0], Tensor) and not _reads_images(rest)
        order = sum(counts.values())
        running[module] = _Call(name, order, args[0], rest, _key(args[0])) if plain else None

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call, result = running.pop(module, None), first_tensor(output)
        if call is None or result is None or result is call.source:
            return
        if _key(call.source) == call.before:  # else the module has changed its input in place
            call.result, call.after = result, _key(result)
            calls.append(call)

    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in names]
    handles += [m.register_forward_hook(leave, with_kwargs=True) for m in names]
    images = Inputs(
        tuple(map(_with_gradient, inputs.args)),
        {key: _with_gradient(value) for key, value in inputs.kwargs.items()},
    )
    with torch.enable_grad(), evaluating(model, trainable=False), hooks(handles):
        images.call(model)
    return [call for call in calls if counts[call.name] == 1]


def _key(tensor: Tensor) -> tuple[int, int]:
    """Tells a tensor, and the same tensor once it has been changed in place."""
    return id(tensor), tensor._version


def _others(inputs: Inputs) -> Inputs:
    """One image more, and other ones."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != inputs.images:
            return value
        more = torch.cat([value, value[:1]])
        return -more if more.is_floating_point() else more

    return Inputs(tuple(map(other, inputs.args)), {k: other(v) for k, v in inputs.kwargs.items()})


def _same(one: Any, other: Any) -> bool:
    """Whether arguments are equal, tensors in every value."""
    if isinstance(one, Inputs):
        one, other = [one.args, one.kwargs], [other.args, other.kwargs]
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        one, other = list(one.items()), list(other.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _with_gradient(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        # A clone, for models that change their input in place.
        return value.detach().requires_grad_().clone()
    return value


def all_tensors(value: Any) -> list[Tensor]:
    """All tensors in nested arguments or outputs."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in all_tensors(v)] if isinstance(value, (list, tuple)) else []


def _reads_images(rest: Inputs) -> bool:
    return any(t.requires_grad for t in all_tensors([rest.args, rest.kwargs]))


def first_tensor(output: Any) -> Tensor | None:
    """The state in a module's output: the output, or the first of several."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None
