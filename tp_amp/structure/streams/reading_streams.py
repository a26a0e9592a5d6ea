"""Find the residual streams of a model, and prove on copies that they may be rotated and cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.inputs import Inputs, runner
from tp_amp.running.restoring import evaluating, seeded
from tp_amp.running.ties import shared_parameters
from tp_amp.running.watching import all_tensors
from tp_amp.structure.comparing.copies import StayingDouble, distance, in_double, noisy_copy
from tp_amp.structure.graph import TracedGraph
from tp_amp.structure.streams.graph_weights import GraphWeights
from tp_amp.structure.streams.norm_kinds import reflection
from tp_amp.structure.streams.proving_cuts import with_cut
from tp_amp.structure.streams.residual_stream import Blocks, Stream
from tp_amp.structure.streams.stream_nodes import residual_additions
from tp_amp.structure.streams.turning import CannotTurn, turn
from tp_amp.structure.streams.walking import Walk, Walked

Run = Callable[..., Any] | None

_TOLERANCE = 1e-8  # in double precision


Found = tuple[list[Stream], dict[str, str]]


def possible_streams(model: nn.Module, traced: TracedGraph) -> Found:
    """Find the residual streams that may be rotated by the structure alone, and why others stay.

    All that the residual additions of the graph tie together, up to the layers that write and read
    it. What the graph does not show is not known yet (`proven_streams`).

    Args:
        model: any model; it is left as it was.
        traced: its graph.

    Returns:
        The streams, in the order of the forward pass, and name of another -> why it stays.
    """
    names = {module: name for name, module in model.named_modules()}
    walk = Walk(traced, names, GraphWeights(model, traced.real))
    shared = shared_parameters(model)
    order = {names[module]: call.order for module, call in traced.calls.items()}
    seen: set[Any] = set()
    found: list[Stream] = []
    reasons: dict[str, str] = {}
    for addition in residual_additions(traced):
        if addition in seen:
            continue
        walked = walk.follow(addition)
        seen |= walked.additions
        name = _name(walked, order)
        try:
            found.append(_stream(model, name, walked, shared, order))
        except CannotTurn as reason:
            reasons[name] = str(reason)
    return sorted(found, key=lambda stream: order.get(stream.name, -1)), reasons


def proven_streams(
    model: nn.Module, possible: Iterable[Stream], inputs: Inputs, forward_fn: Run = None
) -> Found:
    """Prove on copies that streams can be rotated, and find which can be cut.

    In double precision, with noise on all parameters, so that norms and scales do something: turned
    by a rotation that is drawn, a copy gives the same.

    Args:
        model: any model; it is left as it was.
        possible: of `possible_streams`.
        inputs: example inputs.
        forward_fn: calls the model on them, as Torch-Pruning's argument does.

    Returns:
        As `possible_streams`.
    """
    proof = _Proof(model, inputs, forward_fn)
    found: list[Stream] = []
    reasons: dict[str, str] = {}
    for stream in possible:
        try:
            found.append(proof.proven(stream))
        except CannotTurn as reason:
            reasons[stream.name] = str(reason)
    return found, reasons


def _name(walked: Walked, order: dict[str, int]) -> str:
    """What writes first, or where it can't be told what, the first of all that was found."""
    writers = [written.path.rpartition(".")[0] for written in walked.written]
    called = [name for name in writers if name in order]
    others = [*writers, *walked.norms, *walked.problems, "a residual addition"]
    return min(called, key=order.__getitem__) if called else others[0]


def _stream(
    model: nn.Module,
    name: str,
    walked: Walked,
    shared: dict[str, list[str]],
    order: dict[str, int],
) -> Stream:
    """The record of what was found.

    Raises:
        CannotTurn: something stands against a rotation.
    """

    def called(path: str) -> int:
        return order.get(path.rpartition(".")[0], -1)

    stream = Stream(
        name,
        0,
        "centred" in walked.norms.values(),
        tuple(sorted(walked.written, key=lambda written: called(written.path))),
        tuple(sorted(walked.norms, key=lambda path: order.get(path, -1))),
        tuple(sorted(walked.readings, key=lambda reading: called(reading.weight))),
    )
    for path in stream.paths:
        if path in shared:
            raise CannotTurn(f"{path} is also {' and '.join(shared[path])}; give each its own")
    if walked.problems:
        told = [f"{where}: {reason}" for where, reason in walked.problems.items()]
        raise CannotTurn("; ".join(told[:3]) + (f"; and {len(told) - 3} more" if told[3:] else ""))
    if not walked.written or not walked.readings:
        raise CannotTurn("no layer writes it, or none reads it")
    sizes = {w.path: model.get_parameter(w.path).shape[w.dim] for w in walked.written}
    width = min(sizes.values())
    read = {r.weight: model.get_parameter(r.weight).shape[1] for r in walked.readings}
    read |= {path: _channels(model, path) for path in stream.norms}
    wrong = [path for path, size in sizes.items() if size != width]
    wrong += [path for path, size in read.items() if size % width]
    if wrong or width < 2:
        raise CannotTurn(f"{', '.join(wrong[:3])} is of another width than {width}")
    return replace(stream, width=width, blocks=_blocks(model, [*stream.paths, *stream.norms]))


