"""What the tests of the benchmarks share: small cases, and measurements that nobody took."""

import torch

from slowfast_fast.bench.cases import Case
from slowfast_fast.bench.leg import Leg
from slowfast_fast.bench.measure import COPY, GEMM, Measurement
from slowfast_fast.bench.network import NetworkCase
from slowfast_fast.bench.shapes import Shape
from slowfast_fast.bench.summary import STOCK
from slowfast_fast.bench.variants import OURS

CPU = torch.device("cpu")
FLOAT32 = Leg("float32")
SMALL = {
    "temporal_conv": Shape("temporal_conv", "fast", 2, 2, 8, 16, 3, frames=5, size=3),
    "lateral_concat": Shape("lateral_concat", "lateral", 1, 2, 8, 16, 7, frames=8, size=3, stride=4, slow_channels=24),
}


def measurement(shape: Shape | str, direction: str = "fwd", **milliseconds: list[float]) -> Measurement:
    """Of an op's shape, or of a network by its name."""
    of_network = isinstance(shape, str)
    case = NetworkCase(FLOAT32, direction, shape) if of_network else Case(shape, direction, FLOAT32)
    names = {"ours": OURS, "stock": STOCK, "copy": COPY, "gemm": GEMM}
    found = Measurement(case, "cpu", OURS)
    found.seconds = {names[name]: [value / 1e3 for value in values] for name, values in milliseconds.items()}
    found.errors = dict.fromkeys(found.variants, 0.0)
    return found
