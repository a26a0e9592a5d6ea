"""The benchmark of memory and time, on a tiny model."""

import json
import sys

import pages
import pytest
import resource_calls
import resource_report
import resources
import torch

import tp_amp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
GB = 10**9


@pytest.fixture
def table(tmp_path):
    """A page with marks, and the arguments that write there."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- resources -->\n<!-- resources -->\nafter\n")
    options = ["--models", "tiny", "--images", "4", "--threads", "1"]
    return page, [*options, "--output", str(tmp_path), "--page", str(page)]


def rows(folder):
    return json.loads((folder / "resources.json").read_text())["rows"]


@pytest.mark.parametrize("call", resource_calls.CALLS)
def test_calls(call, tmp_path, monkeypatch):
    """What is measured is the public call of that name, once, and nothing before it."""
    name, *further = call.split(", ")
    holder, _, method = name.rpartition(".")
    if name == "collect":
        holder, method = further[0], "collect"
    owner = getattr(tp_amp, holder) if holder else tp_amp
    function, made = getattr(owner, method), []
    monkeypatch.setattr(owner, method, lambda *x, **y: made.append(y) or function(*x, **y))
    prepared = resource_calls.CALLS[call](resource_calls.Case("tiny", 16, tmp_path))
    made.clear()
    found = resource_calls.measured(prepared, resource_calls.from_here())
    assert len(made) == 1
    assert all(made[0][option] for option in {"every_linear", "refine"} & {*further})
    assert found["seconds"] > 0
    assert found["cpu_seconds"] > 0
    assert found["peak_bytes"] > 0


@pytest.mark.parametrize("megabytes", [64, 256])
def test_the_peak_is_what_a_call_holds(megabytes):
    """Touched memory that is given back before the call ends, over what stood before."""
    standing = torch.ones(64 * 2**18)  # not counted
    before = resource_calls.from_here()
    found = resource_calls.measured(lambda: torch.ones(megabytes * 2**18).sum(), before)
    assert (found["peak_bytes"] - before) / 2**20 == pytest.approx(megabytes, rel=0.1)
    assert float(standing[0]) == 1


@pytest.mark.slow
def test_a_row_is_measured_once(table, tmp_path, capsys, monkeypatch):
    page, options = table
    resources.main([*options, "--calls", "find_mlps"])
    [row] = rows(tmp_path)
    assert row["outcome"] == "done"
    assert row["parameters"] == sum(
        p.numel() for p in resource_calls.Case("tiny", 1, tmp_path).model.parameters()
    )
    assert row["peak_bytes"] >= row["before_bytes"] > 0.1 * GB
    assert 0 < row["seconds"] < row["process_seconds"]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert pages.between(text, "resources") == resource_report.report({"rows": [row]})
    assert "| find_mlps |" in capsys.readouterr().out

    made = []
    done = {**row, "call": "inspect"}
    monkeypatch.setattr(resources, "run", lambda *x: made.append(x[1]) or done)
    resources.main([*options, "--calls", "find_mlps", "inspect"])
    assert made == ["inspect"]
    assert rows(tmp_path)[0] == row
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("limit", "outcome", "text"),
    [
        (("--timeout", "0.5"), "time", "stopped after 0.5 s while it was prepared"),
        (("--memory-gb", "0.05"), "memory", "stopped at 0.05 GB while it was prepared"),
    ],
)
def test_a_row_that_meets_a_limit_says_so(limit, outcome, text, table, tmp_path, monkeypatch):
    page, options = table
    resources.main([*options, "--calls", "compensate", *limit])
    [row] = rows(tmp_path)
    assert row["outcome"] == outcome
    assert row["peak_bytes"] < 0.5 * GB, "it was stopped at once"
    assert f"| compensate | | | | | {text} |" in page.read_text().replace("|  ", "| ")
    # The same limit tells nothing new, a higher one does.
    made = []
    monkeypatch.setattr(resources, "run", lambda *x: made.append(x[1]) or row)
    resources.main([*options, "--calls", "compensate", *limit])
    assert made == []
    resources.main([*options, "--calls", "compensate", limit[0], "100"])
    assert made == ["compensate"]
    assert len(rows(tmp_path)) == 1


def test_a_row_that_fails_says_why_and_is_measured_again(table, tmp_path, monkeypatch):
    page, options = table
    script = tmp_path / "broken.py"
    script.write_text("raise ValueError('no such model')")
    monkeypatch.setattr(resource_calls, "__file__", str(script))
    for _ in range(2):
        resources.main([*options, "--calls", "inspect"])
        [row] = rows(tmp_path)
        assert row["outcome"] == "failed"
    assert "failed: ValueError: no such model while it was prepared" in page.read_text()


def row_of(**changes):
    known = {"model": "ViT-B/16", "call": "inspect", "images": 8, "threads": 2}
    known |= {"processor": "some", "parameters": 86_600_000, "before_bytes": GB, "message": None}
    known |= {"peak_bytes": 3 * GB, "seconds": 12.5, "cpu_seconds": 24.25, "timeout": 60.0}
    return {**known, "memory_gb": 16.0, "outcome": "done", "other_cores": 0.0, **changes}


def test_table():
    made = [
        row_of(call="compensate", outcome="memory"),
        row_of(),
        row_of(call="find_mlps", other_cores=0.9),
        row_of(images=256),
    ]
    text = resource_report.report({"rows": made})
    first, second = text.split("\n\n")[1::2]
    assert "| inspect | 12.50 | 24.25 | 2.00 | 3.00 |  |" in first
    assert "| find_mlps | 12.50\\* | 24.25 | 2.00 | 3.00 |  |" in first
    assert "| compensate |  |  | ≥ 2.00 | ≥ 3.00 | stopped at 16 GB |" in first
    assert first.index("inspect") < first.index("find_mlps") < first.index("compensate")
    assert "inspect" in second
    assert "**ViT-B/16**, 86.6 M parameters: 8 images, 2 threads, some" in text
    assert "of 1 rows the time" in text
    assert "\\*" not in resource_report.report({"rows": [row_of()]})
    assert resource_report.report(None) == pages.NOT_RUN
