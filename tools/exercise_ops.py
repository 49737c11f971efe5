"""Every op of a backend, forward and backward, at few small shapes: what compute-sanitizer watches.

    python tools/exercise_ops.py [cuda | triton]

A shape that fails is told, and the others run.

Inputs are made on the host, so that on a GPU hardly a kernel but ours runs (a block's spatial convolution is
PyTorch's). One shape for each kind of kernel: narrow and wide channels, channels that are no multiple of a vector, a
window that leaves the clip, strides; rows too few for the chip, so that the depth is split, and enough of them and of
channels for the larger tiles, forward and in dgrad.
"""

import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import slowfast_fast
from slowfast_fast import ops
from slowfast_fast.backend import BACKENDS, can_run

DTYPES = ((torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False))
# channels, output channels, frames, kernel length, stride
TEMPORAL = (
    (8, 8, 8, 3, 1),
    (32, 16, 6, 3, 1),
    (256, 64, 4, 3, 1),
    (160, 136, 4, 3, 1),
    (7, 5, 5, 5, 2),
    (64, 256, 2, 1, 1),
    (32, 960, 15, 3, 1),
    (960, 32, 15, 3, 1),
    (32, 2048, 15, 1, 1),
    (2048, 32, 15, 1, 1),
)
# channels, inner channels, output channels, stride: a block in training, with a shortcut where it changes its shape
BLOCKS = ((8, 8, 32, 1), (136, 72, 144, 2), (9, 5, 23, 1))
# channels of slow, of fast, of the lateral convolution, frames of slow
LATERAL = ((64, 8, 16, 2), (128, 64, 128, 1), (5, 3, 6, 2))
POOLED = ((64,), (5,))  # channels of a stem
MOVED = ((64, 8), (5, 3))  # channels of slow and of fast
POSITIONS = (5, 7)  # an odd number of rows


