"""`elinvar draft`: heads that draft for a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    from elinvar.nn.decoder import Decoder
    from elinvar.run.replay import MakeDrafter, Recorded, Worth

HELD_OUT = 8
"""Answers that are not trained on, of each temperature, at most."""
CHAIN = 4
"""Drafts in a row that are measured."""


class _StoppedError(Exception):
    """Ctrl-C; what is there is kept."""


@click.group(cls=Group)
def draft() -> None:
    """Make heads that draft for a model."""


@draft.command(cls=Command)
@opt.model
@option("--method", type=click.Choice(["eagle", "early-exit"]), default="eagle")
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
@option("--draft-vocab", type=opt.AT_LEAST_1, default=8192, help="Tokens that the head can draft.")
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

    Ctrl-C keeps what was done; the same command goes on from there. What comes out drafts with
    `--draft-model FOLDER`; an exit that is worth it is used from then on."""
    if method == "eagle" and out is None:
        raise click.BadParameter("give --out, a folder for the head")
    if method == "eagle" and find_spec("torch") is None:
        raise ModelError("Training needs torch; install it with 'pip install elinvar[train]'.")
    defaults = SamplingParams(max_tokens=answer_tokens)
    lines = read_prompts(data, defaults, chat)
    held_out = max(1, min(HELD_OUT, len(lines) // 10))
    if len(lines) < 2:
        raise InputError("data", f"{data} holds one prompt; some are learned from, others tested.")

    from elinvar.base.config import EngineConfig
    from elinvar.cli.load import load

    config = EngineConfig(num_threads=threads, speculation="off")
    engine = load(model, config).engine
    prompts = [encode(engine, line) for line in lines]
    try:
        with Interrupt() as interrupt:
            if method == "eagle":
                assert out is not None
                told = {"model": engine.fingerprint, "chat": chat, "answer_tokens": answer_tokens}
                _claim(out / "work", told | settings | {"prompts": len(prompts)})
                return _eagle(engine, prompts, held_out, out, defaults, settings, interrupt)
            return _exits(engine, prompts[:held_out], defaults, interrupt)
    except _StoppedError:
        note("Stopped; run the same command again to go on.")
        return 130


def _claim(work: Path, settings: dict[str, Any]) -> None:
    """The work folder is of these settings. Raises InputError where it was begun with others."""
    path = work / "settings.json"
    if path.exists():
        before = json.loads(path.read_bytes())
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    "out",
                    f"{work.parent} was begun with {name} = {before.get(name)}, not {value}; go on with "
                    "that, or give another folder.",
                )
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def _eagle(
    engine: Engine,
    prompts: Sequence[list[int]],
    held_out: int,
    out: Path,
    defaults: SamplingParams,
    settings: dict[str, Any],
    interrupt: Interrupt,
) -> int:
    from elinvar.models.eagle import default_taps, load_eagle
    from elinvar.run.drafters.heads import HeadsDrafter
    from elinvar.train.answers import record_answers, seeded, write_features
    from elinvar.train.fit import Settings, described, fit, make_target, publish
    from elinvar.weights.checkpoint import open_checkpoint

    model, ops, work = _decoder(engine), engine.ops, out / "work"
    # Those held out are answered greedily and at temperature 1.
    asked = [*(prompt for prompt in prompts[:held_out] for _ in range(2)), *prompts[held_out:]]
    with _steps("Answering", interrupt) as go_on:
        params = seeded(defaults, len(asked))
        answers = record_answers(engine, asked, params, work, go_on)
    tested, learned = answers[: 2 * held_out], answers[2 * held_out :]
    replay = _replay(model, engine, answers)
    model.taps = default_taps(model.config.num_layers)
    with _steps("Computing states", interrupt) as go_on:
        shards = write_features(replay, learned, work, go_on)
    target = make_target(model, ops, learned, settings["draft_vocab"])
    chosen = Settings(
        settings["epochs"], settings["rate"], settings["depth"], settings["draft_vocab"]
    )
    taps, model.taps = model.taps, ()
    with bar("Training") as update:

        def told(done: int, total: int, loss: float, right: list[float]) -> bool:
            shares = " ".join(f"{share:.0%}" for share in right)
            update(done, f"{done}/{total} · loss {loss:.3f} · likeliest right {shares}")
            return not interrupt.hit

        head = fit(target, len(taps), shards, work, chosen, told)
    if head is None:
        raise _StoppedError
    (out / "config.json").write_text(json.dumps(described(target, taps), indent=2))
    publish(head, target, taps, out)
    plain = {t: _measured(replay, None, tested, t, 0) for t in (0.0, 1.0)}
    loaded = load_eagle(open_checkpoint(out), model, ops)
    replay = _replay(model, engine, answers)

    def make(rows: Any, kv: Any) -> Any:
        return HeadsDrafter("eagle", loaded, ops, kv, rows)

    report = {
        f"temperature {t:g}": _compared(replay, make, tested, t, plain[t]) for t in (0.0, 1.0)
    }
    (out / "report.json").write_text(json.dumps(report, indent=2))
    for name, one in report.items():
        chances = " ".join(f"{chance:.0%}" for chance in one["chances"])
        print(f"{name}: accepted by place {chances}; {one['speed_up']:.2f} x with {one['drafts']}")
    return 0


def _exits(
    engine: Engine, prompts: Sequence[list[int]], defaults: SamplingParams, interrupt: Interrupt
) -> int:
    """Which exit is worth it, remembered for this model."""
    import tempfile

    from elinvar.engine.exits import best_exit, measure_exits, remember_exit
    from elinvar.run.drafters.early_exit import can_exit
    from elinvar.train.answers import record_answers, seeded
    from elinvar.weights.cache import cache_root

    model = _decoder(engine)
    if not can_exit(model):
        raise ModelError("The layers of this model's family cannot draft by themselves.")
    with tempfile.TemporaryDirectory() as work, _steps("Answering", interrupt) as go_on:
        params = seeded(defaults, len(prompts))
        answers = record_answers(engine, prompts, params, Path(work), go_on)
    count = model.config.num_layers
    candidates = sorted({max(1, count * eighths // 8) for eighths in range(1, 8)})
    with _steps("Measuring", interrupt) as go_on:
        tokens = defaults.max_tokens or 64
        exits = measure_exits(model, engine.ops, answers, tokens, candidates, go_on)
    for one in exits:
        chances = " ".join(f"{chance:.0%}" for chance in one.chances)
        print(
            f"{one.num_layers:3} of {count} layers: accepted by place {chances}; "
            f"{one.speed_up:.2f} x with {one.num_drafts}"
        )
    path = remember_exit(cache_root(), engine.fingerprint, exits)
    best = best_exit(exits)
    note(f"{'No exit is' if best is None else f'{best} layers are'} worth it; kept in {path}.")
    return 0


def _decoder(engine: Engine) -> Decoder:
    from elinvar.nn.decoder import Decoder

    model = engine.runner.model
    if not isinstance(model, Decoder):
        raise ModelError("Heads are made for decoders alone.")
    return model


def _replay(model: Decoder, engine: Engine, answers: Sequence[Recorded]) -> Any:
    from elinvar.run.replay import Replay

    longest = max(len(answer.token_ids) for answer in answers)
    return Replay(model, engine.ops, longest, engine.config.kv_dtype)


def _measured(
    replay: Any, make: MakeDrafter | None, answers: Sequence[Recorded], t: float, most: int
) -> Worth:
    some = [answer for answer in answers if answer.params.temperature == t]
    found: Worth = replay.measure(make or (lambda rows, kv: None), some, most, 1 << 20)
    return found


def _compared(
    replay: Any, make: MakeDrafter, answers: Sequence[Recorded], t: float, plain: Worth
) -> dict[str, Any]:
    tries = [_measured(replay, make, answers, t, most) for most in range(1, CHAIN + 1)]
    best = max(range(CHAIN), key=lambda i: tries[i].tokens_a_second)
    return {
        "chances": tries[-1].chances,
        "tokens_a_step": [one.tokens_a_step for one in tries],
        "tokens_a_second": [one.tokens_a_second for one in tries],
        "without": plain.tokens_a_second,
        "drafts": best + 1,
        "speed_up": tries[best].tokens_a_second / plain.tokens_a_second,
        "draft_s": sum(one.draft_s for one in tries),
    }


def _steps(text: str, interrupt: Interrupt) -> Any:
    """A bar for what tells (done, in all), which ends after Ctrl-C."""
    from contextlib import contextmanager

    @contextmanager
    def shown() -> Any:
        with bar(text, 1.0) as update:

            def go_on(done: int, total: int) -> bool:
                update(done / max(total, 1), f"{done}/{total}")
                return not interrupt.hit

            yield go_on
        if interrupt.hit:
            raise _StoppedError

    return shown()
