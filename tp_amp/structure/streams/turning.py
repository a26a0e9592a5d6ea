"""Give a residual stream other coordinates, in place: the same function at full width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.structure.streams.residual_stream import Reading, Stream

# What may be missing of a bias that is kept in a norm, relative, in double precision.
_MISSING = 1e-9


class CannotTurn(ValueError):
    """Why a stream keeps its coordinates."""


@torch.no_grad()
def turn(model: nn.Module, stream: Stream, rotation: Tensor) -> None:
    """Fold norms and scales into the layers around them, then rotate the stream.

    A writer's W becomes Q W, its bias Q b, a token Q t; a reader's W becomes W diag(g) Q^T with the
    norm's weight g, and its bias takes up W b with the norm's bias b. Norms end with weights of
    one and, where all their readers have biases, biases of zero. Everything is computed in double
    precision.

    Args:
        model: holds the stream.
        stream: of it.
        rotation: Q, orthogonal, `(width, width)`; with Q 1 = 1 if the stream is centred.

    Raises:
        CannotTurn: a norm's bias finds no place; some parameters may be turned by then.
    """
    for norm in (*stream.norms, None):
        readings = [reading for reading in stream.readings if reading.norm == norm]
        _turn_readings(model, norm, readings, rotation, keeps_biases=stream.keeps_biases)
    for written in stream.written:
        parameter = model.get_parameter(written.path)
        values = parameter.double()
        if written.scale:
            scale = model.get_parameter(written.scale).double().flatten()
            values = values * scale.view(-1, *[1] * (values.dim() - 1 - written.dim))
        turned = values.movedim(written.dim, -1) @ rotation.to(values).mT
        parameter.copy_(turned.movedim(-1, written.dim))
    for path in stream.scales:
        model.get_parameter(path).fill_(1.0)


def _turn_readings(
    model: nn.Module,
    path: str | None,
    readings: Sequence[Reading],
    rotation: Tensor,
    *,
    keeps_biases: bool,
) -> None:
    """Turn what reads a stream through one norm, or as it is."""
    norm: Any = nn.Module() if path is None else model.get_submodule(path)
    gain, shift = (getattr(norm, name, None) for name in ("weight", "bias"))
    views = [_rows(reading, model.get_parameter(reading.weight)) for reading in readings]
    dense = [view.to(torch.double, copy=True) for view in views]
    turned = [_turned(weight, gain, rotation) for weight in dense]
    for view, weight in zip(views, turned, strict=True):
        view.copy_(weight)
    if gain is not None:
        gain.fill_(1.0)
    if shift is None:
        return
    before = shift.to(torch.double, copy=True)
    keep = [keeps_biases or reading.bias is None for reading in readings]
    after = _kept_bias(str(path), before, dense, turned, keep)
    shift.copy_(after)
    for reading, old, new, kept in zip(readings, dense, turned, keep, strict=True):
        if not kept:
            bias = _rows(reading, model.get_parameter(str(reading.bias)))
            bias.add_((_spread(old, before) @ before - _spread(new, after) @ after).to(bias))


def _rows(reading: Reading, values: Tensor) -> Tensor:
    """The view of what a reading takes of a weight or bias."""
    return values if reading.rows is None else values[slice(*reading.rows)]


def _turned(weight: Tensor, gain: Tensor | None, rotation: Tensor) -> Tensor:
    """W diag(g) Q^T, for each place that is read side by side."""
    if gain is not None:
        weight = (_places(weight, len(gain)) * gain.to(weight)[:, None]).reshape(weight.shape)
    rows = _places(weight, len(rotation)).transpose(2, 3)  # one product of two matrices
    return (rows @ rotation.to(weight).mT).transpose(2, 3).reshape(weight.shape)


def _places(weight: Tensor, channels: int) -> Tensor:
    """A weight as `(outputs, places, channels, kernel)`."""
    return weight.reshape(len(weight), -1, channels, weight[0, 0].numel())


def _spread(weight: Tensor, norm: Tensor) -> Tensor:
    """What a constant behind a norm is multiplied by, `(outputs, channels of the norm)`."""
    return _places(weight, len(norm)).sum((1, 3))


def _kept_bias(
    path: str,
    before: Tensor,
    dense: Sequence[Tensor],
    turned: Sequence[Tensor],
    keep: Sequence[bool],
) -> Tensor:
    """The least bias b' of a norm with W' b' = W b for the readers that can't take it up."""
    pairs = [
        (_apart(old, before), _apart(new, before))
        for old, new, kept in zip(dense, turned, keep, strict=True)
        if kept
    ]
    if not pairs or not bool(before.any()):
        return torch.zeros_like(before)
    target, weights = (
        torch.cat([old for old, _ in pairs]) @ before,
        torch.cat([n for _, n in pairs]),
    )
    # On the normal equations' pseudo-inverse digits would be lost.
    found: Tensor = torch.linalg.lstsq(weights.cpu(), target.cpu(), driver="gelsd").solution.to(
        before
    )
    missing = (weights @ found - target).norm() / target.norm().clamp_min(1e-30)
    if float(missing) > _MISSING:
        raise CannotTurn(
            f"the bias of {path} finds no place: its readers have no biases, and no bias gives in "
            "other coordinates what it gave; set it to zero, or give its readers biases"
        )
    return found


def _apart(weight: Tensor, norm: Tensor) -> Tensor:
    """A row for each output, place and entry of a kernel, `(rows, channels of the norm)`."""
    return _places(weight, len(norm)).transpose(2, 3).reshape(-1, len(norm))
