"""Multiply-accumulates of a model and of its modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tp_amp.running.inputs import Inputs, runner
from tp_amp.running.restoring import evaluating, shapes_first
from tp_amp.structure.attention.adapting import exposing


def macs_of(
    model: nn.Module, inputs: Inputs, forward_fn: Callable[..., Any] | None = None
) -> dict[str, float]:
    """As `count_macs`, on the meta device where the model runs there."""
    return shapes_first(
        model, inputs, lambda given, _: count_macs(model, given, forward_fn), forward_fn
    )


def count_macs(
    model: nn.Module, inputs: Inputs, forward_fn: Callable[..., Any] | None
) -> dict[str, float]:
    """Multiply-accumulates of each module on some inputs, those of its children included."""
    run = runner(model, forward_fn)
    counter = FlopCounterMode(display=False)
    # With gradients, since nn.MultiheadAttention goes a fused way without, which isn't counted.
    with torch.enable_grad(), evaluating(model, trainable=True), exposing(model), counter:
        inputs.call(run)
    top = type(model).__name__
    found = {
        name.removeprefix(top).removeprefix("."): sum(counts.values()) / 2
        for name, counts in counter.flop_counts.items()
        if name != "Global"
    }
    # A forward_fn may go round the model's own call, which has no entry then.
    return found | {"": counter.get_total_flops() / 2}
