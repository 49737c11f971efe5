"""The branches of residual blocks: a bottleneck (temporal, spatial and pointwise), or two spatial convolutions."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from .fused import Parts, conv_norm_act


def create_bottleneck_block(
    *,
    dim_in: int,
    dim_inner: int,
    dim_out: int,
    conv_a_kernel_size: Sequence[int] = (3, 1, 1),
    conv_a_stride: Sequence[int] = (2, 1, 1),
    conv_a_padding: Sequence[int] = (1, 0, 0),
    conv_a: Callable[..., nn.Module] = nn.Conv3d,
    conv_b_kernel_size: Sequence[int] = (1, 3, 3),
    conv_b_stride: Sequence[int] = (1, 2, 2),
    conv_b_padding: Sequence[int] = (0, 1, 1),
    conv_b_num_groups: int = 1,
    conv_b_dilation: Sequence[int] = (1, 1, 1),
    conv_b: Callable[..., nn.Module] = nn.Conv3d,
    conv_c: Callable[..., nn.Module] = nn.Conv3d,
    norm: Callable[..., nn.Module] | None = nn.BatchNorm3d,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Module:
    """A ``BottleneckBlock``; the counterpart of ``pytorchvideo.models.resnet.create_bottleneck_block``.

    Kernel sizes, strides, paddings and dilations are (T, H, W). ``norm`` is called with ``num_features``, ``eps`` and
    ``momentum``, ``activation`` with nothing; None leaves them out.
    """

    def make_norm(channels: int) -> nn.Module | None:
        return None if norm is None else norm(num_features=channels, eps=norm_eps, momentum=norm_momentum)

    def make_activation() -> nn.Module | None:
        return None if activation is None else activation()

    return BottleneckBlock(
        conv_a=conv_a(
            in_channels=dim_in,
            out_channels=dim_inner,
            kernel_size=conv_a_kernel_size,
            stride=conv_a_stride,
            padding=conv_a_padding,
            bias=False,
        ),
        norm_a=make_norm(dim_inner),
        act_a=make_activation(),
        conv_b=conv_b(
            in_channels=dim_inner,
            out_channels=dim_inner,
            kernel_size=conv_b_kernel_size,
            stride=conv_b_stride,
            padding=conv_b_padding,
            bias=False,
            groups=conv_b_num_groups,
            dilation=conv_b_dilation,
        ),
        norm_b=make_norm(dim_inner),
        act_b=make_activation(),
        conv_c=conv_c(in_channels=dim_inner, out_channels=dim_out, kernel_size=(1, 1, 1), bias=False),
        norm_c=make_norm(dim_out),
    )


def create_basic_block(
    *,
    dim_in: int,
    dim_inner: int,
    dim_out: int,
    conv_a_kernel_size: Sequence[int] = (3, 1, 1),
    conv_a_stride: Sequence[int] = (1, 1, 1),
    conv_a_padding: Sequence[int] = (1, 0, 0),
    conv_a: Callable[..., nn.Module] = nn.Conv3d,
    conv_b_kernel_size: Sequence[int] = (1, 3, 3),
    conv_b_stride: Sequence[int] = (1, 2, 2),
    conv_b_padding: Sequence[int] = (0, 1, 1),
    conv_b_num_groups: int = 1,
    conv_b_dilation: Sequence[int] = (1, 1, 1),
    conv_b: Callable[..., nn.Module] = nn.Conv3d,
    conv_c: Callable[..., nn.Module] | None = None,
    norm: Callable[..., nn.Module] | None = nn.BatchNorm3d,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Module:
    """A ``BasicBlock``, the branch of ResNet-18 and 34, from the keywords that describe a bottleneck.

    Both convolutions have the spatial kernel, padding and dilation of conv_b. Conv_a's size in time is that of
    ``conv_a_kernel_size``, conv_b's its own; the first one has both strides. Raises ValueError where ``dim_inner`` is
    not ``dim_out``, or for groups.
    """
    if dim_inner != dim_out:
        raise ValueError(f"a basic block is as wide inside as outside; got dim_inner {dim_inner}, dim_out {dim_out}")
    if conv_b_num_groups != 1:
        raise ValueError(f"conv_b_num_groups must be 1 in a basic block; got {conv_b_num_groups}")

    def make_norm() -> nn.Module | None:
        return None if norm is None else norm(num_features=dim_out, eps=norm_eps, momentum=norm_momentum)

    return BasicBlock(
        conv_a=conv_a(
            in_channels=dim_in,
            out_channels=dim_out,
            kernel_size=(conv_a_kernel_size[0], *conv_b_kernel_size[1:]),
            stride=tuple(a * b for a, b in zip(conv_a_stride, conv_b_stride, strict=True)),
            padding=(conv_a_padding[0], *conv_b_padding[1:]),
            bias=False,
            dilation=(1, *conv_b_dilation[1:]),
        ),
        norm_a=make_norm(),
        act_a=None if activation is None else activation(),
        conv_b=conv_b(
            in_channels=dim_out,
            out_channels=dim_out,
            kernel_size=conv_b_kernel_size,
            stride=(1, 1, 1),
            padding=conv_b_padding,
            bias=False,
            dilation=conv_b_dilation,
        ),
        norm_b=make_norm(),
    )


create_basic_block.expansion = 1  # type: ignore[attr-defined]  # channels of a block's result over dim_inner


class _Layers(nn.Module):
    """The branch of a residual block: layers one after the other, in modules that are named after their place."""

    _names: ClassVar[tuple[tuple[str, str, str | None], ...]]  # of the layers' Parts; None where there is no such part

    def __init__(self, *layers: Parts) -> None:
        super().__init__()
        for names, parts in zip(self._names, layers, strict=True):
            for name, part in zip(names, parts, strict=True):
                if name is not None:
                    setattr(self, name, part)
        final_norm = layers[-1][1]
        if final_norm is not None:
            final_norm.block_final_bn = True  # type: ignore[assignment]  # init_weights sets its gamma to 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim_in, T, H, W) -> (N, dim_out, T', H', W')."""
        for layer in self.layers():
            x = conv_norm_act(x, *layer)
        return x

    def layers(self) -> list[Parts]:
        """The layers as they are now, so that a residual block can run the last one with its sum and activation."""
        return [
            (getattr(self, conv), getattr(self, norm), None if act is None else getattr(self, act))
            for conv, norm, act in self._names
        ]


