"""One mechanism for every convolution: run it with its BatchNorm, residual and ReLU as one op, or call the modules.

The choice is made anew at every forward from what the modules are at that moment, because training code changes them:
precise BN hangs hooks on norms and replaces their buffers, ``convert_sync_batchnorm`` swaps their class, freezing flips
one layer's mode. An op stands in only where nobody could tell the difference; everything else runs as module calls, and
``explain()`` shows the reason.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import ops
from ..backend import forced
from ..explanation import note, recording
from ..ops._batch_norm import BatchNorm
from ..ops._common import wants_gradient
from ..ops.spatial_conv import SPATIAL_FROM, SPATIAL_GEOMETRY

# Whether 1x1x1 convolutions run on ops.temporal_conv too, rather than on PyTorch's own kernels: their norm, sum and
# ReLU then cost no pass of their own, and the network keeps to channels_last_3d.
FUSE_POINTWISE = True

SPATIAL_KERNEL = "spatial kernel"

Parts = tuple[nn.Module, nn.Module | None, nn.Module | None]  # a convolution, its norm and its activation
Step = Parts | nn.Module  # a module is called as it is


def conv_norm_act(
    x: Tensor, conv: nn.Module, norm: nn.Module | None, act: nn.Module | None, residual: Tensor | None = None
) -> Tensor:
    """``act(norm(conv(x)) + residual)``, on ``ops.temporal_conv`` or ``temporal_conv_bn`` where that gives the same.

    Args:
        x: (N, C, T, H, W).
        conv: the convolution; a plain ``nn.Conv3d`` with a (kt, 1, 1) kernel can be fused.
        norm: a plain ``nn.BatchNorm3d`` or None can be fused; its mode, momentum and buffers are read now.
        act: a plain ``nn.ReLU`` or None can be fused.
        residual: added before ``act``; the shape of the result.
    """
    reason = _not_temporal(conv) or modules_needed(conv, norm, act)
    if reason == SPATIAL_KERNEL and evaluates_by_winograd(x, cast(nn.Conv3d, conv), norm, act):
        if recording():
            note((conv, norm, act), "spatial_conv")
        weight, shift = _folded(x, cast(nn.Conv3d, conv), norm)
        return ops.spatial_conv(x, weight, shift, residual, relu=not _absent(act))
    if recording():
        _note("temporal_conv", conv, norm, act, reason)
    if reason is not None:
        return _call_modules(x, conv, norm, act, residual)
    plain = cast(nn.Conv3d, conv)
    return _call_op(
        ops.temporal_conv,
        ops.temporal_conv_bn,
        (x, plain.weight),
        plain,
        norm,
        residual=residual,
        stride=int(plain.stride[0]),  # pytorchvideo's convolutions hold numpy's integers
        padding=int(plain.padding[0]),
        dilation=int(plain.dilation[0]),
        relu=not _absent(act),
    )


def conv_norm_act_concat(
    slow: Tensor, fast: Tensor, conv: nn.Module, norm: nn.Module | None, act: nn.Module | None
) -> Tensor:
    """``cat([slow, act(norm(conv(fast)))], 1)``, on ``ops.lateral_concat`` or ``lateral_concat_bn`` where possible.

    Args:
        slow: (N, C_slow, T, H, W).
        fast: (N, C_fast, alpha * T, H, W) for a convolution with stride (alpha, 1, 1).
        conv, norm, act: as for ``conv_norm_act``.
    """
    reason = _not_lateral(conv) or modules_needed(conv, norm, act)
    if recording():
        _note("lateral_concat", conv, norm, act, reason)
    if reason is not None:
        return torch.cat([slow, _call_modules(fast, conv, norm, act)], 1)
    plain = cast(nn.Conv3d, conv)
    return _call_op(
        ops.lateral_concat,
        ops.lateral_concat_bn,
        (slow, fast, plain.weight),
        plain,
        norm,
        alpha=int(plain.stride[0]),
        padding=int(plain.padding[0]),
        relu=not _absent(act),
    )


def run_step(step: Step, x: Tensor) -> Tensor:
    """A layer by ``conv_norm_act``, any other module by calling it."""
    return conv_norm_act(x, *step) if isinstance(step, tuple) else step(x)


def residual(x: Tensor, branch: Sequence[Step], shortcut: Tensor, act: nn.Module | None) -> Tensor:
    """``act(shortcut + branch(x))``; the sum and the activation go into the kernel of the branch's last layer.

    Args:
        x: (N, C, T, H, W).
        branch: what is done to ``x``, in order.
        shortcut: of the shape that ``branch`` gives.
        act: may be None.
    """
    *first, last = branch
    for step in first:
        x = run_step(step, x)
    if isinstance(last, tuple) and _absent(last[2]):
        return conv_norm_act(x, last[0], last[1], act, residual=shortcut)
    x = shortcut + run_step(last, x)
    return x if act is None else act(x)


def modules_needed(conv: nn.Module, norm: nn.Module | None, act: nn.Module | None) -> str | None:
    """Why (conv, norm, act) must run as module calls; None where an op has the same result and side effects."""
    if type(conv) is nn.Conv3d and not_in_time(conv) is not None:
        return not_in_time(conv)
    return not_fusable(conv, norm, act)


def evaluates_by_winograd(x: Tensor, conv: nn.Conv3d, norm: nn.Module | None, act: nn.Module | None) -> bool:
    """Whether a spatial layer runs on ``ops.spatial_conv``: in float32 on the CPU, where no gradient is wanted and no
    statistics of the batch."""
    return (
        x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and min(conv.in_channels, conv.out_channels) >= SPATIAL_FROM
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == SPATIAL_GEOMETRY
        and forced() in ("auto", "cpu")
        and not (of_batch(norm) or wants_gradient(x, conv.weight, conv.bias, *_affine(norm)))
        and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        and not_fusable(conv, norm, act) is None
    )


def _affine(norm: nn.Module | None) -> tuple[Tensor | None, ...]:
    return (norm.weight, norm.bias) if isinstance(norm, nn.BatchNorm3d) else ()


def _folded(x: Tensor, conv: nn.Conv3d, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and shift with the norm's fixed statistics in them."""
    if not isinstance(norm, nn.BatchNorm3d):
        return conv.weight, conv.bias
    scale, shift = BatchNorm(**_batch_norm(norm, conv.bias)).fold(x)
    return conv.weight * scale.view(-1, 1, 1, 1, 1), shift


