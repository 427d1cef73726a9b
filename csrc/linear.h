// linear: y[m, n] is one chain over k, whatever the number of rows or panels at hand.
// Quantised: an exact integer dot per group of 32, the groups joined by FMA in ascending order.
// Included inside namespace ELINVAR_ISA.

template <int MR>
struct Rows {};

// `next`: the panel to ask memory for meanwhile, or null.
template <Kind kind, int MR>
void quant_tile(const uint8_t* panel, const uint8_t* next, const QuantRows& x, int row, float* out,
                ptrdiff_t ld_out, int cols) {
    const ptrdiff_t groups = x.groups, ld = x.k;
    constexpr int kGroupBytes = kind == Kind::q4 ? 256 : 512;
    const auto* scales = reinterpret_cast<const uint16_t*>(panel + groups * kGroupBytes);
    const uint16_t* mins = scales + groups * 16;
    V acc[MR];
    EL_UNROLL
    for (int r = 0; r < MR; ++r) acc[r] = zero();
    for (ptrdiff_t g = 0; g < groups; ++g) {
        if (next) {
            EL_UNROLL
            for (int line = 0; line < kGroupBytes / 64; ++line)
                prefetch(next + g * kGroupBytes + 64 * line);
            prefetch(next + groups * kGroupBytes + 32 * g);
            if (kind == Kind::q4) prefetch(next + groups * (kGroupBytes + 32) + 32 * g);
        }
        const int8_t* codes = x.codes + row * ld + 32 * g;
        const ptrdiff_t at = row * groups + g;
        I dots[MR];
        const V scale = load_half(scales + 16 * g);
        if constexpr (kind == Kind::q4) {
            q4_group<MR>(panel + g * kGroupBytes, codes, ld, dots);
            const V min = load_half(mins + 16 * g);
            EL_UNROLL
            for (int r = 0; r < MR; ++r) {
                const V factor = scale * set1(x.scale[at + r * groups]);
                acc[r] = fma(to_float(dots[r]), factor, acc[r]);
                acc[r] = fma(min, set1(x.sum[at + r * groups]), acc[r]);
            }
        } else {
            q8_group<MR>(reinterpret_cast<const int8_t*>(panel) + g * kGroupBytes, codes, ld,
                         x.isum + at, groups, dots);
            EL_UNROLL
            for (int r = 0; r < MR; ++r) {
                const V factor = scale * set1(x.scale[at + r * groups]);
                acc[r] = fma(to_float(dots[r]), factor, acc[r]);
            }
        }
    }
    EL_UNROLL
    for (int r = 0; r < MR; ++r) {
        if (cols >= 16)
            store(out + r * ld_out, acc[r]);
        else
            store_n(out + r * ld_out, acc[r], cols);
    }
}

template <Kind kind>
void quant_panel(const uint8_t* panel, size_t stride, const QuantRows& x, int first, int rows,
                 float* out, ptrdiff_t ld, int cols) {
    // Panels stream from memory once, and one is too short for the hardware to learn its three
    // streams: the first tile asks for the next panel, place by place.
    const uint8_t* next = panel + stride;
    int m = 0;
    const auto tiles = [&]<int MR>(Rows<MR>) {
        for (; m + MR <= rows; m += MR, next = nullptr)
            quant_tile<kind, MR>(panel, next, x, first + m, out + m * ld, ld, cols);
    };
    tiles(Rows<kQuantRows>{});
    if constexpr (kQuantRows > 4) tiles(Rows<4>{});
    if constexpr (kQuantRows > 2) tiles(Rows<2>{});
    tiles(Rows<1>{});
}

void linear_quant(Kind kind, const uint8_t* panels, size_t stride, int num_panels,
                  const QuantRows& x, int first, int rows, float* out, ptrdiff_t ld, int cols) {
    for (int p = 0; p < num_panels; ++p, panels += stride, out += 16, cols -= 16) {
        if (kind == Kind::q4)
            quant_panel<Kind::q4>(panels, stride, x, first, rows, out, ld, cols);
        else
            quant_panel<Kind::q8>(panels, stride, x, first, rows, out, ld, cols);
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
