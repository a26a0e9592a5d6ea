"""Prove on a copy that a stream can be cut, and find which attentions need help with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tp_amp.running.restoring import hooks
from tp_amp.structure.streams.norm_kinds import kind_of
from tp_amp.structure.streams.residual_stream import Stream
from tp_amp.structure.streams.stream_cuts import leading, stream_group
from tp_amp.structure.tolerant_graph import untraced_graph

# Norms add a small number to a variance that is smaller once channels are cut: where weights are
# small, outputs differ by it. On the copy it is as good as none.
_EPSILON = 1e-12
_TOLERANCE = 1e-3


def with_cut(
    model: nn.Module,
    stream: Stream,
    outputs: Callable[[nn.Module], list[Tensor]],
    differ: Callable[[list[Tensor], list[Tensor]], float],
) -> Stream:
    """The stream, with the attentions that must be told how wide they are, or why it stays whole.

    Cut to half, a copy must give what the model gives if each reader sees the leading channels
    alone.

    Args:
        model: a copy, in coordinates in which norms have weights of one.
        stream: of it.
        outputs: runs a model on the example inputs.
        differ: the largest difference of outputs, relative.
    """
    if any(reading.rows for reading in stream.readings):
        return replace(stream, whole="a part of an attention's weight reads it")
    for path in stream.norms:
        norm = model.get_submodule(path)
        for name in ("eps", "variance_epsilon"):
            if isinstance(vars(norm).get(name), float):
                setattr(norm, name, min(_EPSILON, vars(norm)[name]))
    kept = max(2, stream.width // 2)
    with hooks(_projecting(model, stream, kept)):
        expected = outputs(model)

    def failure(told: tuple[str, ...]) -> str:
        """Why a cut copy does not give that; empty if it does."""
        trial = copy.deepcopy(model)
        cut = replace(stream, told=told)
        channels = range(kept, stream.width)
        stream_group(untraced_graph(trial), cut, channels).prune(record_history=False)
        try:
            found = differ(outputs(trial), expected)
        except Exception as error:  # whatever a forward pass raises that takes sizes from elsewhere
            return str(error.__cause__ or error).partition("\n")[0]
        return "" if found <= _TOLERANCE else "it gives something else"

    needed = tuple(path for path in _parents(model, stream) if _is_multihead(model, path))
    others = [path for path in _parents(model, stream) if _may_reshape(model, path, stream)]
    for told in (needed, (*needed, *others)) if others else (needed,):
        if not (reason := failure(told)):
            return replace(stream, told=told)
    return replace(stream, whole=f"a copy that is cut fails: {reason}")


def _projecting(model: nn.Module, stream: Stream, kept: int) -> Iterator[Any]:
    """Hooks that let all that reads a stream see its leading channels alone."""

    def seeing(centred: bool) -> Callable[..., Any]:
        def see(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return leading(args[0], stream.width, kept, centred=centred), *args[1:]

        return see

    def give(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return leading(output, stream.width, kept, centred=False)  # not the bias of other channels

    for path in stream.norms:
        norm: Any = model.get_submodule(path)
        centred = kind_of(norm, norm.weight.numel()) == "centred"
        yield norm.register_forward_pre_hook(seeing(centred))
        yield norm.register_forward_hook(give)
    for reading in stream.readings:
        if reading.norm is None:
            layer = model.get_submodule(reading.weight.rpartition(".")[0])
            yield layer.register_forward_pre_hook(seeing(False))


def _is_multihead(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), nn.MultiheadAttention)


def _may_reshape(model: nn.Module, path: str, stream: Stream) -> bool:
    """Whether a module is an attention, whose projection reads as much as the stream has."""
    module = model.get_submodule(path)
    readings = {reading.weight for reading in stream.readings}
    return not _is_multihead(model, path) and any(
        isinstance(layer, nn.Linear)
        and layer.in_features == stream.width
        and f"{path}.{name}.weight" not in readings
        for name, layer in module.named_children()
    )


def _parents(model: nn.Module, stream: Stream) -> list[str]:
    """The modules that call readers or writers of a stream, and none of its norms."""
    layers = [reading.weight.rpartition(".")[0] for reading in stream.readings]
    layers += [written.path.rpartition(".")[0] for written in stream.written]
    found = []
    for path in layers:
        parent = path
        if not _is_multihead(model, path):
            parent = path.rpartition(".")[0]
        holds = any(f"{norm}.".startswith(f"{parent}.") for norm in stream.norms)
        plain = type(model.get_submodule(parent)).forward is nn.Module.forward
        if parent and not holds and not plain and parent not in found:
            found.append(parent)
    return found
