"""Make a Torch-Pruning group by hand, and the one loop over a group."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_pruning import _helpers
from torch_pruning.dependency import Dependency, Group, Node
from torch_pruning.pruner import function

from tp_amp.running.ties import shared_parameters, told_apart

logger = logging.getLogger(__name__)


def make_group(graph: Any, layers: list[tuple[str, Any, list[int]]], roots: list[int]) -> Group:
    """Make a group of layers that are known to be coupled.

    Args:
        graph: the `tp.DependencyGraph`. Modules that it has not seen, since the forward pass
            reads their weights only or they are no layers, are given nodes of their own.
        layers: module path, method of a Torch-Pruning pruner that cuts it, and its channels; the
            root first. Several of a layer's channels may belong to one root channel, part by part.
        roots: the root channels.
    """
    group = Group()
    group._DG = graph
    modules = [graph.model.get_submodule(name) for name, _, _ in layers]
    nodes = [
        graph.module2node.get(module) or Node(module, None, name)
        for module, (name, _, _) in zip(modules, layers, strict=True)
    ]
    for node, (_, handler, indices) in zip(nodes, layers, strict=True):
        dependency = Dependency(handler, handler, source=nodes[0], target=node)
        item = _helpers.GroupItem(dependency, indices)
        item.root_idxs = roots * (len(indices) // max(1, len(roots)))
        group._group.append(item)
    return group


_LAYERS = (function.LinearPruner, function.ConvPruner)  # the depthwise one is of these


def _side(handler: Any) -> Literal["in", "out"] | None:
    """Which channels of a Linear or convolution a pruner's method cuts; None for other layers."""
    if not isinstance(getattr(handler, "__self__", None), _LAYERS):
        return None
    return "out" if handler.__func__.__name__ == "prune_out_channels" else "in"


@dataclass(frozen=True)
class GroupLayer:
    """A Linear or convolution of a group: which of its channels belong to which root channels.

    Root channels are counted by their place in `group[0].idxs`, so that a group of a few channels
    works like one of all.
    """

    name: str
    module: nn.Module
    side: Literal["in", "out"]
    indices: list[int]
    root_indices: list[int]


def group_layers(group: Any) -> Iterator[GroupLayer]:
    """Yield the Linears and convolutions of a group whose root channels are all known."""
    places = dict(zip(group[0].idxs, range(len(group[0].idxs)), strict=True))
    for item in group.items:
        side = _side(item.dep.handler)
        # Grouped-query attention leaves None among the root indices.
        if side is None or not places.keys() >= set(item.root_idxs):
            continue
        module = item.dep.target.module
        name = group._DG._module2name[module]
        channels = _channels(module, side)
        if item.idxs and max(item.idxs) >= channels:
            raise ValueError(
                f"the group of {root_name(group)} has channel {max(item.idxs)} of {name}, which "
                f"has {channels}{_cause(group, item, channels)}"
            )
        roots = list(map(places.__getitem__, item.root_idxs))
        yield GroupLayer(name, module, side, list(item.idxs), roots)


def _cause(group: Any, item: Any, channels: int) -> str:
    """Why a group has a channel that a layer lacks: a new group tells, where it has it too."""
    graph, root = group._DG, group[0].dep
    side = _side(root.handler)
    if side is not None and root.target.module in graph.module2node:
        count = _channels(root.target.module, side)
        there = [index for index in group[0].idxs if index < count]
        again = graph.get_pruning_group(root.target.module, root.handler, there)
        same = [one for one in again.items if one.dep.target is item.dep.target]
        if any(index >= channels for one in same for index in one.idxs):
            return (
                ": Torch-Pruning maps the channels between these layers wrongly, as of gated MLPs "
                "that are packed in one layer; cut it by tp_amp.AdaptiveMLPPruner or "
                "tp_amp.plan_for_target, which have groups of their own, or put "
                f"{root_name(group)} into ignored_layers"
            )
    return "; it was made before a cut: make a new one"


def keeps_ties(group: Any) -> bool:
    """Whether a group can be cut without taking shared parameters apart; if not, that is logged."""
    model = group._DG.model
    names = {group._DG._module2name.get(item.dep.target.module) for item in group.items}
    reason = told_apart(shared_parameters(model), [name for name in names if name is not None])
    if reason:
        logger.warning("no score for the group of %s: %s", root_name(group), reason)
    return reason is None


def _channels(module: Any, side: Literal["in", "out"]) -> int:
    kind = "features" if isinstance(module, nn.Linear) else "channels"
    return int(getattr(module, f"{side}_{kind}"))


def root_name(group: Any) -> str:
    """Module path of the layer that a group starts from."""
    return str(group._DG._module2name[group[0].dep.target.module])


def sum_in_channels(
    group: Any, score: Callable[[GroupLayer], Tensor | None]
) -> tuple[Tensor | None, list[str]]:
    """Like `sum_channels`, over the layers that read the group's channels."""
    return sum_channels(group, lambda layer: score(layer) if layer.side == "in" else None)


def sum_channels(
    group: Any, score: Callable[[GroupLayer], Tensor | None]
) -> tuple[Tensor | None, list[str]]:
    """Sum a score of each layer's channels onto the root channels of the group.

    Args:
        group: a `tp.dependency.Group`.
        score: gives the layer's score for all channels of its side, `(channels,)`, or None.

    Returns:
        The sum `(root channels,)`, None where no layer has a score, and the names of the layers
        that had one.
    """
    total: Tensor | None = None
    scored = []
    for layer in group_layers(group):
        values = score(layer)
        if values is None:
            continue
        if total is None:
            total = values.new_zeros(len(group[0].idxs))
        index = torch.tensor(layer.indices, device=values.device)
        root = torch.tensor(layer.root_indices, device=values.device)
        total.scatter_add_(0, root, values[index])
        scored.append(layer.name)
    return total, scored


def channel_weights(layer: GroupLayer) -> Tensor:
    """Lay out the weights of each channel on the layer's side, `(channels, weights)`.

    Output channels give their rows (filters), input channels their columns.
    """
    weight: Any = layer.module.weight
    weight = weight.detach()
    if (layer.side == "out") != bool(getattr(layer.module, "transposed", False)):
        return torch.flatten(weight, 1)
    groups = int(getattr(layer.module, "groups", 1))
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return torch.flatten(parts.transpose(1, 2), 2).flatten(0, 1)


def root_weights(layer: GroupLayer, roots: int) -> Tensor:
    """Lay out the layer's weights of each root channel of the group, `(roots, weights)`.

    A root channel may own several of the layer's channels (q, k and v of a packed projection);
    their weights stand side by side, with zeros where it owns fewer than another.
    """
    weights = channel_weights(layer)
    index = torch.tensor(layer.indices, device=weights.device)
    root, order = torch.tensor(layer.root_indices, device=weights.device).sort(stable=True)
    owned = root.bincount(minlength=roots)
    place = torch.arange(len(root), device=root.device) - (owned.cumsum(0) - owned)[root]
    rows = weights.new_zeros(roots, int(owned.max()), weights.shape[1])
    rows[root, place] = weights[index[order]]
    return rows.flatten(1)
