"""The label-free objective of AMP: an entropy (nats) of a model's predictions or similarities."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.importance.outputs.features import pooled_features, vector_of
from tp_amp.importance.outputs.logits import describe, ends_in_classifier, is_single, read_logits
from tp_amp.running.arguments import check_number
from tp_amp.running.batches import stream
from tp_amp.running.distributed import Turn, active, add_up, agree, gather_rows, in_turns, together
from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import evaluating, seeded

logger = logging.getLogger(__name__)


def prediction_entropy(logits: Tensor) -> Tensor:
    """Mean over images of the Shannon entropy (nats) of softmax(logits).

    Args:
        logits: `(images, classes)`.

    Example:
        >>> round(float(prediction_entropy(torch.zeros(3, 10))), 4)  # log(10)
        2.3026
    """
    return image_entropies(logits).mean()


def image_entropies(logits: Tensor) -> Tensor:
    """Shannon entropy (nats) of softmax(logits) of each image, `(images,)`."""
    log_p = wide(logits).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def similarity_entropy(features: Tensor, temperature: float = 1 / 15) -> Tensor:
    """Mean over images of the entropy (nats) of each image's similarity to all of the batch.

    The AMP objective: unit features f, p = softmax(f f^T / temperature) row by row, the diagonal
    included, in float32 or wider.

    Args:
        features: `(images, features)`, at least two images.
        temperature: of the softmax; the paper uses 1/15 and 1/20.

    Raises:
        ValueError: the batch holds fewer than two images.
    """
    return prediction_entropy(similarity_logits(features, temperature))


def similarity_logits(features: Tensor, temperature: float) -> Tensor:
    """Cosine similarities of the images of a batch over the temperature, `(images, images)`."""
    if len(features) < 2:
        raise ValueError(
            "the similarity objective compares the images of a batch and found a batch of "
            f"{len(features)}; use larger batches, and drop_last=True for a last batch of one"
        )
    unit = nn.functional.normalize(wide(features), dim=-1)
    return unit @ unit.T / temperature


def wide(values: Tensor) -> Tensor:
    """The values in float32 if they were in half precision, else as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class Objective:
    """What is measured on a batch: a scalar tensor, without labels.

    Args:
        kind: `"prediction"`, `"similarity"`, `"auto"` (prediction where the model ends in a
            classifier of two classes or more, else similarity; decided on the first batch and
            logged), or a callable that takes the model's output and returns a scalar tensor.
        temperature: of `similarity`.

    Raises:
        ValueError: `kind` is another string, or the temperature is not positive.
    """

    def __init__(
        self, kind: str | Callable[[Any], Tensor] = "auto", temperature: float = 1 / 15
    ) -> None:
        if not callable(kind) and kind not in ("auto", "prediction", "similarity"):
            raise ValueError(
                f"objective must be 'auto', 'prediction', 'similarity' or a callable, "
                f"found {kind!r}"
            )
        check_number("positive", lambda value: value > 0, temperature=temperature)
        self.kind = kind
        self.temperature = temperature

    def resolve(self, model: nn.Module, inputs: Inputs) -> Objective:
        """Return the objective that `auto` stands for on this model, and log it."""
        if self.kind != "auto":
            return self
        kind = "prediction" if ends_in_classifier(model, inputs) else "similarity"
        logger.info("objective 'auto' took %r for %s", kind, type(model).__name__)
        return Objective(kind, self.temperature)

    def __call__(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Run the model on one batch and return the objective (`auto` must be resolved before).

        Raises:
            TypeError: the model's output is of a type that the objective can't read.
            ValueError: the model fails on the batch, the objective is not finite, or predictions
                of one class are asked for.
        """
        if self.kind == "similarity":
            value = similarity_entropy(pooled_features(model, inputs), self.temperature)
        else:
            value = self.of_output(inputs.call(model))
        return _finite(value)

    def values(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Run the model on one batch; the objective of each image, `(images,)`, or of all, `(1,)`.

        Only `prediction` has one of each image. The errors are those of a call.
        """
        if self.kind != "prediction":
            return self(model, inputs).reshape(1)
        values = image_entropies(_classes(inputs.call(model)))
        _finite(values.mean())
        return values

    def of_turn(self, model: nn.Module, turn: Turn) -> Tensor:
        """The objective of the batches of all ranks as one, with the gradient of this rank's own.

        A callable is taken for a mean over images.
        """
        inputs = turn.inputs
        if inputs is not None and not active():
            return self(model, inputs)
        if self.kind == "similarity":
            return _finite(similarity_entropy(_features_of(model, turn), self.temperature))
        share = torch.zeros(())
        if inputs is not None:
            share = self(model, inputs) * (inputs.images / turn.images)
        kind = self.kind if isinstance(self.kind, str) else "callable"
        return add_up(f"the {kind} objective", share)

    def logits(self, model: nn.Module, turn: Turn) -> Tensor | None:
        """Run the model and return what the softmax is taken of; None for a callable's output.

        Similarities are those of all ranks' images; predictions are this rank's own, and None where
        it has no batch.
        """
        if self.kind == "similarity":
            return similarity_logits(_features_of(model, turn), self.temperature)
        if callable(self.kind) or turn.inputs is None:
            return None
        return _classes(turn.inputs.call(model))

    def of_output(self, output: Any) -> Tensor:
        """Return the objective of an output that is already there (`auto` takes it for logits)."""
        if callable(self.kind):
            value = self.kind(output)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(
                    f"the objective returned {describe(value)}; it must return a scalar tensor"
                )
            return value.reshape(())
        if self.kind == "similarity":
            return similarity_entropy(vector_of(output), self.temperature)
        return prediction_entropy(_classes(output))


def _classes(output: Any) -> Tensor:
    """The logits `(images, classes)` of an output that holds several classes."""
    logits = read_logits(output)
    if is_single(logits):
        raise ValueError(
            "the prediction objective needs two classes or more, the model returned "
            f"{describe(logits)}: the softmax over one class is constant; pass "
            "objective='similarity' where the model has features, or a callable that reads this "
            "output"
        )
    return logits


def _features_of(model: nn.Module, turn: Turn) -> Tensor:
    own = None if turn.inputs is None else pooled_features(model, turn.inputs)
    if own is not None and not active():
        return own
    return gather_rows("the similarity objective", own)


def _finite(value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value)):
        raise ValueError(
            f"the objective is {float(value.detach())} on a batch; check the images for NaN, "
            "and the model's precision"
        )
    return value


def mean_objective(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective,
    *,
    seed: int = 0,
    progress: bool = False,
) -> float:
    """Mean of the objective over all images, without gradients, the same batches at each call.

    Under a process group: over all ranks' images, the same number on every rank.
    """
    total, images = 0.0, 0
    with (
        together("calibration"),
        torch.no_grad(),
        evaluating(model, trainable=False),
        seeded(seed),
    ):
        own = stream(batches, model, description="calibration", progress=progress)
        for turn in in_turns(own):
            total += float(objective.of_turn(model, turn)) * turn.images
            images += turn.images
        return agree("the entropy", total / images)


def resolve_on(objective: Objective, model: nn.Module, batches: Iterable[Any]) -> Objective:
    """Return the objective that `auto` stands for, by the model's output on the first batch."""
    with torch.no_grad(), evaluating(model, trainable=False):
        first = next(stream(batches, model, description="first batch", progress=False))
        return objective.resolve(model, first)
