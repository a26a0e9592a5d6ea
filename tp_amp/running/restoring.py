"""Context managers that give everything back: flags, hooks, random state."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tp_amp.running.checks import check_replaced
from tp_amp.running.inputs import Inputs, runner
from tp_amp.running.snapshot import given_back

logger = logging.getLogger(__name__)
# Sizes of the inputs that a model was called on.
_CALLED: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()
T = TypeVar("T")


@contextmanager
def evaluating(model: nn.Module, *, trainable: bool) -> Iterator[None]:
    """Run in eval mode as `eval_mode` does, seeded; all that forward passes change is given back.

    What they put on the model, and what is drawn: by models that draw (masked autoencoders) too.

    Raises:
        ValueError: a module is looked for in vain, since a forward pass has replaced it.
    """
    known = dict(model.named_modules())
    with given_back(model), eval_mode(model, trainable=trainable), seeded(0):
        _keep_no_cache(model)
        try:
            yield
        except (AttributeError, KeyError):
            check_replaced(model, known)
            raise


def _keep_no_cache(model: nn.Module) -> None:
    """Let models of transformers keep no keys and values of earlier calls.

    Such a cache is an argument of each layer, and grows whenever a layer is called with it again.
    """
    for module in model.modules():
        config = vars(module).get("config")
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False  # type: ignore[union-attr]


@contextmanager
def eval_mode(model: nn.Module, *, trainable: bool) -> Iterator[None]:
    """Run in eval mode with every parameter's `requires_grad` set to `trainable`, then restore."""
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in required:
            # Integer parameters (quantised weights) can't require a gradient.
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(trainable)
        yield
    finally:
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag


@contextmanager
def on_meta(model: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Let the model's tensors be shapes without values, so that a forward pass costs nothing.

    Yields:
        The real parameter behind each stand-in. On exit every module has back what it held.
    """
    stand_ins: dict[Any, Any] = {}

    def stand_in(tensor: Tensor) -> Any:
        if tensor not in stand_ins:
            shape = torch.empty_like(tensor.detach(), device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            stand_ins[tensor] = nn.Parameter(shape, tensor.requires_grad) if is_parameter else shape
        return stand_ins[tensor]

    with given_back(model):
        for module in model.modules():
            for content in (vars(module), module._parameters, module._buffers):
                content |= {k: stand_in(v) for k, v in content.items() if isinstance(v, Tensor)}
        yield {new: old for old, new in stand_ins.items() if isinstance(old, nn.Parameter)}


def shapes_first(
    model: nn.Module,
    inputs: Inputs,
    run: Callable[[Inputs, Mapping[Any, Any]], T],
    forward_fn: Callable[..., Any] | None = None,
) -> T:
    """Run something that needs no values on the meta device, or as it is where that fails.

    Args:
        model: what is run.
        inputs: example inputs.
        run: takes the inputs and the real parameter behind each stand-in.
        forward_fn: calls the model, as Torch-Pruning's argument does.
    """
    _call_once(model, inputs, forward_fn)
    try:
        with on_meta(model) as real:
            return run(inputs.to("meta"), real)
    except Exception as error:
        logger.debug("the model fails on the meta device: %s", error)
    with given_back(model):
        return run(inputs, {})


def _call_once(model: nn.Module, inputs: Inputs, forward_fn: Callable[..., Any] | None) -> None:
    """Call a model with values before it is called without, once for inputs of each size.

    What it keeps outside of its modules from the first call on, in a global dict or by
    `functools.lru_cache` (a table of positions, say), could not be taken from there again.
    """
    sizes = _CALLED.setdefault(model, set())
    size = tuple((tuple(t.shape), t.dtype, t.device) for t in inputs.tensors())
    tensors = [*model.parameters(), *model.buffers(), *inputs.tensors()]
    if size in sizes or any(tensor.is_meta for tensor in tensors):
        return
    try:
        with torch.no_grad(), eval_mode(model, trainable=False), given_back(model), seeded(0):
            inputs.call(runner(model, forward_fn))
    except Exception as error:  # told where the model is run for what it gives
        logger.debug("the model fails on the inputs: %s", error)
    sizes.add(size)


@contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove all hook handles on exit."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@contextmanager
def replaced_forward(module: nn.Module, make: Callable[[Any], Any]) -> Iterator[None]:
    """Give a module a forward pass made from its own; no hook, which may switch fast paths off."""
    own = vars(module).get("forward")
    vars(module)["forward"] = make(module.forward)
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators that loaders draw from, and restore them on exit.

    A shuffling loader then gives the same batches in the same order each time.
    """
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        numpy.random.set_state(state[2])
