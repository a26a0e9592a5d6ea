"""Layers that share a parameter with others are never taken apart: they are refused by name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from toys import ToyViT, fingerprint, images, perturbed, relative
from zoo_checks import masked

import tp_amp

FREE = "blocks.0.mlp.second"  # of the three MLPs the one that shares nothing
FEW, OTHERS = [images(4, 1), images(4, 2)], [images(4, 3), images(4, 4)]


def whole(model: ToyViT) -> None:
    """All of two MLPs."""
    model.blocks[2].mlp.first.weight = model.blocks[1].mlp.first.weight
    model.blocks[2].mlp.second.weight = model.blocks[1].mlp.second.weight


def one_layer(model: ToyViT) -> None:
    """The first layer of two MLPs."""
    model.blocks[2].mlp.first.weight = model.blocks[1].mlp.first.weight


def a_bias(model: ToyViT) -> None:
    """The bias of the hidden channels."""
    model.blocks[2].mlp.first.bias = model.blocks[1].mlp.first.bias


def transposed(model: ToyViT) -> None:
    """The second layer of each is the first one's transposed."""
    for block in model.blocks[1:]:
        block.mlp.second.weight = nn.Parameter(block.mlp.first.weight.detach().T)


def with_another(model: ToyViT) -> None:
    """A layer that is no MLP's holds the weight too."""
    for i in (1, 2):
        other = nn.Linear(12, 20, bias=False)
        other.weight = model.blocks[i].mlp.first.weight
        model.register_module(f"other{i}", other)


TIES: dict[str, Callable[[ToyViT], None]] = {
    tie.__name__: tie for tie in (whole, one_layer, a_bias, transposed, with_another)
}


def tied(how: str) -> ToyViT:
    torch.manual_seed(0)
    model = ToyViT(depth=3)
    perturbed(model)
    TIES[how](model)
    return model


