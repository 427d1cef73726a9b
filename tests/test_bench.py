"""`elinvar bench` and `elinvar profile`: the figures of a load, and the commands as processes."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from elinvar.base.errors import InputError
from elinvar.cli.bench.latency import Goals, Record, summary
from elinvar.cli.bench.workload import Arrival, poisson, prompts, read_trace, uniform
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
    return Record(arrival, due, True, list(times), len(times), done)


def test_the_summary_of_a_load() -> None:
    records = [
        record(0.0, 0.1, 0.2, 0.4),
        record(1.0, 1.5, 1.6, 1.7),
        record(2.0, 2.1, done=False),
        Record(Arrival(3.0, 10, 1), 3.0, sent=True, error="Refused."),
        Record(Arrival(9.0, 10, 1), 9.0),
    ]
    found = summary(records, Goals(ttft=0.2, tpot=0.2))
    assert [found[k] for k in ("requests", "completed", "failed", "unfinished")] == [5, 2, 1, 2]
    assert found["seconds"] == 2.1 and found["requests_per_s"] == round(2 / 2.1, 3)
    assert found["output_tokens_per_s"] == round(7 / 2.1, 3)
    assert found["total_tokens_per_s"] == round(37 / 2.1, 3)
    assert found["ttft_ms"] == {"mean": 300, "p50": 100, "p90": 500, "p99": 500}
    assert found["itl_ms"] == {"mean": 125, "p50": 100, "p90": 200, "p99": 200}
    assert found["tpot_ms"]["mean"] == 125 and found["e2e_ms"]["p99"] == 700
    assert found["goodput"]["share"] == round(1 / 3, 4)
    assert found["errors"] == {"Refused.": 1}


def test_a_summary_of_nothing() -> None:
    found = summary([Record(Arrival(0, 1, 1), 0.0)], Goals())
    assert found["completed"] == 0 and found["ttft_ms"] is None and "goodput" not in found


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


ONLINE = ["--requests", 12, "--rate", 200, "--prompt-tokens", "4-40", "--output-tokens", "2-9"]


def test_online_in_process(tiny_gguf: Path) -> None:
    done = run("bench", "online", tiny_gguf, *ONLINE, "--json", "--slo-ttft", 60_000)
    found = json.loads(done.stdout)
    assert found["completed"] == found["requests"] == 12 and found["failed"] == 0
    assert not found["interrupted"] and found["goodput"]["share"] == 1
    assert found["ttft_ms"]["p50"] <= found["e2e_ms"]["p50"]
    table = run("bench", "online", tiny_gguf, *ONLINE)
    assert "12 of 12 requests answered" in table.stdout and "TTFT" in table.stdout


def test_online_against_a_server(tiny_gguf: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    one = {"timestamp": 0, "input_length": 30, "output_length": 5}
    trace.write_text("\n".join(json.dumps({**one, "timestamp": 10 * i}) for i in range(8)))
    with serving(tiny_gguf, "tiny") as server:
        ask = ["bench", "online", "tiny", "--url", f"{server.url}/v1", "--json"]
        found = json.loads(run(*ask, "--trace", trace).stdout)
        assert found["completed"] == found["requests"] == 8 and found["trace"] == "trace.jsonl"
        assert found["url"] == f"{server.url}/v1"
        assert found["output_tokens_per_s"] == pytest.approx(8 * 5 / found["seconds"], rel=0.01)
        assert_fails(run(*ask, "--priority", 5), 1, "400", "the server's policy is fcfs")
        ask[2] = "other"
        assert_fails(run(*ask), 1, "404", "other")
        assert server.idle()
    assert_fails(run(*ask), 1, server.url, "does not answer")


def test_requests_that_do_not_fit_are_counted(tiny_gguf: Path) -> None:
    load = ["--prompt-tokens", "1000-3000", "--requests", 8, "--rate", "inf", "--json"]
    found = json.loads(run("bench", "online", tiny_gguf, *load).stdout)
    assert found["completed"] > 0 and found["failed"] > 0 and found["rate"] == "inf"
    assert found["completed"] + found["failed"] == 8
    assert all("shorten the prompt" in error for error in found["errors"])


@pytest.mark.parametrize("remote", [False, True])
def test_ctrl_c_prints_what_was_measured(tiny_gguf: Path, remote: bool) -> None:
    """The requests go on for minutes; some are answered when Ctrl-C comes."""
    load = ["--requests", "3000", "--rate", "20", "--output-tokens", "3", "--json"]
    with serving(tiny_gguf, "tiny") as server:
        whom = ["tiny", "--url", f"{server.url}/v1"] if remote else [str(tiny_gguf)]
        command = [ELINVAR, "bench", "online", *whom, *load]
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
