"""temporal_conv_bn and lateral_concat_bn: batch statistics, running statistics, folding, gradients."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import test_lateral_concat as lateral
import test_temporal_conv as temporal
import torch
from conftest import device_of
from op_arguments import RUNNING, Normal, without
from op_testing import (
    CHANNELS_LAST,
    LAYOUTS,
    Call,
    assert_as_exact_as_pytorch,
    assert_autocast,
    assert_checkpoint,
    assert_dense,
    assert_same_for_any_number_of_threads,
    dtypes,
)
from torch import Tensor, nn

from slowfast_fast import ops

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

Shape = temporal.Shape | lateral.Shape
# Statistics of few values are ill-conditioned, in PyTorch too: gradients are judged where there are twelve or more.
TEMPORAL = {name: shape for name, shape in temporal.SHAPES.items() if not name.startswith("t1")}
LATERAL = {name: shape for name, shape in lateral.SHAPES.items() if shape.t * shape.n * shape.h * shape.w >= 12}
SHAPES = {f"temporal-{name}": shape for name, shape in TEMPORAL.items()} | {
    f"lateral-{name}": shape for name, shape in LATERAL.items()
}
ONE_OF_EACH = {"temporal": temporal.Shape(), "lateral": lateral.Shape(t=4)}

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
both = pytest.mark.parametrize("shape", ONE_OF_EACH.values(), ids=ONE_OF_EACH)


def bn_call(shape: Shape, dtype: torch.dtype, *absent: str, training: bool = True, **options: Any) -> Call:
    """A training step of the BatchNorm form with every argument but those ``absent``."""
    module = temporal if isinstance(shape, temporal.Shape) else lateral
    call = module.random_call(shape, dtype)
    tensors = without(call.tensors, ("scale", "shift")) | Normal(dtype).norm(shape.k)
    tensors = without(tensors, absent)
    # gamma and beta have no default: absent means None.
    missing: dict[str, Any] = {name: None for name in ("gamma", "beta") if name in absent}
    options = call.options | {"training": training} | missing | options
    return Call(f"{call.op}_bn", tensors, options, tuple(without(tensors, RUNNING)), call.grad)


def function(shape: Shape) -> Any:
    return ops.temporal_conv_bn if isinstance(shape, temporal.Shape) else ops.lateral_concat_bn


@dtypes
@shapes
def test_training_step(compiled_backend: str, shape: Shape, dtype: torch.dtype) -> None:
    """Of one channel the norm takes most of the weight's gradient away, and what rounding leaves is now and then
    several times what it mostly is, in ours or in PyTorch's: the median of three decides."""
    trials = 3 if shape.c == 1 else 1
    assert_as_exact_as_pytorch(lambda: bn_call(shape, dtype), device=device_of(compiled_backend), trials=trials)


