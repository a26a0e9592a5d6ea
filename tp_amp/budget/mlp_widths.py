"""Widths of MLPs: the paper's sizing, and the form Torch-Pruning takes widths in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from tp_amp.budget.width_arguments import RoundTo
from tp_amp.budget.width_kinds import steps_of
from tp_amp.running.arguments import check_number, check_widths
from tp_amp.structure.mlps import MLP, find_mlps
from tp_amp.structure.model_structure import Site

logger = logging.getLogger(__name__)


def mlp_ratio_widths(model: nn.Module, example_inputs: Any, ratio: float) -> dict[str, int]:
    """Size every MLP as DGMR does: hidden channels = int(ratio * input channels).

    Args:
        model: the dense model.
        example_inputs: as for `find_mlps`.
        ratio: hidden channels for each input channel of `up`; the paper prunes to 2, 1 and 0.5.

    Returns:
        Module path of each MLP's `down` -> its width, for `plan_from_importance` and
        `pruning_ratio_dict`.

    Raises:
        ValueError: no MLP is found, or an MLP would have no channel or more than it has now.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> tp_amp.mlp_ratio_widths(model, torch.randn(1, 3, 224, 224), 0.5)
        {'blocks.0.mlp.fc2': 96}
    """
    check_number("a number above 0", lambda value: value > 0, ratio=ratio)
    widths = {}
    for mlp in _some_mlps(model, example_inputs):
        up: Any = model.get_submodule(mlp.up[0])
        inputs = up.weight.shape[1]
        widths[mlp.down] = int(ratio * inputs)
        if not 0 < widths[mlp.down] <= mlp.width:
            raise ValueError(
                f"ratio {ratio} gives {mlp.name} {widths[mlp.down]} hidden channels for its "
                f"{inputs} inputs; it has {mlp.width}: pass a ratio above 0, up to "
                f"{mlp.width / inputs:g}"
            )
    return widths


def pruning_ratio_dict(
    model: nn.Module, example_inputs: Any, widths: dict[str, int]
) -> dict[tuple[nn.Module, ...], float]:
    """Turn widths into Torch-Pruning's `pruning_ratio_dict`, for any of its pruners.

    Exactly k of n channels stay, with local and with global pruning: the ratio is
    1 - (k + 0.5) / n, since Torch-Pruning rounds n * (1 - ratio) down and 1 - k/n often leaves
    k - 1. Pass `pruning_ratio=0` beside it, or Torch-Pruning prunes half of everything else too.

    Args:
        model: the dense model.
        example_inputs: as for `find_mlps`.
        widths: module path of an MLP's `down` -> channels to keep.

    Returns:
        The `up` layers of each MLP in `widths` -> the share of its channels to prune.

    Raises:
        ValueError: `widths` names a layer that is no MLP's `down`, a width is out of range, or an
            MLP has gate and value packed in one layer, which Torch-Pruning cuts wrongly.

    Example:
        >>> import timm, torch, torch_pruning as tp, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
        >>> images = torch.randn(1, 3, 224, 224)
        >>> ratios = tp_amp.pruning_ratio_dict(model, images, {"blocks.0.mlp.fc2": 500})
        >>> tp.pruner.MetaPruner(
        ...     model, images, tp_amp.GramSchmidtImportance(), pruning_ratio=0,
        ...     pruning_ratio_dict=ratios, ignored_layers=[model.patch_embed, model.head],
        ... ).step()
        >>> model.blocks[0].mlp.fc1.out_features
        500
    """
    check_widths(widths)
    mlps = {mlp.down: mlp for mlp in _some_mlps(model, example_inputs)}
    ratios = {}
    for name, width in widths.items():
        if name not in mlps or not 0 < width <= mlps[name].width:
            dense = {mlp.down: mlp.width for mlp in mlps.values()}
            raise ValueError(
                f"can't keep {width} channels of {name}; the MLPs and their widths are {dense}"
            )
        mlp = mlps[name]
        if mlp.packed > 1:
            raise ValueError(
                f"Torch-Pruning's own pruners can't cut {mlp.name}: gate and value are packed in "
                f"{mlp.up[0]}; use plan_from_importance and apply_plan"
            )
        key = tuple(model.get_submodule(up) for up in mlp.up)
        ratios[key] = max(0.0, 1 - (width + 0.5) / mlp.width)
    return ratios


def _some_mlps(model: nn.Module, example_inputs: Any) -> list[MLP]:
    mlps = find_mlps(model, example_inputs)
    if not mlps:
        raise ValueError(
            f"no MLP was found in {type(model).__name__}; set the log level of 'tp_amp' to DEBUG "
            "to see why each layer starts none"
        )
    return mlps


def check_narrowable(sites: Sequence[Site], *, round_to: RoundTo = 1, min_width: int = 1) -> None:
    """Tell which MLPs and attentions stay whole since no width that is asked for lies below theirs.

    Args:
        sites: what is to be cut.
        round_to: as for `steps_of`.
        min_width: the smallest width of an MLP; with 0 whole ones may go.

    Raises:
        ValueError: all of them do.
    """
    steps = steps_of(sites, round_to)
    least = {
        site.down: -(-(min_width if isinstance(site, MLP) else 1) // step) * step
        for site, step in zip(sites, steps.values(), strict=True)
    }
    whole = [site for site in sites if 1 < least[site.down] >= site.width]
    if not whole:
        return
    asked = {"round_to": round_to, "min_width": min_width}
    told = " and ".join(f"{name}={value}" for name, value in asked.items() if value != 1)
    several = ", ".join(f"{site.down} ({site.width})" for site in whole[:3])
    smallest = " or ".join(str(width) for width in sorted({least[site.down] for site in whole}))
    kind = "MLPs" if all(isinstance(site, MLP) for site in sites) else "widths"
    text = (
        f"with {told} the smallest width is {smallest}, so that {len(whole)} of {len(sites)} "
        f"{kind} stay whole: {several}{', ...' if len(whole) > 3 else ''}"
    )
    if len(whole) == len(sites):
        raise ValueError(f"{text}; nothing could be pruned, take less")
    logger.warning(text)
