"""Grammars: what each kind lets through, what is refused, and that masks follow from tokens alone."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elinvar.base.errors import EngineError, InputError
from elinvar.base.grammar import (
    Anything,
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
from elinvar.engine.grammars import LIMITS, Compiled, GrammarMatcher, Grammars

END, CALL, THINK = 256, 257, 258
PIECES = ["</", "think>", "}<", "ab", '"}', "é", "\n", ' "']
CONTROL = [b"<end>", b"<call>", b"</think>"]
SPELLINGS = [*(bytes([i]) for i in range(256)), *CONTROL, *(piece.encode() for piece in PIECES)]
NUM_TOKENS = len(SPELLINGS)


class Vocabulary:
    """Bytes, three control tokens, and some longer pieces of text."""

    eos_ids = frozenset([END])
    special_ids = frozenset([END, CALL, THINK])

    def encode(self, text: str, add_special: bool) -> list[int]:
        return [259 + PIECES.index(text)] if text in PIECES else list(text.encode())

    def spellings(self, count: int) -> list[bytes]:
        return SPELLINGS[:count]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    vocabulary: Any = Vocabulary()
    return Grammars(vocabulary, NUM_TOKENS)


def allowed(matcher: GrammarMatcher) -> set[int]:
    mask = np.zeros(-(-NUM_TOKENS // 32), np.uint32)
    matcher.mask(mask)
    return set(np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0].tolist())


def takes(grammars: Grammars, grammar: Grammar, *answer: str | int) -> bool:
    """Whether an answer, of bytes and tokens, may be written and end."""
    matcher = grammars.matcher(grammar)
    parts = [[part] if isinstance(part, int) else list(part.encode()) for part in answer]
    for token in itertools.chain(*parts):
        if token not in allowed(matcher):
            return False
        matcher.accept([token])
    return END in allowed(matcher)


SCHEMA = JsonSchema('{"type": "object", "properties": {"a": {"type": "integer"}}}')
THEN = Sequence((Until(Literal("</t>")), SCHEMA))


@pytest.mark.parametrize(
    ("grammar", "answers", "others"),
    [
        (SCHEMA, [['{"a": 1}'], ["{}"], ['{\n  "a":1}']], [["{"], ['{"a": "x"}'], ["{} "], [" {}"]]),
        (JsonSchema("true"), [["[1, null]"], ['"x"'], ["-0.5e3"]], [["nul"], ["01"]]),
        (Regex(r"a/[b\n]+\d{2}|x"), [["a/b\n12"], ["x"]], [["a/12"], ["ax"], ["a/b٣٤"]]),
        (Regex("^ab$"), [["ab"], [259 + 3]], [["a"], ["abb"]]),
        (Regex(""), [[""]], [["a"]]),
        (Literal("é/\\\"\n"), [["é/\\\"\n"]], [["é"], [""]]),
        (Anything(), [[""], ["¿any\x00thing"]], [[CALL]]),
        (Choice((Literal("yes"), Literal("no"))), [["yes"], ["no"]], [["maybe"], ["yesno"], [""]]),
        (Repeat(Literal("ab"), 1, 2), [["ab"], ["abab"]], [[""], ["ababab"]]),
        (Repeat(SCHEMA, 0, 2), [[""], ["{}{}"]], [["{}{}{}"]]),
        (Lark('start: "a" start "b" | "c"'), [["aacbb"]], [["aacb"]]),
        (Lark('start: "<" %json {"type": "null"} ">"'), [["<null>"]], [["<1>"]]),
        (Lark('root ::= "a" root "b" | [0-9]+'), [["a12b"]], [["a12"]]),
        (Special("<call>"), [[CALL]], [["<call>"], [""]]),
        (Special("think>"), [["think>"], [260]], [["think"]]),
        (Until(Special("think>")), [["a think>"], [260]], [["think> think>"]]),
        (Literal("<call>{"), [[CALL, "{"], ["<call>{"]], [["<call>"]]),
        (Until(Literal("aba")), [["aba"], ["xxaba"], ["abbaba"]], [["ababa"], ["ab"], ["abax"]]),
        (Until(Literal("")), [[""]], [["a"]]),
        (Until(Special("<call>")), [[CALL], ["text", CALL]], [["<call>"], [CALL, CALL]]),
        (THEN, [["hm</t>{}"], ["</t>{}"], ["<", 259, "t>{}"]], [["hm{}"], ["</t></t>{}"]]),
        (
            Sequence((Until(Literal("</think>")), SCHEMA)),
            [["hm", THINK, "{}"], ["hm</think>{}"], ["hm", 259, 260, "{}"]],
            [["hm", THINK, THINK], ["hm</think>", THINK]],
        ),
        (
            Repeat(Sequence((Special("<call>"), SCHEMA, Literal("\n"))), 1),
            [[CALL, "{}\n"], [CALL, "{}\n", CALL, '{"a": 2}\n']],
            [["{}"], [CALL, "{}"]],
        ),
        (
            Choice((Sequence((Special("<call>"), SCHEMA)), Anything())),
            [[CALL, "{}"], ["words"], [""]],
            [["words", CALL, "{}"]],
        ),
        (
            Choice(tuple(JsonSchema(json.dumps({"const": [name]})) for name in ("x", "y"))),
            [['["x"]'], ['["y"]']],
            [['["z"]']],
        ),
        (Sequence((Regex("a*"), Literal("ab"))), [["ab"], ["aaab"]], [["b"]]),
        (Sequence((Literal("{"), SCHEMA, Literal("}"))), [["{{}}"], ["{{", '}', "}"]], [["{{}"]]),
        (Sequence(()), [[""]], [["a"]]),
    ],
)  # fmt: skip
def test_a_grammar_lets_through_its_texts_and_no_others(
    grammars: Grammars, grammar: Grammar, answers: list[Any], others: list[Any]
) -> None:
    assert [one for one in answers if not takes(grammars, grammar, *one)] == []
    assert [one for one in others if takes(grammars, grammar, *one)] == []


def regular(depth: int) -> st.SearchStrategy[tuple[Grammar, str]]:
    """A grammar over a and b, and the expression that it is in Python's words."""
    words = st.text("ab", max_size=3)
    leaves = st.one_of(
        words.map(lambda w: (Literal(w), w)),
        st.sampled_from(["a*", "b+", "(ab)?", "[ab]", "a|bb"]).map(
            lambda r: (Regex(r), f"(?:{r})")
        ),
        words.filter(bool).map(lambda w: (Until(Literal(w)), f"(?:(?:(?!{w})[ab])*{w})")),
        st.just((Anything(), "[ab]*")),
    )
    if depth == 0:
        return leaves
    inner = st.lists(regular(depth - 1), min_size=1, max_size=3)
    return st.one_of(
        leaves,
        inner.map(
            lambda parts: (
                Sequence(tuple(p for p, _ in parts)),
                "".join(f"(?:{r})" for _, r in parts),
            )
        ),
        inner.map(
            lambda parts: (
                Choice(tuple(p for p, _ in parts)),
                "(?:" + "|".join(f"(?:{r})" for _, r in parts) + ")",
            )
        ),
        st.tuples(regular(depth - 1), st.sampled_from([(0, None), (1, 2), (2, 2)])).map(
            lambda given: (
                Repeat(given[0][0], *given[1]),
                f"(?:{given[0][1]}){{{given[1][0]},{'' if given[1][1] is None else given[1][1]}}}",
            )
        ),
    )


