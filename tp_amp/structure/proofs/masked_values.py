"""Check by values that hidden channels can be cut from an MLP."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tp_amp.running.inputs import Inputs, example, runner
from tp_amp.running.restoring import evaluating, hooks
from tp_amp.structure.attention.finding import record_calls
from tp_amp.structure.comparing.copies import (
    TOLERANCE,
    distance,
    first_output,
    in_double,
    masked_norm,
    noisy_copy,
    without_inputs,
)
from tp_amp.structure.comparing.outside import Trial, outside_differences
from tp_amp.structure.comparing.repeats import call_form
from tp_amp.structure.graph import TracedGraph
from tp_amp.structure.mlp_cuts import MLP, mlp_group
from tp_amp.structure.tolerant_graph import untraced_graph

logger = logging.getLogger(__name__)


@torch.inference_mode(False)
@torch.no_grad()
def differences(mlps: Sequence[MLP], traced: TracedGraph) -> dict[str, str]:
    """Tell which MLPs give something else once they are cut than with their channels masked.

    A forward pass may read how wide its layers are, or give channels a meaning by their place: then
    the model runs once they are cut, and is wrong. A copy of the module at an MLP's `name`, in
    double precision and with noise on all parameters, loses half of the channels, and must give
    what it gives with these zeroed before `down`. Modules that are alike are checked once. What a
    copy can't tell counts as right: one that does not run before it is cut, gives something else
    each time, or hardly depends on these channels. What is left is compared in the model as a
    whole, for what stands around an MLP may know its width too.

    Returns:
        `down` of each MLP that differs -> why.
    """
    model: nn.Module = traced.graph.model
    if not mlps or any(parameter.is_meta for parameter in model.parameters()):
        return {}
    owners = {mlp.name: model.get_submodule(mlp.name) for mlp in mlps}
    found: dict[str, str] = {}
    judged: dict[Any, str | None] = {}
    with evaluating(model, trainable=False):
        calls = record_calls(model, owners, *traced.example)
        for mlp in mlps:
            inside = _inside(mlp)
            for inputs in calls.get(mlp.name, []):
                form = inside, call_form(owners[mlp.name], inputs)
                if form not in judged:
                    judged[form] = _difference(owners[mlp.name], inputs, inside)
                if reason := judged[form]:
                    found[mlp.down] = reason
                    logger.debug("%s is no MLP that can be cut: %s", mlp.down, reason)
    inputs, run = example(traced.example[0]), runner(model, traced.example[1])
    trials = {m.down: _trial(traced, m) for m in mlps if m.width > 1 and m.down not in found}
    return found | outside_differences(model, lambda: inputs.call(run), trials)


def _trial(traced: TracedGraph, mlp: MLP) -> Trial:
    dropped, kept = _halves(mlp)

    def cut(_: ExitStack) -> None:
        for item in mlp_group(traced.graph, mlp, dropped).items:
            item.dep(item.idxs)

    return Trial(cut, lambda stack: _zero(traced.graph.model, mlp, dropped, kept, stack))


def _halves(mlp: MLP) -> tuple[list[int], list[int]]:
    """Channels to drop and to keep."""
    order = torch.randperm(mlp.width, generator=torch.Generator().manual_seed(0)).tolist()
    return sorted(order[: mlp.width // 2]), sorted(order[mlp.width // 2 :])


def _inside(mlp: MLP) -> MLP:
    """The MLP with paths as seen from the module at its name."""
    start = len(mlp.name) + 1 if mlp.name else 0
    up, inner = (tuple(name[start:] for name in names) for names in (mlp.up, mlp.inner))
    return replace(mlp, name="", up=up, inner=inner, down=mlp.down[start:])


def _difference(owner: nn.Module, inputs: Inputs, mlp: MLP) -> str | None:
    dropped, kept = _halves(mlp)
    less = f"with {len(kept)} of {mlp.width} channels"
    try:
        model = noisy_copy(owner)
        inputs = Inputs(in_double(inputs.args), in_double(inputs.kwargs))
        dense = first_output(inputs, model)
        zeroed, narrow = copy.deepcopy(model), copy.deepcopy(model)
        with ExitStack() as stack:
            _zero(zeroed, mlp, dropped, kept, stack)
            expected = first_output(inputs, zeroed)
            again = first_output(inputs, zeroed)
    except Exception as error:
        logger.debug("a copy of what holds %s can't be compared: %s", mlp.down, error)
        return None
    change, noise = distance(dense, expected), distance(again, expected)
    if not (change >= 10 * TOLERANCE and noise <= TOLERANCE * change):  # so where they are NaN
        logger.debug("a copy of what holds %s can't tell: %g, %g", mlp.down, change, noise)
        return None
    try:
        mlp_group(untraced_graph(narrow), mlp, dropped).prune(record_history=False)
        found = first_output(inputs, narrow)
    except Exception as error:
        return f"{less} a copy of what holds it no longer runs ({error})"
    if distance(found, expected) <= TOLERANCE * min(1.0, change):
        return None
    return (
        f"{less} it does not give what it gives with the others zeroed: its forward pass knows "
        "their number or their places"
    )


def _zero(
    model: nn.Module, mlp: MLP, dropped: list[int], kept: list[int], stack: ExitStack
) -> None:
    """Take channels from what reads them; norms over all channels see the others only."""
    without_inputs(model.get_submodule(mlp.down), [mlp.first + channel for channel in dropped])
    inner = [model.get_submodule(name) for name in mlp.inner]
    apart = (nn.Conv2d, nn.modules.batchnorm._BatchNorm)  # each channel by itself
    norms = [norm for norm in inner if not isinstance(norm, apart)]
    stack.enter_context(hooks(n.register_forward_hook(masked_norm(n, kept)) for n in norms))
