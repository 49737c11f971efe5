"""What only a CUDA device can show, on every backend that runs on one: exactness at the network's own shapes, streams,
graphs, tensors beyond 32-bit offsets, and whole networks. The tests of the ops run there too (`pytest -m gpu`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import block_testing as block
import network_testing
import pytest
import test_batch_norm as batch_norm
import test_bottleneck_bn as bottleneck_bn
import test_lateral_concat as lateral
import test_temporal_conv as temporal
import torch
from conftest import device_of, forced, tf32
from op_testing import Call, assert_as_exact_as_pytorch, assert_autocast
from torch import Tensor

import slowfast_fast
from slowfast_fast import ops, reference
from slowfast_fast.backend import BACKENDS, can_run
from slowfast_fast.bench.network import random_state
from slowfast_fast.bench.shapes import Shape, network_shapes
from slowfast_fast.reference.slowfast import SlowFast

pytestmark = pytest.mark.gpu

CUDA = "cuda"
MODES = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
modes = pytest.mark.parametrize("mode", MODES)
GIB = 2**30


@pytest.fixture(params=[name for name in BACKENDS if device_of(name) == CUDA])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.node.callspec.params.get("make") in BLOCK_CALLS.values():
        skip_without_blocks(request.param)
    with forced(request):
        yield request.param


def skip_without_blocks(backend: str) -> None:
    why_not = can_run(backend, "bottleneck_bn", torch.empty(1, device=CUDA))
    if why_not is not None:
        assert backend != "cuda", why_not
        pytest.skip(why_not)


def test_backends_are_here() -> None:
    """Every other test would skip, and none fail, if the build had no kernels."""
    x = torch.empty(1, device=CUDA)
    assert can_run("cuda", "temporal_conv", x) is None
    if importlib.util.find_spec("triton"):
        assert can_run("triton", "temporal_conv", x) is None


def of_op(shape: Shape) -> temporal.Shape | lateral.Shape:
    """A shape of the network as the tests of its op write it."""
    same = {"n": shape.batch, "c": shape.channels, "k": shape.out_channels, "h": shape.size, "w": shape.size}
    if shape.op == "temporal_conv":
        return temporal.Shape(**same, t=shape.frames, kt=shape.kernel)
    found = lateral.Shape(**same, c_slow=shape.slow_channels, t=shape.out_frames, kt=shape.kernel, alpha=shape.stride)
    return replace(found, surplus=shape.frames - found.t_fast)


def affine_call(shape: temporal.Shape | lateral.Shape, dtype: torch.dtype) -> Call:
    return (temporal if isinstance(shape, temporal.Shape) else lateral).random_call(shape, dtype)


def real_shapes(crop: int, batch: int) -> pytest.MarkDecorator:
    found = network_shapes(crop, batch=batch)
    names = [f"{shape.op} {shape.name}".replace(" ", "-") for shape in found]
    return pytest.mark.parametrize("shape", [of_op(shape) for shape in found], ids=names)


@real_shapes(224, batch=2)
@modes
@pytest.mark.usefixtures("poisoned")
def test_shapes_of_the_network(gpu_backend: str, mode: str, shape: temporal.Shape | lateral.Shape) -> None:
    dtype, allowed = MODES[mode]
    with tf32(allowed):
        assert_as_exact_as_pytorch(lambda: affine_call(shape, dtype), device=CUDA, exact_on=CUDA)


@real_shapes(256, batch=1)
@modes
@pytest.mark.usefixtures("poisoned")
def test_training_at_shapes_of_the_network(gpu_backend: str, mode: str, shape: temporal.Shape | lateral.Shape) -> None:
    dtype, allowed = MODES[mode]
    with tf32(allowed):
        assert_as_exact_as_pytorch(lambda: batch_norm.bn_call(shape, dtype), device=CUDA, exact_on=CUDA)


@batch_norm.shapes
@pytest.mark.usefixtures("poisoned")
def test_odd_shapes_in_tf32(gpu_backend: str, shape: temporal.Shape | lateral.Shape) -> None:
    """The tests of the ops have them in the other dtypes."""
    with tf32(True):
        for make in (affine_call, batch_norm.bn_call):
            assert_as_exact_as_pytorch(lambda make=make: make(shape, torch.float32), device=CUDA)


# Residual blocks of R50 8x8 at 224: the first ones of a stage have a shortcut with a convolution.
REAL_BLOCKS = {
    "slow_res2_first": block.Shape(c=80, j=64, k=256, kt=1, t=8, h=56, w=56),
    "slow_res4_first": block.Shape(n=1, c=640, j=256, k=1024, t=8, stride=2, h=28, w=28),
    "slow_res5": block.Shape(n=1, c=2048, j=512, k=2048, t=8, h=7, w=7, shortcut=False),
    "fast_res2_first": block.Shape(n=1, c=8, j=8, k=32, t=32, h=56, w=56),
    "fast_res3_first": block.Shape(n=1, c=32, j=16, k=64, t=32, stride=2, h=56, w=56),
    "fast_res4": block.Shape(n=1, c=128, j=32, k=128, t=32, h=14, w=14, shortcut=False),
}


@pytest.mark.parametrize("shape", REAL_BLOCKS.values(), ids=REAL_BLOCKS)
@modes
@pytest.mark.usefixtures("poisoned")
def test_blocks_of_the_network(gpu_backend: str, mode: str, shape: block.Shape) -> None:
    """So many activations that none is close to its kink only where channels are on or off."""
    skip_without_blocks(gpu_backend)
    dtype, allowed = MODES[mode]
    with tf32(allowed):
        assert_as_exact_as_pytorch(lambda: block.random_call(shape, dtype, active=16.0), device=CUDA, exact_on=CUDA)


@pytest.mark.parametrize("shape", bottleneck_bn.SHAPES.values(), ids=bottleneck_bn.SHAPES)
@modes
@pytest.mark.usefixtures("poisoned")
def test_blocks_of_odd_shapes(gpu_backend: str, mode: str, shape: block.Shape) -> None:
    skip_without_blocks(gpu_backend)
    dtype, allowed = MODES[mode]
    with tf32(allowed):
        assert_as_exact_as_pytorch(lambda: block.random_call(shape, dtype, active=6.0), device=CUDA, trials=3)


@pytest.mark.parametrize("name", ["mean_100", "constant", "correlated"])
@pytest.mark.parametrize("k", [32, 40], ids=["narrow", "tiles"])
@modes
@pytest.mark.usefixtures("poisoned")
def test_badly_scaled_blocks(gpu_backend: str, mode: str, k: int, name: str) -> None:
    skip_without_blocks(gpu_backend)
    dtype, allowed = MODES[mode]
    shape = block.Shape(n=2, c=8, j=16, k=k, t=8, h=28, w=28, kt=1)
    with tf32(allowed):
        assert_as_exact_as_pytorch(
            partial(block.badly_scaled, name, shape, dtype), device=CUDA, exact_on=CUDA, trials=7
        )


# A narrow and a wide layer and a lateral connection, small enough for many runs: 7 x 7 images leave the rows of the
# wide one too few for the chip, so its sums are split.
SMALL = {
    "narrow": temporal.Shape(n=2, c=32, k=8, t=8, h=14, w=14),
    "wide": temporal.Shape(n=1, c=1024, k=256, t=8, h=7, w=7),
    "lateral": lateral.Shape(n=2, c_slow=64, c=8, k=16, t=4, h=14, w=14, kt=7),
}
CALLS = {
    f"{name} {form}": (lambda dtype, make=make, shape=shape: make(shape, dtype))
    for name, shape in SMALL.items()
    for form, make in (("affine", affine_call), ("batch norm", batch_norm.bn_call))
}
BLOCKS = {
    "narrow block": block.Shape(c=32, j=16, k=64, t=4, stride=2, h=14, w=14),
    "wide block": block.Shape(n=1, c=256, j=128, k=256, t=4, h=7, w=7, shortcut=False),
}
BLOCK_CALLS = {
    name: (lambda dtype, shape=shape: block.random_call(shape, dtype, active=6.0)) for name, shape in BLOCKS.items()
}
CALLS |= BLOCK_CALLS
calls = pytest.mark.parametrize("make", CALLS.values(), ids=CALLS)
Make = Callable[[torch.dtype], Call]


def on_gpu(call: Call, device: str = CUDA) -> Call:
    return call.to(layout="channels_last", device=device)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def overwrite(call: Call, source: Call) -> None:
    """Give the tensors of a call, in place, the values of another's."""
    for name, tensor in source.tensors.items():
        call.tensors[name].copy_(tensor)
    call.grad.copy_(source.grad)


