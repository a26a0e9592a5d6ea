"""Pruned models through torch.export, ONNX, torch.compile and torch.jit, copied and pickled."""

from __future__ import annotations

import copy
import io
import math
import pickle
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from toys import images, perturbed, relative
from zoo import SHORT, TIMM, hugging_face_models, open_clip_models, torchvision_models
from zoo_checks import run

import tp_amp
from tp_amp.structure.attention import adapted_class
from tp_amp.structure.attention.adapting import adapt
from tp_amp.structure.attention.head_forward import HeadForward
from tp_amp.structure.attention.multihead_forward import MultiheadForward
from tp_amp.structure.attention.window_forward import ShiftedWindowForward

OLD = Version(torch.__version__) < Version("2.5")
takes_new_classes = pytest.mark.skipif(
    OLD, reason="torch 2.4 exports and compiles no classes made at run time"
)

TOLERANCE = 1e-4
# Model -> the class whose forward pass the attentions run once they have lost heads.
FORWARDS: dict[str, type[nn.Module] | None] = {
    "vit": None,
    "swin": None,
    "swinv2": HeadForward,
    "beit": HeadForward,
    "vit_rope_mixed": HeadForward,
    "open_clip": MultiheadForward,
    "open_clip_full": MultiheadForward,
    "torchvision_swin": ShiftedWindowForward,
    "torchvision_swinv2": ShiftedWindowForward,
    "hf_vit": None,
    "hf_swin": None,
    "hf_clip": None,
}
# One of each forward pass and each library.
FEWER = ["vit", "swin", "swinv2", "vit_rope_mixed", "open_clip", "torchvision_swin", "hf_vit"]
# What packages say of their own doing while a model is traced or exported.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::UserWarning:{package}")
    for package in ("timm", "transformers", "open_clip", "torch", "onnxscript", "copyreg")
]


