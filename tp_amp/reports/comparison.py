"""What a comparison of importances found: one table, one picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tp_amp.running.checkpoint import write_atomically

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^v<>pPX"


@dataclass(frozen=True)
class Row:
    """One importance at one size.

    Attributes:
        importance: its name.
        kept: fraction of the channels of every MLP that stays.
        parameters: of the cut model.
        value: the metric.
    """

    importance: str
    kept: float
    parameters: int
    value: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured; `print` it for a table.

    Attributes:
        metric: name of the metric.
        dense: the dense model, as importance `"dense"`.
        rows: one for each importance and size.
        failures: name of each importance that could not be measured -> why.
        compensation: `"none"`, `"mean"` or `"affine"`.

    Example:
        >>> from tp_amp.reports.comparison import Comparison, Row
        >>> dense = Row("dense", kept=1.0, parameters=5_700_000, value=0.81)
        >>> rows = [Row("LAMP", kept=0.5, parameters=3_900_000, value=0.72)]
        >>> print(Comparison("accuracy", dense, rows))
        accuracy; compensation: none
        MLP channels kept    100%     50%
        parameters (M)       5.70    3.90
        LAMP               0.8100  0.7200
    """

    metric: str
    dense: Row
    rows: list[Row]
    failures: dict[str, str] = field(default_factory=dict)
    compensation: str = "none"

    def to_json(self) -> str:
        """Write all numbers as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        sizes = {row.kept: row.parameters for row in self.rows}
        values = {(row.importance, row.kept): row.value for row in self.rows}
        cells = [
            [name, *(f"{values[name, kept]:.4f}" for kept in sizes)] for name in self._importances()
        ]
        lines = [
            f"{self.metric}; compensation: {self.compensation}",
            table(
                ["MLP channels kept", *(f"{kept:.0%}" for kept in (1.0, *sizes))],
                [
                    ["parameters (M)", *(f"{n / 1e6:.2f}" for n in self._sizes(sizes))],
                    *([name, f"{self.dense.value:.4f}", *row] for name, *row in cells),
                ],
            ),
        ]
        lines += [f"not measured: {name}: {reason}" for name, reason in self.failures.items()]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the metric over the parameters, a line for each importance.

        Args:
            path: of the picture; its ending tells the format (png, svg, pdf).

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: matplotlib writes no such format.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("install tp-amp[cli] (matplotlib) to draw a plot") from error
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        axes.axhline(self.dense.value, color="#666666", linewidth=0.8, label="dense")
        for i, name in enumerate(self._importances()):
            rows = [row for row in self.rows if row.importance == name]
            axes.plot(
                [row.parameters / 1e6 for row in rows],
                [row.value for row in rows],
                color=_COLOURS[i % len(_COLOURS)],
                marker=_MARKERS[i % len(_MARKERS)],
                linestyle="-" if i < len(_COLOURS) else "--",
                label=name,
            )
        axes.set_xlabel("parameters (millions)")
        axes.set_ylabel(self.metric)
        axes.set_title(f"without fine-tuning, compensation: {self.compensation}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
        path = Path(path)
        kind = path.suffix.removeprefix(".")
        write_atomically(path, lambda part: figure.savefig(part, dpi=150, format=kind))

    def _importances(self) -> list[str]:
        return list(dict.fromkeys(row.importance for row in self.rows))

    def _sizes(self, sizes: Mapping[float, int]) -> list[int]:
        return [self.dense.parameters, *sizes.values()]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows in columns: the first to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in (header, *rows)
    )
