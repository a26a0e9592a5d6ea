"""The ways to eight bits, and to sixteen, that benchmarks/quantised.py compares.

A route takes a model in eval mode and batches of images without labels to calibrate on; it gives a
function of a batch of images. The model stays as it was. torchao and onnxruntime are imported where
a route needs them.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batches = Sequence[Tensor]
Call = Callable[[Tensor], Tensor]


def float32(model: nn.Module, batches: Batches) -> Call:
    return copy.deepcopy(model)


def in_dtype(dtype: torch.dtype) -> Callable[[nn.Module, Batches], Call]:
    """Weights and activations in a half precision."""

    def route(model: nn.Module, batches: Batches) -> Call:
        half = copy.deepcopy(model).to(dtype)
        return lambda images: half(images.to(dtype)).float()

    return route


def torchao_weights(model: nn.Module, batches: Batches) -> Call:
    """Weights of every Linear in int8, one scale for each row; activations stay as they are."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def torchao_dynamic(model: nn.Module, batches: Batches) -> Call:
    """Activations in int8 too, with a scale for each token, found while the model runs."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def pt2e_static(model: nn.Module, batches: Batches) -> Call:
    """The exported graph with one scale for each layer's input, as observed on the batches.

    It runs as a graph that rounds and computes in float32; `lowered` makes a program of it.
    """
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    size = torch.export.Dim("batch", min=1, max=1024)
    example = batches[0][:2]
    program = torch.export.export(model, (example,), dynamic_shapes=({0: size},))
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program.module(), quantizer)
    move_exported_model_to_eval(prepared)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    converted = convert_pt2e(prepared)
    move_exported_model_to_eval(converted)
    return converted


def onnx_file(model: nn.Module, batches: Batches, path: Path) -> None:
    """The model in ONNX, for any number of images."""
    size = torch.export.Dim("batch", min=1, max=1024)
    torch.onnx.export(
        model,
        (batches[0][:2],),
        path,
        dynamo=True,
        dynamic_shapes=({0: size},),
        external_data=False,
        verbose=False,
    )


def session(path: Path) -> Call:
    """A file of ONNX as a function of images, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    data = path.read_bytes()
    run = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = run.get_inputs()[0].name
    return lambda images: torch.from_numpy(run.run(None, {name: images.numpy()})[0])


def onnxruntime_float32(model: nn.Module, batches: Batches) -> Call:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_file(model, batches, path)
        return session(path)


def onnxruntime_dynamic(model: nn.Module, batches: Batches) -> Call:
    """Every MatMul with weights in int8, one scale for each channel; inputs as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        prepared_onnx(model, batches, source)
        quantize_dynamic(
            source,
            path,
            op_types_to_quantize=LAYERS,
            per_channel=True,
            weight_type=QuantType.QUInt8,
        )
        return session(path)


def onnxruntime_static(model: nn.Module, batches: Batches) -> Call:
    """The same with one scale for each layer's input, observed on the batches."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.left: Iterator[Any] = iter([{name: batch.numpy()} for batch in batches])

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        name = prepared_onnx(model, batches, source)
        quantize_static(
            source,
            path,
            Reader(name),
            op_types_to_quantize=LAYERS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},  # not the products inside of attentions
            weight_type=QuantType.QUInt8,
        )
        return session(path)


LAYERS = ["MatMul", "Gemm"]
# Weights are unsigned: CPUs without VNNI add two products of an unsigned and a signed number of
# eight bits into sixteen, which overflows.


def prepared_onnx(model: nn.Module, batches: Batches, path: Path) -> str:
    """The file, with its shapes written into it as onnxruntime wants; the name of its input."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.onnx"
        onnx_file(model, batches, plain)
        quant_pre_process(plain, path, skip_symbolic_shape=True)
    return str(onnx.load(path).graph.input[0].name)


ROUTES: dict[str, Callable[[nn.Module, Batches], Call]] = {
    "float32": float32,
    "float16": in_dtype(torch.float16),
    "bfloat16": in_dtype(torch.bfloat16),
    "torchao int8 weights": torchao_weights,
    "torchao dynamic int8": torchao_dynamic,
    "PT2E static int8": pt2e_static,
    "onnxruntime float32": onnxruntime_float32,
    "onnxruntime dynamic int8": onnxruntime_dynamic,
    "onnxruntime static int8": onnxruntime_static,
}


def compiled(call: Any) -> Call:
    """A route's model through inductor, weights folded into its kernels."""
    from torch._inductor import config

    torch._dynamo.reset()  # which else gives up on the eighth model of a class
    built = torch.compile(call)

    def run(images: Tensor) -> Tensor:
        with config.patch(freezing=True):
            return built(images)

    return run
