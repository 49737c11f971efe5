"""What ran, and why: :func:`slowfast_fast.explain`.

While it runs a model, every op and every fused block leaves a note of what it did here (``recording``, ``note``,
``note_call``, ``note_copy``); at any other time there is nothing to leave it with.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .backend import Choice


class _PerThread(threading.local):
    # Set in __init__, not on the class: torch.compile guards on an instance attribute of a threading.local only.
    def __init__(self) -> None:
        self.recorder: Recorder | None = None


_thread = _PerThread()


@dataclass(frozen=True)
class Row:
    """One line of :func:`slowfast_fast.explain`: an op with the modules that it covered, or a module that ran as
    itself."""

    modules: tuple[str, ...]  # paths in the model
    what: str  # the op, or the type of the module
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    backend: str  # a key of backend.BACKENDS, a library in a frozen layer, or "torch": a stock module
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


@contextmanager
def because(reason: str) -> Iterator[None]:
    """Puts ``reason`` before that of every row that is noted in the block."""
    recorder = _thread.recorder
    first = 0 if recorder is None else len(recorder.rows)
    yield
    if recorder is not None:
        recorder.rows[first:] = [replace(row, reason=f"{reason}; {row.reason}") for row in recorder.rows[first:]]


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
        if getattr(module, "explains_itself", False):
            return
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
