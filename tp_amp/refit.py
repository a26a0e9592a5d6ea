"""Fit compensation through the depth of a model: each layer on the model as cut before it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp._state import observing
from tp_amp.batches import Inputs, bar, one_image, stream
from tp_amp.chain import Step, find_chain, first_tensor
from tp_amp.compensation import Correction, Moments
from tp_amp.cutting import Site, narrowed, site_group
from tp_amp.distributed import merged, together
from tp_amp.groups import group_layers
from tp_amp.mlps import MLP
from tp_amp.objectives import Objective
from tp_amp.recipe import Recipe, applied, corrected, given_weights, place_weights
from tp_amp.refinement import cost_factor, refine, spread
from tp_amp.sensitivity import output_sensitivity, repeated
from tp_amp.watching import arguments, calls_in_order, watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Layer:
    """A layer to fit.

    Attributes:
        name: its path.
        site: what it reads of, where its inputs are cut.
        outputs: which of the dense layer's outputs stay; all where None.
    """

    name: str
    site: Site | None = None
    outputs: tuple[int, ...] | None = None

    def inputs(self, values: Tensor, kept: Mapping[str, Sequence[int]]) -> Tensor:
        """What of the layer's input, once it is cut, the correction reads."""
        if self.site is None:
            return values
        first = self.site.first
        return values[:, first : first + len(kept[self.name]) * self.site.unit_width]


@torch.no_grad()
def fit(
    graph: Any,
    sites: Sequence[Site],
    keep: Mapping[str, Sequence[int]],
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    progress: bool = True,
) -> dict[str, Correction]:
    """Fit the corrections of all layers in the order of the forward pass; nothing is changed.

    Each layer is fitted on the model as cut and corrected before it, against what the layer gives
    in the dense model, so that errors do not build up. Where the model is a chain of modules, each
    batch walks through it once as dense and once as cut; else it starts anew for each layer.
    Under a process group all ranks' tokens count, and all ranks get the same corrections.

    Args:
        graph: the `tp.DependencyGraph` of the dense model.
        sites: the MLPs and attentions to be cut.
        keep: `down` -> kept channels or heads.
        batches: unlabelled images; their states at one depth are held, never all activations.
        recipe: how to compensate.
        progress: show a progress bar on a terminal.

    Returns:
        Layer -> correction, in the order of the forward pass.
    """
    sites = [site for site in sites if len(keep[site.down]) < site.width]
    if recipe.method == "none" or not sites:
        return {}
    model: nn.Module = graph.model
    with together("compensation"):
        with observing(model, gradients=False):
            inputs = list(stream(batches, model, description="reading", progress=False))
            few = one_image(inputs[0], 2)
            sizes = {tuple(tensor.shape[1:] for tensor in batch.tensors()) for batch in inputs}
            # What the steps are called with besides the state may depend on the images' size.
            chain = [Step("")]
            if len(sizes) == 1:
                chain = find_chain(model, few, [site.name for site in sites])
            layers = _layers(graph, few, sites, keep, recipe)
        places = place_weights(recipe, model, [layer.name for layer in layers], inputs)
        costs = _costs(recipe, model, sites, inputs)
        with observing(model, gradients=False):
            walk = _Walk(graph, layers, keep, recipe, inputs, chain, places, costs)
            for step in bar(chain, description="compensation", progress=progress):
                walk.take(step)
    return walk.corrections


