"""Interleaved measurement: every round runs every variant once, so that a machine that changes speed does so for all.

Figures are medians over the rounds, ratios are ratios of medians. What the machine can do at best is measured in the
same rounds: a copy that moves as many bytes as the case must move (so it meets the same level of cache), and a square
matrix product in the case's dtype (float32 where the device has no arithmetic of that dtype).
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cases import Case, natively_supported
from .leg import Leg
from .network import GRAPHED, NetworkCase
from .variants import OURS

COPY, GEMM = "copy", "gemm"
FAILED = "failed: "  # so begins the reason of what should have run
# Baselines that are no variant: the fastest one of stock, and what the machine can do at best.
FASTEST_STOCK, LIMIT = "the fastest stock variant", "the limit"
MILLISECOND = "a millisecond"  # what ours with a CUDA graph takes, from the call to the result
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
NETWORK_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}  # a whole network has time for one that warms every core
L2_FLUSH_BYTES = 256 << 20
# Clock cycles of a GPU: about 0.1 ms, and 50 ms, longer than any case but a whole network takes to launch (which keeps
# the device busy for longer than that).
SHORTEST_HOLD, LONGEST_HOLD = 200_000, 100_000_000
LARGE_COPY_BYTES = 2 << 30
# Largest relative L2 error against float64 with which a variant still counts as doing the same work: of the result, of
# a gradient. This only keeps a broken variant out of the table, the tests judge exactness. A pre-activation that rounds
# to the other side of zero flips a whole element of the ReLU mask, hence the wide bounds for gradients.
TOLERANCE = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-5, 1e-2),
    torch.bfloat16: (2e-2, 2e-1),
    torch.float16: (3e-3, 1e-1),
}
# The same for the whole network, where training amplifies rounding layer by layer (batch statistics of few values).
NETWORK_TOLERANCE = {
    torch.float64: (1e-10, 1e-6),
    torch.float32: (1e-3, 1e-1),
    torch.bfloat16: (3e-1, 3e-1),
    torch.float16: (5e-2, 5e-2),
}


class CpuClock:
    """Wall-clock seconds of one call."""

    def time(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaClock:
    """Seconds on the device between two events around one call, its L2 cache flushed before.

    The device is held back until the host has queued the whole call, for as many cycles as that takes: what is timed
    is the work on the device, not how fast Python launches it.
    """

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
        self._hold = SHORTEST_HOLD

    def time(self, call: Callable[[], object]) -> float:
        while True:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(self._hold)
            self._flush.zero_()
            start.record()
            call()
            end.record()
            too_short = start.query()
            end.synchronize()
            if not too_short or self._hold >= LONGEST_HOLD:
                return start.elapsed_time(end) / 1e3
            self._hold *= 2


class HostClock:
    """Wall-clock seconds from a call to its result on a GPU: what one caller waits, launches included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def time(self, call: Callable[[], object]) -> float:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - start


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class Race:
    """Runs a set of calls in rounds and keeps the seconds of each; with a host clock, of each once more by that."""

    def __init__(
        self, calls: Mapping[str, Callable[[], object]], clock: CpuClock | CudaClock, host: HostClock | None = None
    ) -> None:
        self.calls = dict(calls)
        self.seconds: dict[str, list[float]] = {name: [] for name in self.calls}
        self.latencies: dict[str, list[float]] = {} if host is None else {name: [] for name in self.calls}
        self._clock, self._host = clock, host
        self._rounds = 0

    def warm_up(self, times: int = 1) -> None:
        for call in self.calls.values():
            for _ in range(times):
                self._clock.time(call)

    def run(self, name: str) -> None:
        self.seconds[name].append(self._clock.time(self.calls[name]))
        if self._host is not None:
            self.latencies[name].append(self._host.time(self.calls[name]))

    def round(self, without: str | None = None) -> None:
        """Every call once, beginning one further in each round so that none always follows the same neighbour."""
        names = [name for name in self.calls if name != without]
        first = self._rounds % len(names) if names else 0
        for name in names[first:] + names[:first]:
            self.run(name)
        self._rounds += 1


def tolerance(table: Mapping[torch.dtype, tuple[float, float]], leg: Leg, device: torch.device) -> tuple[float, float]:
    """The entry of a tolerance table for the precision of a leg on the device."""
    rounds = leg.tf32 and device.type == "cuda"
    return table[torch.float16 if rounds else leg.dtype]  # TF32 rounds inputs to as many bits as float16


def limits(case: Case | NetworkCase, device: torch.device) -> dict[str, Callable[[], object]]:
    """The two calls that measure what the machine can do: see the module's docstring."""
    source, target = copy_buffers(case.bytes, device)
    n = gemm_size(case, device.type)
    # Where the dtype is emulated, float32 is what a kernel computes in and so the rate that limits it.
    dtype = case.dtype if natively_supported(case.dtype, device) else torch.float32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return {COPY: lambda: target.copy_(source), GEMM: lambda: torch.mm(a, b)}


def gemm_size(case: Case | NetworkCase, device: str) -> int:
    """Rows and columns of the square product that is raced with a case."""
    return (NETWORK_GEMM_SIZE if isinstance(case, NetworkCase) else GEMM_SIZE)[device]


def copy_buffers(moved: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A source of random bytes and a target; a copy reads and writes `moved` bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.int8, device=device).random_()
    return source, torch.empty_like(source)


