"""The oracle of sampling (see ref.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elinvar.ops.api import F32, I32
from elinvar.ops.arguments import Penalties, SampleArgs, SampleResult
from elinvar.ops.ref_rows import F64


class SampleRef:
    def sample(self, logits_LV: F32, args: SampleArgs) -> SampleResult:
        rows = logits_LV.astype(np.float64)
        ids = [_choice(edited(row, i, args), i, args) for i, row in enumerate(rows)]
        ids_L = np.array(ids, np.int32)
        if args.num_logprobs is None:
            none = np.empty((len(ids), 0), np.float32)
            return SampleResult(ids_L, none.ravel(), none.astype(np.int32), none)
        return self.score(logits_LV, ids_L, args.num_logprobs)

    def score(self, logits_LV: F32, ids_L: I32, num_logprobs: int) -> SampleResult:
        logits = logits_LV.astype(np.float64)
        order = np.lexsort((np.broadcast_to(np.arange(logits.shape[1]), logits.shape), -logits))
        top_ids = order[:, :num_logprobs].astype(np.int32)
        z = logits - logits.max(-1, keepdims=True)
        logprobs = (z - np.log(np.exp(z).sum(-1, keepdims=True))).astype(np.float32)
        own = np.take_along_axis(logprobs, ids_L[:, None].astype(np.int64), -1)[:, 0]
        return SampleResult(ids_L, own, top_ids, np.take_along_axis(logprobs, top_ids, -1))


def edited(row: F64, i: int, args: SampleArgs) -> F64:
    """Row i as a token is chosen from it; -inf where it may not be."""
    most = float(np.finfo(np.float32).max)
    clipped = np.clip(np.nan_to_num(row, nan=-most), -most, most)
    for lenient in (False, True):
        x = clipped.copy()
        if args.penalties is not None:
            _penalise(x, i, args.penalties)
        if args.biases is not None:
            span = slice(args.biases.starts[i], args.biases.starts[i + 1])
            for token, value in zip(args.biases.ids[span], args.biases.values[span], strict=True):
                if token >= len(x):
                    continue
                x[token] += 0.0 if lenient and np.isneginf(value) else value
        if args.masks is not None:
            for words in args.masks[args.mask_rows == i]:
                allowed = np.unpackbits(words.view(np.uint8), bitorder="little")
                x[allowed[: len(x)] == 0] = -np.inf
        if np.isfinite(x).any():
            break
    return x


def _penalise(x: F64, i: int, penalties: Penalties) -> None:
    history = penalties.token_ids[penalties.starts[i] : penalties.starts[i + 1]]
    seen = np.unique(history)
    factor = np.float64(penalties.repetition[i])
    x[seen] = np.where(x[seen] > 0, x[seen] / factor, x[seen] * factor)
    ids, counts = np.unique(history[penalties.prompt_lens[i] :], return_counts=True)
    x[ids] -= np.float64(penalties.frequency[i]) * counts + np.float64(penalties.presence[i])


def _choice(x: F64, i: int, args: SampleArgs) -> int:
    order = np.lexsort((np.arange(len(x)), -x))
    temperature = np.float64(args.temperature[i])
    if temperature == 0 or np.isneginf(x[order[0]]):
        return int(order[0])
    z = (x - x[order[0]]) / temperature
    if args.typical_p is not None and args.typical_p[i] < 1:
        order = order[np.isin(order, typical(z, float(args.typical_p[i])))]
        z = z - z[order[0]]
    kept = _kept(z, order, args.top_k[i], args.top_p[i], args.min_p[i])
    scores = z[kept] + gumbel(int(args.seeds[i]), int(args.positions[i]), kept)
    return int(kept[np.lexsort((kept, -scores))[0]])


def typical(z: F64, typical_p: float) -> NDArray[Any]:
    """Token ids that are kept, nearest to the entropy first."""
    p = np.exp(z)
    mean = (p[p > 0] * z[p > 0]).sum() / p.sum()
    order = np.lexsort((np.arange(len(z)), np.abs(z - mean)))
    reached = np.cumsum(p[order]) >= typical_p * p.sum()
    return order[: int(np.argmax(reached)) + 1] if reached.any() else order


def gumbel(seed: int, position: int, token_ids: NDArray[Any]) -> F64:
    """Gumbel noise of (seed, position, token id): word id % 4 of Philox4x32-10 with counter
    (id // 4, position, 0, 0) and the seed's two halves as key; 23 bits of it are uniform."""
    ids = np.asarray(token_ids, np.uint64)
    words = philox(ids >> np.uint64(2), position, seed)
    bits = words[(ids & np.uint64(3)).astype(np.int64), np.arange(len(ids))]
    uniform = ((bits >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
    return -np.log(-np.log(uniform))


def philox(counter: NDArray[np.uint64], position: int, seed: int) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al., 2011) -> [4, n] words."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0 = counter & low
    c1 = np.full_like(c0, position)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def _kept(z: F64, order: NDArray[Any], top_k: int, top_p: float, min_p: float) -> NDArray[Any]:
    """Token ids that the filters leave, likeliest first."""
    if 0 < top_k < len(order):
        order = order[:top_k]
    if top_p < 1:
        p = np.exp(z[order])
        reached = np.cumsum(p) >= np.float64(np.float32(top_p)) * p.sum()
        order = order[: int(np.argmax(reached)) + 1] if reached.any() else order
    if min_p > 0:
        order = order[z[order] >= np.log(np.float64(min_p))]
    return order
