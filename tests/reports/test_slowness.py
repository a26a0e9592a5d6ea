"""Reasons against measurements that hold one of them each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_examples import AFTER, BEFORE, PLAN, Page

from tp_amp import Measurement, PruningPlan
from tp_amp.reports.slowness import reasons

# As many MACs as half of the dense model's, and 1.2 times as fast.
SLOW = replace(AFTER, images_per_second=300.0)
EVEN = PruningPlan({"fc2": list(range(16))}, {"fc2": 32})


def told(before: Measurement, after: Measurement, plan: PruningPlan = EVEN) -> list[str]:
    return reasons(plan.report(before, after))


def test_a_model_that_is_as_fast_as_its_macs_allow_has_no_reasons() -> None:
    assert told(BEFORE, AFTER) == []
    assert reasons(EVEN.report()) == reasons(EVEN.report(BEFORE)) == []


def test_without_a_known_reason_the_ratio_alone_is_told() -> None:
    [text] = told(BEFORE, SLOW)
    assert "runs 1.20 times as many images per second" in text
    assert text.endswith("it would run 2.00 times as many.")


def test_time_outside_linears_bounds_the_gain() -> None:
    """A quarter stays and three quarters are halved: 1 / (1/4 + 3/8)."""
    before, after = (replace(side, outside_linears=0.25) for side in (BEFORE, SLOW))
    first, text = told(before, after)
    assert first.endswith("What may keep it from that:")
    assert "25% of the dense model's time" in text
    assert "allows about 1.60 times there" in text


def test_a_batch_of_one_is_told_with_the_gain_at_the_largest() -> None:
    before = replace(BEFORE, batch_size=1, speeds=((1, 250.0), (8, 300.0), (64, 400.0)))
    after = replace(SLOW, batch_size=1, speeds=((1, 300.0), (8, 500.0), (64, 700.0)))
    assert "In batches of 64 it runs 1.75 times as many." in told(before, after)[1]
    before, after = (replace(side, batch_size=1) for side in (BEFORE, SLOW))
    assert told(before, after)[1].endswith("for one image alone.")


def test_widths_between_the_steps_of_kernels_are_counted() -> None:
    assert "2 of 2 widths are no multiples of 8" in told(BEFORE, SLOW, PLAN)[1]


@pytest.mark.parametrize(("left", "count"), [(90, 2), (50, 1)])
def test_activations_that_stay_are_told(left: int, count: int) -> None:
    before, after = replace(BEFORE, activations=100), replace(SLOW, activations=left)
    found = told(before, after)
    assert len(found) == count
    assert count == 1 or "holds 90% of the dense model's activations" in found[1]


@pytest.mark.parametrize(
    ("fused", "text"),
    [((12, 7), "openvino computes 7 of 12 attentions as one operator, and 12 of the dense"),
     ((7, 7), "as one operator, as of the dense model's"), ((12, 12), "")],
)  # fmt: skip
def test_attentions_in_parts_are_told(fused: tuple[int, int], text: str) -> None:
    before, after = (
        replace(side, runtime="openvino", attentions=12, fused_attentions=count)
        for side, count in zip((BEFORE, SLOW), fused, strict=True)
    )
    found = told(before, after)
    assert len(found) == 1 + bool(text)
    assert text in found[-1]


def test_the_report_shows_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    known = {"runtime": "openvino", "attentions": 12, "exported_parameters": 22_050_000}
    before = replace(
        BEFORE, activations=50_000_000, fused_attentions=12, speeds=((64, 400.0),), **known
    )
    after = replace(
        SLOW, activations=45_000_000, fused_attentions=7, speeds=((64, 700.0),), **known
    )
    after = replace(after, parameters=22_050_012)
    report = PLAN.report(before, after)
    page = Page(report.to_html())
    assert [row[:4] for row in page.rows if row[0] in (
        "Activations at their peak", "Images per second, batches of 64",
        "Parameters in the exported graph", "Attentions computed as one operator",
    )] == [
        ["Activations at their peak", "50 MB", "45 MB", "-10%"],
        ["Images per second, batches of 64", "400", "700", "1.75 times"],
        ["Parameters in the exported graph", "22.05 M (664 fewer than the model)",
         "22.05 M (12 fewer than the model)", "+0%"],
        ["Attentions computed as one operator", "12 of 12", "7 of 12", ""],
    ]  # fmt: skip
    for sentence in reasons(report):
        assert sentence in page.text
        assert sentence in report.to_markdown()
        assert sentence in str(report)
    assert "batches of 8, float32, CPU, 1 thread, openvino" in page.text
    assert type(report).from_json(report.to_json()) == report
