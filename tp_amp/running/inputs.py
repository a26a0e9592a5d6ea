"""What a model is called with: one batch, whatever a loader yields, or example inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

LABEL_KEYS = frozenset({"label", "labels", "target", "targets"})
# What transformers calls images, where texts may stand before them.
_IMAGES = ("pixel_values", "pixel_values_videos")
# Several texts may belong to one image.
_TEXTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})
# How many patches of each image stand in one row of all images' patches, `(images, 3)`.
_GRIDS = ("grid_thw", "image_grid_thw")


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of the model: a batch, or example inputs."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None  # classes `(images,)`, where the batch holds them; only measured

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, the images first."""
        named = [self.kwargs[name] for name in _IMAGES if name in self.kwargs]
        others = [value for name, value in self.kwargs.items() if name not in _IMAGES]
        return [v for v in (*self.args, *named, *others) if isinstance(v, Tensor)]

    @property
    def images(self) -> int:
        """How many images the batch holds."""
        grid = self._grid
        return len(self.tensors()[0] if grid is None else grid)

    @property
    def patches(self) -> list[int] | None:
        """How many patches each image has, where they all stand in one row; else None."""
        grid = self._grid
        return None if grid is None else [int(count) for count in grid.prod(1)]

    @property
    def _grid(self) -> Tensor | None:
        found = (self.kwargs.get(name) for name in _GRIDS)
        return next((grid for grid in found if isinstance(grid, Tensor) and grid.dim() == 2), None)

    def raw(self) -> Any:
        """As a script gives them to `forward_fn`: one tensor, several in a tuple, or a dict."""
        return self.kwargs or (self.args[0] if len(self.args) == 1 else self.args)

    def to(self, device: str) -> Inputs:
        """The same arguments with all tensors on another device."""
        args = tuple(v.to(device) if isinstance(v, Tensor) else v for v in self.args)
        items = self.kwargs.items()
        kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in items}
        return Inputs(args, kwargs, self.labels)

    def arguments_of(self, function: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as `function` takes them.

        A dict that lacks what the model's forward pass needs is its one argument, as the patches,
        coordinates and validity of timm's NaFlexViT are.
        """
        whole = bool(self.kwargs) and not self.args and not _takes(function, self.kwargs)
        return ((self.kwargs,), {}) if whole else (self.args, self.kwargs)

    def call(self, function: Any) -> Any:
        """Call `function` on the batch; a failure becomes a ValueError that tells the shapes."""
        args, kwargs = self.arguments_of(function)
        lookups = (AttributeError, KeyError) if len(args) > len(self.args) else ()
        try:
            return function(*args, **kwargs)
        except (RuntimeError, AssertionError, TypeError, ValueError, IndexError, *lookups) as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors())
            raise ValueError(
                f"the model failed on inputs of shape {shapes}: {error}; "
                f"{_remedy(function, self, error)}"
            ) from error


def _remedy(function: Any, inputs: Inputs, error: Exception) -> str:
    """What to do about inputs that a model fails on, by what they look like."""
    picked = "; tp_amp.pick_inputs(batches, key=...) picks the images out of batches"
    wrong = isinstance(error, TypeError) and "argument" in str(error)
    if wrong or isinstance(error, (AttributeError, KeyError)):
        given = f"the keys {list(inputs.kwargs)}" if inputs.kwargs else f"{len(inputs.args)} inputs"
        try:
            takes = str(inspect.signature(getattr(function, "forward", function)))
        except (TypeError, ValueError):
            takes = "others"
        return (
            f"its forward takes {takes}, found {given}; labels are none of them"
            f"{picked if inputs.kwargs else ''}"
        )
    images = next(iter(inputs.tensors()), None)
    if images is None:
        return "pass images"
    dtype = str(images.dtype).removeprefix("torch.")
    if images.dim() == 4 and images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        return "the images have their channels last; pass images.permute(0, 3, 1, 2)"
    if images.dim() > 2 and not images.is_floating_point():
        return f"the images are {dtype}; pass images.float() / 255, normalised as the model needs"
    if images.dim() == 3 and images.shape[0] in (1, 3, 4) and not inputs.kwargs:
        return "an image stands without a batch; pass images[None]"
    weights = function.parameters() if isinstance(function, nn.Module) else ()
    like = next((p for p in weights if p.is_floating_point()), None)
    if like is not None and images.is_floating_point() and images.dtype != like.dtype:
        return f"the inputs are {dtype}; pass inputs.to(torch.{str(like.dtype)[6:]})"
    if like is not None and images.device != like.device:
        return f'the inputs lie on {images.device}; pass inputs.to("{like.device}")'
    check = "check that images have the size and channels the model was built for"
    if not inputs.kwargs:
        return check
    keys = list(inputs.kwargs)
    return f"{check}, and that the model takes what stands under the keys {keys}{picked}"


def _takes(function: Any, names: Collection[str]) -> bool:
    """Whether some keyword arguments hold all that a model's forward pass needs."""
    while isinstance(function, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        function = function.module
    if not isinstance(function, nn.Module):
        return True
    parameters = list(inspect.signature(type(function).forward).parameters.values())[1:]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return True
    needed = [p for p in parameters if p.default is p.empty and p.kind not in several]
    return all(p.name in names for p in needed)


def runner(model: nn.Module, forward_fn: Callable[..., Any] | None) -> Callable[..., Any]:
    """What calls the model: itself, or Torch-Pruning's `forward_fn(model, example_inputs)`."""
    if forward_fn is None:
        return model
    return lambda *args, **kwargs: forward_fn(model, Inputs(args, kwargs).raw())


def prepare(batch: Any, model: nn.Module) -> Inputs:
    """Turn one batch into model inputs on the model's device and in its dtype.

    Args:
        batch: images as a tensor `(images, ...)`, a tuple or list with the images first (of what
            follows, only labels are kept, apart), or a dict of keyword arguments and labels.
        model: gives device and floating dtype by its first floating parameter.

    Raises:
        TypeError: the batch is none of these.
        ValueError: the batch is empty.
    """
    labels = labels_of(batch)
    if isinstance(batch, (tuple, list)) and len(batch) > 0:
        batch = batch[0]
    if isinstance(batch, Mapping):
        batch = _inner({k: v for k, v in batch.items() if k not in LABEL_KEYS})
        inputs = Inputs(kwargs={k: _move(v, model) for k, v in batch.items()})
    elif isinstance(batch, Tensor):
        inputs = Inputs(args=(_move(batch, model),))
    else:
        inputs = Inputs()
    if not inputs.tensors():
        keys = f" under the keys {list(batch)}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            f"a batch is a {type(batch).__name__} without image tensors{keys}; batches must be a "
            "tensor of images, a tuple (images, ...) or a dict of tensors; "
            "tp_amp.pick_inputs(batches, key=...) picks the images out of others"
        )
    if inputs.tensors()[0].dim() == 0 or inputs.images == 0:
        raise ValueError("a batch holds no images; check the data loader")
    if labels is not None and len(labels) == inputs.images:
        inputs = replace(inputs, labels=labels)
    return inputs


def labels_of(batch: Any) -> Tensor | None:
    """The classes of a batch's images; None where what it holds can't be that."""
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in sorted(LABEL_KEYS & batch.keys())), None)
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    whole = isinstance(found, Tensor) and found.dim() == 1 and not found.is_floating_point()
    return found if whole else None


