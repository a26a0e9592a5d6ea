"""The recipes that benchmarks/real.py compares: how a dense model gets to a size.

A recipe is a function of a draw of images and of the share of the MLPs' parameters that stays; it
gives a model. More of them: add to `RECIPES`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from real_students import clock, distilled, remembered
from real_task import Task
from reference import add_cross_entropy_gradients
from torch import Tensor, nn

import tp_amp

PASSES = 5
FEW = 128  # photographs for a closed form that all photographs train on
GRAIL_RIDGE = 1e-3  # relative to the mean diagonal
CORP_RIDGE = 1e-4


class Draw:
    """A dense model and one draw of images; what importances collect is kept for all shares.

    `folder` is where models stay that other recipes go on from; None keeps none.
    """

    def __init__(self, task: Task, count: int, seed: int, folder: Path | None = None) -> None:
        self.task, self.model, self.seed, self.folder = task, task.model, seed, folder
        device = next(task.model.parameters()).device
        self.batches = [images.to(device) for images, _ in task.draw("photos", count, seed)]
        self.labelled = [
            (images.to(device), labels.to(device))
            for images, labels in task.draw("train", count, seed)
        ]
        self.example = self.batches[0][:1]
        self.mlps = tp_amp.find_mlps(self.model, self.example)
        self.downs = [mlp.down for mlp in self.mlps]
        self.spent = np.zeros(2)  # on collecting what was used, see `clock`
        self.recalled = np.zeros(2)  # on models that were read from `folder`
        self.trained: dict[str, Any] = {}  # what the last model's distillation took, if any
        self.collected: dict[str, tuple[np.ndarray, Any]] = {}

    def once(self, name: str, collect: Callable[[Draw], Any]) -> Any:
        """What a function collects from the dense model, collected the first time only."""
        if name not in self.collected:
            began = clock()
            found = collect(self)
            self.collected[name] = clock() - began, found
        spent, found = self.collected[name]
        self.spent += spent
        return found

    def timed(self, make: Callable[[], nn.Module]) -> tuple[nn.Module, np.ndarray, np.ndarray]:
        """A model, the seconds it took in all, and those of them that went into collecting.

        What was collected, or made, for an earlier model counts here too.
        """
        before = self.spent, self.recalled
        self.spent, self.recalled = np.zeros(2), np.zeros(2)
        known, began = set(self.collected), clock()
        model = make()
        new = sum(spent for name, (spent, _) in self.collected.items() if name not in known)
        collecting, recalled = self.spent, self.recalled
        spent = clock() - began - new + collecting + recalled
        self.spent, self.recalled = before[0] + collecting, before[1] + recalled
        return model, spent, collecting

    def first(self, count: int, recipe: Recipe, kept: float) -> nn.Module:
        """A recipe's model of the first images alone."""
        fewer = Draw(self.task, min(count, sum(map(len, self.batches))), self.seed, self.folder)
        model = recipe(fewer, kept)
        self.recalled += fewer.recalled
        return model

    def plan(self, name: str, kept: float) -> tp_amp.PruningPlan:
        """The same share of every MLP, by an importance."""
        importance, model = self.once(name, IMPORTANCES[name])
        torch.manual_seed(self.seed)  # for Random
        return tp_amp.plan_from_importance(model, self.example, importance, self.widths(kept))

    def own_plan(self, kept: float) -> tp_amp.PruningPlan:
        """The widths of the smallest foreseen loss with as many parameters."""
        importance, model = self.once("Reconstruction", IMPORTANCES["Reconstruction"])
        target = {"params": self.parameters(kept)}
        return tp_amp.plan_for_target(model, self.example, importance, target)

    def one_price(
        self, kept: float, kinds: Sequence[str], *, min_width: int = 1, **options: Any
    ) -> nn.Module:
        """As many parameters, with channels inside heads, or of the stream, at the same price."""
        model = copy.deepcopy(self.model)
        if "stream" in kinds:  # changes what MLPs read and write
            tp_amp.rotate(model, self.example, self.batches, progress=False)
            importance = tp_amp.ReconstructionImportance()
        else:
            importance, _ = self.once("Reconstruction", IMPORTANCES["Reconstruction"])
        tp_amp.rotate_heads(model, self.example, self.batches, progress=False)
        importance.data = self.batches
        target = {"params": self.parameters(kept)}
        plan = tp_amp.plan_for_target(
            model, self.example, importance, target, widths=kinds, min_width=min_width
        )
        tp_amp.compensate(model, plan, self.batches, progress=False, **options)
        return model

    def widths(self, kept: float) -> dict[str, int]:
        return {mlp.down: max(1, round(mlp.width * kept)) for mlp in self.mlps}

    def parameters(self, kept: float) -> int:
        """Of the whole model with that share of every MLP."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        for mlp in self.mlps:
            ups = [self.model.get_submodule(name) for name in mlp.up]
            down: Any = self.model.get_submodule(mlp.down)
            channel = len(down.weight) + sum(up.weight.shape[1] + 1 for up in ups)
            total -= channel * (mlp.width - self.widths(kept)[mlp.down])
        return total

    def cut(self, plan: tp_amp.PruningPlan) -> Any:
        model = copy.deepcopy(self.model)
        tp_amp.apply_plan(model, self.example, plan)
        return model

    def compensated(self, plan: tp_amp.PruningPlan, **options: Any) -> nn.Module:
        model = copy.deepcopy(self.model)
        tp_amp.compensate(model, plan, self.batches, progress=False, **options)
        return model


def from_weights(importance: Callable[[], Any]) -> Callable[[Draw], Any]:
    return lambda draw: (importance(), draw.model)


def entropy_taylor(draw: Draw) -> Any:
    importance = tp_amp.EntropyTaylorImportance()
    return importance.collect(draw.model, draw.batches, progress=False), draw.model


def reconstruction(draw: Draw) -> Any:
    importance = tp_amp.ReconstructionImportance()
    importance.collect(draw.model, draw.batches, layers=draw.downs, progress=False)
    return importance, draw.model


def taylor(draw: Draw) -> Any:
    model = copy.deepcopy(draw.model)  # keeps the gradients that are read
    add_cross_entropy_gradients(model, draw.labelled)
    return tp.importance.TaylorImportance(), model


# An importance that is ready to score a model, and the model.
IMPORTANCES: dict[str, Callable[[Draw], Any]] = {
    "Reconstruction": reconstruction,
    "EntropyTaylor": entropy_taylor,
    "GramSchmidt": from_weights(tp_amp.GramSchmidtImportance),
    "DIMAP": from_weights(tp_amp.DIMAPImportance),
    "Magnitude L2": from_weights(lambda: tp.importance.MagnitudeImportance(p=2)),
    "Taylor, labels": taylor,
    "Random": from_weights(tp.importance.RandomImportance),
}


@torch.inference_mode()
def dense_moments(draw: Draw) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and uncentred second moment of every MLP's hidden activations."""
    sums: dict[str, list[Any]] = {name: [0, 0, 0] for name in draw.downs}

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden = inputs[0].flatten(0, -2)
            product = (hidden.T @ hidden).double()
            sums[name] = [
                old + new
                for old, new in zip(
                    sums[name], (len(hidden), hidden.double().sum(0), product), strict=True
                )
            ]

        return hook

    handles = [draw.model.get_submodule(n).register_forward_pre_hook(add(n)) for n in sums]
    try:
        for images in draw.batches:
            draw.model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / count, square / count) for name, (count, total, square) in sums.items()}


