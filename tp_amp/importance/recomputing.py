"""Activation checkpointing: the backward pass computes activations again, and none are kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from tp_amp.running.distributed import Turn
from tp_amp.running.inputs import Inputs, one_image
from tp_amp.running.restoring import replaced_forward
from tp_amp.structure.chain import find_blocks

logger = logging.getLogger(__name__)


@contextmanager
def recomputing(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Keep what each block reads alone, and run the block again when its gradient is computed.

    Hooks on what a block holds see each call twice, the second time within the backward pass.

    Args:
        model: any whose blocks run one after another.
        inputs: a batch, on whose first images the blocks are found.

    Raises:
        ValueError: no such blocks are found.
    """
    blocks = find_blocks(model, one_image(inputs, 2))
    if not blocks:
        raise ValueError(
            f"no blocks were found in {type(model).__name__} that run one after another and hold "
            "most of its layers; use activation_checkpointing=False and smaller batches"
        )
    logger.info("activations of %d blocks are computed again in the backward pass", len(blocks))
    with ExitStack() as stack:
        for name in blocks:
            stack.enter_context(replaced_forward(model.get_submodule(name), _again))
        yield


def recomputed(
    turns: Iterable[Turn], model: nn.Module, stack: ExitStack, *, wanted: bool
) -> Iterator[Turn]:
    """Batches; if wanted, blocks are run again from the first one on, until the stack is left."""
    for turn in turns:
        if wanted and turn.inputs is not None:
            stack.enter_context(recomputing(model, turn.inputs))
            wanted = False
        yield turn


def _again(own: Any) -> Any:
    return partial(checkpoint, own, use_reentrant=False)
