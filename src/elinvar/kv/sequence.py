"""What the KVManager keeps of a sequence, and what it says of one: plain ids and counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class SequenceKV:
    """What one sequence holds. Written by the manager only."""

    tables: list[list[int]]
    """Per group: block ids from the start of the sequence; -1 where none is held."""
    first_held: list[int]
    """Per group: index of the first entry of the table that is not -1."""
    capacity: int = 0
    """Positions that the tables reach."""
    num_published: int = 0
    """Leading blocks that are findable by content (or whose twin is)."""
    next_event: int = 0
    """`advance` has something to do once this many tokens are computed."""
    keys: list[bytes] = field(default_factory=list)
    """Keys of the leading full blocks; outlive preemption, since the tokens stay the same."""
    marks: tuple[int, ...] = ()
    """Positions at which it leaves a snapshot of its recurrent state."""
    tail: int = -1
    """Block of the last snapshot that the next one replaces, if any."""
    root: bytes = b""
    """What stands before the first block's tokens in its key."""


@dataclass(slots=True)
class Prefix:
    """Cached blocks that a sequence could start with. Nothing is held yet."""

    num_tokens: int
    blocks: list[list[int]]
    """Per group, -1 in sliding groups before the window."""
    num_revived: list[int]
    """Per group: how many of the blocks are free now, so that taking them costs a free block."""
    marks: tuple[int, ...] = ()
    """As in SequenceKV."""


@dataclass(slots=True)
class Allocation:
    """A promise of `prepare`, good until anything else changes the manager."""

    seq: SequenceKV
    end: int
    """Positions below this one will have a place."""
    num_blocks: int
    """New entries of each table: in groups of states all but the last are empty."""
    prefix: Prefix | None
