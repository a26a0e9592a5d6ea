"""Reports: numbers against their sources, the page as a parser reads it, the terminal's lines."""

import copy
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from toys import images, toy

import tp_amp
from tp_amp import MLP, Attention, Measurement, PruningPlan, Report
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


def test_numbers_are_those_of_the_plan() -> None:
    report = PLAN.report(BEFORE, AFTER)
    assert {layer.name: layer.kept for layer in report.layers} == PLAN.widths
    assert {layer.name: layer.dense for layer in report.layers} == PLAN.dense_widths
    assert {layer.name: list(layer.probes) for layer in report.layers} == PLAN.probes
    assert [layer.units for layer in report.layers] == ["channels", "channels", "heads"]
    assert (report.dense_entropy, report.before, report.after) == (1.5, BEFORE, AFTER)


@pytest.mark.parametrize("measured", [(None, None), (None, AFTER), (BEFORE, AFTER)])
def test_json_round_trip_is_exact(measured: tuple[Measurement | None, Measurement | None]) -> None:
    report = PLAN.report(*measured)
    assert Report.from_json(report.to_json()) == report
    record = json.loads(report.to_json())
    assert record["layers"][1]["probes"][2] == {"width": 1, "entropy": 1.54, "accepted": True}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1}',
        '{"format": 1, "layers": [{}]}',
        PLAN.report().to_json().replace('"before"', '"other"'),
    ],
)
def test_other_json_raises(text: str) -> None:
    with pytest.raises(ValueError, match="the JSON is no report of tp_amp"):
        Report.from_json(text)


def test_page_holds_every_name_and_number() -> None:
    page = Page(PLAN.report(BEFORE, AFTER).to_html())
    rows = [row[:4] for row in page.rows]
    assert rows[:12] == [
        ["quantity", "before", "after", "change"],
        ["Parameters", "22.05 M", "12.31 M", "-44%"],
        ["MACs per image", "4.6 G", "2.3 G", "-50%"],
        ["Images per second", "250 (240 to 255)", "500 (490 to 520)", "2.00 times"],
        ["Accuracy", "81.6%", "81.0%", "-0.6 points"],
        ["layer", "before", "after", "kept"],
        [FIRST, "20", "3", "15%"],
        [LAST, "40", "1", "2%"],
        ["all", "60", "4", "7%"],
        ["layer", "before", "after", "kept"],
        [HEADS, "3", "2", "67%"],
        ["all", "3", "2", "67%"],
    ]
    probes = []
    for name, tried in PLAN.probes.items():
        verdicts = ["accepted" if p.accepted else "rejected" for p in tried]
        numbers = zip(tried, verdicts, strict=True)
        probes += [[name], *([str(p.width), f"{p.entropy:.9g}", text] for p, text in numbers)]
    assert rows[-len(probes) :] == probes
    for text in ("batches of 8, float32, CPU, 1 thread", "median of 10", "over 2,000 labelled"):
        assert text in page.text
    assert "MLPs keep 4 of 60 channels (7%)." in re.sub(r"\s+", " ", page.text)


