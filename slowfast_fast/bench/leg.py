"""A leg of a run: the precision, batch and crop at which it measures every case."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# dtype, and whether float32 convolutions and products may round their factors to TF32 (on a GPU).
PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float64": (torch.float64, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}


@dataclass(frozen=True)
class Leg:
    """`precision` is a key of `PRECISIONS`, `crop` the height and width of the clips in pixels."""

    precision: str
    batch: int = 1
    crop: int = 224

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"dtype: expected one of {sorted(PRECISIONS)}, got {self.precision!r}")
        if self.batch < 1:
            raise ValueError(f"batch: expected at least 1, got {self.batch}")

    def __str__(self) -> str:
        return f"{self.precision}, batch {self.batch}, {self.crop} x {self.crop}"

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def tf32(self) -> bool:
        return PRECISIONS[self.precision][1]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """PyTorch's settings for the leg: TF32 as it says, and cuDNN free to measure which algorithm is fastest."""
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
        try:
            cudnn.allow_tf32 = matmul.allow_tf32 = self.tf32
            cudnn.benchmark = True
            yield
        finally:
            cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before
