"""The smallest width of each site, and which MLPs and attentions may go as a whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from tp_amp.budget.width_kinds import kind_of
from tp_amp.plan.cutting import least_reason, narrowed
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import ModelStructure, Site

logger = logging.getLogger(__name__)


def least_widths(
    structure: ModelStructure, sites: Sequence[Site], min_width: int, steps: Mapping[str, int]
) -> dict[str, int]:
    """The smallest widths of sites, by their `down`: of MLPs `min_width`, of others one step.

    Of none, where that is asked for, the model is run once; there attentions may go too, with their
    values' channels (and their queries and keys with these). What can't go is logged.

    Args:
        structure: what was read of the model.
        sites: what may be cut.
        min_width: of MLPs; 0 for whole ones and whole attentions.
        steps: what the widths of each site are multiples of.
    """
    least = {site.down: min_width if isinstance(site, MLP) else 1 for site in sites}
    if not min_width:
        possible = [site for site in sites if isinstance(site, MLP) or kind_of(site) == "vo"]
        staying = _staying(structure, possible)
        going = [site for site in possible if site not in staying]
        least |= {site.down: int(site in staying) for site in possible}
        attentions = {site.name for site in going if kind_of(site) == "vo"}
        least |= {
            site.down: 0 for site in sites if kind_of(site) == "qk" and site.name in attentions
        }
        if staying:
            told = [f"{site.down}: {reason}" for site, reason in staying.items()]
            text = "%d of %d MLPs and attentions can't go as a whole: %s%s"
            more = "; ..." if len(told) > 3 else ""
            logger.warning(text, len(told), len(possible), "; ".join(told[:3]), more)
    return {down: -(-width // steps[down]) * steps[down] for down, width in least.items()}


def going_together(sites: Sequence[Site], least: Mapping[str, int]) -> dict[str, str]:
    """The values of each attention that may go -> its queries and keys, by their `down`."""
    queries = {site.name: site.down for site in sites if kind_of(site) == "qk"}
    values = [site for site in sites if kind_of(site) == "vo" and not least[site.down]]
    return {site.down: queries[site.name] for site in values if site.name in queries}


def _staying(structure: ModelStructure, sites: Sequence[Site]) -> dict[Site, str]:
    """Which of some MLPs and values of attentions can't go as a whole, and why."""
    staying: dict[Site, str] = {}
    for site in sites:
        if reason := least_reason(structure.model, site):
            staying[site] = reason
        elif structure.model.get_submodule(site.down).bias is None:
            staying[site] = "it has no bias that could hold what is given on average"
    going = [site for site in sites if site not in staying]
    if going and _error(structure, going):
        staying |= {site: error for site in going if (error := _error(structure, [site]))}
    return staying


def _error(structure: ModelStructure, sites: Sequence[Site]) -> str | None:
    """How the model fails without some of them."""
    with structure.traced.again() as run:
        try:
            with narrowed(structure.graph, dict.fromkeys(sites, ())):
                run()
        except Exception as error:
            return f"without it the model no longer runs ({error})"
    return None
