"""MLPs whose forward pass knows how many channels there are, or which: cut they would be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import fingerprint
from zoo_checks import masked

import tp_amp
from tp_amp.structure.proofs import masked_values

WIDTH = 24


class Knowing(nn.Module):
    """An MLP that does something to its hidden channels by itself."""

    def __init__(self, change: Callable[[Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.change, self.norm = change, norm or nn.Identity()
        self.up, self.down = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.change(self.up(x))).relu())


def model_of(*parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *parts, nn.Linear(6, 3)).eval()


def halves(x: Tensor) -> Tensor:
    return torch.cat([x[..., : WIDTH // 2].relu(), x[..., WIDTH // 2 :].tanh()], -1)


WRONG = {
    "a literal slice": halves,
    "a scale by the width": lambda x: x / x.shape[-1] ** 0.5,
    "a table of places": lambda x: x * (1 + torch.arange(x.shape[-1]) / 10),
    "the largest alone": lambda x: torch.where(x >= x.topk(4).values[..., -1:], x, 0 * x),
    "a branch on the width": lambda x: x.relu() if x.shape[-1] == WIDTH else x.tanh(),
}
RIGHT = {
    "nothing": lambda x: x,
    "a constant": lambda x: 0.5 * x,
    "a tanh by hand": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))),
    "a clamp": lambda x: x.clamp(-1, 1),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_reads_the_width_stays_whole(kind: str) -> None:
    model = model_of(Knowing(WRONG[kind]), Knowing(lambda x: x))
    x = torch.randn(2, 9, 4)
    before = fingerprint(model)
    found = tp_amp.inspect(model, x)
    assert fingerprint(model) == before
    assert [mlp.down for mlp in found.mlps] == ["2.down"]
    assert "with 12 of 24 channels it does not give what it gives" in found.kept_layers["1.up"]


@pytest.mark.parametrize("kind", RIGHT)
def test_others_are_cut_as_masked(kind: str) -> None:
    model = model_of(Knowing(RIGHT[kind]))
    x = torch.randn(2, 9, 4)
    mlps = tp_amp.find_mlps(model, x)
    keep = {"1.down": [0, 3, 4, 11, 23]}
    cut = copy.deepcopy(model)
    tp_amp.apply_plan(cut, x, tp_amp.PruningPlan(keep))
    with torch.no_grad():
        assert torch.allclose(cut(x), masked(model, mlps, keep)(x), atol=1e-6)


def test_norms_see_the_channels_that_are_left() -> None:
    """As documented, so that they are no difference."""
    model = model_of(Knowing(lambda x: x, nn.LayerNorm(WIDTH)))
    assert tp_amp.find_mlps(model, torch.randn(2, 9, 4))[0].inner == ("1.norm",)


def test_what_is_drawn_anew_can_not_be_judged() -> None:
    model = model_of(Knowing(lambda x: x * (1 + 0.1 * torch.rand_like(x[..., :1]))))
    assert len(tp_amp.find_mlps(model, torch.randn(2, 9, 4))) == 1


def test_what_is_no_number_can_not_be_judged() -> None:
    model = model_of(Knowing(lambda x: x.log()))
    assert len(tp_amp.find_mlps(model, torch.randn(2, 9, 4))) == 1


def test_a_copy_that_fails_once_it_is_cut_is_told() -> None:
    """With a channel less it runs, with half of them it does not."""

    def wide(x: Tensor) -> Tensor:
        if x.shape[-1] < WIDTH - 1:
            raise RuntimeError("too narrow")
        return x

    found = tp_amp.inspect(model_of(Knowing(wide)), torch.randn(2, 9, 4))
    assert not found.mlps
    told = "with 12 of 24 channels a copy of what holds it no longer runs (too narrow)"
    assert found.kept_layers["1.up"] == told


class Normed(Knowing):
    """Its channels come second in its norm."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.change(self.up(x)).transpose(1, 2)).transpose(1, 2)
        return x + self.down(hidden.relu())


def test_batch_norms_keep_channels_apart() -> None:
    x = torch.randn(2, 9, 4)
    kinds = (lambda h: h, halves)
    right, wrong = (model_of(Normed(kind, nn.BatchNorm1d(WIDTH))) for kind in kinds)
    assert [mlp.inner for mlp in tp_amp.find_mlps(right, x)] == [("1.norm",)]
    assert not tp_amp.find_mlps(wrong, x)


def test_modules_that_are_alike_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Knowing):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).relu())

    def nothing(x: Tensor) -> Tensor:
        return x

    model = model_of(*(Plain(nothing) for _ in range(6)))
    checked = []
    difference = masked_values._difference
    monkeypatch.setattr(
        masked_values, "_difference", lambda *args: checked.append(1) or difference(*args)
    )
    assert len(tp_amp.find_mlps(model, torch.randn(2, 9, 4))) == 6
    assert len(checked) == 1


def test_on_the_meta_device_there_is_nothing_to_compare() -> None:
    model = model_of(Knowing(lambda x: 0.5 * x)).to("meta")
    assert len(tp_amp.find_mlps(model, torch.randn(2, 4, device="meta"))) == 1
