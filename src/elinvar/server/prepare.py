"""From a decoded request to what the engine is asked: messages, prompts, sampling parameters.

Owns the meaning of the fields: OpenAI's defaults, ranges, and which parameters are refused because
they are not served yet. No engine and no HTTP here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from elinvar.base.config import PolicyName
from elinvar.base.errors import InputError
from elinvar.base.handling import Handling, Service
from elinvar.base.sampling import MAX_LOGPROBS, SINKS, SamplingParams
from elinvar.server.chats import Wanted
from elinvar.server.errors import bad_request, invalid_value, not_supported, own_names
from elinvar.server.formats import asked_grammar
from elinvar.server.schema import DEFAULTS, ChatRequest, CompletionRequest

MAX_CHOICES = 128
"""OpenAI's own limit of `n`."""
DEFAULT_COMPLETION_TOKENS = 16
"""What /v1/completions generates when max_tokens is not given."""

SERVICE_TIERS = "auto", "default", "priority", "flex"
"""Of OpenAI's words those that mean something here; `flex` is slower where others wait."""

_ANY_TOKENS = 2**31 - 1
"""While it is not known how many there is room for."""

Prompt = str | list[int]
Number = TypeVar("Number", int, float)


def wanted(request: ChatRequest | CompletionRequest) -> Wanted:
    """Everything but the prompt, checked. Raises ApiError or InputError naming the field."""
    check_supported(request)
    grammar, field = asked_grammar(request)
    params = sampling_params(request, _ANY_TOKENS, num_logprobs(request))
    params = replace(params, grammar=grammar)
    thinking = request.max_thinking_tokens if isinstance(request, ChatRequest) else None
    return Wanted(num_answers(request), token_limit(request), params, field, thinking)


def check_supported(request: ChatRequest | CompletionRequest) -> None:
    """Raises for parameters that are known, but not served yet."""
    for name, harmless in DEFAULTS.items():
        value = getattr(request, name, None)
        if value is not None and value not in harmless:
            raise not_supported(name)


