"""Tells where a pruner ranks all layers together by scores that only rank within one."""

from __future__ import annotations

import inspect
import logging
from typing import Any
from weakref import WeakSet

import torch_pruning as tp

logger = logging.getLogger(__name__)

_DEPTH = 12  # calls between a pruner and its importance, decorators included
_told: WeakSet[Any] = WeakSet()


def warn_of_global_ranking(importance: Any) -> None:
    """Warn, once for each pruner, if the one that asks for scores ranks all layers together.

    Torch-Pruning calls an importance with a group alone, which does not know its pruner, so that is
    found among the callers; nothing is said where there is none.
    """
    frame = inspect.currentframe()
    for _ in range(_DEPTH):
        frame = frame.f_back if frame else None
        pruner = frame.f_locals.get("self") if frame else None
        if isinstance(pruner, tp.pruner.BasePruner):
            if pruner.global_pruning and pruner not in _told:
                _told.add(pruner)
                logger.warning(
                    "global_pruning=True takes the same share of every layer here: the scores of "
                    "%s are ranks within a layer; take ReconstructionImportance or "
                    "EntropyTaylorImportance, whose scores compare layers, or give widths",
                    type(importance).__name__,
                )
            return
