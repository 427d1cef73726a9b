"""Engine and LLM: text, ends, errors, seeds, metrics; whoever fails takes nobody along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from elinvar.base.config import EngineConfig
from elinvar.base.errors import EngineError, InputError, ModelError, QueueFullError
from elinvar.base.exposition import expose
from elinvar.base.handling import Handling
from elinvar.base.limits import TenantLimits
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.llm import LLM
from elinvar.engine.output import Delta
from elinvar.engine.seeds import choice_seed, draw_seed
from engines import EOS, VOCAB, answers, tiny_engine

PROMPT = list(b"Elinvar: ")
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


def sampled(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "seed": 5, "ignore_eos": True, **options})


def run(engine: Engine) -> list[Delta]:
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    return deltas


def assert_empty(engine: Engine) -> None:
    engine.scheduler.check()
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0
    assert engine.scheduler.kv_usage == 0


def break_next_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next forward writes its keys and values, and then fails."""
    model = engine.runner.model
    forward = model.forward

    def fail(batch: Any, kv: Any) -> Any:
        forward(batch, kv)
        monkeypatch.setattr(model, "forward", forward)
        raise RuntimeError("a kernel died")

    monkeypatch.setattr(model, "forward", fail)


# ---- how answers end --------------------------------------------------------------------------


def test_length_and_context() -> None:
    engine = tiny_engine(max_context=24)
    engine.add(PROMPT, sampled(max_tokens=3))
    assert [d.finish_reason for d in run(engine)] == [None, None, "length"]
    engine.add(PROMPT, sampled(max_tokens=1000))
    assert sum(len(d.token_ids) for d in run(engine)) == 24 - len(PROMPT)


def test_end_token_is_counted_and_has_no_text() -> None:
    engine = tiny_engine()
    ids, _, text = answers(engine, [PROMPT], [sampled()])[0]
    end = ids[5]
    first = ids.index(end)
    params = sampled(stop_token_ids=(end,), logprobs=0)
    engine.add(PROMPT, params)
    deltas = run(engine)
    assert [t for d in deltas for t in d.token_ids] == ids[: first + 1]
    assert sum(len(d.logprobs) for d in deltas) == first + 1
    assert deltas[-1].finish_reason == "stop"
    assert "".join(d.text for d in deltas) == engine.tokenizer.decode(ids[:first])
    assert text.startswith("".join(d.text for d in deltas)[:-1])


def test_eos_ends_unless_ignored() -> None:
    engine = tiny_engine()
    # At a high temperature every token comes up soon.
    params = sampled(temperature=100.0, max_tokens=480, seed=1)
    ids = answers(engine, [PROMPT], [params])[0][0]
    assert len(ids) == 480 and EOS in ids
    ended = answers(
        engine, [PROMPT], [sampled(temperature=100.0, max_tokens=480, seed=1, ignore_eos=False)]
    )[0][0]
    assert ended == ids[: ids.index(EOS) + 1]


@pytest.mark.parametrize("at", [0, 3, 9])
def test_stop_text(at: int) -> None:
    engine = tiny_engine()
    ids, logprobs, text = answers(engine, [PROMPT], [sampled(logprobs=0)])[0]
    stop = text[at : at + 2]
    engine.add(PROMPT, sampled(stop=(stop, "never said"), logprobs=0), "me")
    deltas = run(engine)
    assert "".join(d.text for d in deltas) == text[: text.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    got = [t for d in deltas for t in d.token_ids]
    assert got == ids[: len(got)] and len(got) < len(ids)
    assert [x for d in deltas for x in d.logprobs] == logprobs[: len(got)]
    assert stop in engine.tokenizer.decode(got)
    assert_empty(engine)


def test_stop_text_in_the_rest_that_was_held_back() -> None:
    # The last byte begins a character that never ends: it becomes U+FFFD at the finish only.
    engine = tiny_engine()
    text = LLM(engine).generate([PROMPT], sampled())[0].text
    engine.add(PROMPT, sampled(stop=(text[-1],), max_tokens=20))
    deltas = run(engine)
    assert deltas[-1].finish_reason == "stop"
    assert text[-1] not in "".join(d.text for d in deltas)


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "params", "field"),
    [
        ([], {}, "prompt"),
        ([VOCAB], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1.0] * 40, {}, "prompt"),
        (["a"], {}, "prompt"),
        ([1] * 512, {}, "prompt"),
        ([1] * 100, {"max_tokens": 400}, "max_tokens"),
    ],
)
def test_what_can_never_run_is_refused(ids: list[Any], params: dict[str, Any], field: str) -> None:
    engine = tiny_engine(max_context=256) if field == "max_tokens" else tiny_engine()
    if field == "max_tokens":
        # A cache smaller than the context cannot be asked for; make one.
        engine.scheduler.kv.need.max_sequence = 128
    with pytest.raises(InputError) as error:
        engine.add(ids, sampled(**params))
    assert error.value.field == field
    assert not engine.has_work


