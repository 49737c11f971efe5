"""A plugin for pytest on a device (`pytest -p on_device --capture sys`), for a run that may never come to its end.

A failure is printed when it happens. A worker of pytest-xdist whose device is lost (after a kernel that wrote out of
bounds every later call fails) ends, so that another one takes its place, instead of failing all tests that it is given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest
import torch

from slowfast_fast.bench.apart import device_is_lost

IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and not IN_WORKER:  # a worker's reports come to the process that it works for
        tell(report, "failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and IN_WORKER and lost():
        tell(report, "lost the device")
        os._exit(1)  # to xdist this is the test in which a worker crashed
    return report


def tell(report: pytest.TestReport, what: str) -> None:
    print(f"\n===== {report.nodeid} {what} ({report.when})\n{report.longreprtext}", file=sys.__stderr__, flush=True)


def lost() -> bool:
    return torch.cuda.is_initialized() and device_is_lost(torch.device("cuda"))
