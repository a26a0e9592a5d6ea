"""The one place where a model is checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def check_model(model: Any, *, values: bool = False) -> None:
    """Refuse what can't be worked on, with the reason and what to do instead.

    Args:
        model: whatever was passed for a model.
        values: whether its weights are read too, which must then be there and finite.

    Raises:
        TypeError: it is no module.
        ValueError: it is scripted, exported, compiled, sharded, quantised or not made yet; or, with
            `values`, on the meta device or with a NaN or an infinity.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(_no_module(model))
    for name, module in model.named_modules():
        reason = _other_run(module) or _other_weights(module)
        if reason:
            raise ValueError(f"{name or 'the model'} {reason}")
    if values:
        check_values(model)


def check_replaced(model: nn.Module, known: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a forward pass has put another module where one with parameters was.

    What is found in such a pass has no place in the model as it was before, and is again.

    Args:
        model: after the pass.
        known: its modules by their paths, before the pass.
    """
    now = dict(model.named_modules())
    for name, module in known.items():
        if now.get(name) is not module and next(module.parameters(), None) is not None:
            new = now.get(name)
            done = "removes it" if new is None else f"puts a {type(new).__name__} in its place"
            raise ValueError(
                f"{name} is not there to stay: the first forward pass of {type(model).__name__} "
                f"{done}; call the model once on real images before"
            )


def check_values(model: nn.Module) -> None:
    """Raise ValueError naming the first parameter without values, or with a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name} is on the meta device, without values; load the weights first, "
                "and without offloading them"
            )
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"parameter {name} holds NaN or infinite values; load sound weights before pruning"
            )


def check_heads(model: nn.Module, num_heads: Any) -> None:
    """Raise for numbers of heads that no attention of a model can have.

    Raises:
        TypeError: it is no dict.
        ValueError: a key is no module of the model, or a number is not positive or divides the
            channels of none of the module's Linears.
    """
    if num_heads is None:
        return
    if not isinstance(num_heads, Mapping):
        raise TypeError(
            "num_heads must be a dict from modules to their numbers of heads, found a "
            f"{type(num_heads).__name__}"
        )
    names = {module: name for name, module in model.named_modules()}
    for module, count in num_heads.items():
        if module not in names:
            kind = type(module).__name__
            told = f"the text {module!r}" if isinstance(module, str) else f"a {kind}"
            raise ValueError(
                f"num_heads names {told} that is no module of this {type(model).__name__}; take "
                "the modules off the model that is passed"
            )
        if type(count) is not int or count < 1:
            raise ValueError(
                f"num_heads[{names[module]}] must be a positive integer, found {count!r}"
            )
        layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
        channels = {n for layer in layers for n in (layer.in_features, layer.out_features)}
        if channels and all(width % count for width in channels):
            raise ValueError(
                f"num_heads[{names[module]}] is {count}, which divides none of the channels "
                f"{sorted(channels)} of its Linears"
            )


def remade(module: nn.Module) -> str | None:
    """Why a layer's weights can't be cut: something makes them anew from others at each call."""
    if parametrize.is_parametrized(module):
        parametrizations: Any = module.parametrizations
        name, made = next(iter(parametrizations.items()))
        kind = type(made[0]).__name__.lstrip("_")
        return (
            f"its {name} is made anew at each call by the parametrization {kind}; "
            f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{name}") makes it plain'
        )
    layer = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    if not layer or module._parameters.get("weight") is not None:
        return None
    kinds = {type(hook).__name__ for hook in module._forward_pre_hooks.values()}
    removers = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
    known = [f"{name}(layer)" for kind, name in removers.items() if kind in kinds]
    remedy = (
        f"torch.nn.utils.{known[0]}" if known else 'torch.nn.utils.prune.remove(layer, "weight")'
    )
    if not known and "weight_orig" not in module._parameters:
        remedy = "give it a parameter of its own"
    return f"its weight is made anew at each call, and no parameter; first {remedy}"


def _no_module(found: Any) -> str:
    text = f"the model is a {type(found).__name__}, no torch.nn.Module"
    if isinstance(found, type):
        return f"the model is the class {found.__name__}; make one of it first"
    if isinstance(found, (tuple, list)):
        place = next((i for i, part in enumerate(found) if isinstance(part, nn.Module)), None)
        return text if place is None else f"{text}; pass the model in it, item {place}"
    if isinstance(found, dict):
        return f"{text}; build the model and load the state dict into it"
    if isinstance(found, str):
        return f"{text}; build the model of that name first"
    if isinstance(getattr(found, "model", None), nn.Module):
        return f"{text}; pass its .model"
    return text


def _other_run(module: nn.Module) -> str | None:
    """Why a module's forward pass can't be followed layer by layer."""
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "is scripted by torch.jit, so that its layers can't be cut; prune the Python model "
            "that it was made from, and script what is pruned"
        )
    if isinstance(module, torch.fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes
    ):
        return (
            "was made by torch.export, whose graph calls no layers; prune the Python model that it "
            "was made from, and export what is pruned"
        )
    # torch.compile runs graphs that know no layers, nor hooks.
    if hasattr(module, "_orig_mod"):
        return "is wrapped by torch.compile; pass model._orig_mod, and compile what is pruned"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "was compiled in place; prune a model that is not, and call compile() afterwards"
    return None


def _other_weights(module: nn.Module) -> str | None:
    """Why a module's weights can't be cut as the matrices that they are."""
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    if any(is_lazy(tensor) for tensor in tensors.values()):
        return "has no weights yet; call the model once on real images"
    sharded = any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)
    # DTensors know where their parts lie; DeepSpeed leaves empty tensors.
    sharded |= any(hasattr(t, "placements") or hasattr(t, "ds_id") for t in tensors.values())
    if sharded:
        return (
            "has its weights sharded over processes; prune first, on one, and shard what is pruned"
        )
    if "quantized" in type(module).__module__.split(".") or any(
        is_traceable_wrapper_subclass(tensor) or (name in ("weight", "qweight") and _packed(tensor))
        for name, tensor in tensors.items()
    ):
        return (
            f"is quantised ({type(module).__name__}); prune the model first, and quantise what is "
            "pruned"
        )
    return None


def _packed(weight: Tensor) -> bool:
    """Whether a matrix holds integers, or floating numbers of eight bits."""
    return weight.dim() == 2 and (not weight.dtype.is_floating_point or weight.itemsize == 1)
