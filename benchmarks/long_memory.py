"""What is lost where a request sees its first and last tokens alone (docs/design/021): perplexity of a
long text by position, beyond the model's context too, and a number that is asked for after it has
left the window. And where an answer sees the blocks of its prompt that the prompt's end attends to most
(docs/design/028): the same number, and the perplexity of what follows a prompt.

    python benchmarks/long_memory.py smollm2-135m [--tokens 16384] [--window 1024] [--needles 20]

The text is the reference that comes with Python (pydoc_data.topics), or --text FILE. "moved sinks" is
the paper's own scheme, in which positions count what is kept: the first tokens' keys are turned again
as they move behind the window. Everything else runs as in the engine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar import LLM
from elinvar.base.batch import ForwardBatch
from elinvar.base.config import BLOCK_SIZE
from elinvar.base.plan import PlanItem, RowStart
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.run.rows import Rows

CHUNK = 256
Kept = tuple[int, int] | None


class Reader:
    """Log-probs of a text's tokens under a model; one sequence, whose cache is kept whole."""

    def __init__(self, engine: Engine, num_tokens: int) -> None:
        self.model, self.dtype = engine.runner.model, engine.config.kv_dtype
        self.num_blocks = -(-num_tokens // BLOCK_SIZE)
        self.specs = self.model.kv_specs(self.dtype)
        layers: dict[int, Any] = {}
        for spec in self.specs:
            layers |= zip(
                spec.layers, engine.ops.kv_layers(spec, self.num_blocks + 64), strict=True
            )
        self.kv = [layers[i] for i in range(len(layers))]

    def logprobs(
        self,
        ids: Sequence[int],
        kept: Kept = None,
        moved: bool = False,
        budget: int | None = None,
        num_prompt: int = 0,
    ) -> NDArray[np.float64]:
        """Of each token but the first. kept: as in SamplingParams.kept_blocks; budget: of the first
        num_prompt tokens."""
        rows = Rows(1, len(ids) + BLOCK_SIZE, self.specs)
        blocks = [list(range(-(-len(ids) // BLOCK_SIZE))) for _ in self.specs]
        params = SamplingParams(seed=0, attention_budget=budget)
        rows.start(RowStart("", 0, list(ids), params, blocks, num_prompt_tokens=num_prompt))
        rows.sights.start(0, kept)
        found, step = [], BLOCK_SIZE if moved else CHUNK
        starts = sorted({*range(0, num_prompt, step), *range(num_prompt, len(ids), step)})
        for start, stop in pairwise([*starts, len(ids)]):
            count = stop - start
            item = PlanItem("", 0, start, count, False, [])
            batch, _, _ = rows.gather([item])
            assert isinstance(batch, ForwardBatch)
            if moved:
                self._move_sinks(batch, start)
            batch.logit_rows = np.arange(count, dtype=np.int32)
            logits = self.model.forward(batch, self.kv)
            rows.choose([item], batch)
            after = np.asarray(ids[start + 1 : start + count + 1])
            logits = logits[: len(after)]
            top = logits.max(-1)
            total = np.log(np.exp(logits - top[:, None]).sum(-1, dtype=np.float64)) + top
            found.append(logits[np.arange(len(after)), after] - total)
        return np.concatenate(found)

    def _move_sinks(self, batch: ForwardBatch, start: int) -> None:
        """The first block's keys, turned by as much as was given back, in a block of their own."""
        assert batch.sight is not None
        ahead = start - int(batch.sight.positions[0])
        if not ahead:
            return
        rope = self.model.ropes["full"].upto(ahead + 1)[ahead]  # type: ignore[attr-defined]
        cos, sin = np.split(rope[:, None], 2)
        for table in batch.sight.block_tables:
            table[:, 0] = self.num_blocks
        for layer in self.kv:
            low, high = np.split(layer.k[0].astype(np.float32), 2, axis=1)
            turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=1)
            layer.k[self.num_blocks] = turned
            layer.v[self.num_blocks] = layer.v[0]


def perplexities(reader: Reader, ids: Sequence[int], window: int, marks: Sequence[int]) -> None:
    last = window // BLOCK_SIZE
    schemes: dict[str, tuple[Kept, bool]] = {
        "everything": (None, False),
        f"window {window}, no sinks": ((0, last), False),
        f"window {window}, 32 sinks": ((1, last), False),
        f"window {window}, 128 sinks": ((4, last), False),
        f"window {window}, 32 moved sinks": ((1, last), True),
    }
    parts = list(pairwise(marks))
    print("| sees |", " | ".join(f"{a:,} .. {b:,}" for a, b in parts), "|")
    print("| --- |", " | ".join("---" for _ in parts), "|")
    for name, (kept, moved) in schemes.items():
        found = reader.logprobs(ids, kept, moved)
        cells = [f"{np.exp(-found[a:b].mean()):.2f}" for a, b in parts]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


def continuations(reader: Reader, ids: Sequence[int], tokens: int, num_prompt: int) -> None:
    """Of what follows prompts from all over the text."""
    schemes: dict[str, dict[str, Any]] = {
        "everything": {},
        f"window {tokens}, 32 sinks": {"kept": (1, tokens // BLOCK_SIZE)},
        f"budget {tokens}": {"budget": tokens, "num_prompt": num_prompt},
    }
    length = num_prompt + CHUNK
    starts = range(0, len(ids) - length, length)
    print(f"| sees | {CHUNK} tokens behind {len(starts)} prompts of {num_prompt} |\n| --- | --- |")
    for name, scheme in schemes.items():
        found = [reader.logprobs(ids[at : at + length], **scheme)[num_prompt:] for at in starts]
        print(f"| {name} | {np.exp(-np.mean(found)):.2f} |", flush=True)


def policies(base: SamplingParams, tokens: int) -> dict[str, SamplingParams]:
    """What an answer may see: everything, or about so many tokens of the prompt."""
    return {
        "everything": base,
        f"window {tokens}, 32 sinks": replace(base, attention_window=tokens),
        f"budget {tokens}": replace(base, attention_budget=tokens),
    }


def needles(llm: LLM, filler: str, window: int, count: int, num_tokens: int) -> None:
    """A number at some depth of a text of `num_tokens`, asked for at its end: how often the answer
    begins with it."""
    tokenizer, rng = llm.engine.tokenizer, np.random.default_rng(0)
    words = tokenizer.encode(filler)
    print(f"| of {count} numbers, found at depth | 0 % | 25 % | 50 % | 75 % | 95 % |")
    print("| --- | --- | --- | --- | --- | --- |")
    base = SamplingParams(temperature=0, max_tokens=8)
    asked: list[list[int]] = []
    numbers = [str(n) for n in rng.integers(10_000, 99_999, count)]
    depths = (0.0, 0.25, 0.5, 0.75, 0.95)
    for depth in depths:
        for number in numbers:
            at = int(rng.integers(0, len(words) - num_tokens))
            before = int(depth * num_tokens)
            text = tokenizer.decode(words[at : at + before])
            text += f"\n\nThe secret number is {number}. Remember it.\n\n"
            text += tokenizer.decode(words[at + before : at + num_tokens])
            text += "\n\nQuestion: What is the secret number?\nAnswer: The secret number is"
            asked.append(tokenizer.encode(text))
    for name, params in policies(base, window).items():
        found = [
            numbers[i % count] in one.text for i, one in enumerate(llm.generate(asked, params))
        ]
        cells = [str(sum(found[i : i + count])) for i in range(0, len(found), count)]
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


def costs(llm: LLM, ids: Sequence[int], window: int) -> None:
    """What a token costs behind a prompt of `ids`, alone."""
    print("| sees | ms a token | blocks held |\n| --- | --- | --- |")
    base = SamplingParams(temperature=0, max_tokens=65, ignore_eos=True)
    pool = llm.engine.scheduler.kv.pools[0]
    for name, params in policies(base, window).items():
        times, held = [], 0
        for _ in llm.stream(list(ids), params):
            times.append(time.perf_counter())
            held = held if len(times) > 64 else pool.num_blocks - pool.num_free
        gaps = np.diff(times)
        print(f"| {name} | {1e3 * np.median(gaps):.2f} | {held} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--needles", type=int, default=20)
    parser.add_argument("--haystack", type=int, default=3000)
    parser.add_argument("--kv-dtype", choices=["f16", "bf16", "f32"], default="f16")
    args = parser.parse_args()
    if args.text is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        text = args.text.read_text("utf-8")
    llm = LLM(args.model, kv_dtype=args.kv_dtype)
    ids = llm.engine.tokenizer.encode(text)[: args.tokens]
    context = llm.engine.model_config.max_context
    marks = sorted({32, args.window, 4096, context, *range(context, len(ids), 4096), len(ids) - 1})
    print(json.dumps({"tokens": len(ids), "context": context, "kv": args.kv_dtype}))
    reader = Reader(llm.engine, len(ids))
    perplexities(reader, ids, args.window, [m for m in marks if m < len(ids)])
    continuations(reader, ids, args.budget, args.haystack)
    costs(llm, (ids * 8)[: context - 70], args.window)
    if args.needles:
        needles(llm, text, args.budget, args.needles, args.haystack)


if __name__ == "__main__":
    main()
