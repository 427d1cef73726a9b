"""Idle: what an engine does while it has no requests: it sleeps and wakes up, and takes other weights.

Owns whether there is a model that answers. Whatever fails here changes nothing or says what it left.
"""

from __future__ import annotations

import gc
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from elinvar.base.config import EngineConfig
from elinvar.base.digest import blake2b
from elinvar.base.errors import EngineError, ModelError
from elinvar.base.metrics import EngineMetrics
from elinvar.engine.adapters import Adapters
from elinvar.engine.drafts import Drafting
from elinvar.engine.memory import give_back
from elinvar.engine.output import Delta
from elinvar.kv.sessions import Sessions
from elinvar.models.family import Model
from elinvar.models.load import Loaded, reloaded
from elinvar.models.update import Update
from elinvar.ops import Ops
from elinvar.run.runner import Runner
from elinvar.sched.scheduler import Scheduler

TORN = (
    "The engine holds weights of two models, as an update of them ended half-way: push all of them."
)


class Idle:
    """The part of Engine that needs it to be idle."""

    config: EngineConfig
    ops: Ops
    runner: Runner
    scheduler: Scheduler
    sessions: Sessions
    metrics: EngineMetrics
    adapters: Adapters
    kv_bytes: int
    fingerprint: str
    _weights: str
    """What the fingerprint of weights that were not pushed follows from."""
    _drafting: Drafting
    _live: Mapping[str, object]
    _ready: list[Delta]
    weight_version = 0
    """How many times weights were pushed."""
    is_asleep = False
    """Weights and KV cache take no memory, and no request is taken."""
    _is_torn = False
    """Some weights are replaced by others, and some are not."""

    if TYPE_CHECKING:

        def step(self) -> list[Delta]: ...

        def warm_up(self) -> None: ...

        def _settle(self) -> None: ...

    def push_weights(self, arrays: Mapping[str, NDArray[Any]]) -> int:
        """Replace all weights, by the names of the model's checkpoints or by canonical ones; returns
        the new weight_version. Cached prefixes belong to the weights before and are not found any
        more. The new weights are packed beside the old ones, so both are in memory for a moment.

        Raises ModelError listing what does not fit, EngineError while there are requests (a sequence
        computed by two models is no model's) or adapters. Nothing is changed then.
        """
        self._check_pushable()
        loaded = reloaded(self.runner.model, arrays, self.config.weight_format)
        self._use_pushed(loaded, loaded.build(self.ops))
        return self._version_of_now()

    def update_weights(self, parts: Iterable[Mapping[str, NDArray[Any]]]) -> int:
        """The same part by part: a part's arrays are not needed any more when the next one is asked for,
        and each weight takes the place of the one before, in its memory where the kind is the same. So
        weights are in memory once; on a GPU, too, where recorded steps stay good. Whoever else computes
        with the same Weights has them replaced, too.

        All of them must come. Raises ModelError where the first part does not fit, EngineError as
        push_weights: nothing is changed then. When a later part fails, or the iterator does, or weights
        are missing, the engine holds weights of two models: it raises EngineError, or what the iterator
        raised, and takes no request until all weights are pushed.
        """
        self._check_pushable()
        update = Update(self.runner.model, self.config.weight_format)
        try:
            for arrays in parts:
                update.push(arrays)
            self._use_pushed(*update.finish(self.ops))
        except BaseException as error:
            self._is_torn |= update.has_begun
            if update.has_begun and isinstance(error, ModelError):
                raise EngineError(f"{error} {TORN}") from error
            raise
        return self._version_of_now()

    def _version_of_now(self) -> int:
        if not self.is_asleep:
            self.warm_up()
        return self.weight_version

    def _check_pushable(self) -> None:
        self._check_open()
        self._check_idle("push weights")
        if self.adapters.num_held:
            raise EngineError(
                "Adapters are loaded, which were read for the weights of now; unload them, push "
                "weights, then load them again."
            )

    def _use_pushed(self, loaded: Loaded, model: Model, recorded: bool = False) -> None:
        self._drafting.attach(model, self.ops)
        self.runner.use(model, recorded)
        self.metrics.drafters = self.runner.speculator.stats
        self.adapters.fit(loaded)
        self.weight_version += 1
        self._is_torn = False
        # Of no other engine's: what was pushed has no fingerprint.
        self.scheduler.kv.use_namespace(uuid.uuid4().hex)
        self.sessions.forget_contents()
        self.fingerprint = fingerprint_of_weights(
            self.config, f"{self._weights}+{self.weight_version}"
        )
        give_back()

    def sleep(self) -> None:
        """Give back the memory of weights and KV cache until `wake`. All else stays: the tokenizer,
        sessions, adapters, compiled kernels. Weights that are a packed file's are mapped still, and
        pushed ones stay in the host's memory. What was cached is gone, but for what tiers below have.

        Raises EngineError while there are requests. Weights may be pushed meanwhile.
        """
        self._check_open()
        if self.is_asleep:
            return
        self._check_idle("let it sleep")
        ready: list[Delta] = []
        while self.scheduler.kv.has_unsaved:  # else the tiers would lack it
            ready += self.step()
        self._ready += ready
        self.sessions.yield_all()
        self.scheduler.kv.empty()
        self._lie_down()
        self.is_asleep = True
        self.metrics.asleep = 1

    def _lie_down(self) -> None:
        self.runner.sleep()
        gc.collect()  # recordings point to themselves
        self.ops.release(self.runner.model.weights.values())
        give_back()

    def wake(self) -> None:
        """Answer again, as before `sleep`, to the bit. Raises EngineError where there is no memory for
        it now; it sleeps on then."""
        self._check_open()
        if not self.is_asleep:
            return
        try:
            self.runner.wake()
            self.runner.warm_up()
        except MemoryError as error:
            self._lie_down()
            raise EngineError(
                f"There is no memory to wake up now, where the KV cache takes {self.kv_bytes} bytes and "
                f"the weights as before; free some and try again ({error})."
            ) from None
        self.is_asleep = False
        self.metrics.asleep = 0
        self.metrics.drafters = self.runner.speculator.stats

    def _check_answers(self) -> None:
        if self._is_torn:
            raise EngineError(TORN)
        if self.is_asleep:
            raise EngineError(
                "The model is asleep: wake it up before you ask (Engine.wake, POST /wake_up)."
            )

    def _check_idle(self, what: str) -> None:
        if self._live:
            raise EngineError(
                f"{len(self._live)} requests have not ended; {what} when the engine is idle."
            )
        self._settle()

    def _check_open(self) -> None:
        if not hasattr(self, "runner"):
            raise EngineError("The engine is closed; load the model again.")


def fingerprint_of_weights(config: EngineConfig, weights: str) -> str:
    parts = (weights, config.device, config.weight_format, config.kv_dtype)
    return "fp_" + blake2b("|".join(parts).encode(), digest_size=6).hexdigest()
