"""What a Torch-Pruning pruner leaves of a rotated stream: the dense model with a projector."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from stream_models import FAMILIES, dense_model, projected
from torch import nn
from toys import fingerprint, images, relative, toy
from zoo_checks import run

import tp_amp

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")


def cut(model: nn.Module, x: torch.Tensor, ratio: float) -> tuple[nn.Module, Any]:
    """A rotated model, and a copy cut by Torch-Pruning, in a script's lines."""
    rotated = tp_amp.rotate(model, x[:1], [x], progress=False)
    pruned = copy.deepcopy(model)
    importance = tp_amp.LeadingChannels(rotated)
    tp.pruner.MetaPruner(pruned, x[:1], importance=importance, pruning_ratio=ratio).step()
    return pruned, rotated


def widths(model: nn.Module, rotated: list[tp_amp.RotatedStream]) -> dict[str, int]:
    written = {found.stream.name: found.stream.written[0] for found in rotated}
    return {name: model.get_parameter(w.path).shape[w.dim] for name, w in written.items()}


@pytest.mark.parametrize("name", ["vit", "deit", "deit3", "dinov2", "dinov2_giant", "hf_vit"])
def test_cut_is_the_dense_model_with_a_projector(name: str) -> None:
    model, x = dense_model(name)
    pruned, rotated = cut(model, x, 0.4)
    tp_amp.rescale_norms(pruned, rotated)
    kept = widths(pruned, rotated)
    [width] = kept.values()
    assert width == int(rotated[0].stream.width * 0.6)
    output = run(pruned, x)
    assert relative(output, run(projected(model, rotated, kept), x)) < 1e-10
    assert relative(output, run(model, x)) > 1e-4


def test_all_else_stays_whole() -> None:
    model, x = dense_model("vit")
    pruned, rotated = cut(model, x, 0.5)
    block: Any = pruned.blocks[0]  # type: ignore[index]
    assert block.mlp.fc1.weight.shape == (4 * 64, 32)
    assert block.attn.qkv.weight.shape == (3 * 64, 32)
    assert block.attn.proj.weight.shape == (32, 64)
    scores = tp_amp.LeadingChannels(rotated)
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    dense: Any = model
    stream = graph.get_pruning_group(
        dense.patch_embed.proj, tp.prune_conv_out_channels, list(range(64))
    )
    assert torch.equal(scores(stream).argsort(descending=True), torch.arange(64))  # type: ignore[union-attr]
    hidden = graph.get_pruning_group(
        dense.blocks[0].mlp.fc1, tp.prune_linear_out_channels, list(range(256))
    )
    assert scores(hidden) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eva02", r"does not see that blocks\.\d\.attn\.qkv\.weight"),
        ("torchvision_vit", "nn.MultiheadAttention"),
    ],
)
def test_what_torch_pruning_would_break_is_refused(name: str, message: str) -> None:
    model, x = dense_model(name)
    rotated = tp_amp.rotate(model, x[:1], [x], progress=False)
    before = fingerprint(model)
    pruner = tp.pruner.MetaPruner(
        model, x[:1], importance=tp_amp.LeadingChannels(rotated), pruning_ratio=0.5
    )
    with pytest.raises(ValueError, match=message):
        pruner.step()
    assert fingerprint(model)["values"] == before["values"]


def test_norms_are_rescaled_after_each_step() -> None:
    model, x = toy(depth=1).double(), images(30).double()
    rotated = tp_amp.rotate(model, x[:1], [x], progress=False)
    tp_amp.rescale_norms(model, rotated)  # nothing is cut yet
    assert bool((model.norm.weight == 1).all())
    pruner = tp.pruner.MetaPruner(
        model,
        x[:1],
        importance=tp_amp.LeadingChannels(rotated),
        pruning_ratio=0.5,
        iterative_steps=2,
    )
    for kept in (9, 6):
        pruner.step()
        for _ in range(2):
            tp_amp.rescale_norms(model, rotated)
        for norm in (model.norm, model.blocks[0].norm1, model.blocks[0].norm2):
            assert norm.weight.tolist() == pytest.approx([(12 / kept) ** 0.5] * kept)
    with pytest.raises(ValueError, match=r"no parameter embed\.weight"):
        tp_amp.rescale_norms(nn.Sequential(), [*rotated])
    with torch.no_grad():
        model.blocks[0].norm1.weight[0] += 1
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1 differ"):
        tp_amp.rescale_norms(model, rotated)
    assert fingerprint(model) == before


def test_norms_are_not_rescaled_by_an_earlier_rotation() -> None:
    """Whose scale the later one has folded into the readers; the outputs say so."""
    model, x = toy(depth=1).double(), images(30).double()
    first = tp_amp.rotate(model, x[:1], [x], progress=False)
    tp_amp.apply_plan(model, tp_amp.stream_plan(first, 0.75))
    tp_amp.rescale_norms(model, first)  # as the plan left them
    expected = model(x)
    second = tp_amp.rotate(model, x[:1], [x], progress=False)
    assert bool((model.norm.weight == 1).all())
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"the stream of embed has other coordinates.*last rotate"):
        tp_amp.rescale_norms(model, first)
    assert fingerprint(model) == before
    tp_amp.rescale_norms(model, second)
    torch.testing.assert_close(model(x), expected)
    half = copy.deepcopy(model).bfloat16()
    tp_amp.rescale_norms(half, second)
    for pruned, handles in ((model, second), (half, second)):
        tp_amp.apply_plan(pruned, tp_amp.stream_plan(handles, 0.5))
        weights = pruned.norm.weight.clone()
        tp_amp.rescale_norms(pruned, handles)
        torch.testing.assert_close(pruned.norm.weight, weights, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("rotated", "message"),
    [
        ("handle", "found one of it; pass "),
        ("heads", "found RotatedHeads in it"),
        ("stream", "found Stream in it"),
        (0.5, "found float$"),
        ("embed", "found str$"),
    ],
)
def test_what_is_no_list_of_rotate_is_told(rotated: Any, message: str) -> None:
    stream = tp_amp.Stream("embed", 12, True, (), ("norm",), ())
    site = tp_amp.HeadRanks("vo", "attn", ("attn.qkv",), "attn.proj", heads=2, width=2)
    handle = tp_amp.RotatedStream(stream, (0.0,) * 13)
    heads = [tp_amp.RotatedHeads(site, (0.0,) * 3)]
    given = {"handle": handle, "heads": heads, "stream": [stream]}.get(rotated, rotated)
    for call in (
        lambda: tp_amp.stream_plan(given, 0.5),
        lambda: tp_amp.LeadingChannels(given),
        lambda: tp_amp.rescale_norms(nn.Sequential(), given),
    ):
        with pytest.raises(TypeError, match=rf"the list that rotate gives, {message}"):
            call()


