"""All that was read of one model, found once in a call and handed on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from torch import nn

from tp_amp.running.checks import check_model
from tp_amp.running.inputs import Inputs, example
from tp_amp.structure.attention.finding import listed, read_attentions
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.chain import Step, find_chain
from tp_amp.structure.graph import TracedGraph, build_graph, untraced_graph
from tp_amp.structure.mlps import MLP, read_mlps
from tp_amp.structure.ranks.head_ranks import HeadRanks

logger = logging.getLogger(__name__)

Site = MLP | Attention | HeadRanks


class ModelStructure:
    """What of a model can be cut, read when it is first asked for and never again.

    A public call makes one and hands it on, so that nothing behind it traces the model anew. Who
    knows the sites already (from a plan) asks for `graph` alone, and nothing is traced at all.

    Args:
        model: the dense model.
        example_inputs: as for `find_mlps`.
        forward_fn: calls the model on the example inputs, as Torch-Pruning's argument does.
        num_heads: as for `find_attentions`.
        build: makes another graph than the default one, see `build_graph`.
        on_meta_device: whether the model is traced without values first.

    Attributes:
        inputs: the example inputs.
        reasons: Linear -> why it starts no MLP, once `mlps` was read.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: Callable[..., Any] | None = None,
        *,
        num_heads: Mapping[nn.Module, int] | None = None,
        build: Callable[..., Any] | None = None,
        on_meta_device: bool = True,
    ) -> None:
        check_model(model)
        self.model, self.inputs, self.forward_fn = model, example(example_inputs), forward_fn
        self._num_heads = num_heads
        self.reasons: dict[nn.Module, str] = {}
        self._trace = partial(
            build_graph, model, example_inputs, build, forward_fn, on_meta_device=on_meta_device
        )
        self._chains: dict[Any, list[Step]] = {}

    @cached_property
    def traced(self) -> TracedGraph:
        """The traced graph."""
        return self._trace()

    @cached_property
    def graph(self) -> Any:
        """The `tp.DependencyGraph` that groups are made on; untraced if nothing was traced yet."""
        return self.traced.graph if "traced" in vars(self) else untraced_graph(self.model)

    @cached_property
    def mlps(self) -> list[MLP]:
        """Every MLP, in the order of the forward pass."""
        return read_mlps(self.model, self.traced, self.reasons)

    @cached_property
    def attentions(self) -> tuple[list[Attention], dict[str, str]]:
        """The attentions that can lose heads, and module path -> why another can't."""
        return read_attentions(self.model, self.inputs.raw(), self.forward_fn, self._num_heads)

    def some_attentions(self) -> list[Attention]:
        """The attentions that can lose heads.

        Raises:
            ValueError: there is none; each is named with its reason.
        """
        found, reasons = self.attentions
        if not found:
            name = type(self.model).__name__
            raise ValueError(f"no attention of {name} can lose heads: {listed(reasons)}")
        if reasons:
            logger.warning("these attentions keep all heads: %s", listed(reasons))
        return found

    def sites(self, names: Iterable[str]) -> dict[str, Site]:
        """Every MLP by its `down`, and where one of `names` is none of them, the attentions too.

        Raises:
            ValueError: one of `names` is neither an MLP's `down` nor an attention's.
        """
        found: dict[str, Site] = {mlp.down: mlp for mlp in self.mlps}
        reasons: dict[str, str] = {}
        if not found.keys() >= set(names):
            attentions, reasons = self.attentions
            found |= {attention.down: attention for attention in attentions}
        for name in names:
            if name not in found:
                kept = f"; attentions that can lose no heads: {reasons}" if reasons else ""
                layer: Any = dict(self.model.named_modules()).get(name)
                kept += f"; as an MLP: {self.reasons[layer]}" if layer in self.reasons else ""
                raise ValueError(
                    f"{name} is neither an MLP of this model nor an attention; they are "
                    f"{list(found)}{kept}"
                )
        return found

    def chain(self, inputs: Inputs, names: Sequence[str]) -> list[Step]:
        """The longest chain of modules that covers some layers, as `find_chain` finds it.

        Args:
            inputs: two images; what the steps read besides the state may depend on their size.
            names: module paths.
        """
        sizes = tuple(tuple(tensor.shape) for tensor in inputs.tensors())
        key = tuple(names), sizes
        if key not in self._chains:
            self._chains[key] = find_chain(self.model, inputs, names)
        return self._chains[key]
