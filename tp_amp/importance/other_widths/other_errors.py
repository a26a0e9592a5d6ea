"""Foreseen losses of all that is no MLP: collected, and kept while weights stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tp_amp.importance.other_widths.attention_errors import (
    Foreseen,
    projection_errors,
    query_errors,
)
from tp_amp.importance.other_widths.stream_errors import reader_errors
from tp_amp.importance.seen_layers import SeenLayer
from tp_amp.running.fingerprints import Fingerprint
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.ranks.head_ranks import HeadRanks
from tp_amp.structure.streams.residual_stream import Stream

OtherSite = Attention | HeadRanks | Stream


class OtherErrors:
    """Foreseen losses of attentions and residual streams, of any copy of a model."""

    def __init__(self) -> None:
        self._known: dict[OtherSite, tuple[Fingerprint, Foreseen]] = {}

    def missing(self, model: nn.Module, sites: Iterable[OtherSite]) -> list[OtherSite]:
        """The sites that were not collected with the weights that they have now."""
        return [
            site
            for site in sites
            if site not in self._known or not self._known[site][0].fits(_weights(model, site))
        ]

    def __getitem__(self, site: OtherSite) -> Foreseen:
        """What a site that is not missing loses."""
        return self._known[site][1]

    def __setitem__(self, site: OtherSite, found: tuple[nn.Module, Foreseen]) -> None:
        """Keep what a site of a model loses."""
        model, foreseen = found
        self._known[site] = Fingerprint(_weights(model, site)), foreseen


class Gathering:
    """Makes losses of some sites from layers that come one after the other.

    Args:
        sites: of different `down`.

    Attributes:
        layers: that have to be seen, and `products` of others, as for `seen_layers`.
        optional: layers that the objective need not depend on, as long as it does on another one
            that reads the same stream.
    """

    def __init__(self, sites: Sequence[OtherSite]) -> None:
        self._streams = [site for site in sites if isinstance(site, Stream)]
        ranks = [site for site in sites if isinstance(site, HeadRanks)]
        self._queries = {site.down: site for site in ranks if site.pair == "qk"}
        self._projections = {
            site.down: site
            for site in sites
            if not isinstance(site, Stream) and site.down not in self._queries
        }
        self.optional = [name for stream in self._streams for name in stream.readers]
        self.layers = [*self._projections, *self.optional]
        self.products = {
            down: slice(0, site.width * site.heads) for down, site in self._queries.items()
        }
        self._found: dict[OtherSite, Foreseen] = {}

    def take(self, name: str, seen: SeenLayer | Tensor) -> None:
        """A layer that was asked for."""
        if isinstance(seen, Tensor):
            self._found[self._queries[name]] = query_errors(self._queries[name], seen)
            return
        if site := self._projections.get(name):
            self._found[site] = projection_errors(site, seen)
        for stream in self._streams:
            if name in stream.readers:
                own = reader_errors(stream, seen)
                before = self._found.get(stream)
                errors = own if before is None else before.errors + own
                self._found[stream] = Foreseen(torch.arange(stream.width), errors)

    def found(self) -> dict[OtherSite, Foreseen]:
        """What each site loses, once all layers were taken.

        Raises:
            ValueError: the objective depends on nothing that reads a stream.
        """
        if unseen := [stream.name for stream in self._streams if stream not in self._found]:
            raise ValueError(
                f"the objective depends on no layer that reads the streams of {unseen}, so that "
                "what they lose can't be told; take an objective that does, or leave 'stream' out"
            )
        return self._found


def _weights(model: nn.Module, site: OtherSite) -> list[Tensor]:
    names = site.readers if isinstance(site, Stream) else dict.fromkeys([*site.up, site.down])
    layers = [model.get_submodule(name) for name in names]
    return [values for layer in layers for values in layer.parameters(recurse=False)]
