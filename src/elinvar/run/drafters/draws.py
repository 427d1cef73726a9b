"""Drawing drafts as the target would: with its parameters, its edits and its noise.

Legend: L rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elinvar.base.batch import I32
from elinvar.ops.api import F32, Ops
from elinvar.run.drafters.api import Guess
from elinvar.run.rows import Rows


def draw(
    ops: Ops,
    rows: Rows,
    guesses: Sequence[Guess],
    rows_L: list[int],
    position_L: I32,
    logits_LV: F32,
) -> None:
    """One more draft for each guess, which will have this index in this row. It is also written there,
    behind what is known, for the drafts after it."""
    args = rows.sample_args(rows_L, position_L)
    args.num_logprobs = 0
    result = ops.sample(logits_LV, args)
    rows.token_ids[rows_L, position_L] = result.ids
    chances = np.exp(result.logprobs).tolist()
    for guess, token, chance in zip(guesses, result.ids.tolist(), chances, strict=True):
        guess.tokens.append(token)
        guess.chances.append(chance)
