"""Prove by running that a model goes on with less of its MLPs: forward passes know widths too."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tp_amp.structure.graph import TracedGraph
from tp_amp.structure.mlp_cuts import MLP, mlp_group

logger = logging.getLogger(__name__)


def failures(mlps: Sequence[MLP], traced: TracedGraph) -> dict[str, str]:
    """Tell with which MLPs cut the model doesn't run; with all the others cut at once it does.

    Each loses one channel, so that a reshape to any number of the forward's own no longer fits. The
    model is run as it was traced, on the meta device where it runs there.

    Returns:
        `down` of each MLP that the model fails with -> why.
    """
    accepted: list[MLP] = []
    failed: dict[str, str] = {}

    def judge(candidates: Sequence[MLP]) -> None:
        error = _error([*accepted, *candidates], traced) if candidates else None
        if error is None:
            accepted.extend(candidates)
        elif len(candidates) == 1:
            [mlp] = candidates
            less = f"with {mlp.width - 1} of {mlp.width} channels"
            failed[mlp.down] = f"{less} the model no longer runs ({error})"
            logger.debug("%s is no MLP that can be cut: %s", mlp.down, failed[mlp.down])
        else:
            half = len(candidates) // 2
            judge(candidates[:half])
            judge(candidates[half:])

    judge([mlp for mlp in mlps if mlp.width > 1])
    return failed


def _error(mlps: Sequence[MLP], traced: TracedGraph) -> Exception | None:
    """How the model fails with one channel less of each MLP."""
    with traced.again() as run:
        groups = [mlp_group(traced.graph, mlp, [mlp.width - 1]) for mlp in mlps]
        try:
            for group in groups:
                for item in group.items:
                    item.dep(item.idxs)
            run()
        except Exception as error:
            return error.__cause__ if isinstance(error.__cause__, Exception) else error
    return None
