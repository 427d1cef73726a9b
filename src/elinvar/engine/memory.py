"""How much memory this process may still take: the machine's, within its cgroups' limits."""

from __future__ import annotations

import ctypes
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Bytes that can be allocated without swapping; the page cache counts as free."""
    limits = [_machine_available(proc)]
    for folder in _own_cgroups(proc, cgroup):
        limit = _cgroup_available(folder)
        if limit is not None:
            limits.append(limit)
    return max(0, min(limits))


def _machine_available(proc: Path) -> int:
    text = _read(proc / "meminfo")
    for line in (text or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    import os

    # Not Linux: all physical memory is the best that the standard library knows.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _own_cgroups(proc: Path, cgroup: Path) -> list[Path]:
    """This process's memory cgroup and its ancestors: each may set a limit. In a container the
    path may name a folder of the host that is not mounted: then the mounted root is ours."""
    found: list[Path] = []
    for line in (_read(proc / "self" / "cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = cgroup
        elif "memory" in controllers.split(","):
            root = cgroup / "memory"
        else:
            continue
        folder = root / path.lstrip("/")
        while folder != root:
            found.append(folder)
            folder = folder.parent
        found.append(root)
    return found


def _cgroup_available(folder: Path) -> int | None:
    """Bytes left under this cgroup's own limit; None where it sets none (v2 first, then v1)."""
    for limit_name, usage_name, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _read(folder / limit_name), _read(folder / usage_name)
        if limit is None or usage is None or not limit.strip().isdigit():
            continue
        reclaimable = 0
        for line in (_read(folder / "memory.stat") or "").splitlines():
            key, _, value = line.partition(" ")
            if key == cache_key:
                reclaimable = int(value)
        return int(limit) - int(usage) + reclaimable
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def give_back() -> None:
    """Return freed memory to the system: parsing a vocabulary leaves more behind than it keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
