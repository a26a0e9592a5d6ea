"""Which layers compensation fits, and what of them stays."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tp_amp.compensation.recipe import Recipe
from tp_amp.compensation.routing import routed_layers
from tp_amp.plan.cutting import site_group
from tp_amp.running.checks import remade
from tp_amp.running.inputs import Inputs, one_image
from tp_amp.running.ties import shared_parameters, told_apart
from tp_amp.running.watching import calls_in_order
from tp_amp.structure.attention.rank_linear import RankLinear
from tp_amp.structure.groups import group_layers
from tp_amp.structure.model_structure import Site
from tp_amp.structure.ranks.head_ranks import HeadRanks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A layer to fit.

    Attributes:
        name: its path.
        site: what it reads of, where its inputs are cut.
        outputs: which of the dense layer's outputs stay; all where None.
    """

    name: str
    site: Site | None = None
    outputs: tuple[int, ...] | None = None

    def inputs(self, values: Tensor, kept: Mapping[str, Sequence[int]]) -> Tensor:
        """What of the layer's input, once it is cut, the correction reads."""
        if self.site is None:
            return values
        first = self.site.first
        return values[:, first : first + len(kept[self.name]) * self.site.unit_width]


def layers_to_fit(
    graph: Any,
    batch: Inputs,
    sites: Sequence[Site],
    keep: Mapping[str, Sequence[int]],
    recipe: Recipe,
) -> list[Layer]:
    """The layers to fit, in the order of the forward pass; those a router feeds are left out."""
    model: nn.Module = graph.model
    # Where queries and keys are cut, what is behind them makes up for it.
    cut: dict[str, Site | None] = {
        site.projection: None for site in sites if isinstance(site, HeadRanks)
    }
    cut |= {site.down: site for site in sites if site.down not in site.up}
    linears = [n for n, m in model.named_modules() if _is_plain(m) and n not in cut]
    names = [*cut, *(linears if recipe.every_linear else [])]
    routed = routed_layers(model, batch, names)
    if found := [name for name in cut if name in routed]:
        logger.warning(
            "%d layers are cut and not corrected (%s): a router sends them other tokens once "
            "layers are cut; ignored_layers leaves them whole, and distill teaches them back",
            len(found),
            ", ".join(found[:3]) + (", ..." if len(found) > 3 else ""),
        )
    cut = {name: site for name, site in cut.items() if name not in routed}
    if not cut:
        return []
    called = calls_in_order(
        model, one_image(batch, 2), [name for name in names if name not in routed]
    )
    counts = {name: called.count(name) for name in called}
    if wrong := {name: counts.get(name, 0) for name in cut if counts.get(name, 0) != 1}:
        raise ValueError(
            "compensation needs each layer called once in a forward pass, and "
            f"{', '.join(f'{name} is called {n} times' for name, n in wrong.items())}; "
            "ignored_layers leaves it whole, and apply_plan cuts it without compensation"
        )
    dropped: dict[str, set[int]] = {}
    for site in sites:
        units = sorted(set(range(site.width)) - set(keep[site.down]))
        for part in group_layers(site_group(graph, site, units)):
            if part.side == "out":
                dropped.setdefault(part.name, set()).update(part.indices)
    # Nothing is lost before the first layer that is cut; the last one ends the chain.
    # To refine the first MLP, its `up` needs a correction too.
    opening = {*cut, *(up for site in sites for up in site.up if recipe.refine)}
    first = next(place for place, name in enumerate(called) if name in opening)
    last = max(place for place, name in enumerate(called) if name in cut)
    layers, shared = [], shared_parameters(model)
    for name in called[first : last + 1]:
        if reason := told_apart(shared, [name]):
            logger.warning("%s is not fitted: %s", name, reason)
            continue
        if counts[name] > 1:
            logger.warning("%s is called %d times and is not fitted", name, counts[name])
            continue
        weight: Any = model.get_submodule(name).weight
        kept = tuple(i for i in range(len(weight)) if i not in dropped.get(name, ()))
        layers.append(Layer(name, cut.get(name), kept if name in dropped else None))
    return layers


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a Linear whose weight can be replaced."""
    return type(module) in (nn.Linear, RankLinear) and remade(module) is None
