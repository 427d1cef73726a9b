"""Conversations of a trace of requests: which one goes on from which, and their tokens.

The public Mooncake conversation trace (Qin et al., FAST 2025) gives for each request its lengths and
an id for each 512 tokens of its prompt, the last id for a part of them; equal ids are equal prefixes. A
request whose ids begin with all whole blocks of an earlier, shorter request is that one's next turn.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

PREFIX_BLOCK = 512
"""Tokens that an id of a trace stands for."""
NAME = "mooncake_conversation.jsonl"
VARIABLE = "ELINVAR_TRACES"
"""Names the folder of public traces, where it is not beside the checkout."""
LOWEST, HIGHEST = 100, 1100
"""Prompts are made of these token ids: every vocabulary has them, and few are special."""


@dataclass(frozen=True, slots=True)
class Row:
    """A request of a trace."""

    at: float
    """Seconds after the first one."""
    prompt: int
    answer: int
    """Tokens."""
    ids: tuple[int, ...]


@dataclass(slots=True)
class Turn:
    row: int
    """Its place in the trace, which is by time."""
    prompt: int
    """Tokens, those of the turns before included."""
    answer: int


@dataclass(slots=True)
class Conversation:
    """Turns that each extend the one before. Its tokens are one stream: turn t's prompt is the first
    `prompt` of it, and what is answered comes next."""

    at: float
    """Seconds after the trace's first request; a fork has its parent's."""
    turns: list[Turn]
    ids: tuple[int, ...] = ()
    """What the stream is made of, block by block."""
    parent: Conversation | None = None
    fork: int = 0
    """The parent's turn from which it goes on another way."""
    forks: list[Conversation] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return max(turn.prompt + turn.answer for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Scale:
    """Lengths divided by `divisor`, a power of two, so that ids keep standing for whole blocks."""

    divisor: int = 16
    seed: int = 0
    highest: int = HIGHEST
    """Token ids end below it."""

    @property
    def block(self) -> int:
        return PREFIX_BLOCK // self.divisor

    def tokens(self, ids: Sequence[int], count: int) -> list[int]:
        """The first `count` tokens of a stream."""
        out: list[int] = []
        for one in ids[: -(-count // self.block)]:
            out += _tokens(self.seed, one, self.block, self.highest)
        return out[:count]


@lru_cache(maxsize=1 << 16)
def _tokens(seed: int, block_id: int, count: int, highest: int) -> tuple[int, ...]:
    rng = random.Random(f"{seed} {block_id}")
    return tuple(rng.choices(range(LOWEST, highest), k=count))


def find(path: Path | None = None) -> Path | None:
    """The trace: where the user says, in $ELINVAR_TRACES, or in shared/traces of a folder above the
    checkout; None when it is in none of them. Exits where the user named a file that is not there."""
    if path is not None:
        if not path.is_file():
            raise SystemExit(f"--trace: {path} is no file.")
        return path
    named = os.environ.get(VARIABLE)
    folders = [Path(named)] if named else []
    folders += [above / "shared" / "traces" for above in Path(__file__).resolve().parents]
    return next((f / NAME for f in folders if (f / NAME).is_file()), None)


def read(path: Path) -> list[Row]:
    """The rows of a trace as Mooncake writes them. Exits naming the first line that is none."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                one = json.loads(line)
                ids = tuple(map(int, one["hash_ids"]))
                row = Row(one["timestamp"] / 1000, one["input_length"], one["output_length"], ids)
                if not 0 < row.prompt <= len(ids) * PREFIX_BLOCK or row.answer < 1:
                    raise ValueError("its lengths and hash_ids do not agree")
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"Line {number} of {path} is no request: {error}.") from None
            rows.append(row)
    if not rows:
        raise SystemExit(f"{path} holds no request.")
    return sorted(rows, key=lambda row: row.at)


def copied(rows: Sequence[Row], copies: int, apart: float = 97.0) -> list[Row]:
    """As many users as `copies` traces have, who share nothing but the first block: each copy begins
    `apart` seconds after the one before, with ids of its own."""
    shift = 1 + max(max(row.ids) for row in rows)
    made = [
        Row(
            row.at + copy * apart,
            row.prompt,
            row.answer,
            (row.ids[0], *(one + copy * shift for one in row.ids[1:])),
        )
        for copy in range(copies)
        for row in rows
    ]
    return sorted(made, key=lambda row: row.at)


def conversations(rows: Sequence[Row], scale: Scale, min_turns: int = 1) -> list[Conversation]:
    """Those of at least `min_turns` turns, forks counted with the one they come from; by time.

    A fork is a second request that goes on from the same turn. It shares whole blocks only: ids show
    no more. Prompts below two whole blocks begin no conversation, since all share the first block.
    """
    parents = _parents(rows)
    place: list[tuple[Conversation, int]] = []
    found: list[Conversation] = []
    for index, row in enumerate(rows):
        turn = Turn(index, max(1, row.prompt // scale.divisor), max(1, row.answer // scale.divisor))
        parent = parents[index]
        if parent is None:
            place.append((Conversation(row.at, [turn]), 0))
            found.append(place[-1][0])
            continue
        before, at = place[parent]
        turn.prompt = max(turn.prompt, before.turns[at].prompt + 1)
        if at == len(before.turns) - 1:
            before.turns.append(turn)
            place.append((before, at + 1))
        else:
            fork = Conversation(before.at, [turn], parent=before, fork=at)
            before.forks.append(fork)
            place.append((fork, 0))
    kept = [one for one in found if sum(len(c.turns) for c in family(one)) >= min_turns]
    for one in kept:
        for conversation in family(one):
            _lay_out(conversation, rows, scale)
    return kept


def family(root: Conversation) -> Iterable[Conversation]:
    """A conversation, its forks, and theirs."""
    yield root
    for fork in root.forks:
        yield from family(fork)


def _parents(rows: Sequence[Row]) -> list[int | None]:
    """Of each row the one that it goes on from: the longest whose whole blocks it begins with."""
    ends: dict[int, int] = {}
    parents: list[int | None] = []
    for index, row in enumerate(rows):
        parent = None
        for count in range(len(row.ids), 1, -1):
            other = ends.get(row.ids[count - 1])
            if other is not None and rows[other].prompt < row.prompt:
                parent = other
                break
        parents.append(parent)
        whole = row.prompt // PREFIX_BLOCK
        if whole > 1:
            ends[row.ids[whole - 1]] = index
    return parents


def _lay_out(one: Conversation, rows: Sequence[Row], scale: Scale) -> None:
    """The ids of its stream: the last turn's whole blocks, then as many of its own as it needs."""
    last = rows[one.turns[-1].row]
    whole = list(last.ids[: last.prompt // PREFIX_BLOCK])
    need = -(-one.num_tokens // scale.block) - len(whole)
    # Below zero: no trace has them. A row makes at most 4,096 of them.
    own = [-1 - (one.turns[-1].row << 12) - i for i in range(need)]
    one.ids = (*whole, *own)
