"""Calls of bottleneck_bn for the tests: shapes, random and badly scaled values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from op_testing import Call
from torch import Tensor

from slowfast_fast import ops, reference
from slowfast_fast.ops import NormedConv
from slowfast_fast.reference.temporal_conv import batch_norm, temporal_conv_bn

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


def badly_scaled(name: str, shape: Shape, dtype: torch.dtype) -> BlockCall:
    """Blocks of 16 channels whose last convolution reads channels with a mean of 100 standard deviations, channels
    without any deviation, or a signal that its channels share and its weights cancel."""
    call = random_call(shape, dtype)
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
