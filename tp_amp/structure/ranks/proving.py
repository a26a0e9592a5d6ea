"""Find which attentions have widths inside their heads that can be cut, and prove it by values."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, get_args

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_amp.running.checks import remade
from tp_amp.running.inputs import Inputs, example, runner
from tp_amp.running.restoring import evaluating
from tp_amp.structure.attention.finding import record_calls
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.comparing.copies import (
    CannotCut,
    StayingDouble,
    distance,
    first_output,
    in_double,
    noisy_copy,
    switched,
    switches,
)
from tp_amp.structure.comparing.outside import Trial, outside_differences
from tp_amp.structure.comparing.repeats import call_form
from tp_amp.structure.ranks.head_ranks import HELD, HeadRanks, Pair, mix, rank_group

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-8  # in double precision
_ALONE = "biases apart from the Linears act on channels one by one"
_BETWEEN = {
    "qk": f"rotary embeddings, norms of queries and keys, cosine attention or {_ALONE}",
    "vo": f"norms, gates or {_ALONE} between values and projection",
}


def read_head_ranks(
    model: nn.Module,
    attentions: Sequence[Attention],
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None = None,
) -> tuple[list[HeadRanks], dict[str, str]]:
    """Find the widths inside heads, and for each attention why it has one or none of them.

    Proven on a copy of each attention, or of one that differs from it in the values of parameters
    alone, in double precision and with noise on all parameters: it
    gives the same in other coordinates of its channels, and without half of them what it gives
    with these at zero, fused and unfused. The model is left as it was.

    Args:
        model: any model.
        attentions: of `find_attentions`.
        example_inputs: as for `find_mlps`.
        forward_fn: calls the model on the example inputs, as Torch-Pruning's argument does.

    Returns:
        The widths, by attention in the order of the forward pass, and `name: pair` -> reason.
    """
    found: list[HeadRanks] = []
    reasons: dict[str, str] = {}
    owners = {attention.name: model.get_submodule(attention.name) for attention in attentions}
    with torch.inference_mode(False), evaluating(model, trainable=False), torch.no_grad():
        calls = record_calls(model, owners, example_inputs, forward_fn)
        proven: dict[Any, int | None] = {}
        for attention in attentions:
            for pair in get_args(Pair):
                try:
                    site = _site(model, attention, pair)
                    for inputs in calls[attention.name]:
                        form = site.below(), call_form(owners[attention.name], inputs)
                        if form not in proven:
                            _prove(owners[attention.name], inputs, site)
                            proven[form] = _values(owners[attention.name], inputs, site)
                        values = proven[form]
                    found.append(replace(site, values=values))
                except CannotCut as error:
                    reasons[f"{attention.name}: {pair}"] = str(error)
        given, run = example(example_inputs), runner(model, forward_fn)
        trials = {f"{site.name}: {site.pair}": _trial(model, site) for site in found}
        outside = outside_differences(model, lambda: given.call(run), trials)
    found = [site for site in found if f"{site.name}: {site.pair}" not in outside]
    return found, reasons | outside


def _trial(model: nn.Module, site: HeadRanks) -> Trial:
    dropped = _last_half(site)

    def cut(_: ExitStack) -> None:
        for item in rank_group(_graph(model), site, dropped).items:
            item.dep(item.idxs)

    def zero(_: ExitStack) -> None:
        for name in {*site.made, site.projection}:
            parameters = model.get_submodule(name)._parameters
            for leaf, held in parameters.items():
                if held is not None:
                    parameters[leaf] = nn.Parameter(held.detach().clone(), held.requires_grad)
        mask = _first_half(site)
        mix(model, site, mask, mask)

    return Trial(cut, zero)


def _last_half(site: HeadRanks) -> range:
    return range((site.width + 1) // 2, site.width)


def _first_half(site: HeadRanks) -> Tensor:
    """What takes the other channels from each head, `(heads, width, width)`."""
    kept = torch.zeros(site.width, dtype=torch.double)
    kept[: _last_half(site).start] = 1
    return kept.diag().expand(site.heads, -1, -1)


def _site(model: nn.Module, attention: Attention, pair: Pair) -> HeadRanks:
    for name in (*attention.up, attention.down):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.MultiheadAttention):
            raise CannotCut("an nn.MultiheadAttention holds queries, keys and values in one tensor")
        if type(layer) is not nn.Linear or remade(layer):
            raise CannotCut(f"{name} is no plain Linear, but {type(layer).__name__}")
    channels = attention.width * attention.head_width
    made = [len(parts) * channels for parts in HELD[len(attention.up)]]
    if [model.get_submodule(name).out_features for name in attention.up] != made:
        raise CannotCut("queries, keys and values are not of one width")
    return HeadRanks(
        pair,
        attention.name,
        attention.up,
        attention.down,
        attention.width,
        attention.head_width,
    )


def _prove(owner: nn.Module, inputs: Inputs, site: HeadRanks) -> None:
    """Raise the reason unless an attention can be cut in one of its widths."""
    inside = site.below()
    model = noisy_copy(owner)
    inputs = Inputs(in_double(inputs.args), in_double(inputs.kwargs))
    try:
        dense = first_output(inputs, model)
    except Exception as error:
        raise CannotCut(f"a copy of it can't be run alone ({error})") from error
    mixed = copy.deepcopy(model)
    mix(mixed, inside, *_pair(inside))
    for fused in switches(model):
        if distance(first_output(inputs, switched(mixed, fused)), dense) > _TOLERANCE:
            raise CannotCut(_BETWEEN[site.pair])
    zeroed, narrow = copy.deepcopy(model), copy.deepcopy(model)
    mask = _first_half(inside)
    mix(zeroed, inside, mask, mask)
    rank_group(_graph(narrow), inside, _last_half(inside)).prune(record_history=False)
    for fused in switches(model):
        expected = first_output(inputs, switched(zeroed, fused))
        try:
            found = first_output(inputs, switched(narrow, fused))
        except Exception as error:  # its forward pass reads weights without calling their layers
            raise CannotCut(f"cut to half of the channels it no longer runs ({error})") from error
        if distance(found, expected) > _TOLERANCE:
            raise CannotCut("cut to half of the channels it gives another output than with zeros")


def _values(owner: nn.Module, inputs: Inputs, site: HeadRanks) -> int | None:
    """How many values an attention gives, if it may go as a whole; None if not."""
    if site.pair == "qk":
        return None
    inside, model = site.below(), noisy_copy(owner)
    inputs = Inputs(in_double(inputs.args), in_double(inputs.kwargs))
    with StayingDouble():
        given = inputs.call(model)
    if isinstance(given, Tensor):
        values = 0
    elif isinstance(given, tuple) and all(value is None for value in given[1:]):
        values = len(given)
    else:
        return None
    nothing = torch.zeros(site.heads, site.width, site.width, dtype=torch.double)
    mix(model, inside, nothing, nothing)
    narrow = copy.deepcopy(model)
    removal = rank_group(_graph(narrow), replace(inside, values=values), range(site.width))
    removal.prune(record_history=False)
    try:
        found = first_output(inputs, narrow)
    except Exception as error:
        logger.debug("%s can't go as a whole (%s)", site.name, error)
        return None
    return values if distance(found, first_output(inputs, model)) <= _TOLERANCE else None


def _graph(model: nn.Module) -> Any:
    """A graph of an attention alone, that groups are made on."""
    graph = tp.DependencyGraph()
    graph.model, graph.module2node = model, {}
    graph._module2name = {module: name for name, module in model.named_modules()}
    return graph


def _pair(site: HeadRanks) -> tuple[Tensor, Tensor]:
    """Coordinates of each head, drawn, and those that undo them."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(site.heads, site.width, site.width, generator=generator).double()
    first = torch.eye(site.width).double() + 0.3 * noise / site.width**0.5
    inverse = torch.linalg.inv(first)
    return first, inverse.mT if site.pair == "qk" else inverse
