"""The one loop over a Torch-Pruning group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_pruning.pruner import function

_SIDES: dict[Any, Literal["in", "out"]] = {
    function.prune_linear_out_channels: "out",
    function.prune_linear_in_channels: "in",
    function.prune_conv_out_channels: "out",
    function.prune_conv_in_channels: "in",
}


@dataclass(frozen=True)
class GroupLayer:
    """A Linear or convolution of a group: which of its channels belong to which root channels."""

    name: str
    module: nn.Module
    side: Literal["in", "out"]
    indices: list[int]
    root_indices: list[int]


def group_layers(group: Any) -> Iterator[GroupLayer]:
    """Yield the Linears and convolutions of a group whose root channels are all known."""
    for item in group.items:
        side = _SIDES.get(item.dep.handler)
        # Grouped-query attention leaves None among the root indices.
        if side is None or any(root is None for root in item.root_idxs):
            continue
        module = item.dep.target.module
        name = group._DG._module2name[module]
        yield GroupLayer(name, module, side, list(item.idxs), list(item.root_idxs))


def sum_in_channels(
    group: Any, score: Callable[[GroupLayer], Tensor | None]
) -> tuple[Tensor | None, list[str]]:
    """Sum a score of each layer's input channels onto the root channels of the group.

    Args:
        group: a `tp.dependency.Group`.
        score: gives the layer's score for all its input channels, `(in,)`, or None.

    Returns:
        The sum `(root channels,)`, None where no layer has a score, and the names of the layers
        that had one.
    """
    total: Tensor | None = None
    scored = []
    for layer in group_layers(group):
        values = score(layer) if layer.side == "in" else None
        if values is None:
            continue
        if total is None:
            total = values.new_zeros(len(group[0].idxs))
        index = torch.tensor(layer.indices, device=values.device)
        root = torch.tensor(layer.root_indices, device=values.device)
        total.scatter_add_(0, root, values[index])
        scored.append(layer.name)
    return total, scored
