"""The record of what was kept: made by a pruner, saved as JSON, applied to a model again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tp_amp.plan.json_records import (
    from_record,
    read_indices,
    read_typed,
    to_record,
    write_lines,
)
from tp_amp.reports.numbers import Layer, Measurement, Probe
from tp_amp.reports.report import Report
from tp_amp.structure.model_structure import Site

FORMAT = 1


@dataclass(frozen=True)
class PruningPlan:
    """Which hidden channels of each MLP, and heads of each attention, stay.

    An attention stands under its output projection, with its heads where an MLP has channels.

    Attributes:
        keep: module path of each `down` -> the kept channels or heads, ascending indices into the
            dense layer.
        dense_widths: module path of `down` -> channels or heads of the dense layer, where known.
        probes: module path of `down` -> the widths the search tried, in order, each with the
            entropy (nats) on the calibration images and whether it was accepted.
        dense_entropy: entropy (nats) of the dense model on the calibration images, where known.
        sites: module path of `down` -> the `MLP` or `Attention` that is cut, where known; with
            them a plan is applied without tracing (`load_pruned`).

    Example:
        >>> import tp_amp
        >>> plan = tp_amp.PruningPlan({"blocks.0.mlp.fc2": [0, 3]})
        >>> plan.widths
        {'blocks.0.mlp.fc2': 2}
        >>> tp_amp.PruningPlan.from_json(plan.to_json()) == plan
        True
    """

    keep: dict[str, list[int]]
    dense_widths: dict[str, int] = field(default_factory=dict)
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    dense_entropy: float | None = None
    sites: dict[str, Site] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, int]:
        """Module path of each `down` -> number of channels or heads that stay."""
        return {name: len(kept) for name, kept in self.keep.items()}

    def report(self, before: Measurement | None = None, after: Measurement | None = None) -> Report:
        """Show the plan: tables for the terminal and notebooks, JSON, a page with plots.

        Args:
            before: measurement of the dense model, by `measure` before it is cut or `measure_both`.
            after: measurement of the pruned model, under the same conditions.

        Raises:
            ValueError: the two were not measured under the same conditions, on as many images.

        Example:
            See `Report` and `measure_both`.
        """
        if before and after and _alike(before) != _alike(after):
            raise ValueError(
                f"before was measured with {_alike(before)}, after with {_alike(after)}; "
                "measure both on the same batches, device and dtype"
            )
        return Report(
            tuple(self._layer(name) for name in self.keep), self.dense_entropy, before, after
        )

    def _layer(self, name: str) -> Layer:
        site = self.sites.get(name)
        dense = self.dense_widths.get(name, site.width if site else None)
        units = site.units if site else "channels or heads"
        return Layer(name, units, dense, len(self.keep[name]), tuple(self.probes.get(name, ())))

    def to_json(self) -> str:
        """Write the plan as JSON, one line for each layer's kept channels."""
        probes = {
            n: [[p.width, p.entropy, p.accepted] for p in ps] for n, ps in self.probes.items()
        }
        parts = {
            "format": FORMAT,
            "dense_entropy": self.dense_entropy,
            "dense_widths": self.dense_widths,
            "probes": probes,
            "sites": {name: to_record(site) for name, site in self.sites.items()},
            "keep": self.keep,
        }
        lines = [f'  "{key}": {write_lines(value)}' for key, value in parts.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan that `to_json` wrote.

        Raises:
            ValueError: the text is not such a plan, or of a newer format.
        """
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the plan is not JSON: {error}") from error
        if not isinstance(record, dict) or "keep" not in record:
            raise ValueError("the JSON is not a pruning plan: it has no 'keep'")
        if record.get("format") != FORMAT:
            raise ValueError(
                f"the plan is of format {record.get('format')}, this tp_amp reads {FORMAT}; "
                "upgrade tp_amp or save the plan again"
            )
        try:
            plan = cls(
                keep={str(n): read_indices(kept) for n, kept in record["keep"].items()},
                dense_widths={
                    str(n): read_typed(w, int) for n, w in record["dense_widths"].items()
                },
                probes={
                    str(name): [
                        Probe(read_typed(w, int), float(read_typed(e, int | float)), bool(a))
                        for w, e, a in probes
                    ]
                    for name, probes in record["probes"].items()
                },
                dense_entropy=read_typed(record["dense_entropy"], int | float | None),
                sites={str(n): from_record(r) for n, r in record.get("sites", {}).items()},
            )
            wrong = [name for name, site in plan.sites.items() if site.down != name]
            if wrong:
                raise ValueError(f"the sites of {wrong} name another layer as their down")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the pruning plan is damaged: {error!r}") from error
        return plan


def _alike(measured: Measurement) -> str:
    return f"{measured.conditions}, {measured.labelled_images} labelled images"


def check_plan(plan: Any) -> None:
    """Raise TypeError for what is no plan."""
    if not isinstance(plan, PruningPlan):
        remedy = "; make one of it: tp_amp.PruningPlan(...)" if isinstance(plan, Mapping) else ""
        raise TypeError(f"the plan must be a PruningPlan, found a {type(plan).__name__}{remedy}")
