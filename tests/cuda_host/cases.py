"""Calls of temporal_conv and its training form, on the harness and in PyTorch."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable

import torch
import torch.nn.functional as F
from op_arguments import accumulation, integer_scales, small_integers
from op_testing import Judgement

from .build import Harness


@dataclasses.dataclass(frozen=True)
class Case:
    n: int
    c: int
    k: int
    t: int
    h: int
    w: int
    kt: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def window(self) -> tuple[int, int, int]:
        return self.stride, self.padding, self.dilation

    @property
    def t_out(self) -> int:
        return (self.t + 2 * self.padding - self.dilation * (self.kt - 1) - 1) // self.stride + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The members of ConvShape (csrc/primitives.h)."""
        return self.n, self.c, self.k, self.t, self.t_out, self.h * self.w, self.kt, *self.window

    def __str__(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))


# Each result has at least 64 values, so that a ratio of two errors means something.
CASES = (
    Case(2, 8, 64, 4, 5, 7, 3, padding=1),  # a bottleneck of the fast pathway
    Case(1, 129, 70, 3, 3, 3, 3, padding=1),  # several tiles of both operands
    Case(1, 16, 66, 1, 7, 3, 5, padding=2),  # a clip shorter than the kernel
    Case(1, 8, 72, 17, 3, 3, 7, stride=8, padding=3),  # a lateral connection
    Case(2, 3, 65, 9, 1, 3, 5, stride=2, padding=4, dilation=3),
    Case(1, 5, 67, 2, 3, 31, 1, padding=1),  # frames that see nothing but padding
)
# A norm over very few values says more of their luck than of the arithmetic: these are for comparing exact results.
TINY_CASES = (Case(3, 1, 1, 1, 1, 1, 1), Case(1, 2, 1, 5, 1, 2, 3, dilation=2), Case(1, 1, 3, 3, 2, 1, 1, stride=2))


def conv(x: torch.Tensor, weight: torch.Tensor, case: Case) -> torch.Tensor:
    stride, padding, dilation = ((value, one, one) for value, one in zip(case.window, (1, 0, 1), strict=True))
    return F.conv3d(x, weight, None, stride, padding, dilation)


Convolve = Callable[[torch.Tensor, torch.Tensor, Case], torch.Tensor]


def channel(vector: torch.Tensor) -> torch.Tensor:
    return vector.view(1, -1, 1, 1, 1)


def rows(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last_3d)


def to_tf32(t: torch.Tensor) -> torch.Tensor:
    """The nearest numbers with 10 bits of mantissa, ties away from zero."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def pitched(t: torch.Tensor) -> torch.Tensor:
    """t as the last channels of a wider tensor, at a multiple of 16 bytes, as lateral_concat leaves them."""
    n, c, *frame = t.shape
    wide = torch.full((n, c + 8, *frame), torch.nan, dtype=t.dtype)
    return wide.contiguous(memory_format=torch.channels_last_3d)[:, 8:].copy_(t)


def far_apart(t: torch.Tensor) -> torch.Tensor:
    """Two clips of 2-byte values, 2^31 elements apart, in memory of which only the pages in use exist."""
    memory = torch.frombuffer(mmap.mmap(-1, 2**32 + (1 << 20)), dtype=t.dtype)
    return memory.as_strided(t.shape, (2**31, *t.stride()[1:])).copy_(t)


@dataclasses.dataclass
class Inputs:
    """Random arguments of an op; v1 and v2 are scale and shift, or gamma and beta. Absent ones are None."""

    x: torch.Tensor
    weight: torch.Tensor
    v1: torch.Tensor | None
    v2: torch.Tensor | None
    residual: torch.Tensor | None
    grad: torch.Tensor
    relu: bool

    def leaves(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        given = (self.x, self.weight, self.v1, self.v2, self.residual)
        return [None if t is None else t.detach().clone().to(dtype).requires_grad_() for t in given]


def random_inputs(case: Case, dtype: torch.dtype, full: bool, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    out = (case.n, case.k, case.t_out, case.h, case.w)
    vector = accumulation(dtype)
    return Inputs(
        x=rows(draw(case.n, case.c, case.t, case.h, case.w) + 0.5),
        weight=draw(case.k, case.c, case.kt, 1, 1) / (case.c * case.kt) ** 0.5,
        v1=draw(case.k).to(vector) + 1 if full else None,
        v2=draw(case.k).to(vector) if full else None,
        residual=rows(draw(*out)) if full else None,
        grad=rows(draw(*out)),
        relu=full,
    )


def integer_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Random integers, so small that the op and its backward are exact in ``dtype``; all arguments given."""
    out, vector = (case.n, case.k, case.t_out, case.h, case.w), accumulation(dtype)
    return Inputs(
        x=rows(small_integers(case.n, case.c, case.t, case.h, case.w, dtype=dtype)),
        weight=small_integers(case.k, case.c, case.kt, 1, 1, dtype=dtype),
        v1=integer_scales(case.k, dtype=vector),
        v2=integer_scales(case.k, dtype=vector),
        residual=rows(small_integers(*out, dtype=dtype)),
        grad=rows(small_integers(*out, dtype=dtype)),
        relu=True,
    )


