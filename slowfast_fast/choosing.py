"""The backend of a call: the forced one, or by ``auto`` the one that was fastest when the device was measured
(``tuned/<device>.json``, made by ``python -m slowfast_fast tune``), or on other devices the one that ought to be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import BACKENDS, Choice, _why_not, forced

TABLES = Path(__file__).with_name("tuned")
# Classes of C and K: upper limits, the last one open. At most NARROW, a tensor core's tile is mostly padding and the
# layer is bound by memory: 2 * C * K * kt operations on C + K values a row.
CHANNELS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
NARROW = 64
# Ops without a product, whose kernels do the same in every library.
MOVES = ("frames_concat", "pack_pathways")


class Situation(NamedTuple):
    """All that a choice depends on; op, direction, dtype and shape make the key of an entry in a table."""

    op: str
    direction: str  # fwd or bwd
    forced: str
    device: str
    ordinal: int | None
    dtype: torch.dtype
    tf32: bool
    shape: str  # of shape_class(); empty where it plays no part
    deterministic: bool


def shape_class(weight: Tensor, stride: int) -> str:
    """The class of a convolution by what a layer is, whatever the size of a clip: channels, taps, stride."""
    k, c, taps = weight.shape[:3]
    taken = "pointwise" if taps == 1 else "temporal"
    return f"{channel_class(c)}->{channel_class(k)} {taken}{' strided' if stride > 1 else ''}"


def channel_class(count: int) -> int:
    # A loop of comparisons: torch.compile guards on the class of a symbolic size, not on the size.
    for limit in CHANNELS:
        if count <= limit:
            return limit
    return CHANNELS[-1]


def choose(
    op: str,
    x: Tensor,
    weight: Tensor | None = None,
    stride: int = 1,
    *,
    tf32: bool = False,
    direction: str = "fwd",
    dtype: torch.dtype | None = None,
) -> Choice:
    """The backend for one call of ``op`` on ``x`` (for lateral_concat: ``fast``), or for its backward. ``dtype``: what
    the kernels compute for, where that is not the dtype of ``x``.

    Raises RuntimeError if a backend was forced that cannot run it.
    """
    backend, reason = decide(op, x, weight, stride, tf32=tf32, direction=direction, dtype=dtype)
    if backend is None:
        raise RuntimeError(f"backend {forced()!r} was asked for and cannot run {op}: {reason}")
    return Choice(backend, reason)


def decide(
    op: str,
    x: Tensor,
    weight: Tensor | None = None,
    stride: int = 1,
    *,
    tf32: bool = False,
    direction: str = "fwd",
    dtype: torch.dtype | None = None,
) -> tuple[str | None, str]:
    """The same, with None for a forced backend that cannot run the call, and the reason."""
    device = x.device
    by_shape = forced() == "auto" and device.type == "cuda" and weight is not None
    situation = (
        *(op, direction, forced(), device.type, device.index, dtype or x.dtype, tf32),
        shape_class(weight, stride) if by_shape and weight is not None else "",
        device.type == "cuda" and torch.are_deterministic_algorithms_enabled(),
    )
    return _decide(*situation)


_decisions: dict[tuple[Any, ...], tuple[str | None, str]] = {}


def _decide(*situation: Any) -> tuple[str | None, str]:
    """The backend, or None if the forced one cannot run the call, and the reason."""
    found = _decisions.get(situation)
    if found is None:
        found = _decisions[situation] = _decide_anew(Situation(*situation))
    return found


# torch.compile evaluates this when it traces and keeps the result: all arguments are constants that it guards on. It
# is what torch.compiler.assume_constant_result does, which would import the whole compiler with the package.
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decide_anew(s: Situation) -> tuple[str | None, str]:
    if s.forced != "auto":
        why_not = _why_not(s.forced, s.op, s.device, s.dtype)
        return (s.forced, "asked for") if why_not is None else (None, why_not)
    made_for = [name for name, b in BACKENDS.items() if s.device in b.devices]
    refused = {name: _why_not(name, s.op, s.device, s.dtype) for name in made_for}
    able = [name for name, why_not in refused.items() if why_not is None]
    others = "; ".join(why_not for why_not in refused.values() if why_not is not None)
    if not able:
        return "reference", others or f"no compiled backend is made for {s.device}"
    if len(able) == 1 or s.device == "cpu":
        # On the CPU the second one would be Triton's interpreter, which nobody wants for its speed.
        return able[0], f"fastest for {s.device}" + (f" ({others})" if others else "")
    if s.op in MOVES:
        return able[0], f"{' and '.join(able)} move the same bytes, {able[0]} launches faster"
    if not s.shape:
        return able[0], f"{' or '.join(able)}, by the shape of a call"
    return _fastest(s, able)


def _fastest(s: Situation, able: list[str]) -> tuple[str, str]:
    """Of several backends on a GPU."""
    if s.deterministic and "cuda" in able:
        return "cuda", "deterministic mode: there triton takes tile shapes that nobody timed, cuda computes as always"
    name, capability = cuda_device(s.ordinal)
    entry = table(name).get(table_key(s.op, s.direction, s.dtype, s.tf32, s.shape))
    if entry in able:
        return str(entry), f"measured fastest for {s.shape} on {name}"
    return by_heuristic(s.shape, s.dtype, s.tf32, capability)


def by_heuristic(shape: str, dtype: torch.dtype, tf32: bool, capability: tuple[int, int]) -> tuple[str, str]:
    """cuda or triton, on a device or for a shape that was not measured."""
    c, k = map(int, shape.split()[0].split("->"))
    sm = f"sm_{capability[0]}{capability[1]}"
    if min(c, k) <= NARROW:
        return (
            "cuda",
            f"not measured on this device; {shape} is narrow and bound by memory, made for by its own kernels",
        )
    if dtype == torch.float32 and not tf32:
        return "cuda", "not measured on this device; float32 without TF32 has no tensor cores, so launches decide"
    if capability >= (9, 0):
        return "triton", f"not measured on this device; wide on {sm}: tl.dot becomes wgmma or newer, cuda has mma.sync"
    return "cuda", f"not measured on this device; wide on {sm}: mma.sync in both, cuda launches faster"


def table_key(op: str, direction: str, dtype: torch.dtype, tf32: bool, shape: str) -> str:
    kind = "tf32" if tf32 else str(dtype).removeprefix("torch.")
    return f"{op} {direction} {kind} {shape}"


def table_path(device_name: str) -> Path:
    """The table of a device: NVIDIA H200 in nvidia_h200.json."""
    return TABLES / (re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json")


_tables: dict[str, dict[str, str]] = {}


def table(device_name: str) -> dict[str, str]:
    """The backend by table_key(); empty for a device that was not measured."""
    if device_name not in _tables:
        path = table_path(device_name)
        _tables[device_name] = json.loads(path.read_text())["fastest"] if path.is_file() else {}
    return _tables[device_name]


def cuda_device(ordinal: int | None) -> tuple[str, tuple[int, int]]:
    """Name and compute capability. A fake tensor can be on a device that is not there."""
    if not torch.cuda.is_available():
        return "no device", (0, 0)
    properties = torch.cuda.get_device_properties(ordinal)
    return properties.name, (properties.major, properties.minor)
