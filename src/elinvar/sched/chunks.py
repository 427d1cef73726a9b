"""How much of a prompt a step computes, so that those who are answered meanwhile wait no longer than
their target.

    seconds of a step = quiet(rows that decode) + work x (a + b x depth)

Work is tokens of prompts, each by the share of the layers that the step takes it through. `quiet` is
measured in steps without prompts, a and b in all others, both with short memories: a, b are a tangent
at the chunks of late, so it matters little that a step's time is no straight line. How layers share a
token's time is measured, too: at depth, one that sees everything outweighs ten that see a window.
Nothing here changes an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from elinvar.base.limits import Target
from elinvar.sched.tangent import Tangent

AUTO = 2.0
"""`auto`: times the quiet step."""
LEAST_S = 0.005
"""Seconds below which `auto` does not go: nobody sees them, and steps that small are overhead."""
AIM, LEAST_AIM, MOST_AIM = 0.8, 0.7, 0.9
"""Of the target, since steps vary: what is aimed at in the beginning, at least and at most."""
LATE = 0.005
"""Share of the steps with prompts that may take longer than the target."""
LEAST = 0.25
"""Of a quiet step's time, prompts have it whatever the target: where it cannot be had, they go on."""
FIRST_TOKENS = 16
"""Where nothing was measured yet."""
STALE = 64
"""Steps with prompts after which one without is measured again."""
WAVE = 8
"""Steps that a wave takes, about: more would make chunks larger, and thus cheaper a token by little;
whoever comes meanwhile waits for its end."""
SLACK = 1.2
"""Predictions differ from step to step: the layers that a wave was made for are not split for that."""


