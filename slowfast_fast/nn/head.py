"""Classification and detection heads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .roi_align import RoIAlign


def create_res_basic_head(
    *,
    in_features: int,
    out_features: int,
    pool: Callable[..., nn.Module] | None = nn.AvgPool3d,
    output_size: int | tuple[int, ...] = (1, 1, 1),
    pool_kernel_size: Sequence[int] = (1, 7, 7),
    pool_stride: Sequence[int] = (1, 1, 1),
    pool_padding: Sequence[int] = (0, 0, 0),
    dropout_rate: float = 0.5,
    activation: Callable[..., nn.Module] | None = None,
    output_with_global_average: bool = True,
) -> nn.Module:
    """A ``ResNetBasicHead``; the counterpart of ``pytorchvideo.models.head.create_res_basic_head``.

    Args:
        in_features, out_features: channels in, classes out.
        pool: None, ``nn.AdaptiveAvgPool3d`` (takes ``output_size``) or a pool that takes kernel size, stride and
            padding, each (T, H, W).
        dropout_rate: 0 leaves the dropout out.
        activation: called with nothing, ``nn.Softmax`` with ``dim=1``; None leaves it out.
        output_with_global_average: average over T, H and W, so that the result is (N, out_features).
    """
    return ResNetBasicHead(
        proj=nn.Linear(in_features, out_features),
        activation=_make_activation(activation),
        pool=None if pool is None else make_pool(pool, output_size, pool_kernel_size, pool_stride, pool_padding),
        dropout=nn.Dropout(dropout_rate) if dropout_rate > 0 else None,
        output_pool=nn.AdaptiveAvgPool3d(1) if output_with_global_average else None,
    )


def create_res_roi_pooling_head(
    *,
    in_features: int,
    out_features: int,
    resolution: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    roi: Callable[..., nn.Module] = RoIAlign,
    pool: Callable[..., nn.Module] | None = nn.AvgPool3d,
    output_size: int | tuple[int, ...] = (1, 1, 1),
    pool_kernel_size: Sequence[int] = (1, 7, 7),
    pool_stride: Sequence[int] = (1, 1, 1),
    pool_padding: Sequence[int] = (0, 0, 0),
    pool_spatial: Callable[..., nn.Module] | None = nn.MaxPool2d,
    dropout_rate: float = 0.5,
    activation: Callable[..., nn.Module] | None = None,
    output_with_global_average: bool = True,
) -> nn.Module:
    """A ``ResNetRoIHead``; the counterpart of ``pytorchvideo.models.head.create_res_roi_pooling_head``.

    Args:
        resolution: (H, W) that each box is sampled to.
        spatial_scale: factor from box coordinates to feature coordinates.
        sampling_ratio: samples per output value and direction; 0 takes as many as the box is wide.
        roi: called with ``output_size``, ``spatial_scale`` and ``sampling_ratio``; torchvision's ``RoIAlign`` fits.
        pool_spatial: called with ``resolution`` and ``stride=1``; None leaves it out.

    The rest is as for ``create_res_basic_head``.
    """
    return ResNetRoIHead(
        proj=nn.Linear(in_features, out_features),
        activation=_make_activation(activation),
        pool=None if pool is None else make_pool(pool, output_size, pool_kernel_size, pool_stride, pool_padding),
        pool_spatial=pool_spatial(resolution, stride=1) if pool_spatial else None,
        roi_layer=roi(output_size=resolution, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio),
        dropout=nn.Dropout(dropout_rate) if dropout_rate > 0 else None,
        output_pool=nn.AdaptiveAvgPool3d(1) if output_with_global_average else None,
    )


class ResNetBasicHead(nn.Module):
    """Pool, dropout, projection of the channels at every position, activation, average; each may be (set to) None."""

    def __init__(
        self,
        pool: nn.Module | None,
        dropout: nn.Module | None,
        proj: nn.Module | None,
        activation: nn.Module | None,
        output_pool: nn.Module | None,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.dropout = dropout
        self.proj = proj
        self.activation = activation
        self.output_pool = output_pool

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) -> (N, out_features), or (N, out_features, T', H', W') without ``output_pool``."""
        if self.pool is not None:
            x = self.pool(x)
        return _project(self, x)


class ResNetRoIHead(nn.Module):
    """Pool over time, boxes sampled from the features, and then as ``ResNetBasicHead``; each part may be None."""

    def __init__(
        self,
        pool: nn.Module | None,
        pool_spatial: nn.Module | None,
        roi_layer: nn.Module | None,
        dropout: nn.Module | None,
        proj: nn.Module | None,
        activation: nn.Module | None,
        output_pool: nn.Module | None,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.pool_spatial = pool_spatial
        self.roi_layer = roi_layer
        self.dropout = dropout
        self.proj = proj
        self.activation = activation
        self.output_pool = output_pool

    def forward(self, x: Tensor, bboxes: Tensor) -> Tensor:
        """(N, C, T, H, W), boxes (B, 5) of (clip, x1, y1, x2, y2) -> (B, out_features, 1, H', W') or (B, out_features).

        T must be 1 where the boxes are sampled, else ValueError. Rotated boxes are (B, 6), if ``roi_layer`` takes them.
        """
        if self.pool is not None:
            x = self.pool(x)
        if self.roi_layer is not None:
            if x.shape[2] != 1:
                raise ValueError(
                    f"boxes are sampled from one frame of features, but T is {x.shape[2]} in shape {tuple(x.shape)}: "
                    "choose head_pool_kernel_sizes that leave T = 1"
                )
            x = self.roi_layer(x.squeeze(2), bboxes)
            if self.pool_spatial is not None:
                x = self.pool_spatial(x)
            x = x.unsqueeze(2)
        return _project(self, x)


def _project(head: ResNetBasicHead | ResNetRoIHead, x: Tensor) -> Tensor:
    """What follows the pooling in both heads."""
    if head.dropout is not None:
        x = head.dropout(x)
    if head.proj is not None:
        x = head.proj(x.movedim(1, -1)).movedim(-1, 1)
    if head.activation is not None:
        x = head.activation(x)
    if head.output_pool is not None:
        x = torch.flatten(head.output_pool(x), 1)
    return x


def _make_activation(activation: Callable[..., nn.Module] | None) -> nn.Module | None:
    if activation is None:
        return None
    return activation(dim=1) if activation is nn.Softmax else activation()


def make_pool(
    pool: Callable[..., nn.Module],
    output_size: int | tuple[int, ...],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> nn.Module:
    """``nn.AdaptiveAvgPool3d`` from ``output_size``, any other pool from kernel size, stride and padding (T, H, W)."""
    if pool is nn.AdaptiveAvgPool3d:
        return pool(output_size)
    return pool(kernel_size=kernel_size, stride=stride, padding=padding)
