"""Every criterion that benchmarks/criteria.py compares, and how to make it ready to score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import tp_amp
from tp_amp.importance.readiness import make_ready

Batches = list[tuple[Tensor, Tensor]]


class HessianOfAllImages(tp.importance.HessianImportance):
    """Torch-Pruning's Hessian with the squared gradients of all images, not of the last one."""

    def accumulate_grad(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                square = parameter.grad.square()
                self._accu_grad[parameter] = self._accu_grad.get(parameter, 0) + square
                self._counter[parameter] = self._counter.get(parameter, 0) + 1


def collect_entropy(objective: str, model: nn.Module, batches: Batches) -> Any:
    return tp_amp.EntropyTaylorImportance(objective).collect(model, batches, progress=False)


def collect_hessian(kind: type, images: int, model: nn.Module, batches: Batches) -> Any:
    pictures, labels = (torch.cat(column)[:images] for column in zip(*batches, strict=True))
    return make_ready(kind(), model, [(pictures, labels)], progress=False)


def collected(importance: Callable[[], Any]) -> Callable[[nn.Module, Batches], Any]:
    return lambda model, batches: make_ready(importance(), model, batches, progress=False)


@dataclass(frozen=True)
class Criterion:
    """How to make an importance ready, and what it needs: nothing, a seed, images or labels."""

    needs: str
    prepare: Callable[[nn.Module, Batches], Any]


def all_criteria(hessian_images: int) -> dict[str, Criterion]:
    """Name every criterion, those of tp_amp first."""
    magnitude = tp.importance.MagnitudeImportance
    hessian = tp.importance.HessianImportance
    return {
        "EntropyTaylor, prediction": Criterion("images", partial(collect_entropy, "prediction")),
        "EntropyTaylor, similarity": Criterion("images", partial(collect_entropy, "similarity")),
        "GramSchmidt": from_weights(tp_amp.GramSchmidtImportance),
        "DIMAP": from_weights(tp_amp.DIMAPImportance),
        "Activation": Criterion("images", collected(tp.pruner.importance.ActivationImportance)),
        "Taylor": Criterion("labels", collected(tp.importance.TaylorImportance)),
        "Hessian": Criterion("labels", partial(collect_hessian, hessian, hessian_images)),
        "Hessian, all images": Criterion(
            "labels", partial(collect_hessian, HessianOfAllImages, hessian_images)
        ),
        "Magnitude L1": from_weights(partial(magnitude, p=1)),
        "Magnitude L2": from_weights(partial(magnitude, p=2)),
        "LAMP": from_weights(tp.importance.LAMPImportance),
        "FPGM": from_weights(tp.pruner.importance.FPGMImportance),
        "Random": Criterion("seed", lambda model, batches: tp.importance.RandomImportance()),
    }


def from_weights(importance: Callable[[], Any]) -> Criterion:
    return Criterion("nothing", lambda model, batches: importance())
