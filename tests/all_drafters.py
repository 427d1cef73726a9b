"""Every drafter there is, each with a tiny model that it can draft for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import adversaries
import test_eagle
import test_medusa
from elinvar.base.config import EngineConfig
from elinvar.engine.draft_model import SHARE, Loaded, drafter_of
from elinvar.models.drafts import load_heads
from elinvar.models.family import Model
from elinvar.nn.decoder import Decoder
from elinvar.run.drafters.api import Drafter
from elinvar.run.drafters.aside import Aside
from elinvar.run.drafters.early_exit import EarlyExitDrafter
from elinvar.run.drafters.forced import ForcedDrafter
from elinvar.run.drafters.heads import HeadsDrafter
from elinvar.run.drafters.medusa import MedusaDrafter
from elinvar.run.drafters.suffix import SuffixDrafter
from elinvar.run.runner import Runner
from elinvar.weights.checkpoint import open_checkpoint
from engines import ByteTokenizer, provider, tiny_model
from families.base import VOCAB
from oracles import Oracle
from test_heads import model as mtp_model

Make = Callable[[Runner], Drafter]
Sequences = Sequence[Sequence[int]]
Made = tuple[Model, Callable[[Sequences], Sequence[Make]]]
"""The target, and its drafters: of an oracle what is to come, which nobody else looks at."""


def _known(errs: Callable[[int], bool], is_instant: bool = True) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        return _plain(), lambda known: [lambda r: Oracle(r.rows, known, errs, is_instant)]

    return make


def _plain() -> Any:
    return tiny_model(provider())


def _suffix(folder: Path) -> Made:
    return _plain(), lambda known: [lambda r: SuffixDrafter(r.rows)]


def _auto(folder: Path) -> Made:
    """As an engine has them by itself."""

    def forced(runner: Runner) -> Drafter:
        assert runner.masks is not None
        return ForcedDrafter(runner.rows, runner.masks)

    return _plain(), lambda known: [forced, lambda r: SuffixDrafter(r.rows)]


def _model(family: str, kind: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        tokenizer: Any = ByteTokenizer()
        loaded = Loaded(tiny_model(provider(), family, kind), tokenizer, provider())
        sizes = VOCAB, SHARE * 2**19
        # A cache too small for all of them.
        config = EngineConfig()
        return _plain(), lambda known: [
            lambda r: drafter_of(loaded, r.rows, tokenizer, *sizes, config)
        ]

    return make


def _aside(folder: Path) -> Made:
    return _plain(), lambda known: [
        lambda r: Aside(r.rows, adversaries.AlwaysWrong, in_process=False)
    ]


def _mtp(num_heads: int, is_right: bool = False) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        model = mtp_model(num_heads, is_right)
        return model, lambda known: [lambda r: HeadsDrafter("mtp", model, provider(), r.kv, r.rows)]

    return make


def _eagle(third: bool) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        pytest.importorskip("torch")
        test_eagle.write(folder, third)
        model = test_eagle.tiny_target()
        heads: Any = load_heads(open_checkpoint(folder), model, provider(), "f32")
        return model, lambda known: [
            lambda r: HeadsDrafter("eagle", heads, provider(), r.kv, r.rows)
        ]

    return make


def _medusa(folder: Path) -> Made:
    model: Any = tiny_model(provider(), kind="f32")
    heads: Any = load_heads(open_checkpoint(test_medusa.write(folder)), model, provider(), "f32")
    return model, lambda known: [
        lambda r: MedusaDrafter(heads, model.config.dim, provider(), r.rows)
    ]


def _early(folder: Path) -> Made:
    model: Any = tiny_model(provider(), kind="f32")
    assert isinstance(model, Decoder)
    return model, lambda known: [
        lambda r: EarlyExitDrafter(model, 1, provider(), r.kv, r.rows, r.adapted)
    ]


def _adversary(make_one: Any) -> Callable[[Path], Made]:
    return lambda folder: (_plain(), lambda known: [lambda r: make_one(r.rows)])


def _everybody(folder: Path) -> Made:
    """At once: each step the one that promises most."""
    model = mtp_model(1)
    return model, lambda known: [
        lambda r: SuffixDrafter(r.rows),
        lambda r: Oracle(r.rows, known, lambda index: index % 7 == 3),
        lambda r: adversaries.Slow(r.rows),
        lambda r: HeadsDrafter("mtp", model, provider(), r.kv, r.rows),
        lambda r: adversaries.Raises(r.rows),
    ]


ALL: dict[str, Callable[[Path], Made]] = {
    "right": _known(lambda index: False),
    "right now and then": _known(lambda index: index % 5 == 3),
    "right, asked late": _known(lambda index: index % 6 == 5, is_instant=False),
    "suffix": _suffix,
    "auto": _auto,
    "model": _model("llama", "q8"),
    "another model": _model("gemma3", "q4"),
    "aside": _aside,
    "mtp": _mtp(2),
    "mtp, right": _mtp(1, is_right=True),
    "eagle": _eagle(third=False),
    "eagle3": _eagle(third=True),
    "medusa": _medusa,
    "early exit": _early,
    "everybody": _everybody,
    **{one.__name__: _adversary(one) for one in adversaries.ADVERSARIES},
}
