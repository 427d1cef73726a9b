"""What a number format of the KV cache costs (docs/design/020): perplexity of a fixed text under each,
in windows of some lengths, every token of a window predicted from those before it.

    python benchmarks/perplexity.py MODEL [--text prose python] [--window 1024 4096] [--formats ...]

`prose` is tests/data/prose.txt: the project's own, so no model was trained on it. `python` is the
language reference that the standard library carries (pydoc_data, licence of Python), for contexts longer
than the prose; its words differ between versions, so the result says which. Those with a
hyphen and int4 are no formats of the cache: one of f32 is rounded to them as it is written.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray
from sidebyside.results import FOLDER, cpu_name, write

from elinvar.base.batch import ForwardBatch
from elinvar.base.config import BLOCK_SIZE, KVDtype
from elinvar.engine.tokenizer import load_tokenizer
from elinvar.models.family import Model
from elinvar.models.load import load_parts
from elinvar.ops import KVLayer, Ops, load_provider
from elinvar.ops.ref_attention import to_int8
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import open_checkpoint

F32 = NDArray[np.float32]
PROSE = Path(__file__).parents[1] / "tests/data/prose.txt"
STEP = 256
"""Tokens computed at once; what is found does not depend on it."""


def text_of(name: str) -> str:
    if name == "prose":
        return PROSE.read_text(encoding="utf-8")
    if name == "python":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    return Path(name).read_text(encoding="utf-8")


Rounding = Callable[[F32], F32]
"""Of vectors [T, H, D] to what is kept of them."""


def codes_of_8_bits(x_THD: F32, group: int | None = None) -> F32:
    """As the cache's of values, with a scale for each `group` dims of a vector, or for all."""
    codes, scales = to_int8(x_THD.reshape(*x_THD.shape[:2], -1, group or x_THD.shape[2]))
    return (codes * scales[..., None]).reshape(x_THD.shape)


def codes_of_4_bits(x_THD: F32, group: int | None = None) -> F32:
    """16 levels between the least and the largest of each `group` values of a vector, or of all."""
    groups = x_THD.reshape(*x_THD.shape[:2], -1, group or x_THD.shape[2])
    least = groups.min(-1, keepdims=True)
    step = (groups.max(-1, keepdims=True) - least) / 15
    codes = np.rint((groups - least) / np.where(step == 0, 1, step))
    return (least + codes * step).reshape(x_THD.shape)


def turned(x_THD: F32, rounding: Rounding) -> F32:
    """Rounded where Hadamard's matrix takes them, which spreads a large value over all dims."""
    turn = np.ones((1, 1), np.float32)
    while len(turn) < x_THD.shape[2]:
        turn = np.block([[turn, turn], [turn, -turn]]) / np.float32(math.sqrt(2))
    return rounding(x_THD @ turn) @ turn


groups_of_32 = partial(codes_of_4_bits, group=32)
SIMULATED: dict[str, tuple[Rounding, Rounding]] = {
    "int8-64": (partial(codes_of_8_bits, group=64),) * 2,
    "int8-turned": (partial(turned, rounding=codes_of_8_bits),) * 2,
    "int8-plain": (codes_of_8_bits, codes_of_8_bits),
    "int8-f32": (codes_of_8_bits, lambda x_THD: x_THD),
    "int4": (codes_of_4_bits, codes_of_4_bits),
    "int4-32": (groups_of_32, groups_of_32),
    "int4-turned": (partial(turned, rounding=groups_of_32),) * 2,
    "int8-int4": (codes_of_8_bits, groups_of_32),
}
"""Of keys and of values."""


class RoundingOps:
    """Ops whose f32 caches hold what is kept of keys and values."""

    def __init__(self, ops: Ops, keys: Rounding, values: Rounding) -> None:
        self.ops, self.keys, self.values = ops, keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def rope_write(
        self, qkv: F32, positions: Any, rope: F32, kv: KVLayer, slots: Any, *rest: Any
    ) -> F32:
        q = self.ops.rope_write(qkv, positions, rope, kv, slots, *rest)
        block, offset, dim = slots // BLOCK_SIZE, slots % BLOCK_SIZE, kv.k.shape[2]
        kv.k[block, :, :, offset] = self.keys(kv.k[block, :, :, offset])
        kv.v[block, :, offset, :dim] = self.values(kv.v[block, :, offset, :dim])
        return q


