"""Activations times gradients at the layers' inputs, added up while batches run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.importance.objectives import Objective
from tp_amp.running.arguments import check_names
from tp_amp.running.checkpoint import Checkpoint
from tp_amp.running.distributed import Turn, add_up_named, is_first
from tp_amp.running.restoring import hooks

logger = logging.getLogger(__name__)


class Recorder:
    """Accumulates |sum over tokens of h * dE/dh| of every Linear's and convolution's input."""

    def __init__(self, model: nn.Module, layers: Collection[str] | None) -> None:
        # Transposed and depthwise convolutions included: TP couples their input channels too.
        types = (nn.Linear, nn.modules.conv._ConvNd)
        found = {name: m for name, m in model.named_modules() if isinstance(m, types)}
        if layers is not None:
            check_names(layers)
        unknown = set(layers or ()) - set(found)
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no Linears or convolutions of the model")
        self.names: dict[nn.Module, str] = {
            module: name for name, module in found.items() if layers is None or name in layers
        }
        self.sums: dict[str, Tensor] = {}
        self.seen = 0
        self.images = self.images_of_all = 0
        self.inputs: set[int] = set()

    def resume(self, saved: Checkpoint, device: torch.device) -> int:
        """Take up the sums of a run that was killed, and say how many batches they are of."""
        if is_first():  # the file holds the sums of all ranks
            self.sums = {name: tensor.to(device) for name, tensor in saved.tensors.items()}
        self.seen = saved.facts.get("images", 0)
        return int(saved.facts.get("batches", 0))

    def size(self) -> int:
        """Bytes of all sums."""
        return sum(total.nbytes for total in self.sums.values())

    def run(self, model: nn.Module, turn: Turn, objective: Objective) -> None:
        """Add what one batch of all ranks gives."""
        inputs, self.images_of_all = turn.inputs, turn.images
        self.seen += turn.images
        if inputs is None:  # the other ranks wait for this one in the objective
            objective.of_turn(model, turn)
            return
        self.images = inputs.images
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs.tensors()}
        with hooks(module.register_forward_pre_hook(self._watch) for module in self.names):
            value = objective.of_turn(model, turn)
            if not value.requires_grad:
                raise ValueError(
                    "the objective does not depend on any Linear's or convolution's input; "
                    "check that the objective reads the model's output with its gradient"
                )
            # Times the images, so that half-precision gradients of a mean don't underflow.
            (value * turn.images).backward()  # type: ignore[no-untyped-call]

    def _watch(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        # Input channels of the images are never pruned; gradients start after the first layer.
        if not args or args[0].untyped_storage().data_ptr() in self.inputs:
            return None
        hidden = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        return (_Told.apply(hidden, partial(self._add, module)), *args[1:])

    @torch.no_grad()
    def _add(self, module: nn.Module, hidden: Tensor, gradient: Tensor) -> None:
        name = self.names[module]
        if not isinstance(module, nn.Linear):
            hidden, gradient = (t.transpose(1, -1) for t in (hidden, gradient))
        channels = hidden.shape[-1]
        images = self.images
        if hidden.shape[0] % images:  # a table of positions, say, that all images share
            if name not in self.sums:
                logger.warning("%s reads %s, not images first: all are summed", name, hidden.shape)
            images = 1
        if hidden.dtype in (torch.float16, torch.bfloat16):
            hidden, gradient = hidden.float(), gradient.float()
        # Windows of one image lie next to each other, so they are summed like its tokens.
        product = (hidden * gradient).reshape(images, -1, channels)
        total = product.sum(1).abs().sum(0) / self.images_of_all
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def whole(self) -> dict[str, Tensor]:
        """The sums of all ranks."""
        return add_up_named("adding up the scores", self.sums)

    def means(self) -> dict[str, Tensor]:
        """Mean over all images seen; raises ValueError naming a layer with a score not finite."""
        scores = {name: total / self.seen for name, total in self.whole().items()}
        for name, score in scores.items():
            if not bool(torch.isfinite(score).all()):
                raise ValueError(
                    f"scores of {name} are not finite; check the images for NaN, or score in "
                    "float32 or bfloat16 instead of float16"
                )
        return scores


class _Told(torch.autograd.Function):
    """A layer's input as a tensor of its own: its gradient is that through this layer alone.

    The backward pass tells the input and the gradient. The input is saved as autograd saves what it
    needs: where blocks are run again in the backward pass, what is told is what that gave, and
    once, since no gradient flows through the second run.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tell: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.tell = tell
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.tell(*ctx.saved_tensors, gradient)
        return gradient, None
