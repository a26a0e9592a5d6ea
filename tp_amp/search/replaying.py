"""Modules that tell what they read or give, or give again what they gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tp_amp.running.restoring import replaced_forward


class Kept(NamedTuple):
    """What a module gave, in host memory, and the device that it belongs on."""

    values: Tensor
    device: torch.device

    def back(self) -> Tensor:
        """The values on their device."""
        return _on_device(self.values, self.device)


def stored(output: Any) -> Any:
    """A plain tensor in host memory; anything else as it is."""
    return Kept(_on_host(output), output.device) if type(output) is Tensor else output


def _on_host(values: Tensor) -> Tensor:
    """A copy in host memory, pinned of what CUDA holds: torch pins where a copy may be late.

    Nothing but the copy back reads it, which the device does after this one.
    """
    if values.device.type in ("cpu", "meta"):
        return values
    return values.to("cpu", non_blocking=values.is_cuda)


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, non_blocking=device.type == "cuda")


def giving(module: nn.Module, outputs: list[Any]) -> Any:
    """A module that gives what it gave, and runs nothing."""
    rest = iter(outputs)
    return replaced_forward(module, lambda own: lambda *_, **__: next(rest).back())


def telling(module: nn.Module, keep: Callable[[Any], None]) -> Any:
    """A module that tells what it gives."""

    def make(own: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = own(*args, **kwargs)
            keep(output)
            return output

        return forward

    return replaced_forward(module, make)


def announced(tell: Callable[[Any], None]) -> Callable[[Any], Any]:
    """A forward pass that tells its first argument before it runs."""

    def make(own: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            tell(args[0] if args else None)
            return own(*args, **kwargs)

        return forward

    return make
