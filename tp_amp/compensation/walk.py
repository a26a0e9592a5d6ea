"""Fit compensation through the depth of a model: each layer on the model as cut before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from tp_amp.algebra.closed_form import Correction
from tp_amp.algebra.moments import Halves
from tp_amp.compensation.costs import error_costs, refined_layers
from tp_amp.compensation.layers_to_fit import Layer, layers_to_fit
from tp_amp.compensation.recipe import (
    Recipe,
    applied,
    corrected,
    given_weights,
    tell_few,
    tell_unrefined,
    token_weights,
)
from tp_amp.compensation.refinement import PartOfMLP, refine_mlp
from tp_amp.compensation.stream import Place, find_place
from tp_amp.compensation.token_steps import Example
from tp_amp.importance.sensitivity import Sensitivity
from tp_amp.plan.cutting import narrowed
from tp_amp.running.batches import bar, stream
from tp_amp.running.distributed import active, agree, together
from tp_amp.running.fingerprints import in_second_half
from tp_amp.running.inputs import Inputs, one_image
from tp_amp.running.padding import images_alone
from tp_amp.running.shelf import Held, Shelf
from tp_amp.running.watching import Seen, called_with, first_tensor, watch
from tp_amp.structure.attention.rank_linear import held_inputs, held_outputs
from tp_amp.structure.chain import Step
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.observing import observing
from tp_amp.structure.streams.residual_stream import Stream


@torch.no_grad()
def fit(
    structure: ModelStructure,
    sites: Sequence[Site],
    keep: Mapping[str, Sequence[int]],
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    memory_bytes: int | None = None,
    progress: bool = True,
) -> dict[str, Correction]:
    """Fit the corrections of all layers in the order of the forward pass; nothing is changed.

    Each layer is fitted on the model as cut and corrected before it, against what the dense model
    has behind it: its output, or the residual stream that it adds to (`find_place`). Where the
    model is a chain of modules, each batch walks through it once as dense and once as cut; else it
    starts anew for each layer.
    Where the recipe says so, both layers of an MLP are then refined together. Under a process group
    all ranks' tokens count, and all ranks get the same corrections.

    Args:
        structure: what was read of the dense model.
        sites: the MLPs and attentions to be cut.
        keep: `down` -> kept channels or heads.
        batches: unlabelled images; their states at one depth are held, never all activations.
        recipe: how to compensate.
        memory_bytes: how much of the states is held in memory, see `compensate`.
        progress: show a progress bar on a terminal.

    Returns:
        Layer -> correction, in the order of the forward pass.
    """
    sites = [site for site in sites if len(keep[site.down]) < site.width]
    if recipe.method == "none" or not sites:
        return {}
    model, graph = structure.model, structure.graph
    with together("compensation"):
        with observing(model, gradients=False):
            inputs = list(stream(batches, model, description="reading", progress=False))
            few = one_image(inputs[0], 2)
            sizes = {tuple(tensor.shape[1:] for tensor in batch.tensors()) for batch in inputs}
            # What the steps are called with besides the state may depend on the images' size.
            chain = [Step("")]
            if len(sizes) == 1:
                chain = _chain(structure, few, sites)
            layers = layers_to_fit(graph, inputs[0], sites, keep, recipe)
        if not layers:
            return {}
        chain = _over_all(chain, layers)
        refined = refined_layers(layers, keep) if recipe.refine else []
        costs = error_costs(recipe, model, [x.name for x in layers], refined, inputs)
        with observing(model, gradients=False), Shelf(memory_bytes) as shelf:
            walk = _Walk(graph, layers, sites, keep, recipe, inputs, chain, refined, costs, shelf)
            for step in bar(chain, description="compensation", progress=progress):
                walk.take(step)
    tell_few(walk.few)
    tell_unrefined(walk.unrefined, len(refined))
    return walk.corrections


@dataclass(frozen=True)
class _Spot:
    """Where in the model a layer is fitted.

    Attributes:
        layer: is fitted.
        step: of the chain, holds it.
        place: where the layer writes to a residual stream, whose errors it can then take out.
    """

    layer: Layer
    step: Step
    place: Place | None


class _Walk:
    """Takes all batches through the chain, once as in the dense model and once as in the cut."""

    def __init__(
        self,
        graph: Any,
        layers: list[Layer],
        sites: Sequence[Site],
        keep: Mapping[str, Sequence[int]],
        recipe: Recipe,
        inputs: list[Inputs],
        chain: list[Step],
        refined: Sequence[str],
        costs: Sensitivity,
        shelf: Shelf,
    ) -> None:
        self.graph, self.layers, self.keep, self.recipe = graph, layers, keep, recipe
        read = {layer.site.down for layer in layers if layer.site is not None}
        self.others = [site for site in sites if site.down not in read]  # no fitted layer reads it
        self.model: nn.Module = graph.model
        self.corrections: dict[str, Correction] = {}
        self.batches, self.given = inputs, [given_weights(recipe, batch) for batch in inputs]
        self.refined, self.costs = refined, costs
        self.second = [in_second_half(images_alone(batch)) for batch in inputs]
        self.few: list[str] = []  # layers that saw few tokens
        self.unrefined: list[str] = []  # for which refining found nothing better
        # Behind these no state is needed: the chain's last step, and the whole model.
        self.ends = [chain[-1], *(before for before, after in pairwise(chain) if not after.name)]
        self.shelf = shelf
        self._begin(chain[0])

    def _begin(self, step: Step) -> None:
        """What a step is called with, in the dense model and, where streams are cut, in the cut."""

        def states() -> list[Held[Any]]:
            return [self.shelf.hold(_start(self.model, step, batch)) for batch in self.batches]

        self.dense = states()
        self.cut = list(self.dense)
        if any(isinstance(site, Stream) for site in self.others) and step.name:
            with self._cut([]):
                self.cut = states()

    def take(self, step: Step) -> None:
        """Fit the layers inside one step that are left to fit, and take all batches to the next."""
        inside = [layer for layer in self.layers if _inside(layer, step)]
        unfitted = [layer for layer in inside if layer.name not in self.corrections]
        if not step.name and len(unfitted) < len(inside):  # what lies behind a chain
            self._begin(step)
        for layer in unfitted:
            spot = _Spot(layer, step, self._place(layer, step))
            goes_on = layer is inside[-1] and step not in self.ends
            targets = self._targets(spot, goes_on)
            with self._cut(inside):
                self.corrections[layer.name] = self._fit(spot, targets)
            if layer.name in self.refined:
                with self._cut(inside):
                    self._refine(spot, targets)
        if step in self.ends:
            return
        if not inside:
            self._go_on(self.dense, step)
        with self._cut(inside):
            self._go_on(self.cut, step)

    def _go_on(self, states: list[Held[Any]], step: Step) -> None:
        module = self.model.get_submodule(step.name)
        for batch, state in enumerate(states):
            states[batch] = self.shelf.hold(first_tensor(_inputs(step, state).call(module)))

    def _place(self, layer: Layer, step: Step) -> Place | None:
        if layer.outputs is not None and not layer.writes:
            return None
        module = self.model.get_submodule(step.name)
        weights = partial(self._weights, layer, 0)
        inputs = _inputs(step, self.dense[0])
        found = find_place(module, self.model, layer.name, inputs, weights)
        if found and layer.outputs is not None:
            found = Place(found.name, found.scale[list(layer.outputs)])
        if not active():
            return found
        # Its scale is measured on a rank's own images: all ranks have to divide by the same.
        told = agree(f"where {layer.name} writes", (found.name, found.scale) if found else None)
        device = next(self.model.parameters()).device
        return Place(told[0], told[1].to(device)) if told else None

    def _watch(self, spot: _Spot, state: Held[Any], *, stop: bool) -> tuple[Seen, Any]:
        """Run the step with one state; what the layer reads and gives, and the stream behind it."""
        module, inputs = self.model.get_submodule(spot.step.name), _inputs(spot.step, state)
        later = spot.place.name if spot.place else None
        return watch(module, self.model, spot.layer.name, inputs, stop=stop, later=later)

    def _targets(self, spot: _Spot, goes_on: bool) -> list[Held[Tensor]]:
        """What the dense model has behind a layer, by batch; maybe take it to the next step."""
        targets, layer = [], self.model.get_submodule(spot.layer.name)
        for batch, state in enumerate(self.dense):
            seen, output = self._watch(spot, state, stop=not goes_on)
            kept, behind = spot.layer.outputs, held_outputs(layer, seen.behind)
            targets.append(self.shelf.hold(behind if kept is None else behind[:, kept]))
            if goes_on:
                self.dense[batch] = self.shelf.hold(first_tensor(output))
        return targets

    def _fit(self, spot: _Spot, targets: list[Held[Tensor]]) -> Correction:
        """Fit a layer to its targets; those of the stream become what the layer should add."""
        layer, place, halves = spot.layer, spot.place, Halves(spot.layer.name)
        module = self.model.get_submodule(layer.name)
        for batch, state in enumerate(self.cut):
            seen, _ = self._watch(spot, state, stop=True)
            hidden = layer.inputs(held_inputs(module, seen.inputs), self.keep)
            residuals = targets[batch].get() - held_outputs(module, seen.behind)
            if place:
                wanted = seen.outputs * place.scale.to(seen.outputs) + residuals
                targets[batch] = self.shelf.hold(wanted)
            weights = self._weights(layer, batch, len(hidden))
            halves.add(hidden, residuals, weights, second=self.second[batch])
        bias = getattr(module, "bias", None) is not None or self.recipe.add_bias
        halves = halves.merged(f"the moments of {layer.name}")
        if self.recipe.method == "affine" and halves.few:
            self.few.append(layer.name)
        found = corrected(layer.name, halves, self.recipe, bias)
        return place.as_output(found) if place else found

    def _weights(self, layer: Layer, batch: int, tokens: int) -> Tensor | None:
        places = self.costs.places.get(layer.name)
        return token_weights(self.given[batch], self.model, self.batches[batch], places, tokens)

    def _refine(self, spot: _Spot, targets: list[Held[Tensor]]) -> None:
        """Improve the layers of an MLP together; what that changes is added to the corrections."""
        layer, site = spot.layer, cast(MLP, spot.layer.site)
        module, part = (self.model.get_submodule(name) for name in (spot.step.name, site.name))
        states = [_inputs(spot.step, state) for state in self.cut]
        read = [called for state in states if (called := called_with(module, part, state))]
        if len(read) < len(states):  # only its layers are called, not what holds them
            part, read = module, states
        examples = []
        for batch, inputs in enumerate(read):
            target = targets[batch].get()
            weights = self._weights(layer, batch, len(target))
            examples.append(Example(inputs, target, weights, len(self.second[batch])))
        targets.clear()
        names = [name for name in (*site.up, site.down) if name in self.corrections]
        scale = torch.ones(()) if spot.place is None else spot.place.scale
        cost = self.costs.outputs.get(layer.name)
        if cost is not None and layer.outputs is not None:
            cost = cost[list(layer.outputs)][:, list(layer.outputs)]
        mlp = PartOfMLP(part, self.model, layer.name, names, scale, cost)
        better = refine_mlp(mlp, examples, self.recipe.refine)
        self.unrefined += [] if better else [layer.name]
        for name, added in better.items():
            self.corrections[name] = self.corrections[name].plus(added)

    @contextmanager
    def _cut(self, layers: list[Layer]) -> Iterator[None]:
        """The model with some layers cut, and corrected where they have been fitted."""
        cut = [*self.others, *(x.site for x in layers if x.site is not None)]
        keep = {site: self.keep[site.down] for site in cut}
        with ExitStack() as stack:
            stack.enter_context(narrowed(self.graph, keep))
            for layer in layers:
                if layer.name in self.corrections:
                    module = self.model.get_submodule(layer.name)
                    first = layer.site.first if layer.site else 0
                    stack.enter_context(applied(module, self.corrections[layer.name], first))
            yield


def _chain(structure: ModelStructure, few: Inputs, sites: Sequence[Site]) -> list[Step]:
    """The steps of the walk; what reads a stream may lie behind them."""
    streams = [site for site in sites if isinstance(site, Stream)]
    readers = [name for stream in streams for name in stream.readers]
    return structure.chain(few, [site.name for site in sites if site not in streams], readers)


def _inside(layer: Layer, step: Step) -> bool:
    return not step.name or f"{layer.name}.".startswith(f"{step.name}.")


def _over_all(chain: list[Step], layers: Sequence[Layer]) -> list[Step]:
    """The chain, and the whole model behind it for layers that lie there, as a head does.

    What lies before the chain has to be fitted first: then there is the whole model alone.
    """
    inside = [any(_inside(layer, step) for step in chain) for layer in layers]
    if all(inside):
        return chain
    return [*chain, Step("")] if inside == sorted(inside, reverse=True) else [Step("")]


def _inputs(step: Step, state: Held[Any]) -> Inputs:
    value = state.get()
    if not step.name:
        return value  # type: ignore[no-any-return]
    return Inputs((value, *step.inputs.args), step.inputs.kwargs)


def _start(model: nn.Module, step: Step, batch: Inputs) -> Any:
    """What the first step is called with: its first argument, or the batch for a whole model."""
    if not step.name:
        return batch
    called = called_with(model, model.get_submodule(step.name), batch)
    return called.args[0] if called else batch
