"""text_part: the text model inside a checkpoint of one that also sees or hears.

Such a checkpoint describes it under text_config, and has its weights behind a prefix of their own. All
other weights stay under their names, for nobody asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elinvar.base.errors import ModelError
from elinvar.weights.tensor import HostTensor

_OUTER = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")
"""What the whole model says of itself holds for its text, too."""
_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model."}
_HEAD = "lm_head.weight"


def text_part(
    folder: Path, config: dict[str, Any], tensors: dict[str, HostTensor]
) -> tuple[dict[str, Any], dict[str, HostTensor]]:
    """Configuration and tensors as the text model alone would have them; of another they are what
    they were.

    Inside and outside of text_config files contradict each other over tied heads: a head that is
    not there is tied. Raises ModelError for a weight that is there under two names.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config, tensors
    names = {text_name(name): name for name in tensors}
    for name in tensors.keys() - names.values():
        raise ModelError(
            f"{folder} holds {name} and {names[text_name(name)]}, which are one weight; "
            "download it again."
        )
    tensors = {name: tensors[stored] for name, stored in names.items()}
    outer = {key: config[key] for key in _OUTER if config.get(key) is not None}
    return {**text, **outer, "tie_word_embeddings": _HEAD not in tensors}, tensors


def text_name(name: str) -> str:
    """What the text model alone calls it."""
    for prefix, plain in _PREFIXES.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name.removeprefix("language_model.")
