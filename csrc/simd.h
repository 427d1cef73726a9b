// V: sixteen f32 lanes on every instruction set, so that one source means one arithmetic.
// Only correctly rounded instructions are used: add, mul, fma, div, sqrt, conversions.
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

struct V {
    __m512 v;
};
struct I {
    __m512i v;
};
EL_INLINE V zero() { return {_mm512_setzero_ps()}; }
EL_INLINE V set1(float x) { return {_mm512_set1_ps(x)}; }
EL_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
EL_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
EL_INLINE V load_n(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
EL_INLINE void store_n(float* p, V a, int n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
EL_INLINE V load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
EL_INLINE V load_bf16(const uint16_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
EL_INLINE void store_half(uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
EL_INLINE V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
EL_INLINE V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
EL_INLINE V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
EL_INLINE V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
EL_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
EL_INLINE V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
EL_INLINE V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
EL_INLINE V abs(V a) { return {_mm512_abs_ps(a.v)}; }
EL_INLINE V select_lt(V a, V b, V yes, V no) {  // a < b ? yes : no
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
EL_INLINE I round_to_int(V a) { return {_mm512_cvtps_epi32(a.v)}; }
EL_INLINE V to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
EL_INLINE I int_set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
EL_INLINE I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
EL_INLINE I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
EL_INLINE I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int N>
EL_INLINE I shift_left(I a) {
    return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
EL_INLINE I shift_right_signed(I a) {
    return {_mm512_srai_epi32(a.v, N)};
}
EL_INLINE V as_float(I a) { return {_mm512_castsi512_ps(a.v)}; }
EL_INLINE I as_int(V a) { return {_mm512_castps_si512(a.v)}; }

#elif defined(ELINVAR_AVX2)

struct V {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};
EL_INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
EL_INLINE V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
EL_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
EL_INLINE void store(float* p, V x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
EL_INLINE V load_n(const float* p, int n) {
    float t[16] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
}
EL_INLINE void store_n(float* p, V x, int n) {
    float t[16];
    store(t, x);
    for (int i = 0; i < n; ++i) p[i] = t[i];
}
EL_INLINE V load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
EL_INLINE __m256 bf16_half(const uint16_t* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
EL_INLINE V load_bf16(const uint16_t* p) { return {bf16_half(p), bf16_half(p + 8)}; }
EL_INLINE void store_half(uint16_t* p, V x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, mode));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, mode));
}
EL_INLINE V operator+(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
EL_INLINE V operator-(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
EL_INLINE V operator*(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
EL_INLINE V operator/(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
EL_INLINE V fma(V x, V y, V z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
EL_INLINE V max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
EL_INLINE V min(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
EL_INLINE V abs(V x) {
    const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
EL_INLINE V select_lt(V x, V y, V yes, V no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
EL_INLINE I round_to_int(V x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
EL_INLINE V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
EL_INLINE I int_set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
EL_INLINE I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
EL_INLINE I operator-(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
EL_INLINE I operator&(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int N>
EL_INLINE I shift_left(I x) {
    return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N>
EL_INLINE I shift_right_signed(I x) {
    return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
}
EL_INLINE V as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
EL_INLINE I as_int(V x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

#elif defined(ELINVAR_NEON)

#define EL_EACH(expr)             \
    for (int i = 0; i < 4; ++i) { \
        r.v[i] = expr;            \
    }                             \
    return r

struct V {
    float32x4_t v[4];
};
struct I {
    int32x4_t v[4];
};
EL_INLINE V set1(float x) {
    V r;
    EL_EACH(vdupq_n_f32(x));
}
EL_INLINE V zero() { return set1(0.0f); }
EL_INLINE V load(const float* p) {
    V r;
    EL_EACH(vld1q_f32(p + 4 * i));
}
EL_INLINE void store(float* p, V a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
EL_INLINE V load_n(const float* p, int n) {
    float t[16] = {};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
}
EL_INLINE void store_n(float* p, V a, int n) {
    float t[16];
    store(t, a);
    for (int i = 0; i < n; ++i) p[i] = t[i];
}
EL_INLINE V load_half(const uint16_t* p) {
    V r;
    EL_EACH(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
EL_INLINE V load_bf16(const uint16_t* p) {
    V r;
    EL_EACH(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}
EL_INLINE void store_half(uint16_t* p, V a) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
EL_INLINE V operator+(V a, V b) {
    V r;
    EL_EACH(vaddq_f32(a.v[i], b.v[i]));
}
EL_INLINE V operator-(V a, V b) {
    V r;
    EL_EACH(vsubq_f32(a.v[i], b.v[i]));
}
EL_INLINE V operator*(V a, V b) {
    V r;
    EL_EACH(vmulq_f32(a.v[i], b.v[i]));
}
EL_INLINE V operator/(V a, V b) {
    V r;
    EL_EACH(vdivq_f32(a.v[i], b.v[i]));
}
EL_INLINE V fma(V a, V b, V c) {
    V r;
    EL_EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i]));
}
EL_INLINE V max(V a, V b) {  // a > b ? a : b, as on x86
    V r;
    EL_EACH(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
EL_INLINE V min(V a, V b) {
    V r;
    EL_EACH(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
EL_INLINE V abs(V a) {
    V r;
    EL_EACH(vabsq_f32(a.v[i]));
}
EL_INLINE V select_lt(V a, V b, V yes, V no) {
    V r;
    EL_EACH(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]));
}
EL_INLINE I round_to_int(V a) {
    I r;
    EL_EACH(vcvtnq_s32_f32(a.v[i]));
}
EL_INLINE V to_float(I a) {
    V r;
    EL_EACH(vcvtq_f32_s32(a.v[i]));
}
EL_INLINE I int_set1(int32_t x) {
    I r;
    EL_EACH(vdupq_n_s32(x));
}
EL_INLINE I operator+(I a, I b) {
    I r;
    EL_EACH(vaddq_s32(a.v[i], b.v[i]));
}
EL_INLINE I operator-(I a, I b) {
    I r;
    EL_EACH(vsubq_s32(a.v[i], b.v[i]));
}
EL_INLINE I operator&(I a, I b) {
    I r;
    EL_EACH(vandq_s32(a.v[i], b.v[i]));
}
template <int N>
EL_INLINE I shift_left(I a) {
    I r;
    EL_EACH(vshlq_n_s32(a.v[i], N));
}
template <int N>
EL_INLINE I shift_right_signed(I a) {
    I r;
    EL_EACH(vshrq_n_s32(a.v[i], N));
}
EL_INLINE V as_float(I a) {
    V r;
    EL_EACH(vreinterpretq_f32_s32(a.v[i]));
}
EL_INLINE I as_int(V a) {
    I r;
    EL_EACH(vreinterpretq_s32_f32(a.v[i]));
}
#undef EL_EACH

#else  // scalar: the same arithmetic, one lane after the other

#define EL_EACH(expr)                  \
    for (int i = 0; i < kLanes; ++i) { \
        r.v[i] = expr;                 \
    }                                  \
    return r

struct V {
    float v[16];
};
struct I {
    int32_t v[16];
};
EL_INLINE V set1(float x) {
    V r;
    EL_EACH(x);
}
EL_INLINE V zero() { return set1(0.0f); }
EL_INLINE V load(const float* p) {
    V r;
    EL_EACH(p[i]);
}
EL_INLINE void store(float* p, V a) { std::memcpy(p, a.v, sizeof(a.v)); }
EL_INLINE V load_n(const float* p, int n) {
    V r;
    EL_EACH(i < n ? p[i] : 0.0f);
}
EL_INLINE void store_n(float* p, V a, int n) {
    for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
EL_INLINE V load_half(const uint16_t* p) {
    V r;
    EL_EACH(half_to_float(p[i]));
}
EL_INLINE V load_bf16(const uint16_t* p) {
    V r;
    EL_EACH(bf16_to_float(p[i]));
}
EL_INLINE void store_half(uint16_t* p, V a) {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(a.v[i]);
}
EL_INLINE V operator+(V a, V b) {
    V r;
    EL_EACH(a.v[i] + b.v[i]);
}
EL_INLINE V operator-(V a, V b) {
    V r;
    EL_EACH(a.v[i] - b.v[i]);
}
EL_INLINE V operator*(V a, V b) {
    V r;
    EL_EACH(a.v[i] * b.v[i]);
}
EL_INLINE V operator/(V a, V b) {
    V r;
    EL_EACH(a.v[i] / b.v[i]);
}
EL_INLINE V fma(V a, V b, V c) {
    V r;
    EL_EACH(fmadd(a.v[i], b.v[i], c.v[i]));
}
EL_INLINE V max(V a, V b) {
    V r;
    EL_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
EL_INLINE V min(V a, V b) {
    V r;
    EL_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
}
EL_INLINE V abs(V a) {
    V r;
    EL_EACH(bits_to_float(float_to_bits(a.v[i]) & 0x7fffffff));
}
EL_INLINE V select_lt(V a, V b, V yes, V no) {
    V r;
    EL_EACH(a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}
EL_INLINE I round_to_int(V a) {
    I r;
    EL_EACH(static_cast<int32_t>(__builtin_rintf(a.v[i])));
}
EL_INLINE V to_float(I a) {
    V r;
    EL_EACH(static_cast<float>(a.v[i]));
}
EL_INLINE I int_set1(int32_t x) {
    I r;
    EL_EACH(x);
}
EL_INLINE I operator+(I a, I b) {
    I r;
    EL_EACH(static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])));
}
EL_INLINE I operator-(I a, I b) {
    I r;
    EL_EACH(static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) - static_cast<uint32_t>(b.v[i])));
}
EL_INLINE I operator&(I a, I b) {
    I r;
    EL_EACH(a.v[i] & b.v[i]);
}
template <int N>
EL_INLINE I shift_left(I a) {
    I r;
    EL_EACH(static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N));
}
template <int N>
EL_INLINE I shift_right_signed(I a) {
    I r;
    EL_EACH(a.v[i] >> N);
}
EL_INLINE V as_float(I a) {
    V r;
    EL_EACH(bits_to_float(static_cast<uint32_t>(a.v[i])));
}
EL_INLINE I as_int(V a) {
    I r;
    EL_EACH(static_cast<int32_t>(float_to_bits(a.v[i])));
}
#undef EL_EACH

#endif

// The tree that joins sixteen partial sums: lanes i and i + 8, then + 4, + 2, + 1.
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
