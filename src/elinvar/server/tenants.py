"""Tenants: whose API key a request has, read from a file, and the layer that asks for it.

Owns keys; what a tenant may take is base.limits', and who keeps to it is the scheduler.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from elinvar.base.errors import InputError
from elinvar.base.handling import MAX_NAME
from elinvar.base.limits import ANY_TENANT, TenantLimits
from elinvar.server.errors import ApiError

DEFAULT = "default"
"""The tenant of everybody without a known key, where the file has one of this name."""
_LIMITS = tuple(one.name for one in fields(TenantLimits))
_KEYS = "key", "key_sha256"
_RIGHTS = "models", "admin"
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_HALF = re.compile("[\ud800-\udfff]")
"""What JSON can write and UTF-8 cannot."""


@dataclass(frozen=True, slots=True)
class Tenants:
    """Who is who. Without any, everybody is the tenant ""."""

    limits: Mapping[str, TenantLimits] = field(default_factory=dict)
    """By name; see EngineConfig.tenants."""
    keys: tuple[tuple[bytes, str], ...] = ()
    """(SHA-256 of a key, name)."""
    models: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Names of models that a tenant may ask for; one that is not here may ask for all."""
    admins: frozenset[str] = frozenset()
    """Those who may use what is about the server rather than about their own requests."""

    def of(self, key: bytes | None) -> str | None:
        """The name; None: nobody's key. The time it takes says nothing about the keys there are."""
        if not self.limits:
            return ""
        found = DEFAULT if DEFAULT in self.limits else None
        if key is not None:
            given = hashlib.sha256(key).digest()
            for known, name in self.keys:
                if hmac.compare_digest(given, known):
                    found = name
        return found


NOBODY = Tenants()


def hash_key(key: str) -> str:
    """What a file may have in the place of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_tenants(path: Path) -> Tenants:
    """The tenants of a TOML or JSON file (docs/serving.md). Raises InputError naming the file and
    what is wrong in it."""
    tables = _parse(path)
    limits: dict[str, TenantLimits] = {}
    keys: dict[bytes, str] = {}
    models: dict[str, frozenset[str]] = {}
    admins: set[str] = set()
    for name, table in tables.items():
        try:
            limits[name], digests = _tenant(name, table)
            if "models" in table:
                models[name] = frozenset(_texts(table, "models"))
            if _is_admin(table):
                admins.add(name)
            for digest in digests:
                if digest in keys:
                    raise InputError("key", f"it has the key of {keys[digest]!r}; give it another.")
                keys[digest] = name
        except InputError as error:
            raise InputError("tenants", f"Bad tenant {name!r} in {path}: {error}") from None
    return Tenants(limits, tuple(keys.items()), models, frozenset(admins))


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        is_json = path.suffix == ".json"
        found = json.loads(text) if is_json else tomllib.loads(text)
    except UnicodeDecodeError:
        raise InputError("tenants", f"{path} is not UTF-8 text.") from None
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise InputError("tenants", f"{path} is not {kind}: {error}.") from None
    tables = found.get("tenants") if isinstance(found, dict) else None
    if not isinstance(tables, dict) or not tables or found.keys() != {"tenants"}:
        raise InputError(
            "tenants", f"{path} must hold tables of tenants such as [tenants.alice], nothing else."
        )
    return tables


def _tenant(name: str, table: Any) -> tuple[TenantLimits, list[bytes]]:
    if not name or name == ANY_TENANT or len(name) > MAX_NAME:
        raise InputError("name", f"a name has 1 to {MAX_NAME} characters and is not {ANY_TENANT}.")
    if _HALF.search(name):
        raise InputError("name", "the name holds half of a surrogate pair, write a character.")
    if not isinstance(table, dict):
        raise InputError("tenants", "it must be a table of settings.")
    unknown = table.keys() - {*_LIMITS, *_KEYS, *_RIGHTS}
    if unknown:
        known = ", ".join((*_KEYS, *_RIGHTS, *_LIMITS))
        raise InputError("tenants", f"unknown setting {min(unknown)!r}; there are {known}.")
    digests = [hashlib.sha256(key.encode()).digest() for key in _texts(table, "key")]
    for text in _texts(table, "key_sha256"):
        if not _SHA256.fullmatch(text):
            raise InputError(
                "key_sha256",
                "key_sha256 must be the 64 hexadecimal digits that 'elinvar keys' prints.",
            )
        digests.append(bytes.fromhex(text))
    if not digests and name != DEFAULT:
        raise InputError("key", f"give it a key or a key_sha256; only {DEFAULT!r} needs none.")
    return TenantLimits(**{n: table[n] for n in _LIMITS if n in table}), digests


def _texts(table: Mapping[str, Any], name: str) -> list[str]:
    """One text or several: while a key is replaced by another, both are good."""
    value = table.get(name, [])
    many = [value] if isinstance(value, str) else value
    if not isinstance(many, list) or not all(isinstance(one, str) and one for one in many):
        raise InputError(name, f"{name} must be a text that is not empty, or a list of such.")
    if any(_HALF.search(one) for one in many):
        raise InputError(name, f"{name} holds half of a surrogate pair, which is not a character.")
    return many


def _is_admin(table: Mapping[str, Any]) -> bool:
    value = table.get("admin", False)
    if not isinstance(value, bool):
        raise InputError("admin", f"admin must be true or false, got {value!r}.")
    return value


def of_key(key: str) -> Tenants:
    """One tenant, who may do everything and whose key is this."""
    digest = hashlib.sha256(key.encode()).digest()
    return Tenants({"owner": TenantLimits()}, ((digest, "owner"),), {}, frozenset({"owner"}))


PUBLIC = frozenset({"/", "/health", "/ready", "/metrics", "/openapi.json", "/favicon.ico"})
"""Paths that ask for no key."""
_PUBLIC_FOLDERS = ("/console/",)
ADMIN = frozenset(
    {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/sleep", "/wake_up", "/is_sleeping"}
)
"""Paths of the server rather than of one's own requests."""
_ON_ADMIN_PORT = ADMIN | {"/metrics", "/live"}
_EVERYWHERE = frozenset({"/", "/health", "/ready"})
_FOLDERS_EVERYWHERE = ("/console/", "/v1/requests/")
"""For the console: whoever sees what runs may ask about it, and end it."""


