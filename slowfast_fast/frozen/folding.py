"""Which modules can be folded into a weight and a shift, why not the others, and how."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _triple

from ..nn.fused import is_observed
from ..nn.head import ResNetBasicHead, ResNetRoIHead
from ..nn.net import PoolConcatPathway

OBSERVED = "it carries hooks, a forward of its own or a compiled call"
# In evaluation SyncBatchNorm is BatchNorm3d.
_BATCH_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)


def not_conv(conv: nn.Module) -> str | None:
    """Why ``conv`` cannot be folded; None if it can. The others likewise."""
    if type(conv) is not nn.Conv3d:
        return f"{type(conv).__name__} is not a plain Conv3d"
    if is_observed(conv):
        return OBSERVED
    if isinstance(conv.padding, str):
        return f"padding {conv.padding!r}"
    return None if conv.padding_mode == "zeros" else f"padding mode {conv.padding_mode}"


def not_transposed(conv: nn.Module) -> str | None:
    """For a transposed convolution along T that gives as many frames for each as its stride is."""
    if type(conv) is not nn.ConvTranspose3d:
        return f"{type(conv).__name__} is not a plain ConvTranspose3d"
    if is_observed(conv):
        return OBSERVED
    padding = cast("tuple[int, ...]", conv.padding)
    flat = (conv.kernel_size[1:], conv.stride[1:], padding[1:]) == ((1, 1), (1, 1), (0, 0))
    rest = conv.stride[0] + 2 * padding[0] - conv.kernel_size[0]
    if flat and conv.dilation == (1, 1, 1) and conv.groups == 1 and conv.output_padding == (rest, 0, 0):
        return None
    return "it is not a convolution along T that gives stride times the frames"


def not_norm(norm: nn.Module | None) -> str | None:
    if norm is None:
        return None
    if type(norm) not in _BATCH_NORMS:
        return f"{type(norm).__name__} is not a plain BatchNorm3d"
    if cast(nn.BatchNorm3d, norm).running_mean is None:
        return "BatchNorm without running statistics"
    return OBSERVED if is_observed(norm) else None


def not_relu(act: nn.Module | None) -> str | None:
    if act is None:
        return None
    if type(act) is not nn.ReLU:
        return f"{type(act).__name__} is not a plain ReLU"
    return OBSERVED if is_observed(act) else None


def absent_as_none(module: nn.Module | None) -> nn.Module | None:
    """None for an ``nn.Identity`` that nobody watches."""
    return None if type(module) is nn.Identity and not is_observed(module) else module


def folded(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Weight (K, C, kt, kh, kw) and shift (K,) in float64 of a convolution and a norm that can be folded."""
    weight = weight.detach().double()
    shift = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().double()
    if norm is not None:
        bn = cast(nn.BatchNorm3d, norm)
        mean, var = cast(Tensor, bn.running_mean).double(), cast(Tensor, bn.running_var).double()
        scale = torch.rsqrt(var + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.detach().double()
        weight = weight * scale[:, None, None, None, None]
        shift = (shift - mean) * scale
        if bn.bias is not None:
            shift = shift + bn.bias.detach().double()
    return weight, shift


def as_plain(weight: Tensor, alpha: int, padding: int) -> Tensor:
    """A transposed convolution of stride alpha as a plain one of stride 1, which gives the alpha frames of each as
    channels: channel r * K + k of frame t is channel k of frame alpha * t + r.

    ``weight`` is (K, C, kt, 1, 1), the result (alpha * K, C, odd, 1, 1), to be padded by half.
    """
    k, c, taps = weight.shape[:3]
    # Tap j brings frame t + q to frame alpha * t + r, where alpha * q = r + padding - j.
    met = {
        (r, j): (r + padding - j) // alpha for r in range(alpha) for j in range(taps) if not (r + padding - j) % alpha
    }
    reach = max(map(abs, met.values()))
    plain = weight.new_zeros(alpha * k, c, 2 * reach + 1, 1, 1)
    for (r, j), q in met.items():
        plain[r * k : (r + 1) * k, :, reach + q] = weight[:, :, j]
    return plain


def not_head(pool: nn.Module, head: nn.Module | None) -> str | None:
    """Why pools that can be frozen and what follows them do not make a FrozenHead; None if they do."""
    if head is None:
        return "no head follows it"
    if type(head) is not ResNetBasicHead:
        return f"{type(head).__name__} follows it, not a classification head"
    if head.pool is not None or cast(PoolConcatPathway, pool).retain_list:
        return "the head pools by itself"
    return not_linear(head)


def not_pools(block: nn.Module) -> str | None:
    """For a PoolConcatPathway."""
    return OBSERVED if any(is_observed(module) for module in block.modules()) else None


def not_roi_head(head: nn.Module) -> str | None:
    """For a head that takes boxes."""
    if type(head) is not ResNetRoIHead:
        return f"{type(head).__name__} is not a head that samples boxes"
    if head.roi_layer is None:
        return "the head samples no boxes"
    return not_linear(head)


def not_linear(head: nn.Module) -> str | None:
    """Why what a head does behind its pool does not make a FrozenHead."""
    known = cast("ResNetBasicHead | ResNetRoIHead", head)
    if type(known.proj) is not nn.Linear:
        return f"the head's projection is {type(known.proj).__name__}, not a plain Linear"
    average = known.output_pool
    if average is not None and not (
        type(average) is nn.AdaptiveAvgPool3d and _triple(average.output_size) == (1, 1, 1)
    ):
        return "the head's output_pool is not an average over all positions"
    dropout = known.dropout
    if dropout is not None and type(dropout) not in (nn.Dropout, nn.Dropout3d, nn.Identity):
        return f"the head's dropout is {type(dropout).__name__}"
    return OBSERVED if any(is_observed(module) for module in head.modules()) else None
