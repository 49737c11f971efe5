"""The Python around the Triton kernels: schemas, the choice of tile shapes and its file, launches, and what
torch.compile sees. A stub stands for Triton's driver where launching asks for one; nothing here runs a kernel."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

from functorch.compile import make_boxed_func  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

import slowfast_fast  # noqa: E402
from slowfast_fast.backend import BACKENDS, KERNELS, _why_not_loaded  # noqa: E402
from slowfast_fast.triton import _configs, _convolution, _launch, _tuning, temporal_conv  # noqa: E402
from slowfast_fast.triton._configs import Config  # noqa: E402

FIRST, SECOND, THIRD = (Config(64, 64, 32, 4, stages) for stages in (1, 2, 3))
CANDIDATES = [FIRST, SECOND, THIRD]
CUDA = torch.device("cuda", 0)


def test_schemas_are_those_of_the_extension() -> None:
    frozen = {"temporal_conv_bn_frozen", "lateral_concat_bn_frozen"}
    inference = {"bottleneck", "spatial_conv", "max_pool", "max_pool_lateral_concat", "temporal_conv_lateral_concat"}
    inference |= {"max_pool_frames_concat", "temporal_conv_frames_concat"}
    others = {"batch_norm_max_pool", "bottleneck_bn", "stem_conv"}
    shared = {kernel for op, kernels in KERNELS.items() if op not in inference | others for kernel in kernels}
    for op in sorted(shared | frozen):
        ours, theirs = (
            getattr(getattr(torch.ops, library), op).default._schema
            for library in ("slowfast_fast_triton", "slowfast_fast")
        )
        assert [(a.name, a.type, a.is_write) for a in ours.arguments] == [
            (a.name, a.type, a.is_write) for a in theirs.arguments
        ], op
        assert [r.type for r in ours.returns] == [r.type for r in theirs.returns], op


class Device:
    """Stands for a GPU on which configurations take given times."""

    def __init__(self, milliseconds: dict[Config, float]) -> None:
        self.milliseconds = milliseconds
        self.calls: list[Config] = []

    def prepare(self, config: Config) -> Callable[[], None]:
        def call() -> None:
            if config not in self.milliseconds:
                raise OutOfResources(300_000, 232_448, "shared memory")
            self.calls.append(config)

        return call

    def choose(self, key: str = "key", candidates: list[Config] = CANDIDATES) -> tuple[Config, bool]:
        return _tuning.choose(key, candidates, CUDA, self.prepare)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    """A device on which the second configuration is fastest and the third does not fit, and a cache folder."""
    made = Device({FIRST: 2.0, SECOND: 1.0})

    def time(call: Callable[[], None]) -> float:
        call()
        return made.milliseconds[made.calls[-1]]

    properties = SimpleNamespace(name="Some GPU/80GB", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_tuning, "_milliseconds", time)
    monkeypatch.setattr(_tuning, "_choices", {})
    monkeypatch.setenv("SLOWFAST_FAST_CACHE_DIR", str(tmp_path / "cache"))
    return made


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "_choices", {})


def the_file() -> Path:
    (path,) = _tuning.folder().iterdir()
    return path


def test_the_fastest_is_measured_once_and_kept_on_disk(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.choose() == (SECOND, True)
    assert set(device.calls) == {FIRST, SECOND}
    measured = len(device.calls)
    assert device.choose() == (SECOND, True)
    new_process(monkeypatch)
    assert device.choose() == (SECOND, True)
    assert len(device.calls) == measured
    name = the_file().name
    assert name.startswith(f"triton-Some_GPU_80GB-sm90-triton{triton.__version__}-")
    assert json.loads(the_file().read_text()) == {"key": list(SECOND)}


def test_processes_add_to_each_others_file(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.choose("one")
    ours = _tuning._choices
    new_process(monkeypatch)
    device.choose("two")
    monkeypatch.setattr(_tuning, "_choices", ours)  # which has not read the second one's
    device.choose("three")
    assert sorted(json.loads(the_file().read_text())) == ["one", "three", "two"]


@pytest.mark.parametrize("damage", ["{", "[1]", '{"key": [1, 2]}', '{"key": "abcde"}', '{"key": 3}'])
def test_a_damaged_file_is_ignored_with_a_warning(damage: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.choose()
    the_file().write_text(damage)
    new_process(monkeypatch)
    with pytest.warns(UserWarning, match="damaged and ignored"):
        assert device.choose() == (SECOND, True)
    assert json.loads(the_file().read_text()) == {"key": list(SECOND)}


def test_a_folder_that_cannot_be_written_costs_a_warning_only(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOWFAST_FAST_CACHE_DIR", "/proc/nowhere")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert device.choose() == (SECOND, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device.choose() == (SECOND, True)


def test_a_choice_that_is_no_longer_listed_is_measured_again(device: Device) -> None:
    device.choose()
    assert device.choose(candidates=[FIRST]) == (FIRST, True)


def test_deterministic_mode_takes_the_heuristic(device: Device) -> None:
    device.choose()
    measured = len(device.calls)
    torch.use_deterministic_algorithms(True)
    try:
        assert device.choose() == (FIRST, True)
        assert device.choose("other") == (FIRST, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(device.calls) == measured


def test_nothing_is_measured_during_capture_or_tracing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert device.choose() == (FIRST, False)
    assert _tuning.choose("key", CANDIDATES, CUDA, None) == (FIRST, False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not device.calls
    assert device.choose() == (SECOND, True)
    assert _tuning.choose("key", CANDIDATES, CUDA, None) == (SECOND, True)


def test_measuring_can_be_switched_off(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOWFAST_FAST_TRITON_TUNE", "0")
    assert device.choose() == (FIRST, True)
    assert not device.calls


def test_no_configuration_fits(device: Device) -> None:
    with pytest.raises(RuntimeError, match="none of the tile shapes"):
        device.choose(candidates=[THIRD])


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("backward", [False, True])
def test_lists_are_short_and_hold_what_kernels_take(bits: int, backward: bool) -> None:
    for rows in (1, 100, 10**6):
        for outputs in (1, 8, 64, 129, 2048):
            for channels, taps in ((1, 1), (8, 3), (24, 7), (2048, 3)):
                lists = [
                    _configs.product_configs(rows, outputs, channels, taps, 8, bits, backward),
                    _configs.wgrad_configs(rows, outputs, channels * taps, bits),
                ]
                for configs in lists:
                    assert 1 <= len(configs) <= 5
                    for config in configs:
                        assert all(size >= 16 and size & (size - 1) == 0 for size in config[:3]), config
                        assert config.bm % config.frames == 0
                        assert config.split >= 1


class Driver:
    """Stands for Triton's CUDA driver: it compiles, and counts launches instead of making them."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.launcher_cls = lambda *args: lambda *call: self.launched.append(call)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": 232448,
                "multiprocessor_count": 132,
                "max_num_regs": 65536,
                "warpSize": 32,
            },
            load_binary=lambda *args: (None, object(), 0, 0, 1024),
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 1000  # no kernel made for the stub must be found by the launches of another test

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stub = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", stub)
    return stub


