"""``accelerate`` and ``restore``: which modules of a model are taken over, and how."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import new_class
from typing import Any

from torch import nn

from ..explanation import note, recording
from ..nn.fused import modules_needed
from ..nn.units import UNIT, Unit, forward_class, stock_class
from . import gluoncv, mmaction2, pyslowfast, pytorchvideo, r1c7
from ._library import Library
from ._probe import computes_otherwise

LIBRARIES: Sequence[Library] = tuple(m.LIBRARY for m in (pytorchvideo, pyslowfast, mmaction2, gluoncv, r1c7))


@dataclass(frozen=True)
class Row:
    """What became of a module: ``reason`` is why it was left as it is; empty where it runs on the ops."""

    path: str  # in the model
    kind: str  # its class
    reason: str


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did.

    Attributes:
        libraries: those whose classes were found.
        accelerated: the modules that were taken over.
        left: modules that hold convolutions and were left as they are, with the reason.
        layers: every convolution, with the reason why it runs as a module today; empty where it is part of an op. The
            reasons may change with the model: ``explain`` tells what ran.
    """

    libraries: tuple[str, ...]
    accelerated: tuple[Row, ...]
    left: tuple[Row, ...]
    layers: tuple[Row, ...]

    def __str__(self) -> str:
        fused = sum(not row.reason for row in self.layers)
        kinds = Counter(row.kind for row in self.accelerated)
        lines = [
            f"{' and '.join(self.libraries)}: {fused} of {len(self.layers)} convolutions run on fused ops",
            f"  taken over: {', '.join(f'{n} {kind}' for kind, n in kinds.items()) or 'nothing'}",
        ]
        lines += [f"  left: {row.path or 'the model'} ({row.kind}): {row.reason}" for row in self.left]
        reasons = Counter(row.reason for row in self.layers if row.reason)
        return "\n".join(lines + [f"  as modules: {n} convolutions: {reason}" for reason, n in reasons.most_common()])


def accelerate(model: nn.Module) -> Report:
    """Make a stock SlowFast model run on the fused ops, in place.

    Taken are the blocks of pytorchvideo, PySlowFast, mmaction2, gluoncv and r1c7's SlowFastNetworks, single-pathway
    networks of theirs (Slow-only, I3D, C2D) included. They are recognised by the names of their classes and by what
    they are made of, so that a copy of a library's code is, too; no library is imported. Then a block of each class is
    tried out, on the CPU: one that computes something else, or whose ``forward`` is overridden, is left alone.

    The model stays the same object, with the same parameters and buffers (optimizers made before keep working), the
    same ``state_dict``, module names and call. A module that is taken over has a class derived from its own, of the
    same name; copies and pickles stay accelerated. Modules may be hooked, replaced, frozen or converted afterwards:
    what runs on an op is decided anew at every forward, as in ``create_slowfast``. Features are in channels_last_3d
    memory.

    Returns a :class:`Report`, whose ``str`` tells what was taken over, what not, and why. Accelerating twice does no
    more than once. Raises TypeError if ``model`` is no module, ValueError where nothing in it is known.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    found: dict[str, tuple[nn.Module, Library, Unit]] = {}
    unlike: dict[str, str] = {}
    tried: dict[Any, str | None] = {}
    for path, module in model.named_modules():
        match = _recognise(module, tried)
        if isinstance(match, tuple):
            found[path] = (module, *match)
        elif match is not None:
            unlike[path] = match
    alone = {reason for _, library, _ in found.values() for reason in _left_alone(model, library)}
    if alone:
        names = tuple(dict.fromkeys(library.name for _, library, _ in found.values()))
        row = Row("", type(model).__name__, "; ".join(sorted(alone)))
        return Report(names, (), (row,), tuple(_layers(model, row.reason)))
    if not found:
        _raise_unknown(model, unlike)
    _give_plain_ints(model)
    for module, _, unit in found.values():
        if not hasattr(type(module), UNIT):
            kind: Any = type(module)
            module.__class__ = _taken_over(kind, unit)
    return Report(
        _libraries(found.values()),
        tuple(Row(path, type(module).__name__, "") for path, (module, _, _) in found.items()),
        tuple(_left(model, found, unlike)),
        tuple(_layers(model)),
    )


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every module has its own class back. Does nothing to a model that is not accelerated."""
    for module in model.modules():
        if UNIT in type(module).__dict__:
            module.__class__ = stock_class(type(module))


