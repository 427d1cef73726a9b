"""The pieces of PTX inside kernels, run by a small machine here: no GPU is needed for their meaning."""

from __future__ import annotations

import re

import numpy as np
import torch
from numpy.typing import NDArray

from elinvar.ops.triton import decoding
from triton_matrices import E2M1

BYTES = np.arange(256, dtype=np.uint8)


def run(program: str, word: int) -> list[int]:
    """Its results; it has one input, the last operand."""
    outputs = len(set(re.findall(r"\$\d", program))) - 1
    values = {f"${outputs}": word}
    for line in program.strip("{}").split(";"):
        op, _, rest = line.strip().partition(" ")
        if not op or op == ".reg":
            continue
        target, *operands = (operand.strip() for operand in rest.split(","))
        a, b, c = [*(values[o] if o in values else int(o, 0) for o in operands), 0, 0][:3]
        match op.split(".")[0]:
            case "mov":
                result = a
            case "and":
                result = a & b
            case "or":
                result = a | b
            case "xor":
                result = a ^ b
            case "shl":
                result = a << b & 0xFFFFFFFF
            case "shr":
                result = a >> b
            case "prmt":
                pool = (a | b << 32).to_bytes(8, "little")
                result = sum(pool[c >> 4 * i & 7] << 8 * i for i in range(4))
            case _:
                assert op == "fma.rn.bf16x2"
                x, y, z = map(halves, (a, b, c))
                bits = (x * y + z).astype(np.float32).view(np.uint32)
                assert not (bits & 0xFFFF).any(), "exact in bf16"
                result = int(bits[0] >> 16 | bits[1])
        values[target] = result
    return [values[f"${i}"] for i in range(outputs)]


def halves(word: int) -> NDArray[np.float32]:
    """The two bf16 in a word."""
    return np.array([word << 16 & 0xFFFFFFFF, word & 0xFFFF0000], np.uint32).view(np.float32)


def as_f32(words: list[int]) -> NDArray[np.float32]:
    return np.array(words, np.uint32).view(np.float32)


def test_nibbles() -> None:
    for one, other in zip(BYTES, BYTES[::-1], strict=True):
        words = run(decoding.NIBBLES.value, int(one) | int(other) << 8)
        expected = [128 + int(n) for n in (one & 15, other & 15, one >> 4, other >> 4)]
        assert as_f32(words).tolist() == expected


def test_signed_bytes() -> None:
    for one, other in zip(BYTES, BYTES[::-1], strict=True):
        words = run(decoding.SIGNED.value, int(one) | int(other) << 8)
        codes = np.array([one, other]).view(np.int8).astype(int)
        assert as_f32(words).tolist() == (32896 + codes).tolist()


def test_e4m3() -> None:
    numbers = torch.from_numpy(BYTES).view(torch.float8_e4m3fn).float().numpy()
    for one, other in zip(BYTES, BYTES[::-1], strict=True):
        (word,) = run(decoding.E4M3.value, int(one) | int(other) << 8)
        for found, expected in zip(halves(word), numbers[[one, other]], strict=True):
            assert found == expected or np.isnan(expected)
            assert np.signbit(found) == np.signbit(expected) or np.isnan(expected)


def test_e2m1() -> None:
    for one, other in zip(BYTES, BYTES[::-1], strict=True):
        low, high = run(decoding.E2M1.value, int(one) | int(other) << 8)
        assert halves(low).tolist() == E2M1[[one & 15, other & 15]].tolist()
        assert halves(high).tolist() == E2M1[[one >> 4, other >> 4]].tolist()