def not_in_time(conv: nn.Conv3d) -> str | None:
    """Why a convolution is not one along T alone."""
    if conv.kernel_size[1:] != (1, 1):
        return SPATIAL_KERNEL
    if conv.stride[1:] != (1, 1):
        return "spatial stride"
    if isinstance(conv.padding, str) or conv.padding[1:] != (0, 0):
        return f"padding {conv.padding}"
    return None


def not_fusable(conv: nn.Module, norm: nn.Module | None, act: nn.Module | None) -> str | None:
    """What but its geometry keeps a layer from an op."""
    if type(conv) is not nn.Conv3d:
        return f"{type(conv).__name__} is not a plain Conv3d"
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode}"
    if conv.bias is not None and type(norm) is nn.BatchNorm3d and of_batch(norm):
        return "convolution bias under batch statistics"
    return not_plain(conv, norm, act)


def not_plain(
    conv: nn.Module, norm: nn.Module | None, act: nn.Module | None, pool: nn.Module | None = None
) -> str | None:
    """Why a convolution, its norm or its activation is another module than the ops know, or one of the four shows to
    someone that it is called; None where neither is so."""
    if type(conv) is not nn.Conv3d:
        return f"{type(conv).__name__} is not a plain Conv3d"
    if not _absent(norm) and type(norm) is not nn.BatchNorm3d:
        return f"{type(norm).__name__} is not a plain BatchNorm3d"
    if not _absent(act) and type(act) is not nn.ReLU:
        return f"{type(act).__name__} is not a plain ReLU"
    if has_global_hooks():
        return "process-global module hooks"
    for module in (conv, norm, act, pool):
        if module is not None and is_observed(module):
            return f"{type(module).__name__} carries hooks, a forward of its own or a compiled call"
    return None


