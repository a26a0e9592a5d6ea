"""What a module with one parameter entry for each channel does to a stream, told by values."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["centred", "uncentred", "scale"]

_TOLERANCE = 1e-9


def plain(module: nn.Module) -> nn.Module:
    """A copy of a norm in double precision that only normalises: weights of one, no bias."""
    made = copy.deepcopy(module).double()
    for name, parameter in made.named_parameters(recurse=False):
        parameter.data.fill_(0.0 if name == "bias" else 1.0)
    return made


@torch.no_grad()
def kind_of(module: nn.Module, channels: int) -> Kind | None:
    """Tell a LayerNorm, an RMSNorm and a scale from each other, whatever their classes.

    A scale of one is the identity. A norm commutes with rotations: with all of them, or, where it
    subtracts the mean, with those that leave the all-ones vector in place.

    Args:
        module: is not changed.
        channels: how many it has, in the last dimension of what it reads.

    Returns:
        None for all else.
    """
    others = {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 5, channels, generator=generator, dtype=torch.double)
    values = values.to(next((p.device for p in module.parameters()), "cpu"))
    try:
        norm = plain(module).eval()
        given = norm(values)
        if not isinstance(given, Tensor) or given.shape != values.shape:
            return None
        if torch.equal(given, values):
            return "scale"
        if others:
            return None
        turns = {"uncentred": reflection(values[0, 0])}
        turns["centred"] = reflection(values[0, 0] - values[0, 0].mean())
        for kind, turn in turns.items():
            if bool(((norm(values @ turn) - given @ turn).abs() < _TOLERANCE).all()):
                return kind  # type: ignore[return-value]
    except Exception:  # whatever it takes, it is no plain norm
        return None
    return None


def reflection(normal: Tensor) -> Tensor:
    """The reflection at the plane behind a vector; it leaves what is orthogonal to it in place."""
    unit = normal / normal.norm()
    return torch.eye(len(unit), dtype=unit.dtype, device=unit.device) - 2 * torch.outer(unit, unit)
