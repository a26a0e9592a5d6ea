"""What a node of the traced graph is to a residual stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch_pruning import ops

from tp_amp.running.checks import remade
from tp_amp.structure.graph import TracedGraph
from tp_amp.structure.nodes import is_operation
from tp_amp.structure.streams.graph_weights import is_product, operation_name


def residual_additions(traced: TracedGraph) -> Iterator[Any]:
    """The additions of what layers make of something to that something, the last first."""
    nodes = list(traced.graph.module2node.values())
    depths = _depths(nodes)
    for node in nodes:
        adds = is_operation(node) and operation_name(node) == "Add"
        if adds and any(
            _comes_through_layers(node, one, depths) for one in node.inputs if not is_constant(one)
        ):
            yield node


def _depths(nodes: Sequence[Any]) -> dict[Any, int]:
    """How many nodes lie on the longest way to a node.

    What lies on or behind a circle, as where a module is called twice, has none.
    """
    readers: dict[Any, list[Any]] = defaultdict(list)
    for node in nodes:
        for before in node.inputs:
            readers[before].append(node)
    missing = {node: len(node.inputs) for node in nodes}
    depths = {node: 0 for node in nodes if not node.inputs}
    ready = list(depths)
    longest = dict.fromkeys(nodes, 0)
    while ready:
        node = ready.pop()
        for reader in readers[node]:
            longest[reader] = max(longest[reader], depths[node] + 1)
            missing[reader] -= 1
            if not missing[reader]:
                depths[reader] = longest[reader]
                ready.append(reader)
    return depths


def _comes_through_layers(addition: Any, skip: Any, depths: Mapping[Any, int]) -> bool:
    """Whether what is added to `skip` is made of it by layers."""
    seen: set[Any] = set()
    least = depths.get(skip, -1)  # what is not as deep does not come from it
    stack = [(other, False) for other in addition.inputs if other is not skip]
    while stack:
        node, layers = stack.pop()
        if node is skip:
            if layers:
                return True
            continue
        if (node, layers) not in seen:
            seen.add((node, layers))
            layers |= not is_operation(node) or is_product(node)
            stack += [
                (before, layers)
                for before in node.inputs
                if before is skip or depths.get(before, least + 1) > least
            ]
    return False


def passes(node: Any) -> bool:
    """Whether the stream goes through: an operation, or the end of an nn.MultiheadAttention."""
    return is_operation(node) or node.type == ops.OPTYPE.MHA


def is_layer(node: Any) -> bool:
    """Whether a node is a Linear or a convolution of whatever kind."""
    return isinstance(node.module, (nn.Linear, nn.modules.conv._ConvNd))


def unusual(module: Any) -> str | None:
    """Why the input and output channels of a layer can't be turned."""
    if reason := remade(module):
        return reason
    if getattr(module, "groups", 1) > 1:
        return f"a {type(module).__name__} in {module.groups} groups keeps channels apart"
    if getattr(module, "transposed", False):
        return f"a {type(module).__name__} is not supported"
    if others := module._parameters.keys() - {"weight", "bias"}:
        return f"it holds {sorted(others)} beside its weight; merge them first"
    return None


def is_constant(node: Any) -> bool:
    """Whether nothing but parameters makes it."""
    return node.type == ops.OPTYPE.PARAMETER or (
        is_operation(node) and all(map(is_constant, node.inputs))
    )


def class_name(node: Any) -> str:
    """What the class of a node's module is called."""
    return type(node.module).__name__


def parameter_behind(node: Any) -> Any | None:
    """The node of the parameter that a node is, but for operations on it alone."""
    while passes(node) and len(node.inputs) == 1:
        [node] = node.inputs
    return node if node.type == ops.OPTYPE.PARAMETER else None


def gate_of(node: Any) -> Any | None:
    """The node of the parameter, of more than one entry, that an operation multiplies by."""
    if operation_name(node) not in ("Mul", "Div", "Addcmul"):
        return None
    found = filter(None, map(parameter_behind, node.inputs))
    return next((parameter for parameter in found if parameter.module.numel() > 1), None)


def sources(node: Any, stops: Collection[Any]) -> Iterator[Any]:
    """What a node reads, through operations up to the first of `stops`; no constants."""
    stack = list(node.inputs)
    while stack:
        before = stack.pop()
        if before not in stops and passes(before) and not is_product(before) and before.inputs:
            stack += before.inputs
        elif not is_constant(before):
            yield before
