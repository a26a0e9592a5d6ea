"""The dense model that a saved folder was cut from, built again with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_amp.running.restoring import seeded


def build_dense(source: dict[str, Any], folder: Any) -> nn.Module:
    """Build the dense model that a source.json names, with random weights.

    Raises:
        ValueError: it names no library that is known here.
        ImportError: the library is not installed.
    """
    library, name, arguments = source["library"], source["name"], source["arguments"]
    if library == "timm":
        import timm

        return timm.create_model(name, **{**arguments, "pretrained": False})  # type: ignore[no-any-return]
    if library == "open_clip":
        import open_clip

        # Or the text tower's weights are fetched, of which nothing is used. It moves the model to
        # a device that it is told, which fails on the meta device unless it is told that one.
        device = torch.get_default_device()
        arguments = {"pretrained_text": False, "device": device, **arguments, "pretrained": None}
        return open_clip.create_model(name, **arguments).visual  # type: ignore[no-any-return]
    if library == "transformers":
        try:
            import transformers
        except ImportError as error:
            raise ImportError("install tp-amp[huggingface] for models of transformers") from error
        kind = getattr(transformers, name)
        config = kind.config_class.from_dict(source["config"])
        if source.get("attention"):
            config._attn_implementation = source["attention"]
        return kind(config)  # type: ignore[no-any-return]
    raise ValueError(
        f"{folder} does not say where its model came from; build the dense model and use "
        "load_pruned, or save it again with library= and name="
    )


def dense_sizes(source: dict[str, Any]) -> nn.Module:
    """The dense model for its sizes alone: on the meta device, where it can be built there.

    Random state is given back.

    Raises:
        ValueError or ImportError: as `build_dense`.
    """
    try:
        with torch.device("meta"):
            return build_dense(source, "the model")
    except (RuntimeError, NotImplementedError):  # a constructor that asks for values
        with seeded(0):
            return build_dense(source, "the model")
