"""Telling a person where a request's time went."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elinvar.engine.output import FinishReason
    from elinvar.engine.watch import Record
    from elinvar.sched.request import Request


class Records(dict[str, "Record"]):
    """A Watcher that keeps what is known of the requests that ended, by id."""

    def began(self, request: Request) -> None:
        pass

    def ended(self, request: Request, reason: FinishReason) -> None:
        from elinvar.engine.watch import record

        self[request.id] = record(request, reason)


def sentence(one: Record) -> str:
    """queued 0.1 ms, prefill 12.3 ms (17 tokens in 1 chunk, 64 cached), decode 140.2 ms; 152.6 ms"""
    prefill, cached = one["prefill"], one["cached_tokens"]
    chunks = f"{prefill['chunks']} chunk{'s' * (prefill['chunks'] != 1)}"
    found = "".join(f", {count} found in {tier}" for tier, count in cached.items() if count)
    more = {
        "prefill": f" ({prefill['tokens']} tokens in {chunks}{found})",
        "decode": f" ({one['steps']} steps)",
    }
    parts = ", ".join(
        f"{state} {ns / 1e6:,.1f} ms{more.get(state, '')}"
        for state, ns in one["parts_ns"].items()
        if ns
    )
    return f"{parts}; {one['wall_ns'] / 1e6:,.1f} ms in all"
