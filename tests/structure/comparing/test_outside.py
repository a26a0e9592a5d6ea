"""What stands around a layer knows how wide it is: cut, the model would run and be wrong."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from toys import fingerprint, relative

import tp_amp
from tp_amp.structure.comparing.outside import Trial, outside_differences

HIDDEN, WIDTH, HEADS = 24, 8, 4
Read = Callable[[Any], float]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, self.num_heads, self.head_dim)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / self.head_dim**0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Reading(nn.Module):
    """Blocks that scale what a part gives by something that they read of it."""

    def __init__(self, part: type[nn.Module], reads: list[Read | None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.parts, self.reads = nn.ModuleList(part() for _ in reads), reads

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part, read in zip(self.parts, self.reads, strict=True):
            x = x + part(x) * (1.0 if read is None else read(part))
        return self.head(x.mean(1))


class Telling(MLP):
    """Gives its width beside its result."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.up(x).relu()
        return self.down(hidden), hidden.shape[-1]


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mlp, self.head = nn.Linear(4, WIDTH), Telling(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y, width = self.mlp(x)
        return self.head((x + y / width**0.5).mean(1))


def images() -> Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))


OF_MLPS: dict[str, Read] = {
    "features": lambda mlp: mlp.up.out_features**-0.5,
    "a shape": lambda mlp: mlp.down.weight.shape[1] ** -0.5,
    "a length": lambda mlp: 10 / len(mlp.up.bias),
}
OF_HEADS: dict[str, Read] = {
    "the number of heads": lambda attention: attention.num_heads**-0.5,
    "a shape": lambda attention: attention.proj.weight.shape[1] ** -0.5,
}


@pytest.mark.parametrize("kind", OF_MLPS)
def test_an_mlp_whose_block_reads_its_width_stays_whole(kind: str) -> None:
    model = Reading(MLP, [None, OF_MLPS[kind], None])
    before = fingerprint(model)
    found = tp_amp.inspect(model, images())
    assert fingerprint(model) == before
    assert [mlp.down for mlp in found.mlps] == ["parts.0.down", "parts.2.down"]
    assert "reads how wide it is" in found.kept_layers["parts.1.up"]


def test_a_hook_that_reads_the_width_is_seen() -> None:
    model = Reading(MLP, [None, None])
    model.parts[0].register_forward_hook(lambda mlp, _, y: y / mlp.up.out_features**0.5)
    assert [mlp.down for mlp in tp_amp.find_mlps(model, images())] == ["parts.1.down"]


def test_a_width_that_is_given_out_is_seen() -> None:
    with pytest.raises(ValueError, match="no MLP was found"):
        tp_amp.plan_for_target(
            Asking(), images(), tp_amp.ReconstructionImportance(data=[images()]), {"params": 0.9}
        )


@pytest.mark.parametrize("kind", OF_HEADS)
def test_an_attention_whose_block_reads_its_heads_keeps_them(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Reading(Attention, [None, OF_HEADS[kind]])
    before = fingerprint(model)
    with caplog.at_level(logging.WARNING, "tp_amp"):
        found = tp_amp.find_attentions(model, images())
    assert fingerprint(model) == before
    assert [attention.down for attention in found] == ["parts.0.proj"]
    assert "parts.1: with half of it the model does not give" in caplog.text


def test_channels_inside_heads_of_which_the_block_reads_the_shape_stay() -> None:
    model = Reading(Attention, [lambda attention: attention.qkv.weight.shape[0] / 10])
    with pytest.raises(ValueError, match=r"parts\.0.*reads how wide it is"):
        tp_amp.rotate_heads(model, images(), [images()])


@pytest.mark.parametrize("part", [MLP, Attention])
def test_what_nobody_reads_is_cut_as_masked(part: type[nn.Module]) -> None:
    model = Reading(part, [None, lambda held: 0.5 * len(list(held.children()))]).eval()
    found: list[Any] = (
        tp_amp.find_mlps(model, images())
        if part is MLP
        else tp_amp.find_attentions(model, images())
    )
    assert len(found) == 2
    keep = {site.down: list(range(1, site.width, 2)) for site in found}
    cut, masked = copy.deepcopy(model), copy.deepcopy(model)
    tp_amp.apply_plan(cut, images(), tp_amp.PruningPlan(keep))
    for site in found:
        down: Any = masked.get_submodule(site.down)
        gone = torch.ones(site.width, dtype=torch.bool)
        gone[keep[site.down]] = False
        with torch.no_grad():
            down.weight[:, gone.repeat_interleave(site.unit_width)] = 0
    with torch.no_grad():
        assert relative(cut(images()), masked(images())) < 1e-5


def test_what_draws_or_rounds_hides_nothing_that_can_be_cut() -> None:
    """Noise of the model's own, and bfloat16, are no reason to leave an MLP whole."""
    model = Reading(MLP, [None, lambda _: float(torch.rand(()))])
    assert len(tp_amp.find_mlps(model, images())) == 2
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, embed_dim=48, num_heads=3
    )
    half = vit.to(torch.bfloat16)
    assert len(tp_amp.find_mlps(half, torch.randn(1, 3, 32, 32, dtype=torch.bfloat16))) == 2