def test_memory_refuses_an_answer_but_never_ends_it_early() -> None:
    """The cache holds 128 tokens of the model's 512: how an answer ends is not memory's to say."""
    engine = tiny_engine(num_blocks=4)
    with pytest.raises(InputError) as error:
        engine.add([1] * 100, sampled(max_tokens=30))
    assert error.value.field == "max_tokens" and "29" in str(error.value)
    fits = sampled(max_tokens=29, ignore_eos=True)
    assert answers(engine, [[1] * 100], [fits]) == answers(tiny_engine(), [[1] * 100], [fits])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("num_threads", "kv_memory", "max_context", "max_rows")),
        *(("max_step_tokens", value) for value in (-1, 1.5, True, None)),
        *(("kv_dtype", "int3"), ("weight_format", "q2")),
    ],
)
def test_bad_engine_options_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError) as error:
        EngineConfig(**{field: value})
    assert error.value.field == field


def test_an_id_in_use_is_refused() -> None:
    engine = tiny_engine()
    engine.add(PROMPT, GREEDY, "a")
    with pytest.raises(InputError) as error:
        engine.add(PROMPT, GREEDY, "a")
    assert error.value.field == "request_id"
    assert {d.request_id for d in run(engine)} == {"a"}
    assert engine.add(PROMPT, GREEDY, "a") == "a"


# ---- abort and errors -------------------------------------------------------------------------


def test_abort_frees_at_once_and_says_so() -> None:
    engine = tiny_engine(max_rows=1)
    running, waiting = engine.add(PROMPT, GREEDY), engine.add(PROMPT, GREEDY)
    engine.step()
    assert engine.abort(running) and engine.abort(waiting)
    assert_empty(engine)
    assert not engine.abort(running)
    deltas = run(engine)
    assert [(d.request_id, d.finish_reason) for d in deltas] == [
        (running, "abort"),
        (waiting, "abort"),
    ]
    assert engine.metrics.finished["abort"] == 2


def test_a_failed_step_fails_its_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(max_rows=2)
    prompts = [[number, *PROMPT * (5 + number)] for number in range(3)]
    wanted = [answers(tiny_engine(), [p], [sampled()])[0] for p in prompts]
    first, second, third = [engine.add(p, sampled()) for p in prompts]
    engine.step()
    break_next_step(engine, monkeypatch)
    failed = engine.step()
    assert {d.request_id for d in failed} == {first, second}
    assert all(d.finish_reason == "error" for d in failed)
    assert failed[0].error == "RuntimeError: a kernel died"
    assert engine.scheduler.kv_usage == 0
    deltas = run(engine)
    assert {d.request_id for d in deltas} == {third}
    assert [t for d in deltas for t in d.token_ids] == wanted[2][0]
    # What the failed step wrote is not found as a prefix.
    assert answers(engine, prompts, [sampled()] * 3) == wanted
    assert_empty(engine)


def test_a_failure_in_the_first_step_and_in_the_middle_of_a_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine(max_step_tokens=40)
    long = PROMPT * 12
    wanted = answers(tiny_engine(), [long], [sampled()])
    for steps_before in (0, 1, 2):
        engine.add(long, sampled())
        for _ in range(steps_before):
            engine.step()
        break_next_step(engine, monkeypatch)
        assert run(engine)[-1].finish_reason == "error"
        assert_empty(engine)
    assert answers(engine, [long], [sampled()]) == wanted


def test_a_plan_that_was_never_committed_is_computed_again() -> None:
    engine = tiny_engine()
    wanted = answers(tiny_engine(), [PROMPT], [sampled()])[0][0]
    engine.add(PROMPT, sampled())
    ids = [t for d in engine.step() for t in d.token_ids]
    engine.scheduler.plan()
    ids += [t for d in run(engine) for t in d.token_ids]
    assert ids == wanted


# ---- seeds ------------------------------------------------------------------------------------


def test_a_drawn_seed_is_told_and_repeats_the_answer() -> None:
    llm = LLM(tiny_engine())
    first = llm.generate([PROMPT], sampled(seed=None))[0]
    again = llm.generate([PROMPT], sampled(seed=first.seed))[0]
    other = llm.generate([PROMPT], sampled(seed=None))[0]
    assert first.token_ids == again.token_ids != other.token_ids


