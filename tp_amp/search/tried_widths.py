"""Which widths of MLPs and attentions a search may try."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tp_amp.search.bisection import most_probes
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import Site


@dataclass(frozen=True)
class TriedWidths:
    """The widths that a search may try, and the one that it begins with.

    Attributes:
        steps: widths tried for each site at most.
        min_width: the smallest one of an MLP; an attention keeps one head.
        round_to: widths of MLPs are multiples of it.
        max_pruning_ratio: the largest fraction of its channels or heads that a site may lose.
        errors: `down` -> what is foreseen to be lost with the first 0, 1, ... channels kept
            (nats), of those that the search begins with; the others begin in the middle.
    """

    steps: int
    min_width: int
    round_to: int
    max_pruning_ratio: float
    errors: Mapping[str, Tensor]

    def step(self, site: Site) -> int:
        """What the widths of a site are multiples of."""
        return self.round_to if isinstance(site, MLP) else 1

    def minimum(self, site: Site) -> int:
        """The smallest width to try."""
        smallest = self.min_width if isinstance(site, MLP) else 1
        return max(smallest, math.ceil(site.width * (1 - self.max_pruning_ratio)))

    def smallest(self, sites: Iterable[Site]) -> dict[str, int]:
        """The smallest widths that may be kept, by `down`."""
        widths = {}
        for site in sites:
            step = self.step(site)
            widths[site.down] = min(site.width, -(-self.minimum(site) // step) * step)
        return widths

    def first(self, site: Site, increase: float) -> int | None:
        """The smallest width whose foreseen loss is an allowed one (nats), if any is foreseen."""
        errors = self.errors.get(site.down)
        if errors is None or len(errors) != site.width + 1:
            return None
        return int((errors > increase).sum())

    def most_probes(self, site: Site) -> int:
        """How many widths of a site are tried at most."""
        return most_probes(
            site.width,
            steps=self.steps,
            minimum=self.minimum(site),
            round_to=self.step(site),
            first=self.first(site, math.inf),
        )
