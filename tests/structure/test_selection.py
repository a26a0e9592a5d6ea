"""Which MLPs and attentions are meant, by modules and by patterns of their paths."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from toys import images, toy

import tp_amp
from tp_amp.structure.selection import matched, selected


def vit(depth: int = 12) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=depth, embed_dim=24, num_heads=3, num_classes=4
    )


CHOSEN: list[tuple[dict[str, Any], set[int]]] = [
    ({}, set(range(12))),
    ({"ignored": ["blocks.0.mlp"]}, set(range(1, 12))),
    ({"ignored": ["blocks.0.mlp.fc1", "head"]}, set(range(1, 12))),
    ({"ignored": ["blocks.0-3"]}, set(range(4, 12))),
    ({"ignored": ["blocks.0-3.mlp.fc2", "blocks.11"]}, set(range(4, 11))),
    ({"ignored": "blocks.1*"}, {0, *range(2, 10)}),
    ({"only": ["blocks.1"]}, {1}),  # not blocks.10
    ({"only": ["blocks.[24].*"]}, {2, 4}),
    ({"only": ["*.mlp"], "ignored": ["blocks.9-11"]}, set(range(9))),
    ({"only": ["blocks.0-5"], "ignored": ["*.attn"]}, set(range(6))),
]


@pytest.mark.parametrize(("arguments", "blocks"), CHOSEN, ids=str)
def test_patterns_choose_by_path(arguments: dict[str, Any], blocks: set[int]) -> None:
    model = vit()
    sites = tp_amp.find_mlps(model, torch.randn(1, 3, 32, 32))
    found = selected(model, sites, **arguments)
    assert [site.name for site in found] == [f"blocks.{i}.mlp" for i in sorted(blocks)]


def test_modules_parameters_and_paths_name_the_same() -> None:
    model = vit(2)
    block: Any = model.get_submodule("blocks.1")
    for layer in (block.mlp, block.mlp.fc1, block.mlp.fc2.weight, "blocks.1.mlp"):
        sites = selected(model, tp_amp.find_mlps(model, torch.randn(1, 3, 32, 32)), [layer])
        assert [site.name for site in sites] == ["blocks.0.mlp"]
    assert matched(model, block.mlp, "layers") == set(block.mlp.modules())
    assert matched(model, None, "layers") == set()


def test_a_range_within_ranges_ends_where_any_of_them_does() -> None:
    """Stages of one, three and two blocks, numbered from 0 and from 1."""
    stages = [nn.ModuleList(nn.Identity() for _ in range(count)) for count in (1, 3, 2)]
    model: nn.Module = nn.ModuleDict({"stages": nn.ModuleList(stages)})
    assert len(matched(model, "stages.0-2.0-2", "only_layers")) == 6
    assert len(matched(model, "stages.1-2.1-2", "only_layers")) == 3
    with pytest.raises(ValueError, match=r"number 3, .* the last stages\.1\.2$"):
        matched(model, "stages.0-2.0-3", "only_layers")
    with pytest.raises(ValueError, match=r"number 3, .* the last stages\.2$"):
        matched(model, "stages.0-3.0", "only_layers")
    later: nn.Module = nn.ModuleDict({str(i): nn.Identity() for i in (4, 6)})
    assert len(matched(later, "4-6", "only_layers")) == 2
    with pytest.raises(ValueError, match=r"number 3, which is not there; the first is 4 and the l"):
        matched(later, "3-6", "only_layers")


def test_heads_are_chosen_as_mlps_are() -> None:
    model = vit(2)
    x = torch.randn(4, 3, 32, 32)
    pruner = tp_amp.AdaptiveMLPPruner(
        model,
        x[:1],
        tp_amp.DIMAPImportance(),
        [x],
        prune_num_heads=True,
        only_layers=["*.attn", "blocks.1"],
        ignored_layers=["blocks.1.attn"],
    )
    assert [mlp.name for mlp in pruner.mlps] == ["blocks.1.mlp"]
    assert [attention.name for attention in pruner.attentions] == ["blocks.0.attn"]


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["block.0.mlp"], ValueError, r"'block\.0\.mlp' matches no module of ToyViT; near are bl"),
        (["blocks.7-9"], ValueError, r"'blocks\.7-9' matches no module"),
        (
            ["blocks.1-30"],
            ValueError,
            r"'blocks\.1-30' names number 30, which is not there; the first is blocks\.0 and the "
            r"last blocks\.1$",
        ),
        (["*.0-2.mlp"], ValueError, r"number 2, which is not there; .* the last blocks\.1$"),
        (["blocks.0", "*.mpl"], ValueError, r"'\*\.mpl' matches no module of ToyViT; near are"),
        ([nn.Linear(2, 2)], ValueError, r"ignored_layers holds a Linear that is no part of"),
        ([nn.Parameter(torch.ones(1))], ValueError, r"holds a Parameter that is no part of"),
        ([3], TypeError, r"must hold modules or module paths, found 3"),
        (3, TypeError, r"must be a list of modules or module paths, found 3"),
        (["blocks"], ValueError, r"all 2 MLPs are ignored layers"),
    ],
    ids=str,
)
def test_what_names_nothing_is_an_error(layers: Any, error: type, message: str) -> None:
    model = toy()
    with pytest.raises(error, match=message):
        selected(model, tp_amp.find_mlps(model, images(1)), layers)


def test_a_choice_without_an_mlp_names_those_there_are() -> None:
    model = toy()
    with pytest.raises(ValueError, match=r"nothing to prune; there are \['blocks\.0\.mlp', 'b"):
        selected(model, tp_amp.find_mlps(model, images(1)), only="head")


def test_the_plan_for_a_target_keeps_to_the_choice() -> None:
    model, x = toy(), images(8)
    importance = tp_amp.ReconstructionImportance(data=[x])
    plan = tp_amp.plan_for_target(
        model, x[:1], importance, {"params": 0.9}, only_layers=["blocks.1"]
    )
    assert list(plan.keep) == ["blocks.1.mlp.second"]
