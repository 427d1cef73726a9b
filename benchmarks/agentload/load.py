"""Sessions: conversations with a tool, its pauses, and an end that is announced or not.

What a trace does not say is drawn here, all of it from the seed. Pauses are lognormal with a Pareto
tail, by kind of tool: what is known of a pause before it ends is its tool's name and its past.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from agentload.trace import Conversation, Row, Scale, Turn, conversations, family

LONGEST_PAUSE = 3600.0


@dataclass(frozen=True, slots=True)
class Tool:
    """What a session waits for between its turns, `weight` of all sessions this one."""

    name: str
    weight: float
    median: float
    """Seconds."""
    sigma: float
    """Of the pause's logarithm."""
    tail: float = 0.05
    """Share of pauses that are three medians and more, Pareto of index `alpha`."""
    alpha: float = 1.2

    def pause(self, rng: random.Random) -> float:
        if rng.random() < self.tail:
            seconds = 3 * self.median * rng.paretovariate(self.alpha)
        else:
            seconds = self.median * rng.lognormvariate(0, self.sigma)
        return min(LONGEST_PAUSE, seconds)


TOOLS = (
    Tool("shell", 0.3, 0.2, 0.8),
    Tool("search", 0.2, 3.0, 0.8),
    Tool("tests", 0.25, 30.0, 0.9),
    Tool("human", 0.25, 300.0, 1.0, tail=0.1),
)
PAUSES: dict[str, tuple[tuple[Tool, ...], bool]] = {
    "tools": (TOOLS, False),
    "mixed": (TOOLS, True),
    "one": ((Tool("any", 1.0, 60.0, 1.5, tail=0.1),), False),
}
"""By name: the tools, and whether each turn of a session has another one. With `one` nothing tells
sessions apart but their past."""


@dataclass(slots=True, eq=False)
class Session:
    name: str
    at: float
    """Seconds at which its first turn arrives; without meaning for a fork."""
    conversation: Conversation
    pauses: list[float]
    """Seconds before each turn, since the end of the one before; of a fork also before its first,
    since the end of its parent's turn. The first of all others is 0."""
    tools: list[str]
    """What each pause was for."""
    notice: bool
    """Whether its last turn says that none will follow."""
    forks: list[Session] = field(default_factory=list)

    @property
    def turns(self) -> list[Turn]:
        return self.conversation.turns

    def after(self, turn: int) -> list[tuple[Session, int]]:
        """What follows a turn: the next one, and the first of forks."""
        more = [(fork, 0) for fork in self.forks if fork.conversation.fork == turn]
        return [(self, turn + 1)] * (turn + 1 < len(self.turns)) + more


@dataclass(frozen=True, slots=True)
class Load:
    sessions: list[Session]
    """Forks included, each after its parent; by the time at which they begin."""
    scale: Scale

    @property
    def num_turns(self) -> int:
        return sum(len(one.turns) for one in self.sessions)

    @property
    def num_prompt_tokens(self) -> int:
        """What a cache of nothing computes."""
        return sum(turn.prompt for one in self.sessions for turn in one.turns)

    def tokens(self, session: Session, count: int) -> list[int]:
        return self.scale.tokens(session.conversation.ids, count)


def load(
    roots: Sequence[Conversation],
    scale: Scale,
    pauses: str = "tools",
    rate: float = 1.0,
    notice: float = 0.3,
    seed: int = 0,
) -> Load:
    """rate: how many times as often as in the trace a conversation begins. notice: share of sessions
    that announce their end. `pauses` is a key of PAUSES."""
    rng = random.Random(f"load {seed}")
    tools, mixed = PAUSES[pauses]
    sessions: list[Session] = []
    for number, root in enumerate(roots):
        made: dict[int, Session] = {}
        tool = _choose(tools, rng)
        for part, one in enumerate(family(root)):
            used = [_choose(tools, rng) if mixed else tool for _ in one.turns]
            drawn = [each.pause(rng) for each in used]
            if one.parent is None:
                drawn[0] = 0.0
            name = f"{number}" if one is root else f"{number}.{part}"
            names = [each.name for each in used]
            session = Session(name, root.at / rate, one, drawn, names, rng.random() < notice)
            made[id(one)] = session
            if one.parent is not None:
                made[id(one.parent)].forks.append(session)
            sessions.append(session)
    return Load(sessions, scale)


def _choose(tools: Sequence[Tool], rng: random.Random) -> Tool:
    return rng.choices(tools, [tool.weight for tool in tools])[0]


@dataclass(frozen=True, slots=True)
class Event:
    """A turn, at the time at which it would come if the engine took none."""

    at: float
    session: Session
    turn: int


def timeline(load: Load) -> list[Event]:
    """All turns by time."""
    events: list[Event] = []
    todo = [Event(s.at, s, 0) for s in load.sessions if s.conversation.parent is None]
    while todo:
        event = todo.pop()
        events.append(event)
        for session, turn in event.session.after(event.turn):
            todo.append(Event(event.at + session.pauses[turn], session, turn))
    return sorted(events, key=lambda event: event.at)


def working_set(load: Load) -> int:
    """Tokens of all conversations alive at the peak, what they share counted once. A session is alive
    from its first turn to its last; nobody's computing takes time here."""
    block, peak = load.scale.block, 0
    held: Counter[int] = Counter()
    reach: dict[str, int] = {}
    for event in timeline(load):
        session, name = event.session, event.session.name
        turn, ids = session.turns[event.turn], session.conversation.ids
        before, now = reach.get(name, 0), -(-(turn.prompt + turn.answer) // block)
        held.update(ids[before:now])
        reach[name] = max(before, now)
        peak = max(peak, len(held))
        if event.turn == len(session.turns) - 1:
            for one in ids[: reach.pop(name)]:
                held[one] -= 1
                if not held[one]:
                    del held[one]
    return peak * block


def quantiles(values: Sequence[float], *shares: float) -> list[float]:
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in shares]


Marginals = dict[str, list[float]]
SHARES = (0.1, 0.5, 0.9, 0.99)


def marginals(load: Load) -> Marginals:
    """p10, p50, p90 and p99 of lengths in tokens, of turns a session, of pauses in seconds by tool."""
    made = _lengths([one.conversation for one in load.sessions])
    drawn: dict[str, list[float]] = {}
    for one in load.sessions:
        for tool, pause in zip(one.tools[1:], one.pauses[1:], strict=True):
            drawn.setdefault(f"pause: {tool}", []).append(pause)
    return made | {tool: quantiles(values, *SHARES) for tool, values in sorted(drawn.items())}


def marginals_of_rows(rows: Sequence[Row], scale: Scale) -> Marginals:
    """The same of a whole trace, lengths divided as the load's are. Its gaps are from one arrival to
    the next, so answering is a part of them."""
    every = [c for root in conversations(rows, scale) for c in family(root)]
    gaps = [rows[b.row].at - rows[a.row].at for one in every for a, b in pairwise(one.turns)]
    return _lengths(every) | {"gap": quantiles(gaps or [0.0], *SHARES)}


def _lengths(made: Sequence[Conversation]) -> Marginals:
    turns = [turn for one in made for turn in one.turns]
    new = [b.prompt - a.prompt - a.answer for one in made for a, b in pairwise(one.turns)]
    return {
        "prompt": quantiles([turn.prompt for turn in turns], *SHARES),
        "answer": quantiles([turn.answer for turn in turns], *SHARES),
        "new after the answer": quantiles(new or [0], *SHARES),
        "turns a session": quantiles([len(one.turns) for one in made], *SHARES),
    }
