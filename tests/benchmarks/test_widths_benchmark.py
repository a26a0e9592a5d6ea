"""The benchmark on random models: what it writes, goes on from, and tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reference
import torch
import widths
from random_data import random_images, random_labels, random_reference, write_parquet

import tp_amp


@pytest.mark.slow
def test_widths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    [*_, refined] = widths.KINDS
    monkeypatch.setitem(widths.KINDS, refined, (widths.KINDS[refined][0], 1))
    for kind in list(widths.KINDS)[1:-1]:  # the last one holds all that these do
        monkeypatch.delitem(widths.KINDS, kind)
    model = random_reference("vit")
    reference.save_reference(model, "vit", {}, tmp_path)
    for split, count in (("train", 24), ("test", 40)):
        write_parquet(tmp_path, split, random_images(count, 0), random_labels(count, 0))
    arguments = ["--data", str(tmp_path), "--checkpoints", str(tmp_path), "--output", str(tmp_path)]
    command = [*arguments, "--models", "vit", "--seeds", "0", "1", "--images", "16"]
    command += ["--sizes", "0.7", "0.01", "--kinds", *widths.KINDS]
    passes, compensate = set(), tp_amp.compensate
    monkeypatch.setattr(
        tp_amp, "compensate", lambda *a, **n: passes.add(n["refine"]) or compensate(*a, **n)
    )
    widths.main(command)
    assert passes == {0, 1}
    record = json.loads((tmp_path / "widths.json").read_text())
    first = widths.report(record)
    assert first in capsys.readouterr().out
    rows = record["models"]["vit"]["rows"]
    assert rows["0.7"].keys() == widths.KINDS.keys()
    assert all(len(values["accuracy"]) == 2 for values in rows["0.7"].values())
    assert "out of reach" in first.splitlines()[-1]

    monkeypatch.setattr(widths, "Draw", None)  # nothing is measured again
    widths.main(command)
    assert first in capsys.readouterr().out
    with pytest.raises(ValueError, match="was measured with"):
        widths.main([*command, "--images", "8"])


def test_divergence_is_that_of_the_classes() -> None:
    images = torch.eye(3)
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    p, q = (torch.softmax(model(images), 1).detach() for model in (one, other))
    expected = float((p * (p / q).log()).sum(1).mean())
    assert widths.divergence(one, other, images) == pytest.approx(expected, rel=1e-5)
