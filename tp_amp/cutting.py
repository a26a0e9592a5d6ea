"""The one place that cuts: for a while, to try a width, or for good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch_pruning import _helpers
from torch_pruning.dependency import Dependency, Group, Node

from tp_amp.fused import FusedBlockPruner
from tp_amp.mlps import MLP


def mlp_group(graph: Any, mlp: MLP, channels: Sequence[int]) -> Group:
    """Make Torch-Pruning's group of some hidden channels of an MLP.

    It holds what `find_mlps` has checked, so it is right where TP's own index mapping is not
    (packed gated MLPs, rotary embeddings), and no walk over the graph is needed. The root is the
    first `up` as in TP, or `down` where several rows of `up` make one channel.
    """
    rows = [j + part * mlp.width for part in range(mlp.packed) for j in channels]
    layers = [(name, "prune_out_channels", rows) for name in mlp.up]
    layers += [(name, "prune_out_channels", list(channels)) for name in mlp.inner]
    down = (mlp.down, "prune_in_channels", [mlp.first + j for j in channels])
    layers = [down, *layers] if mlp.packed > 1 else [*layers, down]
    if mlp.fused:
        layers.append((mlp.name, "prune_out_channels", list(channels)))
    nodes = [_node(graph, name) for name, _, _ in layers]
    group = Group()
    group._DG = graph
    for node, (_, side, indices) in zip(nodes, layers, strict=True):
        known = node.module in graph.module2node
        pruner = graph.get_pruner_of_module(node.module) if known else FusedBlockPruner()
        handler = getattr(pruner, side)
        dependency = Dependency(handler, handler, source=nodes[0], target=node)
        item = _helpers.GroupItem(dependency, indices)
        item.root_idxs = list(channels) * (len(indices) // max(1, len(channels)))
        group._group.append(item)
    return group


def _node(graph: Any, name: str) -> Node:
    """Give the graph's node of a layer, or one for a block that is no layer of its own."""
    module = graph.model.get_submodule(name)
    return graph.module2node.get(module) or Node(module, None, name)


@contextmanager
def narrowed(graph: Any, mlp: MLP, keep: Sequence[int]) -> Iterator[None]:
    """Let the MLP run with only the channels `keep` inside the block.

    Torch-Pruning cuts the layers; on exit they get back what they held: the same parameters with
    their gradients, hooks and optimizer state, and the same buffers and attributes.
    """
    group = mlp_group(graph, mlp, sorted(set(range(mlp.width)) - set(keep)))
    saved = [_state(item.dep.target.module) for item in group.items]
    required = _required(saved)
    try:
        for item in group.items:
            item.dep(item.idxs)
        _require(required)
        yield
    finally:
        for module, attributes, parameters, buffers in saved:
            module.__dict__.update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def cut(graph: Any, mlp: MLP, keep: Sequence[int]) -> Iterator[Group]:
    """Yield the Torch-Pruning group that cuts the MLP down to `keep`, if anything goes.

    Whoever takes the group prunes it; asked for the next one, `requires_grad` of the cut
    parameters is put right, which Torch-Pruning sets to True.
    """
    drop = sorted(set(range(mlp.width)) - set(keep))
    if not drop:
        return
    group = mlp_group(graph, mlp, drop)
    required = _required([_state(item.dep.target.module) for item in group.items])
    yield group
    _require(required)


_State = tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]


def _state(module: nn.Module) -> _State:
    return module, dict(vars(module)), dict(module._parameters), dict(module._buffers)


def _required(states: list[_State]) -> list[tuple[nn.Module, str, bool]]:
    return [
        (module, name, parameter.requires_grad)
        for module, _, parameters, _ in states
        for name, parameter in parameters.items()
        if parameter is not None
    ]


def _require(required: list[tuple[nn.Module, str, bool]]) -> None:
    for module, name, flag in required:
        module._parameters[name].requires_grad_(flag)  # type: ignore[union-attr]
