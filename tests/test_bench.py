"""`elinvar bench` and `elinvar profile`: the figures of a load, and the commands as processes."""

from __future__ import annotations

import json
import math
import signal
import statistics
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar.base.config import EngineConfig
from elinvar.base.errors import InputError
from elinvar.cli.bench.latency import Goals, Record, summary
from elinvar.cli.bench.plot import svg
from elinvar.cli.bench.talk import conversations
from elinvar.cli.bench.workload import (
    Arrival,
    poisson,
    prompts,
    read_dataset,
    read_trace,
    uniform,
    with_shared,
)
from processes import ELINVAR, ENVIRONMENT, assert_fails, run
from serving import serving

# The load.


def test_a_seed_is_a_load() -> None:
    lengths = uniform(400, (10, 20), (3, 3), seed=7)
    assert {one.prompt_tokens for one in lengths} == set(range(10, 21))
    assert {one.output_tokens for one in lengths} == {3}
    load = poisson(lengths, 50.0, seed=7)
    assert load == poisson(uniform(400, (10, 20), (3, 3), seed=7), 50.0, seed=7)
    assert load != poisson(lengths, 50.0, seed=8)
    assert load[0].at == 0 and 5 < load[-1].at < 12
    assert all(one.at == 0 for one in poisson(lengths, math.inf, seed=7))


def test_prompts_are_new_but_where_a_trace_shares_them() -> None:
    load = [Arrival(0, 600, 1, (4, 9)), Arrival(0, 1100, 1, (4, 8, 9)), Arrival(0, 5, 1)]
    a, b, c = prompts(load, seed=3, vocab_size=50_000)
    assert [len(p) for p in (a, b, c)] == [600, 1100, 5]
    assert (a[:512] == b[:512]).all() and (a[512:] != b[512:600]).any()
    assert all((p >= 100).all() and (p < 1100).all() for p in (a, b, c))
    assert (a == prompts(load, seed=3, vocab_size=50_000)[0]).all()
    assert max(prompts(load, seed=3, vocab_size=288)[1]) < 288


def test_both_public_traces_are_read(tmp_path: Path) -> None:
    jsonl = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": 3000, "input_length": 100, "output_length": 7, "hash_ids": [0, 1]},
        {"timestamp": 1000, "input_length": 50, "output_length": 1},
        {"timestamp": 9000, "input_length": 1, "output_length": 1},
    ]
    jsonl.write_text("\n".join(map(json.dumps, lines)))
    assert read_trace(jsonl, 2, speed=2.0, scale=0.5) == [
        Arrival(0.0, 25, 1),
        Arrival(1.0, 50, 4, (0, 1)),
    ]
    table = tmp_path / "trace.csv"
    table.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109\r\n"
    )
    first, second = read_trace(table, None, 1.0, 1.0)
    assert first == Arrival(0.0, 374, 44)
    assert second.at == pytest.approx(4.314579, abs=1e-6) and second.output_tokens == 109


def test_our_own_trace_is_read(tmp_path: Path) -> None:
    """As elinvar serve --trace-requests writes it, whose lines come as requests end."""
    path = tmp_path / "ours.jsonl"
    one = {"id": "a", "prompt_tokens": 9, "generated_tokens": 4, "finish_reason": "length"}
    path.write_text(f"{json.dumps({**one, 'arrived': 7.5})}\n{json.dumps({**one, 'arrived': 7.0})}")
    assert read_trace(path, None, 1.0, 1.0) == [Arrival(0.0, 9, 4), Arrival(0.5, 9, 4)]


@given(shape=st.floats(0.1, 10), rate=st.floats(1, 1000))
@settings(max_examples=20, deadline=None)
def test_bursts_have_the_same_rate(shape: float, rate: float) -> None:
    load = poisson(uniform(4000, (1, 1), (1, 1), 0), rate, seed=1, burstiness=shape)
    assert load[-1].at == pytest.approx(4000 / rate, rel=0.25)
    gaps = [b.at - a.at for a, b in pairwise(load)]
    variation = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert variation == pytest.approx(shape**-0.5, rel=0.3)


def test_shared_prefixes() -> None:
    load = with_shared(uniform(40, (5, 9), (1, 1), 0), 30, 2, seed=4)
    ids = prompts(load, 0, 50_000)
    assert {tuple(one[:30]) for one in ids} == {tuple(ids[0][:30]), tuple(_other(ids))}
    assert all(len(one) == arrival.prompt_tokens for one, arrival in zip(ids, load, strict=True))
    assert len({tuple(one[30:]) for one in ids}) == 40


