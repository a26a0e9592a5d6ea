"""What errors of an MLP cost, for the refinement of its layers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tp_amp.compensation.layers_to_fit import Layer
from tp_amp.importance.objectives import Objective
from tp_amp.importance.sensitivity import LEAST, output_sensitivity
from tp_amp.running.distributed import add_up_named
from tp_amp.running.inputs import Inputs
from tp_amp.structure.mlps import MLP

logger = logging.getLogger(__name__)


def sensitivities(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Inputs],
    objective: Objective | None,
    *,
    activation_checkpointing: bool = False,
) -> dict[str, Tensor | None]:
    """What errors of the MLPs that can be refined cost the dense model's predictions.

    Args:
        model: the dense model.
        layers: that are fitted.
        batches: unlabelled images, prepared.
        objective: what the model is for; None where all errors cost the same.
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
    if not mlps or objective is None:
        return dict.fromkeys(mlps)
    raw = [batch.raw() for batch in batches]
    found = output_sensitivity(
        model,
        mlps,
        raw,
        objective,
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
