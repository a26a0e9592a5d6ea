"""Which layers compensation fits, and what of them stays."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tp_amp.compensation.recipe import Recipe, some
from tp_amp.compensation.routing import check_called_once, routed_layers
from tp_amp.plan.cutting import site_group
from tp_amp.running.checks import remade
from tp_amp.running.inputs import Inputs, one_image
from tp_amp.running.ties import shared_parameters, told_apart
from tp_amp.running.watching import calls_in_order
from tp_amp.structure.attention.rank_linear import RankLinear
from tp_amp.structure.constant_linear import ConstantLinear
from tp_amp.structure.groups import group_layers
from tp_amp.structure.model_structure import Site
from tp_amp.structure.ranks.head_ranks import HeadRanks
from tp_amp.structure.streams.residual_stream import Stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A layer to fit.

    Attributes:
        name: its path.
        site: what it reads of, where its inputs are cut; of a stream all that is left is read.
        outputs: which of the dense layer's outputs stay; all where None.
        writes: whether these are channels of a residual stream that is cut.
    """

    name: str
    site: Site | None = None
    outputs: tuple[int, ...] | None = None
    writes: bool = False

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
    """The layers to fit, in the order of the forward pass, each called once and fed by no router.

    Raises:
        ValueError: each layer that is cut is called several times, or one is not called.
    """
    model: nn.Module = graph.model
    streams = [site for site in sites if isinstance(site, Stream)]
    cut = _cut_layers(model, sites)
    linears = [n for n, m in model.named_modules() if _is_plain(m) and n not in cut]
    names = [*cut, *(linears if recipe.every_linear else [])]
    routed = routed_layers(model, batch, names)
    if found := [name for name in cut if name in routed]:
        logger.warning(
            "%d layers are cut and not corrected (%s): a router sends them other tokens once "
            "layers are cut; ignored_layers leaves them whole, and distill teaches them back",
            len(found),
            some(found),
        )
    cut = {name: site for name, site in cut.items() if name not in routed}
    if not cut:
        return []
    called = calls_in_order(
        model, one_image(batch, 2), [name for name in names if name not in routed]
    )
    counts = {name: called.count(name) for name in names}
    if missing := [name for name in cut if not counts[name]]:
        raise ValueError(
            f"{', '.join(missing)} is cut, and not called on a batch; check the batches"
        )
    check_called_once({name: counts[name] for name in cut})
    if again := [name for name in cut if counts[name] > 1]:
        logger.warning(
            "%d layers are cut and not corrected (%s): they are called several times in a forward "
            "pass; ignored_layers leaves them whole, and distill teaches them back",
            len(again),
            some([f"{name} {counts[name]} times" for name in again]),
        )
    dropped = _dropped_outputs(graph, sites, keep)
    # Nothing is lost before the first layer that is cut; the last one ends the chain.
    # To refine the first MLP, its `up` needs a correction too.
    opening = {*cut, *(up for site in sites for up in site.up if recipe.refine)}
    first = next(place for place, name in enumerate(called) if name in opening)
    last = max(place for place, name in enumerate(called) if name in cut)
    between = dict.fromkeys(called[first : last + 1])
    shared = shared_parameters(model)
    tied = [name for name in between if told_apart(shared, [name])]
    several = [name for name in between if counts[name] > 1 and name not in {*tied, *cut}]
    for left, reason in ((tied, "share parameters"), (several, "are called several times")):
        if left:
            count, listed = len(left), some(left)
            logger.warning("%d layers %s and are not fitted: %s", count, reason, listed)
    writers = {written.path for stream in streams for written in stream.written}
    layers = []
    for name in between:
        if name in tied or counts[name] > 1:
            continue
        weight: Any = model.get_submodule(name).weight
        kept = tuple(i for i in range(len(weight)) if i not in dropped.get(name, ()))
        if not kept:  # an MLP goes as a whole
            continue
        outputs = kept if name in dropped else None
        layers.append(Layer(name, cut.get(name), outputs, f"{name}.weight" in writers))
    return layers


def _cut_layers(model: nn.Module, sites: Sequence[Site]) -> dict[str, Site | None]:
    """The layers whose inputs are cut, or that make up for it, with what they read of."""
    cut: dict[str, Site | None] = {}
    for site in sites:
        if isinstance(site, Stream):
            readers = [name for name in site.readers if _is_plain(model.get_submodule(name))]
            cut |= {name: cut.get(name) for name in readers}
            if others := [name for name in site.readers if name not in readers]:
                logger.warning(
                    "%d layers that read the stream of %s are cut and not corrected (%s): they are "
                    "no Linears",
                    len(others),
                    site.name,
                    some(others),
                )
        elif isinstance(site, HeadRanks):
            # Where queries and keys are cut, what is behind them makes up for it.
            cut[site.projection] = site if site.pair == "vo" else cut.get(site.projection)
        elif site.down not in site.up:
            cut[site.down] = site
    return cut


def _dropped_outputs(
    graph: Any, sites: Sequence[Site], keep: Mapping[str, Sequence[int]]
) -> dict[str, set[int]]:
    """Layer -> the outputs that it loses."""
    dropped: dict[str, set[int]] = {}
    for site in sites:
        units = sorted(set(range(site.width)) - set(keep[site.down]))
        if isinstance(site, Stream):
            for written in site.written:
                holder, _, leaf = written.path.rpartition(".")
                layer = graph.model.get_submodule(holder)
                if leaf == "weight" and isinstance(layer, nn.Linear):
                    rows = {i for i in range(layer.out_features) if i % site.width in set(units)}
                    dropped.setdefault(holder, set()).update(rows)
            continue
        for part in group_layers(site_group(graph, site, units)):
            if part.side == "out":
                dropped.setdefault(part.name, set()).update(part.indices)
    return dropped


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a Linear whose weight can be replaced."""
    return type(module) in (nn.Linear, RankLinear, ConstantLinear) and remade(module) is None
