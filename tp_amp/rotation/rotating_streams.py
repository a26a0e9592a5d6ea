"""Put every residual stream into coordinates in which leading channels hold the most."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.rotation.second_moments import SecondMoments
from tp_amp.rotation.stream_basis import StreamBasis, stream_basis
from tp_amp.rotation.telling import LeadingErrors
from tp_amp.running.checks import check_model
from tp_amp.running.inputs import Inputs
from tp_amp.running.watching import tokens_of
from tp_amp.structure.attention.finding import listed
from tp_amp.structure.model_structure import ModelStructure
from tp_amp.structure.streams.norm_kinds import plain
from tp_amp.structure.streams.reading_streams import turned_copy
from tp_amp.structure.streams.residual_stream import Stream

logger = logging.getLogger(__name__)

_ROWS = 4096  # in double precision at once


@dataclass(frozen=True)
class RotatedStream(LeadingErrors):
    """A residual stream, once its leading channels hold the most.

    Attributes:
        stream: what writes and reads it.
        errors: for each number of leading channels kept, from none to all, the share that is lost
            of the stream's second moment, as its norms give it: `(width + 1,)`.
        leads: some values that `rotate` left in the first channel, by which these coordinates are
            known again.

    Example:
        >>> import tp_amp
        >>> stream = tp_amp.Stream("embed", 2, True, (), ("norm",), ())
        >>> tp_amp.RotatedStream(stream, (1.0, 0.125, 0.0)).width_for(0.25)
        1
    """

    stream: Stream
    errors: tuple[float, ...]
    leads: tuple[float, ...] = ()


@torch.inference_mode(False)  # what is computed in it could not be put in place
def rotate(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    forward_fn: Callable[..., Any] | None = None,
    *,
    progress: bool = True,
) -> list[RotatedStream]:
    """Give each residual stream coordinates in which its leading channels hold the most.

    The model computes the same function, to rounding, with the same modules: scales and the affine
    part of norms are folded into the layers around them, and the stream is rotated by an orthogonal
    matrix that leaves the all-ones vector in place, so that LayerNorm stays LayerNorm. Cutting
    trailing channels then truncates principal components of what the norms give, summed over all
    places that read the stream.

    Args:
        model: any model; streams that can't be rotated stay and are logged with the reason.
        example_inputs: as for `find_mlps`.
        batches: unlabelled images; read once, none is kept.
        forward_fn: calls the model on the example inputs, as Torch-Pruning's argument does.
        progress: show a progress bar on a terminal.

    Returns:
        The streams that were rotated, in the order of the forward pass.

    Raises:
        ValueError: no stream can be rotated, there is no batch, or activations are not finite; the
            model is as it was.
        TypeError: `batches` can't be iterated.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
        >>> images = torch.randn(4, 3, 224, 224)
        >>> before = model(images)
        >>> [rotated] = tp_amp.rotate(model, images[:1], [images])
        >>> rotated.stream.name, rotated.stream.width
        ('patch_embed.proj', 192)
        >>> torch.allclose(model(images), before, atol=1e-4)
        True
    """
    check_model(model, values=True)
    structure = ModelStructure(model, example_inputs, forward_fn)
    streams, reasons = structure.streams
    if not streams:
        name = type(model).__name__
        raise ValueError(f"no residual stream of {name} can be rotated: {listed(reasons)}")
    if reasons:
        logger.warning("these residual streams stay as they are: %s", listed(reasons))
    moments = _Moments(model, streams)
    moments.collect(batches, progress=progress)
    bases = [moments.basis(stream) for stream in streams]
    rotations = [(s, basis.rotation) for s, basis in zip(streams, bases, strict=True)]
    _take_over(model, turned_copy(model, rotations, structure.inputs, forward_fn))
    return [
        RotatedStream(
            stream,
            tuple((basis.errors / (float(basis.errors[0]) or 1.0)).tolist()),
            leading_values(model, stream),
        )
        for stream, basis in zip(streams, bases, strict=True)
    ]


def leading_values(model: nn.Module, stream: Stream) -> tuple[float, ...]:
    """Some of what biases and tokens write into the first channel, which no cut changes."""
    parameters = [
        model.get_parameter(written.path).detach().select(written.dim, 0).flatten()[:8]
        for written in stream.written
        if not written.path.endswith("weight")
    ]
    return tuple(float(value) for values in parameters[:8] for value in values)


@torch.no_grad()
def _take_over(model: nn.Module, turned: nn.Module) -> None:
    """Let a model have the values of its copy; nothing can fail halfway."""
    for own, new in zip(model.parameters(), turned.parameters(), strict=True):
        if not torch.equal(own.to(new), new):
            own.copy_(new)


class _Moments(SecondMoments):
    """Of what norms give, and of what layers read raw; under no name, the number of images."""

    def __init__(self, model: nn.Module, streams: Sequence[Stream]) -> None:
        super().__init__(model)
        self.streams, self.images = streams, 0
        self.sums = {"": torch.zeros((), dtype=torch.double)}

    def start(self, inputs: Inputs) -> None:
        """Count the images."""
        self.images = inputs.images
        self.sums[""] += self.images

    def watch(self) -> Iterable[Any]:
        """Hooks that add what each place reads."""
        for stream in self.streams:
            for path in stream.norms:
                norm = self.model.get_submodule(path)
                yield norm.register_forward_pre_hook(self._normed(stream, plain(norm)))
            for reading in stream.readings:
                if reading.norm is None:
                    layer = self.model.get_submodule(reading.weight.rpartition(".")[0])
                    yield layer.register_forward_pre_hook(self._raw(stream, layer, reading.weight))

    def _normed(self, stream: Stream, norm: nn.Module) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            self._add(stream.name, stream.width, rows, norm)

        return read

    def _raw(self, stream: Stream, layer: nn.Module, path: str) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(f"{stream.name} {path}", stream.width, tokens_of(layer, args[0]))

        return read

    def _add(self, key: str, width: int, rows: Tensor, norm: nn.Module | None = None) -> None:
        """Add `(rows, channels)`, so that each place counts alike for each image."""
        if key not in self.sums:
            self.sums[key] = rows.new_zeros(width, width, dtype=torch.double)
        for part in torch.split(rows, _ROWS):
            values = part.double() if norm is None else norm(part.double())
            values = values.reshape(-1, width)
            share = self.images * width / (len(rows) * rows.shape[-1])
            self.sums[key].addmm_(values.mT, values, alpha=share)

    def basis(self, stream: Stream) -> StreamBasis:
        """The best coordinates of a stream."""
        total = self.sums.get(stream.name)
        for key, sums in self.sums.items():
            if key.startswith(f"{stream.name} "):
                # What a norm gives has the width as its trace; so counts what is read raw.
                whole = float(self.sums[""]) * stream.width
                scaled = sums * (whole / sums.trace().clamp_min(1e-30))
                total = scaled if total is None else total + scaled
        if total is None:
            raise ValueError(
                f"no layer that reads the stream of {stream.name} was called on a batch; check the "
                "batches"
            )
        return stream_basis(total, centred=stream.centred)
