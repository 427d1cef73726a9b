"""Update: other weights for a model that is there, part by part, each in the place of what it replaces.

Owns which names there may be and which came. Whoever computes with the model must not do so between the
first part and `finish`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elinvar.base.digest import blake2b
from elinvar.base.errors import ModelError
from elinvar.models.family import Model
from elinvar.models.load import Loaded, rules_of
from elinvar.nn.alike import counterparts
from elinvar.nn.decoder import Decoder
from elinvar.ops.api import Ops
from elinvar.weights.load import replace_weights
from elinvar.weights.nested import text_name
from elinvar.weights.push import as_checkpoint, as_they_are
from elinvar.weights.rules import Binding, Rule, as_published, bind

_LISTED = 3


class Update:
    def __init__(self, model: Model, weight_format: Literal["auto", "f32"] = "auto") -> None:
        self._model, self._format = model, weight_format
        self._family, self._table = rules_of(model)
        self.weights = dict(model.weights)
        self._missing = dict.fromkeys(self.weights)
        self._sources: dict[str, list[Binding]] = {}
        """What becomes of a stored tensor, by each of the names that it may have."""
        embed = next(rule.hf for rule in self._table if rule.name == "embed") or ""
        bare = as_published(self._table, {embed.partition(".")[2]})
        for rules in (as_they_are(self._table), self._table, bare):
            for name, bindings in self._bound(rules).items():
                self._sources.setdefault(name, bindings)
        self._shapes = {
            name: bindings[0].stored_shape or self.weights[bindings[0].name].shape
            for name, bindings in self._sources.items()
        }
        self._twins = self._tied_head({"embed", embed, embed.partition(".")[2]})
        self._seen: dict[str, bytes] = {}
        """What the embedding and a tied head came as."""
        self.has_begun = False
        """Some weights are replaced, perhaps not all."""

    def _bound(self, rules: Sequence[Rule]) -> dict[str, list[Binding]]:
        found: dict[str, list[Binding]] = {}
        for binding in bind(rules, "safetensors", self._model.config.num_layers):
            if binding.name in self.weights:
                found.setdefault(binding.source, []).append(binding)
        return found

    def _tied_head(self, embeds: set[str]) -> dict[str, str]:
        """Which of the two a name is of, where the head is tied: a trainer's state has both."""
        config = self._model.config
        if not config.tied_head:
            return {}
        untied = self._family.rules(replace(config, tied_head=False))
        heads = {rule.hf for rule in untied if rule.name == "head" and rule.hf}
        return dict.fromkeys(embeds, "embed") | dict.fromkeys(heads, "head")

    def push(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """By the names of the model's checkpoints, or canonical ones. Raises ModelError as weights.push
        for what does not fit, before any of these are replaced."""
        arrays = {text_name(name): array for name, array in arrays.items()}
        twins = {self._twins[name]: _digest(a) for name, a in arrays.items() if name in self._twins}
        arrays = {n: a for n, a in arrays.items() if self._twins.get(n) != "head"}
        done = "none of this part was taken" if self.has_begun else "nothing was changed"
        checkpoint = as_checkpoint(arrays, self._shapes, (), done)
        bindings = [binding for name in arrays for binding in self._sources[name]]
        self._seen |= twins
        self.has_begun = True
        for name in replace_weights(checkpoint, bindings, self.weights, self._format):
            self._missing.pop(name, None)

    def finish(self, ops: Ops) -> tuple[Loaded, Model, bool]:
        """What the model is built of now, the model, and whether what was recorded of the old one is good
        still. Raises ModelError where weights are missing."""
        if self._missing:
            names = list(self._missing)
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            raise ModelError(
                f"Nothing replaced {', '.join(names[:_LISTED])}{more}; all of them must come."
            )
        if len(set(self._seen.values())) > 1:
            raise ModelError("The head is tied to the embedding in this model, and theirs differ.")
        old, config = self._model, self._model.config
        model = self._family.build(config, self.weights, ops)
        if isinstance(old, Decoder) and isinstance(model, Decoder):  # they know no weights
            model.ropes, model.temperatures = old.ropes, old.temperatures
        good = ops.exchange(self.weights, counterparts(old, model))
        return (
            Loaded(self._family, config, as_published(self._table, ()), self.weights),
            model,
            good,
        )


def _digest(array: NDArray[Any]) -> bytes:
    return blake2b(np.ascontiguousarray(array).data, digest_size=32).digest()
