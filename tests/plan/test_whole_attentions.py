"""Attentions that go as a whole, against the dense model whose projection gives a constant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import constant_sublayers
import pytest
import timm
import torch
from constant_sublayers import giving, on_average, output
from packaging.version import Version
from torch import Tensor, nn
from toys import images, perturbed, relative
from zoo import SWIN_HEADS, TINY, hugging_face_models

import tp_amp
from tp_amp.running.inputs import example
from tp_amp.running.runtimes.building import build
from tp_amp.structure.model_structure import ModelStructure
from tp_amp.structure.ranks.head_ranks import HeadRanks
from tp_amp.structure.ranks.removed_forward import RemovedForward

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY), 32),
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN_HEADS), 64),
    "hf_vit": (lambda: hugging_face_models()["hf_vit"][0](), 32),
}


def ranks(model: nn.Module, batch: Any) -> dict[str, dict[str, HeadRanks]]:
    """The two widths of each attention."""
    found: dict[str, dict[str, HeadRanks]] = {}
    for site in ModelStructure(model, batch).ranks[0]:
        found.setdefault(site.name, {})[site.pair] = site
    return found


def without(*attentions: dict[str, HeadRanks]) -> tp_amp.PruningPlan:
    sites = {site.down: site for pairs in attentions for site in pairs.values()}
    return tp_amp.PruningPlan({down: [] for down in sites}, sites=sites)


def made(name: str) -> tuple[nn.Module, list[Any]]:
    return constant_sublayers.made(*MODELS[name], wrapped=name.startswith("hf_"))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_dense_one_with_a_constant(name: str) -> None:
    """All attentions go by the cut alone, of which a bias stays; and one with its mean."""
    model, batches = made(name)
    found = list(ranks(model, batches[0]).values())
    plan = without(*found)
    pruned = copy.deepcopy(model)
    tp_amp.apply_plan(pruned, plan)
    downs = [pairs["vo"].projection for pairs in found]
    biases = {down: model.get_submodule(down).bias.detach() for down in downs}
    expected = output(giving(model, biases), batches[1])
    assert relative(output(pruned, batches[1]), expected) < 1e-6
    assert relative(expected, output(model, batches[1])) > 1e-2
    assert not any(
        pruned.get_submodule(layer).weight.numel() for pairs in found for layer in pairs["vo"].made
    )

    mean = on_average(model, downs[-1], batches)
    fitted = copy.deepcopy(model)
    tp_amp.compensate(fitted, without(found[-1]), batches, method="mean", progress=False)
    expected = output(giving(model, {downs[-1]: mean}), batches[1])
    assert relative(output(fitted, batches[1]), expected) < 1e-5


def test_nothing_of_it_is_computed() -> None:
    """No product of queries with keys, nor of weights with values."""
    model, batches = made("vit")
    [first, *_] = ranks(model, batches[0]).values()
    sizes = [tp_amp.measure(model, [batches[0]])]
    tp_amp.apply_plan(model, without(first))
    sizes.append(tp_amp.measure(model, [batches[0]]))
    tokens, width = 5, 64
    products = tokens * 4 * width * width + 2 * tokens * tokens * width
    assert sizes[0].macs - sizes[1].macs == products
    assert sizes[0].parameters - sizes[1].parameters == 4 * width * width + 3 * width


@pytest.mark.parametrize("queries", ["first", "last", "kept", "alone"])
def test_queries_and_keys_go_with_the_values(queries: str) -> None:
    """In whatever order the plan names them, and whatever it says of them."""
    model, batches = made("vit")
    [pairs, *_] = ranks(model, batches[0]).values()
    keep: dict[str, list[int]] = {"attn": [], "qk": [0] if queries == "kept" else []}
    order = {"last": ("vo", "qk"), "alone": ("vo",)}.get(queries, ("qk", "vo"))
    plan = tp_amp.PruningPlan(
        {pairs[pair].down: keep.get(pair, []) for pair in order},
        sites={pairs[pair].down: pairs[pair] for pair in order},
    )
    tp_amp.apply_plan(model, plan)
    assert sum(p.numel() for p in model.blocks[0].attn.parameters()) == 64


def test_queries_and_keys_do_not_go_alone() -> None:
    model, batches = made("vit")
    [pairs, *_] = ranks(model, batches[0]).values()
    site = pairs["qk"]
    for keep in ({site.down: []}, {site.down: [], pairs["vo"].down: [0]}):
        plan = tp_amp.PruningPlan(keep, sites={s.down: s for s in pairs.values()})
        with pytest.raises(ValueError, match=r"they go with the values of blocks.0.attn alone"):
            tp_amp.apply_plan(model, plan)
    assert model.blocks[0].attn.qkv.out_features == 3 * 64


class TwoOutputs(nn.Module):
    """An attention that gives its values too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2)), v


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = TwoOutputs(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.attention(x)[0])


