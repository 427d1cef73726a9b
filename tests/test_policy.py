"""What speculation gains on text of a kind, in steps of known cost: copies gain, and nothing costs more than
a set share."""

from __future__ import annotations

import colorsys
import heapq
import inspect
import random
import re
import shlex
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from elinvar.run.drafters.suffix import SuffixDrafter
from oracles import Clock
from policy import Replay, Told, Words, line

DOCS = Path(__file__).resolve().parents[1] / "docs" / "design"
CODE = (
    (colorsys.rgb_to_hsv, "maxc"),
    (textwrap.indent, "predicate"),
    (colorsys.rgb_to_hls, "sumc"),
    (textwrap.dedent, "margin"),
    (shlex.split, "comments"),
    (heapq.merge, "reverse"),
    (heapq.nsmallest, "result"),
    (statistics.fmean, "weights"),
)
words = Words()


def edits(rng: random.Random) -> list[Told]:
    """A function with a name changed, and here and there a word that nobody could know."""
    told: list[Told] = []
    for function, name in CODE:
        code = inspect.getsource(function)
        changed = re.sub(rf"\b{name}\b", "other", code)
        noisy = [rng.randrange(10**6) if rng.random() < 0.02 else w for w in words(changed)]
        told.append((words(code), noisy))
    return told


def letters(rng: random.Random) -> list[Told]:
    """Fields of a letter, behind two examples."""
    names, goods = (
        ("Ada", "Grace", "Alan", "Edsger", "Barbara"),
        ("desk", "lamp", "carpet", "mirror"),
    )

    def letter() -> tuple[str, str]:
        name, good, number = rng.choice(names), rng.choice(goods), rng.randrange(10**6)
        text = f"Under the number {number} I ordered a {good}. It has not come. Yours, {name}\n"
        return (
            text,
            f'{{"customer": "{name}", "item": "{good}", "number": {number}, "open": true}}\n',
        )

    told: list[Told] = []
    for _ in range(8):
        shown = [letter() for _ in range(2)]
        text, fields = letter()
        told.append((words("".join(a + b for a, b in shown) + text), words(fields)))
    return told


def prose(rng: random.Random) -> list[Told]:
    """The rest of a page, behind its beginning."""
    pages = [words(path.read_text()) for path in sorted(DOCS.glob("0*.md"))[:8]]
    return [(page[:100], page[100:500]) for page in pages]


def noise(rng: random.Random) -> list[Told]:
    texts = [[rng.randrange(200) for _ in range(500)] for _ in range(8)]
    return [(text[:100], text[100:]) for text in texts]


Kind = Callable[[random.Random], list[Told]]


def gains(
    monkeypatch: pytest.MonkeyPatch,
    kinds: Sequence[Kind],
    share: float,
    rows: int = 8,
    thought_s: float = 0.0,
) -> list[float]:
    """Of each, one after the other, in a name of its own; thought_s: between two looks at the clock, where
    a step without drafts takes 1. A name decides which tokens share a place of the chances' table, and that
    about some per cent of what short answers gain: means over several."""
    found: list[list[float]] = [[] for _ in kinds]
    for name in NAMES:
        drafters, cost = (lambda rows: [SuffixDrafter(rows)]), line(share, rows)
        replay = Replay(monkeypatch, drafters, cost, Clock(thought_s))
        for number, kind in enumerate(kinds):
            told = kind(random.Random(number))
            parts = [told[at : at + rows] for at in range(0, len(told), rows)]
            space = b"%s %d" % (name, number)
            found[number].append(statistics.fmean(replay.gain(part, space) for part in parts))
    return [statistics.fmean(gains) for gains in found]


NAMES = b"a", b"b", b"c", b"d"
KINDS = edits, letters, prose, noise


@pytest.mark.parametrize(
    ("share", "rows", "least"),
    [
        (0.05, 8, (2.2, 1.2, 0.98, 0.98)),
        (0.065, 8, (1.8, 1.05, 0.98, 0.98)),
        (0.08, 8, (1.45, 1.0, 0.98, 0.98)),
        (0.1, 8, (1.15, 0.9, 0.98, 0.98)),
        (0.1, 1, (2.9, 2.5, 1.1, 0.98)),
    ],
)
def test_copies_gain_and_the_rest_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, share: float, rows: int, least: Sequence[float]
) -> None:
    """Where a token more is a tenth of a step of 8 rows, hardly anything is left to gain; the letters, of some 30
    steps, may then cost three of those that edits gained."""
    found = gains(monkeypatch, KINDS, share, rows)
    assert all(gain >= bound for gain, bound in zip(found, least, strict=True)), found


@pytest.mark.parametrize(
    "order", [KINDS, KINDS[::-1], (noise, edits, noise, letters, prose, edits)]
)
def test_what_came_before_is_no_burden(
    monkeypatch: pytest.MonkeyPatch, order: Sequence[Kind]
) -> None:
    """Also where thinking takes time."""
    found = gains(monkeypatch, order, 0.065, thought_s=0.001)
    least: dict[Kind, float] = {edits: 1.75, letters: 1.03, prose: 0.98, noise: 0.98}
    assert all(gain >= least[kind] for gain, kind in zip(found, order, strict=True)), found


def test_a_form_that_returns_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a template it is learned where values begin, which differ, and where its own words do."""
    replay = Replay(monkeypatch, lambda r: [SuffixDrafter(r)], line(0.08), Clock(0.0))
    first, *_, last = [replay.gain(letters(random.Random(n)), b"us") for n in range(6)]
    assert last > first + 0.05, (first, last)
