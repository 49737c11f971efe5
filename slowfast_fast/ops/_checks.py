"""What an op accepts. Everything wrong raises here, before anything runs, naming the argument, what came and what
was expected."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def activation(name: str, tensor: Tensor) -> None:
    """An (N, C, T, H, W) floating-point tensor in which only N may be 0."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64; got {tensor.dtype}")
    shape = tensor.shape
    if len(shape) != 5:
        raise ValueError(f"{name} must be (N, C, T, H, W); got {len(shape)} dimensions, shape {_shape(tensor)}")
    if shape[1] == 0 or shape[2] == 0 or shape[3] == 0 or shape[4] == 0:
        raise ValueError(f"{name} may be empty in N only; got (N, C, T, H, W) = {_shape(tensor)}")


def like(name: str, tensor: Tensor, of: Tensor, of_name: str) -> None:
    """The dtype and device of ``of``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype != of.dtype:
        raise TypeError(f"{name} must have the dtype of {of_name}, {of.dtype}; got {tensor.dtype}")
    if tensor.device != of.device:
        raise ValueError(f"{name} must be on the device of {of_name}, {of.device}; got {tensor.device}")


def kernel(weight: Tensor, x: Tensor, x_name: str) -> None:
    """A weight (K, C, kt, 1, 1) for the C of ``x``."""
    like("weight", weight, x, x_name)
    shape = weight.shape
    if len(shape) != 5 or shape[3] != 1 or shape[4] != 1 or shape[0] == 0 or shape[2] == 0:
        raise ValueError(f"weight must be (K, C, kt, 1, 1), a convolution in T alone; got shape {_shape(weight)}")
    if shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must have the channels of {x_name}, C = {x.shape[1]}; got (K, C, kt, 1, 1) = {_shape(weight)}"
        )


def weight(name: str, tensor: Tensor | None, x: Tensor, shape: tuple[int | str, ...], why: str) -> Tensor:
    """A weight of a block on ``x``. ``shape`` has a name where any size from 1 will do."""
    like(name, tensor, x, "x")  # type: ignore[arg-type]  # which raises for None
    assert tensor is not None
    given = tuple(tensor.shape)
    if len(given) != 5 or any(g != s if isinstance(s, int) else g == 0 for g, s in zip(given, shape, strict=True)):
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} must be ({expected}), {why}; got shape {given}")
    return tensor


def same_padding(padding: int | None, weight: Tensor) -> int:
    """``padding``, or the one that keeps T at stride and dilation 1."""
    taps = weight.shape[2]
    if padding is not None:
        return integer("padding", padding, 0)
    if taps % 2 == 0:
        raise ValueError(f"padding must be given for a kernel of even length; got kt = {taps} and padding None")
    return taps // 2


def integer(name: str, value: int, least: int) -> int:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int (along T alone); got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return value


def flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {type(value).__name__} {value!r}")
    return value


def frames(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, x_name: str) -> int:
    """T of the convolution's output, at least 1."""
    reach = dilation * (weight.shape[2] - 1) + 1
    padded = x.shape[2] + 2 * padding
    if padded < reach:
        raise ValueError(
            f"{x_name} is too short: T = {x.shape[2]} with padding {padding} gives {padded} frames, "
            f"the kernel (kt = {weight.shape[2]}, dilation {dilation}) needs {reach}"
        )
    return (padded - reach) // stride + 1


def convolution(
    x: Tensor, weight: Tensor, residual: Tensor | None, stride: int, padding: int | None, dilation: int, relu: bool
) -> tuple[int, tuple[int, ...]]:
    """The arguments of a convolution along T and of what is fused with it. Returns the padding in frames and the shape
    of the output."""
    activation("x", x)
    kernel(weight, x, "x")
    integer("stride", stride, 1)
    integer("dilation", dilation, 1)
    flag("relu", relu)
    padding = same_padding(padding, weight)
    n, _, _, h, w = x.shape
    shape = (n, weight.shape[0], frames(x, weight, stride, padding, dilation, "x"), h, w)
    if residual is not None:
        output_like("residual", residual, shape, x)
    return padding, shape


def output_like(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A residual: the shape of the output, the dtype and device of ``x``."""
    like(name, tensor, x, "x")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape of the output, {_shape(shape)}; got {_shape(tensor)}")


def vector(name: str, tensor: Tensor | None, weight: Tensor, of: str = "weight") -> None:
    """None, or one value per output channel in float32 or the dtype of ``weight``, which messages call ``of``."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None; got {type(tensor).__name__}")
    if tensor.dim() != 1 or tensor.shape[0] != weight.shape[0]:
        raise ValueError(f"{name} must be ({weight.shape[0]},), one value per output channel; got {_shape(tensor)}")
    if tensor.dtype != torch.float32 and tensor.dtype != weight.dtype:
        raise TypeError(f"{name} must be float32 or of the dtype of {of}, {weight.dtype}; got {tensor.dtype}")
    if tensor.device != weight.device:
        raise ValueError(f"{name} must be on the device of {of}, {weight.device}; got {tensor.device}")


