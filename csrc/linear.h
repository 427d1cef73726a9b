// linear: y[m, n] is one chain over k, whatever the number of rows or panels at hand.
// Quantised: an exact integer dot per group of 32, the groups joined by FMA in ascending order.
// Included inside namespace ELINVAR_ISA.

// Integer dots of one group of 32 against 16 columns, for MR rows of activations (stride ldx).
// codes of q4: byte (c, n, j) = k 8c + j low, 8c + 4 + j high; of q8: byte (c, n, j) = k 4c + j.

#if defined(ELINVAR_AVX512)

EL_INLINE __m512i broadcast4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}
template <int MR>
EL_INLINE void q4_group(const uint8_t* codes, const int8_t* x, ptrdiff_t ldx, I* dots) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i w[8];
    for (int c = 0; c < 4; ++c) {
        const __m512i b = _mm512_loadu_si512(codes + 64 * c);
        w[2 * c] = _mm512_and_si512(b, mask);
        w[2 * c + 1] = _mm512_and_si512(_mm512_srli_epi16(b, 4), mask);
    }
    for (int r = 0; r < MR; ++r) {
        __m512i s = _mm512_setzero_si512();
        for (int c = 0; c < 8; ++c)
            s = _mm512_dpbusd_epi32(s, w[c], broadcast4(x + r * ldx + 4 * c));
        dots[r].v = s;
    }
}
template <int MR>
EL_INLINE void q8_group(const int8_t* codes, const int8_t* x, ptrdiff_t ldx, const int32_t* isum,
                        ptrdiff_t ld_isum, I* dots) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i w[8];  // code + 128, as dpbusd wants it unsigned; 128 * sum(x) is taken off again
    for (int c = 0; c < 8; ++c) w[c] = _mm512_xor_si512(_mm512_loadu_si512(codes + 64 * c), flip);
    for (int r = 0; r < MR; ++r) {
        __m512i s = _mm512_set1_epi32(-128 * isum[r * ld_isum]);
        for (int c = 0; c < 8; ++c)
            s = _mm512_dpbusd_epi32(s, w[c], broadcast4(x + r * ldx + 4 * c));
        dots[r].v = s;
    }
}
constexpr int kQuantRows = 8, kFloatRows = 8, kFloatPanels = 2, kSinglePanels = 8;

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
EL_INLINE void q4_group(const uint8_t* codes, const int8_t* x, ptrdiff_t ldx, I* dots) {
    // 16-bit sums are exact: 8 steps of 2 products of at most 15 * 127 make 30,480.
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i s[MR][2];
    for (int r = 0; r < MR; ++r) s[r][0] = s[r][1] = _mm256_setzero_si256();
    for (int c = 0; c < 4; ++c) {
        const __m256i b0 = load_bytes(codes + 64 * c), b1 = load_bytes(codes + 64 * c + 32);
        const __m256i low0 = _mm256_and_si256(b0, mask), low1 = _mm256_and_si256(b1, mask);
        const __m256i high0 = _mm256_and_si256(_mm256_srli_epi16(b0, 4), mask);
        const __m256i high1 = _mm256_and_si256(_mm256_srli_epi16(b1, 4), mask);
        for (int r = 0; r < MR; ++r) {
            const __m256i a = broadcast4(x + r * ldx + 8 * c);
            const __m256i b = broadcast4(x + r * ldx + 8 * c + 4);
            s[r][0] = _mm256_add_epi16(s[r][0], _mm256_maddubs_epi16(low0, a));
            s[r][1] = _mm256_add_epi16(s[r][1], _mm256_maddubs_epi16(low1, a));
            s[r][0] = _mm256_add_epi16(s[r][0], _mm256_maddubs_epi16(high0, b));
            s[r][1] = _mm256_add_epi16(s[r][1], _mm256_maddubs_epi16(high1, b));
        }
    }
    for (int r = 0; r < MR; ++r)
        dots[r] = {_mm256_madd_epi16(s[r][0], ones), _mm256_madd_epi16(s[r][1], ones)};
}
template <int MR>
EL_INLINE void q8_group(const int8_t* codes, const int8_t* x, ptrdiff_t ldx, const int32_t*,
                        ptrdiff_t, I* dots) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int r = 0; r < MR; ++r) dots[r] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int c = 0; c < 8; ++c) {
        const __m256i w0 = load_bytes(codes + 64 * c), w1 = load_bytes(codes + 64 * c + 32);
        const __m256i abs0 = _mm256_abs_epi8(w0), abs1 = _mm256_abs_epi8(w1);
        for (int r = 0; r < MR; ++r) {
            // |w| * sign(w) x: pairs are at most 2 * 127 * 127, exact in 16 bits
            const __m256i a = broadcast4(x + r * ldx + 4 * c);
            const __m256i p0 = _mm256_maddubs_epi16(abs0, _mm256_sign_epi8(a, w0));
            const __m256i p1 = _mm256_maddubs_epi16(abs1, _mm256_sign_epi8(a, w1));
            dots[r].a = _mm256_add_epi32(dots[r].a, _mm256_madd_epi16(p0, ones));
            dots[r].b = _mm256_add_epi32(dots[r].b, _mm256_madd_epi16(p1, ones));
        }
    }
}
constexpr int kQuantRows = 4, kFloatRows = 4, kFloatPanels = 1, kSinglePanels = 4;

