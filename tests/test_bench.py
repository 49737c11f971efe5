"""Runs of the benchmarks: what they write, and what a failure, an interrupt or too little time costs. No test of the
benchmarks depends on how fast anything is."""

import json
import os

import bench_apart
import pytest
import torch

from slowfast_fast.bench import bench
from slowfast_fast.bench import run as running
from slowfast_fast.bench.apart import Apart
from slowfast_fast.bench.run import prepare
from slowfast_fast.bench.variants import Problem


def test_a_variant_that_fails_costs_no_other(tmp_path, monkeypatch):
    """It is told in the document and by the exit."""

    def broken(problem: Problem):
        raise ArithmeticError("no such kernel")

    monkeypatch.setitem(running.STOCK, "broken", broken)
    path = tmp_path / "run.json"
    with pytest.raises(RuntimeError, match="4 variants failed"):
        bench(ops=["lateral_concat"], directions=["fwd"], device="cpu", compile=False, rounds=1, crops=[32], json=path)
    cases = json.loads(path.read_text())["cases"]
    assert {case["unavailable"]["broken"] for case in cases} == {"failed: ArithmeticError: no such kernel"}
    assert all("slowfast_fast cpu" in case["variants"] for case in cases)


def test_cases_apart():
    """One process for all calls, and another one after one that ended or gave no answer."""
    apart = Apart(bench_apart.answer, seconds=60)
    try:
        first = apart("process")
        assert first != os.getpid()
        with pytest.raises(RuntimeError, match="KeyError: 'no such kernel'"):
            apart("raise", value="no such kernel")
        with pytest.raises(torch.OutOfMemoryError, match="too much"):
            apart("memory", value="too much")
        assert apart("process") == first
        with pytest.raises(RuntimeError, match="its process ended with 3"):
            apart("end")
        second = apart("process")
        assert second != first
        apart._seconds = 1.0
        with pytest.raises(RuntimeError, match="no result after 1 s"):
            apart("hang")
        apart._seconds = 60.0
        assert apart("process") not in (first, second)
    finally:
        apart.close()


