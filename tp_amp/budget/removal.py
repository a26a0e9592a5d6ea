"""The smallest width of each site, and which MLPs may go as a whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from tp_amp.plan.cutting import least_reason, narrowed
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import ModelStructure, Site

logger = logging.getLogger(__name__)


def least_widths(
    structure: ModelStructure, sites: Sequence[Site], min_width: int, steps: Mapping[str, int]
) -> dict[str, int]:
    """The smallest widths of sites, by their `down`: of MLPs `min_width`, of others one step.

    Of none, where that is asked for, the model is run once. MLPs that can't go are logged.

    Args:
        structure: what was read of the model.
        sites: what may be cut.
        min_width: of MLPs; 0 for whole ones.
        steps: what the widths of each site are multiples of.
    """
    mlps = [site for site in sites if isinstance(site, MLP)]
    kept = dict.fromkeys(mlps, min_width)
    if not min_width and mlps:
        staying = _staying(structure, mlps)
        kept |= dict.fromkeys(staying, 1)
        if staying:
            told = [f"{mlp.down}: {reason}" for mlp, reason in staying.items()]
            more = "; ..." if len(told) > 3 else ""
            logger.warning(
                "%d of %d MLPs keep a channel: %s%s",
                len(told),
                len(mlps),
                "; ".join(told[:3]),
                more,
            )
    least = {site.down: kept.get(site, 1) if isinstance(site, MLP) else 1 for site in sites}
    return {down: -(-width // steps[down]) * steps[down] for down, width in least.items()}


def _staying(structure: ModelStructure, mlps: Sequence[MLP]) -> dict[MLP, str]:
    """The MLPs that can't go as a whole, and why."""
    staying: dict[MLP, str] = {}
    for mlp in mlps:
        if reason := least_reason(structure.model, mlp):
            staying[mlp] = reason
        elif structure.model.get_submodule(mlp.down).bias is None:
            staying[mlp] = f"{mlp.down} has no bias that could hold what it gives on average"
    going = [mlp for mlp in mlps if mlp not in staying]
    if going and _error(structure, going):
        staying |= {mlp: error for mlp in going if (error := _error(structure, [mlp]))}
    return staying


def _error(structure: ModelStructure, mlps: Sequence[MLP]) -> str | None:
    """How the model fails without some MLPs."""
    with structure.traced.again() as run:
        try:
            with narrowed(structure.graph, dict.fromkeys(mlps, ())):
                run()
        except Exception as error:
            return f"without it the model no longer runs ({error})"
    return None
