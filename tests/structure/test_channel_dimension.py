"""Which dimension a user's own module scales, where several are as long as there are channels."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn
from toys import fingerprint, perturbed, relative

import tp_amp

HIDDEN = 6


class Scale(nn.Module):
    """Unknown to Torch-Pruning; by the shape of its factor it is of channels, rows or tokens."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 2, HIDDEN).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.factor)


class Flat(Scale):
    """The factor's own shape tells nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.factor[:, None, None])


class Norm2d(nn.LayerNorm):
    """Of channels in the second dimension, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Model(nn.Module):
    """A residual MLP on images or tokens, with a module between its two layers."""

    def __init__(self, inner: nn.Module, images: bool) -> None:
        super().__init__()
        self.up = nn.Conv2d(4, HIDDEN, 1) if images else nn.Linear(4, HIDDEN)
        self.inner = inner
        self.down = nn.Conv2d(HIDDEN, 4, 1) if images else nn.Linear(HIDDEN, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.inner(self.up(x)))


# Rows and columns of images, and how many images.
SIZES = [(6, 6, 1), (5, 6, 1), (6, 5, 1), (5, 7, 6), (6, 6, 6), (5, 7, 1)]
PER_CHANNEL = {
    "scale": lambda: Scale(HIDDEN, 1, 1),
    "flat scale": lambda: Flat(HIDDEN),
    "prelu": lambda: nn.PReLU(HIDDEN),
    "norm": Norm2d,
}


def images(rows: int, columns: int, count: int) -> Tensor:
    return torch.randn(count, 4, rows, columns, generator=torch.Generator().manual_seed(0))


def check_cut(model: nn.Module, x: Tensor, normed: bool = False) -> None:
    (mlp,) = tp_amp.find_mlps(model, x)
    assert (mlp.up, mlp.inner, mlp.down) == (("up",), ("inner",), "down")
    dense, keep = copy.deepcopy(model), [0, 2, 5]
    tp_amp.apply_plan(model, x, tp_amp.PruningPlan({"down": keep}))
    with torch.no_grad():
        hidden = dense.up(x).movedim(1, -1) if x.dim() == 4 else dense.up(x)
        mask = torch.zeros(HIDDEN).index_fill(0, torch.tensor(keep), 1)
        if normed:
            hidden = nn.functional.layer_norm(
                hidden[..., keep], (3,), dense.inner.weight[keep], dense.inner.bias[keep]
            )
            weight = dense.down.weight.flatten(1)[:, keep]
            expected = x + (hidden @ weight.T + dense.down.bias).movedim(-1, 1)
        else:
            hidden = dense.inner(hidden.movedim(-1, 1) if x.dim() == 4 else hidden)
            mask = mask[:, None, None] if x.dim() == 4 else mask
            expected = x + dense.down(hidden * mask)
        assert relative(model(x), expected) < 1e-5


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("inner", PER_CHANNEL)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_channels_of_images_are_cut(inner: str, size: tuple[int, int, int], frozen: bool) -> None:
    torch.manual_seed(0)
    model = perturbed(Model(PER_CHANNEL[inner](), images=True)).requires_grad_(not frozen)
    before, x = fingerprint(model), images(*size)
    tp_amp.find_mlps(model, x)
    assert fingerprint(model) == before
    check_cut(model, x, normed=inner == "norm")


class Twice(Model):
    """Gradients of the second call go through the first one too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def test_shared_mlps_are_cut() -> None:
    torch.manual_seed(0)
    model, x = perturbed(Twice(Scale(HIDDEN, 1, 1), images=True)), images(6, 6, 1)
    dense, mask = copy.deepcopy(model), torch.tensor([1.0, 0, 0, 1, 0, 0])
    (mlp,) = tp_amp.find_mlps(model, x)
    tp_amp.apply_plan(model, x, tp_amp.PruningPlan({mlp.down: [0, 3]}))
    dense.down.register_forward_pre_hook(lambda _, args: (args[0] * mask[:, None, None],))
    assert relative(model(x), dense(x)) < 1e-5


@pytest.mark.parametrize("tokens", [6, 5])
def test_channels_of_tokens_are_cut(tokens: int) -> None:
    torch.manual_seed(0)
    model = perturbed(Model(Scale(HIDDEN), images=False))
    check_cut(model, torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(0)))


NO_ENTRY = "Scale has no entry for each channel alone"
OTHERS = {
    "rows": (Scale(HIDDEN, 1), (1, 4, 6, 5), NO_ENTRY),
    "rows of squares": (Scale(HIDDEN, 1), (1, 4, 6, 6), NO_ENTRY),
    "images": (Scale(HIDDEN, 1, 1, 1), (6, 4, 5, 7), NO_ENTRY),
    # Its entries belong to a dimension that the layers around have no channels in.
    "columns": (Scale(HIDDEN), (1, 4, 5, 6), "mixes channels or tokens"),
    "columns of squares": (Scale(HIDDEN), (1, 4, 6, 6), "mixes channels or tokens"),
    "tokens": (Scale(HIDDEN, 1), (1, 6, 4), "mixes channels or tokens"),
    "tokens as channels": (nn.PReLU(HIDDEN), (1, 6, 4), "mixes channels or tokens"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_per_channel_is_left_out(case: str, caplog: pytest.LogCaptureFixture) -> None:
    inner, size, reason = OTHERS[case]
    torch.manual_seed(0)
    model = perturbed(Model(copy.deepcopy(inner), images=len(size) == 4))
    with caplog.at_level(logging.DEBUG):
        assert tp_amp.find_mlps(model, torch.randn(size)) == []
    (told,) = (r.message for r in caplog.records if r.message.startswith("up starts no MLP"))
    assert reason in told


def test_sizes_that_tell_nothing_need_values(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(Scale(HIDDEN, 1, 1), images=True).to("meta")
    with caplog.at_level(logging.DEBUG):
        assert tp_amp.find_mlps(model, images(6, 6, 1).to("meta")) == []
    assert "on the meta device Scale can't be judged" in caplog.text
    assert len(tp_amp.find_mlps(model, images(5, 7, 1).to("meta"))) == 1


def test_a_view_of_images_as_wide_as_channels_is_left_out() -> None:
    class Stacked(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).view(1, HIDDEN, -1, x.shape[-1]).relu())

    for columns in (5, 6):
        assert tp_amp.find_mlps(Stacked(nn.Identity(), images=True), images(5, columns, 2)) == []
