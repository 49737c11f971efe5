"""The Triton backend under Triton's interpreter, judged as every backend is (op_testing.py). test_triton.py runs this
file in processes with TRITON_INTERPRET=1; pytest does not collect it by itself.

A tile takes the interpreter milliseconds, so shapes are small, and most have 64 output channels or more, for one draw
to give every gradient enough values to judge.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import test_batch_norm as bn
import test_frames_concat as moving
import test_lateral_concat as lateral
import test_pack_pathways as pathways
import test_temporal_conv as temporal
import torch
import triton_interpreter  # noqa: F401
from op_testing import ROWS, Call, assert_as_exact_as_pytorch, assert_dense, assert_exact

import slowfast_fast
from slowfast_fast.triton import _convolution, _gradients, frames_concat

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread", "triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

TEMPORAL = {
    "odd": temporal.Shape(c=5, k=67, w=5),
    "pointwise": temporal.Shape(c=24, k=64, kt=1, h=5),
    "kt5": temporal.Shape(c=8, k=64, t=9, kt=5),
    "t2_kt7_stride3": temporal.Shape(c=3, k=65, t=2, kt=7, stride=3, h=7),
    "stride4_kt7": temporal.Shape(c=16, k=64, t=17, kt=7, stride=4),
    "dilation3_stride2": temporal.Shape(c=4, k=64, t=12, kt=5, dilation=3, stride=2),
}
LATERAL = {
    "alpha4_kt7": lateral.Shape(c_slow=64, c=8, k=64, kt=7, h=4, w=5, t=3),
    "alpha8_kt5": lateral.Shape(c_slow=9, c=5, k=67, kt=5, alpha=8, t=3, surplus=7),
}
# The shapes of the op tests that are quick: kernels, strides, short clips, odd sizes. Each runs in one dtype.
QUICK = [name for name in temporal.SHAPES if not name.endswith("129") and name not in ("c64_k80", "c256_k64", "long")]
QUICK_LATERAL = [*lateral.KERNELS, *lateral.GEOMETRY]


@pytest.fixture
def triton() -> Iterator[None]:
    with slowfast_fast.backend("triton"):
        yield


@dtypes
@pytest.mark.parametrize("shape", [*TEMPORAL.values(), *LATERAL.values()], ids=[*TEMPORAL, *LATERAL])
def test_random_values(shape: bn.Shape, dtype: torch.dtype) -> None:
    module = temporal if isinstance(shape, temporal.Shape) else lateral
    assert_as_exact_as_pytorch(lambda: module.random_call(shape, dtype))


@dtypes
@pytest.mark.parametrize("name", ["odd", "pointwise", "stride4_kt7", "alpha4_kt7", "alpha8_kt5"])
def test_training_step(name: str, dtype: torch.dtype) -> None:
    shape: bn.Shape = (TEMPORAL | LATERAL)[name]
    assert_as_exact_as_pytorch(lambda: bn.bn_call(shape, dtype))


@dtypes
@pytest.mark.parametrize("absent", [(), ("gamma",), ("beta",)], ids=str)
@pytest.mark.parametrize("name", ["odd", "alpha8_kt5"])
def test_evaluation_without_gradients(name: str, absent: tuple[str, ...], dtype: torch.dtype) -> None:
    shape: bn.Shape = (TEMPORAL | LATERAL)[name]
    assert_as_exact_as_pytorch(lambda: replace(bn.bn_call(shape, dtype, *absent, training=False), differentiable=()))


@pytest.mark.parametrize(("name", "dtype"), list(zip(QUICK, itertools.cycle(DTYPES), strict=False)), ids=str)
def test_temporal_integers_are_exact(name: str, dtype: torch.dtype) -> None:
    assert_exact(temporal.integer_call(temporal.SHAPES[name], dtype))


@pytest.mark.parametrize(("name", "dtype"), list(zip(QUICK_LATERAL, itertools.cycle(DTYPES), strict=False)), ids=str)
def test_lateral_integers_are_exact(name: str, dtype: torch.dtype) -> None:
    assert_exact(lateral.integer_call(lateral.SHAPES[name], dtype))


@pytest.mark.parametrize("layout", ROWS)
def test_rows_are_read_in_place(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert kwargs.get("memory_format") is None, "copied"
        return contiguous(tensor, *args, **kwargs)

    contiguous = torch.Tensor.contiguous
    calls = [temporal.integer_call(temporal.Shape(c=16, k=24, h=4, w=6), torch.bfloat16)]
    calls.append(lateral.integer_call(lateral.Shape(c_slow=16, c=8, k=16, h=3, w=4), torch.bfloat16))
    calls.append(moving.moving_call(torch.bfloat16))
    for call in calls:
        exact = call.run_exact()
        call = call.to(layout=layout)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "contiguous", refuse)
            results = call.run()
        for name, result in results.items():
            assert torch.equal(result, exact[name].to(result.dtype)), name
        assert_dense(results["output"])


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize(
    "absent", [a for r in range(4) for a in itertools.combinations(("scale", "shift", "residual"), r)], ids=str
)
def test_optional_arguments(absent: tuple[str, ...], relu: bool) -> None:
    assert_exact(temporal.integer_call(temporal.Shape(), torch.float16, *absent, relu=relu))


@pytest.mark.parametrize(
    "absent",
    [("gamma",), ("beta",), ("residual",), ("num_batches_tracked",), ("gamma", "beta", "residual")],
    ids=str,
)
def test_optional_arguments_of_a_training_step(absent: tuple[str, ...]) -> None:
    for relu, momentum in ((False, 0.1), (True, 0.1 if "num_batches_tracked" in absent else None)):
        assert_as_exact_as_pytorch(
            lambda relu=relu, momentum=momentum: bn.bn_call(
                TEMPORAL["odd"], torch.bfloat16, *absent, relu=relu, momentum=momentum
            )
        )


@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("scale",), ("shift",), ("residual",), ("weight", "shift")], ids=str
)
def test_some_gradients_only(wanted: tuple[str, ...]) -> None:
    call = temporal.integer_call(temporal.Shape(), torch.float32)
    assert_exact(replace(call, differentiable=wanted))
    names = {"scale": "gamma", "shift": "beta"}
    step = bn.bn_call(TEMPORAL["kt5"], torch.float32)
    assert_as_exact_as_pytorch(lambda: replace(step, differentiable=tuple(names.get(name, name) for name in wanted)))


@dtypes
def test_empty_batch(dtype: torch.dtype) -> None:
    calls = [temporal.random_call(temporal.Shape(n=0), dtype), bn.bn_call(temporal.Shape(n=0), dtype)]
    calls += [lateral.random_call(lateral.Shape(n=0), dtype), bn.bn_call(lateral.Shape(n=0), dtype)]
    empty = moving.moving_call(dtype)
    calls.append(replace(empty, tensors={k: v[:0] for k, v in empty.tensors.items()}, grad=empty.grad[:0]))
    for call in calls:
        results = call.run()
        assert results["output"].shape[0] == 0
        assert_dense(results["output"])
        for name in call.differentiable:
            gradient = results[f"grad of {name}"]
            assert torch.equal(gradient, torch.zeros_like(call.tensors[name])), name


def _configurations(call: Call, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Every configuration of every list that ``call`` chooses from, one list entry after the other."""
    tried = set()
    for index in itertools.count():
        lists = []

        def choose(key: str, candidates: Any, *rest: Any, index: int = index, lists: list[Any] = lists) -> Any:
            lists.append(candidates)
            return candidates[min(index, len(candidates) - 1)], True

        monkeypatch.setattr(_convolution, "choose", choose)
        _convolution._plans.clear()
        results = call.run()
        assert lists, "no configuration was asked for"
        tried.update(config for candidates in lists for config in candidates[: index + 1])
        yield results
        if index + 1 >= max(map(len, lists)):
            break
    _convolution._plans.clear()
    assert len(tried) > 4


