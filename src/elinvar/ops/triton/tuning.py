"""Which configuration a product gets: one for all numbers of rows, chosen by measuring.

Free of the contract one would take the quickest configuration for each number of rows. Here all of
them share one arithmetic, so what is sought is the configuration that loses least against the best
free one where it loses most; what it loses is the cost of invariance, which is kept.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from elinvar.ops.triton.configs import Config, Tile

Timer = Callable[[Config, int], float]
"""Seconds of a product with so many rows; infinity where the configuration cannot be launched."""
Holds = Callable[[Config], bool]
"""Whether with it a row has the same bits in products of every number of rows that is looked at."""

ROWS = (1, 8, 32, 128, 512, 4096)
FINALISTS = 12
"""Of the configurations that a first look at few and at many rows left, so many are measured whole."""


@dataclass(frozen=True, slots=True)
class Choice:
    config: Config | Tile
    seconds: Mapping[int, float]
    """By number of rows."""
    free: Mapping[int, float]
    """Of the best configuration for each."""

    @property
    def losses(self) -> dict[int, float]:
        """How many times as long as the best free configuration takes, by number of rows."""
        return {rows: self.seconds[rows] / self.free[rows] for rows in self.seconds}

    @property
    def worst(self) -> float:
        return max(self.losses.values())

    @property
    def mean(self) -> float:
        """Geometric."""
        losses = self.losses.values()
        return math.exp(sum(map(math.log, losses)) / len(losses))

    def told(self) -> dict[str, Any]:
        """For the file: JSON's keys are texts."""
        return {
            "config": asdict(self.config),
            "microseconds": {str(rows): s * 1e6 for rows, s in self.seconds.items()},
            "losses": {str(rows): loss for rows, loss in self.losses.items()},
            "worst": self.worst,
            "mean": self.mean,
        }


def candidates(kind: str, n: int, k: int) -> list[Config]:
    """Those that may be worth a look for a matrix [N, K] of this kind, each of one tile height. Each is
    compiled, which takes a second."""
    packed = kind in ("q4", "q5", "q8", "mxfp4", "nvfp4")
    heights, depths = ((16, 64), (64, 128, 256)) if packed else ((16, 64, 128, 256), (64, 128))
    found = []
    for block_n, block_k, warps, stages, parts in itertools.product(
        (64, 128, 256), depths, (4, 8), (3, 4), (1, 4)
    ):
        turns = -(-k // block_k)
        # A part of a few turns has no time to fill its pipeline; enough tiles need no parts.
        if parts > 1 and (turns < 4 * parts or -(-n // block_n) >= 256):
            continue
        if block_n > max(64, n):
            continue
        found += [
            Config(height, block_n, block_k, warps, stages, parts=parts)
            for height in heights
            # More sums than a thread has registers for.
            if height * block_n <= 128 * 32 * warps
        ]
    return found


def tune(
    configs: Sequence[Config],
    rows: Sequence[int],
    time: Timer,
    holds: Holds,
    filled: Callable[[int], int] = int,
) -> Choice:
    """The best configuration for all `rows`, ascending, that keeps the contract. A timer is called once
    for each pair. filled: how many rows a tile finds of so many, by which `Config.few` is chosen.

    First all are timed with the fewest and with the most rows; the finalists, the best of both and
    of each, with all. Raises ValueError where none can be launched, or none keeps the contract.
    """
    measured: dict[Config, dict[int, float]] = {}

    def look(config: Config, at: Iterable[int]) -> None:
        known = measured.setdefault(config, {})
        for count in at:
            if count not in known:
                known[count] = time(config, count)

    few, many = rows[0], rows[-1]
    for config in configs:
        look(config, (few, many))
    for config in _finalists(configs, measured, few, many):
        look(config, rows)
    whole = {
        c: t for c, t in measured.items() if len(t) == len(rows) and math.isfinite(sum(t.values()))
    }
    if not whole:
        raise ValueError("no configuration can be launched")
    free = {count: min(t[count] for t in measured.values() if count in t) for count in rows}
    for choice in sorted(_choices(whole, free, filled), key=lambda c: (c.worst, c.mean)):
        assert isinstance(choice.config, Config)
        if holds(choice.config):
            return choice
    raise ValueError("no configuration gives a row the same bits in every batch")


def _finalists(
    configs: Sequence[Config], measured: Mapping[Config, Mapping[int, float]], few: int, many: int
) -> list[Config]:
    """By arithmetic and width, as those of different heights are joined later."""
    best = {at: min(measured[c][at] for c in configs) for at in (few, many)}

    def loss(group: list[Config]) -> float:
        return max(min(measured[c][at] for c in group) / best[at] for at in (few, many))

    groups: dict[Config, list[Config]] = {}
    for config in configs:
        if math.isfinite(measured[config][few]) and math.isfinite(measured[config][many]):
            groups.setdefault(replace(config, block_m=0), []).append(config)
    order = sorted(groups.values(), key=loss)[:FINALISTS]
    quickest = [min(configs, key=lambda c: measured[c][at]) for at in (few, many)]
    return list(dict.fromkeys([*itertools.chain(*order), *quickest]))


def _choices(
    whole: Mapping[Config, Mapping[int, float]],
    free: Mapping[int, float],
    filled: Callable[[int], int],
) -> Iterator[Choice]:
    """Each configuration alone, and with a lower tile for few rows."""
    for config, times in whole.items():
        yield Choice(config, dict(times), free)
        for low, low_times in whole.items():
            if low.block_m < config.block_m and replace(low, block_m=config.block_m) == config:
                joined = {
                    n: low_times[n] if filled(n) <= low.block_m else s for n, s in times.items()
                }
                yield Choice(replace(config, few=low.block_m), joined, free)


def tune_tile(
    tiles: Sequence[Tile],
    loads: Mapping[int, bool],
    time: Callable[[Tile, int], float],
    holds: Callable[[Tile], bool],
) -> Choice:
    """The same of attention. loads: tokens a step, and whether programs share the splits of their rows
    there; time: seconds of such a step."""
    measured: dict[tuple[int, int, int, int], float] = {}

    def look(tile: Tile, load: int) -> float:
        height = tile.height(loads[load])["ROWS"]
        key = height, tile.keys, tile.num_stages, load
        if key not in measured:
            measured[key] = time(tile, load)
        return measured[key]

    times = {tile: {load: look(tile, load) for load in loads} for tile in tiles}
    whole = {tile: t for tile, t in times.items() if math.isfinite(sum(t.values()))}
    if not whole:
        raise ValueError("no tile can be launched")
    free = {load: min(t[load] for t in times.values()) for load in loads}
    found = [Choice(tile, t, free) for tile, t in whole.items()]
    for choice in sorted(found, key=lambda c: (c.worst, c.mean)):
        assert isinstance(choice.config, Tile)
        if holds(choice.config):
            return choice
    raise ValueError("no tile gives a row the same bits in every batch")


def together(costs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How many times as long all uses of what was tuned take as with the best free configuration of each,
    by number of rows: what invariance costs a forward, of what was chosen here."""
    chosen: Counter[str] = Counter()
    best: Counter[str] = Counter()
    for cost in costs:
        for rows, microseconds in cost["microseconds"].items():
            chosen[rows] += cost["uses"] * microseconds
            best[rows] += cost["uses"] * microseconds / cost["losses"][rows]
    return {rows: chosen[rows] / best[rows] for rows in chosen}
