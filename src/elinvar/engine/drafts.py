"""Drafts: which drafters an engine has, and what of them is loaded with its model.

What few engines have is imported by those: a command starts in the time of its imports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from elinvar.base.config import EngineConfig, ModelConfig
from elinvar.engine.tokenizer import Tokenizer
from elinvar.models.family import Model
from elinvar.models.load import is_mtp
from elinvar.nn.decoder import Decoder
from elinvar.nn.mtp import MTPDecoder
from elinvar.ops import Ops
from elinvar.run.drafters.api import Drafter
from elinvar.run.drafters.forced import ForcedDrafter
from elinvar.run.drafters.suffix import SuffixDrafter
from elinvar.run.runner import Runner
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import Checkpoint, open_checkpoint
from elinvar.weights.sources import resolve

Progress = Callable[[str, int, int], None]

ALWAYS = "forced", "suffix"
"""They cost nothing to have."""


def most_drafts(config: EngineConfig, model: ModelConfig) -> int:
    """Room for drafts that a row gets in a step. None where layers keep a state, which each token
    overwrites: those of drafts that were wrong could not be taken back."""
    return 0 if config.drafters == () or model.delta is not None else config.max_drafts


class Drafting:
    """Makes an engine's drafters, as its configuration asks for them."""

    def __init__(self, config: EngineConfig, fingerprint: str = "") -> None:
        """fingerprint: the model's, by which an early exit of its is known."""
        self.names = ALWAYS if config.drafters is None else config.drafters
        self._config, self._fingerprint = config, fingerprint
        self._folder: Checkpoint | None = None
        """Of heads."""
        self.mtp_from: Checkpoint | None = None
        """Of heads that are loaded with the model."""
        self._is_model = False
        self._attached: Callable[[Runner], Drafter] | None = None
        self._beside: Callable[[Runner], Drafter] | None = None

    @property
    def wants_mtp(self) -> bool:
        """The heads that the model's own checkpoint holds, or one beside it."""
        return "mtp" in self.names or self.mtp_from is not None

    def open(self) -> None:
        """Looks at what the configuration names as its draft_model, if it does. Raises ModelError where that
        cannot be found or read."""
        config = self._config
        if config.draft_model is None or not config.uses_draft_model:
            return
        from elinvar.models.drafts import are_heads

        checkpoint = open_checkpoint(resolve(config.draft_model))
        if is_mtp(checkpoint):
            self.mtp_from = checkpoint
        elif are_heads(checkpoint):
            self._folder = checkpoint
        else:
            checkpoint.close()
            self._is_model = True

    def load(self, target: Path, tokenizer: Tokenizer, ops: Ops, progress: Progress) -> None:
        """A draft_model that is a whole model. Raises ModelError where it cannot be read."""
        if self._is_model:
            from elinvar.engine.draft_model import open_draft_model

            self._beside = open_draft_model(self._config, target, tokenizer, ops, progress)

    def leaves(self, room: int) -> int:
        """Of a device's memory for caches, what that of a draft model beside the target's leaves to it."""
        if not self._is_model:
            return room
        from elinvar.engine.draft_model import SHARE, is_aside

        return room if is_aside(self._config) else room * SHARE // (SHARE + 1)

    def attach(self, model: Model, ops: Ops) -> None:
        """Heads become a part of the model, before its caches are made. Raises ModelError where they do
        not fit."""
        self._attached = None
        if isinstance(model, MTPDecoder) and model.num_heads and self.wants_mtp:
            self._attached = _reading_hidden("mtp", model)
        if self._folder is not None:
            from elinvar.models.drafts import load_heads
            from elinvar.nn.medusa import MedusaHeads

            form = self._config.weight_format
            heads = load_heads(self._folder, model, ops, form, cache_root())
            if isinstance(heads, MedusaHeads):
                self._attached = _medusa(heads)
            else:
                self._attached = _reading_hidden("eagle", heads)

    def make(self, runner: Runner) -> list[Drafter]:
        """In the order in which they are asked: of guesses that promise the same the first is taken."""
        model, rows = runner.model, runner.rows
        if self.names == () or model.config.delta is not None:
            return []
        found: list[Drafter] = []
        suffix = SuffixDrafter(rows) if "suffix" in self.names else None
        if "forced" in self.names and runner.masks is not None:
            found.append(ForcedDrafter(rows, runner.masks, suffix))
        if suffix is not None:
            found.append(suffix)
        if self._attached is not None:
            found.append(self._attached(runner))
        found += self._exits_of(runner)
        if self._beside is not None:
            found.append(self._beside(runner))
        return found

    def _exits_of(self, runner: Runner) -> list[Drafter]:
        if "early-exit" not in self.names:
            return []
        from elinvar.engine.exits import known_exit
        from elinvar.run.drafters.early_exit import EarlyExitDrafter, can_exit

        layers = known_exit(cache_root(), self._fingerprint)
        if layers is None or not can_exit(runner.model):
            return []
        model = cast("Decoder", runner.model)
        places = runner.ops, runner.kv, runner.rows, runner.adapted
        return [EarlyExitDrafter(model, layers, *places)]


def _reading_hidden(name: str, heads: Any) -> Callable[[Runner], Drafter]:
    from elinvar.run.drafters.heads import HeadsDrafter

    return lambda r: HeadsDrafter(name, heads, r.ops, r.kv, r.rows, r.spare)


def _medusa(heads: Any) -> Callable[[Runner], Drafter]:
    from elinvar.run.drafters.medusa import MedusaDrafter

    return lambda r: MedusaDrafter(heads, r.model.config.dim, r.ops, r.rows)


class Given(Drafting):
    """Drafters that somebody made, whatever the configuration says."""

    def __init__(self, *makers: Callable[[Runner], Drafter]) -> None:
        super().__init__(EngineConfig())
        self._makers: Sequence[Callable[[Runner], Drafter]] = makers

    def make(self, runner: Runner) -> list[Drafter]:
        return [make(runner) for make in self._makers]
