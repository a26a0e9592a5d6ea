"""Features of images: what a model gives before classes and projections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tp_amp.importance.outputs.logits import describe, part_of
from tp_amp.running.inputs import Inputs


def pooled_features(model: nn.Module, inputs: Inputs) -> Tensor:
    """Features `(images, features)`: CLS or pooled, after the final norm, before a projection.

    Raises:
        TypeError: the model's output holds no such features.
        ValueError: the model fails on the batch.
    """
    model = image_tower(model)
    with _without_logits(model), _without_projection(model):
        features = vector_of(inputs.call(model))
    if len(features) != inputs.images:
        raise TypeError(
            f"the similarity objective needs features (images, features), the model returned "
            f"{describe(features)} for {inputs.images} images; pass objective=a callable that "
            "reads this output"
        )
    return features


def vector_of(output: Any) -> Tensor:
    """The features `(images, features)` in a model's output; TypeError if it holds none."""
    features = part_of(output, "pooler_output")
    if features is None and part_of(output, "last_hidden_state") is not None:
        features = part_of(output, "last_hidden_state")[:, 0]
    if features is None:
        features = output[0] if isinstance(output, (tuple, list)) and output else output
    # Cosines of single numbers are 1 or -1, which no small change changes.
    if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[1] == 1:
        raise TypeError(
            f"the similarity objective needs features (images, features), the model returned "
            f"{describe(features)}; pass objective=a callable that reads this output"
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
def _without_logits(model: nn.Module) -> Iterator[None]:
    """Let a timm model end before its classifier.

    Its own forward pass hands on what pooling needs, such as which patches are padding.
    """
    own, head = vars(model).get("forward_head"), getattr(model, "forward_head", None)
    if head is None or getattr(model, "forward_features", None) is None:
        yield
        return
    vars(model)["forward_head"] = lambda *args, **kwargs: head(*args, **kwargs, pre_logits=True)
    try:
        yield
    finally:
        if own is None:
            del vars(model)["forward_head"]
        else:
            vars(model)["forward_head"] = own


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