def _blocks(model: nn.Module, paths: Iterable[str]) -> tuple[Blocks, ...]:
    """The lists of blocks that some layers lie in."""
    found: dict[str, int] = {}
    for path in paths:
        parts = path.split(".")
        for above in (".".join(parts[:depth]) for depth in range(len(parts) - 1)):
            listed = model.get_submodule(above)
            if isinstance(listed, (nn.ModuleList, nn.Sequential)) and all(
                any(block.children()) for block in listed
            ):
                found[above] = len(listed)
    return tuple(Blocks(above, number) for above, number in found.items())


def _channels(model: nn.Module, path: str) -> int:
    norm: Any = model.get_submodule(path)
    weight = getattr(norm, "weight", None)
    if weight is None:
        raise CannotTurn(f"{path} has no weight, which could tell the scale once channels are cut")
    return int(weight.numel())


class _Proof:
    """A copy of the model, made when it is first needed, that streams are turned in.

    Args:
        model: is left as it was.
        inputs: example inputs.
        forward_fn: calls the model on them.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, forward_fn: Run) -> None:
        self._model, self._forward_fn = model, forward_fn
        self._inputs = Inputs(in_double(inputs.args), in_double(inputs.kwargs))

    def _run(self, model: nn.Module) -> list[Tensor]:
        return _outputs(model, self._inputs, self._forward_fn)

    @cached_property
    def _dense(self) -> tuple[nn.Module, list[Tensor]]:
        """The copy, with noise on all parameters, and what it gives."""
        try:
            noisy = noisy_copy(self._model)
            known = dict(noisy.named_parameters()).keys()
            outputs = self._run(noisy)
        except Exception as error:
            raise CannotTurn(f"a copy of the model can't be run alone ({error})") from error
        if dict(noisy.named_parameters()).keys() != known:
            raise CannotTurn("the model's first forward pass makes other parameters; run it once")
        return noisy, outputs

    def proven(self, stream: Stream) -> Stream:
        """The stream, with what was found by turning a copy.

        Raises:
            CannotTurn: a turned copy gives something else.
        """
        model = self._model
        with torch.inference_mode(False), torch.no_grad(), evaluating(model, trainable=False):
            noisy, dense = self._dense
            for keeps in (False, True):
                trial = replace(stream, keeps_biases=keeps)
                turned = copy.deepcopy(noisy)
                turn(turned, trial, _some_rotation(stream))
                if differ(self._run(turned), dense) <= _TOLERANCE:
                    return with_cut(turned, trial, self._run, differ)
        raise CannotTurn(
            "rotated on a copy the model gives something else: what the graph does not show "
            "returns it, or reads or writes it channel by channel (hidden states among the "
            "outputs, tables that are no parameters)"
        )


def turned_copy(
    model: nn.Module,
    rotations: Iterable[tuple[Stream, Tensor]],
    inputs: Inputs,
    forward_fn: Run = None,
) -> nn.Module:
    """A copy in double precision with turned streams, checked to be the same function.

    Raises:
        ValueError: it is not; the stream is named.
    """
    with torch.inference_mode(False), torch.no_grad(), evaluating(model, trainable=False):
        trial = copy.deepcopy(model).double()
        inputs = Inputs(in_double(inputs.args), in_double(inputs.kwargs))
        dense = _outputs(trial, inputs, forward_fn)
        for stream, rotation in rotations:
            turn(trial, stream, rotation)
            found = differ(_outputs(trial, inputs, forward_fn), dense)
            if not found <= _TOLERANCE:
                raise ValueError(
                    f"the stream of {stream.name} can't be rotated: a copy then gives outputs that "
                    f"differ by {found:.1e}, relative, from the model's; look for weights that "
                    "overflow, or for outputs that are nearly zero"
                )
    return trial


def _some_rotation(stream: Stream) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.eye(stream.width, dtype=torch.double)
    for _ in range(3):
        normal = torch.randn(stream.width, generator=generator, dtype=torch.double)
        rotation = rotation @ reflection(normal - stream.centred * normal.mean())
    return rotation


def _outputs(model: nn.Module, inputs: Inputs, forward_fn: Run) -> list[Tensor]:
    """All tensors that a model gives, the same where it draws anything."""
    with seeded(0), StayingDouble():
        return all_tensors(inputs.call(runner(model, forward_fn)))


def differ(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference of outputs, relative to the largest value of each."""
    if len(some) != len(others):
        return float("inf")
    return max(map(distance, some, others), default=0.0)
