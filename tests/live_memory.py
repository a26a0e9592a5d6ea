"""What tensors hold on the CPU, step by step, those that autograd saves included."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "step of "


class Steps:
    """Marks steps of loops, by name, while a profiler notes what is allocated and given back."""

    def __init__(self) -> None:
        self.profiler: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def mark(self, name: str) -> None:
        """A step of a loop begins."""
        with record_function(_MARK + name):
            pass

    def run(self, function: Callable[[], Any]) -> dict[str, list[int]]:
        """Run a function: name of a loop -> bytes at the beginning of each step.

        They are those of tensors made since the function began, so that what it was given does not
        count.
        """
        gc.collect()  # or what earlier tests left is given back on the way, and counted
        with self.profiler:
            result = function()
        events = self.profiler.profiler.kineto_results.events()
        live, found = 0, dict[str, list[int]]()
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == "[memory]":
                live += event.nbytes()
            elif event.name().startswith(_MARK):
                found.setdefault(event.name().removeprefix(_MARK), []).append(live)
        del result  # not before: it counts, as what a call returns does
        return found

    @contextmanager
    def of_runs(self, module: nn.Module, name: str) -> Iterator[None]:
        """Each call of a module is a step."""
        handle = module.register_forward_pre_hook(lambda _module, _args: self.mark(name))
        try:
            yield
        finally:
            handle.remove()
