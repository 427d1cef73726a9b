"""What families with mixtures of experts have in common: the names of their weights, and the MLP of a
layer made of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from elinvar.base.config import ModelConfig, MoEConfig
from elinvar.models.keys import Keys
from elinvar.models.shared import GGUF, HF, TO, mlp_rules
from elinvar.nn.decoder import Feeds
from elinvar.nn.mlp import GatedMLP
from elinvar.nn.moe import GatedExpert, MoE
from elinvar.ops.api import F32, Ops
from elinvar.ops.arguments import Experts
from elinvar.weights.rules import Part, Rule

MAX_EXPERTS = 1 << 12
"""No model comes near; the numbers of a corrupt file often go beyond."""
PARTS = ("gate", "up", "down")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def mixture(
    keys: Keys, count: str, used: str, ff_dim: int, layers: Iterable[int], **more: Any
) -> MoEConfig:
    """count, used: the keys of how many experts a layer has and how many a token goes to. more: other
    fields."""
    num_experts = keys.size(count, largest=MAX_EXPERTS)
    top_k = keys.size(used, largest=num_experts)
    return MoEConfig(num_experts, top_k, ff_dim, tuple(layers), **more)


def expert_rules(
    config: ModelConfig,
    block: str = "mlp",
    names: tuple[str, str, str] = PROJECTIONS,
    shared: str = "shared_expert",
) -> list[Rule]:
    """Of the layers that have experts; GGUF files hold those of a layer in one stack. block, names,
    shared: what checkpoints call the MLP, an expert's matrices, the expert of all tokens."""
    assert config.moe is not None
    c, d, hf = config.moe, config.dim, f"{HF}{block}."
    router = "ffn_gate_inp.weight"
    rules = [Rule(f"{TO}router", f"{hf}gate.weight", GGUF + router, (c.num_experts, d))]
    if c.biased:
        name = "e_score_correction_bias"
        rules.append(
            Rule(f"{TO}bias", f"{hf}gate.{name}", f"{GGUF}exp_probs_b.bias", (c.num_experts,))
        )
    for e in range(c.num_experts):
        for part, name, shape in zip(PARTS, names, shapes(d, c.ff_dim), strict=True):
            rules.append(
                Rule(
                    f"{TO}experts.{e}.{part}",
                    f"{hf}experts.{e}.{name}.weight",
                    f"{GGUF}ffn_{part}_exps.weight",
                    shape,
                    gguf_part=Part((c.num_experts, *shape), e * shape[0]),
                )
            )
    if c.shared_ff_dim:
        for part, name, shape in zip(PARTS, PROJECTIONS, shapes(d, c.shared_ff_dim), strict=True):
            stored = f"{hf}{shared}.{name}.weight", f"{GGUF}ffn_{part}_shexp.weight"
            rules.append(Rule(f"{TO}shared.{part}", *stored, shape))
    if c.shared_gate:
        stored = f"{hf}{shared}_gate.weight", f"{GGUF}ffn_gate_inp_shexp.weight"
        # All of it: GGUF files hold it as a vector, or as a matrix of one row.
        rules.append(Rule(f"{TO}shared.router", *stored, (1, d), gguf_part=Part((1, d))))
    return [replace(rule, layers=c.layers) for rule in rules]


def stacked_rules(
    config: ModelConfig,
    block: str = "mlp",
    in_turns: bool = False,
    biased: bool = False,
    transposed: bool = True,
) -> list[Rule]:
    """Where checkpoints, too, hold a layer's experts in stacks, mostly of matrices as (in, out):
    gate_up_proj, whose outputs are gate's and then up's, or gate's and up's in turns, and down_proj;
    biases likewise."""
    assert config.moe is not None
    c, d, hf = config.moe, config.dim, f"{HF}{block}.experts."
    n, f = c.num_experts, c.ff_dim
    turns = (1, 2) if in_turns else (0, 0)
    both = {"gate": 0, "up": 1 if in_turns else f}

    def expert(e: int, part: str) -> list[Rule]:
        k, outputs = (f, d) if part == "down" else (d, f)
        rows, stored = Part((n, outputs), e * outputs), "down_proj"
        hf_rows = rows
        if part in both:
            hf_rows, stored = Part((n, 2 * f), 2 * f * e + both[part], *turns), "gate_up_proj"
        name, gguf = f"{TO}experts.{e}.{part}", f"{GGUF}ffn_{part}_exps."
        matrix = Rule(
            name,
            hf + stored,
            gguf + "weight",
            (outputs, k),
            hf_part=replace(hf_rows, of=(*hf_rows.of, k)),
            gguf_part=replace(rows, of=(*rows.of, k)),
            hf_transposed=transposed,
        )
        names = f"{name}_bias", f"{hf}{stored}_bias", gguf + "bias"
        bias = Rule(*names, (outputs,), hf_part=hf_rows, gguf_part=rows)
        return [matrix, bias] if biased else [matrix]

    rules = [rule for e in range(n) for part in PARTS for rule in expert(e, part)]
    return [replace(rule, layers=c.layers) for rule in rules]


def dense_rules(config: ModelConfig, block: str = "mlp") -> list[Rule]:
    """Of the layers that have no experts."""
    assert config.moe is not None
    dense = [i for i in range(config.num_layers) if i not in config.moe.layers]
    return [replace(rule, layers=tuple(dense)) for rule in mlp_rules(config, block)]


def shapes(d: int, f: int) -> tuple[tuple[int, int], ...]:
    """Of PARTS."""
    return (f, d), (f, d), (d, f)


def feeds(config: ModelConfig, w: Mapping[str, Any], ops: Ops) -> Feeds:
    """The MLP of a layer with the weights `w`: a mixture where they hold a router."""
    if config.moe is None or "router" not in w:
        return GatedMLP(w["gate"], w["up"], w["down"], config.activation, ops)
    gates, ups, downs = (
        [w[f"experts.{e}.{part}"] for e in range(config.moe.num_experts)] for part in PARTS
    )
    experts = Experts(gates, ups, downs, *(_biases(w, part, len(gates)) for part in PARTS))
    shared: Feeds | None = None
    if config.moe.shared_ff_dim:
        gate, up, down = (w[f"shared.{part}"] for part in PARTS)
        shared = GatedMLP(gate, up, down, config.activation, ops)
        if config.moe.shared_gate:
            expert = Experts([gate], [up], [down])
            shared = GatedExpert(w["shared.router"], expert, config.activation, ops)
    router, bias = w["router"], w.get("bias")
    return MoE(
        config.moe, router, experts, config.activation, ops, bias, shared, w.get("router_bias")
    )


def _biases(w: Mapping[str, Any], part: str, num_experts: int) -> F32 | None:
    if f"experts.0.{part}_bias" not in w:
        return None
    return np.stack([w[f"experts.{e}.{part}_bias"] for e in range(num_experts)])