def of_batch(norm: nn.Module | None) -> bool:
    """Whether ``norm`` is a BatchNorm3d that takes the statistics of the batch."""
    return isinstance(norm, nn.BatchNorm3d) and (norm.training or norm.running_mean is None)


def is_observed(module: nn.Module) -> bool:
    """Whether calling ``module`` does, or shows to someone, more than its class's ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def has_global_hooks() -> bool:
    """Whether hooks watch all modules of the process; the one by which ``explain()`` lists what ran does not count."""
    return bool(
        len(torch_module._global_forward_hooks) > (1 if recording() else 0)
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _absent(module: nn.Module | None) -> bool:
    # nn.Identity is what torch.nn.utils.fuse_conv_bn_eval and head surgery leave behind.
    return module is None or type(module) is nn.Identity


def _not_temporal(conv: nn.Module) -> str | None:
    if not FUSE_POINTWISE and type(conv) is nn.Conv3d and conv.kernel_size == (1, 1, 1):
        return "pointwise convolution"
    return None


def _not_lateral(conv: nn.Module) -> str | None:
    if type(conv) is nn.Conv3d and conv.dilation[0] != 1:
        return f"dilation {conv.dilation[0]} in T"
    return None


def _call_modules(
    x: Tensor, conv: nn.Module, norm: nn.Module | None, act: nn.Module | None, residual: Tensor | None = None
) -> Tensor:
    x = conv(x)
    if norm is not None:
        x = norm(x)
    if residual is not None:
        x = residual + x
    return x if act is None else act(x)


def _call_op(
    op: Callable[..., Tensor],
    op_bn: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    conv: nn.Conv3d,
    norm: nn.Module | None,
    **arguments: Any,
) -> Tensor:
    """``op`` without a norm, ``op_bn`` with one."""
    if norm is None or _absent(norm):
        return op(*tensors, shift=conv.bias, **arguments)
    return op_bn(*tensors, **_batch_norm(cast(nn.BatchNorm3d, norm), conv.bias), **arguments)


def _batch_norm(norm: nn.BatchNorm3d, bias: Tensor | None) -> dict[str, Any]:
    """The arguments of a ``*_bn`` op that make it compute what ``norm.forward`` would compute now."""
    counts = norm.training and norm.track_running_stats
    buffers = counts or not norm.training
    mean = norm.running_mean if buffers else None
    counter = norm.num_batches_tracked if counts else None
    if bias is not None and mean is not None:
        # norm(conv + bias) with fixed statistics is norm(conv) with the mean moved by -bias, in the accumulation dtype.
        wide = torch.promote_types(mean.dtype, torch.float32)
        mean = mean.to(wide) - bias.to(wide)
    return {
        "gamma": norm.weight,
        "beta": norm.bias,
        "running_mean": mean,
        "running_var": norm.running_var if buffers else None,
        "num_batches_tracked": counter,
        # Without a counter nn.BatchNorm3d turns a cumulative average into no update at all.
        "momentum": 0.0 if norm.momentum is None and counter is None else norm.momentum,
        "eps": norm.eps,
        "training": of_batch(norm),
    }


def _note(op: str, conv: nn.Module, norm: nn.Module | None, act: nn.Module | None, reason: str | None) -> None:
    """Tells explain() what comes next: an op, or for a reason the modules."""
    if reason is not None:
        note((conv, norm, act), None, reason)
    else:
        note((conv, norm, act), op if _absent(norm) else f"{op}_bn")
