"""Sizes to prune to: what each width costs, and what a target asks for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.budget.latency import Latency
from tp_amp.plan.cutting import narrowed
from tp_amp.running.arguments import is_number
from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import shapes_first
from tp_amp.structure.macs import count_macs
from tp_amp.structure.model_structure import ModelStructure, Site

logger = logging.getLogger(__name__)

KINDS = ("params", "macs", "latency")
_UNITS = {"params": "params", "macs": "macs", "latency": "ms of latency"}
# A size that comes that close below the target is taken.
_CLOSE = 0.01
_NOISE = 1e-9  # of sums, relative to them
# The table adds up what the layers save; a model that is off by more is told.
_FAR = 0.1


class Budget:
    """How large a model may be, and how large it is at given widths.

    Args:
        target: `{"params": 0.6}`, `{"macs": 0.6}` or `{"latency": 0.6}`: a fraction of the dense
            model up to 1, or an absolute number above, of latency in milliseconds of one forward
            pass on the example inputs.
        structure: what was read of the dense model; on its example inputs MACs are counted and the
            latency is measured.
        sites: what may be cut.
        round_to: widths of MLPs are multiples of it, and at such ones the latency is measured.

    Attributes:
        dense: what the dense model costs.
        measured: after `confirm`, the latency of the cut model in milliseconds.

    Raises:
        ValueError: the target is none of these, or the latency can't be measured.
    """

    def __init__(
        self,
        target: Mapping[str, float],
        structure: ModelStructure,
        sites: Sequence[Site],
        round_to: int = 1,
    ) -> None:
        self.kind, amount = read_target(target)
        self.target, self.round_to = dict(target), round_to
        self.widths = {site.down: site.width for site in sites}
        self.latency: Latency | None = None
        self.measured: float | None = None
        macs = partial(_macs, forward_fn=structure.forward_fn)
        measure = _parameters if self.kind == "params" else macs
        self.dense, self.units = _costs(measure, structure, sites)
        if self.kind == "latency":
            # Sites of one width whose channels make as many MACs have the same shapes and tokens.
            alike = {site: (type(site), site.width, self.units[site.down]) for site in sites}
            self.latency = Latency(structure, alike, round_to)
            self.dense = self.latency.dense
            self.units = {site.down: self.saved(site.down, 0) / site.width for site in sites}
        self.amount = amount * self.dense if amount <= 1 else amount

    def saved(self, name: str, width: int) -> float:
        """What one site at a width saves of the dense model's cost."""
        if self.latency is not None:
            return self.latency.saved(name, width)
        return (self.widths[name] - width) * self.units[name]

    def cost(self, widths: Mapping[str, int]) -> float:
        """Parameters, MACs or milliseconds of the model at given widths."""
        return self.dense - math.fsum(self.saved(name, width) for name, width in widths.items())

    def costs(self, name: str) -> Tensor:
        """What one site costs with 0, 1, ... channels or heads kept, `(width + 1,)`."""
        saved = [self.saved(name, width) for width in range(self.widths[name] + 1)]
        return saved[0] - torch.tensor(saved, dtype=torch.float64)

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
        if least > self.dense * (1 + _NOISE):
            raise ValueError(
                f"cutting makes the model no smaller: it has {self.dense:.4g} {self.unit}, "
                f"and {least:.4g} with the smallest widths {dict(smallest)}; allow smaller ones"
            )
        if (1 - _NOISE) * least <= self.amount < least:
            self.amount = least  # sums of the same numbers in another order
        if not least <= self.amount <= self.dense:
            # Rounded inwards: whoever takes an end of what is told gets it.
            low, high = _rounded((1 - _NOISE) * least, math.ceil), _rounded(self.dense, math.floor)
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

    def confirm(self, keep: Mapping[str, Sequence[int]]) -> None:
        """Measure the latency of the model cut to `keep`; one warning tells what misses the target.

        That is a latency far off its target, or off what the table foresees, else a size far below.
        """
        foreseen = self.cost({name: len(kept) for name, kept in keep.items()})
        if self.latency is not None:
            self.measured = self.latency.measure(keep)
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


def _is_far(measured: float, wanted: float) -> bool:
    return abs(measured - wanted) > _FAR * wanted


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


def _costs(
    measure: Callable[[nn.Module, Inputs], float],
    structure: ModelStructure,
    sites: Sequence[Site],
) -> tuple[float, dict[str, float]]:
    """The dense model's cost, and that of one channel or head of each site."""
    model = structure.model

    def costs(inputs: Inputs, _: Any) -> tuple[float, dict[str, float]]:
        dense, units = measure(model, inputs), {}
        for site in sites:
            with narrowed(structure.graph, {site: range(1, site.width)}):
                units[site.down] = dense - measure(model, inputs)
        return dense, units

    return shapes_first(model, structure.inputs, costs)


def _parameters(model: nn.Module, inputs: Inputs) -> float:
    return sum(parameter.numel() for parameter in model.parameters())


def _macs(model: nn.Module, inputs: Inputs, forward_fn: Callable[..., Any] | None = None) -> float:
    return count_macs(model, inputs, forward_fn)[""]
