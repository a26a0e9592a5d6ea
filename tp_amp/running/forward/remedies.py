"""What to do about inputs that a model fails on, by what they look like."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tp_amp.running.forward.names import named, required

_PICKED = "; tp_amp.pick_inputs(batches, key=...) picks the images out of batches"
# What a model finds in place of a tensor; it lacks other attributes by faults of its own.
_NO_TENSOR = re.compile(r"'(NoneType|dict|list|tuple|str|int|float)' object has no attribute")


def of_inputs(error: Exception) -> bool:
    """Whether an error can come of what a model was called with."""
    return not isinstance(error, AttributeError) or _NO_TENSOR.match(str(error)) is not None


def shapes_of(args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> str:
    """What a model was called with, for its message."""
    if tensors:
        return "inputs of shape " + ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
    held = [type(value).__name__ for value in args]
    held += [f"{name}: {type(value).__name__}" for name, value in kwargs.items()]
    return f"inputs without a tensor ({', '.join(held) or 'none'})"


def remedy(
    function: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tensors: Sequence[Tensor],
    error: Exception,
) -> str:
    """What to do.

    Args:
        function: what failed, a model mostly.
        args: what it was called with.
        kwargs: the same.
        tensors: all tensors among both, the images first.
        error: what it raised.
    """
    known = named(function)
    strange = bool(kwargs and known) and not set(kwargs) & set(known)
    wrong = isinstance(error, TypeError) and "argument" in str(error)
    if not tensors and not strange:
        return "pass a tensor of images, or a tuple or a dict of arguments that holds one"
    if strange or wrong or isinstance(error, (AttributeError, KeyError)):
        return _of_names(function, args, kwargs)
    return _of_labels(function, args, tensors[0]) or _of_images(function, kwargs, tensors[0])


def _of_labels(function: Any, args: Sequence[Any], images: Tensor) -> str | None:
    """What to do where numbers of classes stand for images, or where none are asked for."""
    if images.dim() == 1 and not images.is_floating_point():
        dtype = str(images.dtype).removeprefix("torch.")
        return f"{dtype} numbers in one row are labels, no images; images come first in a batch"
    unasked = [value for value in args[len(required(function)) :] if isinstance(value, Tensor)]
    if any(x.shape == images.shape[:1] and not x.is_floating_point() for x in unasked):
        return "what stands behind the images are labels; pass the images alone"
    return None


def _of_names(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What to do where arguments have other names than a forward pass knows, or are too few."""
    known, needed = named(function), required(function)
    given = f"the keys {list(kwargs)}" if kwargs else f"{len(args)} inputs"
    text = f"its forward takes ({', '.join(known)}), found {given}"
    if kwargs:
        return f"{text}; labels are none of them{_PICKED}"
    if len(needed) > len(args):
        parts = ", ".join(f"{name!r}: batch[{place}]" for place, name in enumerate(needed))
        return (
            f"{text}; of a batch in a tuple only the images are passed, so pass a dict of "
            f"{needed}: tp_amp.pick_inputs(batches, key=lambda batch: {{{parts}}}) makes them"
        )
    if len(known) > len(args):
        such = next((name for name in known if name.startswith("pixel_values")), known[0])
        return f"{text} by position; pass a dict by name, such as {{{such!r}: images}}"
    return f"{text}; labels are none of them"


def _of_images(function: Any, kwargs: Mapping[str, Any], images: Tensor) -> str:
    """What to do where images have another form than a model was built for."""
    dtype = str(images.dtype).removeprefix("torch.")
    if images.dim() == 4 and images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        return "the images have their channels last; pass images.permute(0, 3, 1, 2)"
    if images.dim() > 2 and not images.is_floating_point():
        return f"the images are {dtype}; pass images.float() / 255, normalised as the model needs"
    named_images = any(name.startswith("pixel_values") for name in kwargs)
    if images.dim() == 3 and images.shape[0] in (1, 3, 4) and (named_images or not kwargs):
        return "an image stands without a batch; pass images[None]"
    weights = function.parameters() if isinstance(function, nn.Module) else ()
    like = next((p for p in weights if p.is_floating_point()), None)
    if like is not None and images.is_floating_point() and images.dtype != like.dtype:
        return f"the inputs are {dtype}; pass inputs.to(torch.{str(like.dtype)[6:]})"
    if like is not None and images.device != like.device:
        return f'the inputs lie on {images.device}; pass inputs.to("{like.device}")'
    check = "check that images have the size and channels the model was built for"
    if not kwargs:
        return check
    return f"{check}, and that the model takes what stands under the keys {list(kwargs)}{_PICKED}"
