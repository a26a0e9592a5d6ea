from __future__ import annotations

import copy
import itertools
from importlib.metadata import version
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from block_models import hugging_face, old_hugging_face, swin, vit
from packaging.version import Version
from torch import nn
from torch.nn.utils import prune
from torch_pruning.pruner import function
from toys import fingerprint, images, masked, narrow_heads, relative, toy

import tp_amp
from tp_amp.structure.attention.blocks import find_attention_blocks

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def by_definition(energies: list[float]) -> list[float]:
    """Equation 10 as written: a loop over weights, each over those at least as large."""
    return [e / sum(other for other in energies if other >= e) for e in energies]


def mlp_group(model: nn.Module, channels: list[int] | None = None) -> Any:
    mlp = tp_amp.find_mlps(model, images(1))[0]
    graph = tp.DependencyGraph().build_dependency(model, (images(1),), verbose=False)
    up: Any = model.get_submodule(mlp.up[0])
    every = list(range(mlp.width)) if channels is None else channels
    return graph.get_pruning_group(up, function.prune_linear_out_channels, every)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("channels", [None, [7, 3, 15, 0]])
def test_channel_score_is_the_definition(gated: bool, channels: list[int] | None) -> None:
    model = toy(gated=gated)
    mlp = model.blocks[0].mlp
    ups = [mlp.gate, mlp.value] if gated else [mlp.first]
    rows = torch.cat([layer.weight for layer in ups], 1).tolist()
    columns = (mlp.out if gated else mlp.second).weight.T.tolist()
    energies = [
        sum(w * w for w in rows[c]) + sum(w * w for w in columns[c])
        for c in (range(20) if channels is None else channels)
    ]
    group = mlp_group(model, channels)
    held = [(list(item.idxs), list(item.root_idxs)) for item in group.items]
    before = fingerprint(model)
    scores = tp_amp.DIMAPImportance()(group)
    assert scores is not None
    assert scores.tolist() == pytest.approx(by_definition(energies))
    assert float(scores.max()) == 1
    assert torch.equal(scores, tp_amp.DIMAPImportance()(group))
    assert fingerprint(model) == before
    assert [(item.idxs, item.root_idxs) for item in group.items] == held


def test_attention_channels_count_q_k_v_and_the_projection() -> None:
    model = vit()
    attention = model.blocks[1].attn
    graph = tp.DependencyGraph().build_dependency(model, (IMAGE,), verbose=False)
    group = graph.get_pruning_group(
        attention.proj, function.prune_linear_in_channels, list(range(24))
    )
    q, k, v = attention.qkv.weight.detach().double().split(24)
    energy = sum(part.square().sum(1) for part in (q, k, v, attention.proj.weight.detach().T))
    scores = tp_amp.DIMAPImportance()(group)
    assert scores is not None
    assert scores.tolist() == pytest.approx(by_definition(energy.tolist()))


def test_equal_channels_differ_by_index_so_that_no_threshold_takes_all() -> None:
    model = toy()
    with torch.no_grad():
        for layer in (model.blocks[0].mlp.first, model.blocks[0].mlp.second):
            layer.weight.fill_(0.5)
    scores = tp_amp.DIMAPImportance()(mlp_group(model))
    assert scores is not None
    assert scores.tolist() == pytest.approx([1 / (i + 1) for i in range(20)])
    with torch.no_grad():
        for layer in (model.blocks[0].mlp.first, model.blocks[0].mlp.second):
            layer.weight.zero_()
    scores = tp_amp.DIMAPImportance()(mlp_group(model))
    assert scores is not None
    assert scores.tolist() == [1] + [0] * 19


def test_weights_that_are_not_finite_are_named() -> None:
    model = toy()
    group = mlp_group(model)
    with torch.no_grad():
        model.blocks[0].mlp.second.weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.second are not finite; load sound"):
        tp_amp.DIMAPImportance()(group)
    model = vit()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.weight holds NaN"):
        tp_amp.dimap_masks(model, 0.5)


