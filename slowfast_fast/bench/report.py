"""What a run of the benchmarks leaves behind: the table, the summary with its targets, and the JSON document."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .measure import Measurement, large_copy_rate
from .network import NetworkCase
from .summary import STOCK, summarise

SCHEMA = 2


def table(measurement: Measurement) -> str:
    """One case as text: a heading with its size and the machine's limits, then a line per variant, fastest first. Of a
    network clips a second and the slowest round of twenty are told, on a GPU by the host's clock, of an op how fast it
    moves bytes."""
    case = measurement.case
    copy, gemm = measurement.copy_gigabytes_per_second, measurement.gemm_gigaflops_per_second
    per_second, giga = ("TFLOP/s", 1e3) if measurement.device == "cuda" else ("GFLOP/s", 1.0)
    network = isinstance(case, NetworkCase)
    # Percentiles are the host's; where the column "ms" is the device's, the median is told in both.
    percentiles = ((50, 95) if measurement.latencies else (95,)) if network else ()
    rate, tail = "clips/s" if network else "GB/s", "".join(f"{f'p{percent} ms':>9}" for percent in percentiles)
    if measurement.peaks:
        tail += f"{'peak MB':>9}"
    lines = [
        f"{case.name} ({case.leg}): {case.bytes / 1e6:.2f} MB, {case.flops / 1e9:.3f} GFLOP, {measurement.bound} bound "
        f"(copy {copy:.1f} GB/s, gemm {gemm / giga:.0f} {per_second})",
        f"  {'variant':<26}{'ms':>9}{'spread':>8}{'x stock':>9}{rate:>8}{per_second:>9}{'% limit':>9}{'error':>9}",
    ]
    lines[1] += tail
    for name in sorted(measurement.variants, key=measurement.median):
        ratio = measurement.ratio(STOCK, name)
        lines.append(
            f"  {name + (' *' if name == measurement.ours else ''):<26}"
            f"{measurement.median(name) * 1e3:>9.3f}"
            f"{measurement.spread(name):>7.0%} "
            f"{'' if ratio is None else f'{ratio:.2f}':>8} "
            f"{measurement.clips_per_second(name) if network else measurement.gigabytes_per_second(name):>7.1f} "
            f"{measurement.gigaflops_per_second(name) / giga:>8.1f} "
            f"{measurement.percent_of_limit(name):>8.0f} "
            f"{measurement.errors[name]:>8.0e}"
            + "".join(f"{measurement.percentile(name, percent) * 1e3:>9.3f}" for percent in percentiles)
            + (f"{measurement.peaks[name] / 1e6:>9.0f}" if name in measurement.peaks else "")
        )
    lines += [f"  {name}: not run, {reason}" for name, reason in measurement.unavailable.items()]
    if measurement.checked_clips is not None:
        checked = measurement.checked_clips
        lines.append(f"  errors are those of {len(checked)} clips of {case.leg.batch}: {', '.join(map(str, checked))}")
    return "\n".join(lines)


def network_table(cases: Sequence[Mapping[str, Any]]) -> str:
    """Whole networks of documents in Markdown: of ours time, rate and share of the limit, and how many times faster
    than every other variant it is; empty where one did not run."""
    others = dict.fromkeys(name for case in cases for name in case["variants"] if name != case["ours"])
    lines = [["network", "ms (p50)", "p95", "clips/s", "% of the limit", *(f"x {name}" for name in others)]]
    for case in cases:
        variants, row = case["variants"], [case["name"].split(" ", 1)[1]]
        if (ours := variants.get(case["ours"])) is None:
            row += [""] * (4 + len(others))
        else:
            waits = ours.get("p50", ours["median"]), ours["p95"]
            row += [f"{1e3 * wait:.0f}" if wait >= 0.1 else f"{1e3 * wait:.2f}" for wait in waits]
            row += [f"{ours['clips_per_second']:.2f}", f"{ours['percent_of_limit']:.0f}"]
            row += [f"{variants[name]['median'] / ours['median']:.2f}" if name in variants else "" for name in others]
        lines.append(row)
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
        found["memory_bytes"] = properties.total_memory
        found["large_copy_gigabytes_per_second"] = round(large_copy_rate(device), 1)
    return found


def heading(machine: Mapping[str, Any], found: Mapping[str, Any] | None = None) -> str:
    """Where and with what, in one line. `found`: the versions, by default those of this process."""
    found = found or versions()
    where = f"{machine['gpu']}, {machine['cpu']}" if "gpu" in machine else machine["cpu"]
    return (
        f"{where}, {machine['threads']} threads, {machine['cpu_capability']}, torch {found['torch']}, "
        f"slowfast_fast {found['slowfast_fast']} ({(found['commit'] or 'no checkout')[:12]})"
    )


def busy(machine: Mapping[str, Any]) -> str | None:
    """A warning when the machine was not quiet before the run."""
    if machine["load_average"] < 0.5:
        return None
    return (
        f"WARNING: the load average is {machine['load_average']}: something else is running, and the figures will waver"
    )


def versions() -> dict[str, str | None]:
    return {
        "slowfast_fast": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "triton": _triton(),
        "driver": _driver(),
        "python": platform.python_version(),
        "os": platform.platform(),
    }


def document(
    measurements: Sequence[Measurement],
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    left_out: Sequence[Mapping[str, str]] = (),
    *,
    finished: bool = True,
) -> dict[str, Any]:
    """The JSON document of a run. Times are seconds, one per round; rates are 10^9 bytes and operations per second.

    `machine` is as it was before the run, because its load average is to show what else ran. `left_out` names the
    cases that were asked for and not measured, each with its leg and the reason. A document that is not `finished` was
    written on the way, and what it stands in was ended by force if nothing runs any more.
    """
    return {
        "schema": SCHEMA,
        "finished": finished,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": dict(machine),
        "settings": dict(settings),
        "summary": [
            {
                "goal": str(answer.goal),
                "leg": asdict(answer.leg),
                **asdict(answer.goal),
                "target": answer.target,
                "ratio": answer.ratio,
                "measured": answer.measured,
                "expected": answer.expected,
                "met": answer.met,
            }
            for answer in summarise(measurements)
        ],
        "cases": [figures(measurement) for measurement in measurements],
        "left_out": [dict(case) for case in left_out],
    }


def write(document: Mapping[str, Any], path: Path) -> None:
    """The document in place of an older one, at once: whoever reads or is killed meanwhile has the one or the other."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def figures(measurement: Measurement) -> dict[str, Any]:
    """One case as the document has it."""
    case = measurement.case
    shape = {"network": case.network} if isinstance(case, NetworkCase) else asdict(case.shape)
    return {
        "name": case.name,
        "direction": case.direction,
        "leg": asdict(case.leg),
        "shape": shape,
        "bytes": case.bytes,
        "flops": case.flops,
        "limit": {
            "seconds": measurement.limit_seconds,
            "bound": measurement.bound,
            "copy_gigabytes_per_second": measurement.copy_gigabytes_per_second,
            "gemm_gigaflops_per_second": measurement.gemm_gigaflops_per_second,
        },
        "ours": measurement.ours,
        "variants": {name: rates(measurement, name) for name in measurement.variants},
        "unavailable": measurement.unavailable,
        "checked_clips": measurement.checked_clips,  # that relative_error is of; null for all
    }


def rates(measurement: Measurement, name: str) -> dict[str, Any]:
    """All figures of one variant."""
    return {
        "median": measurement.median(name),
        "p50": measurement.percentile(name, 50),
        "p95": measurement.percentile(name, 95),
        "clips_per_second": measurement.clips_per_second(name),
        "seconds": measurement.seconds[name],
        "latencies": measurement.latencies.get(name),
        "speedup_over_stock": measurement.ratio(STOCK, name),
        "gigabytes_per_second": measurement.gigabytes_per_second(name),
        "gigaflops_per_second": measurement.gigaflops_per_second(name),
        "percent_of_limit": measurement.percent_of_limit(name),
        "relative_error": measurement.errors[name],
        "peak_bytes": measurement.peaks.get(name),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cudnn() -> str | None:
    """As cuDNN counts: 91900 is 9.19.0."""
    number = torch.backends.cudnn.version()
    return None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _triton() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


@cache  # a document is written after every case
def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file is in, marked where tracked files differ; outside of one what the
    environment says (SLOWFAST_FAST_COMMIT, for a copy of the files on another machine)."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SLOWFAST_FAST_COMMIT") or None
    return f"{commit} with changes" if changes else commit
