"""Plan to meet a size with the smallest loss that is foreseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tp_amp.budget.allocation import allocate, width_choices
from tp_amp.budget.budget import Budget, read_target
from tp_amp.budget.mlp_widths import check_narrowable
from tp_amp.importance.reconstruction import ReconstructionImportance
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.running.arguments import check_importance, check_whole
from tp_amp.running.checks import check_model
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.selection import Layers, selected


def plan_for_target(
    model: nn.Module,
    example_inputs: Any,
    importance: ReconstructionImportance,
    target: Mapping[str, float],
    *,
    round_to: int = 1,
    ignored_layers: Layers | None = None,
    only_layers: Layers | None = None,
) -> PruningPlan:
    """Plan to meet a size with the smallest loss that `importance` foresees; nothing is cut.

    The widths that `compensate` is at its best with: no search, no more forward passes than the
    importance has made and a latency needs to be measured.

    Args:
        model: the dense model.
        example_inputs: as for `find_mlps`.
        importance: collected on the model, or with `data`.
        target: `{"params": 0.6}`, `{"macs": 0.6}` or `{"latency": 0.6}`: a fraction of the dense
            model, or above 1 an absolute number. The latency is that of one forward pass on the
            example inputs, in milliseconds above 1; it is measured on the model's device.
        round_to: widths are multiples of it.
        ignored_layers: what stays as it is: modules, or patterns of module paths, as
            `"blocks.0.mlp"`, `"*.mlp"`, `"blocks.0-3"`.
        only_layers: named in the same ways; MLPs without a layer in it stay as they are.

    Raises:
        ValueError: no MLP is found, the target is out of reach (its range is told), or an MLP
            shares its `down` with the attention (timm's parallel blocks with one projection).

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> images = [torch.randn(4, 3, 224, 224)]
        >>> importance = tp_amp.ReconstructionImportance(data=images)
        >>> plan = tp_amp.plan_for_target(model, images[0][:1], importance, {"params": 0.7})
        >>> fitted = tp_amp.compensate(model, plan, images)
    """
    read_target(target)
    check_whole(round_to=round_to)
    check_importance(importance)
    if not isinstance(importance, ReconstructionImportance):
        raise TypeError(
            "plan_for_target needs the foreseen errors of a ReconstructionImportance, found "
            f"{type(importance).__name__}; AdaptiveMLPPruner(target=...) meets a size with any"
        )
    check_model(model, values=True)
    structure = ModelStructure(model, example_inputs)
    if not structure.mlps:
        raise ValueError(
            f"no MLP was found in {type(model).__name__}; tp_amp.inspect tells for each layer why"
        )
    mlps = selected(model, structure.mlps, ignored_layers, only_layers)
    check_narrowable(mlps, round_to=round_to)
    sites: list[Site] = [*mlps]
    fused = [site.down for site in sites if site.first]
    if fused:
        raise ValueError(
            f"{fused} read attention and MLP side by side, whose losses are not foreseen apart; "
            "add them to ignored_layers, or use plan_from_importance or AdaptiveMLPPruner"
        )
    return plan_within(Budget(target, structure, sites, round_to), structure, sites, importance)


def plan_within(
    budget: Budget,
    structure: ModelStructure,
    sites: Sequence[Site],
    importance: ReconstructionImportance,
) -> PruningPlan:
    """`plan_for_target` where all is read: the widths within a budget of the smallest loss.

    Args:
        budget: what the widths cost, and how much they may.
        structure: what was read of the model.
        sites: its MLPs to cut.
        importance: has seen what their `down` layers read, or has `data`.

    Raises:
        ValueError: the budget is out of reach, or a layer was not seen and there is no `data`.
    """
    model, round_to = structure.model, budget.round_to
    budget.check({site.down: int(width_choices(site.width, round_to)[0]) for site in sites})
    layers = [
        site.down
        for site in sites
        if not importance.knows(site.down, model.get_submodule(site.down))
    ]
    if layers:
        if importance.data is None:
            raise ValueError(
                f"the importance has not seen {layers}, or not with these weights; call "
                "importance.collect(model, batches, layers=...) or pass data="
            )
        importance.collect(model, importance.data, layers=layers, progress=False)
    errors = {site.down: importance.errors[site.down] for site in sites}
    costs = {site.down: budget.costs(site.down) for site in sites}
    spent = budget.cost(dict.fromkeys(costs, 0))
    widths = allocate(errors, costs, budget.amount - spent, round_to)
    keep = {n: sorted(importance.orders[n][:width].tolist()) for n, width in widths.items()}
    budget.confirm(keep)
    dense = {site.down: site.width for site in sites}
    return PruningPlan(keep, dense, sites={site.down: site for site in sites})
