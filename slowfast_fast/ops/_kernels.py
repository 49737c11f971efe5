"""What explain() tells of a call: with the backend, the CUDA kernels that it takes."""

from __future__ import annotations

from torch import Tensor

from .. import _extension
from ..backend import Choice
from ..explanation import note_call, recording
from ._layout import output_shape

WORD = 16  # bytes that the fast kernels load at once


def note(
    op: str,
    choice: Choice,
    inputs: tuple[Tensor | None, ...],
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: tuple[int, int, int],
    tf32: bool,
) -> None:
    """``op`` ran on the backend of ``choice``: the convolution of ``x`` is among ``inputs``."""
    if not recording():
        return
    if choice.backend == "cuda":
        said = cuda_kernels(x, weight, geometry, tf32, all(is_aligned(t) for t in inputs if t is not None))
        if said is not None:
            choice = choice._replace(reason=f"{choice.reason}; {said}")
    note_call(op, choice, inputs, output)


def is_aligned(rows: Tensor) -> bool:
    """Whether every row begins at a multiple of WORD bytes."""
    stride_n, _, stride_t, _, stride_w = rows.stride()
    return all(
        offset % WORD == 0
        for offset in (rows.data_ptr(), *(s * rows.element_size() for s in (stride_n, stride_t, stride_w)))
    )


def cuda_kernels(x: Tensor, weight: Tensor, geometry: tuple[int, int, int], tf32: bool, aligned: bool) -> str | None:
    """Which kernels the cuda backend takes for a convolution and its gradients, and why not faster ones; None where the
    library has no CUDA kernels."""
    n, c, frames, h, w = x.shape
    k, _, taps, _, _ = weight.shape
    out_frames = output_shape(x, weight, *geometry)[2]
    shape = (n, c, k, frames, out_frames, h * w, taps, *geometry)
    return _extension.cuda_kernels(shape, x.dtype, tf32, aligned)
