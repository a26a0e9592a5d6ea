"""Which tokens of a batch are padding, where the batch says so itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tp_amp.running.inputs import Inputs

# What says which tokens count, `(images, tokens)`: of timm's NaFlex, of transformers.
_MASKS = ("patch_valid", "pixel_attention_mask", "attention_mask")


def mask_of(inputs: Inputs) -> Tensor | None:
    """Which tokens of a batch count, `(images, tokens)` of booleans; None where it has no mask."""
    for name in _MASKS:
        mask = inputs.kwargs.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point():
            return mask.bool()
    return None


def valid_tokens(inputs: Inputs, model: nn.Module, tokens: int) -> Tensor | None:
    """The weight of each token that a layer reads: 0 for padding, `(tokens,)`.

    Args:
        inputs: the batch.
        model: tells how many tokens it puts before those of the batch (class tokens, registers).
        tokens: that the layer reads, image after image.

    Returns:
        None where the batch has no padding, or the layer reads other tokens.
    """
    mask = mask_of(inputs)
    if mask is None or bool(mask.all()):
        return None
    counts = (getattr(module, "num_prefix_tokens", None) for module in model.modules())
    prefix = next((count for count in counts if type(count) is int), 0)
    before = tokens // len(mask) - mask.shape[1]
    if tokens % len(mask) or before not in (0, prefix):
        return None
    return torch.cat([mask.new_ones(len(mask), before), mask], 1).flatten().float()


def images_alone(inputs: Inputs) -> Tensor:
    """The images of a batch, with nothing in the places of padding."""
    images, mask = inputs.tensors()[0], mask_of(inputs)
    if (patches := inputs.patches) is not None:
        of_each = torch.split(images, patches)
        return nn.utils.rnn.pad_sequence(list(of_each), batch_first=True)
    if mask is None or images.shape[:2] != mask.shape:
        return images
    return images.masked_fill(~mask.reshape(*mask.shape, *[1] * (images.dim() - 2)), 0)
