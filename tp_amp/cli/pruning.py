"""Prune as `tp-amp prune` is told: which importance, and how widths are found."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import nn

import tp_amp
from tp_amp.importance.readiness import forget, make_ready
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import Site

logger = logging.getLogger(__name__)

LABELLED = ("taylor", "hessian")
FACTORIES: dict[str, Callable[..., Any]] = {
    "reconstruction": tp_amp.ReconstructionImportance,
    "entropy": tp_amp.EntropyTaylorImportance,
    "gram-schmidt": tp_amp.GramSchmidtImportance,
    "dimap": tp_amp.DIMAPImportance,
    "magnitude": tp.importance.MagnitudeImportance,
    "lamp": tp.importance.LAMPImportance,
    "activation": tp.pruner.importance.ActivationImportance,
    "taylor": tp.importance.TaylorImportance,
    "hessian": tp.importance.HessianImportance,
    "random": tp.importance.RandomImportance,
}


def prune_model(
    model: nn.Module,
    inputs: Any,
    sites: list[Site],
    scoring: list[Any],
    judging: list[Any],
    options: Namespace,
) -> PruningPlan:
    """Cut the model in place: at the widths of least foreseen loss, or at searched ones."""
    plan = foreseen_plan(model, inputs, sites, scoring, options)
    if plan is not None:
        if options.checkpoint:
            logger.warning("--checkpoint is left out: nothing is searched, which takes long")
        tp_amp.compensate(model, plan, scoring, **_compensation(options))
    else:
        pruner = searching(model, inputs, sites, scoring, judging, options)
        layers = [site.down for site in sites]
        make_ready(pruner.importance, model, scoring, layers=layers)
        pruner.step()
        plan = pruner.plan
    forget(model)
    return plan


def foreseen_plan(
    model: nn.Module, inputs: Any, sites: list[Site], scoring: list[Any], options: Namespace
) -> PruningPlan | None:
    """The widths with the least foreseen loss; None where they have to be searched."""
    side_by_side = any(isinstance(site, MLP) and site.first for site in sites)
    searched = options.prune_num_heads or options.min_width > 1 or side_by_side
    if options.importance != "reconstruction" or options.target is None or searched:
        return None
    importance = _importance(options)
    make_ready(importance, model, scoring, layers=[site.down for site in sites])
    return tp_amp.plan_for_target(
        model,
        inputs,
        importance,
        options.target,
        round_to=options.round_to,
        ignored_layers=options.ignore,
        only_layers=options.only,
    )


def searching(
    model: nn.Module,
    inputs: Any,
    sites: list[Site],
    scoring: list[Any],
    judging: list[Any],
    options: Namespace,
) -> tp_amp.AdaptiveMLPPruner:
    """The pruner that searches widths as the options say, with an importance that is not ready."""
    return tp_amp.AdaptiveMLPPruner(
        model,
        inputs,
        _importance(options),
        judging,
        target=options.target,
        max_increase=1e-2 if options.max_increase is None else options.max_increase,
        compensation=tp_amp.Recipe(**_compensation(options)),
        compensation_data=scoring,
        checkpoint=options.checkpoint,
        prune_num_heads=options.prune_num_heads,
        round_to=options.round_to,
        min_width=options.min_width,
        ignored_layers=options.ignore,
        only_layers=options.only,
    )


def _importance(options: Namespace) -> Any:
    return FACTORIES[options.importance](**_recomputed(options))


def _compensation(options: Namespace) -> dict[str, Any]:
    """What `Recipe` and `compensate` take; only refining runs backward passes."""
    recomputed = _recomputed(options) if options.refine else {}
    return {
        "method": options.compensation,
        "every_linear": options.every_linear,
        "refine": options.refine,
        "token_weights": "sensitivity" if options.refine else None,
        **recomputed,
    }


def _recomputed(options: Namespace) -> dict[str, bool]:
    return {"activation_checkpointing": True} if options.activation_checkpointing else {}


def composed(first: PruningPlan, second: PruningPlan) -> PruningPlan:
    """The plan that cuts the dense model as two plans do, one after the other."""
    keep = {name: list(kept) for name, kept in first.keep.items()}
    for name, kept in second.keep.items():
        keep[name] = [keep[name][i] for i in kept] if name in keep else list(kept)
    return PruningPlan(
        keep,
        {**second.dense_widths, **first.dense_widths},
        sites={**second.sites, **first.sites},
    )