@pytest.mark.parametrize(
    "shape",
    [
        temporal.Shape(c=8, k=16, t=6, h=5, w=7),
        temporal.Shape(n=1, c=256, k=128, t=3, h=3, w=3, kt=5),  # wide, and deep for so few rows: split
    ],
    ids=["narrow", "wide"],
)
def test_every_configuration_gives_the_same(shape: temporal.Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    call = temporal.integer_call(shape, torch.float16).to(layout="channels_last")
    exact = call.run_exact()
    for results in _configurations(call, monkeypatch):
        for name, result in results.items():
            assert torch.equal(result, exact[name].to(result.dtype)), name


def test_statistics_of_a_split_convolution() -> None:
    shape = temporal.Shape(n=1, c=256, k=128, t=3, h=3, w=3, kt=5)
    assert_as_exact_as_pytorch(lambda: bn.bn_call(shape, torch.float16))


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_convolution, _gradients):
        monkeypatch.setattr(module, "passes_int32", lambda *tensors: True)
    _convolution._plans.clear()
    assert_exact(temporal.integer_call(temporal.Shape(stride=2, t=7), torch.float32))
    assert_exact(temporal.integer_call(temporal.Shape(c=32, k=8, t=8, h=5, w=7), torch.float16))
    assert_as_exact_as_pytorch(lambda: bn.bn_call(LATERAL["alpha8_kt5"], torch.float32))
    _convolution._plans.clear()


