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

# What may stand between two layers where there are no values to look at.
_ELEMENT_WISE = {
    *("Add", "Clone", "Gelu", "Hardswish", "Mul", "Relu", "Sigmoid", "Silu", "Tanh", "ToCopy"),
    *("Permute", "Slice", "Split", "SplitWithSizes", "T", "Transpose", "UnsafeView", "View"),
}


class NotAnMLP(Exception):
    """Why a layer starts no MLP."""


def check_segment(node: Any, traced: TracedGraph, width: int) -> int:
    """Check that a channel of a layer's input comes from the same channel of what feeds it.

    The graph calls everything it does not know element-wise, a matrix product too. Gradients of
    random channels at one place of the input tell the difference.

    Returns:
        How many rows of a producer make one channel.
    """
    call = traced.calls[node.module]
    producers = [traced.calls[producer].output for producer in _producers(node)]
    if not producers:
        raise NotAnMLP(f"nothing feeds {node.name}")
    hidden = _channels_last(node.module, call.input, width)
    ratios = [max(1, outputs(module) // width) for module in _producers(node)]
    layouts = [
        partial(_channels_last, module, channels=width * ratio)
        for module, ratio in zip(_producers(node), ratios, strict=True)
    ]
    if hidden.is_meta:
        _check_operations(node)
    else:
        check_apart(hidden, producers, layouts)
    return max(ratios)


def _check_operations(node: Any) -> None:
    """Check the kinds of operation that feed a node; on the meta device there are no values."""
    for operation in _operations(node):
        kind = re.sub(r"Backward\d*$", "", operation.grad_fn.name()) if operation.grad_fn else ""
        # There a Linear is seen as its own product and a view of that.
        own = operation in node.inputs and isinstance(node.module, nn.Linear)
        if kind not in _ELEMENT_WISE and not (own and kind in ("Addmm", "Mm")):
            raise NotAnMLP(f"on the meta device {kind or operation.name} can't be judged")


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


def _operations(node: Any) -> list[Any]:
    """The operations between a node and the modules that feed it."""
    return [producer for producer in _feeding(node) if is_operation(producer)]


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
