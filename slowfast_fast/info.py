"""What this installation is made of and what it would use: the facts that a bug report needs."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from . import _C, _extension
from .backend import ENVIRONMENT_VARIABLE, KERNELS
from .choosing import choose


def build_info() -> dict[str, Any]:
    """How the compiled code was made.

    Keys: version, commit (None when not built from a git checkout; "-dirty" when files differed from it), build_type,
    compiler, torch (whose headers were used), abi_target (oldest torch that the library serves), cuda (None without
    CUDA kernels), cuda_archs, cpu_instruction_sets.
    """
    return dict(_C.build_info())


def runtime_info() -> dict[str, Any]:
    """What is chosen at run time, on this machine and in this environment.

    Keys: python, torch, torch_cuda (CUDA version of torch, or None), cpu_capability (instruction set that the CPU
    kernels use), threads, library (path), backend (the forced one, or auto), devices (name -> description),
    backends (device -> op -> {"backend", "reason"}, for float32).
    """
    devices = _devices()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cpu_capability": _extension.cpu_capability(),
        "threads": torch.get_num_threads(),
        "library": str(_extension.LIBRARY),
        "backend": os.environ.get(ENVIRONMENT_VARIABLE) or "auto",
        "devices": devices,
        "backends": {device: {op: _choice(op, device) for op in KERNELS} for device in devices},
    }


def _devices() -> dict[str, str]:
    devices = {"cpu": platform.processor() or platform.machine()}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = (
            f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _choice(op: str, device: str) -> dict[str, str | None]:
    try:
        choice = choose(op, torch.empty(0, device=device))
    except RuntimeError as error:  # a forced backend that cannot run here
        return {"backend": None, "reason": str(error)}
    return {"backend": choice.backend, "reason": choice.reason}


def as_text(build: dict[str, Any], runtime: dict[str, Any]) -> str:
    """Both dictionaries for a terminal."""
    facts = [
        ("slowfast_fast", build["version"]),
        ("commit", build["commit"] or "unknown"),
        ("build", f"{build['build_type']}, {build['compiler']}"),
        ("built against", f"torch {build['torch']}, for torch >= {build['abi_target']}"),
        ("CUDA kernels", f"CUDA {build['cuda']} for {' '.join(build['cuda_archs'])}" if build["cuda"] else "none"),
        ("CPU kernels", " ".join(build["cpu_instruction_sets"])),
        ("library", runtime["library"]),
        ("running", f"Python {runtime['python']}, torch {runtime['torch']} (CUDA {runtime['torch_cuda'] or 'none'})"),
        ("CPU capability", f"{runtime['cpu_capability']}, {runtime['threads']} threads"),
        ("backend", runtime["backend"]),
    ]
    lines = [f"{name:<15}{value}" for name, value in facts]
    for device, description in runtime["devices"].items():
        lines += ["", f"{device}: {description}"]
        lines += [
            f"  {op:<30}{choice['backend'] or 'none':<11}{choice['reason']}"
            for op, choice in runtime["backends"][device].items()
        ]
    return "\n".join(lines)
