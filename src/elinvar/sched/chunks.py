"""How many prompt tokens fit into a step, so that those who are answered meanwhile wait no longer
than their target.

    seconds of a step = quiet(rows that decode) + tokens x (a + b x depth)

`quiet` is measured in steps without prompts, a and b in all others, both with short memories: a, b
are a tangent at the chunks of late, so it matters little that a step's time is no straight line.
Nothing here changes an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from elinvar.base.limits import Target

AUTO = 2.0
"""`auto`: times the quiet step."""
LEAST_S = 0.005
"""Seconds below which `auto` does not go: nobody sees them, and steps that small are overhead."""
AIM = 0.8
"""Of the target, since steps vary."""
LEAST = 0.25
"""Of a quiet step's time, prompts have it whatever the target: where it cannot be had, they go on."""
FIRST_TOKENS = 16
"""Where nothing was measured yet."""
STALE = 64
"""Steps with prompts after which one without is measured again."""


class Chunks:
    """Learns the time of steps. interactive, batch: the targets of those who are answered."""

    def __init__(self, interactive: Target, batch: Target) -> None:
        self.aim_at(interactive, batch)
        # By the number of binary digits of the number of rows: seconds, and steps since measured.
        self._quiet: dict[int, float] = {}
        self._stale: dict[int, int] = {}
        self._aim: float | None = None
        """Seconds of the step that is being computed, where it has a target."""
        self._proven = FIRST_TOKENS // 2
        """Most tokens of late that kept the target, or what would have."""
        self._weight = self._depth = self._cost = 0.0
        """How much was measured, and the means of it: depth, seconds a token."""
        self._depth2 = self._product = 0.0
        """The variance of depth, and its covariance with the seconds."""
        self._tokens = self._seconds = 0.0

    def aim_at(self, interactive: Target, batch: Target) -> None:
        """What holds from now on."""
        self._targets = interactive.itl_s, batch.itl_s

    @property
    def speed(self) -> float | None:
        """Tokens a second, of late."""
        return self._tokens / self._seconds if self._seconds else None

    def prompt_s(self, num_tokens: int) -> float:
        """Seconds that a prompt should take alone."""
        return num_tokens * self._cost_at(num_tokens / 2)

    def span_s(self, start: int, end: int) -> float:
        """Seconds that the tokens from one position to another should take."""
        return (end - start) * self._cost_at((start + end) / 2)

    def limit(self, rows: int, interactive: bool, batch: bool, depth: int) -> int | None:
        """Prompt tokens of a step in which so many rows decode, of these classes, and prompts go on
        at `depth`. None: as many as there are; 0: none, so that a quiet step can be measured."""
        self._aim = None
        asked = [
            target
            for target, here in zip(self._targets, (interactive, batch), strict=True)
            if here and target is not None
        ]
        if not asked:
            return None
        size = rows.bit_length()
        quiet = self._quiet.get(size)
        if quiet is None or self._stale[size] >= STALE:
            return 0
        self._aim = self._seconds_for(quiet, asked)
        return max(1, min(self._fit(quiet, self._aim, depth), 2 * self._proven))

    def beside_first(self, depth: int) -> int | None:
        """Prompt tokens of others at `depth` in a step that brings an interactive request its first
        token, where nobody decodes: it gets that when they are done. None: as many as there are."""
        target = self._targets[0]
        if target is None or not self._quiet or not self._cost:
            return None
        quiet = self._quiet[min(self._quiet)]
        return max(1, self._fit(quiet, self._seconds_for(quiet, [target]), depth))

    def _seconds_for(self, quiet: float, targets: Sequence[float | Literal["auto"]]) -> float:
        auto = max(LEAST_S, AUTO * quiet)
        return AIM * min(auto if target == "auto" else target for target in targets)

    def _fit(self, quiet: float, aim: float, depth: int) -> int:
        return int(max(aim - quiet, LEAST * quiet) / max(self._cost_at(depth), 1e-9))

    def book(self, rows: int, num_tokens: int, depth: float, seconds: float) -> None:
        """A step of `rows` that decoded and num_tokens of prompts, at a mean depth, took so long."""
        self._tokens += rows + num_tokens - self._tokens / 32
        self._seconds += seconds - self._seconds / 32
        size = rows.bit_length()
        if not num_tokens:
            before = self._quiet.get(size, seconds)
            # A hiccup is not the machine, but what is measured rarely must tell.
            rare = self._stale.get(size, 0) >= STALE
            share, most = (1 / 2, 1.5) if rare else (1 / 8, 1.25)
            self._quiet[size] = before + share * (min(seconds, most * before) - before)
            self._stale[size] = 0
            return
        if rows and size not in self._quiet:
            return
        quiet = self._quiet[size] if rows else 0.0
        self._learn(depth, max(0.0, seconds - quiet) / num_tokens)
        if rows:
            self._stale[size] += 1
        if rows and self._aim is not None:
            if seconds <= self._aim:
                self._proven = max(self._proven, num_tokens)
            else:
                self._proven = max(1, int(num_tokens * self._aim / seconds))

    def _learn(self, depth: float, cost: float) -> None:
        """Means, variance and covariance, of which a tenth is forgotten with each step."""
        if self._weight > 3:
            cost = min(cost, 4 * self._cost)
        self._weight = 0.9 * self._weight + 1
        share = 1 / self._weight
        off = depth - self._depth
        self._depth += share * off
        self._cost += share * (cost - self._cost)
        self._depth2 += share * (off * (depth - self._depth) - self._depth2)
        self._product += share * (off * (cost - self._cost) - self._product)

    def _cost_at(self, depth: float) -> float:
        """Seconds of a prompt's token; 0.0: never measured. A line through noise may point anywhere:
        it does not fall, nor far below what was measured."""
        slope = max(0.0, self._product / self._depth2) if self._depth2 > 1 else 0.0
        return max(self._cost + slope * (depth - self._depth), self._cost / 4)
