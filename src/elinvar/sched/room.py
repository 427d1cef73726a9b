"""Room: whether a newcomer has enough, and who must go where there is not enough.

Looks and chooses; the scheduler preempts. The rules and why each request still finishes are in
docs/design/022-who-goes-first.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from elinvar.kv.manager import KVManager
from elinvar.kv.sequence import Prefix
from elinvar.sched.policy import Policy
from elinvar.sched.request import Request
from elinvar.sched.tenants import Tenants


class Room:
    """chunk: most tokens of a step."""

    def __init__(
        self, kv: KVManager, policy: Policy, tenants: Tenants, chunk: int, block_size: int
    ) -> None:
        self._kv, self._policy, self._tenants = kv, policy, tenants
        self._chunk, self._block_size = chunk, block_size
        self.put_off: list[Request] = []
        """Who may be passed while they wait for what others compute or fetch. What they will need
        stays free for them, or they would be passed by for long."""

    def goes_for(self, request: Request, running: Sequence[Request]) -> Request | None:
        """Who is preempted so that a running request can go on: one that comes after it."""
        rank = self._tenants.rank
        mine = rank(request)
        return self._cheapest([r for r in running if _may_go(r) and rank(r) > mine])

    def gives_way(self, request: Request, running: Sequence[Request]) -> Request | None:
        """Who is preempted so that a newcomer can start; None where nobody is, or where it would be
        in vain. Batch requests go at once, even if they did nothing since they last did: what they
        waste is what nobody else wanted."""
        leaving = [] if request.is_batch else [r for r in running if r.is_batch]
        leaving += [
            r
            for r in running
            if r.is_batch == request.is_batch and _may_go(r) and self._policy.gives_way(r, request)
        ]
        if not leaving:
            return None
        staying = [r for r in running if r not in leaving]
        prefix = self._kv.find_prefix(request.kv, request.token_ids)
        if staying and not self.fits(request, prefix, staying, leaving):
            return None
        return self._cheapest(leaving)

    def fits(
        self,
        request: Request,
        prefix: Prefix,
        running: Sequence[Request],
        leaving: Sequence[Request] = (),
    ) -> bool:
        """Besides its own tokens' blocks a newcomer must leave those that running requests still
        need for theirs and those that they will fill until its first token, or it would soon be
        preempted again. leaving: requests that might give theirs back."""
        need, chunk = self._kv.need, self._chunk
        steps = (request.num_tokens - prefix.num_tokens) // chunk
        reserve = need.spare(len(running) * (1 + steps // self._block_size))
        for other in running:
            if other.num_tokens > other.kv.capacity:
                more = need.to_come_for(other.kv, other.num_tokens, chunk)
                reserve = [a + b for a, b in zip(reserve, more, strict=True)]
        for other in self.put_off:
            none = [0] * len(reserve)
            more = need.to_come(none, 0, other.num_tokens, chunk, other.kv.kept)
            reserve = [a + b for a, b in zip(reserve, more, strict=True)]
        for other in leaving:
            reserve = [a - b for a, b in zip(reserve, need.held(other.kv), strict=True)]
        return need.can_admit(prefix, request.num_tokens, chunk, reserve)

    def _cheapest(self, requests: Sequence[Request]) -> Request | None:
        """Batch requests first, then by what would have to be computed again."""
        lost = self._kv.need.lost
        return min(
            requests,
            key=lambda r: (not r.is_batch, lost(r.kv, r.num_computed_tokens), -r.order),
            default=None,
        )


def _may_go(request: Request) -> bool:
    """Whether a request got further than where it was when it was last preempted."""
    return request.num_computed_tokens > request.num_reached_tokens
