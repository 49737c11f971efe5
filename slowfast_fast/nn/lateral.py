"""Lateral connections (paper section 3.4): what one pathway saw, at the other's frame rate, joined to its features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from .. import ops
from ..explanation import note, recording
from .fused import Parts, conv_norm_act, conv_norm_act_concat, has_global_hooks, is_observed, residual
from .rearrange import ChannelToTime, RepeatFrames, SampleFrames, TimeToChannel

KINDS = ("conv", "time_to_channel", "sampling", "none")
JOINS = ("concat", "sum")
DIRECTIONS = ("fast_to_slow", "slow_to_fast", "both")


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


class Lateral(nn.Module):
    """What ``source`` has for ``target``: ``activation(norm(transform(source)))``, beside it or added to it.

    Args:
        transform: a convolution, or one of ``rearrange.py``; gives the frames of the target.
        norm, activation: may be None.
        join: "concat": behind the target's channels; "sum": added to them.
    """

    def __init__(self, transform: nn.Module, norm: nn.Module | None, activation: nn.Module | None, join: str) -> None:
        super().__init__()
        self.transform = transform
        self.norm = norm
        self.activation = activation
        self.join = join

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """(N, C, T, H, W), (N, C', T', H, W) -> (N, C + K, T, H, W), or (N, C, T, H, W) where it is a sum."""
        layer: Parts = (self.transform, self.norm, self.activation)
        if self.join == "concat" and only_moves_frames(*layer):
            moved = cast("TimeToChannel | SampleFrames", self.transform)
            if recording():
                note((moved,), "frames_concat")
            return ops.frames_concat(target, source, alpha=moved.alpha, taps=moved.taps)
        if self.join == "concat":
            return conv_norm_act_concat(target, source, *layer)
        if self.activation is None:
            return residual(source, [layer], target, None)
        return target + conv_norm_act(source, *layer)

    def extra_repr(self) -> str:
        return f"join={self.join}"


def only_moves_frames(transform: nn.Module, norm: nn.Module | None, activation: nn.Module | None) -> bool:
    """Whether a connection from fast to slow is what ``ops.frames_concat`` does, to anyone who looks."""
    known = type(transform) in (TimeToChannel, SampleFrames) and not (is_observed(transform) or has_global_hooks())
    return known and norm is None and activation is None


class FuseLaterals(nn.Module):
    """Either or both directions; both read what the pathways were before. Each may be None."""

    def __init__(self, fast_to_slow: Lateral | None, slow_to_fast: Lateral | None) -> None:
        super().__init__()
        self.fast_to_slow = fast_to_slow
        self.slow_to_fast = slow_to_fast

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """[slow (N, C, T, H, W), fast (N, C_fast, alpha * T, H, W)] -> the same, joined, in a new list."""
        slow, fast = x[0], x[1]
        return [
            slow if self.fast_to_slow is None else self.fast_to_slow(slow, fast),
            fast if self.slow_to_fast is None else self.slow_to_fast(fast, slow),
        ]


@dataclass(frozen=True, kw_only=True)
class LateralBuilder:
    """Makes each stage's lateral connections; a ``fusion_builder`` of ``create_slowfast``.

    Attributes:
        alpha: frames of the fast pathway over those of the slow one.
        beta_inverse: channels of the slow pathway over those of the fast one.
        kind: "conv": a time-strided convolution (kernel, 1, 1), from slow to fast its transpose; "time_to_channel":
            alpha frames become alpha times the channels, from slow to fast the inverse; "sampling": one of alpha
            frames, from slow to fast each of them alpha times; "none": no connection at all.
        kernel: frames of the convolution, odd.
        ratio: the convolution's channels over the fast pathway's, where it is concatenated.
        join: "concat" or "sum".
        direction: "fast_to_slow", "slow_to_fast" or "both".
        norm: called with ``num_features``, ``eps`` and ``momentum``; None: no norms.
        activation: called with nothing; None: no activations.
        stages: residual stages; there is no connection behind the last one.

    Raises ValueError for anything else. The connection of the paper is a ``FuseFastToSlow``.
    """

    alpha: int
    beta_inverse: int
    kind: str = "conv"
    kernel: int = 7
    ratio: int = 2
    join: str = "concat"
    direction: str = "fast_to_slow"
    norm: Callable[..., nn.Module] | None = nn.BatchNorm3d
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    activation: Callable[[], nn.Module] | None = nn.ReLU
    stages: int = 4

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("join", JOINS), ("direction", DIRECTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd; got {self.kernel}")

    def extra_channels(self, fusion_dim_in: int) -> tuple[int, int]:
        """What the slow and the fast pathway gain where the slow one has ``fusion_dim_in`` channels."""
        if self.kind == "none" or self.join == "sum":
            return 0, 0
        gains = (self._channels(fusion_dim_in, to_fast) for to_fast in (False, True))
        return tuple(gain if wanted else 0 for gain, wanted in zip(gains, self._directions(), strict=True))  # type: ignore[return-value]

    def __call__(self, fusion_dim_in: int, stage_idx: int) -> nn.Module:
        """The connection after stage ``stage_idx`` (0: the stem), whose slow pathway has ``fusion_dim_in`` channels."""
        if self.kind == "none" or stage_idx >= self.stages:
            return nn.Identity()
        if (self.kind, self.join, self.direction) == ("conv", "concat", "fast_to_slow"):
            layer = self._lateral(fusion_dim_in, False)
            return FuseFastToSlow(layer.transform, layer.norm, layer.activation)
        return FuseLaterals(
            *(
                self._lateral(fusion_dim_in, to_fast) if wanted else None
                for to_fast, wanted in zip((False, True), self._directions(), strict=True)
            )
        )

    def _directions(self) -> tuple[bool, bool]:
        """Whether there is one from fast to slow, and one from slow to fast."""
        return self.direction != "slow_to_fast", self.direction != "fast_to_slow"

    def _channels(self, slow: int, to_fast: bool) -> int:
        """What a connection gives. Raises ValueError where the channels do not divide, or cannot be added."""
        fast = slow // self.beta_inverse
        source, target = (slow, fast) if to_fast else (fast, slow)
        if self.kind == "conv":
            return target if self.join == "sum" else self.ratio * fast
        if self.kind == "sampling":
            given = source
        elif to_fast:
            if slow % self.alpha:
                raise ValueError(f"alpha {self.alpha} must divide the slow pathway's {slow} channels")
            given = slow // self.alpha
        else:
            given = fast * self.alpha
        if self.join == "sum" and given != target:
            raise ValueError(
                f"join='sum' needs as many channels as there are: {self.kind} with alpha {self.alpha} and beta_inverse "
                f"{self.beta_inverse} gives {given} for {target}; take alpha = beta_inverse, or join='concat'"
            )
        return given

    def _lateral(self, slow: int, to_fast: bool) -> Lateral:
        fast, given = slow // self.beta_inverse, self._channels(slow, to_fast)
        return Lateral(
            self._transform(slow if to_fast else fast, given, to_fast),
            None
            if self.norm is None
            else self.norm(num_features=given, eps=self.norm_eps, momentum=self.norm_momentum),
            None if self.activation is None else self.activation(),
            self.join,
        )

    def _transform(self, channels: int, given: int, to_fast: bool) -> nn.Module:
        if self.kind == "time_to_channel":
            return (ChannelToTime if to_fast else TimeToChannel)(self.alpha)
        if self.kind == "sampling":
            return (RepeatFrames if to_fast else SampleFrames)(self.alpha)
        sizes = {
            "kernel_size": (self.kernel, 1, 1),
            "stride": (self.alpha, 1, 1),
            "padding": (self.kernel // 2, 0, 0),
        }
        if to_fast:
            # With this output padding it gives alpha frames for each.
            return nn.ConvTranspose3d(channels, given, **sizes, output_padding=(self.alpha - 1, 0, 0), bias=False)  # type: ignore[arg-type]
        return nn.Conv3d(channels, given, **sizes, bias=False)  # type: ignore[arg-type]
