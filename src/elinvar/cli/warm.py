"""Filling the prefix cache before a server listens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from elinvar.base.errors import EngineError, InputError
from elinvar.base.handling import Handling
from elinvar.base.sampling import SamplingParams
from elinvar.cli.prompts import Prompt, encode, read_prompts
from elinvar.cli.terminal import Interrupt, bar, note

if TYPE_CHECKING:
    from elinvar.engine.core import Engine

_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0)
_WARMING = Handling(service="batch")


def read_warm_prompts(path: Path) -> list[Prompt]:
    """The lines of a prompts file; each may name the `tenant` whose prefixes it is for. Raises
    InputError naming file and line."""
    return read_prompts(path, _ONE_TOKEN, chat=False, with_tenant=True)


def warm(engine: Engine, prompts: Sequence[Prompt]) -> None:
    """Compute all prompts in one batch, so that requests find them. Ctrl-C leaves the rest out.

    Raises InputError naming file and line, EngineError when a step failed.
    """
    places, total = _add_all(engine, prompts)
    metrics, begin, num_done = engine.metrics, time.perf_counter(), 0
    computed_before = metrics.computed_tokens
    before = computed_before + metrics.cached_tokens
    with Interrupt() as interrupt, bar("Warming", total) as update:
        while engine.has_work and not interrupt.hit:
            for delta in engine.step():
                if delta.error is not None:
                    raise EngineError(f"Warming by {places[delta.request_id]}: {delta.error}")
                num_done += 1
            tokens = min(total, metrics.computed_tokens + metrics.cached_tokens - before)
            rate = tokens / (time.perf_counter() - begin)
            update(tokens, f"{tokens:,} of {total:,} tokens · {rate:,.0f} tokens/s")
    if interrupt.hit:
        for request_id in places:
            engine.abort(request_id)
        while engine.has_work:
            engine.step()
        note(f"Warming was stopped after {num_done} of {len(places)} prompts.")
    else:
        seconds = time.perf_counter() - begin
        note(f"Warmed {len(places)} prompts of {total:,} tokens in {seconds:.1f} s.")
    room = engine.scheduler.kv.max_sequence
    if metrics.computed_tokens - computed_before > room:
        note(f"The cache holds {room:,} tokens: what was computed first may not be found any more.")


def _add_all(engine: Engine, prompts: Sequence[Prompt]) -> tuple[dict[str, str], int]:
    """Where each request comes from, by id, and the tokens of all."""
    tenants = engine.config.tenants
    places, total = {}, 0
    for prompt in prompts:
        try:
            if prompt.tenant and prompt.tenant not in tenants:
                raise InputError("tenant", f"the server has no tenant {prompt.tenant!r}.")
            if (
                not prompt.tenant
                and tenants
                and not any(t.share_prefixes for t in tenants.values())
            ):
                raise InputError("tenant", "name its tenant, since none shares its prefixes.")
            ids = encode(engine, prompt)
            params = replace(_ONE_TOKEN, adapter=prompt.params.adapter)
            places[engine.add(ids, params, handling=_WARMING, prefix_of=prompt.tenant)] = (
                prompt.where
            )
        except InputError as error:
            raise InputError(error.field, f"Bad {prompt.where}: {error}") from None
        total += len(ids)
    return places, total
