"""Models in other runtimes, against PyTorch's own outputs and counts by hand."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from toys import images, relative, toy

from tp_amp.running.inputs import Inputs
from tp_amp.running.runtimes.building import RUNTIMES, Built, build, check_runtime

exports = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.6"), reason="older ones export otherwise"
)
EXPORTED = ("onnxruntime", "openvino")
PACKAGES = ("onnx", "onnxscript")


class Attention(nn.Module):
    """Takes a dict and a flag, and gives a dict, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.unused = nn.Linear(8, 24), nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor, mask: Tensor, scaled: bool = True) -> dict[str, Tensor]:
        q, k, v = self.qkv(tokens).chunk(3, -1)
        scores = q @ k.transpose(-2, -1) * (8**-0.5 if scaled else 1.0)
        weights = scores.masked_fill(mask[:, None] == 0, -1e4).softmax(-1)
        return {"first": weights @ v, "weights": weights}


def built(model: nn.Module, inputs: Inputs, runtime: str) -> Built:
    for package in (*PACKAGES, runtime):
        pytest.importorskip(package)
    return build(model, inputs, runtime)


def outputs(found: Any) -> list[Tensor]:
    values = found.values() if isinstance(found, dict) else found
    values = [values] if isinstance(values, Tensor) else values
    return [torch.as_tensor(value) for value in values]


@exports
@pytest.mark.parametrize("runtime", EXPORTED)
@torch.no_grad()
def test_outputs_are_the_models_own_and_stay_so(runtime: str) -> None:
    model = toy(hidden=7).eval()
    x, other = images(3), images(3, seed=5)
    made = built(model, Inputs((x,)), runtime)
    assert made.exported is not None
    assert made.exported().parameters == sum(p.numel() for p in model.parameters())
    expected = [model(x), model(other)]
    for parameter in model.parameters():
        parameter.zero_()
    for given, wanted in zip((x, other), expected, strict=True):
        [found] = outputs(Inputs((given,)).call(made.run))
        assert relative(found, wanted) < 1e-5


@exports
@pytest.mark.parametrize("runtime", EXPORTED)
@torch.no_grad()
def test_dicts_flags_and_several_outputs(runtime: str) -> None:
    model = Attention().eval()
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    inputs = Inputs(kwargs={"tokens": images(2)[:, 0, :3, :8], "mask": mask, "scaled": False})
    made = built(model, inputs, runtime)
    for found, expected in zip(
        outputs(inputs.call(made.run)), inputs.call(model).values(), strict=True
    ):
        assert relative(found, expected) < 1e-5
    assert made.exported is not None
    counts = made.exported()
    assert (counts.attentions, counts.fused) == (1, 0)
    assert counts.parameters - 8 * 24 - 24 in (0, 3)  # what is not used may be left out


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles C++")
def test_more_models_are_compiled_than_pytorch_takes_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = []
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 2)
    for i in range(3):
        model = toy(depth=1, hidden=3 + i).eval()
        runs.append((model, build(model, Inputs((images(2),)), "compile").run))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for model, run in runs:
        assert relative(run(images(2)), model(images(2))) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before >= 3


def test_pytorch_itself_runs_the_model() -> None:
    model = toy()
    assert build(model, Inputs((images(1),)), "eager") == Built(model)


@pytest.mark.parametrize(("runtime", "extra"), [("onnxruntime", "export"), ("openvino",) * 2])
def test_without_the_extra_its_name_is_told(
    monkeypatch: pytest.MonkeyPatch, runtime: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(
        ImportError, match=rf"install tp-amp\[{extra}\] \(.*{runtime}\) for runtime"
    ):
        check_runtime(runtime)
    check_runtime("compile")


def test_what_no_runtime_takes_raises() -> None:
    with pytest.raises(ValueError, match=r"runtime must be one of \('eager', .* found 'tensorrt'"):
        check_runtime("tensorrt")
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=r"is float64, and runtime='onnxruntime' .* model.float()"):
        check_runtime("onnxruntime", toy().double())
    with pytest.raises(ValueError, match=r"is on meta, and runtime='onnxruntime' runs on the CPU"):
        check_runtime("onnxruntime", toy().to("meta"))
    assert set(RUNTIMES) == {"eager", "compile", *EXPORTED}


@exports
def test_a_model_that_a_runtime_fails_on_raises() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("odd")

    with pytest.raises(ValueError, match=r"Odd can't be built for runtime='onnxruntime': "):
        built(Odd(), Inputs((torch.ones(3),)), "onnxruntime")
