"""bottleneck_bn against PyTorch's own operators: values, gradients, what it keeps, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_testing import (
    DTYPES,
    LAYOUTS,
    Call,
    assert_as_exact_as_pytorch,
    assert_checkpoint,
    assert_dense,
    assert_same_for_any_number_of_threads,
)
from torch import Tensor

import slowfast_fast
from slowfast_fast import ops, reference
from slowfast_fast.ops import NormedConv
from slowfast_fast.reference.temporal_conv import batch_norm, temporal_conv_bn

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

LAYERS = ("a", "b", "c", "shortcut")
PARAMETERS = ("weight", "gamma", "beta")
MOVED = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Shape:
    n: int = 2
    c: int = 6
    j: int = 5
    k: int = 6
    t: int = 3
    h: int = 4
    w: int = 5
    kt: int = 3
    stride_a: int = 1
    dilation_a: int = 1
    stride: int = 1
    dilation: int = 1
    shortcut: bool = True

    @property
    def options(self) -> dict[str, int]:
        padding = {"padding_a": self.dilation_a * (self.kt // 2)}
        return padding | {n: getattr(self, n) for n in ("stride_a", "dilation_a", "stride", "dilation")}

    @property
    def layers(self) -> tuple[str, ...]:
        return LAYERS if self.shortcut else LAYERS[:3]

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        c, j, k = self.c, self.j, self.k
        sizes = {"a": (j, c, self.kt, 1, 1), "b": (j, j, 1, 3, 3), "c": (k, j, 1, 1, 1), "shortcut": (k, c, 1, 1, 1)}
        return {layer: sizes[layer] for layer in self.layers}

    @property
    def out(self) -> tuple[int, ...]:
        t, h, w = (self.t - 1) // self.stride_a, (self.h - 1) // self.stride, (self.w - 1) // self.stride
        return self.n, self.k, t + 1, h + 1, w + 1


SHAPES = {
    "shortcut": Shape(),
    "identity": Shape(shortcut=False),
    "one_clip": Shape(n=1),
    "one_channel_inside": Shape(j=1, shortcut=False),
    "wide": Shape(c=33, j=17, k=35),
    "kt1": Shape(kt=1, shortcut=False),
    "kt5_t2": Shape(kt=5, t=2),
    "stride": Shape(stride=2, h=7, w=6),
    "stride_3_odd": Shape(stride=3, h=8, w=5),
    "stride_in_time": Shape(stride_a=2, t=5),
    "stride_in_both": Shape(stride_a=2, stride=2, kt=1, t=4),
    "dilation": Shape(dilation=2, h=7, w=6, shortcut=False),
    "dilation_in_time": Shape(dilation_a=2, t=5, shortcut=False),
    "one_position": Shape(h=1, w=1, t=9),
    "fast_res2_first": Shape(n=1, c=8, j=8, k=32, h=9, w=7),
    "fast_res3_first": Shape(n=1, c=32, j=16, k=64, t=4, stride=2, h=8, w=6),
    "fast_res4": Shape(n=1, c=128, j=32, k=128, t=4, shortcut=False),
    "library_products": Shape(c=80, j=64, k=128, kt=1, t=2, h=4, stride=2),
    "slow_res5": Shape(n=2, c=128, j=64, k=128, t=4, h=4, w=4, shortcut=False),
}
SEVERAL = ("shortcut", "identity", "stride_in_both", "wide", "library_products")
few_shapes = pytest.mark.parametrize("shape", [Shape(stride=2), Shape(shortcut=False)], ids=["shortcut", "identity"])


def layers_of(tensors: dict[str, Tensor]) -> list[NormedConv]:
    """The layers whose tensors are named ``<layer>_<field of NormedConv>``."""
    fields = {
        layer: {n: tensors[f"{layer}_{n}"] for n in NormedConv._fields if f"{layer}_{n}" in tensors} for layer in LAYERS
    }
    return [NormedConv(**given) for given in fields.values() if given]


@dataclass(frozen=True)
class BlockCall(Call):
    """A Call whose function takes layers."""

    def run(self, function: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
        op = function or ops.bottleneck_bn
        names = {f"{layer}_{name}" for layer in LAYERS for name in MOVED}
        flat = replace(self, updated=tuple(name for name in self.tensors if name in names))
        rest = set(self.options)

        def flattened(**arguments: Any) -> Tensor:
            tensors = {name: value for name, value in arguments.items() if name not in rest}
            return op(tensors.pop("x"), *layers_of(tensors), **{name: arguments[name] for name in rest})

        return Call.run(flat, flattened)

    def run_stock(self) -> dict[str, Tensor]:
        return self.run(reference.bottleneck_bn)


def call_of(shape: Shape, dtype: torch.dtype, active: float = 0.0) -> BlockCall:
    """Random values. ``active``: how far the inner activations stay from their kink, in standard deviations and by
    channels that are on or off; there the mask depends on rounding."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {"x": torch.randn(shape.n, shape.c, shape.t, shape.h, shape.w).to(dtype)}
    for layer, sizes in shape.weights.items():
        k = sizes[0]
        gamma, beta = torch.rand(k) + 0.5, torch.randn(k)
        if layer in "ab":
            beta = beta + active * (2 * (torch.rand(k) < 0.8) - 1)
            beta[0] = abs(beta[0])
        tensors |= {
            f"{layer}_weight": (torch.randn(sizes) / sizes[1] ** 0.5).to(dtype),
            f"{layer}_gamma": gamma.to(wide),
            f"{layer}_beta": beta.to(wide),
            f"{layer}_running_mean": torch.randn(k).to(wide),
            f"{layer}_running_var": torch.rand(k).to(wide),
            f"{layer}_num_batches_tracked": torch.tensor(3),
        }
    differentiable = ("x", *(f"{layer}_{name}" for layer in shape.layers for name in PARAMETERS))
    return BlockCall("bottleneck_bn", tensors, shape.options, differentiable, torch.randn(shape.out).to(dtype))


