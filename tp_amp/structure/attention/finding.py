"""Find every attention of a model that can lose heads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tp_amp.running.checks import check_model, remade
from tp_amp.running.inputs import Inputs, example, runner
from tp_amp.running.restoring import evaluating, hooks
from tp_amp.running.ties import shared_parameters, told_apart
from tp_amp.structure.attention.adapting import FORWARDS, exposing, stand_in
from tp_amp.structure.attention.checking import checked, zeroed_heads
from tp_amp.structure.attention.counting import COUNTS, NAMED, HeadCounts, grouped_queries
from tp_amp.structure.attention.heads import Attention as Attention
from tp_amp.structure.attention.heads import head_group
from tp_amp.structure.attention.rank_linear import RankLinear
from tp_amp.structure.comparing.copies import CannotCut
from tp_amp.structure.comparing.outside import Trial, outside_differences
from tp_amp.structure.comparing.repeats import call_form
from tp_amp.structure.constant_linear import ConstantLinear
from tp_amp.structure.tolerant_graph import untraced_graph

logger = logging.getLogger(__name__)


def find_attentions(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None = None,
    *,
    num_heads: Mapping[nn.Module, int] | None = None,
) -> list[Attention]:
    """Find every attention that whole heads can be cut from, in the order of the forward pass.

    q, k and v are found by their names; what else has a part for each head is found by gradients,
    and that cutting heads is right is checked by values on a copy of each attention, fused and
    unfused. Norms over the channels of all heads then go over those of the kept heads. What is
    left out is logged with the reason. The model is left as it was.

    Args:
        model: any model.
        example_inputs: as for `find_mlps`.
        forward_fn: calls the model on the example inputs, as Torch-Pruning's argument does.
        num_heads: the number of heads where a module does not tell it, by the attention or, as in
            Torch-Pruning, by the Linears that make q, k and v: `{block.attn.qkv: 12}`.

    Returns:
        The attentions; none where none can lose a head.

    Raises:
        ValueError: the model fails on `example_inputs`, or `num_heads` does not fit the model.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> [attention] = tp_amp.find_attentions(model, torch.randn(1, 3, 224, 224))
        >>> attention.down, attention.width, attention.head_width
        ('blocks.0.attn.proj', 3, 64)
    """
    found, reasons = read_attentions(model, example_inputs, forward_fn, num_heads)
    if reasons:
        logger.warning("these attentions keep all heads: %s", listed(reasons))
    return found


def listed(reasons: Mapping[str, str]) -> str:
    """Each reason once, with what it keeps whole, in one line."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(of)}: {reason}" for reason, of in names.items()) or "it has none"


def read_attentions(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None = None,
    num_heads: Mapping[nn.Module, int] | None = None,
) -> tuple[list[Attention], dict[str, str]]:
    """Find the attentions that can lose heads, and why the others can't.

    Args:
        model: any model.
        example_inputs: as for `find_mlps`.
        forward_fn: calls the model on the example inputs, as Torch-Pruning's argument does.
        num_heads: as for `find_attentions`.

    Returns:
        The attentions in the order of the forward pass, and for the others module path -> reason.

    Raises:
        ValueError: the model fails on `example_inputs`, or `num_heads` does not fit the model.
    """
    check_model(model)
    counts = HeadCounts(model, num_heads)
    names = _attention_names(model, counts)
    owners = {name: model.get_submodule(name) for name in names}
    for name in names:
        parent = name.rpartition(".")[0]
        if name and sum(other.startswith(f"{parent}.") for other in names) == 1:
            owners[parent] = model.get_submodule(parent)
    found: dict[str, Attention] = {}
    passed: dict[Any, Attention] = {}
    reasons = {}
    if any(parameter.is_meta for parameter in model.parameters()):
        reason = "heads are checked by values, and the model is on the meta device without any"
        return [], dict.fromkeys(names, reason)
    shared = shared_parameters(model)
    with torch.inference_mode(False), evaluating(model, trainable=False):
        calls = record_calls(model, owners, example_inputs, forward_fn)
        for name in names:
            try:
                attention = _read(model, name, calls, counts, passed)
                layers = [*attention.up, attention.down]
                layers += [tensor.path.rpartition(".")[0] for tensor in attention.tensors]
                if tied := told_apart(shared, layers):
                    raise CannotCut(tied)
                found[attention.name] = attention
            except CannotCut as error:
                reasons[name] = str(error)
                logger.debug("%s can't lose heads: %s", name, error)
        inputs, run = example(example_inputs), runner(model, forward_fn)
        trials = {name: _trial(model, attention) for name, attention in found.items()}
        outside = outside_differences(model, lambda: inputs.call(run), trials)
        reasons |= {name: outside[name] for name in found if name in outside}
    found = {name: attention for name, attention in found.items() if name not in outside}
    return [found[name] for name in calls if name in found], reasons


