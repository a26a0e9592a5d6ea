"""Whether each channel at one layer's input comes from the same channel of what feeds it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.restoring import evaluating, hooks
from tp_amp.structure.graph import Call, TracedGraph
from tp_amp.structure.nodes import feeding, is_operation, outputs, producers

_ELEMENT_WISE = {
    *("Add", "Clone", "Gelu", "Hardswish", "Mul", "PreluKernel", "Relu", "Sigmoid", "Silu"),
    *("Tanh", "ToCopy"),
}
_MIXING = re.compile("Bmm|Softmax|.*ScaledDotProduct")


class NotAnMLP(Exception):
    """Why a layer starts no MLP."""


def check_segment(node: Any, traced: TracedGraph, width: int) -> int:
    """Check that a channel of a layer's input comes from the same channel of what feeds it.

    The graph calls everything it does not know element-wise, a matrix product too. Where all
    operations are known to be element-wise, that is proof; else gradients of random channels at
    one place of the input tell the difference, in each call of the layer.

    Returns:
        How many rows of a producer make one channel.
    """
    modules = producers(node)
    if not modules:
        raise NotAnMLP(f"nothing feeds {node.name}")
    ratios = [max(1, outputs(module) // width) for module in modules]
    layers = [node.module, *modules]
    channels = [width, *(width * ratio for ratio in ratios)]
    values = [traced.calls[node.module].input, *(traced.calls[m].output for m in modules)]
    dimensions = [_dimension(*layer) for layer in zip(layers, values, channels, strict=True)]
    last = all(dimension == -1 for dimension in dimensions)
    unknown = _unknown_operations(node, width, max(ratios), last)
    if any(_MIXING.match(name) for name in unknown):
        raise NotAnMLP("an attention stands between the layers")
    unknown += [type(m).__name__ for m, d in zip(layers, dimensions, strict=True) if d is None]
    if unknown:
        calls = traced.with_values()
        if calls[node.module].input.is_meta:
            raise NotAnMLP(f"on the meta device {', '.join(unknown)} can't be judged")
        own, *others = (
            partial(torch.movedim, source=d or _told_by_gradients(m, calls[m], n), destination=-1)
            for m, d, n in zip(layers, dimensions, channels, strict=True)
        )
        for call in calls[node.module].each():
            made = [_last_before(call, calls[module]) for module in modules]
            check_apart(own(call.input), [each.output for each in made], others)
    return max(ratios)


def _last_before(call: Call, producer: Call) -> Call:
    """The last call of what feeds a layer before a call of the layer."""
    for made in producer.each():
        if made.order < call.order:
            return made
    raise NotAnMLP("in one of its calls another layer feeds it")


def attends(node: Any) -> bool:
    """Whether an attention stands between a layer and what feeds it."""
    operations = [producer for producer in feeding(node) if is_operation(producer)]
    return any(_MIXING.match(o.grad_fn.name()) for o in operations if o.grad_fn)


def _unknown_operations(node: Any, width: int, ratio: int, last: bool) -> list[str]:
    """Name the operations before a node that may mix channels, or tokens of one channel."""
    before = [producer for producer in feeding(node) if is_operation(producer)]
    return [
        operation.grad_fn.name() if operation.grad_fn else operation.name
        for operation in before
        if not _keeps_channels(operation, node, width, ratio, last)
    ]


def _keeps_channels(operation: Any, node: Any, width: int, ratio: int, last: bool) -> bool:
    """Whether an operation, by its kind and shapes, keeps each channel to itself.

    Args:
        operation: before the node, in the graph.
        node: that reads the channels.
        width: number of channels.
        ratio: rows of a producer that make one.
        last: whether channels are the last dimension of all layers around.
    """
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
        return last and same and before in (width, ratio * width)
    if name == "Split":  # halves of packed rows, in whole parts
        dimension = backward._saved_dim
        ends = dimension in (len(backward._saved_self_sym_sizes) - 1, 2**64 - 1)
        return last and ends and backward._saved_split_size == width
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
    half = torch.rand(width, generator=torch.Generator().manual_seed(0)) < 0.5
    half = half.to(hidden.device)
    rows = hidden.numel() // width
    reached: list[Any] = [False] * len(producers)
    # The other half where dead activations of the first leave nothing to judge by.
    for picked in (half, ~half):
        for row in sorted({0, rows // 3, rows // 2, rows - 1}):
            cotangent = hidden.new_zeros(rows, width)
            cotangent[row, picked] = 1
            gradients = torch.autograd.grad(
                hidden,
                producers,
                cotangent.view(hidden.shape),
                retain_graph=True,
                allow_unused=True,
            )
            for i, (layout, gradient) in enumerate(zip(layouts, gradients, strict=True)):
                if gradient is None:
                    raise NotAnMLP("a layer's channels don't reach the hidden activation")
                values = layout(gradient)
                touched = values.reshape(-1, values.shape[-1] // width, width) != 0
                if int(touched.any(-1).any(-1).sum()) > 1 or bool((touched & ~picked).any()):
                    raise NotAnMLP("an operation between the layers mixes channels or tokens")
                reached[i] = touched.any(-1).any(0) | reached[i]
        # Attention saturated to one token looks element-wise, but queries and keys get no gradient.
        if all(bool(parts.all()) for parts in reached):
            return
    raise NotAnMLP("a part of a layer's channels has no gradient to judge by")


def _dimension(module: nn.Module, values: Tensor, channels: int) -> int | None:
    """The dimension of the channels in a layer's input or output, None where sizes don't tell.

    Raises:
        NotAnMLP: there is none.
    """
    places = [place for place in (-1, 1) if values.dim() > 1 and values.shape[place] == channels]
    if isinstance(module, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)):
        known = [1]
    elif isinstance(module, nn.Linear) or type(module) in (nn.LayerNorm, nn.RMSNorm):
        known = [-1]
    else:
        # What scales rows, tokens or images has as many entries too.
        known = places if values.shape.count(channels) == 1 else []
    if not places or (known and known[0] not in places):
        raise NotAnMLP("the layers differ in width")
    return known[0] if known else None


def _told_by_gradients(module: nn.Module, call: Call, channels: int) -> int:
    """The dimension in which each channel has entries of its own in a module's parameters.

    Raises:
        NotAnMLP: there is none, or all gradients are zero.
    """
    generator = torch.Generator().manual_seed(0)
    picked = torch.randperm(channels, generator=generator) < channels // 2
    weights = torch.randn(call.output.shape, generator=generator).to(call.output)
    parameters = list(module.parameters(recurse=False))
    # An earlier call of the module, where it is shared, must not add to the gradients.
    reads = [call.input] if call.input.requires_grad else []
    earlier = [x.register_hook(torch.zeros_like) for x in reads]  # type: ignore[no-untyped-call]
    with hooks(earlier):
        for place in (-1, 1):
            if call.output.shape != call.input.shape or call.output.shape[place] != channels:
                continue
            cotangent = (weights.movedim(place, -1) * picked.to(weights)).movedim(-1, place)
            with evaluating(module, trainable=True):
                gradients = torch.autograd.grad(
                    call.output, parameters, cotangent, retain_graph=True, allow_unused=True
                )
            touched = [
                gradient.flatten().cpu() != 0 for gradient in gradients if gradient is not None
            ]
            if touched and all(bool(t.any()) and not bool((t & ~picked).any()) for t in touched):
                return place
    raise NotAnMLP(
        f"{type(module).__name__} has no entry for each channel alone; if it has, give example "
        "inputs of another size"
    )