def completion_prompts(request: CompletionRequest, vocab_size: int) -> list[Prompt]:
    """The prompts in order: texts as given, token ids checked against the vocabulary."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid_value("prompt", "prompt must not be an empty list.")
    if all(isinstance(p, str) for p in prompt):
        return list(prompt)  # type: ignore[arg-type]
    if all(isinstance(p, int) for p in prompt):
        return [_ids(prompt, "prompt", vocab_size)]
    if all(isinstance(p, list) for p in prompt):
        return [_ids(p, f"prompt[{i}]", vocab_size) for i, p in enumerate(prompt)]
    raise bad_request(
        "Invalid type for 'prompt': expected a string, a list of strings, a list of token ids "
        "or a list of lists of token ids, got a mixture.",
        "prompt",
        "invalid_type",
    )


def _ids(ids: Any, path: str, vocab_size: int) -> list[int]:
    if not ids:
        raise invalid_value(path, f"{path} must not be empty.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        i = next(i for i, t in enumerate(ids) if not 0 <= t < vocab_size)
        message = f"{path}[{i}] must be a token id from 0 to {vocab_size - 1}, got {ids[i]}."
        raise invalid_value(f"{path}[{i}]", message)
    return list(ids)


def num_choices(request: ChatRequest | CompletionRequest) -> int:
    n = 1 if request.n is None else request.n
    if not 1 <= n <= MAX_CHOICES:
        raise invalid_value("n", f"n must be an integer from 1 to {MAX_CHOICES}, got {n}.")
    return n


def num_answers(request: ChatRequest | CompletionRequest) -> int:
    """How many answers a prompt gets, of which `num_choices` are sent."""
    n = num_choices(request)
    best_of = request.best_of if isinstance(request, CompletionRequest) else None
    if best_of is None or request.use_beam_search:  # then it says how many beams there are
        return n
    if not n <= best_of <= MAX_CHOICES:
        message = f"best_of must be from n ({n}) to {MAX_CHOICES}, got {best_of}."
        raise invalid_value("best_of", message)
    if request.stream and best_of > n:
        message = "best_of is known when all answers are there: leave it out, or stream."
        raise invalid_value("best_of", message)
    return best_of


def num_logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    """How many alternatives a token gets; None: no log-probs at all."""
    if isinstance(request, CompletionRequest):
        k, name = request.logprobs, "logprobs"
    elif request.top_logprobs is None:
        return 0 if request.logprobs else None
    else:
        k, name = request.top_logprobs, "top_logprobs"
        if not request.logprobs:
            raise invalid_value(name, "top_logprobs needs logprobs to be true.")
    if k is not None and not 0 <= k <= MAX_LOGPROBS:
        raise invalid_value(name, f"{name} must be an integer from 0 to {MAX_LOGPROBS}, got {k}.")
    return k


def token_limit(request: ChatRequest | CompletionRequest) -> int | None:
    """What the client allows in one answer; None where it did not say."""
    name, limit = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        name, limit = "max_completion_tokens", request.max_completion_tokens
        if request.max_tokens is not None:
            raise invalid_value("max_tokens", "Give max_tokens or max_completion_tokens, not both.")
    if limit == 0 and isinstance(request, CompletionRequest) and request.echo:
        return 1  # it is left out of what is sent
    if limit is not None and limit < 1:
        raise invalid_value(name, f"{name} must be at least 1, got {limit}.")
    return limit


def sampling_params(
    request: ChatRequest | CompletionRequest, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """Raises InputError naming the field when a value is out of range."""
    if request.attention_sinks is not None and request.attention_window is None:
        raise InputError("attention_sinks", "attention_sinks needs an attention_window, too.")
    stop = request.stop or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(request.temperature, 1.0),
        top_k=_or(request.top_k, 0),
        top_p=_or(request.top_p, 1.0),
        min_p=_or(request.min_p, 0.0),
        typical_p=_or(request.typical_p, 1.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=logit_bias(request.logit_bias or {}),
        bad_words=tuple(request.bad_words or ()),
        min_tokens=_or(request.min_tokens, 0),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        seed=request.seed,
        stop=stops,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=_told(request, logprobs),
        prompt_logprobs=_prompt_logprobs(request, logprobs),
        attention_window=request.attention_window,
        attention_sinks=_or(request.attention_sinks, SINKS),
        attention_budget=request.attention_budget,
    )


def _told(request: ChatRequest | CompletionRequest, logprobs: int | None) -> int | None:
    """best_of compares answers by the log-probs of their tokens."""
    return 0 if logprobs is None and num_answers(request) > num_choices(request) else logprobs


def _prompt_logprobs(request: ChatRequest | CompletionRequest, logprobs: int | None) -> int | None:
    """Those that the client asked for, and those of a prompt that is repeated."""
    asked = request.prompt_logprobs
    if asked is not None and request.stream:
        message = "prompt_logprobs come with a whole answer: leave them out, or stream."
        raise invalid_value("prompt_logprobs", message)
    if asked is not None and not 0 <= asked <= MAX_LOGPROBS:
        message = f"prompt_logprobs must be an integer from 0 to {MAX_LOGPROBS}, got {asked}."
        raise invalid_value("prompt_logprobs", message)
    if not isinstance(request, CompletionRequest) or not request.echo or logprobs is None:
        return asked
    return max(logprobs, asked or 0)


def logit_bias(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """Keys of JSON are texts, and those of this field are token ids."""
    for key in biases:
        if not (key.isascii() and key.isdecimal()) or len(key) > 10:
            message = f"The keys of logit_bias must be token ids, got {key[:100]!r}."
            raise invalid_value("logit_bias", message)
    return tuple((int(key), value) for key, value in biases.items())


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value


class Hints(Protocol):
    """Fields of any API that say how a request is treated."""

    priority: int | None
    session_id: str | None
    expect_return_s: float | None
    pause_kind: str | None


def handling(request: ChatRequest | CompletionRequest, tenant: str, policy: PolicyName) -> Handling:
    """How it is treated among others. Raises ApiError or InputError naming the field."""
    tier = request.service_tier
    if tier is not None and tier not in SERVICE_TIERS:
        known = ", ".join(SERVICE_TIERS)
        message = f"service_tier must be one of {known}, got {tier[:100]!r}."
        raise invalid_value("service_tier", message)
    return hinted(request, tenant, policy, "batch" if tier == "flex" else "interactive")


def hinted(
    request: Hints, tenant: str, policy: PolicyName, service: Service = "interactive"
) -> Handling:
    """The same where an API has no service_tier."""
    if request.priority and policy != "priority":
        message = f"priority changes nothing where the server's policy is {policy}; leave it out."
        raise invalid_value("priority", message)
    for name in ("expect_return_s", "pause_kind"):
        if getattr(request, name) is not None and request.session_id is None:
            message = f"{name} says when a session comes back; give its session_id, too."
            raise invalid_value(name, message)
    with own_names({"session": "session_id"}):
        return Handling(
            tenant=tenant,
            service=service,
            priority=_or(request.priority, 0),
            session=request.session_id,
            expect_return_s=request.expect_return_s,
            pause_kind=request.pause_kind,
        )


def tier_used(request: ChatRequest | CompletionRequest) -> str | None:
    """What the answer says of service_tier, as OpenAI's does: what it was served as, if anything was
    asked for. Nobody is served better than by default."""
    if request.service_tier is None:
        return None
    return "flex" if request.service_tier == "flex" else "default"


def stream_usage(request: ChatRequest | CompletionRequest) -> bool:
    """Whether a stream ends with a usage chunk."""
    if request.stream_options is None:
        return False
    if not request.stream:
        raise invalid_value("stream_options", "stream_options needs stream to be true.")
    return bool(request.stream_options.include_usage)
