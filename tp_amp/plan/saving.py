"""Save a pruned model as weights and a plan, and load it without tracing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import nn

import tp_amp
from tp_amp.plan.cutting import check_fits, cut, undone_after_errors
from tp_amp.plan.pruning_plan import PruningPlan, check_kept
from tp_amp.running.checkpoint import write_atomically
from tp_amp.structure.graph import TolerantGraph, per_channel_pruners

WEIGHTS, PLAN, SOURCE = "model.safetensors", "plan.json", "source.json"
_LIBRARIES = ("timm", "open_clip", "transformers")


def save_pruned(
    model: nn.Module,
    folder: str | os.PathLike[str],
    plan: PruningPlan,
    *,
    library: str | None = None,
    name: str | None = None,
    arguments: dict[str, Any] | None = None,
) -> None:
    """Write a pruned model: safetensors weights, the plan and where the model came from.

    Files appear under their names only once they are whole. Nothing is pickled.

    Args:
        model: pruned to `plan`, compensated and fine-tuned or not.
        folder: made if it is missing; what it holds of an earlier save is replaced.
        plan: of a pruner, `plan_from_importance` or `plan_for_target`, which know the layers.
        library: `"timm"`, `"open_clip"` or `"transformers"`, if `create_model` shall build the
            dense model again.
        name: of the model there: a timm or open_clip model name (open_clip's image tower), or the
            class of a transformers model, whose configuration is taken from the model.
        arguments: further arguments of `timm.create_model` or `open_clip.create_model`.

    Raises:
        ValueError: the plan is not that of the model, does not know its layers (made by hand), or
            the library is another.

    Example:
        >>> import tempfile, timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> images = torch.randn(1, 3, 224, 224)
        >>> plan = tp_amp.plan_from_importance(model, images, tp_amp.DIMAPImportance(), 0.5)
        >>> tp_amp.apply_plan(model, images, plan)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tp_amp.save_pruned(
        ...         model, folder, plan, library="timm", name="vit_tiny_patch16_224",
        ...         arguments={"depth": 1},
        ...     )
        ...     again = tp_amp.create_model(folder)
        >>> torch.equal(again.eval()(images), model.eval()(images))
        True
    """
    if library not in (None, *_LIBRARIES):
        raise ValueError(f"library must be one of {_LIBRARIES}, found {library!r}")
    if library is not None and not name:
        raise ValueError(f"to build the model again, {library} needs its name")
    _check_sites(plan)
    for down, kept in plan.keep.items():
        site = plan.sites[down]
        found = _width(model, down) - site.first
        expected = len(kept) * site.unit_width
        if found != expected:
            raise ValueError(
                f"{down} has {found} input channels, the plan keeps {expected}; save the model "
                "that was pruned to this plan"
            )
    config = getattr(model, "config", None) if library == "transformers" else None
    source = {
        "library": library,
        "name": name,
        "arguments": arguments or {},
        "config": config.to_dict() if config is not None else None,
        "dtype": _dtype(model),
        "versions": {"tp_amp": tp_amp.__version__, "torch": torch.__version__},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / SOURCE, lambda path: path.write_text(json.dumps(source, indent=2) + "\n")
    )
    write_atomically(folder / WEIGHTS, lambda path: save_model(model, str(path)))
    write_atomically(folder / PLAN, lambda path: path.write_text(plan.to_json()))


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
    folder = Path(folder)
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; it is no folder of save_pruned")
    plan = PruningPlan.from_json((folder / PLAN).read_text())
    _check_sites(plan)
    for down, kept in plan.keep.items():
        check_kept(plan.sites[down], kept)
        check_fits(model, plan.sites[down])
    with undone_after_errors(model):
        cut_untraced(model, plan)
        _load(model, folder / WEIGHTS)
    return plan


@torch.no_grad()
def cut_untraced(model: nn.Module, plan: PruningPlan) -> None:
    """Cut a dense model to a plan that knows its layers and fits."""
    graph = TolerantGraph()
    graph.model, graph.module2node = model, {}
    graph._module2name = {module: name for name, module in model.named_modules()}
    for kind, pruner in per_channel_pruners(model).items():
        graph.register_customized_layer(kind, pruner)
    for down, kept in plan.keep.items():
        for group in cut(graph, plan.sites[down], kept):
            group.prune(record_history=False)


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


def _dtype(model: nn.Module) -> str | None:
    """The floating dtype of the model's first such parameter."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next((str(dtype).removeprefix("torch.") for dtype in floating), None)


def _check_sites(plan: PruningPlan) -> None:
    unknown = [down for down in plan.keep if down not in plan.sites]
    if unknown:
        raise ValueError(
            f"the plan does not know what {unknown} are: it was made by hand; make it by "
            "plan_from_importance, plan_for_target or a pruner"
        )


def _width(model: nn.Module, down: str) -> int:
    try:
        weight: Any = model.get_submodule(down).weight
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no layer {down}; build the same dense model"
        ) from None
    return int(weight.shape[1])


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
    # One tensor under several names is stored once, unless compensation gave each its own values.
    names: dict[Any, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        known = tensor.numel() > 0 and not tensor.is_meta
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if known else id(tensor)
        names.setdefault(place, []).append(name)
    for same in names.values():
        held = [name for name in same if name in stored]
        for name in held[1:]:
            parent, _, leaf = name.rpartition(".")
            parameters = model.get_submodule(parent)._parameters
            if parameters.get(leaf) is not None:
                parameters[leaf] = nn.Parameter(parameters[leaf].detach().clone())  # type: ignore[union-attr]
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
