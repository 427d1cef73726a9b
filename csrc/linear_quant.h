// linear with quantised weights: y[m, n] is one chain over k, whatever the number of rows or panels
// at hand: an exact integer dot per group of 32, the groups joined by FMA in ascending order.
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
