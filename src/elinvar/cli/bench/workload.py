"""What `bench serve` sends: when each request arrives, how long it is, what it holds.

Everything follows from the seed: two runs, and two servers, get the same requests.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elinvar.base.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Content = str | list[int] | list[dict[str, Any]]
"""A text or token ids to be continued, or the messages of a chat."""

PREFIX_BLOCK = 512
"""Tokens that one of a trace's `hash_ids` stands for."""
TOKEN_IDS = (100, 1100)
"""Prompts are made of these ids: every vocabulary has them, and few are special tokens."""


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    """Seconds after the first request."""
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    """Ids of the prompt's blocks; prompts that begin with equal ids begin with equal tokens."""
    shared: tuple[int, int] | None = None
    """(which one, its tokens): a prompt begins with it besides, and all that have it begin alike."""
    content: Content | None = None
    """What is asked, where that was given; else tokens are made up."""


def poisson(
    lengths: Sequence[Arrival], rate: float, seed: int, burstiness: float = 1.0
) -> list[Arrival]:
    """The same requests, `rate` a second on average; infinity: all at once. burstiness: the shape of
    the gamma distribution of the times between them. 1: they arrive independently of each other (a
    Poisson process); below it they come in bursts, above it more evenly."""
    rng, at, arrivals = random.Random(seed), 0.0, []
    for one in lengths:
        arrivals.append(replace(one, at=at))
        if math.isinf(rate):
            continue
        if burstiness == 1.0:
            at += rng.expovariate(rate)
        else:
            at += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
    return arrivals


def with_shared(arrivals: Sequence[Arrival], tokens: int, count: int, seed: int) -> list[Arrival]:
    """The same requests behind one of `count` prefixes of so many tokens, by chance."""
    rng = random.Random(f"prefixes {seed}")
    return [
        replace(
            one, shared=(rng.randrange(count), tokens), prompt_tokens=one.prompt_tokens + tokens
        )
        for one in arrivals
    ]


def read_dataset(path: Path, count: int, output_tokens: int) -> list[Arrival]:
    """The first `count` prompts of a file as `elinvar generate --prompts-file` reads it, again from the
    beginning where it has fewer. Raises InputError as that does."""
    from elinvar.base.sampling import SamplingParams
    from elinvar.cli.prompts import read_prompts

    prompts = read_prompts(path, SamplingParams(max_tokens=output_tokens), chat=False)
    given = itertools.islice(itertools.cycle(prompts), count)
    return [Arrival(0.0, 0, one.params.max_tokens, content=one.prompt) for one in given]


def uniform(
    count: int, prompt: tuple[int, int], output: tuple[int, int], seed: int
) -> list[Arrival]:
    """Requests whose lengths lie anywhere between the bounds."""
    rng = random.Random(f"lengths {seed}")
    return [Arrival(0.0, rng.randint(*prompt), rng.randint(*output)) for _ in range(count)]


def read_trace(path: Path, count: int | None, speed: float, scale: float) -> list[Arrival]:
    """The first `count` requests of a trace, arriving `speed` times as fast, all lengths times
    `scale`. Two public formats are known, JSONL with `timestamp` (ms), `input_length`,
    `output_length` and perhaps `hash_ids` (Mooncake), and CSV with `TIMESTAMP`, `ContextTokens`
    and `GeneratedTokens` (Azure); and the JSONL of `elinvar serve --trace-requests`. Raises InputError naming the first line that is neither."""
    arrivals: list[Arrival] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.read(1)
            file.seek(0)
            rows: Iterable[Any] = file if first == "{" else csv.DictReader(file)
            parse: Callable[[Any], Arrival] = _jsonl if first == "{" else _azure
            for number, row in enumerate(rows, 1 if first == "{" else 2):
                if len(arrivals) == count:
                    break
                try:
                    arrivals.append(parse(row))
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        "trace", f"Line {number} of {path} is no request of a known trace: {error}."
                    ) from None
    except UnicodeDecodeError:
        raise InputError("trace", f"{path} is not a UTF-8 text file.") from None
    if not arrivals:
        raise InputError("trace", f"{path} holds no request.")
    start = min(one.at for one in arrivals)
    scaled = (
        replace(
            one,
            at=(one.at - start) / speed,
            prompt_tokens=max(1, round(one.prompt_tokens * scale)),
            output_tokens=max(1, round(one.output_tokens * scale)),
        )
        for one in arrivals
    )
    return sorted(scaled, key=lambda one: one.at)


def _jsonl(line: str) -> Arrival:
    values = json.loads(line)
    if "arrived" in values:  # ours; one that its client left had no token perhaps
        output = max(1, int(values["generated_tokens"]))
        return Arrival(float(values["arrived"]), int(values["prompt_tokens"]), output)
    return Arrival(
        float(values["timestamp"]) / 1000,
        int(values["input_length"]),
        int(values["output_length"]),
        tuple(values.get("hash_ids", ())),
    )


def _azure(row: dict[str, str]) -> Arrival:
    # Seven digits of a second are written; fromisoformat reads six and drops the rest.
    at = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
    return Arrival(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def prompts(
    arrivals: Sequence[Arrival], seed: int, vocab_size: int, more: Sequence[int] = (2,)
) -> list[NDArray[Any]]:
    """Token ids of each prompt, random but where prefixes are shared. more: numbers that change those
    that are not."""
    import numpy as np

    low, high = TOKEN_IDS if vocab_size >= TOKEN_IDS[1] else (0, vocab_size)

    def tokens(count: int, *key: int) -> NDArray[Any]:
        return np.random.default_rng([seed, *key]).integers(low, high, count, np.int32)

    made = []
    for i, one in enumerate(arrivals):
        shared = [tokens(PREFIX_BLOCK, 1, block) for block in one.prefix]
        if one.shared is not None:
            shared.append(tokens(one.shared[1], 3, one.shared[0]))
        own = tokens(max(0, one.prompt_tokens - sum(map(len, shared))), *more, i)
        made.append(np.concatenate([*shared, own])[: one.prompt_tokens])
    return made
