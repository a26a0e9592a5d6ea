"""What one channel or head of each site costs, and what two sites cost together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from tp_amp.plan.cutting import narrowed, site_layers
from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import shapes_first
from tp_amp.structure.macs import count_macs
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.streams.residual_stream import Stream

Saved = TypeVar("Saved", float, Tensor)


@dataclass(frozen=True)
class UnitCosts:
    """Parameters or MACs of a model, by the channels and heads that they belong to.

    Attributes:
        dense: of the whole model.
        units: of one channel or head of each site, by its `down`.
        shared: of two sites that have a layer in common, a stream second: what a channel of the one
            and a channel of the other cost both, so that cutting both counts it twice.
        whole: the cost of the values of attentions that may go, with all that goes with them.
    """

    dense: float
    units: Mapping[str, float]
    shared: Mapping[tuple[str, str], float]
    whole: Mapping[str, float] = field(default_factory=dict)

    def twice(self, name: str, saved: Saved, cut: Mapping[str, int]) -> Saved:
        """How much of what one site saves others save too, that have a layer in common with it.

        It is the share of its parameters or MACs that go with the others; of milliseconds the share
        is taken to be the same.

        Args:
            name: the site's `down`.
            saved: what it saves alone, in any unit.
            cut: how many channels or heads of others go.
        """
        less = math.fsum(
            cut[other] * amount
            for pair, amount in self.shared.items()
            for other in pair
            if name in pair and other != name and other in cut
        )
        # In this order sums of whole numbers stay exact.
        return saved * less / self.units[name] if less else 0 * saved


def unit_costs(
    kind: str, structure: ModelStructure, sites: Sequence[Site], going: Sequence[Site] = ()
) -> UnitCosts:
    """Count the parameters, or else the MACs, of a dense model and of one cut by one channel.

    Args:
        kind: `"params"`, or another for MACs.
        structure: what was read of the model.
        sites: what may be cut.
        going: those of them, values of attentions, with which all of the attention may go.
    """
    model, forward_fn = structure.model, structure.forward_fn
    layers = {site.down: site_layers(site) for site in sites}

    def count(inputs: Inputs) -> float:
        if kind == "params":
            return sum(parameter.numel() for parameter in model.parameters())
        return count_macs(model, inputs, forward_fn)[""]

    def costs(inputs: Inputs, _: Any) -> UnitCosts:
        def without(*some: Site, first: int = 1) -> float:
            keep = {site: range(first, site.width) for site in some}
            with narrowed(structure.graph, keep):
                return dense - count(inputs)

        dense = count(inputs)
        units = {site.down: without(site) for site in sites}
        shared = {}
        streams_last = sorted(sites, key=lambda site: isinstance(site, Stream))
        for one, other in itertools.combinations(streams_last, 2):
            if layers[one.down] & layers[other.down]:
                amount = units[one.down] + units[other.down] - without(one, other)
                shared[one.down, other.down] = amount
        whole = {site.down: without(site, first=site.width) for site in going}
        return UnitCosts(dense, units, shared, whole)

    found: UnitCosts = shapes_first(model, structure.inputs, costs, forward_fn)
    return found
