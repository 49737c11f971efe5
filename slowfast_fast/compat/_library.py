"""What compat/<library>.py says of a library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..nn.fused import Step
from ..nn.units import Unit
from ._spelling import Spelling

# What a network does between two joins: the steps of each pathway, in order, and what joins them behind, if anything.
Row = tuple[Sequence[Sequence[Step]], nn.Module | None]


@dataclass(frozen=True, kw_only=True)
class Whole:
    """How a network whose ``forward`` stays its own under ``accelerate`` is built, for ``freeze``.

    Attributes:
        rows: in the order of execution; the first holds the stems.
        head: blocks behind the last row, of the library or of nn/.
        held: the attribute that holds the head; None where the network's own ``forward`` is one.
        alone: whether it takes a clip by itself rather than a list of them.
    """

    rows: Callable[[Any], Sequence[Row]]
    head: Callable[[Any], Sequence[nn.Module]]
    held: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class Library:
    """How a library builds SlowFast.

    Attributes:
        name: as users call it.
        units: for the name of each class that is taken over, how it is built.
        networks: for the name of each class of networks that is no unit, how it is built.
        left_alone: for the name of each class whose presence makes a whole model be left as it is, why.
        spelling: of its state_dict keys.
    """

    name: str
    units: Mapping[str, Unit]
    spelling: Spelling
    networks: Mapping[str, Whole] = field(default_factory=dict)
    left_alone: Mapping[str, str] = field(default_factory=dict)
