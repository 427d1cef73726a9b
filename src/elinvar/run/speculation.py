"""Speculation: who drafts for a step, and how many drafts are verified (docs/speculation.md).

A draft is accepted where it is the token that the target samples, with the same noise, masks and
penalties: nothing here changes an answer, only how many steps it takes. Each step takes the number of
drafts that promises the most tokens a second, down to none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile

from elinvar.base.batch import DecodeBatch, ForwardBatch
from elinvar.base.drafts import DraftStats
from elinvar.base.plan import PlanItem, RowStart, StepOutput
from elinvar.ops.api import F32
from elinvar.ops.chances import Behind, best_counts
from elinvar.run.costs import Costs, Curve
from elinvar.run.drafters.api import Ask, Drafter, Guess, Seen
from elinvar.run.grammar import Masks
from elinvar.run.rows import Rows
from elinvar.run.sources import Source

log = logging.getLogger(__name__)

MARGIN = 1.02
"""What drafts must promise to be worth their noise."""
LENGTHS = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32
"""Of chains that are thought of before they are made."""
LEAST_S = 1e-9
"""That a step takes, whatever clocks say."""
HICCUP = 1.5
"""Times what a step was thought to take, beyond which the machine is to blame and no drafter."""
PEEK = 8
"""Drafts that are thought of while a step is under way."""
SLOW_DOWN = 0.9
"""Of the best number of drafts so far: when more of them promise less than that, no one is looked for."""


@dataclass(slots=True)
class _Chain:
    """What may be verified of a row."""

    source: Source
    ask: Ask
    behind: Behind
    guess: Guess
    """Also what is too unlikely to be verified: it is learned from."""
    chances: list[float]
    """Of each draft that may be verified: that it and those before it are accepted."""

    @property
    def promised(self) -> float:
        """Tokens, if all are verified."""
        return sum(self.chances)


@dataclass(slots=True)
class _Step:
    """A step that is being computed, whose drafts are counted."""

    began: float
    chains: dict[int, _Chain] = field(default_factory=dict)
    """By the index of the item."""
    proposed_s: dict[Source, float] = field(default_factory=dict)
    num_drafts: int = 0
    hopeful: set[Source] = field(default_factory=set)
    """For whom the step before was waited for, where it need not have been."""
    expected_s: float = 0.0
    """That it takes with these drafts."""
    chosen_s: float = 0.0
    """Seconds until it was known what to verify."""


class Speculator:
    """Without drafters it does nothing."""

    def __init__(
        self, rows: Rows, masks: Masks | None, drafters: Sequence[Drafter], vocab_size: int
    ) -> None:
        self._rows, self._masks, self._vocab_size = rows, masks, vocab_size
        self._sources = [Source(drafter) for drafter in drafters]
        self._costs = Costs()
        self._step: _Step | None = None
        self._hopeful: set[Source] = set()
        """As the next step's."""
        self._observed_s = 0.0
        """Seconds of this step in which drafters looked at what came."""

    @property
    def stats(self) -> list[DraftStats]:
        return [source.stats for source in self._sources]

    def reads_hidden(self, items: Sequence[PlanItem]) -> bool:
        """Whether a drafter wants the states of some of their tokens."""
        return any(source.reads(item.row) for source in self._sources for item in items)

    def start(self, started: RowStart) -> None:
        """The row is this request's from now on."""
        self.forget([started.row])
        for source in self._sources:
            source.start(started.row)

    def forget(self, rows: Sequence[int]) -> None:
        for source in self._sources.copy():
            for row in rows:
                try:
                    source.forget(row)
                except Exception:
                    self._switch_off(source)
                    break

    def close(self) -> None:
        for source in self._sources:
            close = getattr(source.drafter, "close", None)
            if close is not None:
                close()

    # ---- before a step ----------------------------------------------------------------------

    def draft(self, items: Sequence[PlanItem]) -> Sequence[PlanItem]:
        """The items with what is to be verified of them, which is written behind their rows' tokens."""
        hopeful, self._hopeful, self._step = self._hopeful, set(), None
        self._observed_s = 0.0
        if not self._sources or not all(i.sample and i.num_tokens == 1 for i in items):
            return _plain(items)
        self._step = step = _Step(time.perf_counter(), hopeful=hopeful)
        curve = self._costs.of(len(items))
        if curve.is_due(_length(items)):
            return _plain(items)
        open_ = self._open(items)
        if not open_:
            return _plain(items)
        planned = self._choose(step, items, open_, curve)
        step.chosen_s = time.perf_counter() - step.began
        return planned

    def hopes(self, items: Sequence[PlanItem]) -> bool:
        """Whether drafts, by what is known while these sample, would have promised more than a token
        each: then the next step should wait for the tokens of this one, and draft."""
        open_ = self._open(items)
        curve = self._costs.of(len(items))
        if not open_ or curve.is_due(_length(items)):
            return False
        if not all(source.drafter.is_instant for source in open_):
            return True
        step = _Step(time.perf_counter())
        least = curve.least(len(items))
        asks = {i: Ask(item.row, item.start + 1, PEEK, least) for i, item in enumerate(items)}
        for source in open_:
            self._take_better(step, source, asks)
        seconds = curve.upto(sum(len(chain.chances) for chain in step.chains.values()))
        counts = _best(step.chains, len(items), seconds)
        self._hopeful = {step.chains[i].source for i in counts}
        return bool(counts)

    def _open(self, items: Sequence[PlanItem]) -> list[Source]:
        """Who may be asked for some of these rows."""
        return [
            source
            for source in self._sources
            if source.account.is_open and any(source.may_guess(item.row) for item in items)
        ]

    def _choose(
        self, step: _Step, items: Sequence[PlanItem], open_: Sequence[Source], curve: Curve
    ) -> Sequence[PlanItem]:
        least = curve.least(len(items))
        asks = {
            i: Ask(item.row, item.start + 1, item.num_drafts, least)
            for i, item in enumerate(items)
            if item.num_drafts
        }
        for source in open_:
            if source.drafter.is_instant:
                self._take_better(step, source, asks)
        slow = [source for source in open_ if not source.drafter.is_instant]
        if not step.chains and not slow:
            return _plain(items)
        if slow:
            seconds = curve.upto(sum(ask.most for ask in asks.values()))
            self._ask_slow(step, slow, asks, seconds, len(items))
        else:
            seconds = curve.upto(sum(len(chain.chances) for chain in step.chains.values()))
        counts = _best(step.chains, len(items), seconds)
        if not counts:
            return _plain(items)
        step.expected_s = seconds[sum(counts.values())]
        return [
            self._verify(item, step, i, counts[i]) if i in counts else item
            for i, item in enumerate(_plain(items))
        ]

    def _take_better(self, step: _Step, source: Source, asks: dict[int, Ask]) -> None:
        """What it guesses, where it promises more than what others did; nothing where it fails."""
        began = time.perf_counter()
        try:
            for i, chain in self._chains(source, asks).items():
                if i not in step.chains or chain.promised > step.chains[i].promised:
                    step.chains[i] = chain
        except Exception:
            self._switch_off(source)
        step.proposed_s[source] = time.perf_counter() - began

    def _switch_off(self, source: Source) -> None:
        log.exception("The drafter %s failed and is not asked any more.", source.drafter.name)
        if source in self._sources:
            self._sources.remove(source)

    def _chains(self, source: Source, asks: dict[int, Ask]) -> dict[int, _Chain]:
        """What it guesses, where it does."""
        guesses = source.drafter.propose(list(asks.values()))
        if len(guesses) != len(asks):
            raise ValueError(f"{len(guesses)} guesses for {len(asks)} rows")
        said = {
            i: guess.first(ask.most)
            for (i, ask), guess in zip(asks.items(), guesses, strict=True)
            if guess.tokens
        }
        if not said:
            return {}
        behind = [self._behind(asks[i]) for i in said]
        tokens, chances = [g.tokens for g in said.values()], [g.chances for g in said.values()]
        least = min(asks[i].least for i in said)
        found = source.chances.of(behind, tokens, chances, least)
        return {
            i: self._chain(source, asks[i], place, said[i], likely)
            for i, place, likely in zip(said, behind, found, strict=True)
        }

    def _behind(self, ask: Ask) -> Behind:
        last = self._rows.token_ids.item(ask.row, ask.num_tokens - 1)
        return Behind(ask.row, hash(self._rows.namespaces[ask.row]), last)

    def _chain(
        self, source: Source, ask: Ask, behind: Behind, guess: Guess, chances: list[float]
    ) -> _Chain:
        """Tokens that there are and that grammars allow."""
        # What is not verified is not looked at, but for the first.
        count = max(1, len(chances))
        tokens = guess.tokens[:count]
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            tokens = list(takewhile(lambda token: 0 <= token < self._vocab_size, tokens))
        if tokens and self._masks is not None and not guess.is_allowed:
            known = self._rows.token_ids
            tokens = tokens[: self._masks.num_valid(ask.row, ask.num_tokens, tokens, known)]
        if len(tokens) < count:
            guess = Guess(tokens, guess.chances[: len(tokens)])
        return _Chain(source, ask, behind, guess, chances[: len(tokens)])

    def _ask_slow(
        self,
        step: _Step,
        sources: Sequence[Source],
        asks: dict[int, Ask],
        seconds: list[float],
        num_rows: int,
    ) -> None:
        """The one that promises most, if it does, for the rows that nobody had a better guess for."""
        began = time.perf_counter()
        best = _rate(step.chains, num_rows, seconds) * MARGIN
        others = {i: chain.promised for i, chain in step.chains.items()}
        longest = max((ask.most for ask in asks.values()), default=0)
        chosen: tuple[Source, dict[int, Ask]] | None = None
        for source in sources:
            hoped = {
                i: list(accumulate(source.chances.expected(ask.row, ask.most), initial=0.0))
                for i, ask in asks.items()
                if source.follows(ask.row)
            }
            draft_s = source.draft_s()
            for most in (length for length in LENGTHS if length <= longest):
                mine, tokens, num_drafts = {}, float(num_rows), 0
                for i, ask in asks.items():
                    count = min(most, ask.most)
                    if i not in hoped or others.get(i, 0.0) >= hoped[i][count]:
                        tokens += others.get(i, 0.0)
                        num_drafts += len(step.chains[i].chances) if i in others else 0
                    else:
                        tokens += hoped[i][count]
                        num_drafts += count
                        mine[i] = count
                took = seconds[min(num_drafts, len(seconds) - 1)] + most * draft_s
                if mine and tokens / took > best:
                    asked = {i: replace(asks[i], most=count) for i, count in mine.items()}
                    best, chosen = tokens / took, (source, asked)
            # Also who is not asked pays for being thought of.
            now = time.perf_counter()
            step.proposed_s[source], began = now - began, now
        if chosen is not None:
            source, asked = chosen
            thought = step.proposed_s[source]
            self._take_better(step, source, asked)
            source.drafted(step.proposed_s[source], max(ask.most for ask in asked.values()))
            step.proposed_s[source] += thought

    def _verify(self, item: PlanItem, step: _Step, index: int, count: int) -> PlanItem:
        chain = step.chains[index]
        known = chain.ask.num_tokens
        self._rows.token_ids[item.row, known : known + count] = chain.guess.tokens[:count]
        step.num_drafts += count
        # As dataclasses.replace, which takes ten times as long.
        return PlanItem(
            item.request_id, item.row, item.start, 1 + count, item.sample, item.new_blocks, count
        )

    # ---- after it ---------------------------------------------------------------------------

    def observe(
        self,
        items: Sequence[PlanItem],
        batch: ForwardBatch | DecodeBatch,
        sampled: Sequence[Sequence[int]],
        hidden_TD: F32 | None,
        shown_s: float = 0.0,
    ) -> None:
        """A forward was computed, and sampled from. shown_s: the seconds of it that states took which
        only drafters read."""
        firsts: Sequence[int] = range(len(items))
        if isinstance(batch, ForwardBatch):
            firsts = batch.query_start_loc[:-1].tolist()
        seen = Seen(items, sampled, hidden_TD, firsts)
        for source in self._sources.copy():
            try:
                self._observed_s += source.observe(seen, shown_s)
            except Exception:
                self._switch_off(source)

    def book(self, items: Sequence[PlanItem], output: StepOutput, seconds: float) -> None:
        """The step that `draft` made took so long in all."""
        step, self._step = self._step, None
        if step is None:
            self._pass_by(seconds)
            return
        rows, took = len(items), max(seconds - step.chosen_s - self._observed_s, LEAST_S)
        curve = self._costs.of(rows)
        curve.book(step.num_drafts, took, _length(items))
        plain = curve.plain or seconds
        if not step.proposed_s and not step.hopeful:  # nobody was asked
            self._pass_by(seconds, plain)
            return
        began = time.perf_counter()
        heard = {chain.source for chain in step.chains.values()}
        for source in heard:
            mine = {i: chain for i, chain in step.chains.items() if chain.source is source}
            _learn(source, mine, output.sampled)
        asked, spent_s = step.proposed_s, step.chosen_s + time.perf_counter() - began
        gained = {source: -spent for source, spent in asked.items()}
        # Who had something to say shares what choosing among them and learning took.
        sharing = heard or asked.keys()
        for source in sharing:
            gained[source] -= (spent_s - sum(asked.values())) / len(sharing)
        excess = min(took, HICCUP * (step.expected_s or plain)) - plain
        for i, chain in step.chains.items():
            count, source = items[i].num_drafts, chain.source
            if not count:
                continue
            accepted = max(0, len(output.sampled[i]) - 1)
            output.num_drafted[i] = count
            source.stats.book(count, accepted)
            gained[source] += accepted * plain / rows - excess * count / step.num_drafts
        if not step.num_drafts:  # the device waited for nothing
            for source in step.hopeful:
                loss = max(0.0, excess) / len(step.hopeful)
                gained[source] = gained.get(source, 0.0) - loss
        for source, gain in gained.items():
            source.account.book(gain)
            source.stats.seconds += step.proposed_s.get(source, 0.0)
        self._pass_by(seconds, plain)

    def pass_by(self, items: Sequence[PlanItem], seconds: float) -> None:
        """A step began before anybody could draft for it, and took so long."""
        curve = self._costs.of(len(items))
        curve.book(0, seconds, _length(items))
        self._pass_by(seconds, curve.plain or seconds)

    def _pass_by(self, seconds: float, plain: float | None = None) -> None:
        for source in self._sources.copy():
            try:
                source.pass_by(seconds, plain)
            except Exception:
                self._switch_off(source)


