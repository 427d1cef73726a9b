"""An engine whose answers are known: it computes as ever, and other tokens are taken for sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elinvar.base.plan import StepOutput, StepPlan
from elinvar.engine.core import Engine
from elinvar.run.ahead import Begun

Script = Callable[[str], str]
"""From a prompt to its answer."""


class ScriptedRunner:
    """In the place of a Runner, whose other parts it lends."""

    def __init__(self, core: Engine, script: Script) -> None:
        self._inner: Any = core.runner
        self._core, self.script = core, script
        self._answers: dict[str, tuple[int, list[int]]] = {}
        """By request: where the answer begins, and its tokens."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def begin(self, plan: StepPlan) -> Begun:
        tokenizer = self._core.tokenizer
        for row in plan.started:
            if row.request_id not in self._answers:
                answer = self.script(tokenizer.decode(row.token_ids))
                ids = [*tokenizer.encode(answer, add_special=False), min(tokenizer.eos_ids)]
                self._answers[row.request_id] = len(row.token_ids), ids
        begun: Begun = self._inner.begin(plan)
        return Begun(lambda: self._told(plan, begun.finish()))

    def _told(self, plan: StepPlan, output: StepOutput) -> StepOutput:
        for item, sampled in zip(plan.items, output.sampled, strict=True):
            begin, ids = self._answers[item.request_id]
            at = item.start + item.num_tokens - begin
            sampled[:] = [ids[at]] if sampled else []
        return output


def use_script(core: Engine, script: Script) -> ScriptedRunner:
    """From now on the engine answers as `script` says; its `script` may be changed."""
    runner = core.runner = ScriptedRunner(core, script)  # type: ignore[assignment]
    return runner
