"""Prune a dense model to a plan and compensate, in one call from any script."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn

from tp_amp.algebra.closed_form import RIDGE, Correction, Method
from tp_amp.compensation.recipe import Recipe, TokenWeights, apply
from tp_amp.compensation.walk import fit
from tp_amp.importance.error_objective import ErrorObjective
from tp_amp.plan.applying import knows_sites, planned_sites
from tp_amp.plan.coordinates import tell_other_coordinates
from tp_amp.plan.cutting import cut_all, undone_after_errors
from tp_amp.plan.pruning_plan import PruningPlan, check_plan
from tp_amp.running.arguments import check_whole
from tp_amp.running.batches import check_batches
from tp_amp.running.checks import check_model
from tp_amp.running.inputs import one_image, prepare
from tp_amp.running.restoring import seeded
from tp_amp.structure.model_structure import ModelStructure


@torch.inference_mode(False)  # parameters made in it could not be trained
def compensate(
    model: nn.Module,
    plan: PruningPlan,
    batches: Iterable[Any],
    *,
    method: Method = "affine",
    ridge: float = RIDGE,
    add_bias: bool = False,
    token_weights: TokenWeights = None,
    every_linear: bool = False,
    refine: int = 0,
    objective: ErrorObjective = "auto",
    activation_checkpointing: bool = False,
    memory_bytes: int | None = None,
    progress: bool = True,
) -> dict[str, Correction]:
    """Cut a dense model to a plan, in place, with what is lost rebuilt from what is kept.

    For each cut layer y = W h + b with kept inputs S and cut ones P, over the tokens of unlabelled
    images: `mean` adds W_P (mean of h_P) to b; `affine` adds W_P B to W_S with B the ridge
    regression of h_P on h_S, and W_P (mean of h_P - B mean of h_S) to b (CORP, arXiv 2602.05243).
    Layers are fitted in the order of the forward pass, each on the model as cut and corrected so
    far: those that add to a residual stream to what the stream lacks right behind them, others to
    what the layer gives in the dense model. Half of the images judges what is fitted to the other
    half; where it does worse there, a stronger ridge or less is taken. No labels.

    Args:
        model: the dense model.
        plan: from `plan_for_target`, `plan_from_importance`, `AdaptiveMLPPruner`, `rank_plan`,
            `stream_plan` or by hand; of MLPs, heads, channels inside them and residual streams.
        batches: unlabelled images in batches `(images, ...)`; labels in them are ignored.
        method: `"none"`, `"mean"` or `"affine"`.
        ridge: the least lambda, relative to the mean diagonal of the kept channels' covariance; it
            grows tenfold where there is no solution, and that is logged.
        add_bias: give cut layers without a bias one; else the best correction without is taken.
        token_weights: takes the images (or the dict of keyword arguments) of a batch and gives the
            weight of each token, `(images, tokens)`: 0 for padding. Or `"sensitivity"`: at each
            layer, half of all weight by what an error at the token's place costs the dense model's
            predictions, from one backward pass over the images, and half to all tokens alike.
        every_linear: fit all Linears from the first to the last cut layer (queries, keys and
            values, projections, `up` layers) against what they give in the dense model. It keeps
            more accuracy and takes about twice as long.
        refine: passes over the images, 10 say, in which both layers of each cut MLP are improved
            together, by gradients of what is missing behind it alone, as costly to the dense
            model's predictions; on tokens drawn from all images but one in eight, which judges.
            Needs `every_linear=True`. It keeps more where much is cut.
        objective: what errors cost, for `refine` and `token_weights="sensitivity"`: as for
            `ReconstructionImportance`, `"auto"`, a callable on the model's output, or
            `"reconstruction"`, by which all count the same.
        activation_checkpointing: run each block again in the backward passes through the whole
            model, those of `refine` and `token_weights="sensitivity"`: for models too deep for the
            memory.
        memory_bytes: how much is held in memory of what the images are at the depth that is worked
            on, dense and cut; what goes beyond it is written to temporary files, with the same
            result bit for bit. Beside it come one batch's activations, the moments of one layer
            and, for `refine`, what one MLP reads and gives. By default all is held: for each image
            about three times its tokens, and the hidden channels of one MLP.
        progress: show a progress bar on a terminal.

    Returns:
        Layer -> what was added, with the mean squared error of the layer's output, or of the
        stream that it adds to, before and after on `batches`.

    Raises:
        ValueError: the plan does not fit, an argument is out of range, or the model has no blocks
            one after another for `activation_checkpointing`; the model is as it was.
        TypeError: `batches` can't be iterated.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> plan = tp_amp.PruningPlan({"blocks.0.mlp.fc2": list(range(192))})
        >>> fitted = tp_amp.compensate(model, plan, [torch.randn(16, 3, 224, 224)])
        >>> fitted["blocks.0.mlp.fc2"].error < fitted["blocks.0.mlp.fc2"].error_before
        True
    """
    recipe = Recipe(
        method,
        ridge,
        add_bias,
        token_weights,
        every_linear,
        refine,
        activation_checkpointing,
        objective,
    )
    if memory_bytes is not None:
        check_whole(0, memory_bytes=memory_bytes)
    check_plan(plan)
    check_model(model, values=True)
    check_batches(batches)
    if knows_sites(plan):  # a plan of another model is refused before an image is read
        planned_sites(ModelStructure(model, ()), plan)
    with seeded(0):  # loaders draw
        unread = iter(batches)
        opening = list(islice(unread, 1))
        if not opening:
            raise ValueError("there are no batches to fit the compensation on")
        structure = ModelStructure(model, one_image(prepare(opening[0], model)).raw())
        sites = planned_sites(structure, plan)
        tell_other_coordinates(model, sites, plan.keep)
        batches = [*opening, *unread]
    fitted = fit(
        structure,
        list(sites.values()),
        plan.keep,
        batches,
        recipe,
        memory_bytes=memory_bytes,
        progress=progress,
    )
    with undone_after_errors(model):
        cut_all(structure.graph, sites, plan.keep)
        # Once all is cut: one site's `down` may be another's `up`, whose corrections have its rows.
        for name, correction in fitted.items():
            first = sites[name].first if name in sites else 0
            apply(model.get_submodule(name), correction, first)
    plan.sites.update(sites)
    return fitted
