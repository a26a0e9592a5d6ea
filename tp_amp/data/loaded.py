"""A model with all that feeds it, and what goes wrong while it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.sharing.dense_models import build_dense


@dataclass
class Loaded:
    """A model, and all that is needed to feed it and to build it again.

    Attributes:
        model: the image model (of CLIP models the image tower).
        library: `"timm"`, `"open_clip"` or `"transformers"`.
        name: as for `save_pruned`.
        arguments: as for `save_pruned`.
        transform: from a picture to a tensor `(channels, height, width)`.
        mode: of the pictures that the transform takes, as Pillow calls it.
        plan: what was cut from it before, if it comes from a folder of `save_pruned`.
        processor: of transformers, if the model is from there.
    """

    model: nn.Module
    library: str
    name: str
    arguments: dict[str, Any]
    transform: Callable[[Any], Tensor] = field(repr=False)
    mode: str = "RGB"
    plan: PruningPlan | None = None
    processor: Any = None

    def blank(self) -> Tensor:
        """A black picture as the model takes it, `(1, channels, height, width)`."""
        from PIL import Image

        picture = self.transform(Image.new(self.mode, (256, 256))).unsqueeze(0)
        like = next(self.model.parameters())
        return picture.to(like.device, like.dtype)


def built(spec: str, source: dict[str, Any]) -> nn.Module:
    """Build a dense model with random weights; what fails is told as a mistake in its arguments."""
    try:
        return build_dense(source, spec)
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
        raise ValueError(
            f"{spec} can't be built with the arguments {source['arguments']} ({error}); check "
            "--model-args"
        ) from error


def fetched(spec: str, fetch: Callable[[], Any]) -> Any:
    """What a library fetches by name; whatever fails is told with what can be done."""
    try:
        return fetch()
    except ImportError:
        raise
    # Each library, and its network client, has errors of its own.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"{spec} can't be loaded ({(lines or [type(error).__name__])[0]}); check the name, "
            "--model-args and the network, or pass --weights FILE"
        ) from error
