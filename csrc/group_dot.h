// The one part of `linear` written per instruction set. Included inside namespace ELINVAR_ISA.
//
// Integer dots of one group of 32 against 16 columns, for MR rows of activations side by side.
// codes of q4: byte (c, n, j) = k 8c + j low, 8c + 4 + j high; of q8: byte (c, n, j) = k 4c + j.

#if defined(ELINVAR_AVX512)

EL_INLINE __m512i broadcast4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}
template <int MR>
EL_INLINE void q4_group(const uint8_t* codes, const QuantGroup* x, I* dots) {
    const __m512i mask = _mm512_set1_epi8(15);
    EL_UNROLL
    for (int r = 0; r < MR; ++r) dots[r].v = _mm512_setzero_si512();
    EL_UNROLL
    for (int c = 0; c < 4; ++c) {
        const __m512i b = _mm512_loadu_si512(codes + 64 * c);
        const __m512i low = _mm512_and_si512(b, mask);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(b, 4), mask);
        EL_UNROLL
        for (int r = 0; r < MR; ++r)
            dots[r].v = _mm512_dpbusd_epi32(dots[r].v, low, broadcast4(x[r].codes + 8 * c));
        EL_UNROLL
        for (int r = 0; r < MR; ++r)
            dots[r].v = _mm512_dpbusd_epi32(dots[r].v, high, broadcast4(x[r].codes + 8 * c + 4));
    }
}
template <int MR>
EL_INLINE void q8_group(const int8_t* codes, const QuantGroup* x, I* dots) {
    // code + 128, as dpbusd wants it unsigned; 128 * sum(x) is taken off beforehand
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    EL_UNROLL
    for (int r = 0; r < MR; ++r) dots[r].v = _mm512_set1_epi32(-128 * x[r].isum);
    EL_UNROLL
    for (int c = 0; c < 8; ++c) {
        const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(codes + 64 * c), flip);
        EL_UNROLL
        for (int r = 0; r < MR; ++r)
            dots[r].v = _mm512_dpbusd_epi32(dots[r].v, w, broadcast4(x[r].codes + 4 * c));
    }
}
constexpr int kQuantRows = 8;

#elif defined(ELINVAR_AVX2)

