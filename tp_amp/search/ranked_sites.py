"""The order in which MLPs and attentions lose their channels or heads, by any importance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tp_amp.importance.entropy_taylor import EntropyTaylorImportance
from tp_amp.importance.reconstruction import ReconstructionImportance
from tp_amp.plan.ranking import rank_channels
from tp_amp.structure.model_structure import Site


def ranked_sites(
    importance: Callable[[Any], Tensor | None],
    graph: Any,
    sites: Sequence[Site],
    *,
    rescore: bool,
    checkpoint: Path | None,
    progress: bool,
) -> dict[Site, list[int]]:
    """Order the channels or heads of some sites, the best first, on the model as it is.

    Args:
        importance: has seen these weights, or has `data` to see them on.
        graph: the `tp.DependencyGraph`.
        sites: not empty.
        rescore: whether what was seen of an earlier model is seen again.
        checkpoint: a folder where the scoring writes its sums, or None.
        progress: show a progress bar on a terminal.
    """
    downs = [site.down for site in sites]
    if isinstance(importance, EntropyTaylorImportance):
        # Scored once for each layer, of which the file of the search tells.
        folder = None if rescore else checkpoint
        importance.refresh(graph.model, downs, progress=progress, checkpoint=folder)
    elif isinstance(importance, ReconstructionImportance) and importance.data is not None:
        # Attention's projections are as wide as they are long: not collected by themselves.
        known = [importance.knows(name, graph.model.get_submodule(name)) for name in downs]
        if rescore or not all(known):
            importance.collect(graph.model, importance.data, layers=downs, progress=progress)
    return {site: rank_channels(importance, graph, site) for site in sites}
