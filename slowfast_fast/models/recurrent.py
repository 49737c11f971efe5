"""A SlowFast whose pathways are 2-D: residual blocks on few frames, a bidirectional ConvLSTM over many."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..nn.bottleneck import create_basic_block
from ..nn.conv_lstm import ConvLSTM
from ..nn.head import create_res_basic_head
from ..nn.net import MultiPathWayWithFuse, Net, PoolConcatPathway
from ..nn.stem import create_res_basic_stem
from ._pathway import Module, make_stage
from .registry import Recipe, register

SHARING = ("none", "same_level", "across_levels")


@register(frames=8, tau=8, alpha=4, recipe=Recipe(batch=32, lr=1e-4, weight_decay=1e-4, epochs=100))
def slowfast_convlstm(
    *,
    depths: Sequence[int] = (2, 2, 2, 2),
    width: int = 64,
    beta: float = 1 / 4,
    growth: int = 2,
    kernel: int = 3,
    share: str = "none",
    model_num_class: int = 400,
    dropout_rate: float = 0.5,
    head_pool: Module = nn.AdaptiveAvgPool3d,
) -> nn.Module:
    """SlowFast of 2-D residual blocks and a bidirectional ConvLSTM.

    [slow (N, 3, T, H, W), fast (N, 3, alpha * T, H, W)] -> logits (N, classes), for any T, alpha, H and W. A level is
    half as high and wide as the one before. The slow pathway has basic residual blocks (ResNet-18's) on each of its
    frames; the fast one the same, narrower, and behind those of each level a ConvLSTM over its frames. What both find
    is averaged over positions and concatenated before one classifier, so that a loss on its logits trains both.

    Args:
        depths: residual blocks of each level.
        width: channels of the slow pathway's first level.
        beta: channels of the fast pathway over those of the slow one; half of them are a direction of the ConvLSTM.
        growth: factor of the channels from level to level.
        kernel: of the ConvLSTM.
        share: which convolutions are the same weights (norms never are). "none"; "same_level": the residual blocks of
            both pathways at each level, which needs beta = 1; "across_levels": these, and those of all levels, and the
            ConvLSTMs of all levels, which needs growth = 1 as well.
        model_num_class, dropout_rate: as for ``create_slowfast``.
        head_pool: of each pathway, called with the output size, 1.

    Raises ValueError for arguments that do not exist or do not fit.
    """
    if share not in SHARING:
        raise ValueError(f"share must be one of {', '.join(SHARING)}; got {share!r}")
    if share != "none" and beta != 1:
        raise ValueError(f"share {share!r} needs pathways of one width, beta = 1; got beta {beta}")
    if share == "across_levels" and growth != 1:
        raise ValueError(f"share 'across_levels' needs levels of one width, growth = 1; got growth {growth}")
    fast_width = round(beta * width)
    if fast_width < 2 or fast_width % 2 or abs(fast_width - beta * width) > 1e-6:
        raise ValueError(f"beta * width must be even, for two directions; got {beta} * {width}")
    widths = (width, fast_width)
    levels = [_pathways([_stem(channels) for channels in widths])]
    residual: list[tuple[nn.Module, nn.Module]] = []
    recurrent: list[ConvLSTM] = []
    for level, depth in enumerate(depths):
        slow, fast = (_residual_blocks(depth, channels, level, growth) for channels in widths)
        channels = fast_width * growth**level
        lstm = ConvLSTM(channels, channels // 2, kernel)
        if share != "none":
            _share(fast, slow)
        if share == "across_levels" and residual:
            for blocks, before in zip((slow, fast, lstm), (*residual[-1], recurrent[-1]), strict=True):
                _share(blocks, before)
        residual.append((slow, fast))
        recurrent.append(lstm)
        levels.append(_pathways([slow, nn.Sequential(fast, lstm)]))
    pools = nn.ModuleList(head_pool(1) for _ in widths)
    head = create_res_basic_head(
        in_features=sum(widths) * growth ** (len(depths) - 1),
        out_features=model_num_class,
        pool=None,
        dropout_rate=dropout_rate,
    )
    return Net(blocks=nn.ModuleList([*levels, PoolConcatPathway(pool=pools), head]))


def _pathways(blocks: Sequence[nn.Module]) -> nn.Module:
    return MultiPathWayWithFuse(multipathway_blocks=nn.ModuleList(blocks), multipathway_fusion=None)


def _stem(channels: int) -> nn.Module:
    return create_res_basic_stem(
        in_channels=3, out_channels=channels, conv_kernel_size=(1, 7, 7), conv_padding=(0, 3, 3)
    )


def _residual_blocks(depth: int, width: int, level: int, growth: int) -> nn.Module:
    channels = width * growth**level
    return make_stage(
        depth=depth,
        dim_in=channels // growth if level else channels,
        dim_inner=channels,
        dim_out=channels,
        bottleneck=create_basic_block,
        kernel_a=(1, 1, 1),
        kernel_b=(1, 3, 3),
        groups_b=1,
        dilation_b=(1, 1, 1),
        stride=(1, 2, 2) if level else (1, 1, 1),
        norm=nn.BatchNorm3d,
        activation=nn.ReLU,
    )


def _share(module: nn.Module, source: nn.Module) -> None:
    """Give each convolution of ``module`` the parameters of the one of that name in ``source``, where there is one: a
    level that keeps its size has no projection."""
    theirs = dict(source.named_modules())
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv3d) and name in theirs:
            part.weight = theirs[name].weight
            part.bias = theirs[name].bias