def _learn(source: Source, chains: dict[int, _Chain], sampled: Sequence[Sequence[int]]) -> None:
    guesses = [chain.guess for chain in chains.values()]
    source.chances.learn(
        [chain.behind for chain in chains.values()],
        [guess.tokens for guess in guesses],
        [guess.chances for guess in guesses],
        [sampled[i] for i in chains],
    )


def _length(items: Sequence[PlanItem]) -> int:
    """Of their texts, on average."""
    return sum(item.start for item in items) // len(items)


def _plain(items: Sequence[PlanItem]) -> Sequence[PlanItem]:
    """The same, without room for drafts: nobody uses it."""
    for item in items:
        item.num_drafts = 0
    return items


def _best(chains: dict[int, _Chain], rows: int, seconds: Sequence[float]) -> dict[int, int]:
    """How many drafts of each chain to verify: the likeliest ones, as many as bring the most tokens a
    second. seconds: of a step with 0, 1, 2, ... drafts."""
    chances = [chain.chances for chain in chains.values()]
    counts = best_counts(chances, seconds, rows, MARGIN, SLOW_DOWN)
    return {i: count for i, count in zip(chains, counts, strict=True) if count}


def _rate(chains: dict[int, _Chain], rows: int, seconds: Sequence[float]) -> float:
    """Tokens a second with the best number of these."""
    counts = _best(chains, rows, seconds)
    tokens = rows + sum(sum(chains[i].chances[:count]) for i, count in counts.items())
    return tokens / seconds[sum(counts.values())]