@pytest.fixture
def same_library_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's spatial convolution is cuDNN's, whose gradients are otherwise not the same every time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@calls
@modes
@pytest.mark.usefixtures("same_library_kernels")
def test_same_bits_every_time(gpu_backend: str, mode: str, make: Make) -> None:
    dtype, allowed = MODES[mode]
    call = on_gpu(make(dtype))
    with tf32(allowed):
        first = call.run()
        for _ in range(3):
            assert_same_bits(call.run(), first)


@calls
@modes
@pytest.mark.usefixtures("same_library_kernels")
def test_graph(gpu_backend: str, mode: str, make: Make) -> None:
    """Forward and backward in one CUDA graph: replayed on other values, it gives what they give in eager mode. Waiting
    for the device during the capture would be an error of CUDA's."""
    dtype, allowed = MODES[mode]
    call, fresh = on_gpu(make(dtype)), on_gpu(make(dtype))
    with tf32(allowed):
        expected = fresh.run()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call.run()  # what is done once (loading code, compiling Triton's) is done outside of the graph
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call.run()
        overwrite(call, fresh)
        for _ in range(2):
            graph.replay()
            assert_same_bits(results, expected)


@calls
@pytest.mark.usefixtures("same_library_kernels")
def test_current_stream(gpu_backend: str, make: Make) -> None:
    """The inputs are there only once this stream has slept: work on any other one would read zeros."""
    source = on_gpu(make(torch.bfloat16))
    expected = source.run()
    late = replace(
        source,
        tensors={name: torch.zeros_like(tensor) for name, tensor in source.tensors.items()},
        grad=torch.zeros_like(source.grad),
    )
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles
        overwrite(late, source)
        results = late.run()
    stream.synchronize()
    assert_same_bits(results, expected)