def test_an_attention_whose_values_are_read_too_stays() -> None:
    torch.manual_seed(0)
    model = Around()
    [pairs] = ranks(model, torch.randn(2, 5, 8)).values()
    with pytest.raises(ValueError, match="attention gives more than its output"):
        tp_amp.apply_plan(model, without({"vo": pairs["vo"]}))


@pytest.mark.parametrize("recipe", [{"every_linear": True}, {"every_linear": True, "refine": 2}])
def test_every_recipe_fits_what_stays(recipe: dict[str, Any]) -> None:
    model, batches = made("vit")
    [first, _] = ranks(model, batches[0]).values()
    plan = without(first)
    mlp = tp_amp.find_mlps(model, batches[0])[0]
    plan.keep[mlp.down] = list(range(mlp.width // 2))
    plan.sites[mlp.down] = mlp
    batches = [images(16, seed, 32, 3) for seed in range(4)]
    cut, fitted = copy.deepcopy(model), copy.deepcopy(model)
    tp_amp.apply_plan(cut, plan)
    corrections = tp_amp.compensate(fitted, plan, batches, progress=False, **recipe)
    assert corrections["blocks.0.attn.proj"].weight.shape == (64, 0)
    assert "blocks.0.attn.qkv" not in corrections
    wanted = output(model, batches[0])
    assert (output(fitted, batches[0]) - wanted).norm() < (output(cut, batches[0]) - wanted).norm()


def test_it_is_saved_loaded_and_pruned_again(tmp_path: Path) -> None:
    model, batches = made("vit")
    [first, _] = ranks(model, batches[0]).values()
    plan, pruned = without(first), copy.deepcopy(model)
    tp_amp.apply_plan(pruned, plan)
    pruned = perturbed(pruned)
    assert tp_amp.PruningPlan.from_json(plan.to_json()) == plan
    tp_amp.save_pruned(pruned, tmp_path, plan)
    tp_amp.load_pruned(model, tmp_path)
    assert torch.equal(output(model, batches[1]), output(pruned, batches[1]))
    assert isinstance(copy.deepcopy(model).blocks[0].attn, RemovedForward)
    assert "blocks.0.attn: all of it went before" in str(tp_amp.inspect(model, batches[0]))
    second = without(ranks(model, batches[0])["blocks.1.attn"])
    assert set(plan.then(second).widths.values()) == {0}
    tp_amp.apply_plan(model, second)
    assert bool(output(model, batches[0]).isfinite().all())


def test_transformers_opens_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, batches = made("hf_vit")
    [first, _] = ranks(model, batches[0]).values()
    plan = without(first)
    tp_amp.apply_plan(model, plan)
    model = perturbed(model)
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers")
    again = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, trust_remote_code=True
    ).eval()
    assert torch.equal(output(again, batches[1]), output(model, batches[1]))
    own = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in again.parameters()) == own


@pytest.mark.skipif(Version(torch.__version__) < Version("2.6"), reason="exports otherwise")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_run_it(runtime: str) -> None:
    pytest.importorskip(runtime)
    model, batches = made("vit")
    tp_amp.apply_plan(model, without(*ranks(model, batches[0]).values()))
    built = build(model.eval(), example(batches[1]), runtime)
    found = torch.as_tensor(built.run(batches[1])[0])
    assert relative(found, output(model, batches[1])) < 1e-4
    assert built.exported is not None
    assert built.exported().attentions == 0


def test_all_that_stays_is_trained() -> None:
    """As distributed training expects: no parameter is without a gradient."""
    model, batches = made("vit")
    tp_amp.apply_plan(model, without(*ranks(model, batches[0]).values()))
    model.train()(batches[0]).square().sum().backward()
    assert all(
        parameter.grad is not None for parameter in model.blocks.parameters() if parameter.numel()
    )