#elif defined(ELINVAR_NEON)

EL_INLINE int8x16_t broadcast4(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
}
template <int MR>
EL_INLINE void q4_group(const uint8_t* codes, const int8_t* x, ptrdiff_t ldx, I* dots) {
    for (int r = 0; r < MR; ++r) dots[r] = int_set1(0);
    for (int c = 0; c < 4; ++c) {
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t b = vld1q_u8(codes + 64 * c + 16 * i);
            const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(b, vdupq_n_u8(15)));
            const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(b, 4));
            for (int r = 0; r < MR; ++r) {
                const int8_t* p = x + r * ldx + 8 * c;
                dots[r].v[i] = vdotq_s32(dots[r].v[i], low, broadcast4(p));
                dots[r].v[i] = vdotq_s32(dots[r].v[i], high, broadcast4(p + 4));
            }
        }
    }
}
template <int MR>
EL_INLINE void q8_group(const int8_t* codes, const int8_t* x, ptrdiff_t ldx, const int32_t*,
                        ptrdiff_t, I* dots) {
    for (int r = 0; r < MR; ++r) dots[r] = int_set1(0);
    for (int c = 0; c < 8; ++c)
        for (int i = 0; i < 4; ++i) {
            const int8x16_t w = vld1q_s8(codes + 64 * c + 16 * i);
            for (int r = 0; r < MR; ++r)
                dots[r].v[i] = vdotq_s32(dots[r].v[i], w, broadcast4(x + r * ldx + 4 * c));
        }
}
constexpr int kQuantRows = 4, kFloatRows = 4, kFloatPanels = 1, kSinglePanels = 2;

#else

template <int MR>
EL_INLINE void q4_group(const uint8_t* codes, const int8_t* x, ptrdiff_t ldx, I* dots) {
    for (int r = 0; r < MR; ++r)
        for (int n = 0; n < 16; ++n) {
            int32_t s = 0;
            for (int c = 0; c < 4; ++c)
                for (int j = 0; j < 4; ++j) {
                    const uint8_t b = codes[64 * c + 4 * n + j];
                    s += (b & 15) * x[r * ldx + 8 * c + j] + (b >> 4) * x[r * ldx + 8 * c + 4 + j];
                }
            dots[r].v[n] = s;
        }
}
template <int MR>
EL_INLINE void q8_group(const int8_t* codes, const int8_t* x, ptrdiff_t ldx, const int32_t*,
                        ptrdiff_t, I* dots) {
    for (int r = 0; r < MR; ++r)
        for (int n = 0; n < 16; ++n) {
            int32_t s = 0;
            for (int k = 0; k < 32; ++k) s += codes[64 * (k / 4) + 4 * n + k % 4] * x[r * ldx + k];
            dots[r].v[n] = s;
        }
}
constexpr int kQuantRows = 1, kFloatRows = 1, kFloatPanels = 1, kSinglePanels = 1;

#endif

template <Kind kind, int MR>
void quant_tile(const uint8_t* panel, const QuantRows& x, int row, float* out, ptrdiff_t ld_out,
                int cols) {
    const ptrdiff_t groups = x.groups, ld = x.k;
    constexpr int kGroupBytes = kind == Kind::q4 ? 256 : 512;
    const auto* scales = reinterpret_cast<const uint16_t*>(panel + groups * kGroupBytes);
    const uint16_t* mins = scales + groups * 16;
    V acc[MR];
    for (int r = 0; r < MR; ++r) acc[r] = zero();
    for (ptrdiff_t g = 0; g < groups; ++g) {
        const int8_t* codes = x.codes + row * ld + 32 * g;
        const ptrdiff_t at = row * groups + g;
        I dots[MR];
        const V scale = load_half(scales + 16 * g);
        if constexpr (kind == Kind::q4) {
            q4_group<MR>(panel + g * kGroupBytes, codes, ld, dots);
            const V min = load_half(mins + 16 * g);
            for (int r = 0; r < MR; ++r) {
                const V factor = scale * set1(x.scale[at + r * groups]);
                acc[r] = fma(to_float(dots[r]), factor, acc[r]);
                acc[r] = fma(min, set1(x.sum[at + r * groups]), acc[r]);
            }
        } else {
            q8_group<MR>(reinterpret_cast<const int8_t*>(panel) + g * kGroupBytes, codes, ld,
                         x.isum + at, groups, dots);
            for (int r = 0; r < MR; ++r) {
                const V factor = scale * set1(x.scale[at + r * groups]);
                acc[r] = fma(to_float(dots[r]), factor, acc[r]);
            }
        }
    }
    for (int r = 0; r < MR; ++r) {
        if (cols >= 16)
            store(out + r * ld_out, acc[r]);
        else
            store_n(out + r * ld_out, acc[r], cols);
    }
}

