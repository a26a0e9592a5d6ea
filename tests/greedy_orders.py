"""Neurons one after another, each the one that leaves the least."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def trace_left(covariance: Tensor, weight: Tensor, kept: list[int]) -> float:
    c, w = covariance.numpy(), weight.numpy()
    if kept:
        across = c[:, kept]
        c = c - across @ np.linalg.inv(c[np.ix_(kept, kept)]) @ across.T
    return float(np.trace(w @ c @ w.T))


def naive_order(covariance: Tensor, weight: Tensor, steps: int) -> list[int]:
    kept: list[int] = []
    for _ in range(steps):
        free = [j for j in range(len(covariance)) if j not in kept]
        kept.append(min(free, key=lambda j: trace_left(covariance, weight, [*kept, j])))
    return kept
