"""What is held in memory up to a bound, and beyond it in files that do not stay."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from tp_amp.running.shelf import Shelf


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize("bound", [None, 0, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_values_come_back_bit_for_bit(bound: int | None, dtype: torch.dtype) -> None:
    tensors = [torch.randn(5, 6).to(dtype) for _ in range(4)]
    with Shelf(bound) as shelf:
        held = [shelf.hold(tensor) for tensor in tensors]
        for _ in range(2):
            assert all(torch.equal(h.get(), t) for h, t in zip(held, tensors, strict=True))


def test_no_more_than_the_bound_is_in_memory(tmp_path: Path) -> None:
    with Shelf(100) as shelf:
        held = [shelf.hold(torch.zeros(10)) for _ in range(4)]
        assert (shelf.bytes, shelf.spilled) == (80, 2)
        assert len(list(tmp_path.glob("*/*"))) == 2
        del held[0], held[-1]
        gc.collect()
        assert shelf.bytes == 40
        assert len(list(tmp_path.glob("*/*"))) == 1
        again = shelf.hold(torch.ones(15))
        assert (shelf.bytes, shelf.spilled) == (100, 2)
        assert float(again.get().sum()) == 15
    assert list(tmp_path.iterdir()) == []


def test_a_view_is_saved_alone(tmp_path: Path) -> None:
    whole = torch.zeros(100_000)
    with Shelf(0) as shelf:
        held = shelf.hold(whole[:5])
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) < 10_000
        assert held.get().shape == (5,)


def test_nothing_is_written_where_nothing_has_to(tmp_path: Path) -> None:
    with Shelf() as shelf:
        assert shelf.hold("no tensor").get() == "no tensor"
        held = shelf.hold(torch.zeros(1000))
        assert held.get().shape == (1000,)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_goes_after_an_error(tmp_path: Path) -> None:
    def failing() -> None:
        with Shelf(0) as shelf:
            shelf.hold(torch.zeros(3))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert list(tmp_path.iterdir()) == []
