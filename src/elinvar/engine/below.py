"""The tiers below an engine's KV cache, and what a content in them depends on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import elinvar
from elinvar.base.config import EngineConfig, KVSpec
from elinvar.base.digest import blake2b

if TYPE_CHECKING:
    from elinvar.kv.tiers.hierarchy import Tiers

STAGING_SHARE = 8
"""Of the free memory, for what is on its way to places below where no host memory was asked for,"""
STAGING_LIMIT = 2**30
"""at most this many bytes."""

_COMPUTING = ("models", "nn", "ops", "run", "weights")


def open_tiers(
    config: EngineConfig, specs: Sequence[KVSpec], identity: str, available: int
) -> Tiers | None:
    """None where none are asked for. Raises InputError naming the field when one cannot be used."""
    if not (config.kv_host_memory or config.kv_host_path or config.kv_tiers):
        return None
    from elinvar.kv.tiers.hierarchy import Tiers
    from elinvar.kv.tiers.host import HostTier
    from elinvar.kv.tiers.places import open_tier
    from elinvar.ops.files import exist

    memory = config.kv_host_memory or min(available // STAGING_SHARE, STAGING_LIMIT)
    host = HostTier(
        Path(config.kv_host_path) if config.kv_host_path else None,
        memory,
        [spec.block_bytes for spec in specs],
        identity.encode(),
    )
    lower, kinds = [], Counter[str]()
    try:
        item = 4 if config.kv_dtype == "f32" else 2
        for url in config.kv_tiers:
            tier = open_tier(
                url, config.kv_disk_size, item_bytes=item, field="kv_tiers", exist=exist
            )
            lower.append(tier)
            kinds[tier.name] += 1
            if (number := kinds[tier.name]) > 1:
                tier.name = f"{tier.name}-{number}"
        return Tiers(host, lower)
    except BaseException:
        for tier in lower:
            tier.close()
        host.close()
        raise


def identity(config: EngineConfig, weights: str) -> str:
    """Whatever the bits of a cached content depend on besides its tokens, adapter and tenant: the
    weights, how they are computed with, and the code that does it."""
    parts = (weights, config.device, config.weight_format, config.kv_dtype, code_digest())
    return "|".join(parts)


def code_digest() -> str:
    """Of all that takes part in computing a content. Other instruction sets and threads give the same
    bits; another version might not."""
    home = Path(elinvar.__file__).parent
    digest = blake2b(elinvar.__version__.encode(), digest_size=16)
    for folder in _COMPUTING:
        for path in sorted((home / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    kernels = find_spec("elinvar._cpu")
    if kernels is not None and kernels.origin is not None:
        digest.update(Path(kernels.origin).read_bytes())
    return digest.hexdigest()
