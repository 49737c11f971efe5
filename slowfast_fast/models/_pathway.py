"""What every constructor of the family shares: how deep a ResNet is, and how a stage is described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import nn

from ..nn.stage import create_res_stage

Module = Callable[..., nn.Module]
Size = tuple[int, int, int]  # (T, H, W)

# Blocks of res2 to res5. 18 is what pytorchvideo means by it.
STAGE_DEPTHS = {18: (1, 1, 1, 1), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


def stage_depths(model_depth: int | Sequence[int]) -> tuple[int, ...]:
    """The number of blocks of each stage. Raises ValueError for a depth that does not exist."""
    if not isinstance(model_depth, int):
        depths = tuple(model_depth)
        if not depths or not all(isinstance(depth, int) and depth > 0 for depth in depths):
            raise ValueError(f"model_depth must have a number of blocks from 1 for each stage; got {model_depth!r}")
        return depths
    if model_depth not in STAGE_DEPTHS:
        known = ", ".join(map(str, STAGE_DEPTHS))
        raise ValueError(f"model_depth must be one of {known}, or the blocks of each stage; got {model_depth!r}")
    return STAGE_DEPTHS[model_depth]


def expansion(block: Module | Sequence[Module] | Sequence[Sequence[Module]]) -> int:
    """The width of a stage over the width inside of its blocks, which one or several callables make. Raises ValueError
    where they differ in it."""
    found = {getattr(block, "expansion", 4)} if callable(block) else {expansion(part) for part in block}
    if len(found) > 1:
        raise ValueError(f"all blocks of a network must widen by the same factor; got factors {sorted(found)}")
    return found.pop()


def make_stage(
    *,
    depth: int,
    dim_in: int,
    dim_inner: int,
    dim_out: int,
    bottleneck: Module,
    kernel_a: Size | Sequence[Size],
    kernel_b: Size | Sequence[Size],
    groups_b: int,
    dilation_b: Size,
    stride: Size,
    norm: Module | None,
    activation: Module | None,
) -> nn.Module:
    """One pathway's stage of ``depth`` blocks.

    Args:
        kernel_a, kernel_b: of the temporal and the spatial convolutions, for all blocks or to repeat over them. Their
            padding keeps the size, except that a dilation above 1 is the padding.
        stride: (T, H, W), of the first block: in T of the temporal convolution, in H and W of the spatial one.
    """

    def padded(kernel: Size) -> tuple[int, ...]:
        sizes = zip(dilation_b[1:], kernel[1:], strict=True)
        return (kernel[0] // 2, *(dilation if dilation > 1 else size // 2 for dilation, size in sizes))

    return create_res_stage(
        depth=depth,
        dim_in=dim_in,
        dim_inner=dim_inner,
        dim_out=dim_out,
        bottleneck=bottleneck,
        conv_a_kernel_size=kernel_a,
        conv_a_stride=(stride[0], 1, 1),
        conv_a_padding=_of_each(kernel_a, lambda kernel: tuple(size // 2 for size in kernel)),
        conv_b_kernel_size=kernel_b,
        conv_b_stride=(1, *stride[1:]),
        conv_b_padding=_of_each(kernel_b, padded),
        conv_b_num_groups=groups_b,
        conv_b_dilation=dilation_b,
        norm=norm,
        activation=activation,
    )


def _of_each(
    kernel: Size | Sequence[Size], padding: Callable[[Size], tuple[int, ...]]
) -> tuple[int, ...] | list[tuple[int, ...]]:
    if isinstance(kernel[0], int):
        return padding(cast(Size, kernel))
    return [padding(size) for size in cast(Sequence[Size], kernel)]


# What a block's convolutions have in time: those of conv_a and conv_b in a bottleneck, and in a basic block.
INFLATIONS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "none": ((1, 1), (1, 1)),
    "3x1x1": ((3, 1), (3, 1)),
    "3x3x3": ((1, 3), (3, 3)),
}
Inflation = str | Sequence[str]  # of all blocks of a stage, or to repeat over them


def inflated(stages: Sequence[Inflation], basic: bool) -> tuple[list[list[Size]], list[list[Size]]]:
    """The kernel sizes of conv_a and of conv_b, for each stage and block. Raises ValueError for another inflation."""
    kernels: tuple[list[list[Size]], list[list[Size]]] = ([], [])
    for stage in stages:
        names = [stage] if isinstance(stage, str) else list(stage)
        unknown = [name for name in names if name not in INFLATIONS]
        if unknown or not names:
            raise ValueError(f"inflation must be of {', '.join(INFLATIONS)}, for a stage or its blocks; got {stage!r}")
        times = [INFLATIONS[name][basic] for name in names]
        kernels[0].append([(kt, 1, 1) for kt, _ in times])
        kernels[1].append([(kt, 3, 3) for _, kt in times])
    return kernels
