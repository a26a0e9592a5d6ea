"""All that was read of one model, found once in a call and handed on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, get_args

from torch import nn

from tp_amp.running.checks import check_model
from tp_amp.running.inputs import Inputs, example
from tp_amp.running.watching import all_tensors
from tp_amp.structure.attention.finding import listed, read_attentions
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.chain import Step, find_chain
from tp_amp.structure.graph import TracedGraph, build_graph
from tp_amp.structure.mlps import MLP, read_mlps, without_adapters
from tp_amp.structure.ranks.head_ranks import HeadRanks, Pair
from tp_amp.structure.ranks.proving import read_head_ranks
from tp_amp.structure.streams.reading_streams import possible_streams, proven_streams
from tp_amp.structure.streams.residual_stream import Stream
from tp_amp.structure.tolerant_graph import untraced_graph

logger = logging.getLogger(__name__)

Site = MLP | Attention | HeadRanks | Stream


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
        tell: whether MLPs that stay whole, since they share parameters, are logged.

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
        tell: bool = True,
    ) -> None:
        check_model(model)
        self.model, self.inputs, self.forward_fn = model, example(example_inputs), forward_fn
        self._num_heads, self._tells_ties = num_heads, tell
        self.reasons: dict[nn.Module, str] = {}
        self._trace = partial(
            build_graph, model, example_inputs, build, forward_fn, on_meta_device=on_meta_device
        )
        self._chains: dict[Any, list[Step]] = {}

    @cached_property
    def traced(self) -> TracedGraph:
        """The traced graph."""
        return self._trace()

    def calls(self, name: str) -> int:
        """How often a layer is called in a forward pass on the example inputs."""
        call = self.traced.calls.get(self.model.get_submodule(name))
        return 0 if call is None else sum(1 for _ in call.each())

    @cached_property
    def unread_output(self) -> str | None:
        """Why nothing can be traced back from what the model gives, if so by its type."""
        with self.traced.again() as run:
            output = run()
        tensors = all_tensors(output)
        if not tensors:
            return (
                f"the model gives a {type(output).__name__}, in which no tensors are found; let it "
                "give tensors, or a dict or dataclass of them"
            )
        if any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
            return None
        kinds = " and ".join({str(tensor.dtype).removeprefix("torch."): 0 for tensor in tensors})
        return (
            f"the model gives {kinds} values alone, which have no gradients; let it give what they "
            "are made of"
        )

    @cached_property
    def graph(self) -> Any:
        """The `tp.DependencyGraph` that groups are made on; untraced if nothing was traced yet."""
        return self.traced.graph if "traced" in vars(self) else untraced_graph(self.model)

    @cached_property
    def mlps(self) -> list[MLP]:
        """Every MLP, in the order of the forward pass."""
        return self._mlps[0]

    @cached_property
    def adapters(self) -> list[MLP]:
        """Bottleneck adapters, which are cut only where they are named."""
        return self._mlps[1]

    @cached_property
    def _mlps(self) -> tuple[list[MLP], list[MLP]]:
        found = read_mlps(self.model, self.traced, self.reasons, tell=self._tells_ties)
        return without_adapters(self.model, found, self.reasons)

    @cached_property
    def attentions(self) -> tuple[list[Attention], dict[str, str]]:
        """The attentions that can lose heads, and module path -> why another can't."""
        return read_attentions(self.model, self.inputs.raw(), self.forward_fn, self._num_heads)

    @cached_property
    def ranks(self) -> tuple[list[HeadRanks], dict[str, str]]:
        """The widths inside heads that can be cut, and why others can't."""
        attentions, reasons = self.attentions
        found, others = read_head_ranks(self.model, attentions, self.inputs.raw(), self.forward_fn)
        return found, reasons | others

    @cached_property
    def possible_streams(self) -> tuple[list[Stream], dict[str, str]]:
        """The residual streams that may be rotated by their structure, and why others can't."""
        return possible_streams(self.model, self.traced)

    @cached_property
    def streams(self) -> tuple[list[Stream], dict[str, str]]:
        """The residual streams that can be rotated, and name -> why another can't."""
        possible, reasons = self.possible_streams
        found, disproved = proven_streams(self.model, possible, self.inputs, self.forward_fn)
        return found, reasons | disproved

    def some_attentions(self) -> list[Attention]:
        """The attentions that can lose heads.

        Raises:
            ValueError: there is none; each is named with its reason.
        """
        found, reasons = self.attentions
        if not found and not reasons:
            raise ValueError(
                f"no attention was found in {type(self.model).__name__}; "
                "num_heads={layer: heads} tells the Linears that make q, k and v of one that goes "
                "by other names"
            )
        self._tell(found, reasons, "no attention of {} can lose heads", "attentions keep all heads")
        return found

    def some_ranks(self, pairs: Collection[Pair]) -> list[HeadRanks]:
        """The widths inside heads that can be cut, of some pairs.

        Raises:
            ValueError: there is none of one pair; each attention is named with its reason.
        """
        found, reasons = self.ranks
        others = tuple(f": {pair}" for pair in get_args(Pair) if pair not in pairs)
        reasons = {name: why for name, why in reasons.items() if not name.endswith(others)}
        some = [site for site in found if site.pair in pairs]
        missing = [pair for pair in pairs if not any(site.pair == pair for site in some)]
        none = f"no attention of {{}} can be cut in {' or '.join(missing)}"
        self._tell(not missing, reasons, none, "heads keep all channels")
        return some

    def some_streams(self) -> list[Stream]:
        """The residual streams that Linears alone read, so that what they lose can be told.

        Raises:
            ValueError: there is none; each is named with its reason.
        """
        streams, reasons = self.streams
        found = []
        for stream in streams:
            layers = {name: self.model.get_submodule(name) for name in stream.readers}
            others = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
            reason = f"{others[0]} reads it, which is no Linear" if others else stream.whole
            if reason:
                reasons = {**reasons, stream.name: reason}
            else:
                found.append(stream)
        none = "no residual stream of {} can be cut"
        self._tell(found, reasons, none, "residual streams stay as they are")
        return found

    def _tell(self, found: object, reasons: Mapping[str, str], none: str, whole: str) -> None:
        """Raise ValueError where nothing was found, or log what stays whole, with the reasons."""
        if not found:
            raise ValueError(f"{none.format(type(self.model).__name__)}: {listed(reasons)}")
        if reasons:
            logger.warning("these %s: %s", whole, listed(reasons))

    def sites(self, names: Iterable[str]) -> dict[str, Site]:
        """Every MLP by its `down`; where one of `names` is none of them, adapters, attentions too.

        Raises:
            ValueError: one of `names` is neither an MLP's `down` nor an attention's.
        """
        found: dict[str, Site] = {mlp.down: mlp for mlp in self.mlps}
        reasons: dict[str, str] = {}
        if not found.keys() >= set(names):
            found |= {adapter.down: adapter for adapter in self.adapters}
        if not found.keys() >= set(names):
            attentions, reasons = self.attentions
            found |= {attention.down: attention for attention in attentions}
        for name in names:
            if name not in found:
                kept = f"; attentions that can lose no heads: {reasons}" if reasons else ""
                layer: Any = dict(self.model.named_modules()).get(name)
                kept += f"; as an MLP: {self.reasons[layer]}" if layer in self.reasons else ""
                streams = [stream.name for stream in self.possible_streams[0]]
                kept += f"; residual streams, by rotate and stream_plan: {streams}" * bool(streams)
                raise ValueError(
                    f"{name} is neither an MLP of this model nor an attention; they are "
                    f"{list(found)}{kept}"
                )
        return found

    def chain(self, inputs: Inputs, names: Sequence[str], beside: Sequence[str] = ()) -> list[Step]:
        """The longest chain of modules that covers some layers, as `find_chain` finds it.

        Args:
            inputs: two images; what the steps read besides the state may depend on their size.
            names: module paths.
            beside: more of them, of which most are covered.
        """
        sizes = tuple(tuple(tensor.shape) for tensor in inputs.tensors())
        key = tuple(names), tuple(beside), sizes
        if key not in self._chains:
            self._chains[key] = find_chain(self.model, inputs, names, beside)
        return self._chains[key]