@settings(max_examples=60, deadline=None)
@given(regular(2))
def test_regular_parts_mean_together_what_an_expression_does(
    grammars: Grammars, given_: tuple[Grammar, str]
) -> None:
    grammar, expression = given_
    pattern = re.compile(expression)
    for length in range(5):
        for text in map("".join, itertools.product("ab", repeat=length)):
            assert takes(grammars, grammar, text) == bool(pattern.fullmatch(text)), text


# ---- JSON Schemas -------------------------------------------------------------------------------

SCALARS = st.sampled_from(
    [
        {"type": "integer", "minimum": -3, "maximum": 120},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "integer", "multipleOf": 7},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[a-c]{2,3}$"},
        {"type": "string", "format": "date"},
        {"type": ["null", "boolean"]},
        {"enum": ["x", 1, None, [1, "é"], {"k": False}]},
        {"const": '\\"/\u2028'},
    ]
)
SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(
            lambda items, least: {
                "type": "array",
                "items": items,
                "minItems": least,
                "maxItems": 3,
            },
            inner,
            st.integers(0, 2),
        ),
        st.builds(
            lambda names, values, needed: {
                "type": "object",
                "properties": dict(zip(names, values, strict=False)),
                "required": names[: min(needed, len(values))],
                "additionalProperties": False,
            },
            st.lists(st.sampled_from(["a", "b", "a b", "ü", '"']), unique=True, max_size=3),
            st.lists(inner, min_size=3, max_size=3),
            st.integers(0, 3),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda all_: {"anyOf": all_}),
    ),
    max_leaves=5,
)


def wander(matcher: GrammarMatcher, seed: int) -> bytes | None:
    """An answer of tokens drawn from what is allowed, which tends to an end; None: it found none."""
    rng = np.random.default_rng(seed)
    text = b""
    for _ in range(600):
        tokens = sorted(allowed(matcher))
        closing = [t for t in tokens if SPELLINGS[t][-1:] in b'"}],1']
        token = int(rng.choice(closing if closing and rng.random() < 0.4 else tokens))
        if token == END or (END in tokens and rng.random() < 0.3):
            return text
        matcher.accept([token])
        text += SPELLINGS[token]
    return None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SCHEMAS, st.integers(0, 2**32))