def test_same_bits_from_call_to_call() -> None:
    call = bn.bn_call(TEMPORAL["stride4_kt7"], torch.float32).to(layout="channels_last")
    first, second = call.run(), call.run()
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_running_statistics_in_their_own_dtype(dtype: torch.dtype, momentum: float | None) -> None:
    call = bn.bn_call(TEMPORAL["odd"], dtype, momentum=momentum)
    for name in ("running_mean", "running_var"):
        call.tensors[name] = call.tensors[name].to(dtype)
    assert_as_exact_as_pytorch(lambda: call)


@pytest.mark.parametrize(("layout", "dtype"), list(zip(("dense", "padded", "crop"), DTYPES, strict=True)), ids=str)
def test_decoded_frames(layout: str, dtype: torch.dtype) -> None:
    for shape, alpha in (*pathways.CASES, ((1, 4, 11, 37), 2)):  # the last one: more than a block a frame
        frames = pathways.lay_out(pathways.decoded(shape), layout)
        packed = slowfast_fast.pack_pathways(frames, alpha=alpha, dtype=dtype, **pathways.COLOURS)
        pathways.assert_packed(packed, frames, alpha, dtype)
        (clip,) = slowfast_fast.pack_pathways(frames, alpha=None, dtype=dtype, **pathways.COLOURS)
        assert torch.equal(clip, packed[1])


@dtypes
@pytest.mark.parametrize("layout", [*ROWS, "contiguous"])
def test_frames_as_channels(layout: str, dtype: torch.dtype) -> None:
    assert_exact(moving.moving_call(dtype), layout)


def frames_call(c_slow: int, c: int, t: int, t_fast: int, alpha: int, taps: int, size: int = 3) -> Call:
    """One clip, of the dtype that the shape falls on."""
    slow, fast = torch.randn(1, c_slow, t, size, size), torch.randn(1, c, t_fast, size, size)
    grad = torch.randn(1, c_slow + taps * c, t, size, size)
    call = Call("frames_concat", {"slow": slow, "fast": fast}, {"alpha": alpha, "taps": taps}, ("slow", "fast"), grad)
    return call.to(DTYPES[c % 3], "channels_last")


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (64, 8, 2, 16, 8, 8),
        (16, 32, 2, 17, 8, 8),  # 256 channels of fast in one tile, one frame too many
        (3, 35, 2, 15, 8, 7),  # 245 of them, which no tile divides
        (8, 72, 1, 7, 4, 4, 2),  # two tiles of channels, and frames of fast that begin another group
        (5, 16, 1, 7, 8, 3),  # fewer frames than alpha
    ],
)
def test_shapes_of_frames(shape: tuple[int, ...]) -> None:
    call = frames_call(*shape)
    assert_exact(call)
    assert_dense(call.run()["output"])
    for name in ("slow", "fast"):
        alone = replace(call, differentiable=(name,)).run()
        assert torch.equal(alone[f"grad of {name}"], call.run_stock()[f"grad of {name}"])


@dtypes
def test_one_frame_for_several(dtype: torch.dtype) -> None:
    moving.test_one_frame_for_several("cpu", dtype)


def test_frames_with_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_convolution, frames_concat):
        monkeypatch.setattr(module, "passes_int32", lambda *tensors: True)
    _convolution._plans.clear()
    assert_exact(frames_call(5, 6, 3, 14, 4, 3))
    _convolution._plans.clear()


OPS = torch.ops.slowfast_fast_triton


