"""Find every MLP of a model by the structure of Torch-Pruning's dependency graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.pruner import function

from tp_amp._state import evaluating, hooks
from tp_amp.batches import Inputs, example
from tp_amp.groups import group_layers

logger = logging.getLogger(__name__)

# What carries a channel on unchanged as far as the graph knows; `_mixing` then looks at the values.
_PASSING = (ops.OPTYPE.ELEMENTWISE, ops.OPTYPE.RESHAPE)


@dataclass(frozen=True)
class MLP:
    """One MLP: hidden channels go from `up` through element-wise operations into `down`.

    Attributes:
        name: module path of the innermost module that holds all of its layers.
        up: module paths of the one (plain) or two (gated) layers that make the hidden channels.
        down: module path of the layer that reads them.
        width: number of hidden channels.
    """

    name: str
    up: tuple[str, ...]
    down: str
    width: int


@dataclass
class _Call:
    """The last call of a Linear in a forward pass with autograd."""

    order: int
    input: Tensor
    output: Tensor


def find_mlps(model: nn.Module, example_inputs: Any) -> list[MLP]:
    """Find every MLP of `model`, in the order of the forward pass.

    An MLP is found by structure, never by name: one or two Linears whose output channels go
    through element-wise operations alone into one Linear. Each is checked twice: values (a channel
    of `down`'s input depends on the same channel of each `up` and on no other) and Torch-Pruning's
    group (the same indices on every `up` and on `down`). What is left out is logged at DEBUG level
    with the reason. Frozen parameters are found too; the model is left as it was.

    Args:
        model: any module that Torch-Pruning can trace.
        example_inputs: a tensor `(images, ...)`, a tuple of arguments or a dict of keyword
            arguments that the model can be called with; one image is enough.

    Raises:
        ValueError: the model fails on `example_inputs`.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> [mlp.down for mlp in tp_amp.find_mlps(model, torch.randn(1, 3, 224, 224))]
        ['blocks.0.mlp.fc2', 'blocks.1.mlp.fc2']
    """
    return [mlp for mlp, _ in find_groups(model, build_graph(model, example_inputs))]


@dataclass
class TracedGraph:
    """A dependency graph, and the calls of every Linear in one forward pass."""

    calls: dict[nn.Module, _Call]
    graph: Any


def build_graph(
    model: nn.Module,
    example_inputs: Any,
    build: Callable[[Any], Any] | None = None,
    forward_fn: Callable[..., Any] | None = None,
) -> TracedGraph:
    """Trace `model` and build its dependency graph, leaving the model as it was.

    Args:
        model: the model.
        example_inputs: as for `find_mlps`.
        build: called with the example inputs in the form Torch-Pruning takes them, while every
            parameter requires a gradient; returns the graph. A fresh graph by default.
        forward_fn: calls the model on the example inputs, as Torch-Pruning's argument does.

    Raises:
        ValueError: the model fails on `example_inputs`.
    """
    if build is None:
        build = partial(tp.DependencyGraph().build_dependency, model, verbose=False)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model, trainable=True),
        warnings.catch_warnings(),
    ):
        # The residual stream is never pruned here, so parameters outside modules don't matter.
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        inputs = example(example_inputs)
        # Never a bare tensor, with which Torch-Pruning tries the images one by one first.
        raw = inputs.kwargs or inputs.args
        run = model if forward_fn is None else lambda *_, **__: forward_fn(model, raw)
        # Torch-Pruning leaves its hooks behind when the forward pass fails, so fail before it.
        return TracedGraph(calls=_record_calls(model, inputs, run), graph=build(raw))


def _record_calls(model: nn.Module, inputs: Inputs, run: Any) -> dict[nn.Module, _Call]:
    calls: dict[nn.Module, _Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, Tensor):
            calls[module] = _Call(len(calls), args[0], output)

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with hooks(module.register_forward_hook(record) for module in linears):
        inputs.call(run)
    return calls


def find_groups(model: nn.Module, traced: TracedGraph) -> list[tuple[MLP, Any]]:
    """Find the MLPs in a traced graph, each with its full Torch-Pruning group."""
    graph, calls = traced.graph, traced.calls
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, tuple[MLP, Any]] = {}
    for module, node in list(graph.module2node.items()):
        if not isinstance(module, nn.Linear) or module not in calls:
            continue
        try:
            ups, down = _follow(node)
            if down in found:
                continue
            ups.sort(key=lambda up: calls[up].order)
            _check_values(calls, ups, down)
            group = _check_group(graph, ups, down)
        except _NotAnMLP as reason:
            logger.debug("%s starts no MLP: %s", names[module], reason)
            continue
        up_names = tuple(names[up] for up in ups)
        holder = _common_path([*up_names, names[down]])
        found[down] = (MLP(holder, up_names, names[down], down.in_features), group)
    return [found[down] for down in sorted(found, key=lambda down: calls[down].order)]


def _common_path(names: list[str]) -> str:
    """Path of the innermost module that holds all of `names`."""
    parts = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(depth < len(part) and part[depth] == parts[0][depth] for part in parts):
        depth += 1
    return ".".join(parts[0][:depth])


class _NotAnMLP(Exception):
    """Why a layer starts no MLP."""


def _follow(start: Any) -> tuple[list[nn.Linear], nn.Linear]:
    """Collect all layers coupled to `start`'s output channels; stop at the first misfit."""
    ups: list[nn.Linear] = [start.module]
    downs: list[nn.Linear] = []
    seen, stack = {start}, list(_consumers(start))
    while stack:
        node, reads = stack.pop()
        if node.type in _PASSING and not isinstance(node.module, (nn.Linear, nn.Parameter)):
            if node not in seen:
                seen.add(node)
                stack += [*_consumers(node), *((producer, False) for producer in node.inputs)]
            continue
        layers = downs if reads else ups
        if node.module not in layers:
            layers.append(node.module)
        if not isinstance(node.module, nn.Linear) or len(ups) > 2 or len(downs) > 1:
            raise _NotAnMLP(f"its channels are coupled to {node.name}")
    if not downs:
        raise _NotAnMLP("no layer reads its channels")
    return ups, downs[0]


def _consumers(node: Any) -> Iterator[tuple[Any, bool]]:
    return ((consumer, True) for consumer in node.outputs)


def _check_values(calls: dict[nn.Module, _Call], ups: list[nn.Linear], down: nn.Linear) -> None:
    """Check that one place and channel of the hidden activation comes from one place of each up.

    The graph calls everything it does not know element-wise, a matrix product too. Gradients of
    random channels at one place of `down`'s input tell the difference.
    """
    if down not in calls or any(up not in calls for up in ups):
        raise _NotAnMLP("it is not called as a module")
    hidden, width = calls[down].input, down.in_features
    outputs = [calls[up].output for up in ups]
    if hidden.shape[-1] != width or any(output.shape[-1] != width for output in outputs):
        raise _NotAnMLP("the layers differ in width")
    picked = torch.rand(width, generator=torch.Generator().manual_seed(0)) < 0.5
    picked = picked.to(hidden.device)
    cotangent = torch.zeros_like(hidden)
    cotangent.view(-1, width)[0, picked] = 1
    gradients = torch.autograd.grad(
        hidden, outputs, cotangent, retain_graph=True, allow_unused=True
    )
    for gradient in gradients:
        if gradient is None:
            raise _NotAnMLP("a layer's channels don't reach the hidden activation")
        touched = gradient.reshape(-1, width) != 0
        if bool((touched & ~picked).any()) or int(touched.any(-1).sum()) > 1:
            raise _NotAnMLP("an operation between the layers mixes channels or tokens")


def _check_group(graph: Any, ups: list[nn.Linear], down: nn.Linear) -> Any:
    """Check Torch-Pruning's group: the same indices on every `up` and on `down`, nothing else."""
    every = list(range(down.in_features))
    group = graph.get_pruning_group(ups[0], function.prune_linear_out_channels, every)
    layers = {(layer.module, layer.side): layer for layer in group_layers(group)}
    if set(layers) != {*((up, "out") for up in ups), (down, "in")}:
        raise _NotAnMLP(f"Torch-Pruning couples {[layer.name for layer in layers.values()]}")
    for layer in layers.values():
        if layer.indices != every or layer.root_indices != every:
            raise _NotAnMLP(f"Torch-Pruning maps its channels to others of {layer.name}")
    return group
