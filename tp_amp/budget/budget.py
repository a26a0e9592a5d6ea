"""Sizes to prune to: what each width costs, and what a target asks for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tp_amp.budget.latency import Latency
from tp_amp.budget.removal import going_together, least_widths
from tp_amp.budget.unit_costs import unit_costs
from tp_amp.budget.width_arguments import RoundTo
from tp_amp.budget.width_kinds import kind_of, steps_of
from tp_amp.running.arguments import is_number
from tp_amp.running.runtimes.building import EAGER, check_runtime
from tp_amp.structure.model_structure import ModelStructure, Site

logger = logging.getLogger(__name__)

KINDS = ("params", "macs", "latency")
_UNITS = {"params": "params", "macs": "macs", "latency": "ms of latency"}
# A size that comes that close below the target is taken.
_CLOSE = 0.01
_NOISE = 1e-9  # of sums, relative to them
# The table adds up what the layers save. A model that is off by more is told, and before that
# other widths are looked for where it is off by more than half of that.
_FAR, _OFF = 0.1, 0.05


class Budget:
    """How large a model may be, and how large it is at given widths.

    Args:
        target: `{"params": 0.6}`, `{"macs": 0.6}` or `{"latency": 0.6}`: a fraction of the dense
            model up to 1, or an absolute number above, of latency in milliseconds of one forward
            pass on the example inputs.
        structure: what was read of the dense model; on its example inputs MACs are counted and the
            latency is measured.
        sites: what may be cut.
        round_to: as for `steps_of`; at such widths the latency is measured.
        runtime: where the latency is measured; see `RUNTIMES`.
        min_width: the smallest width of MLPs; with 0 whole ones and whole attentions may go.

    Attributes:
        dense: what the dense model costs.
        steps: what the widths of each site are multiples of.
        least: the smallest width of each site.
        together: the values of an attention that may go -> its queries and keys, which go too.
        measured: after `confirm`, the latency of the cut model in milliseconds.

    Raises:
        ValueError: the target is none of these, or the latency can't be measured.
        ImportError: the runtime is not installed.
    """

    def __init__(
        self,
        target: Mapping[str, float],
        structure: ModelStructure,
        sites: Sequence[Site],
        round_to: RoundTo = 1,
        runtime: str = EAGER,
        min_width: int = 1,
    ) -> None:
        self.kind, amount = read_target(target)
        self.target, self.steps = dict(target), steps_of(sites, round_to)
        self.widths = {site.down: site.width for site in sites}
        self.least = least_widths(structure, sites, min_width, self.steps)
        self.together = going_together(sites, self.least)
        self.latency: Latency | None = None
        self.measured: float | None = None
        self._measured_at: Mapping[str, Sequence[int]] | None = None
        going = [site for site in sites if kind_of(site) == "vo" and not self.least[site.down]]
        self._counted = unit_costs(self.kind, structure, sites, going)
        self.dense, self.units = self._counted.dense, self._counted.units
        if self.kind == "latency":
            # Sites of one width whose channels make as many MACs have the same shapes and tokens.
            alike = {
                site: (kind_of(site), site.width, self.least[site.down], self.units[site.down])
                for site in sites
            }
            self.latency = Latency(structure, alike, self.steps, runtime, self.least, self.together)
            self.dense = self.latency.dense
            self.units = {site.down: self.saved(site.down, 0) / site.width for site in sites}
        self.amount = amount * self.dense if amount <= 1 else amount

    def saved(self, name: str, width: int) -> float:
        """What one site at a width saves of the dense model's cost."""
        if self.latency is not None:
            return self.latency.saved(name, width)
        if not width and name in self._counted.whole:
            # All of the attention, of which what its queries and keys save is counted as theirs.
            other = self.together.get(name)
            return self._counted.whole[name] - (self.saved(other, 0) if other else 0.0)
        return self._beside(name, width)

    def _beside(self, name: str, width: int) -> float:
        """What one site saves, without what no other can save too: an attention's products."""
        if self.latency is not None:
            return self.latency.saved(name, width)
        return (self.widths[name] - width) * self.units[name]

    def cost(self, widths: Mapping[str, int]) -> float:
        """Parameters, MACs or milliseconds of the model at given widths."""
        return self.separate_cost(widths, self.widths)

    def separate_cost(
        self, widths: Mapping[str, int], fixed: Mapping[str, int] = MappingProxyType({})
    ) -> float:
        """What `cost` would be if each site saved as much as it saves alone.

        It is less where two sites share a layer, as MLPs do of which one's `down` is the other's
        `up`: what both cut of it counts twice.

        Args:
            widths: of all sites.
            fixed: those of them with which all others do not save alone.
        """
        cut = {name: self.widths[name] - width for name, width in widths.items()}
        twice = [
            self._counted.twice(one, self._beside(one, widths[one]), {other: cut[other]})
            for one, other in self._counted.shared
            if (one in fixed or other in fixed) and one in widths and other in widths
        ]
        saved = [self.saved(name, width) for name, width in widths.items()]
        return self.dense - math.fsum(saved) + math.fsum(twice)

    def costs(self, name: str, fixed: Mapping[str, int] = MappingProxyType({})) -> Tensor:
        """What one site costs with 0, 1, ... channels or heads kept, `(width + 1,)`.

        Args:
            name: its `down`.
            fixed: widths of others, beside which it costs that.
        """
        cut = {other: self.widths[other] - width for other, width in fixed.items()}
        saved, beside = (
            torch.tensor(
                [save(name, kept) for kept in range(self.widths[name] + 1)], dtype=torch.double
            )
            for save in (self.saved, self._beside)
        )
        saved -= self._counted.twice(name, beside, cut)
        return saved[0] - saved

    def tolerances(self, increase: float) -> dict[str, float]:
        """Allow each site an increase in proportion to what it costs, the mean site `increase`.

        So MLPs that hold more of the model may cost more of the entropy.
        """
        costs = {name: self.units[name] * width for name, width in self.widths.items()}
        mean = math.fsum(costs.values()) / len(costs)
        return {name: increase * (cost / mean) if cost else 0.0 for name, cost in costs.items()}

    def check(self, smallest: Mapping[str, int]) -> None:
        """Raise ValueError with the reachable range if the target is out of it."""
        least = self.cost(smallest)
        if (1 - _NOISE) * least <= self.amount < least:
            self.amount = least  # sums of the same numbers in another order
        if least <= self.amount <= self.dense:
            return
        # Rounded inwards: whoever takes an end of what is told gets it.
        low, high = _rounded((1 - _NOISE) * least, math.ceil), _rounded(self.dense, math.floor)
        if low >= high:
            than, remedy = "smaller", "allow smaller ones"
            if self.latency is not None:
                than, remedy = "faster", "time larger inputs, or give a target of params or macs"
            raise ValueError(
                f"cutting makes the model no {than}: it has {self.dense:.4g} {self.unit}, "
                f"and {least:.4g} with the smallest widths {dict(smallest)}; {remedy}"
            )
        fraction = math.ceil(1000 * (1 - _NOISE) * least / self.dense) / 1000
        raise ValueError(
            f"the target of {self.amount:.4g} {self.unit} can't be met: reachable are "
            f"{low:.4g} to {high:.4g}, fractions {fraction:.3f} to 1"
        )

    @property
    def unit(self) -> str:
        """What costs are counted in."""
        return _UNITS[self.kind]

    def is_close(self, cost: float) -> bool:
        """Whether a cost is below the target and hardly so."""
        return (1 - _CLOSE) * self.amount <= cost <= self.amount

    def correct(self, keep: Mapping[str, Sequence[int]]) -> bool:
        """Measure the latency of the model cut to `keep`, and let the table tell it.

        Returns:
            Whether it misses the target and the table did not foresee that, so that with the table
            as it is now there are other widths that come closer.
        """
        if self.latency is None:
            return False
        widths = {name: len(kept) for name, kept in keep.items()}
        foreseen, measured = self.cost(widths), self._measure(self.latency, keep)
        if not _is_far(measured, self.amount, _OFF) or not _is_far(measured, foreseen, _OFF):
            return False
        self.latency.correct(self.dense - foreseen, measured, self.amount)
        logger.info("measured %.4g ms where the table had %.4g ms", measured, foreseen)
        return self.cost(widths) != foreseen

    def _measure(self, latency: Latency, keep: Mapping[str, Sequence[int]]) -> float:
        if self.measured is None or self._measured_at != keep:
            self.measured, self._measured_at = latency.measure(keep), keep
        return self.measured

    def confirm(self, keep: Mapping[str, Sequence[int]]) -> None:
        """Measure the latency of the model cut to `keep`; one warning tells what misses the target.

        That is a latency far off its target, or off what the table foresees, else a size far below.
        """
        foreseen = self.cost({name: len(kept) for name, kept in keep.items()})
        if self.latency is not None:
            self.measured = self._measure(self.latency, keep)
            told = (
                "the latency is %.4g ms (%.3f of the dense model's), the target %.4g ms (%.3f), "
                "from the table %.4g ms (%.3f)"
            )
            times = self.measured, self.amount, foreseen
            values = [value for time in times for value in (time, time / self.dense)]
            noise = _is_far(self.measured, foreseen)
            if noise or _is_far(self.measured, self.amount):
                remedy = "measure again on a machine that does nothing else"
                if not (noise or self.is_close(foreseen)):
                    remedy = "a smaller round_to comes closer"
                logger.warning(f"{told}; {remedy}", *values)
                return
            logger.info(told, *values)
        if not self.is_close(foreseen):
            logger.warning(
                "the widths end at %.4g %s (%.3f of the dense model), below the target of %.4g "
                "(%.3f): the next wider ones are above it; a smaller round_to comes closer",
                foreseen,
                self.unit,
                foreseen / self.dense,
                self.amount,
                self.amount / self.dense,
            )


