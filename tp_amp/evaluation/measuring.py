"""What a model costs and how well it does: size, MACs, speed, accuracy."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from tp_amp.evaluation.fidelity import output_reader
from tp_amp.evaluation.profiling import profiled
from tp_amp.importance.outputs.logits import ends_in_classifier, read_logits
from tp_amp.reports.numbers import Measurement
from tp_amp.running.arguments import check_whole
from tp_amp.running.batches import check_batches, stream
from tp_amp.running.checks import check_model
from tp_amp.running.inputs import Inputs, of_size
from tp_amp.running.restoring import evaluating
from tp_amp.running.runtimes.building import EAGER, Built, build, check_runtime
from tp_amp.running.timing import seconds
from tp_amp.structure.macs import macs_of

logger = logging.getLogger(__name__)

WARM_UP = 3  # runs that are not timed; in PyTorch two of them are those of the profile
_PROFILE = 2  # runs, of which the first is not looked at


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    repeats: int = 10,
    runtime: str = EAGER,
    batch_sizes: Sequence[int] = (),
    progress: bool = True,
) -> Measurement:
    """Measure a model's parameters, MACs, speed and, given labels, accuracy; it is left as it was.

    The model runs in eval mode, without gradients, on its device and in its dtype. The speed is
    that on the first batch. Only where batches hold labels are they all read. Two models measured
    one after the other compare well only on a machine that does nothing else; see `measure_both`.

    Args:
        model: dense or pruned.
        batches: images as for the importances; labels are read where a batch is `(images, labels)`
            or a dict with `labels`, as integers `(images,)`.
        repeats: forward passes that are timed.
        runtime: what the speed is measured in: `"eager"` (PyTorch), `"compile"` (torch.compile),
            `"onnxruntime"` (needs `tp-amp[export]`) or `"openvino"` (needs `tp-amp[openvino]`),
            with as many threads as PyTorch has. All else is measured in PyTorch.
        batch_sizes: further ones that the speed is measured at, such as `(1, 8, 64)`, with the
            images of the first batch over and over.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: there is no batch, the model fails on one, it is on the meta device, `repeats`
            is less than one, a label is none of the model's classes, or the runtime is unknown,
            can't run the model on its device or in its dtype, or fails on it.
        TypeError: the batches are of a type that can't be read.
        ImportError: the runtime is not installed.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
        >>> images, labels = torch.randn(2, 3, 224, 224), torch.tensor([3, 8])
        >>> measured = tp_amp.measure(model, [(images, labels)])
        >>> measured.parameters, measured.macs, measured.labelled_images
        (632842, 130952448.0, 2)
    """
    return _measure([model], batches, repeats, runtime, batch_sizes, progress)[0]


def measure_both(
    before: nn.Module,
    after: nn.Module,
    batches: Iterable[Any],
    *,
    repeats: int = 10,
    runtime: str = EAGER,
    batch_sizes: Sequence[int] = (),
    progress: bool = True,
) -> tuple[Measurement, Measurement]:
    """Measure two models that take turns, so that other load on the machine slows both alike.

    Where the batches hold no labels, all are read for the cosine similarity of the outputs.

    Args:
        before: the dense model, such as a copy made before it was pruned.
        after: the pruned model, on the same device and in the same dtype.
        batches: as for `measure`.
        repeats: forward passes of each that are timed.
        runtime: as for `measure`.
        batch_sizes: as for `measure`.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: as `measure`, or the models are on two devices or of two dtypes.
        TypeError: the batches are of a type that can't be read.
        ImportError: the runtime is not installed.

    Example:
        >>> import copy, timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
        >>> images = torch.randn(2, 3, 224, 224)
        >>> plan = tp_amp.plan_from_importance(model, images, tp_amp.DIMAPImportance(), 0.5)
        >>> pruned = copy.deepcopy(model)
        >>> tp_amp.apply_plan(pruned, images, plan)
        >>> report = plan.report(*tp_amp.measure_both(model, pruned, [images]))
        >>> report.before.parameters - report.after.parameters
        147840
    """
    first, second = _measure([before, after], batches, repeats, runtime, batch_sizes, progress)
    return first, second


@torch.no_grad()
def _measure(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    repeats: int,
    runtime: str,
    batch_sizes: Sequence[int],
    progress: bool,
) -> list[Measurement]:
    check_whole(repeats=repeats)
    if isinstance(batch_sizes, (int, str)):
        raise TypeError(f"batch_sizes must be some sizes, such as (1, 8), found {batch_sizes!r}")
    for size in batch_sizes:
        check_whole(batch_sizes=size)
    for model in models:
        check_model(model)
        check_runtime(runtime, model)
    check_batches(batches)
    weight = _like(models)
    unknown: list[float | None] = [None] * len(models)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model, trainable=False))
        rest = stream(batches, models[0], description="measuring", progress=progress)
        first = next(rest)
        macs = [macs_of(model, first)[""] / first.images for model in models]
        profiles = _profiles(models, first, weight.device)
        built = [build(model, first, runtime) for model in models]
        warm_up = WARM_UP - _PROFILE if runtime == EAGER else WARM_UP
        speeds = _speeds(built, first, weight.device, repeats, warm_up)
        exported = [_of_export(each) for each in built]
        further = _at_sizes(models, first, weight.device, repeats, runtime, batch_sizes)
        accuracies, labelled = _accuracies(models, first, rest)
        cosines = _cosines(models, first, rest) if accuracies[0] is None else unknown
    return [
        Measurement(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            macs=macs[i],
            images_per_second=speeds[i][1],
            quartiles=(speeds[i][0], speeds[i][2]),
            batch_size=first.images,
            repeats=repeats,
            device=_device(weight.device),
            dtype=_dtype(weight),
            accuracy=accuracies[i],
            labelled_images=labelled,
            cosine=cosines[i],
            runtime=runtime,
            activations=profiles[i][0],
            outside_linears=profiles[i][1],
            speeds=further[i],
            **exported[i],
        )
        for i, model in enumerate(models)
    ]


def _like(models: Sequence[nn.Module]) -> Tensor:
    """A weight with the device and dtype of all models."""
    floating = ((p for p in model.parameters() if p.is_floating_point()) for model in models)
    weights = [next(parameters, torch.empty(0)) for parameters in floating]
    if any(weight.is_meta for weight in weights):
        raise ValueError("the model is on the meta device, without values; give it weights first")
    kinds = {f"{weight.dtype} on {weight.device}" for weight in weights}
    if len(kinds) > 1:
        raise ValueError(f"the models are {' and '.join(sorted(kinds))}; move one to the other's")
    return weights[0]


def _profiles(
    models: Sequence[nn.Module], inputs: Inputs, device: torch.device
) -> list[tuple[int | None, float | None]]:
    """Of each model the bytes of its activations and the share of its time outside Linears."""
    for _ in range(_PROFILE - 1):
        for model in models:
            inputs.call(model)
    return [profiled(model, inputs, device) for model in models]


def _speeds(
    built: Sequence[Built], inputs: Inputs, device: torch.device, repeats: int, warm_up: int
) -> list[list[float]]:
    """Images per second of each model: lower quartile, median and upper quartile."""
    speeds: list[list[float]] = [[] for _ in built]
    for _ in range(warm_up + repeats):
        for each, found in zip(built, speeds, strict=True):
            found.append(inputs.images / seconds(each.run, inputs, device))
    return [numpy.quantile(found[warm_up:], (0.25, 0.5, 0.75)).tolist() for found in speeds]


def _of_export(built: Built) -> dict[str, int]:
    """What a measurement tells of the exported graph, if there is one."""
    if built.exported is None:
        return {}
    found = built.exported()
    return {
        "exported_parameters": found.parameters,
        "attentions": found.attentions,
        "fused_attentions": found.fused,
    }


def _at_sizes(
    models: Sequence[nn.Module],
    first: Inputs,
    device: torch.device,
    repeats: int,
    runtime: str,
    sizes: Sequence[int],
) -> list[tuple[tuple[int, float], ...]]:
    """Of each model the images per second at each batch size, medians."""
    found: list[list[tuple[int, float]]] = [[] for _ in models]
    for size in sizes:
        inputs = of_size(first, size)
        built = [build(model, inputs, runtime) for model in models]
        for speeds, rows in zip(_speeds(built, inputs, device, repeats, 1), found, strict=True):
            rows.append((size, speeds[1]))
    return [tuple(rows) for rows in found]


def _accuracies(
    models: Sequence[nn.Module], first: Inputs, rest: Iterable[Inputs]
) -> tuple[list[float | None], int]:
    """Each model's fraction of labelled images that it gets right, and how many there are."""
    unknown: list[float | None] = [None] * len(models)
    if first.labels is None:
        return unknown, 0
    for model in models:
        if not ends_in_classifier(model, first):
            name = type(model).__name__
            logger.warning("accuracy is not measured: %s does not end in a classifier", name)
            return unknown, 0
    right, total = [0] * len(models), 0
    for inputs in chain([first], rest):
        if inputs.labels is not None:
            total += inputs.images
            for i, model in enumerate(models):
                right[i] += _right(read_logits(inputs.call(model)), inputs.labels)
    return [count / total for count in right], total


