"""`elinvar bench MODEL`: prompt and decode speed of a model, measured through the engine's real steps.

Decode is measured as a server lives it: all rows of a batch are in, then a fixed number of steps
is timed, scheduling, sampling and detokenising included. Prefix reuse is off.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from elinvar.base.handling import OFFLINE
from elinvar.base.sampling import SamplingParams
from elinvar.cli import options as opt
from elinvar.cli.bench import arguments as arg
from elinvar.cli.command import command
from elinvar.cli.terminal import bar

if TYPE_CHECKING:
    from elinvar.engine.core import Engine

Rates = dict[int, list[float]]


@command
@opt.model
@arg.batch("1,4,16,32")
@arg.prefill
@arg.prompt_tokens
@arg.count("--decode-tokens", 128, "Steps timed per batch size.")
@arg.count("--repeats", 3, "Rounds; median and range are told.")
@opt.as_json
@opt.engine
@opt.verbose
def offline(
    model: str,
    batch: str,
    prefill: str,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    as_json: bool,
    **flags: Any,
) -> None:
    """Measure prompt and decode tokens/s: all rows at once, nothing arrives meanwhile."""
    batches, prefills = arg.numbers(batch, "--batch"), arg.numbers(prefill, "--prefill")
    config = opt.engine_config(
        flags, prefix_cache=False, max_rows=max(batches, default=1), speculation="off"
    )

    from elinvar.cli.load import load

    with load(model, config) as llm:
        measured = _Bench(llm.engine, prompt_tokens, decode_tokens)
        measured.check(prefills)
        measured.run(prefills, batches, repeats)
    ops: Any = llm.engine.ops
    about = {
        "model": model,
        "threads": ops.num_threads,
        "simd": ops.simd,
        "kv_dtype": config.kv_dtype,
        "weight_format": config.weight_format,
        "repeats": repeats,
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
    }
    if as_json:
        print(json.dumps(_as_json(measured, about)))
    else:
        _print_table(measured, about)


@dataclass
class _Bench:
    """Tokens/s of each round, by prompt length and by batch size."""

    engine: Engine
    prompt_tokens: int
    decode_tokens: int
    prefill: Rates = field(default_factory=dict)
    decode: Rates = field(default_factory=dict)

    def check(self, prefills: list[int]) -> None:
        """Raises InputError where the model's context is too short for what is asked."""
        for length in prefills:
            self.engine.check(
                arg.spread_prompt(self.engine, 0, length), SamplingParams(max_tokens=1)
            )
        self.engine.check(
            arg.spread_prompt(self.engine, 0, self.prompt_tokens), self._decode_params()
        )

    def run(self, prefills: list[int], batches: list[int], repeats: int) -> None:
        """One warm-up round of the shortest kind, then `repeats` rounds over everything."""
        jobs: list[tuple[str, Callable[[int], float], int, Rates]] = [
            *(("prefill", self._prefill, n, self.prefill) for n in prefills),
            *(("decode, batch", self._decode, n, self.decode) for n in batches),
        ]
        self._prefill(min(prefills, default=self.prompt_tokens))
        with bar("bench", repeats * len(jobs)) as update:
            for round_ in range(repeats):
                for i, (name, job, size, rates) in enumerate(jobs):
                    update(round_ * len(jobs) + i, f"{name} {size}")
                    rates.setdefault(size, []).append(job(size))

    def _prefill(self, length: int) -> float:
        """Tokens/s of one prompt, to its first sampled token."""
        self.engine.add(
            arg.spread_prompt(self.engine, 0, length),
            SamplingParams(max_tokens=1, temperature=0),
            handling=OFFLINE,
        )
        start = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return length / (time.perf_counter() - start)

    def _decode(self, size: int) -> float:
        """Tokens/s over all rows, from the step after the last prompt was computed."""
        engine, params = self.engine, self._decode_params()
        ids = [
            engine.add(
                arg.spread_prompt(self.engine, i, self.prompt_tokens), params, handling=OFFLINE
            )
            for i in range(size)
        ]
        begun: set[str] = set()
        while len(begun) < size:
            begun |= {delta.request_id for delta in engine.step() if delta.token_ids}
        count = 0
        start = time.perf_counter()
        for _ in range(self.decode_tokens):
            count += sum(len(delta.token_ids) for delta in engine.step())
        seconds = time.perf_counter() - start
        for request_id in ids:
            engine.abort(request_id)
        return count / seconds

    def _decode_params(self) -> SamplingParams:
        # Rows whose prompt came first decode while the others' prompts are computed, and none may
        # end before the last timed step: twice the steps is more than enough.
        return SamplingParams(max_tokens=2**20, temperature=0, ignore_eos=True)


def _as_json(measured: _Bench, about: dict[str, Any]) -> dict[str, Any]:
    def each(rates: Rates, value: Callable[[list[float]], Any]) -> dict[str, Any]:
        return {str(size): value(found) for size, found in rates.items()}

    def middle(found: list[float]) -> float:
        return round(_median(found), 2)

    def spread(found: list[float]) -> list[float]:
        return [round(min(found), 2), round(max(found), 2)]

    return {
        "prefill": each(measured.prefill, middle),
        "decode": each(measured.decode, middle),
        "prefill_range": each(measured.prefill, spread),
        "decode_range": each(measured.decode, spread),
        **about,
    }


def _median(found: list[float]) -> float:
    """The statistics module would bring decimal and OpenSSL into a process whose memory is told."""
    ordered, half = sorted(found), len(found) // 2
    return (ordered[half] + ordered[~half]) / 2


def _print_table(measured: _Bench, about: dict[str, Any]) -> None:
    print(f"{about['model']}: {about['threads']} threads, {about['simd']}, tokens/s over all rows")
    rows = [(f"prefill {size}", rates) for size, rates in measured.prefill.items()]
    rows += [(f"decode, batch {size}", rates) for size, rates in measured.decode.items()]
    for name, rates in rows:
        low, high = min(rates), max(rates)
        print(f"  {name:<18}{_median(rates):>9,.1f}   [{low:,.1f} - {high:,.1f}]")