def before_the_activations(call: BlockCall) -> list[Tensor]:
    """The arguments of the three ReLUs, in float64."""
    exact = call.to(torch.float64)
    o, (a, b, c, *shortcut) = exact.options, layers_of(exact.tensors)
    x = exact.tensors["x"]
    ya = temporal_conv_bn(
        *(x, a.weight, a.gamma, a.beta),
        training=True,
        stride=o["stride_a"],
        padding=o["padding_a"],
        dilation=o["dilation_a"],
    )

    def norm(raw: Tensor, layer: NormedConv) -> Tensor:
        return batch_norm(raw, layer.gamma, layer.beta, None, None, None, 0.0, layer.eps, training=True)

    s, d = o["stride"], o["dilation"]
    yb = norm(F.conv3d(ya.relu(), b.weight, stride=(1, s, s), padding=(0, d, d), dilation=(1, d, d)), b)
    residual = norm(F.conv3d(x, shortcut[0].weight, stride=(o["stride_a"], s, s)), shortcut[0]) if shortcut else x
    return [ya, yb, norm(F.conv3d(yb.relu(), c.weight), c) + residual]


def random_call(shape: Shape, dtype: torch.dtype, active: float | None = None) -> BlockCall:
    """No activation close to its kink: in float32 and float64 by drawing again, in half precision by channels that are
    on or off, as with ``active``. The gradient of the result is 0 where that is close to it."""
    if active is None and dtype.itemsize == 2:
        active = 6.0
    for _ in range(100):
        call = call_of(shape, dtype, active=active or 0.0)
        ya, yb, y = before_the_activations(call)
        if min(ya.abs().min(), yb.abs().min()) > (0.1 if active else 1e-5):
            grad = torch.where(y.abs() > 0.1, call.grad, 0)
            return replace(call, grad=grad.to(dtype))
    raise AssertionError("no draw without an activation close to its kink")


# Every shape in float32, some in the others: what reads and writes a dtype is the same for all.
CASES = [(name, dtype) for name in SHAPES for dtype in DTYPES if dtype == torch.float32 or name in SEVERAL]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda case: str(case).removeprefix("torch."))
def test_random_values(name: str, dtype: torch.dtype) -> None:
    judged = {"trials": 5} if dtype == torch.float32 else {}
    if name == "one_channel_inside":
        judged["fewest_values"] = 32  # a draw has one value of some results
    if name == "slow_res5":
        # Over images the library's dgrad of b is 1.75 times as far off here as over clips: more values, to tell from 2.
        judged["fewest_draws"] = 4
    assert_as_exact_as_pytorch(lambda: random_call(SHAPES[name], dtype), **judged)


@pytest.mark.parametrize("rows", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(n=1, c=8, j=256, k=9, t=2, h=6, stride=2),
        Shape(c=8, j=256, k=8, t=2, h=4, w=1, dilation=2, shortcut=False),
    ],
    ids=["stride", "dilation"],
)
def test_small_images_of_many_channels(shape: Shape, rows: bool) -> None:
    """Where the gradient of b's weight is one product, in either layout. In float64: in float32 oneDNN's forward has
    errors for rows, ours, that are twice those for planes, the reference's."""
    call = call_of(shape, torch.float64)
    expected = call.run_stock()
    if rows:
        call.tensors["b_weight"] = call.tensors["b_weight"].contiguous(memory_format=torch.channels_last_3d)
    for name, result in call.run().items():
        distance = (result - expected[name]).double().norm() / expected[name].double().norm()
        assert distance <= 1e-12, f"{name} is {distance:.2g} off"


