"""The choice of a backend, its overrides, and explain()."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import in_threads
from torch import Tensor, nn

import slowfast_fast
from slowfast_fast import backend as forced
from slowfast_fast import choosing, ops
from slowfast_fast._extension import cuda_kernels
from slowfast_fast.backend import BACKENDS, KERNELS, Backend, can_run
from slowfast_fast.choosing import choose
from slowfast_fast.explanation import note, recording
from slowfast_fast.info import build_info

X = torch.zeros(1, 2, 3, 1, 1)
WEIGHT = torch.zeros(4, 2, 3, 1, 1)


def use_backends(monkeypatch: pytest.MonkeyPatch, backends: dict[str, Backend]) -> None:
    """For the length of a test, other backends than BACKENDS."""
    for module in ("backend", "choosing", "ops._common"):
        monkeypatch.setattr(sys.modules[f"slowfast_fast.{module}"], "BACKENDS", backends)
    monkeypatch.setattr(choosing, "_decisions", {})


def test_auto_takes_the_compiled_kernels() -> None:
    for op in KERNELS:
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            assert choose(op, X.to(dtype)).backend == "cpu", (op, dtype)


def test_reference_runs_what_nothing_else_can() -> None:
    choice = choose("temporal_conv", X.to("meta"))
    assert choice == ("reference", "no compiled backend is made for meta")
    assert ops.temporal_conv(X.to("meta"), WEIGHT.to("meta")).shape == (1, 4, 3, 1, 1)


def test_reasons() -> None:
    assert can_run("cpu", "temporal_conv", X) is None
    assert can_run("reference", "temporal_conv", X) is None
    assert can_run("cuda", "temporal_conv", X) == "the tensors are on cpu, the cuda backend runs on cuda"
    on_device = torch.empty(1, device="meta")
    assert can_run("cpu", "temporal_conv", on_device) == "the tensors are on meta, the cpu backend runs on cpu"
    assert can_run("cpu", "temporal_conv", X.int()) == "the cpu backend has no kernel for torch.int32"


def test_a_backend_without_kernels_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    """What auto does for a device whose kernels this build lacks: the reference, and the reason."""
    backends = BACKENDS | {"cpu": replace(BACKENDS["cpu"], library="slowfast_fast_empty")}
    use_backends(monkeypatch, backends)
    reason = "this build has no cpu kernel of temporal_conv, temporal_conv_backward"
    assert can_run("cpu", "temporal_conv", X) == reason
    assert choose("temporal_conv", X) == ("reference", reason)
    with (
        forced("cpu"),
        pytest.raises(RuntimeError, match=f"'cpu' was asked for and cannot run temporal_conv: {reason}"),
    ):
        ops.temporal_conv(X, WEIGHT)


def test_forced_backend() -> None:
    with forced("reference"):
        assert choose("temporal_conv", X) == ("reference", "asked for")
        with forced("auto"):
            assert choose("temporal_conv", X).backend == "cpu"
        assert choose("temporal_conv", X).backend == "reference"
    assert choose("temporal_conv", X).backend == "cpu"
    with (
        forced("cuda"),
        pytest.raises(RuntimeError, match="'cuda' was asked for and cannot run temporal_conv: the tensors"),
    ):
        ops.temporal_conv(X, WEIGHT)


def test_forced_backend_ends_with_an_exception() -> None:
    def fail() -> None:
        with forced("reference"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert choose("temporal_conv", X).backend == "cpu"


def test_forced_backend_is_of_its_thread() -> None:
    chosen: dict[str, str] = {}
    inside = threading.Barrier(2)

    def run(name: str) -> None:
        with forced(name):
            inside.wait()
            chosen[name] = choose("temporal_conv", X).backend
            inside.wait()

    in_threads(run, ("reference", "cpu"))
    assert chosen == {"reference": "reference", "cpu": "cpu"}


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*cpu, triton, reference; got 'gpu'"):
        forced("gpu")


@pytest.mark.no_sanitizer
@pytest.mark.parametrize(("value", "expected"), [("reference", "reference"), ("", "cpu"), ("auto", "cpu")])
def test_environment(value: str, expected: str) -> None:
    code = (
        "import torch; from slowfast_fast.choosing import choose\n"
        "print(choose('temporal_conv', torch.zeros(1)).backend)"
    )
    assert _python(code, value).stdout.strip() == expected


@pytest.mark.no_sanitizer
def test_environment_with_an_unknown_name() -> None:
    finished = _python("import slowfast_fast", "fast")
    assert finished.returncode != 0
    assert "SLOWFAST_FAST_BACKEND must be one of auto, " in finished.stderr


def _python(code: str, backend: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"SLOWFAST_FAST_BACKEND": backend}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_one_table_entry_adds_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another library with the same schemas, for the same device, asked first."""
    newcomer = Backend("newcomer", "slowfast_fast", ("cpu",), (torch.float32,))
    use_backends(monkeypatch, {"newcomer": newcomer} | BACKENDS)
    assert choose("temporal_conv", X).backend == "newcomer"
    assert choose("temporal_conv", X.double()).backend == "cpu"
    with forced("newcomer"):
        ops.temporal_conv(X, WEIGHT)


