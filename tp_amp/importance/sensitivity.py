"""What an error at a layer's output costs the model: label-free Fisher information."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.algebra.shrinkage import SampleMoments
from tp_amp.importance.objectives import Objective, resolve_on
from tp_amp.importance.places import PlaceGradients, check_finite_gradients
from tp_amp.importance.recomputing import recomputed
from tp_amp.running.batches import stream
from tp_amp.running.distributed import Turn, add_up_named, agree, in_turns, together
from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import hooks
from tp_amp.structure.observing import observing

# What the objective does not see of a layer still steers what comes after it: such a share of the
# mean is added to what errors cost.
LEAST = 0.1
# How often any class is drawn instead of one that the model expects. Where it is certain, it would
# be asked for that class alone, whose gradient is nought however near the others are.
_UNSURE = 0.1


@dataclass(frozen=True)
class Sensitivity:
    """What errors of layers cost, from one backward pass over the images.

    Images are few, so means over them are drawn to their diagonal by what they vary
    (`SampleMoments`): else errors in directions that no image asked for would cost nothing.

    Attributes:
        outputs: module path -> G, the mean over images of the sum over tokens of `g g^T`, g the
            gradient at the output, `(outputs, outputs)` in float64. `1/2 tr(G E)` is how many nats
            an error of the output with second moment E costs, to second order.
        places: module path -> how much errors cost at each place of an image, relative to all its
            places, `(places,)`: half of it the mean over images of the squared gradient, half the
            same everywhere, for what only a class token is fitted to is fitted to few tokens. Left
            out is what has no images first, or not the same places on all batches.
        products: module path -> the mean over images of the sum over tokens of `p p^T`, with
            `p = output * gradient`. Half the sum of its entries over some outputs is how many nats
            it costs, to second order, if they are nought.
    """

    outputs: dict[str, Tensor]
    places: dict[str, Tensor]
    products: dict[str, Tensor] = field(default_factory=dict)


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    *,
    outputs: Collection[str] = (),
    places: Collection[str] = (),
    products: Mapping[str, slice] = MappingProxyType({}),
    optional: Collection[str] = (),
    activation_checkpointing: bool = False,
    progress: bool = True,
) -> Sensitivity:
    """What errors of layers cost, by their gradients over the images of all ranks.

    The gradient is taken at the layer's output; it is that of -log p(y) with y drawn from the
    model's own softmax p (of its logits, or of the similarities of a batch), and one time in ten
    from all classes alike. So an error is not free where the model is certain. For a callable
    objective it is its own gradient.

    Args:
        model: left as it was.
        batches: unlabelled images; read once.
        objective: what the model is for.
        outputs: module paths of Linears or convolutions.
        places: the same.
        products: module path -> which of its outputs.
        optional: those of all these that the objective need not depend on; they are then left out.
        activation_checkpointing: as for `EntropyTaylorImportance`.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: a layer is not called, the objective does not depend on it, what the model gives
            or a gradient is not finite, or the model has no blocks one after another for
            `activation_checkpointing`.
    """
    layers = list(dict.fromkeys([*outputs, *places, *products]))
    optional = set(layers) - ({*outputs, *products} - {*optional})
    resolved = resolve_on(objective, model, batches)
    moments: dict[str, SampleMoments] = {}
    taylor: dict[str, SampleMoments] = {}
    sums = PlaceGradients()
    images = 0
    with together("sensitivity"), observing(model, gradients=True), ExitStack() as stack:
        own = stream(batches, model, description="sensitivity", progress=progress)
        for turn in recomputed(in_turns(own), model, stack, wanted=activation_checkpointing):
            count = turn.inputs.images if turn.inputs else 0
            found = _gradients(model, layers, turn, resolved, optional)
            for name, (output, gradient) in found.items():
                layer = model.get_submodule(name)
                rows = _rows(layer, gradient)
                if name in outputs:
                    moments.setdefault(name, SampleMoments()).add(rows, count)
                if name in products:
                    terms = (rows * _rows(layer, output))[:, products[name]]
                    taylor.setdefault(name, SampleMoments()).add(terms, count)
                if name in places:
                    # Some models put all images into one row of tokens.
                    first = len(rows) if len(gradient) == 1 else len(gradient)
                    sums.add(name, rows, count if first % count == 0 else 0)
            images += turn.images
        costs, terms_of = (_means(kind, images) for kind in (moments, taylor))
    return Sensitivity(costs, sums.weights() if places else {}, terms_of)


def _means(moments: Mapping[str, SampleMoments], images: int) -> dict[str, Tensor]:
    """The means over so many images, of all ranks."""
    for name, found in moments.items():  # one by one: all at once would take much memory
        added = {"total": found.total, "squares": found.squares}
        added = add_up_named(f"the sensitivity of {name}", added)
        found.total, found.squares, found.count = added["total"], added["squares"], images
    check_finite_gradients({name: found.total for name, found in moments.items()})
    return {name: found.shrunk() for name, found in moments.items()}


def _gradients(
    model: nn.Module,
    layers: Collection[str],
    turn: Turn,
    objective: Objective,
    optional: Collection[str],
) -> dict[str, tuple[Tensor, Tensor]]:
    """The outputs of some layers and the gradients there, as these are; some may have none."""
    outputs: dict[str, Tensor] = {}
    first_run = True

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaf = output if output.requires_grad else output.detach().requires_grad_()
            if first_run:  # else a block is run again in the backward pass
                outputs[name] = leaf
            # Positions may be added in place, which a leaf does not allow.
            return output if leaf is output else leaf.clone()

        return hook

    with hooks(model.get_submodule(n).register_forward_hook(keep(n)) for n in layers):
        loss = _loss(model, turn, objective)
        if turn.inputs is None:
            return {}
        if not loss.requires_grad:
            _check_gradient(model, turn.inputs, objective)
        first_run = False
        uncalled = [name for name in layers if name not in outputs and name not in optional]
        if uncalled:
            raise ValueError(f"{uncalled} were not called on a batch; leave them out of the layers")
        gradients: Sequence[Tensor | None] = [None] * len(outputs)
        if loss.requires_grad:  # else it depends on none of them
            gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    found = dict(zip(outputs, gradients, strict=True))
    missing = [n for n, gradient in found.items() if gradient is None and n not in optional]
    if missing:
        raise ValueError(
            f"the objective does not depend on {missing}, as a classifier's does not on heads for "
            "boxes or masks; leave them out: ignored_layers=[model.get_submodule(name) for name "
            f"in {missing}], or take an objective that reads what they give"
        )
    return {
        name: (outputs[name], gradient) for name, gradient in found.items() if gradient is not None
    }


def _check_gradient(model: nn.Module, inputs: Inputs, objective: Objective) -> None:
    """Raise ValueError if a callable loses the gradient of all, not of some layers alone."""
    if not callable(objective.kind):
        return
    args = tuple(map(_with_gradient, inputs.args))
    images = Inputs(args, {name: _with_gradient(v) for name, v in inputs.kwargs.items()})
    if any(tensor.requires_grad for tensor in images.tensors()) and not (
        objective(model, images).requires_grad
    ):
        raise ValueError(
            "the objective does not depend on any Linear's or convolution's input; check that the "
            "objective reads the model's output with its gradient"
        )


def _with_gradient(value: Any) -> Any:
    differs = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_() if differs else value


def _loss(model: nn.Module, turn: Turn, objective: Objective) -> Tensor:
    logits = objective.logits(model, turn)
    if logits is None:
        inputs = turn.inputs
        return torch.zeros(()) if inputs is None else objective(model, inputs) * inputs.images
    log_p = logits.double().log_softmax(-1)
    if bool(log_p.isnan().any()):
        raise ValueError("what the model gives is not finite; check weights and images for NaN")
    chances = log_p.detach().exp().cpu()
    possible = log_p.detach().isfinite().cpu()
    chances = (1 - _UNSURE) * chances + _UNSURE * possible / possible.sum(-1, keepdim=True)
    drawn = torch.multinomial(chances, 1)
    if objective.kind == "similarity":  # all ranks have the same rows
        drawn = agree("what was drawn", drawn)
    drawn = drawn.to(log_p.device)
    return -log_p.gather(1, drawn).sum()


def _rows(layer: nn.Module, values: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        values = values.movedim(1, -1)
    return values.detach().reshape(-1, values.shape[-1]).double()