def stock(
    inputs: Inputs, case: Case, dtype: torch.dtype, bn: bool, y: torch.Tensor, convolve: Convolve = conv
) -> dict[str, torch.Tensor]:
    """The op as PyTorch computes it in `dtype`, with all gradients. The ReLU passes what it passed in `y`: whether a
    value next to 0 is cut off is a matter of rounding, and not what is compared."""
    x, weight, v1, v2, residual = leaves = inputs.leaves(dtype)
    out = convolve(x, weight, case)
    if bn:
        out = F.batch_norm(out, None, None, v1, v2, training=True)
    elif v1 is not None:
        out = out * channel(v1) + channel(v2)
    if residual is not None:
        out = out + residual
    if inputs.relu:
        out = out * (y > 0)
    out.backward(inputs.grad.to(dtype))
    names = ("dx", "dweight", "dv1", "dv2", "dresidual")
    return {"y": out.detach()} | {name: t.grad for name, t in zip(names, leaves, strict=True) if t is not None}


def run_op(
    host: Harness, inputs: Inputs, case: Case, bn: bool, tf32: bool = False, products: bool = True
) -> dict[str, torch.Tensor]:
    """The op and its backward; of the forward's results also what it saves. Without `products`, only those gradients
    that are sums over rows."""
    i = inputs
    needs = (products, products, i.v1 is not None and (products or bn), i.v2 is not None, i.residual is not None)
    saved = {}
    if bn:
        y, *statistics = host.temporal_conv_bn(i.x, i.weight, i.v1, i.v2, i.residual, *case.window, 1e-5, i.relu, tf32)
        saved = dict(zip(("raw", "mean", "invstd", "unbiased_var"), statistics, strict=True))
        grads = host.temporal_conv_bn_backward(
            i.grad, i.x, i.weight, i.v1, i.v2, i.residual, *statistics[:3], *case.window, i.relu, *needs, tf32
        )
    else:
        y = host.temporal_conv(i.x, i.weight, i.v1, i.v2, i.residual, *case.window, i.relu, tf32)
        mask = y if i.relu else None
        grads = host.temporal_conv_backward(i.grad, i.x, i.weight, i.v1, mask, *case.window, *needs, tf32)
    names = ("dx", "dweight", "dv1", "dv2", "dresidual")
    for name, grad, need in zip(names, grads, needs, strict=True):
        assert need or grad.shape == (0,), f"{name} was not asked for"
    return {"y": y, **saved} | {name: grad for name, grad, need in zip(names, grads, needs, strict=True) if need}


def assert_as_exact_as_pytorch(
    got: dict[str, torch.Tensor], inputs: Inputs, case: Case, dtype: torch.dtype, bn: bool
) -> None:
    own, exact = (stock(inputs, case, precision, bn, got["y"]) for precision in (dtype, torch.float64))
    for name, value in ((name, value) for name, value in exact.items() if name in got):
        assert got[name].shape == value.shape, name
        judgement = Judgement()
        judgement.add(got[name], own[name], value)
        assert judgement.ours <= judgement.allowed, f"{name}: {judgement}"