def test_is_no_gradient_importance() -> None:
    """Scripts run a backward pass for these two."""
    assert isinstance(tp_amp.DIMAPImportance(), tp.importance.Importance)
    assert not isinstance(tp_amp.DIMAPImportance(), tp.importance.TaylorImportance)
    assert not isinstance(tp_amp.DIMAPImportance(), tp.importance.HessianImportance)


def test_adaptive_pruner_takes_it() -> None:
    model = toy()
    dense = copy.deepcopy(model)
    pruner = tp_amp.AdaptiveMLPPruner(
        model,
        images(1),
        tp_amp.DIMAPImportance(),
        [images()],
        max_increase=0.05,
        progress=False,
    )
    pruner.step()
    assert any(width < 20 for width in pruner.plan.widths.values())
    with torch.no_grad():
        assert relative(model(images()), masked(dense, pruner.plan.keep)(images())) < 1e-5


def unfused(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def weakest_attention(model: nn.Module, share: float) -> dict[str, list[int]]:
    """Head dimensions of each packed attention that go: one ranking of all, by the definition."""
    scores: dict[tuple[str, int], float] = {}
    for name, module in model.named_modules():
        if hasattr(module, "qkv"):
            parts = module.qkv.weight.detach().double().chunk(3)
            energy = sum(p.square().sum(1) for p in (*parts, module.proj.weight.detach().T))
            score = torch.tensor(by_definition(energy.tolist()))
            for place, value in enumerate(score.view(module.num_heads, -1).mean(0).tolist()):
                scores[name, place] = value
    removed = sorted(scores, key=lambda key: scores[key])[: round(share * len(scores))]
    return {name: [place for other, place in removed if other == name] for name, _ in {*scores}}


def weakest_neurons(model: nn.Module, share: float) -> dict[str, list[int]]:
    scores: dict[tuple[str, int], float] = {}
    for name, module in model.named_modules():
        if hasattr(module, "fc1"):
            energy = module.fc1.weight.detach().double().square().sum(1)
            energy += module.fc2.weight.detach().double().square().sum(0)
            for place, value in enumerate(by_definition(energy.tolist())):
                scores[f"{name}.fc2", place] = value
    removed = sorted(scores, key=lambda key: scores[key])[: round(share * len(scores))]
    return {name: [place for other, place in removed if other == name] for name, _ in {*scores}}


@pytest.mark.parametrize("build", [pytest.param(vit, marks=narrow_heads), swin])
def test_scopes_prune_attention_and_mlps_each_by_one_ranking(build: Any) -> None:
    model = unfused(build())
    dense = copy.deepcopy(model)
    attention, mlp = weakest_attention(model, 0.25), weakest_neurons(model, 0.5)
    auxiliary = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not any(part in name for part in ("qkv", "proj.weight", "fc1", "fc2.weight"))
        or "patch_embed" in name
    }
    scopes = tp_amp.dimap_scopes(model, attention=0.25, mlp=0.5)
    tp.pruner.MetaPruner(model, (IMAGE,), tp_amp.DIMAPImportance(), **scopes).step()
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
            assert module.proj.in_features == module.attn_dim

    for name, places in attention.items():
        old: Any = dense.get_submodule(name)
        width = old.proj.in_features // old.num_heads
        removed = [
            (part * old.num_heads + head) * width + place
            for part in range(3)
            for head in range(old.num_heads)
            for place in places
        ]
        with torch.no_grad():
            old.qkv.weight[removed] = 0
            old.qkv.bias[removed] = 0
        assert model.get_submodule(name).head_dim == width - len(places)
    keep = {
        name: [i for i in range(dense.get_submodule(name).in_features) if i not in places]
        for name, places in mlp.items()
    }
    for name, kept in keep.items():
        assert model.get_submodule(name).in_features == len(kept)
    with torch.no_grad():
        assert relative(model(IMAGE), masked(dense, keep)(IMAGE)) < 1e-4
    for name, value in auxiliary.items():
        assert torch.equal(model.state_dict()[name], value), f"{name} is auxiliary"


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_scopes_prune_hugging_face_models(kind: str) -> None:
    model: Any = hugging_face(kind)
    if Version(version("transformers")) < Version("5"):
        pytest.skip("transformers 4.57: heads can't be narrower")
    scopes = tp_amp.dimap_scopes(model, attention=0.5, mlp=0.5)
    before = sum(p.numel() for p in model.parameters())
    widths = [
        model.get_submodule(block.project).in_features for block in find_attention_blocks(model)
    ]
    tp.pruner.MetaPruner(model, {"pixel_values": IMAGE}, tp_amp.DIMAPImportance(), **scopes).step()
    for module in model.modules():
        if hasattr(module, "q_proj"):
            module.head_dim = module.q_proj.out_features // module.num_attention_heads
    blocks = find_attention_blocks(model)
    assert [model.get_submodule(b.project).in_features for b in blocks] != widths
    assert sum(p.numel() for p in model.parameters()) < 0.8 * before
    assert model(pixel_values=IMAGE).logits.isfinite().all()


