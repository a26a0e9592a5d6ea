"""Streams that are cut: readers, writers and the head against least squares by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch
from compensations import TINY, stored
from tiny_models import pictures, swin, vit
from torch import Tensor, nn
from toys import relative

import tp_amp

ALL = ("mlp", "qk", "vo", "stream")


def model_and_pictures(count: int = 40) -> tuple[nn.Module, Tensor]:
    return vit(), torch.cat(pictures(count))


@pytest.fixture(scope="module")
def cut_stream() -> Any:
    """The rotated model, images, a plan of its stream, and the model cut and compensated."""
    model, images = model_and_pictures(160)
    rotated = tp_amp.rotate(model, images[:1], images.split(8), progress=False)
    plan = tp_amp.stream_plan(rotated, 0.5)
    fitted = copy.deepcopy(model)
    options = {"every_linear": True, "ridge": TINY, "progress": False}
    tp_amp.compensate(fitted, plan, [images], **options)
    return model, images, plan, fitted


def close(fitted: nn.Module, name: str, images: Tensor, wanted: Tensor) -> bool:
    """Whether a layer gives what the best fit on what it reads gives; weights may be others.

    What a LayerNorm gives sums to nought, which least squares must not take rounding of for more.
    """
    read, given = stored(fitted, name, images)
    rows = numpy.column_stack([read.numpy(), numpy.ones(len(read))])
    best = rows @ numpy.linalg.lstsq(rows, wanted.numpy(), rcond=1e-5)[0]
    return relative(given, torch.from_numpy(best)) < 1e-3


def test_the_first_reader_is_fitted_to_what_it_gave(cut_stream: Any) -> None:
    model, images, plan, fitted = cut_stream
    alone = copy.deepcopy(model)
    tp_amp.apply_plan(alone, plan)
    read = stored(alone, "blocks.0.attn.qkv", images)[0]
    assert relative(stored(fitted, "blocks.0.attn.qkv", images)[0], read) < 1e-5
    assert close(fitted, "blocks.0.attn.qkv", images, stored(model, "blocks.0.attn.qkv", images)[1])


def test_a_writer_is_fitted_to_what_the_stream_lacks(cut_stream: Any) -> None:
    model, images, _, fitted = cut_stream
    dense = stored(model, "blocks.0.norm2", images)[0][:, :12]
    before = stored(fitted, "blocks.0.norm1", images)[0]
    assert close(fitted, "blocks.0.attn.proj", images, dense - before)


def test_the_head_is_fitted_last(cut_stream: Any) -> None:
    model, images, _, fitted = cut_stream
    assert close(fitted, "head", images, stored(model, "head", images)[1])


def test_readers_alone_without_every_linear(cut_stream: Any) -> None:
    model, images, plan, _ = cut_stream
    fitted = copy.deepcopy(model)
    found = tp_amp.compensate(fitted, plan, [images], progress=False)
    expected = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "mlp.fc1")}
    assert found.keys() == expected | {"head"}


def joint(model: nn.Module, images: Tensor, target: float = 0.5) -> tp_amp.PruningPlan:
    batches = images.split(8)
    tp_amp.rotate(model, images[:1], batches, progress=False)
    tp_amp.rotate_heads(model, images[:1], batches, progress=False)
    importance = tp_amp.ReconstructionImportance(data=batches)
    return tp_amp.plan_for_target(model, images[:1], importance, {"params": target}, widths=ALL)


def test_all_kinds_together_come_closer_than_the_cut_alone() -> None:
    model, images = model_and_pictures(80)
    plan = joint(model, images)
    others = torch.cat(pictures(40, seed=2))
    errors = []
    for options in ({"method": "none"}, {}, {"every_linear": True}):
        cut = copy.deepcopy(model)
        tp_amp.compensate(cut, plan, images.split(8), progress=False, **options)
        with torch.no_grad():
            errors.append(relative(cut(others), model(others)))
    assert errors[2] < errors[0]
    assert errors[1] < errors[0]


def test_refining_goes_on_from_there() -> None:
    model, images = model_and_pictures(64)
    plan = joint(model, images, 0.6)
    lost = []
    for refine in (0, 20):
        cut = copy.deepcopy(model)
        tp_amp.compensate(
            cut, plan, images.split(16), every_linear=True, refine=refine, progress=False
        )
        with torch.no_grad():
            lost.append(relative(cut(images), model(images)))
    assert lost[1] < lost[0]


def test_refining_weighs_errors_of_the_channels_that_are_left() -> None:
    """Layers that write to a cut stream give fewer outputs than errors are known of."""
    model, images = model_and_pictures(320)
    [rotated] = tp_amp.rotate(model, images[:1], images.split(48), progress=False)
    few = {mlp.down: list(range(mlp.width // 8)) for mlp in tp_amp.find_mlps(model, images[:1])}
    plan = tp_amp.stream_plan([rotated], 0.9).then(tp_amp.PruningPlan(few))
    lost = []
    for refine in (0, 20):
        cut = copy.deepcopy(model)
        options = {"every_linear": True, "refine": refine, "progress": False}
        tp_amp.compensate(cut, plan, images.split(48), **options)
        with torch.no_grad():
            of_cut, of_dense = (each(images).log_softmax(-1) for each in (cut, model))
            lost.append(float((of_dense.exp() * (of_dense - of_cut)).sum(-1).mean()))
    assert lost[1] < 0.95 * lost[0]


def test_states_on_disk_give_the_same_bits() -> None:
    model, images = model_and_pictures(16)
    plan = joint(model, images)
    weights = []
    for memory in (None, 0):
        cut = copy.deepcopy(model)
        options = {"every_linear": True, "memory_bytes": memory, "progress": False}
        tp_amp.compensate(cut, plan, images.split(8), **options)
        weights.append(cut.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_stage_each_of_a_swin() -> None:
    model, images = swin(), torch.cat(pictures(96))
    rotated = tp_amp.rotate(model, images[:1], images.split(8), progress=False)
    plan = tp_amp.stream_plan(rotated, 0.75)
    errors = []
    for options in ({"method": "none"}, {"every_linear": True}):
        cut = copy.deepcopy(model)
        found = tp_amp.compensate(cut, plan, images.split(8), progress=False, **options)
        with torch.no_grad():
            errors.append(relative(cut(images), model(images)))
    assert {"layers.1.blocks.0.attn.qkv", "head.fc"} <= found.keys()
    assert errors[1] < 0.8 * errors[0]


def test_it_is_saved_and_loaded_with_all_kinds(tmp_path: Any) -> None:
    model, images = model_and_pictures(16)
    dense = copy.deepcopy(model)
    plan = joint(model, images)
    tp_amp.compensate(model, plan, images.split(8), every_linear=True, progress=False)
    tp_amp.save_pruned(model, tmp_path, plan)
    tp_amp.load_pruned(dense, tmp_path)
    with torch.no_grad():
        assert torch.equal(dense(images), model(images))


def test_what_reads_a_stream_before_the_chain_is_fitted_before_it() -> None:
    """A branch of the model's own forward, behind which the chain of blocks starts."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 12)
            self.norm, self.first = nn.LayerNorm(12), nn.Linear(12, 12)
            self.blocks = nn.Sequential(*(Block() for _ in range(3)))
            self.last, self.head = nn.LayerNorm(12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            x = x + self.first(self.norm(x))
            return self.head(self.last(self.blocks(x)).mean(1))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(12)
            self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model, images = Net().eval(), torch.randn(64, 5, 6)
    rotated = tp_amp.rotate(model, images[:1], [images], progress=False)
    plan = tp_amp.stream_plan(rotated, 0.75)
    cut = copy.deepcopy(model)
    found = tp_amp.compensate(cut, plan, [images], every_linear=True, ridge=TINY, progress=False)
    names = [f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")]
    assert list(found) == ["first", *names, "head"]
    for name in ("first", "blocks.0.up", "head"):
        own = "norm" if name == "first" else name
        wanted = stored(model, name, images)[1]
        if name == "first":  # writes: what the stream lacks behind it
            wanted = stored(model, "blocks.0", images)[0][:, :9] - stored(cut, own, images)[0]
        assert close(cut, name, images, wanted)
