"""How many KV blocks of each kind the memory buys, and the longest sequence they hold.

Every group first gets what one sequence of full length needs; the rest buys typical sequences,
because layers of different kinds fill at different rates (a sliding layer stops at its window).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elinvar.base.config import BLOCK_SIZE, KVSpec
from elinvar.base.errors import InputError

DEFAULT_SHARE = 4
"""By default the cache takes a quarter of the memory available,"""
DEFAULT_LIMIT = 2 * 2**30
"""at most this many bytes,"""
FULL_CONTEXT_SHARE = 2
"""but up to half of the memory available where one sequence of full length needs it."""
TYPICAL_TOKENS = 2048
"""Length of the sequences that the memory beyond the first is divided for."""


@dataclass(frozen=True, slots=True)
class KVPlan:
    num_blocks: tuple[int, ...]
    """Per group of the specs."""
    max_context: int
    """Tokens of the longest sequence that is held."""
    num_bytes: int


def blocks_needed(spec: KVSpec, num_tokens: int, max_step_tokens: int) -> int:
    """Most blocks that one sequence holds at once in this group.

    A sliding group holds a window and the span of one step, which begin anywhere in a block.
    """
    if spec.state is not None:
        return 2  # the state that it goes on from, and one to leave as a snapshot
    full = -(-num_tokens // BLOCK_SIZE)
    if spec.window is None:
        return full
    return min(full, (spec.window + max_step_tokens - 3) // BLOCK_SIZE + 2)


def plan_kv(
    specs: Sequence[KVSpec],
    model_context: int,
    available: int,
    *,
    kv_memory: int | None = None,
    max_context: int | None = None,
    max_rows: int = 256,
    max_step_tokens: int = 512,
) -> KVPlan:
    """Divide memory among the groups.

    available: bytes of free memory, from which the default is taken. kv_memory and max_context are
    what the user asked for, None where nothing: then the context is the model's, lowered to what
    the memory holds. Raises InputError where the two cannot both be had.
    """
    if max_context is not None and not 1 <= max_context <= model_context:
        raise InputError(
            "max_context",
            f"max_context must be between 1 and {model_context}, "
            f"which this model was made for; got {max_context}.",
        )

    def need(num_tokens: int) -> list[int]:
        return [blocks_needed(spec, num_tokens, max_step_tokens) for spec in specs]

    def size(blocks: Sequence[int]) -> int:
        return sum(n * spec.block_bytes for n, spec in zip(blocks, specs, strict=True))

    wanted = max_context or model_context
    budget = kv_memory
    if budget is None:
        budget = min(available // DEFAULT_SHARE, DEFAULT_LIMIT)
        budget = max(budget, min(size(need(wanted)), available // FULL_CONTEXT_SHARE))
    context = wanted
    if size(need(wanted)) > budget:
        context = _longest(budget, wanted, lambda tokens: size(need(tokens)))
        if max_context is not None or context == 0:
            least = wanted if max_context is not None else 1
            raise InputError(
                "kv_memory",
                f"A sequence of {least} tokens needs {size(need(least))} bytes of KV cache and "
                f"{budget} are to be had; give kv_memory more bytes or lower max_context.",
            )
    first, typical = need(context), need(min(context, TYPICAL_TOKENS))
    more = (budget - size(first)) // size(typical)
    blocks = [
        min(one + more * other, max_rows * one) for one, other in zip(first, typical, strict=True)
    ]
    return KVPlan(tuple(blocks), context, size(blocks))


def describe_blocks(specs: Sequence[KVSpec], num_blocks: Sequence[int]) -> str:
    """For the log."""
    return ", ".join(
        f"{count} {spec.kind} {'states' if spec.state else 'blocks'} of {spec.block_bytes} bytes"
        for spec, count in zip(specs, num_blocks, strict=True)
    )


def _longest(budget: int, wanted: int, cost: Callable[[int], int]) -> int:
    """Most tokens, in whole blocks and below `wanted`, whose cost the budget covers."""
    low, high = 0, wanted // BLOCK_SIZE
    while low < high:
        middle = (low + high + 1) // 2
        if cost(middle * BLOCK_SIZE) <= budget:
            low = middle
        else:
            high = middle - 1
    return low * BLOCK_SIZE
