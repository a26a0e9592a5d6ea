"""A model that was never called is after each public call as it was, in all that it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lazy_models import (
    REPLACING,
    TOYS,
    Building,
    Wrapping,
    contents,
    lazy_toy,
    noting_on_its_class,
)
from torch import Tensor, nn
from toys import ToyViT, images, relative
from zoo import hugging_face_models
from zoo_checks import masked

import tp_amp
from tp_amp.budget.latency import Latency
from tp_amp.structure.attention.finding import read_attentions
from tp_amp.structure.model_structure import ModelStructure

FEW, OTHERS = [images(4, 1), images(4, 2)], [images(4, 3), images(4, 4)]


def plan_of(model: nn.Module, x: Any = None) -> tp_amp.PruningPlan:
    mlps = tp_amp.find_mlps(copy.deepcopy(model), images(1) if x is None else x)
    return tp_amp.PruningPlan({mlp.down: list(range(0, mlp.width, 2)) for mlp in mlps})


def searching(model: nn.Module) -> tp_amp.AdaptiveMLPPruner:
    importance = tp_amp.EntropyTaylorImportance(data=FEW)
    return tp_amp.AdaptiveMLPPruner(
        model, images(1), importance, OTHERS, max_increase=0.05, progress=False
    )


def table_of(model: nn.Module) -> Latency:
    structure = ModelStructure(model, images(1))
    mlps = structure.mlps
    return Latency(structure, {mlp: mlp.width for mlp in mlps}, {mlp.down: 1 for mlp in mlps})


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "inspect": lambda m: tp_amp.inspect(m, images(1)),
    "find_mlps": lambda m: tp_amp.find_mlps(m, images(1)),
    "attentions": lambda m: read_attentions(m, images(1)),
    "entropy_taylor": lambda m: tp_amp.EntropyTaylorImportance().collect(m, FEW, progress=False),
    "reconstruction": lambda m: tp_amp.ReconstructionImportance().collect(m, FEW, progress=False),
    "plan_from_importance": lambda m: tp_amp.plan_from_importance(
        m, images(1), tp_amp.GramSchmidtImportance(), 0.5
    ),
    "plan_for_target": lambda m: tp_amp.plan_for_target(
        m, images(1), tp_amp.ReconstructionImportance(data=FEW), {"macs": 0.8}
    ),
    "latency": table_of,
    "search": lambda m: searching(m).estimate(),
    "compare": lambda m: tp_amp.compare(
        m, images(1), [tp_amp.DIMAPImportance()], FEW, fractions=[0.5], progress=False
    ),
    "measure": lambda m: tp_amp.measure(m, FEW, repeats=1, progress=False),
    "measure_both": lambda m: tp_amp.measure_both(m, copy.deepcopy(m), FEW, repeats=1),
}


# They find what they need of the model without a graph of it.
UNTRACED = {"attentions", "entropy_taylor", "reconstruction", "measure", "measure_both"}


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("call", CALLS)
def test_toys(kind: type[ToyViT], call: str, caplog: pytest.LogCaptureFixture) -> None:
    model = lazy_toy(kind)
    expected = copy.deepcopy(model)(images())
    before = contents(model)
    CALLS[call](model)
    assert contents(model) == before
    assert ("Building builds late in its first" in caplog.text) == (
        kind is Building and call not in UNTRACED
    )
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_noted_on_a_class(call: str) -> None:
    """A model of another class, which does the same, was never seen by the call."""
    kind, other = noting_on_its_class(), noting_on_its_class()
    model, expected = lazy_toy(kind), lazy_toy(other)(images())
    before, method = contents(model), kind.scaled
    CALLS[call](model)
    assert contents(model) == before
    assert (kind.installed, kind.models, kind.scaled) == (False, set(), method)  # type: ignore[attr-defined]
    assert not hasattr(kind, "also_installed")
    assert torch.equal(model(images()), expected)


@pytest.mark.parametrize("kind", REPLACING)
@pytest.mark.parametrize("call", CALLS)
def test_replaced_modules_are_refused_by_their_path(kind: type[ToyViT], call: str) -> None:
    """Where one is asked for in a forward pass; the model is in either case as it was."""
    model = lazy_toy(kind)
    before = contents(model)
    refusal = f"^{REPLACING[kind]} is not there to stay: .* {kind.__name__} .*; call the model once"
    free = call in UNTRACED - ({"reconstruction"} if kind is Wrapping else set())
    with nullcontext() if free else pytest.raises(ValueError, match=refusal):
        CALLS[call](model)
    assert contents(model) == before
    fresh = lazy_toy(kind)
    outputs = []
    for each in (model, fresh):
        torch.manual_seed(2)  # layers are drawn
        outputs.append(each(images()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", REPLACING)
def test_replaced_modules_once_the_model_was_called(kind: type[ToyViT]) -> None:
    model = lazy_toy(kind)
    expected = model(images())
    with pytest.raises(ValueError, match=r"is not there to stay.* once"):
        tp_amp.compensate(lazy_toy(kind), tp_amp.PruningPlan({"blocks.1.mlp.second": [0]}), FEW)
    for call in ("inspect", "reconstruction", "plan_for_target"):
        CALLS[call](model)
    assert len(tp_amp.find_mlps(model, images(1))) == 2
    assert torch.equal(model(images()), expected)


class Lazy(ToyViT):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(5)


@pytest.mark.parametrize("call", CALLS)
def test_layers_without_a_shape_are_refused_by_name(call: str) -> None:
    if call == "measure_both":  # of which no copy can be made
        return
    model = Lazy().eval()
    with pytest.raises(ValueError, match="head has no weights yet; call the model once"):
        CALLS[call](model)
    assert isinstance(model.head.weight, nn.UninitializedParameter)
    model(images(1))
    assert len(tp_amp.find_mlps(model, images(1))) == 2


def masked_toy(model: ToyViT, keep: dict[str, list[int]], x: Tensor) -> Tensor:
    """What the model gives in its first call, with all other channels set to zero."""
    mlps = tp_amp.find_mlps(copy.deepcopy(model), images(1))
    return masked(model, mlps, keep)(x)


@pytest.mark.parametrize("kind", TOYS)
def test_cut_toys(kind: type[ToyViT], tmp_path: Path) -> None:
    """What cuts a model leaves the rest of it as it was: the first call is still to come."""
    plan = plan_of(lazy_toy(kind))
    model = lazy_toy(kind)
    tp_amp.apply_plan(model, images(1), plan)
    expected = masked_toy(lazy_toy(kind), plan.keep, images())
    tp_amp.save_pruned(model, tmp_path, plan)
    assert relative(model(images()), expected) < 1e-5
    again = lazy_toy(kind)
    tp_amp.load_pruned(again, tmp_path)
    assert relative(again(images()), expected) < 1e-5


@pytest.mark.parametrize("kind", TOYS)
def test_compensated_and_searched_toys(kind: type[ToyViT]) -> None:
    """As if the model had been called before, where that puts the same things on it."""
    results = []
    for called in (False, True):
        model = lazy_toy(kind)
        if called:
            model(FEW[0])
        tp_amp.compensate(model, plan_of(lazy_toy(kind)), FEW, progress=False)
        searched = lazy_toy(kind)
        if called:
            searched(FEW[0])
        pruner = searching(searched)
        pruner.step()
        results.append((model(FEW[0]), searched(FEW[0]), pruner.plan.keep))
    (one, two, keep), (other, another, same) = results
    assert relative(one, other) < 1e-5
    assert relative(two, another) < 1e-5
    assert keep == same


def transformers_models() -> dict[str, tuple[Callable[[], nn.Module], Tensor]]:
    """Those that read hidden states of their own, beside those of the zoo."""
    t = pytest.importorskip("transformers")
    plain = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    plain |= {"image_size": 32, "patch_size": 8}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    necks = {"neck_hidden_sizes": [4, 8, 8, 8], "fusion_hidden_size": 8}
    taps = t.Dinov2Config(**plain, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = t.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 4],
        window_size=2, out_features=stages,
    )  # fmt: skip
    found = {
        "DPT": lambda: t.DPTForDepthEstimation(
            t.DPTConfig(
                **plain, **necks, intermediate_size=64, backbone_out_indices=[0, 1, 2, 3],
                is_hybrid=False, readout_type="ignore", reassemble_factors=[4, 2, 1, 0.5],
            )
        ),
        "Segformer": lambda: t.SegformerForSemanticSegmentation(
            t.SegformerConfig(
                depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4],
                decoder_hidden_size=16,
            )
        ),
        "DepthAnything": lambda: t.DepthAnythingForDepthEstimation(
            t.DepthAnythingConfig(
                backbone_config=taps, patch_size=8, reassemble_hidden_size=32, **necks
            )
        ),
        "UperNet": lambda: t.UperNetForSemanticSegmentation(
            t.UperNetConfig(
                backbone_config=swin, hidden_size=16, num_labels=4, auxiliary_in_channels=32,
                auxiliary_channels=8,
            )
        ),
        "MAE": lambda: t.ViTMAEModel(t.ViTMAEConfig(**plain, intermediate_size=64, mask_ratio=0.0)),
        "Dinov2Backbone": lambda: t.Dinov2Backbone(
            t.Dinov2Config(**plain, out_features=["stage2", "stage4"])
        ),
        **{name: entry[0] for name, entry in hugging_face_models().items()},
    }  # fmt: skip
    return {name: (make, x) for name, make in found.items()}


def states(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and hidden states."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(pixel_values=x, output_hidden_states=True)
    held = [v if isinstance(v, tuple) else (v,) for v in output.values() if v is not None]
    return [tensor for values in held for tensor in values]


@pytest.mark.parametrize("name", transformers_models())
def test_transformers(name: str) -> None:
    make, x = transformers_models()[name]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    expected = states(copy.deepcopy(model), x)
    before, inputs = contents(model), {"pixel_values": x}
    assert tp_amp.find_mlps(model, inputs)
    tp_amp.inspect(model, inputs)
    plan = tp_amp.plan_from_importance(model, inputs, tp_amp.DIMAPImportance(), 0.5)
    tp_amp.ReconstructionImportance(objective=None).collect(model, [inputs], progress=False)
    tp_amp.measure(model, [inputs], repeats=1, progress=False)
    assert contents(model) == before
    found = states(model, x)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    pruned = make().eval()
    pruned.load_state_dict(model.state_dict())
    tp_amp.apply_plan(pruned, inputs, plan)
    hidden = masked(model, tp_amp.find_mlps(model, inputs), plan.keep)
    for one, other in zip(states(pruned, x), states(hidden, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