EL_INLINE __m256i broadcast4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}
EL_INLINE __m256i load_bytes(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
template <int MR>
EL_INLINE void q4_group(const uint8_t* codes, const QuantGroup* x, I* dots) {
    // 16-bit sums are exact: 8 steps of 2 products of at most 15 * 127 make 30,480.
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i s[MR][2];
    EL_UNROLL
    for (int r = 0; r < MR; ++r) s[r][0] = s[r][1] = _mm256_setzero_si256();
    EL_UNROLL
    for (int c = 0; c < 4; ++c) {
        const __m256i b0 = load_bytes(codes + 64 * c), b1 = load_bytes(codes + 64 * c + 32);
        const __m256i low0 = _mm256_and_si256(b0, mask), low1 = _mm256_and_si256(b1, mask);
        const __m256i high0 = _mm256_and_si256(_mm256_srli_epi16(b0, 4), mask);
        const __m256i high1 = _mm256_and_si256(_mm256_srli_epi16(b1, 4), mask);
        EL_UNROLL
        for (int r = 0; r < MR; ++r) {
            const __m256i a = broadcast4(x[r].codes + 8 * c);
            const __m256i b = broadcast4(x[r].codes + 8 * c + 4);
            s[r][0] = _mm256_add_epi16(s[r][0], _mm256_maddubs_epi16(low0, a));
            s[r][1] = _mm256_add_epi16(s[r][1], _mm256_maddubs_epi16(low1, a));
            s[r][0] = _mm256_add_epi16(s[r][0], _mm256_maddubs_epi16(high0, b));
            s[r][1] = _mm256_add_epi16(s[r][1], _mm256_maddubs_epi16(high1, b));
        }
    }
    EL_UNROLL
    for (int r = 0; r < MR; ++r)
        dots[r] = {_mm256_madd_epi16(s[r][0], ones), _mm256_madd_epi16(s[r][1], ones)};
}
template <int MR>
EL_INLINE void q8_group(const int8_t* codes, const QuantGroup* x, I* dots) {
    const __m256i ones = _mm256_set1_epi16(1);
    EL_UNROLL
    for (int r = 0; r < MR; ++r) dots[r] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    EL_UNROLL
    for (int c = 0; c < 8; ++c) {
        const __m256i w0 = load_bytes(codes + 64 * c), w1 = load_bytes(codes + 64 * c + 32);
        const __m256i abs0 = _mm256_abs_epi8(w0), abs1 = _mm256_abs_epi8(w1);
        EL_UNROLL
        for (int r = 0; r < MR; ++r) {
            // |w| * sign(w) x: pairs are at most 2 * 127 * 127, exact in 16 bits
            const __m256i a = broadcast4(x[r].codes + 4 * c);
            const __m256i p0 = _mm256_maddubs_epi16(abs0, _mm256_sign_epi8(a, w0));
            const __m256i p1 = _mm256_maddubs_epi16(abs1, _mm256_sign_epi8(a, w1));
            dots[r].a = _mm256_add_epi32(dots[r].a, _mm256_madd_epi16(p0, ones));
            dots[r].b = _mm256_add_epi32(dots[r].b, _mm256_madd_epi16(p1, ones));
        }
    }
}
constexpr int kQuantRows = 4;

#elif defined(ELINVAR_NEON)

EL_INLINE int8x16_t broadcast4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
}
template <int MR>
EL_INLINE void q4_group(const uint8_t* codes, const QuantGroup* x, I* dots) {
    EL_UNROLL
    for (int r = 0; r < MR; ++r) dots[r] = int_set1(0);
    EL_UNROLL
    for (int c = 0; c < 4; ++c) {
        EL_UNROLL
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t b = vld1q_u8(codes + 64 * c + 16 * i);
            const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(b, vdupq_n_u8(15)));
            const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(b, 4));
            EL_UNROLL
            for (int r = 0; r < MR; ++r) {
                const int8_t* p = x[r].codes + 8 * c;
                dots[r].v[i] = vdotq_s32(dots[r].v[i], low, broadcast4(p));
                dots[r].v[i] = vdotq_s32(dots[r].v[i], high, broadcast4(p + 4));
            }
        }
    }
}
template <int MR>
EL_INLINE void q8_group(const int8_t* codes, const QuantGroup* x, I* dots) {
    EL_UNROLL
    for (int r = 0; r < MR; ++r) dots[r] = int_set1(0);
    EL_UNROLL
    for (int c = 0; c < 8; ++c) EL_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int8x16_t w = vld1q_s8(codes + 64 * c + 16 * i);
        EL_UNROLL
        for (int r = 0; r < MR; ++r)
            dots[r].v[i] = vdotq_s32(dots[r].v[i], w, broadcast4(x[r].codes + 4 * c));
    }
}
constexpr int kQuantRows = 4;

#else

template <int MR>
EL_INLINE void q4_group(const uint8_t* codes, const QuantGroup* x, I* dots) {
    EL_UNROLL
    for (int r = 0; r < MR; ++r)
        for (int n = 0; n < 16; ++n) {
            int32_t s = 0;
            EL_UNROLL
            for (int c = 0; c < 4; ++c)
                for (int j = 0; j < 4; ++j) {
                    const uint8_t b = codes[64 * c + 4 * n + j];
                    s += (b & 15) * x[r].codes[8 * c + j] + (b >> 4) * x[r].codes[8 * c + 4 + j];
                }
            dots[r].v[n] = s;
        }
}
template <int MR>
EL_INLINE void q8_group(const int8_t* codes, const QuantGroup* x, I* dots) {
    EL_UNROLL
    for (int r = 0; r < MR; ++r)
        for (int n = 0; n < 16; ++n) {
            int32_t s = 0;
            for (int k = 0; k < 32; ++k) s += codes[64 * (k / 4) + 4 * n + k % 4] * x[r].codes[k];
            dots[r].v[n] = s;
        }
}
constexpr int kQuantRows = 1;

#endif
