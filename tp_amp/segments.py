"""Whether each channel at one layer's input comes from the same channel of what feeds it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops

from tp_amp.graph import TracedGraph, channels_of

_ELEMENT_WISE = {
    *("Add", "Clone", "Gelu", "Hardswish", "Mul", "Relu", "Sigmoid", "Silu", "Tanh", "ToCopy"),
}
_MIXING = re.compile("Bmm|Softmax|.*ScaledDotProduct")


class NotAnMLP(Exception):
    """Why a layer starts no MLP."""


def check_segment(node: Any, traced: TracedGraph, width: int) -> int:
    """Check that a channel of a layer's input comes from the same channel of what feeds it.

    The graph calls everything it does not know element-wise, a matrix product too. Where all
    operations are known to be element-wise, that is proof; else gradients of random channels at
    one place of the input tell the difference.

    Returns:
        How many rows of a producer make one channel.
    """
    modules = _producers(node)
    if not modules:
        raise NotAnMLP(f"nothing feeds {node.name}")
    _channels_last(node.module, traced.calls[node.module].input, width)
    ratios = [max(1, outputs(module) // width) for module in modules]
    layouts = [
        partial(_channels_last, module, channels=width * ratio)
        for module, ratio in zip(modules, ratios, strict=True)
    ]
    for module, layout in zip(modules, layouts, strict=True):
        layout(traced.calls[module].output)
    unknown = _unknown_operations(node, width, max(ratios))
    if any(_MIXING.match(name) for name in unknown):
        raise NotAnMLP("an attention stands between the layers")
    if unknown:
        calls = traced.with_values()
        if calls[node.module].input.is_meta:
            raise NotAnMLP(f"on the meta device {', '.join(unknown)} can't be judged")
        hidden = _channels_last(node.module, calls[node.module].input, width)
        check_apart(hidden, [calls[module].output for module in modules], layouts)
    return max(ratios)


def _unknown_operations(node: Any, width: int, ratio: int) -> list[str]:
    """Name the operations before a node that may mix channels, or tokens of one channel."""
    feeding = [producer for producer in _feeding(node) if is_operation(producer)]
    return [
        operation.grad_fn.name() if operation.grad_fn else operation.name
        for operation in feeding
        if not _keeps_channels(operation, node, width, ratio)
    ]


def _keeps_channels(operation: Any, node: Any, width: int, ratio: int) -> bool:
    """Whether an operation, by its kind and shapes, keeps each channel to itself."""
    backward = operation.grad_fn
    kind = re.fullmatch(r"(\w+)Backward\d+", backward.name() if backward else "")
    if kind is None:  # none of PyTorch's own
        return False
    name = kind[1]
    if name in _ELEMENT_WISE:
        return True
    if name in ("View", "UnsafeView", "ReshapeAlias"):  # of leading dimensions alone
        given = getattr(backward, "_input_metadata", None)  # torch 2.4 has none: gradients decide
        before = int(backward._saved_self_sym_sizes[-1])
        same = given is not None and int(given[0].shape[-1]) == before
        return same and before in (width, ratio * width)
    if name == "Split":  # halves of packed rows, in whole parts
        last = len(backward._saved_self_sym_sizes) - 1
        dimension = backward._saved_dim
        return backward._saved_split_size == width and dimension in (last, 2**64 - 1)
    # A Linear of more than two dimensions is a view of its own product; nothing makes its weight.
    if name in ("Addmm", "Mm"):
        own = isinstance(node.module, nn.Linear) and node.grad_fn is not None
        return own and "View" in node.grad_fn.name() and node.inputs == [operation]
    return name == "T" and not operation.inputs


def check_apart(
    hidden: Tensor, producers: list[Tensor], layouts: Sequence[Callable[[Tensor], Tensor]]
) -> None:
    """Check that each of `hidden`'s channels depends on its own channel and place alone.

    Args:
        hidden: `(..., width)`, made from `producers` with autograd.
        producers: outputs of the layers that feed it.
        layouts: for each producer, how to bring its channels to the end: `(..., ratio * width)`.
    """
    width = hidden.shape[-1]
    picked = torch.rand(width, generator=torch.Generator().manual_seed(0)) < 0.5
    picked = picked.to(hidden.device)
    reached: list[Any] = [False] * len(producers)
    rows = hidden.numel() // width
    for row in sorted({0, rows // 3, rows // 2, rows - 1}):
        cotangent = hidden.new_zeros(rows, width)
        cotangent[row, picked] = 1
        gradients = torch.autograd.grad(
            hidden, producers, cotangent.view(hidden.shape), retain_graph=True, allow_unused=True
        )
        for i, (layout, gradient) in enumerate(zip(layouts, gradients, strict=True)):
            if gradient is None:
                raise NotAnMLP("a layer's channels don't reach the hidden activation")
            values = layout(gradient)
            touched = values.reshape(-1, values.shape[-1] // width, width) != 0
            if int(touched.any(-1).any(-1).sum()) > 1 or bool((touched & ~picked).any()):
                raise NotAnMLP("an operation between the layers mixes channels or tokens")
            reached[i] = touched.any(-1).any(0) | reached[i]
    # Attention saturated to one token looks element-wise, but its queries and keys get no gradient.
    if not all(bool(parts.all()) for parts in reached):
        raise NotAnMLP("a part of a layer's channels has no gradient to judge by")


def is_operation(node: Any) -> bool:
    """Whether a node is an operation of the graph, not a module of the model."""
    return node._name is None and node.type not in (ops.OPTYPE.OUTPUT, ops.OPTYPE.PARAMETER)


def _producers(node: Any) -> list[nn.Module]:
    """The modules that feed a node through operations alone."""
    return [producer.module for producer in _feeding(node) if not is_operation(producer)]


def _feeding(node: Any) -> list[Any]:
    """What comes before a node, up to and with the nearest modules."""
    found: list[Any] = []
    stack = list(node.inputs)
    while stack:
        producer = stack.pop()
        if producer not in found:
            found.append(producer)
            stack += producer.inputs if is_operation(producer) else []
    return found


def outputs(module: Any) -> int:
    """Count a layer's output channels."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features
    return int(module.weight.numel()) if isinstance(module, nn.LayerNorm) else channels_of(module)


def _channels_last(module: nn.Module, values: Tensor, channels: int) -> Tensor:
    """Move the channels of a layer's input or output to the end."""
    second = isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm))
    if not second and not isinstance(module, nn.Linear):
        second = values.shape[-1] != channels
    if values.dim() < 2 or values.shape[1 if second else -1] != channels:
        raise NotAnMLP("the layers differ in width")
    return values.movedim(1, -1) if second else values
