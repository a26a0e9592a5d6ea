"""The preflight against counts by hand and by another library."""

import logging
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn
from toys import fingerprint, images, toy
from zoo import SWIN_HEADS, TINY

import tp_amp
from tp_amp.evaluation.inspection import Share


def test_shares_of_a_vit_are_those_counted_by_hand() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY)
    found = tp_amp.inspect(model, images(1, size=32, channels=3))
    width, hidden, tokens = 64, 256, 5
    assert found.shares["total"].parameters == sum(p.numel() for p in model.parameters())
    assert found.shares["MLPs"].parameters == 2 * (2 * width * hidden + width + hidden)
    assert found.shares["attention"].parameters == 2 * (4 * width**2 + 4 * width)
    assert found.shares["MLPs"].macs == 2 * 2 * tokens * width * hidden
    scores = 2 * tokens**2 * width
    assert found.shares["attention"].macs == 2 * (4 * tokens * width**2 + scores)
    assert sum(found.shares[part].macs for part in ("MLPs", "attention", "rest")) == (
        found.shares["total"].macs
    )


def test_macs_of_linears_and_convolutions_are_torch_prunings() -> None:
    """Torch-Pruning counts no product of queries and keys; subtracted, the sums agree."""
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN_HEADS)
    inputs = images(1, size=64, channels=3)
    found = tp_amp.inspect(model, inputs)
    products = 0
    for stage in model.layers:
        for block in stage.blocks:
            tokens = block.input_resolution[0] * block.input_resolution[1]
            products += 2 * tokens * block.attn.window_area * block.attn.dim
    counted = 0

    def count(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        counted += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(count)
    model(inputs)
    assert found.shares["total"].macs == counted + products
    assert found.shares["MLPs"].macs < tp.utils.count_ops_and_params(model, inputs)[0]


def test_every_linear_is_in_a_group_or_named_with_a_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = timm.create_model("vit_pwee_patch16_reg1_gap_256", img_size=32, depth=2)
    inputs = images(1, size=32, channels=3)
    before = fingerprint(model)
    with caplog.at_level(logging.WARNING, logger="tp_amp"):
        found = tp_amp.inspect(model, inputs)
    assert fingerprint(model) == before
    grouped = {name for mlp in found.mlps for name in (*mlp.up, mlp.down)}
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert grouped | found.kept_layers.keys() == linears
    assert not grouped & found.kept_layers.keys()
    assert found.kept_layers.keys() == {"head", "blocks.0.attn_out_proj", "blocks.1.attn_out_proj"}
    assert caplog.messages == []  # what is told stands in the answer, once
    assert found.kept_attentions.keys() == {"blocks.0", "blocks.1"}
    # Hidden channels and q, k, v share a projection: 1280 of its 2048 rows.
    parts = [found.shares[part].parameters for part in ("MLPs", "attention", "rest")]
    assert sum(parts) == found.shares["total"].parameters
    up, down = model.blocks[0].in_proj, model.blocks[0].mlp_out_proj
    assert parts[0] == pytest.approx(
        2 * (sum(p.numel() for p in up.parameters()) * 1280 / 2048)
        + 2 * sum(p.numel() for p in down.parameters())
    )


def test_report_tells_all_of_it() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY)
    report = str(tp_amp.inspect(model, images(1, size=32, channels=3)))
    assert "blocks.*.mlp (2 times): 256 channels, fc1 -> fc2" in report
    assert "blocks.*.attn (2 times): 4 heads, qkv -> proj" in report
    assert "head: no layer reads its channels" in report
    assert "patch_embed.proj: 64 channels, read through 5 norms" in report


def test_streams_are_told_or_why_they_stay() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN_HEADS)
    before = fingerprint(model)
    found = tp_amp.inspect(model, images(1, size=64, channels=3))
    assert fingerprint(model) == before
    assert [stream.width for stream in found.streams] == [64, 128, 256]
    [(_, reason)] = found.kept_streams.items()
    assert reason == "patch_embed.norm: a LayerNorm writes the stream channel by channel"
    assert reason in str(found)


def test_a_section_of_very_many_reasons_ends() -> None:
    part = Share(0, 0)
    shares = dict.fromkeys(("total", "MLPs", "attention", "rest"), part)
    reasons = {f"{letter}.fc": f"{letter} writes it" for letter in "abcdefgh"}
    told = str(tp_amp.Inspection("Detector", [], [], shares=shares, kept_streams=reasons))
    assert "residual streams that stay as they are: 8\n  a.fc: a writes it" in told
    assert told.endswith("e.fc: e writes it\n  and 3 lines more, see kept_streams")


def test_layers_called_through_functions_are_named() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.unused = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.first.weight)

    found = tp_amp.inspect(Functional(), torch.randn(2, 4))
    assert found.mlps == []
    assert set(found.kept_layers.values()) == {"it is not called as a module on the example inputs"}


def test_model_that_fails_raises() -> None:
    with pytest.raises(ValueError, match="the model failed on inputs of shape"):
        tp_amp.inspect(toy(), torch.randn(1, 2, 3))


class Gives(nn.Module):
    """A toy whose output is made into something else."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.body, self.make = toy(), make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(self.body(x))


def test_an_output_that_tracing_can_not_read_is_told() -> None:
    reasons = {
        iter: "the model gives a tuple_iterator, in which no tensors are found; let it give",
        torch.Tensor.argmax: "the model gives int64 values alone, which have no gradients; let it",
    }
    for make, reason in reasons.items():
        given: Any = (lambda y: iter((y,))) if make is iter else make
        found = tp_amp.inspect(Gives(given), images(1))
        assert found.mlps == []
        assert len(found.kept_layers) == 13
        assert all(told.startswith(reason) for told in found.kept_layers.values())
    detached = tp_amp.inspect(Gives(torch.Tensor.detach), images(1))
    assert "does not depend on it" in detached.kept_layers["body.head"]
