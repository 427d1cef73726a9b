"""The oracle of mixtures of experts (see ref.py)."""

from __future__ import annotations

import numpy as np

from elinvar.base.config import Activation, Scoring
from elinvar.ops.api import F32, I32
from elinvar.ops.arguments import Experts
from elinvar.ops.ref_linear import LinearRef
from elinvar.ops.ref_rows import gated_product


class MoeRef(LinearRef):
    def route(
        self,
        logits_TE: F32,
        k: int,
        scoring: Scoring,
        renormalise: bool,
        scaling: float,
        bias_E: F32 | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> tuple[I32, F32]:
        ids = np.empty((len(logits_TE), k), np.int32)
        weights = np.empty((len(logits_TE), k), np.float32)
        for t, row in enumerate(logits_TE.astype(np.float64)):
            if scoring == "softmax":
                scores = np.exp(row - row.max())
                scores /= scores.sum()
            else:
                scores = 1 / (1 + np.exp(-row))
            by_logit = bias_E is None and (scoring == "softmax" or num_groups == 1)
            choice = row if by_logit else scores if bias_E is None else scores + bias_E
            groups = choice.reshape(num_groups, -1)
            best = np.sort(groups)[:, -1 if scoring == "softmax" else -2 :].sum(-1)
            kept = np.argsort(-best, kind="stable")[:top_groups]
            closed = ~np.isin(np.arange(num_groups), kept)
            choice = np.where(closed[:, None], -np.inf, groups).reshape(-1)
            ids[t] = np.sort(np.argsort(-choice, kind="stable")[:k])
            chosen = scores[ids[t]]
            weights[t] = (chosen / chosen.sum() if renormalise else chosen) * scaling
        return ids, weights

    def moe(
        self,
        x_TD: F32,
        ids_TK: I32,
        weights_TK: F32,
        experts: Experts,
        activation: Activation,
        scale_inputs: bool = False,
    ) -> F32:
        y = np.zeros(x_TD.shape)
        for e in np.unique(ids_TK):  # ascending
            tokens, places = np.nonzero(ids_TK == e)
            x = x_TD[tokens]
            weights = weights_TK[tokens, places][:, None]
            before, after = (weights, np.ones_like(weights))[:: 1 if scale_inputs else -1]
            g = self._linear(x, experts.gates[e]) * before + _row(experts.gate_bias, e)
            u = self._linear(x, experts.ups[e]) * before + _row(experts.up_bias, e)
            d = self._linear(gated_product(g, u, activation), experts.downs[e])
            y[tokens] += after.astype(np.float64) * (d + _row(experts.down_bias, e))
        return y.astype(np.float32)


def _row(bias: F32 | None, e: int) -> F32 | float:
    return 0.0 if bias is None else bias[e]
