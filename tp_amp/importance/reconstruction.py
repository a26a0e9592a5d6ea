"""Keep the neurons that the others can be rebuilt from: Gram-Schmidt on activations."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_amp.algebra.falling_gains import falling_gains
from tp_amp.algebra.pivoting import reconstruction_order
from tp_amp.importance.error_objective import ErrorObjective, error_objective, readable
from tp_amp.importance.hidden_moments import narrowing_layers
from tp_amp.importance.other_widths.attention_errors import Foreseen
from tp_amp.importance.other_widths.other_errors import Gathering, OtherErrors
from tp_amp.importance.seen_layers import SeenLayer, in_turns, moment_bytes, seen_layers
from tp_amp.running.arguments import check_flags, check_names
from tp_amp.running.batches import check_batches
from tp_amp.running.checks import check_model
from tp_amp.running.fingerprints import Fingerprint
from tp_amp.structure.groups import group_layers, keeps_ties
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import Site

logger = logging.getLogger(__name__)


class ReconstructionImportance(tp.importance.Importance):  # type: ignore[misc]
    """Score an MLP's neurons by how much of its output the others can't rebuild; no labels.

    The companion of `compensation="affine"`: greedily keeps the neurons that leave the smallest
    error once the rest is rebuilt from them. An error counts by what it costs the model's
    predictions (`Sensitivity.outputs`), so errors of different layers are in the same unit, nats
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
        self._others = OtherErrors()

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
                the covariances of all layers would take more than two gigabytes.
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
        optional = [] if layers is not None else narrowing_layers(model, batches)
        layers = optional if layers is None else list(layers)
        wrong = [n for n in layers if not _is_projection(named.get(n))]
        if wrong:
            raise ValueError(f"{wrong} are no Linears or 1x1 convolutions of the model")
        several = len(in_turns(moment_bytes(model, layers))) > 1 or self.objective is not None
        check_batches(batches, repeatable=several)
        self._collect(model, layers, batches, Gathering([]), optional, progress)
        return self

    def _collect(
        self,
        model: nn.Module,
        layers: Collection[str],
        batches: Iterable[Any],
        others: Gathering,
        optional: Collection[str],
        progress: bool,
    ) -> None:
        """Order the inputs of some layers; let others be gathered in the same passes."""
        objective = readable(self.objective, model, batches)
        if others.products and objective is None:
            raise ValueError(
                f"what queries and keys lose ({next(iter(others.products))}) is told by gradients "
                'alone; pass ReconstructionImportance(objective=...), or leave "qk" out of the '
                "widths"
            )
        for name, seen in seen_layers(
            model,
            dict.fromkeys([*layers, *others.layers]),
            batches,
            objective,
            products=others.products,
            optional=[*optional, *others.optional],
            activation_checkpointing=self._recompute,
            progress=progress,
        ):
            if isinstance(seen, SeenLayer) and name in layers:
                order, errors = reconstruction_order(seen.covariance, seen.weight)
                weight: Any = model.get_submodule(name).weight
                self.orders[name], self.errors[name] = order, seen.foreseen(errors, order)
                self._seen[name] = Fingerprint([weight])
            others.take(name, seen)

    def knows(self, name: str, layer: nn.Module) -> bool:
        """Whether a layer was collected with the weight that it has now, be it in another copy."""
        weight: Any = layer.weight
        return name in self._seen and self._seen[name].fits([weight])

    @torch.no_grad()
    def foreseen(
        self, model: nn.Module, sites: Sequence[Site], *, progress: bool = False
    ) -> dict[str, Foreseen]:
        """What each width of MLPs, of attentions and of residual streams is foreseen to lose.

        What was not seen with the present weights is collected on `data`, all in the same passes.

        Args:
            model: left as it was.
            sites: all of different `down`.
            progress: show a progress bar on a terminal.

        Returns:
            `down` -> order and errors.

        Raises:
            ValueError: something was not seen and there is no `data`, or as `collect`.
        """
        others = [site for site in sites if not isinstance(site, MLP)]
        mlps = [site.down for site in sites if isinstance(site, MLP)]
        layers = [name for name in mlps if not self.knows(name, model.get_submodule(name))]
        missing = self._others.missing(model, others)
        unseen = [*layers, *(site.down for site in missing)]
        if unseen and self.data is None:
            collect = "call importance.collect(model, batches, layers=...) or " if layers else ""
            raise ValueError(
                f"the importance has not seen {unseen}, or not with these weights; {collect}pass "
                "data="
            )
        if unseen and self.data is not None:
            gathering = Gathering(missing)
            self._collect(model, layers, self.data, gathering, (), progress)
            for site, found in gathering.found().items():
                self._others[site] = model, found
        known = {name: Foreseen(self.orders[name], self.errors[name]) for name in mlps}
        return known | {site.down: self._others[site] for site in others}

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
