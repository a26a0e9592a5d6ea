"""Bring a saved model back: built again, cut without tracing, its weights loaded."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.torch_version import TorchVersion

from tp_amp.plan.applying import planned_sites
from tp_amp.plan.cutting import cut_all, undone_after_errors
from tp_amp.plan.file_names import PLAN, SOURCE, WEIGHTS
from tp_amp.plan.hub import local_folder
from tp_amp.plan.origin import give_dtypes, library_versions
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.plan.saving import check_knows_sites
from tp_amp.running.checks import check_model
from tp_amp.running.restoring import seeded
from tp_amp.sharing.dense_models import build_dense
from tp_amp.structure.attention.heads import OfHeads
from tp_amp.structure.model_structure import ModelStructure

logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # parameters made in it could not be trained
def load_pruned(model: nn.Module, folder: str | os.PathLike[str]) -> PruningPlan:
    """Cut a freshly built dense model to a saved plan and load the weights, in place.

    Nothing is traced and no inputs are needed.

    Args:
        model: of the saved architecture, dense; on any device.
        folder: from `save_pruned`, or `"hf-hub:USER/NAME"`.

    Returns:
        The plan.

    Raises:
        ValueError: files are missing or damaged, or the model is another; it is then as it was.

    Example:
        See `save_pruned`.

        >>> from tp_amp import load_pruned
    """
    check_model(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model is on the meta device, where no weights can be loaded into; give it room "
            'by model.to_empty(device="cpu")'
        )
    folder = local_folder(folder)
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; it is no folder of save_pruned")
    plan = PruningPlan.from_json((folder / PLAN).read_text())
    check_knows_sites(plan)
    structure = ModelStructure(model, ())
    sites = planned_sites(structure, plan)
    with undone_after_errors(model):
        cut_all(structure.graph, sites, plan.keep)
        _load(model, folder / WEIGHTS)
    if any(isinstance(site, OfHeads) for site in sites.values()):
        _warn_of_older_libraries(model, folder)
    return plan


def create_model(folder: str | os.PathLike[str]) -> nn.Module:
    """Build the model of a folder of `save_pruned` again, pruned and with its weights.

    No code of the folder is run.

    Args:
        folder: saved with `library`; or one on the Hugging Face Hub, `"hf-hub:USER/NAME"` or
            `"hf-hub:USER/NAME@REVISION"` (`push_to_hub`).

    Raises:
        ValueError: it was saved without, files are missing or damaged, or can't be fetched.
        ImportError: the library is not installed.

    Example:
        See `save_pruned`.

        >>> from tp_amp import create_model
    """
    folder = local_folder(folder)
    source = _source(folder)
    with seeded(0):  # what is drawn is replaced, and random state given back
        model = build_dense(source, folder)
    give_dtypes(model, source)
    load_pruned(model, folder)
    if source["library"] == "transformers":
        model.config.name_or_path = str(folder)  # type: ignore[union-attr]  # as from_pretrained does
    return model


def _source(folder: Path) -> dict[str, Any]:
    """What the folder says of where its model came from."""
    path = folder / SOURCE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {SOURCE}; it is no folder of save_pruned")
    try:
        source: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again") from error
    if not isinstance(source, dict) or not {"library", "name", "arguments"} <= source.keys():
        raise ValueError(f"{path} does not say where the model is from; save the model again")
    return source


def _warn_of_older_libraries(model: nn.Module, folder: Path) -> None:
    """In an older release a forward pass may know the number of heads that a newer one reads."""
    try:
        saved = dict(_source(folder)["versions"])
    except (ValueError, KeyError, TypeError):
        return  # of an earlier release; the weights fitted
    for library, version in library_versions(model).items():
        if TorchVersion(version) < (then := str(saved.get(library, "0"))):
            logger.warning(
                "%s was saved with %s %s, and here is %s: if the model fails, its attentions know "
                "their number of heads by themselves in this release; install %s %s or newer",
                *(folder, library, then, version, library, then),
            )


def _load(model: nn.Module, path: Path) -> None:
    """Load strictly; a bias that compensation added is made first.

    safetensors' own `load_model` fails on batch norms that are called under two names.
    """
    try:
        stored = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} does not fit the model or is damaged: {error}") from error
    for name, module in model.named_modules():
        layer: Any = module
        own = layer._parameters
        added = f"{name}.bias" in stored and own.get("weight") is not None
        if added and own.get("bias") is None:
            own["bias"] = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    # One tensor under several names is stored once.
    names: dict[Any, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        known = tensor.numel() > 0 and not tensor.is_meta
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if known else id(tensor)
        names.setdefault(place, []).append(name)
    for same in names.values():
        held = [name for name in same if name in stored]
        stored |= {name: stored[held[0]] for name in same if held and name not in held}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in stored.items()}
    wrong = sorted(n for n in expected.keys() | found if expected.get(n) != found.get(n))
    if wrong:
        there, here = (_shape(shapes.get(wrong[0])) for shapes in (found, expected))
        raise ValueError(
            f"{path} does not fit the model or is damaged: {wrong[0]} is {there} in the file, "
            f"{here} in the model ({len(wrong)} such)"
        )
    model.load_state_dict(stored)


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
