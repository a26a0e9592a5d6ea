"""One run of distillation: models on their devices, optimizer, schedule and state."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tp_amp.distillation.features import Features, losses
from tp_amp.distillation.state import (
    History,
    Settings,
    cosine,
    find_state,
    learning_rate,
    load_state,
    save_state,
    write_losses,
)
from tp_amp.distillation.trainable import Average
from tp_amp.running.batches import bar, stream
from tp_amp.running.inputs import Inputs, prepare
from tp_amp.running.restoring import seeded

logger = logging.getLogger(__name__)


class Run:
    """One distillation: models on their devices, optimizer, average, and losses so far."""

    def __init__(
        self,
        features: tuple[Features, Features],
        batches: Iterable[Any],
        images: int,
        settings: Settings,
        accelerator: Any,
        folder: Path | None,
        resume: bool,
    ) -> None:
        self.settings, self.accelerator, self.folder = settings, accelerator, folder
        self.student, self.teacher = features
        processes = accelerator.num_processes
        self.batches: Any = batches
        if isinstance(batches, DataLoader) and processes > 1:
            self.batches = accelerator.prepare(batches)
        elif processes > 1:
            self.batches = _Share(batches, accelerator.process_index, processes)
        count = len(self.batches)
        self.steps = math.ceil(count / settings.accumulate)
        self.peak = settings.learning_rate * images * settings.accumulate * processes / 256
        if self.steps == 0 or self.peak < settings.minimum_learning_rate:
            raise ValueError(
                f"the peak learning rate of {self.peak} for {count} batches of {images} images "
                f"lies below the minimum, {settings.minimum_learning_rate}"
            )
        record = settings.record(steps=self.steps, processes=processes, images=images)
        state = find_state(folder, resume, record)
        self.record = {"settings": record}
        self.history: History = {"loss": [], **{n: [] for n in settings.weights}}
        self.history["learning_rate"] = []
        # FSDP takes a model apart for good.
        self.sharded = getattr(accelerator.distributed_type, "value", "") == "FSDP"
        trained = copy.deepcopy(self.student) if self.sharded else self.student
        self.model, self.optimizer = accelerator.prepare(trained, _optimizer(trained))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.average = None if settings.ema is None else Average(parameters, settings.ema)
        self.epoch = 0
        if state is not None:
            self.epoch, self.history = load_state(state, accelerator, self.average)
            logger.info("going on from %s", state)

    def train(self, progress: bool) -> None:
        """Run all epochs that are left, and leave the result in the student."""
        total = self.steps * self.settings.epochs
        progress = progress and self.accelerator.is_main_process
        with bar(None, description="distilling", progress=progress, total=total) as shown:
            shown.update(self.epoch * self.steps)
            while self.epoch < self.settings.epochs:
                with seeded_on(self.accelerator.device, self.settings.seed * 10_000 + self.epoch):
                    self._epoch(shown)
                self.epoch += 1
                self._save()
        if self.average is not None:
            self.average.apply()
        if self.sharded:
            weights = self.accelerator.get_state_dict(self.model)
            if weights:
                self.student.load_state_dict(weights)

    def _epoch(self, shown: Any) -> None:
        _set_epoch(self.batches, self.epoch, self.settings.seed)
        read = stream(self.batches, self.student.model, description="", progress=False)
        done = 0
        for group in _groups(read, self.settings.accumulate):
            rate = self._schedule(self.epoch * self.steps + done)
            terms = self._step(group)
            loss = self._sum(terms)
            for name, value in {"loss": loss, **terms, "learning_rate": rate}.items():
                self.history[name].append(value)
            done += 1
            shown.update()
            shown.set_postfix(epoch=self.epoch + 1, loss=f"{loss:.4g}", refresh=False)
        if done != self.steps:
            raise ValueError(f"the data's length makes {self.steps} steps, reading it gave {done}")
        mean = sum(self.history["loss"][-done:]) / done
        logger.info("epoch %d: mean loss %.6g", self.epoch + 1, mean)

    def _schedule(self, step: int) -> float:
        """Set one step's learning rate and weight decay."""
        settings, total = self.settings, self.steps * self.settings.epochs
        warmup = min(total, round(settings.warmup_epochs * self.steps))
        rate = learning_rate(step, total, warmup, self.peak, settings.minimum_learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            if group["decays"]:
                group["weight_decay"] = cosine(step / total, *settings.weight_decay)
        return rate

    def _step(self, group: list[Inputs]) -> dict[str, float]:
        """One step over a group of batches, the gradient that of one large batch."""
        images = sum(inputs.images for inputs in group)
        sums: dict[str, Tensor] = {}
        for i, inputs in enumerate(group):
            last = i == len(group) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                terms = self._terms(inputs)
                share = inputs.images / images
                self.accelerator.backward(self._sum(terms) * share)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() * share
        reduced = self.accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
        means: dict[str, float] = dict(zip(sums, reduced, strict=True))
        if not math.isfinite(self._sum(means)):
            raise ValueError(
                f"the loss is {means} in epoch {self.epoch + 1}; the student keeps the weights of "
                "the step before; check the images for NaN, and lower the learning rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        return means

    def _sum(self, terms: Mapping[str, Any]) -> Any:
        return sum(self.settings.weights[name] * value for name, value in terms.items())

    def _terms(self, inputs: Inputs) -> dict[str, Tensor]:
        with torch.no_grad(), self.accelerator.autocast():
            target = prepare(inputs.raw(), self.teacher.model).call(self.teacher)
        found = inputs.call(self.model)
        return losses(found, target, self.settings.weights, self.settings.temperature)

    def _save(self) -> None:
        if self.folder is None:
            return
        if self.accelerator.is_main_process:
            write_losses(self.folder, self.history, self.steps)
        record = {**self.record, "history": self.history}
        save_state(self.folder, self.epoch, self.accelerator, self.average, record)


class _Share:
    """Every n-th batch of an iterable, the same number for each process."""

    def __init__(self, batches: Any, index: int, processes: int) -> None:
        self.batches, self.index, self.processes = batches, index, processes

    def __len__(self) -> int:
        return len(self.batches) // self.processes

    def __iter__(self) -> Iterator[Any]:
        every = itertools.islice(self.batches, self.index, None, self.processes)
        return itertools.islice(every, len(self))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in trained if (p.dim() > 1) == decays],
            "decays": decays,
            "weight_decay": 0.0,
        }
        for decays in (True, False)
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95))


def _groups(items: Iterator[Inputs], size: int) -> Iterator[list[Inputs]]:
    while group := list(itertools.islice(items, size)):
        yield group


def _set_epoch(batches: Any, epoch: int, seed: int) -> None:
    """Let the order of batches depend on seed and epoch alone."""
    if hasattr(batches, "set_epoch"):
        batches.set_epoch(epoch)
    for generator in generators_of(batches):
        generator.manual_seed(seed * 10_000 + epoch)


def generators_of(batches: Any) -> list[torch.Generator]:
    """The generators of its own that a DataLoader, accelerate's too, draws from."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    within = getattr(batch_sampler, "batch_sampler", None)  # accelerate's share of it
    holders = (batches, *(getattr(part, "sampler", None) for part in (batches, within)))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


@contextmanager
def seeded_on(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the CPU's generators and the device's, and restore them."""
    devices = [device] if device.type == "cuda" else []
    with seeded(seed), torch.random.fork_rng(devices):
        if devices:
            torch.cuda.manual_seed(seed)
        yield
