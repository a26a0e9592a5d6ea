"""The label-free entropy-Taylor importance of AMP, as a Torch-Pruning importance."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_amp.importance.objectives import Objective
from tp_amp.importance.recomputing import recomputed
from tp_amp.importance.recording import Recorder
from tp_amp.running.arguments import check_flags
from tp_amp.running.batches import check_batches, stream
from tp_amp.running.checkpoint import Checkpoint, describe, first_digest, model_digest
from tp_amp.running.checks import check_model
from tp_amp.running.distributed import check_same_weights, in_turns, together, warn_of_same_images
from tp_amp.running.fingerprints import Fingerprint
from tp_amp.running.inputs import Inputs
from tp_amp.running.timing import BatchWatch
from tp_amp.structure.groups import GroupLayer, group_layers, keeps_ties, sum_in_channels
from tp_amp.structure.observing import observing

logger = logging.getLogger(__name__)


class EntropyTaylorImportance(tp.importance.TaylorImportance):  # type: ignore[misc]
    """Score channels by activation times gradient of a label-free entropy (AMP, arXiv 2603.08100).

    For each layer, h is its input, `(images, tokens, hidden)`. The score of neuron j is the mean
    over images of `|sum over tokens of h_j * dE/dh_j|`, with all parameters frozen: the gradient
    flows through activations alone. For an MLP, h is the input of `down`. For any other group
    (attention, embedding) the scores of the group's in-channel layers are summed.

    Without collected scores it falls back on the gradients that the script's own backward pass
    left: `|sum of w * dw|` over each input channel's weights, which equals
    `|sum over images and tokens of h * dE/dh|`.

    Args:
        objective: `"prediction"` (entropy of the predicted classes), `"similarity"` (entropy of an
            image's similarities to its batch), `"auto"` (prediction where the model ends in a
            classifier, else similarity; logged), or a callable that takes the model's output and
            returns a scalar tensor.
        temperature: of the similarity softmax; the paper uses 1/15 and 1/20.
        data: an iterable of batches. With it, scores are collected on the first group asked about,
            and again when the model's weights have changed since.
        activation_checkpointing: keep the activations of one block at a time, and run each block
            again in the backward pass: for models too deep for the memory, with the same scores
            for one more forward pass, about half more time.
        normalizer: any of Torch-Pruning's (`"mean"`, `"lamp"`, ...); by default none, since all
            scores are in the same unit, nats of the same entropy.

    Attributes:
        scores: module path of each Linear or convolution -> score of each of its input channels
            `(in,)` in float32; an MLP's scores stand under its `down`.

    Raises:
        ValueError: `objective` or `temperature` is not valid.
        TypeError: `data` can't be iterated.

    Example:
        >>> import timm, torch, torch_pruning as tp, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> images = torch.randn(4, 3, 224, 224)
        >>> importance = tp_amp.EntropyTaylorImportance().collect(model, images.split(2))
        >>> importance.scores["blocks.0.mlp.fc2"].shape
        torch.Size([768])
    """

    def __init__(
        self,
        objective: str | Callable[[Any], Tensor] = "auto",
        temperature: float = 1 / 15,
        data: Iterable[Any] | None = None,
        *,
        activation_checkpointing: bool = False,
        normalizer: str | Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(group_reduction="sum", normalizer=normalizer)
        self.objective = Objective(objective, temperature)
        self._resolved = self.objective
        check_flags(activation_checkpointing=activation_checkpointing)
        if data is not None:
            check_batches(data)
        self.data = data
        # Private: scores are the same with and without, so a checkpoint goes on with either.
        self._recompute = activation_checkpointing
        self.scores: dict[str, Tensor] = {}
        self._fingerprint = Fingerprint([])
        self._layers: Collection[str] | None = ()
        self._own_loss = False
        self._told_loss = False

    def collect(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        layers: Collection[str] | None = None,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> EntropyTaylorImportance:
        """Score every layer's input channels on unlabelled images, one batch at a time.

        No parameter gradient is computed, only one batch's activations are kept, and the model is
        left as it was: flags, gradients, hooks and random state.

        Under an initialised `torch.distributed` process group all ranks call it, each with its own
        batches, as many and as large as it has. The n-th batches of all ranks count as one batch,
        and all ranks get the same scores.

        Args:
            model: the model; it decides device and dtype of the images.
            batches: yields tensors `(images, ...)`, tuples `(images, labels)` or dicts; labels are
                ignored.
            layers: module paths of the layers to score the inputs of; all Linears and
                convolutions by default. The `down` layers of the MLPs alone cost less time.
            progress: show a progress bar on a terminal.
            checkpoint: a folder where the sums are written after every batch. Killed at any
                moment and called again with the same arguments, it goes on after the last batch
                that was done, with the same scores at the end; the batches must come in the same
                order. The folder may be deleted afterwards.

        Returns:
            Itself, with `scores` filled.

        Raises:
            TypeError: a batch, or the model's output, is of an unexpected type.
            ValueError: `layers` names what is no Linear or convolution, no batch, a batch of one
                for `similarity`, images that the model fails on, NaN in weights or scores, the
                checkpoint is of another model, other images or arguments, which are named, or
                the model has no blocks one after another for `activation_checkpointing`.
            RuntimeError: another rank failed, with its message, or is gone.
        """
        with together("scoring"):
            self._collect(model, batches, layers, progress, checkpoint)
        return self

    def _collect(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layers: Collection[str] | None,
        progress: bool,
        checkpoint: str | os.PathLike[str] | None,
    ) -> None:
        check_model(model, values=True)
        check_same_weights(model)
        recorder = Recorder(model, layers)
        objective = self.objective
        device = next(model.parameters(), torch.empty(0)).device
        with observing(model, gradients=True), ExitStack() as stack:
            saved: Checkpoint | None = None
            done = 0
            all_batches = stream(batches, model, description="scoring", progress=progress)
            turns = recomputed(in_turns(all_batches), model, stack, wanted=self._recompute)
            for index, turn in enumerate(turns):
                if turn.inputs is not None:
                    objective = objective.resolve(model, turn.inputs)
                if index == 0:
                    warn_of_same_images(turn.inputs)
                if checkpoint is not None and saved is None:
                    saved = self._checkpoint(Path(checkpoint), model, turn.inputs, layers)
                    done = recorder.resume(saved, device)
                if index < done:
                    continue
                if index == done:
                    left = len(batches) - done if isinstance(batches, Sized) else None
                    watch = BatchWatch("scoring", left, device, recorder.size)
                with watch.batch():
                    recorder.run(model, turn, objective)
                if saved is not None:
                    facts = {"images": recorder.seen, "batches": index + 1}
                    saved.write(recorder.whole(), facts)
            if recorder.seen and index >= done:
                watch.end()
        scores = recorder.means()
        self.scores, self._layers = scores, layers
        self._resolved, self._fingerprint = objective, Fingerprint(_tensors(model))

    def _checkpoint(
        self, folder: Path, model: nn.Module, first: Inputs | None, layers: Collection[str] | None
    ) -> Checkpoint:
        identity = {
            "model": model_digest(model),
            "objective": describe(self.objective),
            "layers": None if layers is None else sorted(layers),
            "first batch": first_digest(first.tensors() if first else ()),
        }
        return Checkpoint(folder / "scores.safetensors", identity)

    def refresh(
        self,
        model: nn.Module,
        layers: Collection[str] | None = None,
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        """Collect from `data`, unless scores of these layers with these weights are there.

        Args:
            model: the model.
            layers: as for `collect`.
            progress: show a progress bar on a terminal.
            checkpoint: as for `collect`.
        """
        if self.data is None:
            return
        missing = self._layers is not None and not set(layers or ("",)) <= set(self._layers)
        if missing or not self._fingerprint.fits(_tensors(model)):
            self.collect(model, self.data, layers=layers, progress=progress, checkpoint=checkpoint)

    def loss(self, output: Any) -> Tensor:
        """The entropy (nats) of a model's output, for scripts that call `backward` themselves.

        Args:
            output: logits `(images, classes)` for `prediction` (and for `auto`), features
                `(images, features)` for `similarity`, or whatever the callable takes.

        Raises:
            TypeError: the output is of another type or shape.
        """
        self._own_loss = True
        return self._resolved.of_output(output)

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Score the root channels of a group `(channels,)`; high means keep.

        Returns:
            None, with a logged reason, for a group that has no scored layer.

        Raises:
            ValueError: neither scores nor gradients are there, scores are of another width than
                the layer (it was pruned since), or a score is not finite.
        """
        if not keeps_ties(group):
            return None
        model = group._DG.model
        readers = {layer.name for layer in group_layers(group) if layer.side == "in"}
        if self._layers and readers and readers <= set(self._layers):
            self.refresh(model, self._layers)  # scores of other layers were never asked for
        else:
            self.refresh(model)
        if self.scores:
            total, scored = sum_in_channels(group, self._collected)
        else:
            self._check_gradients(model)
            total, scored = sum_in_channels(group, _weight_times_gradient)
        root = group._DG._module2name[group[0].dep.target.module]
        if total is None:
            logger.warning("no score for the group of %s: none of its readers was called", root)
            return None
        if not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"the scores of {scored} are not finite; check the gradients and the images"
            )
        scores: Tensor = self._normalize(total, self.normalizer)
        return scores

    def _collected(self, layer: GroupLayer) -> Tensor | None:
        scores = self.scores.get(layer.name)
        width = getattr(layer.module, "in_features", None) or getattr(
            layer.module, "in_channels", 0
        )
        if scores is not None and len(scores) != width:
            raise ValueError(
                f"{layer.name} has {width} input channels and {len(scores)} scores; collect again "
                "after pruning, or pass data= so that this happens by itself"
            )
        return scores

    def _check_gradients(self, model: nn.Module) -> None:
        if all(parameter.grad is None for parameter in model.parameters()):
            raise ValueError(
                "EntropyTaylorImportance has neither scores nor gradients; call "
                "importance.collect(model, batches), pass data=, or call "
                "importance.loss(model(images)).backward() before pruning"
            )
        if not self._own_loss and not self._told_loss:
            logger.warning(
                "no collected scores: the gradients of the script's own loss are used; for the "
                "label-free entropy pass data= or call importance.loss(output).backward()"
            )
            self._told_loss = True


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _weight_times_gradient(layer: GroupLayer) -> Tensor | None:
    """|sum of w * dw| over the weights of each input channel, `(in,)`."""
    weight, gradient = layer.module.weight, layer.module.weight.grad
    if not isinstance(weight, Tensor) or not isinstance(gradient, Tensor):
        return None
    product = weight.detach().float() * gradient.float()
    if product.dim() > 2:
        product = product.flatten(2).sum(-1)
    if getattr(layer.module, "transposed", False):
        return product.sum(1).abs()
    groups = int(getattr(layer.module, "groups", 1))
    per_group: Tensor = product.reshape(groups, -1, product.shape[1]).sum(1).flatten().abs()
    return per_group
