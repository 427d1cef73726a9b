// linear with float weights: y[m, n] is one chain of FMAs over ascending k, whatever the number of
// rows or panels at hand. Included inside namespace ELINVAR_ISA.

// The largest tile: chains enough to hide the latency of an FMA twice over, and few enough loads.
// Few rows have too few chains in one panel: there AVX2 takes two of them as well.
#if defined(ELINVAR_AVX512)
constexpr int kFloatRows = 8, kFloatPanels = 2, kPairedRows = 8;
#elif defined(ELINVAR_AVX2) || defined(ELINVAR_NEON)
constexpr int kFloatRows = 6, kFloatPanels = 1, kPairedRows = 3;
#else
constexpr int kFloatRows = 1, kFloatPanels = 1, kPairedRows = 0;
#endif
template <int NP>
constexpr int kTileRows = NP == 1 ? kFloatRows : kPairedRows;
constexpr int kFloatBlock = 128 * 1024;  // bytes of weights that stay in L2 while all rows pass
constexpr int kFloatStep = 8;            // k from one request for memory to the next
constexpr int kFloatAhead = 8 * 1024;    // bytes asked for and not yet used, of all streams

template <Kind kind>
constexpr int kFloatBytes = kind == Kind::f32 ? 64 : 32;  // of a panel for one k

template <Kind kind>
EL_INLINE V load_weights(const uint8_t* at) {
    if constexpr (kind == Kind::f32)
        return load(reinterpret_cast<const float*>(at));
    else if constexpr (kind == Kind::f16)
        return load_half(reinterpret_cast<const uint16_t*>(at));
    else
        return load_bf16(reinterpret_cast<const uint16_t*>(at));
}

// `num_k` weights of each column, from the first on or where an earlier block left the chains
// in `out`: a stored f32 is the chain itself. Of a tile's panels each is `stride` bytes and `apart`
// columns from the one before.
struct FloatBlock {
    const uint8_t* panels;
    size_t stride;
    int apart;
    int num_k;
    bool first;
    const float* x;
    ptrdiff_t ld_x;
    float* out;
    ptrdiff_t ld_out;
    int cols;
    const uint8_t* next;  // to ask memory for meanwhile, of each panel `lines` a step
    int lines;
};

template <Kind kind, int NP, int MR>
void float_tile(const FloatBlock& b) {
    V acc[MR][NP];
    EL_UNROLL
    for (int r = 0; r < MR; ++r) EL_UNROLL
    for (int p = 0; p < NP; ++p) {
        const float* o = b.out + r * b.ld_out + b.apart * p;
        const int cols = b.cols - b.apart * p;
        acc[r][p] = b.first ? zero() : cols >= 16 ? load(o) : load_n(o, cols);
    }
    const uint8_t *panel = b.panels, *next = b.next;
    const float* x = b.x;
    const size_t stride = b.stride;
    const ptrdiff_t ld_x = b.ld_x, bytes = b.lines * 64;
    for (int left = b.num_k; left > 0; left -= kFloatStep) {
        for (const uint8_t* end = next + bytes; next < end; next += 64) EL_UNROLL
        for (int p = 0; p < NP; ++p) prefetch(next + p * stride);
        for (const float* end = x + min_of(left, kFloatStep); x < end; ++x) {
            V w[NP];
            EL_UNROLL
            for (int p = 0; p < NP; ++p) w[p] = load_weights<kind>(panel + p * stride);
            panel += kFloatBytes<kind>;
            EL_UNROLL
            for (int r = 0; r < MR; ++r) {
                const V a = set1(x[r * ld_x]);
                EL_UNROLL
                for (int p = 0; p < NP; ++p) acc[r][p] = fma(a, w[p], acc[r][p]);
            }
        }
    }
    EL_UNROLL
    for (int r = 0; r < MR; ++r) EL_UNROLL
    for (int p = 0; p < NP; ++p) {
        float* o = b.out + r * b.ld_out + b.apart * p;
        const int cols = b.cols - b.apart * p;
        if (cols >= 16)
            store(o, acc[r][p]);
        else
            store_n(o, acc[r][p], cols);
    }
}

template <Kind kind, int NP, size_t... i>
void float_rows(const FloatBlock& b, int rows, std::index_sequence<i...>) {
    static constexpr void (*tiles[])(const FloatBlock&) = {float_tile<kind, NP, i + 1>...};
    tiles[rows - 1](b);
}
template <Kind kind, int NP>
void float_rows(const FloatBlock& b, int rows) {
    float_rows<kind, NP>(b, rows, std::make_index_sequence<kTileRows<NP>>{});
}

// All rows pass over one block, in tiles of as equal a height as can be: a tile of few rows costs
// almost what a full one does. Each asks for its share of the next block's bytes.
template <Kind kind, int NP>
void float_block(FloatBlock b, int rows) {
    const int tiles = (rows + kTileRows<NP> - 1) / kTileRows<NP>;
    const int steps = (b.num_k + kFloatStep - 1) / kFloatStep;
    int wanted = b.num_k * kFloatBytes<kind> / 64;
    b.lines = (wanted + steps * tiles - 1) / (steps * tiles);
    for (int t = 0; t < tiles; ++t) {
        const int height = rows / tiles + (t < rows % tiles);
        if (wanted <= 0) b.lines = 0;
        float_rows<kind, NP>(b, height);
        wanted -= b.lines * steps;
        b.next += static_cast<ptrdiff_t>(b.lines) * steps * 64;
        b.x += height * b.ld_x;
        b.out += height * b.ld_out;
    }
}

// All rows times NP panels, from end to end. Few rows ask a fixed distance ahead, as memory sets
// their pace; more rows pass over one block of k after the other.
template <Kind kind, int NP>
void float_walk(const FloatBlock& all, int rows) {
    FloatBlock b = all;
    const int k = all.num_k;
    if (rows <= kTileRows<NP>) {
        b.next = b.panels + kFloatAhead / NP;
        b.lines = kFloatStep * kFloatBytes<kind> / 64;
        float_rows<kind, NP>(b, rows);
        return;
    }
    constexpr int most = kFloatBlock / NP / kFloatBytes<kind>;
    const int blocks = (k + most - 1) / most, block = (k + blocks - 1) / blocks;
    for (int first = 0; first < k; first += block) {
        b.num_k = min_of(block, k - first);
        b.first = all.first && first == 0;
        b.x = all.x + first;
        b.panels = all.panels + static_cast<ptrdiff_t>(first) * kFloatBytes<kind>;
        b.next = first + block < k ? b.panels + static_cast<ptrdiff_t>(block) * kFloatBytes<kind>
                                   : all.panels + NP * all.stride;
        float_block<kind, NP>(b, rows);
    }
}

// Two panels that few rows take together lie half a list apart: each is the next of a stream that
// goes on without a break, where neighbours taken in pairs would leave a gap after every panel, at
// which memory's own look-ahead begins anew. More rows take neighbours: they ask a block ahead.
template <Kind kind>
void float_panels(const uint8_t* panels, size_t stride, int num_panels, const float* x, int k,
                  int rows, float* out, ptrdiff_t ld, int cols, bool first) {
    const bool few = rows <= kPairedRows;
    const int pairs = few || kFloatPanels == 2 ? num_panels / 2 : 0;
    const auto walk = [&](void (*panel_walk)(const FloatBlock&, int), int p, int apart) {
        panel_walk({panels + p * stride, stride * apart, 16 * apart, k, first, x, k, out + 16 * p,
                    ld, cols - 16 * p, nullptr, 0},
                   rows);
    };
    if constexpr (kPairedRows > 0)
        for (int i = 0; i < pairs; ++i) walk(float_walk<kind, 2>, few ? i : 2 * i, few ? pairs : 1);
    for (int p = 2 * pairs; p < num_panels; ++p) walk(float_walk<kind, 1>, p, 1);
}

void linear_float(Kind kind, const uint8_t* panels, size_t stride, int num_panels, const float* x,
                  int k, int rows, float* out, ptrdiff_t ld, int cols, bool first) {
    const auto run = kind == Kind::f32   ? float_panels<Kind::f32>
                     : kind == Kind::f16 ? float_panels<Kind::f16>
                                         : float_panels<Kind::bf16>;
    run(panels, stride, num_panels, x, k, rows, out, ld, cols, first);
}
