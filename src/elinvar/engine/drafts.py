"""Drafts: which drafters an engine has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elinvar.base.config import EngineConfig, ModelConfig
from elinvar.run.drafters.api import Drafter
from elinvar.run.drafters.forced import ForcedDrafter
from elinvar.run.drafters.suffix import SuffixDrafter
from elinvar.run.runner import Runner

MakeDrafters = Callable[[Runner], Sequence[Drafter]]


def most_drafts(config: EngineConfig, model: ModelConfig) -> int:
    """Room for drafts that a row gets in a step. None where layers keep a state, which each token
    overwrites: those of drafts that were wrong could not be taken back."""
    return 0 if config.drafters == () or model.delta is not None else config.max_drafts


def make_drafters(config: EngineConfig) -> MakeDrafters:
    """Those that the configuration asks for; `auto`: all that cost nothing to have."""
    names = ("suffix", "forced") if config.drafters is None else config.drafters

    def make(runner: Runner) -> list[Drafter]:
        if runner.model.config.delta is not None:
            return []
        found: list[Drafter] = []
        suffix = SuffixDrafter(runner.rows) if "suffix" in names else None
        if suffix is not None:
            found.append(suffix)
        if "forced" in names and runner.masks is not None:
            found.append(ForcedDrafter(runner.rows, runner.masks, suffix))
        return found

    return make
