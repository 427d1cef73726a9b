"""Every family of the registry in miniature, a file a group: configurations for engines with random
weights, and configurations for transformers to build. A family that is in the registry and not here
fails."""

from __future__ import annotations

import importlib
import pkgutil

from elinvar.base.config import ModelConfig
from families.base import Case

_GROUPS = [
    importlib.import_module(f"families.{module.name}")
    for module in pkgutil.iter_modules(__path__)
    if module.name != "base"
]

ENGINES: dict[str, ModelConfig] = {c.family: c for group in _GROUPS for c in group.ENGINES}
"""By family: what the tests of the contract run."""

CASES: dict[str, Case] = {name: case for group in _GROUPS for name, case in group.CASES.items()}
"""By name: what transformers builds."""
assert len(CASES) == sum(len(group.CASES) for group in _GROUPS), "two cases of one name"
