"""Beam search for the choices of a request: the engine is asked step by step, and the answers come
together at the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from elinvar.engine.beam import Beam, BeamParams, BeamSearch
from elinvar.engine.output import Delta

if TYPE_CHECKING:
    from elinvar.engine.tokenizer import Tokenizer
    from elinvar.server.service import Choice, Event


@dataclass(frozen=True, slots=True)
class Beams:
    """How a request wants its answers searched."""

    width: int
    length_penalty: float

    def params(self, choice: Choice) -> BeamParams:
        said = choice.params
        return BeamParams(
            self.width,
            said.max_tokens,
            self.length_penalty,
            said.logprobs,
            said.stop_token_ids,
            said.ignore_eos,
            said.adapter,
        )


async def search(
    ask: Callable[[Sequence[Choice]], AsyncGenerator[Event, None]],
    choices: Sequence[Choice],
    beams: Beams,
    tokenizer: Tokenizer,
) -> AsyncGenerator[Event, None]:
    """One delta a choice: those of a prompt are its best answers, best first. ask: the deltas of
    requests."""
    of_prompt: dict[int, list[Choice]] = {}
    for choice in choices:
        of_prompt.setdefault(choice.prompt_index, []).append(choice)
    searches: dict[int, BeamSearch] = {}
    for p, (choice, *_) in of_prompt.items():
        params = beams.params(choice)
        searches[p] = BeamSearch(params, params.ends(tokenizer.eos_ids))
    first: dict[int, Delta] = {}
    while any(one.live for one in searches.values()):
        asked: list[Choice] = []
        for p, one in searches.items():
            choice, step = of_prompt[p][0], one.params.step
            for beam in one.live:
                ids = [*choice.prompt_ids, *beam.token_ids]
                asked.append(replace(choice, index=len(asked), prompt_ids=ids, params=step))
        told: dict[int, Delta] = {}
        async with aclosing(ask(asked)) as events:
            async for choice, delta in events:
                told[choice.index] = delta
                first.setdefault(choice.prompt_index, delta)
        for p, one in searches.items():
            if one.live:
                mine = [told[c.index] for c in asked if c.prompt_index == p]
                one.push([delta.logprobs[0] for delta in mine])
    for p, several in of_prompt.items():
        found = searches[p].best(len(several))
        # There are fewer where hardly anything may follow.
        found += [Beam()] * (len(several) - len(found))
        for choice, beam in zip(several, found, strict=True):
            yield choice, _delta(beam, first[p], searches[p], tokenizer)


def _delta(beam: Beam, first: Delta, search: BeamSearch, tokenizer: Tokenizer) -> Delta:
    ids = list(beam.token_ids)
    ended = not ids or ids[-1] in search.end_ids
    return replace(
        first,
        text=tokenizer.decode(ids[:-1] if ended else ids),
        token_ids=ids,
        logprobs=list(beam.logprobs) if search.params.logprobs is not None else [],
        finish_reason="stop" if ended else "length",
    )