def test_a_share_of_zero_leaves_the_module_out() -> None:
    model = vit()
    scopes = tp_amp.dimap_scopes(model, attention=0, mlp=0.5)
    tp.pruner.MetaPruner(model, (IMAGE,), tp_amp.DIMAPImportance(), **scopes).step()
    assert [block.attn.qkv.out_features for block in model.blocks] == [72, 72]
    assert sum(block.mlp.fc1.out_features for block in model.blocks) == 96
    assert model(IMAGE).shape == (1, 5)


MODELS = {
    "timm vit": vit,
    "timm gated": lambda: vit(mlp_layer=timm.layers.SwiGLU),
    "timm square": lambda: vit(mlp_ratio=1),
    "timm swin": swin,
    "timm swin v2": lambda: swin("swinv2_tiny_window8_256"),
    "hugging face vit": lambda: hugging_face("vit"),
    "hugging face swin": lambda: hugging_face("swin"),
    "hugging face before 5": old_hugging_face,
    "flat": toy,
}


@pytest.mark.parametrize("kind", MODELS)
def test_masks_are_one_ranking_of_each_module(kind: str) -> None:
    """Recomputed with a sort of all weights; which Linear is which, by names alone."""
    model: nn.Module = MODELS[kind]()
    projections = ("attn.proj", "attention.output.dense", "o_proj", "project")
    attention = ("qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj")
    auxiliary = ("head", "classifier", "pooler", "reduction", "cpb_mlp")
    modules: dict[str, list[str]] = {"qkv": [], "prj": [], "mlp": []}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not any(part in name for part in auxiliary):
            is_prj, is_qkv = name.endswith(projections), name.split(".")[-1] in attention
            modules["prj" if is_prj else "qkv" if is_qkv and "mlp" not in name else "mlp"].append(
                name
            )
    before = fingerprint(model)
    masks = tp_amp.dimap_masks(model, 0.4)
    assert fingerprint(model) == before
    assert {*masks} == {*itertools.chain(*modules.values())}
    for names in modules.values():
        scores = []
        for name in names:
            energy = model.get_submodule(name).weight.detach().double().square().flatten()
            ranked, order = energy.sort(descending=True, stable=True)
            score = torch.empty_like(energy)
            score[order] = ranked / ranked.cumsum(0)
            scores.append(score)
        every = torch.cat(scores)
        expected = torch.ones_like(every, dtype=torch.bool)
        expected[every.argsort()[: round(0.4 * len(every))]] = False
        found = torch.cat([masks[name].flatten() for name in names])
        # Float32 can't tell the few weights next to the threshold apart.
        assert int((found != expected).sum()) <= 2, names
        assert all(masks[name].shape == model.get_submodule(name).weight.shape for name in names)


