"""Beyond linear algebra: both layers of a cut MLP, improved by gradients of its own output."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tp_amp.compensation.layers_to_fit import Layer
from tp_amp.importance.objectives import Objective
from tp_amp.importance.sensitivity import LEAST, output_sensitivity
from tp_amp.running.distributed import add_up_named, of_each
from tp_amp.running.inputs import Inputs
from tp_amp.structure.mlps import MLP

logger = logging.getLogger(__name__)

# The largest step, relative to a layer's root mean square weight and to its output's error.
_RATE = 0.1


def sensitivities(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Inputs],
    *,
    activation_checkpointing: bool = False,
) -> dict[str, Tensor | None]:
    """What errors of the MLPs that can be refined cost the dense model's predictions.

    Args:
        model: the dense model.
        layers: that are fitted.
        batches: unlabelled images, prepared.
        activation_checkpointing: as for `EntropyTaylorImportance`.

    Returns:
        `down` -> G of `output_sensitivity` for the outputs that stay, `(outputs, outputs)`; None
        where the predictions do not depend on them.
    """
    mlps: dict[str, Layer] = {}
    for layer in layers:
        if isinstance(layer.site, MLP) and (layer.site.fused or layer.site.first):
            logger.warning("%s reads more than an MLP and is not refined", layer.name)
        elif isinstance(layer.site, MLP):
            mlps[layer.name] = layer
    if not mlps:
        return {}
    raw = [batch.raw() for batch in batches]
    found = output_sensitivity(
        model,
        mlps,
        raw,
        Objective(),
        skip_unused=True,
        activation_checkpointing=activation_checkpointing,
        progress=False,
    )
    costs: dict[str, Tensor | None] = {}
    for name, layer in mlps.items():
        costs[name] = found.get(name)
        if name in found and layer.outputs is not None:
            costs[name] = found[name][list(layer.outputs)][:, list(layer.outputs)]
    return costs


def cost_factor(sensitivity: Tensor | None, outputs: int, scale: Tensor) -> Tensor:
    """A factor L by which an error e of a layer's output, times a scale, costs |e L|^2.

    Args:
        sensitivity: `(outputs, outputs)`, of `output_sensitivity`; None for the same cost of all.
        outputs: of the layer.
        scale: what each output is multiplied by where the error is seen, `(outputs,)` or one.

    Returns:
        L, `(outputs, outputs)`; costs are relative to their mean over the outputs.

    Example:
        >>> cost_factor(torch.diag(torch.tensor([1.9, 0.1])), 2, torch.ones(()))
        tensor([[1.4142, 0.0000],
                [0.0000, 0.4472]])
    """
    if sensitivity is None or not float(sensitivity.diagonal().sum()) > 0:
        return torch.eye(outputs)
    # What the output is multiplied by is in its gradients too.
    scale = scale.to(sensitivity).expand(outputs)
    share = torch.where(scale == 0, 0, 1 / scale)
    seen = sensitivity * torch.outer(share, share)
    least = LEAST * torch.eye(outputs).to(sensitivity)
    factor: Tensor = torch.linalg.cholesky(seen / seen.diagonal().mean() + least)
    return factor


def spread(values: Iterable[Tensor]) -> float:
    """The sum of squares around the mean, over all batches `(tokens, outputs)` of all ranks."""
    sums: dict[str, Tensor] = {}
    for batch in values:
        part = batch.double()
        count = torch.tensor(float(len(part)))
        new = {"count": count, "sum": part.sum(0), "squares": part.square().sum()}
        sums = {name: sums[name] + value if sums else value for name, value in new.items()}
    sums = add_up_named("the outputs to refine", sums)
    return float(sums["squares"] - sums["sum"].square().sum() / sums["count"].to(sums["sum"]))


def refine(
    layers: Mapping[str, nn.Module],
    losses: Sequence[Callable[[], Tensor]],
    whole: float,
    passes: int,
) -> dict[str, dict[str, Tensor]]:
    """Minimise a sum of losses over weights and biases of layers by Adam, from where they are.

    One step for each loss, or for those at the same place on all ranks of a process group. The
    rate is a tenth of a layer's root mean square weight times the relative error to begin with, and
    falls to nothing along a cosine: what is nearly right is hardly moved. Nothing is drawn at
    random, and weights of less than float32 are trained in float32.

    Args:
        layers: module path -> layer; each has its own parameters back at the end.
        losses: of each batch, as a sum over its tokens; they run the layers.
        whole: what they would add up to for an output that is constant.
        passes: how often to go through the losses.

    Returns:
        Module path -> name of a parameter -> what to add to it. Nothing where all losses together
        are not lower than before.
    """
    own = {name: dict(layer._parameters) for name, layer in layers.items()}
    used: dict[str, nn.Parameter] = {}
    sizes: dict[str, float] = {}
    for name, layer in layers.items():
        size = float(own[name]["weight"].detach().float().square().mean().sqrt())  # type: ignore[union-attr]
        for key, value in own[name].items():
            if value is not None:
                used[f"{name}.{key}"] = nn.Parameter(value.detach().clone())
                sizes[f"{name}.{key}"] = size
                layer._parameters[key] = used[f"{name}.{key}"]
    try:
        before = after = _total(losses)
        if 0 < before < math.inf:
            rate = _RATE * math.sqrt(min(1.0, before / whole)) if whole > 0 else _RATE
            rates = {name: rate * size for name, size in sizes.items()}
            _descend(used, rates, losses, passes, before)
            after = _total(losses)
    finally:
        for name, layer in layers.items():
            layer._parameters.update(own[name])
    if not after < before:
        return {}
    return {
        name: {
            key: used[f"{name}.{key}"].detach().double() - value.detach().double()
            for key, value in held.items()
            if value is not None
        }
        for name, held in own.items()
    }


def _descend(
    used: dict[str, nn.Parameter],
    rates: dict[str, float],
    losses: Sequence[Callable[[], Tensor]],
    passes: int,
    before: float,
) -> None:
    """Take the steps; of parameters of lower precision a copy in float32 takes them."""
    trained = {n: p if p.dtype.itemsize >= 4 else p.detach().float() for n, p in used.items()}
    groups = [{"params": [trained[name]], "lr": rates[name]} for name in used]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    counts = of_each("the number of batches", len(losses))
    turns = max(counts) if isinstance(counts, list) else counts
    steps = passes * turns
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    for step in range(steps):
        gradients: dict[str, Tensor] = {}
        if step % turns < len(losses):
            with torch.enable_grad():
                loss = losses[step % turns]() * (turns / before)
                found = torch.autograd.grad(loss, list(used.values()), allow_unused=True)
            gradients = {n: g for n, g in zip(used, found, strict=True) if g is not None}
        gradients = add_up_named("the gradients of a refinement", gradients)
        for name, gradient in gradients.items():
            trained[name].grad = gradient.to(trained[name])
        optimizer.step()
        schedule.step()
        for name, parameter in used.items():
            parameter.data.copy_(trained[name])


@torch.no_grad()
def _total(losses: Sequence[Callable[[], Tensor]]) -> float:
    """The sum of the losses, of all ranks."""
    found = of_each("the loss of a refinement", math.fsum(float(loss()) for loss in losses))
    return math.fsum(found) if isinstance(found, list) else found
