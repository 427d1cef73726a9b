// linear with quantised weights: y[m, n] is one chain over k, whatever the number of rows or panels
// at hand: an exact integer dot per group of 32, the groups joined by FMA in ascending order.
// Included inside namespace ELINVAR_ISA.

// A row's first group; the next one is block_height records further.
EL_INLINE QuantGroup* quant_row(const QuantRows& x, int m) {
    const int block = m / QuantRows::kBlock * QuantRows::kBlock;
    return x.data + block * x.groups + (m - block);
}
EL_INLINE ptrdiff_t block_height(const QuantRows& x, int m) {
    return min_of(QuantRows::kBlock, x.rows - m / QuantRows::kBlock * QuantRows::kBlock);
}

void gather_quant(const QuantRows& x, const int32_t* from, int rows, const QuantRows& out,
                  int first_row) {
    for (int i = 0; i < rows; ++i) {
        const QuantGroup* group = quant_row(x, from[i]);
        QuantGroup* to = quant_row(out, first_row + i);
        const ptrdiff_t step = block_height(x, from[i]), step_to = block_height(out, first_row + i);
        for (ptrdiff_t g = 0; g < out.groups; ++g, group += step, to += step_to) *to = *group;
    }
}

// Memory answers after about this much has streamed by. Panels lie one after the other, so the
// place ahead is the right one across their borders; beyond the last, asking costs nothing.
constexpr ptrdiff_t kAhead = 4096;

// MR rows of one block: a group's records are side by side, the next group's `step` further.
template <Kind kind, int MR>
void quant_tile(const uint8_t* group, ptrdiff_t groups, ptrdiff_t ahead, const QuantGroup* x,
                ptrdiff_t step, float* out, ptrdiff_t ld_out, int cols) {
    constexpr ptrdiff_t kCodes = elinvar::code_bytes(kind), kGroup = elinvar::group_bytes(kind);
    V acc[MR];
    EL_UNROLL
    for (int r = 0; r < MR; ++r) acc[r] = zero();
    for (ptrdiff_t g = 0; g < groups; ++g, group += kGroup, x += step) {
        EL_UNROLL
        for (ptrdiff_t line = 0; line < kGroup; line += 64) prefetch(group + ahead + line);
        I dots[MR];
        const auto* scales = reinterpret_cast<const uint16_t*>(group + kCodes);
        if constexpr (kind == Kind::q8)
            q8_group<MR>(reinterpret_cast<const int8_t*>(group), x, dots);
        else
            nibble_group<kind, MR>(group, x, dots);
        const V scale = load_half(scales);
        V min;
        if constexpr (elinvar::has_mins(kind)) min = load_half(scales + 16);
        EL_UNROLL
        for (int r = 0; r < MR; ++r) {
            acc[r] = fma(to_float(dots[r]), scale * set1(x[r].scale), acc[r]);
            if constexpr (elinvar::has_mins(kind)) acc[r] = fma(min, set1(x[r].sum), acc[r]);
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

using QuantTile = void (*)(const uint8_t*, ptrdiff_t, ptrdiff_t, const QuantGroup*, ptrdiff_t,
                           float*, ptrdiff_t, int);
template <Kind kind, size_t... I>
EL_INLINE QuantTile quant_tile_of(int rows, std::index_sequence<I...>) {
    static constexpr QuantTile tiles[] = {quant_tile<kind, I + 1>...};
    return tiles[rows - 1];
}

template <Kind kind>
void quant_panels(const uint8_t* panel, size_t stride, int num_panels, const QuantRows& x,
                  int first, int rows, float* out, ptrdiff_t ld, int cols) {
    static_assert(QuantRows::kBlock % kQuantRows == 0, "a tile stays within a block");
    for (int p = 0; p < num_panels; ++p, panel += stride, out += 16, cols -= 16)
        for (int m = 0; m < rows; m += kQuantRows) {
            const auto tile = quant_tile_of<kind>(min_of(kQuantRows, rows - m),
                                                  std::make_index_sequence<kQuantRows>());
            // The first rows stream the panel from memory; the others find it in L1.
            tile(panel, x.groups, m ? 0 : kAhead, quant_row(x, first + m),
                 block_height(x, first + m), out + m * ld, ld, cols);
        }
}

void linear_quant(Kind kind, const uint8_t* panels, size_t stride, int num_panels,
                  const QuantRows& x, int first, int rows, float* out, ptrdiff_t ld, int cols) {
    const auto run = kind == Kind::q4   ? quant_panels<Kind::q4>
                     : kind == Kind::q5 ? quant_panels<Kind::q5>
                                        : quant_panels<Kind::q8>;
    run(panels, stride, num_panels, x, first, rows, out, ld, cols);
}
