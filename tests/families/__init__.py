"""Every family of the registry in miniature, by groups: a configuration for engines with random weights,
and configurations for transformers to build. A family that is in the registry and not here fails."""

from __future__ import annotations

from elinvar.base.config import ModelConfig
from families import chatglm, deepseek, gemma, gpt, internlm, llama, mixtures, qwen, tail
from families.base import Case

_GROUPS = (llama, mixtures, qwen, gpt, deepseek, gemma, tail, chatglm, internlm)

ENGINES: dict[str, ModelConfig] = {c.family: c for group in _GROUPS for c in group.ENGINES}
"""By family: what the tests of the contract run."""

CASES: dict[str, Case] = {name: case for group in _GROUPS for name, case in group.CASES.items()}
"""By name: what transformers builds."""