template <Kind kind>
void quant_panel(const uint8_t* panel, const QuantRows& x, int first, int rows, float* out,
                 ptrdiff_t ld, int cols) {
    int m = 0;
    for (; m + kQuantRows <= rows; m += kQuantRows)
        quant_tile<kind, kQuantRows>(panel, x, first + m, out + m * ld, ld, cols);
    if constexpr (kQuantRows > 4)
        for (; m + 4 <= rows; m += 4)
            quant_tile<kind, 4>(panel, x, first + m, out + m * ld, ld, cols);
    if constexpr (kQuantRows > 2)
        for (; m + 2 <= rows; m += 2)
            quant_tile<kind, 2>(panel, x, first + m, out + m * ld, ld, cols);
    for (; m < rows; ++m) quant_tile<kind, 1>(panel, x, first + m, out + m * ld, ld, cols);
}

void linear_quant(Kind kind, const uint8_t* panels, size_t stride, int num_panels,
                  const QuantRows& x, int first, int rows, float* out, ptrdiff_t ld, int cols) {
    for (int p = 0; p < num_panels; ++p, panels += stride, out += 16, cols -= 16) {
        if (kind == Kind::q4)
            quant_panel<Kind::q4>(panels, x, first, rows, out, ld, cols);
        else
            quant_panel<Kind::q8>(panels, x, first, rows, out, ld, cols);
    }
}

template <Kind kind>
EL_INLINE V load_weights(const uint8_t* panel, int k) {
    if constexpr (kind == Kind::f32)
        return load(reinterpret_cast<const float*>(panel) + 16 * k);
    else if constexpr (kind == Kind::f16)
        return load_half(reinterpret_cast<const uint16_t*>(panel) + 16 * k);
    else
        return load_bf16(reinterpret_cast<const uint16_t*>(panel) + 16 * k);
}

template <Kind kind, int MR, int NP>
void float_tile(const uint8_t* panels, size_t stride, const float* x, int num_k, float* out,
                ptrdiff_t ld, int cols) {
    V acc[MR][NP];
    for (int r = 0; r < MR; ++r)
        for (int p = 0; p < NP; ++p) acc[r][p] = zero();
    for (int k = 0; k < num_k; ++k) {
        V w[NP];
        for (int p = 0; p < NP; ++p) w[p] = load_weights<kind>(panels + p * stride, k);
        for (int r = 0; r < MR; ++r) {
            const V a = set1(x[static_cast<ptrdiff_t>(r) * num_k + k]);
            for (int p = 0; p < NP; ++p) acc[r][p] = fma(a, w[p], acc[r][p]);
        }
    }
    for (int r = 0; r < MR; ++r)
        for (int p = 0; p < NP; ++p) {
            float* o = out + r * ld + 16 * p;
            if (cols - 16 * p >= 16)
                store(o, acc[r][p]);
            else
                store_n(o, acc[r][p], cols - 16 * p);
        }
}

template <Kind kind>
void float_panels(const uint8_t* panels, size_t stride, int num_panels, const float* x, int k,
                  int rows, float* out, ptrdiff_t ld, int cols) {
    const auto at = [&](int p) { return panels + p * stride; };
    int m = 0;
    for (; m + kFloatRows <= rows && kFloatRows > 1; m += kFloatRows) {
        const float* xm = x + static_cast<ptrdiff_t>(m) * k;
        float* om = out + m * ld;
        int p = 0;
        for (; p + kFloatPanels <= num_panels; p += kFloatPanels)
            float_tile<kind, kFloatRows, kFloatPanels>(at(p), stride, xm, k, om + 16 * p, ld,
                                                       cols - 16 * p);
        for (; p < num_panels; ++p)
            float_tile<kind, kFloatRows, 1>(at(p), stride, xm, k, om + 16 * p, ld, cols - 16 * p);
    }
    for (; m < rows; ++m) {
        const float* xm = x + static_cast<ptrdiff_t>(m) * k;
        float* om = out + m * ld;
        int p = 0;
        for (; p + kSinglePanels <= num_panels; p += kSinglePanels)
            float_tile<kind, 1, kSinglePanels>(at(p), stride, xm, k, om + 16 * p, ld,
                                               cols - 16 * p);
        for (; p < num_panels; ++p)
            float_tile<kind, 1, 1>(at(p), stride, xm, k, om + 16 * p, ld, cols - 16 * p);
    }
}

void linear_float(Kind kind, const uint8_t* panels, size_t stride, int num_panels, const float* x,
                  int k, int rows, float* out, ptrdiff_t ld, int cols) {
    const auto run = kind == Kind::f32   ? float_panels<Kind::f32>
                     : kind == Kind::f16 ? float_panels<Kind::f16>
                                         : float_panels<Kind::bf16>;
    run(panels, stride, num_panels, x, k, rows, out, ld, cols);
}
