"""A plan with all that a report shows, and the page as a parser reads it."""

from __future__ import annotations

from html.parser import HTMLParser

from tp_amp import MLP, Attention, Measurement, PruningPlan
from tp_amp.reports.numbers import Probe

FIRST, LAST, HEADS = "blocks.0.mlp.fc2", "blocks.1.mlp.fc2", "blocks.0.attn.proj"
PLAN = PruningPlan(
    keep={FIRST: [0, 3, 19], LAST: [5], HEADS: [1, 2]},
    dense_widths={FIRST: 20, LAST: 40, HEADS: 3},
    probes={
        FIRST: [Probe(10, 1.61, False), Probe(3, 1.56, True)],
        LAST: [Probe(20, 1.52, True), Probe(9, 77.0, False), Probe(1, 1.54, True)],
        HEADS: [Probe(1, 1.625, False), Probe(2, 1.6, True)],
    },
    dense_entropy=1.5,
    sites={
        FIRST: MLP("blocks.0.mlp", ("blocks.0.mlp.fc1",), FIRST, 20),
        LAST: MLP("blocks.1.mlp", ("blocks.1.mlp.fc1",), LAST, 40),
        HEADS: Attention("blocks.0.attn", ("blocks.0.attn.qkv",), HEADS, 3, 4),
    },
)
BEFORE = Measurement(
    22_050_664, 4.6e9, 250.0, (240.0, 255.0), 8, 10, "CPU, 1 thread", "float32", 0.816, 2000
)
AFTER = Measurement(
    12_310_000, 2.3e9, 500.0, (490.0, 520.0), 8, 10, "CPU, 1 thread", "float32", 0.81, 2000
)


class Page(HTMLParser):
    """The tables of a page as texts, its SVGs and its tags; tags must be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open) and "title" not in self.open:
            self.rows[-1][-1] += data.strip()

    def svgs(self, kind: str) -> list[list[tuple[str, dict[str, str | None]]]]:
        """The shapes inside each SVG of a class, in order."""
        found, inside = [], False
        for tag, attributes in self.tags:
            if tag == "svg" and "class" in attributes:
                inside = kind in str(attributes["class"]).split()
                if inside:
                    found.append([])
            elif tag in ("svg", "td", "th"):
                inside = inside and tag == "svg"
            if inside:
                found[-1].append((tag, attributes))
        return found
