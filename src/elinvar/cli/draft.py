"""`elinvar draft`: heads that draft for a model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elinvar.base.errors import InputError, ModelError
from elinvar.base.sampling import SamplingParams
from elinvar.cli import options as opt
from elinvar.cli.command import Command, Group, option
from elinvar.cli.prompts import encode, read_prompts
from elinvar.cli.terminal import Interrupt, bar, note

if TYPE_CHECKING:
    from elinvar.engine.core import Engine

HELD_OUT = 8
"""Prompts that are not learned from, at most."""


@click.group(cls=Group)
def draft() -> None:
    """Make heads that draft for a model."""


@draft.command(cls=Command)
@opt.model
@option("--method", type=click.Choice(["eagle", "mtp", "early-exit"]), default="eagle")
@option(
    "--data",
    type=opt.FILE_THAT_IS_THERE,
    required=True,
    help="JSONL of prompts, as `elinvar generate` takes them; the model's answers are learned from.",
)
@option("--out", type=opt.FOLDER, help="Folder for the head, and for the work until it is done.")
@option("--chat", is_flag=True, help="Each prompt is a user's message.")
@option("--answer-tokens", type=opt.AT_LEAST_1, default=256, help="Of each answer, at most.")
@option("--epochs", type=opt.AT_LEAST_1, default=3)
@option("--rate", type=opt.Positive(), default=5e-4, help="Learning rate.")
@option("--depth", type=opt.AT_LEAST_1, default=3, help="Drafts in a row that are trained.")
@option(
    "--draft-vocab",
    "num_tokens",
    type=opt.AT_LEAST_1,
    default=8192,
    help="Tokens that are learned; an EAGLE head drafts no others.",
)
@option("--threads", type=opt.AT_LEAST_1, help="Compute threads.")
@opt.verbose
def train(
    model: str,
    method: str,
    data: Path,
    out: Path | None,
    chat: bool,
    answer_tokens: int,
    threads: int | None,
    **settings: Any,
) -> int:
    """Train a head on a model's own answers, or measure which early exit is worth drafting with.

    Ctrl-C keeps what was done, and the same command goes on from there. An exit that is worth it is
    remembered for this model."""
    trained = method != "early-exit"
    if trained and out is None:
        raise click.BadParameter("give --out, a folder for the head")
    if trained and not _has_torch():
        raise ModelError("Training needs torch; install it with 'pip install elinvar[train]'.")
    params = SamplingParams(max_tokens=answer_tokens)
    lines = read_prompts(data, params, chat)
    if len(lines) < 2:
        raise InputError("data", f"{data} holds one prompt; some are learned from, others tested.")
    held_out = max(1, min(HELD_OUT, len(lines) // 10))

    from elinvar.base.config import EngineConfig
    from elinvar.cli.load import load, pulled

    path = pulled(model)
    engine = load(model, EngineConfig(num_threads=threads, speculation="off")).engine
    prompts = [encode(engine, line) for line in lines]
    with Interrupt() as interrupt, ExitStack() as bars:
        tell = _Bars(bars, interrupt)
        if trained:
            assert out is not None
            told = {"model": engine.fingerprint, "method": method, "chat": chat}
            told |= {"answer_tokens": answer_tokens, "prompts": len(lines), **settings}
            _claim(out, told)
            done = _train(engine, path, method, prompts, held_out, params, settings, out, tell)
        else:
            done = _measure(engine, prompts[:held_out], params, tell)
    if not done:
        note("Stopped; run the same command again to go on.")
    return 0 if done else 130


def _has_torch() -> bool:
    try:
        return find_spec("torch") is not None
    except ValueError:  # there is something of that name that is no package
        return False


class _Bars:
    """A bar for each stage; says stop after Ctrl-C."""

    def __init__(self, stack: ExitStack, interrupt: Interrupt) -> None:
        self._stack, self._interrupt, self._stage = stack, interrupt, ""

    def __call__(self, stage: str, done: int, total: int, more: str = "") -> bool:
        if stage != self._stage:
            self._stack.close()
            self._stage, self._update = stage, self._stack.enter_context(bar(stage, total))
        self._update(done, f"{done}/{total} {more}")
        return not self._interrupt.hit


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """The folder is of these settings. Raises InputError where it was begun with others."""
    work = out / "work"
    path = work / "settings.json"
    if path.exists():
        try:
            before = json.loads(path.read_bytes())
        except ValueError:
            raise InputError("out", f"{path} is damaged; give another folder.") from None
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    "out",
                    f"{out} was begun with {name} = {before.get(name)}, not {value}; go on with that, or "
                    "give another folder.",
                )
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def _train(
    engine: Engine,
    path: Path,
    method: str,
    prompts: Sequence[list[int]],
    held_out: int,
    params: SamplingParams,
    settings: dict[str, Any],
    out: Path,
    tell: _Bars,
) -> bool:
    from elinvar.train.draft import train_head
    from elinvar.train.fit import Settings

    chosen = Settings(**settings)
    found = train_head(engine, path, method, prompts, held_out, params, chosen, out, tell)
    if found is None:
        return False
    told = {f"temperature {t:g}": asdict(report) for t, report in found.items()}
    (out / "report.json").write_text(json.dumps(told, indent=2))
    for t, report in found.items():
        best = max(report.tokens_a_second)
        count = report.tokens_a_second.index(best) + 1
        print(
            f"temperature {t:g}: accepted by place {_percent(report.chances)}; "
            f"{best / report.plain:.2f} x with {count}"
        )
    note(f"The head is in {out}; {out / 'work'} is not needed any more.")
    return True


def _measure(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, tell: _Bars
) -> bool:
    """Which exit is worth it, remembered for this model."""
    from elinvar.engine.exits import best_exit, measure_exits, remember_exit
    from elinvar.nn.decoder import Decoder
    from elinvar.run.drafters.early_exit import can_exit
    from elinvar.train.answers import record_answers, seeded
    from elinvar.weights.cache import cache_root

    model = engine.runner.model
    if not isinstance(model, Decoder) or not can_exit(model):
        raise ModelError("The layers of this model's family cannot draft by themselves.")
    with tempfile.TemporaryDirectory() as work:
        both = seeded(params, len(prompts))
        answers = record_answers(
            engine, prompts, both, Path(work), lambda *n: tell("Answering", *n)
        )
    count = model.config.num_layers
    candidates = sorted({max(1, count * eighths // 8) for eighths in range(1, 8)})
    tokens = params.max_tokens or 1
    exits = measure_exits(
        model, engine.ops, answers, tokens, candidates, lambda *n: tell("Measuring", *n)
    )
    if len(answers) < len(prompts) or len(exits) < len(candidates):
        return False
    for one in exits:
        print(
            f"{one.num_layers:3} of {count} layers: accepted by place {_percent(one.chances)}; "
            f"{one.speed_up:.2f} x with {one.num_drafts}"
        )
    path = remember_exit(cache_root(), engine.fingerprint, exits)
    best = best_exit(exits)
    note(f"{'No exit is' if best is None else f'{best} layers are'} worth it; kept in {path}.")
    return True


def _percent(chances: Sequence[float]) -> str:
    return " ".join(f"{chance:.0%}" for chance in chances)
