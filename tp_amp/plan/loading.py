"""Bring a saved model back: built again, cut without tracing, its weights loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tp_amp.plan.applying import planned_sites
from tp_amp.plan.cutting import cut_all, undone_after_errors
from tp_amp.plan.file_names import PLAN, SOURCE, WEIGHTS
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.plan.saving import check_knows_sites
from tp_amp.running.checks import check_model
from tp_amp.structure.model_structure import ModelStructure


@torch.inference_mode(False)  # parameters made in it could not be trained
def load_pruned(model: nn.Module, folder: str | os.PathLike[str]) -> PruningPlan:
    """Cut a freshly built dense model to a saved plan and load the weights, in place.

    Nothing is traced and no inputs are needed.

    Args:
        model: of the saved architecture, dense; on any device.
        folder: from `save_pruned`.

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
    folder = Path(folder)
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
    return plan


def create_model(folder: str | os.PathLike[str]) -> nn.Module:
    """Build the model of a folder of `save_pruned` again, pruned and with its weights.

    Args:
        folder: saved with `library` and `name`.

    Raises:
        ValueError: it was saved without, or files are missing or damaged.
        ImportError: the library is not installed.

    Example:
        See `save_pruned`.

        >>> from tp_amp import create_model
    """
    path = Path(folder) / SOURCE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {SOURCE}; it is no folder of save_pruned")
    try:
        source = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again") from error
    model = build_dense(source, folder)
    if source.get("dtype"):
        model.to(getattr(torch, source["dtype"]))
    load_pruned(model, folder)
    return model


def build_dense(source: dict[str, Any], folder: Any) -> nn.Module:
    """Build the dense model that a source.json names, with random weights.

    Raises:
        ValueError: it names no library that is known here.
        ImportError: the library is not installed.
    """
    library, name, arguments = source["library"], source["name"], source["arguments"]
    if library == "timm":
        import timm

        return timm.create_model(name, **{**arguments, "pretrained": False})  # type: ignore[no-any-return]
    if library == "open_clip":
        import open_clip

        # Or the text tower's weights are fetched, of which nothing is used.
        arguments = {"pretrained_text": False, **arguments, "pretrained": None}
        return open_clip.create_model(name, **arguments).visual  # type: ignore[no-any-return]
    if library == "transformers":
        try:
            import transformers
        except ImportError as error:
            raise ImportError("install tp-amp[huggingface] for models of transformers") from error
        kind = getattr(transformers, name)
        return kind(kind.config_class.from_dict(source["config"]))  # type: ignore[no-any-return]
    raise ValueError(
        f"{folder} does not say where its model came from; build the dense model and use "
        "load_pruned, or save it again with library= and name="
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
