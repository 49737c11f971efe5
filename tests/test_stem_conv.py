"""stem_conv: the convolution of a stem and its gradients, on the backends that have it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_arguments import Draw, Integers, Normal
from op_testing import (
    LAYOUTS,
    Call,
    assert_as_exact_as_pytorch,
    assert_autocast,
    assert_checkpoint,
    assert_dense,
    assert_exact,
    assert_same_for_any_number_of_threads,
    dtypes,
)
from torch import nn

import slowfast_fast
from slowfast_fast import ops
from slowfast_fast.nn.pooled import conv_norm_act_pool

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

# (N, C, T, H, W), K, kernel, stride, padding
CASES = {
    "fast": ((2, 3, 5, 15, 13), 8, (5, 7, 7), (1, 2, 2), (2, 3, 3)),
    "slow": ((1, 3, 2, 18, 30), 64, (1, 7, 7), (1, 2, 2), (0, 3, 3)),
    "strided in T": ((1, 3, 9, 8, 11), 24, (3, 5, 3), (2, 1, 3), (1, 2, 0)),
    "grey, frames between windows": ((2, 1, 7, 9, 6), 5, (2, 3, 3), (3, 2, 1), (0, 0, 2)),
    "many taps, more padding than clip": ((1, 2, 3, 10, 3), 17, (9, 9, 1), (1, 1, 1), (4, 4, 5)),
    "five channels": ((1, 5, 3, 7, 8), 9, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with slowfast_fast.backend(request.param):
        yield request.param


def call_of(case: tuple, draw: Draw, shift: bool = True, relu: bool = True) -> Call:
    shape, k, kernel, stride, padding = case
    tensors = {"x": draw(*shape), "weight": draw.weight(k, shape[1], *kernel)}
    if shift:
        tensors["shift"] = draw.shift(k)
    out = [(i + 2 * p - w) // s + 1 for i, w, s, p in zip(shape[2:], kernel, stride, padding, strict=True)]
    options: dict[str, Any] = {"stride": stride, "padding": padding, "relu": relu}
    return Call("stem_conv", tensors, options, tuple(tensors), draw(shape[0], k, *out))


def random_call(case: tuple, dtype: torch.dtype, **options: bool) -> Call:
    return call_of(case, Normal(dtype), **options)


@dtypes
@cases
def test_as_exact_as_pytorch(backend: str, case: tuple, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: random_call(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    make = lambda: random_call(CASES["fast"], dtype, shift=False, relu=False)  # noqa: E731
    assert_as_exact_as_pytorch(make, layout)


def test_each_product_meets_its_place() -> None:
    """Small integers: every sum is exact, and so is every value of every result, in a frame of many bands too."""
    for case in (*CASES.values(), ((1, 3, 2, 130, 41), 8, (1, 7, 7), (1, 2, 2), (0, 3, 3))):
        assert_exact(call_of(case, Integers(torch.float32)), "contiguous")


def test_nan_and_infinity() -> None:
    call = random_call(CASES["fast"], torch.float32)
    call.tensors["x"][1, 2, 1, 4, 4], call.tensors["x"][0, 0, 0, 0, 0] = math.nan, math.inf
    results, stock = call.run(), call.run_stock()
    for name in results:
        assert torch.equal(results[name].isfinite(), stock[name].isfinite()), name


def test_empty_batch(backend: str) -> None:
    call = random_call(((0, 3, 4, 9, 9), *CASES["fast"][1:]), torch.float32)
    results = call.run()
    assert results["output"].shape == (0, 8, 4, 5, 5)
    assert results["grad of weight"].abs().max() == results["grad of shift"].abs().max() == 0


def test_layouts_of_results() -> None:
    """Rows whatever x is; the gradient of a weight lies as the weight does, so that nobody copies it."""
    call = random_call(CASES["fast"], torch.bfloat16).to(layout="contiguous")
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        weight = call.tensors["weight"].contiguous(memory_format=layout).requires_grad_()
        y = ops.stem_conv(call.tensors["x"], weight, stride=(1, 2, 2), padding=(2, 3, 3))
        assert_dense(y)
        (gradient,) = torch.autograd.grad(y, weight, call.grad)
        assert gradient.stride() == weight.stride()


def test_gradcheck_and_double_backward() -> None:
    call = random_call(((1, 2, 3, 5, 4), 3, (3, 3, 3), (1, 2, 2), (1, 1, 1)), torch.float64, relu=False)
    inputs = [tensor.requires_grad_() for tensor in call.tensors.values()]
    assert torch.autograd.gradcheck(lambda *t: ops.stem_conv(*t, **call.options), inputs)
    (gradient,) = torch.autograd.grad(ops.stem_conv(*inputs, **call.options).square().sum(), inputs[1], create_graph=1)
    with pytest.raises(RuntimeError, match="double backward through stem_conv is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    assert_autocast(random_call(CASES["fast"], torch.float32), dtype, "cpu")


def test_checkpoint(backend: str) -> None:
    assert_checkpoint(random_call(CASES["fast"], torch.float32), use_reentrant=False)


def test_same_bits_for_any_number_of_threads() -> None:
    call = random_call(((3, 3, 4, 40, 41), *CASES["fast"][1:]), torch.float32)
    assert_same_for_any_number_of_threads(call)


def test_opcheck() -> None:
    call = random_call(CASES["fast"], torch.float32)
    x, weight, shift = (call.tensors[name].requires_grad_() for name in call.differentiable)
    geometry = ([1, 2, 2], [2, 3, 3])
    torch.library.opcheck(torch.ops.slowfast_fast.stem_conv.default, (x, weight, shift, *geometry, True))
    grad = call.grad.contiguous(memory_format=torch.channels_last_3d)
    arguments = (grad, x.detach(), weight.detach(), *geometry)
    torch.library.opcheck(torch.ops.slowfast_fast.stem_conv_wgrad.default, arguments)


@pytest.mark.no_sanitizer
def test_a_stem_in_a_graph() -> None:
    """The layer that stems call: one graph, the module's gradients."""
    stem = (nn.Conv3d(3, 8, (5, 7, 7), (1, 2, 2), (2, 3, 3)), nn.BatchNorm3d(8), nn.ReLU())
    pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
    x = torch.randn(2, 3, 4, 16, 16)
    weight = stem[0].weight
    layer = torch.compile(lambda x: conv_norm_act_pool(x, *stem, pool), fullgraph=True, backend="aot_eager")
    (compiled,) = torch.autograd.grad(layer(x).square().sum(), weight)
    (eager,) = torch.autograd.grad(conv_norm_act_pool(x, *stem, pool).square().sum(), weight)
    (stock,) = torch.autograd.grad(pool(nn.Sequential(*stem)(x)).square().sum(), weight)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(eager, stock, rtol=1e-3, atol=1e-3 * stock.abs().max().item())


