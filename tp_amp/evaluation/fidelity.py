"""How much of a model is left after a cut: its accuracy, or its agreement with the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.importance.outputs.features import pooled_features
from tp_amp.importance.outputs.logits import ends_in_classifier, read_logits
from tp_amp.running.inputs import Inputs, prepare
from tp_amp.running.watching import all_tensors
from tp_amp.structure.observing import observing

Metric = Callable[[nn.Module], float]
Reader = Callable[[nn.Module, Inputs], Tensor]

ACCURACY, AGREEMENT = "accuracy", "cosine to the dense model"


def default_metric(model: nn.Module, batches: Iterable[Any]) -> tuple[str, Metric]:
    """Choose what a pruned model is judged by, from 0 to 1, more is better.

    Where the model ends in a classifier and every batch has labels: accuracy. Elsewhere: the mean
    over images of the cosine similarity between the outputs of the pruned and of the dense model,
    as `output_reader` reads them.

    Args:
        model: the dense model, whose outputs are kept.
        batches: images in batches, that have scored nothing.

    Returns:
        The name of the metric, and the metric.

    Raises:
        ValueError: the model fails on the images.
        TypeError: its output can't be read.
    """
    batches = list(batches)
    inputs = [prepare(batch, model) for batch in batches]
    labels = [batch.labels for batch in inputs]
    if all(found is not None for found in labels) and class_count(model, inputs[0]) is not None:
        right = torch.cat([found for found in labels if found is not None]).cpu()
        return ACCURACY, lambda pruned: _accuracy(_outputs(pruned, inputs, _logits), right)
    with observing(model, gradients=False):
        read = output_reader(model, inputs[0])
    dense = _outputs(model, inputs, read)
    return AGREEMENT, lambda pruned: _agreement(_outputs(pruned, inputs, read), dense)


def class_count(model: nn.Module, inputs: Inputs) -> int | None:
    """How many classes a model tells images apart by; None where it does not end in that."""
    with observing(model, gradients=False):
        if not ends_in_classifier(model, inputs):
            return None
        try:
            return _logits(model, inputs).shape[1]
        except TypeError:  # those of pixels or boxes
            return None


def output_reader(model: nn.Module, inputs: Inputs) -> Reader:
    """What reads a model's outputs on a batch, so that two models can be compared.

    Returns:
        A function of a model and a batch, with its outputs as `(images, outputs)`: logits of a
        classifier, features (before a projection) of other models, and of those that have neither,
        dense prediction say, all numbers that they give for an image.

    Raises:
        TypeError: the model gives no numbers for each image.
    """
    for read in (_logits if ends_in_classifier(model, inputs) else pooled_features, _all_numbers):
        try:
            read(model, inputs)
        except TypeError:
            if read is _all_numbers:
                raise
        else:
            break
    return read


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    return read_logits(inputs.call(model))


def _all_numbers(model: nn.Module, inputs: Inputs) -> Tensor:
    tensors = all_tensors(inputs.call(model))
    rows = [
        tensor.flatten(1)
        for tensor in tensors
        if tensor.is_floating_point() and tensor.dim() > 1 and len(tensor) == inputs.images
    ]
    if not rows:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise TypeError(
            f"{type(model).__name__} gives tensors of shapes {shapes}, none with a row for each of "
            f"{inputs.images} images; pass a metric of your own"
        )
    return torch.cat(rows, 1)


def _outputs(model: nn.Module, inputs: list[Inputs], read: Reader) -> list[Tensor]:
    """What is read of the outputs on each batch, in float32 on the CPU."""
    with observing(model, gradients=False):
        return [read(model, batch).float().cpu() for batch in inputs]


def _accuracy(outputs: list[Tensor], labels: Tensor) -> float:
    return float((torch.cat(outputs).argmax(1) == labels).float().mean())


def _agreement(outputs: list[Tensor], dense: list[Tensor]) -> float:
    found = map(nn.functional.cosine_similarity, outputs, dense)
    return float(torch.cat(list(found)).mean())
