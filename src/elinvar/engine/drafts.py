"""Drafts: which drafters an engine has, and what of them is loaded with its model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

from elinvar.base.config import EngineConfig, ModelConfig
from elinvar.base.errors import ModelError
from elinvar.engine.tokenizer import Tokenizer
from elinvar.models.family import Model
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

# What few engines have is imported by those: a command starts in the time of its imports.
if TYPE_CHECKING:
    from elinvar.engine.draft_model import DraftModelMaker
    from elinvar.run.drafters.heads import Heads

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
        self._heads: Checkpoint | None = None
        self._attached: tuple[str, Heads] | None = None
        self._maker: DraftModelMaker | None = None

    @property
    def wants_mtp(self) -> bool:
        """The heads that the model's own checkpoint holds."""
        return "mtp" in self.names

    def load(self, target: Checkpoint, tokenizer: Tokenizer) -> None:
        """Opens the configuration's draft_model, if it has one. Raises ModelError where it is none."""
        if self._config.draft_model is None:
            return
        from elinvar.engine.draft_model import DraftModelMaker, is_model, same_tokens
        from elinvar.models.eagle import is_eagle

        checkpoint = open_checkpoint(resolve(self._config.draft_model, lambda *told: None))
        if is_eagle(checkpoint):
            self._heads = checkpoint
        elif is_model(checkpoint):
            same = same_tokens(checkpoint, tokenizer)
            spelling = None if same else str(target.path)
            self._maker = DraftModelMaker(str(checkpoint.path), spelling, self._config)
            checkpoint.close()
        else:
            checkpoint.close()
            raise ModelError(
                f"{checkpoint.path} is neither a model nor heads that draft for one; name a smaller model "
                "or a folder that 'elinvar draft train' made."
            )

    def attach(self, model: Model, ops: Ops) -> None:
        """Heads become a part of the model, before its caches are made. Raises ModelError where they do
        not fit."""
        self._attached = None
        if isinstance(model, MTPDecoder) and model.num_heads and self.wants_mtp:
            self._attached = "mtp", model
        if self._heads is not None:
            if type(model) is not Decoder:
                raise ModelError(
                    f"{self._heads.path} holds heads for models of decoder layers alone; leave draft_model "
                    "out for this one."
                )
            from elinvar.models.eagle import load_eagle

            head = load_eagle(
                self._heads, model, ops, self._config.weight_format, cache_dir=cache_root()
            )
            self._attached = "eagle", cast("Heads", head)

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
        found += self._heads_of(runner)
        found += self._exits_of(runner)
        found += self._model_beside(runner)
        return found

    def _heads_of(self, runner: Runner) -> list[Drafter]:
        if self._attached is None:
            return []
        from elinvar.run.drafters.heads import HeadsDrafter

        name, heads = self._attached
        return [HeadsDrafter(name, heads, runner.ops, runner.kv, runner.rows)]

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

    def _model_beside(self, runner: Runner) -> list[Drafter]:
        if self._maker is None:
            return []
        maker = self._maker.sized(runner.kv_bytes, runner.model.config.vocab_size)
        if not self._config.draft_aside:
            return [maker.make(runner.rows, runner.ops)]
        from elinvar.run.drafters.aside import Aside

        return [Aside(runner.rows, maker, "draft-model")]


class Given(Drafting):
    """Drafters that somebody made, whatever the configuration says."""

    def __init__(self, *makers: Callable[[Runner], Drafter]) -> None:
        super().__init__(EngineConfig())
        self._makers: Sequence[Callable[[Runner], Drafter]] = makers

    def make(self, runner: Runner) -> list[Drafter]:
        return [make(runner) for make in self._makers]
