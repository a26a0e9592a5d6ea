"""What an error at a layer's output costs the model: label-free Fisher information."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp._state import hooks, observing
from tp_amp.batches import stream
from tp_amp.distributed import Turn, add_up_named, agree, in_turns, together
from tp_amp.objectives import Objective, resolve_on


def output_sensitivity(
    model: nn.Module,
    layers: Collection[str],
    batches: Iterable[Any],
    objective: Objective,
    *,
    skip_unused: bool = False,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Mean over images, of all ranks, of the sum over tokens of g g^T, g a layer's gradient.

    The gradient is taken at the layer's output; it is that of -log p(y) with y drawn from the
    model's own softmax p (of its logits, or of the similarities of a batch), so that 1/2 tr(G E) is
    how many nats an error of the output with second moment E costs, to second order. For a callable
    objective it is its own gradient.

    Args:
        model: left as it was.
        layers: module paths of Linears or convolutions.
        batches: unlabelled images.
        objective: what the model is for.
        skip_unused: leave out layers that the objective does not depend on.
        progress: show a progress bar on a terminal.

    Returns:
        Module path -> G, `(outputs, outputs)` in float64.

    Raises:
        ValueError: the objective does not depend on a layer.
    """
    resolved = resolve_on(objective, model, batches)
    totals: dict[str, Tensor] = {}
    images = 0
    with together("sensitivity"), observing(model, gradients=True):
        own = stream(batches, model, description="sensitivity", progress=progress)
        for turn in in_turns(own):
            gradients = _gradients(model, layers, turn, resolved, skip_unused)
            for name, gradient in gradients.items():
                totals[name] = totals.get(name, 0) + gradient.T @ gradient
            images += turn.images
        # One by one: all at once would take much memory.
        for name in totals:
            totals |= add_up_named(f"the sensitivity of {name}", {name: totals[name]})
    return {name: total / images for name, total in totals.items()}


def _gradients(
    model: nn.Module,
    layers: Collection[str],
    turn: Turn,
    objective: Objective,
    skip_unused: bool,
) -> dict[str, Tensor]:
    """The gradients at the outputs of some layers, `(tokens, outputs)`."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name]

        return hook

    with hooks(model.get_submodule(n).register_forward_hook(keep(n)) for n in layers):
        loss = _loss(model, turn, objective)
    if turn.inputs is None:
        return {}
    missing = [name for name in layers if name not in outputs]
    gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    found = dict(zip(outputs, gradients, strict=True))
    missing += [name for name, gradient in found.items() if gradient is None]
    if missing and not skip_unused:
        raise ValueError(f"the objective does not depend on {missing}; leave them out")
    return {
        name: _rows(model.get_submodule(name), gradient)
        for name, gradient in found.items()
        if gradient is not None
    }


def _loss(model: nn.Module, turn: Turn, objective: Objective) -> Tensor:
    logits = objective.logits(model, turn)
    if logits is None:
        inputs = turn.inputs
        return torch.zeros(()) if inputs is None else objective(model, inputs) * inputs.images
    log_p = logits.double().log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1)
    if objective.kind == "similarity":  # all ranks have the same rows
        drawn = agree("what was drawn", drawn)
    drawn = drawn.to(log_p.device)
    return -log_p.gather(1, drawn).sum()


def _rows(layer: nn.Module, values: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        values = values.movedim(1, -1)
    return values.detach().reshape(-1, values.shape[-1]).double()