def test_whatever_is_drawn_is_valid(grammars: Grammars, schema: Any, seed: int) -> None:
    text = wander(grammars.matcher(JsonSchema(json.dumps(schema))), seed)
    if text is not None:
        jsonschema.validate(json.loads(text), schema)


@settings(max_examples=40, deadline=None)
@given(SCHEMAS, st.integers(0, 2**32), st.data())
def test_masks_follow_from_tokens_alone(
    grammars: Grammars, schema: Any, seed: int, data: st.DataObject
) -> None:
    """However the tokens came: with a mask after each, or some at once, as after a preemption."""
    grammar, rng = JsonSchema(json.dumps(schema)), np.random.default_rng(seed)
    one, tokens, masks = grammars.matcher(grammar), list[int](), list[set[int]]()
    while len(tokens) < 40:
        masks.append(allowed(one))
        tokens.append(int(rng.choice(sorted(masks[-1]))))
        one.accept(tokens[-1:])
        if tokens[-1] == END:
            break
    cut = data.draw(st.integers(0, len(tokens) - 1))
    fresh: Any = Vocabulary()
    for store in (grammars, Grammars(fresh, NUM_TOKENS)):
        other = store.matcher(grammar)
        other.accept(tokens[:cut])
        assert allowed(other) == masks[cut]


# ---- what is refused ----------------------------------------------------------------------------


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def parts(depth: int) -> Grammar:
    return Literal("a") if depth == 0 else Sequence((parts(depth - 1),))


