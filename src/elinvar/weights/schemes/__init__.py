"""Quantised checkpoints as they are published: which tensors each matrix is made of.

`assemble` replaces the tensors that a scheme split a matrix into by one that has the matrix's own
name and shape, and whose rows can be had as codes or as float32 (see base.Matrix). So rules, fixes
and the packing of weights know no scheme. What a model leaves unquantised stays as it is.
docs/design/008-checkpoint-formats.md says what each format becomes and what that loses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from elinvar.base.errors import ModelError
from elinvar.weights.schemes import awq, bnb, compressed, floats, gptq, hqq
from elinvar.weights.schemes.base import Matrix, Parts, short
from elinvar.weights.tensor import HostTensor

Find = Callable[[Parts, Mapping[str, Any]], Iterator[Matrix]]

_METHODS: dict[str, Find] = {
    "gptq": gptq.find,
    "awq": awq.find,
    "compressed-tensors": compressed.find,
    "fp8": floats.find_fp8,
    "fbgemm_fp8": floats.find_fp8,
    "modelopt": floats.find_modelopt,
    "mxfp4": floats.find_mxfp4,
    "bitsandbytes": bnb.find,
    "hqq": hqq.find,
}


def assemble(
    folder: Path, settings: object, tensors: Mapping[str, HostTensor]
) -> dict[str, HostTensor]:
    """The tensors of a folder whose config.json says `settings` under quantization_config.

    Raises ModelError for a method or variant that is not supported, and for parts that are missing
    or do not fit together. What the scales hold is looked at when the weights are packed.
    """
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(method, str) or method not in _METHODS:
        raise ModelError(
            f"{folder} is quantised with {short(method)}, which is not supported; use a model "
            f"with {', '.join(_METHODS)}, or an unquantised one."
        )
    parts = Parts(folder, method, tensors)
    matrices = {matrix.name: matrix.tensor() for matrix in _METHODS[method](parts, settings)}
    for name in matrices:
        if name in parts.left:
            raise ModelError(f"{folder} holds {name} both quantised and not; download it again.")
    return parts.left | matrices
