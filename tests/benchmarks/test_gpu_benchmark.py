"""`make cuda`, as far as a CPU can run it."""

import json
import re
from pathlib import Path

import gpu
import gpu_report
import gpu_timings
import open_clip
import pages
import pytest
import torch


@pytest.fixture
def options(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu -->\n<!-- gpu -->\n")
    small = ["--device", "cpu", "--batch-size", "4", "--repeats", "2"]
    return [*small, "--output", str(tmp_path), "--page", str(page)]


@pytest.fixture(scope="module")
def bench():
    return gpu_timings.Bench("tiny", "cpu", 4)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as told:
        gpu.main(["--output", str(tmp_path)])
    assert told.value.code == "there is no GPU that PyTorch can use, so nothing was run"
    assert not list(tmp_path.iterdir())


def test_every_test_that_needs_a_gpu_is_run():
    tests = Path(__file__).parents[1]
    needy = [path for path in tests.rglob("test_*.py") if "not torch.cuda" in path.read_text()]
    assert {str(path.relative_to(gpu.ROOT)) for path in needy if path != Path(__file__)} == {
        *gpu.files_with_tests()
    } - {"tests/benchmarks/test_gpu_benchmark.py"}
    for path in needy:
        marks = re.findall(r"^.*skipif\(not torch\.cuda.*$", path.read_text(), re.MULTILINE)
        assert path.read_text().count("mark.cuda") >= len(marks), path


def test_stages_of_a_model():
    found = dict(gpu_timings.of_model("tiny", "cpu", 4, 2))
    assert list(found) == [
        *("model", "score", "score, activation checkpointing", "search", "throughput")
    ]
    assert found["model"]["mlps"] == 3
    assert all(values["seconds"] > 0 for name, values in found.items() if name != "model")
    variants = found["throughput"]["variants"]
    dense = variants["dense"]
    assert dense["parameters"] == found["model"]["parameters"]
    assert dense["times_dense"] == 1
    for entry in variants.values():
        # Two Linears of 128 channels: a hidden channel has 128 weights on each side, and a bias.
        lost = 3 * (dense["mean_width"] - entry["mean_width"]) * (128 + 128 + 1)
        assert dense["parameters"] - entry["parameters"] == pytest.approx(lost)
        assert entry["images_per_second"] > 0
    assert variants["AMP's mean width"]["mean_width"] == round(512 * 2682 / 6144)
    assert variants["DGMR's ratio 1"]["mean_width"] == 128


def test_widths_are_multiples_of_what_they_are_called(bench):
    widths = bench.variants()
    irregular = widths["round_to=1"]
    assert any(width % 8 for width in irregular.values())
    for multiple in (8, 16, 32, 64):
        for name, width in widths[f"round_to={multiple}"].items():
            assert width % multiple == 0
            assert 0 <= width - irregular[name] < multiple


def test_the_search_leaves_the_model_dense(bench):
    bench.score(False)
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    bench.search()
    after = bench.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module._forward_pre_hooks for module in bench.model.modules())


def test_a_stage_that_fails_leaves_the_others(monkeypatch):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("too large\nfurther lines")

    monkeypatch.setattr(gpu_timings.Bench, "score", fail)
    found = dict(gpu_timings.of_model("tiny", "cpu", 4, 2))
    assert found["score"] == {"failed": "OutOfMemoryError: too large"}
    assert found["search"]["failed"].startswith("ValueError: EntropyTaylorImportance has neither")
    assert found["throughput"]["seconds"] > 0


def test_stages_of_layers():
    found = dict(gpu_timings.of_layers("cpu", [(40, 8)]))
    assert list(found) == ["reconstruction_order, 40 x 8", "gram_schmidt_order, 40 x 8"]


SUITE = """
import time
import pytest

pytestmark = pytest.mark.cuda

def test_good(): pass
def test_bad(): assert False
@pytest.mark.skip(reason="two GPUs")
def test_large(): pass
"""


def test_tests_are_counted(tmp_path):
    file = tmp_path / "test_suite.py"
    file.write_text(SUITE)
    found = gpu.run_tests([str(file)], 60)
    assert found["passed"] == 1
    assert [name.rpartition("::")[2] for name in found["failed"]] == ["test_bad"]
    assert found["left_out"] == {"two GPUs": 1}
    assert found["outcome"] == "pytest ended with 1"
    file.write_text(SUITE.replace("assert False", "time.sleep(100)"))
    assert gpu.run_tests([str(file)], 3)["outcome"] == "stopped after 3 s"
    file.write_text("import nothing_of_this_name")
    assert gpu.run_tests([str(file)], 60)["outcome"] == "pytest ended with 2"


@pytest.mark.slow
def test_one_part_in_a_process_of_its_own(options, tmp_path, capsys):
    gpu.main([*options, "--no-tests", "--parts", "layers"])
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["tests"] is None
    assert record["timings"]["layers"]["outcome"] == "done"
    text = gpu_report.report(record)
    assert pages.between((tmp_path / "page.md").read_text(), "gpu") == text
    assert "| layers | gram_schmidt_order, 96 x 24 |" in text
    assert text in capsys.readouterr().out


def test_a_part_for_which_no_time_is_left_says_so(options, tmp_path):
    with pytest.raises(SystemExit) as told:
        gpu.main([*options, "--no-tests", "--parts", "tiny", "--minutes", "0.005"])
    assert told.value.code == 1
    text = (tmp_path / "page.md").read_text()
    assert "| tiny | the rest | stopped after 0 s, when the time was over |" in text


STAGES = {"score": {"failed": "OutOfMemoryError: x"}, "search": {"seconds": 2.0, "peak_gb": 3.0}}
PART = {"outcome": "done", "seconds": 1.0, "stages": STAGES}
TESTS = {"outcome": "done", "seconds": 1.0, "passed": 3, "failed": [], "left_out": {"no GPU": 2}}


@pytest.mark.parametrize(
    ("tests", "part", "sound"),
    [
        (TESTS, PART, True),
        (None, PART, True),
        ({**TESTS, "failed": ["a::b"], "outcome": "pytest ended with 1"}, PART, False),
        ({"outcome": "stopped after 3 s", "seconds": 3.0, "failed": []}, PART, False),
        (TESTS, {**PART, "outcome": "ValueError: x"}, False),
        (TESTS, {**PART, "stages": {"score": {"failed": "RuntimeError: x"}}}, False),
    ],
)
def test_it_fails_where_anything_did(tests, part, sound, options, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_tests", lambda *_: tests)
    monkeypatch.setattr(gpu, "run_timings", lambda *_: part)
    arguments = [*options, "--parts", "tiny", *(["--no-tests"] * (tests is None))]
    if sound:
        gpu.main(arguments)
    else:
        with pytest.raises(SystemExit):
            gpu.main(arguments)
    text = (tmp_path / "page.md").read_text()
    if tests and "passed" in tests:
        assert f"3 passed, {len(tests['failed'])} failed" in text
        assert "left out: 2, no GPU" in text
    for failed in (tests or {}).get("failed", []):
        assert f"failed: `{failed}`" in text
    assert ("| tiny | score | OutOfMemoryError: x |  |" in text) == (part["stages"] is STAGES)


def test_the_papers_width():
    assert round(gpu_timings.AMP * 6144) == 2682
    config = open_clip.get_model_config(gpu_timings.MODELS["ViT-g/14"][1])["vision_cfg"]
    assert int(config["width"] * config["mlp_ratio"]) == 6144
