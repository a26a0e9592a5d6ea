"""Which MLPs stand in a residual block, and which in a head or an embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tp_amp.structure.graph import TracedGraph
from tp_amp.structure.mlp_cuts import MLP
from tp_amp.structure.nodes import after, feeding, keeps_channels, passes_on


def outside_blocks(model: nn.Module, mlps: Sequence[MLP], traced: TracedGraph) -> list[str]:
    """Name, by their `down`, the MLPs whose output is not added to what they read.

    Those are hidden layers of heads (of boxes, masks, classes), of embeddings and of projections
    from one width to another. Parallel blocks are known to be blocks. Where one MLP's `down` is the
    next one's `up`, as of three layers in a row, the output of the last is added to what the first
    reads.
    """
    nodes = traced.graph.module2node

    def residual(first: MLP, last: MLP) -> bool:
        up, down = (nodes.get(model.get_submodule(name)) for name in (first.up[0], last.down))
        return not up or not down or _residual(up, down)

    def in_block(mlp: MLP) -> bool:
        starts = _row(mlp, lambda one: [other for other in mlps if other.down in one.up])
        ends = _row(mlp, lambda one: [other for other in mlps if one.down in other.up])
        return any(residual(first, last) for first in starts for last in ends)

    return [mlp.down for mlp in mlps if not mlp.fused and not in_block(mlp)]


def _row(mlp: MLP, nearest: Callable[[MLP], list[MLP]]) -> list[MLP]:
    """The MLP and all that follow it in one direction."""
    row = [mlp]
    for one in row:
        row += [other for other in nearest(one) if other not in row]
    return row


def _residual(up: Any, down: Any) -> bool:
    read = _read_by(up)
    return any(
        other is not down and other in read
        for sum_ in after(down, passes_on)
        if sum_.grad_fn is not None and sum_.grad_fn.name().startswith("Add")
        for other in feeding(sum_, passes_on)
        if not passes_on(other)
    )


def _read_by(node: Any) -> list[Any]:
    """The modules whose outputs a layer reads, through norms and scales too."""
    found: list[Any] = []
    stack = feeding(node, passes_on)
    while stack:
        before = stack.pop()
        if not passes_on(before) and before not in found:
            found.append(before)
            stack += feeding(before, passes_on) if keeps_channels(before.module) else []
    return found
