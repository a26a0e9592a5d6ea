"""The numbers of a report as a page shows them: texts, and places in percent of a plot's width."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, Template

from tp_amp.reports.slowness import reasons

if TYPE_CHECKING:
    from tp_amp.reports.numbers import Layer, Measurement, Numbers, Probe

_TITLES = {
    "channels": "MLPs",
    "heads": "Attentions",
    "channels of each head": "Attentions",
    "channels of the stream": "Residual streams",
}
_UNKNOWN = "-"


@dataclass(frozen=True)
class Comparison:
    """One measured quantity before and after: texts, and bars in percent of the larger one."""

    label: str
    before: str
    after: str
    change: str
    bars: tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One layer, or the sum of a group: its numbers as texts, and bars in percent of the widest."""

    name: str
    before: str
    after: str
    kept: str
    entropy: str
    bars: tuple[float, float]


@dataclass(frozen=True)
class Group:
    """The layers whose widths count the same."""

    title: str
    units: str
    rows: list[Row]
    total: Row


@dataclass(frozen=True)
class Mark:
    """One probe: where it lies on the axis, in percent, and whether it lies beyond its ends."""

    place: float
    beyond: bool
    probe: Probe


@dataclass(frozen=True)
class Entropies:
    """The axis, its labels, the dense model's place, and every layer's marks by units."""

    decimals: int
    labels: list[str]
    dense: float | None
    strips: dict[str, dict[str, list[Mark]]]

    def text(self, entropy: float) -> str:
        """An entropy with digits enough to tell the probes apart."""
        return f"{entropy:.{self.decimals}f}"


def page(report: Numbers, *, whole: bool) -> str:
    """Render the page, or only what a notebook shows of it."""
    return _template().render(
        whole=whole,
        report=report,
        measured=report.after or report.before,
        comparisons=comparisons(report),
        reasons=reasons(report),
        groups=groups(report),
        entropies=entropies(report),
    )


