"""Where a saved model came from, as source.json says it, and the dense model built from that."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import nn

from tp_amp.plan.applying import planned_sites
from tp_amp.plan.cutting import check_fits, cut_all
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.sharing.dense_models import dense_sizes
from tp_amp.sharing.transformers_files import dense_attention, dense_config
from tp_amp.structure.model_structure import ModelStructure
from tp_amp.version import __version__

logger = logging.getLogger(__name__)


def origin(
    model: nn.Module, library: str | None, name: str | None, arguments: dict[str, Any] | None
) -> dict[str, Any]:
    """What source.json holds: how the dense model is built again, and in which dtypes."""
    of_transformers = library == "transformers"
    dtype, others = _dtypes(model)
    return {
        "library": library,
        "name": name,
        "arguments": arguments or {},
        "config": dense_config(model, str(name)) if of_transformers else None,
        "attention": dense_attention(model) if of_transformers else None,
        "dtype": dtype,
        "other_dtypes": others,
        "versions": {"tp_amp": __version__, "torch": torch.__version__, **library_versions(model)},
    }


def dense_for(source: dict[str, Any], plan: PruningPlan) -> nn.Module | None:
    """The dense model that a library builds, for its sizes; None where it can't be built now.

    Raises:
        ValueError: the library builds none, or the plan does not fit it.
    """
    library, name = source["library"], source["name"]
    try:
        dense = dense_sizes(source)
    except ImportError:
        raise
    except Exception as error:  # constructors refuse names and arguments in their own ways
        # open_clip asks the Hub for the configuration of some text towers.
        if library == "open_clip" and isinstance(error, OSError):
            logger.warning(
                "the plan is not compared with the %s that %s builds, which can't be built now: %s",
                *(name, library, str(error).partition("\n")[0]),
            )
            return None
        raise ValueError(
            f"{library} builds no {name!r} with these arguments ({error}); correct them, or leave "
            "library out and load the folder by load_pruned"
        ) from error
    for site in plan.sites.values():
        try:
            check_fits(dense, site)
        except ValueError as error:
            raise ValueError(
                f"the plan is not for the {name} that {library} builds with these arguments: "
                f"{error}; of a model that was cut before, save first.then(later)"
            ) from error
    return dense


def check_comes_back(
    dense: nn.Module, model: nn.Module, plan: PruningPlan, source: dict[str, Any]
) -> None:
    """Raise ValueError if the dense model, cut to a plan, is of other sizes than the pruned one.

    Args:
        dense: that a library builds, for its sizes; it is cut.
        model: pruned.
        plan: that it was pruned to.
        source: as in source.json.
    """
    structure = ModelStructure(dense, ())
    cut_all(structure.graph, planned_sites(structure, plan), plan.keep)
    there, here = (
        {name: tuple(tensor.shape) for name, tensor in each.state_dict().items()}
        for each in (dense, model)
    )
    # What compensation adds is made when weights are loaded.
    added = {f"{n}.bias" for n, module in dense.named_modules() if hasattr(module, "weight")}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name) and (name in there or name not in added):
            raise ValueError(
                f"{name} is {here.get(name, 'missing')} in the model and "
                f"{there.get(name, 'missing')} in the {source['name']} that {source['library']} "
                "builds with these arguments, cut to the plan; pass the arguments that the dense "
                "model was built with, or leave library out and load the folder by load_pruned"
            )


def library_versions(model: nn.Module) -> dict[str, str]:
    """The libraries that a model's classes are of, with the version of each."""
    # An adapted class is one of ours; the library's own stands behind it.
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    roots = {kind.__module__.partition(".")[0] for kind in classes} - {"torch", "tp_amp"}
    found = {root: getattr(sys.modules.get(root), "__version__", None) for root in sorted(roots)}
    return {root: version for root, version in found.items() if isinstance(version, str)}


def give_dtypes(model: nn.Module, source: dict[str, Any]) -> None:
    """Give a model that was built again the dtypes that the saved one had, in place."""
    if source.get("dtype"):
        model.to(getattr(torch, source["dtype"]))
    for path, dtype in (source.get("other_dtypes") or {}).items():
        holder, _, name = path.rpartition(".")
        tensor = getattr(model.get_submodule(holder), name, None)
        if isinstance(tensor, torch.Tensor):  # not a bias that is made when weights are loaded
            tensor.data = tensor.data.to(getattr(torch, dtype))


def _dtypes(model: nn.Module) -> tuple[str | None, dict[str, str]]:
    """The floating dtype of the model's first such parameter, and of those that have another."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = {path: _name(tensor) for path, tensor in tensors if tensor.is_floating_point()}
    first = next((_name(p) for p in model.parameters() if p.is_floating_point()), None)
    return first, {path: dtype for path, dtype in found.items() if first and dtype != first}


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
