// V: sixteen f32 lanes on every instruction set, so that one source means one arithmetic.
// Only correctly rounded instructions are used: add, mul, fma, div, sqrt, conversions. I: as many
// integers of 32 bits; I2: the halves of products.
// Included once per instruction set, inside namespace ELINVAR_ISA (see kernels.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(ELINVAR_AVX512) || defined(ELINVAR_AVX2)
#include <immintrin.h>
#elif defined(ELINVAR_NEON)
#include <arm_neon.h>
#endif

#define EL_INLINE static inline __attribute__((always_inline))
// Register tiles need their loops gone; the compiler's own limit stops short of that.
#if defined(__clang__)
#define EL_UNROLL _Pragma("unroll")
#else
#define EL_UNROLL _Pragma("GCC unroll 16")
#endif

namespace ELINVAR_ISA {

using std::int32_t;
using std::int8_t;
using std::ptrdiff_t;
using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr int kLanes = 16;

EL_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
EL_INLINE float bits_to_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
EL_INLINE uint32_t float_to_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}
EL_INLINE float fmadd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EL_INLINE float max_of(float a, float b) { return a > b ? a : b; }
EL_INLINE int min_of(int a, int b) { return a < b ? a : b; }
EL_INLINE int max_of(int a, int b) { return a > b ? a : b; }

EL_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return bits_to_float(sign | float_to_bits(magnitude));
}
// Round to nearest even; |f| must be at most 65504 (callers saturate).
EL_INLINE uint16_t float_to_half(float f) {
    const uint32_t u = float_to_bits(f);
    const uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (a < 0x38800000) {  // subnormal half: let the f32 adder do the rounding
        const float shifted = bits_to_float(a) + 0.5f;
        return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000));
    }
    const uint32_t rounded = a + 0xfff + ((a >> 13) & 1);
    return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}
EL_INLINE float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
EL_INLINE uint16_t float_to_bf16(float f) {
    const uint32_t u = float_to_bits(f);
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

#if defined(ELINVAR_AVX512)
#include "simd/avx512.h"
#elif defined(ELINVAR_AVX2)
#include "simd/avx2.h"
#elif defined(ELINVAR_NEON)
#include "simd/neon.h"
#else
#include "simd/scalar.h"
#endif

// The tree that joins sixteen partial sums: lanes i and i + 8, then + 4, + 2, + 1.
#if defined(ELINVAR_AVX512) || defined(ELINVAR_AVX2)
#include "simd/x86.h"
#else
EL_INLINE float tree_sum(V a) {
    float t[16];
    store(t, a);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) t[i] = t[i] + t[i + width];
    return t[0];
}
EL_INLINE float tree_max(V a) {
    float t[16];
    store(t, a);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) t[i] = max_of(t[i], t[i + width]);
    return t[0];
}
// out[i * ld_out + j] = x[j * ld + i] for i, j below 16.
template <class T>
EL_INLINE void transpose(const T* x, ptrdiff_t ld, T* out, ptrdiff_t ld_out) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) out[i * ld_out + j] = x[j * ld + i];
}
#endif

// e^x. Range reduction by ln 2 in two parts (Cody and Waite, 1980), a polynomial of degree 6 on
// |r| <= ln(2)/2; below -87.33 the result is 0, above 88.37 it stays at e^88.37.
EL_INLINE V exp(V x) {
    const V low = set1(-87.33f);
    const V clamped = min(max(x, low), set1(88.37f));
    const I n = round_to_int(clamped * set1(1.44269504f));
    const V nf = to_float(n);
    V r = fma(nf, set1(-0.693359375f), clamped);
    r = fma(nf, set1(2.12194440e-4f), r);
    V p = set1(1.3888889e-3f);
    p = fma(p, r, set1(8.3333333e-3f));
    p = fma(p, r, set1(4.1666668e-2f));
    p = fma(p, r, set1(1.6666667e-1f));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    const V result = p * as_float(shift_left<23>(n + int_set1(127)));
    return select_lt(x, low, zero(), result);
}

// tanh x = e / (e + 2) with e = e^(2|x|) - 1: near 0 nothing cancels. The reduction is that of exp,
// its polynomial one degree longer and without the 1. From 10 on the result is 1; a NaN stays.
EL_INLINE V tanh(V x) {
    const V bounded = min(set1(10.0f), abs(x)), t = min(bounded, set1(10.0f));
    const V twice = t + t;
    const I n = round_to_int(twice * set1(1.44269504f));
    const V nf = to_float(n);
    V r = fma(nf, set1(-0.693359375f), twice);
    r = fma(nf, set1(2.12194440e-4f), r);
    V p = set1(1.9841270e-4f);
    p = fma(p, r, set1(1.3888889e-3f));
    p = fma(p, r, set1(8.3333333e-3f));
    p = fma(p, r, set1(4.1666668e-2f));
    p = fma(p, r, set1(1.6666667e-1f));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    const V power = as_float(shift_left<23>(n + int_set1(127)));
    const V e = fma(p * r, power, power - set1(1.0f));
    const V y = e / (e + set1(2.0f));
    // In this order min keeps a NaN in `bounded`, and none in `t`: its integer would differ between
    // instruction sets.
    return select_lt(bounded, set1(11.0f), select_lt(x, zero(), zero() - y, y), bounded);
}

// ln x for normal x > 0: x = 2^e m with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s) with
// s = (m - 1) / (m + 1), a series in s^2.
EL_INLINE V log(V x) {
    const I bits = as_int(x);
    const I e = shift_right_signed<23>(bits - int_set1(0x3f3504f3));
    const V m = as_float(bits - shift_left<23>(e));
    const V f = m - set1(1.0f);
    const V s = f / (m + set1(1.0f));
    const V z = s * s;
    V p = set1(0.2222222222f);
    p = fma(p, z, set1(0.2857142857f));
    p = fma(p, z, set1(0.4f));
    p = fma(p, z, set1(0.6666666667f));
    // ln m = f - s (f - z p): keeps the leading term f exact, as 2 s = f - s f.
    const V lnm = f - s * (f - z * p);
    const V ef = to_float(e);
    return fma(ef, set1(0.693359375f), fma(ef, set1(-2.12194440e-4f), lnm));
}

}  // namespace ELINVAR_ISA
