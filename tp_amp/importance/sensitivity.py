"""What an error at a layer's output costs the model: label-free Fisher information."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.algebra.shrinkage import SampleMoments
from tp_amp.importance.objectives import Objective, resolve_on
from tp_amp.importance.places import PlaceGradients, check_finite_gradients
from tp_amp.importance.recomputing import recomputed
from tp_amp.running.batches import stream
from tp_amp.running.distributed import Turn, add_up_named, agree, in_turns, together
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

    Attributes:
        outputs: module path -> G as of `output_sensitivity`.
        places: module path -> weights as of `place_sensitivity`.
    """

    outputs: dict[str, Tensor]
    places: dict[str, Tensor]


def output_sensitivity(
    model: nn.Module,
    layers: Collection[str],
    batches: Iterable[Any],
    objective: Objective,
    *,
    skip_unused: bool = False,
    activation_checkpointing: bool = False,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Mean over images, of all ranks, of the sum over tokens of g g^T, g a layer's gradient.

    Images are few, so the mean is drawn to its diagonal by what it varies (`SampleMoments`):
    else errors in directions that no image asked for would cost nothing.

    The gradient is taken at the layer's output; it is that of -log p(y) with y drawn from the
    model's own softmax p (of its logits, or of the similarities of a batch), and one time in ten
    from all classes alike. So 1/2 tr(G E) is how many nats an error of the output with second
    moment E costs, to second order, and not nothing where the model is certain. For a callable
    objective it is its own gradient.

    Args:
        model: left as it was.
        layers: module paths of Linears or convolutions.
        batches: unlabelled images.
        objective: what the model is for.
        skip_unused: leave out layers that the objective does not depend on.
        activation_checkpointing: as for `EntropyTaylorImportance`.
        progress: show a progress bar on a terminal.

    Returns:
        Module path -> G, `(outputs, outputs)` in float64.

    Raises:
        ValueError: the objective does not depend on a layer, a gradient is not finite, or the model
            has no blocks one after another for `activation_checkpointing`.
    """
    found = sensitivity(
        model,
        batches,
        objective,
        outputs=layers,
        skip_unused=skip_unused,
        activation_checkpointing=activation_checkpointing,
        progress=progress,
    )
    return found.outputs


def place_sensitivity(
    model: nn.Module,
    layers: Collection[str],
    batches: Iterable[Any],
    objective: Objective,
    *,
    activation_checkpointing: bool = False,
) -> dict[str, Tensor]:
    """How much errors of layers cost at each place of an image, relative to all its places.

    The squared gradient of `output_sensitivity`, as its mean over the images of all ranks: that of
    a single token of one image, of one drawn label, tells little. Half of all weight is dealt by it
    and half to all places alike: what only a class token is fitted to is fitted to few tokens.

    Args:
        model: left as it was.
        layers: module paths of Linears or convolutions.
        batches: unlabelled images.
        objective: what the model is for.
        activation_checkpointing: as for `EntropyTaylorImportance`.

    Returns:
        Module path -> `(places,)`. Layers on which the objective does not depend are left out, and
        those whose outputs have no images first, or not the same places on all batches.

    Raises:
        ValueError: a gradient is not finite, or the model has no blocks one after another for
            `activation_checkpointing`.
    """
    found = sensitivity(
        model,
        batches,
        objective,
        places=layers,
        activation_checkpointing=activation_checkpointing,
        progress=False,
    )
    return found.places


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    *,
    outputs: Collection[str] = (),
    places: Collection[str] = (),
    skip_unused: bool = False,
    activation_checkpointing: bool = False,
    progress: bool = True,
) -> Sensitivity:
    """`output_sensitivity` of some layers and `place_sensitivity` of some, in one pass."""
    layers = list(dict.fromkeys([*outputs, *places]))
    optional = set(layers) if skip_unused else set(layers) - set(outputs)
    resolved = resolve_on(objective, model, batches)
    moments: dict[str, SampleMoments] = {}
    sums = PlaceGradients()
    images = 0
    with together("sensitivity"), observing(model, gradients=True), ExitStack() as stack:
        own = stream(batches, model, description="sensitivity", progress=progress)
        for turn in recomputed(in_turns(own), model, stack, wanted=activation_checkpointing):
            count = turn.inputs.images if turn.inputs else 0
            for name, gradient in _gradients(model, layers, turn, resolved, optional).items():
                rows = _rows(model.get_submodule(name), gradient)
                if name in outputs:
                    moments.setdefault(name, SampleMoments()).add(rows, count)
                if name in places:
                    sums.add(name, rows, count if len(gradient) % count == 0 else 0)
            images += turn.images
        # One by one: all at once would take much memory.
        for name, found in moments.items():
            added = {"total": found.total, "squares": found.squares}
            added = add_up_named(f"the sensitivity of {name}", added)
            found.total, found.squares, found.count = added["total"], added["squares"], images
    check_finite_gradients({name: found.total for name, found in moments.items()})
    costs = {name: found.shrunk() for name, found in moments.items()}
    return Sensitivity(costs, sums.weights() if places else {})


def _gradients(
    model: nn.Module,
    layers: Collection[str],
    turn: Turn,
    objective: Objective,
    optional: Collection[str],
) -> dict[str, Tensor]:
    """The gradients at the outputs of some layers, as these are; some may have none."""
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
        first_run = False
        missing = [name for name in layers if name not in outputs]
        gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    found = dict(zip(outputs, gradients, strict=True))
    missing += [name for name, gradient in found.items() if gradient is None]
    missing = [name for name in missing if name not in optional]
    if missing:
        raise ValueError(
            f"the objective does not depend on {missing}, as a classifier's does not on heads for "
            "boxes or masks; leave them out: ignored_layers=[model.get_submodule(name) for name "
            f"in {missing}], or take an objective that reads what they give"
        )
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def _loss(model: nn.Module, turn: Turn, objective: Objective) -> Tensor:
    logits = objective.logits(model, turn)
    if logits is None:
        inputs = turn.inputs
        return torch.zeros(()) if inputs is None else objective(model, inputs) * inputs.images
    log_p = logits.double().log_softmax(-1)
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
