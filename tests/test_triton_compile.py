"""What Triton's compiler makes of the kernels for sm_80, sm_90 and sm_100, which needs no GPU: the launches of real
calls (on meta tensors), compiled ahead of time, and the machine code of some representative ones."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from slowfast_fast.triton import _configs, _convolution, frames_concat, pack_pathways, temporal_conv  # noqa: E402
from slowfast_fast.triton import lateral_concat as lateral  # noqa: E402
from slowfast_fast.triton._configs import Config  # noqa: E402
from slowfast_fast.triton._launch import Launch  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.uint8: "u8", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
# Shared memory that a block may use.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: r"\bHMMA\b", 90: r"\bHGMMA\b|\bHMMA\b", 100: r"\bUTC\w*MMA\b|\bHMMA\b"}
LOADS_16_BYTES = r"LDG\.E\S*\.128|LDGSTS\.E\S*\.128"
STORES_16_BYTES = r"STG\.E\S*\.128"


@dataclass(frozen=True)
class Machine:
    """A compiled kernel."""

    registers: int
    stack: int
    shared: int
    sass: str

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))


@dataclass(frozen=True)
class Recorded:
    """A launch with its tensors, as it would have been made on a GPU."""

    kernel: Any
    launch: Launch
    tensors: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compile(self, capability: int, folder: Path) -> Machine:
        """With the types, and what divides the arguments, that Triton finds when it launches on aligned tensors."""
        names = self.kernel.arg_names
        pointers, scalars = names[: len(self.tensors)], names[len(self.tensors) :]
        constants = dict(self.launch.constants)
        assert scalars[len(self.launch.scalars) :] == list(constants), "arguments and signature differ in order"
        signature = {name: f"*{TYPES[tensor.dtype]}" for name, tensor in zip(pointers, self.tensors, strict=True)}
        divisible = set(pointers)
        for name, scalar in zip(scalars, self.launch.scalars, strict=False):
            if isinstance(scalar, float):
                signature[name] = "fp32"
            elif scalar == 1:
                constants[name] = 1
            else:
                signature[name] = "i32" if scalar < 2**31 else "i64"
                divisible |= {name} if scalar % 16 == 0 else set()
        signature |= dict.fromkeys(constants, "constexpr")
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
        compiled = triton.compile(
            ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", capability, 32),
            options=self.launch.options,
        )
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin))
        assert usage is not None
        return Machine(int(usage[1]), int(usage[2]), compiled.metadata.shared, _tool("nvdisasm", "-c", cubin))


def _tool(name: str, option: str, cubin: Path) -> str:
    return subprocess.run([TOOLS / name, option, cubin], capture_output=True, text=True, check=True).stdout


def record(run: Callable[[], object], config: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorded]:
    """The launches of ``run`` by kernel, with entry ``config`` of every list of configurations."""
    launches: dict[str, Recorded] = {}

    def note(launch: Launch, kernel: Any, *tensors: Tensor) -> None:
        recorded = Recorded(kernel, launch, tensors)
        launches[recorded.name] = recorded

    def choose(key: str, candidates: list[Config], *rest: Any) -> tuple[Config, bool]:
        return candidates[min(config, len(candidates) - 1)], False

    monkeypatch.setattr(Launch, "__call__", note)
    monkeypatch.setattr(_convolution, "choose", choose)
    run()
    return launches


def rows(n: int, c: int, t: int, size: int, dtype: torch.dtype) -> Tensor:
    shape = (n, c, t, size, size)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last_3d)


def vector(k: int) -> Tensor:
    return torch.empty(k, device="meta")


@dataclass(frozen=True)
class Layer:
    """A temporal convolution of R50 8x8."""

    c: int
    k: int
    t: int
    size: int
    dtype: torch.dtype
    tf32: bool = False
    n: int = 8

    def inputs(self) -> tuple[Tensor, Tensor]:
        weight = torch.empty(self.k, self.c, 3, 1, 1, dtype=self.dtype, device="meta")
        return rows(self.n, self.c, self.t, self.size, self.dtype), weight

    def inference(self) -> None:
        y = rows(self.n, self.k, self.t, self.size, self.dtype)
        v = vector(self.k)
        temporal_conv.temporal_conv(*self.inputs(), v, v, y, 1, 1, 1, True, self.tf32)

    def training_step(self) -> None:
        y = rows(self.n, self.k, self.t, self.size, self.dtype)
        v = vector(self.k)
        temporal_conv.temporal_conv_bn(*self.inputs(), v, v, y, 1, 1, 1, 1e-5, True, self.tf32)
        temporal_conv.temporal_conv_bn_backward(
            y, *self.inputs(), v, v, y, y, v, v, 1, 1, 1, True, True, True, True, True, True, self.tf32
        )


RES2_FAST = Layer(32, 8, 32, 56, torch.bfloat16)
RES4_SLOW = Layer(1024, 256, 8, 14, torch.float16)
RES4_SLOW_TF32 = Layer(1024, 256, 8, 14, torch.float32, tf32=True)
RES5_SLOW_ONE_CLIP = Layer(2048, 512, 8, 7, torch.bfloat16, n=1)
PRODUCTS = ("forward", "dgrad", "wgrad")


def check(machine: Machine, capability: int, product: bool) -> None:
    assert machine.stack == 0, f"{machine.registers} registers and {machine.stack} bytes of stack"
    assert machine.count(r"\b(?:STL|LDL)\b") == 0, "registers are spilled"
    assert machine.shared <= SHARED[capability], f"{machine.shared} bytes of shared memory"
    assert machine.count(LOADS_16_BYTES) > 0, "no 16-byte load"
    if product:
        assert machine.count(TENSOR_CORE[capability]) > 0, "no tensor core"


capabilities = pytest.mark.parametrize("capability", SHARED)
layers = pytest.mark.parametrize("layer", [RES2_FAST, RES4_SLOW, RES4_SLOW_TF32], ids=["narrow", "wide", "tf32"])


@capabilities
@layers
def test_heuristic_configurations(
    layer: Layer, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = record(layer.training_step, 0, monkeypatch)
    for name in PRODUCTS:
        machine = launches[name].compile(capability, tmp_path)
        check(machine, capability, product=True)
        assert machine.count(STORES_16_BYTES) > 0, name


@pytest.mark.parametrize("config", [1, 2, 3, 4])
@layers
def test_every_listed_configuration(layer: Layer, config: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = record(layer.training_step, config, monkeypatch)
    for name in PRODUCTS:
        check(launches[name].compile(90, tmp_path), 90, product=True)


@capabilities
def test_rowwise_and_reducing_kernels(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = record(RES2_FAST.training_step, 0, monkeypatch)
    for name in ("normalise", "gradient_sums", "merge_statistics", "add_chunks", "add_splits"):
        machine = launches[name].compile(capability, tmp_path)
        check(machine, capability, product=False)
        assert name != "normalise" or machine.count(STORES_16_BYTES) > 0


@capabilities
def test_split_depth(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clip in res5: 392 rows do not fill a chip."""
    launches = record(RES5_SLOW_ONE_CLIP.inference, 0, monkeypatch)
    assert launches["forward"].launch.constants["SPLIT"] > 1
    assert launches["forward"].launch.grid[0] * launches["forward"].launch.grid[1] > _configs.WAVE // 2
    for name in ("forward", "finish_split"):
        check(launches[name].compile(capability, tmp_path), capability, product=name == "forward")


