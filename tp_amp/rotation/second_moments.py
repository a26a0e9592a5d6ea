"""Sums over all images that rotations are chosen by, collected at places of the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.batches import stream
from tp_amp.running.distributed import add_up_named, together
from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import hooks
from tp_amp.structure.observing import observing


class SecondMoments(ABC):
    """Products of what a model computes at some places, summed in float64 over all batches.

    Attributes:
        sums: name of a place -> what was added there.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sums: dict[str, Tensor] = {}

    @abstractmethod
    def watch(self) -> Iterable[Any]:
        """Hooks that add to the sums."""

    def start(self, inputs: Inputs) -> None:  # noqa: B027 - not all need it
        """A batch comes."""

    def collect(self, batches: Iterable[Any], *, progress: bool) -> None:
        """Run the model on all batches; every rank then holds the sums of all.

        Raises:
            ValueError: a sum is not finite.
        """
        with together("the moments of a rotation"):
            with observing(self.model, gradients=False), hooks(self.watch()):
                for inputs in stream(
                    batches, self.model, description="rotation", progress=progress
                ):
                    self.start(inputs)
                    inputs.call(self.model)
            self.sums = add_up_named("the moments of a rotation", self.sums)
        for name, found in self.sums.items():
            if not bool(torch.isfinite(found).all()):
                raise ValueError(f"activations of {name} are not finite; check the images for NaN")
