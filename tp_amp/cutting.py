"""The one place that cuts: for a while, to try a width, or for good, through Torch-Pruning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch_pruning.pruner import function

from tp_amp.mlps import MLP


@contextmanager
def narrowed(model: nn.Module, mlp: MLP, keep: Sequence[int]) -> Iterator[None]:
    """Let the MLP run with only the channels `keep` inside the block.

    The layers hold slices of their parameters meanwhile; the parameters themselves come back on
    exit, the same objects with their gradients, hooks and optimizer state.
    """
    layers: list[tuple[Any, int]] = [(model.get_submodule(name), 0) for name in mlp.up]
    layers.append((model.get_submodule(mlp.down), 1))
    saved = [(m, dict(m._parameters), m.in_features, m.out_features) for m, _ in layers]
    try:
        for module, dim in layers:
            index = torch.tensor(keep, device=module.weight.device)
            for name in ("weight", "bias") if dim == 0 else ("weight",):
                parameter = module._parameters[name]
                if parameter is not None:
                    sliced = parameter.detach().index_select(dim, index)
                    module._parameters[name] = nn.Parameter(sliced, parameter.requires_grad)
            setattr(module, ("out_features", "in_features")[dim], len(keep))
        yield
    finally:
        for module, parameters, in_features, out_features in saved:
            module._parameters.update(parameters)
            module.in_features, module.out_features = in_features, out_features


def cut(graph: Any, mlp: MLP, keep: Sequence[int]) -> Iterator[Any]:
    """Yield the Torch-Pruning group that cuts the MLP down to `keep`, if anything goes.

    Whoever takes the group prunes it; asked for the next one, `requires_grad` of the cut
    parameters is put right, which Torch-Pruning sets to True.
    """
    drop = sorted(set(range(mlp.width)) - set(keep))
    if not drop:
        return
    modules = [graph.model.get_submodule(name) for name in (*mlp.up, mlp.down)]
    flags = [(m, name, p.requires_grad) for m in modules for name, p in m.named_parameters()]
    yield graph.get_pruning_group(modules[0], function.prune_linear_out_channels, drop)
    for module, name, flag in flags:
        module.get_parameter(name).requires_grad_(flag)
