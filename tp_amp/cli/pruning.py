"""Prune as `tp-amp prune` is told: which importance, and how widths are found."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import nn

import tp_amp
from tp_amp.budget.budget import Budget
from tp_amp.budget.joint_widths import smallest
from tp_amp.budget.mlp_widths import check_narrowable
from tp_amp.budget.target_plan import plan_within
from tp_amp.budget.width_kinds import sites_of
from tp_amp.cli.early_checks import has_to_search
from tp_amp.cli.help_texts import BY_OBJECTIVE
from tp_amp.importance.readiness import forget, make_ready
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.running.runtimes.building import EAGER, check_runtime
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.ranks.head_ranks import HeadRanks
from tp_amp.structure.selection import matched, selected
from tp_amp.structure.streams.residual_stream import Stream

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


class Pruning:
    """One model, and how it is to be pruned.

    Args:
        model: dense, or pruned before.
        inputs: one image.
        options: of `tp-amp prune`.

    Attributes:
        sites: what is to be cut.
        budget: what it may cost, or None without `--target`.

    Raises:
        ValueError: nothing can be cut, or not as small; told before an image is read.
    """

    def __init__(self, model: nn.Module, inputs: Any, options: Namespace) -> None:
        self.model, self.inputs, self.options = model, inputs, options
        check_runtime(options.runtime, model)
        self._structure = ModelStructure(model, inputs)
        self.sites = self._chosen()
        mlps = [site for site in self.sites if isinstance(site, MLP)]
        check_narrowable(
            mlps if options.prune_num_heads else self.sites,
            round_to=options.round_to,
            min_width=options.min_width,
        )
        self._searched = has_to_search(options) or any(mlp.first for mlp in mlps)
        if self._searched and options.objective == "reconstruction":
            raise ValueError(
                "--objective reconstruction is no entropy, by which widths are searched, and MLPs "
                f"beside attentions as in {mlps[0].name} need a search; leave it out"
            )
        if self._searched and not options.min_width:
            raise ValueError(
                "--min-width 0 is for widths that are foreseen, and MLPs beside attentions as in "
                f"{mlps[0].name} need a search; leave it out"
            )
        self.budget: Budget | None = None
        if options.target is not None:
            self.budget = Budget(
                options.target,
                self._structure,
                self.sites,
                options.round_to,
                options.runtime,
                options.min_width,
            )
            streams = [site.down for site in self.sites if isinstance(site, Stream)]
            self.budget.check(smallest(self.budget, streams))

    def _chosen(self) -> list[Site]:
        model, options = self.model, self.options
        kinds = [*options.widths, *(["heads"] if options.prune_num_heads else [])]
        every = sites_of(self._structure, kinds)
        for argument, patterns in {"--ignore": options.ignore, "--only": options.only}.items():
            matched(model, patterns, argument)  # told by the names that were typed
        adapters = self._structure.adapters if "mlp" in kinds else []
        return selected(model, every, options.ignore, options.only, adapters)

    def foreseen(self, scoring: list[Any]) -> PruningPlan | None:
        """The widths with the least foreseen loss; None where they have to be searched.

        Where channels of streams or inside heads may be cut, the model gets the coordinates for it.
        """
        if self.budget is None or self._searched:
            return None
        if any(isinstance(site, Stream) for site in self.sites):
            tp_amp.rotate(self.model, self.inputs, scoring)
        if any(isinstance(site, HeadRanks) for site in self.sites):
            tp_amp.rotate_heads(self.model, self.inputs, scoring)
        importance = make_importance(self.options.importance, self.options)
        importance.data = scoring
        importance.foreseen(self.model, self.sites, progress=True)
        return plan_within(self.budget, self._structure, self.sites, importance)

    def searching(self, scoring: list[Any], judging: list[Any]) -> tp_amp.AdaptiveMLPPruner:
        """The pruner that searches widths, with an importance that is not ready."""
        options = self.options
        further = ("checkpoint", "objective", "prune_num_heads", "round_to", "min_width", "target")
        return tp_amp.AdaptiveMLPPruner(
            self.model,
            self.inputs,
            make_importance(options.importance, options),
            judging,
            max_increase=1e-2 if options.max_increase is None else options.max_increase,
            compensation=tp_amp.Recipe(**_compensation(options)),
            compensation_data=scoring,
            ignored_layers=options.ignore,
            only_layers=options.only,
            runtime=self._runtime,
            **{name: getattr(options, name) for name in further},
        )

    def prune(self, scoring: list[Any], judging: list[Any]) -> PruningPlan:
        """Cut the model in place: at the widths of least foreseen loss, or at searched ones."""
        plan = self.foreseen(scoring)
        if plan is not None:
            if self.options.checkpoint:
                logger.warning("--checkpoint is left out: nothing is searched, which takes long")
            tp_amp.compensate(self.model, plan, scoring, **_compensation(self.options))
        else:
            pruner = self.searching(scoring, judging)
            make_ready(pruner.importance, self.model, scoring, layers=self._downs)
            pruner.step()
            plan, self.budget = pruner.plan, pruner.budget
        forget(self.model)
        return plan

    def latencies(self) -> tuple[dict[str, float], dict[str, float]]:
        """Milliseconds of the dense model and of the planned one, where they are the target."""
        if self.budget is None or self.budget.measured is None:
            return {}, {}
        return {"latency": self.budget.dense}, {"latency": self.budget.measured}

    @property
    def _runtime(self) -> str:
        """Where the target is measured; where the report is, if that is no latency."""
        of_latency = self.budget is not None and self.budget.kind == "latency"
        return str(self.options.runtime) if of_latency else EAGER

    @property
    def _downs(self) -> list[str]:
        return [site.down for site in self.sites]


def make_importance(name: str, options: Namespace) -> Any:
    """The importance of a name, with what the options of `prune` or `compare` say of it."""
    if name not in BY_OBJECTIVE:
        return FACTORIES[name]()
    again = getattr(options, "activation_checkpointing", False)
    return FACTORIES[name](objective=options.objective, activation_checkpointing=again)


def _compensation(options: Namespace) -> dict[str, Any]:
    """What `Recipe` and `compensate` take; only refining runs backward passes."""
    return {
        "method": options.compensation,
        "every_linear": options.every_linear,
        "refine": options.refine,
        "token_weights": "sensitivity" if options.refine else None,
        "objective": options.objective,
        "activation_checkpointing": options.refine > 0 and options.activation_checkpointing,
    }
