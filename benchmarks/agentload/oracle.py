"""What a load costs at least: an engine that forgets nothing computes each token once a prefix."""

from __future__ import annotations

from agentload.load import Load, timeline


def least(load: Load) -> int:
    """Prompt tokens that are computed when memory has no end: those of which the prefix was never
    computed before, and one of each turn, from which its answer is sampled. Answers' own tokens come
    on top, the same for everybody; the last one of each is not computed."""
    block = load.scale.block
    reach: dict[int, int] = {}
    total = 0
    for event in timeline(load):
        turn, ids = event.session.turns[event.turn], event.session.conversation.ids
        known = 0
        for one in ids[: -(-turn.prompt // block)]:
            known += reach.get(one, 0)
            if reach.get(one, 0) < block:
                break
        total += turn.prompt - min(known, turn.prompt - 1)
        end = turn.prompt + turn.answer - 1
        for index, one in enumerate(ids[: -(-end // block)]):
            reach[one] = max(reach.get(one, 0), min(block, end - index * block))
    return total
