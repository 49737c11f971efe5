"""Which backend runs which op, and why.

``auto`` takes the first backend of :data:`BACKENDS` that can run a call. One is forced for the whole process by the
environment variable ``SLOWFAST_FAST_BACKEND`` (read when the package is imported), or for a block of one thread by
the context manager :class:`backend`; a forced backend that cannot run a call raises and says why.

While :func:`slowfast_fast.explain` runs a model, every op and every fused block leaves a note of what it did here
(``recording``, ``note``); at any other time the recorder does not exist.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import _extension  # noqa: F401  (the table below asks which kernels the library registered)

ENVIRONMENT_VARIABLE = "SLOWFAST_FAST_BACKEND"


@dataclass(frozen=True)
class Backend:
    """What a backend accepts. ``library`` is the namespace of ``torch.ops`` that holds its kernels; None: plain
    PyTorch, which takes any device and dtype that PyTorch's own convolution takes."""

    name: str
    library: str | None = None
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()


# In the order in which `auto` asks: the fastest first.
BACKENDS = {
    b.name: b
    for b in (
        Backend("cuda", "slowfast_fast", ("cuda",), (torch.float32, torch.float16, torch.bfloat16)),
        Backend("cpu", "slowfast_fast", ("cpu",), (torch.float32, torch.float64, torch.float16, torch.bfloat16)),
        Backend("reference"),
    )
}

# The kernels that a call of each public op may reach, its backward included.
KERNELS = {
    "temporal_conv": ("temporal_conv", "temporal_conv_backward"),
    "temporal_conv_bn": ("temporal_conv_bn", "temporal_conv_bn_backward", "update_running_stats"),
    "lateral_concat": ("lateral_concat", "temporal_conv_backward"),
    "lateral_concat_bn": ("lateral_concat_bn", "temporal_conv_bn_backward", "update_running_stats"),
}