def _other(ids: Any) -> Any:
    return next(one[:30] for one in ids if (one[:30] != ids[0][:30]).any())


def test_turns_go_on_with_what_was_said() -> None:
    load = uniform(2, (6, 6), (4, 4), seed=0)
    a, b = conversations(load, 0, 50_000, chat=False)
    first, second, third = (a.ask(turn, "x") for turn in range(3))
    assert (len(first), len(second), len(third)) == (6, 16, 26)
    assert third[:16] == second and second[:6] == first
    assert {*b.ask(0, None)[:2]} != {*first[:2]}  # type: ignore[misc]
    chat, _ = conversations(load, 0, 50_000, chat=True)
    assert isinstance(chat.ask(0, None), list)
    messages: Any = chat.ask(1, "Yes.")
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "Yes." and len(messages[0]["content"].split()) == 6


def test_a_dataset_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    said = [{"role": "user", "content": "Hi"}]
    path.write_text(
        f'{{"prompt": "a", "max_tokens": 3}}\n{json.dumps({"messages": said})}\n'
        '{"prompt_ids": [5, 6]}\n'
    )
    load = read_dataset(path, 4, output_tokens=9)
    assert [one.output_tokens for one in load] == [3, 9, 9, 3]
    asked = [talk.ask(0, None) for talk in conversations(load, 0, 1000, chat=False)]
    assert asked == ["a", said, [5, 6], "a"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"timestamp": 0}', "Line 1"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "Line 2"),
        ("a,b\n1,2\n", "Line 2"),
        ("", "no request"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_bad_trace_is_told_by_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words):
        read_trace(path, None, 1.0, 1.0)


# The figures.


def record(due: float, *times: float, done: bool = True) -> Record:
    arrival = Arrival(due, 10, len(times))
    return Record(arrival, due, due, list(times), len(times), done)


def test_the_summary_of_a_load() -> None:
    records = [
        record(0.0, 0.1, 0.2, 0.4),
        record(1.0, 1.5, 1.6, 1.7),
        record(2.0, 2.1, done=False),
        Record(Arrival(3.0, 10, 1), 3.0, sent=3.5, kind="HTTP 429", error="Refused."),
        Record(Arrival(9.0, 10, 1), 9.0),
    ]
    assert summary(records, Goals(itl=0.15))["goodput"]["share"] == round(1 / 3, 4)
    found = summary(records, Goals(ttft=0.2, tpot=0.2))
    assert [found[k] for k in ("requests", "completed", "failed", "unfinished")] == [5, 2, 1, 2]
    assert found["seconds"] == 2.1 and found["requests_per_s"] == round(2 / 2.1, 3)
    assert found["output_tokens_per_s"] == round(7 / 2.1, 3)
    assert found["total_tokens_per_s"] == round(37 / 2.1, 3)
    assert found["ttft_ms"] == {"mean": 300, "p50": 100, "p90": 500, "p99": 500}
    assert found["itl_ms"] == {"mean": 125, "p50": 100, "p90": 200, "p99": 200}
    assert found["tpot_ms"]["mean"] == 125 and found["e2e_ms"]["p99"] == 700
    assert found["goodput"]["share"] == round(1 / 3, 4)
    assert found["late_ms"]["p99"] == 500
    assert found["errors"] == {"HTTP 429": 1}


def test_a_summary_of_nothing() -> None:
    found = summary([Record(Arrival(0, 1, 1), 0.0)], Goals())
    assert found["completed"] == 0 and found["ttft_ms"] is None and "goodput" not in found


def test_the_picture_is_xml() -> None:
    records = [record(i, i + 0.1, i + 0.2 + i / 50) for i in range(30)]
    root = ElementTree.fromstring(svg("a < b", records))
    lines = [one for one in root.iter() if one.tag.endswith("polyline")]
    assert len(lines) == 5 and all(one.get("points") for one in lines)
    assert "nothing was answered" in svg("", [])


# The commands.


def test_offline_prints_the_agreed_json(smollm2_gguf: Path) -> None:
    sizes = ["--prefill", "32", "--batch", "1,3", "--prompt-tokens", 8, "--decode-tokens", 4]
    done = run("bench", smollm2_gguf, "--json", "--repeats", 2, *sizes)
    found = json.loads(done.stdout)
    assert set(found["prefill"]) == {"32"} and set(found["decode"]) == {"1", "3"}
    assert all(rate > 0 for rate in [*found["prefill"].values(), *found["decode"].values()])
    low, high = found["decode_range"]["3"]
    assert low <= found["decode"]["3"] <= high
    assert found["repeats"] == 2 and found["threads"] >= 1 and found["simd"]


