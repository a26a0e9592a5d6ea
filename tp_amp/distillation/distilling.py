"""Distillation of a pruned model from its dense teacher, without labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tp_amp.distillation.features import Features, read_features
from tp_amp.distillation.run import Run, generators_of, seeded_on
from tp_amp.distillation.state import Settings
from tp_amp.distillation.trainable import adapted, checkpointed, cut_modules, held, used_parameters
from tp_amp.importance.outputs.features import image_tower
from tp_amp.running.batches import check_batches
from tp_amp.running.checks import check_model
from tp_amp.running.inputs import prepare
from tp_amp.running.restoring import eval_mode, seeded
from tp_amp.running.snapshot import given_back

logger = logging.getLogger(__name__)


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    weights: Mapping[str, float] | None = None,
    train: Literal["all", "cut", "lora"] = "all",
    epochs: int = 10,
    learning_rate: float = 2e-5,
    minimum_learning_rate: float = 1e-7,
    warmup_epochs: float = 1.0,
    weight_decay: tuple[float, float] = (0.04, 0.2),
    accumulate: int = 1,
    checkpointing: bool = False,
    ema: float | None = None,
    rank: int = 8,
    temperature: float = 1 / 15,
    accelerator: Any = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Train a pruned model, in place, to give its dense teacher's features, without labels.

    The loss of AMP (arXiv 2603.08100) and DGMR (arXiv 2506.08591): the mean squared error of the
    CLS token plus that of all other tokens, both before the final norm. A model without CLS gives
    the mean of its tokens in its place. AdamW with betas 0.9 and 0.95; biases and norms don't
    decay. What the loss does not depend on (final norm, head) is not trained.

    Args:
        student: as pruned; half-precision weights are float32 while they are trained.
        teacher: gives features of the same shape, usually a copy of the model before it was cut;
            it is left as it was.
        batches: a DataLoader or other iterable with a length, read once for each epoch; labels
            are ignored. It may have a `set_epoch`. Processes share a DataLoader out by samples
            and anything else by batches.
        weights: of the loss's terms; by default `{"cls": 1, "tokens": 1}`. Others are `logits`,
            the divergence of the classes from the teacher's, and `similarity`, AMP's divergence of
            each image's similarities to its batch (both in nats).
        train: `"all"`; `"cut"` freezes the layers that have the teacher's shape; `"lora"` trains
            adapters on the cut layers only, which are folded in at the end. What is frozen
            already stays so.
        epochs: the papers use 5 to 30 on ImageNet.
        learning_rate: at 256 images for each step; it is scaled by their number / 256, over all
            processes.
        minimum_learning_rate: where the cosine ends, not scaled.
        warmup_epochs: with a linear learning rate.
        weight_decay: at the start and at the end, a cosine between.
        accumulate: batches for each step.
        checkpointing: compute activations again in the backward pass to save memory.
        ema: decay of an exponential moving average of the weights, which the student then gets.
        rank: of the adapters.
        temperature: of `similarity`.
        accelerator: an `accelerate.Accelerator` of your own, for instance with
            `mixed_precision="bf16"` (autocast over float32 weights), DDP or FSDP; it is freed at
            the end. FSDP trains a copy, and the main process's student gets its weights.
        folder: gets the state after each epoch, `losses.json` and `losses.png`.
        resume: go on from the state in `folder`, if there is one; with the same student, teacher
            and batches the result is that of a run at one go.
        seed: of the order of batches, dropout and adapters.
        progress: show a bar on a terminal.

    Returns:
        The student.

    Raises:
        ValueError: the features' shapes differ, an argument is out of range, or nothing can be
            trained; the student is then as it was. Or, on the way, the loss is not finite or the
            batches are not as many as their length says.
        TypeError: `batches` has no length or can be read only once.
        ImportError: accelerate, matplotlib (for `folder`) or peft is not installed.

    Example:
        >>> import copy, timm, torch, tp_amp
        >>> teacher = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> student, images = copy.deepcopy(teacher), torch.randn(2, 3, 224, 224)
        >>> plan = tp_amp.plan_from_importance(student, images, tp_amp.DIMAPImportance(), 0.5)
        >>> tp_amp.apply_plan(student, images, plan)
        >>> student = tp_amp.distill(student, teacher, [images], epochs=1)
    """
    settings = Settings(
        weights={"cls": 1.0, "tokens": 1.0} if weights is None else weights,
        train=train,
        epochs=epochs,
        learning_rate=learning_rate,
        minimum_learning_rate=minimum_learning_rate,
        warmup_epochs=warmup_epochs,
        weight_decay=weight_decay,
        accumulate=accumulate,
        checkpointing=checkpointing,
        ema=ema,
        rank=rank,
        temperature=temperature,
        seed=seed,
    )
    for model in (student, teacher):
        check_model(model, values=True)
    _check_data(batches)
    accelerator = _accelerator(accelerator, folder is not None)
    pair = [image_tower(model) for model in (student, teacher)]
    with ExitStack() as stack:
        for generator in generators_of(batches):
            stack.callback(generator.set_state, generator.get_state())
        first = _first_batch(batches)
        features = _read_both(pair, first, settings)
        trained = _choose(pair[0], pair[1], features[0], first, settings)
        stack.callback(accelerator.free_memory)
        stack.enter_context(seeded_on(accelerator.device, seed))
        for model, masters in zip(pair, (True, False), strict=True):
            stack.enter_context(held(model, accelerator.device, masters=masters))
        # What the student's forward passes keep (statistics, say) is part of its training.
        stack.enter_context(eval_mode(pair[0], trainable=False))
        stack.enter_context(given_back(pair[1]))
        stack.enter_context(eval_mode(pair[1], trainable=False))
        stack.enter_context(checkpointed(pair[0], checkpointing))
        if train == "lora":
            stack.enter_context(adapted(pair[0], trained, rank))
        else:
            for name in trained:
                pair[0].get_parameter(name).requires_grad_(True)
        pair[0].train()
        images, place = prepare(first, pair[0]).images, None if folder is None else Path(folder)
        Run(features, batches, images, settings, accelerator, place, resume).train(progress)
    return student


