"""Rotated streams: the same function, exactly; their order that of principal components."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from stream_models import FAMILIES, dense_model
from torch import nn
from toys import fingerprint, images, perturbed, relative, toy
from zoo import by_name
from zoo_checks import run

import tp_amp

STREAMS = {"siglip": 2, "swin": 2}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_function(name: str) -> None:
    model, x = dense_model(name)
    dense, before = copy.deepcopy(model), fingerprint(model)
    rotated = tp_amp.rotate(model, x[:1], x.split(4), progress=False)
    assert len(rotated) == STREAMS.get(name, 1)
    assert relative(run(model, x), run(dense, x)) < 1e-10
    after = fingerprint(model)
    values = before.pop("values"), after.pop("values")
    assert before == after
    for found in rotated:
        stream = found.stream
        assert all(values[0][path] != values[1][path] for path in stream.paths)
        for path in stream.norms:
            assert set(values[1][f"{path}.weight"]) == {1.0}
        assert found.errors[0] == 1
        assert found.errors[-1] == 0
        assert list(found.errors) == sorted(found.errors, reverse=True)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "swin", "hf_dinov2"])
def test_single_precision(name: str) -> None:
    model, x = dense_model(name)
    model, x = model.float(), x.float()
    before = run(model, x)
    tp_amp.rotate(model, x[:1], [x], progress=False)
    assert relative(run(model, x), before) < 1e-5


@torch.no_grad()
def test_channels_are_in_the_order_of_components() -> None:
    """What all norms give, added up by hand, has its components in the leading channels."""
    model, x = toy(depth=2).double(), images(40).double()
    dense = copy.deepcopy(model)
    [rotated] = tp_amp.rotate(model, x[:1], x.split(7), progress=False)
    seen: list[torch.Tensor] = []
    for norm in [m for m in dense.modules() if isinstance(m, nn.LayerNorm)]:
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense(x)
    total = torch.zeros(12, 12).double()
    for values in seen:
        z = nn.functional.layer_norm(values, (12,)).flatten(0, 1)
        total += z.mT @ z / len(z)
    lost = torch.linalg.eigvalsh(total).cumsum(0)
    lost = torch.cat([lost[:1] * 0, lost[1:] - lost[0]]).flip(0) / total.trace()
    expected = [1.0, *lost.tolist()]  # the first of twelve is the mean, of which nothing is left
    assert rotated.errors == pytest.approx(expected, abs=1e-9)
    assert rotated.width_for(0) == 12
    assert rotated.width_for(1) == 1
    middle = rotated.width_for(0.2)
    assert rotated.errors[middle] <= 0.2 < rotated.errors[middle - 1]
    with pytest.raises(ValueError, match="at least 0"):
        rotated.width_for(-1)


@torch.no_grad()
def test_what_is_read_without_a_norm_counts_as_one() -> None:
    """However large the stream is there: added up by hand, with as large a trace."""
    model, x = toy(depth=1).double(), images(40).double()
    model.norm = nn.Identity()  # type: ignore[assignment]
    model.embed.weight.mul_(30)
    dense = copy.deepcopy(model)
    [rotated] = tp_amp.rotate(model, x[:1], x.split(7), progress=False)
    assert [reading.norm for reading in rotated.stream.readings].count(None) == 1
    seen: list[torch.Tensor] = []
    for layer in (dense.blocks[0].norm1, dense.blocks[0].norm2, dense.head):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense(x)
    normed = [nn.functional.layer_norm(values, (12,)).flatten(0, 1) for values in seen[:2]]
    moments = [z.mT @ z / z.square().sum() for z in (*normed, seen[2])]
    centring = torch.eye(12).double() - 1 / 12
    values = torch.linalg.eigvalsh(centring @ sum(moments) @ centring)
    lost = torch.cat([values[:1] * 0, values[1:].cumsum(0)]).flip(0) / values.sum()
    assert rotated.errors == pytest.approx([1.0, *lost.tolist()], abs=1e-6)


@torch.no_grad()
def test_batches_may_be_of_any_size() -> None:
    x, results = images(24).double(), []
    for size in (1, 10, 24):
        [found] = tp_amp.rotate(toy().double(), x[:1], x.split(size), progress=False)
        results.append(torch.tensor(found.errors))
    assert torch.allclose(results[0], results[1], atol=1e-10)
    assert torch.allclose(results[0], results[2], atol=1e-10)


REFUSED = {
    "swinv2": "a LayerNorm writes the stream channel by channel",
    "hf_clip": "pre_layrnorm: a LayerNorm writes the stream channel by channel",
    "open_clip": "ln_pre: a LayerNorm writes the stream channel by channel",
    "hf_dinov2": "the model's output is what this norm gives",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_is_told_with_the_reason(name: str) -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="(timm|transformers|open_clip)")
    torch.manual_seed(0)
    model, example = by_name(name)
    model = perturbed(model)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f"no residual stream.*({REFUSED[name]})"):
        tp_amp.rotate(model, example, [example])
    assert fingerprint(model) == before


def test_one_stream_stays_and_others_are_rotated(caplog: pytest.LogCaptureFixture) -> None:
    model, x = dense_model("swin")
    found = tp_amp.rotate(model, x[:1], [x], progress=False)
    assert [f.stream.width for f in found] == [32, 64]
    [record] = [r for r in caplog.records if "stay as they are" in r.getMessage()]
    assert "patch_embed.norm: a LayerNorm writes the stream" in record.getMessage()


@pytest.mark.parametrize(("batches", "error"), [([], ValueError), (3, TypeError)])
def test_after_an_error_the_model_is_as_it_was(batches: Any, error: type[Exception]) -> None:
    model = toy()
    before = fingerprint(model)
    with pytest.raises(error):
        tp_amp.rotate(model, images(1), batches)
    assert fingerprint(model) == before


def test_a_bias_that_finds_no_place_is_told() -> None:
    """A weight of zero in a norm: what its bias gives there, no other bias gives."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, num_heads=2, depth=1, qkv_bias=False
    )
    model = perturbed(model)
    with torch.no_grad():
        model.blocks[0].norm1.weight[3] = 0
    x = torch.randn(4, 3, 32, 32)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"the bias of blocks.0.norm1 finds no place"):
        tp_amp.rotate(model, x[:1], [x])
    assert fingerprint(model) == before


@torch.no_grad()
def test_padding_behind_a_norm_keeps_its_bias() -> None:
    """Swin at a size that its windows don't divide pads with zeros behind norms."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "num_classes": 5}
    model: Any = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, window_size=4, **sizes
    )
    model, x = perturbed(model).double(), torch.randn(4, 3, 56, 56).double()
    before = model(x)
    [rotated] = tp_amp.rotate(model, x[:1], [x], progress=False)
    assert rotated.stream.keeps_biases
    assert relative(model(x), before) < 1e-10
    assert bool(model.layers[1].blocks[0].norm1.bias.any())
