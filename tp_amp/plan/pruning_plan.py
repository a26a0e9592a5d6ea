"""The record of what was kept: made by a pruner, saved as JSON, applied to a model again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tp_amp.plan.cutting import Site, cut, site_group, undone_after_errors
from tp_amp.plan.json_records import (
    from_record,
    read_indices,
    read_typed,
    to_record,
    write_lines,
)
from tp_amp.search.bisection import Probe
from tp_amp.structure.attention.finding import read_attentions
from tp_amp.structure.graph import TracedGraph, build_graph
from tp_amp.structure.mlps import read_mlps

if TYPE_CHECKING:
    from tp_amp.evaluation.measuring import Measurement
    from tp_amp.reports.report import Report

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
        from tp_amp.reports.report import make_report

        return make_report(self, before, after)

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


@torch.inference_mode(False)  # parameters made in it could not be trained
def apply_plan(model: nn.Module, example_inputs: Any, plan: PruningPlan) -> None:
    """Cut the MLPs and heads of a dense model to a plan, through Torch-Pruning, in place.

    Args:
        model: of the architecture that the plan was made for, not yet pruned.
        example_inputs: as for `find_mlps`.
        plan: MLPs and attentions that it does not name stay as they are.

    Raises:
        ValueError: the plan names a layer that is no MLP or attention of the model, another width,
            or kept channels that are empty, repeated or out of range. The model is then as it was.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> plan = tp_amp.PruningPlan({"blocks.0.mlp.fc2": list(range(64))})
        >>> tp_amp.apply_plan(model, torch.randn(1, 3, 224, 224), plan)
        >>> model.blocks[0].mlp.fc1.out_features
        64
    """
    traced = build_graph(model, example_inputs)
    sites = planned_sites(model, example_inputs, traced, plan)
    with undone_after_errors(model):
        for name, site in sites.items():
            for group in cut(traced.graph, site, plan.keep[name]):
                group.prune()


def planned_sites(
    model: nn.Module, example_inputs: Any, traced: TracedGraph, plan: PruningPlan
) -> dict[str, Site]:
    """Find what a plan names, and check that it fits.

    Raises:
        ValueError: as `apply_plan`.
    """
    sites = find_sites(model, example_inputs, traced, plan.keep)
    for name, kept in plan.keep.items():
        width = sites[name].width
        if plan.dense_widths.get(name, width) != width:
            raise ValueError(
                f"{name} has {width} {sites[name].units}, the plan was made for "
                f"{plan.dense_widths[name]}; apply it to the dense model"
            )
        check_kept(sites[name], kept)
    return {name: sites[name] for name in plan.keep}


def check_kept(site: Site, kept: Sequence[int]) -> None:
    """Raise ValueError if kept channels or heads are empty, repeated or out of range."""
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= site.width:
        raise ValueError(
            f"the plan's kept {site.units} of {site.down} must be distinct and within "
            f"0..{site.width - 1}"
        )


def find_sites(
    model: nn.Module, example_inputs: Any, traced: TracedGraph, names: Iterable[str]
) -> dict[str, Site]:
    """Find the MLPs, and where one of `names` is none of them, the attentions too.

    Raises:
        ValueError: one of `names` is neither an MLP's `down` nor an attention's.
    """
    sites: dict[str, Site] = {mlp.down: mlp for mlp in read_mlps(model, traced)}
    reasons: dict[str, str] = {}
    if not sites.keys() >= set(names):
        attentions, reasons = read_attentions(model, example_inputs)
        sites |= {attention.down: attention for attention in attentions}
    for name in names:
        if name not in sites:
            kept = f"; attentions that can lose no heads: {reasons}" if reasons else ""
            raise ValueError(
                f"{name} is neither an MLP of this model nor an attention; they are "
                f"{list(sites)}{kept}"
            )
    return sites


def plan_from_importance(
    model: nn.Module,
    example_inputs: Any,
    importance: Callable[[Any], Tensor | None],
    widths: float | dict[str, int],
) -> PruningPlan:
    """Keep the most important channels or heads at given widths; the model is not cut.

    Args:
        model: the dense model.
        example_inputs: as for `find_mlps`.
        importance: any Torch-Pruning importance that is ready to score.
        widths: the fraction of each MLP's channels that stays, above 0 (at least one channel
            stays), or for each `down` its number of channels; of an attention, of heads.

    Raises:
        ValueError: no MLP is found, `widths` names a layer that is neither MLP nor attention or
            is out of range, or the importance has no finite scores for one.

    Example:
        >>> import timm, torch, torch_pruning as tp, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> images = torch.randn(1, 3, 224, 224)
        >>> plan = tp_amp.plan_from_importance(model, images, tp.importance.LAMPImportance(), 0.5)
        >>> plan.widths
        {'blocks.0.mlp.fc2': 384}
    """
    traced = build_graph(model, example_inputs)
    named = widths if isinstance(widths, dict) else {}
    sites = find_sites(model, example_inputs, traced, named)
    if not sites:
        raise ValueError(f"no MLP was found in {type(model).__name__}")
    dense = {name: site.width for name, site in sites.items()}
    if not isinstance(widths, dict):
        if not 0 < widths <= 1:
            raise ValueError(f"widths must be a fraction above 0, 1 at most, found {widths}")
        widths = {name: max(1, round(width * widths)) for name, width in dense.items()}
    for name, width in widths.items():
        if not 0 < width <= dense[name]:
            raise ValueError(
                f"can't keep {width} {sites[name].units} of {name}, which has {dense[name]}"
            )
    keep = {
        name: sorted(rank_channels(importance, traced.graph, sites[name])[:width])
        for name, width in widths.items()
    }
    kept_sites = {name: sites[name] for name in keep}
    return PruningPlan(keep, {name: dense[name] for name in keep}, sites=kept_sites)


@torch.no_grad()
def rank_channels(importance: Callable[[Any], Tensor | None], graph: Any, site: Site) -> list[int]:
    """Order an MLP's hidden channels or an attention's heads by importance, the best first.

    The score of a head is the sum over its channels. Ties stand by index.

    Raises:
        ValueError: the importance gives None, another number of scores, or a score not finite.
    """
    scores = importance(site_group(graph, site, range(site.width)))
    if scores is None:
        raise ValueError(
            f"the importance has no score for the {type(site).__name__} {site.down}; see the log"
        )
    channels = site.width * site.unit_width
    bad = int((~torch.isfinite(scores)).sum())
    if scores.shape != (channels,) or bad:
        raise ValueError(
            f"the importance's scores for {site.down} must be {channels} finite numbers, found "
            f"shape {tuple(scores.shape)}, {bad} of them not finite; check weights and data"
        )
    sums = scores.view(site.width, -1).sum(1)
    order: list[int] = sums.argsort(descending=True, stable=True).tolist()
    return order
