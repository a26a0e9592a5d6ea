"""With old releases: what they don't have yet is skipped, with the release in the reason."""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest
import timm
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