def _trial(model: nn.Module, attention: Attention) -> Trial:
    """The first half of the heads, since what counts them takes the first ones."""
    dropped = list(range(attention.width // 2))

    def cut(_: ExitStack) -> None:
        for item in head_group(untraced_graph(model), attention, dropped).items:
            item.dep(item.idxs)

    return Trial(cut, lambda stack: stack.enter_context(zeroed_heads(model, attention, dropped)))


def _attention_names(model: nn.Module, counts: HeadCounts) -> list[str]:
    """Paths of the modules with q, k and v, and of others with layers that count heads."""
    counting = {
        name: module
        for name, module in model.named_modules()
        if counts.projections(module)
        or (counts.counted(module) is not None and any(map(_is_layer, module.modules())))
    }
    known = [name for name, module in counting.items() if counts.projections(module)]

    def stands_alone(name: str) -> bool:
        inside = any(_holds(other, name) for other in known)
        return name in known or not (inside or any(_holds(name, other) for other in counting))

    return [name for name in counting if stands_alone(name)]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _holds(holder: str, name: str) -> bool:
    return name != holder and (not holder or name.startswith(f"{holder}."))


def record_calls(
    model: nn.Module,
    owners: dict[str, nn.Module],
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None,
) -> dict[str, list[Inputs]]:
    """Record all calls of each module, in the order of the first ones."""
    inputs = example(example_inputs)
    calls: dict[str, list[Inputs]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, []).append(Inputs(args, kwargs))

        return record

    run = runner(model, forward_fn)
    handles = [
        module.register_forward_pre_hook(recorder(name), with_kwargs=True)
        for name, module in owners.items()
    ]
    with torch.no_grad(), exposing(model), hooks(handles):
        inputs.call(run)
    return calls


def _read(
    model: nn.Module,
    name: str,
    calls: dict[str, list[Inputs]],
    counts: HeadCounts,
    passed: dict[Any, Attention],
) -> Attention:
    """Describe one attention, or raise the reason why it can't lose heads.

    A call that repeats one in `passed`, in all but the values of parameters, passes as that did;
    what passes a check of its own is entered there.
    """
    guesses = _guesses(model, name, counts)
    if counts.counted(model.get_submodule(name)) == 1:
        raise CannotCut("it has one head")
    if name not in calls:
        raise CannotCut("it is not called on the example inputs")
    for layer in model.get_submodule(name).modules():
        if isinstance(layer, ConstantLinear):
            raise CannotCut("all of it went before")
        if isinstance(layer, RankLinear) and layer.out_features:
            raise CannotCut("its heads have lost channels; cut whole heads before those")
        if reason := remade(layer):
            raise CannotCut(f"of one of its layers, {reason}")
    reasons = []
    for owner, guess in guesses:
        if owner not in calls:
            continue
        try:
            module, found = model.get_submodule(owner), []
            for inputs in calls[owner]:
                form = guess, call_form(module, inputs)
                if form not in passed:
                    passed[form] = checked(module, inputs, guess)
                found.append(passed[form])
            if len(set(found)) > 1:
                raise CannotCut(f"its {len(found)} calls differ in what has a part for each head")
            return _placed(found[0], owner)
        except CannotCut as error:
            reasons.append(error)
    raise reasons[0] if reasons else CannotCut("no Linear reads the channels of all its heads")


def _guesses(model: nn.Module, name: str, counts: HeadCounts) -> Iterator[tuple[str, Attention]]:
    """Yield what an attention may be, the likeliest first, with the module that holds its parts."""
    module = model.get_submodule(name)
    if isinstance(module, nn.MultiheadAttention):
        heads, width = module.num_heads, module.out_proj.in_features // module.num_heads
        yield name, Attention("", ("",), "out_proj", heads, width, forward=_forward(module))
        return
    up, kind = counts.projections(module), type(module).__name__
    if not up:
        raise CannotCut(
            f"{kind} has no Linears named {NAMED}; if others make q, k and v, pass "
            "num_heads={linear: n}"
        )
    made = module.get_submodule(up[-1]).out_features
    # The last holds v alone, k and v, or all three.
    channels = int(made) // (4 - len(up))  # type: ignore[arg-type]
    heads = counts.heads(module, channels) or 0
    if not heads:
        raise CannotCut(
            f"{kind} has its number of heads as none of {COUNTS}; pass num_heads={{module: n}} to "
            "what finds attentions (find_attentions, inspect, plan_from_importance, the pruner)"
        )
    if heads == 1:
        raise CannotCut("it has one head")
    grouped = grouped_queries(module, up, heads, channels)
    if channels % heads:
        uneven = f"{channels} channels don't fall into {heads} heads of one width"
        raise CannotCut(grouped or uneven)
    guess = Attention("", up, "", heads, channels // heads, forward=_forward(module))
    for owner in dict.fromkeys((name, name.rpartition(".")[0])):
        inside = name[len(owner) :].lstrip(".")
        paths = tuple(f"{inside}.{part}" if inside else part for part in up)
        downs = _downs(model.get_submodule(owner), paths, inside, channels)
        for down in downs:
            yield owner, replace(guess, up=paths, down=down)
        if downs:
            return
    if grouped:
        raise CannotCut(grouped)


def _forward(module: nn.Module) -> str:
    """Which forward pass the module can run with fewer heads, or runs already."""
    for kind in ("multihead", "windows"):
        if stand_in(module) == kind or isinstance(module, FORWARDS[kind]):
            return kind
    if isinstance(module, nn.MultiheadAttention):
        raise CannotCut("add_bias_kv, add_zero_attn and forwards of subclasses are not known")
    return "own"


def _downs(owner: nn.Module, up: tuple[str, ...], inside: str, channels: int) -> list[str]:
    """Names of the Linears that may read the heads, the outermost and last first."""
    names = [
        name
        for name, module in owner.named_modules()
        if isinstance(module, nn.Linear)
        and module.in_features == channels
        and name not in up
        and not (inside and _holds(inside, name))
    ]
    names.reverse()
    return sorted(names, key=lambda name: name.count("."))


def _placed(attention: Attention, owner: str) -> Attention:
    """The attention with paths as seen from the model."""

    def path(name: str) -> str:
        return f"{owner}.{name}" if owner and name else owner or name

    return replace(
        attention,
        name=owner,
        up=tuple(map(path, attention.up)),
        down=path(attention.down),
        tensors=tuple(replace(tensor, path=path(tensor.path)) for tensor in attention.tensors),
    )