class Layer(nn.Module):
    """A fused layer in small: it notes what its op covers, or why it runs its modules one by one."""

    def __init__(self, fuse: bool) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.norm = nn.BatchNorm3d(2)
        self.act = nn.ReLU()
        self.fuse = fuse

    def forward(self, x: Tensor) -> Tensor:
        if recording():
            note(
                (self.conv, self.norm, None, self.act),
                "temporal_conv_bn" if self.fuse else None,
                "" if self.fuse else "no",
            )
        if not self.fuse:
            return self.act(self.norm(self.conv(x)))
        n = self.norm
        return ops.temporal_conv_bn(
            x, self.conv.weight, n.weight, n.bias, n.running_mean, n.running_var,
            num_batches_tracked=n.num_batches_tracked, training=self.training, relu=True,
        )  # fmt: skip


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(Layer(True), Layer(False), nn.Dropout(0.5), nn.AdaptiveAvgPool3d(1)).train()


CLIP = (2, 2, 5, 4, 4)


def test_explain_rows(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    found = slowfast_fast.explain(network, torch.randn(CLIP))
    rows = [(row.modules, row.what, row.backend) for row in found.rows]
    assert rows == [
        (("0.conv", "0.norm", "0.act"), "temporal_conv_bn", "cpu"),
        (("1.conv",), "Conv3d", "torch"),
        (("1.norm",), "BatchNorm3d", "torch"),
        (("1.act",), "ReLU", "torch"),
        (("2",), "Dropout", "torch"),
        (("3",), "AdaptiveAvgPool3d", "torch"),
    ]
    fused, *unfused, dropout, pool = found.rows
    assert fused.inputs == fused.outputs == (CLIP,)
    assert fused.reason == f"fastest for cpu; copied x {CLIP} from strides (160, 80, 16, 4, 1)"
    assert {row.reason for row in unfused} == {"no"}
    assert dropout.reason == pool.reason == "no op of this package covers it"
    assert pool.outputs == ((2, 2, 1, 1, 1),)
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    table = printed.splitlines()
    assert table[0].split() == ["layer", "ran", "as", "backend", "shapes", "why"]
    assert len(table) == 2 + len(rows)
    assert table[2].split()[:3] == ["0.{conv,norm,act}", "temporal_conv_bn", "cpu"]
    assert "2x2x5x4x4 -> 2x2x5x4x4" in table[2]


def test_explain_tells_the_evaluation_form(network: nn.Module) -> None:
    found = slowfast_fast.explain(network.eval(), torch.randn(CLIP), show=False)
    assert found.rows[0].what == "temporal_conv"


def test_explain_tells_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library says of the convolution, asked with its shape; the CPU's kernels stand in for a device's."""
    use_backends(monkeypatch, {"cuda": replace(BACKENDS["cpu"], name="cuda")})
    asked: list[tuple[Any, ...]] = []

    def said(*question: Any) -> str:
        asked.append(question)
        return "forward: kernels"

    monkeypatch.setattr(sys.modules["slowfast_fast._extension"], "cuda_kernels", said)

    class Lateral(nn.Module):
        def forward(self, clips: list[Tensor]) -> Tensor:
            return ops.lateral_concat(clips[0], clips[1], torch.zeros(6, 4, 5, 1, 1), alpha=4)

    slow, fast = torch.zeros(2, 4, 2, 3, 5), torch.zeros(2, 4, 8, 3, 5)
    clips = [t.contiguous(memory_format=torch.channels_last_3d) for t in (slow, fast)]
    reason = slowfast_fast.explain(Lateral(), clips, show=False).rows[0].reason
    assert reason == "fastest for cpu; forward: kernels"
    wide = torch.zeros(2, 5, 8, 3, 5).contiguous(memory_format=torch.channels_last_3d)
    slowfast_fast.explain(Lateral(), [clips[0], wide[:, :4]], show=False)
    shape = (2, 4, 6, 8, 2, 15, 5, 4, 2, 1)
    assert asked == [(shape, torch.float32, False, aligned) for aligned in (True, False)]


def test_explain_tells_the_cuda_kernels_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its layers that are ours, each asked with its shape."""
    use_backends(monkeypatch, {"cuda": replace(BACKENDS["cpu"], name="cuda")})
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(sys.modules["slowfast_fast._extension"], "cuda_kernels", lambda *q: asked.append(q) or "k")
    x = torch.randn(2, 8, 4, 6, 10).contiguous(memory_format=torch.channels_last_3d)
    shapes = {"a": (3, 8, 3, 1, 1), "b": (3, 3, 1, 3, 3), "c": (5, 3, 1, 1, 1), "shortcut": (5, 8, 1, 1, 1)}

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.bottleneck_bn(x, *(ops.NormedConv(torch.randn(s)) for s in shapes.values()), stride=2)

    row = slowfast_fast.explain(Block(), x, show=False).rows[0]
    assert row.reason == "fastest for cpu; a: k; b: PyTorch's convolution of images; c: k; shortcut: k"
    of_a, of_c = (2, 8, 3, 4, 4, 60, 3, 1, 1, 1), (2, 3, 5, 4, 4, 15, 1, 1, 0, 1)
    assert [question[0] for question in asked] == [of_a, of_c, (2, 8, *of_c[2:])]


@pytest.mark.skipif(build_info()["cuda"] is not None, reason="for builds without CUDA kernels")
def test_no_cuda_kernels_to_tell_of() -> None:
    assert cuda_kernels((1,) * 10, torch.float32, False, True) is None


def test_explain_under_a_forced_backend(network: nn.Module) -> None:
    with forced("reference"):
        found = slowfast_fast.explain(network, torch.randn(CLIP), show=False)
    assert (found.rows[0].backend, found.rows[0].reason.split(";")[0]) == ("reference", "asked for")


def test_explain_changes_nothing(network: nn.Module) -> None:
    buffers = {name: (buffer, buffer.clone()) for name, buffer in network.named_buffers()}
    clips = [torch.randn(CLIP), torch.randn(CLIP)]
    given = list(clips)
    random = torch.get_rng_state()
    slowfast_fast.explain(Second(network), given, show=False)
    assert torch.equal(torch.get_rng_state(), random)
    for name, buffer in network.named_buffers():
        same, value = buffers[name]
        assert buffer is same
        assert torch.equal(buffer, value), name
    assert all(a is b for a, b in zip(given, clips, strict=True))
    assert network.training
    assert not recording()
    assert not nn.modules.module._global_forward_hooks


class Second(nn.Module):
    """Takes a list and, as pytorchvideo does, writes into it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, clips: list[Tensor]) -> Tensor:
        clips[0] = self.inner(clips[1])
        return clips[0]


def test_explain_restores_after_an_error(network: nn.Module) -> None:
    network.append(nn.Linear(7, 7))
    before = network[0].norm.running_mean.clone()
    with pytest.raises(RuntimeError):
        slowfast_fast.explain(network, torch.randn(CLIP), show=False)
    assert torch.equal(network[0].norm.running_mean, before)
    assert not recording()
    assert not nn.modules.module._global_forward_hooks


@pytest.mark.no_sanitizer
def test_explain_a_compiled_model(network: nn.Module) -> None:
    compiled: Any = torch.compile(network, backend="aot_eager")
    rows = slowfast_fast.explain(compiled, torch.randn(CLIP), show=False).rows
    assert [row.modules[0] for row in rows] == ["0.conv", "1.conv", "1.norm", "1.act", "2", "3"]


def test_note_outside_of_explain() -> None:
    with pytest.raises(AssertionError, match="recording"):
        note((), None)
