"""What kernels on the host must show under the schedules in which their threads may run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from .build import SCHEDULES, Harness

Run = Callable[[str], Sequence[torch.Tensor]]  # the results under a schedule, which it sets


def assert_same_under_all(run: Run) -> None:
    for values in zip(*map(run, SCHEDULES), strict=True):
        assert all(torch.equal(value, values[0]) for value in values)


def assert_all_needed(harness: Harness, sites: Iterable[str], run: Run, expected: Sequence[torch.Tensor]) -> None:
    """Without the barrier or wait at a site, some schedule fails or gives something else than ``expected``."""

    def notices(schedule: str) -> bool:
        try:
            results = run(schedule)
        except RuntimeError:
            return True
        return not all(torch.equal(value, right) for value, right in zip(results, expected, strict=True))

    for site in sites:
        harness.skip_barrier(site)
        assert any(map(notices, SCHEDULES)), f"nothing changes without what is at {site}"
