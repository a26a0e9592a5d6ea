"""An importance with a known order, and short comparisons with it."""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor
from toys import images, toy

import tp_amp


class LastFirst(tp.importance.Importance):
    """Keeps the last channels."""

    def __call__(self, group: Any) -> Tensor:
        return torch.arange(len(group[0].idxs)).float()


def batches(seed: int = 1, labels: bool = False) -> list[Any]:
    pictures = images(12, seed=seed)
    classes = torch.randint(5, (12,), generator=torch.Generator().manual_seed(seed))
    if labels:
        return list(zip(pictures.split(4), classes.split(4), strict=True))
    return list(pictures.split(4))


def compare(importances: Any, **further: Any) -> tp_amp.Comparison:
    arguments = {"evaluation": batches(2), "fractions": [0.5, 0.2], "progress": False, **further}
    return tp_amp.compare(toy(), images(1), importances, batches(), **arguments)