def dense(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    others = [open_clip_models(), torchvision_models(), hugging_face_models(), {**TIMM, **SHORT}]
    make, inputs, _ = {key: value for family in others for key, value in family.items()}[name]
    return perturbed(make()), inputs


def batch(inputs: Any, count: int, seed: int = 0) -> Any:
    """As many different images, and texts, as asked for."""
    if isinstance(inputs, dict):
        return {key: batch(value, count, seed) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(batch(value, count, seed) for value in inputs)
    if not inputs.is_floating_point():
        return torch.cat([inputs.roll(i + seed, -1) for i in range(count)])
    return images(count, seed, inputs.shape[-1], inputs.shape[1])


@cache
def pruned(name: str, compensated: bool = False) -> tuple[nn.Module, Any]:
    """A model without every second hidden channel and without one head of each attention.

    Made once for all tests: none of them changes it.
    """
    model, inputs = dense(name)
    mlps = tp_amp.find_mlps(model, inputs)
    keep = {mlp.down: list(range(0, mlp.width, 2)) for mlp in mlps}
    found = tp_amp.find_attentions(model, inputs)
    keep |= {a.down: [head for head in range(a.width) if head != 1] for a in found}
    plan = tp_amp.PruningPlan(keep)
    if compensated:
        tp_amp.compensate(model, plan, [batch(inputs, 4)], progress=False)
    else:
        tp_amp.apply_plan(model, inputs, plan)
    adapted = [type(m).__mro__ for m in model.modules() if "head_cut" in vars(m)]
    if not OLD:  # timm 1.0.17 and transformers 4.57 need help where newer ones don't
        forward = FORWARDS[name]
        assert bool(adapted) == (forward is not None)
        assert all(forward in classes for classes in adapted)
    one, other = (run(model, batch(inputs, 1, seed)) for seed in (1, 2))
    assert relative(one, other) > 0.01, "agreement on such a model would say nothing"
    return model.eval(), inputs


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return inputs if isinstance(inputs, tuple) else (inputs,), {}


def dynamic(inputs: Any) -> Any:
    """Any number of images, the same for all inputs."""
    size = {0: torch.export.Dim("batch")}
    if isinstance(inputs, dict):
        return dict.fromkeys(inputs, size)
    return (size,) * len(arguments(inputs)[0])


@torch.no_grad()
def check(candidate: Callable[..., Any], model: nn.Module, inputs: Any) -> None:
    """Outputs for one image and for five are the model's."""
    for count in (1, 5):
        given = batch(inputs, count)
        found, expected = run(candidate, given), run(model, given)
        # onnxruntime gives a lone output as a tuple, which comes flat.
        assert relative(found.flatten(), expected.flatten()) < TOLERANCE


@torch.no_grad()
def exported(model: nn.Module, inputs: Any) -> torch.export.ExportedProgram:
    """The program for any number of images; two are its example, since one would be fixed."""
    two = batch(inputs, 2)
    return torch.export.export(model, *arguments(two), dynamic_shapes=dynamic(two))


@cache
def exported_once(name: str) -> torch.export.ExportedProgram:
    return exported(*pruned(name))


@torch.no_grad()
def onnx_file(model: nn.Module, inputs: Any) -> Any:
    """The model in ONNX for any number of images."""
    pytest.importorskip("onnxscript")
    two = batch(inputs, 2)
    args, kwargs = arguments(two)
    program = torch.onnx.export(
        model, args, kwargs=kwargs, dynamo=True, dynamic_shapes=dynamic(two), verbose=False
    )
    assert program is not None
    return program.model_proto


@cache
def onnx_file_once(name: str) -> Any:
    """Of the program that was exported; torch makes the same one from a model first."""
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(exported_once(name), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto


def onnx_session(file: Any) -> Callable[..., tuple[Tensor, ...]]:
    """A file in ONNX, run by onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(file.SerializeToString())
    names = [entry.name for entry in session.get_inputs()]

    def call(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        values = [value.numpy() for value in (*args, *kwargs.values())]
        outputs = session.run(None, dict(zip(names, values, strict=True)))
        return tuple(map(torch.from_numpy, outputs))

    return call


@takes_new_classes
@pytest.mark.parametrize("name", FORWARDS)
def test_export(name: str) -> None:
    model, inputs = pruned(name)
    check(exported_once(name).module(), model, inputs)


@takes_new_classes
@pytest.mark.parametrize("name", FEWER)
def test_onnx(name: str) -> None:
    model, inputs = pruned(name)
    check(onnx_session(onnx_file_once(name)), model, inputs)


@takes_new_classes
@pytest.mark.parametrize("name", ["vit", "hf_vit"])
def test_onnx_files_hold_as_much_less_as_the_model(name: str) -> None:
    def numbers(file: Any, model: nn.Module) -> tuple[int, int]:
        written = sum(math.prod(t.dims) for t in file.graph.initializer)
        return written, sum(p.numel() for p in model.parameters())

    (model, inputs), unpruned = pruned(name), dense(name)[0].eval()
    written, held = numbers(onnx_file_once(name), model)
    before, whole = numbers(onnx_file(unpruned, inputs), unpruned)
    assert before - written == whole - held > 0


@takes_new_classes
@pytest.mark.parametrize("name", ["vit", "swin", "open_clip"])
def test_compensated_models(name: str) -> None:
    model, inputs = pruned(name, compensated=True)
    check(exported(model, inputs).module(), model, inputs)
    check(onnx_session(onnx_file(model, inputs)), model, inputs)


def gradient(model: nn.Module, output: Tensor) -> Tensor:
    """Of all parameters, in a row; zeros for one that is not used."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(output.square().sum(), parameters, materialize_grads=True)
    return torch.cat([tensor.flatten() for tensor in found])


@takes_new_classes
@pytest.mark.parametrize("name", FEWER)
def test_compile(name: str) -> None:
    """One graph without breaks, forward and backward, for all batch sizes."""
    model, inputs = pruned(name)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (2, 5):
            given = batch(inputs, count)
            args, kwargs = arguments(given)
            for tensor in (*args, *kwargs.values()):
                # Images of another size would be another graph, and a large one.
                torch._dynamo.mark_dynamic(tensor, 0)
            expected, found = run(model, given), run(compiled, given)
            assert relative(found, expected) < TOLERANCE
            assert relative(gradient(twin, found), gradient(model, expected)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="inductor compiles C++")
def test_inductor() -> None:
    model, inputs = pruned("vit")
    torch._dynamo.reset()
    check(torch.compile(model, fullgraph=True), model, inputs)


@pytest.mark.parametrize("name", FORWARDS)
def test_jit_trace(name: str) -> None:
    """TorchScript is frozen in PyTorch, and still what many deployments take."""
    model, inputs = pruned(name)
    args, kwargs = arguments(batch(inputs, 2))
    given: dict[str, Any] = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
    with warnings.catch_warnings():
        # Shapes that models check in Python become constants, and jit says so of each.
        warnings.simplefilter("ignore")
        check(torch.jit.trace(model, strict=False, **given), model, inputs)


@pytest.mark.parametrize("name", FORWARDS)
def test_copies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied, and pickled for a process that has not met the adapted classes."""
    model, inputs = pruned(name)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    data = pickle.dumps(model)
    check(copy.deepcopy(model), model, inputs)
    monkeypatch.setattr(adapted_class, "_CLASSES", {})
    for again in (pickle.loads(data), torch.load(file, weights_only=False)):
        check(again, model, inputs)
        cut = {path for path, module in model.named_modules() if "head_cut" in vars(module)}
        assert cut == {path for path, module in again.named_modules() if "head_cut" in vars(module)}


@takes_new_classes
def test_masks_for_each_head_leave_the_batch_size_open() -> None:
    torch.manual_seed(0)
    attention = perturbed(nn.MultiheadAttention(16, 4, batch_first=True))
    adapted = copy.deepcopy(attention)
    adapt(adapted, "multihead")

    def given(count: int) -> dict[str, Any]:
        x = images(1, 0, 16, count)[0, :, :6]
        mask = images(1, 1, 6, 4 * count)[0]
        return {"query": x, "key": x, "value": x, "need_weights": False, "attn_mask": mask}

    size = torch.export.Dim("batch")
    shapes = {key: {0: size} for key in ("query", "key", "value")}
    program = torch.export.export(
        adapted,
        (),
        given(2),
        dynamic_shapes={**shapes, "need_weights": None, "attn_mask": {0: 4 * size}},
    )
    with torch.no_grad():
        found, _ = program.module()(**given(5))
        expected, _ = attention(**given(5))
    assert relative(found, expected) < TOLERANCE
