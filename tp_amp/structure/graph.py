"""Torch-Pruning's dependency graph of a model, built so that nothing is left behind."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.checks import check_model, check_replaced
from tp_amp.running.inputs import Inputs, example, runner
from tp_amp.running.restoring import evaluating, hooks, on_meta, shapes_first
from tp_amp.structure.tolerant_graph import LayerGraph, per_channel_pruners

logger = logging.getLogger(__name__)


@dataclass
class Call:
    """A call of a layer in a forward pass with autograd, and the one before it, if any."""

    order: int
    input: Tensor
    output: Tensor
    earlier: Call | None = None

    def each(self) -> Iterator[Call]:
        """This call and those before it, the last first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.earlier


@dataclass
class TracedGraph:
    """A dependency graph, and how its layers were called in one forward pass.

    Attributes:
        calls: the last call of every module with parameters of its own.
        reads_images: whether a module's input depends on the images (a table of positions does
            not); None where the inputs can't tell, such as token numbers.
        graph: the `tp.DependencyGraph`.
        again: a context with what runs the model once more as it was traced: without values where
            it was, in eval mode, and giving it back as it was.
        values: runs the model for calls with values, if it was traced without any.
        changed: layers whose output is a view that is changed in place.
        real: the model's own parameter behind each that autograd knows, if these are others.
        example: the example inputs as they were given, and what calls the model on them.
    """

    calls: dict[nn.Module, Call]
    reads_images: dict[nn.Module, bool] | None
    graph: Any
    again: Callable[[], AbstractContextManager[Callable[[], Any]]]
    values: Callable[[], dict[nn.Module, Call]] | None = None
    changed: Sequence[nn.Module] = ()
    real: Mapping[Any, Any] = field(default_factory=dict)
    example: tuple[Any, Callable[..., Any] | None] = (None, None)

    def with_values(self) -> dict[nn.Module, Call]:
        """The calls with values, where the model has any; they are recorded once."""
        if self.values is not None:
            self.calls, self.values = self.values(), None
        return self.calls


def build_graph(
    model: nn.Module,
    example_inputs: Any,
    build: Callable[..., Any] | None = None,
    forward_fn: Callable[..., Any] | None = None,
    on_meta_device: bool = True,
) -> TracedGraph:
    """Trace `model` and build its dependency graph, leaving the model as it was.

    The model is traced on the meta device, where that costs next to nothing; models that fail
    there are traced with their values.

    Args:
        model: the model.
        example_inputs: as for `find_mlps`.
        build: called with the example inputs in the form Torch-Pruning takes them and with
            `customized_pruners`, while every parameter requires a gradient; returns the graph.
        forward_fn: calls the model on the example inputs, as Torch-Pruning's argument does.
        on_meta_device: whether to try that first.

    Raises:
        ValueError: the model fails on `example_inputs`, is compiled, or replaces its modules in its
            first forward pass.
    """
    check_model(model)
    if build is None:
        build = partial(LayerGraph().build_dependency, model, verbose=False)
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        # The residual stream is never pruned here, so parameters outside modules don't matter.
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        warnings.filterwarnings("ignore", message="Maximum recursive depth reached")
        inputs = example(example_inputs)
        trace = partial(_trace, model, build=build, forward_fn=forward_fn)
        if on_meta_device:
            traced = shapes_first(model, inputs, trace, forward_fn)
        else:
            traced = trace(inputs, {})
    shapes_alone = any(call.input.is_meta for call in traced.calls.values())
    if shapes_alone and not _has_no_values(model):
        traced.values = partial(_record_values, model, inputs, forward_fn, traced.changed)
    traced.example = example_inputs, forward_fn
    return traced


