"""What a grammar library takes and understands (docs/design/030): the time of a token's mask and of
compiling, and JSON Schemas refused, too strict and too lax on the official test suite.

    python benchmarks/grammars.py masks smollm2-135m gemma3-270m
    python benchmarks/grammars.py steps smollm2-135m
    python benchmarks/grammars.py coverage PATH/json/tests/draft2020-12 PATH/json/tests/draft7

The suite comes with the source package of `jsonschema` (pip download --no-binary jsonschema --no-deps
jsonschema). xgrammar takes part where it can be imported. Times are those of a CPU, in one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from elinvar.base.config import EngineConfig
from elinvar.base.grammar import JsonSchema
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.sources import resolve


class Matching(Protocol):
    def mask(self, into: np.ndarray) -> None: ...

    def accept(self, token: int) -> bool: ...

    def ended(self) -> bool: ...


class Guidance:
    """llguidance. Raises ValueError for a schema that it does not take."""

    name = "llguidance"

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], ends: Sequence[int]
    ) -> None:
        import llguidance

        class Vocabulary:
            is_tokenizer_wrapper = True
            bos_token_id, eos_token_id = None, ends[0]
            special_token_ids = special

            def __call__(self, text: str) -> list[int]:
                return list(text.encode())  # asked for, never called: masks alone are measured

        Vocabulary.tokens = tokens  # type: ignore[attr-defined]
        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(Vocabulary(), eos_token=list(ends))

    def __call__(self, schema: str) -> Callable[[], Matching]:
        grammar = '%llguidance {"no_forcing": true}\nstart: %json ' + schema
        compiled = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if compiled.is_error():
            raise ValueError(compiled.get_error())
        return lambda: _Guided(compiled.deep_copy())


class _Guided:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, into: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(into.ctypes.data, into.nbytes)

    def accept(self, token: int) -> bool:
        return bool(self._matcher.try_consume_tokens([token]))

    def ended(self) -> bool:
        return bool(self._matcher.is_accepting())


class XGrammar:
    """The same of xgrammar."""

    name = "xgrammar"

    def __init__(
        self, tokens: Sequence[bytes], special: Sequence[int], ends: Sequence[int]
    ) -> None:
        import xgrammar

        self._library, self._ends = xgrammar, ends
        hidden = set(special)
        plain = [b"" if i in hidden else token for i, token in enumerate(tokens)]
        info = xgrammar.TokenizerInfo(plain, stop_token_ids=list(ends))
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def __call__(self, schema: str) -> Callable[[], Matching]:
        try:
            compiled = self._compiler.compile_json_schema(schema, strict_mode=False)
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        make = partial(self._library.GrammarMatcher, compiled, terminate_without_stop_token=True)
        return lambda: _X(make())


class _X:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, into: np.ndarray) -> None:
        import torch

        self._matcher.fill_next_token_bitmask(torch.from_numpy(into.view(np.int32))[None])

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def ended(self) -> bool:
        return bool(self._matcher.is_completed())


LIBRARIES = [Guidance, XGrammar] if importlib.util.find_spec("xgrammar") else [Guidance]

# ---- the time of masks --------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "born": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 8},
        "height": {"type": "number", "minimum": 0, "maximum": 3},
        "eyes": {"enum": ["brown", "green", "blue", "grey"]},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": ["integer", "null"]}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "born", "tags", "height", "eyes", "address"],
    "additionalProperties": False,
}
ANSWER = {
    "name": 'Ada "Countess" Lovelace-Грин',
    "born": "1815-12-10",
    "tags": ["mathematics", "the analytical engine", "poetry \U0001f642"],
    "height": 1.65,
    "eyes": "brown",
    "address": {"street": "12 St James's Square\nLondon", "zip": None},
}
MANY = {
    "type": "object",
    "properties": {f"field_{i}": {"type": ["string", "number", "null"]} for i in range(200)},
    "required": [f"field_{i}" for i in range(200)],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
LEAF: dict[str, Any] = {"value": -7, "children": []}
CASES = {
    "any JSON": ({}, ANSWER),
    "a person": (PERSON, ANSWER),
    "200 fields": (MANY, {f"field_{i}": f"text {i}" if i % 2 else i / 7 for i in range(200)}),
    "a tree": (TREE, {"value": 1, "children": [{"value": 2, "children": [LEAF, LEAF]}, LEAF]}),
}


def masks(models: Sequence[str]) -> None:
    print(
        "| vocabulary | library | made in s | grammar | compiled in ms | mask us p50 | p99 | max |"
    )
    for model in models:
        checkpoint = open_checkpoint(resolve(model))
        tokenizer = load_tokenizer(checkpoint, cache_root())
        tokens = tokenizer.spellings(tokenizer.vocab_size)
        for library in LIBRARIES:
            began = time.process_time()
            compiler = library(tokens, sorted(tokenizer.special_ids), sorted(tokenizer.eos_ids))
            made = time.process_time() - began
            for name, (schema, answer) in CASES.items():
                compiled, times = _mask_times(compiler, tokenizer, json.dumps(schema), answer)
                rest = [t * 1e6 for t in times]
                p50, p99 = np.percentile(rest, [50, 99])
                print(
                    f"| {len(tokens)} | {library.name} | {made:.2f} | {name} | {compiled * 1e3:.1f} "
                    f"| {p50:.0f} | {p99:.0f} | {max(rest):.0f} |"
                )


def _mask_times(
    compiler: Any, tokenizer: Tokenizer, schema: str, answer: Any
) -> tuple[float, list[float]]:
    """Of compiling, and of each mask on the way through the answer, in seconds."""
    began = time.process_time()
    start = compiler(schema)
    compiled = time.process_time() - began
    into = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    ids = tokenizer.encode(json.dumps(answer, ensure_ascii=False), add_special=False)
    matching, times = start(), []
    for token in ids:
        began = time.process_time()
        matching.mask(into)
        times.append(time.process_time() - began)
        assert into[token // 32] >> (token % 32) & 1, tokenizer.token_bytes(token)
        matching.accept(token)
    assert matching.ended()
    return compiled, times


# ---- what a step costs more --------------------------------------------------------------------


def steps(model: str, rows: Sequence[int]) -> None:
    """Decode steps of answers that none, or all, keep to the form of a person."""
    engine = Engine.load(model, EngineConfig(max_rows=max(rows), prefix_cache=False))
    prompt = engine.tokenizer.encode("A form, filled with great care and in every detail: ")
    print("| rows | ms a step, free | with a grammar |")
    for count in rows:
        times = {}
        for grammar in (None, JsonSchema(json.dumps(PERSON))):
            params = SamplingParams(
                max_tokens=64, temperature=0.8, seed=1, grammar=grammar, ignore_eos=True
            )
            for _ in range(count):
                engine.add(prompt, params)
            engine.step()
            spent = []
            while engine.has_work:
                began = time.perf_counter()
                engine.step()
                spent.append(time.perf_counter() - began)
            times[grammar is None] = float(np.median(spent)) * 1e3
        print(f"| {count} | {times[True]:.2f} | {times[False]:.2f} |")


# ---- what schemas are understood ----------------------------------------------------------------


def coverage(folders: Sequence[Path]) -> None:
    print(
        "| suite | library | schemas | refused | tests | valid, yet kept from | invalid, yet let |"
    )
    # A token is a byte.
    vocabulary = [bytes([i]) for i in range(256)], [], [256]
    for folder in folders:
        for library in LIBRARIES:
            compiler = library([*vocabulary[0], b"<end>"], [256], [256])
            found, details = _suite(compiler, folder)
            print(
                f"| {folder.name} | {library.name} | {found['schemas']} | {found['refused']} "
                f"| {found['tests']} | {found['strict']} | {found['lax']} |"
            )
            for kind in ("refused", "strict", "lax"):
                told = ", ".join(f"{k} {n}" for k, n in sorted(details[kind].items()))
                print(f"    {kind}: {told}")


def _suite(compiler: Any, folder: Path) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Counts, and by kind of failure those of each file."""
    found: Counter[str] = Counter()
    details: dict[str, Counter[str]] = {k: Counter() for k in ("refused", "strict", "lax")}
    for path in sorted(folder.glob("*.json")):
        for case in json.loads(path.read_text()):
            found["schemas"] += 1
            try:
                start = compiler(json.dumps(case["schema"]))
            except ValueError:
                found["refused"] += 1
                details["refused"][path.stem] += 1
                continue
            for test in case["tests"]:
                found["tests"] += 1
                taken = any(_takes(start(), text) for text in _spellings(test["data"]))
                if taken != test["valid"]:
                    kind = "strict" if test["valid"] else "lax"
                    found[kind] += 1
                    details[kind][path.stem] += 1
    return found, details


def _takes(matching: Matching, text: str) -> bool:
    return all(matching.accept(byte) for byte in text.encode()) and matching.ended()


def _spellings(value: Any) -> Iterator[str]:
    """The value as JSON with its members in some orders: libraries fix one."""
    for one in itertools.islice(_orders(value), 5000):
        yield json.dumps(one, ensure_ascii=False, separators=(",", ":"))


def _orders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for names in itertools.permutations(value):
            for values in itertools.product(*(list(_orders(value[n])) for n in names)):
                yield dict(zip(names, values, strict=True))
    elif isinstance(value, list):
        yield from map(list, itertools.product(*(list(_orders(v)) for v in value)))
    else:
        yield value


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("masks").add_argument("models", nargs="+")
    stepping = commands.add_parser("steps")
    stepping.add_argument("model")
    stepping.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    commands.add_parser("coverage").add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args()
    if options.command == "masks":
        masks(options.models)
    elif options.command == "steps":
        steps(options.model, options.rows)
    else:
        coverage(options.folders)


if __name__ == "__main__":
    main()
