"""What old releases don't have yet is skipped; and fixtures that several tests share."""

from __future__ import annotations

import re
import sys
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


@pytest.fixture(autouse=True)
def settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Are given back: benchmarks set threads and how attention runs for the process they own."""
    fused = timm.layers.config._USE_FUSED_ATTN
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", fused)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fewer_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference models of benchmarks have half as many blocks; all else of them is as it is."""
    if request.path.parent.name != "benchmarks":
        return
    import reference

    fewer = {"vit": {"depth": 3}, "swin": {"depths": (2, 2, 2)}}
    for name, (kind, arguments) in reference.ARCHITECTURES.items():
        monkeypatch.setitem(reference.ARCHITECTURES, name, (kind, arguments | fewer[name]))


@pytest.fixture
def one_thread(settings_of_the_process: None) -> None:
    """Sums come in the same order each time, and no more memory is held for each thread."""
    torch.set_num_threads(1)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def code_of_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that transformers copies before it runs it does not go into the home folder."""
    dynamic_module_utils = pytest.importorskip("transformers.dynamic_module_utils")
    place = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", place)
        yield
    sys.path[:] = [path for path in sys.path if path != place]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tp-amp prune` writes."""
    from command_line import PRUNE

    from tp_amp.cli.main import main

    folder = tmp_path_factory.mktemp("saved") / "small"
    assert main([*PRUNE[:-1], str(folder), "--json"]) == 0
    return folder
