"""The demo, with one epoch and few images."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
import quickstart

import tp_amp


@pytest.fixture
def few_images(monkeypatch):
    load_data = quickstart.load_data

    def load_few(seed):
        return tuple((images[:96], labels[:96]) for images, labels in load_data(seed))

    monkeypatch.setattr(quickstart, "load_data", load_few)


def test_demo_compares_all_criteria_at_amps_size(few_images, monkeypatch, tmp_path, capsys):
    pruners, applied = [], []

    class Pruner(tp_amp.AdaptiveMLPPruner):
        def step(self, *args, **kwargs):
            pruners.append(self)
            return super().step(*args, **kwargs)

    def apply_plan(model, example_inputs, plan):
        applied.append(plan)
        original(model, example_inputs, plan)

    original = tp_amp.apply_plan
    monkeypatch.setattr(tp_amp, "AdaptiveMLPPruner", Pruner)
    monkeypatch.setattr(tp_amp, "apply_plan", apply_plan)
    monkeypatch.setattr(quickstart, "MINIMUM_ACCURACY", 0)
    image = tmp_path / "demo.png"

    quickstart.main(["--epochs", "1", "--output", str(image)])

    [pruner] = pruners
    assert applied[0].keep == pruner.plan.keep  # AMP's importance at AMP's widths is AMP
    kept = sum(pruner.plan.widths.values())
    assert kept < sum(pruner.plan.dense_widths.values())
    assert [sum(plan.widths.values()) for plan in applied] == [kept] * len(applied)
    # Two columns, Random several times.
    assert len(applied) == 2 * (len(quickstart.CRITERIA) - 1 + quickstart.RANDOM_SEEDS)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [image]
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in quickstart.CRITERIA)


def test_demo_stops_if_the_model_is_not_trained_well(few_images, tmp_path):
    with pytest.raises(SystemExit, match="less than 95%"):
        quickstart.main(["--epochs", "1", "--output", str(tmp_path / "demo.png")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("widths", "expected"), [([5, 3, 3], [4, 4, 3]), ([2, 2], [2, 2])])
def test_uniform_widths_keep_the_sum(widths, expected):
    uniform = quickstart.uniform_widths({str(index): width for index, width in enumerate(widths)})
    assert list(uniform.values()) == expected
