"""The plan as tables in Markdown, for a model card."""

from __future__ import annotations

from collections.abc import Sequence

from tp_amp.reports.numbers import Numbers
from tp_amp.reports.page import comparisons, groups
from tp_amp.reports.slowness import reasons


def markdown(report: Numbers) -> str:
    """Write what was measured, if anything was, and a table of widths for each kind of layer."""
    parts = []
    measured = report.after or report.before
    if measured:
        rows = [(line.label, line.before, line.after, line.change) for line in comparisons(report)]
        table = _table(("", "dense", "pruned", "change"), rows)
        parts.append(f"Speed in {measured.conditions}.\n\n{table}")
    if told := reasons(report):
        parts.append(told[0])
        parts += ["\n".join(f"- {reason}" for reason in told[1:])] if told[1:] else []
    for group in groups(report):
        rows = [(f"`{r.name}`", r.before, r.after, r.kept) for r in group.rows]
        total = group.total
        rows.append((total.name, total.before, total.after, total.kept))
        table = _table(("layer", "dense", "pruned", "kept"), rows)
        parts.append(f"{group.title}, in {group.units}:\n\n{table}")
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