@pytest.mark.parametrize(
    ("channels", "options", "ran"),
    [
        (3, {}, ["stem_conv", "batch_norm_max_pool"]),
        (5, {}, ["batch_norm_max_pool"]),
        (3, {"dilation": (1, 2, 2)}, ["batch_norm_max_pool"]),
        (3, {"padding": "valid"}, ["batch_norm_max_pool"]),
        (3, {"padding_mode": "circular"}, ["batch_norm_max_pool"]),
    ],
    ids=str,
)
def test_which_stems_take_it(channels: int, options: dict, ran: list[str]) -> None:
    arguments: dict[str, Any] = {"padding": (1, 3, 3)} | options
    conv = nn.Conv3d(channels, 8, (3, 7, 7), **arguments)
    stem = slowfast_fast.nn.stem.ResNetBasicStem(
        conv=conv, norm=nn.BatchNorm3d(8), activation=nn.ReLU(), pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
    )
    rows = slowfast_fast.explain(stem, torch.randn(1, channels, 4, 20, 20), show=False).rows
    assert [row.what for row in rows if row.backend == "cpu"] == ran
    assert ("convolution by PyTorch" in rows[-1].reason) == (len(ran) == 1)


WRONG = [
    (TypeError, {"x": torch.zeros(1, 3, 4, 8, 8, dtype=torch.int32)}, "x must be float32, float16, bfloat16 or"),
    (TypeError, {"weight": torch.zeros(8, 3, 3, 3, 3).half()}, "weight must have the dtype of x, torch.float32; got"),
    (ValueError, {"weight": torch.zeros(8, 2, 3, 3, 3)}, "weight must be (K, 3, kt, kh, kw), K convolutions in T, H"),
    (ValueError, {"weight": torch.zeros(8, 3, 3, 3, 13)}, "x is too small: W = 8 with padding 1 has no window of 13"),
    (ValueError, {"shift": torch.zeros(3)}, "shift must be (8,), one value per output channel; got (3,)"),
    (TypeError, {"stride": 2}, "stride must be three ints, for T, H and W; got 2"),
    (ValueError, {"stride": (1, 0, 1)}, "stride[1] must be at least 1; got 0"),
    (TypeError, {"padding": (1, 1, 1.0)}, "padding[2] must be an int"),
    (TypeError, {"relu": 1}, "relu must be True or False; got int 1"),
]


@pytest.mark.parametrize(("error", "wrong", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments(error: type[Exception], wrong: dict[str, Any], message: str) -> None:
    right = {"x": torch.zeros(1, 3, 4, 8, 8), "weight": torch.zeros(8, 3, 3, 3, 3)}
    with pytest.raises(error, match=re.escape(message)):
        ops.stem_conv(**right | {"stride": (1, 1, 1), "padding": (1, 1, 1)} | wrong)
