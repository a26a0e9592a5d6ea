"""What the graph and gradients take for an MLP, and the forward pass knows the width of."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import PlainMLP, fingerprint

import tp_amp


class Reshaped(nn.Module):
    """Projects tokens, and makes of them a map whose width its forward knows."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden, self.project = hidden, nn.Linear(6, hidden)
        self.read = nn.Conv2d(hidden, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.project(x)).transpose(1, 2)
        return self.read(tokens.reshape(len(x), self.hidden, 3, 3)).flatten(2).transpose(1, 2)


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).view(-1, 9, 8))


class Branching(nn.Module):
    """Needs the values of its input, so that it fails on the meta device."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > -1e9 else -x


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(6), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


def mixed(*parts: nn.Module, branching: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*([Branching()] * branching), *map(Residual, parts))


@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("kind", [lambda: Reshaped(8), Literal])
def test_only_what_the_model_runs_without_is_found(kind: Any, branching: bool) -> None:
    parts = [PlainMLP(6, 8), kind(), PlainMLP(6, 10), kind(), kind(), PlainMLP(6, 5)]
    model = mixed(*parts, branching=branching)
    x = torch.randn(2, 9, 6)
    before = fingerprint(model)
    found = tp_amp.inspect(model, x)
    assert fingerprint(model) == before
    places = [int(branching) + place for place in (0, 2, 5)]
    assert [mlp.down for mlp in found.mlps] == [f"{place}.inner.second" for place in places]
    starts = [name for name in found.kept_layers if name.endswith(("project", "up"))]
    assert len(starts) == 3
    for name in starts:
        assert "with 7 of 8 channels the model no longer runs (shape" in found.kept_layers[name]
    with torch.no_grad():
        plan = tp_amp.plan_from_importance(model, x, tp_amp.GramSchmidtImportance(), 0.5)
        tp_amp.apply_plan(model, x, plan)
        assert model(x).shape == x.shape


class Sharing(nn.Module):
    """Runs with either of its MLPs cut, not with both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = PlainMLP(6, 8), PlainMLP(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        widths = self.one.first.out_features, self.two.first.out_features
        if max(widths) < 8:
            raise RuntimeError("one of them must be whole")
        return self.one(x) + self.two(x)


def test_what_is_found_can_be_cut_together() -> None:
    found = tp_amp.inspect(Sharing(), torch.randn(2, 6))
    assert len(found.mlps) == 1
    [reason] = [text for text in found.kept_layers.values() if "one of them must be whole" in text]
    assert reason.startswith("with 7 of 8 channels")


def test_the_readout_of_dpt_is_left_whole() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DPTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8,
        intermediate_size=80, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, readout_type="project",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DPTForDepthEstimation(config).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    found = tp_amp.inspect(model, inputs)
    assert len(found.mlps) == 4
    assert "no longer runs" in found.kept_layers["neck.reassemble_stage.readout_projects.0.0"]
    plan = tp_amp.plan_from_importance(model, inputs, tp_amp.GramSchmidtImportance(), 0.5)
    tp_amp.apply_plan(model, inputs, plan)
    assert torch.isfinite(model(**inputs).predicted_depth).all()


class Gives(nn.Module):
    """Gives its hidden channels too, as transformers' CLIP gives what is pooled of each tower."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        self.nested, self.inner = nested, Residual(PlainMLP(6, 8))
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Any:
        hidden = self.up(self.inner(x))
        given = {"embeds": self.down(hidden), "count": 3, "none": None, "tower": (hidden,)}
        return given if self.nested else (given["embeds"], hidden)


@pytest.mark.parametrize("nested", [False, True])
def test_hidden_channels_that_the_model_gives_out_are_left_whole(nested: bool) -> None:
    model, x = Gives(nested), torch.randn(2, 5, 6)
    found = tp_amp.inspect(model, x)
    assert [mlp.name for mlp in found.mlps] == ["inner.inner"]
    reason = r"with 7 of 8 channels the model gives (2, 5, 8) as (2, 5, 7)"
    assert reason in found.kept_layers["up"]


class Varying(nn.Module):
    """Gives out beside its result what has another length each time."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.lengths = PlainMLP(6, 8), itertools.count(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.mlp(x), x.new_zeros(next(self.lengths))


def test_lengths_that_vary_by_themselves_say_nothing_of_an_mlp() -> None:
    assert [mlp.down for mlp in tp_amp.find_mlps(Varying(), torch.randn(2, 6))] == ["mlp.second"]