def _trace(
    model: nn.Module,
    inputs: Inputs,
    real: Mapping[Any, Any],
    build: Callable[..., Any],
    forward_fn: Callable[..., Any] | None,
) -> TracedGraph:
    run = runner(model, forward_fn)
    calls: dict[nn.Module, Call] = {}

    def recorded(*_: Any, **__: Any) -> None:
        calls.clear()
        calls.update(_record_calls(model, inputs, run))

    # Without values no gradients are taken through the calls, so one pass records all.
    once = _has_no_values(model)
    known = dict(model.named_modules())
    with evaluating(model, trainable=False):
        reads_images = _record_readers(model, inputs, recorded if once else run)
        check_replaced(model, known)
        _tell_late(model, set(known.values()))
    with evaluating(model, trainable=True):
        if not once:
            recorded()
        # Never a bare tensor, with which Torch-Pruning tries the images one by one first.
        raw = inputs.kwargs or inputs.args
        changed = [module for module, call in calls.items() if _changed_in_place(call.output)]
        with _cloned(changed):
            if changed and not once:
                recorded()
            graph = build(raw, customized_pruners=per_channel_pruners(model))
    _give_parameters_back(graph, real)
    again = partial(_again, model, partial(inputs.call, run), without_values=bool(real))
    return TracedGraph(calls, reads_images, graph, again, changed=changed, real=real)


@contextmanager
def _again(
    model: nn.Module, run: Callable[[], Any], *, without_values: bool
) -> Iterator[Callable[[], Any]]:
    with ExitStack() as stack:
        if without_values:
            stack.enter_context(on_meta(model))
        stack.enter_context(evaluating(model, trainable=False))
        stack.enter_context(torch.no_grad())
        yield run


def _tell_late(model: nn.Module, known: set[nn.Module]) -> None:
    """Warn of layers that the model has built in this forward pass: they are taken off again."""
    late = [
        name
        for name, module in model.named_modules()
        if module not in known and next(module.parameters(recurse=False), None) is not None
    ]
    if late:
        logger.warning(
            "%s builds %s in its first forward pass, with weights that are drawn then, so that "
            "they can't be pruned; call the model once before",
            type(model).__name__,
            ", ".join(late),
        )


def _changed_in_place(output: Tensor) -> bool:
    """Whether a view was: autograd then makes another node for it, which no graph knows."""
    return output._is_view() and output._version > 0


def _cloned(layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Let some layers give copies, which are no views."""
    return hooks(layer.register_forward_hook(lambda _m, _a, y: y.clone()) for layer in layers)


def _record_values(
    model: nn.Module,
    inputs: Inputs,
    forward_fn: Callable[..., Any] | None,
    changed: Sequence[nn.Module],
) -> dict[nn.Module, Call]:
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model, trainable=True),
        _cloned(changed),
    ):
        return _record_calls(model, inputs, runner(model, forward_fn))


def _has_no_values(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _give_parameters_back(graph: Any, real: Mapping[Any, Any]) -> None:
    """Put the real parameters where Torch-Pruning keeps those that belong to no layer."""
    graph._param_to_name = {real.get(p, p): name for p, name in graph._param_to_name.items()}
    graph.unwrapped_parameters = [
        entry._replace(parameters=real.get(entry.parameters, entry.parameters))
        for entry in graph.unwrapped_parameters
    ]
    for node in graph.module2node.values():
        node.module = real.get(node.module, node.module)
    graph.module2node = {node.module: node for node in graph.module2node.values()}


def _record_calls(model: nn.Module, inputs: Inputs, run: Any) -> dict[nn.Module, Call]:
    calls: dict[nn.Module, Call] = {}
    order = itertools.count()

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, Tensor) and isinstance(args[0], Tensor):
            calls[module] = Call(next(order), args[0], output, calls.get(module))

    leaves = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    with hooks(module.register_forward_hook(record) for module in leaves):
        inputs.call(run)
    return calls


def _record_readers(model: nn.Module, inputs: Inputs, run: Any) -> dict[nn.Module, bool] | None:
    """With frozen parameters, what requires a gradient depends on the inputs."""
    floating = [t for t in inputs.tensors() if t.is_floating_point()]
    required = [tensor.requires_grad for tensor in floating]
    reads: dict[nn.Module, bool] = {}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            reads[module] = reads.get(module, False) or args[0].requires_grad

    readers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    try:
        for tensor in floating:
            tensor.requires_grad_(True)
        with hooks(module.register_forward_pre_hook(record) for module in readers):
            inputs.call(run)
    finally:
        for tensor, flag in zip(floating, required, strict=True):
            tensor.requires_grad_(flag)
    return reads if floating and len(floating) == len(inputs.tensors()) else None
