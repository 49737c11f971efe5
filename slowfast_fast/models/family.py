"""The family's two constructors, in the paper's terms: :func:`slowfast_network` and :func:`single_pathway`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..nn.bottleneck import create_basic_block, create_bottleneck_block
from ..nn.lateral import LateralBuilder
from ..nn.non_local import insert_non_local
from ._pathway import STAGE_DEPTHS, Inflation, inflated
from .resnet import create_resnet
from .slowfast import create_slowfast, create_slowfast_with_roi_head

BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
# Temporal kernels of the paper's Table 1: in the slow pathway in res4 and res5 only.
SLOW: tuple[Inflation, ...] = ("none", "none", "3x1x1", "3x1x1")
FAST: tuple[Inflation, ...] = ("3x1x1",) * 4


def slowfast_network(
    *,
    depth: int = 50,
    frames: int = 8,
    alpha: int = 4,
    beta: float = 1 / 8,
    width: int = 64,
    slow_inflation: Sequence[Inflation] = SLOW,
    fast_inflation: Sequence[Inflation] = FAST,
    lateral: str = "conv",
    lateral_kernel: int = 7,
    lateral_ratio: int = 2,
    lateral_join: str = "concat",
    lateral_direction: str = "fast_to_slow",
    lateral_norm: bool | None = None,
    lateral_activation: bool | None = None,
    non_local: Mapping[int, Iterable[int]] | None = None,
    non_local_kind: str = "dot_product",
    non_local_pool: Sequence[int] = (1, 2, 2),
    detection: bool = False,
    norm: Callable[..., nn.Module] | None = nn.BatchNorm3d,
    activation: Callable[..., nn.Module] | None = nn.ReLU,
    **stock: Any,
) -> nn.Module:
    """A SlowFast network: [slow (N, 3, frames, H, W), fast (N, 3, alpha * frames, H, W)] -> logits (N, classes).

    The defaults are R50 8x8. Which frames of a video the pathways see (tau) is not the network's matter.

    Args:
        depth: 18 and 34 have basic blocks; 50, 101, 152 and 200 bottlenecks.
        frames: of the slow pathway, which the head's average pools span.
        alpha, beta: frames and channels of the fast pathway over those of the slow one; 1 / beta must be whole.
        width: channels of the slow stem.
        slow_inflation, fast_inflation: for each stage, or each stage and block (repeated), what is inflated in time:
            "none"; "3x1x1": a bottleneck's first convolution, of a basic block the first one (3x3x3); or "3x3x3": a
            bottleneck's spatial convolution, of a basic block both.
        lateral, lateral_kernel, lateral_ratio, lateral_join, lateral_direction: the lateral connections, as ``kind``
            and so on of :class:`slowfast_fast.nn.lateral.LateralBuilder`.
        lateral_norm, lateral_activation: whether they have them; None: convolutions do, the others not.
        non_local, non_local_kind, non_local_pool: non-local blocks in the slow pathway, as ``places``, ``kind`` and
            ``pool`` of :func:`slowfast_fast.nn.non_local.insert_non_local`.
        detection: a network that takes boxes, as ``create_slowfast_with_roi_head``.
        stock: every other keyword of :func:`slowfast_fast.create_slowfast`; a ``fusion_builder`` is taken instead of
            what the ``lateral`` arguments say.

    Raises ValueError for arguments that do not exist or do not fit.
    """
    beta_inverse = _inverse(beta)
    depths, basic = _blocks(depth)
    (slow_a, slow_b), (fast_a, fast_b) = (inflated(stages, basic) for stages in (slow_inflation, fast_inflation))
    convolves = lateral == "conv"
    builder = LateralBuilder(
        alpha=alpha,
        beta_inverse=beta_inverse,
        kind=lateral,
        kernel=lateral_kernel,
        ratio=lateral_ratio,
        join=lateral_join,
        direction=lateral_direction,
        norm=norm if (convolves if lateral_norm is None else lateral_norm) else None,
        activation=activation if (convolves if lateral_activation is None else lateral_activation) else None,
        stages=len(depths),
    )
    size = 1 if detection else 7
    create = create_slowfast_with_roi_head if detection else create_slowfast
    arguments: dict[str, Any] = {
        "model_depth": depths,
        "bottleneck": create_basic_block if basic else create_bottleneck_block,
        "slowfast_channel_reduction_ratio": beta_inverse,
        "stem_dim_outs": (width, width // beta_inverse),
        "stage_conv_a_kernel_sizes": (slow_a, fast_a),
        "stage_conv_b_kernel_sizes": (slow_b, fast_b),
        "fusion_builder": builder,
        "head_pool_kernel_sizes": ((frames, size, size), (alpha * frames, size, size)),
        "norm": norm,
        "activation": activation,
    }
    model = create(**{**arguments, **stock})
    if non_local:
        body = model.model if detection else model
        insert_non_local(body, non_local, kind=non_local_kind, pool=non_local_pool, norm=norm)  # type: ignore[arg-type]
    return model


def single_pathway(
    *,
    depth: int = 50,
    frames: int = 8,
    width: int = 64,
    inflation: Sequence[Inflation] = SLOW,
    stem_frames: int = 1,
    non_local: Mapping[int, Iterable[int]] | None = None,
    non_local_kind: str = "dot_product",
    non_local_pool: Sequence[int] = (1, 2, 2),
    norm: Callable[..., nn.Module] | None = nn.BatchNorm3d,
    **stock: Any,
) -> nn.Module:
    """A network of one pathway: clip (N, 3, T, H, W) -> logits (N, classes). The defaults are Slow-only R50 8x8.

    Args:
        depth, width, inflation: as for :func:`slowfast_network`.
        frames: of the features before the head, which its average pool spans.
        stem_frames: the size in time of the stem's convolution.
        non_local, non_local_kind, non_local_pool: as for :func:`slowfast_network`.
        stock: every other keyword of :func:`slowfast_fast.create_resnet`.

    Raises ValueError for arguments that do not exist or do not fit.
    """
    depths, basic = _blocks(depth)
    kernels_a, kernels_b = inflated(inflation, basic)
    arguments: dict[str, Any] = {
        "model_depth": depths,
        "bottleneck": create_basic_block if basic else create_bottleneck_block,
        "stem_dim_out": width,
        "stem_conv_kernel_size": (stem_frames, 7, 7),
        "stage_conv_a_kernel_size": kernels_a,
        "stage_conv_b_kernel_size": kernels_b,
        "head_pool_kernel_size": (frames, 7, 7),
        "norm": norm,
    }
    model = create_resnet(**{**arguments, **stock})
    if non_local:
        insert_non_local(model, non_local, kind=non_local_kind, pool=non_local_pool, norm=norm)
    return model


def _inverse(beta: float) -> int:
    inverse = round(1 / beta) if beta > 0 else 0
    if inverse < 1 or abs(beta * inverse - 1) > 1e-6:
        raise ValueError(f"beta must be 1 over a whole number; got {beta!r}")
    return inverse


def _blocks(depth: int) -> tuple[tuple[int, ...], bool]:
    """How many blocks each stage has, and whether they are basic ones."""
    if depth in BASIC:
        return BASIC[depth], True
    if depth not in STAGE_DEPTHS:
        raise ValueError(f"depth must be one of 18, 34, 50, 101, 152, 200; got {depth!r}")
    return STAGE_DEPTHS[depth], False