def _cosines(
    models: Sequence[nn.Module], first: Inputs, rest: Iterable[Inputs]
) -> list[float | None]:
    """The mean cosine similarity of each model's outputs to the first one's, of two and more."""
    if len(models) < 2:
        return [None]
    try:
        read = output_reader(models[0], first)
    except TypeError as error:
        logger.warning("no cosine of the outputs is measured: %s", error)
        return [None] * len(models)
    totals, images = [0.0] * len(models), 0
    for inputs in chain([first], rest):
        outputs = [read(model, inputs).float() for model in models]
        images += inputs.images
        for i, found in enumerate(outputs):
            totals[i] += float(nn.functional.cosine_similarity(outputs[0], found).sum())
    return [total / images for total in totals]


def _right(logits: Tensor, labels: Tensor) -> int:
    """How many images have their largest logit at their label."""
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < logits.shape[1]:
        raise ValueError(
            f"labels from {low} to {high} are not all among the model's {logits.shape[1]} classes; "
            "pass the labels of its classes, or none"
        )
    return int((logits.argmax(1) == labels.to(logits.device)).sum())


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads".replace(", 1 threads", ", 1 thread")
    return str(device)


def _dtype(weight: Tensor) -> str:
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return f"autocast to {torch.get_autocast_dtype(kind)}".replace("torch.", "")
    return str(weight.dtype).removeprefix("torch.")
