"""Gumbel noise of (seed, position, token id), to the bit that of csrc/sample.h; for kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(counter, position, key_low, key_high):
    """Philox4x32-10 (Salmon et al., 2011) of counters u32: the four words of each."""
    c0 = counter
    c1 = tl.zeros_like(counter) + position
    c2, c3 = tl.zeros_like(counter), tl.zeros_like(counter)
    first = tl.zeros_like(counter) + 0xD2511F53
    second = tl.zeros_like(counter) + 0xCD9E8D57
    k0, k1 = tl.zeros_like(counter) + key_low, tl.zeros_like(counter) + key_high
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(first, c0), tl.umulhi(second, c2)
        low0, low1 = first * c0, second * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def gumbel(start, position, key_low, key_high, COUNT: tl.constexpr):
    """Noise of the tokens start .. start + COUNT, multiples of 4: -ln(-ln u) with u inside (0, 1) of 23
    bits of a token's word."""
    counters = start // 4 + tl.arange(0, COUNT // 4)
    w0, w1, w2, w3 = philox(counters.to(tl.uint32), position, key_low, key_high)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [COUNT])
    u = ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return 0.0 - log(0.0 - log(u))


@triton.jit
def log(x):
    """ln x of normal x > 0 as csrc/simd.h has it. A chip's own is no use here: near 1 it is off by as
    much as ln u is itself, where the largest noise comes from."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    f = m - 1.0
    s = tl.div_rn(f, m + 1.0)
    z = s * s
    p = tl.zeros_like(x) + 0.2222222222
    p = tl.fma(p, z, tl.zeros_like(x) + 0.2857142857)
    p = tl.fma(p, z, tl.zeros_like(x) + 0.4)
    p = tl.fma(p, z, tl.zeros_like(x) + 0.6666666667)
    lnm = f - s * (f - z * p)
    ef = e.to(tl.float32)
    low = tl.fma(ef, tl.zeros_like(x) - 2.12194440e-4, lnm)
    return tl.fma(ef, tl.zeros_like(x) + 0.693359375, low)
