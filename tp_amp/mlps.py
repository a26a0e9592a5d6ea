"""Find every MLP of a model by the structure of Torch-Pruning's dependency graph."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops

from tp_amp.graph import Call, TracedGraph, build_graph, channels_of

logger = logging.getLogger(__name__)

_NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class MLP:
    """One MLP: hidden channels go from `up` through per-channel operations into `down`.

    Attributes:
        name: module path of the innermost module that holds all of its layers.
        up: module paths of the one (plain) or two (gated) layers that make the hidden channels.
        down: module path of the layer that reads them.
        width: number of hidden channels.
        inner: module paths of the norms and depthwise convolutions in between, which are cut too.
        packed: how many rows of its one `up` make one hidden channel: channel j comes from rows
            j, j + width, ... (2 for a gated MLP in one layer).
    """

    name: str
    up: tuple[str, ...]
    down: str
    width: int
    inner: tuple[str, ...] = ()
    packed: int = 1


def find_mlps(model: nn.Module, example_inputs: Any) -> list[MLP]:
    """Find every MLP of `model`, in the order of the forward pass.

    An MLP is found by structure, never by name: one or two Linears (or 1x1 convolutions) whose
    output channels reach one Linear (or 1x1 convolution), each channel on its own but for norms
    and depthwise convolutions. The graph proposes; gradients decide: between one layer and the
    next, a channel must depend on the same channel at one place, and on no other. What is left out
    is logged at DEBUG level with the reason. Frozen parameters are found too; the model is left as
    it was.

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
    return read_mlps(model, build_graph(model, example_inputs))


@torch.enable_grad()
def read_mlps(model: nn.Module, traced: TracedGraph) -> list[MLP]:
    """Find the MLPs in a traced graph."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, MLP] = {}
    for module, node in list(traced.graph.module2node.items()):
        if not _is_projection(module):
            continue
        try:
            parts = _follow(node)
            if parts.down not in found:
                found[parts.down] = _check(parts, traced, names)
        except _NotAnMLP as reason:
            logger.debug("%s starts no MLP: %s", names.get(module), reason)
    return [found[down] for down in sorted(found, key=lambda down: traced.calls[down].order)]


class _NotAnMLP(Exception):
    """Why a layer starts no MLP."""


@dataclass
class _Parts:
    """The layers coupled to one layer's output channels, as nodes of the graph."""

    ups: list[Any]
    inner: list[Any]
    downs: list[Any]

    @property
    def down(self) -> Any:
        return self.downs[0].module


def _is_projection(module: Any) -> bool:
    """Whether a module turns channels into others at each place: a Linear or 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and set(module.kernel_size) == set(module.stride) == {1}
    return isinstance(module, nn.Linear)


def _is_per_channel(module: Any) -> bool:
    """Whether a module keeps channels apart as far as cutting goes."""
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels > 1
    return isinstance(module, _NORMS) or (isinstance(module, nn.Module) and channels_of(module) > 1)


def _is_operation(node: Any) -> bool:
    """Whether a node is an operation of the graph, not a module of the model."""
    return node._name is None and node.type not in (ops.OPTYPE.OUTPUT, ops.OPTYPE.PARAMETER)


def _follow(start: Any) -> _Parts:
    """Collect all layers coupled to `start`'s output channels; stop at the first misfit."""
    parts = _Parts([start], [], [])
    seen, stack = {start}, [(node, True) for node in start.outputs]
    while stack:
        node, reads = stack.pop()
        if _is_operation(node):
            goes_on = node not in seen
            seen.add(node)
        elif _is_per_channel(node.module):
            goes_on = node not in parts.inner
            parts.inner += [node] if goes_on else []
        else:
            layers, goes_on = (parts.downs if reads else parts.ups), False
            layers += [node] if node not in layers else []
            if not _is_projection(node.module) or len(parts.ups) > 2 or len(parts.downs) > 1:
                raise _NotAnMLP(f"its channels are coupled to {node.name}")
        if goes_on:
            stack += [(consumer, True) for consumer in node.outputs]
            stack += [(producer, False) for producer in node.inputs]
    if not parts.downs:
        raise _NotAnMLP("no layer reads its channels")
    return parts


