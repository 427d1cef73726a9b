"""Policies: who goes first. One order decides who is admitted, who gets prompt budget in a step and
who is preempted last; whatever the policy, interactive requests go before batch ones.

A policy never sees blocks or rows, so none can break what the scheduler promises: see
docs/design/022-who-goes-first.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from elinvar.base.config import EngineConfig
from elinvar.base.limits import BATCH, INTERACTIVE, Target
from elinvar.sched.request import Request


class Policy(Protocol):
    """Requests are ordered by (turn, place, order of arrival), lower first."""

    def place(self, request: Request, work_s: float) -> float:
        """Where it stands for as long as it lives. Asked once, when it has arrived; work_s: the
        seconds that computing its prompt should take."""

    def turn(self, request: Request) -> float:
        """What changes while it waits or runs."""

    def gives_way(self, running: Request, waiting: Request) -> bool:
        """Whether `running` is preempted so that `waiting`, of the same class of service, can start.
        It must not hold the other way round after they changed places."""


class FirstCome:
    """In order of arrival."""

    def place(self, request: Request, work_s: float) -> float:
        return 0.0

    def turn(self, request: Request) -> float:
        return 0.0

    def gives_way(self, running: Request, waiting: Request) -> bool:
        return False


@dataclass(frozen=True)
class Priority(FirstCome):
    """Higher levels first; ageing_s seconds of waiting are worth one level.

    All age alike, so the order of two requests never changes: a request's place is the time at
    which one of level 0 would have had to arrive. Nobody waits longer than for those that came
    less than (difference of levels) x ageing_s later.
    """

    ageing_s: float

    def place(self, request: Request, work_s: float) -> float:
        return request.arrival - request.handling.priority * self.ageing_s

    def gives_way(self, running: Request, waiting: Request) -> bool:
        # Not by level alone: who was admitted for its age stays.
        higher = waiting.handling.priority > running.handling.priority
        return higher and waiting.place < running.place


class Fair(FirstCome):
    """Tenants in proportion to their weights, by a counter of what each was served (the virtual
    token counter: Sheng et al., 2024); in order of arrival within a tenant."""

    def turn(self, request: Request) -> float:
        return request.account.virtual

    def gives_way(self, running: Request, waiting: Request) -> bool:
        """While rows are divided unequally even after the change, so they never take turns."""
        theirs, ours = running.account, waiting.account
        unequal = theirs.num_running * ours.weight > (ours.num_running + 1) * theirs.weight
        return unequal and theirs.virtual > ours.virtual


@dataclass(frozen=True)
class Deadline(FirstCome):
    """Least slack first: by the last moment at which the prompt can be begun and the first token
    come in time. What is long goes earlier than what is short with the same deadline."""

    interactive: Target = INTERACTIVE
    batch: Target = BATCH

    def place(self, request: Request, work_s: float) -> float:
        target = self.batch if request.is_batch else self.interactive
        return request.arrival + target.ttft_s - work_s


def make_policy(config: EngineConfig) -> Policy:
    match config.policy:
        case "fcfs":
            return FirstCome()
        case "priority":
            return Priority(config.ageing_s)
        case "fair":
            return Fair()
        case "deadline":
            return Deadline(config.interactive, config.batch)
