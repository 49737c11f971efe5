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


def note_block(
    choice: Choice, x: Tensor, weights: dict[str, Tensor], geometry: tuple[int, ...], output: Tensor, tf32: bool
) -> None:
    """``bottleneck_bn`` ran on the backend of ``choice``. ``weights``: of a, b, c and, where there is one, the
    shortcut; ``geometry``: stride_a, padding_a and dilation_a first."""
    if not recording():
        return
    if choice.backend == "cuda":
        n, _, t, h, w = output.shape
        of_a, of_others = (x.shape[2], x.shape[3] * x.shape[4], geometry[:3]), (t, h * w, (1, 0, 1))
        reasons = [choice.reason]
        for name, weight in weights.items():
            k, c, taps = weight.shape[:3]
            frames, positions, window = of_a if name == "a" else of_others
            shape = (n, c, k, frames, t, positions, taps, *window)
            ours = _extension.cuda_kernels(shape, x.dtype, tf32, name == "c" or is_aligned(x)) if name != "b" else None
            said = "PyTorch's convolution of images" if name == "b" else ours
            reasons += [] if said is None else [f"{name}: {said}"]
        choice = choice._replace(reason="; ".join(reasons))
    note_call("bottleneck_bn", choice, (x,), output)


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
