"""Networks of one pathway, as pytorchvideo builds them: Slow-only, Fast-only, I3D ResNet and C2D."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from ..nn.bottleneck import create_bottleneck_block
from ..nn.head import create_res_basic_head
from ..nn.net import Net
from ..nn.stem import create_res_basic_stem
from ._pathway import Module, Size, expansion, make_stage, stage_depths


def create_resnet(
    *,
    input_channel: int = 3,
    model_depth: int | Sequence[int] = 50,
    model_num_class: int = 400,
    dropout_rate: float = 0.5,
    norm: Module | None = nn.BatchNorm3d,
    activation: Module | None = nn.ReLU,
    stem_dim_out: int = 64,
    stem_conv_kernel_size: Size = (3, 7, 7),
    stem_conv_stride: Size = (1, 2, 2),
    stem_pool: Module | None = nn.MaxPool3d,
    stem_pool_kernel_size: Size = (1, 3, 3),
    stem_pool_stride: Size = (1, 2, 2),
    stem: Module = create_res_basic_stem,
    stage1_pool: Module | None = None,
    stage1_pool_kernel_size: Size = (2, 1, 1),
    stage_conv_a_kernel_size: Size | Sequence[Size | Sequence[Size]] = ((1, 1, 1), (1, 1, 1), (3, 1, 1), (3, 1, 1)),
    stage_conv_b_kernel_size: Size | Sequence[Size | Sequence[Size]] = ((1, 3, 3), (1, 3, 3), (1, 3, 3), (1, 3, 3)),
    stage_conv_b_num_groups: Sequence[int] = (1, 1, 1, 1),
    stage_conv_b_dilation: Size | Sequence[Size] = ((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    stage_spatial_h_stride: Sequence[int] = (1, 2, 2, 2),
    stage_spatial_w_stride: Sequence[int] = (1, 2, 2, 2),
    stage_temporal_stride: Sequence[int] = (1, 1, 1, 1),
    bottleneck: Module | Sequence[Module] = create_bottleneck_block,
    head: Module | None = create_res_basic_head,
    head_pool: Module | None = nn.AvgPool3d,
    head_pool_kernel_size: Size = (4, 7, 7),
    head_output_size: Sequence[int] = (1, 1, 1),
    head_activation: Module | None = None,
    head_output_with_global_average: bool = True,
) -> nn.Module:
    """A classifier of one pathway: clip (N, input_channel, T, H, W) -> logits (N, model_num_class).

    Keywords, defaults, module tree, ``state_dict`` and numbers are those of
    ``pytorchvideo.models.resnet.create_resnet`` 0.1.5; with the same seed so are the initial weights. Sizes are (T, H,
    W). The keywords are those of :func:`slowfast_fast.create_slowfast` for one pathway; beside them:

    Args:
        stem_conv_stride, stem_pool_stride: may stride in T, too, as I3D's do.
        stage1_pool: behind res2, called with ``stage1_pool_kernel_size`` as kernel and stride; None: no pool.
        bottleneck: for all stages, or one for each.
        head_pool: ``nn.AdaptiveAvgPool3d`` (of ``head_output_size``), or a pool that takes ``head_pool_kernel_size``.

    Raises ValueError for a depth that does not exist.
    """
    depths = stage_depths(model_depth)
    blocks_of = (bottleneck,) * len(depths) if callable(bottleneck) else bottleneck
    kernels_a, kernels_b, dilations_b = (
        (sizes,) * len(depths) if isinstance(sizes[0], int) else sizes
        for sizes in (stage_conv_a_kernel_size, stage_conv_b_kernel_size, stage_conv_b_dilation)
    )
    blocks = [
        stem(
            in_channels=input_channel,
            out_channels=stem_dim_out,
            conv_kernel_size=stem_conv_kernel_size,
            conv_stride=stem_conv_stride,
            conv_padding=[size // 2 for size in stem_conv_kernel_size],
            pool=stem_pool,
            pool_kernel_size=stem_pool_kernel_size,
            pool_stride=stem_pool_stride,
            pool_padding=[size // 2 for size in stem_pool_kernel_size],
            norm=norm,
            activation=activation,
        )
    ]
    expand = expansion(bottleneck)
    dim_in, dim_out = stem_dim_out, stem_dim_out * expand
    for stage, depth in enumerate(depths):
        blocks.append(
            make_stage(
                depth=depth,
                dim_in=dim_in,
                dim_inner=dim_out // expand,
                dim_out=dim_out,
                bottleneck=blocks_of[stage],
                kernel_a=cast("Size | Sequence[Size]", kernels_a[stage]),
                kernel_b=cast("Size | Sequence[Size]", kernels_b[stage]),
                groups_b=stage_conv_b_num_groups[stage],
                dilation_b=cast(Size, dilations_b[stage]),
                stride=(stage_temporal_stride[stage], stage_spatial_h_stride[stage], stage_spatial_w_stride[stage]),
                norm=norm,
                activation=activation,
            )
        )
        dim_in, dim_out = dim_out, dim_out * 2
        if stage == 0 and stage1_pool is not None:
            size = stage1_pool_kernel_size
            blocks.append(stage1_pool(kernel_size=size, stride=size, padding=(0, 0, 0)))
    if head is not None:
        blocks.append(
            head(
                in_features=dim_in,
                out_features=model_num_class,
                pool=head_pool,
                output_size=head_output_size,
                pool_kernel_size=head_pool_kernel_size,
                dropout_rate=dropout_rate,
                activation=head_activation,
                output_with_global_average=head_output_with_global_average,
            )
        )
    return Net(blocks=nn.ModuleList(blocks))