def places(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: (p.data_ptr(), *p.shape, *p.stride())
        for name, p in model.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize("how", TIES)
def test_they_are_not_found_and_the_reason_is_told(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tied(how)
    with caplog.at_level(logging.WARNING):
        assert [mlp.down for mlp in tp_amp.find_mlps(model, images(1))] == [FREE]
    assert "the MLP blocks.1.mlp stays whole: blocks.1.mlp." in caplog.text
    assert "is also" in caplog.text
    caplog.clear()
    found = tp_amp.inspect(model, images(1))
    assert not caplog.messages  # its result says so
    assert [mlp.down for mlp in found.mlps] == [FREE]
    assert "is also" in found.kept_layers["blocks.2.mlp.first"]


@pytest.mark.parametrize("how", TIES)
def test_the_others_are_cut_and_ties_hold(how: str) -> None:
    importance = tp_amp.ReconstructionImportance(data=FEW)
    plan = tp_amp.plan_for_target(tied(how), images(1), importance, {"macs": 0.95})
    ranked = tp_amp.plan_from_importance(tied(how), images(1), tp_amp.DIMAPImportance(), 0.5)
    searched = tied(how)
    pruner = tp_amp.AdaptiveMLPPruner(
        searched,
        images(1),
        tp_amp.EntropyTaylorImportance(data=FEW),
        OTHERS,
        max_increase=0.05,
        progress=False,
    )
    pruner.step()
    for cut, made in ((tied(how), plan), (tied(how), ranked), (searched, pruner.plan)):
        dense = tied(how)
        assert list(made.keep) == [FREE]
        if cut is not searched:
            tp_amp.apply_plan(cut, made)
        sites = list(made.sites.values())
        assert relative(cut(images()), masked(dense, sites, made.keep)(images())) < 1e-5  # type: ignore[arg-type]
        for name, other in cut.named_modules():
            if name.startswith(("blocks.1.mlp", "blocks.2.mlp", "other")):
                for one, two in zip(
                    other.parameters(recurse=False),
                    dense.get_submodule(name).parameters(recurse=False),
                    strict=True,
                ):
                    assert one.shape == two.shape
        assert len({p.data_ptr() for p in cut.parameters()}) == len(
            {p.data_ptr() for p in dense.parameters()}
        )


@pytest.mark.parametrize("how", TIES)
def test_a_plan_that_names_them_is_refused(how: str) -> None:
    model = tied(how)
    torch.manual_seed(0)
    sites = {mlp.down: mlp for mlp in tp_amp.find_mlps(ToyViT(depth=3), images(1))}
    keep = {"blocks.2.mlp.second": [0, 1]}
    before, where = fingerprint(model), places(model)
    for known in (sites, {}):
        plan = tp_amp.PruningPlan(dict(keep), sites=dict(known))
        for cut in (
            lambda plan=plan: tp_amp.apply_plan(model, plan, images(1)),
            lambda plan=plan: tp_amp.compensate(model, plan, FEW, progress=False),
        ):
            with pytest.raises(ValueError, match=r"blocks.2.mlp.second.* is also "):
                cut()
    assert fingerprint(model) == before
    assert places(model) == where


IMPORTANCES: dict[str, Callable[[], Any]] = {
    "entropy_taylor": lambda: tp_amp.EntropyTaylorImportance(data=FEW),
    "reconstruction": lambda: tp_amp.ReconstructionImportance(data=FEW),
    "gram_schmidt": tp_amp.GramSchmidtImportance,
    "dimap": tp_amp.DIMAPImportance,
}


@pytest.mark.parametrize("name", IMPORTANCES)
@pytest.mark.parametrize("how", ["whole", "one_layer"])
def test_torch_prunings_pruner_leaves_them_whole(
    name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tied(how)
    head = {module for n, module in model.named_modules() if n in ("head", "embed")}
    pruner = tp.pruner.MetaPruner(
        model,
        images(1),
        importance=IMPORTANCES[name](),
        pruning_ratio=0.5,
        ignored_layers=[*head, *(b.project for b in model.blocks)],
        root_module_types=[nn.Linear],
    )
    pruner.step()
    mlps = [block.mlp for block in model.blocks]
    assert [mlp.first.out_features for mlp in mlps] == [10, 20, 20]
    assert mlps[1].first.weight is mlps[2].first.weight
    assert "is also" in caplog.text
    model(images())


class Reused(nn.Module):
    """One block that is called three times, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ToyViT(depth=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.embed(x).flatten(2).transpose(1, 2)
        for _ in range(3):
            x = self.model.blocks(x)
        return self.model.head(self.model.norm(x).mean(1))


def test_a_module_that_is_called_several_times_is_one() -> None:
    torch.manual_seed(0)
    model = perturbed(Reused())
    dense = copy.deepcopy(model)
    importance = tp_amp.ReconstructionImportance(data=FEW)
    plan = tp_amp.plan_for_target(model, images(1), importance, {"params": 0.8})
    assert list(plan.keep) == ["model.blocks.0.mlp.second"]
    tp_amp.apply_plan(model, plan)
    sites = list(plan.sites.values())
    expected = masked(dense, sites, plan.keep)(images())  # type: ignore[arg-type]
    assert relative(model(images()), expected) < 1e-5


def test_attentions_that_share_a_parameter_keep_their_heads() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3).eval()
    model.blocks[2].attn.qkv.weight = model.blocks[1].attn.qkv.weight
    found = tp_amp.find_attentions(model, torch.randn(1, 3, 32, 32))
    assert [attention.name for attention in found] == ["blocks.0.attn"]
    reasons = tp_amp.inspect(model, torch.randn(1, 3, 32, 32)).kept_attentions
    assert "blocks.1.attn.qkv.weight is also blocks.2.attn.qkv.weight" in reasons["blocks.1.attn"]


def test_both_ends_of_the_range_that_is_told_can_be_reached() -> None:
    torch.manual_seed(0)
    make = lambda: perturbed(ToyViT(depth=3, hidden=37))  # noqa: E731
    importance = tp_amp.ReconstructionImportance(data=FEW)
    with pytest.raises(ValueError, match="reachable are") as told:
        tp_amp.plan_for_target(make(), images(1), importance, {"params": 0.01})
    words = str(told.value).replace(",", "").split()
    place = words.index("are")
    ends = [float(words[place + 1]), float(words[place + 3]), float(words[place + 5])]
    assert ends[0] <= ends[1]
    for end in ends:
        plan = tp_amp.plan_for_target(make(), images(1), importance, {"params": end})
        cut = make()
        size = sum(p.numel() for p in cut.parameters())
        tp_amp.apply_plan(cut, plan)
        limit = end * size if end <= 1 else end
        assert sum(p.numel() for p in cut.parameters()) <= limit
