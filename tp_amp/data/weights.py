"""A model's weights from a file, without running code that is in it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


def load_weights(model: nn.Module, path: str) -> None:
    """Load weights from a file into a model, all of them and nothing else.

    Args:
        model: of the architecture that the weights are for.
        path: of safetensors, or of a state dict that `torch.load` reads with `weights_only=True`,
            plain or under the key `state_dict` or `model`; of a CLIP model, its image tower is
            taken.

    Raises:
        ValueError: the file is missing, damaged, holds other than tensors, or does not fit; the
            model is as it was.
    """
    from timm.models import load_state_dict

    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}; --weights takes a .safetensors or .pt file")
    try:
        state = load_state_dict(path, use_ema=False, weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds other than tensors")
    # torch.load fails in many ways on bytes that are no checkpoint.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} can't be read as weights ({reason}); pass tensors alone, best as .safetensors"
        ) from error
    own = model.state_dict()
    visual = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    if visual and not any(key.startswith("visual.") for key in own):
        state = visual
    wrong = {
        "missing": [key for key in own if key not in state],
        "unknown": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            for key in own
            if key in state and own[key].shape != state[key].shape
        ],
    }
    found = [f"{len(keys)} {what} ({', '.join(keys[:2])})" for what, keys in wrong.items() if keys]
    if found:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(found)}; check the model's "
            "name and --model-args (num_classes, img_size)"
        )
    with torch.no_grad():
        model.load_state_dict(state)