def test_bars_are_as_long_as_the_numbers_say() -> None:
    page = Page(PLAN.report(BEFORE, AFTER).to_html())
    bars = [
        [float(str(a["width"])[:-1]) for tag, a in shapes if tag == "rect"]
        for shapes in page.svgs("bar")
    ]
    measured = [22_050_664, 12_310_000, 4.6, 2.3, 250, 500, 0.816, 0.81]
    largest = [22_050_664, 4.6, 500, 0.816]
    expected = [[100 * x / largest[i // 2]] for i, x in enumerate(measured)]
    expected += [[50.0, 7.5], [100.0, 2.5], [100.0, 100 * 4 / 60]]
    expected += [[100.0, 100 * 2 / 3], [100.0, 100 * 2 / 3]]
    assert len(bars) == len(expected)
    for found, wanted in zip(bars, expected, strict=True):
        assert found == pytest.approx(wanted, abs=0.006)


def test_marks_lie_where_their_entropies_do() -> None:
    """One axis for all: places are affine in the entropy; what lies far out is at the edge."""
    page = Page(PLAN.report().to_html())
    strips = page.svgs("strip")
    assert len(strips) == 3
    places: dict[float, float] = {}
    for shapes, probes in zip(strips, PLAN.probes.values(), strict=True):
        found = [float(str(a["x"])[:-1]) for tag, a in shapes if tag == "svg" and "x" in a]
        kinds = [tag for tag, a in shapes if tag in ("circle", "path")]
        assert kinds == ["circle" if probe.accepted else "path" for probe in probes]
        places |= {p.entropy: x for p, x in zip(probes, found, strict=True)}
        (dense,) = {a["x1"] for tag, a in shapes if a.get("class") == "dense"}
        places[1.5] = float(str(dense)[:-1])
    assert places.pop(77.0) == 100.0
    slope = (places[1.625] - places[1.5]) / 0.125
    for entropy, place in places.items():
        assert place == pytest.approx(places[1.5] + slope * (entropy - 1.5), abs=0.02)
    assert slope > 0
    assert min(places.values()) > 0


def test_labels_of_a_narrow_axis_differ() -> None:
    probes = {FIRST: [Probe(2, 2.0 + 1e-7, True), Probe(1, 2.0 + 1.5e-7, False)]}
    page = Page(PruningPlan({FIRST: [1, 2]}, probes=probes, dense_entropy=2.0).report().to_html())
    axis = next(str(a["aria-label"]) for _, a in page.tags if "axis" in str(a.get("class")))
    low, high = re.findall(r"\d\.\d+", axis)
    assert float(low) < 2.0 < 2.0 + 1.5e-7 < float(high)
    entropies = [row[1] for row in page.rows[-2:]]
    assert entropies[0] != entropies[1]


@pytest.mark.parametrize("entropy", [0.0, 2.0, float("nan"), float("inf")])
def test_one_probe_alone_has_a_place(entropy: float) -> None:
    page = Page(
        PruningPlan({FIRST: [0]}, probes={FIRST: [Probe(1, entropy, True)]}).report().to_html()
    )
    (strip,) = page.svgs("strip")
    (place,) = (float(str(a["x"])[:-1]) for tag, a in strip if tag == "svg" and "x" in a)
    assert 0 <= place <= 100


def test_a_plan_without_probes_says_why_there_is_no_plot() -> None:
    plan = PruningPlan.from_json(PruningPlan({FIRST: [0, 3]}).to_json())
    page = Page(plan.report().to_html())
    assert page.svgs("strip") == []
    assert "this plan holds no probe" in page.text
    assert "Nothing was measured" in page.text
    assert [FIRST, "-", "2", "-"] in [row[:4] for row in page.rows]
    assert "Layers keep 2 channels or heads." in re.sub(r"\s+", " ", page.text)


def test_an_empty_plan_has_a_page() -> None:
    assert "The plan names no layer" in Page(PruningPlan({}).report().to_html()).text


def test_accuracy_that_was_not_measured_is_named() -> None:
    after = Measurement(5, 5.0, 1.0, (1.0, 1.0), 8, 10, "CPU, 1 thread", "float32")
    page = Page(PLAN.report(after=after).to_html())
    assert ["Accuracy", "-", "-", ""] in page.rows
    assert "Accuracy was not measured" in page.text


def test_page_needs_nothing_else_and_every_plot_has_a_text() -> None:
    text = PLAN.report(BEFORE, AFTER).to_html()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import|src=|href=", text)
    assert all(
        "aria-hidden" in a or "aria-label" in a
        for tag, a in page.tags
        if tag == "svg" and "x" not in a
    )
    assert "prefers-color-scheme: dark" in text
    assert text.startswith("<!DOCTYPE html>")
    assert ("meta", {"charset": "utf-8"}) in page.tags


@pytest.mark.parametrize("html", ["to_html", "_repr_html_"])
def test_names_are_escaped(html: str) -> None:
    name = "a.<script>alert('1')</script>\"&amp;.\u00fc"
    plan = PruningPlan({name: [0]}, {name: 2}, {name: [Probe(1, 1.0, True)]})
    text = getattr(plan.report(), html)()
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert [row[0] for row in page.rows].count(name) == 3


def test_notebook_shows_the_same_without_a_page_around() -> None:
    report = PLAN.report(BEFORE, AFTER)
    whole, part = Page(report.to_html()), Page(report._repr_html_())
    assert part.rows == whole.rows
    assert not {"html", "head", "body", "title"} & {
        tag for tag, attributes in part.tags if tag != "title"
    }


def test_save_writes_the_page_or_the_json(tmp_path: Path) -> None:
    report = PLAN.report(BEFORE, AFTER)
    report.save(tmp_path / "new" / "report.html")
    report.save(str(tmp_path / "report.json"))
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == report.to_html()
    assert Report.from_json((tmp_path / "report.json").read_text(encoding="utf-8")) == report


def test_another_suffix_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"as .html or .json, found 'report.pdf'"):
        PLAN.report().save(tmp_path / "report.pdf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "report.html"
    if existing:
        path.write_text("old")
    with pytest.raises(UnicodeEncodeError):  # a lone surrogate has no bytes
        PruningPlan({"\ud800": [0]}).report().save(path)
    assert [p.read_text() for p in tmp_path.iterdir()] == (["old"] if existing else [])


def test_terminal_of_60_columns_cuts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    long = "visual.transformer.resblocks.11.attention_of_a_long_name.mlp.c_proj[bold]"
    plan = PruningPlan({**PLAN.keep, long: [0]}, PLAN.dense_widths, PLAN.probes, 1.5, PLAN.sites)
    lines = str(plan.report(BEFORE, AFTER)).splitlines()
    assert max(map(len, lines)) <= 60
    assert not any("\u2026" in line for line in lines)
    assert long in "".join(line.split()[0] for line in lines if line.strip())  # folded
    words = "\n".join(lines).split()
    for name, numbers in {FIRST: ["20", "3", "15%", "1.5600"], HEADS: ["3", "2", "67%"]}.items():
        at = words.index(name) + 1
        assert words[at : at + len(numbers)] == numbers
    for text in (
        "22.05 M",
        "12.31 M",
        "-44%",
        "2.00 times",
        "-0.6 points",
        "in heads",
        "in channels",
    ):
        assert text in "\n".join(lines)


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_text_holds_no_escapes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert "\x1b" not in str(PLAN.report(BEFORE, AFTER))


def test_text_is_a_string_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert FIRST in str(PLAN.report())


def test_without_rich_the_error_names_the_extra_and_the_rest_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "rich", None)
    report = PLAN.report(BEFORE, AFTER)
    with pytest.raises(ImportError, match=r"install tp-amp\[report\]"):
        str(report)
    assert FIRST in report.to_json()
    assert Page(report.to_html()).rows


@pytest.mark.parametrize(
    "changed", [{"batch_size": 9}, {"dtype": "float16"}, {"device": "x"}, {"labelled_images": 7}]
)
def test_measurements_under_other_conditions_do_not_compare(changed: dict[str, object]) -> None:
    other = Measurement(**{**vars(AFTER), **changed})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="measure both on the same batches, device and dtype"):
        PLAN.report(BEFORE, other)


def test_report_of_a_real_plan_and_model() -> None:
    model = toy()
    plan = tp_amp.plan_from_importance(model, images(1), tp_amp.DIMAPImportance(), 0.5)
    pruned = copy.deepcopy(model)
    tp_amp.apply_plan(pruned, images(1), plan)
    report = plan.report(*tp_amp.measure_both(model, pruned, [images()], repeats=1))
    assert report.before is not None
    assert report.after is not None
    # Two MLPs lose 10 of 20 neurons, each with 12 weights in, one bias and 12 weights out.
    assert report.before.parameters - report.after.parameters == 2 * 10 * (12 + 1 + 12)
    assert report.before.macs - report.after.macs == 2 * 10 * 4 * 2 * 12
    assert {layer.units for layer in report.layers} == {"channels"}
