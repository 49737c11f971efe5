"""Everything that needs a CUDA device, in one command of under nine minutes: `make gpu`.

Builds in place, for this device alone, runs every op of each backend once, then the tests marked gpu and
compute-sanitizer over the ops, and the benchmarks in what time is left. It takes the Python and the packages that are
there: nothing is installed, no network is used. The log, the benchmarks' document and their chart go to $OUT, or to
build/gpu where that is not set; document and chart also to benchmarks/results/. A step that fails does not stop those
that can do without it; the exit status is 1 if any failed. What a step finds is written when it finds it, so that
little is lost where the command is ended before its time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TUNED = ROOT / "slowfast_fast" / "tuned"
SECONDS = 520  # for everything; the budgets below sum up to less, and the benchmarks take what is left
MERGED = "gpu.log"
GRACE = 10  # between asking a step to stop and killing it; also what the benchmarks need after their last case
TOOLS = ("memcheck", "racecheck", "initcheck")
LONGEST_TEST = 100  # seconds; a kernel that runs for longer hangs
POLL = 0.05  # seconds between two looks at the steps that run


@dataclass(frozen=True)
class Step:
    """A command with its budget in seconds. `command` is given the seconds that it has."""

    name: str
    budget: float
    command: Callable[[float], Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    unavailable: str | None = None  # why it cannot run on this machine
    needs: str | None = None  # the step without which it makes no sense


@dataclass
class Result:
    step: str
    outcome: str  # "passed", "skipped", "not run" or what went wrong
    seconds: float = 0.0
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome not in ("passed", "skipped")


def missing() -> list[str]:
    """What the build and the tests need and this machine lacks."""
    modules = {"torch": "2.10", "setuptools": "77", "click": None, "pytest": None}
    found = [_module_missing(name, oldest) for name, oldest in modules.items()]
    sys.path.insert(0, str(ROOT / "build_backend"))
    if importlib.util.find_spec("setuptools"):
        import sff_build

        if sff_build.find_cmake() is None:
            found.append(f"CMake {'.'.join(map(str, sff_build.OLDEST_CMAKE))} or newer")
        if sff_build.find_ninja() is None:
            found.append("Ninja")
    if find_tool("nvcc") is None:
        found.append("nvcc, on PATH, in CUDACXX or in CUDA_HOME")
    return [text for text in found if text]


def _module_missing(name: str, oldest: str | None) -> str | None:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"the Python package {name}"
    if oldest and _numbers(version) < _numbers(oldest):
        return f"the Python package {name} of {oldest} or newer; there is {version}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or beside nvcc."""
    homes = [os.environ.get("CUDA_HOME", ""), os.path.dirname(os.path.dirname(os.environ.get("CUDACXX", "")))]
    folders = [Path(home, "bin") for home in (*homes, "/usr/local/cuda") if home]
    return shutil.which(name) or next((str(path / name) for path in folders if (path / name).is_file()), None)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def describe_device() -> tuple[str, str]:
    """The first CUDA device, as in file names, and its architecture as CMake writes it. Raises if there is none."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"make gpu needs a CUDA device; torch {torch.__version__} finds none")
    major, minor = torch.cuda.get_device_capability()
    # The instructions of one architecture alone ("a") exist from Hopper on.
    architecture = f"{major}{minor}{'a' if major >= 9 else ''}-real"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"), architecture


def plan(device: str, architecture: str, folder: Path, compile: bool, tune: bool = False) -> list[list[Step]]:
    """Groups of steps: one after the other, the steps of a group side by side."""
    python = sys.executable
    build_environment = {"SLOWFAST_FAST_CUDA": "1", "SLOWFAST_FAST_CUDA_ARCHS": architecture}
    if nvcc := find_tool("nvcc"):
        build_environment["CUDACXX"] = nvcc
    build = Step(
        "build",
        150,
        lambda seconds: [python, "setup.py", "--quiet", "build_ext", "--inplace"],
        build_environment,
    )
    groups = [[build], _every_op(python), [*_tests(python), *_sanitizers(python)]]
    groups += [[_tune(python, device, folder)]] * tune
    return [*groups, [_networks(python, device, folder, compile)], [_benchmarks(python, device, folder, compile)]]


def _without_triton() -> str | None:
    return None if installed("triton") else "triton is not installed"


def _every_op(python: str) -> list[Step]:
    """Seconds, where nothing is wrong: whether kernels run at all is the first that one wants to know."""
    return [
        Step(
            f"ops of {backend}",
            40,
            lambda seconds, backend=backend: [python, "tools/exercise_ops.py", backend],
            # Triton's first choices: the tests and the benchmarks measure.
            {"SLOWFAST_FAST_TRITON_TUNE": "0"},
            unavailable=unavailable,
            needs="build",
        )
        for backend, unavailable in (("cuda", None), ("triton", _without_triton()))
    ]


def _tune(python: str, device: str, folder: Path) -> Step:
    precisions = [word for name in ("bfloat16", "float16", "tf32", "float32") for word in ("--dtype", name)]
    return Step(
        "tune",
        SECONDS,
        lambda seconds: [
            *(python, "-m", "slowfast_fast", "tune", "--device", "cuda", *precisions),
            *("--out", str(folder / f"{device}-tuned.json")),
        ],
        unavailable=_without_triton(),
        needs="build",
    )


def _tests(python: str) -> list[Step]:
    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    pytest += ["-p", "on_device", "--capture", "sys", "tests"]
    if installed("xdist"):
        pytest += ["-n", "6", "--max-worker-restart", "100"]
    if installed("pytest_timeout"):  # by a thread: a signal does not end what waits for a device
        pytest += ["--timeout", str(LONGEST_TEST), "--timeout-method", "thread"]
    options = {"environment": {"PYTHONPATH": str(ROOT / "tools")}, "needs": "build"}
    return [
        Step("tests", 150, lambda seconds: [*pytest, "-k", "not triton"], **options),
        Step(
            "tests of triton",
            150,
            lambda seconds: [*pytest, "-k", "triton"],
            unavailable=_without_triton(),
            **options,
        ),
    ]


def _sanitizers(python: str) -> list[Step]:
    sanitizer = find_tool("compute-sanitizer")
    return [
        Step(
            tool,
            150,
            lambda seconds, tool=tool: [
                *(str(sanitizer), "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"),
                *(python, "tools/exercise_ops.py"),
            ],
            # Every tensor is an allocation of its own, so that its end is one to the sanitizer too.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            unavailable=None if sanitizer else "compute-sanitizer is not installed",
            needs="build",
        )
        for tool in TOOLS
    ]


def _networks(python: str, device: str, folder: Path, compile: bool) -> Step:
    """The network at the two sizes that have a target, before the ops take what time is left."""
    words = ["--model", "R50 8x8", "--direction", "fwd", "--dtype", "bfloat16", "--crop", "256"]
    words += ["--batch", "32", "--batch", "1"]
    return _bench(python, "networks", 300 if compile else 100, words, folder / f"{device}-networks", compile)


def _benchmarks(python: str, device: str, folder: Path, compile: bool) -> Step:
    legs = [("--dtype", dtype) for dtype in ("bfloat16", "float16", "tf32")]
    legs += [("--batch", batch) for batch in ("8", "32")] + [("--crop", crop) for crop in ("224", "256")]
    legs += [("--op", op) for op in ("temporal_conv", "lateral_concat", "slowfast")]
    words = [word for pair in legs for word in pair]
    return _bench(python, "benchmarks", SECONDS, words, folder / device, compile)


def _bench(python: str, name: str, budget: float, words: Sequence[str], out: Path, compile: bool) -> Step:
    switches = ("--compile" if compile else "--no-compile", "--chart" if installed("matplotlib") else "--no-chart")
    return Step(
        name,
        budget,
        lambda seconds: [
            *(python, "-m", "slowfast_fast", "bench", "--device", "cuda", "--rounds", "9", *words, *switches),
            *("--budget", f"{max(0.0, seconds - GRACE):.0f}", "--out", str(out)),
        ],
        needs="build",
    )


def run(
    groups: Sequence[Sequence[Step]],
    folder: Path,
    seconds: float = SECONDS,
    after_group: Callable[[], object] = lambda: None,
) -> list[Result]:
    """Run the groups, and say what came of every step, in their order: of each when it ends, and of all at the end. A
    step's output is in a log of its own, which goes into gpu.log once its group has ended."""
    end = time.monotonic() + seconds
    results: dict[str, Result] = {}
    (folder / MERGED).unlink(missing_ok=True)
    for group in groups:
        running: list[Running] = []
        for step in group:
            needed = results.get(step.needs or "")
            if step.unavailable:
                results[step.name] = Result(step.name, "skipped", detail=step.unavailable)
            elif needed is not None and needed.failed:
                results[step.name] = Result(step.name, "not run", detail=f"{needed.step} did not pass")
            else:
                allowed = min(step.budget, end - time.monotonic())
                print(f"{step.name} ({allowed:.0f} s at most)", flush=True)
                running.append(Running(step, allowed, folder))
        while running:
            for one in [one for one in running if one.has_ended()]:
                running.remove(one)
                result = results[one.step.name] = one.result()
                print(f"{result.step}: {result.outcome} after {result.seconds:.0f} s, {result.detail}", flush=True)
            time.sleep(POLL)
        _merge_logs(group, folder)
        after_group()
    return [results[step.name] for group in groups for step in group]


