"""What a model is called with: one batch, whatever a loader yields, or example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.forward.names import accepts, required, takes
from tp_amp.running.forward.remedies import of_inputs, remedy, shapes_of

LABEL_KEYS = frozenset({"label", "labels", "target", "targets"})
# What transformers calls images, where texts may stand before them.
_IMAGES = ("pixel_values", "pixel_values_videos")
# Several texts may belong to one image.
_TEXTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})
# How many patches of each image stand in one row of all images' patches, `(images, 3)`.
_GRIDS = ("grid_thw", "image_grid_thw")


class Arguments(dict[str, Any]):
    """Keyword arguments of a model, among which no labels are left to be set apart."""


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
        """As a script gives them to `forward_fn`: one tensor, several in a tuple, or a dict.

        A list of images as the one argument stays in its tuple, for it would be read as several.
        """
        alone = len(self.args) == 1 and not isinstance(self.args[0], (tuple, list))
        return self.kwargs or (self.args[0] if alone else self.args)

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
        whole = bool(self.kwargs) and not self.args and not takes(function, self.kwargs)
        return ((dict(self.kwargs),), {}) if whole else (self.args, self.kwargs)

    def call(self, function: Any) -> Any:
        """Call `function` on the batch; a failure becomes a ValueError that tells the shapes."""
        args, kwargs = self.arguments_of(function)
        whole = len(args) > len(self.args)
        lookups = (AttributeError, KeyError) if whole else (AttributeError,)
        try:
            return function(*args, **kwargs)
        except (RuntimeError, AssertionError, TypeError, ValueError, IndexError, *lookups) as error:
            if not whole and not of_inputs(error):
                raise
            tensors = self.tensors()
            raise ValueError(
                f"the model failed on {shapes_of(self.args, self.kwargs, tensors)}: {error}; "
                f"{remedy(function, self.args, self.kwargs, tensors, error)}"
            ) from error


def runner(model: nn.Module, forward_fn: Callable[..., Any] | None) -> Callable[..., Any]:
    """What calls the model: itself, or Torch-Pruning's `forward_fn(model, example_inputs)`."""
    if forward_fn is None:
        return model
    return lambda *args, **kwargs: forward_fn(model, Inputs(args, kwargs).raw())


def prepare(batch: Any, model: nn.Module) -> Inputs:
    """Turn one batch into model inputs on the model's device and in its dtype.

    Args:
        batch: images as a tensor `(images, ...)`, a tuple or list with the images first (of what
            follows, only labels are kept, apart), or a dict of keyword arguments and labels (which
            are arguments too where the forward pass can't do without).
        model: gives device and floating dtype by its first floating parameter.

    Raises:
        TypeError: the batch is none of these.
        ValueError: the batch is empty.
    """
    labels = None if isinstance(batch, Mapping) else labels_of(batch)
    if isinstance(batch, (tuple, list)) and len(batch) > 0:
        batch = batch[0]
    if isinstance(batch, Mapping):
        apart = {name: batch[name] for name in _labels_apart(batch, model)}
        labels = labels_of(apart) if labels is None else labels
        batch = _inner({k: v for k, v in batch.items() if k not in apart})
        inputs = Inputs(kwargs=Arguments((k, _move(v, model)) for k, v in batch.items()))
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


def _labels_apart(batch: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The labels of a dict that are no arguments of the model."""
    found = [name for name in batch if name in LABEL_KEYS]
    if isinstance(batch, Arguments):
        return [name for name in found if not accepts(model, name)]
    needed = required(model)
    return [name for name in found if name not in needed]


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
        ValueError: they hold no image.
    """
    found = _example(inputs)
    images = next(iter(found.tensors()), None)
    if images is not None and images.dim() > 0 and len(images) == 0:
        raise ValueError(
            f"example inputs hold no images, found shape {tuple(images.shape)}; pass one image"
        )
    return found


def _example(inputs: Any) -> Inputs:
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
