"""What errors are to be counted by: an objective's sensitivity, or all alike."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.importance.objectives import Objective
from tp_amp.importance.outputs.logits import is_single
from tp_amp.running.batches import stream
from tp_amp.running.inputs import one_image
from tp_amp.running.restoring import seeded
from tp_amp.structure.observing import observing

logger = logging.getLogger(__name__)

_PREDICTIONS = re.compile("logits|pred|boxes|masks|reconstruction")

# Models whose outputs were told to be neither classes nor features, which is told once.
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# A name of an objective, a callable, or None for "reconstruction".
ErrorObjective = str | Callable[[Any], Tensor] | None


def error_objective(objective: ErrorObjective, temperature: float = 1 / 15) -> Objective | None:
    """What errors count by; None where all errors of an output count the same.

    Args:
        objective: as for `EntropyTaylorImportance`; or `"reconstruction"`, None for short.
        temperature: of the similarity softmax.

    Raises:
        ValueError: it is another string, or the temperature is not positive.
    """
    if objective is None or objective == "reconstruction":
        return None
    try:
        return Objective(objective, temperature)
    except ValueError as error:
        if isinstance(objective, str) and temperature > 0:
            raise ValueError(
                "objective must be 'auto', 'prediction', 'similarity', 'reconstruction', a "
                f"callable or None, found {objective!r}"
            ) from error
        raise


def predictions(output: Any) -> list[str]:
    """Names of what a model gives beside features: boxes, masks, depth and the like."""
    names = output.keys() if isinstance(output, Mapping) else ()
    return [name for name in names if _PREDICTIONS.search(name) and output[name] is not None]


def readable(
    objective: Objective | None, model: nn.Module, batches: Iterable[Any]
) -> Objective | None:
    """The objective, or None and a warning where `auto` finds neither classes nor features.

    So models of dense prediction need no objective: token or feature maps, depth, boxes, masks.

    Args:
        objective: None stays None, and what is no `auto` is as it was.
        model: left as it was.
        batches: of which the first is run.
    """
    if objective is None or objective.kind != "auto":
        return objective
    with torch.no_grad(), observing(model, gradients=False), seeded(0):
        first = next(stream(batches, model, description="first batch", progress=False))
        few = one_image(first, 2)
        resolved = objective.resolve(model, few)
        try:
            if resolved.kind == "similarity":
                _check_features_alone(few.call(model))
            resolved(model, few)
        except TypeError as error:
            level = logging.DEBUG if model in _told else logging.WARNING
            _told.add(model)
            logger.log(
                level,
                "%s's output is neither classes nor features, so all errors of a layer count the "
                "same; pass objective= to say what matters (%s)",
                type(model).__name__,
                str(error).partition(";")[0],
            )
            return None
        except ValueError:  # told where it is used
            return resolved
    return resolved


def _check_features_alone(output: Any) -> None:
    """Raise TypeError for what is more than features, or less."""
    if is_single(output):
        raise TypeError("it gives one number for each image")
    if given := predictions(output):
        raise TypeError(f"it gives {', '.join(given)} too")