# Per backend and op, the kernels that this build lacks. Asked once: the library does not change after it was loaded,
# and torch.compile can read a table but not question the dispatcher.
_MISSING = {
    (b.name, op): tuple(
        k
        for k in kernels
        for device in b.devices
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{b.library}::{k}", device.upper())
    )
    for b in BACKENDS.values()
    for op, kernels in KERNELS.items()
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
        self.recorder: Recorder | None = None


_thread = _PerThread()


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
    missing = _MISSING[name, op]
    if missing:
        return f"this build has no {name} kernel of {', '.join(missing)}"
    return None


def _fastest(op: str, device: str, dtype: torch.dtype) -> Choice:
    reason = f"no compiled backend is made for {device}"
    for name, candidate in BACKENDS.items():
        why_not = _why_not(name, op, device, dtype)
        if why_not is None:
            return Choice(name, reason if candidate.library is None else f"fastest for {device}")
        if device in candidate.devices:
            reason = why_not
    raise AssertionError("the reference backend runs everything")


# `auto` for every device and dtype that a compiled backend is made for: an op is chosen for at each call.
_FASTEST = {
    (op, device, dtype): _fastest(op, device, dtype)
    for b in BACKENDS.values()
    for op in KERNELS
    for device in b.devices
    for dtype in b.dtypes
}


def choose(op: str, *tensors: Tensor) -> Choice:
    """The backend for one call of ``op``: the forced one, or the first that can run it.

    Raises RuntimeError if the forced one cannot.
    """
    forced, device, dtype = _thread.forced, tensors[0].device.type, tensors[0].dtype
    if forced == "auto":
        return _FASTEST.get((op, device, dtype)) or _fastest(op, device, dtype)
    why_not = _why_not(forced, op, device, dtype)
    if why_not is not None:
        raise RuntimeError(f"backend {forced!r} was asked for and cannot run {op}: {why_not}")
    return Choice(forced, "asked for")


@dataclass(frozen=True)
class Row:
    """One line of :func:`slowfast_fast.explain`: an op with the modules that it covered, or a module that ran as
    itself."""

    modules: tuple[str, ...]  # paths in the model
    what: str  # the op, or the type of the module
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    backend: str  # a key of BACKENDS, or "torch": a stock module
    reason: str


@dataclass
class Recorder:
    """Collects rows in the order of execution. ``paths`` names the modules of the model by identity."""

    paths: dict[int, str]
    rows: list[Row] = field(default_factory=list)
    unfused: dict[int, str] = field(default_factory=dict)
    pending: tuple[tuple[str, ...], str] = ((), "")
    copies: list[str] = field(default_factory=list)

    def path(self, module: nn.Module) -> str:
        return self.paths.get(id(module), type(module).__name__)


def recording() -> bool:
    """Whether explain() is watching this thread."""
    return _thread.recorder is not None


def note(modules: Iterable[nn.Module | None], op: str | None, reason: str = "") -> None:
    """For the blocks of ``nn/``; call it only while :func:`recording`.

    With ``op``: the next op called runs on behalf of ``modules``, and ``reason`` is added to its row. With ``op``
    None: ``modules`` are about to run one by one, as modules, and ``reason`` says why they were not fused. None
    among ``modules`` is skipped.
    """
    recorder = _thread.recorder
    assert recorder is not None, "note() is for code that runs under recording()"
    given = [m for m in modules if m is not None]
    if op is None:
        for module in given:
            recorder.unfused.update((id(part), reason) for part in module.modules())
    else:
        recorder.pending = (tuple(recorder.path(m) for m in given), reason)


def note_copy(argument: str, tensor: Tensor) -> None:
    """For ops/: ``argument`` was not laid out as rows and is copied before the op."""
    if _thread.recorder is not None:
        _thread.recorder.copies.append(f"copied {argument} {tuple(tensor.shape)} from strides {tensor.stride()}")


def note_call(op: str, choice: Choice, inputs: Iterable[Tensor | None], output: Tensor) -> None:
    """For ops/: ``op`` ran on the backend of ``choice``."""
    recorder = _thread.recorder
    if recorder is None:
        return
    modules, reason = recorder.pending
    shapes = tuple(tuple(t.shape) for t in inputs if t is not None)
    parts = [part for part in (reason, choice.reason, *recorder.copies) if part]
    recorder.rows.append(Row(modules, op, shapes, (tuple(output.shape),), choice.backend, "; ".join(parts)))
    recorder.pending = ((), "")
    recorder.copies.clear()


class Explanation:
    """What :func:`slowfast_fast.explain` found: ``rows`` in the order of execution, and ``str()`` of it as a table."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(rows)

    def __repr__(self) -> str:
        counts = Counter(row.backend for row in self.rows)
        return f"<Explanation: {', '.join(f'{n} rows on {name}' for name, n in counts.items())}>"

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("layer", "ran as", "backend", "shapes", "why")]
        for row in self.rows:
            shapes = f"{', '.join(map(_by, row.inputs))} -> {', '.join(map(_by, row.outputs))}"
            lines.append((_braces(row.modules), row.what, row.backend, shapes, row.reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, tuple("-" * width for width in widths))
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _braces(paths: tuple[str, ...]) -> str:
    """a.b.conv, a.b.norm as a.b.{conv,norm}; a call that no module made as (direct call)."""
    if not paths:
        return "(direct call)"
    parents = {path.rpartition(".")[0] for path in paths}
    if len(paths) == 1 or len(parents) > 1:
        return ", ".join(paths)
    parent = parents.pop()
    return f"{parent}{'.' if parent else ''}{{{','.join(path.rpartition('.')[2] for path in paths)}}}"


def explain(model: nn.Module, inputs: Any, *, show: bool = True) -> Explanation:
    """Run ``model(inputs)`` once and tell which backend ran each layer, and why.

    The model runs in the mode it is in (train or eval), eagerly even if it is compiled, without gradients. Its
    buffers (BatchNorm statistics), the state of PyTorch's random number generators and a list given as ``inputs``
    are as before afterwards.

    Args:
        model: any module; modules that no op of this package covered are shown as stock modules ("torch") with the
            reason.
        inputs: what the model takes as its one argument; for SlowFast the list [slow, fast] of (N, C, T, H, W) tensors.
        show: print the table as well.

    Returns:
        An Explanation, whose ``rows`` are in the order of execution.
    """
    model = getattr(model, "_orig_mod", model)
    recorder = Recorder({id(module): path for path, module in model.named_modules()})

    # A hook on all modules of the process rather than one on each: fused blocks step aside for modules that carry
    # hooks.
    def on_forward(module: nn.Module, args: Any, output: Any) -> None:
        if _thread.recorder is recorder and id(module) in recorder.paths and not any(module.children()):
            reason = recorder.unfused.get(id(module), "no op of this package covers it")
            recorder.rows.append(
                Row((recorder.path(module),), type(module).__name__, _shapes(args), _shapes(output), "torch", reason)
            )

    buffers = [
        (module, name, tensor, tensor.clone())
        for module in model.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]
    outer = _thread.recorder
    handle = nn.modules.module.register_module_forward_hook(on_forward)
    try:
        _thread.recorder = recorder
        with torch.no_grad(), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            model(list(inputs) if isinstance(inputs, list) else inputs)
    finally:
        _thread.recorder = outer
        handle.remove()
        with torch.no_grad():
            for module, name, tensor, value in buffers:
                tensor.copy_(value)
                module._buffers[name] = tensor
    explanation = Explanation(recorder.rows)
    if show:
        print(explanation)
    return explanation


def _shapes(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
