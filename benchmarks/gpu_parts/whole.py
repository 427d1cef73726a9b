"""Whole models in their engine: the contract on the device, tokens a second, start to first token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.described import Described
from elinvar.engine.devices import CHIPS
from elinvar.engine.forecast import Reads, Run
from elinvar.nn.attention import kv_specs
from elinvar.ops.triton.sizes import matrix_bytes
from gpu_parts.base import Part
from gpu_parts.idle import idle
from gpu_parts.models import engine_of, random_model

PROMPT = 512
STEPS = 48


def measure(part: Part) -> None:
    begun = time.monotonic()
    model, ops, described = random_model(part.name, part.small, part.tables)
    batches = (1, 2) if part.small else (1, 8, 32, 128)
    prompt = 9 if part.small else PROMPT
    longest = 64 if part.small else 8192 + 64
    # What all rows of the largest batch need, and one long prompt.
    specs = model.kv_specs("bf16")
    a_block = sum(spec.block_bytes for spec in specs)
    blocks = max(batches[-1] * (prompt + STEPS + 96) // 32, longest // 32) + 64
    options = {"kv_memory": blocks * a_block, "max_rows": batches[-1], "max_context": longest}
    engine = engine_of(model, ops, **options, max_step_tokens=16 if part.small else 8192)
    part.attempt("first_token", lambda: first_token(engine, begun))
    for batch in batches[:1] if part.small else (1, 32):
        prompts = [random_prompt(engine, prompt, i) for i in range(batch)]
        steps = 3 if part.small else STEPS
        part.attempt(f"idle/{batch}", lambda p=prompts, n=steps: idle(part, engine, p, n))
    for batch in batches:
        part.attempt(f"decode/{batch}", lambda n=batch: decode(part, engine, described, n, prompt))
    part.attempt("prefill", lambda: prefill(engine, 40 if part.small else 8192))
    if part.device.type == "cuda":
        part.attempt("plan", lambda: plan(engine, described))
    if part.name == "llama":
        part.attempt("sleep", lambda: sleep(part, engine))
        part.attempt("contract", lambda: contract(part, engine))
        part.attempt("update", lambda: update(part))


def plan(engine: Engine, model: Described) -> dict[str, Any]:
    """What `elinvar plan` says of this run, and what the driver says is taken; random weights do not
    arrive, they are made where they are."""
    free, there = torch.cuda.mem_get_info()
    foreseen = Run(model, engine.config, replace(CHIPS["h200"], memory=there)).facts()["bytes"]
    planned = foreseen["total"] - foreseen["arriving"]
    return {**foreseen, "taken": there - free, "of_taken": planned / (there - free)}


def tokens_of(engine: Engine, prompts: Sequence[list[int]], count: int, **more: Any) -> list[Any]:
    """(token ids, log-probs) of each prompt's answer, all in one batch."""
    asked = {"temperature": 0.8, "seed": 7, "logprobs": 0, "ignore_eos": True, **more}
    ids = [engine.add(prompt, SamplingParams(max_tokens=count, **asked)) for prompt in prompts]
    found: dict[str, Any] = {one: ([], []) for one in ids}
    while engine.has_work:
        for delta in engine.step():
            if delta.error:
                raise RuntimeError(delta.error)
            found[delta.request_id][0].extend(delta.token_ids)
            found[delta.request_id][1].extend(one.logprob for one in delta.logprobs)
    return [found[one] for one in ids]


def random_prompt(engine: Engine, length: int, seed: int) -> list[int]:
    rng = np.random.default_rng((length, seed))
    found: list[int] = rng.integers(0, engine.model_config.vocab_size, length).tolist()
    return found


def first_token(engine: Engine, begun: float) -> dict[str, Any]:
    """From weights that are not there to a token, with all kernels to compile or to find compiled."""
    tokens_of(engine, [random_prompt(engine, 8, 0)], 1)
    return {"seconds": time.monotonic() - begun}