def _move(value: Any, model: nn.Module) -> Any:
    if not isinstance(value, Tensor):
        return value
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is not None:
        value = value.to(like.device, like.dtype if value.is_floating_point() else None)
    return _autograd_ready(value)


def _autograd_ready(value: Any) -> Any:
    """Autograd can't save tensors made in inference mode, but it can save copies of them."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def one_image(batch: Inputs, count: int = 1, first: int = 0) -> Inputs:
    """The first image of a batch, or a few from another one on."""
    images, patches = batch.images, batch.patches

    def few(value: Any, name: str = "") -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if patches is not None and len(value) == sum(patches) != images:
            start = sum(patches[:first])
            return value[start : start + sum(patches[first : first + count])]
        each = len(value) // images if name in _TEXTS and len(value) % images == 0 else 1
        return (
            value[first * each : (first + count) * each] if len(value) == each * images else value
        )

    return Inputs(tuple(map(few, batch.args)), {k: few(v, k) for k, v in batch.kwargs.items()})


def of_size(batch: Inputs, count: int) -> Inputs:
    """A batch of as many images, the given ones over and over."""
    images, times = batch.images, -(-count // batch.images)
    patches = batch.patches

    def several(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        rows = images if patches is None else sum(patches)
        fits = len(value) == images or len(value) % rows == 0
        return torch.cat([value] * times) if fits else value

    args = tuple(map(several, batch.args))
    kwargs = {name: several(value) for name, value in batch.kwargs.items()}
    return one_image(Inputs(args, kwargs), count)


def _inner(inputs: Any) -> Any:
    """A dict that is all that another one, or a tuple, holds."""
    held = list(inputs.values() if isinstance(inputs, Mapping) else inputs)
    return held[0] if len(held) == 1 and isinstance(held[0], Mapping) else inputs


def example(inputs: Any) -> Inputs:
    """Read example inputs as Torch-Pruning does: a tensor, a sequence, or keyword arguments.

    Raises:
        TypeError: they are none of these.
    """
    if isinstance(inputs, (Mapping, tuple, list)):
        inputs = _inner(inputs)
    if isinstance(inputs, Mapping):
        return Inputs(kwargs={key: _autograd_ready(value) for key, value in inputs.items()})
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (tuple, list)):
        many = hasattr(inputs, "__iter__") and not isinstance(inputs, str)
        how = "; pass one batch of images" if many else ""
        raise TypeError(
            "example inputs must be a tensor of images, a tuple of arguments or a dict of keyword "
            f"arguments, found a {type(inputs).__name__}{how}"
        )
    return Inputs(args=tuple(_autograd_ready(value) for value in inputs))
