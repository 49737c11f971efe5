"""The lateral connection: what the fast pathway saw, strided in time, beside the slow pathway's channels."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .fused import conv_norm_act_concat


class FuseFastToSlow(nn.Module):
    """``[cat([slow, activation(norm(conv_fast_to_slow(fast)))], 1), fast]`` ("time-strided convolution", section 3.4).

    ``norm`` and ``activation`` may be None. The counterpart of ``pytorchvideo.models.slowfast.FuseFastToSlow``.
    """

    def __init__(
        self, conv_fast_to_slow: nn.Module, norm: nn.Module | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv_fast_to_slow = conv_fast_to_slow
        self.norm = norm
        self.activation = activation

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """[slow (N, C, T, H, W), fast (N, C_fast, alpha * T, H, W)] -> [(N, C + K, T, H, W), fast], a new list."""
        slow, fast = x[0], x[1]
        return [conv_norm_act_concat(slow, fast, self.conv_fast_to_slow, self.norm, self.activation), fast]


class FastToSlowFusionBuilder:
    """Makes each stage's lateral connection, as ``pytorchvideo.models.slowfast.FastToSlowFusionBuilder`` does.

    Args:
        slowfast_channel_reduction_ratio: the fast pathway has 1 / this of the slow pathway's channels (1 / beta).
        conv_fusion_channel_ratio: the connection makes this many times the fast pathway's channels.
        conv_kernel_size: (T, H, W) of the convolution; its padding is half of it.
        conv_stride: (alpha, 1, 1) where the fast pathway has alpha times the slow one's frames.
        norm, activation: called as in every other block; None leaves them out.
        max_stage_idx: stages from this one's successor on get ``nn.Identity``.
    """

    def __init__(
        self,
        slowfast_channel_reduction_ratio: int,
        conv_fusion_channel_ratio: float,
        conv_kernel_size: tuple[int, int, int],
        conv_stride: tuple[int, int, int],
        norm: Callable[..., nn.Module] | None = nn.BatchNorm3d,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        activation: Callable[[], nn.Module] | None = nn.ReLU,
        max_stage_idx: int = 3,
    ) -> None:
        self.slowfast_channel_reduction_ratio = slowfast_channel_reduction_ratio
        self.conv_fusion_channel_ratio = conv_fusion_channel_ratio
        self.conv_kernel_size = conv_kernel_size
        self.conv_stride = conv_stride
        self.norm = norm
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.activation = activation
        self.max_stage_idx = max_stage_idx

    def create_module(self, fusion_dim_in: int, stage_idx: int) -> nn.Module:
        """The connection after stage ``stage_idx`` (0: the stem), whose slow pathway has ``fusion_dim_in`` channels."""
        if stage_idx > self.max_stage_idx:
            return nn.Identity()
        kt, kh, kw = self.conv_kernel_size
        fast_channels = fusion_dim_in // self.slowfast_channel_reduction_ratio
        channels = int(fast_channels * self.conv_fusion_channel_ratio)
        return FuseFastToSlow(
            conv_fast_to_slow=nn.Conv3d(
                fast_channels,
                channels,
                kernel_size=(kt, kh, kw),
                stride=self.conv_stride,
                padding=(kt // 2, kh // 2, kw // 2),
                bias=False,
            ),
            norm=None
            if self.norm is None
            else self.norm(num_features=channels, eps=self.norm_eps, momentum=self.norm_momentum),
            activation=None if self.activation is None else self.activation(),
        )