def _check(parts: _Parts, traced: TracedGraph, names: dict[nn.Module, str]) -> MLP:
    """Check the values from each layer to the next, and describe the MLP."""
    calls, down = traced.calls, parts.down
    nodes = [*parts.ups, *parts.inner, *parts.downs]
    for node in nodes:
        if node.module not in calls:
            raise _NotAnMLP(f"{node.name} is not called as a module")
    if traced.reads_images is not None and not traced.reads_images.get(down, False):
        raise _NotAnMLP("its channels don't depend on the images")
    width = down.in_features if isinstance(down, nn.Linear) else down.in_channels
    packed = {_check_segment(node, traced, width) for node in (*parts.inner, *parts.downs)}
    made = {_outputs(up.module) for up in parts.ups}
    if made != {width * max(packed)} or (max(packed) > 1 and len(parts.ups) > 1):
        raise _NotAnMLP("the layers differ in width")
    parts.ups.sort(key=lambda up: calls[up.module].order)
    parts.inner.sort(key=lambda node: calls[node.module].order)
    up, inner = (tuple(names[node.module] for node in part) for part in (parts.ups, parts.inner))
    name = _common_path([*up, names[down]])
    return MLP(name, up, names[down], width, inner, max(packed))


def _check_segment(node: Any, traced: TracedGraph, width: int) -> int:
    """Check that a channel of a layer's input comes from the same channel of what feeds it.

    The graph calls everything it does not know element-wise, a matrix product too. Gradients of
    random channels at one place of the input tell the difference.

    Returns:
        How many rows of a producer make one channel.
    """
    call: Call = traced.calls[node.module]
    producers = [traced.calls[producer].output for producer in _producers(node)]
    if not producers:
        raise _NotAnMLP(f"nothing feeds {node.name}")
    hidden = _channels_last(node.module, call.input, width)
    picked = torch.rand(width, generator=torch.Generator().manual_seed(0)) < 0.5
    picked = picked.to(hidden.device)
    ratios = [max(1, _outputs(module) // width) for module in _producers(node)]
    reached = [torch.zeros(ratio, dtype=torch.bool, device=hidden.device) for ratio in ratios]
    rows = hidden.numel() // width
    for row in sorted({0, rows // 3, rows // 2, rows - 1}):
        cotangent = hidden.new_zeros(rows, width)
        cotangent[row, picked] = 1
        gradients = torch.autograd.grad(
            hidden, producers, cotangent.view(hidden.shape), retain_graph=True, allow_unused=True
        )
        for i, (module, gradient) in enumerate(zip(_producers(node), gradients, strict=True)):
            if gradient is None:
                raise _NotAnMLP("a layer's channels don't reach the hidden activation")
            values = _channels_last(module, gradient, width * ratios[i])
            touched = values.reshape(-1, ratios[i], width) != 0
            if int(touched.any(-1).any(-1).sum()) > 1 or bool((touched & ~picked).any()):
                raise _NotAnMLP("an operation between the layers mixes channels or tokens")
            reached[i] |= touched.any(-1).any(0)
    # Attention saturated to one token looks element-wise, but its queries and keys get no gradient.
    if not all(bool(parts.all()) for parts in reached):
        raise _NotAnMLP("a part of a layer's channels has no gradient to judge by")
    return max(ratios)


def _producers(node: Any) -> list[nn.Module]:
    """The modules that feed a node through operations alone."""
    seen, stack, found = set(), list(node.inputs), []
    while stack:
        producer = stack.pop()
        if producer in seen:
            continue
        seen.add(producer)
        if _is_operation(producer):
            stack += producer.inputs
        else:
            found.append(producer.module)
    return found


def _outputs(module: Any) -> int:
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
        raise _NotAnMLP("the layers differ in width")
    return values.movedim(1, -1) if second else values


def _common_path(names: list[str]) -> str:
    """Path of the innermost module that holds all of `names`."""
    parts = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(depth < len(part) and part[depth] == parts[0][depth] for part in parts):
        depth += 1
    return ".".join(parts[0][:depth])