def test_choice_seeds() -> None:
    seeds = [choice_seed(5, k) for k in range(1000)]
    assert seeds[0] == 5 and len(set(seeds)) == 1000
    assert all(0 <= s < 2**53 for s in seeds)
    assert choice_seed(-1, 0) == -1
    assert choice_seed(-1, 3) == choice_seed(2**64 - 1, 3)
    assert choice_seed(5, 1) != choice_seed(6, 1)
    # Pinned: answers of a seed must not change from version to version.
    assert (choice_seed(0, 1), choice_seed(1234, 7)) == (7956156453446585, 4461295578776323)
    assert 0 <= draw_seed() < 2**53


# ---- LLM --------------------------------------------------------------------------------------


def test_generate_takes_one_or_many_texts_or_ids() -> None:
    llm = LLM(tiny_engine())
    one = llm.generate("Elinvar: ", GREEDY)
    assert len(one) == 1 and one[0].prompt_token_ids == PROMPT
    assert llm.generate(PROMPT, GREEDY)[0].token_ids == one[0].token_ids
    both = llm.generate(["Elinvar: ", "Other: "], [GREEDY, sampled(max_tokens=3)])
    assert both[0].text == one[0].text and len(both[1].token_ids) == 3
    assert llm.generate([PROMPT, PROMPT], GREEDY)[1].token_ids == one[0].token_ids
    assert llm.generate([], GREEDY) == []
    with pytest.raises(InputError, match="one a prompt; got 1"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(InputError) as error:
        llm.generate(["a", ""], GREEDY)
    assert error.value.field == "prompt"
    assert_empty(llm.engine)


def test_a_list_runs_in_one_batch_and_tells_how_far_it_is() -> None:
    llm = LLM(tiny_engine(speculation="off"))  # one token a step
    seen: list[tuple[int, int, int]] = []
    llm.generate(["a", "b", "c"], GREEDY, progress=lambda *now: seen.append(now))
    assert len(seen) == 20 and seen[0] == (0, 3, 3) and seen[-1] == (3, 3, 60)


def test_n_answers_to_a_prompt() -> None:
    llm = LLM(tiny_engine())
    single = llm.generate("a", sampled())[0]
    many = llm.generate(["a", "b"], sampled(), n=3)
    assert [c.prompt_token_ids for c in many] == [[97]] * 3 + [[98]] * 3
    assert many[0].token_ids == single.token_ids
    assert [c.seed for c in many[:3]] == [choice_seed(5, k) for k in range(3)]
    assert len({tuple(c.token_ids) for c in many[:3]}) == 3
    drawn = llm.generate("a", sampled(seed=None), n=2)
    assert drawn[1].seed == choice_seed(drawn[0].seed, 1)
    with pytest.raises(InputError):
        llm.generate("a", n=0)


def test_chat_needs_a_template() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        LLM(tiny_engine()).chat([{"role": "user", "content": "Hi"}])


def test_streams_concatenate_to_the_answer_and_share_the_batch() -> None:
    llm = LLM(tiny_engine())
    wanted = llm.generate("Elinvar: ", sampled())[0]
    one, two = llm.stream("Elinvar: ", sampled()), llm.stream(PROMPT, sampled(seed=6))
    first = [next(one), next(two), next(one)]
    assert llm.engine.scheduler.num_running == 2
    # A call in between runs to its end and loses nothing of theirs.
    again = llm.generate("Elinvar: ", sampled())[0]
    assert again.num_cached_tokens == len("Elinvar: ") - 1
    assert replace(again, num_cached_tokens=0) == wanted
    rest = list(one)
    assert "".join(d.text for d in [first[0], first[2], *rest]) == wanted.text
    assert sum(len(d.token_ids) for d in [first[1], *two]) == 20
    assert_empty(llm.engine)


def test_a_closed_stream_is_aborted() -> None:
    llm = LLM(tiny_engine())
    stream = llm.stream("Elinvar: ", sampled())
    next(stream)
    stream.close()
    assert_empty(llm.engine)
    with pytest.raises(InputError):
        llm.stream("", sampled())


def test_ctrl_c_ends_the_call_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_engine())
    model = llm.engine.runner.model
    forward = model.forward

    def interrupted(batch: Any, kv: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return forward(batch, kv)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY)
    assert llm.engine.metrics.steps == 1
    assert_empty(llm.engine)
    assert len(llm.generate("a", GREEDY)[0].token_ids) == 20


def test_a_failed_step_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_engine(max_rows=2))
    break_next_step(llm.engine, monkeypatch)
    with pytest.raises(EngineError, match="a kernel died"):
        llm.generate(["a", "b", "c"], GREEDY)
    assert_empty(llm.engine)
    assert len(llm.generate("a", GREEDY)) == 1


