"""What real scripts hand over: dtypes, wrappers, shared layers, hooks, buffers, Ctrl-C."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from architectures import BlockSpec, MLPSpec, Spec, build, inputs, masked_forward
from torch import Tensor, nn
from torch_pruning.dependency import Group
from toys import Block, PlainMLP, fingerprint, images, masked, relative, toy

import tp_amp

DOWN = "blocks.1.mlp.second"


def half_plan(model: nn.Module, example: Tensor) -> tp_amp.PruningPlan:
    importance = tp_amp.DIMAPImportance()
    return tp_amp.plan_from_importance(model, example, importance, 0.5)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float16, 5e-3), (torch.bfloat16, 5e-2), (torch.float32, 1e-5), (torch.float64, 1e-12)],
    ids=str,
)
def test_dtypes(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    model = toy().to(dtype)
    x = images(8)  # float32, as a loader gives them
    dense = copy.deepcopy(model)
    importance = tp_amp.EntropyTaylorImportance(data=list(x[:4].split(2)))
    pruner = tp_amp.AdaptiveMLPPruner(
        model, x[:1].to(dtype), importance, list(x[4:].split(2)), max_increase=0.05
    )
    pruner.step()
    plan = pruner.plan
    assert any(len(kept) < 20 for kept in plan.keep.values())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    wide = masked(dense.double(), plan.keep) if dtype is torch.float64 else None
    expected = (wide or masked(copy.deepcopy(dense).float(), plan.keep))(x.double() if wide else x)
    assert relative(model(x.to(dtype)).to(expected.dtype), expected) < bound
    tp_amp.save_pruned(model, tmp_path, plan)
    again = toy().to(dtype)
    tp_amp.load_pruned(again, tmp_path)
    assert torch.equal(again(x.to(dtype)), model(x.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_compensation_in_other_dtypes(dtype: torch.dtype) -> None:
    model = toy().to(dtype)
    plan = half_plan(model, images(1).to(dtype))
    fitted = tp_amp.compensate(model, plan, [images(32)], progress=False)
    assert all(value.error < value.error_before for value in fitted.values())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_channels_last_stays() -> None:
    spec = Spec(convolutional=True, blocks=(BlockSpec(mlps=(MLPSpec(inner="depthwise"),)),))
    model = build(spec).to(memory_format=torch.channels_last)
    x = inputs(spec, 6).contiguous(memory_format=torch.channels_last)
    sites = {mlp.down: mlp for mlp in tp_amp.find_mlps(model, x[:1])}
    keep = {name: [0, 3] for name in sites}
    expected = masked_forward(copy.deepcopy(model), sites, keep)(x)
    fitted = copy.deepcopy(model)
    tp_amp.apply_plan(model, x[:1], tp_amp.PruningPlan(keep))
    torch.testing.assert_close(model(x).detach(), expected)
    tp_amp.compensate(fitted, tp_amp.PruningPlan(keep), [x], progress=False)
    assert fitted(x).is_contiguous()
    assert fitted(x).isfinite().all()


def test_data_parallel_model(tmp_path: Path) -> None:
    model, x = toy(), images(8)
    plain, dense = copy.deepcopy(model), copy.deepcopy(model)
    wrapped = nn.DataParallel(model)
    plans = []
    for candidate in (wrapped, plain):
        pruner = tp_amp.AdaptiveMLPPruner(
            candidate,
            x[:1],
            tp_amp.EntropyTaylorImportance(data=list(x[:4].split(2))),
            list(x[4:].split(2)),
            max_increase=0.05,
            compensation="mean",
        )
        pruner.step()
        plans.append(pruner.plan)
    kept = {name.removeprefix("module."): kept for name, kept in plans[0].keep.items()}
    assert kept == plans[1].keep
    assert relative(wrapped(x), plain(x)) < 1e-5
    tp_amp.save_pruned(wrapped, tmp_path, plans[0])
    again = nn.DataParallel(dense)
    tp_amp.load_pruned(again, tmp_path)
    assert relative(again(x), plain(x)) < 1e-5


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_compiled_model_is_refused_with_the_remedy(in_place: bool) -> None:
    model, x = toy(), images(8)
    compiled: Any = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    plan = tp_amp.PruningPlan({DOWN: [0]})
    refused = [
        lambda: tp_amp.find_mlps(compiled, x[:1]),
        lambda: tp_amp.EntropyTaylorImportance().collect(compiled, [x]),
        lambda: tp_amp.ReconstructionImportance().collect(compiled, [x]),
        lambda: tp_amp.apply_plan(compiled, x[:1], plan),
        lambda: tp_amp.compensate(compiled, plan, [x]),
        lambda: tp_amp.AdaptiveMLPPruner(compiled, x[:1], tp_amp.DIMAPImportance(), [x]),
    ]
    before = fingerprint(model)
    for call in refused:
        with pytest.raises(ValueError, match=r"compiled in place|pass model\._orig_mod"):
            call()
    assert fingerprint(model) == before


class Twice(nn.Module):
    """One MLP that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 6, 4, 4)
        self.first = self.second = PlainMLP(6, 10)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.first(x)
        return self.head((x + self.second(x.tanh())).mean(1))


