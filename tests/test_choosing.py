"""What `auto` takes on a GPU: a measured table, else a heuristic, and always a reason. No GPU is needed: the tensors
are fake, and so is the device that the tables are asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_backend import use_backends
from torch import Tensor
from torch._subclasses import FakeTensorMode

from slowfast_fast import backend as forced
from slowfast_fast import choosing
from slowfast_fast.backend import BACKENDS, KERNELS, Backend
from slowfast_fast.choosing import choose, shape_class, table_key, table_path
from slowfast_fast.ops import _common

HALF = torch.float16
WIDE, NARROW = (512, 2048, 1), (8, 32, 3)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Two backends for CUDA on a device called "Fake 9000", whose tables lie in tmp_path."""
    backends = BACKENDS | {
        "cuda": replace(BACKENDS["cuda"], module=None),
        "triton": replace(BACKENDS["triton"], devices=("cuda",), module=None),
    }
    use_backends(monkeypatch, backends)
    monkeypatch.setattr(sys.modules["slowfast_fast.backend"], "_missing", lambda b, op: [])
    monkeypatch.setattr(choosing, "TABLES", tmp_path)
    monkeypatch.setattr(choosing, "_tables", {})

    def is_a(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(choosing, "_decisions", {})
        monkeypatch.setattr(choosing, "cuda_device", lambda ordinal: ("Fake 9000", capability))

    is_a((9, 0))
    with FakeTensorMode():
        yield is_a


def conv(shape: tuple[int, int, int], dtype: torch.dtype = HALF) -> tuple[Tensor, Tensor]:
    c, k, taps = shape
    x = torch.empty(2, c, 8, 7, 7, dtype=dtype, device="cuda", memory_format=torch.channels_last_3d)
    return x, torch.empty(k, c, taps, 1, 1, dtype=dtype, device="cuda")


def test_heuristic(gpu: Callable[..., None]) -> None:
    for capability, wide in (((8, 0), "cuda"), ((9, 0), "triton"), ((10, 0), "triton")):
        gpu(capability)
        choice = choose("temporal_conv", *conv(WIDE))
        assert choice.backend == wide
        assert f"not measured on this device; wide on sm_{capability[0]}{capability[1]}" in choice.reason
        assert choose("temporal_conv", *conv(NARROW)).backend == "cuda"
    assert "narrow and bound by memory" in choose("temporal_conv", *conv(NARROW)).reason
    assert choose("temporal_conv", *conv(WIDE, torch.float32), tf32=True).backend == "triton"
    choice = choose("temporal_conv", *conv(WIDE, torch.float32))
    assert choice.backend == "cuda"
    assert "float32 without TF32" in choice.reason


def test_table(gpu: Callable[..., None]) -> None:
    """Entries decide, each for its op, direction, dtype and shape; another device's table does not."""
    narrow = shape_class(conv(NARROW)[1], 1)
    assert narrow == "8->32 temporal"
    fastest = {
        table_key("temporal_conv", "fwd", HALF, False, narrow): "triton",
        table_key("temporal_conv", "bwd", HALF, False, shape_class(conv(WIDE)[1], 1)): "cuda",
    }
    assert list(fastest) == [
        "temporal_conv fwd float16 8->32 temporal",
        "temporal_conv bwd float16 512->2048 pointwise",
    ]
    assert table_path("Fake 9000").name == "fake_9000.json"
    table_path("Fake 9000").write_text(json.dumps({"fastest": fastest}))
    choice = choose("temporal_conv", *conv(NARROW))
    assert choice == ("triton", "measured fastest for 8->32 temporal on Fake 9000")
    assert choose("temporal_conv", *conv(WIDE), direction="bwd").backend == "cuda"
    for situation in (
        choose("temporal_conv", *conv(NARROW), stride=2),
        choose("temporal_conv", *conv(NARROW), direction="bwd"),
        choose("temporal_conv", *conv(NARROW, torch.bfloat16)),
        choose("temporal_conv_bn", *conv(NARROW)),
        choose("temporal_conv", *conv((16, 32, 3))),
    ):
        assert situation.backend == "cuda"
        assert "not measured" in situation.reason
    assert choose("temporal_conv", *conv((5, 20, 5))).backend == "triton"  # the class of 8->32


def test_an_entry_of_a_backend_that_cannot_run_here(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = {table_key("temporal_conv", "fwd", HALF, False, "8->32 temporal"): "triton"}
    table_path("Fake 9000").write_text(json.dumps({"fastest": fastest}))
    backends = dict(choosing.BACKENDS)
    backends["triton"] = Backend("triton", "slowfast_fast_triton", ("cuda",), (HALF,), "no_module", "no_such_package")
    use_backends(monkeypatch, backends)
    choice = choose("temporal_conv", *conv(NARROW))
    assert choice == ("cuda", "fastest for cuda (no triton kernels: no_such_package is not installed)")
    with (
        forced("triton"),
        pytest.raises(RuntimeError, match="cannot run temporal_conv: no triton kernels: no_such_pack"),
    ):
        choose("temporal_conv", *conv(NARROW))


def test_deterministic_mode(gpu: Callable[..., None]) -> None:
    assert choose("temporal_conv", *conv(WIDE)).backend == "triton"
    torch.use_deterministic_algorithms(True)
    try:
        choice = choose("temporal_conv", *conv(WIDE))
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.backend == "cuda"
    assert "deterministic mode" in choice.reason


def test_without_a_shape(gpu: Callable[..., None]) -> None:
    assert choose("temporal_conv", conv(WIDE)[0]) == ("cuda", "cuda or triton, by the shape of a call")
    for op in choosing.MOVES:
        assert choose(op, conv(WIDE)[0]) == ("cuda", "cuda and triton move the same bytes, cuda launches faster")


def test_forced(gpu: Callable[..., None]) -> None:
    for name in ("cuda", "triton"):
        with forced(name):
            assert choose("temporal_conv", *conv(WIDE)) == (name, "asked for")


def test_the_backward_chooses_for_itself(gpu: Callable[..., None]) -> None:
    """By the table under auto, the forward's backend where that was forced."""
    fastest = {table_key("lateral_concat", "bwd", HALF, False, "8->32 temporal strided"): "triton"}
    table_path("Fake 9000").write_text(json.dumps({"fastest": fastest}))
    arguments = ("lateral_concat", *conv(NARROW), 4, False)
    assert _common.backward_library("slowfast_fast", *arguments) == "slowfast_fast_triton"
    with forced("cuda"):
        assert _common.backward_library("slowfast_fast", *arguments) == "slowfast_fast"
    with forced("triton"):
        assert _common.backward_library("slowfast_fast_triton", *arguments) == "slowfast_fast_triton"


def test_committed_tables_are_sound() -> None:
    for path in choosing.TABLES.glob("*.json"):
        content = json.loads(path.read_text())
        assert table_path(content["device"]) == path
        for key, name in content["fastest"].items():
            op, direction, *_ = key.split(" ", 3)
            assert direction in ("fwd", "bwd")
            if content["device"].startswith("frozen "):
                assert (
                    name
                    in {
                        "layer": ("onednn", "temporal_conv", "spatial_conv", "cudnn"),
                        "block": ("bottleneck", "layers"),
                    }[op]
                )
            else:
                assert op in KERNELS
                assert name in BACKENDS


# A library of the same schemas for CPU tensors, whose kernels call those of the extension and say so.
SECOND = """
import torch
from torch import Tensor
import slowfast_fast
from slowfast_fast import ops, backend
from slowfast_fast.backend import BACKENDS, Backend, KERNELS, _definitions
first, calls = torch.ops.slowfast_fast, []
library = torch.library.Library("slowfast_fast_second", "DEF")
for name in sorted({k for kernels in KERNELS.values() for k in kernels} | {"lateral_concat"}):
    kernel = getattr(first, name).default
    schema = str(kernel._schema).removeprefix("slowfast_fast::")
    library.define(schema)
    def run(*args, kernel=kernel, name=name):
        calls.append(name)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args)
    library.impl(name, run, "CPU")
for define in _definitions:
    define("slowfast_fast_second")
BACKENDS["second"] = Backend("second", "slowfast_fast_second", ("cpu",), (torch.float32,))
"""


@pytest.mark.no_sanitizer
def test_a_second_library_is_told_to_pytorch_and_used() -> None:
    """Forced: forward and backward run there, eager and compiled, and nothing runs elsewhere."""
    code = (
        SECOND
        + """
x = torch.randn(1, 3, 4, 2, 2).contiguous(memory_format=torch.channels_last_3d)
weight = torch.randn(5, 3, 3, 1, 1)
def gradients(function):
    leaf = weight.clone().requires_grad_()
    y = function(x, leaf, None, None, torch.zeros(5), torch.ones(5), training=True, relu=True)
    slow = function_of_lateral(y, x, leaf)
    (slow.sum() + y.square().sum()).backward()
    return y.detach(), leaf.grad
def function_of_lateral(y, x, leaf):
    return ops.lateral_concat(y, x, leaf, alpha=1)
expected = gradients(ops.temporal_conv_bn)
assert not calls
with backend("second"):
    for run in (ops.temporal_conv_bn, torch.compile(ops.temporal_conv_bn, fullgraph=True, backend="aot_eager")):
        calls.clear()
        for ours, right in zip(gradients(run), expected):
            assert torch.equal(ours, right)
        print(*sorted(calls))
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ran = "lateral_concat temporal_conv_backward temporal_conv_bn temporal_conv_bn_backward update_running_stats"
    assert done.stdout.splitlines() == [ran, ran]


@pytest.mark.no_sanitizer
def test_the_package_does_not_import_the_compiler() -> None:
    """It takes longer than all of the rest."""
    code = "import sys, slowfast_fast; print(sorted({'torch._dynamo', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