def one_shot(draw: Draw, kept: float, rank: str, method: str) -> nn.Module:
    """Every layer fitted on the dense model, as others do."""
    moments = draw.once("moments", dense_moments)
    if rank == "magnitude":
        plan = draw.plan("Magnitude L2", kept)
    else:
        keep = {}
        for name, width in draw.widths(kept).items():
            mean, square = moments[name]
            score = square.diagonal() - mean.square()
            if rank == "variance and norm":
                weight: Any = draw.model.get_submodule(name).weight
                score = score * weight.double().square().sum(0)
            keep[name] = sorted(score.topk(width).indices.tolist())
        plan = tp_amp.PruningPlan(keep)
    model = draw.cut(plan)
    with torch.no_grad():
        for name, chosen in plan.keep.items():
            down = draw.model.get_submodule(name)
            weight, bias = fold(down.weight, *moments[name], chosen, method)
            model.get_submodule(name).weight += weight
            model.get_submodule(name).bias += bias
    return model


def fold(
    weight: Tensor, mean: Tensor, square: Tensor, chosen: list[int], method: str
) -> tuple[Tensor, Tensor]:
    """What is added to the kept columns and to the bias for the columns that are cut."""
    gone = torch.ones(len(mean), dtype=torch.bool)
    gone[chosen] = False
    cut = weight[:, gone].double()
    if method == "mean":
        return torch.zeros_like(weight[:, chosen]), (cut @ mean[gone]).to(weight.dtype)
    moment = square - torch.outer(mean, mean) if method == "affine" else square
    kept = moment[chosen][:, chosen]
    ridge = CORP_RIDGE if method == "affine" else GRAIL_RIDGE
    kept = kept + ridge * kept.diagonal().mean() * torch.eye(len(kept), device=kept.device)
    added = cut @ torch.linalg.solve(kept, moment[chosen][:, gone]).T
    shift = cut @ mean[gone] - added @ mean[chosen] if method == "affine" else torch.zeros(1)
    return added.to(weight.dtype), shift.to(weight)


