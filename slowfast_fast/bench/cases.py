"""What one call of an op has to move and to compute: the formulas behind GB/s, GFLOP/s and percent of the limit.

A tensor is counted once for every pass over it that no implementation can avoid, whatever the caches do. So the figures
are the same for every variant, and one that makes more passes shows a lower rate. Multiplications with the zero padding
in T are counted, as `torch.utils.flop_counter` does; the epilogue's few operations per value are not.
"""

from dataclasses import dataclass
from math import prod

import torch

from .leg import Leg
from .shapes import Shape

DIRECTIONS = {"fwd": "eval forward", "bwd": "training forward and backward"}
ELEMENT_SIZE = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


@dataclass(frozen=True)
class Case:
    """An op at a shape of a leg, in a direction, which is a key of `DIRECTIONS`."""

    shape: Shape
    direction: str
    leg: Leg

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction: expected one of {sorted(DIRECTIONS)}, got {self.direction!r}")

    @property
    def dtype(self) -> torch.dtype:
        return self.leg.dtype

    @property
    def name(self) -> str:
        return f"{self.shape.op} {self.shape.name} {self.direction}"

    @property
    def bytes(self) -> int:
        return sum(traffic(self).values())

    @property
    def flops(self) -> int:
        return flops(self)


def traffic(case: Case) -> dict[str, int]:
    """Bytes per tensor that the call must read or write. Keys name the tensor and the pass."""
    shape, size = case.shape, ELEMENT_SIZE[case.dtype]
    vector = shape.out_channels * max(4, size)  # per-channel vectors are kept in the accumulation dtype
    x = shape.in_positions * shape.channels * size  # temporal_conv's x, lateral_concat's fast
    conv = shape.out_positions * shape.out_channels * size  # the convolution's result, raw or normalised
    weight = shape.out_channels * shape.channels * shape.kernel * size
    slow = shape.out_positions * shape.slow_channels * size  # 0 for temporal_conv

    if case.direction == "fwd":
        return {
            "input read": x,
            "weight read": weight,
            "scale and shift read": 2 * vector,
            "result written": conv,  # lateral_concat: into channels [slow_channels:]
            "slow read": slow,
            "slow written": slow,  # the concat's copy, into channels [:slow_channels]
        }
    return {
        # Forward. The statistics are known only when the whole convolution is, so its raw output makes a round trip.
        "input read": x,
        "weight read": weight,
        "raw written": conv,
        "raw read by the normalisation": conv,
        "gamma, beta, mean and invstd": 4 * vector,
        "result written": conv,
        "slow read": slow,
        "slow written": slow,
        # Backward. BatchNorm's two reductions must be complete before its input gradient can be formed, hence two
        # passes over grad and raw. The ReLU mask follows from raw; the gradient of slow is a view of grad.
        "grad read by the reductions": conv,
        "raw read by the reductions": conv,
        "grad read by dgrad and wgrad": conv,
        "raw read by dgrad and wgrad": conv,
        "input read by wgrad": x,
        "weight read by dgrad": weight,
        "input gradient written": x,
        "weight gradient written": weight,
        "gamma and beta gradients written": 2 * vector,
    }


def flops(case: Case) -> int:
    """Multiplications and additions of the convolution; in training also of dgrad and wgrad, each as many again."""
    shape = case.shape
    convolution = 2 * prod((shape.out_positions, shape.out_channels, shape.channels, shape.kernel))
    return convolution if case.direction == "fwd" else 3 * convolution


def natively_supported(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies in this dtype, as opposed to PyTorch emulating it at a fraction of the speed."""
    if device.type != "cpu" or torch.finfo(dtype).bits > 16:
        return True
    mkldnn = torch.ops.mkldnn
    return mkldnn._is_mkldnn_bf16_supported() if dtype is torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported()