def contract(part: Part, engine: Engine) -> dict[str, Any]:
    """Equal to the bit: alone and in a batch; decoded, by a replayed graph, and computed as a prompt,
    without one; and with speculation on."""
    length, count = (5, 4) if part.small else (70, 40)
    prompts = [random_prompt(engine, length + i, i) for i in range(3 if part.small else 9)]
    together = tokens_of(engine, prompts, count)
    alone = [tokens_of(engine, [prompt], count)[0] for prompt in prompts[:2]]
    found: dict[str, Any] = {"alone_is_batch": alone == together[:2]}
    ids, logprobs = together[0]
    again = [tokens_of(engine, [prompts[0] + ids[:n]], 1)[0] for n in (1, count // 2, count - 1)]
    decoded = [([ids[n]], [logprobs[n]]) for n in (1, count // 2, count - 1)]
    found["graph_decode_is_eager_prefill"] = again == decoded
    # Repeated tokens, which the drafter of repetitions foresees.
    turns = [random_prompt(engine, 4, 99) * (length // 4) for _ in range(2)]
    options = {"kv_memory": engine.kv_bytes, "max_rows": 4, "max_context": engine.max_context}
    plain, drafting = (
        engine_of(engine.runner.model, engine.ops, **options, speculation=how)
        for how in ("off", "suffix")
    )
    with_drafts, without = (
        tokens_of(one, turns, count, temperature=0.0) for one in (drafting, plain)
    )
    found["speculation_changes_nothing"] = with_drafts == without
    found["drafted"] = sum(stats.num_drafted for stats in drafting.metrics.drafters)
    return found


def decode(part: Part, engine: Engine, model: Described, batch: int, prompt: int) -> dict[str, Any]:
    """Tokens a second of steps that decode alone, against what reading weights and cache allows."""
    count = STEPS + 16
    params = SamplingParams(max_tokens=count, temperature=0.8, seed=1, ignore_eos=True)
    ids = {engine.add(random_prompt(engine, prompt, i), params): 0 for i in range(batch)}
    while min(ids.values()) < 4:
        for delta in engine.step():
            ids[delta.request_id] += len(delta.token_ids)
    wait(part)
    begun, steps = time.perf_counter(), 2 if part.small else STEPS // 2
    tokens = sum(len(delta.token_ids) for _ in range(steps) for delta in engine.step())
    wait(part)
    seconds = time.perf_counter() - begun
    for request in ids:
        engine.abort(request)
    while engine.has_work:
        engine.step()
    found = {"tokens_per_s": tokens / seconds, "step_ms": seconds / steps * 1e3}
    if part.ceilings["copy"]:
        found["of_limit"] = found["tokens_per_s"] / limit(part, model, batch, prompt)
    return found


def limit(part: Part, model: Described, batch: int, context: int) -> float:
    """Tokens a second if a step took the time of its bytes at the rate of a copy."""
    sizes = [0 if e.kind == "vector" else matrix_bytes(e.kind, e.shape) for e in model.entries]
    reads = Reads.of(model, kv_specs(model.config, "bf16"), sizes)
    seconds = (reads.weight_bytes(batch) + batch * reads.kv_bytes(context)) / part.ceilings["copy"]
    return batch / seconds


def prefill(engine: Engine, length: int) -> dict[str, Any]:
    """The second of two: the first compiles."""
    for seed in (1, 2):
        begun = time.perf_counter()
        tokens_of(engine, [random_prompt(engine, length, seed)], 1)
        seconds = time.perf_counter() - begun
    return {"tokens_per_s": length / seconds, "seconds": seconds}


def sleep(part: Part, engine: Engine) -> dict[str, Any]:
    """Seconds to give memory back and to take it again, what is still held between, and that recorded
    steps give the same bits afterwards."""
    prompts = [random_prompt(engine, 5, 3)]
    before, begun = tokens_of(engine, prompts, 3), time.perf_counter()
    engine.sleep()
    wait(part)
    asleep = time.perf_counter()
    held = torch.cuda.memory_reserved() if part.device.type == "cuda" else 0
    engine.wake()
    wait(part)
    found = {"asleep_s": asleep - begun, "awake_s": time.perf_counter() - asleep}
    return found | {"held_bytes": held, "same": tokens_of(engine, prompts, 3) == before}


def update(part: Part) -> dict[str, Any]:
    """Steps that were recorded before other weights took the places of a small model's, and those of a
    model that was brought here anew, give the same bits."""
    model, ops, _ = random_model("llama", True, part.tables)
    engine = engine_of(model, ops, kv_memory=2**22, max_rows=2, max_context=64)
    old, new = (
        {name: _numbers(w.shape, seed) for name, w in model.weights.items()} for seed in (1, 2)
    )
    prompts = [random_prompt(engine, 5, seed) for seed in (1, 2)]
    engine.push_weights(old)
    before = tokens_of(engine, prompts, 4)
    engine.update_weights([new])
    updated = tokens_of(engine, prompts, 4)
    engine.push_weights(new)
    found = {"other_tokens": updated != before}
    return found | {"updated_is_new": updated == tokens_of(engine, prompts, 4)}


def _numbers(shape: tuple[int, ...], seed: int) -> NDArray[np.float16]:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float16) / 8


def wait(part: Part) -> None:
    if part.device.type == "cuda":
        torch.cuda.synchronize()
