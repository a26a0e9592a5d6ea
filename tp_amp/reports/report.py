"""What a person looks at after pruning: a table for the terminal, JSON, a page with plots."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_amp.evaluation.measuring import Measurement
from tp_amp.reports.page import comparisons, groups, page
from tp_amp.running.checkpoint import write_atomically
from tp_amp.search.bisection import Probe

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

    from tp_amp.plan.pruning_plan import PruningPlan

FORMAT = 1


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
class Report:
    """A plan's widths and entropies, and what the model cost before and after, as plain numbers.

    `print` it for tables (with `pip install tp-amp[report]`; `rich.print` adds colours), or let a
    notebook show it.

    Attributes:
        layers: the plan's MLPs, then its attentions.
        dense_entropy: entropy (nats) of the dense model on the calibration images, where known.
        before: measurement of the dense model, if any.
        after: measurement of the pruned model, if any.

    Example:
        >>> import tp_amp
        >>> plan = tp_amp.PruningPlan({"blocks.0.mlp.fc2": [0, 3]}, {"blocks.0.mlp.fc2": 8})
        >>> report = plan.report()
        >>> report.layers
        (Layer(name='blocks.0.mlp.fc2', units='channels or heads', dense=8, kept=2, probes=()),)
        >>> tp_amp.Report.from_json(report.to_json()) == report
        True
    """

    layers: tuple[Layer, ...]
    dense_entropy: float | None = None
    before: Measurement | None = None
    after: Measurement | None = None

    def to_json(self) -> str:
        """Write all numbers as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
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
                    record[side] = Measurement(**{**record[side], "quartiles": quartiles})
            return cls(layers, **record)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"the JSON is no report of tp_amp: {error!r}") from error

    def to_html(self) -> str:
        """Write one page that needs no other file: tables and plots, light and dark."""
        return page(self, whole=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page or the JSON, by the suffix; the file appears only once it is whole.

        Args:
            path: ends in `.html` or `.json`.

        Raises:
            ValueError: it ends otherwise.
        """
        path = Path(path)
        writers = {".html": self.to_html, ".json": self.to_json}
        if path.suffix not in writers:
            raise ValueError(f"the report is saved as {' or '.join(writers)}, found {path.name!r}")
        text = writers[path.suffix]()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))

    def _repr_html_(self) -> str:
        return page(self, whole=False)

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError as error:
            raise ImportError(
                "install tp-amp[report] to print a report; to_json, to_html and save do without"
            ) from error
        text = StringIO()
        # Plain text here, whatever the surroundings: a notebook would show it beside the string.
        width = shutil.get_terminal_size().columns
        Console(
            file=text, width=width, color_system=None, force_terminal=False, force_jupyter=False
        ).print(self)
        return text.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """Give rich the tables; long names are folded, never cut."""
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        style: Any = {"title_justify": "left", "box": SIMPLE, "padding": (0, 1, 0, 0)}
        measured = self.after or self.before
        if measured:
            table = Table("", title=f"Speed: {measured.conditions}", **style)
            for column in ("before", "after", "change"):
                table.add_column(column, justify="right", overflow="fold")
            for line in comparisons(self):
                table.add_row(line.label, line.before, line.after, line.change)
            yield table
        for group in groups(self):
            title = f"{group.title}, in {group.units}"
            table = Table(title=title, show_footer=True, **style)
            table.add_column("layer", group.total.name, overflow="fold")
            columns = ["before", "after", "kept"]
            if any(row.entropy for row in group.rows):
                columns.append("entropy")
            for column in columns:
                total = getattr(group.total, column)
                table.add_column(column, total, justify="right", no_wrap=True)
            for row in group.rows:
                table.add_row(Text(row.name), *(getattr(row, column) for column in columns))
            yield table


def make_report(
    plan: PruningPlan, before: Measurement | None = None, after: Measurement | None = None
) -> Report:
    """Report a plan; see `PruningPlan.report`."""
    if before and after and _alike(before) != _alike(after):
        raise ValueError(
            f"before was measured with {_alike(before)}, after with {_alike(after)}; "
            "measure both on the same batches, device and dtype"
        )
    layers = []
    for name, kept in plan.keep.items():
        site = plan.sites.get(name)
        dense = plan.dense_widths.get(name, site.width if site else None)
        units = site.units if site else "channels or heads"
        layers.append(Layer(name, units, dense, len(kept), tuple(plan.probes.get(name, ()))))
    return Report(tuple(layers), plan.dense_entropy, before, after)


def _alike(measured: Measurement) -> str:
    return f"{measured.conditions}, {measured.labelled_images} labelled images"
