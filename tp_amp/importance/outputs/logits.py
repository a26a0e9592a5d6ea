"""Classes in a model's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.inputs import Inputs, one_image
from tp_amp.running.restoring import hooks


def ends_in_classifier(model: nn.Module, inputs: Inputs) -> bool:
    """Tell whether the model's output is logits over several classes.

    Hugging Face models name their logits, timm models know their `num_classes`, and elsewhere a
    classifier is a Linear with a bias whose output is the model's output. A single number for each
    image (a regression, or yes and no) tells no classes.
    """
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes < 2:
        return False
    biased = [m for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    last: list[Tensor] = []
    with (
        torch.no_grad(),
        hooks(m.register_forward_hook(lambda _m, _a, out: last.append(out)) for m in biased),
    ):
        output = one_image(inputs).call(model)
    if is_single(output):
        return False
    if isinstance(classes, int) or part_of(output, "logits") is not None:
        return True
    return isinstance(output, Tensor) and any(output is result for result in last)


def is_single(output: Any) -> bool:
    """Whether an output, or the logits in it, is one number for each image, `(images, 1)`."""
    logits = part_of(output, "logits")
    logits = output if logits is None else logits
    return isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] == 1


def read_logits(output: Any) -> Tensor:
    """The logits `(images, classes)` in a model's output; TypeError if it holds none."""
    logits = part_of(output, "logits")
    logits = output if logits is None else logits
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise TypeError(
            f"the prediction objective and accuracy need logits (images, classes), the model "
            f"returned {describe(logits)}; pass objective=a callable that reads this output"
        )
    return logits


def part_of(output: Any, key: str) -> Any:
    """What stands in an output under a name; None if nothing does."""
    return output.get(key) if isinstance(output, dict) else getattr(output, key, None)


def describe(value: Any) -> str:
    """A value in few words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
