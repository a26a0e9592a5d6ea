"""How much of a model is left after a cut: its accuracy, or its agreement with the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.importance.objectives import ends_in_classifier, pooled_features, read_logits
from tp_amp.running.inputs import Inputs, labels_of, prepare
from tp_amp.structure.observing import observing

Metric = Callable[[nn.Module], float]

ACCURACY, AGREEMENT = "accuracy", "cosine to the dense model"


def default_metric(model: nn.Module, batches: Iterable[Any]) -> tuple[str, Metric]:
    """Choose what a pruned model is judged by, from 0 to 1, more is better.

    Where the model ends in a classifier and every batch has labels: accuracy. Elsewhere: the mean
    over images of the cosine similarity between the outputs of the pruned and of the dense model,
    logits of a classifier and features (before a projection) of any other model.

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
    labels = [labels_of(batch) for batch in batches]
    classifier = class_count(model, inputs[0]) is not None
    if classifier and all(found is not None for found in labels):
        right = torch.cat([found for found in labels if found is not None]).cpu()
        return ACCURACY, lambda pruned: _accuracy(_outputs(pruned, inputs, True), right)
    dense = _outputs(model, inputs, classifier)
    return AGREEMENT, lambda pruned: _agreement(_outputs(pruned, inputs, classifier), dense)


def class_count(model: nn.Module, inputs: Inputs) -> int | None:
    """How many classes a model tells apart; None where it does not end in a classifier."""
    with observing(model, gradients=False):
        if not ends_in_classifier(model, inputs):
            return None
        return read_logits(inputs.call(model)).shape[1]


def _outputs(model: nn.Module, inputs: list[Inputs], classifier: bool) -> Tensor:
    """Logits or features of all images, in float32 on the CPU."""
    with observing(model, gradients=False):
        outputs = [outputs_of(model, batch, classifier) for batch in inputs]
    return torch.cat(outputs).float().cpu()


def outputs_of(model: nn.Module, batch: Inputs, classifier: bool) -> Tensor:
    """Logits of a classifier, else features before a projection, `(images, outputs)`."""
    return read_logits(batch.call(model)) if classifier else pooled_features(model, batch)


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).float().mean())


def _agreement(outputs: Tensor, dense: Tensor) -> float:
    return float(nn.functional.cosine_similarity(outputs, dense).mean())