@pytest.mark.parametrize("order", ["flags first", "by its name"])
def test_offline_is_what_bench_means(tiny_gguf: Path, order: str) -> None:
    flags = ["--json", "--repeats=1", "--prefill=8", "--batch=2", "--decode-tokens=2"]
    arguments = [*flags, tiny_gguf] if order == "flags first" else ["offline", tiny_gguf, *flags]
    done = run("bench", *arguments)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["decode"]) == {"2"}


def test_kernels_against_the_ceilings(tmp_path: Path) -> None:
    arguments = ["bench", "kernels", "--shape", "64,96", "--rows", "1,3", "--warm", "--threads", 1]
    arguments += ["--kinds", "q4,bf16"]
    environment = {**ENVIRONMENT, "ELINVAR_CACHE": str(tmp_path)}

    def go(*more: object) -> Any:
        command = [ELINVAR, *map(str, [*arguments, *more])]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    first = go("--json")
    assert "measuring" in first.stderr
    found = json.loads(first.stdout)
    assert [(one["kind"], one["rows"]) for one in found["results"]] == [
        *(("q4", 1), ("q4", 3), ("bf16", 1), ("bf16", 3))
    ]
    assert found["results"][0]["shape"] == [64, 96]
    for one in found["results"]:
        assert one["gop_per_s"] == pytest.approx(2 * one["rows"] * 64 * 96 / one["seconds"] / 1e9)
        assert all(0 < share < 400 for share in one["percent"].values())
    assert "fma" in found["results"][-1]["percent"] and "fma" not in found["results"][0]["percent"]
    table = go()
    assert table.stderr == "" and "bf16 64x96" in table.stdout and "GOP/s" in table.stdout
    assert "measuring" in go("--remeasure").stderr


