"""How long the device waits between steps that decode: from the end of one, its sampled tokens on their
way to the host, to the beginning of the next."""

from __future__ import annotations

import time
from contextlib import ExitStack
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from elinvar.base.plan import StepPlan
from elinvar.base.sampling import SamplingParams
from elinvar.engine.core import Engine
from elinvar.run.ahead import Begun
from gpu_parts.base import Part


def idle(part: Part, engine: Engine, prompts: list[list[int]], steps: int) -> dict[str, Any]:
    """Going ahead, and as it would be with a host that waits for each step's tokens before the next."""
    return {
        "ahead": _measured(part, engine, prompts, steps),
        "waiting": _measured(part, engine, prompts, steps, waits=True),
    }


def _measured(
    part: Part, engine: Engine, prompts: list[list[int]], steps: int, waits: bool = False
) -> dict[str, Any]:
    runner = engine.runner
    forward, begin = runner.graphs.forward, runner.begin
    first: list[Any] = []
    last: list[Any] = []
    num_ahead = 0

    def marked(batch: Any) -> Any:
        first.append(_mark(part))
        return forward(batch)

    def counted(plan: StepPlan) -> Begun:
        nonlocal num_ahead
        begun = begin(plan)
        last.append(_mark(part))
        num_ahead += plan.is_ahead
        return begun

    params = SamplingParams(max_tokens=steps + 16, temperature=0.8, seed=1, ignore_eos=True)
    asked = [engine.add(prompt, params) for prompt in prompts]
    begun: set[str] = set()
    while len(begun) < len(asked):
        begun |= {delta.request_id for delta in engine.step() if delta.token_ids}
    for _ in range(4):  # all decode, and their steps are recorded
        engine.step()
    with ExitStack() as stack:
        stack.enter_context(patch.object(runner.graphs, "forward", marked))
        stack.enter_context(patch.object(runner, "begin", counted))
        if waits:
            stack.enter_context(patch.object(runner, "goes_on", lambda plan: False))
        for _ in range(steps):
            engine.step()
    for request in asked:
        engine.abort(request)
    while engine.has_work:
        engine.step()
    if part.device.type == "cuda":
        torch.cuda.synchronize()
    pauses = [_us(end, start) for end, start in zip(last, first[1:], strict=False)]
    step_us = float(np.median([_us(one, other) for one, other in pairwise(first)]))
    return {
        "idle_us": {str(q): float(np.percentile(pauses, q)) for q in (50, 90, 100)},
        "step_us": step_us,
        "idle_of_step": float(np.median(pauses)) / step_us,
        "begun_ahead": num_ahead / len(last),
    }


def _mark(part: Part) -> Any:
    """A moment of the device, when it has come to what it is told here; of the host where there is none."""
    if part.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _us(one: Any, other: Any) -> float:
    return (other - one) * 1e6 if isinstance(one, float) else one.elapsed_time(other) * 1e3
