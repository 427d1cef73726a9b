"""Mixtures of experts (Shazeer et al., 2017): each token goes through some of a layer's MLPs.

Legend: T tokens of this step, D model dim, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

from elinvar.base.config import MoEConfig
from elinvar.ops.api import F32, Activation, Ops
from elinvar.ops.arguments import Experts
from elinvar.ops.layout import Weight


class MoE:
    """The experts that the router chooses, and one that every token goes through, if there is."""

    def __init__(
        self,
        config: MoEConfig,
        router: Weight,
        experts: Experts,
        activation: Activation,
        ops: Ops,
        bias_E: F32 | None = None,
        shared: Callable[[F32], F32] | None = None,
        router_bias_E: F32 | None = None,
    ) -> None:
        """bias_E: added to the scores where experts are chosen, and only there; router_bias_E: to
        the logits."""
        self.config, self.router, self.bias = config, (router,), bias_E
        self.router_bias = router_bias_E
        self.experts, self.activation, self.shared = experts, activation, shared
        self.ops = ops

    def __call__(self, x_TD: F32) -> F32:
        ops, c = self.ops, self.config
        ids_TK, weights_TK = ops.route(
            ops.linear(x_TD, self.router, self.router_bias),
            c.top_k,
            c.scoring,
            c.renormalise,
            c.scaling,
            self.bias,
            c.num_groups,
            c.top_groups,
        )
        routed = ids_TK, weights_TK, self.experts, self.activation
        y_TD = ops.moe(x_TD, *routed, c.scale_inputs)
        return y_TD if self.shared is None else ops.add(y_TD, self.shared(x_TD))


class GatedExpert:
    """sigmoid(router x) * MLP(x): a mixture of one, to which every token is routed."""

    def __init__(self, router: Weight, expert: Experts, activation: Activation, ops: Ops) -> None:
        self.router, self.expert, self.activation, self.ops = (router,), expert, activation, ops

    def __call__(self, x_TD: F32) -> F32:
        ops = self.ops
        ids, weights = ops.route(ops.linear(x_TD, self.router), 1, "sigmoid", False, 1.0)
        return ops.moe(x_TD, ids, weights, self.expert, self.activation)
