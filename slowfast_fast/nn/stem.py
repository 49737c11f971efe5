"""The stem of a pathway: convolution, norm, activation and pooling."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..ops._layout import as_rows
from .fused import conv_norm_act
from .pooled import conv_norm_act_pool


def create_res_basic_stem(
    *,
    in_channels: int,
    out_channels: int,
    conv_kernel_size: Sequence[int] = (3, 7, 7),
    conv_stride: Sequence[int] = (1, 2, 2),
    conv_padding: Sequence[int] = (1, 3, 3),
    conv_bias: bool = False,
    conv: Callable[..., nn.Module] = nn.Conv3d,
    pool: Callable[..., nn.Module] | None = nn.MaxPool3d,
    pool_kernel_size: Sequence[int] = (1, 3, 3),
    pool_stride: Sequence[int] = (1, 2, 2),
    pool_padding: Sequence[int] = (0, 1, 1),
    norm: Callable[..., nn.Module] | None = nn.BatchNorm3d,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Module:
    """A ``ResNetBasicStem``; the counterpart of ``pytorchvideo.models.stem.create_res_basic_stem``.

    Sizes are (T, H, W). ``pool``, ``norm`` and ``activation`` may be None.
    """
    return ResNetBasicStem(
        conv=conv(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=conv_kernel_size,
            stride=conv_stride,
            padding=conv_padding,
            bias=conv_bias,
        ),
        norm=None if norm is None else norm(num_features=out_channels, eps=norm_eps, momentum=norm_momentum),
        activation=None if activation is None else activation(),
        pool=None if pool is None else pool(kernel_size=pool_kernel_size, stride=pool_stride, padding=pool_padding),
    )


class ResNetBasicStem(nn.Module):
    """``pool(activation(norm(conv(x))))``; all but ``conv`` may be None."""

    def __init__(
        self, *, conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None, pool: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.activation = activation
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, T, H, W) -> (N, out_channels, T', H', W')."""
        layer = (self.conv, self.norm, self.activation)
        if self.pool is None:
            return conv_norm_act(as_rows(x, "x"), *layer)
        return conv_norm_act_pool(x, *layer, self.pool)
