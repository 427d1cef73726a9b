"""What is compared: how an engine keeps what agents come back to. A new row is one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agentload import policies
from agentload.leases import Leases
from agentload.policies import Hints
from agentload.simulate import Hint, Watcher, end_hint, exact_hint, no_hint
from elinvar.sched.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Config:
    """hint: what a client says of its session with each turn; None: requests name no session. tools:
    whether it names the tool that it will wait for. host:
    whether there is a host tier. engine: more fields of EngineConfig, for a real run. prepare: what to
    switch on in the scheduler of a simulated one."""

    hint: Hint | None = None
    tools: bool = False
    host: bool = False
    engine: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Scheduler], None] | None = None


CONFIGS = {
    "lru": Config(),
    "host tier": Config(host=True),
    "sessions": Config(hint=no_hint),
    "sessions, tools told": Config(hint=no_hint, tools=True),
    "sessions, ends told": Config(hint=end_hint),
    "sessions, returns told": Config(hint=exact_hint),
    "sessions, tools and returns told": Config(hint=exact_hint, tools=True),
    "sessions + host tier": Config(hint=no_hint, host=True),
    "sessions, tools told + host tier": Config(hint=no_hint, tools=True, host=True),
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A rule of which block yields that exists in the simulator only."""

    order: Callable[[], policies.Order]
    cached_first: bool = False
    host: bool = False
    """Whether there is a host tier, which the rule steers as well."""

    def watcher(self) -> Watcher:
        return Leases(self.order(), self.host)


CANDIDATES = {
    "blocks, LRU": Candidate(policies.Blocks),
    "leases, LRU": Candidate(policies.Recency),
    "learned, all alike": Candidate(lambda: policies.Learned(policies.alike)),
    "learned by tool": Candidate(lambda: policies.Learned(policies.by_tool)),
    "learned by past": Candidate(lambda: policies.Learned(policies.by_past)),
    "hints, exact": Candidate(lambda: policies.Trusting(Hints())),
    "hints x/ 2": Candidate(lambda: policies.Trusting(Hints(0.7))),
    "hints x/ 4": Candidate(lambda: policies.Trusting(Hints(1.4))),
    "hints, exact, learned": Candidate(lambda: policies.Learned(policies.alike, Hints())),
    "hints x/ 2, learned": Candidate(lambda: policies.Learned(policies.alike, Hints(0.7))),
    "hints x/ 4, learned": Candidate(lambda: policies.Learned(policies.alike, Hints(1.4))),
    "oracle": Candidate(policies.Oracle),
}
CANDIDATES |= {
    f"{name}; cached go first": Candidate(CANDIDATES[name].order, cached_first=True)
    for name in ("blocks, LRU", "learned by tool", "hints, exact", "oracle")
}
CANDIDATES |= {
    f"{name}; host tier": Candidate(CANDIDATES[name].order, host=True)
    for name in (
        "blocks, LRU",
        "leases, LRU",
        "learned by tool",
        "hints x/ 4, learned",
        "hints, exact",
        "oracle",
    )
}
