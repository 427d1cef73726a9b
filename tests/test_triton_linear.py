"""Products on GPUs, under Triton's interpreter: close to f64, and a row has its bits beside any others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton_matrices
from triton_matrices import KINDS, made

from elinvar.base.config import Activation
from elinvar.base.errors import InputError
from elinvar.ops.ref_rows import gated_product
from elinvar.ops.triton import gather, linear, matrices, tuned
from elinvar.ops.triton.configs import Config
from elinvar.ops.triton.matrices import Matrix

SMALL = Config(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=2)
ROWS = (1, 2, 7, 17, 33)


def inputs(rows: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)


def close(y: torch.Tensor, expected: np.ndarray, rounding: float) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(y.double().numpy() / scale, expected / scale, rtol=0, atol=rounding)
