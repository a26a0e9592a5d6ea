"""Modules that are called several times in one forward pass, as in ALBERT: cut is masked, or no."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from head_cuts import zeroed
from torch import Tensor, nn
from toys import fingerprint, perturbed, relative
from zoo_checks import masked

import tp_amp
from tp_amp.structure.attention.finding import read_attentions

transformers = pytest.importorskip("transformers")
LAYER = "encoder.albert_layer_groups.0.albert_layers.0"
MLP, HEADS = f"{LAYER}.ffn_output", f"{LAYER}.attention.dense"
CALLS, TOKENS, WIDTH, HIDDEN = 3, 7, 32, 48


def albert() -> nn.Module:
    """One block that makes up the whole depth."""
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=WIDTH,
        num_hidden_layers=CALLS,
        num_hidden_groups=1,
        num_attention_heads=4,
        intermediate_size=HIDDEN,
        max_position_embeddings=TOKENS,
    )
    return perturbed(transformers.AlbertModel(config))


def words(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 50, (count, TOKENS), generator=generator)}


def test_inspect_counts_each_call() -> None:
    found = tp_amp.inspect(albert(), words(1, 0))
    assert [mlp.down for mlp in found.mlps] == [MLP]
    assert [attention.down for attention in found.attentions] == [HEADS]
    assert found.shares["MLPs"].macs == CALLS * TOKENS * 2 * WIDTH * HIDDEN
    assert found.shares["MLPs"].parameters == 2 * WIDTH * HIDDEN + WIDTH + HIDDEN


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_target_is_met_and_cut_is_masked(kind: str) -> None:
    model = albert()
    dense = copy.deepcopy(model)
    before = tp_amp.inspect(model, words(1, 0)).shares["total"]
    importance = tp_amp.ReconstructionImportance(data=[words(8, 1), words(8, 2)])
    plan = tp_amp.plan_for_target(model, words(1, 0), importance, {kind: 0.85})
    assert list(plan.keep) == [MLP]
    tp_amp.apply_plan(model, plan)
    after = tp_amp.inspect(model, words(1, 0)).shares["total"]
    share = after.macs / before.macs if kind == "macs" else after.parameters / before.parameters
    assert 0.83 < share <= 0.85
    expected = masked(dense, list(plan.sites.values()), plan.keep)
    with torch.no_grad():
        assert relative(model(**words(3, 3))[0], expected(**words(3, 3))[0]) < 1e-5
        assert relative(model(**words(3, 3))[0], dense(**words(3, 3))[0]) > 1e-3


def test_heads_that_are_cut_are_masked_in_every_call() -> None:
    model = albert()
    keep = {HEADS: [0, 2, 3]}
    expected = zeroed(model, tp_amp.find_attentions(model, words(1, 0)), keep)
    tp_amp.apply_plan(model, tp_amp.PruningPlan(keep), words(1, 0))
    with torch.no_grad():
        assert relative(model(**words(3, 3))[0], expected(**words(3, 3))[0]) < 1e-5


@pytest.mark.parametrize("every_linear", [False, True])
def test_compensation_names_the_layer_and_leaves_the_model(every_linear: bool) -> None:
    model = albert()
    before = fingerprint(model)
    plan = tp_amp.PruningPlan({MLP: list(range(9))})
    with pytest.raises(ValueError, match=rf"called once.*{MLP} is called 3 times.*apply_plan"):
        tp_amp.compensate(model, plan, [words(8, 1)], every_linear=every_linear)
    assert fingerprint(model) == before


class Mixer(nn.Module):
    """An MLP of which a call may bring each channel to the place of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor, rolled: bool) -> Tensor:
        hidden = self.up(x).sin()
        return self.down(hidden.roll(1, -1) if rolled else hidden)


class Calls(nn.Module):
    """One module that is called several times, in a way of its own each time."""

    def __init__(self, module: nn.Module, *calls: Any) -> None:
        super().__init__()
        self.module, self.calls = module, calls

    def forward(self, x: Tensor) -> Tensor:
        for call in self.calls:
            x = x + self.module(x.tanh(), call)
        return x


@pytest.mark.parametrize("rolled", [(False, True), (True, False), (True, True), (False, False)])
def test_no_call_of_an_mlp_may_mix_channels(rolled: tuple[bool, bool]) -> None:
    """Masking the same channels everywhere would not be what a cut does."""
    torch.manual_seed(0)
    model, x = perturbed(Calls(Mixer(), *rolled)), torch.randn(4, 5, 6)
    found = tp_amp.find_mlps(model, x)
    assert len(found) == (not any(rolled))
    if found:
        keep = {"module.down": [0, 2, 3, 7]}
        expected = masked(model, found, keep)(x)
        tp_amp.apply_plan(model, tp_amp.PruningPlan(keep), x)
        assert relative(model(x), expected) < 1e-5


class Crossed(nn.Module):
    """Both hidden activations are made before the first is read, the second one first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.up(x).sin(), self.up(x.tanh()).sin()
        return x + self.down(second) + self.down(first)


def test_calls_that_can_not_be_told_apart_are_left_out() -> None:
    assert tp_amp.find_mlps(Crossed(), torch.randn(4, 5, 6)) == []


class Attending(nn.Module):
    """Takes a bias for each head, or q, k and v of one head side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, bias: Any = None) -> Tensor:
        qkv = self.qkv(x)
        if isinstance(bias, str):
            q, k, v = qkv.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = q @ k.transpose(-2, -1)
        weights = weights + bias if isinstance(bias, Tensor) else weights
        return self.proj((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))


BIAS = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ((None, None), ""),
        ((BIAS, BIAS), ""),
        ((BIAS, -BIAS), ""),
        ((BIAS, None), "its 2 calls differ"),
        ((None, BIAS), "its 2 calls differ"),
        ((None, "beside"), "it does not give what it gives"),
        (("beside", None), "it does not give what it gives"),
    ],
    ids=["plain", "bias", "two", "first", "second", "other last", "other first"],
)
def test_every_call_of_an_attention_is_checked(calls: tuple[Any, Any], reason: str) -> None:
    torch.manual_seed(0)
    model, x = perturbed(Calls(Attending(), *calls)), torch.randn(2, 5, 32)
    found, reasons = read_attentions(model, x)
    if reason:
        assert not found
        assert reason in reasons["module"]
        return
    keep = {"module.proj": [0, 2]}
    expected = zeroed(model, found, keep)(x)
    tp_amp.apply_plan(model, tp_amp.PruningPlan(keep), x)
    assert relative(model(x), expected) < 1e-5
