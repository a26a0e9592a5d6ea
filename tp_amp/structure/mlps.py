"""Find every MLP of a model by the structure of Torch-Pruning's dependency graph."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.structure.fused import FusedParts, fused_parts
from tp_amp.structure.graph import TracedGraph, build_graph, channels_of
from tp_amp.structure.segments import NotAnMLP, check_apart, check_segment, is_operation, outputs

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
        fused: whether its layers hold more than the MLP: `up` the queries, keys and values after
            the hidden channels, and `down` maybe the heads before them (timm's parallel blocks).
        first: the input channel of `down` that is hidden channel 0.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> mlp = tp_amp.find_mlps(model, torch.randn(1, 3, 224, 224))[0]
        >>> mlp.name, mlp.up, mlp.down, mlp.width
        ('blocks.0.mlp', ('blocks.0.mlp.fc1',), 'blocks.0.mlp.fc2', 768)
    """

    name: str
    up: tuple[str, ...]
    down: str
    width: int
    inner: tuple[str, ...] = ()
    packed: int = 1
    fused: bool = False
    first: int = 0

    @property
    def units(self) -> str:
        """What its `width` counts."""
        return "channels"

    @property
    def unit_width(self) -> int:
        """Input channels of `down` that one of its `width` is."""
        return 1


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


@torch.inference_mode(False)
@torch.enable_grad()
def read_mlps(
    model: nn.Module, traced: TracedGraph, reasons: dict[nn.Module, str] | None = None
) -> list[MLP]:
    """Find the MLPs in a traced graph; put why each other layer starts none into `reasons`."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[nn.Module, MLP] = {}
    for module, node in list(traced.graph.module2node.items()):
        if not _is_projection(module):
            continue
        try:
            parts = _follow(node)
            if parts.down not in found:
                found[parts.down] = _check(parts, traced, names)
        except NotAnMLP as reason:
            logger.debug("%s starts no MLP: %s", names.get(module), reason)
            if reasons is not None:
                reasons[module] = str(reason)
    for fused in fused_parts(model):
        found[fused.down] = _check_fused(fused, traced, names)
    return [found[down] for down in sorted(found, key=lambda down: traced.calls[down].order)]


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


def _follow(start: Any) -> _Parts:
    """Collect all layers coupled to `start`'s output channels; stop at the first misfit."""
    parts = _Parts([start], [], [])
    seen, stack = {start}, [(node, True) for node in start.outputs]
    while stack:
        node, reads = stack.pop()
        if is_operation(node):
            goes_on = node not in seen
            seen.add(node)
        elif _is_per_channel(node.module):
            goes_on = node not in parts.inner
            parts.inner += [node] if goes_on else []
        else:
            layers, goes_on = (parts.downs if reads else parts.ups), False
            if node not in layers:
                layers.append(node)
                # What else makes the channels it reads is coupled too, and reads those it makes.
                stack += [(producer, False) for producer in node.inputs] if reads else []
                stack += [] if reads else [(consumer, True) for consumer in node.outputs]
            if not _is_projection(node.module) or len(parts.ups) > 2 or len(parts.downs) > 1:
                raise NotAnMLP(f"its channels are coupled to {node._name or node.name}")
        if goes_on:
            stack += [(consumer, True) for consumer in node.outputs]
            stack += [(producer, False) for producer in node.inputs]
    if not parts.downs:
        raise NotAnMLP("no layer reads its channels")
    return parts


def _check(parts: _Parts, traced: TracedGraph, names: dict[nn.Module, str]) -> MLP:
    """Check the values from each layer to the next, and describe the MLP."""
    calls, down = traced.calls, parts.down
    nodes = [*parts.ups, *parts.inner, *parts.downs]
    for node in nodes:
        if node.module not in calls:
            raise NotAnMLP(f"{node.name} is not called as a module")
    if traced.reads_images is not None and not traced.reads_images.get(down, False):
        raise NotAnMLP("its channels don't depend on the images")
    width = down.in_features if isinstance(down, nn.Linear) else down.in_channels
    packed = {check_segment(node, traced, width) for node in (*parts.inner, *parts.downs)}
    made = {outputs(up.module) for up in parts.ups}
    if made != {width * max(packed)} or (max(packed) > 1 and len(parts.ups) > 1):
        raise NotAnMLP("the layers differ in width")
    parts.ups.sort(key=lambda up: calls[up.module].order)
    parts.inner.sort(key=lambda node: calls[node.module].order)
    up, inner = (tuple(names[node.module] for node in part) for part in (parts.ups, parts.inner))
    name = _common_path([*up, names[down]])
    return MLP(name, up, names[down], width, inner, max(packed))


def _check_fused(parts: FusedParts, traced: TracedGraph, names: dict[nn.Module, str]) -> MLP:
    """Check the values of an MLP that shares its layers with the attention beside it."""
    name, calls = names[parts.block], traced.with_values()
    if parts.up not in calls or parts.down not in calls:
        raise ValueError(
            f"{name} reads the weight of its input projection without calling it, as timm did "
            "before 1.0.25 without a bias on q, k and v; upgrade timm, or put it into "
            "ignored_layers"
        )
    up, down = calls[parts.up], calls[parts.down]
    hidden = down.input[..., parts.first : parts.first + parts.width]

    def layout(gradient: Tensor) -> Tensor:
        if bool(gradient[..., parts.width :].any()):
            raise NotAnMLP("the attention's channels reach the hidden activation")
        return gradient[..., : parts.width]

    try:
        if not hidden.is_meta:
            check_apart(hidden, [up.output], [layout])
    except NotAnMLP as reason:
        raise ValueError(
            f"{name} is a {type(parts.block).__name__} of a kind that is not understood: {reason}; "
            "prune the other MLPs with ignored_layers, or another timm release"
        ) from reason
    layers = (names[parts.up],), names[parts.down]
    return MLP(name, *layers, parts.width, fused=True, first=parts.first)


def _common_path(names: list[str]) -> str:
    """Path of the innermost module that holds all of `names`."""
    parts = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(depth < len(part) and part[depth] == parts[0][depth] for part in parts):
        depth += 1
    return ".".join(parts[0][:depth])
