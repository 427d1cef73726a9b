"""The door of the scheduler: whether a request could ever run, even alone on an idle engine."""

from __future__ import annotations

from collections.abc import Collection

from elinvar.base.config import LayerKind
from elinvar.base.errors import InputError


def max_total_tokens(num_prompt: int, max_tokens: int, max_context: int, kv_tokens: int) -> int:
    """Length at which a request ends: prompt and max_tokens, capped by the context.

    kv_tokens: most tokens of one sequence that the KV cache holds. The cap is the context alone,
    never the cache: a small cache may refuse a request, it may not change its answer. Raises
    InputError naming `prompt` or `max_tokens`.
    """
    if num_prompt == 0:
        raise InputError("prompt", "The prompt has no tokens; give at least one.")
    if num_prompt >= max_context:
        raise InputError(
            "prompt",
            f"The prompt has {num_prompt} tokens, but with an answer the context of {max_context} "
            f"has room for {max_context - 1}: shorten the prompt.",
        )
    if num_prompt > kv_tokens:
        raise InputError(
            "prompt",
            f"The prompt has {num_prompt} tokens, but the KV cache holds {kv_tokens}: shorten the "
            "prompt or give the cache more memory.",
        )
    total = min(num_prompt + max_tokens, max_context)
    # The last token needs no place in the cache: nothing is sampled after it.
    if total - 1 > kv_tokens:
        raise InputError(
            "max_tokens",
            f"A prompt of {num_prompt} tokens and an answer of {total - num_prompt} exceed the KV "
            f"cache of {kv_tokens} tokens: set max_tokens to {kv_tokens + 1 - num_prompt} or give "
            "the cache more memory.",
        )
    return total


def why_no_window(kinds: Collection[LayerKind]) -> str | None:
    """Why a model with layers of these kinds takes no attention_window; None where it does."""
    if "chunked" in kinds:
        return "has layers that attend within chunks, whose keys a window would take away"
    if "full" not in kinds:
        return "has no layers of full attention, on which it would act"
    return None


def why_no_budget(kinds: Collection[LayerKind], has_index: bool) -> str | None:
    """The same of attention_budget. has_index: the model chooses keys for each token."""
    return why_no_window(kinds) or (
        "chooses what each of its tokens attends to itself" if has_index else None
    )