class Inputs:
    """Random leaves on a device."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def _leaf(self, host: Tensor) -> Tensor:
        return host.to(self.device).requires_grad_()

    def rows(self, *shape: int) -> Tensor:
        return self._leaf(torch.randn(shape).to(self.dtype).contiguous(memory_format=torch.channels_last_3d))

    def weight(self, k: int, c: int, kt: int) -> Tensor:
        return self._leaf((torch.randn(k, c, kt, 1, 1) / (c * kt) ** 0.5).to(self.dtype))

    def spatial_weight(self, j: int) -> Tensor:
        return self._leaf((torch.randn(j, j, 1, 3, 3) / (9 * j) ** 0.5).to(self.dtype))

    def vectors(self, k: int) -> list[Tensor]:
        return [self._leaf(torch.rand(k) + 0.5) for _ in range(2)]

    def running(self, k: int) -> dict[str, Tensor]:
        return {
            "running_mean": torch.zeros(k).to(self.device),
            "running_var": torch.ones(k).to(self.device),
            "num_batches_tracked": torch.tensor(0).to(self.device),
        }


def finish(output: Tensor, *inputs: Tensor) -> None:
    grad = torch.randn(output.shape).to(output.dtype).contiguous(memory_format=torch.channels_last_3d)
    check(output, *torch.autograd.grad(output, inputs, grad.to(output.device)))


def check(*results: Tensor) -> None:
    for result in results:
        assert torch.isfinite(result.cpu()).all()


def temporal_conv(of: Inputs, c: int, k: int, t: int, kt: int, stride: int) -> None:
    x, weight, vectors = of.rows(2, c, t, *POSITIONS), of.weight(k, c, kt), of.vectors(k)
    residual = of.rows(2, k, (t + 2 * (kt // 2) - kt) // stride + 1, *POSITIONS)
    options = {"residual": residual, "stride": stride, "relu": True}
    inputs = (x, weight, *vectors, residual)
    finish(ops.temporal_conv(x, weight, *vectors, **options), *inputs)
    finish(ops.temporal_conv_bn(x, weight, *vectors, **of.running(k), training=True, **options), *inputs)


def bottleneck_bn(of: Inputs, c: int, j: int, k: int, stride: int) -> None:
    weights = [of.weight(j, c, 3), of.spatial_weight(j), of.weight(k, j, 1), of.weight(k, c, 1)]
    if (c, stride) == (k, 1):
        del weights[3]
    layers = [ops.NormedConv(w, *of.vectors(len(w)), **of.running(len(w))) for w in weights]
    x = of.rows(2, c, 4, *POSITIONS)
    finish(ops.bottleneck_bn(x, *layers, stride=stride), x, *(tensor for layer in layers for tensor in layer[:3]))


@torch.no_grad()
def bottleneck(of: Inputs, c: int, j: int, k: int, stride: int) -> None:
    weights = [of.weight(j, c, 3), of.spatial_weight(j), of.weight(k, j, 1), of.weight(k, c, 1)]
    if (c, stride) == (k, 1):
        del weights[3]
    layers = [tensor for weight in weights for tensor in (weight, of.vectors(len(weight))[0])]
    check(ops.bottleneck(of.rows(2, c, 4, *POSITIONS), *layers, stride=stride))


def stem(of: Inputs, c: int) -> None:
    pool = {"kernel": 3, "stride": 2, "padding": 1}
    x, vectors = of.rows(2, c, 3, *POSITIONS), of.vectors(c)
    finish(ops.batch_norm_max_pool(x, *vectors, **of.running(c), relu=True, **pool), x, *vectors)
    check(ops.max_pool(x.detach(), **pool))


def frames_concat(of: Inputs, c_slow: int, c: int) -> None:
    slow, fast = of.rows(2, c_slow, 2, *POSITIONS), of.rows(2, c, 8, *POSITIONS)
    finish(ops.frames_concat(slow, fast, alpha=4, taps=4), slow, fast)


def pack_pathways(of: Inputs) -> None:
    frames = torch.randint(256, (2, 8, *POSITIONS, 3), dtype=torch.uint8)
    check(*ops.pack_pathways(frames.to(of.device), alpha=4, dtype=of.dtype))


def lateral_concat(of: Inputs, c_slow: int, c: int, k: int, t: int) -> None:
    slow, fast = of.rows(1, c_slow, t, *POSITIONS), of.rows(1, c, 4 * t, *POSITIONS)
    inputs = (slow, fast, of.weight(k, c, 7), *of.vectors(k))
    finish(ops.lateral_concat(*inputs, alpha=4), *inputs)
    finish(ops.lateral_concat_bn(*inputs, **of.running(k), alpha=4, training=True), *inputs)


def main(backend: str = "cuda") -> None:
    device = BACKENDS[backend].devices[0]
    calls = failed = 0

    def attempt(op: Callable[..., None], of: Inputs, *shape: Any) -> None:
        nonlocal calls, failed
        calls += 1
        try:
            op(of, *shape)
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"{op.__name__} {shape} in {of.dtype} failed on {backend}", flush=True)

    every_shape = {
        "temporal_conv": (temporal_conv, TEMPORAL),
        "lateral_concat": (lateral_concat, LATERAL),
        "bottleneck_bn": (bottleneck_bn, BLOCKS),
        "bottleneck": (bottleneck, BLOCKS),
        "batch_norm_max_pool": (stem, POOLED),
        "frames_concat": (frames_concat, MOVED),
        "pack_pathways": (pack_pathways, ((),)),
    }
    with slowfast_fast.backend(backend):
        for dtype, tf32 in DTYPES:
            torch.backends.cudnn.allow_tf32 = tf32
            of = Inputs(device, dtype)
            for name, (op, shapes) in every_shape.items():
                if can_run(backend, name, torch.empty(1, dtype=dtype, device=device)) is None:
                    for shape in shapes:
                        attempt(op, of, *shape)
    if failed:
        raise SystemExit(f"{failed} of {calls} shapes and dtypes failed on {backend}")
    print(f"every op ran on {backend}, {calls} shapes and dtypes")


if __name__ == "__main__":
    main(*sys.argv[1:])
