"""What a residual stream loses with fewer channels, in the unit of MLPs' errors."""

from __future__ import annotations

import torch
from torch import Tensor

from tp_amp.algebra.nested_widths import nested_errors
from tp_amp.importance.seen_layers import SeenLayer
from tp_amp.structure.streams.residual_stream import Stream


def reader_errors(stream: Stream, seen: SeenLayer) -> Tensor:
    """What one of the layers that read a stream loses, `(channels of the stream + 1,)`.

    It is what no fit on the leading channels, as the layer's norm gives them, rebuilds of what the
    layer gives. Where norms take the mean of the channels out, one of them is spent on it.
    """
    inputs = seen.weight.shape[1]
    places = inputs // stream.width  # side by side, as patch merging reads them
    order = torch.arange(inputs).view(places, stream.width).T.flatten()
    errors = nested_errors(seen.covariance, seen.weight, order)
    errors = seen.foreseen(errors, order)[::places]
    narrower = torch.cat([errors[:1], errors[:-2]]) if stream.centred else errors[:-1]
    return torch.cat([narrower, errors.new_zeros(1)])
