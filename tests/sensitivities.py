"""One kind of sensitivity at a time."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from tp_amp.importance.sensitivity import sensitivity


def output_sensitivity(
    model: nn.Module, layers: Collection[str], batches: Any, objective: Any, **options: Any
) -> dict[str, Tensor]:
    return sensitivity(model, batches, objective, outputs=layers, **options).outputs


def place_sensitivity(
    model: nn.Module, layers: Collection[str], batches: Any, objective: Any, **options: Any
) -> dict[str, Tensor]:
    return sensitivity(model, batches, objective, places=layers, **options).places
