"""Agents as a load (benchmarks/): conversations of a trace, the oracle, and both drivers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from agentload import load, policies, real, simulate, synthetic, trace  # noqa: E402
from agentload.configs import CANDIDATES, CONFIGS, Config  # noqa: E402
from agentload.oracle import least  # noqa: E402
from agentload.trace import Row, Scale  # noqa: E402

from engines import tiny_engine  # noqa: E402

SCALE = Scale(16)


def made(seed: int = 0, count: int = 60, **options: object) -> load.Load:
    found = trace.conversations(synthetic.rows(count, seed), SCALE, 2)
    return load.load(found, SCALE, seed=seed, rate=4.0, **options)  # type: ignore[arg-type]


ROWS = [
    Row(0, 1100, 50, (0, 1, 2)),  # 0
    Row(1, 1300, 40, (0, 1, 3)),  # 0's next turn
    Row(2, 700, 9, (0, 4)),  # its only whole block is everybody's
    Row(3, 2000, 9, (0, 1, 5, 6)),  # another way on from 0's next turn: a fork
    Row(4, 1600, 9, (0, 1, 7, 8)),  # and a fork of the fork's parent
    Row(5, 2100, 9, (0, 1, 5, 6, 9)),  # goes on from the fork
]


class TestTrace:
    def test_who_goes_on_from_whom(self) -> None:
        found = trace.conversations(ROWS, SCALE)
        assert [one.turns[0].row for one in found] == [0, 2]
        root = found[0]
        assert [turn.row for turn in root.turns] == [0, 1, 3, 5]
        (fork,) = root.forks
        assert [turn.row for turn in fork.turns] == [4] and fork.fork == 1
        assert [len(one.turns) for one in trace.conversations(ROWS, SCALE, 5)] == [4]

    def test_equal_ids_are_equal_tokens(self) -> None:
        root = trace.conversations(ROWS, SCALE)[0]
        (fork,) = root.forks
        ours = SCALE.tokens(root.ids, root.num_tokens)
        theirs = SCALE.tokens(fork.ids, fork.num_tokens)
        assert len(ours) == root.num_tokens == 2100 // 16 + 1
        assert ours[:64] == theirs[:64] and ours[64:96] != theirs[64:96]
        assert ours == SCALE.tokens(root.ids, 10_000)[: len(ours)]
        assert all(trace.LOWEST <= token < trace.HIGHEST for token in ours)
        assert ours != Scale(16, seed=1).tokens(root.ids, root.num_tokens)

    def test_copies_share_the_first_block_alone(self) -> None:
        found = trace.conversations(trace.copied(ROWS, 3), SCALE, 5)
        assert len(found) == 3 and len({one.ids[0] for one in found}) == 1
        assert len({one.ids[1] for one in found}) == 3

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 1000), st.sampled_from([1, 8, 32]))
    def test_turns_of_a_conversation_grow(self, seed: int, divisor: int) -> None:
        rows = synthetic.rows(30, seed)
        assert [row.at for row in rows] == sorted(row.at for row in rows)
        scale = Scale(divisor)
        roots = trace.conversations(rows, scale)
        every = [one for root in roots for one in trace.family(root)]
        assert sum(len(one.turns) for one in every) == len(rows), "a request is lost or doubled"
        for one in every:
            prompts = [turn.prompt for turn in one.turns]
            assert prompts == sorted(set(prompts))
            assert len(one.ids) * scale.block >= one.num_tokens
            for turn in one.turns:
                whole = turn.prompt // scale.block
                assert one.ids[:whole] == rows[turn.row].ids[:whole], "not the trace's prefix"

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("{", "Line 2"),
            ('{"timestamp": 0, "input_length": 5, "output_length": 1}', "hash_ids"),
            ('{"timestamp":0,"input_length":513,"output_length":1,"hash_ids":[1]}', "do not agree"),
        ],
    )
    def test_a_bad_trace_is_told_by_line(self, tmp_path: Path, line: str, words: str) -> None:
        path = tmp_path / trace.NAME
        good = {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [0]}
        path.write_text(json.dumps(good) + "\n" + line)
        with pytest.raises(SystemExit, match=words):
            trace.read(path)

    def test_where_the_trace_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / trace.NAME).touch()
        monkeypatch.setenv(trace.VARIABLE, str(tmp_path))
        assert trace.find() == tmp_path / trace.NAME
        with pytest.raises(SystemExit, match="is no file"):
            trace.find(tmp_path / "other")
        with pytest.raises(SystemExit, match="holds no request"):
            trace.read(tmp_path / trace.NAME)


class TestLoad:
    def test_a_seed_is_a_load(self) -> None:
        one, same, other = made(3), made(3), load.load([], SCALE)
        assert [s.pauses for s in one.sessions] == [s.pauses for s in same.sessions]
        assert [s.notice for s in one.sessions] == [s.notice for s in same.sessions]
        assert other.num_turns == 0

    def test_pauses_are_those_of_their_tools(self) -> None:
        one = made(0, 3000)
        drawn = load.marginals(one)
        for tool in load.TOOLS:
            middle = drawn[f"pause: {tool.name}"][1]
            assert middle == pytest.approx(tool.median, rel=0.4)
        assert all(len(set(s.tools)) == 1 for s in one.sessions)
        told = [s.notice for s in one.sessions]
        assert sum(told) / len(told) == pytest.approx(0.3, abs=0.05)
        assert any(len(set(s.tools)) > 1 for s in made(0, pauses="mixed").sessions)

    def test_the_timeline_has_each_turn_after_the_one_before(self) -> None:
        one = load.load(trace.conversations(ROWS, SCALE), SCALE)
        events = load.timeline(one)
        assert len(events) == one.num_turns == len(ROWS)
        at = {(e.session.name, e.turn): e.at for e in events}
        assert at["0", 1] == pytest.approx(at["0", 0] + one.sessions[0].pauses[1])
        assert at["0.1", 0] == pytest.approx(at["0", 1] + one.sessions[1].pauses[0])

    def test_the_working_set_counts_what_is_shared_once(self) -> None:
        one = load.load(trace.conversations(ROWS[:2], SCALE), SCALE)
        assert load.working_set(one) == 96  # 1340 tokens / 16 in blocks of 32
        both = load.load(trace.conversations(ROWS[:2] + ROWS[3:], SCALE), SCALE, rate=1e9)
        ids = {i for s in both.sessions for i in s.conversation.ids}
        assert 96 <= load.working_set(both) <= 32 * len(ids)


class TestOracle:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 1000))
    def test_counts_tokens_by_their_prefixes(self, seed: int) -> None:
        """The same, by all prefixes one by one."""
        one = made(seed, 12)
        seen: set[int] = set()
        total = 0
        for event in load.timeline(one):
            turn = event.session.turns[event.turn]
            tokens = one.tokens(event.session, turn.prompt + turn.answer - 1)
            key, keys = 0, []
            for token in tokens:
                key = hash((key, token))
                keys.append(key)
            known = next((i for i, k in enumerate(keys) if k not in seen), len(keys))
            total += turn.prompt - min(known, turn.prompt - 1)
            seen.update(keys)
        # Where two part within a block they may have some tokens in common by chance.
        assert total == pytest.approx(least(one), abs=2 + one.num_turns / 20)

    def test_a_conversation_alone_costs_its_length(self) -> None:
        one = load.load(trace.conversations(ROWS[:2], SCALE), SCALE)
        first, second = one.sessions[0].turns
        assert least(one) == first.prompt + second.prompt - (first.prompt + first.answer - 1)


def simulated(one: load.Load, pool: int, **options: object) -> simulate.Result:
    run = simulate.Simulation(one, pool, **options)  # type: ignore[arg-type]
    result = run.run(least(one))
    assert not run.scheduler.has_work()
    run.scheduler.check()
    return result


class TestSimulation:
    def test_with_room_for_all_it_is_the_oracle(self) -> None:
        one = made(1)
        result = simulated(one, 2 * one.num_prompt_tokens)
        assert result.computed == pytest.approx(result.least, rel=0.01)
        assert len(result.returning) + len(result.first_turns) == one.num_turns
        assert result.evictions == 0

    @pytest.mark.parametrize("name", list(CANDIDATES))
    def test_every_candidate_serves_all(self, name: str) -> None:
        one, candidate = made(2, 40), CANDIDATES[name]
        result = simulated(
            one,
            8192,
            watcher=candidate.watcher(),
            cached_first=candidate.cached_first,
            host_tokens=8192 if candidate.host else 0,
        )
        assert 1 <= result.ratio <= one.num_prompt_tokens / result.least + 0.2
        assert result.evictions > 0

    @pytest.mark.parametrize("name", list(CONFIGS))
    def test_every_configuration_serves_all(self, name: str) -> None:
        one, config = made(2, 40), CONFIGS[name]
        host = 2 * one.num_prompt_tokens if config.host else 0
        result = simulated(one, 8192, hint=config.hint, prepare=config.prepare, host_tokens=host)
        assert 1 <= result.ratio <= one.num_prompt_tokens / result.least + 0.2
        assert result.ratio < 1.01 or not config.host

    def test_who_knows_the_future_computes_less(self) -> None:
        one = made(5, 200)
        pool = max(8192, load.working_set(one) // 4)
        lru, oracle = (
            simulated(one, pool, watcher=CANDIDATES[n].watcher()) for n in ("blocks, LRU", "oracle")
        )
        assert oracle.again < 0.9 * lru.again


def test_hazards_are_learned_from_pauses_that_ended_and_that_did_not() -> None:
    one = made(0).sessions[0]
    learned = policies.Learned(policies.alike)
    leases = [policies.Lease(one) for _ in range(200)]
    for lease in leases:
        learned.paused(lease, 0.0)
    for lease in leases[:100]:  # half come back after ten seconds, half never
        learned.returned(lease, 10.0)
    soon, late = policies.Lease(one), policies.Lease(one)
    learned.paused(late, 10.0)
    learned.paused(soon, 32.0)
    worth = {lease: learned.worth(lease, 41.0) for lease in (soon, late)}
    assert worth[soon] > 3 * worth[late], "who is late for long will not come"


def test_an_engine_serves_a_load() -> None:
    scale = Scale(64, highest=280)
    one = load.load(trace.conversations(ROWS, scale, 5), scale, rate=4.0)
    engine = tiny_engine(num_blocks=64, max_context=128)
    result = real.drive(engine, one, Config(hint=simulate.exact_hint), 1e5, least(one))
    assert len(result.returning) == 3 and len(result.first_turns) == 2
    assert result.least <= result.computed <= one.num_prompt_tokens


def test_the_script_prints_its_json() -> None:
    command = [sys.executable, str(BENCHMARKS / "agents.py"), "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)["reports"]
    assert [line["config"] for line in report["lines"]] == list(CONFIGS)
    assert all(line["computed_over_least"] >= 1 for line in report["lines"])
    assert report["marginals"]["source"]["gap"][1] > 0
    done = subprocess.run([*command, "--config", "none"], capture_output=True, text=True)
    assert done.returncode == 1 and "is none of lru" in done.stderr
