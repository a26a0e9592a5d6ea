"""Module-aware distortion (DIMAP): what a cut takes from a layer, ranked within its module."""

from __future__ import annotations

import logging
from typing import Any

import numpy
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import prune

from tp_amp.running.arguments import check_number
from tp_amp.running.checks import check_model
from tp_amp.structure.attention.blocks import auxiliary, find_attention_blocks, heads
from tp_amp.structure.groups import GroupLayer, channel_weights, keeps_ties, root_name, sum_channels

logger = logging.getLogger(__name__)

_SHARE = "a share from 0 up to below 1"


class DIMAPImportance(tp.importance.Importance):  # type: ignore[misc]
    """Score channels by the distortion their removal causes (DIMAP, arXiv 2404.13648, eq. 10).

    The paper's score of single weights, for channels: the energy of a channel is the squared weight
    summed over its row or column in every layer of the group, and its score is the energy over the
    energy of all channels that still stand when it goes, its own included: those with more, and of
    equal ones those before it. The largest channel scores 1, so no layer is emptied by a threshold.
    Scores are shares, made to be compared between layers: rank each module over all blocks with
    `dimap_scopes`. It needs no data and no gradient, and reads the weights anew at each call.

    Example:
        >>> import timm, torch, torch_pruning as tp, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> images = torch.randn(1, 3, 224, 224)
        >>> tp.pruner.MetaPruner(
        ...     model, images, tp_amp.DIMAPImportance(), **tp_amp.dimap_scopes(model, 0.0, 0.5)
        ... ).step()
        >>> sum(block.mlp.fc1.out_features for block in model.blocks)
        768
    """

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Score the root channels of a group `(channels,)`, in [0, 1]; high means keep.

        Returns:
            None, with a logged reason, for a group without a Linear or a convolution.

        Raises:
            ValueError: weights are not finite, or their squares.
        """
        if not keeps_ties(group):
            return None
        energy, _ = sum_channels(group, _energy)
        if energy is None:
            logger.warning(
                "no score for the group of %s: no Linear or convolution is in it", root_name(group)
            )
            return None
        if not bool(torch.isfinite(energy).all()):
            raise ValueError(
                f"the energies of the channels of {root_name(group)} sum to more than float32 "
                "holds; load sound weights before pruning"
            )
        ranked, order = energy.sort(descending=True, stable=True)
        return torch.empty_like(energy).scatter_(0, order, _distortion(ranked))


def _energy(layer: GroupLayer) -> Tensor:
    energy = _wide(channel_weights(layer)).square().sum(1)
    if not bool(torch.isfinite(energy).all()):
        raise ValueError(
            f"the weights of {layer.name} are not finite; load sound weights before pruning"
        )
    return energy


def _distortion(ranked: Tensor) -> Tensor:
    """Energy over the energy that still stands, of energies in descending order."""
    standing = ranked.cumsum(0).clamp_(min=torch.finfo(ranked.dtype).tiny)
    scores = ranked / standing
    scores[:1] = 1
    return scores


def _is_share(value: float) -> bool:
    return 0 <= value < 1


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def dimap_scopes(model: nn.Module, attention: float, mlp: float) -> dict[str, Any]:
    """Make any of Torch-Pruning's pruners rank module by module, as DIMAP does.

    Two scopes with one threshold each, over all blocks and stages: the channels of attention (head
    dimensions: q, k, v and the output projection that reads v are one group to Torch-Pruning, so
    the paper's QKV and PRJ modules are one), and the hidden channels of the MLPs. All else is
    ignored: norms, patch embedding, patch merging and head, the residual stream through them, and
    parameters outside layers. Swin's `relative_position_bias_table` is such a one; unless ignored,
    Torch-Pruning skips its attention without a word.

    Torch-Pruning cuts the layers alone, the same dimensions of each head; `num_heads` stays. After
    `step()`, set what the forward pass reads beside them. On each attention of timm's ViTs that is
    `head_dim = qkv.out_features // (3 * num_heads)` and `attn_dim = num_heads * head_dim`; timm's
    Swins need neither. On those of Hugging Face it is `head_dim`, before version 5
    `attention_head_size` and `all_head_size`. Where timm's `fused_attn` is set, attention scales by
    the new head dimension: set `fused_attn = False` to keep the dense model's scale, or
    `scale = head_dim**-0.5` so that both ways agree.

    Args:
        model: as for `dimap_masks`.
        attention: share of the attention channels to remove, from 0 up to below 1.
        mlp: share of the hidden channels to remove, from 0 up to below 1.

    Returns:
        Keyword arguments: `global_pruning`, `pruning_ratio`, `pruning_ratio_dict`, `num_heads` and
        `ignored_layers`.

    Raises:
        ValueError: no transformer block is found, an attention doesn't tell its number of heads, or
            a share is out of range.

    Example:
        >>> import timm, tp_amp
        >>> model = timm.create_model("swin_tiny_patch4_window7_224")
        >>> scopes = tp_amp.dimap_scopes(model, attention=0.3, mlp=0.5)
        >>> [(len(layers), share) for layers, share in scopes["pruning_ratio_dict"].items()]
        [(12, 0.3), (12, 0.5)]
    """
    for name, share in {"attention": attention, "mlp": mlp}.items():
        check_number(_SHARE, _is_share, **{name: share})
    check_model(model)
    blocks = find_attention_blocks(model)
    module = model.get_submodule
    qkv = {module(name): heads(model, b) for b in blocks for name in b.qkv}
    up = [module(name) for b in blocks for name in b.up]
    scopes = {tuple(qkv): attention, tuple(up): mlp}
    ignored = [m for layers, share in scopes.items() if share == 0 for m in layers]
    # A cut of the residual stream would cut these.
    ignored += [module(name) for b in blocks for name in (b.project, b.down)]
    return {
        "global_pruning": True,
        "pruning_ratio": 0.0,
        "pruning_ratio_dict": {layers: share for layers, share in scopes.items() if share},
        "num_heads": qkv,
        "ignored_layers": [*ignored, *auxiliary(model, blocks)],
    }


def dimap_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Choose the single weights to keep, as DIMAP prunes (arXiv 2404.13648, eq. 10).

    Within a layer the score of a weight is its square over the sum of all squares that still stand
    when it goes. Each of three modules has one threshold over all blocks and stages: all QKV
    weights, all output projections, all MLP weights. Biases, norms, embeddings, patch merging and
    the head are never pruned, and no layer is emptied.

    Args:
        model: a ViT or Swin of timm, torchvision or Hugging Face; it is not changed.
        sparsity: share of each module's weights to remove, from 0 up to below 1; the paper's three
            models have 0.15, 0.35 and 0.55.

    Returns:
        Module path of each Linear -> what to keep of its weight, bool `(out, in)`; none of layers
        that have no weight left.

    Raises:
        ValueError: no transformer block is found, weights are not finite, or the sparsity is out of
            range.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> masks = tp_amp.dimap_masks(model, 0.25)
        >>> {name: f"{mask.float().mean():.2f}" for name, mask in masks.items() if "attn" in name}
        {'blocks.0.attn.qkv': '0.75', 'blocks.0.attn.proj': '0.75'}
    """
    check_number(_SHARE, _is_share, sparsity=sparsity)
    check_model(model, values=True)
    blocks = find_attention_blocks(model)
    modules = (
        [name for block in blocks for name in block.qkv],
        [block.project for block in blocks],
        [name for block in blocks for name in (*block.up, block.down)],
    )
    masks: dict[str, Tensor] = {}
    for names in modules:
        weights = {name: _finite(name, model.get_submodule(name)) for name in names}
        weights = {name: weight for name, weight in weights.items() if weight.numel()}
        if weights:
            masks |= zip(weights, _module_masks([*weights.values()], sparsity), strict=True)
    return {name: masks[name] for name, _ in model.named_modules() if name in masks}


def dimap_sparsify(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Set weights to zero with `dimap_masks`, in place and for good while it trains on.

    The masks are `torch.nn.utils.prune` parametrisations: an optimizer trains `weight_orig`, and
    the removed weights stay zero. `torch.nn.utils.prune.remove(module, "weight")` makes a layer
    plain again. Nothing gets smaller or faster: the zeros are stored.

    Args:
        model: as for `dimap_masks`.
        sparsity: as for `dimap_masks`.

    Returns:
        The masks.

    Raises:
        ValueError: as `dimap_masks`.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> masks = tp_amp.dimap_sparsify(model, 0.25)
        >>> bool((model.blocks[0].mlp.fc1.weight[~masks["blocks.0.mlp.fc1"]] == 0).all())
        True
    """
    masks = dimap_masks(model, sparsity)
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", mask)  # type: ignore[no-untyped-call]
    return masks


def _finite(name: str, module: Any) -> Tensor:
    weight: Tensor = module.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the weight of {name} is not finite; load sound weights before pruning")
    return weight


def _module_masks(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """Keep the best weights of all layers of a module, by one threshold on their distortion."""
    magnitudes = [_descending(weight) for weight in weights]
    scores = [_distortion(magnitude.square()) for magnitude in magnitudes]
    count = sum(map(len, scores))
    # The largest weight of each layer scores 1 and the next at most 1/2, so each layer keeps one.
    kept = _counts_above_threshold(scores, max(count - round(sparsity * count), len(scores)))
    return list(map(_largest, weights, magnitudes, kept))


def _counts_above_threshold(scores: list[Tensor], total: int) -> list[int]:
    """Count each layer's scores, descending, above the lowest threshold that `total` can exceed."""
    rising = [-score for score in scores]

    def above(threshold: float) -> list[int]:
        return [int(torch.searchsorted(negative, -threshold)) for negative in rising]

    low, high = -1.0, 0.5
    if sum(above(low)) <= total:
        return above(low)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if sum(above(middle)) > total else (low, middle)
    return above(high)


def _descending(weight: Tensor) -> Tensor:
    magnitude = _wide(weight).abs().flatten()
    if magnitude.device.type == "cpu":
        # Ten times faster than torch's sort, which makes indices too.
        return torch.from_numpy(numpy.sort(magnitude.numpy())).flip(0)
    return magnitude.sort(descending=True).values


def _largest(weight: Tensor, magnitudes: Tensor, count: int) -> Tensor:
    """Mask the `count` weights of largest magnitude; of equal ones, the first."""
    smallest = magnitudes[count - 1]
    magnitude = _wide(weight).abs().flatten()
    mask = magnitude > smallest
    tied = (magnitude == smallest).nonzero().flatten()
    mask[tied[: count - int(mask.sum())]] = True
    return mask.view(weight.shape)
