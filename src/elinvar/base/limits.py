"""What tenants may take and what classes of service are promised. Nothing here changes an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elinvar.base.errors import InputError

ANY_TENANT = "*"
"""In a table of tenants: those that it does not name, each for itself."""


MOST = 1e12
"""Of anything here: sums and products of such numbers are finite."""


def check_positive(name: str, value: object) -> None:
    """Raises InputError naming the field."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value <= MOST):  # type: ignore[operator]
        raise InputError(name, f"{name} must be a number above 0, up to {MOST:g}, got {value!r}.")


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """A tenant's share and budget. Raises InputError naming the field when a value is out of range."""

    weight: float = 1.0
    """Its share beside others', where the policy is `fair`."""
    tokens_per_s: float | None = None
    """Tokens of prompts and answers that are computed for it, on average; beyond them its requests
    wait. What is found in the cache costs nothing."""
    burst_s: float = 10.0
    """Seconds of that rate which it may use at once after a rest."""
    max_running: int | None = None
    """Requests of it that compute at once; others wait."""
    max_waiting: int | None = None
    """Requests of it that wait besides those that may begin; more are refused with QueueFullError."""
    share_prefixes: bool = False
    """Whether its cached prefixes and those of others that share theirs serve each other. Then the
    time of an answer tells whether somebody else had the same beginning."""

    lease_share: float = 0.5
    """Share of the cache, from 0 to 1, that its sessions may keep for their next turns before what
    others used last. Nobody who runs waits for it."""

    def __post_init__(self) -> None:
        for name in ("weight", "tokens_per_s", "burst_s"):
            value = getattr(self, name)
            if not (value is None and name == "tokens_per_s"):
                check_positive(name, value)
        for name, least in (("max_running", 1), ("max_waiting", 0)):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < least
            ):
                raise InputError(
                    name, f"{name} must be a whole number of {least} or more, got {value!r}."
                )
        share = self.lease_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise InputError(
                "lease_share", f"lease_share must be a number from 0 to 1, got {share!r}."
            )
        if not isinstance(self.share_prefixes, bool):
            raise InputError(
                "share_prefixes",
                f"share_prefixes must be true or false, got {self.share_prefixes!r}.",
            )


@dataclass(frozen=True, slots=True)
class Target:
    """What requests of one class of service should see. Raises InputError naming the field."""

    ttft_s: float
    """Seconds from arrival to the first token: what the policy `deadline` orders by."""
    itl_s: float | Literal["auto"] | None
    """Seconds between an answer's tokens: prompts of others are cut so that steps take no longer.
    `auto`: twice what a step without prompts takes; None: no limit."""

    def __post_init__(self) -> None:
        check_positive("ttft_s", self.ttft_s)
        if self.itl_s is not None and self.itl_s != "auto":
            check_positive("itl_s", self.itl_s)


INTERACTIVE = Target(ttft_s=1.0, itl_s="auto")
BATCH = Target(ttft_s=600.0, itl_s=None)