def _give_plain_ints(model: nn.Module) -> None:
    """pytorchvideo's shortcuts hold strides of numpy.int64, which torch.compile cannot trace in one graph."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.stride = tuple(int(n) for n in module.stride)


def _recognise(module: nn.Module, tried: dict[Any, str | None]) -> tuple[Library, Unit] | str | None:
    """The library and unit of a module; where only its name is known why it is none of them; else None.

    ``tried`` remembers what came of trying out a class.
    """
    kind = stock_class(type(module))
    made_by = forward_class(kind)
    if made_by.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return None
    reasons = []
    for library in LIBRARIES:
        unit = library.units.get(made_by.__name__)
        if unit is None:
            continue
        reason = unit.unlike(module)
        if reason is None and (kind, unit) not in tried:
            accelerated = hasattr(type(module), UNIT)
            tried[kind, unit] = None if accelerated else computes_otherwise(module, unit)
        reason = reason or tried[kind, unit]
        if reason is None:
            return library, unit
        reasons.append(f"not {library.name}'s: it {reason}")
    if reasons:
        return "; ".join(reasons)
    known = [base.__name__ for base in kind.__mro__ if any(base.__name__ in library.units for library in LIBRARIES)]
    return f"{made_by.__name__} has a forward of its own, not {known[0]}'s" if known else None


@functools.cache
def _taken_over(kind: Any, unit: Unit) -> Any:
    """The class of a module that was of class ``kind`` and is run by ``unit``."""
    first = list(inspect.signature(kind.forward).parameters)[1]

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *inputs: Any, **keywords: Any) -> Any:
        if not inputs and list(keywords) == [first]:
            inputs, keywords = (keywords[first],), {}
        if len(inputs) == 1 and not keywords:
            reason = None if unit.stock_if is None else unit.stock_if(self)
        else:
            reason = "called with more than one argument"
        if reason is None:
            return unit.run(self, inputs[0])
        if recording():
            note([self], None, reason)
        return kind.forward(self, *inputs, **keywords)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return (_rebuild, (kind, *_address(unit)), object.__reduce_ex__(self, 2)[2])

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        UNIT: unit,
    }
    return new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(body))


def _address(unit: Unit) -> tuple[str, str]:
    """The library and class by which a pickle names a unit."""
    return next((lib.name, name) for lib in LIBRARIES for name, other in lib.units.items() if other is unit)


def _rebuild(kind: Any, library: str, name: str) -> Any:
    """An empty module of an accelerated class, for copies and pickles."""
    unit = next(lib.units[name] for lib in LIBRARIES if lib.name == library)
    made = _taken_over(kind, unit)
    return made.__new__(made)


def _left_alone(model: nn.Module, library: Library) -> Iterator[str]:
    for module in model.modules():
        reason = library.left_alone.get(type(module).__name__)
        if reason is not None:
            yield reason


def _libraries(found: Iterable[tuple[nn.Module, Library, Unit]]) -> tuple[str, ...]:
    """As few as spell all units that were found: some units are the same in several libraries."""
    units = [unit for _, _, unit in found]
    names: list[str] = []
    while units:
        spelled = [(library, [unit for unit in units if unit in library.units.values()]) for library in LIBRARIES]
        library, explained = max(spelled, key=lambda pair: len(pair[1]))
        names.append(library.name)
        units = [unit for unit in units if unit not in explained]
    return tuple(names)


def _layers(model: nn.Module, alone: str = "") -> Iterator[Row]:
    """Every convolution, and why it runs as a module: for ``alone``, if it is given."""
    reasons: dict[int, str] = {}
    for module in model.modules():
        unit = getattr(type(module), UNIT, None)
        for conv, norm, act in unit.covered(module) if unit is not None else ():
            reasons.setdefault(id(conv), modules_needed(conv, norm, act) or "")
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv3d):
            yield Row(path, type(module).__name__, alone or reasons.get(id(module), "no op covers the module it is in"))


def _left(model: nn.Module, found: Mapping[str, Any], unlike: Mapping[str, str]) -> Iterator[Row]:
    """The modules with convolutions of their own that no unit covers."""
    covered = {
        id(parts[0])
        for module in model.modules()
        if hasattr(type(module), UNIT)
        for parts in getattr(type(module), UNIT).covered(module)
    }
    modules = dict(model.named_modules())
    seen = set()
    for path, conv in modules.items():
        if not isinstance(conv, nn.Conv3d) or id(conv) in covered:
            continue
        owner = path.rpartition(".")[0]
        while owner and type(modules[owner]) in (nn.Sequential, nn.ModuleList):
            owner = owner.rpartition(".")[0]
        if owner not in seen:
            seen.add(owner)
            kind = type(modules[owner]).__name__
            known = "runs as it is, on NCDHW memory" if owner in found else f"{kind} is not known"
            yield Row(owner, kind, unlike.get(owner, known))


def _raise_unknown(model: nn.Module, unlike: Mapping[str, str]) -> None:
    ours = any(type(module).__module__.startswith("slowfast_fast.nn.") for module in model.modules())
    if ours:
        raise ValueError(f"{type(model).__name__} is slowfast_fast's own and runs on the fused ops already")
    kinds = Counter(type(module).__name__ for module in model.modules() if not isinstance(module, _TORCH))
    lines = [
        f"no block of a known library in {type(model).__name__}",
        f"found: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common(12)) or 'only modules of PyTorch'}",
        *(f"{path or 'the model'}: {reason}" for path, reason in list(unlike.items())[:5]),
        *(f"supported: {library.name} ({', '.join(library.units)})" for library in LIBRARIES),
    ]
    raise ValueError("\n  ".join(lines))


_TORCH = tuple(kind for kind in vars(nn).values() if isinstance(kind, type) and kind is not nn.Module)
