"""What attentions lose with fewer heads, or with fewer channels in each, in the unit of MLPs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tp_amp.algebra.nested_widths import block_order, nested_errors
from tp_amp.importance.seen_layers import SeenLayer
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.ranks.head_ranks import HeadRanks


@dataclass(frozen=True)
class Foreseen:
    """What each width of a layer is foreseen to lose.

    Attributes:
        order: its channels or heads, those to keep longest first, `(width,)`.
        errors: what is lost (nats, or the mean squared output error without an objective) with the
            first 0, 1, ... of them kept, `(width + 1,)`.
    """

    order: Tensor
    errors: Tensor


def projection_errors(site: Attention | HeadRanks, seen: SeenLayer) -> Foreseen:
    """Of whole heads, or of values and the projection, by what the projection read.

    It is what is left once the projection is fitted to the channels that stay.
    """
    if isinstance(site, HeadRanks):
        order, channels = torch.arange(site.width), torch.tensor(site.read(range(site.width)))
    else:
        order = block_order(seen.covariance, seen.weight, site.head_width)
        channels = (order[:, None] * site.head_width + torch.arange(site.head_width)).flatten()
    errors = nested_errors(seen.covariance, seen.weight, channels)
    return Foreseen(order, seen.foreseen(errors, channels)[:: site.unit_width])


def query_errors(site: HeadRanks, products: Tensor) -> Foreseen:
    """Of queries and keys, by the products of queries with their gradients.

    Nothing is rebuilt: without some channels a logit is less by `q k` of them, so that the loss
    changes by `q * gradient`, to first order and exactly in the keys. So it is half the sum over
    all pairs of dropped channels; fewer channels never cost less.
    """
    between = products.view(site.heads, site.width, site.heads, site.width).sum((0, 2))
    sums = between.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0) / 2
    errors = torch.cat([sums, sums.new_zeros(1)]).flip(0).cummax(0).values.flip(0)
    return Foreseen(torch.arange(site.width), errors.cpu())
