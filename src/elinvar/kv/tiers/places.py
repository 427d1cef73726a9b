"""What a user writes for a tier, and the tier that it means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from elinvar.base.errors import InputError
from elinvar.kv.tiers.packed import PackedTier, SizedTier
from elinvar.kv.tiers.tier import Tier
from elinvar.kv.tiers.wire import read_secret

if TYPE_CHECKING:
    from elinvar.kv.tiers.disk import Exist

_PACKED, _DISK = "packed+", "disk:"
_FORMS = "a folder, tcp://host:port, or s3://bucket/prefix and other URLs that fsspec knows"


def open_tier(
    url: str,
    max_bytes: int | None = None,
    *,
    item_bytes: int = 2,
    field: str = "tier",
    exist: Exist | None = None,
) -> Tier:
    """url: a folder (also `disk:FOLDER`), `tcp://host:port` of an `elinvar kv-server` (its secret
    comes from ELINVAR_KV_SECRET), or a URL for objects. With `packed+` before one of the latter two,
    contents are kept smaller, as numbers of `item_bytes`. max_bytes: of a folder, which needs it;
    the others have bounds of their own. field: the option that a refusal names. exist: as DiskTier has it.
    Raises InputError.
    """
    try:
        if url.startswith(_PACKED):
            return PackedTier(_open_sized(url.removeprefix(_PACKED)), item_bytes)
        if not is_folder(url):
            return _open_sized(url)
    except InputError as error:
        raise InputError(field, str(error)) from error
    folder = url.removeprefix(_DISK)
    if not folder:
        raise InputError(field, f"{field} must be {_FORMS}, got {url!r}.")
    if max_bytes is None:
        message = f"The folder {folder} of {field} needs a size: give kv_disk_size, too."
        raise InputError(field, message)
    from elinvar.kv.tiers.disk import DiskTier, exist_each

    return DiskTier(Path(folder), max_bytes, field=field, exist=exist or exist_each)


def is_folder(url: str) -> bool:
    return "://" not in url and not url.startswith((_PACKED, "tcp:"))


def _open_sized(url: str) -> SizedTier:
    if url.startswith("tcp:"):
        from elinvar.kv.tiers.remote import RemoteTier

        return RemoteTier(url, secret=read_secret())
    if "://" in url:
        from elinvar.kv.tiers.objects import ObjectTier

        return ObjectTier(url)
    raise InputError("tier", "Only tcp:// and URLs for objects can be packed, not a folder.")
