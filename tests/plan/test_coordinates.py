"""Plans of leading channels belong to the model that was rotated, not to the dense one."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_models import dense_model
from torch import nn
from toys import fingerprint, images, toy
from zoo import by_name

import tp_amp

QUIET: dict[str, Any] = {"progress": False}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [m for m in caplog.messages if "was not called on this model" in m]
    caplog.clear()
    return found


def test_a_stream_of_fewer_blocks_is_refused(tmp_path: Path) -> None:
    model, x = toy(depth=2), images(8)
    plan = tp_amp.stream_plan(tp_amp.rotate(model, x[:1], [x], **QUIET), 0.5)
    assert tp_amp.PruningPlan.from_json(plan.to_json()) == plan
    tp_amp.apply_plan(pruned := copy.deepcopy(model), plan)
    tp_amp.save_pruned(pruned, tmp_path, plan)
    for depth in (1, 3):
        other = toy(depth=depth)
        before = fingerprint(other)
        with pytest.raises(ValueError, match=rf"blocks has {depth} blocks, .* runs through 2"):
            tp_amp.apply_plan(other, plan)
        with pytest.raises(ValueError, match="build the same dense model"):
            tp_amp.load_pruned(other, tmp_path)
        assert fingerprint(other) == before


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_stream_that_was_not_rotated_is_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    dense, x = dense_model(name)
    rotated = copy.deepcopy(dense)
    plan = tp_amp.stream_plan(tp_amp.rotate(rotated, x[:1], [x], **QUIET), 0.5)
    with caplog.at_level(logging.WARNING):
        tp_amp.apply_plan(copy.deepcopy(rotated), plan)
        tp_amp.apply_plan(copy.deepcopy(rotated).bfloat16(), plan)
        assert not told(caplog)
        tp_amp.apply_plan(dense, plan)
        [message] = told(caplog)
    assert "rotate was not called on this model" in message
    assert "stream have several weights" in message


def test_heads_that_were_not_rotated_are_told(caplog: pytest.LogCaptureFixture) -> None:
    dense, _ = by_name("vit")
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rotated = copy.deepcopy(dense)
    handles = tp_amp.rotate_heads(rotated, x[:1], [x], **QUIET)
    plan = tp_amp.rank_plan(handles, {"qk": 0.5, "vo": 0.5})
    with caplog.at_level(logging.WARNING):
        for same in (rotated, copy.deepcopy(rotated).bfloat16()):
            tp_amp.apply_plan(copy.deepcopy(same), plan)
            tp_amp.compensate(copy.deepcopy(same).float(), plan, [x], **QUIET)
        tp_amp.apply_plan(copy.deepcopy(dense), tp_amp.rank_plan(handles, {"vo": 1}))
        # No plan of leading channels: whoever chose these knows why.
        others = {down: [kept[-1]] for down, kept in plan.keep.items()}
        tp_amp.apply_plan(copy.deepcopy(dense), tp_amp.PruningPlan(others, sites=plan.sites))
        assert not told(caplog)
        for cut in (tp_amp.apply_plan, lambda m, p: tp_amp.compensate(m, p, [x], **QUIET)):
            cut(copy.deepcopy(dense), plan)
            [message] = told(caplog)
            assert "rotate_heads was not called on this model" in message
            assert "attn.proj are not orthogonal (2 such)" in message


def test_streams_are_rotated_before_heads(caplog: pytest.LogCaptureFixture) -> None:
    """Folding a LayerScale into projections, which rotating a stream does, turns their columns."""
    dense, x = dense_model("dinov2")  # whose LayerScale is not the same in all channels
    for order in ((tp_amp.rotate, tp_amp.rotate_heads), (tp_amp.rotate_heads, tp_amp.rotate)):
        model = copy.deepcopy(dense)
        handles = {rotate: rotate(model, x[:1], [x], **QUIET) for rotate in order}
        plan = tp_amp.rank_plan(handles[tp_amp.rotate_heads], {"vo": 0.5})
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tp_amp.apply_plan(model, plan)
        if order[0] is tp_amp.rotate:
            assert not told(caplog)
        else:
            [message] = told(caplog)
            assert "(by rotate, which comes before it, too)" in message


def test_sizes_alone_have_no_coordinates() -> None:
    model, x = toy(), images(8)
    plan = tp_amp.stream_plan(tp_amp.rotate(model, x[:1], [x], **QUIET), 0.5)
    model.to("meta")
    tp_amp.apply_plan(model, plan)
    assert model.embed.out_channels == 6
    assert isinstance(model.norm, nn.LayerNorm)
