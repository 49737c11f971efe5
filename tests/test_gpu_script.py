"""`make gpu` as far as it can be tried without a GPU: what it would run, and what it does when steps go wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


gpu = load("gpu")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def step(name: str, code: str, **options) -> gpu.Step:
    return gpu.Step(name, options.pop("budget", 60), lambda seconds: python(code), **options)


def test_steps_that_fail_do_not_stop_the_others(tmp_path: Path) -> None:
    groups = [
        [step("build", "print('built'); raise SystemExit(3)")],
        [
            step("tests", "print('never')", needs="build"),
            step("racecheck", "", unavailable="compute-sanitizer is not installed"),
            step("environment", "import os; print(os.environ['ASKED'])", environment={"ASKED": "for"}),
            step("hangs", "import time; print('waiting', flush=True); time.sleep(100)", budget=1),
        ],
        [step("benchmarks", "print('measured')")],
    ]
    results = {result.step: result for result in gpu.run(groups, tmp_path)}
    assert list(results) == ["build", "tests", "racecheck", "environment", "hangs", "benchmarks"]
    assert results["build"].outcome == "FAILED (3)"
    assert results["build"].detail == "built"
    assert (results["tests"].outcome, results["tests"].detail) == ("not run", "build did not pass")
    assert (results["racecheck"].outcome, results["racecheck"].failed) == ("skipped", False)
    assert (results["environment"].outcome, results["environment"].detail) == ("passed", "for")
    assert results["hangs"].outcome == "TIMED OUT after 1 s"
    assert (results["benchmarks"].outcome, results["benchmarks"].detail) == ("passed", "measured")
    assert [name for name, result in results.items() if result.failed] == ["build", "tests", "hangs"]
    table = gpu.as_table(list(results.values()))
    assert "compute-sanitizer is not installed" in table
    assert len(table.splitlines()) == 1 + len(results)
    merged = (tmp_path / "gpu.log").read_text()
    assert merged.index("===== build") < merged.index("===== environment") < merged.index("===== benchmarks")
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.log"]


def test_results_are_told_and_kept_as_steps_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whoever ends the command during the last step has what came before: printed, and in few files."""
    printed, files = [], []

    def after_group() -> None:
        printed.append(capsys.readouterr().out)
        files.append({path.name for path in tmp_path.iterdir()})

    slow = "import time; time.sleep(1); print('second thoughts')"
    gpu.run([[step("slow", slow), step("quick", "print('first')")], [step("last", "")]], tmp_path, 60, after_group)
    assert "quick: passed after 0 s, first\nslow: passed after 1 s, second thoughts" in printed[0]
    assert files == [{"gpu.log"}] * 2


def test_a_step_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """What ignores being asked is killed, and so are its children."""
    marker = tmp_path / "still-here"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(60)
"""
    gpu.GRACE, grace = 0.5, gpu.GRACE
    try:
        (result,) = gpu.run([[step("deaf", code, budget=1)]], tmp_path)
    finally:
        gpu.GRACE = grace
    assert result.outcome.startswith("TIMED OUT")
    time.sleep(3)
    assert not marker.exists()


def test_steps_of_a_group_run_side_by_side(tmp_path: Path) -> None:
    """Each waits for a file that the other one writes."""
    code = """
import pathlib, time
pathlib.Path({mine!r}).touch()
while not pathlib.Path({other!r}).exists(): time.sleep(0.05)
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    steps = [step("one", code.format(mine=a, other=b)), step("other", code.format(mine=b, other=a))]
    assert [result.outcome for result in gpu.run([steps], tmp_path)] == ["passed", "passed"]


def test_a_step_gets_no_more_than_what_is_left(tmp_path: Path) -> None:
    groups = [[step("first", "pass")], [step("second", "import time; time.sleep(100)", budget=100)]]
    begun = time.monotonic()
    first, second = gpu.run(groups, tmp_path, seconds=8)
    assert first.outcome == "passed"
    assert second.outcome.startswith("TIMED OUT")
    assert time.monotonic() - begun < 50


def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"xdist": True, "triton": False, "matplotlib": False, "pytest_timeout": True}
    monkeypatch.setattr(gpu, "installed", present.__getitem__)
    monkeypatch.setattr(gpu, "find_tool", {"compute-sanitizer": "/cuda/compute-sanitizer", "nvcc": "/cuda/nvcc"}.get)
    groups = gpu.plan("some-device", "90a-real", tmp_path, compile=False)
    steps = {s.name: s for group in groups for s in group}
    assert list(steps) == [
        *("build", "ops of cuda", "ops of triton", "tests", "tests of triton"),
        *("memcheck", "racecheck", "initcheck", "networks", "benchmarks"),
    ]
    assert steps["build"].environment == {
        "SLOWFAST_FAST_CUDA": "1",
        "SLOWFAST_FAST_CUDA_ARCHS": "90a-real",
        "CUDACXX": "/cuda/nvcc",
    }
    assert steps["tests of triton"].unavailable == steps["ops of triton"].unavailable == "triton is not installed"
    assert {"-n", "--timeout", "on_device"} <= set(steps["tests"].command(60))
    tuned = gpu.plan("some-device", "90a-real", tmp_path, compile=False, tune=True)
    assert [[s.name for s in group] for group in tuned[-3:]] == [["tune"], ["networks"], ["benchmarks"]]
    assert steps["memcheck"].command(60)[:3] == ["/cuda/compute-sanitizer", "--tool", "memcheck"]
    assert all(s.needs == "build" for s in steps.values() if s.name != "build")
    words = steps["benchmarks"].command(200)
    assert words[words.index("--budget") + 1] == str(200 - gpu.GRACE)
    assert {"--no-compile", "--no-chart", "bfloat16", "float16", "tf32", "8", "32", "224", "256"} <= set(words)
    assert not any("pip" in word for s in steps.values() for word in s.command(60))
    assert "some-device-networks" in steps["networks"].command(60)[-1]
    # Under nine minutes, the time that a step may take to stop included, and some for the benchmarks at the worst.
    before = sum(max(s.budget for s in group) + gpu.GRACE for group in groups[:-1])
    assert before <= gpu.SECONDS - 40
    assert gpu.SECONDS + gpu.GRACE < 9 * 60


