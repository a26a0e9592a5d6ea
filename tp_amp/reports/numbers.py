"""What is known of a model and of a run: plain numbers, and their JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Probe:
    """One width that was tried: the entropy (nats) of the model with it, and the verdict."""

    width: int
    entropy: float
    accepted: bool


@dataclass(frozen=True)
class Measurement:
    """What `measure` found.

    Attributes:
        parameters: number of parameters.
        macs: multiply-accumulates for each image.
        images_per_second: the median over forward passes.
        quartiles: images per second between which half of the passes lie.
        batch_size: images of the batch that was timed.
        repeats: forward passes that were timed, after the warm-up.
        device: what the model ran on, a CPU with its number of threads.
        dtype: of the weights, or of autocast.
        accuracy: fraction of the labelled images whose largest logit is their class, if known.
        labelled_images: how many images it was taken over.
        cosine: where no accuracy is known, the mean over images of the cosine similarity of the
            outputs to the dense model's, if that was measured too (`measure_both`).
        runtime: what the speeds are of, `"eager"` for PyTorch itself; all else is PyTorch's.
        activations: bytes that a forward pass on the timed batch holds at its peak, without the
            weights and the batch itself.
        outside_linears: share of a forward pass's time that is spent outside Linears, on a CPU.
        speeds: images per second at further batch sizes, `(batch size, images per second)`.
        exported_parameters: elements of parameters in the exported graph, where one is made.
        attentions: attentions in the exported graph, told by their softmax.
        fused_attentions: how many of them the runtime computes as one operator.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
        >>> measured = tp_amp.measure(model, [torch.randn(2, 3, 224, 224)])
        >>> low, high = measured.quartiles
        >>> low <= measured.images_per_second <= high
        True
        >>> measured.macs, measured.accuracy, measured.dtype
        (130952448.0, None, 'float32')
    """

    parameters: int
    macs: float
    images_per_second: float
    quartiles: tuple[float, float]
    batch_size: int
    repeats: int
    device: str
    dtype: str
    accuracy: float | None = None
    labelled_images: int = 0
    cosine: float | None = None
    runtime: str = "eager"
    activations: int | None = None
    outside_linears: float | None = None
    speeds: tuple[tuple[int, float], ...] = ()
    exported_parameters: int | None = None
    attentions: int | None = None
    fused_attentions: int | None = None

    @property
    def conditions(self) -> str:
        """Under what the speed was measured; only speeds under the same ones compare."""
        where = "" if self.runtime == "eager" else f", {self.runtime}"
        return f"batches of {self.batch_size}, {self.dtype}, {self.device}{where}"


FORMAT = 1
Kind = TypeVar("Kind", bound="Numbers")


@dataclass(frozen=True)
class Layer:
    """One MLP or attention of a plan.

    Attributes:
        name: module path of its `down`.
        units: what its widths count: `"channels"`, `"heads"`, or both words where the plan, made
            by hand, does not say.
        dense: width of the dense layer, where known.
        kept: width that stays.
        probes: the widths the search tried, with the entropy (nats) at each.
    """

    name: str
    units: str
    dense: int | None
    kept: int
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True)
class Numbers:
    """What a report holds; see `Report`, which shows it."""

    layers: tuple[Layer, ...]
    dense_entropy: float | None = None
    before: Measurement | None = None
    after: Measurement | None = None

    def to_json(self) -> str:
        """Write all numbers as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls: type[Kind], text: str) -> Kind:
        """Read a report that `to_json` wrote.

        Raises:
            ValueError: the text is not such a report, or of a newer format.
        """
        try:
            record = json.loads(text)
            if record.pop("format") != FORMAT:
                raise ValueError(f"this tp_amp reads format {FORMAT}; make the report again")
            layers = tuple(
                Layer(**{**layer, "probes": tuple(Probe(**probe) for probe in layer["probes"])})
                for layer in record.pop("layers")
            )
            for side in ("before", "after"):
                if record[side] is not None:
                    quartiles = tuple(record[side]["quartiles"])
                    speeds = tuple((size, speed) for size, speed in record[side].get("speeds", ()))
                    pairs = {"quartiles": quartiles, "speeds": speeds}
                    record[side] = Measurement(**{**record[side], **pairs})
            return cls(layers, **record)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the JSON is no report of tp_amp: {error!r}") from error
