"""Widths that meet a target size with the smallest loss, from the errors of every width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.budget.budget import Budget
from tp_amp.importance.reconstruction import ReconstructionImportance
from tp_amp.plan.cutting import Site
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.running.batches import example
from tp_amp.structure.graph import build_graph
from tp_amp.structure.mlps import read_mlps


def allocate(
    errors: Mapping[str, Tensor], costs: Mapping[str, Tensor], budget: float, round_to: int = 1
) -> dict[str, int]:
    """Choose widths whose cost is within a budget, with the smallest sum of errors.

    With one price for a unit of cost, each layer takes the width that minimises its error plus what
    the width costs; the price is found by bisection. That is optimal among all widths on the lower
    convex hulls of the errors over the costs. What is left of the budget goes where it lowers the
    error most.

    Args:
        errors: name -> error with 0, 1, ... channels kept, `(width + 1,)`.
        costs: name -> cost of 0, 1, ... channels, `(width + 1,)`, never falling.
        budget: for the sum of the costs.
        round_to: widths are multiples of it.

    Returns:
        Name -> width, at least one step each.

    Raises:
        ValueError: the budget is below the cost of the smallest widths.

    Example:
        >>> errors = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([1.0, 0.5, 0.0])}
        >>> allocate(errors, {"a": torch.arange(3.0), "b": torch.arange(3.0)}, budget=3)
        {'a': 2, 'b': 1}
    """
    choices = {n: _choices(len(values) - 1, round_to) for n, values in errors.items()}

    def widths(price: float) -> dict[str, int]:
        return {
            name: int(kept[(errors[name][kept] + price * costs[name][kept]).argmin()])
            for name, kept in choices.items()
        }

    def cost(price: float) -> float:
        return _total(costs, widths(price))

    low, high = 0.0, 1e-12
    while cost(high) > budget:
        low, high = high, 4 * high
        if high > 1e30:
            raise ValueError(
                f"a budget of {budget:.4g} can't be met: the smallest widths cost {cost(high):.4g}"
            )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > budget else (low, middle)
    return _filled(widths(high), errors, costs, budget, choices)


def _total(costs: Mapping[str, Tensor], widths: Mapping[str, int]) -> float:
    return math.fsum(float(costs[name][width]) for name, width in widths.items())


def _filled(
    widths: dict[str, int],
    errors: Mapping[str, Tensor],
    costs: Mapping[str, Tensor],
    budget: float,
    choices: Mapping[str, Tensor],
) -> dict[str, int]:
    """Widen one layer after the other by one step, as long as that fits the budget."""
    left = budget - _total(costs, widths)
    while True:
        best: tuple[float, str, int] | None = None
        for name, width in widths.items():
            wider = _next(choices[name], width)
            if wider is None:
                continue
            price = float(costs[name][wider] - costs[name][width])
            if price > left:
                continue
            gain = float(errors[name][width] - errors[name][wider]) / max(price, 1e-30)
            if best is None or gain > best[0]:
                best = gain, name, wider
        if best is None:
            return widths
        _, name, wide = best
        left -= float(costs[name][wide] - costs[name][widths[name]])
        widths[name] = wide


def _next(kept: Tensor, width: int) -> int | None:
    """The next larger width to choose."""
    place = int(torch.searchsorted(kept, width, right=True))
    return int(kept[place]) if place < len(kept) else None


def plan_for_target(
    model: nn.Module,
    example_inputs: Any,
    importance: ReconstructionImportance,
    target: Mapping[str, float],
    *,
    round_to: int = 1,
    ignored_layers: Iterable[nn.Module] = (),
) -> PruningPlan:
    """Plan to meet a size with the smallest loss that `importance` foresees; nothing is cut.

    The widths that `compensate` is at its best with: no search, no more forward passes than the
    importance has made and a latency needs to be measured.

    Args:
        model: the dense model.
        example_inputs: as for `find_mlps`.
        importance: collected on the model, or with `data`.
        target: `{"params": 0.6}`, `{"macs": 0.6}` or `{"latency": 0.6}`: a fraction of the dense
            model, or above 1 an absolute number. The latency is that of one forward pass on the
            example inputs, in milliseconds above 1; it is measured on the model's device.
        round_to: widths are multiples of it.
        ignored_layers: modules that stay as they are.

    Raises:
        ValueError: no MLP is found, the target is out of reach (its range is told), or an MLP
            shares its `down` with the attention (timm's parallel blocks with one projection).

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> images = [torch.randn(4, 3, 224, 224)]
        >>> importance = tp_amp.ReconstructionImportance(data=images)
        >>> plan = tp_amp.plan_for_target(model, images[0][:1], importance, {"params": 0.7})
        >>> fitted = tp_amp.compensate(model, plan, images)
    """
    traced = build_graph(model, example_inputs)
    ignored = {module for layer in ignored_layers for module in layer.modules()}
    sites: list[Site] = [
        mlp
        for mlp in read_mlps(model, traced)
        if not ignored & {model.get_submodule(name) for name in (*mlp.up, mlp.down)}
    ]
    if not sites:
        raise ValueError(f"no MLP to prune was found in {type(model).__name__}")
    fused = [site.down for site in sites if site.first]
    if fused:
        raise ValueError(
            f"{fused} read attention and MLP side by side, whose losses are not foreseen apart; "
            "add them to ignored_layers, or use plan_from_importance or AdaptiveMLPPruner"
        )
    layers = [
        site.down
        for site in sites
        if not importance.knows(site.down, model.get_submodule(site.down))
    ]
    if layers:
        if importance.data is None:
            raise ValueError(
                f"the importance has not seen {layers}, or not with these weights; call "
                "importance.collect(model, batches, layers=...) or pass data="
            )
        importance.collect(model, importance.data, layers=layers, progress=False)
    inputs = example(example_inputs)
    budget = Budget(target, model, traced.graph, sites, inputs, round_to=round_to)
    budget.check({site.down: int(_choices(site.width, round_to)[0]) for site in sites})
    errors = {site.down: importance.errors[site.down] for site in sites}
    costs = {site.down: budget.costs(site.down) for site in sites}
    spent = budget.cost(dict.fromkeys(costs, 0))
    widths = allocate(errors, costs, budget.amount - spent, round_to)
    keep = {n: sorted(importance.orders[n][:width].tolist()) for n, width in widths.items()}
    budget.confirm(keep)
    dense = {site.down: site.width for site in sites}
    return PruningPlan(keep, dense, sites={site.down: site for site in sites})


def _choices(width: int, round_to: int) -> Tensor:
    """The widths to choose from: multiples, and the dense one."""
    multiples = torch.arange(round_to, width + 1, round_to)
    return (
        multiples
        if len(multiples) and multiples[-1] == width
        else torch.cat([multiples, torch.tensor([width])])
    )
