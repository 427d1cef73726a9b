"""A server that tells on SIGUSR1 what it has used and holds, as one line of JSON on stdout.

    python benchmarks/workers/serve_watched.py MODEL [--rows 256] [--step-s 0.01] [...]

Its first line is {"port"}. The event loop has the main thread to itself, so that the CPU time of that
thread is what the server takes, and all else of the process is the engine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import signal
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

from elinvar.base.config import EngineConfig
from elinvar.base.plan import StepPlan
from elinvar.engine.aio import AsyncEngine
from elinvar.engine.core import Engine
from elinvar.run.ahead import Begun
from elinvar.server.app import Settings, create_models_app
from elinvar.server.models import Models
from elinvar.server.process import listen, serve
from elinvar.server.served import Served

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""For models without a chat template."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--kv-memory", type=int, default=2**30)
    parser.add_argument("--tracemalloc", action="store_true")
    parser.add_argument("--step-s", type=float, default=0.0, help="a step sleeps so long")
    parser.add_argument("--no-prefix-cache", action="store_true")
    options = parser.parse_args()
    config = EngineConfig(
        max_rows=options.rows,
        kv_memory=options.kv_memory,
        prefix_cache=not options.no_prefix_cache,
    )
    core = Engine.load(options.model, config)
    if core.tokenizer.chat_template is None:
        core.tokenizer.use_chat_template(TEMPLATE)
    served = Served.of("model", AsyncEngine(core), 4096)
    app = create_models_app(Models.of(served), Settings(max_waiting=4096))
    if options.step_s:
        slow_down(core, options.step_s)
    if options.tracemalloc:
        tracemalloc.start()
    signal.signal(signal.SIGUSR1, lambda *_: print(json.dumps(picture(served)), flush=True))
    listener = listen("127.0.0.1", 0)
    port = json.dumps({"port": listener.getsockname()[1]})
    sys.exit(serve(app, [listener], grace_seconds=5, started=lambda: print(port, flush=True)))


def slow_down(core: Engine, seconds: float) -> None:
    """Steps of a tiny model then take as long as a larger one's, and like that one's leave Python to
    the event loop meanwhile."""
    begin = core.runner.begin

    def slow(plan: StepPlan) -> Begun:
        time.sleep(seconds)
        return begin(plan)

    core.runner.begin = slow  # type: ignore[method-assign]


_looked_s = 0.0
"""CPU time that the pictures themselves took."""


def picture(served: Served) -> dict[str, Any]:
    """Times in seconds, sizes in bytes; `kept`: entries of all that outlives a request."""
    global _looked_s
    began, kernel = time.thread_time(), resource.getrusage(resource.RUSAGE_THREAD).ru_stime
    gc.collect()
    kinds = Counter(type(one).__name__ for one in gc.get_objects())
    scheduler = served.core.scheduler
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {
        "loop_s": began - _looked_s,
        "kernel_s": kernel,
        "rss": pages * os.sysconf("SC_PAGESIZE"),
        "traced": tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else None,
        "objects": sum(kinds.values()),
        "kinds": dict(kinds.most_common(40)),
        "fds": len(os.listdir("/proc/self/fd")),
        "rows": scheduler.num_running + scheduler.num_waiting,
        "kv_usage": scheduler.kv_usage,
        "tasks": kinds["Task"],
        "kept": {
            "live": served.service.num_live,
            "streams": len(served.engine._streams),
            "explanations": len(served.service.explanations._entries),
            "spellings": len(served.core.tokenizer._bytes),  # at most the vocabulary
        },
    }
    _looked_s += time.thread_time() - began
    return found


if __name__ == "__main__":
    main()
