"""LLM: the engine for scripts. Blocking calls; all prompts of a call run in one batch.

Owns the door of a script: texts to token ids, seeds, and who gets which delta. One thread.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Any, Self, cast

from elinvar.base.config import EngineConfig
from elinvar.base.errors import EngineError, InputError
from elinvar.base.handling import NO_WISHES, OFFLINE, Handling
from elinvar.base.sampling import SamplingParams
from elinvar.engine.beam import Beam, BeamParams, BeamSearch
from elinvar.engine.chat import ChatOptions
from elinvar.engine.core import Engine, LoadProgress
from elinvar.engine.output import Completion, CompletionBuilder, Delta
from elinvar.engine.seeds import choice_seed, draw_seed

Prompt = str | Sequence[int]
"""A text, or token ids."""
Message = Mapping[str, Any]
"""At least `role` and `content`, as chat templates take them."""
Progress = Callable[[int, int, int], None]
"""Called after each step with (answers finished, answers in all, tokens generated)."""


class LLM:
    """A model, ready to answer.

    model: an alias, `hf:org/name`, `pypi:name` or a path; or an Engine that is there already.
    options: the fields of EngineConfig. progress: told what is being loaded. Raises ModelError
    when the model cannot be found or read, InputError when the options do not fit it.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Engine,
        *,
        progress: LoadProgress | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, Engine):
            self.engine = model
        else:
            self.engine = Engine.load(model, EngineConfig(**options), progress)
        self._inboxes: dict[str, deque[Delta]] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        best_of: int | None = None,
        adapter: str | None = None,
        handling: Handling = OFFLINE,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Answers in the order of the prompts, `n` for each (prompt 0's first); of `best_of` where that
        is given, the likeliest by the mean log-prob of their tokens, likeliest first.

        params: one for all, or one a prompt. Answer k of a prompt has the seed
        choice_seed(params.seed, k). adapter: the loaded adapter that answers, where the params name
        none. handling: how all of them are treated among others, by default after those who read
        along; it changes no answer. Raises InputError for what cannot be served, EngineError when a
        step failed; then, and on Ctrl-C, everything that this call started is aborted.
        """
        all_ids = [self._encode(prompt) for prompt in _as_many(prompts)]
        each = _one_each(params, len(all_ids), adapter)
        if best_of is None:
            return self._run(all_ids, each, n, handling, progress)
        if not 1 <= n <= best_of:
            raise InputError("best_of", f"best_of must be at least n ({n}), got {best_of}.")
        told = [replace(one, logprobs=one.logprobs or 0) for one in each]
        done = self._run(all_ids, told, best_of, handling, progress)
        several = [done[at : at + best_of] for at in range(0, len(done), best_of)]
        return [one for answers in several for one in sorted(answers, key=_unlikeliness)[:n]]

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamParams, handling: Handling = OFFLINE
    ) -> list[list[Completion]]:
        """Of each prompt the answers that beam search finds, best first, at most params.width. Raises as
        `generate`."""
        all_ids = [self._encode(prompt) for prompt in _as_many(prompts)]
        room = [self.engine.context_of(params.step) - len(ids) for ids in all_ids]
        ends = params.ends(self.engine.tokenizer.eos_ids)
        searches = [
            BeamSearch(replace(params, max_tokens=max(1, min(params.max_tokens, left))), ends)
            for left in room
        ]
        cached: dict[int, int] = {}
        while live := [(i, beam) for i, one in enumerate(searches) for beam in one.live]:
            asked = [[*all_ids[i], *beam.token_ids] for i, beam in live]
            steps = self._run(asked, [params.step] * len(asked), 1, handling, None)
            for i in {i for i, _ in live}:
                mine = [step for (j, _), step in zip(live, steps, strict=True) if j == i]
                cached.setdefault(i, mine[0].num_cached_tokens)
                searches[i].push([step.logprobs[0] for step in mine])
        return [
            [self._completed(beam, ends, all_ids[i], cached[i]) for beam in one.best(params.width)]
            for i, one in enumerate(searches)
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        adapter: str | None = None,
        options: ChatOptions | None = None,
        handling: Handling = OFFLINE,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """As `generate`, for one conversation or several. options: tools, thinking and the like.
        Raises ModelError where the model has no chat template."""
        one = len(messages) > 0 and isinstance(messages[0], Mapping)
        many = cast("Sequence[Sequence[Message]]", [messages] if one else messages)
        all_ids = [self.engine.encode_chat(conversation, options) for conversation in many]
        return self._run(all_ids, _one_each(params, len(all_ids), adapter), n, handling, progress)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        handling: Handling = NO_WISHES,
    ) -> Generator[Delta, None, None]:
        """The deltas of one answer; closing the iterator aborts it. Several streams may be read in
        turn: they share the batch. Raises as `generate`."""
        return self._stream(self._encode(prompt), params or SamplingParams(), handling)

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        options: ChatOptions | None = None,
        handling: Handling = NO_WISHES,
    ) -> Generator[Delta, None, None]:
        """As `stream`, for a conversation."""
        ids = self.engine.encode_chat(messages, options)
        return self._stream(ids, params or SamplingParams(), handling)

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """A LoRA adapter, a folder as PEFT saves it, that requests may ask for by `name`. Raises as
        Engine.load_adapter."""
        self.engine.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        """New requests do not find it any more; streams that are open end with it."""
        self.engine.unload_adapter(name)

    def sleep(self) -> None:
        """Give back the memory of weights and KV cache until `wake`. Raises as Engine.sleep."""
        self.engine.sleep()

    def wake(self) -> None:
        """Answer again. Raises as Engine.wake."""
        self.engine.wake()

    def close(self) -> None:
        """Give the memory back; the LLM is of no use afterwards."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _completed(
        self, beam: Beam, ends: frozenset[int], prompt_ids: list[int], num_cached: int
    ) -> Completion:
        ended = beam.token_ids[-1] in ends
        said = beam.token_ids[:-1] if ended else beam.token_ids
        return Completion(
            text=self.engine.tokenizer.decode(said),
            token_ids=list(beam.token_ids),
            logprobs=list(beam.logprobs),
            prompt_token_ids=prompt_ids,
            num_cached_tokens=num_cached,
            finish_reason="stop" if ended else "length",
            seed=0,
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.engine.tokenizer.encode(prompt)
        return list(prompt)

    def _run(
        self,
        all_ids: Sequence[list[int]],
        params: Sequence[SamplingParams],
        n: int,
        handling: Handling,
        progress: Progress | None,
    ) -> list[Completion]:
        if n < 1:
            raise InputError("n", f"n must be at least 1, got {n}.")
        for ids, one in zip(all_ids, params, strict=True):
            self.engine.check(ids, one)
        inbox: deque[Delta] = deque()
        builders: dict[str, CompletionBuilder] = {}
        done: dict[str, Completion] = {}
        num_tokens = 0
        try:
            for ids, one in zip(all_ids, params, strict=True):
                seed = draw_seed() if one.seed is None else one.seed
                for k in range(n):
                    choice = replace(one, seed=choice_seed(seed, k))
                    request_id = self._add(ids, choice, handling, inbox)
                    builders[request_id] = CompletionBuilder(ids)
            while len(done) < len(builders):
                self._step()
                while inbox:
                    delta = _checked(inbox.popleft())
                    num_tokens += len(delta.token_ids)
                    completion = builders[delta.request_id].push(delta)
                    if completion is not None:
                        done[delta.request_id] = completion
                if progress is not None:
                    progress(len(done), len(builders), num_tokens)
        finally:
            self._drop(inbox)
        return [done[request_id] for request_id in builders]

    def _stream(
        self, ids: list[int], params: SamplingParams, handling: Handling
    ) -> Generator[Delta, None, None]:
        self.engine.check(ids, params)
        return self._deltas(ids, params, handling)

    def _deltas(
        self, ids: list[int], params: SamplingParams, handling: Handling
    ) -> Generator[Delta, None, None]:
        inbox: deque[Delta] = deque()
        finished = False
        try:
            self._add(ids, params, handling, inbox)
            while not finished:
                while not inbox:
                    self._step()
                delta = _checked(inbox.popleft())
                finished = delta.finish_reason is not None
                yield delta
        finally:
            self._drop(inbox)

    def _add(
        self, ids: list[int], params: SamplingParams, handling: Handling, inbox: deque[Delta]
    ) -> str:
        with _interrupts_held():
            request_id = self.engine.add(ids, params, handling=handling)
            self._inboxes[request_id] = inbox
        return request_id

    def _step(self) -> None:
        with _interrupts_held():
            for delta in self.engine.step():
                inbox = self._inboxes.get(delta.request_id)
                if inbox is not None:
                    inbox.append(delta)

    def _drop(self, inbox: deque[Delta]) -> None:
        """Forget the requests of a call; those that still run are aborted."""
        with _interrupts_held():
            for request_id in [key for key, value in self._inboxes.items() if value is inbox]:
                self.engine.abort(request_id)
                del self._inboxes[request_id]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block: a step half done would leave the scheduler
    inconsistent. Signals reach the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        if caught and callable(handler):
            handler(*caught[0])


def _as_many(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return cast("Sequence[Prompt]", [prompts] if one else prompts)


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int, adapter: str | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise InputError(
            "params", f"Give one SamplingParams or {num_prompts}, one a prompt; got {len(params)}."
        )
    return [replace(one, adapter=one.adapter or adapter) for one in params]


def _unlikeliness(done: Completion) -> float:
    return -sum(one.logprob for one in done.logprobs) / len(done.logprobs)


def _checked(delta: Delta) -> Delta:
    if delta.finish_reason == "error":
        raise EngineError(f"A step of the engine failed: {delta.error}")
    return delta
