"""Models of transformers by name for the command line, with their image processors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from tp_amp.data.loaded import Loaded, built, fetched

logger = logging.getLogger(__name__)


def load_hugging_face(name: str, arguments: dict[str, Any], pretrained: bool) -> Loaded:
    """Build the image model that a name on the hub, or a folder, stands for."""
    transformers = _transformers()
    config, unknown = fetched(
        f"hf:{name}",
        lambda: transformers.AutoConfig.from_pretrained(
            name, return_unused_kwargs=True, **arguments
        ),
    )
    if unknown:
        raise ValueError(f"hf:{name} has no arguments {sorted(unknown)}; see --model-args")
    kind: Any = _image_class(name, config)
    if pretrained:
        model = fetched(f"hf:{name}", lambda: kind.from_pretrained(name, **arguments))
    else:
        own = getattr(config, "vision_config", config)
        record = {"library": "transformers", "name": kind.__name__, "arguments": {}}
        model = built(f"hf:{name}", {**record, "config": own.to_dict()})
    processor = image_processor(name, model.config, arguments)
    transform, mode = processor_transform(processor), picture_mode(model.config)
    return Loaded(model, "transformers", kind.__name__, {}, transform, mode, processor=processor)


def fetch_hugging_face(name: str, kind: str, config: dict[str, Any]) -> Any:
    """The weights that a name on the hub, or a folder, stands for, in a model of a class."""
    found = getattr(_transformers(), kind)
    given = found.config_class.from_dict(config)
    return fetched(f"hf:{name}", lambda: found.from_pretrained(name, config=given))


def _transformers() -> Any:
    """The library, silent where nobody looks on."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("install tp-amp[huggingface] for models of transformers") from error
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def _image_class(name: str, config: Any) -> Any:
    """The class that was saved; of a model of images and text the one for images."""
    import transformers

    listed = config.architectures or []
    if not listed:
        raise ValueError(f"hf:{name} does not say its class (architectures in config.json)")
    found = listed[0]
    if hasattr(config, "vision_config"):
        found = found.removesuffix("Model") + "VisionModel"
    if not hasattr(transformers, found):
        raise ValueError(f"hf:{name} is a {listed[0]}, of which transformers has no image model")
    return getattr(transformers, found)


def image_processor(name: str, config: Any, arguments: Mapping[str, Any]) -> Any:
    """What prepares images for a model; one with usual settings where it has none."""
    import transformers

    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    shape = {"height": height, "width": width}
    try:
        load: Any = transformers.AutoImageProcessor.from_pretrained
        # A pruned folder's configuration names code, of which nothing is needed for this.
        processor = load(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        logger.warning(
            "hf:%s has no image processor (%s): images are scaled to %d x %d, mean and standard "
            "deviation 0.5",
            name,
            str(error).splitlines()[0],
            height,
            width,
        )
        return transformers.ViTImageProcessor(size=shape)
    if "image_size" in arguments:
        processor.size = processor.crop_size = shape
    return processor


def processor_transform(processor: Any) -> Any:
    """From a picture to the tensor that the processor makes of it."""
    return lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0]


def picture_mode(config: Any) -> str:
    """The mode of pictures that the model takes, as Pillow calls it."""
    return "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
