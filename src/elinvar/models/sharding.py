"""Tensor parallelism: which part of each weight a rank holds, by the weight's canonical name.

Families name their weights alike (docs/adding-a-model.md), so this table serves all of them. What is
multiplied first is cut by outputs, what follows it by inputs (Shoeybi et al., 2019): a rank computes
its heads and its part of an MLP alone, and the ranks' sums are added after `o` and `down`. The
biases of those two are added once and not cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from elinvar.base.config import ModelConfig
from elinvar.base.errors import ModelError
from elinvar.weights.rules import Cut, Rule

ROWS: Literal[0] = 0
COLUMNS: Literal[1] = 1
MOST = 64
"""Ranks that an error proposes."""


@dataclass(frozen=True, slots=True)
class Split:
    """How ranks share a weight."""

    axis: Literal[0, 1]
    unit: str = ""
    """What stays whole: "heads" or "key-value heads", of delta nets "key heads" or "value heads"; "":
    single rows or columns."""
    repeated: bool = False
    """With more ranks than units, several ranks hold the same one."""
    even: bool = True
    """Whether all ranks hold the same number."""


_Q, _KV = Split(ROWS, "heads"), Split(ROWS, "key-value heads", repeated=True)
_KEYS, _VALUES = Split(ROWS, "key heads", repeated=True), Split(ROWS, "value heads")
_OUT, _IN, _VOCAB = Split(ROWS), Split(COLUMNS), Split(ROWS, even=False)

SPLITS: dict[str, Split | None] = {
    **dict.fromkeys(("embed", "head", "head_bias"), _VOCAB),
    **dict.fromkeys(("q", "q_bias", "k_b", "v_b", "sinks"), _Q),
    **dict.fromkeys(("k", "k_bias", "v", "v_bias"), _KV),
    "o": Split(COLUMNS, "heads"),
    **dict.fromkeys(("gate", "gate_bias", "up", "up_bias"), _OUT),
    "down": _IN,
    **dict.fromkeys(("o_bias", "down_bias", "positions", "router", "router_bias", "bias"), None),
    **dict.fromkeys(("q_a", "kv_a", "index_q", "index_k", "index_weights", "join"), None),
    **dict.fromkeys(("altup_router", "altup_predict", "altup_correct", "altup_scale"), None),
    **dict.fromkeys(("laurel_left", "laurel_right", "own_gate", "own_out", "spread"), None),
    **dict.fromkeys(("own_embed", "own_project", "gather"), None),
    "gate_o": _Q,
    **dict.fromkeys(("delta_q", "delta_k", "conv_q", "conv_k"), _KEYS),
    **dict.fromkeys(("delta_v", "delta_z", "delta_b", "delta_a", "conv_v"), _VALUES),
    **dict.fromkeys(("a_log", "dt_bias"), _VALUES),
    "delta_o": Split(COLUMNS, "value heads"),
}
"""By the last part of a canonical name; None: every rank holds all of it, as it does of norms."""

_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


def shard(
    rules: Sequence[Rule],
    config: ModelConfig,
    rank: int,
    size: int,
    experts: Literal["rows", "whole"] = "rows",
) -> list[Rule]:
    """The rules of rank `rank` of `size`: loaded by them, a state holds that rank's part alone
    (weights.shards joins the parts again).

    experts: each expert is cut like an MLP, or the ranks share them out whole, expert by expert.
    Raises ModelError naming the weight that cannot be shared so, and the numbers of ranks that can.
    """
    assert 0 <= rank < size
    found = []
    for rule in rules:
        expert = _EXPERT.search(rule.name)
        if expert and experts == "whole":
            assert config.moe is not None
            if int(expert[1]) * size // config.moe.num_experts == rank:
                found.append(rule)
        else:
            found.append(replace(rule, cut=_cut(rule, config, rank, size)))
    return found


def split_of(rule: Rule, config: ModelConfig) -> Split | None:
    """Raises ModelError for a name that the table lacks."""
    last = rule.name.rpartition(".")[2]
    if last in SPLITS:
        return SPLITS[last]
    if not last.removesuffix("_bias").endswith("norm"):
        raise ModelError(
            f"How ranks share {rule.name} is not known; add {last} to models/sharding.py."
        )
    if last in ("q_norm", "k_norm") and config.latent is None and rule.shape != (config.head_dim,):
        return _Q if last == "q_norm" else _KV  # gains of all heads together
    return None


def _cut(rule: Rule, config: ModelConfig, rank: int, size: int) -> Cut | None:
    split = split_of(rule, config)
    if split is None or size == 1:
        return None
    assert rule.shape is not None
    length = rule.shape[split.axis]
    of = {"heads": config.num_heads, "key-value heads": config.num_kv_heads}
    if config.delta is not None:
        of |= {"key heads": config.delta.key_heads, "value heads": config.delta.heads}
    units = of.get(split.unit, length)
    if split.repeated and size % units == 0:
        first = rank * units // size
        last = first + 1
    elif split.even:
        unit = split.unit or ("rows", "columns")[split.axis]
        first, last = _share(rule.name, units, unit, rank, size, split.repeated)
    elif size <= units:
        first, last = units * rank // size, units * (rank + 1) // size
    else:
        raise ModelError(f"{rule.name} has {units} rows, too few for {size} ranks.")
    each = length // units
    return Cut(split.axis, first * each, last * each)


def _share(
    name: str, units: int, unit: str, rank: int, size: int, repeated: bool
) -> tuple[int, int]:
    if units % size:
        sizes = [n for n in range(1, MOST) if units % n == 0 or (repeated and n % units == 0)]
        raise ModelError(
            f"{name} has {units} {unit}, which {size} ranks cannot share evenly; "
            f"{', '.join(map(str, sizes))} ranks can."
        )
    return units * rank // size, units * (rank + 1) // size
