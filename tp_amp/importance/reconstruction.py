"""Keep the neurons that the others can be rebuilt from: Gram-Schmidt on activations."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_amp.algebra.falling_gains import falling_gains
from tp_amp.algebra.held_out import foreseen_errors
from tp_amp.algebra.pivoting import gain_pivots
from tp_amp.importance.error_objective import ErrorObjective, error_objective, readable
from tp_amp.importance.hidden_moments import hidden_moments, in_turns, narrowing_layers
from tp_amp.importance.objectives import Objective
from tp_amp.importance.sensitivity import output_sensitivity
from tp_amp.running.arguments import check_flags, check_names
from tp_amp.running.batches import check_batches
from tp_amp.running.checks import check_model
from tp_amp.running.fingerprints import Fingerprint
from tp_amp.structure.groups import group_layers, keeps_ties

logger = logging.getLogger(__name__)


def reconstruction_order(covariance: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Order neurons so that each next one removes most of the output error that is left.

    `y = W h` with covariance `C` of `h`. With the kept set `S`, the best affine reconstruction of
    the rest leaves the error `tr(W R W^T)`, `R = C - C_:S C_SS^-1 C_S:`. Taking neuron `j` as well
    lowers it by `|W R_:j|^2 / R_jj`. That is a Cholesky factorisation of `C` whose pivot is the
    neuron with the largest gain, made in panels of 64 pivots. Of gains that agree to twelve digits
    the lower index comes first. Beside its arguments it takes about three matrices of `C`'s size.

    Args:
        covariance: of the hidden activation, `(hidden, hidden)`.
        weight: of the layer that reads it, `(outputs, hidden)`.

    Returns:
        The neurons, the best first, `(hidden,)`; those that add nothing last, by index. And the
        mean squared error of the output with the first 0, 1, ... kept, `(hidden + 1,)`.

    Example:
        >>> import torch, tp_amp
        >>> covariance = torch.diag(torch.tensor([1.0, 4.0]))
        >>> order, errors = tp_amp.reconstruction_order(covariance, torch.eye(2))
        >>> order.tolist(), errors.tolist()
        ([1, 0], [5.0, 1.0, 0.0])
    """
    covariance, weight = covariance.double(), weight.to(covariance.device).double()
    product = covariance @ weight.T
    error = (product * weight.T).sum()
    first, gains = gain_pivots(covariance, product)
    rest = torch.ones(len(covariance), dtype=torch.bool, device=first.device)
    rest[first] = False
    falls = gains.new_zeros(len(covariance) + 1)
    falls[0], falls[1 : len(gains) + 1] = error, -gains
    # A sum that is made in parallel may rise by rounding.
    errors = falls.cumsum(0).cummin(0).values.clamp_min(0)
    return torch.cat([first, rest.nonzero().flatten()]).cpu(), errors


