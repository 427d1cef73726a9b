"""Heads that predict further tokens (nn/mtp.py), as families' checkpoints hold them: names, and how
they are built. A family says which names are its own (Family.mtp), reads their number into
ModelConfig.mtp_layers, and makes its decoder with `decoder` of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from elinvar.base.config import ModelConfig
from elinvar.models.shared import FULL, GGUF, HF, TO, by_layer
from elinvar.nn.decoder import Decoder, Layer
from elinvar.nn.mtp import MTPDecoder, MTPHead
from elinvar.nn.norm import Norm
from elinvar.ops.api import Ops
from elinvar.weights.fixes import AddOne, Fix
from elinvar.weights.rules import Rule

OWN = "mtp."
"""Begins the names of their weights here."""
_NEXTN = "model.layers.{m}."


@dataclass(frozen=True, slots=True)
class MTPNames:
    """What checkpoints call the parts of a head. {n} is its number, {m} that of the layer that it
    would be after the model's own."""

    layer: str
    """Before the names of its layer, whose weights are named as in the model's."""
    embed_norm: str
    hidden_norm: str
    join: str
    norm: str
    copies: Mapping[str, str] = field(default_factory=dict)
    """Of the model's own weights, by their names here: written, and never read."""
    norm_fix: Fix | None = None


NEXTN = MTPNames(
    layer=_NEXTN,
    embed_norm=f"{_NEXTN}enorm",
    hidden_norm=f"{_NEXTN}hnorm",
    join=f"{_NEXTN}eh_proj",
    norm=f"{_NEXTN}shared_head.norm",
    copies={"embed": f"{_NEXTN}embed_tokens", "head": f"{_NEXTN}shared_head.head"},
)
"""DeepSeek V3, and GLM 4.5 after it."""
PREDICTOR = MTPNames(
    layer="mtp.layers.{n}.",
    embed_norm="mtp.pre_fc_norm_embedding",
    hidden_norm="mtp.pre_fc_norm_hidden",
    join="mtp.fc",
    norm="mtp.norm",
    norm_fix=AddOne(),
)
"""Qwen3-Next: one head, whose gains lack their 1."""


def mtp_rules(
    config: ModelConfig, rules: Callable[[ModelConfig], list[Rule]], names: MTPNames
) -> list[Rule]:
    """Of all heads; `rules` are the family's. A head's layer is like the model's last one, and sees
    all keys."""
    moe, last = config.moe, config.num_layers - 1
    if moe is not None:
        moe = replace(moe, layers=(0,)) if last in moe.layers else None
    index = config.index and replace(config.index, layers=(0,))
    alike = replace(config, num_layers=1, layer_kinds=FULL, moe=moe, index=index)
    layer = [r for r in rules(alike) if "{i}" in r.name and (r.layers is None or 0 in r.layers)]
    return [rule for n in range(config.mtp_layers) for rule in _of_head(n, config, layer, names)]


def _of_head(n: int, config: ModelConfig, layer: Sequence[Rule], names: MTPNames) -> list[Rule]:
    own, m, d = f"{OWN}{n}.", str(config.num_layers + n), config.dim
    nextn = f"{GGUF.replace('{i}', m)}nextn."

    def hf(name: str) -> str:
        return name.replace("{n}", str(n)).replace("{m}", m)

    def norm(name: str, stored: str, gguf: str) -> Rule:
        fix = names.norm_fix
        return Rule(own + name, f"{hf(stored)}.weight", f"{nextn}{gguf}.weight", (d,), hf_fix=fix)

    return [
        norm("embed_norm", names.embed_norm, "enorm"),
        norm("hidden_norm", names.hidden_norm, "hnorm"),
        Rule(f"{own}join", f"{hf(names.join)}.weight", f"{nextn}eh_proj.weight", (d, 2 * d)),
        *(
            replace(
                rule,
                name=rule.name.replace(TO, own),
                hf=rule.hf and rule.hf.replace(HF, hf(names.layer)),
                gguf=rule.gguf and rule.gguf.replace("{i}", m),
                layers=None,
            )
            for rule in layer
        ),
        norm("last_norm", names.norm, "shared_head_norm"),
    ]


def mtp_copies(config: ModelConfig, names: MTPNames) -> list[Rule]:
    """For saving."""
    return [
        Rule(
            name, f"{stored.replace('{m}', str(config.num_layers + n))}.weight", None, optional=True
        )
        for n in range(config.mtp_layers)
        for name, stored in names.copies.items()
    ]


def heads(
    config: ModelConfig,
    weights: Mapping[str, Any],
    norm: Callable[[Any], Norm],
    layer: Callable[[dict[str, Any]], Layer],
) -> list[MTPHead]:
    """Those whose weights were loaded. norm: of a gain; layer: of its weights."""
    return [
        MTPHead(
            norm(w["embed_norm"]), norm(w["hidden_norm"]), w["join"], layer(w), norm(w["last_norm"])
        )
        for w in by_layer(weights, config.mtp_layers, OWN)
        if w
    ]


def decoder(
    config: ModelConfig,
    weights: Mapping[str, Any],
    ops: Ops,
    layers: Sequence[Layer],
    norm: Callable[[Any], Norm],
    head_layer: Callable[[dict[str, Any]], Layer],
) -> Decoder:
    """With heads where their weights were loaded; norm and head_layer as in `heads`."""
    own, last = heads(config, weights, norm, head_layer), norm(weights["norm"])
    if own:
        return MTPDecoder(config, weights, ops, layers, last, own)
    return Decoder(config, weights, ops, layers, last)
