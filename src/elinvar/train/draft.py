"""From prompts to a head that drafts: answers, states, training, a folder, and what it is worth on answers
that it did not learn from. Each part is kept in OUT/work, so that one that was stopped goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elinvar.base.errors import ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.models.drafts import load_heads
from elinvar.models.eagle import default_taps
from elinvar.models.load import is_mtp, load_model
from elinvar.models.registry import FAMILIES
from elinvar.nn.decoder import Decoder
from elinvar.run.drafters.heads import HeadsDrafter
from elinvar.run.replay import MakeDrafter, Recorded, Replay, Worth
from elinvar.train.answers import SHARD, Progress, record_answers, seeded, write_features
from elinvar.train.eagle import Eagle
from elinvar.train.fit import Settings, fit, make_target, publish
from elinvar.train.head import Head
from elinvar.train.mtp import MTP
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import open_checkpoint

CHAIN = 4
"""Drafts in a row that are measured."""
Tell = Callable[[str, int, int, str], bool]
"""(what is done, steps done, in all, a word more) -> whether to go on."""


@dataclass(frozen=True, slots=True)
class Report:
    """At one temperature."""

    chances: list[float]
    """Of drafts, by place: of being right where all before are."""
    tokens_a_step: list[float]
    """With 1, 2, ... drafts."""
    tokens_a_second: list[float]
    plain: float
    """Tokens a second without drafts."""


def train_head(
    engine: Engine,
    path: Path,
    method: str,
    prompts: Sequence[Sequence[int]],
    held_out: int,
    params: SamplingParams,
    settings: Settings,
    out: Path,
    tell: Tell,
) -> dict[float, Report] | None:
    """By temperature; None where `tell` said stop. path: of the engine's model; method: `eagle` or `mtp`;
    held_out: prompts that are not learned from. Raises ModelError where the model cannot have such
    heads."""
    model, ops, work = check_target(engine, method), engine.ops, out / "work"
    # Those held out are answered greedily and at temperature 1, the others by turns.
    asked = [*(prompt for prompt in prompts[:held_out] for _ in range(2)), *prompts[held_out:]]

    def stage(text: str) -> Progress:
        return lambda done, total: tell(text, done, total, "")

    both = seeded(params, len(asked))
    answers = record_answers(engine, asked, both, work, stage("Answering"))
    if len(answers) < len(asked):
        return None
    tested, learned = answers[: 2 * held_out], answers[2 * held_out :]
    replay = _replay(model, engine, answers)
    plain = {t: _measured(replay, lambda rows, kv: None, tested, t, 0) for t in (0.0, 1.0)}
    taps = default_taps(model.config.num_layers) if method == "eagle" else []
    model.taps = taps
    shards = write_features(replay, learned, work, stage("Computing states"))
    model.taps = ()
    if len(shards) < -(-len(learned) // SHARD):
        return None
    target = make_target(model, ops, learned, settings.num_tokens)
    torch.manual_seed(0)
    head: Head = Eagle(target, taps) if method == "eagle" else MTP(target)

    def told(done: int, total: int, loss: float, right: list[float]) -> bool:
        shares = " ".join(f"{share:.0%}" for share in right)
        return tell("Training", done, total, f"loss {loss:.3f}, likeliest right {shares}")

    if not fit(head, target, shards, work, settings, told):
        return None
    publish(head, target, out)
    reread, make = _read(engine, path, model, out)
    replay = _replay(reread, engine, answers)
    return {t: _report(replay, make, tested, t, plain[t]) for t in (0.0, 1.0)}


def check_target(engine: Engine, method: str) -> Decoder:
    """The engine's model. Raises ModelError where heads of this kind cannot be trained for it."""
    model, config = engine.runner.model, engine.runner.model.config
    family = next(family for family in FAMILIES if family.name == config.family)
    plain = isinstance(model, Decoder) and model.layers and hasattr(model.next_norms[-1], "gain")
    fits = config.latent is None and config.delta is None and config.layer_kinds[0] == "full"
    if not plain or not fits or (method == "mtp" and family.mtp is None):
        raise ModelError(
            f"Heads of the method {method} cannot be trained for models of the family {family.name}."
        )
    assert isinstance(model, Decoder)
    return model


def _read(engine: Engine, path: Path, model: Decoder, out: Path) -> tuple[Decoder, MakeDrafter]:
    """The model with the head that was written, and what drafts with it."""
    checkpoint, ops = open_checkpoint(out), engine.ops
    found: Any
    if is_mtp(checkpoint):
        form = engine.config.weight_format
        found = model = load_model(  # type: ignore[assignment]
            open_checkpoint(path), ops, form, cache_root(), drafts=True, heads_from=checkpoint
        )
    else:
        found = load_heads(checkpoint, model, ops)
    return model, lambda rows, kv: HeadsDrafter("heads", found, ops, kv, rows)


def _replay(model: Decoder, engine: Engine, answers: Sequence[Recorded]) -> Replay:
    longest = max(len(answer.token_ids) for answer in answers)
    return Replay(model, engine.ops, longest, engine.config.kv_dtype)


def _measured(
    replay: Replay, make: MakeDrafter, answers: Sequence[Recorded], t: float, most: int
) -> Worth:
    some = [answer for answer in answers if answer.params.temperature == t]
    return replay.measure(make, some, most, 1 << 20)


def _report(
    replay: Replay, make: MakeDrafter, answers: Sequence[Recorded], t: float, plain: Worth
) -> Report:
    tries = [_measured(replay, make, answers, t, most) for most in range(1, CHAIN + 1)]
    return Report(
        tries[-1].chances,
        [one.tokens_a_step for one in tries],
        [one.tokens_a_second for one in tries],
        plain.tokens_a_second,
    )
