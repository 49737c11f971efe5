"""Of what layers a SlowFast network is, whatever a library calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Make = Callable[..., nn.Module]


@dataclass(frozen=True)
class Plan:
    """A network; the defaults are R50 8x8. ``pathways`` 1 is Slow-only. ``norm`` is called with the channels."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    beta_inverse: int = 8
    alpha: int = 4
    fusion_kernel: int = 7
    fusion_norm: bool = True
    classes: int = 400
    classifier_bias: bool = True
    kernels: tuple[tuple[int, ...], tuple[int, ...]] = ((1, 1, 3, 3), (3, 3, 3, 3))
    dilations: tuple[int, ...] = (1, 1, 1, 1)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    pathways: int = 2
    nonlocal_blocks: tuple[tuple[int, int], ...] = ()  # (stage, block): a non-local block behind it, slow pathway
    pool: tuple[int, int] = (2, 2)  # (H, W) of the last features, where the head's pool is not adaptive
    frames: int = 8  # of the slow pathway, for that pool
    norm: Make | None = nn.BatchNorm3d
    activation: Make | None = nn.ReLU

    @property
    def features(self) -> list[int]:
        return [self.width_of(pathway) * 32 for pathway in range(self.pathways)]

    def width_of(self, pathway: int) -> int:
        return self.width // (self.beta_inverse if pathway else 1)

    def make_norm(self, channels: int) -> nn.Module | None:
        return None if self.norm is None else self.norm(channels)

    def make_act(self) -> nn.Module | None:
        return None if self.activation is None else self.activation()

    def stem(self, pathway: int) -> nn.Conv3d:
        kt = 5 if pathway else 1
        return nn.Conv3d(3, self.width_of(pathway), (kt, 7, 7), (1, 2, 2), (kt // 2, 3, 3), bias=False)

    def pools(self) -> list[nn.Module]:
        frames = (self.frames, self.frames * self.alpha)
        return [nn.AvgPool3d((frames[pathway], *self.pool), stride=1) for pathway in range(self.pathways)]

    def lateral(self, stage: int) -> nn.Conv3d:
        """After a stage; 0 is the stem."""
        channels = self.width_of(1) * (4 * 2 ** (stage - 1) if stage else 1)
        kernel = self.fusion_kernel
        return nn.Conv3d(channels, 2 * channels, (kernel, 1, 1), (self.alpha, 1, 1), (kernel // 2, 0, 0), bias=False)

    def stage(self, pathway: int, stage: int) -> list[Block]:
        """The residual blocks of a stage, counted from 0."""
        inner = self.width_of(pathway) * 2**stage
        before = inner * 2 if stage else inner
        if pathway == 0 and self.pathways == 2:
            before += 2 * before // self.beta_inverse
        return [
            Block(
                self,
                dim_in=inner * 4 if index else before,
                dim_inner=inner,
                kernel=self.kernels[pathway][stage],
                stride=1 if index else self.strides[stage],
                dilation=self.dilations[stage],
            )
            for index in range(self.depths[stage])
        ]


@dataclass(frozen=True)
class Block:
    """The layers of one residual block."""

    plan: Plan
    dim_in: int
    dim_inner: int
    kernel: int
    stride: int
    dilation: int

    def shortcut(self) -> nn.Conv3d | None:
        if self.dim_in == self.dim_inner * 4 and self.stride == 1:
            return None
        return nn.Conv3d(self.dim_in, self.dim_inner * 4, 1, (1, self.stride, self.stride), bias=False)

    def convolutions(self) -> tuple[nn.Conv3d, nn.Conv3d, nn.Conv3d]:
        inner, d = self.dim_inner, self.dilation
        return (
            nn.Conv3d(self.dim_in, inner, (self.kernel, 1, 1), padding=(self.kernel // 2, 0, 0), bias=False),
            nn.Conv3d(
                inner, inner, (1, 3, 3), (1, self.stride, self.stride), (0, d, d), dilation=(1, d, d), bias=False
            ),
            nn.Conv3d(inner, inner * 4, 1, bias=False),
        )