class ReconstructionImportance(tp.importance.Importance):  # type: ignore[misc]
    """Score an MLP's neurons by how much of its output the others can't rebuild; no labels.

    The companion of `compensation="affine"`: greedily keeps the neurons that leave the smallest
    error once the rest is rebuilt from them. An error counts by what it costs the model's
    predictions (`output_sensitivity`), so errors of different layers are in the same unit, nats
    for each image. The score is the loss that a channel takes away when those picked before it are
    kept (`falling_gains`), so that the global ranking of `tp.pruner.MetaPruner` cuts where least is
    foreseen to be lost; within a layer the first pick is highest. Made for MLPs and attention
    projections; for groups that no collected layer reads it gives None.

    Args:
        objective: what the model is for, as for `EntropyTaylorImportance`; `"reconstruction"` or
            None: all errors of an output count the same, and no gradient is taken. So it is where
            `"auto"` finds neither classes nor features, which is logged.
        temperature: of the similarity softmax.
        data: an iterable of batches. With it, activations are collected on the first group asked
            about, and a layer's again when its weight has changed since. A copy of the model, or
            one loaded again with the same weights, is known.
        activation_checkpointing: as for `EntropyTaylorImportance`.

    Attributes:
        orders: module path of each layer -> its input channels, the best first `(in,)`.
        errors: module path -> what is lost (nats, or the mean squared output error where
            `objective` is None) with the first 0, 1, ... channels kept, `(in + 1,)`; of layers that
            saw fewer than ten tokens for each channel, as foreseen for other images.

    Raises:
        TypeError: `data` can't be iterated.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> images = torch.randn(4, 3, 224, 224)
        >>> importance = tp_amp.ReconstructionImportance().collect(
        ...     model, [images], layers=["blocks.0.mlp.fc2"], progress=False
        ... )
        >>> errors = importance.errors["blocks.0.mlp.fc2"]
        >>> bool(errors[384] < 0.5 * errors[0])
        True
    """

    def __init__(
        self,
        objective: ErrorObjective = "auto",
        temperature: float = 1 / 15,
        data: Iterable[Any] | None = None,
        *,
        activation_checkpointing: bool = False,
    ) -> None:
        check_flags(activation_checkpointing=activation_checkpointing)
        if data is not None:
            check_batches(data, repeatable=True)
        self.objective = error_objective(objective, temperature)
        self.data = data
        self._recompute = activation_checkpointing
        self.orders: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}
        self._seen: dict[str, Fingerprint] = {}

    @torch.no_grad()
    def collect(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        progress: bool = True,
        layers: Collection[str] | None = None,
    ) -> ReconstructionImportance:
        """Run the model over unlabelled images and order the inputs of its layers.

        Args:
            model: left as it was.
            batches: as for `EntropyTaylorImportance.collect`; read once, or several times where
                the covariances of all layers would take more than a gigabyte.
            layers: module paths of Linears or 1x1 convolutions; by default all Linears that have
                more inputs than outputs, which the `down` layers of MLPs are.
            progress: show a progress bar on a terminal.

        Raises:
            ValueError: a layer is none of these, or is never called, or weights are not finite, or
                the model has no blocks one after another for `activation_checkpointing`.
            TypeError: `batches` can't be iterated, or not again where that is needed.
        """
        check_model(model, values=True)
        check_batches(batches)
        if layers is not None:
            check_names(layers)
        named = dict(model.named_modules())
        chosen = layers is None
        if layers is None:
            layers = narrowing_layers(model, batches)
        wrong = [n for n in layers if not _is_projection(named.get(n))]
        if wrong:
            raise ValueError(f"{wrong} are no Linears or 1x1 convolutions of the model")
        parts = in_turns([(name, _inputs(named[name])) for name in layers])
        check_batches(batches, repeatable=len(parts) > 1 or self.objective is not None)
        objective = readable(self.objective, model, batches)
        for part in parts:
            moments = hidden_moments(model, part, batches, progress=progress)
            roots = self._roots(objective, model, part, batches, chosen, progress)
            for name in part if objective is None else roots:
                weight: Any = named[name].weight
                seen = weight.flatten(1).double()
                seen = roots[name] @ seen if name in roots else seen
                order, errors = reconstruction_order(moments[name].whole.inputs, seen)
                errors = foreseen_errors(errors, order, moments[name], seen)
                self.orders[name] = order
                self.errors[name] = (errors / 2 if name in roots else errors).cpu()
                self._seen[name] = Fingerprint([weight])
        return self

    def _roots(
        self,
        objective: Objective | None,
        model: nn.Module,
        layers: list[str],
        batches: Iterable[Any],
        skip_unused: bool,
        progress: bool,
    ) -> dict[str, Tensor]:
        """Square roots of the sensitivities, so that |root @ error|^2 counts in nats."""
        if objective is None:
            return {}
        found = output_sensitivity(
            model,
            layers,
            batches,
            objective,
            skip_unused=skip_unused,
            activation_checkpointing=self._recompute,
            progress=progress,
        )
        roots = {}
        for name, matrix in found.items():
            values, vectors = torch.linalg.eigh(matrix)
            roots[name] = (vectors * values.clamp_min(0).sqrt()).T
        return roots

    def knows(self, name: str, layer: nn.Module) -> bool:
        """Whether a layer was collected with the weight that it has now, be it in another copy."""
        weight: Any = layer.weight
        return name in self._seen and self._seen[name].fits([weight])

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Score the root channels of a group, `(root channels,)`; None where no layer is known."""
        if not keeps_ties(group):
            return None
        for layer in group_layers(group):
            if layer.side != "in" or not _is_projection(layer.module):
                continue
            weight: Any = layer.module.weight
            if not self.knows(layer.name, layer.module) and self.data is not None:
                # All at once the first time; then only what has changed.
                layers = None if not self.orders else [layer.name]
                self.collect(group._DG.model, self.data, layers=layers, progress=False)
                if layer.name not in self.orders:
                    self.collect(group._DG.model, self.data, layers=[layer.name], progress=False)
            if layer.name in self.orders:
                return self._gains(layer, weight.shape[1], len(group[0].idxs))
        logger.warning(
            "no layer that reads the group of %s was collected", group[0].dep.target.name
        )
        return None

    def _gains(self, layer: Any, width: int, roots: int) -> Tensor:
        order = self.orders[layer.name]
        if len(order) != width:
            raise ValueError(
                f"{layer.name} has {width} input channels and {len(order)} scores; collect again "
                "after pruning, or pass data= so that this happens by itself"
            )
        gains = torch.empty(width, dtype=torch.float64)
        gains[order] = falling_gains(self.errors[layer.name])
        scores = torch.zeros(roots, dtype=torch.float64)
        index = torch.tensor(layer.root_indices)
        return scores.scatter_add_(0, index, gains[torch.tensor(layer.indices)])


def _is_projection(module: Any) -> bool:
    """Whether each output is a sum over all input channels at one place."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and set(module.kernel_size) == set(module.stride) == {1}
    return isinstance(module, nn.Linear)


def _inputs(module: Any) -> int:
    return int(module.weight.shape[1])
