"""Accuracy and size of a reference model with its MLPs cut, for benchmarks/criteria.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from cifar import normalize
from importances import Batches, Criterion
from reference import accuracy
from torch import Tensor, nn

import tp_amp
from tp_amp.importance.readiness import forget
from tp_amp.plan.cutting import narrowed
from tp_amp.plan.ranking import rank_channels
from tp_amp.structure.model_structure import ModelStructure


class Bench:
    """A dense model and the test split; nothing is measured twice."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.example = images[:1].to(next(model.parameters()).device)
        structure = ModelStructure(model, self.example)
        self.mlps, self.graph = structure.mlps, structure.graph
        self._accuracy: dict[str, float] = {}
        self._size: dict[str, dict[str, Any]] = {}

    def rank(self, criterion: Criterion, batches: Batches, seed: int) -> dict[str, list[int]]:
        """Order the channels of each MLP, the best first; leaves the model as it was."""
        torch.manual_seed(seed)
        importance = criterion.prepare(self.model, batches)
        order = {mlp.down: rank_channels(importance, self.graph, mlp) for mlp in self.mlps}
        forget(self.model)
        return order

    def widths(self, fraction: float) -> dict[str, int]:
        """The same share of every MLP."""
        return {mlp.down: max(1, round(mlp.width * fraction)) for mlp in self.mlps}

    def widths_of_macs(self, macs: int) -> dict[str, int]:
        """The same share of every MLP, as large as leaves the model so many MACs."""
        dense, half = (self.size(self.widths(fraction))["macs"] for fraction in (1, 0.5))
        return self.widths(max(0.0, 1 - (dense - macs) / (2 * (dense - half))))

    def search(self, importance: Any, images: Batches, increase: float) -> dict[str, int]:
        """Let AMP's pruner find each MLP's width."""
        pruner = tp_amp.AdaptiveMLPPruner(
            copy.deepcopy(self.model),
            self.example,
            importance,
            images,
            objective="prediction",
            max_increase=increase,
            progress=False,
        )
        pruner.step()
        return pruner.plan.widths

    def accuracy(self, order: dict[str, list[int]], widths: dict[str, int]) -> float:
        """Test accuracy with the first channels of each order; the model comes back whole."""
        keep = {name: sorted(order[name][:width]) for name, width in widths.items()}
        key = json.dumps(keep)
        if key not in self._accuracy:
            with narrowed(self.graph, {mlp: keep[mlp.down] for mlp in self.mlps}):
                self._accuracy[key] = accuracy(self.model, self.images, self.labels, 64)
        return self._accuracy[key]

    def size(self, widths: dict[str, int]) -> dict[str, Any]:
        """Parameters, multiply-accumulates, and the share of the MLPs' parameters that stays."""
        key = json.dumps(widths)
        if key not in self._size:
            model = copy.deepcopy(self.model)
            plan = tp_amp.PruningPlan({name: list(range(w)) for name, w in widths.items()})
            tp_amp.apply_plan(model, self.example, plan)
            macs, parameters = tp.utils.count_ops_and_params(model, self.example)
            kept = self._mlp_parameters(model) / self._mlp_parameters(self.model)
            self._size[key] = {"kept": kept, "parameters": int(parameters), "macs": int(macs)}
        return self._size[key]

    def _mlp_parameters(self, model: nn.Module) -> int:
        names = [name for mlp in self.mlps for name in (*mlp.up, mlp.down)]
        return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())


def draw_batches(
    train: tuple[Tensor, Tensor], counts: Sequence[int], seed: int, device: str
) -> list[Batches]:
    """Draw disjoint sets of training images at random, each in normalised batches of 64."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    sets = []
    for index in order[: sum(counts)].split(list(counts)):
        images, labels = (t[index].to(device) for t in train)
        sets.append(list(zip(normalize(images).split(64), labels.split(64), strict=True)))
    return sets
