"""The search that runs only what comes after a cut, against the one that runs everything."""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

import pytest
import timm
import torch
from searches import data, pruner_of
from torch import Tensor, nn
from toys import Block, ToyViT, images, perturbed, toy
from zoo import by_name

import tp_amp
from tp_amp.search import prefix_cache as prefix
from tp_amp.search import replaying


def plan_of(model: nn.Module, cache_bytes: int, **options: Any) -> str:
    model = copy.deepcopy(model)
    pruner = pruner_of(model, cache_bytes=cache_bytes, progress=False, **options)
    pruner.step()
    return pruner.plan.to_json()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rescore": {"rescore": True},
    "loose": {"max_increase": 0.3},
    "target": {"target": {"params": 0.8}},
    "compensation": {"compensation": "affine"},
}


@pytest.mark.parametrize("limit", [2**30, 2500, 10], ids=["all", "one block", "nothing"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_plan_and_entropies_are_the_same(options: dict[str, Any], limit: int) -> None:
    model = toy(depth=4)
    assert plan_of(model, limit, **options) == plan_of(model, 0, **options)


@pytest.mark.parametrize("name", ["vit", "swin", "beit", "eva02", "open_clip", "hf_vit", "hf_swin"])
def test_zoo_models_with_heads(name: str) -> None:
    torch.manual_seed(0)
    model, example = by_name(name)
    shape = (example if isinstance(example, Tensor) else example["pixel_values"]).shape[1:]
    batches: Any = torch.randn(8, *shape).split(2)
    if isinstance(example, dict):
        batches = [{"pixel_values": batch} for batch in batches]
    plans = []
    for limit in (2**30, 0):
        pruner = tp_amp.AdaptiveMLPPruner(
            copy.deepcopy(model),
            example,
            tp_amp.EntropyTaylorImportance(data=batches[:2]),
            batches[2:],
            max_increase=1e-2,
            steps=3,
            prune_num_heads=True,
            cache_bytes=limit,
        )
        pruner.step()
        plans.append(pruner.plan.to_json())
    assert plans[0] == plans[1]


def test_blocks_before_the_cut_are_not_run_again() -> None:
    counts = {}
    for limit in (2**30, 0):
        model, calls = toy(depth=4), [0, 0, 0, 0]

        def count(module: nn.Module, args: Any, calls: list[int] = calls) -> None:
            calls[int(module.place)] += 1

        for place, block in enumerate(model.blocks):
            block.mlp.place = place
            block.mlp.register_forward_pre_hook(count)
        importance, search = tp_amp.GramSchmidtImportance(), images(16)[8:].split(1)
        tp_amp.AdaptiveMLPPruner(model, images(1), importance, search, cache_bytes=limit).step()
        counts[limit] = calls
    kept, plain = counts[2**30], counts[0]
    assert kept[3] >= plain[3]  # the last block is run for every probe
    assert kept[0] < 0.6 * plain[0]
    assert sum(kept) < 0.85 * sum(plain)


class Shuffled:
    """Batches in another order each time, whatever the seed."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.turn = batches, 0

    def __iter__(self) -> Any:
        self.turn += 1
        return iter(self.batches[:: 1 if self.turn % 2 else -1])


def test_other_batches_each_time_run_everything(caplog: pytest.LogCaptureFixture) -> None:
    scoring, search = data()
    model = toy(depth=3)
    plans = []
    for limit in (2**30, 0):
        pruner = tp_amp.AdaptiveMLPPruner(
            copy.deepcopy(model),
            images(1),
            tp_amp.EntropyTaylorImportance(data=scoring),
            Shuffled(search),
            cache_bytes=limit,
        )
        with caplog.at_level(logging.WARNING):
            pruner.step()
        plans.append(pruner.plan.keep)
    assert plans[0] == plans[1]
    assert "the batches are others each time" in caplog.text


def test_forward_passes_are_given_back_after_an_error() -> None:
    model = toy(depth=3)
    pruner = pruner_of(model)
    seen: list[int] = []

    def fail(module: nn.Module, args: Any) -> None:
        seen.append(1)
        if len(seen) == 30:
            raise KeyboardInterrupt

    model.blocks[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        pruner.step()
    assert not any("forward" in vars(module) for module in model.modules())


RUNS: list[bool] = []


class Counted(nn.Linear):
    """Notes its runs in a global list: what a forward pass puts on the model is taken off."""

    def forward(self, x: Tensor) -> Tensor:
        RUNS.append(not x.is_meta)
        return super().forward(x)


class Wider(Block):
    """A block with a layer that the others don't have."""

    def __init__(self) -> None:
        super().__init__(12, 20, gated=False, bias=True)
        self.extra = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.extra(x))


@pytest.mark.parametrize("uneven", [False, True])
def test_a_layer_that_stays_dense_leaves_nothing_to_the_next(
    uneven: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What ran before it in its block is none of the next block's, and that is not run again."""
    runs = {}
    for limit in (2**30, 0):
        torch.manual_seed(0)
        model = ToyViT(depth=3)
        if uneven:
            model.blocks[2] = Wider()
        model = perturbed(model)
        query = model.blocks[0].query
        counted = Counted(12, 12)
        counted.load_state_dict(query.state_dict())
        model.blocks[0].query = counted
        importance = tp_amp.GramSchmidtImportance()
        options = {"importance": importance, "objective": Rising(), "max_increase": 0.0}
        pruner = pruner_of(model, cache_bytes=limit, **options)
        RUNS.clear()
        with caplog.at_level(logging.WARNING):
            pruner.step()
        assert pruner.plan.widths == pruner.plan.dense_widths
        runs[limit] = sum(RUNS)
    assert "the batches are others" not in caplog.text
    # Two batches of the dense model, and of five probes of three layers. Else two images and the
    # first batch to check the chain, the dense model, what the blocks give, and what the first one
    # gives inside.
    assert runs == {0: 2 + 2 * 5 * 3, 2**30: 2 + 2 + 2 + 2}


class Rising:
    """An objective that rises from call to call, so that no width is accepted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Tensor) -> Tensor:
        self.calls += 1
        return output.sum() * 0 + self.calls


class Device:
    """Stands in for an accelerator: what is kept has another dtype, in which no layer runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stored = self.fetched = 0
        monkeypatch.setattr(replaying, "_on_host", self.store)
        monkeypatch.setattr(replaying, "_on_device", self.fetch)

    def store(self, values: Tensor) -> Tensor:
        assert values.dtype == torch.float32
        self.stored += 1
        return values.double()

    def fetch(self, values: Tensor, device: torch.device) -> Tensor:
        assert values.dtype == torch.float64
        assert device == torch.device("cpu")
        self.fetched += 1
        return values.float()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_kept_goes_to_the_host_and_back(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy(depth=4)
    plain = plan_of(model, 0, **options)
    device = Device(monkeypatch)
    assert plan_of(model, 2**30, **options) == plain
    assert device.stored > 4
    assert device.fetched > device.stored


def test_on_the_cpu_nothing_is_copied() -> None:
    values = torch.randn(3)
    kept = replaying.stored(values)
    assert kept.values is values
    assert kept.back() is values
    shape = torch.empty(3, device="meta")
    assert replaying.stored(shape).back() is shape


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_what_is_kept_lies_in_pinned_host_memory() -> None:
    values = torch.randn(3, 5, device="cuda").T
    kept = replaying.stored(values)
    assert kept.values.is_pinned()
    assert torch.equal(kept.back(), values)
    assert kept.back().stride() == values.stride()
    model = toy(depth=4).cuda()
    assert plan_of(model, 2**30) == plan_of(model, 0)


def test_memory_above_the_limit_is_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until the first batch has run to its end."""
    most, one = [0], 4 * 4 * 12 * 4  # images, tokens, channels, bytes
    keep = prefix.Prefix._keep

    def measured(self: prefix.Prefix, name: str, output: Any) -> None:
        keep(self, name, output)
        most.append(sum(e.values.nbytes for kept in self._given.values() for e in kept))

    monkeypatch.setattr(prefix.Prefix, "_keep", measured)
    plan_of(toy(depth=8), 2 * 2 * one)
    assert max(most) == 2 * 2 * one


@pytest.mark.timing
def test_takes_at_most_six_tenths_of_the_time() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4
    ).eval()
    batches = torch.randn(192, 3, 32, 32).split(64)
    ratios, plans = [], {}
    for _ in range(3):
        seconds = {}
        for limit in (2**30, 0):
            pruner = tp_amp.AdaptiveMLPPruner(
                copy.deepcopy(model),
                batches[0][:1],
                tp_amp.GramSchmidtImportance(),
                batches[1:],
                max_increase=1e-4,
                cache_bytes=limit,
            )
            start = time.process_time()
            pruner.step()
            seconds[limit] = time.process_time() - start
            plans[limit] = pruner.plan.to_json()
        assert plans[2**30] == plans[0]
        ratios.append(seconds[2**30] / seconds[0])
        if ratios[-1] <= 0.6:  # else it may be other work: up to three times
            return
    raise AssertionError(ratios)


class Encoder(nn.Module):
    """Layers that torch runs in one kernel, in which no Linear is called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 12, 4, 4)
        layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("error", [None, 0.05])
def test_batches_that_are_the_same_are_not_told_to_be_others(
    error: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    batches = list(images(48).split(4))
    plans = []
    for cache in (2**30, 0):
        torch.manual_seed(0)
        pruner = tp_amp.AdaptiveMLPPruner(
            perturbed(Encoder()),
            images(1),
            tp_amp.DIMAPImportance(),
            batches,
            max_increase=1e-3,
            error_probability=error,
            cache_bytes=cache,
            progress=False,
        )
        pruner.step()
        plans.append(pruner.plan)
    assert "others each time" not in caplog.text
    assert plans[0] == plans[1]
