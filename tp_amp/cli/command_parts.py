"""What several commands of `tp-amp` do alike: models, images, sizes, and what is saved."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tp_amp.data.drawing import draw
from tp_amp.data.images import Images
from tp_amp.data.loaded import Loaded
from tp_amp.data.sources import load
from tp_amp.evaluation.fidelity import class_count
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.plan.saving import save_pruned
from tp_amp.reports.report import Report
from tp_amp.running.checks import check_values
from tp_amp.running.inputs import example
from tp_amp.structure.macs import macs_of

logger = logging.getLogger(__name__)

RECORD, REPORT = "prune.json", "report.json"


@dataclass(frozen=True)
class Answer:
    """What a command prints: a text, or one JSON object."""

    text: str
    record: dict[str, Any]


def load_model(options: Namespace) -> Loaded:
    """The model that the command names, with sound weights, on its device and in its dtype."""
    device = find_device(options.device)
    loaded = load(
        options.model,
        arguments=dict(options.model_args),
        pretrained=options.pretrained,
        weights=options.weights,
    )
    check_values(loaded.model)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    loaded.model.to(device, dtype).eval()
    return loaded


def find_device(name: str) -> torch.device:
    """The device of `--device`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # fails on the meta device too
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} is not there ({str(error).splitlines()[0]}); --device cpu always is"
        ) from error
    return device


def draw_batches(
    options: Namespace, images: Images, loaded: Loaded
) -> tuple[bool, list[list[Any]]]:
    """Images that score, and others that judge; with labels where they are the model's classes."""
    if not (options.pretrained or options.weights or loaded.plan):
        logger.warning(
            "%s has random weights, good for trying commands only; --pretrained or --weights FILE "
            "gives it trained ones",
            options.model,
        )
    classes = class_count(loaded.model, example(loaded.blank()))
    labelled = classes is not None and images.classes == classes
    if images.classes and classes and not labelled:
        logger.warning(
            "the labels of %s are left out: %d classes, the model has %d",
            options.data,
            images.classes,
            classes,
        )
    return labelled, draw(
        images,
        loaded.transform,
        (options.images, options.search_images),
        mode=loaded.mode,
        labelled=labelled,
        batch_size=options.batch_size,
        seed=options.seed,
        skip_corrupt=options.skip_corrupt,
    )


def write_model(
    loaded: Loaded, plan: PruningPlan, report: Report, record: dict[str, Any], folder: Path
) -> None:
    """Save a pruned model with all that makes it a model of the command line."""
    origin = {"library": loaded.library, "name": loaded.name}
    save_pruned(
        loaded.model,
        folder,
        plan,
        **origin,
        arguments=loaded.arguments,
        processor=loaded.processor,
        report=report,
    )
    report.save(folder / REPORT)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def size_of(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Parameters, and multiply-accumulates of one image."""
    macs = macs_of(model, example(inputs))[""]
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": int(macs)}


def count_images(batches: list[Any]) -> int:
    """How many images some batches hold."""
    return sum(len(batch[0] if isinstance(batch, tuple) else batch) for batch in batches)
