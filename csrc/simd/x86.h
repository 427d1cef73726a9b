// What avx2 and avx512 share: trees over sixteen lanes in registers, a transpose of 16-bit values.
// Included by simd.h inside namespace ELINVAR_ISA.

EL_INLINE float tree_sum(V a) {
    const __m256 t8 = _mm256_add_ps(low_half(a), high_half(a));
    const __m128 t4 = _mm_add_ps(_mm256_castps256_ps128(t8), _mm256_extractf128_ps(t8, 1));
    const __m128 t2 = _mm_add_ps(t4, _mm_movehl_ps(t4, t4));
    return _mm_cvtss_f32(_mm_add_ss(t2, _mm_movehdup_ps(t2)));
}
EL_INLINE float tree_max(V a) {
    const __m256 t8 = _mm256_max_ps(low_half(a), high_half(a));
    const __m128 t4 = _mm_max_ps(_mm256_castps256_ps128(t8), _mm256_extractf128_ps(t8, 1));
    const __m128 t2 = _mm_max_ps(t4, _mm_movehl_ps(t4, t4));
    return _mm_cvtss_f32(_mm_max_ss(t2, _mm_movehdup_ps(t2)));
}

// out[i * ld_out + j] = x[j * ld + i] for i, j below 16. Joining rows i and i + 8 moves each bit of
// (row, column) up by one place: four times is a transpose.
EL_INLINE void transpose(const int8_t* x, ptrdiff_t ld, int8_t* out, ptrdiff_t ld_out) {
    __m128i a[16], b[16];
    EL_UNROLL
    for (int i = 0; i < 16; ++i)
        a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i * ld));
    const auto join = [](const __m128i* from, __m128i* to) {
        EL_UNROLL
        for (int i = 0; i < 8; ++i) {
            to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 8]);
            to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 8]);
        }
    };
    join(a, b);
    join(b, a);
    join(a, b);
    join(b, a);
    EL_UNROLL
    for (int i = 0; i < 16; ++i)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * ld_out), a[i]);
}
EL_INLINE void transpose(const uint16_t* x, ptrdiff_t ld, uint16_t* out, ptrdiff_t ld_out) {
    __m256i a[16], b[16];
    EL_UNROLL
    for (int i = 0; i < 16; ++i)
        a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i * ld));
    // Bits of (row, column) go round: joining rows i and i + 4 turns r2 r1 r0 | c2 c1 c0 into
    // r1 r0 c2 | c1 c0 r2; three times is a transpose of each 8 x 8 quarter.
    const auto join = [](const __m256i* from, __m256i* to) {
        EL_UNROLL
        for (int i = 0; i < 4; ++i) {
            to[2 * i] = _mm256_unpacklo_epi16(from[i], from[i + 4]);
            to[2 * i + 1] = _mm256_unpackhi_epi16(from[i], from[i + 4]);
        }
    };
    EL_UNROLL
    for (int half = 0; half < 16; half += 8) {
        join(a + half, b + half);
        join(b + half, a + half);
        join(a + half, b + half);
    }
    EL_UNROLL
    for (int i = 0; i < 8; ++i) {
        const __m256i left = _mm256_permute2x128_si256(b[i], b[i + 8], 0x20);
        const __m256i right = _mm256_permute2x128_si256(b[i], b[i + 8], 0x31);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * ld_out), left);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (i + 8) * ld_out), right);
    }
}