def test_quick_run_writes_everything(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib")
    threads = torch.get_num_threads()
    json_path, png_path = tmp_path / "run.json", tmp_path / "run.png"
    bench(quick=True, crops=[32], rounds=2, threads=1, json=json_path, png=png_path)
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "temporal_conv fast res2 8->8 32x8x8 fwd" in printed
    assert "lateral_concat eval forward, sum over the network, against stock" in printed
    assert png_path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    document = json.loads(json_path.read_text())
    assert set(document) == {
        *("schema", "finished", "date", "versions", "machine", "settings", "summary", "cases", "left_out")
    }
    assert document["schema"] == 2
    assert document["finished"] is True
    assert document["left_out"] == []
    assert document["machine"]["threads"] == 1
    assert {"cpu", "cpu_capability", "load_average"} <= set(document["machine"])
    assert {"commit", "torch", "cuda", "cudnn", "triton", "driver", "python", "slowfast_fast"} <= set(
        document["versions"]
    )
    assert document["settings"]["rounds"] == 2
    assert len(document["cases"]) == 6  # fast, slow and lateral, in both directions
    for case in document["cases"]:
        assert {"name", "direction", "leg", "shape", "bytes", "flops", "limit", "ours", "variants"} <= set(case)
        assert case["ours"] in case["variants"]
        assert all(len(variant["seconds"]) == 2 for variant in case["variants"].values())
        stock, ours = case["variants"]["stock"], case["variants"][case["ours"]]
        assert ours["speedup_over_stock"] == pytest.approx(stock["median"] / ours["median"])
        assert ours["gigabytes_per_second"] == pytest.approx(case["bytes"] / ours["median"] / 1e9)
    assert all({"goal", "leg", "target", "ratio", "met"} <= set(line) for line in document["summary"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["conv"]}, "ops: expected some of .*'temporal_conv'.*, got 'conv'"),
        ({"directions": ["train"]}, "directions: expected some of .*'fwd'.*, got 'train'"),
        ({"dtypes": ["int8"]}, "dtype: expected one of .*'float32'.*, got 'int8'"),
        ({"dtypes": ["tf32"], "device": "cpu"}, "dtype: tf32 is for a GPU"),
        ({"batches": [0]}, "batch: expected at least 1, got 0"),
        ({"device": "meta"}, "device: expected cpu or cuda, got 'meta'"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"crops": [100]}, "crop: expected a positive multiple of 32, got 100"),
        ({"json": "no/such/folder/run.json"}, "json: the folder of no/such/folder/run.json does not exist"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench(**arguments)


def test_chart_needs_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        bench(png=tmp_path / "run.png")
    assert capsys.readouterr().out == ""  # nothing was measured


def test_budget(tmp_path, capsys):
    """The legs come in the order asked for, and what there was no time for is named."""
    path = tmp_path / "run.json"
    legs = {"dtypes": ["float32", "bfloat16"], "batches": [1, 2], "crops": [32]}
    bench(
        ops=["lateral_concat"], directions=["fwd"], device="cpu", compile=False, rounds=1, budget=0, json=path, **legs
    )
    document = json.loads(path.read_text())
    assert document["cases"] == []
    names = [case["leg"] for case in document["left_out"]]
    assert list(dict.fromkeys(names)) == [
        f"{dtype}, batch {batch}, 32 x 32" for batch in (1, 2) for dtype in ("float32", "bfloat16")
    ]
    assert len(names) == 4 * 4
    assert {case["reason"] for case in document["left_out"]} == {"the time was up"}
    assert "16 of 16 cases were left out" in capsys.readouterr().out


def test_a_failing_case_is_no_end(tmp_path, monkeypatch):
    """The others are measured and written, and the failure is told twice: in the document and by the exit."""

    def prepare_some(case, *arguments, **options):
        if case.shape.stage == 2:
            raise RuntimeError("no such kernel")
        return prepare(case, *arguments, **options)

    monkeypatch.setattr(running, "prepare", prepare_some)
    path = tmp_path / "run.json"
    with pytest.raises(RuntimeError, match="1 of 4 cases failed"):
        bench(ops=["lateral_concat"], directions=["fwd"], device="cpu", compile=False, rounds=1, crops=[32], json=path)
    document = json.loads(path.read_text())
    assert len(document["cases"]) == 3
    assert [case["reason"] for case in document["left_out"]] == ["failed: no such kernel"]


@pytest.mark.parametrize(
    ("error", "reason"), [(KeyboardInterrupt(), "interrupted"), (torch.OutOfMemoryError(), "out of device memory")]
)
def test_what_ends_a_case_early_costs_no_result(tmp_path, monkeypatch, error, reason):
    """An interrupt also leaves out what would come after it; neither is a failure of a kernel."""

    def prepare_some(case, *arguments, **options):
        if case.shape.stage == 2:
            raise error
        return prepare(case, *arguments, **options)

    monkeypatch.setattr(running, "prepare", prepare_some)
    path = tmp_path / "run.json"
    bench(ops=["lateral_concat"], directions=["fwd"], device="cpu", compile=False, rounds=1, crops=[32], json=path)
    document = json.loads(path.read_text())
    left_out = [reason, "the time was up", "the time was up"] if reason == "interrupted" else [reason]
    assert [case["reason"] for case in document["left_out"]] == left_out
    assert len(document["cases"]) == 4 - len(left_out)


def test_a_killed_run_keeps_what_it_has(tmp_path, monkeypatch):
    """The document is complete after every case; of one that is begun and not ended it says so."""
    path = tmp_path / "run.json"
    path.write_text("older")
    seen: list[object] = []

    class Killed(BaseException):
        pass

    def prepare_some(case, *arguments, **options):
        seen.append(path.read_text() if not seen else json.loads(path.read_text()))
        if len(seen) == 3:
            raise Killed
        return prepare(case, *arguments, **options)

    monkeypatch.setattr(running, "prepare", prepare_some)
    with pytest.raises(Killed):
        bench(ops=["lateral_concat"], directions=["fwd"], device="cpu", compile=False, rounds=1, crops=[32], json=path)
    assert seen[0] == "older", "nothing is lost before there is anything new"
    document = json.loads(path.read_text())
    assert document == seen[2]
    assert [(len(d["cases"]), len(d["left_out"]), d["finished"]) for d in seen[1:]] == [(1, 3, False), (2, 2, False)]
    assert {case["reason"] for case in document["left_out"]} == {"the run did not get there"}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
