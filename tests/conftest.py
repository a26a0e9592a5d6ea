"""What old releases don't have yet is skipped; and fixtures that several tests share."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import timm
import torch
from packaging.version import Version

# What came after the oldest release of timm that is supported.
_NEWER = re.compile(
    r"Unknown model \(\w+\)|unexpected keyword argument 'fuse_out_proj'|Optimizer muon not found"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    except (RuntimeError, TypeError, ValueError) as error:
        newer = _NEWER.search(str(error))
        if newer and Version(timm.__version__) < Version("1.0.26"):
            pytest.skip(f"timm {timm.__version__}: {newer[0]}")
        raise


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums come in the same order each time, and no more memory is held for each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tp-amp prune` writes."""
    from command_line import PRUNE

    from tp_amp.cli.main import main

    folder = tmp_path_factory.mktemp("saved") / "small"
    assert main([*PRUNE[:-1], str(folder), "--json"]) == 0
    return folder
