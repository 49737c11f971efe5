"""The time that a run has: in which order its cases come, and which of them still fit."""

import math
import time
from collections.abc import Sequence
from typing import ClassVar

from .cases import Case
from .measure import Measurement
from .network import NetworkCase
from .run import FEWEST_ROUNDS
from .summary import GOALS


def most_wanted_first(cases: Sequence[Case | NetworkCase], device: str) -> list[Case | NetworkCase]:
    """Of whole networks those that have a target, then the cheaper before the dearer, so that a run that ends early has
    as many as it can; others as they are."""
    networks = [case for case in cases if isinstance(case, NetworkCase)]
    if len(networks) < len(cases):
        return list(cases)
    aims = {(goal.network, goal.direction, goal.at) for goal in GOALS[device] if goal.target is not None}
    return [*sorted(networks, key=lambda case: ((case.network, case.direction, case.leg) not in aims, case.flops))]


class Budget:
    """Seconds for a run: a case is begun if it would still fit, by what those of its kind took that ran before.

    That is as long as the longest of them. Of a network's, whose batches and crops differ, what comes before the rounds
    (compiling, checking) counts so, and a round takes as much longer as its FLOPs are more.
    """

    # For the first of a kind. cuDNN's search for the fastest algorithm takes most of it.
    GUESS: ClassVar[dict[str, float]] = {"Case": 5.0, "NetworkCase": 60.0, "FamilyCase": 30.0}
    ROUNDS_BEFORE = 2  # every variant is called to be checked, and to warm up

    def __init__(self, seconds: float | None, rounds: int, case_seconds: float | None = None) -> None:
        self._end = float("inf") if seconds is None else time.monotonic() + seconds
        self._rounds, self._case_seconds = rounds, case_seconds
        self._longest: dict[tuple[str, str], float] = {}
        self._slowest: dict[tuple[str, str], float] = {}  # seconds of a round, by FLOP
        self._begun = 0.0

    def has_room_for(self, case: Case | NetworkCase) -> bool:
        self._begun = time.monotonic()
        return self._begun + self.expected(case) <= self._end

    def expected(self, case: Case | NetworkCase) -> float:
        """Seconds that the case will take."""
        kind = self._kind(case)
        if kind not in self._longest:
            return self.GUESS[kind[0]]
        a_round = self._slowest.get(kind, 0.0) * case.flops
        rounds = self._rounds
        if self._case_seconds is not None and a_round > 0:
            rounds = min(rounds, max(FEWEST_ROUNDS, math.ceil(self._case_seconds / a_round)))
        return self._longest[kind] + a_round * (rounds + self.ROUNDS_BEFORE)

    def stop(self) -> None:
        self._end = float("-inf")

    def took(self, case: Case | NetworkCase, measured: Measurement | None) -> None:
        """The case that there was room for is done; None: it failed."""
        kind, elapsed = self._kind(case), time.monotonic() - self._begun
        if measured is not None and isinstance(case, NetworkCase):
            a_round = sum(map(measured.median, measured.seconds))
            rounds = max(map(len, measured.seconds.values())) + self.ROUNDS_BEFORE
            self._slowest[kind] = max(self._slowest.get(kind, 0.0), a_round / case.flops)
            elapsed = max(0.0, elapsed - a_round * rounds)
        self._longest[kind] = max(self._longest.get(kind, 0.0), elapsed)

    @staticmethod
    def _kind(case: Case | NetworkCase) -> tuple[str, str]:
        return type(case).__name__, case.direction
