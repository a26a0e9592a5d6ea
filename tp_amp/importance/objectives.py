"""The label-free objective of AMP: an entropy (nats) of a model's predictions or similarities."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.arguments import check_number
from tp_amp.running.batches import stream
from tp_amp.running.distributed import Turn, active, add_up, agree, gather_rows, in_turns, together
from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import evaluating, hooks, seeded

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
            classifier, else similarity; decided on the first batch and logged), or a callable that
            takes the model's output and returns a scalar tensor.
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
            ValueError: the model fails on the batch, or the objective is not finite.
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
        values = image_entropies(read_logits(inputs.call(model)))
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
        return read_logits(turn.inputs.call(model))

    def of_output(self, output: Any) -> Tensor:
        """Return the objective of an output that is already there (`auto` takes it for logits)."""
        if callable(self.kind):
            value = self.kind(output)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(
                    f"the objective returned {_describe(value)}; it must return a scalar tensor"
                )
            return value.reshape(())
        if self.kind == "similarity":
            return similarity_entropy(_vector(output), self.temperature)
        return prediction_entropy(read_logits(output))


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


def ends_in_classifier(model: nn.Module, inputs: Inputs) -> bool:
    """Tell whether the model's output is logits over classes.

    Hugging Face models name their logits, timm models know their `num_classes`, and elsewhere a
    classifier is a Linear with a bias whose output is the model's output.
    """
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int):
        return classes > 0
    biased = [m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    last: list[Tensor] = []
    with (
        torch.no_grad(),
        hooks(m.register_forward_hook(lambda _m, _a, out: last.append(out)) for m in biased),
    ):
        output = inputs.call(model)
    if _get(output, "logits") is not None:
        return True
    return isinstance(output, Tensor) and any(output is result for result in last)


def pooled_features(model: nn.Module, inputs: Inputs) -> Tensor:
    """Features `(images, features)`: CLS or pooled, after the final norm, before a projection.

    Raises:
        TypeError: the model's output holds no such features.
        ValueError: the model fails on the batch.
    """
    model = image_tower(model)
    trunk_forward: Any = getattr(model, "forward_features", None)
    head_forward: Any = getattr(model, "forward_head", None)
    if trunk_forward is not None and head_forward is not None:  # timm
        return _vector(
            inputs.call(lambda *a, **k: head_forward(trunk_forward(*a, **k), pre_logits=True))
        )
    with _without_projection(model):
        features = _vector(inputs.call(model))
    if len(features) != inputs.images:
        raise TypeError(
            f"the similarity objective needs features (images, features), the model returned "
            f"{_describe(features)} for {inputs.images} images; pass objective=a callable that "
            "reads this output"
        )
    return features


def image_tower(model: nn.Module) -> nn.Module:
    """The part of an open_clip model that makes image features; other models are it themselves."""
    for name in ("visual", "trunk"):  # CLIP's image tower, and the timm model wrapped in it
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            return image_tower(part)
    return model


@contextmanager
def _without_projection(model: nn.Module) -> Iterator[None]:
    """Take off the projection parameter of open_clip's VisionTransformer."""
    projection = model._parameters.get("proj")
    if projection is None:
        yield
        return
    model._parameters["proj"] = None
    try:
        yield
    finally:
        model._parameters["proj"] = projection


def read_logits(output: Any) -> Tensor:
    """The logits `(images, classes)` in a model's output; TypeError if it holds none."""
    logits = _get(output, "logits")
    logits = output if logits is None else logits
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise TypeError(
            f"the prediction objective and accuracy need logits (images, classes), the model "
            f"returned {_describe(logits)}; pass objective=a callable that reads this output"
        )
    return logits


def _vector(output: Any) -> Tensor:
    features = _get(output, "pooler_output")
    if features is None and _get(output, "last_hidden_state") is not None:
        features = _get(output, "last_hidden_state")[:, 0]
    if features is None:
        features = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(features, Tensor) or features.dim() != 2:
        raise TypeError(
            f"the similarity objective needs features (images, features), the model returned "
            f"{_describe(features)}; pass objective=a callable that reads this output"
        )
    return features


def _get(output: Any, key: str) -> Any:
    return output.get(key) if isinstance(output, dict) else getattr(output, key, None)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
