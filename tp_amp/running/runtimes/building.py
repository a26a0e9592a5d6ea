"""Runtimes that a model may be timed in: PyTorch, torch.compile, onnxruntime, OpenVINO."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tp_amp.running.inputs import Inputs, runner
from tp_amp.running.runtimes.onnx_export import Exported, counted, export, softmaxes_left

EAGER, COMPILE, ONNXRUNTIME, OPENVINO = RUNTIMES = ("eager", "compile", "onnxruntime", "openvino")
# Runtime -> the extra that installs it, and what of it is imported.
_EXTRAS = {
    ONNXRUNTIME: ("export", ("onnx", "onnxscript", "onnxruntime")),
    OPENVINO: ("openvino", ("onnx", "onnxscript", "openvino")),
}
# Each model that is compiled counts as another of its class; after a few, PyTorch gives up.
_MANY = 4096


@dataclass(frozen=True)
class Built:
    """A model in a runtime.

    Attributes:
        run: called as the model is, it runs one batch of the shapes it was built for.
        exported: counts what the exported graph holds; None where there is none.
    """

    run: Callable[..., Any]
    exported: Callable[[], Exported] | None = None


def check_runtime(runtime: Any, model: nn.Module | None = None) -> None:
    """Check that a runtime is known and installed, and that it takes a model.

    Raises:
        ValueError: there is none of that name, or it can't run the model where it is.
        ImportError: its extra is not installed.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {RUNTIMES}, found {runtime!r}")
    if runtime not in _EXTRAS:
        return
    extra, packages = _EXTRAS[runtime]
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"install tp-amp[{extra}] ({', '.join(missing)}) for runtime={runtime!r}")
    for name, parameter in [] if model is None else model.named_parameters():
        if parameter.device.type != "cpu":
            raise ValueError(
                f"{name} is on {parameter.device}, and runtime={runtime!r} runs on the CPU here; "
                'move the model there with model.to("cpu")'
            )
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} is {kind}, and runtime={runtime!r} takes models in float32 here; pass "
                "model.float()"
            )


@torch.no_grad()
def build(
    model: nn.Module, inputs: Inputs, runtime: str, forward_fn: Callable[..., Any] | None = None
) -> Built:
    """Build a model for one runtime and the shapes of some inputs, with PyTorch's threads.

    What is built keeps running as the model is now, whatever is done to it afterwards; in PyTorch
    itself it is the model.

    Args:
        model: in eval mode.
        inputs: of the batch size that shall be run.
        runtime: one of `RUNTIMES`, checked by `check_runtime`.
        forward_fn: as Torch-Pruning's, if the model is not called itself.

    Raises:
        ValueError: the runtime fails on the model.
    """
    if runtime == EAGER:
        return Built(runner(model, forward_fn))
    makers = {COMPILE: _compiled, ONNXRUNTIME: _in_onnxruntime, OPENVINO: _in_openvino}
    try:
        with warnings.catch_warnings():
            # Exporters and compilers warn of what they do themselves.
            warnings.simplefilter("ignore")
            return makers[runtime](copy.deepcopy(model), inputs, forward_fn)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{type(model).__name__} can't be built for runtime={runtime!r}: {lines[0]}; "
            "runtime='eager' runs every model"
        ) from error


def _compiled(model: nn.Module, inputs: Inputs, forward_fn: Callable[..., Any] | None) -> Built:
    compiled: Any = torch.compile(model, dynamic=False)
    run = runner(compiled, forward_fn)
    with torch._dynamo.config.patch(cache_size_limit=_MANY):
        inputs.call(run)
    return Built(run)


def _in_onnxruntime(
    model: nn.Module, inputs: Inputs, forward_fn: Callable[..., Any] | None
) -> Built:
    import onnxruntime

    file = export(model, inputs, forward_fn)
    content = file.SerializeToString()

    def session(**further: Any) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        for name, value in further.items():
            setattr(options, name, value)
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])

    opened = session()
    names = [entry.name for entry in opened.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> Any:
        return opened.run(None, dict(zip(names, _arrays(args, kwargs), strict=True)))

    def exported() -> Exported:
        left = softmaxes_left(lambda path: session(optimized_model_filepath=path))
        return counted(file, model, left)

    return Built(run, exported)


def _in_openvino(model: nn.Module, inputs: Inputs, forward_fn: Callable[..., Any] | None) -> Built:
    import openvino

    file = export(model, inputs, forward_fn)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Else it computes in bfloat16 where the processor can.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(file.SerializeToString()), "CPU", settings)
    request = compiled.create_infer_request()

    def run(*args: Any, **kwargs: Any) -> Any:
        found = request.infer(_arrays(args, kwargs))
        return [found[output] for output in compiled.outputs]

    def exported() -> Exported:
        kinds = (op.get_rt_info()["layerType"] for op in compiled.get_runtime_model().get_ops())
        left = sum(kind.astype(str) == "Softmax" for kind in kinds)
        return counted(file, model, left)

    return Built(run, exported)


def _arrays(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The tensors among some arguments, as the runtimes take them."""
    leaves = tree_leaves((args, kwargs))
    return [leaf.detach().numpy() for leaf in leaves if isinstance(leaf, Tensor)]
