// V and I on avx512: one register of sixteen lanes. Included by simd.h inside namespace
// ELINVAR_ISA.

struct V {
    __m512 v;
};
struct I {
    __m512i v;
};
struct I2 {
    I low, high;
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
EL_INLINE V load_int8(const int8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))};
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
EL_INLINE __m256 low_half(V a) { return _mm512_castps512_ps256(a.v); }
EL_INLINE __m256 high_half(V a) { return _mm512_extractf32x8_ps(a.v, 1); }
EL_INLINE I round_to_int(V a) { return {_mm512_cvtps_epi32(a.v)}; }
EL_INLINE V to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
EL_INLINE I int_set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
EL_INLINE void store_bytes(int8_t* p, I a) {  // lanes within -128 .. 127
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
EL_INLINE I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
EL_INLINE I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
EL_INLINE I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
EL_INLINE I operator^(I a, I b) { return {_mm512_xor_si512(a.v, b.v)}; }
EL_INLINE I2 wide_product(I a, uint32_t b) {
    const __m512i factor = _mm512_set1_epi32(static_cast<int32_t>(b));
    const __m512i even = _mm512_mul_epu32(a.v, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
    return {{_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))},
            {_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)}};
}
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
