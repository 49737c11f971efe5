"""temporal_conv_lateral_concat and max_pool_lateral_concat: both parts of a wide tensor, each where it belongs; and the
packed weights of temporal_conv."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_host.build import Harness
from op_arguments import Draw, Integers, Normal, accumulation
from op_testing import (
    ROWS,
    Call,
    assert_as_exact_as_pytorch,
    assert_dense,
    assert_exact,
    dtypes,
    lay_out,
)
from torch import Tensor

from slowfast_fast import ops, reference


def tensors(draw: Draw, n: int, c: int, k: int, taps: int) -> dict[str, Tensor]:
    return {
        "x": draw(n, c, 3, 5, 4),
        "weight": draw.weight(k, c, taps, 1, 1),
        "shift": draw.shift(k),
        "residual": draw(n, k, 3, 5, 4),
        "fast": draw(n, 6, 12, 5, 4),
        "lateral_weight": draw.weight(9, 6, 7, 1, 1),
        "lateral_shift": draw.shift(9),
    }


def conv_call(draw: Draw) -> Call:
    taps = int(torch.randint(0, 2, ())) * 2 + 1
    return Call("temporal_conv_lateral_concat", tensors(draw, 2, 20, 33, taps), {"alpha": 4, "relu": True})


def pool_call(draw: Draw) -> Call:
    given = {name: t for name, t in tensors(draw, 2, 20, 33, 1).items() if "lateral" in name or name == "fast"}
    options = {"alpha": 4, "kernel": 3, "stride": 2, "padding": 1}
    return Call("max_pool_lateral_concat", {"x": draw(2, 21, 3, 10, 7), **given}, options)


calls = pytest.mark.parametrize("make", [conv_call, pool_call], ids=["conv", "pool"])


@calls
@dtypes
@pytest.mark.parametrize("layout", [*ROWS, "contiguous"])
def test_as_exact_as_pytorch(poisoned: None, make: Any, dtype: torch.dtype, layout: str) -> None:
    assert_as_exact_as_pytorch(lambda: make(Normal(dtype)), layout)


@calls
@dtypes
def test_exact(poisoned: None, make: Any, dtype: torch.dtype) -> None:
    call = make(Integers(dtype))
    assert_exact(call)
    assert_dense(call.run()["output"])


@pytest.mark.gpu
@calls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_on_a_gpu(make: Any, dtype: torch.dtype) -> None:
    assert_exact(make(Integers(dtype)), device="cuda")


@dtypes
@pytest.mark.parametrize("channels", [(20, 33), (16, 32)], ids=["odd", "aligned"])
def test_cuda_kernels_on_the_host(host: Harness, dtype: torch.dtype, channels: tuple[int, int]) -> None:
    """Exact integers: the two parts, each as its own op gives it."""
    c, k = channels
    t = {
        name: lay_out(v, "channels_last") if v.dim() == 5 and "weight" not in name else v
        for name, v in tensors(Integers(dtype), 2, c, k, 3).items()
    }
    shifts = [t[name].to(accumulation(dtype)) for name in ("shift", "lateral_shift")]
    lateral = (t["fast"], t["lateral_weight"], shifts[1], 4, 3, True, False)
    out = host.temporal_conv_lateral_concat(t["x"], t["weight"], shifts[0], t["residual"], 1, 1, 1, True, *lateral)
    assert torch.equal(out, reference.temporal_conv_lateral_concat(**t, alpha=4))
    x = lay_out(torch.randn(2, c, 3, 10, 7).to(dtype), "channels_last")
    names = ("fast", "lateral_weight", "lateral_shift")
    expected = reference.max_pool_lateral_concat(x, *(t[n] for n in names), kernel=3, stride=2, padding=1, alpha=4)
    assert torch.equal(host.max_pool_lateral_concat(x, 3, 2, 1, *lateral), expected)


@calls
def test_opcheck(make: Any) -> None:
    """The fake kernels' strides are those of the kernels."""
    call = make(Normal(torch.float32)).to(layout="channels_last")
    t = call.tensors
    lateral = (t["fast"], t["lateral_weight"], t["lateral_shift"], 4, 3, True, False)
    if make is conv_call:
        padding = t["weight"].shape[2] // 2
        arguments = (t["x"], t["weight"], t["shift"], t["residual"], 1, padding, 1, True, *lateral)
    else:
        arguments = (t["x"], 3, 2, 1, *lateral)
    torch.library.opcheck(getattr(torch.ops.slowfast_fast, call.op).default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fast": torch.randn(2, 6, 8, 5, 4)}, ValueError, "slow has T = 3 and fast T = 8"),
        ({"fast": torch.randn(2, 6, 12, 5, 5)}, ValueError, "must agree in N, H and W"),
        ({"fast": torch.randn(2, 6, 12, 5, 4).double()}, TypeError, "fast must have the dtype of x"),
        ({"lateral_shift": torch.randn(8)}, ValueError, r"lateral_shift must be \(9,\)"),
        ({"residual": torch.randn(2, 33, 3, 5, 5)}, ValueError, "residual must have the shape of the output"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    call = conv_call(Normal(torch.float32))
    with pytest.raises(error, match=message):
        ops.temporal_conv_lateral_concat(**{**call.tensors, **change}, alpha=4)


# temporal_conv with a weight that was packed before


@dtypes
@pytest.mark.parametrize("frames", [1, 6])
@pytest.mark.parametrize("shape", [(8, 8, 3), (64, 40, 3), (40, 70, 5), (30, 20, 1)], ids=str)
def test_packed_weights(poisoned: None, shape: tuple[int, int, int], frames: int, dtype: torch.dtype) -> None:
    """The same bits as from the call that packs for itself."""
    c, k, taps = shape
    x = lay_out(torch.randn(2, c, frames, 4, 3).to(dtype), "channels_last")
    weight = torch.randn(k, c, taps, 1, 1).to(dtype)
    geometry = (1, taps // 2, 1)
    library = torch.ops.slowfast_fast
    packed = library.temporal_conv_pack(x, weight, *geometry, False)
    got = library.temporal_conv_packed(x, weight, packed, None, None, None, *geometry, True, False)
    assert torch.equal(got, ops.temporal_conv(x, weight, relu=True))
    with pytest.raises(RuntimeError, match=r"packed must be .* bytes from temporal_conv_pack"):
        library.temporal_conv_packed(x, weight, packed[1:].clone(), None, None, None, *geometry, True, False)


@dtypes
def test_packed_weights_in_cuda_kernels(host: Harness, dtype: torch.dtype) -> None:
    x = lay_out(Integers(dtype)(2, 160, 4, 3, 3), "channels_last")
    weight = Integers(dtype)(72, 160, 3, 1, 1)
    packed = host.temporal_conv_pack(x, weight, 1, 1, 1, False)
    arguments = (None, None, None, 1, 1, 1, True, False)
    launched = host.kernels(lambda: host.temporal_conv_packed(x, weight, packed, *arguments))
    assert "pack_weight" not in launched
    got = host.temporal_conv_packed(x, weight, packed, *arguments)
    assert torch.equal(got, host.temporal_conv(x, weight, *arguments))
