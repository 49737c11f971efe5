"""The clips of a whole network's case, shared by its variants."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Clips:
    """Inputs of a network in NCDHW, one tensor for each pathway, and the same in other layouts and dtypes.

    In evaluation, where no clip knows of another, two of a batch are held against float64: all of a large one would
    take longer than the race, and on a CPU PyTorch's float64 convolution unfolds all that it is given.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = [torch.randn(tuple(size), generator=generator).to(device, dtype) for size in sizes]
        self._layouts = {torch.contiguous_format: self.tensors}

    def laid_out(self, memory_format: torch.memory_format, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The clips as a variant likes them best. Variants that like the same layout read the same memory; in another
        dtype than the case's they are the caller's own."""
        if memory_format not in self._layouts:
            self._layouts[memory_format] = [tensor.contiguous(memory_format=memory_format) for tensor in self.tensors]
        return [tensor if dtype is None else tensor.to(dtype) for tensor in self._layouts[memory_format]]

    @property
    def checked(self) -> list[int]:
        """Which clips are checked in evaluation: the first and the last."""
        return sorted({0, self.tensors[0].shape[0] - 1})

    def alone(self, clip: int) -> list[Tensor]:
        """One clip in float64, as a batch of its own."""
        return [tensor[clip : clip + 1].double() for tensor in self.tensors]
