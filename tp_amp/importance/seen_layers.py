"""What layers read and what errors at their outputs cost, in as few passes as memory allows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.algebra.held_out import foreseen_errors
from tp_amp.algebra.moments import Halves
from tp_amp.importance.hidden_moments import hidden_moments
from tp_amp.importance.objectives import Objective
from tp_amp.importance.sensitivity import sensitivity

# What layers read may take that many bytes at once, and what their errors cost as many; more is
# collected in turns.
_BYTES = 2**31


@dataclass(frozen=True)
class SeenLayer:
    """A Linear or 1x1 convolution, and what it read.

    Attributes:
        moments: of its inputs.
        weight: `(outputs, inputs)` in float64; with an objective, its outputs are turned so that
            squared errors of them count twice the nats that they cost.
        share: of a squared error that counts: a half with an objective, else all.
    """

    moments: Halves
    weight: Tensor
    share: float

    @property
    def covariance(self) -> Tensor:
        """Of its inputs, `(inputs, inputs)`."""
        return self.moments.whole.inputs

    def foreseen(self, errors: Tensor, order: Tensor) -> Tensor:
        """What is lost on other images, from squared errors on these, `(inputs + 1,)`."""
        return self.share * foreseen_errors(errors, order, self.moments, self.weight).cpu()


def in_turns(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in parts whose bytes fit into the memory together."""
    parts: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not parts or used + size > _BYTES:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def moment_bytes(model: nn.Module, layers: Collection[str]) -> dict[str, int]:
    """What the moments of the inputs of some layers take, for both halves of the images."""
    return {name: 2 * 8 * _sizes(model, name)[1] ** 2 for name in layers}


def cost_bytes(
    model: nn.Module, layers: Collection[str], products: Mapping[str, slice]
) -> dict[str, int]:
    """What the sensitivities take; a layer may be in both."""
    names = dict.fromkeys([*layers, *products])
    return {
        name: 8 * _sizes(model, name)[0] ** 2 * ((name in layers) + (name in products))
        for name in names
    }


def _sizes(model: nn.Module, name: str) -> tuple[int, int]:
    weight: Any = model.get_submodule(name).weight
    return weight.shape[0], weight.shape[1]


def seen_layers(
    model: nn.Module,
    layers: Collection[str],
    batches: Iterable[Any],
    objective: Objective | None,
    *,
    products: Mapping[str, slice] = MappingProxyType({}),
    optional: Collection[str] = (),
    activation_checkpointing: bool = False,
    progress: bool = False,
) -> Iterator[tuple[str, SeenLayer | Tensor]]:
    """Run a model over unlabelled images; give one layer after the other.

    Args:
        model: left as it was.
        layers: module paths of Linears or 1x1 convolutions.
        batches: read once for what errors cost, and once for what layers read, or for each part
            of these that fits into the memory.
        objective: what the model is for; None: all errors of an output count the same.
        products: of `Sensitivity.products`, which are given as they are; not without an objective.
        optional: those of the layers that are left out if the objective does not depend on them.
        activation_checkpointing: as for `EntropyTaylorImportance`.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: a layer is never called, or as `sensitivity`.
    """
    if objective is None:
        yield from _each(model, layers, batches, None, progress)
        return
    # What errors cost is small beside what layers read, and a backward pass takes longest.
    for part in in_turns(cost_bytes(model, layers, products)):
        costs = sensitivity(
            model,
            batches,
            objective,
            outputs=[name for name in part if name in layers],
            products={name: products[name] for name in part if name in products},
            optional=optional,
            activation_checkpointing=activation_checkpointing,
            progress=progress,
        )
        yield from costs.products.items()
        yield from _each(model, list(costs.outputs), batches, costs.outputs, progress)


def _each(
    model: nn.Module,
    layers: Collection[str],
    batches: Iterable[Any],
    costs: dict[str, Tensor] | None,
    progress: bool,
) -> Iterator[tuple[str, SeenLayer]]:
    """One layer after the other; what its errors cost is taken out."""
    for part in in_turns(moment_bytes(model, layers)):
        moments = hidden_moments(model, part, batches, progress=progress)
        for name in part:
            weight: Any = model.get_submodule(name).weight
            seen = weight.detach().flatten(1).double()
            if costs is not None:
                seen = _root(costs.pop(name)) @ seen
            yield name, SeenLayer(moments.pop(name), seen, 1.0 if costs is None else 0.5)


def _root(sensitivity: Tensor) -> Tensor:
    """The matrix with which `|root @ error|^2 / 2` is what an error costs, `(outputs, outputs)`."""
    values, vectors = torch.linalg.eigh(sensitivity)
    found: Tensor = vectors * values.clamp_min(0).sqrt()
    return found.T