@dtypes
@both
def test_evaluation(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: bn_call(shape, dtype, training=False), device=device_of(backend))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "absent",
    [
        ("gamma",),
        ("beta",),
        ("gamma", "beta"),
        ("residual",),
        ("num_batches_tracked",),
        ("running_mean", "running_var"),
        (*RUNNING, "gamma", "beta", "residual"),
    ],
    ids=str,
)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@both
def test_optional_arguments(backend: str, shape: Shape, relu: bool, absent: tuple[str, ...], training: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_exact_as_pytorch(
            lambda dtype=dtype: bn_call(shape, dtype, *absent, training=training, relu=relu), device=device_of(backend)
        )


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@both
def test_layouts(backend: str, shape: Shape, layout: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(lambda: bn_call(shape, dtype), layout, device_of(backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@both
def test_vectors_in_half_precision(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    """As model.half() leaves them: gamma, beta and the running statistics in the dtype of the activations."""
    for training in (True, False):
        assert_as_exact_as_pytorch(
            lambda training=training: bn_call(shape, dtype, training=training).to(dtype), device=device_of(backend)
        )


@both
def test_values_far_from_zero(compiled_backend: str, shape: Shape) -> None:
    """A mean of a thousand standard deviations: E[x^2] - E[x]^2 would have nothing left in float32."""

    def make() -> Call:
        call = bn_call(replace(shape, h=20, w=20), torch.float32)
        source = "x" if "x" in call.tensors else "fast"
        call.tensors[source] = 0.01 * call.tensors[source] + 1
        call.tensors["weight"] = call.tensors["weight"].abs()
        return call

    # All weights being positive, a draw's error follows those of its sums over channels.
    assert_as_exact_as_pytorch(make, device=device_of(compiled_backend), fewest_draws=4)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
@both
def test_as_stock_modules(backend: str, shape: Shape, momentum: float | None, affine: bool, tracked: bool) -> None:
    """Three training steps and an evaluation beside nn.Conv3d and nn.BatchNorm3d, buffers included."""
    if device_of(backend) != "cpu":
        pytest.skip("float64 runs on the CPU")
    is_temporal = isinstance(shape, temporal.Shape)
    norm = nn.BatchNorm3d(shape.k, momentum=momentum, affine=affine, track_running_stats=tracked).double()
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.5, 1.5)
    ours = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    gamma, beta = (norm.weight, norm.bias) if affine else (None, None)
    for training in (True, True, True, False):
        norm.train(training)
        call = bn_call(shape, torch.float64)
        t = call.tensors
        out = function(shape)(
            **{name: t[name] for name in ("x", "slow", "fast", "weight", "residual") if name in t},
            **{"gamma": gamma, "beta": beta, **ours},
            **call.options | {"training": training, "momentum": momentum, "eps": norm.eps},
        )
        stride = shape.stride if is_temporal else shape.alpha
        conv = nn.functional.conv3d(
            t["x" if is_temporal else "fast"], t["weight"], stride=(stride, 1, 1), padding=(shape.kt // 2, 0, 0)
        )
        stock = norm(conv)
        stock = (stock + t["residual"]).relu() if is_temporal else torch.cat([t["slow"], stock.relu()], 1)
        torch.testing.assert_close(out, stock, rtol=1e-10, atol=1e-10)
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(ours[name], buffer, rtol=1e-12, atol=1e-12)


@both
def test_updates_in_place(backend: str, shape: Shape) -> None:
    """The very tensors given move, and evaluation leaves them alone."""
    call = bn_call(shape, torch.float32).to(device=device_of(backend))
    before = {name: call.tensors[name].clone() for name in call.updated}
    function(shape)(**call.tensors, **call.options | {"training": False})
    for name in call.updated:
        assert torch.equal(call.tensors[name], before[name]), name
    function(shape)(**call.tensors, **call.options)
    for name in call.updated:
        assert not torch.equal(call.tensors[name], before[name]), name
    assert call.tensors["num_batches_tracked"].item() == 4


@dtypes
@both
def test_output_and_gradients_keep_dtype_and_layout(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    call = bn_call(shape, dtype).to(device=device_of(backend))
    results = call.run()
    assert_dense(results["output"])
    assert results["output"].dtype == dtype
    for name in call.differentiable:
        assert results[f"grad of {name}"].dtype == call.tensors[name].dtype, name


@pytest.mark.filterwarnings("ignore:var_mean")  # PyTorch's own, for the reference backend
@both
def test_empty_batch(backend: str, shape: Shape) -> None:
    """As nn.BatchNorm3d: an empty batch is counted, and moves nothing."""
    call = bn_call(replace(shape, n=0), torch.float32).to(device=device_of(backend))
    results = call.run()
    assert results["output"].shape[0] == 0
    assert_dense(results["output"])
    assert results["num_batches_tracked"].item() == 4
    for name in ("running_mean", "running_var"):
        assert torch.equal(results[name], call.tensors[name])
    for name in ("weight", "gamma", "beta"):
        assert torch.equal(results[f"grad of {name}"], torch.zeros_like(results[f"grad of {name}"])), name


@both
def test_two_values_per_channel(compiled_backend: str, shape: Shape) -> None:
    """The fewest that have a variance: +-1 after normalisation, with a gradient of zero up to eps."""
    call = bn_call(replace(shape, n=2, t=1, h=1, w=1), torch.float32, "residual", relu=False, eps=1e-12)
    results = call.to(device=device_of(compiled_backend)).run()
    out = results["output"][:, -shape.k :].flatten(1).cpu()
    gamma, beta = call.tensors["gamma"], call.tensors["beta"]
    torch.testing.assert_close((out - beta).abs(), gamma.expand(2, -1), rtol=1e-4, atol=1e-4)
    assert all(torch.isfinite(result).all() for result in results.values())


@both
def test_gradcheck(backend: str, shape: Shape) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("float64 runs on the CPU")
    small = {"n": 2, "c": 2, "k": 3, "h": 2, "w": 2, "kt": 3} | (
        {"c_slow": 2, "alpha": 2, "t": 2} if shape.t == 4 else {}
    )
    small = {name: value for name, value in small.items() if hasattr(shape, name)}
    call = bn_call(replace(shape, **small), torch.float64).to(layout="channels_last")
    names = call.differentiable
    inputs = [call.tensors[name].clone().requires_grad_() for name in names]
    for training in (True, False):
        for relu in (False, True):

            def run(*tensors: Tensor, training: bool = training, relu: bool = relu) -> Tensor:
                buffers = {name: call.tensors[name].clone() for name in call.updated}
                arguments = dict(zip(names, tensors, strict=True)) | buffers
                return function(shape)(**arguments, **call.options | {"training": training, "relu": relu})

            torch.autograd.gradcheck(run, inputs)


@both
def test_double_backward_raises_by_name(compiled_backend: str, shape: Shape) -> None:
    call = bn_call(shape, torch.float32).to(device=device_of(compiled_backend))
    weight = call.tensors["weight"].requires_grad_()
    out = function(shape)(**call.tensors, **call.options)
    (gradient,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through temporal_conv_bn or lateral_concat_bn"):
        gradient.sum().backward()


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@both
def test_saved_for_backward(compiled_backend: str, shape: Shape, relu: bool) -> None:
    """The inputs, the raw convolution output, mean and inverse standard deviation; the residual for the mask alone."""
    call = bn_call(shape, torch.float32, relu=relu).to(layout="channels_last", device=device_of(compiled_backend))
    tensors = {name: t.requires_grad_() if name in call.differentiable else t for name, t in call.tensors.items()}
    inputs = {t.data_ptr() for t in tensors.values()}
    own: list[tuple[int, ...]] = []
    given: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() in inputs:
            given.add(tensor.data_ptr())
        else:
            own.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(shape)(**tensors, **call.options)
    raw = (out.shape[0], shape.k, *out.shape[2:])
    assert sorted(own) == sorted([raw, (shape.k,), (shape.k,)])
    if "residual" in tensors:
        assert (tensors["residual"].data_ptr() in given) == relu
    if "slow" in tensors:
        assert tensors["slow"].data_ptr() not in given


def test_training_step_between_evaluation_and_its_backward(compiled_backend: str) -> None:
    """Moving the running statistics does not change the gradient of an evaluation that came before."""
    call = bn_call(temporal.Shape(), torch.float32, training=False).to(device=device_of(compiled_backend))
    gamma = call.tensors["gamma"].requires_grad_()
    (expected,) = torch.autograd.grad(ops.temporal_conv_bn(**call.tensors, **call.options), gamma, call.grad)
    out = ops.temporal_conv_bn(**call.tensors, **call.options)
    with torch.no_grad():
        ops.temporal_conv_bn(**call.tensors, **call.options | {"training": True, "momentum": 1.0})
    (gradient,) = torch.autograd.grad(out, gamma, call.grad)
    assert torch.equal(gradient, expected)


@both
def test_same_bits_for_any_number_of_threads(compiled_backend: str, shape: Shape) -> None:
    call = bn_call(replace(shape, n=3, c=24, k=40, h=13, w=17), torch.float32)
    assert_same_for_any_number_of_threads(call.to(device=device_of(compiled_backend)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@both
def test_autocast(backend: str, shape: Shape, dtype: torch.dtype) -> None:
    assert_autocast(bn_call(shape, torch.float32), dtype, device_of(backend))


@pytest.mark.parametrize("use_reentrant", [False, True])
@both
def test_checkpoint(backend: str, shape: Shape, use_reentrant: bool) -> None:
    assert_checkpoint(bn_call(shape, torch.float32).to(device=device_of(backend)), use_reentrant)


def test_raw_output_and_statistics(compiled_backend: str) -> None:
    """The op under the public one: raw is the bare convolution, the statistics are those of raw."""
    for dtype in (torch.float32, torch.bfloat16):
        call = temporal.random_call(temporal.Shape(n=3, k=9, h=9, w=8), dtype).to(layout="channels_last")
        x, weight = (call.tensors[name].to(device_of(compiled_backend)) for name in ("x", "weight"))
        _, raw, mean, invstd, unbiased_var = torch.ops.slowfast_fast.temporal_conv_bn(
            x, weight, None, None, None, 1, 1, 1, 1e-5, False, False
        )
        assert torch.equal(raw, ops.temporal_conv(x, weight))
        assert_dense(raw)
        dims = (0, 2, 3, 4)
        exact = nn.functional.conv3d(x.double(), weight.double(), padding=(1, 0, 0))
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
        torch.testing.assert_close(mean.double(), exact.mean(dims), **tolerance)
        torch.testing.assert_close(unbiased_var.double(), exact.var(dims), **tolerance)
        torch.testing.assert_close(invstd.double(), (exact.var(dims, correction=0) + 1e-5).rsqrt(), **tolerance)


def _arguments(**changes: Any) -> dict[str, Any]:
    call = bn_call(temporal.Shape(), torch.float32)
    return call.tensors | call.options | changes


WRONG = [
    (ValueError, {"gamma": torch.zeros(5)}, "gamma must be (6,), one value per output channel; got (5,)"),
    (TypeError, {"beta": torch.zeros(6).half()}, "beta must be float32 or of the dtype of weight, torch.float32; got"),
    (
        ValueError,
        {"running_mean": None},
        "running_mean and running_var must be given together; got None for running_mean",
    ),
    (
        ValueError,
        {"running_var": None},
        "running_mean and running_var must be given together; got None for running_var",
    ),
    (
        ValueError,
        {"running_var": torch.zeros(6, 1)},
        "running_var must be (6,), one value per output channel; got (6, 1)",
    ),
    (
        ValueError,
        {"running_mean": torch.zeros(12)[::2]},
        "running_mean and running_var are updated in place and must be",
    ),
    (
        ValueError,
        {"num_batches_tracked": torch.tensor(0.0)},
        "num_batches_tracked must be one int64 on cpu; got torch.float32",
    ),
    (TypeError, {"num_batches_tracked": 3}, "num_batches_tracked must be a torch.Tensor or None; got int"),
    (
        ValueError,
        {"num_batches_tracked": None, "momentum": None},
        "momentum None is a cumulative average and needs num_",
    ),
    (ValueError, {"eps": 0.0}, "eps must be positive for batch statistics; got 0.0"),
    (ValueError, {"eps": -1.0, "training": False}, "eps must not be negative; got -1.0"),
    (TypeError, {"training": 1}, "training must be True or False; got int 1"),
    (TypeError, {"momentum": "0.1"}, "momentum must be a number or None; got str"),
]


@pytest.mark.parametrize(("error", "changes", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.temporal_conv_bn(**_arguments(**changes))


@both
def test_one_value_per_channel_raises_as_stock(shape: Shape) -> None:
    call = bn_call(replace(shape, n=1, t=1, h=1, w=1), torch.float32, "residual")
    message = f"Expected more than 1 value per channel when training, got input size (1, {shape.k}, 1, 1, 1)"
    with pytest.raises(ValueError, match=re.escape(message)):
        function(shape)(**call.tensors, **call.options)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        nn.BatchNorm3d(shape.k)(torch.zeros(1, shape.k, 1, 1, 1).contiguous(memory_format=CHANNELS_LAST))
