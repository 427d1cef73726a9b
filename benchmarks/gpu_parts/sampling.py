"""Sampling over Llama 3's vocabulary: the tokens are those of the reference, in every batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from elinvar.ops import load_provider
from elinvar.ops.arguments import SampleArgs
from gpu_parts.base import Part


def arguments(
    rows: int, temperature: float = 0.8, top_k: int = 50, top_p: float = 0.95
) -> SampleArgs:
    def full(value: float, dtype: Any = np.float32) -> Any:
        return np.full(rows, value, dtype)

    return SampleArgs(
        seeds=np.arange(rows, dtype=np.uint64),
        positions=np.arange(rows, dtype=np.int32) + 100,
        temperature=full(temperature),
        top_k=full(top_k, np.int32),
        top_p=full(top_p),
        min_p=full(0.0),
        num_logprobs=0,
    )


def measure(part: Part) -> None:
    ops: Any = load_provider("cuda")
    ref: Any = load_provider("ref")
    size = 300 if part.small else 128256
    for rows in (1, 3) if part.small else (1, 32, 128):
        logits = part.randn(rows, size, dtype=torch.float32, seed=rows) * 3
        for name, args in (
            ("plain", arguments(rows, top_k=0, top_p=1.0)),
            ("top", arguments(rows)),
        ):

            def one(
                logits: Any = logits, args: SampleArgs = args, rows: int = rows
            ) -> dict[str, Any]:
                found = ops.sample(logits, args)
                some = min(rows, 4)
                wanted = ref.sample(logits[:some].cpu().numpy(), arguments_of(args, some))
                alone = ops.sample(logits[:1], arguments_of(args, 1))
                same = np.array_equal(alone.ids, found.ids[:1])
                same &= np.array_equal(alone.logprobs, found.logprobs[:1])
                told = {
                    "right": np.array_equal(found.ids[:some], wanted.ids),
                    "invariant": bool(same),
                }
                if part.small:
                    return told
                # The results go to the host: no graph can hold that.
                begun = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                begun[0].record()
                for _ in range(10):
                    ops.sample(logits, args)
                begun[1].record()
                torch.cuda.synchronize()
                seconds = begun[0].elapsed_time(begun[1]) / 1e4
                return told | part.rates(seconds, logits.numel() * 4)

            part.attempt(f"{name}/{rows}", one)


def arguments_of(args: SampleArgs, rows: int) -> SampleArgs:
    """Of the first rows."""
    names = "seeds", "positions", "temperature", "top_k", "top_p", "min_p"
    return SampleArgs(*(getattr(args, name)[:rows] for name in names), args.num_logprobs)
