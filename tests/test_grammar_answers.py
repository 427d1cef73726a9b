"""Answers that keep to a grammar, from the engine: what they are, how they end, and their bits."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elinvar.base.config import EngineConfig
from elinvar.base.errors import EngineError, InputError
from elinvar.base.grammar import (
    Choice,
    Grammar,
    JsonSchema,
    Lark,
    Literal,
    Regex,
    Repeat,
    Sequence,
    Special,
    Until,
)
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.grammars import GrammarMatcher
from elinvar.engine.output import CompletionBuilder
from elinvar.run import speculation
from elinvar.run.accounts import Account
from engines import EOS, Answer, answers, provider, tiny_engine
from test_invariance import FAMILIES, prompt

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["é", "b\n", '"']}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
JSON = JsonSchema(json.dumps(SCHEMA))
FLAT = '{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"]}'
KINDS: dict[str, tuple[Grammar, str | None]] = {
    "schema": (JSON, None),
    "regex": (Regex("[a-c]{3,6}(d|é){1,9}?"), "[a-c]{3,6}(d|é){1,9}"),
    "choice": (Choice((Literal("yes"), Literal("no"), Literal("nobody"))), "yes|no|nobody"),
    "lark": (Lark('start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/'), r"\(*\d{1,3}\)*"),
    "sequence": (
        Sequence((Repeat(Literal("ab"), 1, 3), Literal("|"), Regex(r"\d{2}"))),
        r"(ab){1,3}\|\d\d",
    ),
    "ended": (Sequence((Literal("x"), Special("<end>"))), "x"),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine()


@pytest.mark.parametrize("drafters", ["suffix", "auto"])
def test_any_number_of_drafts_may_be_verified(
    drafters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends of answers among them: later ones are drafted from earlier ones."""
    rng = random.Random(1)

    def some(chains: dict[int, Any], rows: int, seconds: list[float]) -> dict[int, int]:
        counts = {i: rng.randrange(len(chain.chances) + 1) for i, chain in chains.items()}
        return {i: count for i, count in counts.items() if count}

    monkeypatch.setattr(speculation, "_best", some)
    monkeypatch.setattr(Account, "is_open", True)
    asked = [prompt(i, 20 + i) for i in range(6)]
    plain, drafting = tiny_engine(speculation="off"), tiny_engine(speculation=drafters)
    for temperature, (grammar, _) in itertools.product((0.0, 0.7), KINDS.values()):
        many = [params(grammar, temperature=temperature, seed=seed) for seed in range(6)]
        expected = answers(plain, asked, many)
        for _ in range(3):
            assert answers(drafting, asked, many) == expected


def params(grammar: Grammar | None, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 200, "seed": 3, "grammar": grammar} | changes)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_random_models_keep_to_it(engine: Engine, kind: str, temperature: float) -> None:
    grammar, expression = KINDS[kind]
    changes = {"temperature": temperature, "max_tokens": 1500}
    many = [params(grammar, seed=seed, **changes) for seed in range(6)]
    for ids, _, text in answers(engine, [prompt(i, 20 + i) for i in range(6)], many):
        if len(ids) == 1500:
            assert kind == "lark", "only brackets need not end"
            continue
        assert ids[-1] == EOS
        if expression is None:
            jsonschema.validate(json.loads(text), SCHEMA)
        else:
            assert re.fullmatch(expression, text)


def test_max_tokens_cuts_it(engine: Engine) -> None:
    builder = CompletionBuilder(prompt(1, 9))
    engine.add(prompt(1, 9), params(JSON, max_tokens=5, temperature=0))
    done = [d for _ in range(5) for delta in engine.step() if (d := builder.push(delta))]
    assert done[0].finish_reason == "length" and done[0].text.startswith("{")


def test_what_is_complete_ends(engine: Engine) -> None:
    builder = CompletionBuilder(prompt(1, 9))
    engine.add(prompt(1, 9), params(Literal("ab"), temperature=0))
    done = [d for _ in range(3) for delta in engine.step() if (d := builder.push(delta))]
    assert (done[0].finish_reason, done[0].text) == ("stop", "ab")


