"""Context managers that give everything back: flags, hooks, random state."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tp_amp.running.checks import check_replaced
from tp_amp.running.snapshot import given_back

if TYPE_CHECKING:
    from tp_amp.running.inputs import Inputs

logger = logging.getLogger(__name__)
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
        try:
            yield
        except (AttributeError, KeyError):
            check_replaced(model, known)
            raise


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
    model: nn.Module, inputs: Inputs, run: Callable[[Inputs, Mapping[Any, Any]], T]
) -> T:
    """Run something that needs no values on the meta device, or as it is where that fails.

    Args:
        model: what is run.
        inputs: example inputs.
        run: takes the inputs and the real parameter behind each stand-in.
    """
    try:
        with on_meta(model) as real:
            return run(inputs.to("meta"), real)
    except Exception as error:
        logger.debug("the model fails on the meta device: %s", error)
    with given_back(model):
        return run(inputs, {})


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
