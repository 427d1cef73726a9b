"""The contract across tiers: what comes back from below is, to the bit, what was computed. Every
comparison here is == with an engine without a cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from elinvar.base.config import EngineConfig
from elinvar.base.exposition import expose
from elinvar.base.limits import BATCH
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.models.registry import FAMILIES as REGISTRY
from engines import Answer, ByteTokenizer, answers, provider, tiny_engine, tiny_model
from kv_servers import kv_server
from test_invariance import FAMILIES, prompt

ROOM = 2**25
PARAMS = [
    SamplingParams(max_tokens=9, temperature=0.8, seed=seed, logprobs=2, ignore_eos=True)
    for seed in range(4)
]
FIRST = prompt(5, 100)
PROMPTS = [FIRST, [*FIRST[:77], *prompt(6, 20)], FIRST[:64], prompt(7, 70)]
"""One that ends amid a block, one that parts from it amid another, one that ends at a border."""
OTHERS = [prompt(number, 90) for number in range(20, 26)]
_alone: dict[str, list[Answer]] = {}


def expected(family: str) -> list[Answer]:
    if family not in _alone:
        engine = tiny_engine(family, prefix_cache=False)
        _alone[family] = [
            answers(engine, [p], [s])[0] for p, s in zip(PROMPTS, PARAMS, strict=True)
        ]
    return _alone[family]


@contextmanager
def engine_above(family: str, **options: Any) -> Iterator[Engine]:
    engine = tiny_engine(family, **{"kv_host_memory": ROOM, **options})
    # Small models compute faster than anybody copies: here what is there is always used.
    assert engine.scheduler.kv._below is not None
    engine.scheduler.kv._below.compute_s = lambda start, end: 1e9
    try:
        yield engine
    finally:
        engine.close()


def ask_all(engine: Engine) -> list[Answer]:
    return [answers(engine, [p], [s])[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]


def push_out(engine: Engine) -> None:
    """Others take the blocks."""
    for number, ids in enumerate(OTHERS):
        answers(engine, [ids], [PARAMS[number % 4]])


def hits(engine: Engine, tier: int = 0) -> int:
    assert engine.tiers is not None
    return engine.tiers.stats()[tier].hits


@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_every_family(family: str, tmp_path: Path) -> None:
    """From host memory; then, in an engine that knows nothing, from a disk behind it."""
    places = {"num_blocks": 8, "max_context": 160, "kv_disk_size": 2**30}
    places["kv_tiers"] = (str(tmp_path),)
    with engine_above(family, **places) as engine:
        assert ask_all(engine) == expected(family)
        push_out(engine)
        before = hits(engine)
        assert ask_all(engine) == expected(family)
        assert hits(engine) > before, "host memory must serve"
        assert engine.tiers is not None and engine.tiers.flush()
    with engine_above(family, **places) as engine:
        assert ask_all(engine) == expected(family)
        assert hits(engine, 1) > 0, "the disk must serve"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_and_objects(family: str) -> None:
    with kv_server("--memory", "64M") as server:
        for place in (server.address, f"packed+{server.address}", f"memory://{family}"):
            for warm in (False, True):
                with engine_above(family, kv_tiers=(place,)) as engine:
                    assert ask_all(engine) == expected(family)
                    assert engine.tiers is not None and engine.tiers.flush()
                    assert not warm or hits(engine, 1) > 0, f"{place} must serve"


@pytest.fixture
def segment() -> Iterator[Path]:
    path = Path(f"/dev/shm/elinvar-test-{os.getpid()}-{time.monotonic_ns()}")
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restart_begins_warm(family: str, segment: Path) -> None:
    for warm in (False, True):
        with engine_above(family, kv_host_path=str(segment)) as engine:
            assert ask_all(engine) == expected(family)
            assert not warm or hits(engine) > 0


CHILD = """
import sys
from test_tiers_bits import ask_all, engine_above
with engine_above(sys.argv[1], kv_host_path=sys.argv[2]) as engine:
    ask_all(engine)
    print("ready", flush=True)
    while True:
        ask_all(engine)
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restart_after_a_kill_begins_warm(family: str, segment: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, family, str(segment)],
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with engine_above(family, kv_host_path=str(segment)) as engine:
        assert ask_all(engine) == expected(family)
        assert hits(engine) > 0


