"""Beyond linear algebra: both layers of a cut MLP, improved by gradients of what it lacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tp_amp.compensation.costs import cost_factor, spread
from tp_amp.compensation.token_steps import Batches, Example, Tokens, steps_on
from tp_amp.running.distributed import add_up_named, of_each
from tp_amp.running.inputs import Inputs
from tp_amp.running.watching import watch

# The largest step, relative to a layer's root mean square weight and to its output's error.
_RATE = 0.1
# How much of what was learned is tried on the images held out.
_SHARES = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class PartOfMLP:
    """An MLP in a model, cut and solved for.

    Attributes:
        part: what is run: the module of the MLP, or what holds its layers.
        model: holds the layers.
        down: path of the layer whose output counts.
        names: paths of the layers that are trained.
        scale: what the output is multiplied by where errors are seen, `(outputs,)` or one.
        sensitivity: of the output, see `cost_factor`.
    """

    part: nn.Module
    model: nn.Module
    down: str
    names: Sequence[str]
    scale: Tensor
    sensitivity: Tensor | None


def refine_mlp(
    mlp: PartOfMLP, examples: Sequence[Example], passes: int
) -> dict[str, dict[str, Tensor]]:
    """Improve the layers of an MLP together, by gradients of what is missing behind it.

    Args:
        mlp: is run, and left as it was.
        examples: what it reads and should give, times the scale.
        passes: over the images.

    Returns:
        As `refine`.
    """
    like = examples[0].targets
    kind = torch.promote_types(like.dtype, torch.float32)
    factor = cost_factor(mlp.sensitivity, like.shape[1], mlp.scale).to(like.device, kind)
    scale = mlp.scale.to(like.device, kind)

    def run(inputs: Inputs) -> Tensor:
        seen, _ = watch(mlp.part, mlp.model, mlp.down, inputs, stop=True)
        return seen.outputs.to(kind) * scale

    def cost(errors: Tensor) -> Tensor:
        return errors.to(kind) @ factor

    whole = spread(cost(example.weighed()) for example in examples)
    layers = {name: mlp.model.get_submodule(name) for name in mlp.names}
    return refine(layers, steps_on(run, cost, examples), whole, passes)


def refine(
    layers: Mapping[str, nn.Module], examples: Tokens | Batches, whole: float, passes: int
) -> dict[str, dict[str, Tensor]]:
    """Minimise a loss over weights and biases of layers by Adam, from where they are.

    The rate is a tenth of a layer's root mean square weight times the relative error to begin with,
    and falls to nothing along a cosine: what is nearly right is hardly moved. What is drawn is the
    same each time, and weights of less than float32 are trained in float32. All ranks of a process
    group take the same steps, each on examples of its own.

    Args:
        layers: module path -> layer; each has its own parameters back at the end.
        examples: run the layers; the loss of some of them judges.
        whole: what the loss would be for an output that is constant.
        passes: how often to go through the examples.

    Returns:
        Module path -> name of a parameter -> what to add to it: as much of what was learned as what
        judges is lowest with. Nothing where it is not lower than before.
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
        start = _of_all(examples.total)
        if not 0 < start < math.inf:
            return {}
        before = _of_all(examples.judged)
        rate = _RATE * math.sqrt(min(1.0, start / whole)) if whole > 0 else _RATE
        rates = {name: rate * size for name, size in sizes.items()}
        given = {name: parameter.detach().double() for name, parameter in used.items()}
        _descend(used, rates, examples, passes, start)
        learned = {name: used[name].detach().double() - value for name, value in given.items()}
        judged: dict[float, float] = {}
        for share in _SHARES:
            for name, parameter in used.items():
                parameter.data.copy_(given[name] + share * learned[name])
            judged[share] = _of_all(examples.judged)
    finally:
        for name, layer in layers.items():
            layer._parameters.update(own[name])
    better = {share: loss for share, loss in judged.items() if loss < before}
    if not better:
        return {}
    best = min(better, key=better.__getitem__)
    return {
        name: {key: best * learned[f"{name}.{key}"] for key in held if f"{name}.{key}" in learned}
        for name, held in own.items()
    }


def _descend(
    used: dict[str, nn.Parameter],
    rates: dict[str, float],
    examples: Tokens | Batches,
    passes: int,
    start: float,
) -> None:
    """Take the steps; of parameters of lower precision a copy in float32 takes them."""
    trained = {n: p if p.dtype.itemsize >= 4 else p.detach().float() for n, p in used.items()}
    groups = [{"params": [trained[name]], "lr": rates[name]} for name in used]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    counts = of_each("the steps of a refinement", examples.steps)
    turns = max(counts) if isinstance(counts, list) else counts
    steps = passes * turns
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2
    )
    for step in range(steps):
        gradients: dict[str, Tensor] = {}
        with torch.enable_grad():
            loss = examples.loss(step % turns, turns)
            if loss is not None:
                parameters = list(used.values())
                found = torch.autograd.grad(loss / start, parameters, allow_unused=True)
                gradients = {n: g for n, g in zip(used, found, strict=True) if g is not None}
        gradients = add_up_named("the gradients of a refinement", gradients)
        for name, gradient in gradients.items():
            trained[name].grad = gradient.to(trained[name])
        optimizer.step()
        schedule.step()
        for name, parameter in used.items():
            parameter.data.copy_(trained[name])


@torch.no_grad()
def _of_all(loss: Callable[[], float]) -> float:
    """The sum of a loss of all ranks."""
    found = of_each("the loss of a refinement", loss())
    return math.fsum(found) if isinstance(found, list) else found
