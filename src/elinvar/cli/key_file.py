"""Changing a file of tenants as a person would: what else is in it, comments too, stays as it is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

from elinvar.base.errors import InputError
from elinvar.server.tenants import hash_key, read_tenants

_DIGEST = re.compile(r"[0-9a-f]{8,64}")

Tables = MutableMapping[str, Any]


def add_key(path: Path, tenant: str, digest: str, admin: bool) -> None:
    """Gives the tenant another key; a file or tenant that is not there is begun."""

    def change(tables: Tables) -> None:
        table = tables.setdefault(tenant, _new_table(path))
        table["key_sha256"] = [*_listed(table.get("key_sha256")), digest]
        if admin:
            table["admin"] = True

    _change(path, change)


def remove_key(path: Path, key: str) -> str:
    """Takes out a key, or the one whose SHA-256 begins with `key`; returns whose it was. Raises
    InputError where none or several are meant."""
    known = read_tenants(path)
    exact = [one for one in known.keys if one[0].hex() == hash_key(key)]
    alike = [one for one in known.keys if _DIGEST.fullmatch(key) and one[0].hex().startswith(key)]
    found = exact or alike
    if len(found) != 1:
        why = "several keys begin so; give more of it" if found else "no key in it is this one"
        raise InputError("key", f"{path}: {why}; 'elinvar keys list' shows them.")
    digest, tenant = found[0][0].hex(), found[0][1]

    def change(tables: Tables) -> None:
        table = tables[tenant]
        kept = {
            "key_sha256": [
                one for one in _listed(table.get("key_sha256")) if one.lower() != digest
            ],
            "key": [one for one in _listed(table.get("key")) if hash_key(one) != digest],
        }
        for name, values in kept.items():
            if values:
                table[name] = values
            elif name in table:
                del table[name]
        if not (kept["key_sha256"] or kept["key"] or tenant == "default"):
            del tables[tenant]

    _change(path, change)
    return tenant


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _new_table(path: Path) -> Any:
    if path.suffix == ".json":
        return {}
    import tomlkit

    return tomlkit.table()


def _change(path: Path, change: Callable[[Tables], None]) -> None:
    """The new text is read as a server would before it replaces the old one."""
    load: Callable[[str], Any]
    dump: Callable[[Any], str]
    if path.suffix == ".json":
        load, dump = json.loads, lambda value: json.dumps(value, indent=2) + "\n"
    else:
        import tomlkit

        load, dump = tomlkit.parse, tomlkit.dumps
    if path.exists():
        read_tenants(path)  # says what is wrong with it
        whole = load(path.read_bytes().decode("utf-8-sig"))
    else:
        whole = load("{}" if path.suffix == ".json" else "")
    tables = whole.setdefault("tenants", {})
    change(tables)
    if not tables:
        raise InputError(
            "key", f"It is the last key in {path}; delete the file to ask nobody for one."
        )
    # Only its owner may read it: a file of before keeps the rights it had.
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    beside = path.with_name(f".{path.stem}.{os.urandom(6).hex()}{path.suffix}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(dump(whole))
            file.flush()
            os.fsync(file.fileno())
        read_tenants(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