@pytest.mark.parametrize("family", [family.name for family in REGISTRY])
def test_preemption_moves_what_it_takes(family: str) -> None:
    prompts = [prompt(i, 40 + i) for i in range(5)]
    params = [
        SamplingParams(max_tokens=70, temperature=0.9, seed=i, logprobs=1, ignore_eos=True)
        for i in range(5)
    ]
    roomy = tiny_engine(family, prefix_cache=False)
    wanted = [answers(roomy, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    recomputed = tiny_engine(family, num_blocks=8, max_context=140, max_step_tokens=64)
    assert answers(recomputed, prompts, params) == wanted
    # Who is preempted, and when, must not depend on how long steps take.
    options = {"num_blocks": 8, "max_context": 140, "max_step_tokens": 64, "interactive": BATCH}
    with engine_above(family, **options) as engine:
        assert answers(engine, prompts, params) == wanted
        assert engine.metrics.preemptions > 0 and hits(engine) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_forks_of_what_lies_below(family: str) -> None:
    with engine_above(family, num_blocks=12, max_context=160) as engine:
        ask_all(engine)
        push_out(engine)
        before = hits(engine)
        assert answers(engine, [FIRST] * 4, PARAMS) == [
            answers(tiny_engine(family, prefix_cache=False), [FIRST], [one])[0] for one in PARAMS
        ]
        assert hits(engine) > before


def test_weights_may_be_pushed_while_something_is_yet_to_be_saved() -> None:
    with engine_above("llama") as engine:
        engine.add(FIRST, PARAMS[0])
        while engine._live:
            engine.step()
        assert engine.has_work
        with pytest.raises(Exception, match=r"tensor|weight|missing") as error:
            engine.push_weights({})
        assert "have not ended" not in str(error.value)


def test_an_engine_that_ends_saves_what_it_has(tmp_path: Path) -> None:
    """As a command does that answers once."""
    places = {"kv_tiers": (str(tmp_path),), "kv_disk_size": 2**30}
    with engine_above("llama", **places) as engine:
        engine.add(FIRST, PARAMS[0])
        while engine._live:
            engine.step()
    with engine_above("llama", **places) as engine:
        assert ask_all(engine) == expected("llama")
        assert hits(engine, 1) >= 3


def test_weights_without_a_name_are_shared_with_nobody() -> None:
    config, tokenizer = EngineConfig(kv_memory=2**24, kv_host_memory=ROOM), ByteTokenizer()
    spaces = set()
    for _ in range(2):
        engine = Engine(tiny_model(provider()), provider(), tokenizer, config)  # type: ignore[arg-type]
        spaces.add(engine.scheduler.kv.new_sequence().root)
        engine.close()
    assert len(spaces) == 2


def test_metrics_and_explanations_add_up(tmp_path: Path) -> None:
    places = {"kv_tiers": (str(tmp_path),), "kv_disk_size": 2**30}
    with engine_above("gemma3", **places) as engine:
        ask_all(engine)
    with engine_above("gemma3", **places) as engine:
        request_id = engine.add(FIRST, PARAMS[0])
        explained: dict[str, Any] = {}
        while engine.has_work:
            explained = (engine.explain(request_id) or {}).get("cached_tokens") or explained
            engine.step()
        assert explained == {"disk": engine.metrics.cached_tokens}
        assert engine.metrics.cached_tokens == 96
        text = expose({"m": engine.metrics}).decode()
    assert 'elinvar_kv_tier_hits_total{model_name="m",tier="disk"}' in text
    assert 'elinvar_kv_tier_bytes_held{model_name="m",tier="host"}' in text