def test_an_mlp_that_is_called_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), images(8)
    dense = copy.deepcopy(model)
    pruner = tp_amp.AdaptiveMLPPruner(
        model,
        x[:1],
        tp_amp.EntropyTaylorImportance(data=[x[:4]]),
        [x[4:]],
        max_increase=0.01,
    )
    pruner.step()
    assert len(pruner.plan.keep) == 1
    assert any(len(kept) < 10 for kept in pruner.plan.keep.values())
    assert relative(model(x), masked(dense, pruner.plan.keep)(x)) < 1e-5
    assert model.first is model.second
    tp_amp.save_pruned(model, tmp_path, pruner.plan)
    again = copy.deepcopy(dense)
    tp_amp.load_pruned(again, tmp_path)
    assert torch.equal(again(x), model(x))


def test_hooks_of_the_user_stay_and_are_called() -> None:
    model, x = toy(), images(8)
    counts = {"forward": 0, "before": 0, "backward": 0}

    def count(kind: str) -> Any:
        def hook(*_: Any) -> None:
            counts[kind] += 1

        return hook

    layer = model.get_submodule(DOWN)
    layer.register_forward_hook(count("forward"))
    layer.register_forward_pre_hook(count("before"))
    layer.register_full_backward_hook(count("backward"))
    hooks = fingerprint(model)["hooks"]
    importance = tp_amp.EntropyTaylorImportance().collect(model, [x[:4]])
    assert fingerprint(model)["hooks"] == hooks
    pruner = tp_amp.AdaptiveMLPPruner(model, x[:1], importance, [x[4:]], max_increase=0.1)
    pruner.step()
    assert fingerprint(model)["hooks"] == hooks
    counts.update(dict.fromkeys(counts, 0))
    model(x.requires_grad_()).sum().backward()
    assert counts == {"forward": 1, "before": 1, "backward": 1}


