"""Heads cut for good, and the dense model with the same heads masked."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tp_amp.plan.cutting import cut
from tp_amp.structure.attention.heads import Attention

Keep = dict[str, list[int]]


def channels(attention: Attention, heads: list[int]) -> list[int]:
    width = attention.head_width
    return [head * width + i for head in heads for i in range(width)]


def zeroed(model: nn.Module, found: list[Attention], keep: Keep) -> nn.Module:
    """The dense model whose projections see the kept heads only, and norms before them too."""
    model = copy.deepcopy(model)
    for attention in found:
        kept = channels(attention, keep[attention.down])
        mask = torch.zeros(attention.width * attention.head_width)
        mask[kept] = 1
        down = model.get_submodule(attention.down)
        holder = model.get_submodule(attention.down.rpartition(".")[0])
        with torch.no_grad():
            # Those read the projection's weight and never call it.
            if isinstance(holder, nn.MultiheadAttention) or "Shifted" in type(holder).__name__:
                down.weight.mul_(mask)
        down.register_forward_pre_hook(lambda _m, args, mask=mask: (args[0] * mask,))
        for tensor in attention.tensors:
            if tensor.path.endswith("attn.norm.weight"):
                norm = model.get_submodule(tensor.path.rpartition(".")[0])
                norm.register_forward_hook(
                    lambda m, args, out, kept=kept: out.index_copy(
                        -1,
                        torch.tensor(kept),
                        nn.functional.layer_norm(
                            args[0][..., kept], (len(kept),), m.weight[kept], m.bias[kept], m.eps
                        ),
                    )
                )
    return model


def random_keep(found: list[Attention]) -> Keep:
    generator = torch.Generator().manual_seed(5)
    return {
        a.down: sorted(
            torch.randperm(a.width, generator=generator)[: max(1, a.width * 2 // 3)].tolist()
        )
        for a in found
    }


def prune(graph: Any, found: list[Attention], keep: Keep) -> None:
    for attention in reversed(found):
        for group in cut(graph, attention, keep[attention.down]):
            group.prune()
