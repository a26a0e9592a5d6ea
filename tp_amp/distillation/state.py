"""A distillation's settings, its state on disk after each epoch, and its picture."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tp_amp.distillation.features import TERMS
from tp_amp.running.arguments import check_flags, check_number, check_whole

logger = logging.getLogger(__name__)

FORMAT = 1
STATE, LOSSES, PICTURE, AVERAGE = "state.json", "losses.json", "losses.png", "average"
History = dict[str, list[float]]


@dataclass(frozen=True)
class Settings:
    """What decides a run's result, as `distill` takes it.

    Raises:
        ValueError: a value is out of range.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"cls": 1.0, "tokens": 1.0})
    train: Literal["all", "cut", "lora"] = "all"
    epochs: int = 10
    learning_rate: float = 2e-5
    minimum_learning_rate: float = 1e-7
    warmup_epochs: float = 1.0
    weight_decay: tuple[float, float] = (0.04, 0.2)
    accumulate: int = 1
    checkpointing: bool = False
    ema: float | None = None
    rank: int = 8
    temperature: float = 1 / 15
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping):
            raise TypeError(f"weights must be a dict of terms and numbers, found {self.weights!r}")
        if not self.weights or not set(self.weights) <= set(TERMS):
            raise ValueError(f"weights must name some of {TERMS}, found {list(self.weights)}")
        for weight in self.weights.values():
            check_number("positive", _positive, weights=weight)
        if self.train not in ("all", "cut", "lora"):
            raise ValueError(f"train must be 'all', 'cut' or 'lora', found {self.train!r}")
        check_whole(epochs=self.epochs, accumulate=self.accumulate, rank=self.rank)
        rates = {name: getattr(self, name) for name in ("learning_rate", "temperature")}
        check_number("positive", _positive, **rates)
        others = {n: getattr(self, n) for n in ("minimum_learning_rate", "warmup_epochs")}
        check_number("zero or more", lambda value: value >= 0, **others)
        check_flags(checkpointing=self.checkpointing)
        if self.ema is not None:
            check_number("a number between 0 and 1", lambda value: 0 < value < 1, ema=self.ema)
        if not isinstance(self.weight_decay, Sequence) or len(self.weight_decay) != 2:
            raise TypeError(f"weight_decay must be two numbers, found {self.weight_decay!r}")
        for decay in self.weight_decay:
            check_number("zero or more", lambda value: value >= 0, weight_decay=decay)
        if self.warmup_epochs >= self.epochs:
            logger.warning(
                "all %d epochs are warm-up; lower warmup_epochs, %s",
                self.epochs,
                self.warmup_epochs,
            )

    def record(self, **others: int) -> dict[str, Any]:
        """As JSON, with what else decides the result."""
        given: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return given | others


def _positive(value: float) -> bool:
    return value > 0


def learning_rate(step: int, steps: int, warmup: int, peak: float, minimum: float) -> float:
    """The rate of one step: linear to the peak over the warm-up, then a cosine to the minimum.

    Args:
        step: counted from 0.
        steps: of the whole run.
        warmup: steps until the peak.
        peak: highest rate.
        minimum: what the cosine comes near at the last step.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine((step - warmup) / max(1, steps - warmup), peak, minimum)


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def save_state(folder: Path, epoch: int, accelerator: Any, average: Any, record: Any) -> None:
    """Write the state after an epoch, and only then remove that of the epoch before."""
    from safetensors.torch import save_file

    part, final = folder / ".part", folder / f"epoch-{epoch:04}"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    if average is not None:
        tensors = {str(i): _local(value) for i, value in enumerate(average.values)}
        save_file(tensors, part / f"{AVERAGE}_{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / STATE).write_text(json.dumps({"format": FORMAT, "epoch": epoch, **record}))
        os.replace(part, final)
        for other in folder.glob("epoch-*"):
            if other != final:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def find_state(folder: Path | None, resume: bool, settings: dict[str, Any]) -> Path | None:
    """The state to go on from; None to start.

    Raises:
        ValueError: there is a state and `resume` is false, or it is of another run.
    """
    found = max(folder.glob("epoch-*"), default=None) if folder else None
    if found is None:
        return None
    if not resume:
        raise ValueError(f"{found} is there; go on with resume=True, or choose another folder")
    try:
        state = json.loads((found / STATE).read_text())
        before = state["settings"] if state["format"] == FORMAT else {}
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{found} is no state of distill: {error!r}") from error
    changed = {
        name: (before.get(name), value)
        for name, value in settings.items()
        if before.get(name) != value
    }
    if changed:
        raise ValueError(f"{found} is of a run with other settings (then, now): {changed}")
    return found


def load_state(state: Path, accelerator: Any, average: Any) -> tuple[int, History]:
    """Read a state back; returns the epochs that are done and the losses so far."""
    from safetensors.torch import load_file

    accelerator.load_state(str(state))
    if average is not None:
        tensors = load_file(state / f"{AVERAGE}_{accelerator.process_index}.safetensors")
        for i, value in enumerate(average.values):
            _local(value).copy_(tensors[str(i)])
    record = json.loads((state / STATE).read_text())
    return record["epoch"], record["history"]


def _local(tensor: Any) -> Any:
    """This process's part of a tensor that FSDP has spread."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def write_losses(folder: Path, history: History, steps_per_epoch: int) -> None:
    """Write every step's loss, terms and learning rate as JSON, and draw them."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOSSES).write_text(json.dumps(history) + "\n")
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    epochs = [(step + 1) / steps_per_epoch for step in range(len(history["loss"]))]
    for name, values in history.items():
        if name != "learning_rate":
            axes.plot(epochs, values, linewidth=2 if name == "loss" else 1, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    if min(history["loss"]) > 0:
        axes.set_yscale("log")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    rates = axes.twinx()
    rates.plot(epochs, history["learning_rate"], color="#999999", linestyle=":")
    rates.set_ylabel("learning rate (dotted)")
    figure.legend(loc="outside upper center", ncols=len(history), frameon=False)
    figure.savefig(folder / PICTURE, dpi=120)
