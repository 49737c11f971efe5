"""A whole bottleneck block of the fast pathway in one kernel, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._extension import cuda_bottleneck
from ..backend import Choice, for_every_library
from ..choosing import choose
from ..explanation import note_call, recording
from . import _checks
from ._common import accumulator, allows_tf32, autocast, call, forbid_gradient, kernel, register_fake
from ._kernels import is_aligned
from ._layout import as_dense, as_rows, empty_channels_last, is_rows
from ._repeat import Plan, Signature, call_planned, look_up, remember

PARAMETERS = (
    *("weight_a", "shift_a", "weight_b", "shift_b", "weight_c", "shift_c"),
    *("shortcut_weight", "shortcut_shift"),
)
NO_GRADIENT = "bottleneck has no backward: it is for inference, with BatchNorm folded into weights and shifts"


def bottleneck(
    x: Tensor,
    weight_a: Tensor,
    shift_a: Tensor,
    weight_b: Tensor,
    shift_b: Tensor,
    weight_c: Tensor,
    shift_c: Tensor,
    shortcut_weight: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    *,
    padding_a: int | None = None,
    stride: int = 1,
    dilation: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """y = relu(c(relu(b(relu(a(x) + shift_a)) + shift_b)) + shift_c + residual): a residual block of the fast pathway
    (table 1 of the SlowFast paper) in inference, the scales of its BatchNorms folded into the weights. Stock:
    pytorchvideo's ResBlock with a BottleneckBlock in eval mode.

    What lies between its convolutions is never stored. Beside the image b sees zeros, as in a stack of layers.

    Args:
        x: (N, C, T, H, W), float32, float16, bfloat16 or float64; N may be 0. Read in place where its memory is rows of
            channels (torch.channels_last_3d, or a slice of it in any dimension), else copied once.
        weight_a: (J, C, kt, 1, 1) of x's dtype, kt odd: temporal.
        weight_b: (J, J, 1, 3, 3): spatial, with ``stride`` in H and W and as much padding as dilation.
        weight_c: (K, J, 1, 1, 1): pointwise.
        shift_a, shift_b, shift_c: (J,), (J,), (K,) in float32 or x's dtype.
        shortcut_weight, shortcut_shift: (K, C, 1, 1, 1) and (K,): the residual is this convolution of x, with
            ``stride``. Without them it is x itself; C is K then, and stride 1.
        padding_a: zeros before and after T, kt // 2, which None stands for: the block keeps T.
        stride, dilation: 1 or 2.
        out: (N, K, T, H', W') to write into, of x's dtype; rows of channels, such as a channel slice of a wider
            tensor. It must share no memory with x.

    Under autocast x and the weights are cast to the active dtype. Sums are kept in float32 (float64 for float64); so is
    what lies between the convolutions, but on a GPU's tensor cores, which take it in x's dtype or TF32.

    Returns:
        ``out``, or a dense channels_last_3d (N, K, T, H', W'), H' = (H - 1) // stride + 1 and W' likewise.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
        RuntimeError: an argument requires a gradient while gradients are recorded, or the backend that was asked for
            cannot run the call.
    """
    x, weight_a, weight_b, weight_c, shortcut_weight = autocast(x, weight_a, weight_b, weight_c, shortcut_weight)
    arguments = (x, weight_a, shift_a, weight_b, shift_b, weight_c, shift_c, shortcut_weight, shortcut_shift)
    _refuse_gradient(arguments)
    key, plan = look_up("bottleneck", (padding_a, stride, dilation), (x, weight_a, out), arguments[2:])
    if plan is not None:
        try:
            targets = () if out is None else (out,)
            y = call_planned(plan.kernel, *targets, *arguments, plan.padding, stride, dilation, plan.tf32)
            return y if out is None else out
        except RuntimeError:
            pass  # the long way says what is wrong
    _checks.activation("x", x)
    padding, shape = _check(x, arguments[1:], padding_a, stride, dilation)
    if out is not None:
        _check_out(out, shape, x)
    return _bottleneck(arguments, (padding, stride, dilation), out, key)


def _refuse_gradient(arguments: tuple[Tensor | None, ...]) -> None:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        raise RuntimeError(f"{NO_GRADIENT}; call it under torch.no_grad(), or detach what requires a gradient")


def _check(
    x: Tensor, others: tuple[Tensor | None, ...], padding_a: int | None, stride: int, dilation: int
) -> tuple[int, tuple[int, ...]]:
    """Check all but x. Returns the padding of a and the shape of the output."""
    weight_a, shift_a, weight_b, shift_b, weight_c, shift_c, shortcut_weight, shortcut_shift = others
    weight_a = _checks.weight("weight_a", weight_a, x, ("J", x.shape[1], "kt", 1, 1), "with the C of x")
    j, _, taps, _, _ = weight_a.shape
    _checks.weight("weight_b", weight_b, x, (j, j, 1, 3, 3), "with the J of weight_a")
    weight_c = _checks.weight("weight_c", weight_c, x, ("K", j, 1, 1, 1), "with the J of weight_a")
    for name, value in (("stride", stride), ("dilation", dilation)):
        if _checks.integer(name, value, 1) > 2:
            raise ValueError(f"{name} must be 1 or 2; got {value}")
    padding = taps // 2 if padding_a is None else _checks.integer("padding_a", padding_a, 0)
    if taps != 2 * padding + 1:
        raise ValueError(
            f"padding_a must keep T: kt // 2 for an odd kt; got padding_a {padding_a} and weight_a (J, C, kt, 1, 1) = "
            f"{tuple(weight_a.shape)}"
        )
    _shift("shift_a", shift_a, weight_a)
    _shift("shift_b", shift_b, weight_a)
    _shift("shift_c", shift_c, weight_c)
    n, c, t, h, w = x.shape
    k = weight_c.shape[0]
    if (shortcut_weight is None) != (shortcut_shift is None):
        absent = "shortcut_weight" if shortcut_weight is None else "shortcut_shift"
        raise ValueError(f"shortcut_weight and shortcut_shift must be given together; got None for {absent}")
    if shortcut_weight is not None:
        _checks.weight("shortcut_weight", shortcut_weight, x, (k, c, 1, 1, 1), "with the K of weight_c and the C of x")
        _shift("shortcut_shift", shortcut_shift, weight_c)
    elif c != k or stride != 1:
        raise ValueError(
            f"shortcut_weight must be given where x cannot be added to the result: C = {c}, K = {k}, stride {stride}"
        )
    return padding, (n, k, t, (h - 1) // stride + 1, (w - 1) // stride + 1)


def _shift(name: str, shift: Tensor | None, weight: Tensor) -> None:
    if shift is None:
        raise TypeError(f"{name} must be a torch.Tensor; got NoneType")
    _checks.vector(name, shift, weight)


def _check_out(out: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    _checks.output_like("out", out, shape, x)
    if not is_rows(out):
        raise ValueError(
            f"out must be rows of channels (channels_last_3d or a slice of it); got {shape} with strides {out.stride()}"
        )


def _bottleneck(
    arguments: tuple[Any, ...],
    geometry: tuple[int, int, int],
    out: Tensor | None,
    key: Signature | None,
) -> Tensor:
    x = as_rows(arguments[0], "x")
    tf32 = allows_tf32(x)
    choice = choose("bottleneck", x, tf32=tf32)
    if choice.backend == "reference":
        padding, stride, dilation = geometry
        y = reference.bottleneck(x, *arguments[1:], padding_a=padding, stride=stride, dilation=dilation, out=out)
        y = y if out is not None else y.contiguous(memory_format=torch.channels_last_3d)
    else:
        others = (
            tensor if tensor is None else as_dense(tensor, name) if "weight" in name else accumulator(tensor, x, name)
            for name, tensor in zip(PARAMETERS, arguments[1:], strict=True)
        )
        used = (x, *others)
        op = kernel(choice.backend, "bottleneck" if out is None else "bottleneck_out")
        result = call(op, *(used if out is None else (out, *used)), *geometry, tf32)
        y = result if out is None else out
        remember(key, Plan(op, choice.backend, geometry[0], tf32), arguments, used)
    if recording():
        note_call("bottleneck", _with_details(choice, x, arguments[1], y, tf32), (x,), y)
    return y


def _with_details(choice: Choice, x: Tensor, weight_a: Tensor, y: Tensor, tf32: bool) -> Choice:
    """What explain() should say of the kernel beside the choice of its backend."""
    said = None
    if choice.backend == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        said = f"{x.dtype} is converted to float32 row by row, which is slower"
    elif choice.backend == "cuda":
        channels = (x.shape[1], weight_a.shape[0], y.shape[1])
        why_not = on_tensor_cores(*channels, x.dtype, tf32, is_aligned(x) and is_aligned(y))
        said = f"general kernel: {why_not}" if why_not else "tensor cores"
    return choice if said is None else choice._replace(reason=f"{choice.reason}; {said}")


_why_not_tensor_cores: dict[tuple[Any, ...], str | None] = {}


def on_tensor_cores(c: int, j: int, k: int, dtype: torch.dtype, tf32: bool, aligned: bool = True) -> str | None:
    """Why the CUDA kernel on tensor cores does not take a block C -> J -> K; None if it does. The general one, which
    takes any block, is slower than a kernel for each layer."""
    arguments = (c, j, k, dtype, tf32, aligned)
    if arguments not in _why_not_tensor_cores:
        _why_not_tensor_cores[arguments] = cuda_bottleneck(*arguments) or None
    return _why_not_tensor_cores[arguments]


# torch.compile keeps what it returned when it traced, as in choosing.py.
on_tensor_cores._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fake(x, weight_a, shift_a, weight_b, shift_b, weight_c, shift_c, shortcut, shortcut_shift, padding, stride, *_):
    n, _, t, h, w = x.shape
    return empty_channels_last(x, (n, weight_c.shape[0], t, (h - 1) // stride + 1, (w - 1) // stride + 1))


def _fake_out(out, x, *_):
    return None


@for_every_library
def _define(library: str) -> None:
    if not hasattr(getattr(torch.ops, library), "bottleneck"):
        return
    register_fake(f"{library}::bottleneck", _fake)
    register_fake(f"{library}::bottleneck_out", _fake_out)
    forbid_gradient(f"{library}::bottleneck", NO_GRADIENT)
