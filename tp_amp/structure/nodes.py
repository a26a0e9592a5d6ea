"""What a node of the traced graph is, and what stands before and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch_pruning import ops

from tp_amp.structure.tolerant_graph import channels_of

_NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)


def is_operation(node: Any) -> bool:
    """Whether a node is an operation of the graph, not a module of the model."""
    return node._name is None and node.type not in (ops.OPTYPE.OUTPUT, ops.OPTYPE.PARAMETER)


def is_projection(module: Any) -> bool:
    """Whether a module turns channels into others at each place: a Linear or 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and set(module.kernel_size) == set(module.stride) == {1}
    return isinstance(module, nn.Linear)


def producers(node: Any) -> list[nn.Module]:
    """The modules that feed a node through operations alone."""
    return [producer.module for producer in feeding(node) if not is_operation(producer)]


def passes_on(node: Any) -> bool:
    """Whether a node is an operation, or one whose result the model gives out as well."""
    return is_operation(node) or bool(node.type == ops.OPTYPE.OUTPUT)


def feeding(node: Any, through: Callable[[Any], bool] = is_operation) -> list[Any]:
    """What comes before a node, up to and with the nearest modules."""
    found: list[Any] = []
    stack = list(node.inputs)
    while stack:
        producer = stack.pop()
        if producer not in found:
            found.append(producer)
            stack += producer.inputs if through(producer) else []
    return found


def after(node: Any, through: Callable[[Any], bool] = is_operation) -> list[Any]:
    """What a layer's output goes through, channel by channel, before another layer reads it."""
    found: list[Any] = []
    stack = list(node.outputs)
    while stack:
        reader = stack.pop(0)
        if reader not in found and (through(reader) or keeps_channels(reader.module)):
            found.append(reader)
            stack += reader.outputs
    return found


def keeps_channels(module: Any) -> bool:
    """Whether a module keeps channels apart as far as cutting goes: norms, depthwise, scales."""
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels > 1
    return isinstance(module, _NORMS) or (isinstance(module, nn.Module) and channels_of(module) > 1)


def outputs(module: Any) -> int:
    """Count a layer's output channels."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features
    return int(module.weight.numel()) if isinstance(module, nn.LayerNorm) else channels_of(module)
