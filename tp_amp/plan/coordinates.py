"""Whether a model still has the coordinates that a plan of leading channels was made in."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tp_amp.structure.model_structure import Site
from tp_amp.structure.ranks.head_ranks import HeadRanks
from tp_amp.structure.streams.residual_stream import Stream

logger = logging.getLogger(__name__)

# What columns that a rotation has left orthogonal may have in common, in half precision too.
_COMMON = 0.05
_AFTER = " (by rotate, which comes before it, too)"


@torch.no_grad()
def tell_other_coordinates(
    model: nn.Module, sites: Mapping[str, Site], keep: Mapping[str, Sequence[int]]
) -> None:
    """Warn where a plan keeps leading channels, and they are not as a rotation leaves them.

    A rotation leaves one weight in all norms of a stream, and orthogonal columns in each head's
    part of an output projection. Training since undoes both, so that this is no error; so does
    `rotate` after `rotate_heads`, where it folds a LayerScale into projections.

    Args:
        model: that is cut next.
        sites: by their path in the plan.
        keep: of the plan.
    """
    others: dict[str, list[str]] = {"rotate": [], "rotate_heads": []}
    for down, kept in keep.items():
        site = sites[down]
        if list(kept) != list(range(len(kept))) or len(kept) in (0, site.width):
            continue  # no plan of leading channels
        if isinstance(site, Stream) and not _norms_are_plain(model, site):
            others["rotate"].append(f"the norms of {site.name}'s stream have several weights")
        if isinstance(site, HeadRanks) and site.pair == "vo" and not _is_orthogonal(model, site):
            others["rotate_heads"].append(f"the columns of {down} are not orthogonal")
    for rotation, found in others.items():
        if found:
            more = f" ({len(found)} such)" if len(found) > 1 else ""
            logger.warning(
                "the plan keeps leading channels, but %s%s: %s was not called on this model, or "
                "the model was changed since%s, and they hold no more than others; apply the plan "
                "to the model as it was rotated",
                *(found[0], more, rotation, _AFTER if rotation == "rotate_heads" else ""),
            )


def _norms_are_plain(model: nn.Module, stream: Stream) -> bool:
    weights = [model.get_parameter(f"{path}.weight") for path in stream.norms]
    return all(weight.is_meta or bool((weight == weight[0]).all()) for weight in weights)


def _is_orthogonal(model: nn.Module, site: HeadRanks) -> bool:
    weight: Any = model.get_submodule(site.projection).weight
    if weight.is_meta:
        return True
    columns = weight.double().view(-1, site.heads, site.width)
    products = torch.einsum("ohi,ohj->hij", columns, columns)
    lengths = products.diagonal(dim1=1, dim2=2)
    common = (products - torch.diag_embed(lengths)).norm()
    return float(common) <= _COMMON * float(products.norm())
