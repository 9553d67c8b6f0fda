"""A failing test of the rounds prints what its peers heard and decided last."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.failed:
        report.sections += [("decisions", one.decisions()) for one in cluster.made[-2:]]
    if report.when == "teardown":
        cluster.made.clear()
    return report
