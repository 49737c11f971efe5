"""The backends: what each can run, and the override that forces one.

One is forced for the whole process by the environment variable ``SLOWFAST_FAST_BACKEND`` (read when the package is
imported), or for a block of one thread by the context manager :class:`backend`; a forced backend that cannot run a call
raises and says why. Otherwise ``choosing.py`` decides among those that can.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from . import _extension  # noqa: F401  (registers the ops of the namespace slowfast_fast)

ENVIRONMENT_VARIABLE = "SLOWFAST_FAST_BACKEND"
# Triton's interpreter runs its kernels on the CPU, to be tested and debugged; it reads this itself.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Backend:
    """What a backend accepts. ``library`` is the namespace of ``torch.ops`` that holds its kernels; None: plain
    PyTorch, which takes any device and dtype that PyTorch's own convolution takes. ``module`` registers them when it
    is imported, which is put off until the backend is considered, and needs the package ``requires``."""

    name: str
    library: str | None = None
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    module: str | None = None
    requires: str = ""


# In the order in which `auto` asks where nothing else decides.
BACKENDS = {
    b.name: b
    for b in (
        Backend("cuda", "slowfast_fast", ("cuda",), (torch.float32, torch.float16, torch.bfloat16)),
        Backend("cpu", "slowfast_fast", ("cpu",), (torch.float32, torch.float64, torch.float16, torch.bfloat16)),
        Backend(
            "triton",
            "slowfast_fast_triton",
            ("cpu",) if INTERPRETED else ("cuda",),
            (torch.float32, torch.float16, torch.bfloat16),
            "slowfast_fast.triton",
            "triton",
        ),
        Backend("reference"),
    )
}

# The kernels that a call of each public op may reach, its backward included.
KERNELS = {
    "temporal_conv": ("temporal_conv", "temporal_conv_backward"),
    "temporal_conv_bn": ("temporal_conv_bn", "temporal_conv_bn_backward", "update_running_stats"),
    "lateral_concat": ("lateral_concat", "temporal_conv_backward"),
    "lateral_concat_bn": ("lateral_concat_bn", "temporal_conv_bn_backward", "update_running_stats"),
    "bottleneck": ("bottleneck", "bottleneck_out"),
    "bottleneck_bn": ("bottleneck_bn", "bottleneck_bn_backward", "update_running_stats"),
    "batch_norm_max_pool": ("batch_norm_max_pool", "batch_norm_max_pool_backward", "update_running_stats"),
    "stem_conv": ("stem_conv", "stem_conv_wgrad"),
    "max_pool": ("max_pool",),
    "pack_pathways": ("pack_pathways",),
    "spatial_conv": ("spatial_conv",),
    "frames_concat": ("frames_concat", "frames_concat_backward"),
    "max_pool_frames_concat": ("max_pool_frames_concat",),
    "temporal_conv_frames_concat": ("temporal_conv_frames_concat",),
    "max_pool_lateral_concat": ("max_pool_lateral_concat",),
    "temporal_conv_lateral_concat": ("temporal_conv_lateral_concat",),
}


class Choice(NamedTuple):
    """The backend that runs a call, and why that one."""

    backend: str
    reason: str


def check_name(name: str, what: str = "backend") -> str:
    """``name`` if it names a backend or is ``auto``; ValueError, with ``what`` it was given as, if not."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{what} must be one of auto, {', '.join(BACKENDS)}; got {name!r}")
    return name


_default = check_name(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", ENVIRONMENT_VARIABLE)


class _PerThread(threading.local):
    # Set in __init__, not on the class: torch.compile guards on an instance attribute of a threading.local only.
    def __init__(self) -> None:
        self.forced = _default


_thread = _PerThread()


def forced() -> str:
    """The backend that this thread's calls are forced onto, or ``auto``."""
    return _thread.forced


class backend:
    """Context manager that makes every op called by this thread in the block run on backend ``name``, and undoes it
    at the end.

    ``auto`` lifts a choice made outside. A compiled function is compiled once more for each backend it is called
    under; the backward runs on the backend of its forward.

    Raises ValueError for an unknown name. A call that the backend cannot run raises RuntimeError with the reason.
    """

    def __init__(self, name: str) -> None:
        self.name = check_name(name)

    def __enter__(self) -> None:
        self.outer = _thread.forced
        _thread.forced = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _thread.forced = self.outer


# What is told to PyTorch of the kernels of a namespace, once it is loaded; ops/ adds to it.
_definitions: list[Callable[[str], None]] = []
# Per module that registers kernels: None once it is imported, or why it cannot be.
_imported: dict[str, str | None] = {}


def for_every_library(define: Callable[[str], None]) -> Callable[[str], None]:
    """Decorator of a function that tells PyTorch of the kernels in the namespace that it is given: it runs for each
    namespace when that is loaded. Those of the extension are loaded already."""
    _definitions.append(define)
    define("slowfast_fast")
    return define


def _why_not_loaded(b: Backend) -> str | None:
    """Imports the kernels of ``b``, the first time; None if they are there, else the reason why not."""
    if b.module is None:
        return None
    if b.module not in _imported:
        _imported[b.module] = None
        if importlib.util.find_spec(b.requires) is None:
            _imported[b.module] = f"{b.requires} is not installed"
        else:
            try:
                importlib.import_module(b.module)
            except ImportError as error:
                _imported[b.module] = f"{b.module} cannot be imported: {error}"
            else:
                for define in _definitions:
                    define(str(b.library))
    return _imported[b.module]


def _missing(b: Backend, op: str) -> list[str]:
    """The kernels of ``op`` that the library of ``b`` lacks."""

    def has(kernel: str) -> bool:
        if not hasattr(getattr(torch.ops, str(b.library)), kernel):
            return False
        # torch.library.triton_op registers for all devices at once.
        keys = [device.upper() for device in b.devices] if b.module is None else ["CompositeExplicitAutograd"]
        return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"{b.library}::{kernel}", key) for key in keys)

    return [kernel for kernel in KERNELS[op] if not has(kernel)]


def can_run(name: str, op: str, *tensors: Tensor) -> str | None:
    """None if backend ``name`` can run public op ``op`` on these tensors (of one device and dtype), else the reason
    why not."""
    return _why_not(check_name(name), op, tensors[0].device.type, tensors[0].dtype)


def _why_not(name: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    b = BACKENDS[name]
    if b.library is None:
        return None
    if device not in b.devices:
        return f"the tensors are on {device}, the {name} backend runs on {' and '.join(b.devices)}"
    if dtype not in b.dtypes:
        return f"the {name} backend has no kernel for {dtype}"
    absent = _why_not_loaded(b)
    if absent is not None:
        return f"no {name} kernels: {absent}"
    missing = _missing(b, op)
    if missing:
        return f"this build has no {name} kernel of {', '.join(missing)}"
    return None
