"""What /v1/completions alone can: prompts that are repeated, holes that are filled in, and the best
of several answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from elinvar.base.handling import Handling
from elinvar.engine.fim import fill_in
from elinvar.server import prepare
from elinvar.server.asked import Asked
from elinvar.server.chats import Wanted, make_choices, run_sized
from elinvar.server.errors import invalid_value
from elinvar.server.formats import make_ready
from elinvar.server.schema import CompletionRequest
from elinvar.server.served import Target
from elinvar.server.service import Choice, Echo

if TYPE_CHECKING:
    from elinvar.engine.tokenizer import Tokenizer


async def ask_completion(
    target: Target, request: CompletionRequest, wanted: Wanted, handling: Handling
) -> Asked:
    """The answers to all prompts, ready to run. Raises ApiError or InputError naming the field."""
    served, core = target.served, target.served.core
    prompts = prepare.completion_prompts(request, core.model_config.vocab_size)
    field = "n" if len(prompts) == 1 else "prompt"
    served.service.check_count(len(prompts) * wanted.n, field, handling.tenant)
    await make_ready(served.engine, wanted.params.grammar, wanted.grammar_field)
    size = sum(len(p) for p in prompts if isinstance(p, str)) + len(request.suffix or "")
    if request.suffix:
        encode = partial(_fill_in, core.tokenizer, request.suffix)
        ids, ends = await run_sized(size, encode, prompts)
        params = wanted.params
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *ends))
        wanted = replace(wanted, params=params)
    else:
        ids = await run_sized(size, partial(_encode_all, core.tokenizer), prompts)
    choices = make_choices(target, wanted, ids, prepare.DEFAULT_COMPLETION_TOKENS, "prompt")
    choices = [_about_prompt(request, choice, prompts, core.tokenizer) for choice in choices]
    n = prepare.num_choices(request)
    return Asked(served, choices, handling, keep=n if n < wanted.n else None)


def echo_shift(asked: Asked) -> int:
    """By how many characters prompts that are repeated are longer than their tokens' text: some
    tokenizers write a space before it."""
    first = asked.choices[0]
    if first.echo is None:
        return 0
    return len(first.echo.text) - len(asked.served.core.tokenizer.decode(first.prompt_ids))


def _about_prompt(
    request: CompletionRequest,
    choice: Choice,
    prompts: Sequence[prepare.Prompt],
    tokenizer: Tokenizer,
) -> Choice:
    """The choice with what it is to say of its prompt."""
    choice = replace(choice, prompt_top=request.prompt_logprobs)
    if not request.echo:
        return choice
    prompt = prompts[choice.prompt_index]
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    return replace(choice, echo=Echo(text, request.logprobs, alone=request.max_tokens == 0))


def _encode_all(tokenizer: Tokenizer, prompts: Sequence[prepare.Prompt]) -> list[list[int]]:
    return [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]


def _fill_in(
    tokenizer: Tokenizer, suffix: str, prompts: Sequence[prepare.Prompt]
) -> tuple[list[list[int]], tuple[int, ...]]:
    holes = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise invalid_value("suffix", "suffix needs a prompt that is a text, not token ids.")
        holes.append(fill_in(tokenizer, prompt, suffix))
    return [hole.token_ids for hole in holes], holes[0].end_ids
