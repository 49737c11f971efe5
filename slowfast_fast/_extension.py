"""Loads the operator library, once, at import: every schema and compiled kernel of ``torch.ops.slowfast_fast``."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libslowfast_fast.so")


def _load() -> None:
    oldest = (2, 10)
    version = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    if version < oldest:
        raise ImportError(f"slowfast_fast needs torch >= 2.10; this environment has {torch.__version__}")
    if not LIBRARY.is_file():
        raise ImportError(
            f"slowfast_fast's operator library is missing: {LIBRARY} does not exist. "
            "Build it with `pip install .`, or `python setup.py build_ext --inplace` in a source checkout."
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(
            f"slowfast_fast's operator library {LIBRARY} does not load under torch {torch.__version__}: {error}. "
            "Build it again with `pip install .`, or `python setup.py build_ext --inplace` in a source checkout."
        ) from error


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use in this process: "baseline", "avx2" or "avx512".

    The newest one that both the processor and this build have. The environment variable ``ATEN_CPU_CAPABILITY``, set to
    "default", "avx2" or "avx512" before the first call of an op, asks for no newer one than that.
    """
    function = ctypes.CDLL(str(LIBRARY)).slowfast_fast_cpu_capability
    function.restype = ctypes.c_char_p
    return function().decode()


# In the order of Dtype in csrc/primitives.h.
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def cuda_kernels(shape: tuple[int, ...], dtype: torch.dtype, tf32: bool, aligned: bool) -> str | None:
    """Which CUDA kernels a convolution takes, in words; ``shape`` as ConvShape in csrc/primitives.h, ``aligned``:
    whether every row lies at a multiple of 16 bytes. None where the library was built without CUDA kernels."""
    function = getattr(ctypes.CDLL(str(LIBRARY)), "slowfast_fast_cuda_kernels", None)
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    function.argtypes = (ctypes.POINTER(ctypes.c_int64), ctypes.c_int, ctypes.c_bool, ctypes.c_bool)
    return function((ctypes.c_int64 * len(shape))(*shape), _DTYPES.index(dtype), tf32, aligned).decode()


def cuda_bottleneck(c: int, j: int, k: int, dtype: torch.dtype, tf32: bool, aligned: bool) -> str | None:
    """Why a bottleneck block C -> J -> K takes the general CUDA kernel, in words; "" if it takes the one on tensor
    cores. None where the library was built without CUDA kernels."""
    function = getattr(ctypes.CDLL(str(LIBRARY)), "slowfast_fast_cuda_bottleneck", None)
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    function.argtypes = (*[ctypes.c_int64] * 3, ctypes.c_int, ctypes.c_bool, ctypes.c_bool)
    return function(c, j, k, _DTYPES.index(dtype), tf32, aligned).decode()


_load()
