"""Entropies measured on as many calibration images as a verdict needs: a sequential test."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tp_amp.importance.objectives import Objective
from tp_amp.running.batches import stream
from tp_amp.running.fingerprints import some_values
from tp_amp.running.restoring import evaluating
from tp_amp.search.estimated_means import looks

logger = logging.getLogger(__name__)

STORED = "sequential "  # what names in a checkpoint start with
_VALUES, _IMAGES = f"{STORED}values ", f"{STORED}images"
_SAME = (
    "the sequential test compares image by image: switch shuffling and augmentation off, or leave "
    "error_probability out"
)


class Forwards(NamedTuple):
    """Images that a search ran the model on, and those of the same probes on all images."""

    used: int
    plain: int


class SequentialTest:
    """The entropies of a search's models, each on as many calibration images as were needed.

    Whether they are enough, `Verdicts` tells. With the objective `"prediction"` each image has a
    value; else each batch has one, as the objective compares the images of a batch, or is a
    callable.

    Args:
        model: what is run.
        batches: the same ones in the same order each time, drawn at random.
        objective: resolved.
        error_probability: that a probe is judged otherwise than on all images.
        stored: the tensors of a checkpoint.

    Raises:
        ValueError: the batches are others than before.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        objective: Objective,
        error_probability: float,
        stored: Mapping[str, Tensor],
    ) -> None:
        self.model, self.batches, self.objective = model, batches, objective
        self.error_probability = error_probability
        self._each_image = objective.kind == "prediction"
        self._seen: list[bytes] = []  # a few values of each batch, and below its images
        self._images: list[int] = stored[_IMAGES].tolist() if _IMAGES in stored else []
        # By the state's name, a tensor for each batch that it was measured on.
        self._values: dict[str, list[Tensor]] = {
            name.removeprefix(_VALUES): self._by_batch(values)
            for name, values in stored.items()
            if name.startswith(_VALUES)
        }

    @property
    def stored(self) -> dict[str, Tensor]:
        """What a later run goes on from."""
        values = {_VALUES + state: torch.cat(found) for state, found in self._values.items()}
        return {**values, _IMAGES: torch.tensor(self._images)}

    @property
    def forwards(self) -> Forwards:
        """Images that all states so far took, and would have taken."""
        used = sum(sum(self._images[: len(found)]) for found in self._values.values())
        return Forwards(used, sum(self._images) * len(self._values))

    def measured(self, state: str) -> int:
        """How many batches a state was measured on."""
        return len(self._values.get(state, []))

    def complete(self, state: str) -> bool:
        """Whether a state was measured on all batches."""
        return bool(self._images) and self.measured(state) == len(self._images)

    def measure(self, state: str, enough: Callable[[], bool] = lambda: False) -> None:
        """Run the model, which `state` names, on the batches that are left until it is `enough`."""
        values, images = list(self._values.get(state, [])), []
        skipped, every = len(values), looks(self.sizes())
        with torch.no_grad(), evaluating(self.model, trainable=False):
            passes = stream(self.batches, self.model, description="calibration", progress=False)
            for place, inputs in enumerate(passes):
                self._check(place, inputs.tensors()[0])
                images.append(inputs.images)
                if place < skipped:
                    continue
                values.append(self.objective.values(self.model, inputs).cpu())
                self._values[state] = values
                if len(values) in every and enough():
                    return
        if not self._images:
            self._images = images
            self._check_order(values)
        if images != self._images:
            raise ValueError(
                f"the calibration images come in {len(images)} batches, before in "
                f"{len(self._images)}, or in others; {_SAME}"
            )

    def mean(self, state: str) -> float:
        """The entropy (nats) of a complete state, as `mean_objective` has it."""
        total = 0.0  # sum() would add up more exactly
        for values, images in zip(self._values[state], self._images, strict=True):
            total += float(values.mean()) * images
        return total / sum(self._images)

    def values(self, state: str, batches: int) -> Tensor:
        """The objective on the first batches, `(values,)`; its mean over all is that of images."""
        found = self._values[state][:batches]
        if not self._each_image:
            average = sum(self._images) / len(self._images)
            found = [v * n / average for v, n in zip(found, self._images, strict=False)]
        return torch.cat(found).double()

    def sizes(self) -> list[int]:
        """How many values each batch gives."""
        return self._images if self._each_image else [1] * len(self._images)

    def _by_batch(self, values: Tensor) -> list[Tensor]:
        sizes = self.sizes()
        batches = list(accumulate(sizes)).index(len(values)) + 1
        return list(torch.split(values, sizes[:batches]))

    def _check(self, place: int, images: Tensor) -> None:
        few = some_values(images)
        if place == len(self._seen):
            self._seen.append(few)
        if self._seen[place] != few:
            raise ValueError(
                f"batch {place} of the calibration images is another one than before; {_SAME}"
            )

    def _check_order(self, values: Sequence[Tensor]) -> None:
        """Warn where the batches are no random draws, by an analysis of variance."""
        if not self._each_image or len(values) < 4 or len({len(v) for v in values[:-1]}) > 1:
            return
        groups = torch.stack([group.double() for group in values if len(group) == len(values[0])])
        within = float(groups.var(1).mean()) / groups.shape[1] if groups.shape[1] > 1 else 0.0
        if within and float(groups.mean(1).var()) / within > 1 + 5 * math.sqrt(2 / len(groups)):
            logger.warning(
                "the calibration batches differ more than random draws do; the sequential test "
                "needs images in random order: shuffle them once"
            )
