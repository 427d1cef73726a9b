"""What a request asks of a model, ready to run, and what comes of it step by step.

Between the engine and how an API writes answers: all of them are run here, and read by the same
readers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from elinvar.base.handling import Handling
from elinvar.base.plan import TokenLogprobs
from elinvar.engine.pieces import Arguments, Call, Piece, Reader, Text, Thought
from elinvar.server.seen import Answered, note
from elinvar.server.service import Choice, Event

if TYPE_CHECKING:
    from elinvar.engine.output import Delta
    from elinvar.engine.watch import Record
    from elinvar.server.beams import Beams
    from elinvar.server.served import Served


Scored = tuple[int, TokenLogprobs]
"""A token of a prompt."""


@dataclass(slots=True)
class Step:
    """What one step of the engine added to one choice."""

    index: int
    """The choice's."""
    pieces: Sequence[Piece]
    ids: Sequence[int]
    """New tokens that have a text: without the end token."""
    logprobs: Sequence[TokenLogprobs | None]
    """One a token of `ids` where the request asked for them; None where the token follows nothing."""
    reason: str | None
    """Why the choice ended: stop, length or tool_calls."""
    seed: int
    stop_text: str | None = None
    """The stop text that ended it, if one did."""
    prompt_logprobs: Sequence[Scored] | None = None
    """Before a choice's first tokens, where the client asked for them: of its prompt, from the second
    token on."""


class Usage:
    """Token counts of one HTTP request. A prompt counts once, however many choices it has."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        """Those of steps that brought nothing but thoughts."""

    def push(self, choice: Choice, delta: Delta, pieces: Sequence[Piece]) -> None:
        counts = (delta.num_prompt_tokens, delta.num_cached_tokens)
        self._prompts.setdefault(choice.prompt_index, counts)
        self.completion_tokens += len(delta.token_ids)
        if pieces and type(pieces[-1]) is Thought:
            self.reasoning_tokens += len(delta.token_ids)

    @classmethod
    def of(cls, choices: Sequence[Choice], records: Mapping[int, Record]) -> Usage:
        """What was done for choices that ended, whoever was told of it."""
        usage = cls()
        for choice in choices:
            if (one := records.get(choice.index)) is not None:
                counts = one["prompt_tokens"], sum(one["cached_tokens"].values())
                usage._prompts.setdefault(choice.prompt_index, counts)
                usage.completion_tokens += one["generated_tokens"]
        return usage

    @property
    def prompt_tokens(self) -> int:
        return sum(count for count, _ in self._prompts.values())

    @property
    def cached_tokens(self) -> int:
        return sum(count for _, count in self._prompts.values())

    def as_json(self) -> dict[str, Any]:
        """As OpenAI's chat and text completions write it."""
        prompt = self.prompt_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens:
            details = {"reasoning_tokens": self.reasoning_tokens}
            usage["completion_tokens_details"] = details
        return usage


@dataclass(slots=True)
class MadeCall:
    """A call of a tool, whole."""

    id: str
    name: str
    arguments: str
    """A JSON object."""


