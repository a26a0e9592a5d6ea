"""What `AdaptiveMLPPruner` checks before anything is changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from tp_amp.importance.entropy_taylor import EntropyTaylorImportance
from tp_amp.importance.reconstruction import ReconstructionImportance
from tp_amp.running.batches import check_batches
from tp_amp.running.distributed import active

logger = logging.getLogger(__name__)


def check_numbers(
    max_increase: float,
    steps: int,
    round_to: int,
    min_width: int,
    max_pruning_ratio: float,
    error_probability: float | None,
) -> None:
    """Raise ValueError for a number out of range.

    Raises:
        ValueError: as said, or several processes with an error probability.
        ImportError: an error probability without scipy.
    """
    if not (math.isfinite(max_increase) and max_increase >= 0):
        raise ValueError(
            f"max_increase must be a finite number of nats, zero or more, found {max_increase}"
        )
    for name, value in {"steps": steps, "round_to": round_to, "min_width": min_width}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, found {value!r}")
    if not 0 < max_pruning_ratio <= 1:
        raise ValueError(
            f"max_pruning_ratio must be a fraction above 0, 1 at most, found {max_pruning_ratio}"
        )
    if error_probability is not None and not 0 < error_probability < 0.5:
        raise ValueError(f"error_probability must lie between 0 and 0.5, found {error_probability}")
    if error_probability is not None:
        if active():
            raise ValueError(
                "error_probability is for one process; on several, every probe runs all images"
            )
        try:
            import scipy.special  # noqa: F401
        except ImportError as error:
            raise ImportError("install tp-amp[sequential] (scipy) for error_probability") from error


def check_data(importance: Any, calibration: Iterable[Any], rescore: bool) -> None:
    """Raise unless the search has images of its own that it can read again."""
    check_batches(calibration, repeatable=True)
    if getattr(importance, "data", None) is calibration:
        raise ValueError(
            "the importance scores on the calibration batches; pass other images for the "
            "search (tp_amp.split_batches splits a loader in two)"
        )
    own = (EntropyTaylorImportance, ReconstructionImportance)
    if rescore and isinstance(importance, own) and importance.data is None:
        raise ValueError(f"rescore=True needs {type(importance).__name__}(data=...) to score again")


def without_ignored(model: nn.Module, sites: list[Any], ignored: list[nn.Module]) -> list[Any]:
    """The MLPs or attentions that hold no ignored layer; ValueError if none is left."""
    left = []
    if not sites:
        raise ValueError(
            f"no MLP was found in {type(model).__name__}; tp_amp.inspect tells for each layer why"
        )
    for site in sites:
        if any(model.get_submodule(name) in ignored for name in (*site.up, site.down)):
            logger.info("%s is not pruned: it is among the ignored layers", site.name)
        else:
            left.append(site)
    if not left:
        raise ValueError(f"all {len(sites)} {type(sites[0]).__name__}s are ignored layers")
    return left
