"""What compat/<library>.py says of a library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..nn.units import Unit
from ._spelling import Spelling


@dataclass(frozen=True)
class Library:
    """How a library builds SlowFast.

    Attributes:
        name: as users call it.
        units: for the name of each class that is taken over, how it is built.
        left_alone: for the name of each class whose presence makes a whole model be left as it is, why.
        spelling: of its state_dict keys.
    """

    name: str
    units: Mapping[str, Unit]
    spelling: Spelling
    left_alone: Mapping[str, str] = field(default_factory=dict)