COMBINED: dict[str, dict[str, Any]] = {
    "stop": {"stop": (",",)},
    "stop token": {"stop_token_ids": (ord(","),)},
    "log-probs": {"logprobs": 5},
    "filters": {"top_k": 1, "top_p": 0.01, "min_p": 1.0, "typical_p": 0.1},
    "penalties": {"repetition_penalty": 50.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    "bias": {"logit_bias": {EOS: 100, ord("z"): 100, ord("{"): -100}},
    "bad words": {"bad_words": ('"', "{", ":", (EOS,))},
    "min tokens": {"min_tokens": 150},
    "no end": {"ignore_eos": True},
}


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("what", COMBINED)
def test_with_other_parameters_it_has_the_last_word(
    engine: Engine, what: str, temperature: float
) -> None:
    one = params(JSON, temperature=temperature, **COMBINED[what])
    [(ids, logprobs, text)] = answers(engine, [prompt(2, 33)], [one])
    if what in ("stop", "stop token"):
        assert "," not in text
        assert text.startswith("{") and '"name"' in text
        return
    if what == "no end":
        assert len(ids) == 200 and set(ids[-3:]) == {EOS}
    jsonschema.validate(json.loads(text), SCHEMA)
    assert len(logprobs) == (len(ids) if what == "log-probs" else 0)


def test_min_tokens_holds_where_there_is_more_to_say(engine: Engine) -> None:
    one = params(Regex("a*"), min_tokens=30, temperature=0.5)
    [(ids, _, text)] = answers(engine, [prompt(2, 33)], [one])
    assert len(text) >= 30 and len(ids) >= 30


def test_a_stop_text_cuts_within_it(engine: Engine) -> None:
    one = params(Sequence((Literal("one"), Literal(" two"))), stop=(" t",))
    [(_, _, text)] = answers(engine, [prompt(2, 33)], [one])
    assert text == "one"


def test_thoughts_come_before_it(engine: Engine) -> None:
    """They end within a bound, so that a random model's do."""
    thoughts = Sequence((Regex("[a-z ]{0,20}"), Literal("</think>")))
    [(_, _, text)] = answers(engine, [prompt(2, 33)], [params(Sequence((thoughts, JSON)))])
    before, after = text.split("</think>")
    assert len(before) <= 20
    jsonschema.validate(json.loads(after), SCHEMA)
    forever = params(Sequence((Until(Literal("</think>")), JSON)), max_tokens=50)
    [(ids, _, text)] = answers(engine, [prompt(2, 33)], [forever])
    assert len(ids) == 50 and "</think>" not in text


# ---- bits ---------------------------------------------------------------------------------------

PROMPTS = [prompt(1, 40), prompt(1, 97), prompt(2, 5), prompt(1, 64), prompt(3, 33), prompt(4, 70)]
MIXED = [
    params(JSON, temperature=0.9, logprobs=2),
    params(None, temperature=0.8, max_tokens=40, logprobs=2),
    params(KINDS["regex"][0], temperature=1.5, logprobs=0),
    params(JSON, temperature=0, logprobs=1, repetition_penalty=1.3),
    params(None, temperature=0, max_tokens=30, ignore_eos=True, logprobs=1),
    params(KINDS["choice"][0], temperature=1.0, seed=8, logprobs=3),
]


def alone(family: str) -> list[Answer]:
    engine = tiny_engine(family, prefix_cache=False)
    return [answers(engine, [p], [s])[0] for p, s in zip(PROMPTS, MIXED, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_depend_on_nobody_else(family: str) -> None:
    """In a batch, in chunks, with found prefixes, on more threads; and those without a grammar."""
    wanted = alone(family)
    free = [replace(one, grammar=None) for one in MIXED]
    engine = tiny_engine(family, ops=provider(num_threads=3), max_step_tokens=21)
    assert answers(engine, PROMPTS, MIXED) == wanted
    assert answers(engine, PROMPTS, MIXED) == wanted
    others = answers(tiny_engine(family), PROMPTS, free)
    assert [others[i] for i in (1, 4)] == [wanted[i] for i in (1, 4)]


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_outlive_preemption(family: str, every: int) -> None:
    engine = tiny_engine(family, max_step_tokens=40)
    builders = {engine.add(p, s): CompletionBuilder(p) for p, s in zip(PROMPTS, MIXED, strict=True)}
    done, step = {}, 0
    while engine.has_work:
        for delta in engine.step():
            if completion := builders[delta.request_id].push(delta):
                done[delta.request_id] = completion
        running = [i for i in builders if i not in done][1:]
        if running and step % every == 0:
            engine.scheduler.preempt(running[step // every % len(running)])
        step += 1
    assert engine.metrics.preemptions > 3
    assert [(done[i].token_ids, done[i].logprobs, done[i].text) for i in builders] == alone(family)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["step", "step", "preempt", "abort", "add"]), max_size=60))
def test_rows_change_hands(events: list[str]) -> None:
    """Who comes and goes in between changes nothing for the one that is watched."""
    engine = tiny_engine(max_rows=3, num_blocks=14, max_context=300)
    watched = engine.add(PROMPTS[0], MIXED[0])
    builder, others, done = CompletionBuilder(PROMPTS[0]), list[str](), None
    for event in [*events, *["step"] * 500]:
        if event == "add":
            others.append(engine.add(PROMPTS[1], params(JSON, seed=len(others))))
        elif event == "abort" and others:
            engine.abort(others.pop())
        elif event == "preempt" and engine.scheduler.num_running:
            engine.scheduler.preempt(watched)
        for delta in engine.step():
            if delta.request_id == watched and (completion := builder.push(delta)):
                done = completion
            elif delta.finish_reason is not None and delta.request_id in others:
                others.remove(delta.request_id)
        if done:
            break
    assert done is not None
    assert (done.token_ids, done.logprobs, done.text) == alone("llama")[0]


def test_the_oracle_masks_alike() -> None:
    one = params(JSON, temperature=1.0)
    exact = {"kind": "f32", "kv_dtype": "f32"}
    [wanted] = answers(tiny_engine(**exact), [PROMPTS[0]], [one])
    [got] = answers(tiny_engine(ops=provider("ref"), **exact), [PROMPTS[0]], [one])
    assert got[0] == wanted[0]


# ---- what goes wrong ----------------------------------------------------------------------------


def test_what_cannot_be_compiled_is_refused_at_the_door(engine: Engine) -> None:
    with pytest.raises(InputError, match="keywords") as caught:
        engine.add(prompt(1, 3), params(JsonSchema('{"not": {}}')))
    assert caught.value.field == "grammar"
    with pytest.raises(InputError, match="grammar must be one of"):
        SamplingParams(grammar="{}")  # type: ignore[arg-type]
    deep: Grammar = Literal("a")
    for _ in range(2000):
        deep = Sequence((deep,))
    for wrong in (deep, JsonSchema({"type": "object"}), Sequence([Literal("a")])):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="tuples") as caught:
            params(wrong)
        assert caught.value.field == "grammar"
    assert not engine.has_work


def test_a_grammar_that_takes_too_much_ends_its_own_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others of the step go on, to the bit."""
    [wanted] = answers(engine, [PROMPTS[1]], [MIXED[1]])
    real = GrammarMatcher.mask

    def mask(self: GrammarMatcher, into: Any) -> None:
        if len(self._tokens) == 4:
            raise EngineError("The answer's grammar takes too much here.")
        real(self, into)

    monkeypatch.setattr(GrammarMatcher, "mask", mask)
    failing = engine.add(PROMPTS[0], MIXED[0])
    builder, other = CompletionBuilder(PROMPTS[1]), engine.add(PROMPTS[1], MIXED[1])
    ends: dict[str, Any] = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.request_id == other:
                builder.push(delta)
            if delta.finish_reason:
                ends[delta.request_id] = (delta.finish_reason, delta.error)
    assert ends[failing] == ("error", "The answer's grammar takes too much here.")
    assert ends[other][0] != "error" and builder.token_ids == wanted[0]
    engine.scheduler.check()


# ---- real vocabularies --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm(smollm2_gguf: Path) -> Engine:
    return Engine.load(smollm2_gguf, EngineConfig(kv_memory=64 << 20, num_threads=2))


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}


def test_a_real_model_fills_a_form(smollm: Engine) -> None:
    messages = [{"role": "user", "content": "Describe Anna, 31, who likes red, as JSON."}]
    ids = smollm.encode_chat(messages)
    grammar = JsonSchema(json.dumps(PERSON))
    ways = [params(grammar, temperature=t, seed=i) for i, t in enumerate((0.0, 0.7, 1.5, 1.5))]
    got = answers(smollm, [ids] * len(ways), ways)
    for tokens, _, text in got:
        assert tokens[-1] in smollm.tokenizer.eos_ids
        jsonschema.validate(json.loads(text), PERSON)
    assert json.loads(got[0][2])["name"].startswith("Anna")
    assert [answers(smollm, [ids], [way])[0] for way in ways] == got


@pytest.mark.parametrize("model", ["smollm2_gguf", "gemma_gguf"])
def test_texts_of_any_script_are_let_through_in_the_models_own_tokens(
    model: str, request: pytest.FixtureRequest
) -> None:
    """Byte-level BPE, and SentencePiece with tokens for bytes, of which some stand for half a letter."""
    engine = Engine.load(
        request.getfixturevalue(model), EngineConfig(kv_memory=32 << 20, max_context=256)
    )
    tokenizer, size = engine.tokenizer, engine.model_config.vocab_size
    text = '{"k": ["Жук \\" \\n 你好 🙂 \u0301 ﷽ \U000e0041", 1.5e3, {"ü": null}]}'
    ids = tokenizer.encode(text, add_special=False)
    assert tokenizer.decode(ids) == text
    for grammar in (JsonSchema("{}"), Regex("(?s:.*)"), Literal(text)):
        matcher = engine.grammars.matcher(grammar)
        for token in ids:
            mask = np.zeros(-(-size // 32), np.uint32)
            matcher.mask(mask)
            assert mask[token // 32] >> (token % 32) & 1, tokenizer.token_bytes(token)
            matcher.accept([token])
    byte = next(i for i in range(size) if tokenizer.token_bytes(i) == b"\xf0")
    assert not mask[byte // 32] >> (byte % 32) & 1
    engine.close()
