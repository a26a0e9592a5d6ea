"""Make any importance, ours or Torch-Pruning's, ready to score a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_amp.importance.entropy_taylor import EntropyTaylorImportance
from tp_amp.importance.outputs.logits import read_logits
from tp_amp.importance.reconstruction import ReconstructionImportance
from tp_amp.running.batches import bar, stream
from tp_amp.running.inputs import labels_of, prepare
from tp_amp.running.restoring import evaluating
from tp_amp.structure.observing import observing


def make_ready(
    importance: Any,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Iterable[str] | None = None,
    progress: bool = True,
) -> Any:
    """Give an importance what it needs to score: activations, gradients or nothing.

    Torch-Pruning's Taylor and Hessian read the parameters' gradients of a cross entropy, which are
    left in `.grad`, and its Activation an attribute of the modules; everything else is left as it
    was. What was collected before, or has `data`, is taken as it is.

    Args:
        importance: any of tp_amp's or Torch-Pruning's.
        model: the dense model.
        batches: images in batches, with labels where the importance needs them.
        layers: module paths of the `down` layers to be scored; all layers by default.
        progress: show a progress bar on a terminal.

    Returns:
        The importance.

    Raises:
        ValueError: the importance needs labels and there are none, or can't be made ready here.
    """
    if isinstance(importance, (EntropyTaylorImportance, ReconstructionImportance)):
        known = importance.scores if hasattr(importance, "scores") else importance.orders
        if importance.data is None and not known:
            chosen = None if layers is None else list(layers)
            importance.collect(model, batches, layers=chosen, progress=progress)
    elif isinstance(importance, tp.importance.GroupHessianImportance):
        importance.zero_grad()
        _each_image(importance, model, batches, progress)
    elif isinstance(importance, tp.importance.GroupTaylorImportance):
        model.zero_grad()
        for batch in bar(batches, description="gradients", progress=progress):
            _add_gradients(importance, model, batch)
    elif isinstance(importance, tp.pruner.importance.ActivationImportance):
        _activations(importance, model, batches, progress)
    elif isinstance(importance, tp.importance.BNScaleImportance):
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        if not any(norm.affine for norm in norms):
            raise ValueError(
                f"BNScaleImportance reads the scales of batch norms, and {type(model).__name__} "
                "has none; take another importance"
            )
    elif isinstance(importance, tp.importance.OBDCImportance):
        raise ValueError(
            "OBDCImportance needs hooks of its own and a pruner while gradients are computed; "
            "follow Torch-Pruning's example for it"
        )
    return importance


def _each_image(importance: Any, model: nn.Module, batches: Iterable[Any], progress: bool) -> None:
    for batch in bar(batches, description="gradients of each image", progress=progress):
        for i in range(prepare(batch, model).images):
            model.zero_grad()
            _add_gradients(importance, model, _image(batch, i))
            importance.accumulate_grad(model)


def _add_gradients(importance: Any, model: nn.Module, batch: Any) -> None:
    """Add up the parameters' gradients of a cross entropy, as Torch-Pruning's examples do."""
    labels = labels_of(batch)
    if labels is None:
        raise ValueError(
            f"{type(importance).__name__} needs labels and the batches have none; pass batches "
            "(images, labels), or take an importance that needs none"
        )
    inputs = prepare(batch, model)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model, trainable=True):
        output = read_logits(inputs.call(model))
        if int(labels.max()) >= output.shape[1] or int(labels.min()) < 0:
            raise ValueError(
                f"labels lie between {int(labels.min())} and {int(labels.max())}, the model has "
                f"{output.shape[1]} classes; pass the labels that the model was trained on"
            )
        loss = nn.functional.cross_entropy(output, labels.to(output.device))
        loss.backward()  # type: ignore[no-untyped-call]


def _activations(importance: Any, model: nn.Module, batches: Iterable[Any], progress: bool) -> None:
    """Torch-Pruning keeps what the last forward pass gave; here it is the sum over all batches."""
    sums: dict[nn.Module, Tensor] = {}
    with observing(model, gradients=False), importance.compute_importance(model):
        for inputs in stream(batches, model, description="activations", progress=progress):
            inputs.call(model)
            for module in model.modules():
                found = module.__dict__.pop("_importance", None)
                if found is not None:
                    sums[module] = sums[module] + found if module in sums else found
    for module, total in sums.items():
        module._importance = total


def _image(batch: Any, index: int) -> Any:
    """One image of a batch, as a batch."""

    def part(value: Any) -> Any:
        return value[index : index + 1] if isinstance(value, Tensor) and value.dim() else value

    if isinstance(batch, Mapping):
        return {key: part(value) for key, value in batch.items()}
    return tuple(part(value) for value in batch) if isinstance(batch, (tuple, list)) else batch


def forget(model: nn.Module) -> None:
    """Drop what `make_ready` left on a model."""
    model.zero_grad(set_to_none=True)
    for module in model.modules():
        module.__dict__.pop("_importance", None)
