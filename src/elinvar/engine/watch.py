"""Watchers of an engine: told when a request gets its first token and when it ends."""

from __future__ import annotations

import time
from typing import Any, Protocol

from elinvar.engine.output import FinishReason
from elinvar.sched.request import Request

Record = dict[str, Any]
"""What is known of one request, as JSON has it (docs/serving.md): counts and times, no texts."""


class Watcher(Protocol):
    """Both are called by the thread that steps: they must be quick, and may not raise."""

    def began(self, request: Request) -> None:
        """A request has its first token."""

    def ended(self, request: Request, reason: FinishReason) -> None:
        """A request ended, and its ledger with it; its last delta comes afterwards."""


def record(request: Request, reason: FinishReason | None = None) -> Record:
    """Of a request that ended for `reason`, or still runs. Of one that runs, the thread that steps
    may ask."""
    handling, now = request.handling, time.monotonic()
    return {
        "id": request.id,
        "tenant": handling.tenant,
        "service": handling.service,
        "priority": handling.priority,
        "session_id": handling.session,
        "adapter": request.params.adapter,
        "arrived": time.time() - (now - request.arrival),
        "prompt_tokens": request.num_prompt_tokens,
        "generated_tokens": request.num_tokens - request.num_prompt_tokens,
        "finish_reason": reason,
        "drafts": {"verified": request.num_drafted, "accepted": request.num_accepted},
        **request.ledger.report(now),
    }