def inputs(**changes: Any) -> tuple[Any, ...]:
    x = torch.randn(2, 16, 4, 3, 3).contiguous(memory_format=torch.channels_last_3d)
    weight, scale = torch.randn(24, 16, 3, 1, 1), torch.randn(24)
    return x, weight, scale, scale.clone(), None, 1, 1, 1, True, False


def test_a_call_seen_before_goes_straight_to_the_compiled_kernel(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = torch.ops.slowfast_fast_triton.temporal_conv
    _convolution._plans.clear()
    arguments = inputs()
    op(*arguments)
    searched = triton.runtime.jit.JITFunction.run
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *args, **kwargs: pytest.fail("searched again"))
    op(*arguments)
    first, second = driver.launched
    # Grid, stream and so on, then the arguments of the kernel in order; y (at the sixth place of them) is fresh.
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        if isinstance(ours, Tensor):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        elif isinstance(ours, (int, float, str)):
            assert ours == theirs
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", searched)
    unaligned = torch.empty(arguments[0].numel() + 1)[1:].as_strided(arguments[0].shape, arguments[0].stride())
    op(unaligned, *arguments[1:])
    assert len(driver.launched) == 3
    assert driver.launched[-1][4] is not driver.launched[0][4], "compiled for aligned tensors"
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *args, **kwargs: pytest.fail("searched again"))
    op(*arguments)
    _convolution._plans.clear()


def test_compile_sees_the_kernels(driver: Driver) -> None:
    """In one graph, forward and backward, the ops become their kernels."""
    assert _why_not_loaded(BACKENDS["triton"]) is None  # which registers gradients
    targets: list[str] = []

    def look(graph: torch.fx.GraphModule, example: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    op = torch.ops.slowfast_fast_triton.temporal_conv_bn
    x, weight, gamma, beta, *_ = inputs()

    def step(x: Tensor, weight: Tensor) -> Tensor:
        return op(x, weight, gamma, beta, None, 1, 1, 1, 1e-5, True, False)[0]

    compiler = aot_autograd(fw_compiler=look, bw_compiler=look)
    # Forced, the backward runs where the forward did.
    with slowfast_fast.backend("triton"):
        y = torch.compile(step, backend=compiler, fullgraph=True)(x.requires_grad_(), weight.requires_grad_())
        y.sum().backward()
    assert sum("triton_kernel_wrapper" in target for target in targets) >= 7, targets
    assert not any("slowfast_fast_triton" in target for target in targets), targets


def test_offsets_and_units() -> None:
    dense = torch.empty(2, 24, 4, 3, 5, device="meta", memory_format=torch.channels_last_3d)
    assert _launch.strides(dense) == (24 * 60, 24 * 15, 24)
    assert _launch.strides(dense[:, 8:]) == (24 * 60, 24 * 15, 24)
    assert _launch.common_unit(_launch.strides(dense)) == 8
    assert _launch.strides(None) == (0, 0, 0)
    assert not _launch.passes_int32(dense)
    assert _launch.passes_int32(torch.empty(2**10, 2**11, 2**10, 1, 2, device="meta"))


def test_running_statistics_launch_is_made_once() -> None:
    arguments = (torch.device("cuda", 0), 64, torch.float32, torch.float32, True, 0.1)
    assert temporal_conv._running_launch(*arguments) is temporal_conv._running_launch(*arguments)