def _check_data(batches: Any) -> None:
    check_batches(batches, repeatable=True)
    if not isinstance(batches, Sized):
        raise TypeError(
            "the learning rate needs the number of batches, and a "
            f"{type(batches).__name__} has no length; give it a __len__"
        )


def _first_batch(batches: Iterable[Any]) -> Any:
    """One batch, without drawing from the caller's generators."""
    with seeded(0):
        for batch in batches:
            return batch
    raise ValueError("the data holds no batch; pass a loader with at least one batch")


def _accelerator(accelerator: Any, draws: bool) -> Any:
    try:
        import accelerate

        if draws:
            import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("install tp-amp[distill] for distill") from error
    accelerator = accelerate.Accelerator() if accelerator is None else accelerator
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("use accumulate=, not the accelerator's gradient_accumulation_steps")
    return accelerator


def _read_both(pair: list[nn.Module], first: Any, settings: Settings) -> tuple[Features, Features]:
    """Both models with the features that the loss reads, checked for their shapes."""
    if set(pair[0].parameters()) & set(pair[1].parameters()):
        raise ValueError(
            "student and teacher share parameters, so the teacher would change; copy the dense "
            "model before it is cut: teacher = copy.deepcopy(model)"
        )
    names = set(settings.weights)
    (student, found), (teacher, expected) = (
        read_features(model, prepare(first, model), names) for model in pair
    )
    if found != expected:
        raise ValueError(
            f"the student's features have the shapes {found} at {student.place}, the teacher's "
            f"{expected} at {teacher.place}; distill from a model of the same width"
        )
    logger.info("features at %s", student.place)
    return student, teacher


def _choose(
    student: nn.Module, teacher: nn.Module, features: Features, first: Any, settings: Settings
) -> list[str]:
    """Names of the parameters that are trained, or of the layers that get adapters."""
    if settings.train == "lora":
        return cut_modules(student, teacher)
    used = used_parameters(features, prepare(first, student))
    unused = [name for name, _ in student.named_parameters() if name not in used]
    logger.info("the loss does not depend on, so these stay as they are: %s", unused)
    names = [name for name, p in student.named_parameters() if name in used and p.requires_grad]
    if settings.train == "cut":
        cut = cut_modules(student, teacher)
        names = [name for name in names if name.rpartition(".")[0] in cut]
    if not names:
        raise ValueError("nothing to train: all that the loss depends on is frozen")
    return names
