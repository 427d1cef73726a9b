"""What a step costs that verifies branches of drafts, on this machine."""

from __future__ import annotations

import time
from bisect import bisect_left

from elinvar.base.config import BLOCK_SIZE
from elinvar.base.plan import PlanItem, RowStart
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine

CONTEXT = 16 * BLOCK_SIZE
TOKENS = 1, 2, 3, 5, 9, 17
"""Of a request in a step, with its last known one. Between them costs are interpolated."""
BRANCHES = 1, 2, 4
ROUNDS = 12
REPEATS = 3

Costs = dict[int, list[float]]
"""By the number of branches: seconds a request, with as many tokens as TOKENS says."""


def measure(engine: Engine, requests: int) -> Costs:
    """So many requests alike, of CONTEXT known tokens each. Branches of one share all blocks but the last,
    and each computes its tokens from the last known one on. The least of several times, in turn: what
    else the machine does is no cost."""
    shapes = [(branches, tokens) for branches in BRANCHES for tokens in TOKENS]
    rounds = [
        {shape: _seconds(engine, requests, *shape) for shape in shapes} for _ in range(ROUNDS)
    ]
    return {
        branches: [min(times[branches, tokens] for times in rounds) for tokens in TOKENS]
        for branches in BRANCHES
    }


def seconds(costs: Costs, branches: int, tokens: int) -> float:
    """tokens: of all branches together. More branches than were measured cost as if they were tokens."""
    most = max(b for b in BRANCHES if b <= branches)
    line = costs[most]
    at = min(max(1, bisect_left(TOKENS, tokens)), len(TOKENS) - 1)
    low, high = TOKENS[at - 1], TOKENS[at]
    return line[at - 1] + (line[at] - line[at - 1]) * (tokens - low) / (high - low)


def _seconds(engine: Engine, requests: int, branches: int, tokens: int) -> float:
    runner, rows = engine.runner, engine.runner.rows
    items = []
    shares = [tokens // branches + (i < tokens % branches) for i in range(branches)]
    shared = CONTEXT // BLOCK_SIZE
    for request in range(requests):
        for branch, share in enumerate(shares):
            if not share:
                continue
            row, first = len(items), request * (shared + max(BRANCHES))
            blocks = [*range(first, first + shared), first + shared + branch]
            ids = [5 + i % 900 for i in range(CONTEXT + 1)]
            params = SamplingParams(seed=row, temperature=0)
            rows.start(RowStart("", row, ids, params, [blocks] * len(rows.tables)))
            rows.token_ids[row, CONTEXT : CONTEXT + share] = 7
            items.append(PlanItem("", row, CONTEXT, share, True, [], num_drafts=share - 1))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        batch, rows_L, position_L = rows.gather(items)
        logits_LV = runner.graphs.forward(batch)
        runner.ops.sample(logits_LV, rows.sample_args(rows_L, position_L))
        times.append(time.perf_counter() - began)
    return min(times) / requests
