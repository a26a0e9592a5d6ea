"""Draw images at random into sets that share none, transformed and in batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tp_amp.data.images import Images
from tp_amp.running.batches import bar

logger = logging.getLogger(__name__)


def draw(
    images: Images,
    transform: Callable[[Any], Tensor],
    counts: Sequence[int],
    *,
    mode: str = "RGB",
    labelled: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    skip_corrupt: bool = False,
    progress: bool = True,
) -> list[list[Any]]:
    """Draw disjoint sets of images at random, in batches.

    Args:
        images: to draw from.
        transform: from a picture to a tensor `(channels, height, width)`.
        counts: images of each set; where there are fewer images, sets shrink in proportion, which
            is logged.
        mode: of the pictures, as Pillow calls it.
        labelled: make batches `(images, labels)`, else of images alone.
        batch_size: images in a batch at most.
        seed: of the draw.
        skip_corrupt: leave out pictures that can't be decoded, and log how many.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: a picture can't be decoded, or there are fewer images than sets.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    taken: list[tuple[Tensor, int | None]] = []
    corrupt: list[str] = []
    wanted = min(sum(counts), len(order))
    with bar(None, description="reading images", progress=progress, total=wanted) as steps:
        while order and len(taken) < wanted:
            count = wanted - len(taken)
            chosen, order = sorted(order[:count]), order[count:]
            for index in chosen:  # in order, since Parquet is read in groups of rows
                try:
                    picture, label = images.read(index)
                    picture = picture.convert(mode)
                except ValueError as error:
                    if not skip_corrupt:
                        raise ValueError(
                            f"{images.name(index)} can't be decoded as an image ({error}); mend "
                            "or remove it, or pass --skip-corrupt"
                        ) from error
                    corrupt.append(images.name(index))
                else:
                    taken.append((transform(picture), label))
                    steps.update()
    if corrupt:
        logger.warning("%d corrupt images are left out: %s", len(corrupt), ", ".join(corrupt[:5]))
    return _sets(taken, counts, labelled, batch_size, seed)


def _sets(
    taken: list[tuple[Tensor, int | None]],
    counts: Sequence[int],
    labelled: bool,
    batch_size: int,
    seed: int,
) -> list[list[Any]]:
    if len(taken) < len(counts):
        raise ValueError(
            f"{len(taken)} readable images are too few: {len(counts)} sets are needed that share "
            "none (to score, and to judge); pass more images"
        )
    if len(taken) < sum(counts):
        asked = " + ".join(map(str, counts))
        first = max(1, len(taken) * counts[0] // sum(counts))
        counts = [first, len(taken) - first] if len(counts) == 2 else [len(taken)]
        found = " + ".join(map(str, counts))
        logger.warning(
            "%d images are there, %s were asked for: taking %s", len(taken), asked, found
        )
    # They were read in the order of the source, which may be that of the classes.
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.split(torch.randperm(len(taken), generator=generator), list(counts))
    return [
        [
            _batch([taken[i] for i in part.tolist()], labelled)
            # Parts of nearly the same size: the similarity objective can't use a batch of one.
            for part in torch.tensor_split(chosen, math.ceil(len(chosen) / batch_size))
        ]
        for chosen in mixed
    ]


def _batch(pictures: list[tuple[Tensor, int | None]], labelled: bool) -> Any:
    stacked = torch.stack([picture for picture, _ in pictures])
    labels = [label for _, label in pictures if label is not None]
    if not labelled:
        return stacked
    if len(labels) < len(pictures):
        raise ValueError("some images have no label; label all of them or none")
    return stacked, torch.tensor(labels)