def badly_scaled(name: str, dtype: torch.dtype) -> BlockCall:
    """Blocks whose last convolution reads channels with a mean of 100 standard deviations, channels without any
    deviation, or a signal that its channels share and its weights cancel."""
    call = random_call(Shape(n=2, j=16, k=24, t=4, h=6, w=6, kt=1), dtype)
    t = dict(call.tensors)
    match name:
        case "mean_100":
            t["b_beta"] = torch.full_like(t["b_beta"], 100.0)
            t["b_gamma"] = torch.ones_like(t["b_gamma"])
        case "constant":
            t["b_gamma"] = torch.where(torch.arange(16) % 2 == 0, 0, t["b_gamma"])
            t["b_beta"] = torch.where(torch.arange(16) % 2 == 0, 3.0, t["b_beta"]).to(t["b_beta"].dtype)
        case "correlated":
            # b copies one channel into all, each with a hundredth of its own; c takes differences of channels.
            own = t["b_weight"] / 100
            own[:, 0, 0, 1, 1] += 1
            t["b_weight"] = own
            t["b_beta"] = torch.full_like(t["b_beta"], 6.0)
            t["b_gamma"] = torch.ones_like(t["b_gamma"])
            t["c_weight"] = t["c_weight"] - t["c_weight"].mean(1, keepdim=True)
    call = replace(call, tensors=t)
    y = before_the_activations(call)[2]
    return replace(call, grad=torch.where(y.abs() > 0.1, call.grad, 0).to(dtype))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("name", ["mean_100", "constant", "correlated"])
def test_badly_scaled(name: str, dtype: torch.dtype) -> None:
    # Made after the draw that keeps activations off their kinks: one in twenty has a ReLU that rounding flips.
    assert_as_exact_as_pytorch(lambda: badly_scaled(name, dtype), trials=7)


@few_shapes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, shape: Shape) -> None:
    call = random_call(shape, torch.float32)
    expected = call.run()
    for name, result in call.to(layout=layout).run().items():
        torch.testing.assert_close(result, expected[name], msg=lambda message, n=name: f"{n}: {message}")


