"""Drafts from what was said before equal what a plain search finds, and its memory is bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from elinvar.base.plan import PlanItem
from elinvar.ops.suffixes import Suffixes
from elinvar.run.drafters.api import Ask, Seen
from elinvar.run.drafters.suffix import SuffixDrafter
from elinvar.run.rows import Rows

GAP = -1
GRAMS, PLACES, LONGEST = (8, 3, 1), 16, 64
ROWS, WIDTH = 4, 512
MOST_KEPT, MOST_SHARED, MOST_RUNNING = 200, 80, 700


def matches(text: list[int], tail: list[int]) -> list[tuple[int, int]]:
    """Of the longest gram that the tail ends with and that the text has: the latest places behind it,
    and how long each match is."""
    for gram in GRAMS:
        places = [
            at
            for at in range(len(text) - 1, gram - 1, -1)
            if len(tail) >= gram and text[at - gram : at] == tail[-gram:]
        ]
        if places:
            return [(at, common(text[:at], tail)) for at in places[:PLACES]]
    return []


def common(left: list[int], right: list[int]) -> int:
    same = 0
    while same < min(LONGEST, len(left), len(right)) and left[-1 - same] == right[-1 - same]:
        same += 1
    return same


def guess(
    own: list[int],
    others: Sequence[list[int]],
    known: list[int],
    ahead: list[int],
    most: int,
    least: float,
) -> tuple[list[int], list[float]]:
    tail = known[-LONGEST:] + ahead
    found = [(text, *match) for text in (own, *others) for match in matches(text, tail)]
    longest = max((length for *_, length in found), default=0)
    live = [(text, at) for text, at, length in found if length == longest]
    tokens: list[int] = []
    chances: list[float] = []
    while len(tokens) < most:
        nexts = []
        for text, at in live:
            whole = text + ahead + tokens if text is own else text
            nexts.append(whole[at + len(tokens)] if at + len(tokens) < len(whole) else GAP)
        counts = Counter(token for token in nexts if token != GAP)
        if not counts:
            break
        best, often = counts.most_common(1)[0]
        chance = often / len(live) * (1 - 1 / (longest + len(tokens) + 0.6))
        if prod([*chances, chance]) < least:
            break
        chances.append(chance)
        live = [place for place, token in zip(live, nexts, strict=True) if token == best]
        tokens.append(best)
    return tokens, chances


tokens_of = st.one_of(
    st.lists(st.integers(0, 2), max_size=30),
    st.lists(st.integers(0, 2), min_size=1, max_size=3).map(lambda period: period * 12),
)


class Index(RuleBasedStateMachine):
    """Rows that begin, grow, are asked about and end, in three namespaces."""

    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.token_ids = np.zeros((ROWS, WIDTH), np.int32)
        self.index = Suffixes(self.token_ids, MOST_KEPT, MOST_SHARED, MOST_RUNNING)
        self.texts: dict[int, list[int]] = {}
        self.seen: dict[int, int] = {}
        """Rows' tokens that are looked into."""
        self.spaces: dict[int, bytes] = {}
        self.corpora: dict[bytes, tuple[list[int], list[int]]] = {}
        """Young and old; the one asked last at the end."""

    @rule(target=rows, space=st.sampled_from([b"", b"a", b"b\0"]), prompt=tokens_of)
    def begin(self, space: bytes, prompt: list[int]) -> int:
        row = next((row for row in range(ROWS) if row not in self.texts), -1)
        if row >= 0:
            self.texts[row], self.spaces[row], self.seen[row] = [], space, 0
            self.index.begin(row, space)
            self.grow(row, [7, *prompt])
        return row

    @rule(row=rows, tokens=tokens_of)
    def grow(self, row: int, tokens: list[int]) -> None:
        if row in self.texts:
            text = self.texts[row]
            text += tokens[: WIDTH - len(text)]
            self.token_ids[row, : len(text)] = text

    @rule(
        row=rows,
        ahead=st.lists(st.integers(0, 2), max_size=3),
        most=st.integers(1, 20),
        least=st.sampled_from([0.0, 0.02, 0.31]),
    )
    def propose(self, row: int, ahead: list[int], most: int, least: float) -> None:
        if row not in self.texts:
            return
        text, space = self.texts[row], self.spaces[row]
        if sum(self.seen.values()) - self.seen[row] + len(text) <= MOST_RUNNING:
            self.seen[row] = len(text)
        own = text if self.seen[row] == len(text) else []
        others: Sequence[list[int]] = ()
        if space in self.corpora:
            others = self.corpora[space] = self.corpora.pop(space)
        tokens, chances = guess(own, others, text, ahead, most, least)
        found = self.index.propose([(row, len(text), most)], least, ahead)
        assert found == [(tokens, pytest.approx(chances))]

    @rule(row=consumes(rows), data=st.data())
    def forget(self, row: int, data: st.DataObject) -> None:
        if row not in self.texts:
            return
        text, space = self.texts.pop(row), self.spaces.pop(row)
        del self.seen[row]
        start = data.draw(st.integers(0, len(text)))
        self.index.forget(row, start, len(text))
        if start < len(text):
            self.keep(space, text[start:][-(MOST_SHARED // 2 - 1) :])
        self.token_ids[row] = 9

    def keep(self, space: bytes, tokens: list[int]) -> None:
        young, old = self.corpora.pop(space, ([], []))
        if len(young) + len(tokens) + 1 > MOST_SHARED // 2:
            young, old = [], young
        self.corpora[space] = [*young, *tokens, GAP], old
        while sum(len(part) for corpus in self.corpora.values() for part in corpus) > MOST_KEPT:
            del self.corpora[next(iter(self.corpora))]

    @invariant()
    def sizes(self) -> None:
        kept = [len(part) for corpus in self.corpora.values() for part in corpus]
        assert self.index.num_kept == sum(kept) <= MOST_KEPT
        assert self.index.num_running == sum(self.seen.values()) <= MOST_RUNNING


TestIndex = Index.TestCase
TestIndex.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def drafter_of(texts: Sequence[list[int]], spaces: Sequence[bytes]) -> SuffixDrafter:
    rows = Rows(len(texts), WIDTH, [])
    rows.namespaces[:] = spaces
    for row, text in enumerate(texts):
        rows.token_ids[row, : len(text)] = text
    return SuffixDrafter(rows)


def test_answers_are_for_their_namespace_alone() -> None:
    prompt, answer = [1, 2, 3], [10, 11, 12, 13]
    drafter = drafter_of(
        [prompt + answer, [9, 10, 11], [9, 10, 11], [9, 1, 2]], [b"a", b"a", b"b", b"a"]
    )
    drafter.observe(Seen([PlanItem("r", 0, 0, 3, True, [])], [answer[:1]], None, [0]))
    assert drafter.propose([Ask(0, 4, 8)])[0].tokens == []
    item = PlanItem("r", 0, 3, 4, True, [], num_drafts=3)
    drafter.observe(Seen([item], [answer[1:]], None, [0]))
    drafter.forget(0)
    asks = [Ask(row, 3, 8) for row in (1, 2, 3)]
    # Of the prompt nothing is shared, and of the answer nothing with others.
    assert [guess.tokens for guess in drafter.propose(asks)] == [[12, 13], [], []]


def test_a_loop_goes_on_past_the_end() -> None:
    drafter = drafter_of([[5, 1, 2, 1, 2]], [b""])
    (guess,) = drafter.propose([Ask(0, 5, 7)])
    assert guess.tokens == [1, 2, 1, 2, 1, 2, 1]
    assert guess.chances == sorted(guess.chances), "a match grows with what is accepted"


def test_bytes_of_a_token() -> None:
    """As the module says, at any number of them."""
    width = 40_000
    token_ids = np.random.default_rng(3).integers(0, 50_000, (1, width), dtype=np.int32)
    for count in (1000, 10_000, width):
        index = Suffixes(token_ids, 1 << 20, 1 << 20, 1 << 20)
        index.begin(0, b"")
        index.propose([(0, count, 8)])
        assert index.bytes <= 100 * count
