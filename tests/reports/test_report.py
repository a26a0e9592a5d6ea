"""Reports: numbers against their sources, the page as a parser reads it, the terminal's lines."""

import copy
import sys
from pathlib import Path

import pytest
from report_examples import AFTER, BEFORE, FIRST, HEADS, PLAN, Page
from toys import images, toy

import tp_amp
from tp_amp import Measurement, PruningPlan, Report


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
