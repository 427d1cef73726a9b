"""Handling: how a request is treated among others. Nothing here may change its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from elinvar.base.errors import InputError

Service = Literal["interactive", "batch"]
"""Somebody waits for it; or it fills what the others leave, and yields to them at once."""

MAX_NAME = 256
"""Characters of a tenant's or a session's name."""
MAX_SECONDS = 1e9


@dataclass(frozen=True, slots=True)
class Handling:
    """Raises InputError naming the field when a value is out of range."""

    tenant: str = ""
    """Whose it is: shares, budgets and cached prefixes are a tenant's. "": the one that serves
    whoever has no name."""
    service: Service = "interactive"
    priority: int = 0
    """Higher goes first, where the policy asks for it."""
    session: str | None = None
    """The conversation that it belongs to, whose cached prefix is kept for its next turn."""
    expect_return_s: float | None = None
    """Seconds from its end until the session's next turn, as far as the client knows; 0: there
    will be none."""
    pause_kind: str | None = None
    """What the session waits for until then, such as a tool's name: pauses of one kind are thought
    to be alike. "": nothing is known of it; None: the same as before."""

    def __post_init__(self) -> None:
        for name in ("tenant", "session", "pause_kind"):
            value = getattr(self, name)
            if value is None and name != "tenant":
                continue
            if not isinstance(value, str) or len(value) > MAX_NAME:
                raise InputError(name, f"{name} must be a name of at most {MAX_NAME} characters.")
        if self.session == "":
            raise InputError("session", "session must not be empty.")
        if self.session is not None and self.session.endswith("/fork"):
            # POST /v1/sessions/a/fork forks a.
            raise InputError("session", "session must not end in /fork; choose another name.")
        if self.service not in get_args(Service):
            known = " or ".join(get_args(Service))
            raise InputError("service", f"service must be {known}, got {self.service!r}.")
        priority = self.priority
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 1000:
            raise InputError(
                "priority", f"priority must be an integer from -1000 to 1000, got {priority!r}."
            )
        seconds = self.expect_return_s
        if seconds is not None and (
            isinstance(seconds, bool)
            or not isinstance(seconds, int | float)
            or not 0 <= seconds <= MAX_SECONDS
        ):
            raise InputError(
                "expect_return_s",
                f"expect_return_s must be from 0 to {MAX_SECONDS:g} seconds, got {seconds!r}.",
            )


NO_WISHES = Handling()
OFFLINE = Handling(service="batch")
"""Nobody reads its tokens as they come: what counts is when all are done."""