class WideBlock(nn.Module):
    def __init__(self, width: int, hidden: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), act
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Wide(nn.Module):
    """Sums so long that a cut changes how they are rounded; `give` makes the output."""

    def __init__(
        self,
        give: Callable[[Tensor], Any] = torch.Tensor.clone,
        act: Callable[[Tensor], Tensor] = torch.relu,
        first: Callable[[Tensor], Tensor] = torch.Tensor.clone,
        scale: Callable[[nn.Module], float] = lambda _: 1.0,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 96)
        self.blocks = nn.ModuleList(WideBlock(96, 384, act) for _ in range(2))
        self.give, self.first, self.scale = give, first, scale

    def forward(self, x: Tensor) -> Any:
        x = self.first(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.give(x * self.scale(self.blocks[0].up))


def _normalised(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


NOTHING_BUT_ROUNDING: dict[str, Callable[[Tensor], Any]] = {
    "a mean that is zero": lambda x: (x, _normalised(x).mean(-1)),
    "a penalty that is zero": lambda x: {"x": x, "aux": (x.softmax(-1).sum(-1) - 1).square().sum()},
    "an empty tensor": lambda x: (_normalised(x).mean(-1), x[:, :0]),
}


@pytest.mark.parametrize("kind", NOTHING_BUT_ROUNDING)
def test_an_output_that_is_rounding_alone_is_no_reason(kind: str) -> None:
    model = Wide(NOTHING_BUT_ROUNDING[kind])
    assert len(tp_amp.find_mlps(model, images().repeat(4, 3, 1))) == 2


def test_what_is_drawn_for_each_hidden_channel_is_no_reason() -> None:
    """With fewer channels fewer numbers are drawn, and all later ones are others."""
    model = Wide(act=lambda x: nn.functional.dropout(x, 0.1))  # drops in evaluation mode too
    assert len(tp_amp.find_mlps(model, images())) == 2


WIDTH_READ: dict[str, dict[str, Any]] = {
    "beside rounding": {"give": NOTHING_BUT_ROUNDING["a mean that is zero"]},
    "where the same is drawn": {"first": lambda x: x + 0.5 * torch.randn_like(x)},
    "where some is infinite": {"give": lambda x: x.masked_fill(torch.eye(96)[0] > 0, -torch.inf)},
    "where some is nan": {"give": lambda x: x.masked_fill(torch.eye(96)[0] > 0, torch.nan)},
    "in complex numbers": {"give": lambda x: torch.fft.rfft(x, dim=1)},
}


@pytest.mark.parametrize("kind", WIDTH_READ)
def test_a_width_that_is_read_is_seen(kind: str) -> None:
    model = Wide(**WIDTH_READ[kind], scale=lambda up: len(up.bias) / 100)  # type: ignore[arg-type]
    assert [mlp.down for mlp in tp_amp.find_mlps(model, images())] == ["blocks.1.down"]


@pytest.mark.parametrize("inside", [torch.bfloat16, torch.float16])
def test_half_precision_inside_is_no_reason(inside: torch.dtype) -> None:
    """Both ways differ by the last bit of a weight, as sums in another order may."""
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.LayerNorm(64))]
    model = nn.Sequential(*layers).to(inside)
    x, first = torch.randn(8, 64, dtype=inside), model[0]
    weight = first.weight.detach().clone()

    def weighing(factor: float) -> Callable[[ExitStack], None]:
        def change(_: ExitStack) -> None:
            first._parameters["weight"] = nn.Parameter(weight * factor)

        return change

    def run() -> Tensor:
        return model(x).float()

    last = 1 + torch.finfo(inside).eps
    rounded = {"rounded": Trial(weighing(1.05 * last), weighing(1.05))}
    assert not outside_differences(model, run, rounded)
    assert outside_differences(model, run, {"wrong": Trial(weighing(-1.0), weighing(1.05))})
    assert torch.equal(first.weight, weight)
