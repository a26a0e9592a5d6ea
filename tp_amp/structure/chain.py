"""The modules of a model that run one after another, so that it can be walked step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.inputs import Inputs, one_image
from tp_amp.running.restoring import evaluating, hooks, shapes_first
from tp_amp.running.watching import all_tensors, first_tensor


@dataclass
class Step:
    """A module of the chain, and what it is called with besides the state.

    Attributes:
        name: its path; empty for the whole model.
        inputs: arguments after the first, the same for all batches.
        plain: whether it gives the state alone; else the state is the first of several values.
    """

    name: str
    inputs: Inputs = field(default_factory=Inputs)
    plain: bool = True


@dataclass
class _Call:
    name: str
    order: int
    source: Tensor
    rest: Inputs
    before: tuple[int, int]
    after: tuple[int, int] = (0, 0)
    result: Tensor | None = None
    plain: bool = True


def find_chain(
    model: nn.Module, inputs: Inputs, names: Sequence[str], beside: Sequence[str] = ()
) -> list[Step]:
    """Find the longest chain of modules that covers some layers.

    Each module of the chain is called once, its first argument is the very tensor that the module
    before it returned, untouched since, and nothing else that it is called with depends on the
    images or on how many they are. So the model from the first to the last of them is the modules
    one after another.

    Args:
        model: the model.
        inputs: of one call.
        names: module paths, each of which is or lies in one module of the chain.
        beside: more of them, of which most do.

    Returns:
        The chain; one step that is the whole model where there is none.
    """
    wanted = [*names, *beside]
    covered, chain = _longest(_candidates(model, inputs), wanted)
    whole = all(any(_held(call, [name]) for call in chain) for name in names)
    if not (whole and 2 * covered > len(wanted)):
        return [Step("")]
    return [Step(call.name, call.rest, call.plain) for call in chain]


def find_blocks(model: nn.Module, inputs: Inputs) -> list[str]:
    """Find the modules that make up most of a model and run one after another.

    They are the steps of the chain that holds most of the Linears and convolutions that are called;
    none of them holds more than half of these.

    Args:
        model: the model.
        inputs: of one call.

    Returns:
        Module paths in the order of the calls; none where they hold less than half of the layers.
    """
    calls = _candidates(model, inputs)
    types = (nn.Linear, nn.modules.conv._ConvNd)
    layers = [call.name for call in calls if isinstance(model.get_submodule(call.name), types)]
    held = {call.name: _held(call, layers) for call in calls}
    covered, chain = _longest([c for c in calls if 2 * held[c.name] <= len(layers)], layers)
    if 2 * covered < len(layers):
        return []
    return [call.name for call in chain if held[call.name] and call.name not in layers]


def _candidates(model: nn.Module, inputs: Inputs) -> list[_Call]:
    """The calls that may be steps: what else they are called with is the same for all images.

    Shapes tell it, unless tensors among the arguments have to be compared.
    """
    return shapes_first(model, inputs, lambda given, _: _steady(model, given))


def _steady(model: nn.Module, inputs: Inputs) -> list[_Call]:
    others = {call.name: call for call in _record(model, _others(inputs))}
    return [
        call
        for call in _record(model, inputs)
        if call.name in others and _same(call.rest, others[call.name].rest)
    ]


def _held(call: _Call, names: Sequence[str]) -> int:
    """How many of some layers a module is or holds."""
    return sum(name == call.name or name.startswith(f"{call.name}.") for name in names)


def _longest(calls: Sequence[_Call], names: Sequence[str]) -> tuple[int, list[_Call]]:
    """The chain that covers most of some layers, of these the longest, and how many it covers."""
    best: dict[tuple[int, int], tuple[int, int, Any]] = {}
    top: tuple[int, int, Any] = (0, 0, None)
    for call in sorted(calls, key=lambda call: -call.order):
        after = best.get(call.after, (0, 0, None))
        path = (_held(call, names) + after[0], 1 + after[1], (call, after[2]))
        if path[:2] > best.get(call.before, (0, 0, None))[:2]:
            best[call.before] = path
            top = max(top, path, key=lambda path: path[:2])
    chain, rest = [], top[2]
    while rest:
        call, rest = rest
        chain.append(call)
    return top[0], chain


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
            call.plain = result is output
            calls.append(call)

    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in names]
    handles += [m.register_forward_hook(leave, with_kwargs=True) for m in names]
    images = Inputs(
        tuple(map(_with_gradient, inputs.args)),
        {key: _with_gradient(value) for key, value in inputs.kwargs.items()},
    )
    # Who depends on whom is asked alone: nothing is kept for a backward pass.
    unkept = torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing)
    with torch.enable_grad(), evaluating(model, trainable=False), hooks(handles), unkept:
        images.call(model)
    return [call for call in calls if counts[call.name] == 1]


def _nothing(_: Any) -> Any:
    return None


def _key(tensor: Tensor) -> tuple[int, int]:
    """Tells a tensor, and the same tensor once it has been changed in place."""
    return id(tensor), tensor._version


def _others(inputs: Inputs) -> Inputs:
    """One image more, and other ones."""
    first = one_image(inputs)

    def other(value: Any, of_first: Any) -> Any:
        if value is of_first:  # all images share it
            return value
        more = torch.cat([value, of_first])
        return -more if more.is_floating_point() else more

    args = map(other, inputs.args, first.args)
    return Inputs(tuple(args), {k: other(v, first.kwargs[k]) for k, v in inputs.kwargs.items()})


def _same(one: Any, other: Any) -> bool:
    """Whether arguments are equal, tensors in every value."""
    if isinstance(one, Inputs):
        one, other = [one.args, one.kwargs], [other.args, other.kwargs]
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        if one.is_meta:
            raise ValueError("values are needed to compare arguments")
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


def _reads_images(rest: Inputs) -> bool:
    return any(t.requires_grad for t in all_tensors([rest.args, rest.kwargs]))