def test_profile_tells_every_op(smollm2_gguf: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    arguments = ["profile", smollm2_gguf, "--prefill", 40, "--batch", "1,3", "--steps", 4]
    done = run(*arguments, "--repeats", 2, "--json", "--trace", trace)
    found = json.loads(done.stdout)
    assert [phase["name"] for phase in found["phases"]] == [
        *("prefill 40", "decode, batch 1", "decode, batch 3")
    ]
    assert found["ceilings"]["read"] > 0
    for phase in found["phases"]:
        ops = {(one["op"], one["label"]): one for one in phase["ops"]}
        assert ops["gated_linear", "q4 1536+1536x576"]["calls"] == 30
        assert ops["linear", "q4 576+192+192x576"]["calls"] == 30
        assert ops["attention", "f16"]["calls"] == 30 and ops["sample", ""]["calls"] == 1
        assert phase["seconds"] > 0 and phase["python_seconds"] > 0
        shares = sum(one["share"] for one in phase["ops"]) + phase["python_share"]
        assert shares == pytest.approx(1)
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(e["name"] == "decode, batch 1" for e in events) == 4
    assert sum(e["name"] == "attention" for e in events) == 30 * (2 + 4 + 4)
    assert all(e["ph"] == "X" and e["ts"] >= 0 and e["dur"] >= 0 for e in events)


def test_profile_as_a_table(tiny_gguf: Path) -> None:
    done = run("profile", tiny_gguf, "--prefill", 8, "--batch", 2, "--steps", 2, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    assert "this machine at most" in done.stdout
    assert "above the kernels (Python)" in done.stdout and "linear f16" in done.stdout


def test_a_trace_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    path = tmp_path / "none/trace.json"
    assert_fails(run("profile", "./none.gguf", "--trace", path), 1, str(path))


LOAD = ["--requests", 12, "--rate", 200, "--prompt-tokens", "4-40", "--output-tokens", "2-9"]


def test_a_load_in_process(tiny_gguf: Path) -> None:
    done = run("bench", "serve", tiny_gguf, *LOAD, "--json", "--slo", "ttft:60000,itl:60000")
    found = json.loads(done.stdout)
    assert found["completed"] == found["requests"] == 12 and found["failed"] == 0
    assert not found["interrupted"] and found["goodput"]["share"] == 1
    assert found["ttft_ms"]["p50"] <= found["e2e_ms"]["p50"]
    table = run("bench", "serve", tiny_gguf, *LOAD)
    assert "12 of 12 requests answered" in table.stdout and "TTFT" in table.stdout


def test_a_load_against_a_server(tiny_gguf: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    one = {"timestamp": 0, "input_length": 30, "output_length": 5}
    trace.write_text("\n".join(json.dumps({**one, "timestamp": 10 * i}) for i in range(8)))
    with serving(tiny_gguf, "tiny") as server:
        ask = ["bench", "serve", "tiny", "--url", f"{server.url}/v1", "--json"]
        found = json.loads(run(*ask, "--trace", trace).stdout)
        assert found["completed"] == found["requests"] == 8 and found["trace"] == "trace.jsonl"
        assert found["url"] == f"{server.url}/v1"
        assert found["output_tokens_per_s"] == pytest.approx(8 * 5 / found["seconds"], rel=0.01)
        assert_fails(run(*ask, "--priority", 5), 1, "400", "the server's policy is fcfs")
        ask[2] = "other"
        assert_fails(run(*ask), 1, "404", "other")
        assert server.idle()
    assert_fails(run(*ask), 1, server.url, "does not answer")


def test_conversations_that_are_closed(tiny_gguf: Path, tmp_path: Path) -> None:
    """Two at once, three turns each, with a prefix that all share, as chats and as tokens."""
    load = ["-n", 4, "-c", 2, "--turns", 3, "--prompt-tokens", 20, "--output-tokens", 3]
    load += ["--shared-prefix", 40, "--json", "--slo", "e2e:60000"]
    plot = tmp_path / "load.svg"
    with serving(tiny_gguf, "tiny") as server:
        ask = ["bench", "serve", "tiny", "--url", f"{server.url}/v1", *load]
        for more in (["--plot", plot], ["--chat"]):
            done = run(*ask, *more)
            found = json.loads(done.stdout)
            assert found["completed"] == found["requests"] == 12, done.stderr
            assert found["concurrency"] == 2 and found["goodput"]["share"] == 1
        metrics = server.core.metrics
        assert metrics.cached_tokens > 12 * 32 and metrics.finished["length"] >= 24
    assert "12 of 12" in plot.read_text()


def test_errors_are_counted_by_kind(tiny_gguf: Path) -> None:
    """A server whose queue takes nobody besides those that run."""
    config = EngineConfig(kv_memory=64 * 2**20, num_threads=1, max_rows=1)
    with serving(tiny_gguf, "tiny", config, max_waiting=0) as server:
        ask = ["bench", "serve", "tiny", "--url", f"{server.url}/v1", "--json", "-n", 12]
        found = json.loads(run(*ask, "--rate", "inf", "--output-tokens", 40).stdout)
    assert found["completed"] > 0 and found["errors"]["HTTP 429"] > 0
    assert found["completed"] + found["failed"] == 12


@pytest.mark.parametrize("slo", ["ttft", "ttft:0", "ttft:5,ttft:6", "x:1", "", "itl:1e3"])
def test_goals_that_are_none(slo: str) -> None:
    assert_fails(run("bench", "serve", "m", "--slo", slo), 2, "--slo", "ttft:500,itl:50")


def test_requests_that_do_not_fit_are_counted(tiny_gguf: Path) -> None:
    load = ["--prompt-tokens", "1000-3000", "--requests", 8, "--rate", "inf", "--json"]
    found = json.loads(run("bench", "serve", tiny_gguf, *load).stdout)
    assert found["completed"] > 0 and found["failed"] > 0 and found["rate"] == "inf"
    assert found["completed"] + found["failed"] == 8
    assert all("shorten the prompt" in e for e in found["error_examples"].values())


@pytest.mark.parametrize("remote", [False, True])
def test_ctrl_c_prints_what_was_measured(tiny_gguf: Path, remote: bool) -> None:
    """The requests go on for minutes; some are answered when Ctrl-C comes."""
    load = ["--requests", "3000", "--rate", "20", "--output-tokens", "3", "--json"]
    with serving(tiny_gguf, "tiny") as server:
        whom = ["tiny", "--url", f"{server.url}/v1"] if remote else [str(tiny_gguf)]
        command = [ELINVAR, "bench", "serve", *whom, *load]
        pipes = subprocess.PIPE
        with subprocess.Popen(
            command, stdout=pipes, stderr=pipes, text=True, env=ENVIRONMENT
        ) as child:
            assert child.stderr is not None
            assert child.stderr.readline().startswith("sending 3000 requests")
            time.sleep(1.5)
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=30)
    assert child.returncode == 130 and err == ""
    found = json.loads(out)
    assert found["interrupted"] and 0 < found["completed"] < 3000
    assert found["unfinished"] == 3000 - found["completed"]