REFUSED = {
    "lookahead": (Regex("(?=a)b"), "look-around"),
    "backreference": (Regex(r"(a)\1"), "backreferences"),
    "open bracket": (Regex("(a"), "unclosed group"),
    "no text fits": (Regex(r"[^\s\S]"), "no text"),
    "boundary": (Regex(r"a\b"), "lookarounds"),
    "deep brackets": (Regex("(" * 5000 + "a" + ")" * 5000), "nest"),
    "states": (
        Lark("start: R\nR: /(?s:.*)a.{15}/ & /(?s:.*)b.{17}/ & ~/(?s:.*)c.{14}/"),
        "fuel exhausted",
    ),
    "long": (Regex("a" * 200_000), "131072 characters"),
    "unknown token": (Special("<none>"), "no token '<none>'"),
    "deep parts": (parts(100), "32 in one another"),
    "many parts": (Choice((Literal("a"),) * 20_000), "10000 parts"),
    "no choice": (Choice(()), "at least one"),
    "repeated": (Repeat(Literal("a"), 0, 10**9), "100000 times"),
    "backwards": (Repeat(Literal("a"), 3, 2), "3 to 2"),
    "keyword": (JsonSchema('{"type": "array", "uniqueItems": true}'), 'keywords "uniqueItems"'),
    "format": (JsonSchema('{"type": "string", "format": "iban"}'), "Unknown format: iban"),
    "type": (JsonSchema('{"type": "text"}'), "Invalid type: text"),
    "remote": (JsonSchema('{"$ref": "http://localhost/x"}'), "localhost"),
    "false": (JsonSchema("false"), "A schema is an object, got false"),
    "broken": (JsonSchema('{"type":'), "not JSON"),
    "infinite": (JsonSchema('{"maximum": Infinity}'), "Infinity is no number"),
    "library's": (
        JsonSchema('{"x-guidance": {"lenient": true}, "uniqueItems": true}'),
        "x-guidance",
    ),
    "cycle": (JsonSchema('{"$ref": "#"}'), "no text"),
    "deep": (JsonSchema(nested(90)), "60 deep"),
    "deeper": (JsonSchema(nested(10_000)), "131072|not JSON|60 deep"),
    "properties": (
        JsonSchema(json.dumps({"properties": {f"p{i}": {} for i in range(3000)}})),
        "1000 properties",
    ),
    "remainders": (JsonSchema('{"type": "integer", "multipleOf": 1000003}'), "multipleOf"),
    "half a character": (Regex("\ud800"), "surrogate"),
    "half a token": (Special("<\udfff>"), "surrogate"),
    "no text": (Regex(5), "string"),  # type: ignore[arg-type]
    "remainders of round numbers": (JsonSchema('{"multipleOf": 1e9}'), "multipleOf"),
    "remainders together": (
        JsonSchema(json.dumps({"allOf": [{"multipleOf": n} for n in (0.97, 1.01, True, 10**90)]})),
        "common multiple",
    ),
    "enum": (JsonSchema(json.dumps({"enum": list(range(60_000))})), "characters|values|too big"),
    "products": (
        JsonSchema(
            json.dumps(
                {
                    "allOf": [
                        {"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(8)]}
                        for i in range(12)
                    ]
                }
            )
        ),
        "too large",
    ),
    "lark": (Lark("start: ("), "grammar is not supported"),
    "no start": (Lark('other: "a"'), "start"),
    "endless": (Lark("start: start"), "no text"),
    "temperature": (Lark("start: a\na[temperature=2]: /b/"), "temperature"),
    "deep lark": (Lark("start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "nested"),
    "inline remainders": (
        Lark('start: "a" j\nj: %json {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}'),
        "common multiple",
    ),
    "inline, hidden": (Lark('start: %json // here\n {"multipleOf": 9973}'), "follows %json"),
    "inline options": (Lark('start: %json {"x-guidance": {"lenient": true}}'), "x-guidance"),
    "gbnf": (Lark("root ::= ("), "GBNF"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused_in_a_sentence(grammars: Grammars, name: str) -> None:
    grammar, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason) as caught:
        grammars.compile(grammar)
    assert caught.value.field == "grammar"
    assert len(str(caught.value)) < 500


def test_without_an_end_token_there_is_no_end() -> None:
    class Endless(Vocabulary):
        eos_ids = frozenset[int]()

    vocabulary: Any = Endless()
    with pytest.raises(InputError, match="no end token"):
        Grammars(vocabulary, NUM_TOKENS).compile(Literal("a"))


def test_grammars_are_compiled_once_and_forgotten_when_nobody_has_them() -> None:
    vocabulary: Any = Vocabulary()
    store = Grammars(vocabulary, NUM_TOKENS)
    held = store.compile(Literal("held"))
    first = store.compile(Literal("0"))
    for i in range(1, 100):
        store.compile(Literal(str(i)))
    assert store.compile(Literal("held")) is held
    assert store.compile(Literal("99")) is store.compile(Literal("99"))
    del first
    assert store.find(Literal("0")) is None


def test_a_shared_lexer_that_is_full_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others of the same grammar found out must not end an answer."""
    monkeypatch.setitem(LIMITS, "max_lexer_states", 400)
    vocabulary: Any = Vocabulary()
    store = Grammars(vocabulary, NUM_TOKENS)
    grammar, errors, renewed = Regex("(a|b)*a(a|b){8}c"), 0, 0
    renew = Compiled.renew

    def counted(self: Compiled) -> Any:
        nonlocal renewed
        renewed += 1
        return renew(self)

    monkeypatch.setattr(Compiled, "renew", counted)
    for seed in range(60):
        matcher, rng = store.matcher(grammar), np.random.default_rng(seed)
        for _ in range(40):
            try:
                tokens = sorted(allowed(matcher) - {ord("c")})
            except EngineError:
                errors += 1
                break
            matcher.accept([int(rng.choice(tokens))])
    assert errors == 0 and renewed > 0


@pytest.mark.parametrize("source", [r"[0-9]{1,3}", r"(ab){1,3}\|\d\d", r"a?b"])
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_what_was_taken_back_was_never_there(grammars: Grammars, source: str, seed: int) -> None:
    """Ends, too, where they may come and where nothing else can."""
    rng, matcher, known = random.Random(seed), grammars.matcher(Regex(source)), list[int]()
    for _ in range(20):
        ahead = list[int]()
        while len(ahead) < 4 and (known + ahead)[-1:] != [END]:
            ahead.append(rng.choice(sorted(allowed(matcher))))
            matcher.accept(ahead[-1:])
            allowed(matcher)
        kept = rng.randrange(len(ahead) + 1)
        if END in ahead[:kept]:
            break
        if kept < len(ahead):
            matcher.rewind(len(ahead) - kept)
        known += ahead[:kept]
        fresh = grammars.matcher(Regex(source))
        fresh.accept(known)
        assert allowed(matcher) == allowed(fresh)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(SCHEMAS, st.integers(0, 2**32))
def test_a_matcher_takes_what_may_follow(grammars: Grammars, schema: Any, seed: int) -> None:
    """As many as it says are valid, and is then where it would be had it been given them."""
    rng, taking = np.random.default_rng(seed), grammars.matcher(JsonSchema(json.dumps(schema)))
    asked = taking.copy()
    for _ in range(30):
        here = sorted(allowed(asked))
        if not here:
            break
        token = int(rng.choice(here)) if rng.random() < 0.8 else int(rng.integers(NUM_TOKENS))
        count = asked.num_valid([token])
        assert taking.take([token]) == count
        asked.accept([token][:count])
        assert allowed(taking) == allowed(asked)
