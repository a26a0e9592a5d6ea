"""A pruner on a toy, and images for it."""

from __future__ import annotations

from torch import Tensor, nn
from toys import images

from tp_amp import AdaptiveMLPPruner, EntropyTaylorImportance


def data(seed: int = 1, **arguments: int) -> tuple[list[Tensor], list[Tensor]]:
    """Batches for scoring and for the search, with no image in common."""
    whole = images(16, seed, **arguments)
    return list(whole[:8].split(4)), list(whole[8:].split(4))


def pruner_of(model: nn.Module, seed: int = 1, **arguments: object) -> AdaptiveMLPPruner:
    scoring, search = data(seed)
    importance = arguments.pop("importance", None) or EntropyTaylorImportance(data=scoring)
    return AdaptiveMLPPruner(model, images(1), importance, search, **arguments)