class Chunks:
    """Learns the time of steps. interactive, batch: the targets of those who are answered."""

    def __init__(self, interactive: Target, batch: Target, num_layers: int = 1) -> None:
        self.aim_at(interactive, batch)
        self.num_layers = num_layers
        # By the number of binary digits of the number of rows: seconds, the same in steps with a wave,
        # and steps since the first was measured.
        self._quiet: dict[int, float] = {}
        self._beside: dict[int, float] = {}
        self._stale: dict[int, int] = {}
        self._share = AIM
        """Of the target that is aimed at."""
        self._target: float | None = None
        """Seconds of the step that is being computed, where it has a target."""
        self._proven = FIRST_TOKENS / 2
        """Most work of late that kept the target, or what would have."""
        self._cost = Tangent()
        """Seconds of a token's work, by depth."""
        self._layers = [1 / num_layers] * num_layers
        """Shares of the time of a token."""
        self._wave_s: list[float] = []
        """Seconds of the layers of the wave that is underway."""
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
        return self.span_s(0, num_tokens)

    def span_s(self, start: int, end: int) -> float:
        """Seconds that the tokens from one position to another should take."""
        return (end - start) * self._cost.at((start + end) / 2)

    # ---- how much ---------------------------------------------------------------------------

    def limit(self, rows: int, interactive: bool, batch: bool, depth: float) -> float | None:
        """Work of a step in which so many rows decode, of these classes, and prompts go on at
        `depth`. None: as much as there is; 0: none, so that a quiet step can be measured."""
        self._target = None
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
        self._target = self._seconds_for(quiet, asked)
        return min(self._fit(self._beside.get(size, quiet), self._target, depth), 2 * self._proven)

    def knows_quiet(self, rows: int) -> bool:
        """How long a step of so many rows that decode takes, without anything else."""
        size = rows.bit_length()
        return size in self._quiet and self._stale[size] < STALE

    def in_wave(self, limit: float) -> int:
        """Tokens of a chunk that goes through the layers in about WAVE steps of so much work: as many
        as make those steps full, since none ends amid a layer."""
        return max(1, int(limit / self._a_step))

    @property
    def _a_step(self) -> float:
        """Share of its time that a wave should take in a step: that of so many layers."""
        largest = max(self._layers)
        return largest * math.ceil(1 / (WAVE * largest) - 1e-6)

    def reach(self, limit: float | None, num_tokens: int, first: int) -> int:
        """The layer behind those that a step takes a wave through, which is at `first`."""
        if limit is None:
            return self.num_layers
        most = max(limit, min(SLACK * limit, num_tokens * self._a_step)) + 1e-6
        work, end = num_tokens * self._layers[first], first + 1
        while end < self.num_layers:
            work += num_tokens * self._layers[end]
            if work > most:
                break
            end += 1
        return end

    def beside_first(self, depth: int) -> int | None:
        """Prompt tokens of others at `depth` in a step that brings an interactive request its first
        token, where nobody decodes: it gets that when they are done. None: as many as there are."""
        target = self._targets[0]
        if target is None or not self._quiet or not self._cost.mean:
            return None
        quiet = self._quiet[min(self._quiet)]
        return max(1, int(self._fit(quiet, self._seconds_for(quiet, [target]), depth)))

    def _seconds_for(self, quiet: float, targets: Sequence[float | Literal["auto"]]) -> float:
        auto = max(LEAST_S, AUTO * quiet)
        return min(auto if target == "auto" else target for target in targets)

    def _fit(self, quiet: float, target: float, depth: float) -> float:
        return max(self._share * target - quiet, LEAST * quiet) / max(self._cost.at(depth), 1e-9)

    # ---- what steps took --------------------------------------------------------------------

    def book(self, rows: int, num_tokens: int, depth: float, seconds: float) -> None:
        """A step of `rows` that decoded and num_tokens of prompts, at a mean depth, took so long."""
        self._count(rows + num_tokens, seconds)
        size = rows.bit_length()
        if not num_tokens:
            before = self._quiet.get(size, seconds)
            # A hiccup is not the machine, but what is measured rarely must tell.
            rare = self._stale.get(size, 0) >= STALE
            self._quiet[size] = _nearer(before, seconds, rare)
            self._stale[size] = 0
            return
        if rows and size not in self._quiet:
            return
        quiet = self._quiet[size] if rows else 0.0
        self._cost.learn(depth, max(0.0, seconds - quiet) / num_tokens)
        if rows:
            self._keep_to_target(size, num_tokens, seconds)

    def book_wave(
        self, rows: int, num_tokens: int, depth: float, layer_s: Sequence[float], seconds: float
    ) -> None:
        """The same of a step that took num_tokens through some layers, each of which took so long."""
        first = len(self._wave_s)
        took = sum(layer_s)
        work = num_tokens * sum(self._layers[first : first + len(layer_s)])
        self._count(rows + work, seconds)
        self._cost.learn(depth, took / work)
        self._wave_s += layer_s
        if len(self._wave_s) == self.num_layers:
            self._learn_layers()
        size = rows.bit_length()
        if size in self._quiet:
            before = self._beside.get(size, self._quiet[size])
            self._beside[size] = _nearer(before, seconds - took)
            self._keep_to_target(size, work, seconds)

    def new_wave(self) -> None:
        """One begins, whether or not that before came to its end."""
        self._wave_s = []

    def _count(self, tokens: float, seconds: float) -> None:
        self._tokens += tokens - self._tokens / 32
        self._seconds += seconds - self._seconds / 32

    def _keep_to_target(self, size: int, work: float, seconds: float) -> None:
        self._stale[size] += 1
        if self._target is None:
            return
        # With so many late ones it neither rises nor falls in the long run.
        late = seconds > self._target
        change = (LATE - 1 if late else LATE) / 50
        self._share = min(MOST_AIM, max(LEAST_AIM, self._share * (1 + change)))
        if not late:
            self._proven = max(self._proven, work)
        else:
            self._proven = work * self._target / seconds

    def _learn_layers(self) -> None:
        total = sum(self._wave_s)
        shares = [
            # A hiccup is no share.
            before + (min(took / total, 2 * before) - before) / 4
            for before, took in zip(self._layers, self._wave_s, strict=True)
        ]
        whole = sum(shares)
        self._layers = [share / whole for share in shares]


def _nearer(before: float, seconds: float, rare: bool = False) -> float:
    share, most = (1 / 2, 1.5) if rare else (1 / 8, 1.25)
    return before + share * (min(seconds, most * before) - before)
