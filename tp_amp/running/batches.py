"""From whatever a loader yields to what a model takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from tp_amp.running.arguments import check_number
from tp_amp.running.distributed import is_first
from tp_amp.running.inputs import Arguments, Inputs, labels_of, prepare


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
    if isinstance(batches, (str, bytes, os.PathLike)):
        raise TypeError(
            f"expected an iterable of batches, found {batches!r}; pass a DataLoader or a list of "
            "batches that were read from there"
        )
    if isinstance(batches, Mapping):
        raise TypeError(
            f"expected an iterable of batches, found one dict with the keys {list(batches)}; pass "
            "[batch], or one of its values where these are loaders"
        )
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
    between = "a share between 0 and 1"
    check_number(between, lambda value: 0 < value < 1, calibration=calibration)
    if isinstance(batches, DataLoader) and isinstance(batches.dataset, Sized):
        count = len(batches.dataset)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        parts = _cut(order, calibration, "images")
        return _subset_loader(batches, parts[0]), _subset_loader(batches, parts[1])
    return _cut(list(batches), calibration, "batches")


def pick_inputs(batches: Iterable[Any], key: str | Callable[[Any], Any]) -> Iterable[Any]:
    """Pick the images out of batches of another form than those that are understood.

    Args:
        batches: that are dicts, or anything if `key` is callable; read again each time.
        key: of the images in each batch; labels under their usual names (`"label"`, `"labels"`,
            `"target"`, `"targets"`) go along. Or takes a batch and gives one that is understood: a
            tensor of images, a tuple of images and labels, or a dict of the model's arguments, of
            which those under the names of labels are passed where the model takes them.

    Returns:
        Batches for every function that takes some; as long as `batches`, where that has a length.

    Raises:
        TypeError: `batches` can't be iterated, or, while they are read, one is no dict.
        ValueError: while they are read, a batch has no such key; those it has are named.

    Example:
        >>> import torch, tp_amp
        >>> loader = [{"img": torch.randn(2, 3, 4, 4), "label": torch.tensor([0, 1])}]
        >>> [(images, labels)] = tp_amp.pick_inputs(loader, "img")
        >>> images.shape, labels
        (torch.Size([2, 3, 4, 4]), tensor([0, 1]))
    """
    check_batches(batches)
    return (_SizedPicked if isinstance(batches, Sized) else _Picked)(batches, key)


class _Picked:
    def __init__(self, batches: Iterable[Any], key: str | Callable[[Any], Any]) -> None:
        self.batches, self.key = batches, key

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield _made(self.key(batch)) if callable(self.key) else _picked(batch, self.key)


class _SizedPicked(_Picked):
    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def _made(found: Any) -> Any:
    """What a function made of a batch, a dict marked as the model's arguments."""
    if isinstance(found, (tuple, list)) and found and isinstance(found[0], Mapping):
        return (Arguments(found[0]), *found[1:])
    return Arguments(found) if isinstance(found, Mapping) else found


def _picked(batch: Any, key: str) -> Any:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch is a {type(batch).__name__}, not a dict with the key {key!r}; pass key= as a "
            "function that takes a batch and gives the images"
        )
    if key not in batch:
        raise ValueError(f"a batch has no key {key!r}; its keys are {list(batch)}")
    labels = labels_of(batch)
    return batch[key] if labels is None else (batch[key], labels)


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
