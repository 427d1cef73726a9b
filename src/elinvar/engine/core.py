"""Engine: token ids in, deltas out, one step at a time.

Owns the main road: scheduler.plan, runner.begin, scheduler.commit, text. It is synchronous and
not thread-safe; LLM and AsyncEngine are two ways to drive it.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, Self, cast

from elinvar.base.config import EngineConfig
from elinvar.base.digest import blake2b
from elinvar.base.errors import EngineError, InputError, ModelError
from elinvar.base.handling import NO_WISHES, Handling
from elinvar.base.limits import ANY_TENANT
from elinvar.base.metrics import EngineMetrics
from elinvar.base.plan import StepOutput, StepPlan, TokenLogprobs
from elinvar.base.sampling import SamplingParams
from elinvar.engine.adapters import Adapters
from elinvar.engine.bad_words import spelled
from elinvar.engine.below import identity, open_tiers
from elinvar.engine.chat import ChatOptions
from elinvar.engine.counts import Counts
from elinvar.engine.drafts import Drafting, most_drafts
from elinvar.engine.forecast import device_room
from elinvar.engine.grammars import Compiled, Grammars
from elinvar.engine.idle import Idle, fingerprint_of_weights
from elinvar.engine.memory import available_memory, give_back
from elinvar.engine.output import Delta, FinishReason
from elinvar.engine.plan_kv import describe_blocks, plan_kv
from elinvar.engine.seeds import draw_seed
from elinvar.engine.text import AnswerText
from elinvar.engine.tokenizer import Tokenizer, load_tokenizer
from elinvar.engine.watch import Record, Watcher, record
from elinvar.models.family import Model
from elinvar.models.load import load_parts
from elinvar.ops import Ops, load_provider
from elinvar.ops.adapted import AdaptedOps
from elinvar.run.ahead import Begun
from elinvar.run.grammar import Masks
from elinvar.run.runner import Runner
from elinvar.sched.door import max_total_tokens, why_no_budget, why_no_window
from elinvar.sched.policy import make_policy
from elinvar.sched.request import Request, RequestUpdate, Status
from elinvar.sched.scheduler import Scheduler
from elinvar.weights.cache import cache_root
from elinvar.weights.checkpoint import open_checkpoint
from elinvar.weights.peft import Adapter
from elinvar.weights.sources import resolve

log = logging.getLogger(__name__)

LONGEST_NAP_S = 0.01
"""Where everybody waits for a budget or for what is being fetched."""

LAST_SAVES_S = 5.0
"""Most that tiers below host memory get to take what an engine that ends has for them."""

LoadProgress = Callable[[str, int, int], None]
"""Called with (what is being loaded, bytes done, bytes in all or 0 where unknown), perhaps from
another thread."""


class _Live:
    """A request that has not finished."""

    __slots__ = ("grammar", "last_token", "request", "text")

    def __init__(self, request: Request, text: AnswerText, grammar: Compiled | None) -> None:
        self.request = request
        self.text = text
        self.grammar = grammar  # which is kept as long as somebody has it
        self.last_token: float | None = None


class Engine(Idle):
    """A model with its KV cache, its scheduler and its tokenizer.

    Raises InputError when config.kv_memory and config.max_context do not fit the model.
    """

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        config: EngineConfig | None = None,
        progress: LoadProgress | None = None,
        wrap_ops: Callable[[Ops], Ops] | None = None,
        drafting: Drafting | None = None,
    ) -> Self:
        """The engine of a named model (see weights.sources), pulled where it is not here yet.

        The packed weights are kept in the cache folder and mapped the next time. Raises ModelError
        when the model cannot be found or read.

        wrap_ops: what goes around the provider, to watch it. drafting: in the place of what the
        configuration asks for.
        """
        config = config or EngineConfig()
        tell = progress or (lambda what, done, total: None)
        path = resolve(os.fspath(model), lambda what, done, total: tell(what, done, total or 0))
        checkpoint = open_checkpoint(path)
        try:
            adapted = AdaptedOps(
                load_provider(config.device, config.num_threads, cache=cache_root())
            )
            ops = cast("Ops", adapted)
            if wrap_ops is not None:
                ops = wrap_ops(ops)
            drafting = drafting or Drafting(
                config, fingerprint_of_weights(config, checkpoint.fingerprint)
            )
            drafting.open()
            parts = load_parts(
                checkpoint,
                config.weight_format,
                cache_root(),
                logging.getLogger("elinvar.weights").info,
                lambda done, total: tell("packing", done, total),
                drafting.wants_mtp,
                drafting.mtp_from,
                ops.stored,
            )
            tokenizer = load_tokenizer(checkpoint, cache_root())
            drafting.load(path, tokenizer, ops, tell)
            named = None
            if config.kv_tiers or config.kv_host_path:
                # Others share what is kept there: sizes and times of files are not enough to go by.
                named = checkpoint.content_digest(
                    cache_root(), lambda done, total: tell("checking", done, total)
                )
        finally:
            checkpoint.close()
        fingerprint = checkpoint.fingerprint
        del checkpoint  # a GGUF file's keys hold the vocabulary, too
        give_back()
        adapters = Adapters(parts, adapted, config.max_adapters)
        loaded = parts.build(ops), ops, tokenizer, config, fingerprint, adapters
        engine = cls(*loaded, named, drafting)
        engine.warm_up(progress)
        return engine

    def __init__(
        self,
        model: Model,
        ops: Ops,
        tokenizer: Tokenizer,
        config: EngineConfig,
        weights_fingerprint: str = "",
        adapters: Adapters | None = None,
        weights_digest: str | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        """adapters: without them none can be loaded. weights_digest: of their content, where it is
        known; what is kept below the cache goes by it. drafting: who was loaded to draft for it."""
        self._drafting = drafting or Drafting(config)
        self._drafting.attach(model, ops)
        specs = model.kv_specs(config.kv_dtype)
        available = room = available_memory()
        kv_memory = config.kv_memory
        if (free := ops.available_memory()) is not None:  # a device's, which is for nothing else
            room = self._drafting.leaves(max(device_room(model.config, config, free), 0))
            kv_memory = kv_memory or room
        kv = plan_kv(
            specs,
            model.config.max_context,
            room,
            kv_memory=kv_memory,
            max_context=config.max_context,
            max_rows=config.max_rows,
            max_step_tokens=config.max_step_tokens,
        )
        log.info("KV cache: %s; %d bytes", describe_blocks(specs, kv.num_blocks), kv.num_bytes)
        self.kv_bytes = kv.num_bytes
        """Memory of the KV cache."""
        self.config = config
        self._weights = weights_fingerprint + ops.arithmetic
        self.fingerprint = fingerprint_of_weights(config, self._weights)
        """Changes when answers may change: weights, provider, formats."""
        self.model_config = model.config
        self.tokenizer = tokenizer
        self.ops = ops
        self.max_context = kv.max_context
        """Tokens of the longest sequence, prompt and answer, that the memory here holds."""
        # Where an answer ends is the model's and the user's to say, never the free memory's: the
        # scheduler caps at this, and refuses what the cache cannot hold.
        self._context = config.max_context or model.config.max_context
        self.scheduler = Scheduler(
            specs,
            kv.num_blocks,
            config.max_rows,
            config.max_step_tokens,
            self._context,
            tokenizer.eos_ids,
            config.prefix_cache,
            policy=make_policy(config),
            tenants=config.tenants,
            interactive=config.interactive,
            batch=config.batch,
            num_layers=model.config.num_layers,
            max_drafts=most_drafts(config, model.config),
        )
        # Weights that nobody can name are no other engine's.
        weights = weights_digest or weights_fingerprint or uuid.uuid4().hex
        named = identity(config, weights + ops.arithmetic)
        self.tiers = open_tiers(config, specs, named, available)
        if self.tiers is not None:
            self.scheduler.use_tiers(self.tiers)
            self.scheduler.kv.use_namespace(named)
        self.sessions = self.scheduler.sessions
        """Conversations by name, and what their clients say of them (see kv.sessions)."""
        self.metrics = EngineMetrics(self.scheduler)
        self.metrics.cache = {
            "block_size": self.scheduler.kv.block_size,
            "cache_dtype": config.kv_dtype,
            "enable_prefix_caching": config.prefix_cache,
            "num_gpu_blocks": sum(kv.num_blocks),
        }
        if self.tiers is not None:
            self.metrics.tiers = self.tiers.stats
        self._no_window = why_no_window(model.config.layer_kinds)
        self._no_budget = why_no_budget(model.config.layer_kinds, model.config.index is not None)
        longest = self._context
        if self._no_window:  # or a sequence may outgrow the cache
            longest = min(longest, self.scheduler.kv.max_sequence + 1)
        self.adapters = adapters or Adapters()
        self.grammars = Grammars(tokenizer, model.config.vocab_size)
        self.runner = Runner(
            model,
            ops,
            specs,
            kv.num_blocks,
            config.max_rows,
            longest,
            self.adapters.ops,
            self.tiers,
            Masks(model.config.vocab_size, self.grammars.matcher),
            self._drafting.make,
        )
        self.metrics.drafters = self.runner.speculator.stats
        self.watchers: list[Watcher] = [Counts(self.metrics)]
        self._live: dict[str, _Live] = {}
        self._underway: tuple[StepPlan, Begun] | None = None
        """A step that was begun before the tokens of the last one were known."""
        self._ready: list[Delta] = []

    def warm_up(self, progress: LoadProgress | None = None) -> None:
        """Bring the weights to the device now rather than with the first request, where it is not the
        CPU. Raises EngineError where they do not fit beside the KV cache."""
        tell = progress or (lambda what, done, total: None)
        try:
            self.runner.warm_up(lambda done, total: tell("uploading", done, total))
        except MemoryError as error:
            raise EngineError(
                f"The weights do not fit on the device beside a KV cache of {self.kv_bytes} bytes; ask "
                f"for a smaller one with kv_memory ({error})."
            ) from None

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None
    ) -> list[int]:
        """Token ids of a conversation up to where the answer begins. Raises as render_chat."""
        text = self.render_chat(messages, options)
        return self.tokenizer.encode_chat(text)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None
    ) -> str:
        """Its text. Raises ModelError where the model has no chat template, InputError where the
        template refuses messages or options."""
        template = self.tokenizer.chat_template
        if template is None:
            raise ModelError(
                "This model has no chat template; give it a prompt to continue, or a template "
                "with --chat-template FILE."
            )
        return template.render(messages, options)

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Requests may ask for the LoRA adapter in the folder `path` by `name` from now on. Raises
        ModelError when it cannot be read or does not fit, InputError for a name that is in use, and
        where max_adapters are there."""
        self._check_open()
        self.adapters.check_new(name)
        self.add_adapter(name, self.adapters.read(path))

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """The same for one that was read before (see Adapters.read)."""
        self.adapters.add(name, adapter)
        self.metrics.adapters = len(self.adapters.names)

    def unload_adapter(self, name: str) -> None:
        """New requests do not find it any more; those that have it end with it. Raises InputError
        when there is none of this name."""
        self.adapters.remove(name)
        self.metrics.adapters = len(self.adapters.names)

    def fingerprint_of(self, adapter: str | None) -> str:
        """`fingerprint`, and with an adapter what changes when that does."""
        if adapter is None:
            return self.fingerprint
        return f"{self.fingerprint}_{self.adapters.digest(adapter)[:4].hex()}"

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises InputError when the request could never run here, EngineError when the engine is
        closed, asleep or holds weights of two models. Any thread may ask."""
        self._check_open()
        self._check_answers()
        if params.adapter is not None:
            self.adapters.find(params.adapter)
        if params.grammar is not None:
            self.grammars.compile(params.grammar)
        for field, why_not in (
            ("attention_window", self._no_window),
            ("attention_budget", self._no_budget),
        ):
            if why_not and getattr(params, field) is not None:
                raise InputError(field, f"This model {why_not}: leave {field} out.")
        kv_tokens = self.scheduler.kv.longest(params.kept_blocks)
        max_total_tokens(len(prompt_ids), params.max_tokens, self._context, kv_tokens)
        for kind in set(map(type, prompt_ids)):
            if not issubclass(kind, Integral):  # a float would be cut, or fail amid a step
                raise InputError(
                    "prompt", f"Token ids of the prompt must be integers, got {kind.__name__}."
                )
        vocab_size = self.model_config.vocab_size
        if params.thinking is not None and max(params.thinking.end) >= vocab_size:
            raise InputError("max_thinking_tokens", "This model has no token that ends a thought.")
        _check_ids("logit_bias", (token for token, _ in params.logit_bias), vocab_size)
        for word in params.bad_words:
            _check_ids("bad_words", () if isinstance(word, str) else word, vocab_size)
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
            wrong = next(t for t in prompt_ids if not 0 <= t < vocab_size)
            raise InputError(
                "prompt",
                f"Token ids of the prompt must be from 0 to {vocab_size - 1}, got {wrong}.",
            )

    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        handling: Handling = NO_WISHES,
        arrival: float = 0.0,
        prefix_of: str | None = None,
    ) -> str:
        """Queue a request and return its id. Without a seed in `params` one is drawn. Raises
        InputError as `check` does, and for an id that is in use.

        arrival: when it was asked for (time.monotonic), where that was before this call. prefix_of:
        the tenant whose cached prefixes it finds and adds to, where it is not its own.
        """
        self.check(prompt_ids, params)
        if params.seed is None:
            params = replace(params, seed=draw_seed())
        if params.bad_words:
            params = replace(params, bad_words=spelled(self.tokenizer, params.bad_words))
        request = Request(
            request_id or uuid.uuid4().hex,
            list(prompt_ids),
            params,
            namespace=self._namespace(params, handling.tenant if prefix_of is None else prefix_of),
            handling=handling,
            arrival=arrival,
        )
        self.scheduler.add(request)
        if params.adapter is not None:  # after what may raise: it is not forgotten until _forget
            request.adapter = self.adapters.begin(params.adapter)
        grammar = None if params.grammar is None else self.grammars.compile(params.grammar)
        self._live[request.id] = _Live(request, AnswerText(self.tokenizer, params), grammar)
        return request.id

    def _namespace(self, params: SamplingParams, tenant: str) -> bytes:
        """Whose blocks it finds, and who finds its. A prompt that gets log-probs is computed, so there it
        finds its own alone, after a preemption. Who has a name finds no prefix of others, unless both share: how long an answer takes would
        tell what somebody else asked. What tokens become depends on what they saw."""
        adapter, kept = params.adapter, params.kept_blocks
        namespace = b"" if adapter is None else self.adapters.digest(adapter)
        tenants = self.config.tenants
        limits = tenants.get(tenant) or tenants.get(ANY_TENANT)
        if tenant and not (limits and limits.share_prefixes):
            namespace += blake2b(tenant.encode(), digest_size=32, person=b"tenant").digest()
        if params.prompt_logprobs is not None:
            namespace += uuid.uuid4().bytes
        return namespace if kept is None else namespace + b"keeps %d+%d" % kept

    def explain(self, request_id: str) -> Record | None:
        """What is known of a request that has not ended; None when there is none of this id."""
        live = self._live.get(request_id)
        return None if live is None else record(live.request)

    def running(self) -> list[Request]:
        """All that have not ended, the oldest first. Any thread may ask, to look at them."""
        return [live.request for live in self._live.copy().values()]

    def abort(self, request_id: str, why: str | None = None) -> bool:
        """End a request now; its blocks are free at once and its last delta, whose `error` is `why`,
        comes with the next step. False when there is none of this id."""
        if request_id not in self._live:
            return False
        self.scheduler.abort(request_id)
        live = self._forget(request_id, "abort")
        self._ready.append(_delta(live.request, finish_reason="abort", error=why))
        return True

    def context_of(self, params: SamplingParams) -> int:
        """Tokens of the longest sequence, prompt and answer, that such a request may be."""
        if params.kept_blocks is None:
            return self.max_context
        return min(self._context, self.scheduler.kv.longest(params.kept_blocks) + 1)

    @property
    def has_work(self) -> bool:
        """Whether a step would bring anything."""
        return bool(self._live or self._ready or self.scheduler.kv.has_unsaved)

    @property
    def idle_s(self) -> float:
        """Seconds until one can, where all that is there waits for a budget or a fetch."""
        busy = self._ready or self.scheduler.kv.has_unsaved
        return 0.0 if busy else self.scheduler.idle_s

    def step(self) -> list[Delta]:
        """Plan, execute, commit. Where a device computes and nothing of this step's tokens is needed, the
        next one is planned and begun before they are waited for. When the model's forward fails, the
        requests of this step end with finish_reason `error`; the engine and all other requests go on."""
        began = time.monotonic()
        underway, self._underway = self._underway, None
        plan = self.scheduler.plan() if underway is None else underway[0]
        deltas, self._ready = self._ready, []
        if plan.is_empty:
            if not deltas and self._live:
                time.sleep(min(self.scheduler.idle_s, LONGEST_NAP_S))
            return deltas
        self.metrics.timeline.begin(began)
        try:
            begun = self.runner.begin(plan) if underway is None else underway[1]
            if begun.is_open and self.runner.goes_on(plan):
                self._underway = self._begin_next()
            output = begun.finish()
        except Exception as error:
            deltas += self._give_up(self._failed(plan, error))
        else:
            deltas += self._commit(plan, output, began)
        self.metrics.timeline.end(time.monotonic())
        return deltas

    def _begin_next(self) -> tuple[StepPlan, Begun] | None:
        """What goes wrong at its beginning is told at its end: the step before it goes on."""
        plan = self.scheduler.plan_ahead()
        if plan is None:
            return None
        try:
            return plan, self.runner.begin(plan)
        except Exception as error:
            return plan, Begun(partial(_raise, error))

    def _commit(self, plan: StepPlan, output: StepOutput, began: float) -> list[Delta]:
        updates = self.scheduler.commit(plan, output)
        now = time.monotonic()
        deltas = [self._advance(update, now) for update in updates]
        deltas += self._give_up(output.failed)
        self.metrics.steps += 1
        self.metrics.computed_tokens += plan.num_tokens
        self.metrics.step_tokens.observe(plan.num_tokens)
        self.metrics.step_seconds.observe(now - began)
        self.metrics.recent_steps.observe(now - began, now)
        return deltas

    def _failed(self, plan: StepPlan, error: Exception) -> dict[str, str]:
        """Of a step that failed: its requests, but for those that left it since it began."""
        touched = (item.request_id for item in plan.touched)
        live = [self._live[i].request for i in touched if i in self._live]
        ids = [request.id for request in live if request.status is Status.RUNNING]
        log.exception("A step failed; its %d requests are given up.", len(ids))
        return dict.fromkeys(ids, f"{type(error).__name__}: {error}")

    def _settle(self) -> None:
        """Nothing is under way any more. What was is dropped: nobody is left who would hear of it."""
        underway, self._underway = self._underway, None
        if underway is not None:
            with suppress(Exception):
                underway[1].finish()

    def close(self) -> None:
        """Give up all requests and let go of the model and the KV arrays. What outlives the engine, and
        is not saved yet, is saved before; tiers that are slow may lack some of it. May be called
        again."""
        for request_id in list(self._live):
            self.abort(request_id)
        self._settle()
        self._ready.clear()
        self.adapters.close()
        self.grammars.close()
        if hasattr(self, "runner"):
            self.runner.close()
        if self.tiers is not None:
            if hasattr(self, "runner") and (self.config.kv_host_path or self.config.kv_tiers):
                while self.scheduler.kv.has_unsaved:
                    self.step()
                self.tiers.flush(LAST_SAVES_S)
            self.tiers.close()
        vars(self).pop("runner", None)

    def _advance(self, update: RequestUpdate, now: float) -> Delta:
        """Book what a step brought to one request: text, end, metrics."""
        request = update.request
        live = self._live[request.id]
        reason: FinishReason | None = request.finish_reason
        ids, logprobs = update.new_token_ids, update.logprobs
        # A token that ends the answer has no text.
        ended = reason == "stop" and not live.text.shows(ids[-1])
        text, count, stopped = live.text.push(ids[:-1] if ended else ids)
        if stopped is None and update.finished:
            rest, stopped = live.text.finish()
            text += rest
        elif stopped is not None:
            ids, logprobs = ids[:count], logprobs[:count]
            self.scheduler.finish(request.id)
        if stopped is not None:
            reason = "stop"
        begins = live.last_token is None and request.params.prompt_logprobs is not None
        self._time(live, len(ids), now)
        if reason is not None:
            self._forget(request.id, reason)
            self.metrics.e2e_seconds.observe(now - request.arrival)
        delta = _delta(request, text, ids, logprobs, reason, stop_text=stopped)
        if begins:
            delta.prompt_logprobs = request.prompt_logprobs
        return delta

    def _forget(self, request_id: str, reason: FinishReason) -> _Live:
        live = self._live.pop(request_id)
        if live.request.adapter >= 0:
            self.adapters.end(live.request.adapter)
        self.metrics.finished[reason] += 1
        for watcher in self.watchers:
            watcher.ended(live.request, reason)
        return live

    def _time(self, live: _Live, num_tokens: int, now: float) -> None:
        metrics = self.metrics
        metrics.generated_tokens += num_tokens
        if live.last_token is None:
            metrics.ttft_seconds.observe(now - live.request.arrival)
            metrics.recent_ttft.observe(now - live.request.arrival, now)
            metrics.prompt_tokens += live.request.num_prompt_tokens
            metrics.cached_tokens += live.request.num_cached_tokens
            for watcher in self.watchers:
                watcher.began(live.request)
        else:
            metrics.itl_seconds.observe(now - live.last_token)
            metrics.recent_itl.observe(now - live.last_token, now)
        live.last_token = now

    def _give_up(self, failed: Mapping[str, str]) -> list[Delta]:
        """Requests, and why."""
        deltas = []
        for request_id, message in failed.items():
            self.scheduler.abort(request_id)
            live = self._forget(request_id, "error")
            deltas.append(_delta(live.request, finish_reason="error", error=message))
        return deltas


def _raise(error: Exception) -> StepOutput:
    raise error


def _check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if token >= vocab_size:
            message = f"Token ids of {field} must be from 0 to {vocab_size - 1}, got {token}."
            raise InputError(field, message)


def _delta(
    request: Request,
    text: str = "",
    token_ids: Sequence[int] = (),
    logprobs: Sequence[TokenLogprobs] = (),
    finish_reason: FinishReason | None = None,
    error: str | None = None,
    stop_text: str | None = None,
) -> Delta:
    seed = request.params.seed
    assert seed is not None
    return Delta(
        request.id,
        text,
        list(token_ids),
        list(logprobs),
        finish_reason,
        request.num_prompt_tokens,
        request.num_cached_tokens,
        seed,
        error,
        stop_text=stop_text,
    )
