"""Carry a plan out on a dense model."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, overload

import torch
from torch import nn

from tp_amp.plan.coordinates import tell_other_coordinates
from tp_amp.plan.cutting import check_fits, cut_all, least_reason, undone_after_errors
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.running.ties import shared_parameters, told_apart
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.ranks.head_ranks import HeadRanks


@overload
def apply_plan(model: nn.Module, plan: PruningPlan, example_inputs: Any = None) -> None: ...


@overload
def apply_plan(model: nn.Module, example_inputs: Any, plan: PruningPlan) -> None: ...


@torch.inference_mode(False)  # parameters made in it could not be trained
def apply_plan(model: nn.Module, *arguments: Any, **named: Any) -> None:  # noqa: D417
    """Cut the MLPs and heads of a dense model to a plan, through Torch-Pruning, in place.

    A plan of a pruner, `plan_for_target` or `plan_from_importance` knows its layers and is cut
    without tracing. A plan made by hand needs example inputs; it knows its layers afterwards. One
    that names an attention which does not tell its number of heads is given what `find_attentions`
    finds with `num_heads=`: `PruningPlan(keep, sites={attention.down: attention})`.

    Args:
        model: of the architecture that the plan was made for, not yet pruned.
        plan: MLPs and attentions that it does not name stay as they are. It may also stand after
            the example inputs.
        example_inputs: as for `find_mlps`; read for a plan that does not know all its layers.

    Raises:
        ValueError: the plan names a layer that is no MLP or attention of the model, another width,
            or kept channels that are repeated or out of range, or none where one has to stay; or it
            does not know its layers and there are no example inputs. The model is then as it was.
        TypeError: there is no plan.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> plan = tp_amp.PruningPlan({"blocks.0.mlp.fc2": list(range(64))})
        >>> tp_amp.apply_plan(model, plan, torch.randn(1, 3, 224, 224))
        >>> model.blocks[0].mlp.fc1.out_features
        64
    """
    plan, example_inputs = _plan_and_inputs(arguments, named)
    if example_inputs is None and not knows_sites(plan):
        raise ValueError(
            "the plan was made by hand and does not know what its layers are; pass example inputs "
            "too: apply_plan(model, plan, example_inputs)"
        )
    structure = ModelStructure(model, () if example_inputs is None else example_inputs)
    sites = planned_sites(structure, plan)
    tell_other_coordinates(model, sites, plan.keep)
    with undone_after_errors(model):
        cut_all(structure.graph, sites, plan.keep)
    plan.sites.update(sites)


def _plan_and_inputs(arguments: Sequence[Any], named: dict[str, Any]) -> tuple[PruningPlan, Any]:
    """The plan and the example inputs, in either order or by name."""
    plans = [value for value in (*arguments, *named.values()) if isinstance(value, PruningPlan)]
    others = [value for value in arguments if not isinstance(value, PruningPlan)]
    others += [named[name] for name in ("example_inputs",) if name in named]
    if len(plans) != 1 or len(others) > 1 or not named.keys() <= {"plan", "example_inputs"}:
        found = [type(value).__name__ for value in arguments] + sorted(named)
        raise TypeError(
            f"apply_plan takes a model, a PruningPlan and maybe example inputs, found {found}"
        )
    return plans[0], others[0] if others else None


def knows_sites(plan: PruningPlan) -> bool:
    """Whether a plan knows what every layer that it names is."""
    return plan.sites.keys() >= plan.keep.keys()


def planned_sites(structure: ModelStructure, plan: PruningPlan) -> dict[str, Site]:
    """What a plan names, found unless the plan knows it, and checked.

    Raises:
        ValueError: as `apply_plan`.
    """
    for down, kept in plan.keep.items():
        if isinstance(kept, Sequence) and any(isinstance(i, bool) for i in kept):
            raise TypeError(
                f"the plan must keep a list of whole numbers of {down}, found truth values; pass "
                "the places where the mask is true"
            )
        whole = isinstance(kept, Sequence) and all(isinstance(i, Integral) for i in kept)
        if not whole or isinstance(kept, str):
            raise TypeError(f"the plan must keep a list of whole numbers of {down}, found {kept!r}")
    unknown = [down for down in plan.keep if down not in plan.sites]
    sites = {**(structure.sites(unknown) if unknown else {}), **plan.sites}
    removed = [
        s.name
        for s in sites.values()
        if isinstance(s, HeadRanks) and s.pair == "vo" and not plan.keep.get(s.down, True)
    ]
    shared = shared_parameters(structure.model)
    for down, kept in plan.keep.items():
        site = sites[down]
        if reason := told_apart(shared, (*site.up, *site.inner, down)):
            raise ValueError(f"the plan names {down}, which can't be cut: {reason}")
        if plan.dense_widths.get(down, site.width) != site.width:
            raise ValueError(
                f"{down} has {site.width} {site.units}, the plan was made for "
                f"{plan.dense_widths[down]}; apply it to the dense model"
            )
        if not set(kept) <= set(range(site.width)) or len(set(kept)) != len(kept):
            raise ValueError(
                f"the plan's kept {site.units} of {down} must be distinct and within "
                f"0..{site.width - 1}"
            )
        if down in plan.sites:
            check_fits(structure.model, site)
        gone = isinstance(site, HeadRanks) and site.pair == "qk" and site.name in removed
        if not (kept or gone) and (reason := least_reason(structure.model, site)):
            raise ValueError(
                f"the plan keeps no {site.units} of {down}; one at least has to stay: {reason}"
            )
    return {down: sites[down] for down in plan.keep}
