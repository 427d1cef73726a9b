"""What the KVManager keeps of a sequence, and what it says of one: plain ids and counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class SequenceKV:
    """What one sequence holds. Written by the manager only."""

    tables: list[list[int]]
    """Per group: block ids from the start of the sequence; -1 where none is held."""
    num_hidden: list[int]
    """Per group: entries of the table that are -1. They are its first ones; where there is `kept`, in
    groups without a window, those after the first that are kept."""
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
    kept: tuple[int, int] | None = None
    """What groups without a window keep of it: so many first blocks, and so many last ones before that
    of the next token. None: all."""


@dataclass(slots=True)
class Prefix:
    """Cached blocks that a sequence could start with. Nothing is held yet."""

    num_tokens: int
    blocks: list[list[int]]
    """Per group, -1 where the first query after the prefix sees nothing."""
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
