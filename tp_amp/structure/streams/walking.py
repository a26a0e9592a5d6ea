"""Follow a residual stream through the traced graph, to all that writes and reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch_pruning import ops

from tp_amp.structure.graph import TracedGraph
from tp_amp.structure.streams.graph_weights import GraphWeights, is_product, operation_name
from tp_amp.structure.streams.norm_kinds import Kind, kind_of
from tp_amp.structure.streams.residual_stream import Reading, Written
from tp_amp.structure.streams.stream_nodes import (
    class_name,
    gate_of,
    is_layer,
    parameter_behind,
    passes,
    sources,
    unusual,
)
from tp_amp.structure.tolerant_graph import channels_of


@dataclass
class Walked:
    """What was found on the way.

    Attributes:
        additions: nodes of the graph whose output is the stream.
        norms: path of each norm that reads it, and its kind.
        problems: what stands against a rotation: `path: reason`.
    """

    additions: set[Any] = field(default_factory=set)
    written: list[Written] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    norms: dict[str, Kind] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def problem(self, where: str, reason: str) -> None:
        """Note the first reason at a place."""
        self.problems.setdefault(where, reason)


class Walk:
    """Collects all that is coupled to one addition by the channels of its stream.

    Args:
        traced: the traced graph.
        names: path of each module.
        weights: names the parameters of the graph.
    """

    def __init__(
        self, traced: TracedGraph, names: Mapping[nn.Module, str], weights: GraphWeights
    ) -> None:
        self._traced, self._names, self._weights = traced, names, weights

    def follow(self, addition: Any) -> Walked:
        """Follow the stream in both directions until layers end it."""
        found = self.found = Walked({addition})
        self._normed: set[Any] = set()
        self._reading_nodes: set[Any] = set()
        self._queue = [addition]
        self._stream = {addition}
        while self._queue:
            node = self._queue.pop()
            for behind in node.outputs:
                self._read(behind)
            if passes(node) and not is_product(node):
                found.additions.add(node)
                for before in node.inputs:
                    self._write(before)
                if not node.inputs:
                    self._constant(node)
        self._check_alone()
        return found

    def _go_on(self, node: Any) -> None:
        if node not in self._stream:
            self._stream.add(node)
            self._queue.append(node)

    # What reads the stream.

    def _read(self, node: Any) -> None:
        if node in self._stream:
            return
        if node.type == ops.OPTYPE.OUTPUT:
            self.found.problem("the output", "the model's output is the stream itself")
        elif is_product(node) or is_layer(node):
            self._reading(node, None)
        elif passes(node):
            if gate := self._gate(node):
                self.found.problem(gate, "it multiplies the stream channel by channel")
            else:
                self._go_on(node)
        else:
            self._norm(node)

    def _norm(self, node: Any) -> None:
        name, kind = self._name(node), self._kind(node)
        if kind in ("centred", "uncentred"):
            if name not in self.found.norms:
                self.found.norms[name] = kind
                self._normed.add(node)
                self._behind_norm(node, name)
        else:
            self.found.problem(name, f"a {class_name(node)} reads the stream channel by channel")

    def _behind_norm(self, norm: Any, name: str) -> None:
        """What reads the stream through a norm, which must end in layers everywhere."""
        inside, stack = {norm}, [norm]
        while stack:
            node = stack.pop()
            if not node.outputs:
                self.found.problem(name, "the model's output is what this norm gives; add a Linear")
            for behind in node.outputs:
                if is_product(behind) or is_layer(behind):
                    self._reading(behind, name)
                elif behind.type == ops.OPTYPE.OUTPUT:
                    reason = "the model's output is what this norm gives; add a Linear"
                    self.found.problem(name, reason)
                elif not passes(behind):
                    reason = f"a {class_name(behind)} reads what {name} gives channel by channel"
                    self.found.problem(self._name(behind), reason)
                elif behind not in inside:
                    inside.add(behind)
                    stack.append(behind)
        for node in inside - {norm}:
            for other in node.inputs:
                if other not in inside:
                    self.found.problem(name, "what it gives is combined with something else")
        self._normed |= inside

    def _reading(self, node: Any, norm: str | None) -> None:
        where = self._name(node)
        self._reading_nodes.add(node)
        if not is_layer(node):
            self._product_reads(node, norm)
            return
        module = node.module
        if known := unusual(module):
            self.found.problem(where, known)
            return
        folds = isinstance(module, nn.Linear) and module.bias is not None
        self._add(Reading(f"{where}.weight", f"{where}.bias" if folds else None, norm))

    def _product_reads(self, node: Any, norm: str | None) -> None:
        factor = self._weights.factor(node)
        if factor is None:
            reason = f"the stream is read by a product ({operation_name(node)}) of no layer"
            self.found.problem(norm or self._name(node), reason)
            return
        self._add(Reading(factor.weight, factor.bias, norm, factor.rows))

    def _add(self, reading: Reading) -> None:
        others = [r for r in self.found.readings if r.weight == reading.weight]
        if others and reading not in others:
            self.found.problem(reading.weight, "it reads the stream in two ways")
        elif not others:
            self.found.readings.append(reading)

    # What writes to it.

    def _write(self, node: Any) -> None:
        if node in self._stream:
            return
        if node.type == ops.OPTYPE.PARAMETER:
            self._stream.add(node)
            self._parameter(self._weights.name(node.module) or node.name, node.module)
        elif is_product(node) or is_layer(node):
            self._layer_writes(node, None)
            self._go_on(node)
        elif passes(node):
            if gate := self._gate(node):
                self._scaled(node, gate)
            else:
                self._go_on(node)
        elif self._kind(node) == "scale":
            path = f"{self._name(node)}.{next(iter(node.module._parameters))}"
            self._scaled(node, path)
        elif isinstance(node.module, nn.Embedding):
            self.found.written.append(Written(f"{self._name(node)}.weight", 1))
            self._go_on(node)
        else:
            reason = f"a {class_name(node)} writes the stream channel by channel"
            self.found.problem(self._name(node), reason)

    def _constant(self, node: Any) -> None:
        """An operation on parameters that layers hold, such as a table of positions."""
        if known := self._weights.behind(node.grad_fn):
            self._parameter(known[0], self._traced.graph.model.get_parameter(known[0]))

    def _parameter(self, name: str, parameter: Tensor) -> None:
        if all(written.path != name for written in self.found.written):
            self.found.written.append(Written(name, parameter.dim() - 1))

    def _layer_writes(self, node: Any, scale: str | None) -> None:
        where = self._name(node)
        if not is_layer(node):
            factor = self._weights.factor(node)
            if factor is None or factor.rows is not None:
                reason = f"the stream is written by a product ({operation_name(node)}) of no layer"
                self.found.problem(where, reason)
                return
            names = [factor.weight, factor.bias]
        elif known := unusual(node.module):
            self.found.problem(where, known)
            return
        else:
            bias = f"{where}.bias" if node.module.bias is not None else None
            names = [f"{where}.weight", bias]
        if {written.path for written in self.found.written} & set(names):
            self.found.problem(where, "it writes the stream in two ways")
            return
        self.found.written += [Written(name, 0, scale) for name in names if name]

    def _scaled(self, node: Any, scale: str) -> None:
        """A layer writes through a scale, alone."""
        self._go_on_behind(node)
        stack = [before for before in node.inputs if parameter_behind(before) is None]
        while stack:
            before = stack.pop()
            if len(set(before.outputs)) > 1:
                self.found.problem(scale, "what it scales is read by something else too")
            if is_product(before) or is_layer(before):
                self._layer_writes(before, scale)
            elif passes(before) and len(before.inputs) == 1 and not self._gate(before):
                stack += before.inputs
            else:
                self.found.problem(scale, "it scales something else than what a layer writes")

    def _go_on_behind(self, node: Any) -> None:
        """The stream goes on behind a node whose own inputs are looked at already."""
        self._stream.add(node)
        for behind in node.outputs:
            self._read(behind)

    def _gate(self, node: Any) -> str | None:
        """Path of the parameter, of more than one entry, that an operation multiplies by."""
        found = gate_of(node)
        return None if found is None else self._weights.name(found.module) or str(found.name)

    # What must hold in the end.

    def _check_alone(self) -> None:
        """Layers and norms that read the stream read nothing else, in no other call either."""
        graph, allowed = self._traced.graph, self._stream | self._normed | self._reading_nodes
        held = [*self.found.norms, *(r.weight.rpartition(".")[0] for r in self.found.readings)]
        called = [graph.module2node.get(graph.model.get_submodule(path)) for path in held]
        for node in {*self._reading_nodes, *(n for n in called if n and not passes(n))}:
            if any(before not in allowed for before in sources(node, allowed)):
                self.found.problem(self._name(node), "it reads the stream and something else")

    def _kind(self, node: Any) -> Kind | None:
        module = node.module
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            return kind_of(module, module.normalized_shape[0])
        channels = channels_of(module) if isinstance(module, nn.Module) else 0
        return kind_of(module, channels) if channels > 1 else None

    def _name(self, node: Any) -> str:
        return self._names.get(node.module) or str(node.name)
