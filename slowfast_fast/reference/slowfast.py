"""The stock SlowFast network in plain PyTorch: the modules, ``state_dict`` keys and arithmetic of pytorchvideo 0.1.5.

For reading, and for judging the fused network against; it knows the keywords that change the network's structure.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int, int]  # (T, H, W)
DEPTHS = {18: (1, 1, 1, 1), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
KERNELS_A = (((1, 1, 1), (1, 1, 1), (3, 1, 1), (3, 1, 1)), ((3, 1, 1),) * 4)


class Stem(nn.Module):
    """conv 1x7x7 or 5x7x7, norm, activation, max pool 1x3x3; both with spatial stride 2."""

    def __init__(self, dim_out: int, kernel: Size, norm: Callable, activation: Callable) -> None:
        super().__init__()
        kt, kh, kw = kernel
        padding = (kt // 2, kh // 2, kw // 2)
        self.conv = nn.Conv3d(3, dim_out, kernel, stride=(1, 2, 2), padding=padding, bias=False)
        self.norm = norm(dim_out)
        self.activation = activation()
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activation(self.norm(self.conv(x))))


class Bottleneck(nn.Module):
    """kt x 1 x 1, then 1 x 3 x 3 with the spatial stride, then 1 x 1 x 1."""

    def __init__(
        self, dim_in: int, dim_inner: int, dim_out: int, kt: int, stride: int, norm: Callable, activation: Callable
    ) -> None:
        super().__init__()
        self.conv_a = nn.Conv3d(dim_in, dim_inner, (kt, 1, 1), padding=(kt // 2, 0, 0), bias=False)
        self.norm_a = norm(dim_inner)
        self.act_a = activation()
        self.conv_b = nn.Conv3d(
            dim_inner, dim_inner, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False
        )
        self.norm_b = norm(dim_inner)
        self.act_b = activation()
        self.conv_c = nn.Conv3d(dim_inner, dim_out, 1, bias=False)
        self.norm_c = norm(dim_out)
        self.norm_c.block_final_bn = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.act_a(self.norm_a(self.conv_a(x)))
        x = self.act_b(self.norm_b(self.conv_b(x)))
        return self.norm_c(self.conv_c(x))


class ResBlock(nn.Module):
    """activation(shortcut + bottleneck); the shortcut is a convolution and a norm where the shape changes."""

    def __init__(
        self, dim_in: int, dim_inner: int, dim_out: int, kt: int, stride: int, norm: Callable, activation: Callable
    ) -> None:
        super().__init__()
        self.branch1_conv: nn.Module | None = None
        if dim_in != dim_out or stride != 1:
            self.branch1_conv = nn.Conv3d(dim_in, dim_out, 1, stride=(1, stride, stride), bias=False)
            self.branch1_norm = norm(dim_out)
        self.branch2 = Bottleneck(dim_in, dim_inner, dim_out, kt, stride, norm, activation)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.branch1_conv is None else self.branch1_norm(self.branch1_conv(x))
        return self.activation(shortcut + self.branch2(x))


class Stage(nn.Module):
    """Residual blocks in a row; the first one changes the channels and has the stride."""

    def __init__(self, blocks: list[ResBlock]) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x)
        return x


class Lateral(nn.Module):
    """The fast pathway, strided in time, beside the slow pathway's channels."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel: Size,
        stride: Size,
        norm: Callable,
        activation: Callable,
    ) -> None:
        super().__init__()
        kt, kh, kw = kernel
        padding = (kt // 2, kh // 2, kw // 2)
        self.conv_fast_to_slow = nn.Conv3d(dim_in, dim_out, kernel, stride=stride, padding=padding, bias=False)
        self.norm = norm(dim_out)
        self.activation = activation()

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        slow, fast = x
        return [torch.cat([slow, self.activation(self.norm(self.conv_fast_to_slow(fast)))], 1), fast]


class MultiPathway(nn.Module):
    """One block for each pathway, then the lateral connection."""

    def __init__(self, blocks: Sequence[nn.Module], fusion: nn.Module) -> None:
        super().__init__()
        self.multipathway_blocks = nn.ModuleList(blocks)
        self.multipathway_fusion = fusion

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        return self.multipathway_fusion(
            [block(pathway) for block, pathway in zip(self.multipathway_blocks, x, strict=True)]
        )


class PoolConcat(nn.Module):
    """Average pools with stride 1, and the pathways' channels side by side."""

    def __init__(self, kernels: Sequence[Size]) -> None:
        super().__init__()
        self.pool = nn.ModuleList(nn.AvgPool3d(kernel, stride=1) for kernel in kernels)

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat([pool(pathway) for pool, pathway in zip(self.pool, x, strict=True)], 1)


class Head(nn.Module):
    """Dropout, a projection at every position, and the average of the positions."""

    def __init__(self, dim_in: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.proj = nn.Linear(dim_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.dropout(x).permute(0, 2, 3, 4, 1)).mean((1, 2, 3))


class SlowFast(nn.Module):
    """[slow (N, 3, T, H, W), fast (N, 3, alpha * T, H, W)] -> logits (N, model_num_class). Keywords as stock."""

    def __init__(
        self,
        *,
        model_depth: int = 50,
        model_num_class: int = 400,
        slowfast_channel_reduction_ratio: int = 8,
        slowfast_conv_channel_fusion_ratio: int = 2,
        slowfast_fusion_conv_kernel_size: Size = (7, 1, 1),
        slowfast_fusion_conv_stride: Size = (4, 1, 1),
        stem_dim_outs: Sequence[int] = (64, 8),
        stem_conv_kernel_sizes: Sequence[Size] = ((1, 7, 7), (5, 7, 7)),
        stage_conv_a_kernel_sizes: Sequence[Sequence[Size]] = KERNELS_A,
        stage_spatial_strides: Sequence[Sequence[int]] = ((1, 2, 2, 2), (1, 2, 2, 2)),
        head_pool_kernel_sizes: Sequence[Size] = ((8, 7, 7), (32, 7, 7)),
        dropout_rate: float = 0.5,
        norm: Callable[[int], nn.Module] = nn.BatchNorm3d,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        beta_inverse = slowfast_channel_reduction_ratio
        fusion = (slowfast_fusion_conv_kernel_size, slowfast_fusion_conv_stride, norm, activation)

        def lateral(slow_channels: int) -> nn.Module:
            fast_channels = slow_channels // beta_inverse
            return Lateral(fast_channels, fast_channels * slowfast_conv_channel_fusion_ratio, *fusion)

        stems = [Stem(stem_dim_outs[p], stem_conv_kernel_sizes[p], norm, activation) for p in (0, 1)]
        dim_in = stem_dim_outs[0]
        blocks: list[nn.Module] = [MultiPathway(stems, lateral(dim_in))]
        dim_out = dim_in * 4
        for stage, depth in enumerate(DEPTHS[model_depth]):
            extra = dim_in // beta_inverse * slowfast_conv_channel_fusion_ratio
            stages = []
            for p, width, dims in ((0, 1, dim_in + extra), (1, beta_inverse, dim_in // beta_inverse)):
                kt = stage_conv_a_kernel_sizes[p][stage][0]
                out, inner, stride = dim_out // width, dim_out // 4 // width, stage_spatial_strides[p][stage]
                first = ResBlock(dims, inner, out, kt, stride, norm, activation)
                rest = [ResBlock(out, inner, out, kt, 1, norm, activation) for _ in range(depth - 1)]
                stages.append(Stage([first, *rest]))
            last = stage == len(DEPTHS[model_depth]) - 1
            blocks.append(MultiPathway(stages, nn.Identity() if last else lateral(dim_out)))
            dim_in, dim_out = dim_out, dim_out * 2
        blocks.append(PoolConcat(head_pool_kernel_sizes))
        blocks.append(Head(dim_in + dim_in // beta_inverse, model_num_class, dropout_rate))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: list[Tensor]) -> Tensor:
        out: Any = x
        for block in self.blocks:
            out = block(out)
        return out
