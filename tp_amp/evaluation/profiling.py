"""Where the time and the memory of one forward pass go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from tp_amp.running.inputs import Inputs

_PASS, _LINEAR, _MEMORY = "tp_amp forward pass", "aten::linear", "[memory]"
_LOG_LEVEL = "KINETO_LOG_LEVEL"


def profiled(
    model: nn.Module, inputs: Inputs, device: torch.device
) -> tuple[int | None, float | None]:
    """Run a model once, in PyTorch itself.

    Returns:
        The bytes that it holds at its peak, without its weights and inputs; and the share of its
        time outside Linears. None of what can't be told on the device.
    """
    if device.type == "cuda":
        return _peak_on_cuda(model, inputs, device), None
    if device.type != "cpu":
        inputs.call(model)
        return None, None
    profiler: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent(), profiler:
        with record_function(_PASS):
            outputs = inputs.call(model)
        del outputs  # not before: they are held while the pass ends
    live = peak = linear = whole = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == _MEMORY:
            live += event.nbytes()
            peak = max(peak, live)
        elif event.name() == _LINEAR:
            linear += event.duration_ns()
        elif event.name() == _PASS:
            whole += event.duration_ns()
    return peak, (1 - linear / whole if whole else None)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the profiler from telling on the terminal that it starts, ends and finds no GPU."""
    told = os.environ.get(_LOG_LEVEL)
    os.environ.setdefault(_LOG_LEVEL, "99")
    try:
        yield
    finally:
        if told is None:
            del os.environ[_LOG_LEVEL]


def _peak_on_cuda(model: nn.Module, inputs: Inputs, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    inputs.call(model)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
