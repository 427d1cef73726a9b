"""How quickly blocks move to and from an `elinvar kv-server` of this machine.

    python benchmarks/kv_server.py [--seconds 1]

Figures are of contents written and read, checksums included. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from elinvar.kv.tiers.remote import RemoteTier

SIZES = 24_576, 737_280, 4 << 20
CONNECTIONS = 1, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    seconds = parser.parse_args().seconds
    elinvar = Path(sys.executable).with_name("elinvar")
    command = [elinvar, "kv-server", "--port", "0", "--memory", "1G", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    tier = RemoteTier(json.loads(server.stdout.readline())["address"], connections=4)
    try:
        for size in SIZES:
            for count in CONNECTIONS:
                data = memoryview(os.urandom(size))
                into = [memoryview(bytearray(size)) for _ in range(count)]
                for what, call in (
                    ("write", lambda i, d=data: tier.write(bytes([i]), d)),
                    ("read", lambda i, buffers=into: tier.read(bytes([i]), buffers[i])),
                ):
                    each, median = measure(call, count, seconds)
                    print(
                        f"{size:>8} B, {count} at once, {what:>5}: {size / each / 1e9:6.2f} GB/s, "
                        f"a call {median * 1e6:6.0f} us"
                    )
    finally:
        tier.close()
        server.send_signal(signal.SIGTERM)
        server.wait(10)


def measure(call: Callable[[int], object], num_threads: int, seconds: float) -> tuple[float, float]:
    """Seconds a block, of all threads together; the median of a call's."""
    took: list[float] = []
    call(0)
    start = time.perf_counter()

    def work(i: int) -> None:
        now = time.perf_counter()
        while now - start < seconds:
            call(i)
            before, now = now, time.perf_counter()
            took.append(now - before)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - start) / len(took), statistics.median(took)


if __name__ == "__main__":
    main()