@capabilities
def test_lateral_writes_16_bytes_into_its_slice(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = rows(8, 64, 8, 56, torch.bfloat16), rows(8, 8, 32, 56, torch.bfloat16)
    weight = torch.empty(16, 8, 7, 1, 1, dtype=torch.bfloat16, device="meta")
    launches = record(
        lambda: lateral.lateral_concat(slow, fast, weight, vector(16), vector(16), 4, 3, True, False), 0, monkeypatch
    )
    for name in ("forward", "normalise"):
        machine = launches[name].compile(capability, tmp_path)
        check(machine, capability, product=name == "forward")
        assert machine.count(STORES_16_BYTES) > 0, name
        assert machine.count(r"STG\.E\S*\.U16|STG\.E\S*\.U8") == 0, name


@pytest.mark.parametrize(
    ("taps", "dtype", "capability"),
    [(8, torch.bfloat16, 80), (1, torch.bfloat16, 90), (8, torch.float32, 100)],
    ids=str,
)
def test_frames_move_16_bytes_at_a_time(
    taps: int, dtype: torch.dtype, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the stem of R50 4x16, whose fast pathway has 8 channels: 16 bytes of a frame in bfloat16."""
    slow, fast = rows(8, 64, 4, 56, dtype), rows(8, 8, 32, 56, dtype)
    forward = record(lambda: frames_concat.frames_concat(slow, fast, 8, taps), 0, monkeypatch)
    assert forward["normalise"].launch.constants["FIRST"] == 0
    grad = rows(8, 64 + taps * 8, 4, 56, dtype)[:, 64:]
    backward = record(lambda: frames_concat.frames_concat_backward(grad, 32, 8, taps), 0, monkeypatch)
    assert not backward["move_frames"].launch.constants["WIDE"]
    for launches in (forward, backward):
        machine = launches["move_frames"].compile(capability, tmp_path)
        check(machine, capability, product=False)
        assert machine.count(STORES_16_BYTES) > 0
        assert machine.count(r"(?:STG|LDG)\.E\S*\.[US](?:16|8)\b") == 0, "2 bytes at a time"


@pytest.mark.parametrize("slow_frames", [list(range(0, 32, 4)), []], ids=["two pathways", "one"])
def test_decoded_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_frames: list[int]) -> None:
    frames = torch.empty(8, 32, 224, 224, 3, dtype=torch.uint8, device="meta")
    three = [0.5] * 3
    launches = record(
        lambda: pack_pathways.pack_pathways(frames, slow_frames, three, three, torch.bfloat16), 0, monkeypatch
    )
    machine = launches["normalise_frames"].compile(90, tmp_path)
    assert (machine.stack, machine.count(r"\b(?:STL|LDL)\b")) == (0, 0)
    assert machine.count(STORES_16_BYTES) > 0
    assert machine.count(r"LDG\.E\S*\.64") > 0, "8 bytes make the 16 of a result"


def test_float32_stays_float32_without_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(64, 64, 8, 14, torch.float32)
    machine = record(layer.inference, 0, monkeypatch)["forward"].compile(90, tmp_path)
    assert machine.count(TENSOR_CORE[90]) == 0
    assert machine.count(r"\bFFMA\b") > 0


def test_offsets_pass_2_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = RES2_FAST, Layer(64, 64, 32, 256, torch.bfloat16, n=32)
    for layer, wide in ((small, False), (large, True)):
        for name, launch in record(layer.training_step, 0, monkeypatch).items():
            if "WIDE" in launch.launch.constants:
                assert launch.launch.constants["WIDE"] is wide, name
