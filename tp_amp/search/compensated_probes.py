"""Compensation inside the search: a cut layer is corrected before it is judged."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from tp_amp.algebra.closed_form import Correction
from tp_amp.algebra.moments import Halves
from tp_amp.compensation.costs import error_costs
from tp_amp.compensation.recipe import Recipe, corrected, given_weights, token_weights
from tp_amp.compensation.routing import routed_layers
from tp_amp.plan.cutting import narrowed
from tp_amp.running.batches import stream
from tp_amp.running.fingerprints import in_second_half
from tp_amp.running.inputs import one_image
from tp_amp.running.padding import images_alone
from tp_amp.running.timing import clock
from tp_amp.running.watching import Seen, calls_in_order, watch
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.model_structure import Site
from tp_amp.structure.observing import observing


def most_bytes(recipe: Recipe, sites: Iterable[Site]) -> int:
    """What the second moments of the widest layer take, in float64, for two halves."""
    if recipe.method == "none":
        return 0
    return 2 * 8 * max((site.width * site.unit_width for site in sites), default=0) ** 2


class Compensator:
    """Corrects a cut layer before the search judges it, on the prefix as it is: dense.

    The moments of a layer's input are collected once; every width is solved from them. Where a
    norm stands before the layer, or where heads are cut, they are collected for each width.

    Args:
        graph: the `tp.DependencyGraph`.
        batches: unlabelled images.
        recipe: how to compensate.
        layers: module paths of the layers to correct.
    """

    def __init__(
        self, graph: Any, batches: Iterable[Any], recipe: Recipe, layers: Sequence[str]
    ) -> None:
        self.graph, self.batches, self.recipe, self.layers = graph, batches, recipe, layers
        self.places: dict[str, Tensor] = {}
        if recipe.token_weights == "sensitivity":  # else batches need not be read now
            inputs = list(stream(batches, graph.model, description="reading", progress=False))
            self.places = error_costs(recipe, graph.model, layers, [], inputs).places
        self._times: dict[Any, tuple[float, float]] = {}
        self._moments: tuple[str, Halves] | None = None
        self._targets: tuple[str, list[Tensor]] | None = None

    def correction(self, site: Site, kept: list[int]) -> Correction | None:
        """The correction of a site's `down` once only `kept` channels or heads are left."""
        if len(kept) == site.width or self.recipe.method == "none":
            return None
        if site.down in self._uncorrected:  # told in the end
            return None
        down: Any = self.graph.model.get_submodule(site.down)
        if isinstance(site, Attention) or site.inner:
            moments = self._measured(site, down, kept)
        else:
            weight = down.weight.detach().flatten(1)[:, site.first : site.first + site.width]
            moments = self._hidden(site, down).after_cut(weight, kept)
        bias = down.bias is not None or self.recipe.add_bias
        return corrected(site.down, moments, self.recipe, bias)

    def seconds(self, sites: Sequence[Site], probes: Sequence[float]) -> float:
        """How long the corrections of some probes of each site take, by two of each kind of site.

        The first collects the moments, which those after it read or, of heads, collect again.
        """
        if self.recipe.method == "none":
            return 0.0
        total = 0.0
        for site, count in zip(sites, probes, strict=True):
            kind = isinstance(site, Attention), bool(site.inner), site.width * site.unit_width
            if kind not in self._times:
                kept = list(range(max(1, site.width // 2)))
                times = []
                for _ in range(2):
                    start = clock()
                    self.correction(site, kept)
                    times.append(clock() - start)
                self._times[kind] = max(0.0, times[0] - times[1]), times[1]
            once, each = self._times[kind]
            # What is accepted is cut once more.
            total += once + (count + 1) * each if count else 0.0
        return total

    @cached_property
    def _uncorrected(self) -> set[str]:
        """The layers that a router feeds, or that are called several times."""
        model: nn.Module = self.graph.model
        with observing(model, gradients=False):
            batch = next(stream(self.batches, model, description="reading", progress=False))
            calls = calls_in_order(model, one_image(batch, 2), self.layers)
            routed = routed_layers(model, batch, self.layers)
        return routed | {name for name in self.layers if calls.count(name) > 1}

    def _hidden(self, site: Site, down: nn.Module) -> Halves:
        if self._moments is None or self._moments[0] != site.down:
            moments = Halves(site.down)
            with closing(self._calls(site, down)) as calls:
                for call, weights, second in calls:
                    hidden = call.inputs[:, site.first : site.first + site.width]
                    moments.add(hidden, hidden[:, :0], weights, second=second)
            self._moments = site.down, moments.merged(f"the moments of {site.down}")
        return self._moments[1]

    def _measured(self, site: Site, down: nn.Module, kept: list[int]) -> Halves:
        if self._targets is None or self._targets[0] != site.down:
            with closing(self._calls(site, down)) as calls:
                self._targets = site.down, [call.outputs for call, _, _ in calls]
        moments = Halves(site.down)
        with narrowed(self.graph, {site: kept}), closing(self._calls(site, down)) as calls:
            for target, (call, weights, second) in zip(self._targets[1], calls, strict=True):
                moments.add(call.inputs, target - call.outputs, weights, second=second)
        return moments.merged(f"the moments of {site.down}")

    def _calls(
        self, site: Site, down: nn.Module
    ) -> Generator[tuple[Seen, Tensor | None, Tensor], None, None]:
        """What `down` reads and gives on each batch, the weights of tokens, and images' halves."""
        model: nn.Module = self.graph.model
        with observing(model, gradients=False):
            for batch in stream(self.batches, model, description="moments", progress=False):
                call, _ = watch(model, model, site.down, batch, stop=True)
                second = in_second_half(images_alone(batch))
                given, places = given_weights(self.recipe, batch), self.places.get(site.down)
                yield call, token_weights(given, model, batch, places, len(call.inputs)), second
