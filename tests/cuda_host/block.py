"""bottleneck_bn of the harness, to be called as ops.bottleneck_bn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from block_testing import BlockCall
from op_arguments import accumulation
from torch import Tensor

from slowfast_fast.ops import NormedConv
from slowfast_fast.ops._layout import as_rows

from .build import Harness


class HostBlock(torch.autograd.Function):
    """bottleneck_bn of the harness, as ops/bottleneck_bn.py calls it."""

    @staticmethod
    def forward(ctx: Any, host: Harness, options: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        *geometry, tf32 = options
        results = host.bottleneck_bn(*tensors, *geometry, *(1e-5,) * 4, tf32)
        ctx.host, ctx.options = host, options
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(*(t for i, t in enumerate(tensors) if i not in (9, 12)), *results)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *geometry, tf32 = ctx.options
        wanted = ctx.needs_input_grad[2:]
        needs = sum(1 << i for i, need in enumerate(wanted) if need)
        results = ctx.host.bottleneck_bn_backward(as_rows(grad, "grad"), *ctx.saved_tensors, *geometry, needs, tf32)
        return None, None, *(r if need else None for r, need in zip(results, wanted, strict=True))


def on_host(host: Harness, tf32: bool) -> Callable[..., Tensor]:
    def function(x: Tensor, *layers: NormedConv, **options: int) -> Tensor:
        four = [*layers, *(None,) * (4 - len(layers))]
        wide = accumulation(x.dtype)
        tensors = [as_rows(x, "x")]
        for layer in four:
            tensors += (
                [None] * 3 if layer is None else [layer.weight, *(v if v is None else v.to(wide) for v in layer[1:3])]
            )
        order = ("stride_a", "padding_a", "dilation_a", "stride", "dilation")
        results = HostBlock.apply(host, (*(options[name] for name in order), tf32), *tensors)
        for layer, statistics in zip(layers, results[3:], strict=False):
            moved = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
            host.update_running_stats(*moved, statistics[0], statistics[2], 0.1)
        return results[0]

    return function


class HostCall(BlockCall):
    host: Harness
    tf32 = False

    def run(self, function: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
        return BlockCall.run(self, function or on_host(self.host, self.tf32))