WHOLE = {"hf_siglip"}  # a head that the classifier does not read is run all the same
LARGE = {"open_clip_siglip"}  # cut as timm's; its rotation is tested


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LARGE])
def test_a_plan_gives_the_dense_model_with_a_projector(name: str) -> None:
    """Of every family, Torch-Pruning's graph or not; and with Torch-Pruning's cut where it can."""
    model, x = dense_model(name)
    rotated = tp_amp.rotate(model, x[:1], [x], progress=False)
    if name in WHOLE:
        with pytest.raises(ValueError, match="can't be cut: a copy that is cut fails"):
            tp_amp.stream_plan(rotated, 0.5)
        return
    dense = run(model, x)
    for kept in (0.4, 0.75):
        pruned = copy.deepcopy(model)
        plan = tp_amp.stream_plan(rotated, kept)
        tp_amp.apply_plan(pruned, plan)
        assert widths(pruned, rotated) == plan.widths
        output = run(pruned, x)
        assert relative(output, run(projected(model, rotated, plan.widths), x)) < 1e-10
        assert relative(output, dense) > 1e-6


def test_a_stream_in_a_plan_is_like_other_sites(tmp_path: Path) -> None:
    """Saved, loaded, reported, copied, trained, with MLPs and heads in the same plan."""
    model, x = dense_model("eva02")  # whose attentions must be told how wide their heads are
    rotated = tp_amp.rotate(model, x[:1], [x], progress=False)
    mlps = {mlp.down: mlp for mlp in tp_amp.find_mlps(model, x[:1])}
    heads = {found.down: found for found in tp_amp.find_attentions(model, x[:1])}
    plan = tp_amp.stream_plan(rotated, 0.5, round_to=16)
    assert plan.widths == {"patch_embed.proj": 32}
    kept = {name: list(range(100)) for name in mlps} | {name: [0, 2] for name in heads}
    for first, second in ((plan.keep, kept), (kept, plan.keep)):
        whole = tp_amp.PruningPlan({**first, **second}, sites={**plan.sites, **mlps, **heads})
        assert tp_amp.PruningPlan.from_json(whole.to_json()) == whole
        pruned = copy.deepcopy(model)
        tp_amp.apply_plan(pruned, whole)
        with torch.no_grad():
            output = pruned(x)
            assert torch.equal(copy.deepcopy(pruned)(x), output)
            assert torch.equal(pickle.loads(pickle.dumps(pruned))(x), output)
            tp_amp.save_pruned(pruned, tmp_path, whole)
            fresh, _ = dense_model("eva02")
            assert tp_amp.load_pruned(fresh, tmp_path) == whole
            assert torch.equal(fresh(x), output)
        told = " ".join(str(whole.report()).split())
        assert "Residual streams, in channels of the stream" in told
        pruned.train()(x).square().sum().backward()
        assert all(p.grad is not None for p in pruned.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"patch_embed\.proj has 32"):
        tp_amp.save_pruned(pruned, tmp_path, tp_amp.stream_plan(rotated, 0.25))
    with pytest.raises(ValueError, match=r"channels of the stream of patch_embed\.proj"):
        tp_amp.apply_plan(pruned, plan)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "above 0"),
        (1.5, "at most 1"),
        (True, "at most 1"),
        ({"embed": 13}, "has 12 channels"),
        ({"embed": 1}, "at least 2"),
        ({"other": 4}, "no rotated streams"),
    ],
)
def test_widths_are_checked(kept: Any, message: str) -> None:
    stream = tp_amp.Stream("embed", 12, True, (), ("norm",), ())
    with pytest.raises(ValueError, match=message):
        tp_amp.stream_plan([tp_amp.RotatedStream(stream, (0.0,) * 13)], kept)


@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_mlps_are_compensated_once_streams_are_cut(name: str) -> None:
    """As the page says: a plan of streams alone first, then one of MLPs."""
    model, x = dense_model(name)
    model, x = model.float(), torch.cat([x, x.flip(0), x + 0.1]).float()
    tp_amp.apply_plan(
        model, tp_amp.stream_plan(tp_amp.rotate(model, x[:1], [x], progress=False), 0.8)
    )
    plan = tp_amp.PruningPlan({m.down: list(range(60)) for m in tp_amp.find_mlps(model, x[:1])})
    dense, cut = copy.deepcopy(model), copy.deepcopy(model)
    fitted = tp_amp.compensate(model, plan, [x], every_linear=True, progress=False)
    tp_amp.apply_plan(cut, plan, x[:1])
    assert fitted.keys() > plan.keep.keys()
    with torch.no_grad():
        lost = [(run(m, x) - run(dense, x)).square().mean() for m in (model, cut)]
    assert lost[0] < lost[1]