class WithBuffers(nn.Module):
    """Buffers that no layer reads, one of them on another device and one not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.model = toy()
        self.register_buffer("away", torch.empty(20, device="meta"), persistent=False)
        self.register_buffer("numbers", torch.arange(20))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def test_buffers_elsewhere_stay(tmp_path: Path) -> None:
    model, x = WithBuffers().eval(), images(8)
    before = dict(model.named_buffers())
    pruner = tp_amp.AdaptiveMLPPruner(
        model, x[:1], tp_amp.EntropyTaylorImportance(data=[x[:4]]), [x[4:]], max_increase=0.1
    )
    pruner.step()
    after = dict(model.named_buffers())
    assert all(after[name] is buffer for name, buffer in before.items())
    tp_amp.save_pruned(model, tmp_path, pruner.plan)
    again = WithBuffers().eval()
    tp_amp.load_pruned(again, tmp_path)
    assert torch.equal(again(x), model(x))
    assert again.away.is_meta


def test_everything_in_inference_mode(tmp_path: Path) -> None:
    model = toy()
    plain = copy.deepcopy(model)

    def run(model: nn.Module, x: Tensor) -> tp_amp.PruningPlan:
        pruner = tp_amp.AdaptiveMLPPruner(
            model,
            x[:1],
            tp_amp.EntropyTaylorImportance(data=[x[:4]]),
            [x[4:]],
            max_increase=0.1,
            compensation="affine",
        )
        pruner.step()
        return pruner.plan

    with torch.inference_mode():
        plan = run(model, images(8))
        tp_amp.save_pruned(model, tmp_path, plan)
        inside = model(images(4))
    assert plan == run(plain, images(8))
    assert relative(inside, plain(images(4))) < 1e-6
    model(images(4)).sum().backward()  # what was made inside can still be trained


@pytest.mark.parametrize("name", ["apply", "compensate", "load"])
def test_ctrl_c_between_two_cuts(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, x = toy(), images(40)
    plan = half_plan(model, x[:1])
    pruned = copy.deepcopy(model)
    tp_amp.apply_plan(pruned, x[:1], plan)
    tp_amp.save_pruned(pruned, tmp_path, plan)
    works = {
        "apply": lambda: tp_amp.apply_plan(model, x[:1], plan),
        "compensate": lambda: tp_amp.compensate(model, plan, [x], method="none", progress=False),
        "load": lambda: tp_amp.load_pruned(model, tmp_path),
    }
    prune, groups = Group.prune, []

    def interrupted(self: Group, *args: Any, **kwargs: Any) -> None:
        groups.append(self)
        if len(groups) == 2:
            raise KeyboardInterrupt
        prune(self, *args, **kwargs)

    before = fingerprint(model)
    with monkeypatch.context() as patch:
        patch.setattr(Group, "prune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            works[name]()
    assert fingerprint(model) == before
    works[name]()
    assert relative(model(x), pruned(x)) < 1e-6


@pytest.mark.parametrize("file", ["source.json", "model.safetensors", "plan.json"])
def test_ctrl_c_while_saving_leaves_the_files_of_before(
    file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, x = toy(), images(4)
    plan = half_plan(model, x[:1])
    tp_amp.apply_plan(model, x[:1], plan)
    tp_amp.save_pruned(model, tmp_path, plan)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace = os.replace

    def interrupted(source: Any, target: Any) -> None:
        if Path(target).name == file:
            raise KeyboardInterrupt
        replace(source, target)

    state = fingerprint(model)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tp_amp.save_pruned(model, tmp_path, plan)
    assert fingerprint(model) == state
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_reconstruction_names_the_parameter_that_is_not_finite() -> None:
    model = toy()
    with torch.no_grad():
        model.blocks[0].mlp.first.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.first\.weight holds NaN"):
        tp_amp.ReconstructionImportance().collect(model, [images()], progress=False)


def test_heads_are_searched_with_reconstruction() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=4, num_classes=5
    )
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    importance = tp_amp.ReconstructionImportance(data=[x[:4]])
    pruner = tp_amp.AdaptiveMLPPruner(
        model, x[:1], importance, [x[4:]], max_increase=1.0, prune_num_heads=True
    )
    pruner.step()
    assert pruner.plan.widths["blocks.0.attn.proj"] == 1
    assert set(importance.orders) == {"blocks.0.mlp.fc2", "blocks.0.attn.proj"}


def test_layer_norms_are_cut_in_order() -> None:
    """Torch-Pruning's LayerNorm took the kept channels in the order of a set: 8 before 1."""
    spec = Spec(blocks=(BlockSpec(mlps=(MLPSpec(hidden=9, inner="layer"),)),))
    model = build(spec)
    sites = {mlp.down: mlp for mlp in tp_amp.find_mlps(model, inputs(spec, 1))}
    norm: Any = model.blocks[0].mlps[0].inner
    expected = norm.weight[[1, 8]].tolist()
    tp_amp.apply_plan(model, inputs(spec, 1), tp_amp.PruningPlan({name: [1, 8] for name in sites}))
    norm = model.blocks[0].mlps[0].inner
    assert norm.weight.tolist() == expected
    assert norm.normalized_shape == (2,)


class Stream(nn.Module):
    """The embedding makes the stream that a block adds to, which other layers read as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query = nn.Linear(3, 4), nn.Linear(4, 4)
        self.inner, self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.inner(self.query(x).softmax(-1))
        return self.down(self.up(self.norm(x)).relu()).mean(1)


def test_a_stream_that_others_read_is_no_mlp() -> None:
    torch.manual_seed(0)
    found = tp_amp.find_mlps(Stream(), torch.randn(2, 4, 3))
    assert [mlp.down for mlp in found] == ["down"]


class CalledTwice(nn.Module):
    """The second call of `up` reads what no cut of `embed` reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 1)
        self.down, self.norm = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.down(self.up(self.embed(x)).relu()))
        return self.down(self.up(x).relu()).mean((2, 3))


def test_a_layer_that_is_called_with_other_channels_too_is_no_down() -> None:
    torch.manual_seed(0)
    found = tp_amp.find_mlps(CalledTwice().eval(), torch.randn(1, 3, 2, 2))
    assert [mlp.down for mlp in found] == ["down"]


