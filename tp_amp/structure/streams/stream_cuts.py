"""Cut channels of a residual stream: Torch-Pruning's group of all that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group
from torch_pruning.pruner import function

from tp_amp.structure.attention.adapting import adapt
from tp_amp.structure.attention.head_forward import HeadCut
from tp_amp.structure.groups import make_group
from tp_amp.structure.streams.residual_stream import Stream

# What modules call the size of a dimension of their weight.
_SIZES = {
    nn.Linear: {0: "out_features", 1: "in_features"},
    nn.modules.conv._ConvNd: {0: "out_channels", 1: "in_channels"},
    nn.Embedding: {1: "embedding_dim"},
}


class _StreamPruner(function.BasePruningFunc):  # type: ignore[misc]
    """Cuts what one module holds of a stream.

    Args:
        stream: the stream.
        path: of the module.
    """

    def __init__(self, stream: Stream, path: str) -> None:
        super().__init__()
        self.stream, self.path = stream, path

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Drop channels `idxs` of the stream from all that the module holds of it."""
        width = self.stream.width
        for leaf, dim in held(self.stream).get(self.path, ()):
            parameter: Any = layer._parameters.get(leaf)
            if parameter is None:
                continue
            size = parameter.shape[dim]
            places = range(0, size, width)
            dropped = set(idxs)
            keep = [first + c for first in places for c in range(width) if c not in dropped]
            layer._parameters[leaf] = self._prune_parameter_and_grad(parameter, keep, dim)
            _resize(layer, leaf, dim, size, len(keep))
        if self.path in self.stream.norms:
            # Its readers see the scale that they saw, by what is left of the stream's length.
            with torch.no_grad():
                weight: Any = layer.weight
                weight.mul_((width / (width - len(set(idxs)))) ** 0.5)
        if self.path in around(self.stream):
            _recount(layer, width, width - len(set(idxs)))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        """Count the channels of the stream."""
        return self.stream.width

    get_in_channels = get_out_channels


class _AttentionPruner(_StreamPruner):
    """Lets an attention run on an input that is narrower than its heads."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Adapt the module's forward pass."""
        super().prune_out_channels(layer, idxs)
        if isinstance(layer, nn.MultiheadAttention):
            adapt(layer, "multihead")
        else:
            cut: HeadCut | None = getattr(layer, "head_cut", None)
            if cut is None:
                adapt(layer, "narrow")
                width = self.stream.width  # heads may be cut later: there are not more
                layer.__dict__["head_cut"] = HeadCut(width, tuple(range(width)), width=width)
        return layer

    prune_in_channels = prune_out_channels


def held(stream: Stream) -> dict[str, list[tuple[str, int]]]:
    """Module path -> the names of its parameters and their dimensions that hold the stream."""
    found: dict[str, list[tuple[str, int]]] = {}
    pairs = [(written.path, written.dim) for written in stream.written]
    pairs += [(path, -1) for path in stream.scales]
    pairs += [(reading.weight, 1) for reading in stream.readings]
    pairs += [(f"{norm}.{leaf}", -1) for norm in stream.norms for leaf in ("weight", "bias")]
    for path, dim in pairs:
        holder, _, leaf = path.rpartition(".")
        found.setdefault(holder, []).append((leaf, dim))
    return found


def around(stream: Stream) -> list[str]:
    """The modules that hold norms of a stream: blocks and the model, which may say its width."""
    parts = (norm.split(".") for norm in stream.norms)
    paths = (".".join(part[:depth]) for part in parts for depth in range(len(part)))
    return list(dict.fromkeys(paths))


def stream_group(graph: Any, stream: Stream, channels: Sequence[int]) -> Group:
    """Make Torch-Pruning's group of some channels of a stream, the root at what writes to it.

    Args:
        graph: the `tp.DependencyGraph`; only its model and names are used.
        stream: to be cut; its norms get the scale of the dense model.
        channels: indices into the stream's channels.
    """
    layers: list[tuple[str, Any, list[int]]] = []
    for path in dict.fromkeys([*held(stream), *stream.told, *around(stream)]):
        kind = _AttentionPruner if path in stream.told else _StreamPruner
        layers.append((path, kind(stream, path).prune_out_channels, list(channels)))
    return make_group(graph, layers, list(channels))


def _recount(module: nn.Module, dense: int, kept: int) -> None:
    """Put right what blocks and models call the width of the stream."""
    words = ("dim", "width", "features", "channels", "hidden_size")
    for name, value in list(vars(module).items()):
        if type(value) is int and value == dense and any(word in name for word in words):
            setattr(module, name, kept)


def _resize(layer: nn.Module, leaf: str, dim: int, dense: int, kept: int) -> None:
    """Put right what a module says of its size."""
    if leaf != "weight":
        return
    for kind, names in _SIZES.items():
        if isinstance(layer, kind):
            setattr(layer, names[dim], kept)
            return
    for name, value in list(vars(layer).items()):
        if type(value) is int and value == dense:
            setattr(layer, name, kept)
        elif isinstance(value, tuple) and tuple(value) == (dense,):
            setattr(layer, name, (kept,))


def leading(values: Tensor, width: int, kept: int, *, centred: bool) -> Tensor:
    """What a norm must read so that it gives what it would after a cut, `(..., channels)`.

    All but the leading channels are zero, and of these the mean is taken out: over all channels it
    is zero then, so that the norm takes nothing else out.

    Example:
        >>> leading(torch.tensor([1.0, 3.0, 7.0, 9.0]), 4, 2, centred=True)
        tensor([-1.,  1.,  0.,  0.])
    """
    own = (torch.arange(values.shape[-1], device=values.device) % width < kept).to(values.dtype)
    mean = (values * own).sum(-1, keepdim=True) / own.sum()
    return (values - mean if centred else values) * own
