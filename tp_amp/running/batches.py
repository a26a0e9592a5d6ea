"""From whatever a loader yields to what a model takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from tp_amp.running.distributed import is_first

LABEL_KEYS = frozenset({"label", "labels", "target", "targets"})


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of the model: a batch, or example inputs."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None  # classes `(images,)`, where the batch holds them; only measured

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, the images first."""
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    @property
    def images(self) -> int:
        """How many images the batch holds."""
        return len(self.tensors()[0])

    def raw(self) -> Any:
        """As a script gives them to `forward_fn`: one tensor, several in a tuple, or a dict."""
        return self.kwargs or (self.args[0] if len(self.args) == 1 else self.args)

    def to(self, device: str) -> Inputs:
        """The same arguments with all tensors on another device."""
        args = tuple(v.to(device) if isinstance(v, Tensor) else v for v in self.args)
        items = self.kwargs.items()
        kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in items}
        return Inputs(args, kwargs, self.labels)

    def call(self, function: Any) -> Any:
        """Call `function` on the batch; a failure becomes a ValueError that tells the shapes."""
        try:
            return function(*self.args, **self.kwargs)
        except (RuntimeError, AssertionError, TypeError, ValueError, IndexError) as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors())
            raise ValueError(
                f"the model failed on inputs of shape {shapes}: {error}; "
                "check that images have the size and channels the model was built for"
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
        kwargs = {k: _move(v, model) for k, v in batch.items() if k not in LABEL_KEYS}
        inputs = Inputs(kwargs=kwargs)
    elif isinstance(batch, Tensor):
        inputs = Inputs(args=(_move(batch, model),))
    else:
        inputs = Inputs()
    if not inputs.tensors():
        raise TypeError(
            f"a batch is a {type(batch).__name__} without image tensors; batches must be a tensor "
            "of images, a tuple (images, ...) or a dict of tensors"
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


def one_image(batch: Inputs, count: int = 1) -> Inputs:
    """The first image of a batch, or the first few."""

    def few(value: Any) -> Any:
        whole = isinstance(value, Tensor) and len(value) == batch.images
        return value[:count] if whole else value

    return Inputs(tuple(map(few, batch.args)), {k: few(v) for k, v in batch.kwargs.items()})


def example(inputs: Any) -> Inputs:
    """Read example inputs as Torch-Pruning does: a tensor, a sequence, or keyword arguments."""
    if isinstance(inputs, Mapping):
        return Inputs(kwargs={key: _autograd_ready(value) for key, value in inputs.items()})
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    return Inputs(args=tuple(_autograd_ready(value) for value in inputs))


def stream(
    batches: Iterable[Any], model: nn.Module, *, description: str, progress: bool
) -> Iterator[Inputs]:
    """Yield every batch as model inputs, with a progress bar on a terminal.

    Raises:
        TypeError: `batches` is a single tensor or can't be iterated.
        ValueError: there is no batch.
    """
    check_batches(batches)
    count = 0
    total = len(batches) if isinstance(batches, Sized) else None
    # tqdm may call iter() twice, which starts a loader's workers twice.
    for batch in bar(iter(batches), description=description, progress=progress, total=total):
        yield prepare(batch, model)
        count += 1
    if count == 0:
        raise ValueError(
            "the data holds no batch; pass a loader with at least one batch "
            "(an iterator that was used up before yields none)"
        )


def bar(items: Any, *, description: str, progress: bool, total: int | None = None) -> Any:
    """Wrap an iterable in a progress bar: on a terminal, and of several ranks on the first."""
    disable = None if progress and is_first() else True  # None: where nobody looks
    return tqdm(items, desc=description, total=total, disable=disable, leave=False)


def check_batches(batches: Any, *, repeatable: bool = False) -> None:
    """Raise TypeError unless `batches` can be iterated, more than once if `repeatable`."""
    if isinstance(batches, Tensor):
        raise TypeError(
            f"expected an iterable of batches, found one tensor of shape {tuple(batches.shape)}; "
            "pass [images] or images.split(64)"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"expected an iterable of batches, found {type(batches).__name__}")
    if repeatable and isinstance(batches, Iterator):
        raise TypeError(
            f"the batches are read many times, found a one-shot {type(batches).__name__}; "
            "pass a DataLoader or a list of batches"
        )


def split_batches(
    batches: Iterable[Any], calibration: float = 0.5, *, seed: int = 0
) -> tuple[Iterable[Any], Iterable[Any]]:
    """Split one loader in two with no image in common: for scoring, and for the search.

    A DataLoader over a map-style dataset is split by image, at random; anything else is read
    into a list and split between batches.

    Args:
        batches: a DataLoader, or any iterable of batches.
        calibration: share of the images (or batches) that goes to the search, between 0 and 1.
        seed: of the random split.

    Returns:
        The batches for scoring and those for the search.

    Raises:
        ValueError: the share is not between 0 and 1, or one part would be empty.

    Example:
        >>> import torch, tp_amp
        >>> scoring, search = tp_amp.split_batches(torch.randn(8, 3, 4, 4).split(2))
        >>> len(scoring), len(search)
        (2, 2)
    """
    check_batches(batches)
    if not 0 < calibration < 1:
        raise ValueError(f"calibration must lie between 0 and 1, found {calibration}")
    if isinstance(batches, DataLoader) and isinstance(batches.dataset, Sized):
        count = len(batches.dataset)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        parts = _cut(order, calibration, "images")
        return _subset_loader(batches, parts[0]), _subset_loader(batches, parts[1])
    return _cut(list(batches), calibration, "batches")


def _cut(items: list[Any], calibration: float, unit: str) -> tuple[list[Any], list[Any]]:
    held_out = round(len(items) * calibration)
    if not 0 < held_out < len(items):
        raise ValueError(
            f"{len(items)} {unit} can't be split with a share of {calibration}: one part would be "
            "empty; pass more data or another share"
        )
    return items[held_out:], items[:held_out]


def _subset_loader(loader: DataLoader[Any], indices: Sequence[int]) -> DataLoader[Any]:
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size or 1,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )
