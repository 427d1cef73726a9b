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
// Codes of a group as bytes, and of how many groups those that tiles share stay in L1.
constexpr ptrdiff_t kShared = 512, kSharedGroups = 32;

// Groups of one panel.
struct Groups {
    const uint8_t* first;
    ptrdiff_t count, ahead;
    uint8_t* bytes;  // of their codes, if tiles share them
    bool go_on;      // with the chains that the output holds
};

// Where results go: rows `ld` apart, so many columns.
struct Columns {
    float* first;
    ptrdiff_t ld;
    int count;
};

// MR rows of one block: a group's records are side by side, the next group's `step` further.
template <Kind kind, int MR, Codes from>
void quant_tile(const Groups& groups, const QuantGroup* x, ptrdiff_t step, const Columns& out) {
    constexpr ptrdiff_t kCodes = elinvar::code_bytes(kind), kGroup = elinvar::group_bytes(kind);
    const uint8_t* group = groups.first;
    uint8_t* bytes = groups.bytes;
    V acc[MR];
    EL_UNROLL
    for (int r = 0; r < MR; ++r) {
        acc[r] = zero();
        if constexpr (from != Codes::packed) {
            const float* so_far = out.first + r * out.ld;
            if (groups.go_on) acc[r] = out.count >= 16 ? load(so_far) : load_n(so_far, out.count);
        }
    }
    for (ptrdiff_t g = 0; g < groups.count; ++g, group += kGroup, x += step) {
        if constexpr (from != Codes::bytes) {
            EL_UNROLL
            for (ptrdiff_t line = 0; line < kGroup; line += 64)
                prefetch(group + groups.ahead + line);
        }
        I dots[MR];
        const auto* scales = reinterpret_cast<const uint16_t*>(group + kCodes);
        if constexpr (kind == Kind::q8)
            q8_group<MR>(reinterpret_cast<const int8_t*>(group), x, dots);
        else
            nibble_group<kind, MR, from>(group, bytes, x, dots);
        if constexpr (from != Codes::packed) bytes += kShared;
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
        if (out.count >= 16)
            store(out.first + r * out.ld, acc[r]);
        else
            store_n(out.first + r * out.ld, acc[r], out.count);
    }
}

using QuantTile = void (*)(const Groups&, const QuantGroup*, ptrdiff_t, const Columns&);
template <Kind kind, Codes from, size_t... I>
EL_INLINE QuantTile quant_tile_of(int rows, std::index_sequence<I...>) {
    static constexpr QuantTile tiles[] = {quant_tile<kind, I + 1, from>...};
    return tiles[rows - 1];
}

// All rows times some groups of a panel, in tiles. The first one streams the panel from memory; the
// others find it in L1.
template <Kind kind, bool shares>
EL_INLINE void quant_rows(Groups groups, const QuantRows& x, ptrdiff_t from, int first, int rows,
                          const Columns& out) {
    constexpr auto first_tile = shares ? Codes::packed_for_all : Codes::packed;
    constexpr auto next_tile = shares ? Codes::bytes : Codes::packed;
    constexpr auto heights = std::make_index_sequence<kQuantRows>();
    for (int m = 0; m < rows; m += kQuantRows, groups.ahead = 0) {
        const int height = min_of(kQuantRows, rows - m);
        const auto tile = m ? quant_tile_of<kind, next_tile>(height, heights)
                            : quant_tile_of<kind, first_tile>(height, heights);
        const ptrdiff_t step = block_height(x, first + m);
        tile(groups, quant_row(x, first + m) + from * step, step,
             {out.first + m * out.ld, out.ld, out.count});
    }
}

template <Kind kind>
void quant_panels(const uint8_t* panel, size_t stride, int num_panels, const QuantRows& x,
                  int first, int rows, float* out, ptrdiff_t ld, int cols) {
    static_assert(QuantRows::kBlock % kQuantRows == 0, "a tile stays within a block");
    for (int p = 0; p < num_panels; ++p, panel += stride, out += 16, cols -= 16) {
        const Columns columns{out, ld, cols};
        if constexpr (kSharesCodes && kind != Kind::q8) {
            if (rows > kQuantRows) {
                alignas(64) uint8_t bytes[kSharedGroups * kShared];
                for (ptrdiff_t g = 0; g < x.groups; g += kSharedGroups) {
                    const ptrdiff_t count = min_of(kSharedGroups, x.groups - g);
                    const uint8_t* from = panel + g * elinvar::group_bytes(kind);
                    quant_rows<kind, true>({from, count, kAhead, bytes, g > 0}, x, g, first, rows,
                                           columns);
                }
                continue;
            }
        }
        quant_rows<kind, false>({panel, x.groups, kAhead, nullptr, false}, x, 0, first, rows,
                                columns);
    }
}

void linear_quant(Kind kind, const uint8_t* panels, size_t stride, int num_panels,
                  const QuantRows& x, int first, int rows, float* out, ptrdiff_t ld, int cols) {
    const auto run = kind == Kind::q4   ? quant_panels<Kind::q4>
                     : kind == Kind::q5 ? quant_panels<Kind::q5>
                                        : quant_panels<Kind::q8>;
    run(panels, stride, num_panels, x, first, rows, out, ld, cols);
}
