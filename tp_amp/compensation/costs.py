"""What errors cost: at each place of an image, and in each direction of an MLP's output."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tp_amp.compensation.layers_to_fit import Layer
from tp_amp.compensation.recipe import Recipe
from tp_amp.importance.error_objective import error_objective, readable
from tp_amp.importance.sensitivity import LEAST, Sensitivity, sensitivity
from tp_amp.running.distributed import add_up_named
from tp_amp.running.inputs import Inputs
from tp_amp.structure.mlps import MLP

logger = logging.getLogger(__name__)


def error_costs(
    recipe: Recipe,
    model: nn.Module,
    layers: Sequence[str],
    refined: Sequence[str],
    batches: Sequence[Inputs],
) -> Sensitivity:
    """What errors cost the dense model's predictions, as far as a recipe asks, from one pass.

    Args:
        recipe: how to compensate.
        model: the dense model.
        layers: whose tokens are weighed.
        refined: layers whose outputs' errors are refined by what they cost.
        batches: unlabelled images, prepared.

    Returns:
        Of the layers on which the predictions depend: nothing of any where all errors count alike.
    """
    weighed = layers if recipe.token_weights == "sensitivity" else []
    if recipe.method == "none" or not (weighed or refined):
        return Sensitivity({}, {})
    raw = [batch.raw() for batch in batches]
    objective = readable(error_objective(recipe.objective), model, raw)
    if objective is None:
        return Sensitivity({}, {})
    found = sensitivity(
        model,
        raw,
        objective,
        outputs=refined,
        places=weighed,
        optional=[*refined, *weighed],
        activation_checkpointing=recipe.activation_checkpointing,
        progress=False,
    )
    left = [name for name in weighed if name not in found.places]
    if left:
        logger.warning(
            "all tokens of %s weigh the same: the objective does not depend on them, or their "
            "outputs have other places on other batches",
            ", ".join(left),
        )
    return found


def refined_layers(layers: Sequence[Layer], keep: Mapping[str, Sequence[int]]) -> list[str]:
    """The `down` layers of the MLPs that can be refined; others are told but for those that go."""
    names = []
    for layer in layers:
        if isinstance(layer.site, MLP) and (layer.site.fused or layer.site.first):
            logger.warning("%s reads more than an MLP and is not refined", layer.name)
        elif isinstance(layer.site, MLP) and keep[layer.name]:
            names.append(layer.name)
    return names


def cost_factor(cost: Tensor | None, outputs: int, scale: Tensor) -> Tensor:
    """A factor L by which an error e of a layer's output, times a scale, costs |e L|^2.

    Args:
        cost: G of `Sensitivity.outputs`, `(outputs, outputs)`; None for the same cost of all.
        outputs: of the layer.
        scale: what each output is multiplied by where the error is seen, `(outputs,)` or one.

    Returns:
        L, `(outputs, outputs)`; costs are relative to their mean over the outputs.

    Example:
        >>> cost_factor(torch.diag(torch.tensor([1.9, 0.1])), 2, torch.ones(()))
        tensor([[1.4142, 0.0000],
                [0.0000, 0.4472]])
    """
    if cost is None or not float(cost.diagonal().sum()) > 0:
        return torch.eye(outputs)
    # What the output is multiplied by is in its gradients too.
    scale = scale.to(cost).expand(outputs)
    share = torch.where(scale == 0, 0, 1 / scale)
    seen = cost * torch.outer(share, share)
    least = LEAST * torch.eye(outputs).to(cost)
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
