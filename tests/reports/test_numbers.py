"""Numbers of a report, against their sources, and their JSON."""

from __future__ import annotations

import json

import pytest
from report_examples import AFTER, BEFORE, PLAN

from tp_amp import Measurement, Report


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
