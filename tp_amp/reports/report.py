"""What a person looks at after pruning: a table for the terminal, JSON, a page with plots."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tp_amp.reports.markdown import markdown
from tp_amp.reports.numbers import Numbers
from tp_amp.reports.page import comparisons, groups, page
from tp_amp.reports.slowness import reasons
from tp_amp.running.checkpoint import write_atomically

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions


@dataclass(frozen=True)
class Report(Numbers):
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

    def to_html(self) -> str:
        """Write one page that needs no other file: tables and plots, light and dark."""
        return page(self, whole=True)

    def to_markdown(self) -> str:
        """Write the tables in Markdown, as for a model card."""
        return markdown(self)

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
        for i, reason in enumerate(reasons(self)):
            yield Text(f"- {reason}" if i else reason)
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
