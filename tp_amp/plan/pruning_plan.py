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
from tp_amp.structure.attention.heads import OfHeads
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

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Mapping):
            raise TypeError(
                "a plan keeps a dict of module paths and lists of whole numbers, found a "
                f"{type(self.keep).__name__}"
            )

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
            TypeError: one is no measurement.

        Example:
            See `Report` and `measure_both`.
        """
        for name, side in (("before", before), ("after", after)):
            if side is not None and not isinstance(side, Measurement):
                raise TypeError(
                    f"{name} must be what tp_amp.measure returns, found a {type(side).__name__}"
                )
        if before and after and _alike(before) != _alike(after):
            raise ValueError(
                f"before was measured with {_alike(before)}, after with {_alike(after)}; "
                "measure both on the same batches, device and dtype"
            )
        return Report(
            tuple(self._layer(name) for name in self.keep), self.dense_entropy, before, after
        )

    def then(self, later: PruningPlan) -> PruningPlan:
        """The one plan for the dense model that cuts what this plan and a later one cut together.

        So a model that was pruned over several rounds is saved, and loaded into the dense model.

        Args:
            later: made for the model as this plan has cut it.

        Returns:
            A plan for the dense model, with the entropy that this plan knows of it and the probes
            of both, in order. It knows what this plan knows, and the layers that the later one cut
            first.

        Raises:
            ValueError: the later plan was made for other widths than this one leaves, or one cuts
                heads of an attention and the other channels inside them.
            TypeError: it is no plan.

        Example:
            >>> import tp_amp
            >>> first = tp_amp.PruningPlan({"blocks.0.mlp.fc2": [0, 3, 7]})
            >>> first.then(tp_amp.PruningPlan({"blocks.0.mlp.fc2": [1, 2]})).keep
            {'blocks.0.mlp.fc2': [3, 7]}
        """
        check_plan(later)
        _check_follows(self, later)
        keep = dict(self.keep)
        for name, kept in later.keep.items():
            keep[name] = [self.keep[name][i] for i in kept] if name in self.keep else list(kept)
        probes = {name: list(tried) for name, tried in self.probes.items()}
        for name, tried in later.probes.items():
            probes[name] = [*probes.get(name, ()), *tried]
        # What the later plan knows of layers that were cut before is not of the dense model.
        new = later.keep.keys() - self.keep.keys()
        widths = {name: width for name, width in later.dense_widths.items() if name in new}
        sites = {name: site for name, site in later.sites.items() if name in new}
        return PruningPlan(
            keep,
            {**self.dense_widths, **widths},
            probes,
            self.dense_entropy,
            {**self.sites, **sites},
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
            TypeError: it is no text.
        """
        if not isinstance(text, (str, bytes)):
            raise TypeError(
                f"a plan is read from the text of its file, found a {type(text).__name__}"
            )
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


def _check_follows(first: PruningPlan, later: PruningPlan) -> None:
    """Raise ValueError unless a plan may have been made for the model that another one has cut."""
    of_heads = {s.name: s for s in first.sites.values() if isinstance(s, OfHeads)}
    for site in later.sites.values():
        before = of_heads.get(site.name)
        if before and isinstance(site, OfHeads) and type(site) is not type(before):
            raise ValueError(
                f"this plan cuts {before.units} of {site.name}, the later one {site.units}: no one "
                "plan does both"
            )
    for name in later.keep.keys() & first.keep.keys():
        kept, left = later.keep[name], len(first.keep[name])
        made_for = later.sites[name].width if name in later.sites else None
        made_for = later.dense_widths.get(name, made_for)
        if made_for not in (None, left) or not set(kept) <= set(range(left)):
            found = made_for or f"more than {max(kept)}"
            raise ValueError(
                f"the later plan was made for {found} channels or heads of {name}, this one leaves "
                f"{left}; make it for the model as this plan has cut it"
            )
