"""How long a model takes at each width of its layers: tables measured on its device."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Hashable, Mapping, Sequence

import numpy
import torch

from tp_amp.plan.cutting import narrowed
from tp_amp.running.inputs import runner
from tp_amp.running.restoring import evaluating, seeded
from tp_amp.running.timing import seconds
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.model_structure import ModelStructure, Site

logger = logging.getLogger(__name__)

POINTS = 5  # widths that are measured below the dense one
_WARM_UP, _REPEATS = 1, 7
_Keep = Mapping[Site, Sequence[int]]


class Latency:
    """The milliseconds that each width of each layer saves of a model's forward pass.

    Layers that are alike share a table and are narrowed together, for what one of them saves is
    often less than the noise; each then saves its share. Between the measured widths lies a
    straight line, and what layers save adds up. The dense model runs in turns with the narrowed
    ones, so that other load on the machine slows all of them alike.

    Args:
        structure: what was read of the dense model; its example inputs are run.
        alike: layer -> anything that equal layers have in common.
        round_to: the measured widths of MLPs are multiples of it, since others may be slower.

    Attributes:
        dense: milliseconds of the dense model, the median.

    Raises:
        ValueError: the model is on the meta device.
    """

    def __init__(
        self,
        structure: ModelStructure,
        alike: Mapping[Site, Hashable],
        round_to: int,
    ) -> None:
        self._graph = structure.graph
        self._run = runner(structure.model, structure.forward_fn)
        self._device = next(structure.model.parameters()).device
        if self._device.type == "meta":
            raise ValueError(
                "the latency of a model on the meta device can't be measured; move it to the "
                "device that it shall be fast on"
            )
        self._inputs = structure.inputs.to(str(self._device))
        self._sites = {site.down: site for site in alike}
        groups: dict[Hashable, list[Site]] = {}
        for site, key in alike.items():
            groups.setdefault(key, []).append(site)
        logger.info(
            "timing %d kinds of layers at up to %d widths on %s", len(groups), POINTS, self._device
        )
        measured = [self._table(sites, round_to) for sites in groups.values()]
        self.dense = 1000 * statistics.median(dense for dense, _, _ in measured)
        # By name: widths, and the milliseconds that they save.
        self._tables: dict[str, tuple[list[int], list[float]]] = {
            site.down: (widths, [self.dense * share / len(sites) for share in shares])
            for sites, (_, widths, shares) in zip(groups.values(), measured, strict=True)
            for site in sites
        }

    def saved(self, name: str, width: int) -> float:
        """Milliseconds that one layer saves at a width; below the smallest measured one no more."""
        return float(numpy.interp(width, *self._tables[name]))

    def measure(self, keep: Mapping[str, Sequence[int]]) -> float:
        """Milliseconds of the model cut to `keep`, as it does beside the dense one."""
        _, [ratio] = self._ratios([{self._sites[name]: kept for name, kept in keep.items()}])
        return self.dense * ratio

    def _table(self, sites: list[Site], round_to: int) -> tuple[float, list[int], list[float]]:
        """The dense model's seconds, and what share of them all of these save at which widths."""
        widths = _points(sites[0], round_to)
        dense, ratios = self._ratios([{site: range(width) for site in sites} for width in widths])
        # A narrower layer saves no less than a wider one: what noise, or a width that suits the
        # device badly, says against that is settled so that the model is rather faster than told.
        shares = [max(0.0, 1 - ratio) for ratio in ratios]
        falling = numpy.minimum.accumulate(shares).tolist()
        return dense, [*widths, sites[0].width], [*falling, 0.0]

    @torch.no_grad()
    def _ratios(self, cuts: Sequence[_Keep]) -> tuple[float, list[float]]:
        """The dense model's seconds, and the time with each cut relative to it: medians."""
        dense: list[float] = []
        ratios: list[list[float]] = [[] for _ in cuts]
        with evaluating(self._graph.model, trainable=False), seeded(0):
            for _ in range(_WARM_UP + _REPEATS):
                dense.append(self._seconds({}))
                for cut, found in zip(cuts, ratios, strict=True):
                    found.append(self._seconds(cut) / dense[-1])
        medians = [statistics.median(found[_WARM_UP:]) for found in ratios]
        return statistics.median(dense[_WARM_UP:]), medians

    def _seconds(self, keep: _Keep) -> float:
        with narrowed(self._graph, keep):
            # Once for nothing: the weights were just written, or not used for a while.
            self._inputs.call(self._run)
            return seconds(self._run, self._inputs, self._device)


def _points(site: Site, round_to: int) -> list[int]:
    """Widths from the smallest up, evenly spread, without the dense one."""
    step = 1 if isinstance(site, Attention) else round_to
    even = numpy.linspace(0, site.width, POINTS + 1)[:-1].tolist()
    widths = {max(1, round(width / step)) * step for width in even}
    return sorted(width for width in widths if width < site.width)