Recipe = Callable[[Draw, float], nn.Module]
CLOSED = "plan_for_target + affine, every Linear"
RECOMMENDED = f"{CLOSED}, by sensitivity, refined"
MLPS = f"{CLOSED}, by sensitivity"
HEADS = f"{MLPS}, of mlp + qk + vo"
UNIFORM = "Reconstruction + affine, every Linear"
CORP = "CORP: magnitude + affine at once"
RECIPES: dict[str, Recipe] = {
    RECOMMENDED: lambda d, kept: d.compensated(
        d.own_plan(kept), every_linear=True, token_weights="sensitivity", refine=PASSES
    ),
    CLOSED: lambda d, kept: d.compensated(d.own_plan(kept), every_linear=True),
    MLPS: lambda d, kept: d.compensated(
        d.own_plan(kept), every_linear=True, token_weights="sensitivity"
    ),
    UNIFORM: lambda d, kept: d.compensated(d.plan("Reconstruction", kept), every_linear=True),
}
# As many parameters as with that share of the MLPs, where these are not cut alone.
_HEADS = ("mlp", "qk", "vo")
for _kinds in (("mlp", "qk"), _HEADS, (*_HEADS, "stream"), ("mlp", "heads")):
    RECIPES[f"{MLPS}, of {' + '.join(_kinds)}"] = lambda d, kept, kinds=_kinds: d.one_price(
        kept, kinds, every_linear=True, token_weights="sensitivity"
    )
RECIPES[f"{HEADS}, or none of a sublayer"] = lambda d, kept: d.one_price(
    kept, _HEADS, min_width=0, every_linear=True, token_weights="sensitivity"
)
for _name in IMPORTANCES:
    RECIPES[f"{_name} + affine"] = lambda d, kept, n=_name: d.compensated(d.plan(n, kept))
    RECIPES[_name] = lambda d, kept, n=_name: d.cut(d.plan(n, kept))
RECIPES |= {
    "VBP: variance + mean": lambda d, kept: one_shot(d, kept, "variance", "mean"),
    "FLAP: variance and norm + mean": lambda d, kept: one_shot(
        d, kept, "variance and norm", "mean"
    ),
    "GRAIL: magnitude + uncentred ridge": lambda d, kept: one_shot(d, kept, "magnitude", "GRAIL"),
    CORP: lambda d, kept: one_shot(d, kept, "magnitude", "affine"),
    f"{UNIFORM}, by sensitivity, refined": lambda d, kept: d.compensated(
        d.plan("Reconstruction", kept),
        every_linear=True,
        token_weights="sensitivity",
        refine=PASSES,
    ),
}
# Of a narrower stream there are no tokens like the dense model's.
for _name in (RECOMMENDED, CLOSED, MLPS, HEADS, CORP, "EntropyTaylor", "Magnitude L2"):
    _recalled = RECIPES[_name] = remembered(_name, RECIPES[_name])
    RECIPES[f"{_name}, distilled"] = lambda d, kept, r=_recalled: distilled(d, r(d, kept))
RECIPES[f"{CLOSED} ({FEW} photographs), distilled"] = lambda d, kept: distilled(
    d, d.first(FEW, RECIPES[CLOSED], kept)
)
