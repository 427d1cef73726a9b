"""What a session is: its name, what its client says of it, where it is, and what is told of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from elinvar.base.errors import InputError
from elinvar.base.handling import Handling
from elinvar.base.limits import check_positive
from elinvar.kv.leases import Lease, Owner
from elinvar.kv.pauses import Pause
from elinvar.kv.tree import Node

TTL_S = 3600.0
"""After so many seconds without a turn a session is forgotten."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What a client knows of a session; None: what it said before. Raises InputError naming the
    field when a value is out of range."""

    expect_return_s: float | None = None
    """Seconds from now until it comes back; 0: never."""
    ttl_s: float | None = None
    """Seconds without a turn until it is forgotten."""
    pause_kind: str | None = None
    """What it waits for: see Handling."""

    def __post_init__(self) -> None:
        Handling(expect_return_s=self.expect_return_s, pause_kind=self.pause_kind)
        if self.ttl_s is not None:
            check_positive("ttl_s", self.ttl_s)


NO_HINTS = Hints()


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What is known of a session. Times are seconds of the engine's clock."""

    name: str
    tenant: str
    created: float
    last_used: float
    expires: float
    turns: int
    running: int
    """Requests of it that wait or run."""
    num_tokens: int
    """Of what its last turn left behind."""
    leased_tokens: int
    expect_return_s: float | None
    """Seconds from now until it is expected, by its client's word or by what others did; negative:
    it is late; None: it runs, or nobody expects it."""
    tokens_in_memory: int | None = None
    """Of what it left behind, by the groups that keep every block; None in a list."""
    tokens_below: int | None = None
    """Of the rest, what is known to be in a tier below."""


class NoSessionError(InputError):
    """There is no session of this name."""


class Session:
    """Written by Sessions only."""

    __slots__ = (
        "account",
        "busy",
        "created",
        "event",
        "expects_s",
        "is_new_turn",
        "kind",
        "lease",
        "name",
        "num_tokens",
        "path",
        "pause",
        "ttl_s",
        "turns",
        "used",
    )

    def __init__(self, name: str, account: Account, now: float) -> None:
        self.name = name
        self.account = account
        self.created = self.used = now
        self.ttl_s = TTL_S
        self.turns = 0
        self.busy = 0
        """Requests of it that wait or run."""
        self.is_new_turn = False
        """None of them has ended yet."""
        self.expects_s: float | None = None
        self.kind = ""
        self.path: list[Node] = []
        """What its last turn left behind, from the beginning."""
        self.num_tokens = 0
        self.lease = Lease(account.owner)
        self.pause: Pause | None = None
        self.event = -1
        """Number of the event that is to come, of all that were noted."""


class Account:
    """One tenant's sessions."""

    __slots__ = ("name", "owner", "sessions")

    def __init__(self, name: str, most: Sequence[int]) -> None:
        self.name = name
        self.owner = Owner(most)
        self.sessions: OrderedDict[str, Session] = OrderedDict()
        """Last used last."""