class Pyramid(nn.Module):
    """A head that reads what every block gives, so that no block can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Block(4, 8, False, True) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        total = torch.zeros_like(x)
        for block in self.blocks:
            x = block(x)
            total = total + x
        return self.head(total.mean(1))


def test_search_runs_all_where_the_head_reads_every_block(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model, x, plans = Pyramid().eval(), torch.randn(8, 4, 3), []
    for limit in (2**30, 0):
        pruner = tp_amp.AdaptiveMLPPruner(
            copy.deepcopy(model),
            x[:1],
            tp_amp.GramSchmidtImportance(),
            list(x[4:].split(2)),
            cache_bytes=limit,
        )
        with caplog.at_level(logging.WARNING):
            pruner.step()
        plans.append(pruner.plan.to_json())
    assert plans[0] == plans[1]
    assert "every probe runs the whole model" in caplog.text


def test_overlapping_mlps_are_compensated() -> None:
    """Without residual and norm a block's `up` is the `down` of what feeds it."""
    block = BlockSpec(mlps=(MLPSpec(bias=False),), norm="none", residual=False)
    spec = Spec(convolutional=True, blocks=(block,))
    model, x = build(spec), inputs(spec, 12)
    sites = [mlp.down for mlp in tp_amp.find_mlps(model, x[:1])]
    assert sites == ["blocks.0.mlps.0.up", "blocks.0.mlps.0.down"]
    tp_amp.compensate(model, tp_amp.PruningPlan({n: [0, 1] for n in sites}), [x], progress=False)
    assert model(x).isfinite().all()


def test_shared_batch_norms_load(tmp_path: Path) -> None:
    block = BlockSpec(mlps=(MLPSpec(inner="layer"),))
    shared = BlockSpec(mlps=(MLPSpec(inner="layer"),), reuse="shared")
    spec = Spec(convolutional=True, blocks=(block, shared))
    model, x = build(spec), inputs(spec, 4)
    dense = copy.deepcopy(model)
    plan = half_plan(model, x[:1])
    tp_amp.apply_plan(model, x[:1], plan)
    tp_amp.save_pruned(model, tmp_path, plan)
    tp_amp.load_pruned(dense, tmp_path)
    assert torch.equal(dense(x), model(x))


def test_ctrl_c_while_torch_pruning_traces() -> None:
    """Torch-Pruning caught it with a bare except, called the model again and kept its hooks."""
    x, calls = images(2), []

    def counted() -> nn.Module:
        model = toy()  # a new one, since the first call of all is made once
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        return model

    tp_amp.find_mlps(counted(), x)
    count = len(calls)
    assert count > 3
    for failing in range(1, count + 1):
        calls.clear()
        model = counted()
        before = fingerprint(model)

        def interrupt(*_: Any, failing: int = failing) -> None:
            if len(calls) == failing:
                raise KeyboardInterrupt

        handle = model.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            tp_amp.find_mlps(model, x)
        handle.remove()
        assert fingerprint(model) == before


def test_search_forgets_what_a_block_gave_that_keeps_all() -> None:
    """The attention's output of the block that was searched before stood in for this block's."""
    block = BlockSpec(mlps=(MLPSpec(), MLPSpec()), mixing=True)
    spec, probes = Spec(blocks=(block, block)), []
    x = inputs(spec, 12)
    for limit in (2**30, 0):
        model = build(spec)
        pruner = tp_amp.AdaptiveMLPPruner(
            model, x[:1], tp_amp.GramSchmidtImportance(), [x], max_increase=0.0, cache_bytes=limit
        )
        pruner.step()
        probes.append(pruner.plan.probes)
    accepted = {name: any(p.accepted for p in tried) for name, tried in probes[1].items()}
    assert not accepted["blocks.1.mlps.0.down"]
    assert probes[0] == probes[1]


def test_dead_activations_are_judged_by_the_other_channels() -> None:
    """Gradients of half of the channels were looked at, of which no gate let one through."""
    mlp = MLPSpec(kind="gated", hidden=3, activation="relu", inner="rms")
    spec = Spec(convolutional=False, blocks=(BlockSpec(mlps=(mlp,)),))
    model = build(spec)
    gate: Any = model.blocks[0].mlps[0].gate
    for channel in range(3):
        with torch.no_grad():
            gate.weight.zero_()
            gate.bias.copy_(torch.full((3,), -1.0))
            gate.bias[channel] = 1.0
        found = tp_amp.find_mlps(model, inputs(spec, 1))
        assert [mlp.down for mlp in found] == ["blocks.0.mlps.0.down"]
