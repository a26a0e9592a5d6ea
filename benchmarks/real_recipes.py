"""The recipes that benchmarks/real.py compares: how a dense model gets to a size.

A recipe is a function of a draw of images and of the share of the MLPs' parameters that stays; it
gives a model. More of them: add to `RECIPES`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from real_task import Task
from reference import add_cross_entropy_gradients
from torch import Tensor, nn

import tp_amp

PASSES = 5
STEPS, STEP_IMAGES, PEAK = 300, 12, 4e-5  # of distillation
GRAIL_RIDGE = 1e-3  # relative to the mean diagonal
CORP_RIDGE = 1e-4


def clock() -> np.ndarray:
    """Seconds, and the processor's, of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


class Photographs:
    """Batches in an order of their own in each epoch, half of the images mirrored."""

    def __init__(self, images: Tensor, size: int, seed: int) -> None:
        self.images, self.size, self.seed, self.epoch = images, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        for index in torch.randperm(len(self.images), generator=generator).split(self.size):
            images = self.images[index]
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
            yield images


class Draw:
    """A dense model and one draw of images; what importances collect is kept for all shares."""

    def __init__(self, task: Task, count: int, seed: int) -> None:
        self.model, self.seed = task.model, seed
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

    def distilled(self, student: nn.Module) -> nn.Module:
        """Train the whole for `STEPS` steps to give the dense model's tokens, without labels."""
        photographs = Photographs(torch.cat(self.batches), STEP_IMAGES, self.seed)
        epochs = max(1, round(STEPS / len(photographs)))
        return tp_amp.distill(
            student,
            copy.deepcopy(self.model),
            photographs,
            epochs=epochs,
            learning_rate=PEAK * 256 / STEP_IMAGES,
            warmup_epochs=0.1 * epochs,
            weight_decay=(0.0, 0.0),
            seed=self.seed,
            progress=False,
        )


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
UNIFORM = "Reconstruction + affine, every Linear"
RECIPES: dict[str, Recipe] = {
    RECOMMENDED: lambda d, kept: d.compensated(
        d.own_plan(kept), every_linear=True, token_weights="sensitivity", refine=PASSES
    ),
    CLOSED: lambda d, kept: d.compensated(d.own_plan(kept), every_linear=True),
    f"{CLOSED}, by sensitivity": lambda d, kept: d.compensated(
        d.own_plan(kept), every_linear=True, token_weights="sensitivity"
    ),
    UNIFORM: lambda d, kept: d.compensated(d.plan("Reconstruction", kept), every_linear=True),
}
for _name in IMPORTANCES:
    RECIPES[f"{_name} + affine"] = lambda d, kept, n=_name: d.compensated(d.plan(n, kept))
    RECIPES[_name] = lambda d, kept, n=_name: d.cut(d.plan(n, kept))
RECIPES |= {
    "VBP: variance + mean": lambda d, kept: one_shot(d, kept, "variance", "mean"),
    "FLAP: variance and norm + mean": lambda d, kept: one_shot(
        d, kept, "variance and norm", "mean"
    ),
    "GRAIL: magnitude + uncentred ridge": lambda d, kept: one_shot(d, kept, "magnitude", "GRAIL"),
    "CORP: magnitude + affine at once": lambda d, kept: one_shot(d, kept, "magnitude", "affine"),
    f"{UNIFORM}, by sensitivity, refined": lambda d, kept: d.compensated(
        d.plan("Reconstruction", kept),
        every_linear=True,
        token_weights="sensitivity",
        refine=PASSES,
    ),
}
for _name in (RECOMMENDED, "EntropyTaylor", "Magnitude L2"):
    RECIPES[f"{_name}, distilled"] = lambda d, kept, n=_name: d.distilled(RECIPES[n](d, kept))
