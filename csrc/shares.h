// What part of a token's attention goes to each block of keys: of every block its largest score and
// the sum behind it, as in attention, then all of a row's blocks together. A row's arithmetic
// depends on its own position alone. Included inside namespace ELINVAR_ISA, after attention.h.

// Of R rows: [R, 2, width] the largest score of each block, and the sum of e^(score - that).
template <Kind kind, int R>
__attribute__((noinline)) void sum_blocks(const Attention& a, Walk& w, const int32_t* table,
                                          int kv_head, int num_blocks, ptrdiff_t width,
                                          float* out) {
    const auto keys = [&](int b) {
        const ptrdiff_t place = static_cast<ptrdiff_t>(table[b]) * a.block_step + kv_head;
        return static_cast<const Stored<kind>*>(a.k) + place * head_size(kind, a.padded_dim);
    };
    for (int b = 0; b < num_blocks; ++b) {
        const Stored<kind>*k = keys(b), *next = keys(min_of(b + 1, num_blocks - 1));
        block_scores<kind, R, 1>(w, &k, &next, a.dim, set1(a.scale));
        if (a.softcap > 0.0f) cap_scores(w, 1, R, a.softcap);
        for (int r = 0; r < R; ++r) {
            w.max[r] = kNoScore;
            store(w.partial[r], zero());
            block_softmax(w, 0, r, 32 * b);
            out[2 * r * width + b] = w.max[r];
            out[(2 * r + 1) * width + b] = tree_sum(load(w.partial[r]));
        }
    }
}

template <Kind kind, int R = kWalkRows>
void sum_blocks_of(const Attention& a, Walk& w, int rows, const int32_t* table, int kv_head,
                   int num_blocks, ptrdiff_t width, float* out) {
    if constexpr (R > 1)
        if (rows < R)
            return sum_blocks_of<kind, R - 1>(a, w, rows, table, kv_head, num_blocks, width, out);
    sum_blocks<kind, R>(a, w, table, kv_head, num_blocks, width, out);
}

// Shares become those of one row where they are less. Behind the blocks, up to `width`, lie those
// of no score.
void raise_shares(const float* maxima, float* sums, int num_blocks, ptrdiff_t width,
                  const float* sink, float* shares) {
    V most = set1(kNoScore);
    for (ptrdiff_t b = 0; b < width; b += 16) most = max(load(maxima + b), most);
    float top = tree_max(most);
    if (sink) top = max_of(top, *sink);
    V partial = zero();
    for (ptrdiff_t b = 0; b < width; b += 16) {
        const V weight = load(sums + b) * exp(load(maxima + b) - set1(top));
        store(sums + b, weight);
        partial = partial + weight;
    }
    float all = tree_sum(partial);
    if (sink) all = all + first_lane(exp(set1(*sink - top)));
    for (int b = 0; b < num_blocks; b += 16) {
        const int n = min_of(16, num_blocks - b);
        // In this order a share that is no number is none.
        store_n(shares + b, max(load(sums + b) / set1(all), load_n(shares + b, n)), n);
    }
}

// Of all heads of some tokens of a sequence; `room` takes 2 * kWalkRows * width floats.
void block_shares(const Attention& a, int seq, int first_token, int num_tokens, int num_blocks,
                  float* room, float* shares, ptrdiff_t stride) {
    const ptrdiff_t width = (num_blocks + 15) / 16 * 16;
    const int32_t* table = a.tables + seq * a.table_stride;
    const int group = a.heads / a.kv_heads, num_rows = num_tokens * group;
    const auto sum = a.kv_kind == Kind::f32    ? sum_blocks_of<Kind::f32>
                     : a.kv_kind == Kind::f16  ? sum_blocks_of<Kind::f16>
                     : a.kv_kind == Kind::bf16 ? sum_blocks_of<Kind::bf16>
                                               : sum_blocks_of<Kind::int8>;
    alignas(64) float turned[kWalkRows * kMaxHeadDim];
    Walk w;
    for (int kv_head = 0; kv_head < a.kv_heads; ++kv_head)
        for (int begin = 0; begin < num_rows; begin += kWalkRows) {
            const int rows = min_of(kWalkRows, num_rows - begin);
            for (int r = 0; r < rows; ++r) {
                const int token = first_token + (begin + r) / group;
                w.q[r] = query(a, token, kv_head * group + (begin + r) % group, turned + r * a.dim);
                w.first_key[r] = 0;
                w.last_key[r] = a.positions[token];
            }
            for (int r = 0; r < 2 * rows; ++r)
                for (ptrdiff_t b = num_blocks; b < width; ++b)
                    room[r * width + b] = r % 2 ? 0.0f : kNoScore;
            sum(a, w, rows, table, kv_head, num_blocks, width, room);
            for (int r = 0; r < rows; ++r) {
                const ptrdiff_t token = first_token + (begin + r) / group;
                const int head = kv_head * group + (begin + r) % group;
                raise_shares(room + 2 * r * width, room + (2 * r + 1) * width,
                             a.positions[token] / 32 + 1, width, a.sinks ? a.sinks + head : nullptr,
                             shares + token * stride);
            }
        }
}
