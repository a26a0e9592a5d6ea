"""Pruned models, with heads cut and odd widths, quantised by other packages, and trained for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import quantising
import torch
from quantising import ROUTES
from test_export import takes_new_classes
from torch import Tensor, nn
from toys import images, perturbed, relative
from zoo import SHORT, TIMM, hugging_face_models

import tp_amp

# Relative error of the outputs that rounding to 8 bits, or to bfloat16, may cause.
TOLERANCE = 0.1
MODELS = ("vit", "swin", "hf_clip")
pytestmark = [
    takes_new_classes,
    *(
        pytest.mark.filterwarnings(f"ignore::UserWarning:{package}")
        for package in ("timm", "transformers", "torch", "torchao", "onnxscript", "copyreg")
    ),
]


class Pooled(nn.Module):
    """The one tensor of an output, since quantisers read a function of a tensor to a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output: Any = self.model(images)
        return output if isinstance(output, Tensor) else output.pooler_output


def dense(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    entries = {
        "vit": TIMM["vit"],
        "swin": SHORT["swin"],
        "hf_clip": hugging_face_models()["hf_clip"],
    }
    make, inputs, _ = entries[name]
    example = inputs["pixel_values"] if isinstance(inputs, dict) else inputs
    return Pooled(perturbed(make(), scale=0.1)).eval(), example


@cache
def pruned(name: str) -> tuple[nn.Module, Tensor]:
    """A model whose MLPs keep an odd number of channels and whose attentions lack a head."""
    model, example = dense(name)
    keep = {m.down: list(range(m.width // 2 + 3)) for m in tp_amp.find_mlps(model, example)}
    heads = tp_amp.find_attentions(model, example)
    assert heads
    keep |= {a.down: [head for head in range(a.width) if head != 1] for a in heads if a.width > 1}
    tp_amp.apply_plan(model, example, tp_amp.PruningPlan(keep))
    return model, example


def batches(example: Tensor, count: int = 2) -> list[Tensor]:
    return [images(4, seed, example.shape[-1], 3) for seed in range(count)]


@pytest.fixture(scope="module", autouse=True)
def exported_once() -> Iterator[None]:
    """The three routes through ONNX begin with the same file, which is written once a model."""
    write, files = quantising.onnx_file, {}

    def written(model: nn.Module, batches: list[Tensor], path: Path) -> None:
        if model not in files:
            write(model, batches, path)
            files[model] = path.read_bytes()
        path.write_bytes(files[model])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantising, "onnx_file", written)
        yield


QUICK = [("hf_clip", "onnxruntime dynamic int8")]  # of those that export


def case(name: str, route: str) -> Any:
    exports = "onnx" in route or "PT2E" in route
    slow = exports and (name, route) not in QUICK
    return pytest.param(name, route, marks=pytest.mark.slow if slow else ())


CASES = [case(name, route) for name in MODELS for route in ROUTES]


@pytest.mark.parametrize(("name", "route"), CASES)
def test_outputs_stay_near(name: str, route: str) -> None:
    pytest.importorskip("onnxruntime" if route.startswith("onnx") else "torchao")
    model, example = pruned(name)
    before = copy.deepcopy(model.state_dict())
    given = batches(example)
    with torch.no_grad():
        expected = model(given[0])
        found = ROUTES[route](model, given)(given[0])
    assert relative(found, expected) < TOLERANCE
    assert relative(expected, expected.roll(1, 0)) > 2 * TOLERANCE, "all images alike: no test"
    if "int8" in route:
        assert not torch.equal(found, expected), "nothing was quantised"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_training_with_quantisation(name: str) -> None:
    """Ten steps against the float model's outputs bring the rounded model nearer to them."""
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    model, example = copy.deepcopy(pruned(name))
    [given] = batches(example, 1)
    with torch.no_grad():
        target = model(given)
    weights = qat.IntxFakeQuantizeConfig(torch.int4, "per_channel")
    inputs = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    config = qat.QATConfig(activation_config=inputs, weight_config=weights)
    quantization.quantize_(model, config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    losses = []
    for _ in range(10):
        loss = (model(given) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert 0 < losses[-1] < 0.8 * losses[0]
