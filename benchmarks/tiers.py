"""GB/s of the tiers of KV blocks: copies into and out of host memory, files written and read.

    python benchmarks/tiers.py [--folder DIR] [--megabytes N]

The folder says which disk is measured. Reads come from the page cache unless it was dropped: run
`--read-only` again after `echo 3 > /proc/sys/vm/drop_caches` for the disk itself.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from elinvar.kv.tiers.disk import DiskTier
from elinvar.kv.tiers.host import SHARED_MEMORY, HostTier

SIZES = {"24 kB": 24_000, "737 kB": 737_280, "4 MB": 4_000_000}


def rate(name: str, num_bytes: int, keys: list[bytes], move: Callable[[bytes], object]) -> None:
    began = time.perf_counter()
    for key in keys:
        assert move(key) is not False
    seconds = time.perf_counter() - began
    each = seconds / len(keys)
    print(f"  {name:<18}{num_bytes / each / 1e9:7.2f} GB/s {each * 1e6:9.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--read-only", action="store_true", help="what an earlier run left there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, num_bytes in SIZES.items():
            print(name)
            measure(args, (args.folder or Path(folder)) / str(num_bytes), num_bytes)


def measure(args: argparse.Namespace, folder: Path, num_bytes: int) -> None:
    total = args.megabytes << 20
    keys = [b"%032d" % n for n in range(total // num_bytes)]
    data = memoryview(os.urandom(num_bytes))
    into = memoryview(bytearray(num_bytes))
    disk = DiskTier(folder, 2 * total)
    if not args.read_only:
        measure_host(num_bytes, total, keys, data, into)
        rate("disk write", num_bytes, keys, lambda key: disk.write(key, data))
    rate("disk read", num_bytes, keys, lambda key: disk.read(key, into))


def measure_host(
    num_bytes: int, total: int, keys: list[bytes], data: memoryview, into: memoryview
) -> None:
    path = SHARED_MEMORY / f"elinvar-bench-{os.getpid()}"
    host = HostTier(path, total * 11 // 10, [num_bytes])
    try:
        rate("host put, first", num_bytes, keys, lambda key: host.put(key, data))
        again = [b"again%027d" % n for n in range(len(keys))]
        rate("host put", num_bytes, again, lambda key: host.put(key, data))
        rate("host get", num_bytes, again, lambda key: host.get(key, into))
        host.close()
        began = time.perf_counter()
        host = HostTier(path, total * 11 // 10, [num_bytes])
        seconds = time.perf_counter() - began
        print(f"  attach            {seconds * 1e3:7.1f} ms for {len(host.contents()):,} blocks")
    finally:
        host.close()
        path.unlink()


if __name__ == "__main__":
    main()
