"""Fit compensation through the depth of a model: each layer on the model as cut before it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp._state import hooks, observing
from tp_amp.batches import Inputs, bar, stream
from tp_amp.chain import Step, find_chain, first_tensor
from tp_amp.compensation import Correction, Moments
from tp_amp.cutting import Site, narrowed
from tp_amp.recipe import Recipe, apply, corrected, token_weights

logger = logging.getLogger(__name__)


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

    Args:
        graph: the `tp.DependencyGraph` of the dense model.
        sites: the MLPs and attentions to be cut.
        keep: `down` -> kept channels or heads.
        batches: unlabelled images; their states at one depth are held, never all activations.
        recipe: how to compensate.
        progress: show a progress bar on a terminal.

    Returns:
        `down` -> correction, in the order of the forward pass.
    """
    sites = [site for site in sites if len(keep[site.down]) < site.width]
    if recipe.method == "none" or not sites:
        return {}
    model: nn.Module = graph.model
    with observing(model, gradients=False):
        inputs = list(stream(batches, model, description="reading", progress=False))
        few = one_image(inputs[0], 2)
        sizes = {tuple(tensor.shape[1:] for tensor in batch.tensors()) for batch in inputs}
        # What the steps are called with besides the state may depend on the images' size.
        chain = [Step("")]
        if len(sizes) == 1:
            chain = find_chain(model, few, [site.name for site in sites])
        walk = _Walk(graph, _in_call_order(model, few, sites), keep, recipe, inputs, chain)
        for step in bar(chain, description="compensation", progress=progress):
            walk.take(step)
    return walk.corrections


class _Walk:
    """Takes all batches through the chain, once as in the dense model and once as in the cut."""

    def __init__(
        self,
        graph: Any,
        sites: list[Site],
        keep: Mapping[str, Sequence[int]],
        recipe: Recipe,
        inputs: list[Inputs],
        chain: list[Step],
    ) -> None:
        self.graph, self.sites, self.keep, self.recipe = graph, sites, keep, recipe
        self.model: nn.Module = graph.model
        self.corrections: dict[str, Correction] = {}
        self.weights = [token_weights(recipe, batch) for batch in inputs]
        self.last = chain[-1]
        self.dense = [_start(self.model, chain[0], batch) for batch in inputs]
        self.cut = list(self.dense)

    def take(self, step: Step) -> None:
        """Fit the layers inside one step, and take all batches to the next."""
        prefix = f"{step.name}." if step.name else ""
        inside = [site for site in self.sites if site.down.startswith(prefix)]
        module = self.model.get_submodule(step.name)
        following: list[Any] = []
        for site in inside:
            down = self.model.get_submodule(site.down)
            goes_on = site is inside[-1] and step is not self.last
            targets = []
            for state in self.dense:
                call, output = watch(module, down, site, _inputs(step, state), stop=not goes_on)
                targets.append(call[1])
                following += [first_tensor(output)] if goes_on else []
            before = inside[: inside.index(site)]
            with self._applied([*before, site]):
                moments = self._moments(site, module, step, targets)
            bias = getattr(down, "bias", None) is not None or self.recipe.add_bias
            self.corrections[site.down] = corrected(site, moments, self.recipe, bias)
        if step is self.last:
            return
        if not inside:
            following = [first_tensor(_inputs(step, x).call(module)) for x in self.dense]
        self.dense = following
        with self._applied(inside):
            self.cut = [first_tensor(_inputs(step, x).call(module)) for x in self.cut]

    def _moments(self, site: Site, module: nn.Module, step: Step, targets: list[Tensor]) -> Moments:
        down = self.model.get_submodule(site.down)
        moments = Moments()
        for state, target, weights in zip(self.cut, targets, self.weights, strict=True):
            (hidden, output), _ = watch(module, down, site, _inputs(step, state), stop=True)
            width = len(self.keep[site.down]) * site.unit_width
            moments.add(hidden[:, site.first : site.first + width], target - output, weights)
        return moments

    @contextmanager
    def _applied(self, sites: list[Site]) -> Iterator[None]:
        """The model with some layers cut, and corrected where they have been fitted."""
        with ExitStack() as stack:
            for site in sites:
                stack.enter_context(narrowed(self.graph, site, self.keep[site.down]))
                if site.down in self.corrections:
                    down = self.model.get_submodule(site.down)
                    apply(down, site, self.corrections[site.down])
            yield


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def watch(
    module: nn.Module, down: nn.Module, site: Site, inputs: Inputs, *, stop: bool
) -> tuple[tuple[Tensor, Tensor], Any]:
    """Run a module; give `down`'s input and output as `(tokens, channels)`, and the output."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((_tokens(down, args[0]), _tokens(down, output)))
        if stop:
            raise _Stop

    output = None
    with hooks([down.register_forward_hook(see)]), suppress(_Stop):
        output = inputs.call(module)
    if not seen:
        raise ValueError(f"{site.down} was not called on a batch; check the batches")
    return seen[0], output


def _tokens(layer: nn.Module, values: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        values = values.movedim(1, -1)
    return values.reshape(-1, values.shape[-1])


def _inputs(step: Step, state: Any) -> Inputs:
    if not step.name:
        return state  # type: ignore[no-any-return]
    return Inputs((state, *step.inputs.args), step.inputs.kwargs)


def _start(model: nn.Module, step: Step, batch: Inputs) -> Any:
    """What the first step is called with: its first argument, or the batch for a whole model."""
    if not step.name:
        return batch
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Stop

    first = model.get_submodule(step.name)
    with hooks([first.register_forward_pre_hook(see)]), suppress(_Stop):
        batch.call(model)
    return seen[0]


def one_image(batch: Inputs, count: int = 1) -> Inputs:
    """The first image of a batch, or the first few."""

    def few(value: Any) -> Any:
        whole = isinstance(value, Tensor) and len(value) == batch.images
        return value[:count] if whole else value

    return Inputs(tuple(map(few, batch.args)), {k: few(v) for k, v in batch.kwargs.items()})


def _in_call_order(model: nn.Module, inputs: Inputs, sites: Sequence[Site]) -> list[Site]:
    called: list[Site] = []
    with hooks(
        model.get_submodule(site.down).register_forward_pre_hook(
            lambda _m, _a, site=site: called.append(site)
        )
        for site in sites
    ):
        inputs.call(model)
    if len(called) != len(sites):
        raise ValueError(
            f"compensation needs each layer called once in a forward pass; of {len(sites)} layers "
            f"the calls were {[site.down for site in called]}"
        )
    return called