class BottleneckBlock(_Layers):
    """``norm_c(conv_c(act_b(norm_b(conv_b(act_a(norm_a(conv_a(x))))))))``; norms and activations may be None."""

    _names = (("conv_a", "norm_a", "act_a"), ("conv_b", "norm_b", "act_b"), ("conv_c", "norm_c", None))

    def __init__(
        self,
        *,
        conv_a: nn.Module,
        norm_a: nn.Module | None,
        act_a: nn.Module | None,
        conv_b: nn.Module,
        norm_b: nn.Module | None,
        act_b: nn.Module | None,
        conv_c: nn.Module,
        norm_c: nn.Module | None,
    ) -> None:
        super().__init__((conv_a, norm_a, act_a), (conv_b, norm_b, act_b), (conv_c, norm_c, None))


class BasicBlock(_Layers):
    """``norm_b(conv_b(act_a(norm_a(conv_a(x)))))``; norms and activation may be None."""

    _names = (("conv_a", "norm_a", "act_a"), ("conv_b", "norm_b", None))

    def __init__(
        self,
        *,
        conv_a: nn.Module,
        norm_a: nn.Module | None,
        act_a: nn.Module | None,
        conv_b: nn.Module,
        norm_b: nn.Module | None,
    ) -> None:
        super().__init__((conv_a, norm_a, act_a), (conv_b, norm_b, None))