def _arguments(op: str) -> tuple[Any, ...]:
    """Of a call of the op itself: small, with every optional argument."""
    n, c, k, t, h, w, kt = 2, 3, 4, 4, 2, 3, 3

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)

    x, weight, out = rows(n, c, t, h, w), torch.randn(k, c, kt, 1, 1), rows(n, k, t, h, w)
    first, second, positive = torch.randn(k), torch.randn(k), torch.rand(k) + 0.5
    geometry, wanted = (1, 1, 1), (True,) * 5
    fast, slow = rows(n, c, 8, h, w), rows(n, 5, t, h, w)
    return {
        "temporal_conv": (x, weight, first, second, out, *geometry, True, False),
        "temporal_conv_backward": (out, x, weight, first, rows(n, k, t, h, w), *geometry, *wanted, False),
        "temporal_conv_bn": (x, weight, first, second, out, *geometry, 1e-5, True, False),
        "temporal_conv_bn_backward": (
            *(out, x, weight, first, second, rows(n, k, t, h, w), rows(n, k, t, h, w), first, positive),
            *(*geometry, True, *wanted, False),
        ),
        "lateral_concat": (slow, fast, weight, first, second, 2, 1, True, False),
        "lateral_concat_bn": (slow, fast, weight, first, second, 2, 1, 1e-5, True, False),
        "temporal_conv_bn_frozen": (x, weight, first, second, first, positive, out, *geometry, 1e-5, True, False),
        "lateral_concat_bn_frozen": (slow, fast, weight, first, second, first, positive, 2, 1, 1e-5, True, False),
        "update_running_stats": (first, positive, torch.tensor(3), second, positive.clone(), 0.1),
        "frames_concat": (slow, fast, 2, 2),
        "frames_concat_backward": (rows(n, 4, t, h, w), 9, 2, 2),
        "pack_pathways": (pathways.decoded((2, 4, 3, 5)), [0, 2, 2], [0.01] * 3, [-2.0] * 3, torch.float16),
    }[op]


@pytest.mark.parametrize(
    "op",
    [
        *("temporal_conv", "temporal_conv_backward", "temporal_conv_bn", "temporal_conv_bn_backward"),
        *("lateral_concat", "lateral_concat_bn", "update_running_stats"),
        *("temporal_conv_bn_frozen", "lateral_concat_bn_frozen", "pack_pathways"),
        *("frames_concat", "frames_concat_backward"),
    ],
)
def test_opcheck(op: str) -> None:
    """Schema, fake kernel and gradient registration fit what the op does."""
    torch.library.opcheck(getattr(OPS, op).default, _arguments(op))


def test_arguments_that_are_no_rows_are_refused() -> None:
    x, weight, *rest = _arguments("temporal_conv")
    cases = [
        ((x.contiguous(), weight), "x must be rows of channels"),
        ((x, weight.half()), "weight must have the dtype"),
        ((x, weight[:, :2].contiguous()), "weight must be a contiguous"),
        ((x.double(), weight.double()), "x must be float32, float16 or bfloat16"),
    ]
    for (x, weight), message in cases:
        with pytest.raises(ValueError, match=message):
            OPS.temporal_conv(x, weight, *rest)
    x, weight, scale, shift, residual, *rest = _arguments("temporal_conv")
    with pytest.raises(ValueError, match="residual must have shape"):
        OPS.temporal_conv(x, weight, scale, shift, residual[:, :, :2], *rest)
    with pytest.raises(ValueError, match="scale must be 4 contiguous float32"):
        OPS.temporal_conv(x, weight, scale[:3], shift, residual, *rest)
    slow, *rest = _arguments("lateral_concat")
    with pytest.raises(ValueError, match="slow must have shape"):
        OPS.lateral_concat(slow[:, :, :3], *rest)
    slow, fast, *rest = _arguments("frames_concat")
    with pytest.raises(ValueError, match="slow must have shape"):
        OPS.frames_concat(slow[:, :, :, :1], fast, *rest)
    with pytest.raises(ValueError, match="6 fast frames give 3 of the slow pathway, which has 4"):
        OPS.frames_concat(slow, fast[:, :, :6], *rest)
    with pytest.raises(ValueError, match="9 fast frames give 4 of the slow pathway, which has 3"):
        OPS.frames_concat_backward(slow[:, 1:, :3], 9, 2, 2)


def test_compiles_as_one_graph() -> None:
    call = bn.bn_call(temporal.Shape(), torch.float32).to(layout="channels_last")
    compiled = torch.compile(getattr(slowfast_fast.ops, call.op), backend="aot_eager", fullgraph=True)
    eager, graph = call.run(), call.run(compiled)
    for name, result in eager.items():
        assert torch.equal(result, graph[name]), name
