"""The forward pass of torchvision's Swin attention, v1 and v2, for any number of heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class ShiftedWindowForward(nn.Module):
    """Attends in shifted windows as `torchvision`'s `shifted_window_attention` does.

    That function takes the width of the heads for the width of the input, and reads the weights
    of the projection only. Calls `proj` as a module.
    """

    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    dropout: float
    attention_dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    get_relative_position_bias: Any

    def forward(self, x: Any) -> Any:
        """Attend within the windows of `(images, height, width, channels)`."""
        _, height, width, _ = x.shape
        window = self.window_size
        x = functional.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        size = x.shape[1:3]
        # A window that covers the image needs no shift.
        shift = [0 if w >= n else s for w, n, s in zip(window, size, self.shift_size, strict=True)]
        rolled = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        mask = _mask(size, window, shift, x) if any(shift) else None
        y: Any = self.proj(self._attend(_windows(rolled, window), mask))
        y = functional.dropout(y, self.dropout, self.training)
        y = y.unflatten(0, (-1, size[0] // window[0], size[1] // window[1]))
        y = y.unflatten(3, window).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return torch.roll(y, (shift[0], shift[1]), (1, 2))[:, :height, :width].contiguous()

    def _attend(self, x: Tensor, mask: Tensor | None) -> Any:
        """Turn windows `(windows, tokens, channels)` into the heads' channels."""
        bias: Any = self.qkv.bias
        scale = getattr(self, "logit_scale", None)
        if scale is not None and bias is not None:
            # Keys have no bias in v2.
            q_bias, k_bias, v_bias = bias.chunk(3)
            bias = torch.cat([q_bias, torch.zeros_like(k_bias), v_bias])
        qkv: Any = functional.linear(x, self.qkv.weight, bias)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if scale is None:
            logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        else:
            q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
            logits = q @ k.transpose(-2, -1) * scale.clamp(max=math.log(100.0)).exp()
        logits = logits + self.get_relative_position_bias()
        if mask is not None:
            logits = (logits.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
        weights = functional.dropout(logits.softmax(-1), self.attention_dropout, self.training)
        return (weights @ v).transpose(1, 2).flatten(2)


def _windows(x: Any, window: list[int]) -> Any:
    """Cut `(images, height, width, channels)` into `(images * windows, tokens, channels)`."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _mask(size: torch.Size, window: list[int], shift: list[int], like: Tensor) -> Tensor:
    """Keep tokens apart that only the shift has brought into one window."""
    rows, columns = (
        (torch.arange(n, device=like.device) >= n - w).long()
        + (torch.arange(n, device=like.device) >= n - s).long() * int(s > 0)
        for n, w, s in zip(size, window, shift, strict=True)
    )
    region = _windows((rows[:, None] * 3 + columns)[None, :, :, None], window).squeeze(-1)
    apart = region[:, None] != region[:, :, None]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill_(apart, -100.0)
