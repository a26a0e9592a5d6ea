"""timm's parallel blocks, whose one input projection makes the hidden channels, q, k and v."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from timm.models import vision_transformer
from torch import nn
from torch_pruning.pruner import function

# Older releases of timm lack the second.
_BLOCKS = tuple(
    getattr(vision_transformer, name)
    for name in ("ParallelScalingBlock", "DiffParallelScalingBlock")
    if hasattr(vision_transformer, name)
)


@dataclass(frozen=True)
class FusedParts:
    """The layers of one parallel block; hidden channels are the first outputs of `up`."""

    block: nn.Module
    up: nn.Linear
    down: nn.Linear
    width: int
    first: int


def fused_parts(model: nn.Module) -> Iterator[FusedParts]:
    """Yield the parallel blocks of a model, in the order they are defined.

    Raises:
        ValueError: a block's layers don't fit the widths it splits its input projection by.
    """
    for name, block in model.named_modules():
        if not isinstance(block, _BLOCKS):
            continue
        split: Any = getattr(block, "in_split", [0])
        width, *attention = split
        up: Any = block.in_proj
        down: Any = getattr(block, "mlp_out_proj", None) or block.out_proj
        first = down.in_features - width
        if up.out_features != width + sum(attention) or first not in (0, *attention):
            raise ValueError(
                f"{name} splits {up.out_features} channels of in_proj into {split} and reads "
                f"{down.in_features}; tp_amp knows [hidden, q, k, v] and a projection of "
                "[attention, hidden] or of hidden alone"
            )
        yield FusedParts(block, up, down, width, first)


class FusedBlockPruner(function.BasePruningFunc):  # type: ignore[misc]
    """Puts right what a parallel block itself knows of its hidden channels."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Drop the hidden channels `idxs` from the split and from the bias of its own."""
        block: Any = layer
        width, *attention = block.in_split
        if block.mlp_bias is not None:
            keep = sorted(set(range(width)) - set(idxs))
            block.mlp_bias = self._prune_parameter_and_grad(block.mlp_bias, keep, 0)
        # A new list: a temporary cut gives the old one back.
        block.in_split = [width - len(idxs), *attention]
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        """Count the hidden channels."""
        split: Any = layer.in_split
        return int(split[0])

    get_in_channels = get_out_channels
