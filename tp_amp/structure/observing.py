"""Run a model so that what its layers read can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tp_amp.running.checks import check_model
from tp_amp.running.restoring import evaluating
from tp_amp.structure.attention.adapting import exposing


@contextmanager
def observing(model: nn.Module, *, gradients: bool) -> Iterator[None]:
    """Run in eval mode, frozen and seeded, with every output projection called as a module."""
    check_model(model)
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        evaluating(model, trainable=False),
        exposing(model),
    ):
        yield
