"""From a checkpoint to a model, and to the same model with other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elinvar.base.config import ModelConfig
from elinvar.base.errors import ModelError
from elinvar.models.family import Family, Model
from elinvar.models.keys import MAX_LAYERS, Keys
from elinvar.models.mtp import mtp_copies, mtp_rules
from elinvar.models.registry import FAMILIES, find_encoder, find_family, read_config
from elinvar.nn.decoder import Decoder
from elinvar.nn.encoder import Encoder
from elinvar.nn.mtp import MTPDecoder
from elinvar.ops.api import Ops
from elinvar.ops.layout import Kinds
from elinvar.weights.checkpoint import Checkpoint
from elinvar.weights.load import Log, Progress, load_weights
from elinvar.weights.nested import text_name
from elinvar.weights.push import pushed
from elinvar.weights.rules import Rule, State, as_published

WeightFormat = Literal["auto", "f32"]

HEADS_ALONE = "NextNHead"
"""The architecture of a folder with heads and without a model."""
_HEADS = "num_nextn_predict_layers"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a model is built of."""

    family: Family[Model]
    config: ModelConfig
    rules: list[Rule]
    """With the names of the whole model, whichever the checkpoint had."""
    weights: State

    def build(self, ops: Ops) -> Model:
        ops.prepare(self.weights)
        return self.family.build(self.config, self.weights, ops)


def load_parts(
    checkpoint: Checkpoint,
    weight_format: WeightFormat = "auto",
    cache_dir: Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
    drafts: bool = False,
    heads_from: Checkpoint | None = None,
    stored: Kinds = frozenset(),
) -> Loaded:
    """Reads the configuration and loads the weights (see load_weights).

    drafts: with the heads that predict further tokens (nn/mtp.py). Their weights are packed by
    themselves, so that the model's packed file is the same with them and without. heads_from: where
    they are, if not in the checkpoint (`is_mtp`)."""
    family, config = find_family(checkpoint), read_config(checkpoint)
    rules = as_published(family.rules(config), checkpoint.tensors)
    also = weight_format, cache_dir, log, progress
    weights = load_weights(checkpoint, rules, config, *also, stored=stored)
    whole = as_published(family.rules(config), ())
    if drafts:
        source = heads_from or checkpoint
        if heads_from is not None:
            count = Keys(source.metadata, "config.json").size(_HEADS, largest=MAX_LAYERS)
            config = replace(config, mtp_layers=count)
        if family.mtp is None or not _held(family, config, source):
            raise ModelError(
                f"{source.path} holds no heads that predict further tokens of this model; load it "
                "without drafts, or a checkpoint that has them."
            )
        heads = mtp_rules(config, family.rules, family.mtp)
        rules = as_published(heads, source.tensors)
        weights |= load_weights(source, rules, config, *also, "mtp", stored)
        whole += [*as_published(heads, ()), *mtp_copies(config, family.mtp)]
    return Loaded(family, config, whole, weights)


def mtp_heads(checkpoint: Checkpoint) -> int:
    """How many heads that predict further tokens the checkpoint holds; conversions often drop them,
    whatever the configuration says."""
    family = find_encoder(checkpoint) or find_family(checkpoint)
    return _held(family, read_config(checkpoint), checkpoint)


def _held(family: Family[Any], config: ModelConfig, checkpoint: Checkpoint) -> int:
    rules = mtp_rules(config, family.rules, family.mtp) if family.mtp else []
    joins = [{rule.hf, rule.gguf} for rule in rules if rule.name.endswith(".join")]
    return sum(not names.isdisjoint(checkpoint.tensors) for names in joins)


def is_mtp(checkpoint: Checkpoint) -> bool:
    """Whether it holds such heads and no model, as `elinvar draft train` writes them."""
    return checkpoint.architecture == HEADS_ALONE


