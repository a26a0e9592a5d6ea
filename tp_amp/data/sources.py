"""Models by name for the command line: timm, open_clip, Hugging Face or a folder of ours."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tp_amp.data.hugging_face import (
    fetch_hugging_face,
    image_processor,
    load_hugging_face,
    picture_mode,
    processor_transform,
)
from tp_amp.data.loaded import Loaded, built, fetched
from tp_amp.data.weights import load_weights
from tp_amp.plan.file_names import PLAN, SOURCE
from tp_amp.plan.hub import local_folder
from tp_amp.plan.loading import create_model
from tp_amp.plan.pruning_plan import PruningPlan

KINDS = "timm:NAME, open_clip:NAME, hf:NAME or a folder that tp-amp prune made"
_PREFIXES = ("timm", "open_clip", "hf")
# What decides how open_clip prepares an image, and goes with the weights.
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


def load(
    spec: str,
    *,
    arguments: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    weights: str | None = None,
) -> Loaded:
    """Build the model that a name stands for.

    Args:
        spec: `timm:NAME`, `open_clip:NAME` or `open_clip:NAME/TAG`, `hf:NAME` (or a folder with a
            config.json), or a folder that `save_pruned` wrote with `library` and `name`.
        arguments: for the model's constructor; of the configuration for `hf:`.
        pretrained: load the library's own weights, which may fetch them.
        weights: file with weights: safetensors, or a state dict that `torch.load` reads without
            running code.

    Raises:
        ValueError: there is no such model, or weights don't fit.
        ImportError: the library is not installed.
    """
    if pretrained and weights:
        raise ValueError("--pretrained and --weights both give weights; pass one of them")
    library, _, name = spec.partition(":")
    if library not in _PREFIXES:
        return _saved(spec, arguments or pretrained or weights)
    make = {"timm": _timm, "open_clip": _open_clip, "hf": load_hugging_face}[library]
    loaded = make(name, dict(arguments or {}), pretrained)
    if weights:
        load_weights(loaded.model, weights)
    return loaded


def load_teacher(
    folder: Path, *, origin: str | None = None, pretrained: bool = False, weights: str | None = None
) -> nn.Module:
    """Build the dense model that a saved folder was cut from, with trained weights.

    Args:
        folder: that `save_pruned` wrote with `library` and `name`.
        origin: the model as it was named when it was cut, where the library's weights go by more
            than the architecture (open_clip's tag, the hub's name).
        pretrained: load the library's own weights, which may fetch them.
        weights: file with the dense model's weights, as for `load`.

    Raises:
        ValueError: not one source of weights is given, they are not known, or don't fit.
        ImportError: the library is not installed.
    """
    if pretrained and weights:
        raise ValueError("--pretrained and --weights both give weights; pass one of them")
    if not (pretrained or weights):
        raise ValueError(
            "a teacher with random weights teaches nothing; pass --pretrained, or --weights FILE "
            "of the dense model"
        )
    source = json.loads((folder / SOURCE).read_text())
    library, name = source["library"], source["name"]
    if weights:
        teacher = built(str(folder), source)
        load_weights(teacher, weights)
        return teacher
    spec = f"timm:{name}" if library == "timm" else origin or ""
    prefix = "hf" if library == "transformers" else library
    if not spec.startswith(f"{prefix}:"):
        raise ValueError(
            f"{folder} does not say which of {library}'s weights {name} had; pass --weights FILE "
            "of the dense model"
        )
    if library == "transformers":
        found = fetch_hugging_face(spec.removeprefix("hf:"), name, source["config"])
        return found  # type: ignore[no-any-return]
    return load(spec, arguments=source["arguments"], pretrained=True).model


def _saved(spec: str, further: Any) -> Loaded:
    folder = local_folder(spec)
    if not (folder / SOURCE).is_file():
        raise ValueError(f"{spec} {_what_is_wrong(spec, folder)}; a model is {KINDS}")
    if further:
        raise ValueError(
            f"{spec} is a saved model with its own weights and architecture; leave out "
            "--pretrained, --weights and --model-args"
        )
    model = create_model(folder)
    source = json.loads((folder / SOURCE).read_text())
    plan = PruningPlan.from_json((folder / PLAN).read_text())
    library, name, arguments = source["library"], source["name"], source["arguments"]
    if library == "timm":
        return Loaded(model, library, name, arguments, *_timm_transform(model, arguments), plan)
    if library == "open_clip":
        return Loaded(model, library, name, arguments, _open_clip_transform(model), plan=plan)
    processor = image_processor(str(folder), model.config, {})
    transform, mode = processor_transform(processor), picture_mode(model.config)
    return Loaded(model, library, name, arguments, transform, mode, plan, processor)


def _what_is_wrong(spec: str, folder: Path) -> str:
    if folder.is_dir():
        also = "; for a folder of transformers write hf:" + spec
        return f"holds no {SOURCE}" + (also if (folder / "config.json").is_file() else "")
    library, colon, _ = spec.partition(":")
    if colon and len(library) > 1:
        return f"names the library {library!r}, which is not known"
    import timm

    if timm.is_model(spec):
        return f"is no folder; did you mean timm:{spec}?"
    return "is no folder and names no library"


def _timm(name: str, arguments: dict[str, Any], pretrained: bool) -> Loaded:
    import timm

    remote = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not remote and not timm.is_model(name):
        raise ValueError(_unknown("timm", name, timm.list_models()))
    source = {"library": "timm", "name": name, "arguments": arguments, "config": None}
    if pretrained:
        model = fetched(
            f"timm:{name}", lambda: timm.create_model(name, **{**arguments, "pretrained": True})
        )
    else:
        model = built(f"timm:{name}", source)
    return Loaded(model, "timm", name, arguments, *_timm_transform(model, arguments))


def _timm_transform(model: Any, arguments: Mapping[str, Any]) -> tuple[Any, str]:
    from timm.data import create_transform, resolve_data_config

    channels = int(arguments.get("in_chans", 3))
    wanted: dict[str, Any] = {"in_chans": channels}
    size = arguments.get("img_size")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        wanted = {"input_size": (channels, height, width)}
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, in_chans={channels} is neither")
    config = resolve_data_config(wanted, model=model)
    if channels == 1:
        config |= {key: (sum(config[key]) / len(config[key]),) for key in ("mean", "std")}
    return create_transform(**config, is_training=False), "L" if channels == 1 else "RGB"


def _open_clip(name: str, arguments: dict[str, Any], pretrained: bool) -> Loaded:
    import open_clip

    name, _, tag = name.partition("/")
    if name not in open_clip.list_models():
        raise ValueError(_unknown("open_clip", name, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in (tags if tag or pretrained else ("",)):
        has = f"one of {', '.join(tags)}" if tags else "none at all; pass --weights FILE"
        raise ValueError(
            f"open_clip:{name} has no weights {tag!r}: write open_clip:{name}/TAG, where TAG is "
            f"{has}"
        )
    config = open_clip.get_pretrained_cfg(name, tag) or {}
    preprocess = {key: config[key] for key in _PREPROCESS if key in config}
    if preprocess:
        arguments = {"force_preprocess_cfg": preprocess, **arguments}
    source = {"library": "open_clip", "name": name, "arguments": arguments, "config": None}
    if pretrained:
        given = {**arguments, "pretrained": tag}
        model = fetched(
            f"open_clip:{name}/{tag}", lambda: open_clip.create_model(name, **given).visual
        )
    else:
        model = built(f"open_clip:{name}", source)
    return Loaded(model, "open_clip", name, arguments, _open_clip_transform(model))


def _open_clip_transform(model: Any) -> Any:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**model.preprocess_cfg), is_train=False)


def _unknown(library: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.split(".")[0], known, 3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"see {library}.list_models()"
    return f"{library} has no model {name!r}; {hint}"