@dataclass(slots=True)
class Done:
    """What one choice came to."""

    index: int
    parts: list[Text | Thought | MadeCall] = field(default_factory=list)
    """In the order in which they were written; neighbours of one kind are one."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    reason: str = ""
    seed: int = 0
    stop_text: str | None = None
    prompt_logprobs: Sequence[Scored] | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def thoughts(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Thought))

    @property
    def calls(self) -> list[MadeCall]:
        return [part for part in self.parts if isinstance(part, MadeCall)]


class Collector:
    """Joins the steps of all choices."""

    def __init__(self, indices: Sequence[int]) -> None:
        self._done = {index: Done(index) for index in indices}
        self._pieces: dict[int, list[Piece]] = {index: [] for index in indices}

    def push(self, step: Step) -> None:
        done = self._done[step.index]
        self._pieces[step.index] += step.pieces
        done.ids += step.ids
        done.logprobs += step.logprobs
        if step.prompt_logprobs is not None:
            done.prompt_logprobs = step.prompt_logprobs
        if step.reason is not None:
            done.reason, done.seed = step.reason, step.seed
            done.stop_text = step.stop_text

    def finish(self) -> list[Done]:
        """In the order of the indices."""
        for index, done in self._done.items():
            done.parts = _joined(self._pieces[index])
        return list(self._done.values())


@dataclass(frozen=True, slots=True)
class Asked:
    """The choices of one request for one model, checked."""

    served: Served
    choices: Sequence[Choice]
    handling: Handling
    reader: Callable[[], Reader] | None = None
    """Makes what reads a choice's answer; None: all of it is text."""
    beams: Beams | None = None
    """They are searched, not sampled."""
    keep: int | None = None
    """How many of each prompt's answers are wanted: the likeliest, by the mean log-prob of their
    tokens. None: all."""
    _means: dict[int, float] = field(default_factory=dict)
    """By choice; where some are to be left out."""

    @asynccontextmanager
    async def run(
        self, response_id: str, request_id: str, usage: Usage, whole: bool = False
    ) -> AsyncIterator[AsyncGenerator[Step, None]]:
        """The steps of all choices as they come, or with `whole` when a choice has ended, counted in
        `usage`. Leaving the context aborts what still runs. Raises as Service.run."""
        run = self.served.service.run
        events = run(response_id, request_id, self.choices, self.handling, self.beams, whole)
        records = self.served.service.explanations.records_of
        async with events as stream, aclosing(self._steps(stream, usage)) as steps:
            about = self.served, self.choices, self.handling, usage, records(response_id)
            note(Answered(response_id, *about))
            yield steps

    async def collect(
        self, response_id: str, request_id: str, usage: Usage | None = None
    ) -> list[Done]:
        """All of it, for those whom nobody waits for piece by piece."""
        collector = Collector([choice.index for choice in self.choices])
        async with self.run(response_id, request_id, usage or Usage(), whole=True) as steps:
            async for step in steps:
                collector.push(step)
        return self.best(collector.finish())

    def best(self, done: Sequence[Done]) -> list[Done]:
        """What is wanted of what came, likeliest first, and numbered so."""
        if self.keep is None:
            return list(done)
        by_prompt: dict[int, list[Done]] = {}
        for choice, one in zip(self.choices, done, strict=True):
            by_prompt.setdefault(choice.prompt_index, []).append(one)
        kept: list[Done] = []
        for several in by_prompt.values():
            several.sort(key=lambda one: -self._means[one.index])
            kept += several[: self.keep]
        return [replace(one, index=index) for index, one in enumerate(kept)]

    async def _steps(
        self, events: AsyncGenerator[Event, None], usage: Usage
    ) -> AsyncGenerator[Step, None]:
        make = self.reader
        readers = {} if make is None else {choice.index: make() for choice in self.choices}
        calling: set[int] = set()
        end_ids = self.served.core.tokenizer.eos_ids
        sums: dict[int, tuple[float, int]] = {}
        begun: set[int] = set()
        """Whose prompts were repeated."""
        async for choice, delta in events:
            if delta.prompt_logprobs is not None or choice.echo is not None:
                for step in _of_prompt(choice, delta, choice.index in begun):
                    yield step
                begun.add(choice.index)
                if choice.echo is not None and choice.echo.alone:
                    usage.push(choice, replace(delta, token_ids=[]), ())
                    yield Step(choice.index, (), (), (), "length", delta.seed)
                    continue
            if self.keep is not None:
                self._weigh(sums, choice, delta)
            reader = readers.get(choice.index)
            pieces: Sequence[Piece] = _read(reader, delta)
            usage.push(choice, delta, pieces)
            if reader is not None and any(type(piece) is Call for piece in pieces):
                calling.add(choice.index)
            ids, logprobs, reason = delta.token_ids, delta.logprobs, delta.finish_reason
            if reason == "stop" and ids:
                params = choice.params
                shown = params.include_stop_str_in_output and ids[-1] in params.stop_token_ids
                if not shown and (ids[-1] in end_ids or ids[-1] in params.stop_token_ids):
                    ids, logprobs = ids[:-1], logprobs[:-1]
                # A text that ended it may have cut a call off.
                if choice.index in calling and delta.stop_text is None:
                    yield Step(choice.index, pieces, ids, logprobs, "tool_calls", delta.seed)
                    continue
            yield Step(choice.index, pieces, ids, logprobs, reason, delta.seed, delta.stop_text)

    def _weigh(self, sums: dict[int, tuple[float, int]], choice: Choice, delta: Delta) -> None:
        total, count = sums.get(choice.index, (0.0, 0))
        total += sum(value.logprob for value in delta.logprobs)
        count += len(delta.logprobs)
        sums[choice.index] = total, count
        self._means[choice.index] = total / max(count, 1)


def _of_prompt(choice: Choice, delta: Delta, begun: bool) -> Iterator[Step]:
    """What an answer says of its prompt before anything else."""
    if begun:
        return
    values, echo = delta.prompt_logprobs or [], choice.echo
    if echo is not None:
        ids = choice.prompt_ids
        told: list[TokenLogprobs | None] = []
        if echo.num_top is not None:
            told = [None, *(_cut(value, echo.num_top) for value in values)]
        yield Step(choice.index, (Text(echo.text),), ids, told, None, delta.seed)
    if choice.prompt_top is not None:
        cut = [_cut(value, choice.prompt_top) for value in values]
        scored = list(zip(choice.prompt_ids[1:], cut, strict=True))
        yield Step(choice.index, (), (), (), None, delta.seed, prompt_logprobs=scored)


def _cut(value: TokenLogprobs, num_top: int) -> TokenLogprobs:
    return TokenLogprobs(value.logprob, value.top[:num_top])


def _read(reader: Reader | None, delta: Delta) -> Sequence[Piece]:
    if reader is None:
        return (Text(delta.text),) if delta.text else ()
    pieces = reader.push(delta.text) if delta.text else []
    if delta.finish_reason is None:
        return pieces
    return [*pieces, *reader.finish(cut=delta.finish_reason == "length")]


def _joined(pieces: Sequence[Piece]) -> list[Text | Thought | MadeCall]:
    """Calls by their number, since the arguments of several may come in turns."""
    parts: list[Text | Thought | MadeCall] = []
    calls: dict[int, tuple[MadeCall, list[str]]] = {}
    texts: list[str] = []
    kind: type[Text] | type[Thought] = Text

    def flush() -> None:
        if texts:
            parts.append(kind("".join(texts)))
            texts.clear()

    for piece in pieces:
        if isinstance(piece, Arguments):
            calls[piece.number][1].append(piece.text)
            continue
        if isinstance(piece, Call):
            flush()
            call = MadeCall(piece.id, piece.name, "")
            calls[piece.number] = call, []
            parts.append(call)
            continue
        if type(piece) is not kind:
            flush()
            kind = type(piece)
        texts.append(piece.text)
    flush()
    for call, arguments in calls.values():
        call.arguments = "".join(arguments)
    return parts
