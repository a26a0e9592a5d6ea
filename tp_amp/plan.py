"""The record of what was kept: made by a pruner, saved as JSON, applied to a model again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.cutting import cut, mlp_group
from tp_amp.graph import build_graph
from tp_amp.mlps import MLP, read_mlps
from tp_amp.search import Probe

FORMAT = 1


@dataclass(frozen=True)
class PruningPlan:
    """Which hidden channels of each MLP stay.

    Attributes:
        keep: module path of each MLP's `down` -> the kept channels, ascending indices into the
            dense layer.
        dense_widths: module path of `down` -> hidden channels of the dense layer, where known.
        probes: module path of `down` -> the widths the search tried, in order, each with the
            entropy (nats) on the calibration images and whether it was accepted.
        dense_entropy: entropy (nats) of the dense model on the calibration images, where known.

    Example:
        >>> plan = PruningPlan({"blocks.0.mlp.fc2": [0, 3]})
        >>> plan.widths
        {'blocks.0.mlp.fc2': 2}
        >>> PruningPlan.from_json(plan.to_json()) == plan
        True
    """

    keep: dict[str, list[int]]
    dense_widths: dict[str, int] = field(default_factory=dict)
    probes: dict[str, list[Probe]] = field(default_factory=dict)
    dense_entropy: float | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Module path of each MLP's `down` -> number of channels that stay."""
        return {name: len(kept) for name, kept in self.keep.items()}

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
            "keep": self.keep,
        }
        lines = [f'  "{key}": {_lines(value)}' for key, value in parts.items()]
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
                keep={str(n): [_index(i) for i in kept] for n, kept in record["keep"].items()},
                dense_widths={str(n): _index(w) for n, w in record["dense_widths"].items()},
                probes={
                    str(name): [Probe(_index(w), float(e), bool(a)) for w, e, a in probes]
                    for name, probes in record["probes"].items()
                },
                dense_entropy=record["dense_entropy"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the pruning plan is damaged: {error!r}") from error
        return plan


def apply_plan(model: nn.Module, example_inputs: Any, plan: PruningPlan) -> None:
    """Cut the MLPs of a dense model to a plan, through Torch-Pruning, in place.

    Args:
        model: of the architecture that the plan was made for, not yet pruned.
        example_inputs: as for `find_mlps`.
        plan: MLPs that it does not name stay as they are.

    Raises:
        ValueError: the plan names a layer that is no MLP of the model, another width, or kept
            channels that are empty, repeated or out of range. The model is then as it was.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> plan = tp_amp.PruningPlan({"blocks.0.mlp.fc2": list(range(64))})
        >>> tp_amp.apply_plan(model, torch.randn(1, 3, 224, 224), plan)
        >>> model.blocks[0].mlp.fc1.out_features
        64
    """
    traced = build_graph(model, example_inputs)
    mlps = {mlp.down: mlp for mlp in read_mlps(model, traced)}
    for name, kept in plan.keep.items():
        if name not in mlps:
            raise ValueError(
                f"the plan names {name}, which is no MLP of this model; its MLPs are {list(mlps)}"
            )
        width = mlps[name].width
        if plan.dense_widths.get(name, width) != width:
            raise ValueError(
                f"{name} has {width} hidden channels, the plan was made for "
                f"{plan.dense_widths[name]}; apply it to the dense model"
            )
        if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= width:
            raise ValueError(
                f"the plan's kept channels of {name} must be distinct and within 0..{width - 1}"
            )
    for name, kept in plan.keep.items():
        for group in cut(traced.graph, mlps[name], kept):
            group.prune()


def plan_from_importance(
    model: nn.Module,
    example_inputs: Any,
    importance: Callable[[Any], Tensor | None],
    widths: float | dict[str, int],
) -> PruningPlan:
    """Keep each MLP's most important channels at given widths; the model is not cut.

    Args:
        model: the dense model.
        example_inputs: as for `find_mlps`.
        importance: any Torch-Pruning importance that is ready to score.
        widths: the fraction of each MLP's channels that stays, above 0 (at least one channel
            stays), or a width for each `down`.

    Raises:
        ValueError: no MLP is found, `widths` names a layer that is no MLP or is out of range, or
            the importance has no finite scores for an MLP.

    Example:
        >>> import timm, torch, torch_pruning as tp, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> images = torch.randn(1, 3, 224, 224)
        >>> plan = tp_amp.plan_from_importance(model, images, tp.importance.LAMPImportance(), 0.5)
        >>> plan.widths
        {'blocks.0.mlp.fc2': 384}
    """
    traced = build_graph(model, example_inputs)
    mlps = read_mlps(model, traced)
    if not mlps:
        raise ValueError(f"no MLP was found in {type(model).__name__}")
    dense = {mlp.down: mlp.width for mlp in mlps}
    if not isinstance(widths, dict):
        widths = {name: max(1, round(width * widths)) for name, width in dense.items()}
    for name, width in widths.items():
        if not 0 < width <= dense.get(name, 0):
            raise ValueError(
                f"can't keep {width} channels of {name}; the MLPs and their widths are {dense}"
            )
    keep = {
        mlp.down: sorted(rank_channels(importance, traced.graph, mlp)[: widths[mlp.down]])
        for mlp in mlps
        if mlp.down in widths
    }
    return PruningPlan(keep, {name: dense[name] for name in keep})


@torch.no_grad()
def rank_channels(importance: Callable[[Any], Tensor | None], graph: Any, mlp: MLP) -> list[int]:
    """Order an MLP's hidden channels by importance, the best first; ties by index.

    Raises:
        ValueError: the importance gives None, another number of scores, or a score not finite.
    """
    scores = importance(mlp_group(graph, mlp, range(mlp.width)))
    if scores is None:
        raise ValueError(f"the importance has no score for the MLP {mlp.down}; see the log")
    bad = int((~torch.isfinite(scores)).sum())
    if scores.shape != (mlp.width,) or bad:
        raise ValueError(
            f"the importance's scores for {mlp.down} must be {mlp.width} finite numbers, found "
            f"shape {tuple(scores.shape)}, {bad} of them not finite; check weights and data"
        )
    order: list[int] = scores.argsort(descending=True, stable=True).tolist()
    return order


def _lines(value: Any) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ",".join(f"\n    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "}"


def _index(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected an integer, found {value!r}")
    return value
