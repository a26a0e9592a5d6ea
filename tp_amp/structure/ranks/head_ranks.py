"""Cut channels inside every head of an attention: those of q and k, or of v and the projection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group
from torch_pruning.pruner import function

from tp_amp.structure.attention.adapted_class import adapted
from tp_amp.structure.attention.heads import OfHeads
from tp_amp.structure.attention.rank_linear import Part, RankLinear
from tp_amp.structure.constant_linear import ConstantLinear
from tp_amp.structure.groups import make_group
from tp_amp.structure.ranks.removed_forward import Removed, RemovedForward

Pair = Literal["qk", "vo"]
_PARTS: dict[Pair, tuple[int, ...]] = {"qk": (0, 1), "vo": (2,)}
# Which of q, k and v each Linear makes, by how many Linears there are.
HELD = {1: ((0, 1, 2),), 2: ((0,), (1, 2)), 3: ((0,), (1,), (2,))}


@dataclass(frozen=True)
class HeadRanks(OfHeads):
    """One of the two widths inside the heads of an attention.

    A query is only ever multiplied with keys, and values are only averaged and projected: each
    pair has a width of its own, in coordinates of its own (`rotate_heads`).

    Attributes:
        pair: `"qk"`, the channels of queries and keys, or `"vo"`, those of values and what the
            output projection reads.
        name: path of the attention.
        made: paths of what makes q, k and v: of one Linear, of two (q, k and v) or of three.
        projection: path of the output projection.
        heads: number of heads.
        width: channels of each head.
        values: how many values the attention gives (its output, and else None; 0 for the output
            alone), where all of it may go with the values' channels; else None.

    Raises:
        ValueError: `made` are none, or more than three.

    Example:
        >>> import tp_amp
        >>> site = tp_amp.HeadRanks("vo", "attn", ("attn.qkv",), "attn.proj", heads=2, width=8)
        >>> site.down, site.up
        ('attn.proj', ('attn.qkv',))
    """

    pair: Pair
    name: str
    made: tuple[str, ...]
    projection: str
    heads: int
    width: int
    values: int | None = None

    def __post_init__(self) -> None:
        if len(self.made) not in HELD:
            raise ValueError(f"q, k and v are made by one Linear, two or three, found {self.made}")

    @property
    def up(self) -> tuple[str, ...]:
        """Paths of the layers whose outputs are cut."""
        return tuple(name for name in self.made if any(self.cuts(name)))

    @property
    def down(self) -> str:
        """The path it has in a plan: of the projection, or of what makes the queries."""
        return self.made[0] if self.pair == "qk" else self.projection

    @property
    def parts(self) -> tuple[int, ...]:
        """Which of q, k and v are cut."""
        return _PARTS[self.pair]

    @property
    def units(self) -> str:
        """What its `width` counts."""
        return "channels of each head"

    @property
    def unit_width(self) -> int:
        """Channels that one of its `width` is."""
        return self.heads

    def rows(self, name: str, layer: nn.Linear, channels: Iterable[int]) -> list[int]:
        """Output channels of one of its Linears, where some channels of each head lie."""
        begins, rows = 0, []
        for part, held in zip(self.holds(name), self.held(layer), strict=True):
            if part in self.parts and held.kept:  # all went where the attention did
                rows += [begins + held.kept * h + c for c in channels for h in range(self.heads)]
            begins += self.heads * held.kept
        return rows

    def held(self, layer: nn.Linear) -> tuple[Part, ...]:
        """What of q, k and v one of its Linears gives, as cut so far."""
        whole = Part(self.heads, self.width, self.width)
        return getattr(layer, "gives", ()) or (whole,) * (layer.out_features // whole.channels)

    def read(self, channels: Iterable[int]) -> list[int]:
        """Input channels of the projection, channel by channel of all heads."""
        return [h * self.width + c for c in channels for h in range(self.heads)]

    def holds(self, name: str) -> tuple[int, ...]:
        """Which of q, k and v one of its Linears makes."""
        return HELD[len(self.made)][self.made.index(name)]

    def below(self) -> HeadRanks:
        """The same with paths as seen from the attention."""
        start = len(self.name) + 1 if self.name else 0
        made = tuple(name[start:] for name in self.made)
        return replace(self, name="", made=made, projection=self.projection[start:])

    def channels_left(self, model: nn.Module) -> int:
        """How many channels of all heads it has in a model that may be cut."""
        layer: Any = model.get_submodule(self.down)
        return layer.in_features if self.pair == "vo" else self.held(layer)[0].channels

    def cuts(self, name: str) -> list[bool]:
        """Of the parts that one of its Linears gives, which are cut."""
        return [part in self.parts for part in self.holds(name)]


class _RankPruner(function.LinearPruner):  # type: ignore[misc]
    """Cuts a Linear as Torch-Pruning does, and lets it be as wide as before from outside."""

    def __init__(self, site: HeadRanks, linear: str) -> None:
        super().__init__()
        self.site, self.linear = site, linear

    def prune_out_channels(self, layer: nn.Linear, idxs: Sequence[int]) -> nn.Linear:
        """Drop some channels of each head from what a Linear gives."""
        site, cuts = self.site, self.site.cuts(self.linear)
        held = site.held(layer)
        dropped = len(idxs) // (site.heads * sum(cuts))
        super().prune_out_channels(layer, idxs)
        _adapt(layer)
        layer.gives = tuple(  # type: ignore[assignment]
            replace(part, kept=part.kept - dropped) if own else part
            for part, own in zip(held, cuts, strict=True)
        )
        return layer

    def prune_in_channels(self, layer: nn.Linear, idxs: Sequence[int]) -> nn.Linear:
        """Drop some channels of each head from what the projection reads."""
        site = self.site
        super().prune_in_channels(layer, idxs)
        _adapt(layer)
        layer.reads = Part(site.heads, layer.in_features // site.heads, site.width)  # type: ignore[assignment]
        return layer


class _RemovedPruner(function.LinearPruner):  # type: ignore[misc]
    """Drops all that is left of the Linears of an attention that goes as a whole."""

    def __init__(self, site: HeadRanks) -> None:
        super().__init__()
        self.site = site

    def prune_out_channels(self, layer: nn.Linear, idxs: Sequence[int]) -> nn.Linear:
        """Drop the queries, keys and values that a Linear gives."""
        held = self.site.held(layer)
        super().prune_out_channels(layer, idxs)
        _adapt(layer)
        layer.gives = tuple(replace(part, kept=0) for part in held)  # type: ignore[assignment]
        return layer

    def prune_in_channels(self, layer: nn.Linear, idxs: Sequence[int]) -> nn.Linear:
        """Drop what the projection reads."""
        super().prune_in_channels(layer, idxs)
        layer.__class__ = ConstantLinear
        return layer


class _Removal:
    """Lets an attention give what its projection does, without computing anything else."""

    pruning_dim: int  # Torch-Pruning writes it

    def __init__(self, site: HeadRanks) -> None:
        self.site = site

    def prune_out_channels(self, layer: nn.Module, _: Sequence[int]) -> nn.Module:
        """Give an attention that other forward pass."""
        layer.__class__ = adapted(RemovedForward, type(layer))
        layer.__dict__["removed"] = Removed(self.site.below().projection, self.site.values or 0)
        return layer


def _adapt(layer: nn.Linear) -> None:
    if not isinstance(layer, RankLinear):
        layer.__class__ = RankLinear
        layer.gives, layer.reads = (), None  # type: ignore[assignment]


def rank_group(graph: Any, site: HeadRanks, channels: Sequence[int]) -> Group:
    """Make Torch-Pruning's group of some channels of each head, the root at the site's `down`.

    Without any channel of the values the attention gives a constant: all of it goes, queries and
    keys too.

    Args:
        graph: the `tp.DependencyGraph`; only its model and names are used.
        site: one of the widths inside an attention's heads.
        channels: indices into the channels of a head.
    """
    layers: list[tuple[str, Any, list[int]]] = []
    if site.pair == "vo" and len(channels) == site.width:
        return _removal_group(graph, site)
    if site.pair == "vo":
        pruner = _RankPruner(site, site.projection)
        layers.append((site.projection, pruner.prune_in_channels, site.read(channels)))
    for name in site.up:
        pruner = _RankPruner(site, name)
        layer: Any = graph.model.get_submodule(name)
        layers.append((name, pruner.prune_out_channels, site.rows(name, layer, channels)))
    return make_group(graph, layers, layers[0][2])


def _removal_group(graph: Any, site: HeadRanks) -> Group:
    """The group of all that an attention holds."""
    pruner, read = _RemovedPruner(site), site.read(range(site.width))
    layers: list[tuple[str, Any, list[int]]] = [(site.projection, pruner.prune_in_channels, read)]
    for name in site.made:
        layer: Any = graph.model.get_submodule(name)
        layers.append((name, pruner.prune_out_channels, list(range(layer.out_features))))
    return make_group(graph, [*layers, (site.name, _Removal(site).prune_out_channels, read)], read)


@torch.no_grad()
def mix(model: nn.Module, site: HeadRanks, first: Tensor, second: Tensor) -> None:
    """Give the channels of each head other coordinates, in place and in double precision.

    Args:
        model: holds the attention, dense in this width.
        site: which of its widths.
        first: what each head's query, or value, is multiplied by, `(heads, width, width)`.
        second: the same for its key; or what its part of the projection is multiplied by from the
            right.
    """
    factors = dict(zip(site.parts, (first, second), strict=False))
    for name in site.up:
        linear = model.get_submodule(name)
        for values in linear.parameters():
            for part, own in zip(site.holds(name), _split(values, site), strict=True):
                if part in factors:
                    factor = factors[part].to(own.device, torch.double)
                    own.copy_(torch.einsum("hij,hj...->hi...", factor, own.double()))
    if site.pair == "vo":
        weight: Any = model.get_submodule(site.projection).weight
        split = weight.unflatten(1, (site.heads, site.width)).double()
        weight.copy_(torch.einsum("ohi,hij->ohj", split, second.to(split)).flatten(1))


def _split(values: Tensor, site: HeadRanks) -> Iterable[Tensor]:
    """Views of what belongs to each of q, k and v, `(heads, width, ...)`."""
    return values.view(-1, site.heads, site.width, *values.shape[1:])
