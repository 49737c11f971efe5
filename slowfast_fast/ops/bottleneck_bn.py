"""A whole bottleneck block in training: three convolutions with BatchNorm, the shortcut, their sum and its ReLU."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backend import for_every_library
from ..choosing import choose, decide
from . import _checks
from ._batch_norm import BatchNorm
from ._common import accumulation_dtype, allows_tf32, autocast, call, define_op, forbid_gradient, kernel, register_fake
from ._kernels import note_block
from ._layout import as_dense, as_rows, empty_channels_last, places

Geometry = tuple[int, int, int, int, int]  # stride_a, padding_a, dilation_a, stride, dilation


class NormedConv(NamedTuple):
    """A convolution's weight and the BatchNorm behind it, as nn.Conv3d (without bias) and nn.BatchNorm3d hold them."""

    weight: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5

    @property
    def norm(self) -> BatchNorm:
        return BatchNorm(*self[1:], training=True)


def bottleneck_bn(
    x: Tensor,
    a: NormedConv,
    b: NormedConv,
    c: NormedConv,
    shortcut: NormedConv | None = None,
    *,
    stride_a: int = 1,
    padding_a: int | None = None,
    dilation_a: int = 1,
    stride: int = 1,
    dilation: int = 1,
) -> Tensor:
    """relu(bn(c(relu(bn(b(relu(bn(a(x)))))))) + residual): a residual block (table 1 of the SlowFast paper) in
    training, every BatchNorm with the statistics of the batch. Stock: pytorchvideo's ResBlock with a BottleneckBlock.

    Kept for the backward are x, the raw outputs of a and b, the statistics and the result, and nothing else: what is
    normalised is made again, and the raw outputs of c and of the shortcut live for the length of a call at most.
    Running statistics are updated in place, variances unbiased, and num_batches_tracked incremented.

    Args:
        x: (N, C, T, H, W), float32, float16, bfloat16 or float64; N may be 0. Read in place where its memory is rows of
            channels (torch.channels_last_3d, or a slice of it in any dimension), else copied once.
        a: weight (J, C, kt, 1, 1) of x's dtype: temporal, with ``stride_a``, ``padding_a`` and ``dilation_a``.
        b: weight (J, J, 1, 3, 3): spatial, with ``stride`` in H and W, ``dilation``, and as much padding.
        c: weight (K, J, 1, 1, 1): pointwise.
        shortcut: weight (K, C, 1, 1, 1): the residual is its BatchNorm of this convolution of x, with the strides of a
            and b. None: the residual is x itself; C is K then, and both strides 1.
        padding_a: in T; None means kt // 2, for odd kt only.

        gamma, beta and the running statistics of a layer are one value per output channel in float32 or x's dtype; see
        :func:`temporal_conv_bn` for momentum and eps. Under autocast x and the weights are cast to the active dtype.

    Returns:
        (N, K, T', H', W'), dense channels_last_3d: H' = (H - 1) // stride + 1, W' likewise, T' as
        :func:`temporal_conv`.

    Raises:
        TypeError, ValueError: an argument is not as above, or there is a single value per channel; the message says
            which.
        RuntimeError: the backend that was asked for cannot run the call. A double backward raises too.
    """
    layers = {"a": a, "b": b, "c": c} | ({} if shortcut is None else {"shortcut": shortcut})
    x, *weights = autocast(x, *(layer.weight for layer in layers.values()))
    layers = {name: layer._replace(weight=w) for (name, layer), w in zip(layers.items(), weights, strict=True)}
    geometry = _check(x, layers, stride_a, padding_a, dilation_a, stride, dilation)
    x = as_rows(x, "x")
    tf32 = allows_tf32(x)
    choice = choose("bottleneck_bn", x, tf32=tf32)
    if choice.backend == "reference":
        plain: dict[str, Any] = dict(zip(GEOMETRY, geometry, strict=True))
        out = reference.bottleneck_bn(x, layers["a"], layers["b"], layers["c"], layers.get("shortcut"), **plain)
        out = out.contiguous(memory_format=torch.channels_last_3d)
    else:
        tensors = [t for layer in _four(layers) for t in _used(layer, x, choice.backend)]
        epsilons = [layer.eps if layer is not None else 1.0 for layer in _four(layers)]
        results = call(kernel(choice.backend, "bottleneck_bn"), x, *tensors, *geometry, *epsilons, tf32)
        out = results[0]
        for layer, statistics in zip(_four(layers), results[3:], strict=True):
            if layer is not None:
                layer.norm.move(choice.backend, out.shape[0], statistics[0], statistics[2])
    note_block(choice, x, {name: layer.weight for name, layer in layers.items()}, geometry, out, tf32)
    return out


def layers_needed(x: Tensor) -> str | None:
    """Why a block on ``x`` runs layer by layer, on the ops that each of them has; None where a backend takes it
    whole."""
    backend, reason = decide("bottleneck_bn", x, tf32=allows_tf32(x))
    return reason if backend in (None, "reference") else None


GEOMETRY = ("stride_a", "padding_a", "dilation_a", "stride", "dilation")


def _four(layers: dict[str, NormedConv]) -> list[NormedConv | None]:
    return [layers.get(name) for name in ("a", "b", "c", "shortcut")]


def _used(layer: NormedConv | None, x: Tensor, backend: str) -> tuple[Tensor | None, ...]:
    """Weight, gamma and beta as the kernels take them. The CPU's read a weight of either layout; b's is PyTorch's to
    convolve with elsewhere, which prefers rows."""
    if layer is None:
        return (None,) * 3
    weight = layer.weight
    either = backend == "cpu" or weight.shape[3] > 1
    if not (either and weight.is_contiguous(memory_format=torch.channels_last_3d)):
        weight = as_dense(weight, "weight")
    return weight, *layer.norm.accumulators(x)