@pytest.mark.parametrize("layer", ["a", "b"])
@pytest.mark.parametrize("shape", [Shape(), Shape(c=40, j=32, k=40, t=4)], ids=["direct", "winograd"])
def test_weight_in_channels_last(shape: Shape, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read as it lies, and its gradient lies alike."""
    call = call_of(shape, torch.float32)
    expected = call.run()
    name = f"{layer}_weight"
    rows = call.tensors[name].contiguous(memory_format=torch.channels_last_3d)
    copied: list[str] = []
    monkeypatch.setattr("slowfast_fast.ops._layout.note_copy", lambda argument, tensor: copied.append(argument))
    results = replace(call, tensors=call.tensors | {name: rows}).run()
    assert "weight" not in copied
    for result in results:
        torch.testing.assert_close(results[result], expected[result], msg=lambda message, n=result: f"{n}: {message}")
    assert results[f"grad of {name}"].stride() == rows.stride()


WIDE = Shape(n=3, c=130, j=128, k=130, t=4, h=2, w=3, shortcut=False)


def rows_of_a(call: BlockCall) -> BlockCall:
    """The call with a's weight in channels_last_3d."""
    rows = call.tensors["a_weight"].contiguous(memory_format=torch.channels_last_3d)
    return replace(call, tensors=call.tensors | {"a_weight": rows})


@pytest.mark.parametrize(
    "shape",
    [WIDE, replace(WIDE, n=1), replace(WIDE, dilation_a=2), replace(WIDE, kt=5, t=2), replace(WIDE, n=0)],
    ids=["clips", "one_clip", "dilation", "taps_beyond_the_clip", "no_clip"],
)
def test_gradient_of_a_wide_temporal_weight_by_taps(shape: Shape) -> None:
    call = rows_of_a(call_of(shape, torch.float64))
    expected = replace(call, tensors=call.tensors | {"a_weight": call.tensors["a_weight"].contiguous()}).run()
    for name, result in call.run().items():
        distance = (result - expected[name]).double().norm()
        assert distance <= 1e-12 * expected[name].double().norm(), f"{name} is {distance:.2g} off"


def test_wide_temporal_weight_is_as_exact() -> None:
    assert_as_exact_as_pytorch(lambda: rows_of_a(random_call(WIDE, torch.float32)))


@pytest.mark.parametrize(
    "shape",
    [
        Shape(stride=2, h=6, w=6),
        Shape(shortcut=False, h=6, w=6),
        Shape(c=64, j=64, k=128, kt=1, t=4, h=16, w=16),
        replace(WIDE, c=512, k=512, t=8, h=7, w=7),
    ],
    ids=["shortcut", "identity", "library_products", "by_taps"],
)
def test_same_for_any_number_of_threads(shape: Shape) -> None:
    """All but the gradient of b's weight, which is the library's."""
    call = rows_of_a(call_of(shape, torch.float32))
    differentiable = tuple(name for name in call.differentiable if name != "b_weight")
    assert_same_for_any_number_of_threads(replace(call, differentiable=differentiable))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    call = random_call(Shape(), torch.float64)

    class Flat:
        @staticmethod
        def bottleneck_bn(**arguments: Any) -> Tensor:
            tensors = {name: value for name, value in arguments.items() if name not in call.options}
            return ops.bottleneck_bn(tensors.pop("x"), *layers_of(tensors), **call.options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("op_testing.ops", Flat)
        tensors = {n: t for n, t in call.tensors.items() if not n.endswith(MOVED)}
        assert_checkpoint(replace(call, tensors=tensors), use_reentrant)


def leaves(call: BlockCall, wanted: set[str]) -> tuple[Tensor, dict[str, Tensor]]:
    tensors = {name: tensor.detach().clone() for name, tensor in call.tensors.items()}
    for name in wanted:
        tensors[name].requires_grad_()
    return ops.bottleneck_bn(tensors["x"], *layers_of(tensors), **call.options), tensors


@few_shapes
def test_each_gradient_by_itself(shape: Shape) -> None:
    """Whatever else is frozen."""
    call = random_call(shape, torch.float32)
    every = call.run()
    groups = [{name} for name in call.differentiable]
    groups += [{n for n in call.differentiable if n.startswith(layer)} for layer in shape.layers]
    for wanted in groups:
        out, tensors = leaves(call, wanted)
        assert out.requires_grad
        out.backward(call.grad)
        for name in wanted:
            torch.testing.assert_close(tensors[name].grad, every[f"grad of {name}"], msg=lambda m, n=name: f"{n}: {m}")
    assert not leaves(call, set())[0].requires_grad


@few_shapes
def test_what_is_kept(shape: Shape) -> None:
    """x, two narrow tensors, the result, the parameters and the statistics; nothing of the result's size besides."""
    call = random_call(replace(shape, h=8, w=8), torch.float32)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, tensors = leaves(call, set(call.differentiable))
    s, (n, _, t, h, w) = shape, out.shape
    x = call.tensors["x"]
    activations = x.numel() + s.n * s.j * t * x.shape[3] * x.shape[4] + n * s.j * t * h * w + out.numel()
    parameters = sum(tensors[f"{layer}_{name}"].numel() for layer in s.layers for name in PARAMETERS)
    statistics = 3 * sum(sizes[0] for sizes in s.weights.values())
    assert sum(kept.values()) <= 4 * (activations + parameters + statistics)


@few_shapes
def test_gradcheck(shape: Shape) -> None:
    call = random_call(replace(shape, n=1, c=3, j=2, k=3, t=2, h=3, w=3), torch.float64)
    tensors = {name: t for name, t in call.tensors.items() if not name.endswith(MOVED)}
    names = list(tensors)
    inputs = [t.detach().requires_grad_() for t in tensors.values()]

    def function(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return ops.bottleneck_bn(given.pop("x"), *layers_of(given), **call.options)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    (gradient,) = torch.autograd.grad(function(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through bottleneck_bn is not supported"):
        gradient.sum().backward()


@pytest.mark.no_sanitizer
@few_shapes
def test_opcheck(shape: Shape) -> None:
    call = random_call(shape, torch.float32)
    x = call.tensors["x"].contiguous(memory_format=torch.channels_last_3d)
    layers = [*layers_of(call.tensors), *((None,) if not shape.shortcut else ())]
    used = [t for layer in layers for t in ((None,) * 3 if layer is None else layer[:3])]
    geometry = tuple(call.options[name] for name in ("stride_a", "padding_a", "dilation_a", "stride", "dilation"))
    op = torch.ops.slowfast_fast.bottleneck_bn.default
    for tensor in (x, *used):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(op, (x, *used, *geometry, *(1e-5,) * 4, False))
    with torch.no_grad():
        results = op(x, *used, *geometry, *(1e-5,) * 4, False)
    saved = [t if t is None else t.detach() for i, t in enumerate((x, *used)) if i not in (9, 12)]
    for needs in (2**13 - 1, 0b1, 0b10000):
        torch.library.opcheck(
            torch.ops.slowfast_fast.bottleneck_bn_backward.default,
            (
                call.to(layout="channels_last").grad,
                *saved,
                *results,
                *geometry,
                needs if shape.shortcut else needs & 0x3FF,
                False,
            ),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.no_sanitizer
@pytest.mark.parametrize(("compiler", "shortcut"), [("aot_eager", False), ("inductor", True)])
def test_compiled_is_eager(compiler: str, shortcut: bool) -> None:
    call = random_call(Shape(shortcut=shortcut), torch.float32)
    torch._dynamo.reset()
    compiled = call.run(torch.compile(ops.bottleneck_bn, fullgraph=True, backend=compiler))
    for name, expected in call.run().items():
        torch.testing.assert_close(compiled[name], expected, msg=lambda message, n=name: f"{n}: {message}")


def assert_autocast(call: BlockCall, dtype: torch.dtype, device: str) -> None:
    """As in op_testing.py, for a function of layers."""
    call = call.to(device=device)
    with torch.autocast(device, dtype):
        ours = call.run(lambda *args, **options: ops.bottleneck_bn(*args, **options).float())
    half = {n: t.to(dtype) if t.dim() == 5 else t for n, t in call.tensors.items()}
    expected = replace(call, tensors=half, grad=call.grad.to(dtype)).run()
    for name, result in ours.items():
        assert torch.equal(result, expected[name].to(result.dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(dtype: torch.dtype) -> None:
    assert_autocast(random_call(Shape(), torch.float32), dtype, "cpu")


def test_empty_batch() -> None:
    call = call_of(Shape(n=0), torch.float32)
    results = call.run()
    assert_dense(results["output"])
    for name, tensor in call.tensors.items():
        if name.endswith("num_batches_tracked"):
            assert results.get(name, tensor + 1) == tensor + 1
        elif name.endswith(MOVED):
            assert torch.equal(results[name], tensor), name
        else:
            assert not results[f"grad of {name}"].any(), name


def test_nan_passes_through() -> None:
    call = random_call(Shape(), torch.float32)
    call.tensors["x"][0, 0, 0, 0, 0] = float("nan")
    assert call.run()["output"].isnan().all()


def test_one_value_per_channel() -> None:
    """As nn.BatchNorm3d says it."""
    call = call_of(Shape(n=1, t=1, h=1, w=1), torch.float32)
    with pytest.raises(ValueError, match=re.escape("Expected more than 1 value per channel when training, got input")):
        call.run()


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "b_weight": ({"b_weight": torch.zeros(5, 5, 3, 1, 1)}, "b.weight must be (5, 5, 1, 3, 3), with the J of a"),
    "c_weight": ({"c_weight": torch.zeros(6, 4, 1, 1, 1)}, "c.weight must be (K, 5, 1, 1, 1), with the J of a"),
    "shortcut": ({"shortcut_weight": torch.zeros(6, 5, 1, 1, 1)}, "shortcut.weight must be (6, 6, 1, 1, 1)"),
    "x": ({"x": torch.zeros(2, 6, 3, 4, 5, dtype=torch.int32)}, "x must be float32"),
    "gamma": ({"b_gamma": torch.zeros(4)}, "gamma must be (5,)"),
    "dtype": ({"a_weight": torch.zeros(5, 6, 3, 1, 1).double()}, "a.weight must have the dtype of x"),
    "stride": ({"stride": 0}, "stride must be at least 1; got 0"),
    "padding_a": ({"padding_a": 0}, "padding_a must leave as many frames as the shortcut has, 3; got 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call = call_of(Shape(), torch.float32)
    changes, message = ERRORS[name]
    tensors = call.tensors | {n: v for n, v in changes.items() if isinstance(v, Tensor)}
    options = call.options | {n: v for n, v in changes.items() if not isinstance(v, Tensor)}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        replace(call, tensors=tensors, options=options, differentiable=()).run()


def test_shortcut_that_is_missing() -> None:
    with pytest.raises(ValueError, match="shortcut must be given where x cannot be added"):
        call_of(Shape(shortcut=False, k=7), torch.float32).run()


def test_forced_backends() -> None:
    call = random_call(Shape(), torch.float64)
    expected = call.run()
    with slowfast_fast.backend("reference"):
        for name, result in call.run().items():
            torch.testing.assert_close(result, expected[name])
