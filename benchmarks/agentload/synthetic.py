"""Rows with the marginals that Mooncake publishes of its conversation trace, for where it is absent.

Lengths are lognormal with the trace's medians and spreads, the growth of a turn beyond the answer a mixture of a few
words and a document, a third of the requests go on from an earlier one, and all share their first block.
"""

from __future__ import annotations

import random
from itertools import count

from agentload.trace import PREFIX_BLOCK, Row

SHARED_ID = 0
LONGEST = 126_000


def rows(num_conversations: int, seed: int = 0, seconds: float = 3537.0) -> list[Row]:
    """Sorted by time; of so many conversations that begin within `seconds`."""
    rng = random.Random(f"rows {seed}")
    fresh = count(1)
    made: list[Row] = []
    for _ in range(num_conversations):
        at = rng.uniform(0, seconds)
        prompt = _between(rng.lognormvariate(8.84, 1.1), 900, LONGEST)
        ids: list[int] = [SHARED_ID]
        while True:
            answer = _between(rng.lognormvariate(5.6, 0.9), 1, 2000)
            whole, part = divmod(prompt, PREFIX_BLOCK)
            ids += [next(fresh) for _ in range(whole - len(ids))]
            # A part of a block has an id of its own, which no later request has.
            tail = [next(fresh)] if part else []
            made.append(Row(at, prompt, answer, (*ids[:whole], *tail)))
            at += rng.lognormvariate(4.8, 0.8)
            more = 20 if rng.random() < 0.72 else rng.lognormvariate(8.3, 0.9)
            prompt += answer + max(1, round(more))
            if rng.random() > 0.62 or prompt > LONGEST:
                break
    return sorted(made, key=lambda row: row.at)


def _between(value: float, low: int, high: int) -> int:
    return min(high, max(low, round(value)))
