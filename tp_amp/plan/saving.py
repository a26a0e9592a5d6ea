"""Save a pruned model as weights and a plan, and load it without tracing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from tp_amp.plan.file_names import CARD, PLAN, PROCESSOR, SOURCE, WEIGHTS, written_files
from tp_amp.plan.origin import check_comes_back, dense_for, origin
from tp_amp.plan.pruning_plan import PruningPlan, check_plan
from tp_amp.reports.report import Report
from tp_amp.running.checkpoint import write_atomically
from tp_amp.running.checks import check_model
from tp_amp.sharing.model_card import model_card
from tp_amp.sharing.timm_files import timm_files
from tp_amp.sharing.transformers_files import class_name, image_processor, transformers_files
from tp_amp.structure.ranks.head_ranks import HeadRanks
from tp_amp.structure.streams.residual_stream import Stream

_LIBRARIES = ("timm", "open_clip", "transformers")


def save_pruned(
    model: nn.Module,
    folder: str | os.PathLike[str],
    plan: PruningPlan,
    *,
    library: str | None = None,
    name: str | None = None,
    arguments: dict[str, Any] | None = None,
    processor: Any = None,
    report: Report | None = None,
) -> None:
    """Write a pruned model: safetensors weights, the plan and where the model came from.

    Files appear under their names only once they are whole. Nothing is pickled. With
    `library="transformers"` the folder also holds a configuration and a short modelling file, by
    which `AutoModel.from_pretrained(folder, trust_remote_code=True)` opens it where this package
    is not installed. With `library="timm"` it holds what `timm.create_model("local-dir:FOLDER")`
    needs, if all MLPs are cut alike and no heads, so that timm's own arguments build the model.

    Args:
        model: pruned to `plan`, compensated and fine-tuned or not.
        folder: made if it is missing; what it holds of an earlier save is replaced, the model card
            too, and nothing else.
        plan: that the model was cut to.
        library: `"timm"`, `"open_clip"` or `"transformers"`, if `create_model` shall build the
            dense model again.
        name: of the model there: a timm or open_clip model name (open_clip's image tower), or the
            class of a transformers model, its own if left out. Its configuration is taken from the
            model.
        arguments: further arguments of `timm.create_model` or `open_clip.create_model`.
        processor: the image processor of a transformers model, saved beside it. Left out, it is
            that of the checkpoint which the model was loaded from, if it is on this machine. Of a
            processor of images and texts pass its `image_processor`.
        report: of `plan.report`, for the model card in README.md.

    Raises:
        ValueError: the plan is not that of the model, does not know its layers (made by hand and
            never applied), or the library is another; the folder holds files of these names that
            are of no earlier save; or the model differs from what the configuration, or the
            library with these arguments, builds by more than the cut. Nothing is then written.
        TypeError: the processor is no image processor.

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
    if processor is not None and library != "transformers":
        raise ValueError(f"processor is for models of transformers; library is {library!r}")
    if arguments and library in (None, "transformers"):
        raise ValueError(
            f"arguments are for models of timm and open_clip; library is {library!r}, found "
            f"{arguments}"
        )
    if library == "transformers":
        name = name or class_name(model)
    elif library is not None and not name:
        raise ValueError(f"to build the model again, {library} needs its name")
    check_model(model)
    check_plan(plan)
    check_knows_sites(plan)
    _check_widths(model, plan)
    source = origin(model, library, name, arguments)
    dense = dense_for(source, plan) if library else None
    texts = _texts(model, plan, source, dense, report or plan.report()) if library else {}
    if dense is not None:
        check_comes_back(dense, model, plan, source)
    texts |= {PLAN: plan.to_json()}
    prepares = image_processor(processor, model) if library == "transformers" else None
    written = {WEIGHTS, *texts} | ({PROCESSOR} if prepares else set())
    earlier = written_files(folder)
    _check_nothing_is_lost(folder, sorted(written - earlier))
    text = json.dumps({**source, "files": sorted(written)}, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    # First, so that a folder that is saved in part is known as one.
    write_atomically(folder / SOURCE, partial(_write_text, text=text))
    # Where it says so, transformers takes the tensors for those of torch.
    write = partial(save_model, model, metadata={"format": "pt"})
    write_atomically(folder / WEIGHTS, lambda path: write(str(path)))
    for file, text in texts.items():
        write_atomically(folder / file, partial(_write_text, text=text))
    if prepares:
        prepares.save_pretrained(folder)
    for file in earlier - written:
        (folder / file).unlink(missing_ok=True)


def _check_widths(model: nn.Module, plan: PruningPlan) -> None:
    """Raise ValueError if a model was not pruned to a plan."""
    for down, kept in plan.keep.items():
        site = plan.sites[down]
        if isinstance(site, (HeadRanks, Stream)):
            found = site.channels_left(model)
        else:
            found = _width(model, down) - site.first
        expected = len(kept) * site.unit_width
        if found != expected:
            raise ValueError(
                f"{down} has {found} input channels, the plan keeps {expected}; save the model "
                "that was pruned to this plan"
            )


def _check_nothing_is_lost(folder: Path, files: Iterable[str]) -> None:
    """Raise ValueError if files would be replaced that no earlier save wrote."""
    if found := [file for file in files if (folder / file).exists()]:
        raise ValueError(
            f"{folder} holds {', '.join(found)}, which save_pruned did not write; name another "
            "folder"
        )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _texts(
    model: nn.Module,
    plan: PruningPlan,
    source: dict[str, Any],
    dense: nn.Module | None,
    report: Report,
) -> dict[str, str]:
    """What other libraries open the folder by, and the model card."""
    texts: dict[str, str] = {}
    opener = None
    if source["library"] == "transformers" and dense is not None:
        texts, opener = transformers_files(model, source, dense)
    if source["library"] == "timm":
        texts = timm_files(model, source, plan.sites, plan.widths)
        opener = "timm" if texts else None
    card = model_card(source["library"], source["name"], report, opener=opener)
    return {**texts, CARD: card}


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
