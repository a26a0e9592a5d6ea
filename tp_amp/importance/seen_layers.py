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
from tp_amp.importance.sensitivity import Sensitivity, sensitivity

# Matrices of all layers at once may take that many bytes; more are collected in turns.
_BYTES = 2**30


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


def in_turns(
    model: nn.Module, layers: Collection[str], products: Mapping[str, slice] = MappingProxyType({})
) -> list[list[str]]:
    """Layers whose matrices fit into the memory together."""
    parts: list[list[str]] = []
    used = 0
    for name in dict.fromkeys([*layers, *products]):
        weight: Any = model.get_submodule(name).weight
        size = 2 * 8 * max(weight.shape[:2]) ** 2  # of both halves, or of the outputs
        if not parts or used + size > _BYTES:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


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
        batches: read twice for each part of `in_turns`, once without an objective.
        objective: what the model is for; None: all errors of an output count the same.
        products: of `Sensitivity.products`, which are given as they are; not without an objective.
        optional: those of the layers that are left out if the objective does not depend on them.
        activation_checkpointing: as for `EntropyTaylorImportance`.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: a layer is never called, or as `sensitivity`.
    """
    for part in in_turns(model, layers, products):
        read = [name for name in part if name in layers]
        moments = hidden_moments(model, read, batches, progress=progress) if read else {}
        costs = Sensitivity({}, {})
        if objective is not None:
            costs = sensitivity(
                model,
                batches,
                objective,
                outputs=read,
                products={name: products[name] for name in part if name in products},
                optional=optional,
                activation_checkpointing=activation_checkpointing,
                progress=progress,
            )
        yield from costs.products.items()
        for name in read if objective is None else costs.outputs:
            weight: Any = model.get_submodule(name).weight
            seen = weight.detach().flatten(1).double()
            if objective is not None:
                seen = _root(costs.outputs[name]) @ seen
            yield name, SeenLayer(moments[name], seen, 1.0 if objective is None else 0.5)


def _root(sensitivity: Tensor) -> Tensor:
    """The matrix with which `|root @ error|^2 / 2` is what an error costs, `(outputs, outputs)`."""
    values, vectors = torch.linalg.eigh(sensitivity)
    found: Tensor = vectors * values.clamp_min(0).sqrt()
    return found.T
