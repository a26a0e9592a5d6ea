"""Find every MLP of a model by the structure of Torch-Pruning's dependency graph."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops

from tp_amp.running.checks import remade
from tp_amp.running.restoring import evaluating
from tp_amp.running.ties import shared_parameters, told_apart
from tp_amp.structure.fused import FusedParts, fused_parts
from tp_amp.structure.graph import TracedGraph, build_graph
from tp_amp.structure.mlp_cuts import MLP as MLP
from tp_amp.structure.mlp_cuts import failures
from tp_amp.structure.nodes import is_operation, is_projection, keeps_channels, outputs
from tp_amp.structure.proofs.adapters import adapted_layer, bottleneck, wrapped
from tp_amp.structure.proofs.masked_values import differences
from tp_amp.structure.proofs.segments import NotAnMLP, attends, check_apart, check_segment

logger = logging.getLogger(__name__)


def find_mlps(model: nn.Module, example_inputs: Any) -> list[MLP]:
    """Find every MLP of `model`, in the order of the forward pass.

    An MLP is found by structure, never by name: one or two Linears (or 1x1 convolutions) whose
    output channels reach one Linear (or 1x1 convolution), each channel on its own but for norms
    and depthwise convolutions. The graph proposes; gradients decide: between one layer and the
    next, a channel must depend on the same channel at one place, and on no other. What is left out
    is logged at DEBUG level with the reason, and as a warning where layers share a parameter with
    others. Frozen parameters are found too; the model is left as it was.

    Args:
        model: any module that Torch-Pruning can trace.
        example_inputs: a tensor `(images, ...)`, a tuple of arguments or a dict of keyword
            arguments that the model can be called with; one image is enough.

    That the model runs with a channel less of each is tried, and that a copy of the module around
    it gives what it gives with the same channels zeroed. Low-rank adapters are no MLPs, and those
    that are bottlenecks are left out: `only_layers` and plans may name them.

    Raises:
        ValueError: the model fails on `example_inputs`, or layers of an MLP have low-rank adapters
            (LoRA), which must be merged first.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> [mlp.down for mlp in tp_amp.find_mlps(model, torch.randn(1, 3, 224, 224))]
        ['blocks.0.mlp.fc2', 'blocks.1.mlp.fc2']
    """
    return without_adapters(model, read_mlps(model, build_graph(model, example_inputs)), {})[0]


def without_adapters(
    model: nn.Module, mlps: Sequence[MLP], reasons: dict[nn.Module, str]
) -> tuple[list[MLP], list[MLP]]:
    """Set the bottleneck adapters apart; put why their layers are in no MLP into `reasons`."""
    offered: list[MLP] = []
    adapters: list[MLP] = []
    for mlp in mlps:
        path = bottleneck(model, mlp)
        (offered if path is None else adapters).append(mlp)
        if path is not None:
            told = (
                f"it is of an adapter ({type(model.get_submodule(path)).__name__}), {mlp.width} "
                f"channels wide, which is small as it is; only_layers=[{path!r}] cuts it"
            )
            logger.debug("%s is left out: %s", mlp.down, told)
            reasons |= {model.get_submodule(name): told for name in (*mlp.up, mlp.down)}
    return offered, adapters


@torch.inference_mode(False)
@torch.enable_grad()
def read_mlps(
    model: nn.Module,
    traced: TracedGraph,
    reasons: dict[nn.Module, str] | None = None,
    *,
    tell: bool = True,
) -> list[MLP]:
    """Find the MLPs in a traced graph; put why each other layer starts none into `reasons`."""
    names = {module: name for name, module in model.named_modules()}
    reasons = {} if reasons is None else reasons
    found: dict[nn.Module, MLP] = {}
    adapters: dict[Any, nn.Module] = {}
    starts = [node for m, node in traced.graph.module2node.items() if is_projection(m)]
    # As it was traced, for models that compute their activations again for a gradient.
    with evaluating(model, trainable=True):
        for node in starts:
            try:
                if not node.module.weight.numel():
                    raise NotAnMLP("no channel is left of it")
                parts = _follow(node)
                if layer := _adapted(parts):
                    adapters |= dict.fromkeys((*parts.ups, *parts.downs), layer)
                    raise NotAnMLP(f"it is part of a low-rank adapter of {names[layer]}")
                if parts.down not in found:
                    found[parts.down] = _check(parts, traced, names)
            except NotAnMLP as reason:
                logger.debug("%s starts no MLP: %s", names.get(node.module), reason)
                reasons[node.module] = str(reason)
    _check_merged(traced, adapters, names)
    for fused in fused_parts(model):
        found[fused.down] = _check_fused(fused, traced, names)
    shared = shared_parameters(model)
    whole: dict[str, str] = {}
    for down in sorted(found, key=lambda down: traced.calls[down].order):
        mlp = found[down]
        if tied := told_apart(shared, (*mlp.up, *mlp.inner, mlp.down)):
            whole.setdefault(mlp.name, tied)
            del found[down]
            reasons |= {model.get_submodule(name): tied for name in (*mlp.up, mlp.down)}
    if whole and tell:
        name, *others = whole
        also = f"; so do {', '.join(others)}, which share others" if others else ""
        logger.warning("the MLP %s stays whole: %s%s", name, whole[name], also)
    failed = failures(list(found.values()), traced)
    failed |= differences([mlp for mlp in found.values() if mlp.down not in failed], traced)
    for mlp in [found.pop(model.get_submodule(down)) for down in failed]:
        reasons |= dict.fromkeys(map(model.get_submodule, mlp.up), failed[mlp.down])
    for layer in reasons.keys() & names.keys():
        reasons[layer] = wrapped(model, names[layer]) or reasons[layer]
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


def _adapted(parts: _Parts) -> nn.Module | None:
    """The layer that the parts are an adapter of, if they are one."""
    single = len(parts.ups) == len(parts.downs) == 1 and not parts.inner
    return adapted_layer(parts.ups[0], parts.downs[0]) if single else None


def _check_merged(
    traced: TracedGraph, adapters: dict[Any, nn.Module], names: dict[nn.Module, str]
) -> None:
    """Raise ValueError where layers of an MLP have adapters, which a cut would not follow."""
    if not adapters:
        return
    nodes, adapted = traced.graph.module2node.values(), set(adapters.values())
    # DoRA's magnitudes may be parameters in no layer.
    parameters = {node for node in nodes if node.type == ops.OPTYPE.PARAMETER}
    held: set[str] = set()
    for node in nodes:
        if not is_projection(node.module) or node in adapters:
            continue
        try:
            parts = _follow(node, skipped=adapters.keys() | parameters)
        except NotAnMLP:
            continue
        layers = {part.module for part in (*parts.ups, *parts.downs)}
        if not attends(parts.downs[0]):
            held |= {names[layer] for layer in layers & adapted}
    if held:
        listed = [name for name in names.values() if name in held]
        raise ValueError(
            f"low-rank adapters (LoRA, DoRA) are on layers of MLPs: {listed}; merge them into "
            "these first (of PEFT: model = model.merge_and_unload()), prune, and put new ones on "
            "the pruned model"
        )


def _follow(start: Any, skipped: Collection[Any] = ()) -> _Parts:
    """Collect all layers coupled to `start`'s output channels; stop at the first misfit."""
    parts = _Parts([start], [], [])
    seen, stack = {start}, [(node, True) for node in start.outputs]
    while stack:
        node, reads = stack.pop()
        if node in skipped:
            continue
        if is_operation(node):
            goes_on = node not in seen
            seen.add(node)
        elif keeps_channels(node.module):
            goes_on = node not in parts.inner
            parts.inner += [node] if goes_on else []
        else:
            layers, goes_on = (parts.downs if reads else parts.ups), False
            if node not in layers:
                layers.append(node)
                # What else makes the channels it reads is coupled too, and reads those it makes.
                stack += [(producer, False) for producer in node.inputs] if reads else []
                stack += [] if reads else [(consumer, True) for consumer in node.outputs]
            if not is_projection(node.module) or len(parts.ups) > 2 or len(parts.downs) > 1:
                if node.type == ops.OPTYPE.OUTPUT:
                    raise NotAnMLP("the model gives out its channels")
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
            raise NotAnMLP(f"{node.name} is not called as a module on the example inputs")
        if reason := remade(node.module):
            raise NotAnMLP(f"of {names[node.module]}, {reason}")
        if reason := wrapped(traced.graph.model, names[node.module]):
            raise NotAnMLP(reason)
        others = node.module._parameters.keys() - {"weight", "bias"}
        if is_projection(node.module) and others:
            raise NotAnMLP(
                f"{node.name} holds {sorted(others)} beside its weight; merge them first"
            )
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
