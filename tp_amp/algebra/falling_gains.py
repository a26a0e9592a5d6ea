"""What each further channel adds, spread so that none adds more than the one before it."""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = 1e-12  # of a score, between channels of equal gain: their order must not be lost
_NOTHING = 1e-30


def falling_gains(errors: Tensor) -> Tensor:
    """The slopes of the lower convex hull of the errors over the widths, strictly falling.

    Of several layers, those channels whose gain is above one threshold then leave the smallest sum
    of errors of all widths on the hulls with as many channels. Gains that are equal fall by a 1e-12
    of themselves, and channels that add nothing are below zero by next to nothing, so that the
    order stays.

    Args:
        errors: with the first 0, 1, ... channels kept, `(width + 1,)`.

    Returns:
        Of the first, second, ... channel, `(width,)`, float64.

    Example:
        >>> import torch
        >>> falling_gains(torch.tensor([9.0, 8.0, 1.0, 0.5])).tolist()
        [4.0, 3.999999999996, 0.499999999999]
    """
    blocks: list[tuple[float, int]] = []
    for total in (errors[:-1] - errors[1:]).double().tolist():
        count = 1
        while blocks and total * blocks[-1][1] >= blocks[-1][0] * count:
            above, more = blocks.pop()
            total, count = total + above, count + more
        blocks.append((total, count))
    means = [total / count for total, count in blocks]
    counts = torch.tensor([count for _, count in blocks])
    slopes = torch.tensor(means, dtype=torch.float64).repeat_interleave(counts)
    places = torch.arange(len(slopes), dtype=torch.float64)
    falling = slopes * (1 - _STEP * places)
    return torch.where(slopes > 0, falling, -_NOTHING * (places + 1))
