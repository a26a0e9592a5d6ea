"""What `AdaptiveMLPPruner` checks before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tp_amp.importance.entropy_taylor import EntropyTaylorImportance
from tp_amp.importance.reconstruction import ReconstructionImportance
from tp_amp.running.arguments import check_number, check_whole
from tp_amp.running.batches import check_batches
from tp_amp.running.distributed import active


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
    nats = "a finite number of nats, zero or more"
    check_number(nats, lambda value: value >= 0, max_increase=max_increase)
    check_whole(steps=steps, round_to=round_to, min_width=min_width)
    fraction = "a fraction above 0, 1 at most"
    check_number(fraction, lambda value: 0 < value <= 1, max_pruning_ratio=max_pruning_ratio)
    if error_probability is not None:
        between = "a number between 0 and 0.5"
        check_number(between, lambda value: 0 < value < 0.5, error_probability=error_probability)
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