def log_probs(model: Model, ops: Ops, ids: Sequence[int], kv_dtype: KVDtype) -> F32:
    """Of each token but the first, given all before it -> [T - 1]."""
    specs = model.kv_specs(kv_dtype)
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    caches: dict[int, Any] = {}
    for spec in specs:
        caches |= zip(spec.layers, ops.kv_layers(spec, num_blocks), strict=True)
    kv = [caches[i] for i in range(len(caches))]
    table = np.arange(num_blocks, dtype=np.int32)[None]
    found = []
    for start in range(0, len(ids) - 1, STEP):
        positions = np.arange(start, min(start + STEP, len(ids) - 1), dtype=np.int32)
        batch = ForwardBatch(
            input_ids=np.array(ids, np.int32)[positions],
            positions=positions,
            query_start_loc=np.array([0, len(positions)], np.int32),
            seq_lens=positions[-1:] + 1,
            block_tables=(table,) * len(specs),
            slot_mapping=(positions,) * len(specs),
            logit_rows=np.arange(len(positions), dtype=np.int32),
        )
        logits = model.forward(batch, kv)
        logits -= logits.max(-1, keepdims=True)
        chosen = logits[np.arange(len(positions)), np.array(ids, np.int32)[positions + 1]]
        sums = np.exp(logits, out=logits).sum(-1, dtype=np.float64)
        found.append(chosen - np.log(sums))
    return np.concatenate(found)


def windows(ids: Sequence[int], length: int, most: int) -> Iterator[Sequence[int]]:
    """Whole ones, at most `most` tokens of them; one shorter window where the text is no longer."""
    for start in range(0, max(min(len(ids), most) - length, 0) + 1, length):
        yield ids[start : start + length]


def row(found: F32, exact: F32) -> dict[str, float]:
    """Perplexity, and by how much it is above that of the exact cache: percent, and its standard
    error from the differences token by token."""
    more = (exact - found).astype(np.float64)
    return {
        "perplexity": round(math.exp(-found.mean(dtype=np.float64)), 4),
        "excess": round(100 * math.expm1(more.mean()), 4),
        "error": round(100 * more.std() / math.sqrt(more.size), 4),
        "difference": round(float(np.abs(more).mean()), 6),
    }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    formats = ("f32", *(f for f in get_args(KVDtype) if f != "f32"), *SIMULATED)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", default=["prose"], help="prose, python or files")
    parser.add_argument("--window", type=int, nargs="+", default=[1024])
    parser.add_argument("--formats", nargs="+", choices=formats, default=list(formats))
    parser.add_argument("--tokens", type=int, default=2**15, help="of each text, at most")
    parser.add_argument("--weight-format", choices=["f32", "auto"], default="f32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, help="the file to write (default: none)")
    parser.add_argument(
        "--save", action="store_true", help="write to benchmarks/results/perplexity/"
    )
    options = parser.parse_args()

    ops = load_provider("cpu", options.threads)
    checkpoint = open_checkpoint(Path(options.model))
    tokenizer = load_tokenizer(checkpoint, cache_root())
    parts = load_parts(checkpoint, options.weight_format, cache_root())
    exact = parts.build(ops)
    run: dict[str, Callable[[Sequence[int]], F32]] = {}
    for name in ("f32", *(f for f in options.formats if f != "f32")):
        model, dtype = exact, name
        if name in SIMULATED:
            model, dtype = parts.build(cast(Ops, RoundingOps(ops, *SIMULATED[name]))), "f32"
        run[name] = lambda ids, m=model, d=dtype: log_probs(m, ops, ids, d)  # type: ignore[misc]

    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "model": Path(options.model).name,
        "weight_format": options.weight_format,
        "versions": {"python": platform.python_version()},
        "texts": {},
        "perplexity": {},
    }
    for name in options.text:
        text = text_of(name)
        ids = tokenizer.encode(text)
        report["texts"][name] = {"sha256": sha256(text.encode()).hexdigest(), "tokens": len(ids)}
        for length in options.window:
            pieces = list(windows(ids, length, options.tokens))
            found = {f: np.concatenate([one(ids) for ids in pieces]) for f, one in run.items()}
            table = {f: row(values, found["f32"]) for f, values in found.items()}
            report["perplexity"][f"{name}, {len(pieces)} windows of {len(pieces[0])}"] = table
            print(f"{name}, {len(pieces)} windows of {len(pieces[0])} tokens")
            for f, r in table.items():
                print(
                    f"  {f:11} {r['perplexity']:9.4f} {r['excess']:+8.3f} % +- {r['error']:.3f}"
                    f"   log-probs differ by {r['difference']:.5f}",
                    flush=True,
                )
    if options.save or options.out:
        stem = f"{report['date'][:10]}-{Path(options.model).stem.lower()}"
        print(write(report, options.out or FOLDER / "perplexity" / f"{stem}.json"))


if __name__ == "__main__":
    main()