def test_results_and_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """They are left in $OUT and beside the committed ones, and the table is printed last."""
    out, results, tables = tmp_path / "out", tmp_path / "results", tmp_path / "tuned"
    results.mkdir()
    tables.mkdir()
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(gpu, "RESULTS", results)
    monkeypatch.setattr(gpu, "TUNED", tables)
    monkeypatch.setattr(gpu, "missing", list)
    monkeypatch.setattr(gpu, "describe_device", lambda: ("some-device", "90a-real"))
    write = "; ".join(f"open({str(out / f'some-device{end}.json')!r}, 'w').write('{{}}')" for end in ("", "-tuned"))
    good, bad = [step("benchmarks", f"{write}; print('written')")], [step("tests", "raise SystemExit(1)")]
    monkeypatch.setattr(gpu, "plan", lambda *arguments: [good])
    assert gpu.main([]) == 0
    assert (results / "some-device.json").read_text() == (tables / "some_device.json").read_text() == "{}"
    monkeypatch.setattr(gpu, "plan", lambda *arguments: [bad, good])
    assert gpu.main([]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-5:-2]] == ["step", "tests", "benchmarks"]
    assert printed[-1] == f"log and results: {out}"
    assert {path.name for path in out.iterdir()} == {"gpu.log", "some-device.json", "some-device-tuned.json"}
    assert gpu.main(["--only", "benchmarks"]) == 0
    with pytest.raises(SystemExit):
        gpu.main(["--only", "lunch"])


def test_a_worker_without_its_device_is_replaced(tmp_path: Path) -> None:
    """And a failure is printed when it happens: what came of the tests that ran is known even without a summary."""
    pytest.importorskip("xdist")
    (tmp_path / "test_two.py").write_text("""
import on_device, os, time
def test_lost(monkeypatch):
    on_device.lost = lambda: True
    assert False, "illegal memory access"
def test_next():
    assert not on_device.lost()
def test_wrong():
    assert 1 == 2, "one is not two"
def test_killed():
    end = time.monotonic() + 60
    while "test_wrong failed" not in open(os.environ["SAID"]).read() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(int(os.environ["CONTROLLER"]), 9)
""")
    command = [sys.executable, "-m", "pytest", "-p", "on_device", "--capture", "sys", "-q", "-n", "1"]
    code = f"import os; os.environ['CONTROLLER'] = str(os.getpid()); os.execvp({command[0]!r}, {command!r})"
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    path, output = os.pathsep.join((str(ROOT / "tools"), str(ROOT))), tmp_path / "said"
    with output.open("w") as log:
        environment = {**outside, "PYTHONPATH": path, "SAID": str(output)}
        done = subprocess.run(python(code), cwd=tmp_path, env=environment, stdout=log, stderr=log)
    said = output.read_text()
    assert done.returncode == -9
    assert "test_lost lost the device" in said
    assert "illegal memory access" in said
    assert "test_wrong failed" in said
    assert "one is not two" in said
    assert "test_next failed" not in said


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    versions = {"torch": "2.9.1", "setuptools": "80.1", "click": "8.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise gpu.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(gpu.metadata, "version", version)
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    assert gpu.main([]) == 1
    printed = capsys.readouterr().out
    assert "torch of 2.10 or newer; there is 2.9.1" in printed
    assert "the Python package pytest" in printed
    assert "nvcc, on PATH" in printed
    assert "setuptools" not in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device() -> None:
    done = subprocess.run([sys.executable, "tools/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "make gpu needs a CUDA device" in done.stderr or "this machine lacks" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_commands_work(tmp_path: Path) -> None:
    """The tests' command, given one file, collects and skips; the benchmarks', on the CPU, has no time for a case."""
    steps = {s.name: s for group in gpu.plan("cpu", "90a-real", tmp_path, compile=False) for s in group}

    def as_here(name: str, words: dict[str, str]) -> gpu.Step:
        command = [words.get(word, word) for word in steps[name].command(0)]
        # Longer, for a machine that is busy with other tests.
        return replace(steps[name], budget=900, needs=None, command=lambda seconds: command)

    # Every worker collects what it is given, and six of them all tests for minutes on two cores.
    tests = as_here("tests", {"tests": "tests/test_wide.py", "6": "1"})
    benchmarks = as_here("benchmarks", {"cuda": "cpu", "tf32": "float32", "--chart": "--no-chart"})
    tested, measured = gpu.run([[tests], [benchmarks]], tmp_path, seconds=1800)
    assert tested.outcome == "passed", (tmp_path / "tests.log").read_text()[-2000:]
    assert "skipped" in tested.detail
    assert measured.outcome == "passed", (tmp_path / "benchmarks.log").read_text()[-2000:]
    document = json.loads((tmp_path / "cpu.json").read_text())
    # 12 settings of 16 shapes and the network, in both directions.
    assert len(document["left_out"]) == 12 * 17 * 2
