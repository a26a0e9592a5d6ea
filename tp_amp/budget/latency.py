"""How long a model takes at each width of its layers: tables, measured on its device."""

from __future__ import annotations

import copy
import logging
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy
import torch

from tp_amp.plan.cutting import narrowed
from tp_amp.running.inputs import runner
from tp_amp.running.restoring import evaluating
from tp_amp.running.runtimes.building import EAGER, build, check_runtime
from tp_amp.running.timing import seconds
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.streams.residual_stream import Stream

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

    In another runtime each set of widths must be built, which takes seconds to minutes. So the
    table is PyTorch's there too, scaled: by what the model with the smallest widths saves in that
    runtime, and by what `correct` is told of others.

    Args:
        structure: what was read of the dense model; its example inputs are run.
        alike: layer -> anything that equal layers have in common.
        steps: what the measured widths of each layer are multiples of, by its `down`, since others
            may be slower.
        runtime: where the model shall be fast, one of `RUNTIMES`.
        least: the smallest width of each, where that is 0.
        together: layer -> another that goes where it does, and is counted there.

    Attributes:
        dense: milliseconds of the dense model in the runtime, the median.

    Raises:
        ValueError: the model is on the meta device, or the runtime fails on it.
        ImportError: the runtime is not installed.
    """

    def __init__(
        self,
        structure: ModelStructure,
        alike: Mapping[Site, Hashable],
        steps: Mapping[str, int],
        runtime: str = EAGER,
        least: Mapping[str, int] = MappingProxyType({}),
        together: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        check_runtime(runtime, structure.model)
        self._graph, self._forward_fn = structure.graph, structure.forward_fn
        self._runtime, self._scale = runtime, 1.0
        # What models were measured to save, by what the table without its scale says.
        self._known: dict[float, float] = {0.0: 0.0}
        # What was measured last, built: it can be measured again at once.
        self._last: tuple[Mapping[str, Sequence[int]], list[Callable[[], float]]] | None = None
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
        self._together = together
        others = set(together.values())  # which never go alone
        whole = {down for down, width in least.items() if not width} - others
        measured = [
            self._table(sites, steps[sites[0].down], sites[0].down in whole)
            for sites in groups.values()
        ]
        self.dense = 1000 * statistics.median(dense for dense, _, _ in measured)
        # By name: widths, and the milliseconds that they save.
        self._tables: dict[str, tuple[list[int], list[float]]] = {
            site.down: (widths, [self.dense * share / len(sites) for share in shares])
            for sites, (_, widths, shares) in zip(groups.values(), measured, strict=True)
            for site in sites
        }
        if runtime != EAGER:
            self._scale_to_runtime()

    def saved(self, name: str, width: int) -> float:
        """Milliseconds that one layer saves at a width; below the smallest measured one no more.

        What others save that go with it is counted as theirs.
        """
        saved = float(numpy.interp(width, *self._tables[name]))
        if not width and name in self._together:
            saved -= float(numpy.interp(0, *self._tables[self._together[name]]))
        return self._scale * saved

    def measure(self, keep: Mapping[str, Sequence[int]]) -> float:
        """Milliseconds of the model cut to `keep`, as it does beside the dense one."""
        if self._last is None or self._last[0] != keep:
            cut = {self._sites[name]: kept for name, kept in keep.items()}
            self._last = keep, self._in_runtime([cut])
        _, [ratio] = self._compared(self._last[1])
        return self.dense * ratio

    def moved(self, runtime: str) -> Latency:
        """The same table scaled to another runtime."""
        check_runtime(runtime, self._graph.model)
        other = copy.copy(self)
        other._runtime, other._scale, other._last = runtime, 1.0, None
        other._known = {0.0: 0.0}
        other._scale_to_runtime()
        return other

    def correct(self, foreseen: float, measured: float, target: float) -> None:
        """Scale the table so that it is right at a target, by what was measured at some widths.

        What layers save together is more or less than what they save one kind at a time, and not
        in proportion: the target lies between two models that were measured, on a straight line.

        Args:
            foreseen: milliseconds that these widths save by the table.
            measured: milliseconds that the model took with them; if no less than the dense one,
                the table stays.
            target: milliseconds that the model shall take.
        """
        if foreseen <= 0 or measured >= self.dense:
            return
        self._known[foreseen / self._scale] = self.dense - measured
        tables = sorted(self._known)
        saved = numpy.maximum.accumulate([self._known[table] for table in tables])
        needed = min(self.dense - target, saved[-1])  # beyond, in proportion to the most
        if needed > 0:
            self._scale = needed / float(numpy.interp(needed, saved, tables))

    def _scale_to_runtime(self) -> None:
        """Let the table be the runtime's: PyTorch's, with what the smallest widths save there."""
        logger.info("building the dense model and the narrowest one for %s", self._runtime)
        smallest = {name: widths[0] for name, (widths, _) in self._tables.items()}
        streams = [name for name in smallest if isinstance(self._sites[name], Stream)]
        if len(streams) < len(smallest):  # what a stream saves beside the others is no sum
            smallest = {n: width for n, width in smallest.items() if n not in streams}
        foreseen = math.fsum(self.saved(name, width) for name, width in smallest.items())
        cut = {self._sites[name]: range(width) for name, width in smallest.items()}
        self._built_dense = self._built({})
        dense, [ratio] = self._compared(self._in_runtime([cut]))
        self.dense = 1000 * dense
        saved = max(0.0, 1 - ratio) * self.dense
        self._scale = saved / foreseen if foreseen else 0.0
        self._known[foreseen] = saved

    def _table(
        self, sites: list[Site], step: int, whole: bool
    ) -> tuple[float, list[int], list[float]]:
        """The dense model's seconds, and what share of them all of these save at which widths."""
        widths = [*([0] if whole else []), *_points(sites[0].width, step)]
        cuts: list[_Keep] = [{}, *({site: range(width) for site in sites} for width in widths)]
        dense, ratios = self._compared([partial(self._seconds, cut) for cut in cuts])
        # A narrower layer saves no less than a wider one: what noise, or a width that suits the
        # device badly, says against that is settled so that the model is rather faster than told.
        shares = [max(0.0, 1 - ratio) for ratio in ratios]
        falling = numpy.minimum.accumulate(shares).tolist()
        return dense, [*widths, sites[0].width], [*falling, 0.0]

    @torch.no_grad()
    def _compared(self, timed: Sequence[Callable[[], float]]) -> tuple[float, list[float]]:
        """The seconds of the first, the dense model, and of each other relative to it: medians."""
        dense: list[float] = []
        ratios: list[list[float]] = [[] for _ in timed[1:]]
        with evaluating(self._graph.model, trainable=False):
            for _ in range(_WARM_UP + _REPEATS):
                dense.append(timed[0]())
                for run, found in zip(timed[1:], ratios, strict=True):
                    found.append(run() / dense[-1])
        medians = [statistics.median(found[_WARM_UP:]) for found in ratios]
        return statistics.median(dense[_WARM_UP:]), medians

    def _in_runtime(self, cuts: Sequence[_Keep]) -> list[Callable[[], float]]:
        """What times the dense model and some cut ones, built where that is needed."""
        if self._runtime == EAGER:
            return [partial(self._seconds, cut) for cut in ({}, *cuts)]
        runs = [self._built_dense, *map(self._built, cuts)]
        return [partial(seconds, run, self._inputs, self._device) for run in runs]

    def _built(self, keep: _Keep) -> Callable[..., Any]:
        model = self._graph.model
        with evaluating(model, trainable=False), narrowed(self._graph, keep):
            return build(model, self._inputs, self._runtime, self._forward_fn).run

    def _seconds(self, keep: _Keep) -> float:
        with narrowed(self._graph, keep):
            # Once for nothing: the weights were just written, or not used for a while.
            self._inputs.call(self._run)
            return seconds(self._run, self._inputs, self._device)


def _points(dense: int, step: int) -> list[int]:
    """Widths from the smallest up, evenly spread, without the dense one."""
    even = numpy.linspace(0, dense, POINTS + 1)[:-1].tolist()
    widths = {max(1, round(width / step)) * step for width in even}
    return sorted(width for width in widths if width < dense)
