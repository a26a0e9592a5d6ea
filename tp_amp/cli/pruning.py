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
from tp_amp.structure.model_structure import ModelStructure

logger = logging.getLogger(__name__)

LABELLED = ("taylor", "hessian")
# Those whose backward pass is tp_amp's own.
RECOMPUTING = ("reconstruction", "entropy")
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
    mlps: list[MLP],
    scoring: list[Any],
    judging: list[Any],
    options: Namespace,
) -> PruningPlan:
    """Cut the model in place: at the widths of least foreseen loss, or at searched ones."""
    recompute = {"activation_checkpointing": True} if options.activation_checkpointing else {}
    importance = FACTORIES[options.importance](**recompute)
    refined: dict[str, Any] = {}
    if options.refine:
        refined = {"every_linear": True, "refine": options.refine, **recompute}
    layers = [mlp.down for mlp in mlps]
    if options.prune_num_heads:
        layers += [site.down for site in ModelStructure(model, inputs).some_attentions()]
    make_ready(importance, model, scoring, layers=layers)
    foreseen = options.importance == "reconstruction" and options.target is not None
    side_by_side = any(mlp.first for mlp in mlps)
    if foreseen and not (options.prune_num_heads or options.min_width > 1 or side_by_side):
        if options.checkpoint:
            logger.warning("--checkpoint is left out: nothing is searched, which takes long")
        plan = tp_amp.plan_for_target(
            model, inputs, importance, options.target, round_to=options.round_to
        )
        tp_amp.compensate(model, plan, scoring, method=options.compensation, **refined)
    else:
        pruner = tp_amp.AdaptiveMLPPruner(
            model,
            inputs,
            importance,
            judging,
            target=options.target,
            max_increase=1e-2 if options.max_increase is None else options.max_increase,
            compensation=tp_amp.Recipe(options.compensation, **refined),
            compensation_data=scoring,
            checkpoint=options.checkpoint,
            prune_num_heads=options.prune_num_heads,
            round_to=options.round_to,
            min_width=options.min_width,
        )
        pruner.step()
        plan = pruner.plan
    forget(model)
    return plan


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
