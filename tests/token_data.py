"""Inputs and residuals of a layer, token by token, and their moments."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_amp.algebra.moments import Moments


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def data(tokens: int = 60, inputs: int = 5, outputs: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    """Correlated inputs with means, and residuals that depend on them in part."""
    x = normal(tokens, inputs, seed=seed) @ normal(inputs, inputs, seed=seed + 1) + 2
    r = x @ normal(inputs, outputs, seed=seed + 2) + normal(tokens, outputs, seed=seed + 3) + 1
    return x, r


def filled(x: Tensor, r: Tensor, weights: Tensor | None = None, batch: int = 1000) -> Moments:
    moments = Moments()
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        moments.add(x[part], r[part], None if weights is None else weights[part])
    return moments


def output_error(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    left = r - x @ weight.T - (0 if bias is None else bias)
    return float(left.square().sum(1).mean())
