"""What comes out of an engine: deltas while a request runs, a completion when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from elinvar.base.plan import TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Delta:
    """What one step added to one request. The last one of a request has a `finish_reason`.

    Texts concatenate to the answer. A delta's text may lag behind its tokens: half a UTF-8
    character, or the beginning of what may become a stop text, is held back.
    """

    request_id: str
    text: str
    token_ids: list[int]
    """Sampled tokens, with the end token if one was sampled (it has no text)."""
    logprobs: list[TokenLogprobs]
    """One a token if the request asked for them, otherwise empty."""
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose keys and values were found in the prefix cache."""
    seed: int
    """The request's seed, also where the user gave none: giving it again repeats the answer."""
    error: str | None = None
    """With finish_reason `error`: what went wrong, one sentence. With `abort`: who wanted it, if
    somebody did."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """With the first tokens of a request that asked for them: of the prompt's, from its second on."""
    stop_text: str | None = None
    """With finish_reason `stop`: the stop text that ended the answer, if one did."""


@dataclass(slots=True)
class Completion:
    """A finished answer."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finish_reason: FinishReason
    seed: int
    prompt_logprobs: list[TokenLogprobs] | None = None
    """As in Delta."""


@dataclass(slots=True)
class CompletionBuilder:
    """Collects a request's deltas."""

    prompt_token_ids: list[int]
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None

    def push(self, delta: Delta) -> Completion | None:
        """Add a delta; the completion when it was the last one."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is None:
            return None
        return Completion(
            text="".join(self.texts),
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            prompt_token_ids=self.prompt_token_ids,
            num_cached_tokens=delta.num_cached_tokens,
            finish_reason=delta.finish_reason,
            seed=delta.seed,
            prompt_logprobs=self.prompt_logprobs,
        )
