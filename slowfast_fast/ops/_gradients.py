"""The two backward formulas, shared by the ops whose convolution they differentiate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import for_every_library
from ._common import accumulation_dtype, call, forbid_gradient, register_fake
from ._layout import as_rows, empty_channels_last

Gradients = tuple[Tensor | None, ...]


def affine_gradients(
    library: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    y: Tensor | None,
    geometry: tuple[int, int, int],
    tf32: bool,
    needs: tuple[bool, ...],
) -> Gradients:
    """Gradients of x, weight, scale, shift and residual; None for those that ``needs`` does not ask for.

    ``library``: the namespace of the kernel. ``y`` is the op's output, given exactly where it went through a ReLU.
    ``geometry``: stride, padding, dilation.
    """
    arguments = (as_rows(grad, "grad"), x, weight, scale, y, *geometry)
    return _wanted(library, "temporal_conv_backward", arguments, needs, y is not None, tf32)


def batch_norm_gradients(
    library: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    raw: Tensor,
    mean: Tensor,
    invstd: Tensor,
    geometry: tuple[int, int, int],
    relu: bool,
    tf32: bool,
    needs: tuple[bool, ...],
) -> Gradients:
    """Gradients of x, weight, gamma, beta and residual; None for those that ``needs`` does not ask for."""
    saved = (x, weight, gamma, beta, residual, raw, mean, invstd)
    arguments = (as_rows(grad, "grad"), *saved, *geometry, relu)
    return _wanted(library, "temporal_conv_bn_backward", arguments, needs, relu, tf32)


def _wanted(
    library: str, op: str, arguments: tuple[Any, ...], needs: tuple[bool, ...], relu: bool, tf32: bool
) -> Gradients:
    """``op``'s results where needed. Without a ReLU the residual's gradient is the incoming one, which is the first
    argument."""
    *of_conv, of_residual = needs
    asked = (*of_conv, of_residual and relu)
    results: tuple[Any, ...] = (None,) * len(asked)
    if any(asked):
        results = call(getattr(getattr(torch.ops, library), op).default, *arguments, *asked, tf32)
    wanted = [result if need else None for result, need in zip(results, asked, strict=True)]
    if of_residual and not relu:
        wanted[-1] = arguments[0]
    return tuple(wanted)


def empty_vector(x: Tensor, weight: Tensor) -> Tensor:
    """One value per output channel, in the accumulation dtype."""
    return torch.empty(weight.shape[0], dtype=accumulation_dtype(x), device=x.device)


def _fake_backward(grad, x, weight, *rest):
    *_, need_x, need_weight, need_scale, need_shift, need_residual, _tf32 = rest
    return (
        empty_channels_last(x, x.shape) if need_x else x.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else x.new_empty(0),
        empty_vector(x, weight) if need_scale else x.new_empty(0),
        empty_vector(x, weight) if need_shift else x.new_empty(0),
        empty_channels_last(x, grad.shape) if need_residual else x.new_empty(0),
    )


@for_every_library
def _define(library: str) -> None:
    for name, serves in (
        ("temporal_conv_backward", "temporal_conv or lateral_concat"),
        ("temporal_conv_bn_backward", "temporal_conv_bn or lateral_concat_bn"),
    ):
        register_fake(f"{library}::{name}", _fake_backward)
        problem = f"double backward through {serves} is not supported: its gradients have no gradient"
        forbid_gradient(f"{library}::{name}", problem)