def _check(
    x: Tensor,
    layers: dict[str, NormedConv],
    stride_a: int,
    padding_a: int | None,
    dilation_a: int,
    stride: int,
    dilation: int,
) -> Geometry:
    _checks.activation("x", x)
    channels = x.shape[1]
    weight_a = _checks.weight("a.weight", layers["a"].weight, x, ("J", channels, "kt", 1, 1), "with the C of x")
    j = weight_a.shape[0]
    _checks.weight("b.weight", layers["b"].weight, x, (j, j, 1, 3, 3), "with the J of a")
    k = _checks.weight("c.weight", layers["c"].weight, x, ("K", j, 1, 1, 1), "with the J of a").shape[0]
    for name, value in (("stride_a", stride_a), ("dilation_a", dilation_a), ("stride", stride), ("dilation", dilation)):
        _checks.integer(name, value, 1)
    padding = _checks.same_padding(padding_a, weight_a)
    t = _checks.frames(x, weight_a, stride_a, padding, dilation_a, "x")
    n, _, frames, h, w = x.shape
    inner, out = (n, j, t, h, w), (n, k, t, (h - 1) // stride + 1, (w - 1) // stride + 1)
    shapes = {"a": inner, "b": (n, j, *out[2:]), "c": out, "shortcut": out}
    if "shortcut" in layers:
        why = "with the K of c and the C of x"
        _checks.weight("shortcut.weight", layers["shortcut"].weight, x, (k, channels, 1, 1, 1), why)
        if (frames - 1) // stride_a + 1 != t:
            raise ValueError(
                f"padding_a must leave as many frames as the shortcut has, {(frames - 1) // stride_a + 1}; got {t} "
                f"with padding_a {padding}"
            )
    elif channels != k or frames != t or stride_a != 1 or stride != 1:
        raise ValueError(
            f"shortcut must be given where x cannot be added to the result: C = {channels}, K = {k}, T = {frames} "
            f"becomes {t}, stride_a {stride_a}, stride {stride}"
        )
    for name, layer in layers.items():
        layer.norm.check(layer.weight, shapes[name])
    return stride_a, padding, dilation_a, stride, dilation


# What PyTorch must know of the kernels: the shapes and strides they return, and their gradients.

TENSORS = 13  # x, then weight, gamma and beta of a, b, c and the shortcut


def _empty_statistics(x, k):
    return torch.empty((3, k), dtype=accumulation_dtype(x), device=x.device)


def _fake(x, weight_a, _ga, _ba, weight_b, _gb, _bb, weight_c, _gc, _bc, shortcut, _gs, _bs, *rest):
    stride_a, padding_a, dilation_a, stride, _ = rest[:5]
    n, _, t, h, w = x.shape
    j, k, kt = weight_a.shape[0], weight_c.shape[0], weight_a.shape[2]
    frames = places(t, kt, stride_a, padding_a, dilation_a)
    size = (frames, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return (
        empty_channels_last(x, (n, k, *size)),
        empty_channels_last(x, (n, j, frames, h, w)),
        empty_channels_last(x, (n, j, *size)),
        *(_empty_statistics(x, channels) for channels in (j, j, k)),
        x.new_empty(0) if shortcut is None else _empty_statistics(x, k),
    )


def _save(library: str, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters = inputs[:TENSORS]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # The betas of c and of the shortcut play no part: the result's sign is the mask of the last ReLU.
    parameters = [p for i, p in enumerate(parameters) if i not in (8, 11)]
    ctx.save_for_backward(x, *parameters, *output)
    ctx.geometry, ctx.tf32, ctx.library = inputs[TENSORS : TENSORS + 5], inputs[-1], library


def _backward(ctx: Any, grad: Tensor | None, *of_statistics: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 10
    wanted = ctx.needs_input_grad[:TENSORS]
    if grad is None or not any(wanted):
        return (None,) * TENSORS + rest
    needs = sum(1 << i for i, need in enumerate(wanted) if need)
    op = getattr(torch.ops, ctx.library).bottleneck_bn_backward.default
    results = call(op, as_rows(grad, "grad"), *ctx.saved_tensors, *ctx.geometry, needs, ctx.tf32)
    return tuple(result if need else None for result, need in zip(results, wanted, strict=True)) + rest


def _fake_backward(grad, x, weight_a, _ga, _ba, weight_b, _gb, _bb, weight_c, _gc, shortcut, _gs, *rest):
    *_, needs, _tf32 = rest
    accumulator = accumulation_dtype(x)
    like = [x]
    for weight in (weight_a, weight_b, weight_c, weight_c if shortcut is None else shortcut):
        like += [weight, *(weight.new_empty(weight.shape[0], dtype=accumulator) for _ in range(2))]

    def empty(tensor):
        if tensor is x:
            return empty_channels_last(x, x.shape)
        return torch.empty_like(tensor)

    return tuple(empty(tensor) if needs >> i & 1 else x.new_empty(0) for i, tensor in enumerate(like))


@for_every_library
def _define(library: str) -> None:
    if not hasattr(getattr(torch.ops, library), "bottleneck_bn"):
        return
    define_op(f"{library}::bottleneck_bn", _fake, partial(_save, library), _backward)
    register_fake(f"{library}::bottleneck_bn_backward", _fake_backward)
    problem = "double backward through bottleneck_bn is not supported: its gradients have no gradient"
    forbid_gradient(f"{library}::bottleneck_bn_backward", problem)
