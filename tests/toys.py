"""Toy models, and references that share no code with the package."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

judges_shapes = pytest.mark.skipif(
    not hasattr(torch.zeros(1, requires_grad=True).view(1).grad_fn, "_input_metadata"),
    reason="torch 2.4 tells no shapes of what an operation gives: meta models can't be judged",
)

narrow_heads = pytest.mark.skipif(
    not hasattr(Attention(8, 2), "attn_dim"),
    reason="timm 1.0.17: the heads of a ViT can't be narrower",
)


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """As `set_submodule`, which torch 2.4 lacks."""
    holder, _, last = name.rpartition(".")
    setattr(model.get_submodule(holder), last, layer)


class PlainMLP(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden, bias=bias)
        self.act = nn.GELU()
        self.second = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=bias)
        self.value = nn.Linear(width, hidden, bias=bias)
        self.out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.silu(self.gate(x)) * self.value(x))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, gated: bool, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project = nn.Linear(width, width)
        self.mlp = (GatedMLP if gated else PlainMLP)(width, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        attention = (self.query(y) @ self.key(y).transpose(1, 2)).softmax(-1)
        x = x + self.project(attention @ self.value(y))
        return x + self.mlp(self.norm2(x))


class ToyViT(nn.Module):
    """Tokens are 4x4 patches of 8x8 images with one channel; CLS-free, mean pooled."""

    def __init__(
        self,
        classes: int = 5,
        width: int = 12,
        hidden: int = 20,
        depth: int = 2,
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, 4)
        self.blocks = nn.Sequential(*(Block(width, hidden, gated, bias) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.dropout(self.norm(self.blocks(x)).mean(1)))


def toy(seed: int = 0, **arguments: object) -> ToyViT:
    torch.manual_seed(seed)
    return perturbed(ToyViT(**arguments), seed)  # type: ignore[arg-type]


def perturbed(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Add noise to every parameter, so that no layer is near identity or zero and masks matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = scale * (parameter.std() if parameter.numel() > 1 else 0) + 0.05
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(spread * noise)
    return model.eval()


def images(count: int = 6, seed: int = 1, size: int = 8, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def masked(model: nn.Module, keep: dict[str, list[int]]) -> nn.Module:
    """The dense model with all other neurons of each `down` input set to zero."""
    model = copy.deepcopy(model)
    for name, kept in keep.items():
        module = model.get_submodule(name)
        mask = torch.zeros(module.in_features)
        mask[kept] = 1
        module.register_forward_pre_hook(lambda _m, args, mask=mask: (args[0] * mask,))
    return model


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Everything a call must give back: values, flags, gradients, hooks, widths."""
    return {
        "values": {n: p.detach().clone().tolist() for n, p in model.state_dict().items()},
        "objects": {n: id(p) for n, p in model.named_parameters()},
        "required": {n: p.requires_grad for n, p in model.named_parameters()},
        "gradients": {
            n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()
        },
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for n, m in model.named_modules()
        },
        "text": repr(model),
        "random": torch.get_rng_state().tolist(),
    }
