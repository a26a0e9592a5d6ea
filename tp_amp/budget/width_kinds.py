"""What of a model has a kind of width, and the steps that it is chosen in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import get_args

from tp_amp.budget.width_arguments import RoundTo
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.ranks.head_ranks import HeadRanks, Pair
from tp_amp.structure.streams.residual_stream import Stream


def kind_of(site: Site) -> str:
    """Hidden channels of an MLP, whole heads, one of the two widths inside heads, or a stream."""
    if isinstance(site, HeadRanks):
        return site.pair
    if isinstance(site, Stream):
        return "stream"
    return "heads" if isinstance(site, Attention) else "mlp"


def steps_of(sites: Sequence[Site], round_to: RoundTo) -> dict[str, int]:
    """What the widths of sites are multiples of, by their `down`.

    Args:
        sites: what is to be cut.
        round_to: one number for all but heads, which are counted one by one; or kind -> number.
    """
    if isinstance(round_to, Mapping):
        return {site.down: round_to.get(kind_of(site), 1) for site in sites}
    return {site.down: 1 if isinstance(site, Attention) else round_to for site in sites}


def sites_of(structure: ModelStructure, kinds: Collection[str]) -> list[Site]:
    """All that can be cut in some kinds of widths; what of an attention can't is logged.

    Raises:
        ValueError: there is nothing of one kind.
    """
    sites: list[Site] = [*structure.mlps] if "mlp" in kinds else []
    if "mlp" in kinds and not sites:
        raise ValueError(
            f"no MLP was found in {type(structure.model).__name__}; tp_amp.inspect tells for each "
            "layer why"
        )
    if "heads" in kinds:
        sites += structure.some_attentions()
    if "stream" in kinds:
        sites += structure.some_streams()
    if pairs := [pair for pair in get_args(Pair) if pair in kinds]:
        sites += structure.some_ranks(pairs)
    return sites