@cache
def _template() -> Template:
    text = files("tp_amp.reports").joinpath("report.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)


def comparisons(report: Numbers) -> list[Comparison]:
    """What was measured before and after, one quantity a row; none where nothing was measured."""
    if not (report.before or report.after):
        return []
    rows = [
        _compare(report, "Parameters", _percent, lambda m: (m.parameters, _short(m.parameters))),
        *_known(report, "Activations at their peak", _percent, _activations),
        _compare(report, "MACs per image", _percent, lambda m: (m.macs, _short(m.macs))),
        _compare(report, "Images per second", _times, lambda m: (m.images_per_second, _speed(m))),
    ]
    sides = [side for side in (report.before, report.after) if side]
    for size in dict.fromkeys(size for side in sides for size, _ in side.speeds):
        label = f"Images per second, batches of {size}"
        rows.append(_compare(report, label, _times, partial(_speed_at, size)))
    rows += _known(report, "Parameters in the exported graph", _percent, _exported)
    rows += _known(report, "Attentions computed as one operator", _nothing, _fused)
    if any(side.accuracy is not None for side in sides):
        rows.append(_compare(report, "Accuracy", _points, _accuracy))
    elif any(side.cosine is not None for side in sides):
        rows.append(_compare(report, "Cosine to the dense model", _difference, _cosine))
    return rows


def _known(
    report: Numbers,
    label: str,
    change: Callable[[float, float], str],
    read: Callable[[Measurement], tuple[float, str] | None],
) -> list[Comparison]:
    """A row where the quantity is known of a side; else none."""
    known = any(side and read(side) for side in (report.before, report.after))
    return [_compare(report, label, change, read)] if known else []


def _activations(measured: Measurement) -> tuple[float, str] | None:
    found = measured.activations
    return None if found is None else (found, f"{_short(found)}B")


def _exported(measured: Measurement) -> tuple[float, str] | None:
    """With how many they are less, or more, than the model's, which are then not all read."""
    found = measured.exported_parameters
    if found is None:
        return None
    other = found - measured.parameters
    what = f"{abs(other):,} {'more' if other > 0 else 'fewer'} than the model" if other else "all"
    return found, f"{_short(found)} ({what})"


def _fused(measured: Measurement) -> tuple[float, str] | None:
    found = measured.fused_attentions
    return None if found is None else (found, f"{found} of {measured.attentions}")


def _speed_at(size: int, measured: Measurement) -> tuple[float, str] | None:
    found = dict(measured.speeds).get(size)
    return None if found is None else (found, _images(found))


def _accuracy(measured: Measurement) -> tuple[float, str] | None:
    return None if measured.accuracy is None else (measured.accuracy, f"{measured.accuracy:.1%}")


def _cosine(measured: Measurement) -> tuple[float, str] | None:
    return None if measured.cosine is None else (measured.cosine, f"{measured.cosine:.4f}")


def _difference(old: float, new: float) -> str:
    return f"{new - old:+.4f}"


def _compare(
    report: Numbers,
    label: str,
    change: Callable[[float, float], str],
    read: Callable[[Measurement], tuple[float, str] | None],
) -> Comparison:
    """One row, from what gives a quantity and its text."""
    old, new = (side and read(side) for side in (report.before, report.after))
    largest = max(found[0] for found in (old, new, (0.0, "")) if found) or 1
    return Comparison(
        label,
        old[1] if old else _UNKNOWN,
        new[1] if new else _UNKNOWN,
        change(old[0], new[0]) if old and new else "",
        (100 * old[0] / largest if old else 0, 100 * new[0] / largest if new else 0),
    )


def groups(report: Numbers) -> list[Group]:
    """The layers by what their widths count, MLPs first."""
    found = []
    for units in dict.fromkeys(layer.units for layer in report.layers):
        layers = [layer for layer in report.layers if layer.units == units]
        widest = max(layer.dense or layer.kept for layer in layers) or 1
        rows = [
            _row(layer.name, layer.dense, layer.kept, widest, _last_entropy(layer))
            for layer in layers
        ]
        known = [layer.dense for layer in layers if layer.dense is not None]
        dense = sum(known) if len(known) == len(layers) else None
        kept = sum(layer.kept for layer in layers)
        total = _row("all", dense, kept, dense or kept or 1, "")
        found.append(Group(_TITLES.get(units, "Layers"), units, rows, total))
    return found


def _row(name: str, dense: int | None, kept: int, widest: int, entropy: str) -> Row:
    return Row(
        name,
        _UNKNOWN if dense is None else f"{dense:,}",
        f"{kept:,}",
        f"{kept / dense:.0%}" if dense else _UNKNOWN,
        entropy,
        (100 * (dense or 0) / widest, 100 * kept / widest),
    )


def _last_entropy(layer: Layer) -> str:
    """The entropy at the width that stays, if it was tried."""
    tried = [probe.entropy for probe in layer.probes if probe.width == layer.kept]
    return f"{tried[-1]:.4f}" if tried else ""


def entropies(report: Numbers) -> Entropies | None:
    """Place every probe on one axis; None where the plan holds no probe."""
    probes = [probe for layer in report.layers for probe in layer.probes]
    if not probes:
        return None
    dense = [] if report.dense_entropy is None else [report.dense_entropy]
    low, high = _limits(
        [*dense, *(probe.entropy for probe in probes if probe.accepted)],
        [probe.entropy for probe in probes],
    )

    def place(entropy: float) -> float:
        share = (entropy - low) / (high - low) if math.isfinite(entropy) else 1.0
        return 100 * min(max(share, 0.0), 1.0)

    def mark(probe: Probe) -> Mark:
        return Mark(place(probe.entropy), not low <= probe.entropy <= high, probe)

    strips: dict[str, dict[str, list[Mark]]] = {layer.units: {} for layer in report.layers}
    for layer in report.layers:
        if layer.probes:
            strips[layer.units][layer.name] = [mark(probe) for probe in layer.probes]
    digits = max(0, 2 - math.floor(math.log10(high - low)))
    labels = [f"{low + share * (high - low):.{digits}f}" for share in (0, 0.5, 1)]
    return Entropies(max(4, digits + 1), labels, place(dense[0]) if dense else None, strips)


def _limits(core: Iterable[float], others: Iterable[float]) -> tuple[float, float]:
    """Ends of an axis that shows the core, and of the others those within its span of it.

    A width that is far too small would else press all that matters into one place.
    """
    core, others = (list(filter(math.isfinite, values)) for values in (core, others))
    if not core:
        core = others or [0.0]
    span = max(core) - min(core) or math.inf
    near = [x for x in others if min(core) - span <= x <= max(core) + span]
    low, high = min([*core, *near]), max([*core, *near])
    margin = 0.03 * (high - low) or 1e-3
    return low - margin, high + margin


def _short(value: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g} {letter}"
    return f"{value:.4g}"


def _speed(measured: Measurement) -> str:
    speeds = measured.images_per_second, *measured.quartiles
    median, low, high = map(_images, speeds)
    return f"{median} ({low} to {high})"


def _images(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _nothing(old: float, new: float) -> str:
    return ""


def _percent(old: float, new: float) -> str:
    return f"{new / old - 1:+.0%}" if old else ""


def _times(old: float, new: float) -> str:
    return f"{new / old:.2f} times"


def _points(old: float, new: float) -> str:
    return f"{100 * (new - old):+.1f} points"
