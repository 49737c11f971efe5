"""The command line: what it prints, what it refuses, and that options reach the code behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

import slowfast_fast
from slowfast_fast.backend import KERNELS
from slowfast_fast.cli import main


def cli(*arguments: str):
    return CliRunner().invoke(main, arguments)


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slowfast_fast", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_version():
    result = cli("--version")
    assert result.exit_code == 0
    assert slowfast_fast.__version__ in result.output


def test_info_is_the_same_in_text_and_json():
    facts = json.loads(cli("info", "--json").output)
    build, runtime = facts["build"], facts["runtime"]
    assert build["version"] == slowfast_fast.__version__
    assert runtime["torch"] == torch.__version__
    assert runtime["threads"] == torch.get_num_threads()
    assert runtime["cpu_capability"] in build["cpu_instruction_sets"]
    assert set(runtime["backends"]) == set(runtime["devices"])
    assert set(runtime["backends"]["cpu"]) == set(KERNELS)
    assert {choice["backend"] for choice in runtime["backends"]["cpu"].values()} == {"cpu"}

    text = cli("info").output
    for fact in (build["compiler"], build["torch"], runtime["torch"], runtime["cpu_capability"], runtime["library"]):
        assert fact in text
    for op in KERNELS:
        assert any(line.split()[:2] == [op, "cpu"] for line in text.splitlines())


def test_python_m_slowfast_fast():
    result = run_module("info", "--json", SLOWFAST_FAST_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    runtime = json.loads(result.stdout)["runtime"]
    assert runtime["backend"] == "reference"
    assert all(choice["backend"] == "reference" for choice in runtime["backends"]["cpu"].values())


def test_info_tells_when_the_forced_backend_cannot_run():
    result = run_module("info", "--json", SLOWFAST_FAST_BACKEND="cuda")
    assert result.returncode == 0, result.stderr
    for choice in json.loads(result.stdout)["runtime"]["backends"]["cpu"].values():
        assert choice["backend"] is None
        assert "'cuda' was asked for" in choice["reason"]


def cpu_capability(limit: str) -> str:
    """What a fresh process chooses: it asks once."""
    code = "from slowfast_fast import _extension; print(_extension.cpu_capability())"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": limit}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def unlimited() -> str:
    return cpu_capability("")


@pytest.mark.parametrize("limit", ["default", "avx2", "avx512"])
def test_cpu_capability_can_be_lowered_but_not_raised(unlimited, limit):
    order = ["baseline", "avx2", "avx512"]
    asked_for = "baseline" if limit == "default" else limit
    assert cpu_capability(limit) == min(unlimited, asked_for, key=order.index)


def test_bench_passes_its_options_on(monkeypatch):
    calls = []
    monkeypatch.setattr("slowfast_fast.bench.bench", lambda **options: calls.append(options))
    words = "--op lateral_concat --op slowfast --direction fwd --dtype bfloat16 --threads 2 --no-compile --no-autocast"
    result = cli("bench", *words.split(), "--out", "run", "--no-chart")
    assert result.exit_code == 0, result.output
    (call,) = calls
    assert call["ops"] == ("lateral_concat", "slowfast")
    assert call["directions"] == ("fwd",)
    assert (call["dtypes"], call["threads"], call["compile"], call["rounds"]) == (("bfloat16",), 2, False, None)
    assert not call["autocast"]
    assert (call["json"], call["png"]) == ("run.json", None)


def test_bench_refuses_what_it_does_not_know():
    result = cli("bench", "--no-chart", "--dtype", "int8")
    assert result.exit_code == 2
    assert "dtype: expected one of" in result.output
    assert "int8" in result.output


def test_bench_without_matplotlib_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli("bench", "--quick")
    assert result.exit_code == 1
    assert "pip install matplotlib" in result.output
    assert "--no-chart" in result.output
