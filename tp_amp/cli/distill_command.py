"""What `tp-amp distill` does."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import tp_amp
from tp_amp.cli.command_parts import (
    RECORD,
    Answer,
    count_images,
    draw_batches,
    find_device,
    write_model,
)
from tp_amp.cli.describing import changed, widths
from tp_amp.cli.output_folder import check_output, staging
from tp_amp.data.images import open_images
from tp_amp.data.loaded import Loaded
from tp_amp.data.sources import load, load_teacher
from tp_amp.evaluation.fidelity import default_metric
from tp_amp.plan.file_names import PLAN, SOURCE
from tp_amp.running.checkpoint import Checkpoint, model_digest
from tp_amp.running.checks import check_values

logger = logging.getLogger(__name__)

_SETTINGS = ("train", "epochs", "learning_rate", "batch_size", "seed")


def distill(options: Namespace) -> Answer:
    """Train a pruned model from its dense teacher, and write it whole or not at all."""
    output, device = Path(options.output), find_device(options.device)
    accelerator = _accelerator(device)
    check_output(output, options.overwrite)
    record = _record(Path(options.folder))
    images = open_images(options.data, options.split)
    loaded, teacher = _models(options, record, device)
    student = loaded.model
    plan: Any = loaded.plan  # a folder has one
    with staging(output, student) as folder:
        _, (training, judging) = draw_batches(options, images, loaded)
        metric, measure = default_metric(teacher, judging)
        before = measure(student)
        tp_amp.distill(
            student,
            teacher,
            _loader(training, options.batch_size),
            train=options.train,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            warmup_epochs=min(1.0, options.epochs / 10),
            accelerator=accelerator,
            folder=_checkpoint(options, student, teacher),
            resume=options.checkpoint is not None,
            seed=options.seed,
        )
        after = measure(student)
        if not after > before:
            logger.warning(
                "the %s did not rise (%.4f -> %.4f); pass more images or epochs, or another "
                "--learning-rate",
                metric,
                before,
                after,
            )
        record |= {
            "output": options.output,
            "widths": widths(plan),
            "distillation": {
                "student": options.folder,
                "teacher": options.weights or "pretrained",
                **{key: getattr(options, key) for key in _SETTINGS},
                "images_trained": count_images(training),
                "images_judged": count_images(judging),
                "before": {metric: before},
                "after": {metric: after},
            },
            "versions": {"tp_amp": tp_amp.__version__, "torch": torch.__version__},
        }
        report = plan.report(*tp_amp.measure_both(teacher, student, judging))
        write_model(loaded, plan, report, record, folder)
    told = f"{count_images(judging)} images that did not train"
    files = ", ".join(sorted(path.name for path in output.iterdir()))
    saved = f"saved in {output}: {files}\nnext: tp-amp report {output}"
    return Answer(f"{changed(metric, before, after, told)}\n{saved}", record)


def _accelerator(device: torch.device) -> Any:
    """An accelerator on the device that was asked for."""
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("install tp-amp[distill] for tp-amp distill") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return Accelerator(cpu=device.type == "cpu")


def _record(folder: Path) -> dict[str, Any]:
    """What tp-amp prune told of a folder; empty where save_pruned wrote it."""
    for name in (SOURCE, PLAN):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} holds no {name}; the student is a folder that tp-amp prune made"
            )
    try:
        content = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / RECORD} is damaged ({error}); prune again") from error
    return dict(content)


def _models(
    options: Namespace, record: dict[str, Any], device: torch.device
) -> tuple[Loaded, nn.Module]:
    """The student with what feeds it, and the teacher, on one device and in one dtype."""
    loaded = load(options.folder)
    teacher = load_teacher(
        Path(options.folder),
        origin=record.get("spec"),
        pretrained=options.pretrained,
        weights=options.weights,
    )
    dtype = getattr(torch, options.dtype) if options.dtype else loaded.blank().dtype
    for model in (loaded.model, teacher):
        check_values(model)
        model.to(device, dtype).eval()
    return loaded, teacher


def _loader(batches: list[Any], batch_size: int) -> DataLoader[Any]:
    """Images without labels, in another order in each epoch."""
    images = torch.cat([batch[0] if isinstance(batch, tuple) else batch for batch in batches])
    dataset: Any = images
    return DataLoader(dataset, batch_size, shuffle=True, generator=torch.Generator())


def _checkpoint(options: Namespace, student: nn.Module, teacher: nn.Module) -> Path | None:
    """The folder of the states, which belong to these models and images alone."""
    if options.checkpoint is None:
        return None
    folder = Path(options.checkpoint)
    identity = {
        "student": model_digest(student),
        "teacher": model_digest(teacher),
        **{key: getattr(options, key) for key in ("data", "split", "images", "search_images")},
    }
    Checkpoint(folder / "run.safetensors", identity).write({}, {})
    return folder