class Keys:
    """The layer that finds out whose request it is, and what they may ask for.

    admin_port: what is for administrators, and /metrics, is there only, and nothing else is."""

    def __init__(
        self,
        app: ASGIApp,
        tenants: Callable[[], Tenants],
        admin_port: int | None = None,
        origins: Sequence[str] = (),
    ) -> None:
        """tenants: those of now: they may change. origins: of pages elsewhere that may ask."""
        self._app = app
        self._tenants = tenants
        self._admin_port = admin_port
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._admit(scope)
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        path, known = scope["path"], self._tenants()
        if path.endswith("\n"):
            # Routes match it as if that were not there, and rights go by the path.
            raise ApiError(404, f"Unknown URL: {path[:200]!r}.", None, "unknown_url")
        if _comes_from_elsewhere(scope, self._origins):
            message = "Pages of other origins may not ask; start the server with --cors-origin."
            raise ApiError(403, message, None, "foreign_origin", "permission_error")
        here = self._admin_port is not None and scope["server"][1] == self._admin_port
        everywhere = path in _EVERYWHERE or path.startswith(_FOLDERS_EVERYWHERE)
        elsewhere = here != (path in _ON_ADMIN_PORT) and not everywhere
        if self._admin_port is not None and elsewhere:
            where = "another" if here else "the administrators'"
            raise ApiError(404, f"{path[:200]} is served at {where} port.", None, "unknown_url")
        # A port of their own keeps others away already, where no key is anybody's.
        if path in PUBLIC or path.startswith(_PUBLIC_FOLDERS) or (here and not known.admins):
            # They may be asked by anybody, and tell administrators more.
            private = bool(known.limits) and not here
            scope["elinvar.admin"] = not private or known.of(_given_key(scope)) in known.admins
            return
        tenant = known.of(_given_key(scope))
        if tenant is None:
            raise _unknown_key()
        if path in ADMIN and known.limits and tenant not in known.admins:
            message = f"{path} is for keys of tenants that have admin = true."
            raise ApiError(403, message, None, "not_an_admin", "permission_error")
        scope["elinvar.tenant"] = tenant
        scope["elinvar.admin"] = tenant in known.admins or not known.limits
        scope["elinvar.models"] = known.models.get(tenant)


def tenant_of(scope: Scope) -> str:
    """Whose request it is; "" where keys mean nothing."""
    return str(scope.get("elinvar.tenant", ""))


def is_admin(scope: Scope) -> bool:
    """Whether they may see and end what others asked for, too."""
    return bool(scope.get("elinvar.admin", True))


def allowed_models(scope: Scope) -> frozenset[str] | None:
    """Names of models that whose request it is may ask for; None: all."""
    found: frozenset[str] | None = scope.get("elinvar.models")
    return found


def _comes_from_elsewhere(scope: Scope, origins: Sequence[str]) -> bool:
    """Whether a browser sends it for a page of another site, which it does unasked where the request
    looks like a form's: such a page could end answers here, though it cannot read them."""
    headers = dict(scope["headers"])
    if headers.get(b"sec-fetch-site") not in (b"cross-site", b"same-site"):
        return False
    if headers.get(b"sec-fetch-mode") == b"navigate" and scope["method"] == "GET":  # a link to here
        return False
    return "*" not in origins and headers.get(b"origin", b"").decode("latin-1") not in origins


def _given_key(scope: Scope) -> bytes | None:
    """From `Authorization: Bearer`, else from `x-api-key`, where Anthropic's clients have it."""
    headers = dict(scope["headers"])
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer":
        return bytes(key).strip()
    return headers.get(b"x-api-key")


def _unknown_key() -> ApiError:
    # Not a word of the key that was given: answers end up in logs.
    return ApiError(
        401,
        "Incorrect API key provided; send one that this server knows as 'Authorization: Bearer KEY'.",
        None,
        "invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
