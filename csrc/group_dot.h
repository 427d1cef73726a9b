// The one part of `linear` written per instruction set. Included inside namespace ELINVAR_ISA.
//
// Integer dots of one group of 32 against 16 columns, for MR rows of activations side by side.
// codes of q4: byte (c, n, j) = k 8c + j low, 8c + 4 + j high; of q8: byte (c, n, j) = k 4c + j.
// q5 is q4 with a plane of fifth bits behind: bits c and 4 + c of byte (n, j) = k 8c + j, 8c + 4 +
// j.

// Of a tile: packed ones; packed ones that it leaves as bytes, [step][column][j], for the tiles
// behind it; those bytes.
enum class Codes { packed, packed_for_all, bytes };

#if defined(ELINVAR_AVX512)

// A value that stays in its register: GCC else loads it again for every use, 5 % of a q5 product.
EL_INLINE __m512i pinned(__m512i value) {
    asm("" : "+v"(value));
    return value;
}
EL_INLINE __m512i broadcast4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}
template <Kind kind, int MR, Codes from>
EL_INLINE void nibble_group(const uint8_t* codes, uint8_t*, const QuantGroup* x, I* dots) {
    const __m512i mask = _mm512_set1_epi8(15), fifth = _mm512_set1_epi8(16);
    __m512i plane;
    if constexpr (kind == Kind::q5) plane = pinned(_mm512_loadu_si512(codes + 256));
    EL_UNROLL
    for (int r = 0; r < MR; ++r) dots[r].v = _mm512_setzero_si512();
    EL_UNROLL
    for (int c = 0; c < 4; ++c) {
        const __m512i b = pinned(_mm512_loadu_si512(codes + 64 * c));
        __m512i low = _mm512_and_si512(b, mask);
        __m512i high = _mm512_and_si512(_mm512_srli_epi16(b, 4), mask);
        if constexpr (kind == Kind::q5) {
            const __m512i up = _mm512_slli_epi16(plane, 4 - c), down = _mm512_srli_epi16(plane, c);
            low = _mm512_or_si512(low, _mm512_and_si512(up, fifth));
            high = _mm512_or_si512(high, _mm512_and_si512(down, fifth));
        }
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
constexpr bool kSharesCodes = false;  // to unpack them takes little

#elif defined(ELINVAR_AVX2)

EL_INLINE __m256i broadcast4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}
EL_INLINE __m256i load_bytes(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
// A sum that stays in its register: GCC else reassociates the adds of a tile and spills.
EL_INLINE __m256i pinned(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
}
// Step c of 8: codes k 4c + j, of columns 0 to 7 or (at = 32) 8 to 15.
template <Kind kind>
EL_INLINE __m256i unpacked(const uint8_t* codes, int c, int at) {
    const __m256i b = load_bytes(codes + c / 2 * 64 + at);
    const __m256i w = _mm256_and_si256(c % 2 ? _mm256_srli_epi16(b, 4) : b, _mm256_set1_epi8(15));
    if constexpr (kind == Kind::q4) return w;
    const __m256i plane = load_bytes(codes + 256 + at);
    const __m256i bit =
        c % 2 ? _mm256_srli_epi16(plane, c / 2) : _mm256_slli_epi16(plane, 4 - c / 2);
    return _mm256_or_si256(w, _mm256_and_si256(bit, _mm256_set1_epi8(16)));
}
template <Kind kind, Codes from>
EL_INLINE __m256i step_codes(const uint8_t* codes, uint8_t* bytes, int c, int at) {
    auto* own = reinterpret_cast<__m256i*>(bytes + 64 * c + at);
    if constexpr (from == Codes::bytes) return _mm256_load_si256(own);
    const __m256i w = unpacked<kind>(codes, c, at);
    if constexpr (from == Codes::packed_for_all) _mm256_store_si256(own, w);
    return w;
}
template <Kind kind, int MR, Codes from>
EL_INLINE void nibble_group(const uint8_t* codes, uint8_t* bytes, const QuantGroup* x, I* dots) {
    // 16-bit sums are exact: 8 steps of 2 products of at most 15 * 127 make 30,480, 4 of at most
    // 31 * 127 make 31,496.
    constexpr int kSteps = kind == Kind::q4 ? 8 : 4;
    const __m256i ones = _mm256_set1_epi16(1);
    EL_UNROLL
    for (int first = 0; first < 8; first += kSteps) {
        I sums[MR];
        EL_UNROLL
        for (int r = 0; r < MR; ++r) sums[r] = int_set1(0);
        EL_UNROLL
        for (int c = first; c < first + kSteps; ++c) {
            const __m256i w0 = step_codes<kind, from>(codes, bytes, c, 0);
            const __m256i w1 = step_codes<kind, from>(codes, bytes, c, 32);
            EL_UNROLL
            for (int r = 0; r < MR; ++r) {
                const __m256i a = broadcast4(x[r].codes + 4 * c);
                sums[r].a = pinned(_mm256_add_epi16(sums[r].a, _mm256_maddubs_epi16(w0, a)));
                sums[r].b = pinned(_mm256_add_epi16(sums[r].b, _mm256_maddubs_epi16(w1, a)));
            }
        }
        EL_UNROLL
        for (int r = 0; r < MR; ++r) {
            const I part{_mm256_madd_epi16(sums[r].a, ones), _mm256_madd_epi16(sums[r].b, ones)};
            dots[r] = first ? dots[r] + part : part;
        }
    }
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
            dots[r].a = pinned(_mm256_add_epi32(dots[r].a, _mm256_madd_epi16(p0, ones)));
            dots[r].b = pinned(_mm256_add_epi32(dots[r].b, _mm256_madd_epi16(p1, ones)));
        }
    }
}
constexpr int kQuantRows = 4;
constexpr bool kSharesCodes = true;

