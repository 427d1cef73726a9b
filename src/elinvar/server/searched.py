"""What requests say of beam search: its fields, and those that mean nothing beside them."""

from __future__ import annotations

from elinvar.base.sampling import SamplingParams
from elinvar.engine.beam import MAX_WIDTH, BeamParams
from elinvar.server import prepare
from elinvar.server.beams import Beams
from elinvar.server.errors import invalid_value
from elinvar.server.schema import ChatRequest, CompletionRequest

_NOT_SEARCHED = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "min_tokens", "stop"),
    *("include_stop_str_in_output", "skip_special_tokens", "prompt_logprobs"),
    *("attention_window", "attention_budget"),
    *("stream", "echo"),
)
_SAMPLED: dict[str, object] = {
    **dict.fromkeys(("top_p", "typical_p", "repetition_penalty"), 1.0),
    "skip_special_tokens": True,
}
"""Values that change nothing of a search, besides nothing, 0 and false."""


def beams(request: ChatRequest | CompletionRequest, params: SamplingParams) -> Beams | None:
    """How the answers are searched, where they are not sampled. params: what became of the request."""
    penalty = request.length_penalty
    if not request.use_beam_search:
        if penalty is not None:
            message = "length_penalty compares the answers of beams: it needs use_beam_search."
            raise invalid_value("length_penalty", message)
        return None
    for name in _NOT_SEARCHED:
        value = getattr(request, name, None)
        changes = value not in (None, _SAMPLED.get(name))
        if changes and (value or name == "skip_special_tokens"):
            message = f"{name} means nothing with use_beam_search: leave one of them out."
            raise invalid_value(name, message)
    if params.grammar is not None:
        message = "Beams keep to no grammar: leave use_beam_search out, or the format."
        raise invalid_value("use_beam_search", message)
    n, best_of = prepare.num_choices(request), getattr(request, "best_of", None)
    name, width = ("n", n) if best_of is None else ("best_of", best_of)
    if not n <= width <= MAX_WIDTH:
        message = f"{name} says how many beams there are, n ({n}) to {MAX_WIDTH}, got {width}."
        raise invalid_value(name, message)
    found = Beams(width, 1.0 if penalty is None else penalty)
    BeamParams(width, length_penalty=found.length_penalty)
    return found