def large_copy_rate(device: torch.device) -> float:
    """10^9 bytes, read and written, a second in a copy that is far larger than any cache."""
    source, target = copy_buffers(LARGE_COPY_BYTES, device)
    race = Race({COPY: lambda: target.copy_(source)}, clock_for(device))
    race.warm_up()
    for _ in range(5):
        race.round()
    return LARGE_COPY_BYTES / statistics.median(race.seconds[COPY]) / 1e9


def relative_error(result: Tensor, exact: Tensor) -> float:
    """L2 norm of the difference over that of `exact`, in float64."""
    exact = exact.double()
    return float((result.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def disagreement(
    results: Mapping[str, Tensor], exact: Mapping[str, Tensor], tolerance: tuple[float, float]
) -> tuple[float, str | None]:
    """The largest relative error among the results, and what is wrong with them (None when nothing is)."""
    if results.keys() != exact.keys():
        return float("inf"), f"gave {sorted(results)} where {sorted(exact)} was expected"
    worst = 0.0
    for name, tensor in exact.items():
        if results[name].shape != tensor.shape:
            return float("inf"), f"{name} has shape {tuple(results[name].shape)}, expected {tuple(tensor.shape)}"
        error = relative_error(results[name], tensor)
        allowed = tolerance[0 if name == "y" else 1]
        if not error <= allowed:  # also true for NaN
            return error, f"relative error of {name} against float64 is {error:.1e}, more than {allowed:.0e}"
        worst = max(worst, error)
    return worst, None


@dataclass
class Measurement:
    """All that one case gave: seconds per variant and round, errors against float64, peaks of memory, and who could not
    run and why. `latencies`: of an evaluation of a network on a GPU, by the host's clock; elsewhere `seconds` are."""

    case: Case | NetworkCase
    device: str
    ours: str  # the variant that `auto` picks
    seconds: dict[str, list[float]] = field(default_factory=dict)
    latencies: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)  # bytes; of a network's training step, see memory.py
    unavailable: dict[str, str] = field(default_factory=dict)
    checked_clips: list[int] | None = None  # of the batch, those that errors are of; None for all

    @property
    def failed(self) -> list[str]:
        """The variants that raised."""
        return [name for name, reason in self.unavailable.items() if reason.startswith(FAILED)]

    @property
    def occurrences(self) -> int:
        """How often the network runs this case."""
        return self.case.shape.count if isinstance(self.case, Case) else 1

    @property
    def variants(self) -> list[str]:
        return [name for name in self.seconds if name not in (COPY, GEMM)]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def percentile(self, name: str, percent: int) -> float:
        """Seconds until the result that this many of a hundred calls did not exceed, interpolated between the
        rounds."""
        seconds = self.latencies.get(name, self.seconds[name])
        return seconds[0] if len(seconds) < 2 else statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1]

    def clips_per_second(self, name: str) -> float:
        return self.case.leg.batch / self.median(name)

    def spread(self, name: str) -> float:
        """Distance between the quartiles over the median: how much the machine wavered. 0 for fewer than two rounds."""
        seconds = self.seconds[name]
        if len(seconds) < 2:
            return 0.0
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return (high - low) / middle

    def ratio(self, baseline: str, name: str | None = None) -> float | None:
        """How many times faster `name` (by default ours) is than the baseline; None when one of the two did not run.

        A baseline is a variant, `FASTEST_STOCK` or `LIMIT` (then below 1 as a rule); or `MILLISECOND`, of the variant
        with a CUDA graph.
        """
        if baseline == MILLISECOND:
            latencies = self.latencies.get(GRAPHED)
            return 1e-3 / statistics.median(latencies) if latencies else None
        name, theirs = name or self.ours, self.baseline_seconds(baseline)
        return None if theirs is None or name not in self.seconds else theirs / self.median(name)

    def peak_ratio(self, baseline: str) -> float | None:
        """Ours' peak memory over the baseline's; None when one of the two did not run."""
        ours, theirs = self.peaks.get(self.ours), self.peaks.get(baseline)
        return None if ours is None or theirs is None else ours / theirs

    def baseline_seconds(self, baseline: str) -> float | None:
        if baseline == LIMIT:
            return self.limit_seconds
        if baseline == FASTEST_STOCK:
            stock = [self.median(name) for name in self.variants if not name.startswith(OURS)]
            return min(stock, default=None)
        return self.median(baseline) if baseline in self.seconds else None

    def gigabytes_per_second(self, name: str) -> float:
        return self.case.bytes / self.median(name) / 1e9

    def gigaflops_per_second(self, name: str) -> float:
        return self.case.flops / self.median(name) / 1e9

    @property
    def copy_gigabytes_per_second(self) -> float:
        return self.gigabytes_per_second(COPY)

    @property
    def gemm_gigaflops_per_second(self) -> float:
        return 2 * gemm_size(self.case, self.device) ** 3 / self.median(GEMM) / 1e9

    @property
    def limit_seconds(self) -> float:
        """The least time the machine needs: the bytes at the copy's rate or the FLOPs at the gemm's, the longer one."""
        return max(self.median(COPY), self.case.flops / self.gemm_gigaflops_per_second / 1e9)

    @property
    def bound(self) -> str:
        return "memory" if self.limit_seconds == self.median(COPY) else "compute"

    def percent_of_limit(self, name: str) -> float:
        return 100 * self.limit_seconds / self.median(name)
