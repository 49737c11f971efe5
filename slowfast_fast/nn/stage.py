"""Residual blocks, and the stages that they form."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from .bottleneck import BasicBlock, BottleneckBlock
from .fused import Step, has_global_hooks, is_observed, run_step
from .residual import residual_block


def add(x: Tensor, y: Tensor) -> Tensor:
    """The ``branch_fusion`` of a residual block."""
    return x + y


def create_res_block(
    *,
    dim_in: int,
    dim_inner: int,
    dim_out: int,
    bottleneck: Callable[..., nn.Module],
    conv_a_stride: Sequence[int],
    conv_b_stride: Sequence[int],
    norm: Callable[..., nn.Module] | None = nn.BatchNorm3d,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
    **convolutions: Any,
) -> nn.Module:
    """A ``ResBlock``; the counterpart of ``pytorchvideo.models.resnet.create_res_block``.

    The shortcut has a 1x1x1 convolution and a norm where the number of channels or the size changes. ``bottleneck`` is
    called with every keyword of ``create_bottleneck_block``; ``convolutions`` are its kernel sizes, paddings, groups
    and dilation.
    """
    # Plain ints: torch.compile cannot trace a whole model whose convolutions hold numpy ones.
    t, h, w = (int(a) * int(b) for a, b in zip(conv_a_stride, conv_b_stride, strict=True))
    projects = dim_in != dim_out or t * h * w != 1
    branch1_norm = (
        norm(num_features=dim_out, eps=norm_eps, momentum=norm_momentum) if projects and norm is not None else None
    )
    return ResBlock(
        branch1_conv=nn.Conv3d(dim_in, dim_out, kernel_size=(1, 1, 1), stride=(t, h, w), bias=False)
        if projects
        else None,
        branch1_norm=branch1_norm,
        branch2=bottleneck(
            dim_in=dim_in,
            dim_inner=dim_inner,
            dim_out=dim_out,
            conv_a_stride=conv_a_stride,
            conv_a=nn.Conv3d,
            conv_b_stride=conv_b_stride,
            conv_b=nn.Conv3d,
            conv_c=nn.Conv3d,
            norm=norm,
            norm_eps=norm_eps,
            norm_momentum=norm_momentum,
            activation=activation,
            **convolutions,
        ),
        activation=None if activation is None else activation(),
        branch_fusion=add,
    )


def create_res_stage(
    *,
    depth: int,
    dim_in: int,
    dim_out: int,
    conv_a_kernel_size: Sequence[int] | Sequence[Sequence[int]],
    conv_a_stride: Sequence[int],
    conv_a_padding: Sequence[int] | Sequence[Sequence[int]],
    conv_b_kernel_size: Sequence[int] | Sequence[Sequence[int]],
    conv_b_stride: Sequence[int],
    conv_b_padding: Sequence[int] | Sequence[Sequence[int]],
    **block: Any,
) -> nn.Module:
    """A ``ResStage`` of ``depth`` blocks; the counterpart of ``pytorchvideo.models.resnet.create_res_stage``.

    The first block goes from ``dim_in`` to ``dim_out`` channels and has the strides; the others have stride 1.
    Kernel sizes and paddings are one (T, H, W) for all blocks, or a sequence of them that is repeated until every block
    has one. ``block`` is passed on to ``create_res_block``.
    """
    kernels_a, kernels_b = _per_block(conv_a_kernel_size, depth), _per_block(conv_b_kernel_size, depth)
    paddings_a, paddings_b = _per_block(conv_a_padding, depth), _per_block(conv_b_padding, depth)
    blocks = [
        create_res_block(
            dim_in=dim_out if index else dim_in,
            dim_out=dim_out,
            conv_a_kernel_size=kernels_a[index],
            conv_a_stride=(1, 1, 1) if index else conv_a_stride,
            conv_a_padding=paddings_a[index],
            conv_b_kernel_size=kernels_b[index],
            conv_b_stride=(1, 1, 1) if index else conv_b_stride,
            conv_b_padding=paddings_b[index],
            **block,
        )
        for index in range(depth)
    ]
    return ResStage(nn.ModuleList(blocks))


class ResBlock(nn.Module):
    """``activation(branch_fusion(shortcut, branch2(x)))``; the shortcut is ``branch1_norm(branch1_conv(x))``, or x."""

    def __init__(
        self,
        branch1_conv: nn.Module | None,
        branch1_norm: nn.Module | None,
        branch2: nn.Module,
        activation: nn.Module | None,
        branch_fusion: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.branch1_conv = branch1_conv
        self.branch1_norm = branch1_norm
        self.branch2 = branch2
        self.activation = activation
        self.branch_fusion = branch_fusion

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim_in, T, H, W) -> (N, dim_out, T', H', W')."""
        branch2, activation = self.branch2, self.activation
        projection: list[Step] = []
        if self.branch1_conv is not None:
            projection.append((self.branch1_conv, self.branch1_norm, None))
        if self.branch_fusion is add:
            known = type(branch2) in (BottleneckBlock, BasicBlock)
            opened = known and not (is_observed(branch2) or has_global_hooks())
            branch: Sequence[Step] = cast(BottleneckBlock, branch2).layers() if opened else [branch2]
            return residual_block(x, branch, projection, activation)
        shortcut = run_step(projection[0], x) if projection else x
        x = self.branch_fusion(shortcut, branch2(x))
        return x if activation is None else activation(x)


class ResStage(nn.Module):
    """Residual blocks in a row, each with a non-local block behind it where one was added."""

    def __init__(self, res_blocks: nn.ModuleList) -> None:
        super().__init__()
        self.res_blocks = res_blocks
        self.non_local: nn.ModuleDict | None = None  # by the number of the residual block

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim_in, T, H, W) -> (N, dim_out, T', H', W')."""
        for block in self.blocks():
            x = block(x)
        return x

    def add_non_local(self, index: int, block: nn.Module) -> None:
        """Put ``block`` behind residual block ``index``, in place of one that is there."""
        if self.non_local is None:
            self.non_local = nn.ModuleDict()
        self.non_local[str(index)] = block

    def blocks(self) -> Iterator[nn.Module]:
        """All blocks in the order of execution."""
        for index, block in enumerate(self.res_blocks):
            yield block
            if self.non_local is not None and str(index) in self.non_local:
                yield self.non_local[str(index)]


def _per_block(sizes: Sequence[int] | Sequence[Sequence[int]], depth: int) -> list[Sequence[int]]:
    """(T, H, W) for each of ``depth`` blocks, from one for all or a sequence to repeat."""
    cycle = cast(Sequence[Sequence[int]], [sizes] if isinstance(sizes[0], int) else sizes)
    return [cycle[index % len(cycle)] for index in range(depth)]
