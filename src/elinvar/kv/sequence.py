"""What the KVManager keeps of a sequence, and what it says of one: plain ids and counts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elinvar.base.plan import BlockCopy, BlockMove
from elinvar.kv.match import Kept
from elinvar.kv.tree import Node

if TYPE_CHECKING:
    from elinvar.kv.tiers.ticket import Ticket


@dataclass(slots=True, eq=False)
class Lookup:
    """How far the search of one sequence has come."""

    ticket: Ticket | None = None
    asked: bool = False
    fetching: bool = False
    over: bool = False
    """Nothing more is to be had."""
    failed: bool = False
    """For good: what was promised did not come."""
    origins: dict[bytes, str] = field(default_factory=dict)
    """Tier that had each content which was asked for."""

    def end(self) -> None:
        self.over = True
        if self.ticket is not None:
            self.ticket.release()
            self.ticket = None


LOAD = -2
"""In the place of a block: one is to be taken, and its content loaded."""


@dataclass(slots=True, eq=False)
class SequenceKV:
    """What one sequence holds. Written by the manager only."""

    tables: list[list[int]]
    """Per group: block ids from the start of the sequence; -1 where none is held."""
    first_held: list[int]
    """Per group: index of the first entry of the table that is not -1."""
    root: bytes
    """Namespace of its contents."""
    capacity: int = 0
    """Positions that the tables reach."""
    num_published: int = 0
    """Leading blocks that can be found (or whose twin can)."""
    next_event: int = 0
    """`advance` has something to do once this many tokens are computed."""
    nodes: list[Node] = field(default_factory=list)
    """Of the leading blocks: those published, and those of the tokens known when it began."""
    num_known: int = 0
    """Blocks that it then knew all tokens of."""
    tail: Node | None = None
    """Of the tokens behind them that it knew, until they are computed."""
    num_first: int = 0
    """Tokens that it knew."""
    marks: tuple[int, ...] = ()
    """Positions at which it leaves a snapshot of its recurrent state."""
    waits: bool = True
    """For what another is about to compute, rather than look for it below. Its scheduler says so."""
    lookup: Lookup | None = None
    """Its search below the provider's memory."""
    snapshot: int = -1
    """Block of the last snapshot that the next one replaces, if any."""
    kept: Kept | None = None
    """None: everything."""
    num_hidden: int = 0
    """Entries of tables behind the first that are kept, which are -1 as it forgot them."""
    shared: int = sys.maxsize
    """Tokens whose contents others can find. What the ones behind saw of them was chosen for this
    sequence alone."""
    sought: int = sys.maxsize
    """It is found as if it had so many tokens: the others it computes, whatever is cached."""
    dropped: Sequence[int] = ()
    """Entries of tables that are -1 as they were not chosen, ascending."""


@dataclass(slots=True)
class Prefix:
    """Cached contents that a sequence could start with. Nothing is held yet."""

    num_tokens: int
    token_ids: Sequence[int]
    """Of the whole sequence."""
    path: list[Node]
    """Its whole blocks of the prefix."""
    blocks: list[list[int]]
    """Per group the blocks of `path`: -1 where the first query after it sees nothing, LOAD where the
    content lies below."""
    num_taken: list[int]
    """Per group: free blocks that taking them costs."""
    tail: Node | None = None
    """What begins as the block after those does, to be copied."""
    marks: tuple[int, ...] = ()
    """As in SequenceKV."""
    coming: Node | None = None
    """What would come next, which a living sequence is about to compute."""
    pending: bool = False
    """More of it may be found below, which is not known yet, or on its way."""
    kept: Kept | None = None
    """As in SequenceKV."""

    @property
    def is_below(self) -> bool:
        """Some of it is to be loaded."""
        at_end = self.tail is not None and min(self.tail.blocks) < 0
        return at_end or any(LOAD in row for row in self.blocks)


@dataclass(slots=True)
class Allocation:
    """A promise of `prepare`, good until anything else changes the manager."""

    seq: SequenceKV
    end: int
    """Positions below this one will have a place."""
    num_blocks: int
    """New entries of each table: in groups of states all but the last are empty."""
    prefix: Prefix | None


@dataclass(slots=True)
class Taken:
    """What `apply` took."""

    blocks: list[list[int]]
    """Per group: new entries of the runner's table."""
    start: list[list[int]]
    """Per group: those of the prefix."""
    copies: list[BlockCopy] = field(default_factory=list)
    loads: list[BlockMove] = field(default_factory=list)


def first_of(token_ids: Sequence[int], count: int) -> Sequence[int]:
    """The first `count`; no copy of all of them."""
    return token_ids if len(token_ids) <= count else token_ids[:count]