@calls
@pytest.mark.usefixtures("same_library_kernels")
def test_second_device(gpu_backend: str, make: Make) -> None:
    """On the device of the tensors, whatever the current one is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    call = make(torch.float32)
    with torch.cuda.device(0):
        results = on_gpu(call, "cuda:1").run()
    with torch.cuda.device(1):
        expected = on_gpu(call, "cuda:1").run()
    assert all(result.device == torch.device("cuda:1") for result in results.values())
    assert_same_bits(results, expected)


@calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_host_does_not_wait(gpu_backend: str, dtype: torch.dtype, make: Make) -> None:
    call = on_gpu(make(dtype))
    call.run()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@calls
@pytest.mark.usefixtures("same_library_kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast(gpu_backend: str, dtype: torch.dtype, make: Make) -> None:
    of_block = make in BLOCK_CALLS.values()
    (bottleneck_bn.assert_autocast if of_block else assert_autocast)(make(torch.float32), dtype, CUDA)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("form", ["affine", "batch norm"])
def test_compiled_with_graphs(gpu_backend: str, form: str, name: str) -> None:
    """torch.compile(mode="reduce-overhead"), forward and backward, with nothing that would keep it from CUDA graphs.
    (Running statistics are changed in place, which inductor's graphs do not take: they are left out.)"""
    from torch._dynamo.utils import counters

    running = ("running_mean", "running_var", "num_batches_tracked")
    make = (
        (lambda: affine_call(SMALL[name], torch.bfloat16))
        if form == "affine"
        else (lambda: batch_norm.bn_call(SMALL[name], torch.bfloat16, *running))
    )
    torch._dynamo.reset()
    counters.clear()
    op = getattr(ops, make().op)
    compiled = torch.compile(lambda **arguments: op(**arguments), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # the first runs compile and record, the others replay
        call = on_gpu(make())
        torch.compiler.cudagraph_mark_step_begin()
        results = {key: tensor.clone() for key, tensor in call.run(compiled).items()}
        for key, expected in call.run().items():
            torch.testing.assert_close(results[key], expected, msg=lambda text, key=key: f"{key}: {text}")
    assert counters["inductor"]["cudagraph_skips"] == 0


@contextmanager
def memory(gib: int) -> Iterator[None]:
    """Room for tensors of so many GiB in all, given back at the end."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free device memory; there are {free // GIB}")
    try:
        yield
    except torch.OutOfMemoryError as error:  # others may have taken some meanwhile
        pytest.skip(str(error))
    finally:
        torch.cuda.empty_cache()


def random_rows(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=CUDA, memory_format=torch.channels_last_3d).normal_()


def assert_rounded(found: Tensor, exact: Tensor, name: str) -> None:
    """bfloat16 results within what rounding them once may cost."""
    assert network_testing.distance(found.double(), exact) <= torch.finfo(torch.bfloat16).eps, name


LAST = 4  # image rows that stand for the others: a convolution in T alone treats each for itself


def test_temporal_conv_beyond_32_bits(gpu_backend: str) -> None:
    with memory(30):
        x = random_rows(1, 8, 40, 2600, 2600).requires_grad_()
        assert x.numel() > 2**31
        weight = (torch.randn(8, 8, 3, 1, 1, device=CUDA) / 5).bfloat16().requires_grad_()
        scale, shift = torch.rand(8, device=CUDA) + 0.5, torch.randn(8, device=CUDA)
        y = ops.temporal_conv(x, weight, scale, shift, relu=True)
        grad = torch.zeros_like(y)
        grad[..., -LAST:, :] = random_rows(*grad[..., -LAST:, :].shape)
        dx, dweight = torch.autograd.grad(y, (x, weight), grad)

        part = x.detach()[..., -LAST:, :].double().requires_grad_()
        exact_weight = weight.detach().double().requires_grad_()
        exact = reference.temporal_conv(part, exact_weight, scale.double(), shift.double(), relu=True)
        exact_dx, exact_dweight = torch.autograd.grad(exact, (part, exact_weight), grad[..., -LAST:, :].double())
        assert_rounded(y.detach()[..., -LAST:, :], exact.detach(), "y")
        assert_rounded(dx[..., -LAST:, :], exact_dx, "dx")
        assert_rounded(dweight, exact_dweight, "dweight")
        assert not dx[..., :-LAST, :].any()


def test_lateral_concat_beyond_32_bits(gpu_backend: str) -> None:
    with memory(25):
        slow, fast = random_rows(1, 64, 8, 2100, 2100), random_rows(1, 8, 32, 2100, 2100)
        assert slow.numel() > 2**31
        weight = (torch.randn(16, 8, 7, 1, 1, device=CUDA) / 7).bfloat16()
        out = ops.lateral_concat(slow, fast, weight, alpha=4)
        part = fast[..., -LAST:, :].double()
        exact = reference.lateral_concat(slow[..., -LAST:, :].double(), part, weight.double(), alpha=4)
        assert torch.equal(out[:, :64], slow)
        assert_rounded(out[:, 64:, :, -LAST:], exact[:, 64:], "the lateral channels")


@modes
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_network(gpu_backend: str, training: bool, mode: str) -> None:
    dtype, allowed = MODES[mode]
    with tf32(allowed):
        network_testing.assert_as_exact_as_stock(
            lambda: network_testing.clips(batch=4, dtype=torch.float32), dtype, CUDA, training
        )


def test_network_of_the_paper() -> None:
    """SlowFast R50 8x8 at its full size, on the backends that auto picks, within TF32's rounding."""
    stock, fused = SlowFast(), slowfast_fast.create_slowfast(model_num_class=400)
    stock.load_state_dict(random_state(stock, seed=torch.initial_seed()))
    fused.load_state_dict(stock.state_dict())
    stock, fused = stock.to(CUDA).eval(), fused.to(CUDA).eval()
    x = [torch.randn(1, 3, frames, 224, 224, device=CUDA) for frames in (8, 32)]
    rows = slowfast_fast.explain(fused, x, show=False).rows
    ours = {row.backend for row in rows} - {"torch"}
    assert ours, "not one layer ran on an op of this package"
    assert ours <= {"cuda", "triton"}
    with torch.no_grad(), tf32(False):
        exact = stock.double()([clip.double() for clip in x])
        assert network_testing.distance(fused(list(x)).double(), exact) < 1e-3
