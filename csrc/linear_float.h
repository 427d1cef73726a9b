// linear with float weights: y[m, n] is one chain of FMAs over ascending k, whatever the number of
// rows or panels at hand. Included inside namespace ELINVAR_ISA.

// Rows and panels of a tile, and panels of a tile of one row: what the registers hold.
#if defined(ELINVAR_AVX512)
constexpr int kFloatRows = 8, kFloatPanels = 2, kSinglePanels = 8;
#elif defined(ELINVAR_AVX2)
constexpr int kFloatRows = 4, kFloatPanels = 1, kSinglePanels = 4;
#elif defined(ELINVAR_NEON)
constexpr int kFloatRows = 4, kFloatPanels = 1, kSinglePanels = 2;
#else
constexpr int kFloatRows = 1, kFloatPanels = 1, kSinglePanels = 1;
#endif

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
    EL_UNROLL
    for (int r = 0; r < MR; ++r) EL_UNROLL
    for (int p = 0; p < NP; ++p) acc[r][p] = zero();
    for (int k = 0; k < num_k; ++k) {
        V w[NP];
        EL_UNROLL
        for (int p = 0; p < NP; ++p) w[p] = load_weights<kind>(panels + p * stride, k);
        EL_UNROLL
        for (int r = 0; r < MR; ++r) {
            const V a = set1(x[static_cast<ptrdiff_t>(r) * num_k + k]);
            EL_UNROLL
            for (int p = 0; p < NP; ++p) acc[r][p] = fma(a, w[p], acc[r][p]);
        }
    }
    EL_UNROLL
    for (int r = 0; r < MR; ++r) EL_UNROLL
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