class _Walk:
    """Takes all batches through the chain, once as in the dense model and once as in the cut."""

    def __init__(
        self,
        graph: Any,
        layers: list[_Layer],
        keep: Mapping[str, Sequence[int]],
        recipe: Recipe,
        inputs: list[Inputs],
        chain: list[Step],
        places: Mapping[str, Tensor],
        costs: Mapping[str, Tensor | None],
    ) -> None:
        self.graph, self.layers, self.keep, self.recipe = graph, layers, keep, recipe
        self.model: nn.Module = graph.model
        self.corrections: dict[str, Correction] = {}
        self.given, self.places = [given_weights(recipe, batch) for batch in inputs], places
        self.costs = costs
        self.last = chain[-1]
        self.dense = [_start(self.model, chain[0], batch) for batch in inputs]
        self.cut = list(self.dense)

    def take(self, step: Step) -> None:
        """Fit the layers inside one step, and take all batches to the next."""
        prefix = f"{step.name}." if step.name else ""
        inside = [x for x in self.layers if x.name == step.name or x.name.startswith(prefix)]
        module = self.model.get_submodule(step.name)
        following: list[Any] = []
        for layer in inside:
            goes_on = layer is inside[-1] and step is not self.last
            targets = []
            for state in self.dense:
                (_, target), output = watch(
                    module, self.model, layer.name, _inputs(step, state), stop=not goes_on
                )
                targets.append(target if layer.outputs is None else target[:, layer.outputs])
                following += [first_tensor(output)] if goes_on else []
            with self._cut(inside):
                self.corrections[layer.name] = self._fit(layer, module, step, targets)
            if layer.name in self.costs:
                with self._cut(inside):
                    self._refine(layer, module, step, targets)
        if step is self.last:
            return
        if not inside:
            following = [first_tensor(_inputs(step, x).call(module)) for x in self.dense]
        self.dense = following
        with self._cut(inside):
            self.cut = [first_tensor(_inputs(step, x).call(module)) for x in self.cut]

    def _fit(
        self, layer: _Layer, module: nn.Module, step: Step, targets: list[Tensor]
    ) -> Correction:
        moments = Moments(layer.name)
        for state, target, given in zip(self.cut, targets, self.given, strict=True):
            (hidden, output), _ = watch(
                module, self.model, layer.name, _inputs(step, state), stop=True
            )
            weights = self._weights(layer, given, len(hidden))
            moments.add(layer.inputs(hidden, self.keep), target - output, weights)
        own = getattr(self.model.get_submodule(layer.name), "bias", None)
        bias = own is not None or self.recipe.add_bias
        moments = merged(f"the moments of {layer.name}", moments)
        return corrected(layer.name, moments, self.recipe, bias)

    def _weights(self, layer: _Layer, given: Tensor | None, tokens: int) -> Tensor | None:
        return repeated(self.places.get(layer.name), tokens) if given is None else given

    def _refine(self, layer: _Layer, module: nn.Module, step: Step, targets: list[Tensor]) -> None:
        """Improve the layers of an MLP together; what that changes is added to the corrections."""
        site: Any = layer.site
        mlp = self.model.get_submodule(site.name)
        read = [arguments(module, mlp, _inputs(step, state)) for state in self.cut]
        factor = cost_factor(self.costs[layer.name], targets[0].shape[1]).to(targets[0].device)

        def costly(values: Tensor, batch: int) -> Tensor:
            """Values whose squares add up to what they cost as errors."""
            weights = self._weights(layer, self.given[batch], len(values))
            if weights is None:
                return values.to(factor) @ factor
            seen = weights > 0  # what padding holds must not matter, be it NaN
            return weights[seen].sqrt().to(factor)[:, None] * (values[seen].to(factor) @ factor)

        def loss(batch: int) -> Tensor:
            (_, output), _ = watch(mlp, self.model, layer.name, read[batch], stop=True)
            return costly(output - targets[batch], batch).square().sum()

        names = [name for name in (*site.up, site.down) if name in self.corrections]
        layers = {name: self.model.get_submodule(name) for name in names}
        losses = [partial(loss, batch) for batch in range(len(read))]
        whole = spread(costly(target, batch) for batch, target in enumerate(targets))
        found = refine(layers, losses, whole, self.recipe.refine)
        if not found:
            logger.warning(
                "%s: refining found nothing better than the closed form; try more passes, or "
                "batches of fewer images",
                layer.name,
            )
        for name, added in found.items():
            self.corrections[name] = self.corrections[name].plus(added)

    @contextmanager
    def _cut(self, layers: list[_Layer]) -> Iterator[None]:
        """The model with some layers cut, and corrected where they have been fitted."""
        with ExitStack() as stack:
            for layer in layers:
                if layer.site is not None:
                    stack.enter_context(narrowed(self.graph, layer.site, self.keep[layer.name]))
            for layer in layers:
                if layer.name in self.corrections:
                    module = self.model.get_submodule(layer.name)
                    first = layer.site.first if layer.site else 0
                    stack.enter_context(applied(module, self.corrections[layer.name], first))
            yield


def _layers(
    graph: Any,
    few: Inputs,
    sites: Sequence[Site],
    keep: Mapping[str, Sequence[int]],
    recipe: Recipe,
) -> list[_Layer]:
    """The layers to fit, in the order of the forward pass."""
    model: nn.Module = graph.model
    cut = {site.down: site for site in sites}
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear and n not in cut]
    called = calls_in_order(model, few, [*cut, *(linears if recipe.every_linear else [])])
    counts = {name: called.count(name) for name in called}
    if any(counts.get(name, 0) != 1 for name in cut):
        raise ValueError(
            f"compensation needs each layer called once in a forward pass; of {len(cut)} layers "
            f"the calls were {[name for name in called if name in cut]}"
        )
    dropped: dict[str, set[int]] = {}
    for site in sites:
        units = sorted(set(range(site.width)) - set(keep[site.down]))
        for part in group_layers(site_group(graph, site, units)):
            if part.side == "out":
                dropped.setdefault(part.name, set()).update(part.indices)
    # Nothing is lost before the first layer that is cut; the last one ends the chain.
    # To refine the first MLP, its `up` needs a correction too.
    opening = {*cut, *(up for site in sites for up in site.up if recipe.refine)}
    first = next(place for place, name in enumerate(called) if name in opening)
    last = max(place for place, name in enumerate(called) if name in cut)
    layers = []
    for name in called[first : last + 1]:
        if counts[name] > 1:
            logger.warning("%s is called %d times and is not fitted", name, counts[name])
            continue
        weight: Any = model.get_submodule(name).weight
        kept = tuple(i for i in range(len(weight)) if i not in dropped.get(name, ()))
        layers.append(_Layer(name, cut.get(name), kept if name in dropped else None))
    return layers


def _costs(
    recipe: Recipe, model: nn.Module, sites: Sequence[Site], batches: Sequence[Inputs]
) -> dict[str, Tensor | None]:
    """What errors of the MLPs to refine cost; None where the objective does not see them."""
    if not recipe.refine:
        return {}
    mlps = [site for site in sites if isinstance(site, MLP)]
    fused = [mlp.name for mlp in mlps if mlp.fused or mlp.first]
    if fused:
        logger.warning("%s hold more than an MLP and are not refined", ", ".join(fused))
    downs = [mlp.down for mlp in mlps if mlp.name not in fused]
    if not downs:
        return {}
    raw = [batch.raw() for batch in batches]
    found = output_sensitivity(model, downs, raw, Objective(), skip_unused=True, progress=False)
    return {name: found.get(name) for name in downs}


def _inputs(step: Step, state: Any) -> Inputs:
    if not step.name:
        return state  # type: ignore[no-any-return]
    return Inputs((state, *step.inputs.args), step.inputs.kwargs)


def _start(model: nn.Module, step: Step, batch: Inputs) -> Any:
    """What the first step is called with: its first argument, or the batch for a whole model."""
    if not step.name:
        return batch
    return arguments(model, model.get_submodule(step.name), batch).args[0]
