"""What makes a saved folder one that transformers opens by itself, with remote code allowed."""

from __future__ import annotations

import json
import logging
from typing import Any

from torch import nn

from tp_amp.sharing.generated_code import FORMS, modelling_file
from tp_amp.sharing.recorded_sizes import recorded_sizes

logger = logging.getLogger(__name__)

CODE = "modeling_pruned"
_RECORD = "pruned_layers"
_ATTENTION = "dense_attention"


def class_name(model: nn.Module) -> str:
    """The class of transformers that a model is of, whatever a pruned one adds to it.

    Raises:
        ValueError: it is of none, or of one's own.
    """
    own = type(model)
    for kind in own.__mro__:
        if kind.__module__.startswith("transformers.models.") and hasattr(kind, "config_class"):
            # Code of a folder of `save_pruned` adds the cut alone.
            if kind is own or own.__module__.startswith("transformers_modules."):
                return kind.__name__
            raise ValueError(
                f"{own.__name__} is a class of your own, of which no folder can be built; pass "
                f'name="{kind.__name__}" if it does nothing else than its parent'
            )
    raise ValueError(
        f"{own.__name__} is no model of transformers; pass the library that it is from"
    )


def dense_config(model: nn.Module, name: str) -> dict[str, Any]:
    """The configuration that builds the dense model."""
    import transformers

    config: Any = model.config
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    _forget_places(values)
    values.pop(_ATTENTION, None)
    if values.pop(_RECORD, None) is not None:
        values.pop("auto_map", None)
        values["model_type"] = getattr(transformers, name).config_class.model_type
        values["architectures"] = [name]
    return values


def _forget_places(values: dict[str, Any]) -> None:
    """Take out where models were loaded from, a path of the user's maybe, as transformers does."""
    values.pop("_name_or_path", None)
    for part in values.values():
        if isinstance(part, dict):
            _forget_places(part)


def dense_attention(model: nn.Module) -> str | None:
    """Whether a model runs its attentions in plain steps, which configurations do not say.

    Other ways are the library's own choice where the model is built, or need what may not be there.
    """
    # A model may run its own attentions in plain steps and those of its backbone in others.
    config: Any = model.config
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_diff_dict"))]
    ways = {getattr(part, "_attn_implementation", None) for part in parts}
    return "eager" if ways == {"eager"} else None


def transformers_files(
    model: nn.Module, source: dict[str, Any], dense: nn.Module
) -> tuple[dict[str, str], str]:
    """The texts of config.json and of the modelling file, by name, and the class that opens them.

    Args:
        model: pruned.
        source: as in source.json.
        dense: the model that it builds, on the meta device or not.

    Raises:
        ValueError: the model differs from what its configuration builds by more than a cut.
    """
    import transformers

    layers = recorded_sizes(dense, model)
    if source["other_dtypes"]:
        logger.warning(
            "transformers opens the folder in %s alone, and %d tensors of the model are in another "
            "dtype; tp_amp.create_model keeps each",
            *(source["dtype"], len(source["other_dtypes"])),
        )
    kind = getattr(transformers, source["name"])
    names = {
        "pruned": f"Pruned{kind.__name__}",
        "config": f"Pruned{kind.config_class.__name__}",
        "model_type": f"pruned_{kind.config_class.model_type}",
    }
    openers = _auto_classes(kind)
    config = {
        **source["config"],
        "model_type": names["model_type"],
        "architectures": [names["pruned"]],
        "auto_map": {
            "AutoConfig": f"{CODE}.{names['config']}",
            **dict.fromkeys(openers, f"{CODE}.{names['pruned']}"),
        },
        "dtype": source["dtype"],
        _ATTENTION: source["attention"],
        _RECORD: layers,
    }
    used = [form for form in FORMS if any(form in record for record in layers.values())]
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        f"{CODE}.py": modelling_file(kind, names, used),
    }
    return texts, openers[-1]


def image_processor(processor: Any, model: nn.Module) -> Any:
    """What prepares images: as given, or of the checkpoint the model is from, if it is here.

    Nothing is fetched.

    Raises:
        TypeError: what is given is none.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    if processor is not None and not isinstance(processor, ImageProcessingMixin):
        part = getattr(processor, "image_processor", None)
        remedy = "; pass its image_processor, and save the rest yourself" if part else ""
        raise TypeError(
            "processor must be an image processor of transformers, found a "
            f"{type(processor).__name__}{remedy}"
        )
    if processor is None and (origin := getattr(model.config, "_name_or_path", "")):
        from transformers import AutoImageProcessor

        load: Any = AutoImageProcessor.from_pretrained
        try:
            processor = load(origin, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            logger.info("%s has no image processor on this machine (%s)", origin, error)
    if processor is None:
        logger.info("no image processor is saved; pass processor= for that")
    return processor


def _auto_classes(kind: Any) -> list[str]:
    """Names of the Auto classes that open a class of transformers, `AutoModel` in any case."""
    from transformers.models.auto import modeling_auto

    found = {"AutoModel"}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", {})
        if name.startswith("Auto") and kind.config_class in mapping:
            opened = mapping[kind.config_class]
            if kind in (opened if isinstance(opened, tuple) else (opened,)):
                found.add(name)
    return sorted(found)