# ---- metrics and the package ------------------------------------------------------------------


def test_metrics() -> None:
    llm = LLM(tiny_engine(max_rows=2))
    prompt = PROMPT * 8
    llm.generate([prompt], GREEDY)
    llm.generate([prompt, PROMPT, PROMPT], GREEDY)
    list(zip(range(3), llm.stream(PROMPT, GREEDY), strict=False))
    text = expose({"m": llm.engine.metrics}).decode()
    values = {
        (sample.name, *(v for k, v in sample.labels.items() if k != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("elinvar_")
    }
    assert values["elinvar_prompt_tokens_total",] == 2 * len(prompt) + 3 * len(PROMPT)
    assert values["elinvar_cached_tokens_total",] == len(prompt) - 1 + 3 * (len(PROMPT) - 1)
    assert values["elinvar_generated_tokens_total",] >= 80
    assert values["elinvar_requests_finished_total", "length"] == 4
    assert values["elinvar_requests_finished_total", "abort"] == 1
    assert values["elinvar_requests_running",] == values["elinvar_requests_waiting",] == 0
    assert values["elinvar_ttft_seconds_count",] == 5
    assert values["elinvar_e2e_seconds_count",] == 4
    assert values["elinvar_itl_seconds_bucket", "+Inf"] == values["elinvar_itl_seconds_count",]
    assert values["elinvar_step_seconds_count",] == values["elinvar_steps_total",]
    assert values["elinvar_step_seconds_sum",] > 0


def test_import_is_light() -> None:
    code = (
        "import sys, elinvar; assert 'numpy' not in sys.modules; "
        "from elinvar import SamplingParams; assert 'numpy' not in sys.modules; "
        "from elinvar import LLM; assert 'torch' not in sys.modules; assert 'LLM' in dir(elinvar)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 10**400),
        ("temperature", float("nan")),
        ("top_p", -(10**400)),
        ("stop", 5),
        ("stop", None),
        ("stop", b"x"),
        ("stop", "x" * 1025),
        ("stop_token_ids", 7),
        ("stop_token_ids", range(1025)),
        ("ignore_eos", "false"),
        ("ignore_eos", None),
    ],
)
def test_a_sampling_parameter_of_a_wrong_kind_is_named(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name) as error:
        SamplingParams(**{name: value})
    assert error.value.field == name


def test_threads_that_no_system_starts_are_refused() -> None:
    with pytest.raises(InputError, match="num_threads must be at most 1024, got 100000"):
        EngineConfig(num_threads=100_000)


def test_a_closed_engine_says_so() -> None:
    engine = tiny_engine()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        LLM(engine).generate([PROMPT], GREEDY)


def test_a_model_may_be_a_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no\.gguf"):
        LLM(tmp_path / "no.gguf")


def test_requests_over_their_tenants_rate_wait_and_are_answered() -> None:
    # Half a second to wait for: longer than a busy machine stands still between two lines.
    engine = tiny_engine(tenants={"slow": TenantLimits(tokens_per_s=20.0, burst_s=0.01)})
    params, slow = SamplingParams(8, seed=1, ignore_eos=True), Handling(tenant="slow")
    first = engine.add([1, 2, 3], params, handling=slow)
    while engine.has_work:
        engine.step()
    assert engine.idle_s == 0
    second = engine.add([1, 2, 3], params, handling=slow)
    other = engine.add([1, 2, 3], params)
    waits, ends = [engine.idle_s], []
    while engine.has_work:
        ends += [delta.request_id for delta in engine.step() if delta.finish_reason]
        waits.append(engine.idle_s)
    assert first not in ends and ends == [other, second]
    assert engine.scheduler.num_held_up == 1
    assert all(0 <= wait < 2 for wait in waits)


def test_who_has_enough_waiting_is_told_when_to_come_back() -> None:
    engine = tiny_engine(tenants={"*": TenantLimits(max_running=1, max_waiting=1)})
    for _ in range(2):
        engine.add([1, 2, 3], SamplingParams(8))
    with pytest.raises(QueueFullError, match="0 requests run and 2 wait already") as error:
        engine.add([1, 2, 3], SamplingParams(8))
    assert error.value.retry_after_s == 1
    long = SamplingParams(64, ignore_eos=True)
    engine.add([1, 2, 3], long, handling=Handling(tenant="b"))
    while not any(delta.finish_reason for delta in engine.step()):
        pass
    engine.add([1, 2, 3], SamplingParams(8))
    while engine.has_work:
        engine.step()
