"""Models that are compensated, and least squares on what their layers read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from toys import PlainMLP, perturbed, relative
from zoo import by_name

import tp_amp

DOWN = "blocks.0.mlp.second", "blocks.1.mlp.second"
Keep = dict[str, list[int]]
TINY = 1e-10


def plan_of(model: nn.Module, inputs: Any, heads: bool = False) -> tp_amp.PruningPlan:
    """Half of every MLP's channels at random, and of every attention's heads."""
    generator = torch.Generator().manual_seed(5)
    sites = list(tp_amp.find_mlps(model, inputs))
    sites += tp_amp.find_attentions(model, inputs) if heads else []
    return tp_amp.PruningPlan(
        {
            site.down: sorted(torch.randperm(site.width, generator=generator)[:half].tolist())
            for site in sites
            for half in [max(1, site.width // 2)]
        }
    )


def compensated(model: nn.Module, plan: tp_amp.PruningPlan | Keep, batches: Any, **options: Any):
    plan = plan if isinstance(plan, tp_amp.PruningPlan) else tp_amp.PruningPlan(plan)
    model = copy.deepcopy(model)
    fitted = tp_amp.compensate(model, plan, batches, progress=False, **options)
    return model, fitted


def stored(model: nn.Module, name: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a Linear and comes out, `(tokens, channels)`."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _m, args, out: seen.extend(v.flatten(0, -2).double() for v in (args[0], out))
    )
    with torch.no_grad():
        model(batch)
    handle.remove()
    return seen[0], seen[1]


def lstsq(x: Tensor, y: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    rows = torch.cat([x, torch.ones(len(x), int(intercept))], 1).numpy()
    solution = torch.from_numpy(np.linalg.lstsq(rows, y.numpy(), rcond=None)[0])
    return solution[: x.shape[1]].T, solution[x.shape[1] :].flatten()


def left_over(hidden: Tensor, weight: Tensor, kept: list[int]) -> float:
    """The mean squared error of a layer's output after an affine fit on some of its inputs."""
    outputs = hidden @ weight.T
    slope, shift = lstsq(hidden[:, kept], outputs, True)
    return float((outputs - hidden[:, kept] @ slope.T - shift).square().sum(1).mean())


def after(name: str) -> tuple[str, int]:
    """Where a toy's stream is once an MLP or attention has written to it.

    A module, and whether the stream is its input or its output, 0 or 1; of layers that do not
    write to it, their own output.
    """
    block, _, part = name.rpartition(".mlp.")
    if part in ("second", "out"):
        return block, 1
    if name.endswith("project"):
        return name.replace("project", "norm2"), 0
    # Blocks that are MLPs, added to the stream outside of them.
    following = {"blocks.0.second": "blocks.1", "blocks.1.second": "head"}
    return (following[name], 0) if name in following else (name, 1)


def hand_fitted(
    model: nn.Module,
    keep: Keep,
    batch: Tensor,
    place: Callable[[str], tuple[str, int]] = after,
) -> nn.Module:
    """Cut and refit one Linear after another, the later ones on the corrected model.

    Each makes up for what the stream lacks behind it.
    """
    dense, cut = model, copy.deepcopy(model)
    for name, units in keep.items():
        mlp, down = cut.get_submodule(name.rpartition(".")[0]), cut.get_submodule(name)
        for part in mlp.children():
            if isinstance(part, nn.Linear) and part is not down:
                part.weight = nn.Parameter(part.weight.detach()[units])
                part.bias = None if part.bias is None else nn.Parameter(part.bias.detach()[units])
        down.weight = nn.Parameter(down.weight.detach()[:, units])
        hidden, _ = stored(cut, name, batch)
        module, side = place(name)
        given, target = (stored(one, module, batch)[side] for one in (cut, dense))
        biased = down.bias is not None
        weight, bias = lstsq(hidden, target - given, biased)
        with torch.no_grad():
            down.weight += weight
            if biased:
                down.bias += bias
    return cut


def same_weights(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> bool:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    if tolerance == 0:
        return all(torch.equal(a[name], b[name]) for name in a)
    return all(relative(a[name], b[name]) < tolerance for name in a if a[name].abs().sum())


KEEP = {DOWN[0]: [0, 3, 7, 8, 15, 19], DOWN[1]: [1, 2, 4, 9, 11]}


def kept(gated: bool) -> Keep:
    return {name.replace("second", "out") if gated else name: k for name, k in KEEP.items()}


def entry(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: by_name(name)


# Model, whether heads are cut, and how many layers are fitted.
FAMILIES = {
    "packed gated": (entry("dinov2_giant"), False, 2),
    "inner norm": (entry("beit3"), False, 2),
    "inner norm, gated": (entry("eva02_clip"), False, 2),
    "convolutions": (entry("convnext_conv_mlp"), False, 5),
    "global response norm": (entry("convnextv2"), False, 5),
    "depthwise convolution inside": (entry("pvt_v2"), False, 4),
    "fused parallel": (entry("pwee_fused_out"), False, 2),
    "swin": (entry("swin"), False, 3),
    "swin with heads": (entry("swin"), True, 6),
    "rotary with heads": (entry("eva02"), True, 4),
    "open_clip with heads": (entry("open_clip"), True, 4),
}


class Tokenwise(nn.Module):
    """An MLP for each token on its own, `(images, tokens, 6)`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PlainMLP(6, 16), PlainMLP(6, 16)])
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.head(tokens).mean(1)


def tokenwise() -> tuple[nn.Module, Tensor, Keep]:
    torch.manual_seed(0)
    tokens = torch.randn(30, 8, 6, generator=torch.Generator().manual_seed(3))
    keep = {f"blocks.{i}.second": [0, 2, 5, 11] for i in (0, 1)}
    return perturbed(Tokenwise()), tokens, keep
