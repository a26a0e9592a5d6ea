"""Folders opened by other libraries, in a process in which this package can't be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import safetensors.torch
from torch import Tensor

# A copy has memory of its own: in a file weights begin at any byte, and kernels add up in another
# order where they are not aligned.
_OPENER = """
import copy, json, sys, warnings
sys.modules.update(tp_amp=None, torch_pruning=None)
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file, save_file

def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    held = values if isinstance(output, (dict, list, tuple)) else ()
    return [tensor for value in held for tensor in tensors(value)]

def opened(folder, opener):
    if opener == "timm":
        import timm
        return timm.create_model("local-dir:" + folder, pretrained=True)
    import transformers
    return getattr(transformers, opener).from_pretrained(folder, trust_remote_code=True)

for folder, opener in json.load(sys.stdin):
    model = copy.deepcopy(opened(folder, opener)).eval()
    inputs = load_file(folder + "/inputs")
    with torch.no_grad():
        output = model(*inputs.values()) if opener == "timm" else model(**inputs)
    kept = [t for t in tensors(output) if t.dim() and t.is_floating_point()]
    output = torch.cat([tensor.flatten() for tensor in kept])
    save_file({"output": output}, folder + "/output")
"""


def outputs_elsewhere(
    folders: list[tuple[Path, str]], inputs: list[dict[str, Tensor]], place: Path
) -> list[Tensor]:
    """What the models of folders give in one other process, run in another place.

    Args:
        folders: with what opens each: `"timm"`, or a class of transformers.
        inputs: each model is called with.
        place: an empty folder.
    """
    for (folder, _), given in zip(folders, inputs, strict=True):
        safetensors.torch.save_file(given, folder / "inputs")
    environment = {**os.environ, "HF_MODULES_CACHE": str(place), "HF_HUB_OFFLINE": "1"}
    jobs = json.dumps([(str(folder), opener) for folder, opener in folders])
    command = [sys.executable, "-c", _OPENER]
    done = subprocess.run(
        command, input=jobs, cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [safetensors.torch.load_file(folder / "output")["output"] for folder, _ in folders]