def _log(step: Step, folder: Path) -> Path:
    return folder / f"{step.name.replace(' ', '-')}.log"


class Running:
    """A step's process. When its time is up it is asked to stop, and killed if it does not."""

    def __init__(self, step: Step, allowed: float, folder: Path) -> None:
        self.step, self._allowed, self._log = step, allowed, _log(step, folder)
        path = (str(ROOT), step.environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        with open(self._log, "w") as log:
            # A session of its own: compilers and test workers go with it when its time is up.
            self._process = subprocess.Popen(
                step.command(allowed), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._begun = time.monotonic()
        self._asked = False

    def has_ended(self) -> bool:
        if self._process.poll() is not None:
            return True
        late = time.monotonic() - self._begun - self._allowed
        if late > GRACE:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        elif late > 0 and not self._asked:
            self._asked = True
            os.killpg(self._process.pid, signal.SIGINT)  # pytest then still prints what it found
        return False

    def result(self) -> Result:
        status = self._process.returncode
        outcome = "passed" if status == 0 else f"FAILED ({status})"
        if self._asked:
            outcome = f"TIMED OUT after {self._allowed:.0f} s"
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return Result(self.step.name, outcome, time.monotonic() - self._begun, lines[-1] if lines else "")


def _merge_logs(steps: Sequence[Step], folder: Path) -> None:
    with open(folder / MERGED, "a") as merged:
        for step in steps:
            if (log := _log(step, folder)).is_file():
                merged.write(f"\n===== {step.name}\n\n{log.read_text(errors='replace')}")
                log.unlink()


def as_table(results: Sequence[Result]) -> str:
    lines = [f"{'step':<18}{'outcome':<24}{'s':>5}  "]
    lines += [f"{r.step:<18}{r.outcome:<24}{r.seconds:>5.0f}  {r.detail[:70]}".rstrip() for r in results]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="STEP", help="of the steps in the table; repeatable")
    parser.add_argument("--compile", action="store_true", help="torch.compile among the variants (slow to compile)")
    parser.add_argument("--tune", action="store_true", help="before the benchmarks, the table that `auto` goes by")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything [default: {SECONDS}]")
    chosen = parser.parse_args(arguments)
    if lacking := missing():
        print("make gpu installs nothing, and this machine lacks:", *lacking, sep="\n  ")
        return 1
    device, architecture = describe_device()
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    groups = plan(device, architecture, folder, chosen.compile, chosen.tune or "tune" in (chosen.only or ()))
    names = [step.name for group in groups for step in group]
    if unknown := set(chosen.only or ()) - set(names):
        parser.error(f"--only: expected some of {', '.join(names)}; got {', '.join(sorted(unknown))}")
    if chosen.only:
        groups = [[step for step in group if step.name in chosen.only] for group in groups]
    results = run(groups, folder, chosen.seconds, lambda: copy_into_the_checkout(device, folder))
    print(f"\n{_tail(folder / MERGED)}\n\n{as_table(results)}\n\nlog and results: {folder}")
    return int(any(result.failed for result in results))


def copy_into_the_checkout(device: str, folder: Path) -> None:
    """What steps have written so far to where it is committed; the benchmarks then go by a fresh table, too."""
    for written, place in (
        *((f"{device}{part}.{kind}", RESULTS) for part in ("", "-networks") for kind in ("json", "png")),
        (f"{device}-tuned.json", TUNED / f"{device.replace('-', '_')}.json"),
    ):
        if (folder / written).is_file():
            shutil.copy(folder / written, place)


def _tail(log: Path) -> str:
    """The summary of the benchmarks, which is the end of the log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-60:])


if __name__ == "__main__":
    sys.exit(main())
