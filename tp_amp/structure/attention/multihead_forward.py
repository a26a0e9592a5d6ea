"""The forward pass of `nn.MultiheadAttention` for any number of heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tp_amp.structure.attention.head_forward import HeadCut


class MultiheadForward(nn.MultiheadAttention):
    """`nn.MultiheadAttention` for any number of heads, which calls `out_proj` as a module.

    The original demands heads times head width to be the width of its input, and reads the weight
    of `out_proj` only, so that no hook sees the heads.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does; `is_causal` is a hint on `attn_mask`."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint on attn_mask; pass the causal attn_mask too")
        batched = query.dim() == 3
        inputs = [_images_first(x, batched, self.batch_first) for x in (query, key, value)]
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = (
            x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for x in self._projected(inputs)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        hidden, weights = _attend(q, k, v, mask, self.dropout * self.training, need_weights)
        # Images first also where the caller has tokens first, so that scores are of each image.
        output = self.out_proj(hidden.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not batched:
            return output.squeeze(0), weights
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(self, inputs: list[Tensor]) -> Iterator[Tensor]:
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return map(functional.linear, inputs, weights, biases)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        if mask is not None:
            mask = _additive(mask, q.dtype)
            if mask.dim() == 3:
                # Not len(), an int, which would fix the batch size of an exported model.
                mask = mask.reshape(q.shape[0], -1, *mask.shape[1:])
                cut: HeadCut | None = getattr(self, "head_cut", None)
                mask = cut.take(mask, 1) if cut else mask
        if padding is not None:
            padding = _additive(padding, q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask


def _images_first(values: Tensor, batched: bool, batch_first: bool) -> Tensor:
    if not batched:
        return values.unsqueeze(0)
    return values if batch_first else values.transpose(0, 1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    if not need_weights:
        attend = functional.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=mask, dropout_p=dropout), None
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    weights = (logits if mask is None else logits + mask).softmax(-1)
    weights = functional.dropout(weights, dropout)
    return weights @ v, weights