#elif defined(ELINVAR_NEON)

EL_INLINE int8x16_t broadcast4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
}
template <Kind kind, int MR, Codes from>
EL_INLINE void nibble_group(const uint8_t* codes, uint8_t*, const QuantGroup* x, I* dots) {
    EL_UNROLL
    for (int r = 0; r < MR; ++r) dots[r] = int_set1(0);
    EL_UNROLL
    for (int c = 0; c < 4; ++c) {
        EL_UNROLL
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t b = vld1q_u8(codes + 64 * c + 16 * i);
            uint8x16_t low = vandq_u8(b, vdupq_n_u8(15)), high = vshrq_n_u8(b, 4);
            if constexpr (kind == Kind::q5) {
                const uint8x16_t plane = vld1q_u8(codes + 256 + 16 * i), fifth = vdupq_n_u8(16);
                const auto moved = [&](int left) { return vshlq_u8(plane, vdupq_n_s8(left)); };
                low = vorrq_u8(low, vandq_u8(moved(4 - c), fifth));
                high = vorrq_u8(high, vandq_u8(moved(-c), fifth));
            }
            EL_UNROLL
            for (int r = 0; r < MR; ++r) {
                const int8_t* p = x[r].codes + 8 * c;
                int32x4_t& dot = dots[r].v[i];
                dot = vdotq_s32(dot, vreinterpretq_s8_u8(low), broadcast4(p));
                dot = vdotq_s32(dot, vreinterpretq_s8_u8(high), broadcast4(p + 4));
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
constexpr bool kSharesCodes = false;

#else

template <Kind kind, int MR, Codes from>
EL_INLINE void nibble_group(const uint8_t* codes, uint8_t*, const QuantGroup* x, I* dots) {
    EL_UNROLL
    for (int r = 0; r < MR; ++r)
        for (int n = 0; n < 16; ++n) {
            int32_t s = 0;
            EL_UNROLL
            for (int c = 0; c < 4; ++c)
                for (int j = 0; j < 4; ++j) {
                    const uint8_t b = codes[64 * c + 4 * n + j];
                    int low = b & 15, high = b >> 4;
                    if constexpr (kind == Kind::q5) {
                        const int plane = codes[256 + 4 * n + j];
                        low |= plane << (4 - c) & 16;
                        high |= plane >> c & 16;
                    }
                    s += low * x[r].codes[8 * c + j] + high * x[r].codes[8 * c + 4 + j];
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
constexpr bool kSharesCodes = false;

#endif
