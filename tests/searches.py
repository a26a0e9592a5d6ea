"""A pruner on a toy, and images for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toys import images, toy

from tp_amp import AdaptiveMLPPruner, EntropyTaylorImportance


def data(seed: int = 1, **arguments: int) -> tuple[list[Tensor], list[Tensor]]:
    """Batches for scoring and for the search, with no image in common."""
    whole = images(16, seed, **arguments)
    return list(whole[:8].split(4)), list(whole[8:].split(4))


def pruner_of(model: nn.Module, seed: int = 1, **arguments: object) -> AdaptiveMLPPruner:
    scoring, search = data(seed)
    importance = arguments.pop("importance", None) or EntropyTaylorImportance(data=scoring)
    return AdaptiveMLPPruner(model, images(1), importance, search, **arguments)


def duplicated() -> nn.Module:
    """A toy whose hidden neurons come in pairs, so that half of them can be rebuilt exactly."""
    model = toy()
    with torch.no_grad():
        for block in model.blocks:
            for parameter in (block.mlp.first.weight, block.mlp.first.bias):
                parameter[10:] = parameter[:10]
    return model
