"""Loading: rows whose cached prefix lies below the provider's memory and is copied up, some of it each
step. Owns how much a step copies, and who may go on when it has been committed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from elinvar.base.config import KVSpec
from elinvar.base.plan import MOST_BYTES, BlockMove, StepPlan
from elinvar.sched.request import Request


class Loading:
    """step_bytes: most that a step copies."""

    def __init__(self, specs: Sequence[KVSpec], step_bytes: int = MOST_BYTES) -> None:
        self.step_bytes = step_bytes
        self._bytes = [spec.block_bytes for spec in specs]
        self._room = 0
        self._planned: list[tuple[Request, list[BlockMove]]] = []

    def begin(self) -> None:
        """A plan begins."""
        self._room = self.step_bytes

    def go_on(self, plan: StepPlan, request: Request) -> bool:
        """Plan what is next to be copied; whether that is the last of it, so that the step can go on
        where the prefix ends."""
        count = 0
        while count < len(request.loads) and self._room > 0:
            self._room -= self._bytes[request.loads[count].group]
            count += 1
        moves, request.loads = request.loads[:count], request.loads[count:]
        plan.loads += moves
        # Also where there was no room: its row may start in this plan, which may be lost.
        self._planned.append((request, moves))
        return not request.loads

    def send_away(self, plan: StepPlan, request: Request) -> None:
        """Somebody else may be given its blocks in this very plan, and what it would have copied."""
        for other, moves in self._planned:
            if other is request:
                gone = {(move.group, move.block) for move in moves}
                plan.loads = [m for m in plan.loads if (m.group, m.block) not in gone]
                self._room += sum(self._bytes[move.group] for move in moves)
        self._planned = [one for one in self._planned if one[0] is not request]

    def committed(self, lost: Iterable[bytes] = ()) -> tuple[list[Request], list[Request]]:
        """Whose last contents have come, and those of whom some were lost."""
        gone = set(lost)
        planned, self._planned = self._planned, []
        failed = [r for r, moves in planned if any(move.key in gone for move in moves)]
        return [r for r, _ in planned if not r.loads and r not in failed], failed

    def dropped(self) -> list[Request]:
        """The plan was not committed; returns whom it copied for."""
        planned, self._planned = self._planned, []
        return [request for request, _ in planned]
