"""The ways of cutting that benchmarks/dimap.py compares: channels, and single weights."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tp_amp

EXAMPLE = torch.zeros(1, 3, 32, 32)
TRIES, CLOSE = 10, 0.001


Part = tuple[int, int]  # whether attention is cut, and the MLPs: 1 or 0


def cut_by_modules(dense: nn.Module, part: Part, share: float) -> nn.Module:
    """DIMAP: a threshold for attention and one for the MLPs."""
    model = copy.deepcopy(dense)
    scopes = tp_amp.dimap_scopes(model, *(on * share for on in part))
    return pruned(model, tp_amp.DIMAPImportance(), scopes)


def cut_uniformly(dense: nn.Module, part: Part, parameters: int) -> nn.Module:
    """The same share of each layer; what whole head dimensions leave over, the MLPs make up."""

    def by_shares(attention: float, mlp: float) -> nn.Module:
        model = copy.deepcopy(dense)
        scopes = tp_amp.dimap_scopes(model, part[0] * attention, part[1] * mlp)
        scopes["global_pruning"] = False
        return pruned(model, tp.importance.MagnitudeImportance(p=2), scopes)

    both = closest_share(lambda share: by_shares(share, share), parameters)
    if not part[1]:
        return by_shares(both, 0)
    return by_shares(both, closest_share(lambda share: by_shares(both, share), parameters))


def cut_by_one_threshold(dense: nn.Module, parameters: int) -> nn.Module:
    """Torch-Pruning's LAMP, ranked globally over the layers that DIMAP cuts."""

    def by_share(share: float) -> nn.Module:
        model = copy.deepcopy(dense)
        scopes = tp_amp.dimap_scopes(model, share, share)
        layers = tuple(itertools.chain(*scopes["pruning_ratio_dict"]))
        scopes["pruning_ratio_dict"] = {layers: share}
        return pruned(model, tp.importance.LAMPImportance(), scopes)

    return by_share(closest_share(by_share, parameters))


def pruned(
    model: nn.Module, importance: Callable[[Any], Tensor | None], scopes: dict[str, Any]
) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unwrapped parameters")  # the scopes ignore them
        tp.pruner.MetaPruner(model, (EXAMPLE,), importance, **scopes).step()
    return model


def closest_share(by_share: Callable[[float], nn.Module], parameters: int) -> float:
    """Bisect for the share to remove that leaves so many parameters."""
    low, high, off = 0.0, 1.0, {}
    for _ in range(TRIES):
        share = (low + high) / 2
        count = count_parameters(by_share(share))
        off[share] = abs(count - parameters)
        if off[share] <= CLOSE * parameters:
            break
        low, high = (share, high) if count > parameters else (low, share)
    return min(off, key=lambda share: off[share])


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module) -> int:
    # Torch-Pruning's own counter takes cut attention for smaller than it is.
    with FlopCounterMode(display=False) as counter:
        model(EXAMPLE)
    return counter.get_total_flops() // 2


def uniform_masks(model: nn.Module, names: list[str], sparsity: float) -> dict[str, Tensor]:
    """Keep the same share of each layer's weights, the largest."""
    return {n: keep_best(model.get_submodule(n).weight.detach().abs(), sparsity) for n in names}


def lamp_masks(model: nn.Module, names: list[str], sparsity: float) -> dict[str, Tensor]:
    """Rank all layers by one threshold on LAMP's scores (arXiv 2010.07611)."""
    weights = [model.get_submodule(name).weight.detach() for name in names]
    scores = torch.cat([lamp_scores(weight) for weight in weights])
    parts = keep_best(scores, sparsity).split([weight.numel() for weight in weights])
    return {n: part.view_as(w) for n, part, w in zip(names, parts, weights, strict=True)}


def lamp_scores(weight: Tensor) -> Tensor:
    """The square of each weight over the sum of all that are at least as large, flat."""
    ranked, order = weight.double().square().flatten().sort(descending=True)
    return torch.empty_like(ranked).scatter_(0, order, ranked / ranked.cumsum(0))


def keep_best(scores: Tensor, sparsity: float) -> Tensor:
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort()[: round(sparsity * scores.numel())]] = False
    return mask.view_as(scores)


UNSTRUCTURED: dict[str, Callable[[nn.Module, list[str], float], dict[str, Tensor]]] = {
    "uniform magnitude": uniform_masks,
    "LAMP, one threshold": lamp_masks,
    "DIMAP": lambda model, names, sparsity: tp_amp.dimap_masks(model, sparsity),
}


@torch.no_grad()
def zeroed(dense: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy in which only the masks' weights stand."""
    model = copy.deepcopy(dense)
    for name, mask in masks.items():
        model.get_submodule(name).weight *= mask
    return model
