"""Widths of MLPs by the paper's ratio, and as Torch-Pruning takes them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from small_models import Convolutions, packed
from torch import Tensor, nn
from toys import images, masked, relative, toy

import tp_amp


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("global_pruning", [False, True])
def test_torch_prunings_pruner_keeps_the_first_picks(gated: bool, global_pruning: bool) -> None:
    model = toy(gated=gated)
    dense = copy.deepcopy(model)
    widths = {mlp.down: 7 + 4 * i for i, mlp in enumerate(tp_amp.find_mlps(model, images(1)))}
    importance = tp_amp.GramSchmidtImportance()
    keep = tp_amp.plan_from_importance(model, images(1), importance, widths).keep
    blocks = [layer for b in model.blocks for layer in (b.query, b.key, b.value, b.project)]
    pruner = tp.pruner.MetaPruner(
        model,
        (images(1),),
        importance,
        global_pruning=global_pruning,
        pruning_ratio=0,
        pruning_ratio_dict=tp_amp.pruning_ratio_dict(model, images(1), widths),
        ignored_layers=[model.embed, model.head, *blocks],
    )
    pruner.step()
    for name, kept in keep.items():
        assert model.get_submodule(name).in_features == len(kept) == widths[name]
    with torch.no_grad():
        assert relative(model(images()), masked(dense, keep)(images())) < 1e-5


@pytest.mark.parametrize(("ratio", "width"), [(1, 12), (0.5, 6), (1.4, 16), (20 / 12, 20)])
def test_mlp_ratio_counts_hidden_channels_for_each_input(ratio: float, width: int) -> None:
    model = toy()
    widths = tp_amp.mlp_ratio_widths(model, images(1), ratio)
    assert widths == {"blocks.0.mlp.second": width, "blocks.1.mlp.second": width}


def test_mlp_ratio_out_of_range_is_named() -> None:
    for ratio, found in ((0.05, 0), (2, 24)):
        with pytest.raises(ValueError, match=rf"blocks\.0\.mlp {found} hidden channels for its 12"):
            tp_amp.mlp_ratio_widths(toy(), images(1), ratio)
    with pytest.raises(ValueError, match="no MLP was found in Convolutions"):
        tp_amp.mlp_ratio_widths(Convolutions(), torch.randn(1, 3, 8, 8), 1)


def test_pruning_ratio_dict_names_what_is_wrong() -> None:
    for widths in (
        {"blocks.0.mlp.first": 5},
        {"blocks.0.mlp.second": 21},
        {"blocks.0.mlp.second": 0},
    ):
        with pytest.raises(
            ValueError, match=r"can't keep \d+ channels of blocks\.0\.mlp\.\w+; the"
        ):
            tp_amp.pruning_ratio_dict(toy(), images(1), widths)


def test_pruning_ratio_dict_refuses_packed_layers() -> None:
    with pytest.raises(ValueError, match=r"can't cut blocks\.0\.mlp: gate and value are packed in"):
        tp_amp.pruning_ratio_dict(packed(), torch.randn(1, 3, 16, 16), {"blocks.0.mlp.fc2": 9})


def test_pruning_ratios_are_exact_in_torch_prunings_arithmetic() -> None:
    class Width(nn.Module):
        def __init__(self, hidden: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(2, hidden), nn.Linear(hidden, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    model, hidden = Width(3072), 3072
    mlp = tp_amp.find_mlps(model, torch.randn(1, 2))
    assert [m.width for m in mlp] == [hidden]
    for width in (1, 2, 767, 768, 1023, 3071, 3072):
        ratios = tp_amp.pruning_ratio_dict(model, torch.randn(1, 2), {"down": width})
        assert list(ratios) == [(model.up,)]
        assert int(hidden * (1 - ratios[(model.up,)])) == width
