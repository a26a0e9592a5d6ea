"""Save a pruned model as weights and a plan, and load it without tracing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from tp_amp.plan.file_names import PLAN, SOURCE, WEIGHTS
from tp_amp.plan.pruning_plan import PruningPlan, check_plan
from tp_amp.running.checkpoint import write_atomically
from tp_amp.running.checks import check_model
from tp_amp.structure.ranks.head_ranks import HeadRanks
from tp_amp.version import __version__

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
        plan: that the model was cut to.
        library: `"timm"`, `"open_clip"` or `"transformers"`, if `create_model` shall build the
            dense model again.
        name: of the model there: a timm or open_clip model name (open_clip's image tower), or the
            class of a transformers model, whose configuration is taken from the model.
        arguments: further arguments of `timm.create_model` or `open_clip.create_model`.

    Raises:
        ValueError: the plan is not that of the model, does not know its layers (made by hand and
            never applied), or the library is another.

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
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if library not in (None, *_LIBRARIES):
        raise ValueError(f"library must be one of {_LIBRARIES}, found {library!r}")
    if library is not None and not name:
        raise ValueError(f"to build the model again, {library} needs its name")
    check_model(model)
    check_plan(plan)
    check_knows_sites(plan)
    for down, kept in plan.keep.items():
        site = plan.sites[down]
        if isinstance(site, HeadRanks):
            found = site.channels_left(model)
        else:
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
        "versions": {"tp_amp": __version__, "torch": torch.__version__},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / SOURCE, lambda path: path.write_text(json.dumps(source, indent=2) + "\n")
    )
    write_atomically(folder / WEIGHTS, lambda path: save_model(model, str(path)))
    write_atomically(folder / PLAN, lambda path: path.write_text(plan.to_json()))


def _dtype(model: nn.Module) -> str | None:
    """The floating dtype of the model's first such parameter."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next((str(dtype).removeprefix("torch.") for dtype in floating), None)


def check_knows_sites(plan: PruningPlan) -> None:
    """Raise ValueError if a plan was made by hand and never applied, so that it knows no layers."""
    unknown = [down for down in plan.keep if down not in plan.sites]
    if unknown:
        raise ValueError(
            f"the plan does not know what {unknown} are: it was made by hand; apply it first "
            "(apply_plan, compensate), or make it by plan_from_importance, plan_for_target or a "
            "pruner"
        )


def _width(model: nn.Module, down: str) -> int:
    try:
        weight: Any = model.get_submodule(down).weight
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no layer {down}; build the same dense model"
        ) from None
    return int(weight.shape[1])