def test_masks_by_brute_force() -> None:
    model = vit()
    names = [f"blocks.{i}.attn.proj" for i in range(2)]
    scores = {
        (name, place): score
        for name in names
        for place, score in enumerate(
            by_definition(model.get_submodule(name).weight.double().square().flatten().tolist())
        )
    }
    removed = sorted(scores, key=lambda key: scores[key])[: len(scores) // 4]
    masks = tp_amp.dimap_masks(model, 0.25)
    for name in names:
        places = sorted(place for other, place in removed if other == name)
        assert (~masks[name]).flatten().nonzero().flatten().tolist() == places


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.99, 0.999999])
def test_no_layer_is_emptied(sparsity: float) -> None:
    model = swin()
    with torch.no_grad():
        model.layers[0].blocks[0].mlp.fc1.weight.mul_(1e-12)
        model.layers[1].blocks[0].mlp.fc1.weight.zero_()
        model.layers[2].blocks[0].mlp.fc1.weight.fill_(1)
    masks = tp_amp.dimap_masks(model, sparsity)
    assert all(bool(mask.any()) for mask in masks.values())
    kept = {n: m for n, m in masks.items() if n.endswith("proj")}
    total, count = sum(m.numel() for m in kept.values()), sum(int(m.sum()) for m in kept.values())
    assert count == max(total - round(sparsity * total), len(kept))


def test_equal_weights_keep_the_exact_count() -> None:
    model = vit().to(torch.bfloat16)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.copy_(torch.ones(24, 24).bernoulli().mul(2).sub(1))
    masks = tp_amp.dimap_masks(model, 0.25)
    assert [int(masks[f"blocks.{i}.attn.proj"].sum()) for i in range(2)] == [432, 432]
    assert masks["blocks.0.attn.proj"].flatten()[:432].all(), "of equal ones, the first stay"


def test_sparsify_zeroes_weights_for_good() -> None:
    model = vit().train()
    biases = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias")}
    masks = tp_amp.dimap_masks(model, 0.5)
    returned = tp_amp.dimap_sparsify(model, 0.5)
    assert all(torch.equal(returned[name], mask) for name, mask in masks.items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert all(torch.equal(model.get_parameter(n), bias) for n, bias in biases.items())
    for _ in range(2):
        model(IMAGE).square().sum().backward()
        optimizer.step()
    for name, mask in masks.items():
        layer: Any = model.get_submodule(name)
        prune.remove(layer, "weight")
        assert isinstance(layer.weight, nn.Parameter)
        assert torch.equal(layer.weight != 0, mask), name
    assert sum(int((p == 0).sum()) for p in model.head.parameters()) == 0


def test_sparsify_again_counts_the_zeros_there_are() -> None:
    model = vit()
    first = tp_amp.dimap_sparsify(model, 0.3)
    second = tp_amp.dimap_sparsify(model, 0.6)
    for name, mask in second.items():
        assert not (mask & ~first[name]).any(), "what is gone stays gone"
        layer: Any = model.get_submodule(name)
        assert torch.equal(layer.weight != 0, mask)


def test_bad_models_and_shares_are_named() -> None:
    for sparsity in (1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="sparsity must be a share from 0 up to below 1"):
            tp_amp.dimap_masks(vit(), sparsity)
    with pytest.raises(ValueError, match=r"no attention with q, k and v .* in Sequential; DIMAP"):
        tp_amp.dimap_masks(nn.Sequential(nn.Linear(2, 2)), 0.5)
    model = vit()
    model.blocks[1].mlp = nn.Identity()
    with pytest.raises(
        ValueError, match=r"around blocks\.1\.attn are no transformer block of width"
    ):
        tp_amp.dimap_sparsify(model, 0.5)
    assert not any(name.endswith("weight_mask") for name, _ in model.named_buffers())


def test_iterative_steps_rank_the_weights_of_the_moment() -> None:
    model = vit()
    scopes = tp_amp.dimap_scopes(model, attention=0, mlp=0.5)
    pruner = tp.pruner.MetaPruner(
        model, (IMAGE,), tp_amp.DIMAPImportance(), iterative_steps=2, **scopes
    )
    for share in (0.25, 1 / 3):
        expected = {
            name: model.get_submodule(name).in_features - len(places)
            for name, places in weakest_neurons(model, share).items()
        }
        pruner.step()
        for name, width in expected.items():
            assert model.get_submodule(name).in_features == width
            with torch.no_grad():
                model.get_submodule(name).weight.mul_(torch.linspace(0.1, 3, width))
