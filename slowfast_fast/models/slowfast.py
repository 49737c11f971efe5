"""SlowFast (Feichtenhofer et al., "SlowFast Networks for Video Recognition", ICCV 2019), as pytorchvideo builds it."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..nn.bottleneck import create_bottleneck_block
from ..nn.head import create_res_basic_head, create_res_roi_pooling_head, make_pool
from ..nn.lateral import FastToSlowFusionBuilder
from ..nn.net import DetectionBBoxNetwork, MultiPathWayWithFuse, Net, PoolConcatPathway
from ..nn.stem import create_res_basic_stem
from ._pathway import Module, Size, expansion, make_stage, stage_depths


def create_slowfast(
    *,
    slowfast_channel_reduction_ratio: int | Sequence[int] = (8,),
    slowfast_conv_channel_fusion_ratio: int = 2,
    slowfast_fusion_conv_kernel_size: Size = (7, 1, 1),
    slowfast_fusion_conv_stride: Size = (4, 1, 1),
    fusion_builder: Module | None = None,
    input_channels: Sequence[int] = (3, 3),
    model_depth: int | Sequence[int] = 50,
    model_num_class: int = 400,
    dropout_rate: float = 0.5,
    norm: Module | None = nn.BatchNorm3d,
    activation: Module | None = nn.ReLU,
    stem_function: Sequence[Module] = (create_res_basic_stem,) * 2,
    stem_dim_outs: Sequence[int] = (64, 8),
    stem_conv_kernel_sizes: Sequence[Size] = ((1, 7, 7), (5, 7, 7)),
    stem_conv_strides: Sequence[Size] = ((1, 2, 2), (1, 2, 2)),
    stem_pool: Module | Sequence[Module | None] | None = (nn.MaxPool3d,) * 2,
    stem_pool_kernel_sizes: Sequence[Size] = ((1, 3, 3), (1, 3, 3)),
    stem_pool_strides: Sequence[Size] = ((1, 2, 2), (1, 2, 2)),
    stage_conv_a_kernel_sizes: Sequence[Sequence[Size | Sequence[Size]]] = (
        ((1, 1, 1), (1, 1, 1), (3, 1, 1), (3, 1, 1)),
        ((3, 1, 1), (3, 1, 1), (3, 1, 1), (3, 1, 1)),
    ),
    stage_conv_b_kernel_sizes: Sequence[Sequence[Size | Sequence[Size]]] = (((1, 3, 3),) * 4,) * 2,
    stage_conv_b_num_groups: Sequence[Sequence[int]] = ((1, 1, 1, 1), (1, 1, 1, 1)),
    stage_conv_b_dilations: Sequence[Sequence[Size]] = (((1, 1, 1),) * 4,) * 2,
    stage_spatial_strides: Sequence[Sequence[int]] = ((1, 2, 2, 2), (1, 2, 2, 2)),
    stage_temporal_strides: Sequence[Sequence[int]] = ((1, 1, 1, 1), (1, 1, 1, 1)),
    bottleneck: Module | Sequence[Sequence[Module]] = ((create_bottleneck_block,) * 4,) * 2,
    head: Module | None = create_res_basic_head,
    head_pool: Module | None = nn.AvgPool3d,
    head_pool_kernel_sizes: Sequence[Size] = ((8, 7, 7), (32, 7, 7)),
    head_output_size: Sequence[int] = (1, 1, 1),
    head_activation: Module | None = None,
    head_output_with_global_average: bool = True,
) -> nn.Module:
    """A SlowFast classifier: [slow (N, 3, T, H, W), fast (N, 3, alpha * T, H, W)] -> logits (N, model_num_class).

    Keywords, defaults, module tree, ``state_dict`` and numbers are those of
    ``pytorchvideo.models.slowfast.create_slowfast`` 0.1.5; with the same seed so are the initial weights. Sizes are (T,
    H, W). Tuples of tuples are indexed by pathway (slow first), then by stage.

    Args:
        slowfast_channel_reduction_ratio: channels of the slow pathway over those of each further one (1 / beta).
        slowfast_conv_channel_fusion_ratio: channels that a lateral connection makes, over those of the fast pathway.
        slowfast_fusion_conv_kernel_size, slowfast_fusion_conv_stride: of the lateral convolutions; the stride is
            (alpha, 1, 1).
        fusion_builder: called with ``fusion_dim_in`` and ``stage_idx`` for the stem (0) and each stage, in place of the
            lateral connections that the arguments above describe; gives a module that maps a list of pathways to a
            list. If it has an attribute ``extra_channels``, that is called with ``fusion_dim_in`` and gives the
            channels that each pathway gains; else the slow one gains what ``slowfast_conv_channel_fusion_ratio`` says.
        input_channels: one for each pathway.
        model_depth: 18, 50, 101, 152 or 200; 18 means one bottleneck a stage. Or the number of blocks of each stage.
        dropout_rate: before the projection; 0 leaves the dropout out.
        norm: called with ``num_features``, ``eps`` and ``momentum``; None: no norms.
        activation: called with nothing; None: no activations.
        stem_function: one for each pathway, called as ``create_res_basic_stem`` is.
        stem_dim_outs: channels of each pathway's stem; every stage doubles them, the first one times 4 (of a
            ``bottleneck`` with an attribute ``expansion``: times that).
        stem_pool: for all pathways or one for each; None: no pool.
        stage_conv_a_kernel_sizes, stage_conv_b_kernel_sizes: of a stage's temporal and spatial convolutions, or a
            sequence of them to repeat over its blocks.
        stage_conv_b_dilations: of the spatial convolutions; where above 1 it is their padding, too.
        bottleneck: for all stages, or one for each pathway and stage; called with every keyword of
            ``create_bottleneck_block``.
        head: called with the keywords ``in_features``, ``out_features``, ``pool`` (None), ``output_size``,
            ``dropout_rate``, ``activation`` and ``output_with_global_average``; None: the network ends with the
            concatenated features.
        head_pool: ``nn.AdaptiveAvgPool3d`` (of ``head_output_size``), or a pool that takes ``head_pool_kernel_sizes``,
            stride and padding; None: no pool.

    Raises ValueError for a depth that does not exist, for arguments with too few pathways, and for channels that do not
    divide.
    """
    pathways = len(input_channels)
    depths = stage_depths(model_depth)
    if isinstance(slowfast_channel_reduction_ratio, int):
        slowfast_channel_reduction_ratio = (slowfast_channel_reduction_ratio,)
    if stem_pool is None or callable(stem_pool):
        stem_pool = (stem_pool,) * pathways
    if callable(bottleneck):
        bottleneck = ((bottleneck,) * len(depths),) * pathways
    for name, values, needed in (
        ("slowfast_channel_reduction_ratio", slowfast_channel_reduction_ratio, max(1, pathways - 1)),
        ("stem_function", stem_function, pathways),
        ("stem_dim_outs", stem_dim_outs, pathways),
        ("stem_pool", stem_pool, pathways),
        ("stage_conv_a_kernel_sizes", stage_conv_a_kernel_sizes, pathways),
        ("bottleneck", bottleneck, pathways),
    ):
        if len(values) < needed:
            raise ValueError(f"{name} must have {needed} entries for {pathways} input_channels; got {len(values)}")
    # Each pathway's width is a fixed fraction of the slow one's.
    reductions = (1, *slowfast_channel_reduction_ratio)
    beta_inverse = reductions[1]
    expand = expansion(bottleneck)
    if fusion_builder is None:
        widths = [stem_dim_outs[0], *(stem_dim_outs[0] * expand * 2**stage for stage in range(len(depths) - 1))]
        _check_widths(stem_dim_outs[:pathways], reductions, slowfast_conv_channel_fusion_ratio, widths)
        fusion_builder = FastToSlowFusionBuilder(
            slowfast_channel_reduction_ratio=beta_inverse,
            conv_fusion_channel_ratio=slowfast_conv_channel_fusion_ratio,
            conv_kernel_size=slowfast_fusion_conv_kernel_size,
            conv_stride=slowfast_fusion_conv_stride,
            norm=norm,
            activation=activation,
            max_stage_idx=len(depths) - 1,
        ).create_module

    stems = [
        stem_function[pathway](
            in_channels=input_channels[pathway],
            out_channels=stem_dim_outs[pathway],
            conv_kernel_size=stem_conv_kernel_sizes[pathway],
            conv_stride=stem_conv_strides[pathway],
            conv_padding=[size // 2 for size in stem_conv_kernel_sizes[pathway]],
            pool=stem_pool[pathway],
            pool_kernel_size=stem_pool_kernel_sizes[pathway],
            pool_stride=stem_pool_strides[pathway],
            pool_padding=[size // 2 for size in stem_pool_kernel_sizes[pathway]],
            norm=norm,
            activation=activation,
        )
        for pathway in range(pathways)
    ]
    dim_in = stem_dim_outs[0]
    blocks: list[nn.Module] = [
        MultiPathWayWithFuse(
            multipathway_blocks=nn.ModuleList(stems),
            multipathway_fusion=fusion_builder(fusion_dim_in=dim_in, stage_idx=0),
        )
    ]
    dim_out = dim_in * expand
    gained = getattr(fusion_builder, "extra_channels", None)
    for stage, depth in enumerate(depths):
        lateral = _lateral_channels(dim_in, slowfast_conv_channel_fusion_ratio, beta_inverse)
        extra = (lateral, *(0 for _ in reductions[1:])) if gained is None else gained(dim_in)
        stages = [
            make_stage(
                depth=depth,
                dim_in=dim_in // reductions[pathway] + extra[pathway],
                dim_inner=dim_out // expand // reductions[pathway],
                dim_out=dim_out // reductions[pathway],
                bottleneck=bottleneck[pathway][stage],
                kernel_a=stage_conv_a_kernel_sizes[pathway][stage],
                kernel_b=stage_conv_b_kernel_sizes[pathway][stage],
                groups_b=stage_conv_b_num_groups[pathway][stage],
                dilation_b=stage_conv_b_dilations[pathway][stage],
                stride=(stage_temporal_strides[pathway][stage], *(stage_spatial_strides[pathway][stage],) * 2),
                norm=norm,
                activation=activation,
            )
            for pathway in range(pathways)
        ]
        blocks.append(
            MultiPathWayWithFuse(
                multipathway_blocks=nn.ModuleList(stages),
                multipathway_fusion=fusion_builder(fusion_dim_in=dim_out, stage_idx=stage + 1),
            )
        )
        dim_in, dim_out = dim_out, dim_out * 2

    pools = None
    if head_pool is not None:
        pools = nn.ModuleList(
            make_pool(head_pool, head_output_size[pathway], head_pool_kernel_sizes[pathway], (1, 1, 1), (0, 0, 0))
            for pathway in range(pathways)
        )
    blocks.append(PoolConcatPathway(pool=pools))
    if head is not None:
        blocks.append(
            head(
                in_features=sum(dim_in // reduction for reduction in reductions),
                out_features=model_num_class,
                pool=None,
                output_size=head_output_size,
                dropout_rate=dropout_rate,
                activation=head_activation,
                output_with_global_average=head_output_with_global_average,
            )
        )
    return Net(blocks=nn.ModuleList(blocks))


def create_slowfast_with_roi_head(
    *,
    model_depth: int | Sequence[int] = 50,
    model_num_class: int = 80,
    dropout_rate: float = 0.5,
    stem_dim_outs: Sequence[int] = (64, 8),
    slowfast_channel_reduction_ratio: int | Sequence[int] = (8,),
    stage_conv_b_dilations: Sequence[Sequence[Size]] = (((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 2, 2)),) * 2,
    stage_spatial_strides: Sequence[Sequence[int]] = ((1, 2, 2, 1), (1, 2, 2, 1)),
    head: Module = create_res_roi_pooling_head,
    head_pool_kernel_sizes: Sequence[Size] = ((8, 1, 1), (32, 1, 1)),
    head_output_size: Sequence[int] = (1, 1, 1),
    head_activation: Module | None = nn.Sigmoid,
    head_output_with_global_average: bool = False,
    head_spatial_resolution: Sequence[int] = (7, 7),
    head_spatial_scale: float = 1.0 / 16.0,
    head_sampling_ratio: int = 0,
    **slowfast: Any,
) -> nn.Module:
    """A SlowFast detector: [slow, fast] and boxes (B, 5) of (clip, x1, y1, x2, y2) -> scores (B, model_num_class).

    Keywords, defaults, module tree, ``state_dict`` and numbers are those of
    ``pytorchvideo.models.slowfast.create_slowfast_with_roi_head`` 0.1.5, except that ``fusion_builder``,
    ``stem_function``, ``bottleneck`` and ``head`` are honoured; pytorchvideo accepts and ignores them.

    Args:
        head: called with ``in_features``, ``out_features``, ``pool`` (None), ``output_size``, ``dropout_rate``,
            ``activation``, ``output_with_global_average``, ``resolution``, ``spatial_scale`` and ``sampling_ratio``.
        head_spatial_resolution: (H, W) that each box is sampled to.
        head_spatial_scale: factor from box coordinates (pixels of the input) to feature coordinates.
        head_sampling_ratio: samples per output value and direction; 0 takes as many as the box is wide.
        slowfast: every other keyword of ``create_slowfast``.
    """
    model = create_slowfast(
        model_depth=model_depth,
        stem_dim_outs=stem_dim_outs,
        slowfast_channel_reduction_ratio=slowfast_channel_reduction_ratio,
        stage_conv_b_dilations=stage_conv_b_dilations,
        stage_spatial_strides=stage_spatial_strides,
        head=None,
        head_pool_kernel_sizes=head_pool_kernel_sizes,
        head_output_size=head_output_size,
        **slowfast,
    )
    if isinstance(slowfast_channel_reduction_ratio, int):
        slowfast_channel_reduction_ratio = (slowfast_channel_reduction_ratio,)
    expand = expansion(slowfast.get("bottleneck", create_bottleneck_block))
    slow_features = stem_dim_outs[0] * expand * 2 ** (len(stage_depths(model_depth)) - 1)
    return DetectionBBoxNetwork(
        model,
        head(
            in_features=sum(slow_features // reduction for reduction in (1, *slowfast_channel_reduction_ratio)),
            out_features=model_num_class,
            pool=None,
            output_size=head_output_size,
            dropout_rate=dropout_rate,
            activation=head_activation,
            output_with_global_average=head_output_with_global_average,
            resolution=head_spatial_resolution,
            spatial_scale=head_spatial_scale,
            sampling_ratio=head_sampling_ratio,
        ),
    )


def _check_widths(
    stem_dim_outs: Sequence[int], reductions: Sequence[int], fusion_ratio: float, widths: Sequence[int]
) -> None:
    """Raises ValueError where a stem or a lateral connection would not give the channels that the next stage takes."""
    slow = stem_dim_outs[0]
    for pathway, (width, reduction) in enumerate(zip(stem_dim_outs, reductions, strict=False)):
        if width != slow // reduction:
            raise ValueError(
                f"stem_dim_outs[{pathway}] must be stem_dim_outs[0] // slowfast_channel_reduction_ratio[{pathway - 1}] "
                f"= {slow // reduction}; got {width}"
            )
    for width in widths:
        given = int(width // reductions[1] * fusion_ratio)
        taken = _lateral_channels(width, fusion_ratio, reductions[1])
        if given != taken:
            raise ValueError(
                f"slowfast_conv_channel_fusion_ratio {fusion_ratio} and slowfast_channel_reduction_ratio "
                f"{reductions[1]} do not fit {width} channels: the lateral connection would give {given}, the stage "
                f"after it take {taken}"
            )


def _lateral_channels(slow_channels: int, fusion_ratio: float, reduction: int) -> int:
    return int(slow_channels * fusion_ratio // reduction)