def running_stats(
    mean: Tensor | None,
    var: Tensor | None,
    count: Tensor | None,
    momentum: float | None,
    weight: Tensor,
    of: str,
    *,
    moves: bool,
) -> None:
    """Running statistics as nn.BatchNorm3d keeps them: both or none. Where the call ``moves`` them, in place, they
    share one dtype and lie side by side, and a cumulative average has its count."""
    if (mean is None) != (var is None):
        absent = "running_mean" if mean is None else "running_var"
        raise ValueError(f"running_mean and running_var must be given together; got None for {absent}")
    vector("running_mean", mean, weight, of)
    vector("running_var", var, weight, of)
    if momentum is not None and not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum must be a number or None; got {type(momentum).__name__} {momentum!r}")
    if mean is None or var is None or not moves:
        return
    if mean.dtype != var.dtype:
        raise TypeError(f"running_var must have the dtype of running_mean, {mean.dtype}; got {var.dtype}")
    if not mean.is_contiguous() or not var.is_contiguous():
        raise ValueError(
            f"running_mean and running_var are updated in place and must be contiguous; "
            f"got strides {mean.stride()} and {var.stride()}"
        )
    if count is None:
        if momentum is None:
            raise ValueError("momentum None is a cumulative average and needs num_batches_tracked; got None")
        return
    if not isinstance(count, Tensor):
        raise TypeError(f"num_batches_tracked must be a torch.Tensor or None; got {type(count).__name__}")
    if count.dtype != torch.int64 or count.numel() != 1 or count.device != weight.device:
        raise ValueError(
            f"num_batches_tracked must be one int64 on {weight.device}; "
            f"got {count.dtype} of shape {_shape(count)} on {count.device}"
        )


def batch_statistics(output_shape: tuple[int, ...], eps: float) -> None:
    """As torch.nn.functional.batch_norm: over a single value there is no variance."""
    n, _, t, h, w = output_shape
    if n * t * h * w == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {_shape(output_shape)}")
    if eps <= 0:
        raise ValueError(f"eps must be positive for batch statistics; got {eps}")


def lateral_frames(slow: tuple[int, ...], fast: Tensor, weight: Tensor, alpha: int, padding: int) -> int:
    """T of the result, which a slow part of this shape and the convolution of fast must agree on, as on N, H and W."""
    n, _, t, h, w = slow
    if (n, h, w) != (fast.shape[0], fast.shape[3], fast.shape[4]):
        raise ValueError(
            f"slow and fast must agree in N, H and W; got slow (N, C, T, H, W) = {_shape(slow)}, fast {_shape(fast)}"
        )
    given = frames(fast, weight, alpha, padding, 1, "fast")
    if t != given:
        raise ValueError(
            f"slow has T = {t} and fast T = {fast.shape[2]}: with alpha = {alpha}, kt = {weight.shape[2]} and padding "
            f"{padding} the convolution of fast gives T = {given}; {_fitting_alpha(t, fast, weight, padding)}"
        )
    return given


def lateral(
    x: Tensor,
    slow_shape: tuple[int, ...],
    fast: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    alpha: int,
    padding: int | None,
) -> int:
    """The lateral convolution that goes beside a slow part of ``slow_shape``. Returns its padding in frames."""
    activation("fast", fast)
    like("fast", fast, x, "x")
    kernel(weight, fast, "fast")
    vector("lateral_shift", shift, weight)
    integer("alpha", alpha, 1)
    padding = same_padding(padding, weight)
    lateral_frames(slow_shape, fast, weight, alpha, padding)
    return padding


def pool(x: Tensor, kernel: int, stride: int, padding: int) -> None:
    """Square windows in H and W."""
    integer("kernel", kernel, 1)
    integer("stride", stride, 1)
    integer("padding", padding, 0)
    if padding > kernel // 2:
        raise ValueError(f"padding must be at most half of the kernel, {kernel // 2}; got {padding}")
    height, width = x.shape[3], x.shape[4]
    if min(height, width) + 2 * padding < kernel:
        raise ValueError(f"kernel {kernel} does not fit H = {height} and W = {width} with padding {padding}")


def _fitting_alpha(slow_frames: int, fast: Tensor, weight: Tensor, padding: int) -> str:
    last = fast.shape[2] + 2 * padding - weight.shape[2]
    fitting = [a for a in range(1, last + 2) if last // a + 1 == slow_frames]
    if not fitting:
        return "no alpha gives the T of slow"
    if slow_frames == 1:
        return f"alpha = {fitting[0]} or more would fit"
    if len(fitting) == 1:
        return f"alpha = {fitting[0]} would fit"
    return f"alpha = {fitting[0]} to {fitting[-1]} would fit"


def _shape(tensor: Tensor | tuple[int, ...]) -> str:
    return str(tuple(tensor.shape if isinstance(tensor, Tensor) else tensor))
