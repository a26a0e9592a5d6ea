"""Pruning in many rounds: plans that add up, Torch-Pruning's pruners, training after each cut."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from head_cuts import zeroed
from torch import Tensor, nn
from toys import perturbed, relative
from zoo import SHORT, SHORT_SWIN, TIMM, TINY
from zoo_checks import masked

import tp_amp

FAMILIES = ["vit", "beit", "swin"]
ROUNDS = 50


def pictures(inputs: Tensor, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(count, *inputs.shape[1:], generator=generator)


def made(family: str) -> tuple[nn.Module, Tensor]:
    build, inputs, _ = (TIMM | SHORT)[family]
    torch.manual_seed(0)
    return perturbed(build()), inputs


def one_less(sites: list[Any], left: dict[str, int]) -> tp_amp.PruningPlan:
    """Drop the first of each that has two at least."""
    return tp_amp.PruningPlan(
        {site.down: list(range(1, left[site.down])) for site in sites if left[site.down] > 1}
    )


@pytest.mark.parametrize(
    ("family", "rounds"),
    [("vit", 4), *(pytest.param(name, ROUNDS, marks=pytest.mark.slow) for name in FAMILIES)],
)
def test_plans_of_many_rounds_are_one_plan(family: str, rounds: int, tmp_path: Path) -> None:
    model, inputs = made(family)
    dense = copy.deepcopy(model)
    whole = tp_amp.PruningPlan({})
    for _ in range(rounds):
        plan = tp_amp.plan_from_importance(model, inputs, tp_amp.DIMAPImportance(), 0.97)
        tp_amp.apply_plan(model, plan)
        whole = whole.then(plan)
    mlps = tp_amp.find_mlps(dense, inputs)
    assert {mlp.down for mlp in mlps} == whole.keep.keys()
    assert all(whole.widths[mlp.down] < mlp.width * (1 - rounds / 100) for mlp in mlps)
    batch = pictures(inputs)
    with torch.no_grad():
        found = model(batch)
        assert relative(found, masked(dense, mlps, whole.keep)(batch)) < 1e-5
    tp_amp.save_pruned(model, tmp_path, tp_amp.PruningPlan.from_json(whole.to_json()))
    assert whole == tp_amp.load_pruned(dense, tmp_path)
    with torch.no_grad():
        assert torch.equal(dense(batch), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_channels_of_several_rounds(family: str) -> None:
    """Heads in the first and third, channels in the second and third."""
    model, inputs = made(family)
    dense = copy.deepcopy(model)
    mlps, attentions = tp_amp.find_mlps(model, inputs), tp_amp.find_attentions(model, inputs)
    left = {site.down: site.width for site in (*mlps, *attentions)}
    whole = tp_amp.PruningPlan({})
    for sites in (attentions, mlps, [*mlps, *attentions]):
        plan = one_less(sites, left)
        tp_amp.apply_plan(model, plan, inputs)
        whole = whole.then(plan)
        left |= plan.widths
    batch = pictures(inputs)
    with torch.no_grad():
        reference = masked(zeroed(dense, attentions, whole.keep), mlps, whole.keep)
        assert relative(model(batch), reference(batch)) < 1e-5
        tp_amp.apply_plan(dense, whole)
        assert torch.equal(dense(batch), model(batch))


IMPORTANCES: dict[str, Callable[[list[Tensor]], Any]] = {
    "entropy": lambda data: tp_amp.EntropyTaylorImportance(data=data),
    "reconstruction": lambda data: tp_amp.ReconstructionImportance(data=data),
    "gram_schmidt": lambda data: tp_amp.GramSchmidtImportance(),
    "dimap": lambda data: tp_amp.DIMAPImportance(),
}


SMALL = {"embed_dim": 16, "depths": (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_of_a_pruner_of_torch_pruning(family: str, importance: str) -> None:
    model, inputs = made(family)
    if family == "swin":  # one block of each of two stages
        name, arguments = DROPPING[family]
        model = perturbed(timm.create_model(name, **(arguments | SMALL)))
    batch = pictures(inputs)
    mlps = tp_amp.find_mlps(model, inputs)
    ups = {model.get_submodule(name) for mlp in mlps for name in mlp.up}
    pruner = tp.pruner.MetaPruner(
        model,
        inputs,
        IMPORTANCES[importance]([batch]),
        pruning_ratio=0.75,
        iterative_steps=ROUNDS,
        ignored_layers=[m for m in model.modules() if not list(m.children()) and m not in ups],
    )
    for _ in range(ROUNDS):
        pruner.step()
        with torch.no_grad():
            assert torch.isfinite(model(batch)).all()
    for mlp in mlps:
        assert model.get_submodule(mlp.up[0]).out_features == mlp.width // 4
        assert model.get_submodule(mlp.down).in_features == mlp.width // 4


CUTS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "channels": lambda model, inputs: tp_amp.apply_plan(
        model, one_less(found := tp_amp.find_mlps(model, inputs), widths(found)), inputs
    ),
    "heads": lambda model, inputs: tp_amp.apply_plan(
        model, one_less(found := tp_amp.find_attentions(model, inputs), widths(found)), inputs
    ),
    "ranks": lambda model, inputs: tp_amp.apply_plan(
        model,
        tp_amp.rank_plan(tp_amp.rotate_heads(model, inputs, [pictures(inputs)]), {"vo": 0.5}),
    ),
    "compensated": lambda model, inputs: tp_amp.compensate(
        model,
        tp_amp.plan_from_importance(model, inputs, tp_amp.DIMAPImportance(), 0.5),
        [pictures(inputs, 16)],
        every_linear=True,
        refine=1,
        progress=False,
    ),
}


DROPPING: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {**TINY, "img_size": 32}),
    "swin": ("swin_tiny_patch4_window7_224", SHORT_SWIN),
}


def widths(sites: list[Any]) -> dict[str, int]:
    return {site.down: site.width for site in sites}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("family", "compiled"),
    [
        pytest.param("vit", False, id="vit"),
        pytest.param("vit", True, id="vit-compiled", marks=pytest.mark.slow),
        pytest.param("swin", False, id="swin"),
        pytest.param("swin", True, id="swin-compiled", marks=pytest.mark.slow),
    ],
)
def test_a_training_step_after_a_cut(cut: str, family: str, compiled: bool) -> None:
    """In train mode, with dropout and stochastic depth; every parameter learns."""
    name, arguments = DROPPING[family]
    inputs = (TIMM | SHORT)[family][1]
    torch.manual_seed(0)
    model = perturbed(timm.create_model(name, **arguments, drop_path_rate=0.1, proj_drop_rate=0.1))
    CUTS[cut](model, inputs)
    model.train()
    run: Any = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    torch.manual_seed(1)
    run(pictures(inputs, 8)).square().mean().backward()
    optimizer.step()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.shape == value.shape, name
        assert torch.isfinite(value).all(), name
        assert not torch.equal(value, before[name]), name