def _is_far(measured: float, wanted: float, share: float = _FAR) -> bool:
    return abs(measured - wanted) > share * wanted


def check_target(target: Any, runtime: Any) -> None:
    """Check a target and where its latency is measured, before anything is read.

    Raises:
        TypeError: the target is no dict.
        ValueError: it is none of those known, or the runtime is none, or one without a latency.
        ImportError: the runtime is not installed.
    """
    kind, _ = read_target(target)
    check_runtime(runtime)
    if runtime != EAGER and kind != "latency":
        raise ValueError(
            f"runtime={runtime!r} is where a latency is measured, and the target is "
            f"{dict(target)}; leave the runtime out, or give a target of latency"
        )


def read_target(target: Any) -> tuple[str, float]:
    """The kind and the amount of a target; before anything is read.

    Raises:
        TypeError: it is no dict.
        ValueError: it names none of the kinds, or several, or its amount is no positive number.
    """
    if not isinstance(target, Mapping):
        raise TypeError(f'target must be a dict such as {{"params": 0.6}}, found {target!r}')
    if len(target) != 1 or not set(target) <= set(KINDS):
        raise ValueError(f"target must name one of {KINDS}, found {dict(target)}")
    [(kind, amount)] = target.items()
    if not is_number(amount) or amount <= 0:
        raise ValueError(f"target must be a positive number, found {dict(target)}")
    return kind, float(amount)


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    """Four digits of a number, as they are told, the last one rounded up or down."""
    scale = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return towards(value / scale) * scale