def load_model(
    checkpoint: Checkpoint,
    ops: Ops,
    weight_format: WeightFormat = "auto",
    cache_dir: Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
    drafts: bool = False,
    heads_from: Checkpoint | None = None,
) -> Model:
    """The model itself, of `load_parts`; with drafts an nn.mtp.MTPDecoder."""
    also = weight_format, cache_dir, log, progress, drafts, heads_from, ops.stored
    return load_parts(checkpoint, *also).build(ops)


def reloaded(
    model: Model, arrays: Mapping[str, NDArray[Any]], weight_format: WeightFormat = "auto"
) -> Loaded:
    """The same model with other weights, by the names of its checkpoints or by canonical ones; all of
    them, of heads that were loaded, too. Raises ModelError as weights.push does."""
    config, arrays = model.config, {text_name(name): array for name, array in arrays.items()}
    family, table = rules_of(model)
    rules = as_published(table, arrays)
    if config.tied_head:
        arrays = _without_tied_head(arrays, rules, family.rules(replace(config, tied_head=False)))
    checkpoint, rules = pushed(arrays, rules, config.num_layers, model.weights)
    weights = load_weights(checkpoint, rules, config, weight_format)
    return Loaded(family, config, as_published(table, ()), weights)


def rules_of(model: Model) -> tuple[Family[Model], list[Rule]]:
    """Its family, and the rules of all its weights, of heads that were loaded, too."""
    family = next(family for family in FAMILIES if family.name == model.config.family)
    table = family.rules(model.config)
    if isinstance(model, MTPDecoder) and model.heads:
        assert family.mtp is not None
        table += mtp_rules(model.config, family.rules, family.mtp)
    return family, table


def _without_tied_head(
    arrays: Mapping[str, NDArray[Any]], rules: Sequence[Rule], untied: Sequence[Rule]
) -> Mapping[str, NDArray[Any]]:
    """A trainer's state names a tied head twice."""
    embed, head = (
        next((rule.hf for rule in table if rule.name == name and rule.hf in arrays), None)
        for name, table in (("embed", rules), ("head", untied))
    )
    if embed is None or head is None or not np.array_equal(arrays[embed], arrays[head]):
        return arrays
    return {name: array for name, array in arrays.items() if name != head}


def load_encoder(
    checkpoint: Checkpoint,
    ops: Ops,
    weight_format: WeightFormat = "auto",
    cache_dir: Path | None = None,
    log: Log | None = None,
    progress: Progress | None = None,
) -> Encoder | Decoder:
    """The same for a model that turns texts into vectors. A decoder that was published for that may
    lack its head, which is then not loaded. Raises ModelError where layers keep other things than
    keys and values of their own."""
    family = find_encoder(checkpoint) or find_family(checkpoint)
    config = read_config(checkpoint)
    rules = as_published(family.rules(config), checkpoint.tensors)
    if config.encoder is None and not any(
        r.hf in checkpoint.tensors for r in rules if r.name == "head"
    ):
        config = replace(config, tied_head=True)
        rules = [rule for rule in rules if rule.name != "head"]
    also = weight_format, cache_dir, log, progress
    weights = load_weights(checkpoint, rules, config, *also, stored=ops.stored)
    ops.prepare(weights)
    model = family.build(config, weights, ops)
    if not isinstance(model, Encoder | Decoder) or not forgets(model):
        raise ModelError(
            f"{checkpoint.path} cannot make vectors: layers of its family, {family.name}, keep other "
            "things of a text than keys and values of their own; use an embedding model."
        )
    return model


def forgets(model: Encoder | Decoder) -> bool:
    """Whether each layer has keys and values of its own, all of one shape: then nobody needs them after
    the layer, and all layers may use the same arrays (run/texts.py)."""
    specs = model.kv_specs("f32")
    shapes = {replace(spec, kind="full", layers=(), window=None) for spec in specs}
    alone = sum(len(spec.layers) for spec in specs) == model.config.num_layers
    return alone and len(shapes) == 1 and specs[0].state is None
