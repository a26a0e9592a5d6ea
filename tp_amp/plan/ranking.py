"""Make a plan from scores and widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.plan.cutting import least_reason, site_group
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.running.arguments import check_importance, check_number, check_widths
from tp_amp.running.checks import check_heads
from tp_amp.structure.model_structure import ModelStructure, Site


def plan_from_importance(
    model: nn.Module,
    example_inputs: Any,
    importance: Callable[[Any], Tensor | None],
    widths: float | dict[str, int],
    *,
    num_heads: Mapping[nn.Module, int] | None = None,
) -> PruningPlan:
    """Keep the most important channels or heads at given widths; the model is not cut.

    Args:
        model: the dense model.
        example_inputs: as for `find_mlps`.
        importance: any Torch-Pruning importance that is ready to score.
        widths: the fraction of each MLP's channels that stays, above 0 (at least one channel
            stays), or for each `down` its number of channels, of which an MLP may keep none; of an
            attention, of heads.
        num_heads: as for `find_attentions`, where an attention does not tell them.

    Raises:
        ValueError: no MLP is found, `widths` names a layer that is neither MLP nor attention or
            is out of range, or the importance has no finite scores for one.

    Example:
        >>> import timm, torch, torch_pruning as tp, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> images = torch.randn(1, 3, 224, 224)
        >>> plan = tp_amp.plan_from_importance(model, images, tp.importance.LAMPImportance(), 0.5)
        >>> plan.widths
        {'blocks.0.mlp.fc2': 384}
    """
    check_importance(importance)
    if isinstance(widths, Mapping):
        check_widths(widths)
    else:
        fraction = "a fraction above 0, 1 at most, or a dict of widths"
        check_number(fraction, lambda value: 0 < value <= 1, widths=widths)
    structure = ModelStructure(model, example_inputs, num_heads=num_heads)
    check_heads(model, num_heads)
    sites = structure.sites(widths if isinstance(widths, dict) else ())
    if not sites:
        raise ValueError(f"no MLP was found in {type(model).__name__}")
    dense = {name: site.width for name, site in sites.items()}
    if not isinstance(widths, dict):
        widths = {name: max(1, round(width * widths)) for name, width in dense.items()}
    for name, width in widths.items():
        if not 0 <= width <= dense[name]:
            raise ValueError(
                f"can't keep {width} {sites[name].units} of {name}, which has {dense[name]}"
            )
        if not width and (reason := least_reason(model, sites[name])):
            raise ValueError(f"can't keep no {sites[name].units} of {name}: {reason}")
    keep = {
        name: sorted(rank_channels(importance, structure.graph, sites[name])[:width])
        for name, width in widths.items()
    }
    return PruningPlan(keep, {n: dense[n] for n in keep}, sites={n: sites[n] for n in keep})


@torch.no_grad()
def rank_channels(importance: Callable[[Any], Tensor | None], graph: Any, site: Site) -> list[int]:
    """Order an MLP's hidden channels or an attention's heads by importance, the best first.

    The score of a head is the sum over its channels. Ties stand by index.

    Raises:
        ValueError: the importance gives None, another number of scores, or a score not finite.
    """
    scores = importance(site_group(graph, site, range(site.width)))
    if scores is None:
        raise ValueError(
            f"the importance has no score for the {type(site).__name__} {site.down}; see the log"
        )
    channels = site.width * site.unit_width
    bad = int((~torch.isfinite(scores)).sum())
    if scores.shape != (channels,) or bad:
        raise ValueError(
            f"the importance's scores for {site.down} must be {channels} finite numbers, found "
            f"shape {tuple(scores.shape)}, {bad} of them not finite; check weights and data"
        )
    sums = scores.view(site.width, -1).sum(1)
    order: list[int] = sums.argsort(descending=True, stable=True).tolist()
    return order
