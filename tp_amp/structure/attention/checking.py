"""Check by values that heads can be cut from an attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch_pruning as tp
from torch import nn

from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import hooks
from tp_amp.structure.attention.adapting import OWN
from tp_amp.structure.attention.head_tensors import norms_over_heads, with_tensors
from tp_amp.structure.attention.heads import Attention, head_group, rows
from tp_amp.structure.comparing.copies import (
    TOLERANCE,
    CannotCut,
    distance,
    first_output,
    in_double,
    masked_norm,
    noisy_copy,
    switched,
    switches,
    without_inputs,
)


@torch.enable_grad()
def checked(owner: nn.Module, inputs: Inputs, guess: Attention) -> Attention:
    """Complete what is known of an attention, and check that heads can be cut from it.

    A copy of the module, in double precision and with noise on all parameters (tables are often
    zero at first), loses one head, then all but one, and must give what it gives with those heads'
    channels cut off at the projection; the former fused and the latter not, where it has a switch.
    The module itself is not touched.

    Args:
        owner: the module at the attention's `name`, in eval mode.
        inputs: of one real call of it.
        guess: the attention with paths as seen from `owner`, so that its `name` is empty.

    Raises:
        CannotCut: with the reason.
    """
    model = noisy_copy(owner)
    inputs = Inputs(in_double(inputs.args), in_double(inputs.kwargs))
    attention = with_tensors(model, inputs, guess)
    reason = CannotCut("it has no forward pass")
    for forward in OWN if guess.forward == "own" else (guess.forward,):
        attention = replace(attention, forward=forward)
        try:
            for fused, dropped in _trials(model, guess.width):
                _compare(switched(model, fused), inputs, attention, dropped)
            return attention
        except CannotCut as error:
            reason = error
    raise reason


def _compare(model: nn.Module, inputs: Inputs, attention: Attention, dropped: list[int]) -> None:
    """Cut heads from a copy, and zero them in another."""
    zeroed, narrow = copy.deepcopy(model), copy.deepcopy(model)
    graph = tp.DependencyGraph()
    graph.model, graph.module2node = narrow, {}
    less = f"with {attention.width - len(dropped)} of {attention.width} heads"
    with torch.no_grad(), zeroed_heads(zeroed, attention, dropped):
        try:
            head_group(graph, attention, dropped).prune(record_history=False)
            found = first_output(inputs, narrow)
        except Exception as error:
            raise CannotCut(f"{less} its forward pass fails ({error})") from error
        expected = first_output(inputs, zeroed)
        change = distance(first_output(inputs, model), expected)
    if change < 10 * TOLERANCE:
        raise CannotCut("its output does not depend on its heads")
    if distance(found, expected) > TOLERANCE * min(1.0, change):
        raise CannotCut(f"{less} it does not give what it gives with the others' channels zeroed")


@contextmanager
def zeroed_heads(model: nn.Module, attention: Attention, heads: list[int]) -> Iterator[None]:
    """Take the heads' channels from the projection; norms over all heads see the others only.

    The projection is left with another weight, which reads nothing from them.
    """
    columns = rows(heads, attention.width, attention.head_width)
    without_inputs(model.get_submodule(attention.down), columns)
    others = [head for head in range(attention.width) if head not in heads]
    keep = rows(others, attention.width, attention.head_width)
    paths = {tensor.path for tensor in attention.tensors}
    norms = [m for n, m in norms_over_heads(model, attention) if f"{n}.weight" in paths]
    with hooks(norm.register_forward_hook(masked_norm(norm, keep)) for norm in norms):
        yield


def _trials(model: nn.Module, heads: int) -> list[tuple[bool | None, list[int]]]:
    """Which heads to drop, and whether the attention shall be fused (None: it has no switch)."""
    one, all_but_one = [(heads - 1) // 2], list(range(heads - 1))
    kinds = switches(model)
    return [(kinds[0], one), (kinds[-1], all_but_one)]
