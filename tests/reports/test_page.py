"""The page of a report, as a parser reads it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import tiny_models
from report_examples import AFTER, BEFORE, FIRST, HEADS, LAST, PLAN, Page

import tp_amp
from tp_amp import Measurement, PruningPlan
from tp_amp.reports.numbers import Probe


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


def test_a_plan_without_probes_has_no_section_for_them() -> None:
    plan = PruningPlan.from_json(PruningPlan({FIRST: [0, 3]}).to_json())
    page = Page(plan.report().to_html())
    assert page.svgs("strip") == []
    assert "Entropy at every probe" not in page.text
    assert "Nothing was measured" in page.text
    assert [FIRST, "-", "2", "-"] in [row[:4] for row in page.rows]
    assert "Layers keep 2 channels or heads." in re.sub(r"\s+", " ", page.text)


def test_each_kind_of_width_has_the_name_of_what_is_cut() -> None:
    model, batches = tiny_models.vit(), tiny_models.pictures()
    example = batches[0][:1]
    stream = tp_amp.stream_plan(tp_amp.rotate(model, example, batches, progress=False), 0.5)
    heads = tp_amp.rotate_heads(model, example, batches, progress=False)
    found = []
    for plan in (stream, tp_amp.rank_plan(heads, {"vo": 0.5})):
        text = re.sub(r"\s+", " ", Page(plan.report().to_html()).text)
        found += re.findall(r"(?:[A-Z][a-z ]+|MLPs) keep [^.]*\.", text)
    assert found == [
        "Residual streams keep 12 of 24 channels of the stream (50%).",
        "Attentions keep 8 of 16 channels of each head (50%).",
    ]


def test_an_empty_plan_has_a_page() -> None:
    assert "The plan names no layer" in Page(PruningPlan({}).report().to_html()).text


def test_the_cosine_stands_in_place_of_an_accuracy_that_was_not_measured() -> None:
    after = Measurement(5, 5.0, 1.0, (1.0, 1.0), 8, 10, "CPU, 1 thread", "float32")
    page = Page(PLAN.report(after=after).to_html())
    assert not [row for row in page.rows if row[0] in ("Accuracy", "Cosine to the dense model")]
    assert "Accuracy" not in page.text
    before, after = replace(after, cosine=1.0), replace(after, cosine=0.9312)
    rows = Page(PLAN.report(before, after).to_html()).rows
    assert ["Cosine to the dense model", "1.0000", "0.9312", "-0.0688"] in rows


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
