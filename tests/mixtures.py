"""A toy with a sparse mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from toys import PlainMLP, perturbed, toy

DENSE = "blocks.1.mlp.second"
EXPERTS = [f"blocks.0.mlp.experts.{i}.second" for i in range(3)]


class Experts(nn.Module):
    """A sparse mixture: each token goes to the expert that its router likes best."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(PlainMLP(width, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        given = torch.zeros_like(tokens)
        for place, expert in enumerate(self.experts):
            rows = torch.where(chosen == place)[0]
            if len(rows):
                given = given.index_add(0, rows, expert(tokens[rows]) * weights[rows, None])
        return given.view_as(x)


class ChoosingExperts(Experts):
    """Each expert takes as many tokens, those that it likes best (arXiv 2202.09368)."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        given = torch.zeros_like(tokens)
        likings = self.router(tokens).softmax(-1).T
        for liking, expert in zip(likings, self.experts, strict=True):
            weights, rows = liking.topk(len(tokens) // 2)
            given = given.index_add(0, rows, expert(tokens[rows]) * weights[:, None])
        return given.view_as(x)


def mixture(experts: type[Experts] = Experts) -> nn.Module:
    model = toy(depth=3)
    torch.manual_seed(0)
    model.blocks[0].mlp = experts(3, 12, 20)
    return perturbed(model)
