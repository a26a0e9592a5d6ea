"""Find every attention of a model that can lose heads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tp_amp.running.inputs import Inputs, example, runner
from tp_amp.running.restoring import evaluating, hooks
from tp_amp.structure.attention.adapting import FORWARDS, exposing, stand_in
from tp_amp.structure.attention.blocks import _QKV
from tp_amp.structure.attention.checking import checked
from tp_amp.structure.attention.head_tensors import CannotCut
from tp_amp.structure.attention.heads import Attention as Attention

logger = logging.getLogger(__name__)

_PROJECTIONS = (*_QKV, ("q", "kv"))
_NAMED = " or ".join("/".join(names) for names in _PROJECTIONS)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")


def find_attentions(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None = None,
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

    Raises:
        ValueError: no attention can lose a head; each is named with the reason. Or the model
            fails on `example_inputs`.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> [attention] = tp_amp.find_attentions(model, torch.randn(1, 3, 224, 224))
        >>> attention.down, attention.width, attention.head_width
        ('blocks.0.attn.proj', 3, 64)
    """
    found, reasons = read_attentions(model, example_inputs, forward_fn)
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    if not found:
        raise ValueError(
            f"no attention of {type(model).__name__} can lose heads: {listed or 'it has none'}"
        )
    if reasons:
        logger.warning("these attentions keep all heads: %s", listed)
    return found


def read_attentions(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None = None,
) -> tuple[list[Attention], dict[str, str]]:
    """Find the attentions that can lose heads, and why the others can't.

    Args:
        model: any model.
        example_inputs: as for `find_mlps`.
        forward_fn: calls the model on the example inputs, as Torch-Pruning's argument does.

    Returns:
        The attentions in the order of the forward pass, and for the others module path -> reason.

    Raises:
        ValueError: the model fails on `example_inputs`.
    """
    names = _attention_names(model)
    owners = {name: model.get_submodule(name) for name in names}
    for name in names:
        parent = name.rpartition(".")[0]
        if name and sum(other.startswith(f"{parent}.") for other in names) == 1:
            owners[parent] = model.get_submodule(parent)
    found: dict[str, Attention] = {}
    reasons = {}
    with torch.inference_mode(False), evaluating(model, trainable=False):
        calls = _record(model, owners, example_inputs, forward_fn)
        for name in names:
            try:
                attention = _read(model, name, calls)
                found[attention.name] = attention
            except CannotCut as reason:
                reasons[name] = str(reason)
                logger.debug("%s can't lose heads: %s", name, reason)
    return [found[name] for name in calls if name in found], reasons


def _attention_names(model: nn.Module) -> list[str]:
    """Paths of the modules with q, k and v, and of others with layers that count heads."""
    counting = {
        name: module
        for name, module in model.named_modules()
        if _projections(module)
        or (_heads(module) is not None and any(map(_is_layer, module.modules())))
    }
    known = [name for name, module in counting.items() if _projections(module)]

    def counts(name: str) -> bool:
        inside = any(_holds(other, name) for other in known)
        return name in known or not (inside or any(_holds(name, other) for other in counting))

    return [name for name in counting if counts(name)]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _holds(holder: str, name: str) -> bool:
    return name != holder and (not holder or name.startswith(f"{holder}."))


def _heads(module: nn.Module) -> int | None:
    """Read the number of heads off a module."""
    for name in _HEADS:
        if type(found := getattr(module, name, None)) is int:
            return found
    return None


def _record(
    model: nn.Module,
    owners: dict[str, nn.Module],
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None,
) -> dict[str, Inputs]:
    """Record the last call of each module, in the order of the calls."""
    inputs = example(example_inputs)
    calls: dict[str, Inputs] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = Inputs(args, kwargs)

        return record

    run = runner(model, forward_fn)
    handles = [
        module.register_forward_pre_hook(recorder(name), with_kwargs=True)
        for name, module in owners.items()
    ]
    with torch.no_grad(), exposing(model), hooks(handles):
        inputs.call(run)
    return calls


def _read(model: nn.Module, name: str, calls: dict[str, Inputs]) -> Attention:
    """Describe one attention, or raise the reason why it can't lose heads."""
    module = model.get_submodule(name)
    if _heads(module) == 1:
        raise CannotCut("it has one head")
    if name not in calls:
        raise CannotCut("it is not called on the example inputs")
    reasons = []
    for owner, guess in _guesses(model, name):
        if owner not in calls:
            continue
        try:
            return _placed(checked(model.get_submodule(owner), calls[owner], guess), owner)
        except CannotCut as error:
            reasons.append(error)
    raise reasons[0] if reasons else CannotCut("no Linear reads the channels of all its heads")


def _guesses(model: nn.Module, name: str) -> Iterator[tuple[str, Attention]]:
    """Yield what an attention may be, the likeliest first, with the module that holds its parts."""
    module = model.get_submodule(name)
    heads = _heads(module) or 0
    up = _projections(module)
    if isinstance(module, nn.MultiheadAttention):
        width = module.out_proj.in_features // heads
        yield name, Attention("", ("",), "out_proj", heads, width, forward=_forward(module))
        return
    if not up:
        raise CannotCut(f"{type(module).__name__} has no Linears named {_NAMED}")
    made = module.get_submodule(up[-1]).out_features
    # The last holds v alone, k and v, or all three.
    channels = int(made) // (4 - len(up))  # type: ignore[arg-type]
    if not heads:
        raise CannotCut(f"{type(module).__name__} has its number of heads as none of {_HEADS}")
    if channels % heads:
        raise CannotCut(f"{channels} channels don't fall into {heads} heads of one width")
    guess = Attention("", up, "", heads, channels // heads, forward=_forward(module))
    for owner in dict.fromkeys((name, name.rpartition(".")[0])):
        inside = name[len(owner) :].lstrip(".")
        paths = tuple(f"{inside}.{part}" if inside else part for part in up)
        downs = _downs(model.get_submodule(owner), paths, inside, channels)
        for down in downs:
            yield owner, replace(guess, up=paths, down=down)
        if downs:
            return


def _forward(module: nn.Module) -> str:
    """Which forward pass the module can run with fewer heads, or runs already."""
    for kind in ("multihead", "windows"):
        if stand_in(module) == kind or isinstance(module, FORWARDS[kind]):
            return kind
    if isinstance(module, nn.MultiheadAttention):
        raise CannotCut("add_bias_kv, add_zero_attn and forwards of subclasses are not known")
    return "own"


def _projections(module: nn.Module) -> tuple[str, ...]:
    """Names of the Linears that make q, k and v; a `nn.MultiheadAttention` has its own weights."""
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight",)
    for names in _PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in names):
            return names
    return ()


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
