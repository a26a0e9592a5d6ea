"""Peaks against those counted by hand, and times of layers that sleep."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor, nn

from tp_amp.evaluation.profiling import profiled
from tp_amp.running.inputs import Inputs

CPU = torch.device("cpu")


@torch.no_grad()
def test_the_peak_is_that_of_what_lives_at_the_same_time() -> None:
    """Of four layers' outputs two live at once: what a layer reads and what it writes."""
    model = nn.Sequential(*(nn.ReLU() for _ in range(4)))
    x = torch.randn(100, 1000)
    peak, outside = profiled(model, Inputs((x,)), CPU)
    assert peak == 2 * 4 * x.numel()
    assert outside == 1.0


@torch.no_grad()
def test_the_share_outside_linears_is_that_of_the_time() -> None:
    class Slow(nn.Module):
        def __init__(self, rest: float) -> None:
            super().__init__()
            self.layer, self.rest = nn.Linear(512, 512), rest

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                x = self.layer(x)
            time.sleep(self.rest)
            return x

    inputs = Inputs((torch.randn(256, 512),))
    for rest, low, high in ((0.0, 0.0, 0.5), (1.0, 0.6, 1.0)):
        model = Slow(rest)
        model(inputs.args[0])
        _, outside = profiled(model, inputs, CPU)
        assert outside is not None
        assert low <= outside < high


@torch.no_grad()
def test_where_nothing_can_be_told_the_model_still_runs() -> None:
    model = nn.Linear(2, 2).to("meta")
    assert profiled(model, Inputs((torch.ones(1, 2, device="meta"),)), torch.device("meta")) == (
        None,
        None,
    )
    with pytest.raises(ValueError, match="the model failed"):
        profiled(model, Inputs((torch.ones(1, 3, device="meta"),)), torch.device("meta"))


def test_the_terminal_stays_empty() -> None:
    """The profiler tells of itself, and of GPUs that it does not find, in a process's first use."""
    code = (
        "import os, torch, tp_amp\n"
        "print(tp_amp.measure(torch.nn.Linear(4, 4), [torch.randn(2, 4)]).activations)\n"
        "assert 'KINETO_LOG_LEVEL' not in os.environ"
    )
    environment = {name: value for name, value in os.environ.items() if "KINETO" not in name}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stderr == ""
    assert int(done.stdout) > 0
