"""What every model of the zoo is put through."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lazy_models import contents
from torch import Tensor, nn
from toys import perturbed, relative
from zoo import hugging_face_models, open_clip_models, torchvision_models

import tp_amp

# Norms over the hidden channels make cutting and masking differ by construction.
MIXING = {"beit3": 2, "eva02_clip": 2, "convnextv2": 5, "open_clip_eva02": 1}


GROUPS = {
    "open_clip": open_clip_models,
    "torchvision": torchvision_models,
    "hugging_face": hugging_face_models,
}


def run(model: nn.Module, inputs: Any) -> Tensor:
    """All tensors of the output in one, whatever its type."""
    output = called(model, inputs)
    if isinstance(output, Tensor):
        return output
    # Not CLIP's logit scale, beside which all else is small.
    return torch.cat([t.flatten() for t in tensors(output) if t.dim() and t.is_floating_point()])


def called(model: nn.Module, inputs: Any) -> Any:
    """What a model gives on example inputs."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors(output: Any) -> list[Tensor]:
    """All tensors that an output holds, at any depth."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    held = values if isinstance(output, (dict, list, tuple)) else ()
    return [tensor for value in held for tensor in tensors(value)]


def masked(model: nn.Module, mlps: list[tp_amp.MLP], keep: dict[str, list[int]]) -> nn.Module:
    """The dense model with all other channels of each `down`'s input set to zero."""
    model = copy.deepcopy(model)
    for mlp in mlps:
        down = model.get_submodule(mlp.down)
        mask = torch.ones(down.weight.shape[1])
        mask[mlp.first : mlp.first + mlp.width] = 0
        mask[mlp.first + torch.tensor(keep[mlp.down])] = 1
        mask = mask if isinstance(down, nn.Linear) else mask.view(-1, 1, 1)
        down.register_forward_pre_hook(lambda _m, args, mask=mask: (args[0] * mask,))
    return model


def hand_cut(model: nn.Module, mlps: list[tp_amp.MLP], keep: dict[str, list[int]]) -> nn.Module:
    """A copy with every tensor of the MLP's layers indexed by hand."""
    model = copy.deepcopy(model)
    for mlp in mlps:
        kept = keep[mlp.down]
        for name in (*mlp.up, *mlp.inner, mlp.down):
            module = model.get_submodule(name)
            for key, parameter in list(module.named_parameters(recurse=False)):
                if name == mlp.down:
                    value = parameter[:, kept] if key == "weight" else parameter
                else:
                    value = parameter[kept]
                setattr(module, key, nn.Parameter(value.detach().clone()))
            if isinstance(module, nn.LayerNorm):
                module.normalized_shape = (len(kept),)
    return model


@contextmanager
def left_as_it_was(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Check that nothing of a model changes that was never called, partly frozen and in training.

    Afterwards it is in eval mode, and still was never called.
    """
    expected = outputs(copy.deepcopy(model), inputs)
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for place, parameter in enumerate(required):
        parameter.requires_grad_(place % 2 == 0)
    next(model.train().children()).eval()
    before = contents(model)
    yield
    assert contents(model) == before
    for place, (parameter, flag) in enumerate(required.items()):
        assert parameter.requires_grad == (place % 2 == 0)
        assert parameter.grad is None
        parameter.requires_grad_(flag)
    found = outputs(copy.deepcopy(model.eval()), inputs)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors of the output, without gradients; what a model draws is the same each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(called(model, inputs))


def check(name: str, model: nn.Module, inputs: Any, count: int) -> float:
    """Check a model; gives the relative difference of the pruned model to the reference."""
    warnings.filterwarnings("ignore", category=UserWarning, module="(timm|transformers|open_clip)")
    model = perturbed(model)
    with left_as_it_was(model, inputs):
        mlps = tp_amp.inspect(model, inputs).mlps  # as find_mlps finds them, and all the rest
    assert len(mlps) == count, [mlp.down for mlp in mlps]
    return check_halves(name, model, mlps, inputs, traced=True)


def check_halves(
    name: str, model: nn.Module, mlps: list[tp_amp.MLP], inputs: Any, *, traced: bool
) -> float:
    """Cut half of each MLP, compare with masking, and use what comes out as any other model.

    A plan that knows the layers cuts them without tracing.
    """
    generator = torch.Generator().manual_seed(5)
    keep = {
        mlp.down: sorted(
            torch.randperm(mlp.width, generator=generator)[: max(1, mlp.width // 2)].tolist()
        )
        for mlp in mlps
    }
    with torch.no_grad():
        dense = run(model, inputs)
        expected = run((hand_cut if name in MIXING else masked)(model, mlps, keep), inputs)
        sites: Any = {} if traced else {mlp.down: mlp for mlp in mlps}
        tp_amp.apply_plan(model, inputs, tp_amp.PruningPlan(keep, sites=sites))
        pruned = run(model, inputs)
    difference = relative(pruned, expected)
    assert difference < 1e-5
    assert relative(dense, expected) > 1e-4  # the masks matter
    if name in MIXING:
        assert sum(len(mlp.inner) for mlp in mlps) == MIXING[name]
    # It is a model like any other: copied, trained, saved, pruned again.
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    run(again, inputs).sum().backward()
    assert all(
        model.get_submodule(mlp.down).weight.shape[1] - mlp.first == len(keep[mlp.down])
        for mlp in mlps
    )
    tp_amp.apply_plan(again, inputs, tp_amp.PruningPlan({mlps[0].down: [0]}))
    assert torch.isfinite(run(again, inputs)).all()
    return difference
