"""Scores with activation checkpointing, against those of a plain pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import fingerprint, images, toy
from zoo import by_name

import tp_amp
from tp_amp import EntropyTaylorImportance, ReconstructionImportance


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made meanwhile took together, on any machine."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        found = function(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        for tensor in filter(is_tensor, tree_leaves(found)):
            storage = tensor.untyped_storage()
            if id(storage) not in self.known | given:
                self.known.add(id(storage))
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        return found

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


def peak(run: Callable[[], Any]) -> int:
    with PeakMemory() as memory:
        run()
    return memory.peak


def batches_for(example: Any, count: int = 6) -> list[Any]:
    torch.manual_seed(0)
    if isinstance(example, dict):
        values = example["pixel_values"]
        parts = torch.randn(count, *values.shape[1:]).to(values.dtype).split(2)
        return [{"pixel_values": part} for part in parts]
    return list(torch.randn(count, *example.shape[1:]).split(2))


NAMES = ["vit", "swin", "beit", "eva02", "open_clip", "hf_vit", "hf_swin"]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_same_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model, example = by_name(name)
    batches, before = batches_for(example), fingerprint(model.eval())
    found = [
        EntropyTaylorImportance(activation_checkpointing=again).collect(model, batches).scores
        for again in (False, True)
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])
    assert fingerprint(model) == before
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["vit", "swin", "eva02", "open_clip", "hf_swin"])
def test_reconstruction_is_the_same_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    model, example = by_name(name)
    batches, downs = batches_for(example), []
    downs = [mlp.down for mlp in tp_amp.find_mlps(model, example)]
    orders, errors = [], []
    for again in (False, True):
        torch.manual_seed(0)
        importance = ReconstructionImportance(activation_checkpointing=again)
        importance.collect(model, batches, layers=downs, progress=False)
        orders.append(importance.orders)
        errors.append(importance.errors)
    assert all(torch.equal(orders[0][down], orders[1][down]) for down in downs)
    assert all(torch.equal(errors[0][down], errors[1][down]) for down in downs)


@pytest.mark.parametrize(
    "recipe", [{"every_linear": True, "refine": 2}, {"token_weights": "sensitivity"}]
)
def test_compensation_is_the_same(recipe: dict[str, Any]) -> None:
    mlps = tp_amp.find_mlps(toy(depth=4), images(1))
    found, runs = [], []
    for again in (False, True):
        plan = tp_amp.PruningPlan({mlp.down: [0, 3, 4] for mlp in mlps})
        model, seen = toy(depth=4), []
        model.head.register_forward_hook(lambda *_, seen=seen: seen.append("head"))
        model.blocks[1].query.register_forward_hook(lambda *_, seen=seen: seen.append("block"))
        options = {**recipe, "activation_checkpointing": again, "progress": False}
        tp_amp.compensate(model, plan, images(16).split(4), **options)
        found.append([parameter.detach() for parameter in model.parameters()])
        runs.append({name: seen.count(name) for name in seen})
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    more = {name: runs[1][name] - runs[0][name] for name in ("head", "block")}
    assert more["head"] == 2  # the blocks are found once, by two passes
    assert more["block"] == more["head"] + 4  # once more for each batch


def test_takes_the_memory_of_one_block() -> None:
    """What a block keeps for its gradient is there for one block at a time, not for twelve."""
    model, batch = toy(depth=12, hidden=96), images(16)

    def score(again: bool) -> Any:
        importance = EntropyTaylorImportance("prediction", activation_checkpointing=again)
        return lambda: importance.collect(model, [batch], progress=False)

    assert peak(score(True)) < 0.4 * peak(score(False))


def test_reconstruction_takes_less_memory() -> None:
    model, batch = toy(depth=12, hidden=96), images(64)
    downs = [f"blocks.{i}.mlp.second" for i in range(12)]

    def sensitivity(again: bool) -> Any:
        from sensitivities import output_sensitivity

        from tp_amp.importance.objectives import Objective

        return lambda: output_sensitivity(
            model,
            downs,
            [batch],
            Objective("prediction"),
            activation_checkpointing=again,
            progress=False,
        )

    assert peak(sensitivity(True)) < 0.5 * peak(sensitivity(False))


def test_depth_adds_what_blocks_read_alone() -> None:
    """From 6 to 12 blocks the peak grows by six block inputs and a bit, not by their insides."""
    peaks = {}
    for depth in (6, 12):
        model = toy(depth=depth, hidden=96)
        importance = EntropyTaylorImportance("prediction", activation_checkpointing=True)
        peaks[depth] = peak(lambda i=importance, m=model: i.collect(m, [images(64)]))
    tokens = 64 * 4
    block_input = tokens * 12 * 4
    assert peaks[12] - peaks[6] < 6 * 1.5 * block_input


def test_a_model_without_blocks_is_refused_and_left_as_it_was() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    before = fingerprint(model)
    importance = EntropyTaylorImportance(activation_checkpointing=True)
    with pytest.raises(ValueError, match="no blocks were found in Sequential"):
        importance.collect(model, [images(4)])
    assert fingerprint(model) == before
    assert not importance.scores


def test_forwards_are_given_back_after_an_error() -> None:
    model = toy(depth=4)
    importance = EntropyTaylorImportance(lambda _: None, activation_checkpointing=True)
    with pytest.raises(TypeError, match="must return a scalar"):
        importance.collect(model, [images(4)])
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_checkpoint_goes_on_with_and_without(tmp_path: Any) -> None:
    """Out of memory after a batch, say: the same scores as of a run that was not interrupted."""
    model, batches = toy(depth=4), images(8).split(2)

    def stopping() -> Any:
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EntropyTaylorImportance().collect(model, stopping(), checkpoint=tmp_path)
    importance = EntropyTaylorImportance(activation_checkpointing=True)
    resumed = importance.collect(model, batches, checkpoint=tmp_path).scores
    plain = EntropyTaylorImportance().collect(model, batches).scores
    assert all(torch.equal(resumed[name], plain[name]) for name in plain)


def test_in_bfloat16() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3).bfloat16()
    batches = torch.randn(4, 3, 32, 32).split(2)
    found = [
        EntropyTaylorImportance(activation_checkpointing=again).collect(model, batches).scores
        for again in (False, True)
    ]
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])
