"""Which MLPs stand in a residual block, and which in a head or an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tp_amp.structure.graph import TracedGraph
from tp_amp.structure.mlp_cuts import MLP
from tp_amp.structure.nodes import after, feeding, is_operation, keeps_channels


def outside_blocks(model: nn.Module, mlps: Sequence[MLP], traced: TracedGraph) -> list[str]:
    """Name, by their `down`, the MLPs whose output is not added to what they read.

    Those are hidden layers of heads (of boxes, masks, classes), of embeddings and of projections
    from one width to another. Parallel blocks are known to be blocks.
    """
    nodes = traced.graph.module2node
    found = []
    for mlp in mlps:
        up, down = (nodes.get(model.get_submodule(name)) for name in (mlp.up[0], mlp.down))
        if not mlp.fused and up and down and not _residual(up, down):
            found.append(mlp.down)
    return found


def _residual(up: Any, down: Any) -> bool:
    read = _read_by(up)
    return any(
        other is not down and other in read
        for sum_ in after(down)
        if sum_.grad_fn is not None and sum_.grad_fn.name().startswith("Add")
        for other in feeding(sum_)
        if not is_operation(other)
    )


def _read_by(node: Any) -> list[Any]:
    """The modules whose outputs a layer reads, through norms and scales too."""
    found: list[Any] = []
    stack = feeding(node)
    while stack:
        before = stack.pop()
        if not is_operation(before) and before not in found:
            found.append(before)
            stack += feeding(before) if keeps_channels(before.module) else []
    return found
