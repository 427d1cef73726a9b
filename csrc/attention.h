// attention: keys in blocks of 32 at absolute positions, a running softmax per query row
// (Milakov and Gimelshein, 2018) restarted every kSplit keys, the parts merged in ascending
// order (Dao et al., 2023). A row's arithmetic depends on its own position alone, never on the
// rows beside it. Included inside namespace ELINVAR_ISA.

constexpr int kSplit = elinvar::kAttentionSplit;
// Query rows that walk the keys together, and how many V of sums their register tile may hold.
#if defined(ELINVAR_AVX512)
constexpr int kWalkRows = 8, kSums = 16;
#elif defined(ELINVAR_AVX2) || defined(ELINVAR_NEON)
constexpr int kWalkRows = 6, kSums = 6;
#else
constexpr int kWalkRows = 1, kSums = 1;
#endif

constexpr float kMinusInfinity = -__builtin_inff();
// Max of a row that has met no score. Finite, so that a masked -infinity stays below it and weighs
// nothing whatever the scores are.
constexpr float kNoScore = -0x1.fffffep127f;
alignas(64) constexpr float kKeyOfLane[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                              11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                              22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// Rows on their walk through the keys of one split: running max, sixteen partial sums and the
// weighted values of each.
struct Walk {
    const float* q[kWalkRows];
    int first_key[kWalkRows], last_key[kWalkRows];
    float max[kWalkRows];
    alignas(64) float partial[kWalkRows][16];
    alignas(64) float scores[kWalkRows][32];  // of the present block, then e^(score - max)
    float* acc;                               // [rows, padded_dim]
    int padded_dim;
};

template <Kind kind>
EL_INLINE V load_kv(const Stored<kind>* p) {
    if constexpr (kind == Kind::f32)
        return load(p);
    else if constexpr (kind == Kind::f16)
        return load_half(p);
    else
        return load_bf16(p);
}
template <class T>
EL_INLINE void prefetch_values(const T* p, int n) {
    for (int i = 0; i < n; i += 64 / static_cast<int>(sizeof(T))) prefetch(p + i);
}

// Scores of R rows against the block's 32 keys: one chain over d for each. The blocks lie
// scattered: each line read here asks for the same line of the next block.
template <Kind kind, int R>
EL_INLINE void block_scores(Walk& w, const Stored<kind>* k, const Stored<kind>* next, int dim,
                            V scale) {
    constexpr int vectors = 2 * R <= kSums ? 2 : 1;
    for (int at = 0; at < 32; at += 16 * vectors) {
        V s[R][vectors];
        EL_UNROLL
        for (int r = 0; r < R; ++r) EL_UNROLL
        for (int i = 0; i < vectors; ++i) s[r][i] = zero();
        for (int d = 0; d < dim; ++d) {
            prefetch_values(next + 32 * d + at, 16 * vectors);
            V keys[vectors];
            EL_UNROLL
            for (int i = 0; i < vectors; ++i) keys[i] = load_kv<kind>(k + 32 * d + at + 16 * i);
            EL_UNROLL
            for (int r = 0; r < R; ++r) {
                const V q = set1(w.q[r][d]);
                EL_UNROLL
                for (int i = 0; i < vectors; ++i) s[r][i] = fma(q, keys[i], s[r][i]);
            }
        }
        EL_UNROLL
        for (int r = 0; r < R; ++r) EL_UNROLL
        for (int i = 0; i < vectors; ++i) store(w.scores[r] + at + 16 * i, s[r][i] * scale);
    }
}

// Folds the block's scores into the row's max and sum; leaves e^(score - max), exact zeros outside
// the row's keys.
EL_INLINE void block_softmax(Walk& w, int r, int first_of_block) {
    V s0 = load(w.scores[r]), s1 = load(w.scores[r] + 16);
    const int low = w.first_key[r] - first_of_block, high = w.last_key[r] + 1 - first_of_block;
    if (low > 0 || high < 32) {
        if (low >= 32 || high <= 0) {  // none of this block's keys: no other row may leave a trace
            store(w.scores[r], zero());
            store(w.scores[r] + 16, zero());
            return;
        }
        const V from = set1(static_cast<float>(low)), to = set1(static_cast<float>(high));
        const V key0 = load(kKeyOfLane), key1 = load(kKeyOfLane + 16), none = set1(kMinusInfinity);
        s0 = select_lt(key0, from, none, select_lt(key0, to, s0, none));
        s1 = select_lt(key1, from, none, select_lt(key1, to, s1, none));
    }
    const float block_max = tree_max(max(s0, s1));
    V partial = load(w.partial[r]);
    if (block_max > w.max[r]) {
        const V factor = exp(set1(w.max[r] - block_max));
        partial = partial * factor;
        float* acc = w.acc + r * w.padded_dim;
        for (int d = 0; d < w.padded_dim; d += 16) store(acc + d, load(acc + d) * factor);
        w.max[r] = block_max;
    }
    const V m = set1(w.max[r]);
    const V p0 = exp(s0 - m), p1 = exp(s1 - m);
    store(w.scores[r], p0);
    store(w.scores[r] + 16, p1);
    store(w.partial[r], (partial + p0) + p1);
}

// Adds the block's weighted values to 16 N dims of R rows, keys low .. high - 1 in turn.
template <Kind kind, int R, int N>
EL_INLINE void block_values(Walk& w, const Stored<kind>* v, const Stored<kind>* next, int low,
                            int high, int d) {
    V acc[R][N];
    EL_UNROLL
    for (int r = 0; r < R; ++r) EL_UNROLL
    for (int i = 0; i < N; ++i) acc[r][i] = load(w.acc + r * w.padded_dim + d + 16 * i);
    for (int j = low; j < high; ++j) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(j) * w.padded_dim + d;
        prefetch_values(next + at, 16 * N);
        V values[N];
        EL_UNROLL
        for (int i = 0; i < N; ++i) values[i] = load_kv<kind>(v + at + 16 * i);
        EL_UNROLL
        for (int r = 0; r < R; ++r) {
            const V p = set1(w.scores[r][j]);
            EL_UNROLL
            for (int i = 0; i < N; ++i) acc[r][i] = fma(p, values[i], acc[r][i]);
        }
    }
    EL_UNROLL
    for (int r = 0; r < R; ++r) EL_UNROLL
    for (int i = 0; i < N; ++i) store(w.acc + r * w.padded_dim + d + 16 * i, acc[r][i]);
}

// R rows through the keys first .. last, which lie within one split.
template <Kind kind, int R>
__attribute__((noinline)) void walk_keys(const Attention& a, Walk& w, const int32_t* table,
                                         int kv_head, int first, int last) {
    constexpr int vectors = R * 4 <= kSums ? 4 : R * 2 <= kSums ? 2 : 1;
    const auto* keys = static_cast<const Stored<kind>*>(a.k);
    const auto* values = static_cast<const Stored<kind>*>(a.v);
    const V scale = set1(a.scale);
    for (int b = first / 32; b <= last / 32; ++b) {
        const ptrdiff_t here = static_cast<ptrdiff_t>(table[b]) * a.block_step + kv_head;
        const int32_t follower = table[min_of(b + 1, last / 32)];
        const ptrdiff_t next = static_cast<ptrdiff_t>(follower) * a.block_step + kv_head;
        block_scores<kind, R>(w, keys + here * a.padded_dim * 32, keys + next * a.padded_dim * 32,
                              a.dim, scale);
        for (int r = 0; r < R; ++r) block_softmax(w, r, 32 * b);
        const int low = max_of(first - 32 * b, 0), high = min_of(last + 1 - 32 * b, 32);
        const auto* v = values + here * 32 * a.padded_dim;
        const auto* v_next = values + next * 32 * a.padded_dim;
        int d = 0;
        for (; d + 16 * vectors <= a.padded_dim; d += 16 * vectors)
            block_values<kind, R, vectors>(w, v, v_next, low, high, d);
        for (; d < a.padded_dim; d += 16) block_values<kind, R, 1>(w, v, v_next, low, high, d);
    }
}

template <Kind kind, int R = kWalkRows>
void walk_rows(const Attention& a, Walk& w, int rows, const int32_t* table, int kv_head, int first,
               int last) {
    if constexpr (R > 1)
        if (rows < R) return walk_rows<kind, R - 1>(a, w, rows, table, kv_head, first, last);
    walk_keys<kind, R>(a, w, table, kv_head, first, last);
}

// One split's part of a tile: [rows, padded_dim] weighted values, [rows] max, [rows] sum.
struct Part {
    float *acc, *max, *sum;
    Part(float* p, int rows, int padded_dim)
        : acc(p), max(p + static_cast<ptrdiff_t>(rows) * padded_dim), sum(max + rows) {}
};

void attention_part(const Attention& a, const AttentionTile& t, int split, float* out) {
    const int group = a.heads / a.kv_heads, num_rows = t.num_tokens * group;
    const Part part(out, num_rows, a.padded_dim);
    const int32_t* table = a.tables + t.seq * a.table_stride;
    const int num_walks = (num_rows + kWalkRows - 1) / kWalkRows;
    for (int i = 0; i < num_walks; ++i) {
        const int begin = num_rows * i / num_walks, rows = num_rows * (i + 1) / num_walks - begin;
        Walk w;
        w.acc = part.acc + static_cast<ptrdiff_t>(begin) * a.padded_dim;
        w.padded_dim = a.padded_dim;
        int first = split * kSplit + kSplit, last = -1;
        for (int r = 0; r < rows; ++r) {
            const int token = t.first_token + (begin + r) / group;
            const int head = t.kv_head * group + (begin + r) % group;
            w.q[r] = a.q + (static_cast<ptrdiff_t>(token) * a.heads + head) * a.dim;
            w.last_key[r] = a.positions[token];
            w.first_key[r] = a.window ? max_of(w.last_key[r] - a.window + 1, 0) : 0;
            first = min_of(first, w.first_key[r]);
            last = max_of(last, w.last_key[r]);
            w.max[r] = kNoScore;
            store(w.partial[r], zero());
        }
        for (int d = 0; d < rows * a.padded_dim; d += 16) store(w.acc + d, zero());
        first = max_of(first, split * kSplit);
        last = min_of(last, split * kSplit + kSplit - 1);
        const auto walk = a.kv_kind == Kind::f32   ? walk_rows<Kind::f32>
                          : a.kv_kind == Kind::f16 ? walk_rows<Kind::f16>
                                                   : walk_rows<Kind::bf16>;
        if (first <= last) walk(a, w, rows, table, t.kv_head, first, last);
        for (int r = 0; r < rows; ++r) {
            part.max[begin + r] = w.max[r];
            part.sum[begin + r] = tree_sum(load(w.partial[r]));
        }
    }
}

EL_INLINE float exp_of(float x) {
    float t[16];
    store(t, exp(set1(x)));
    return t[0];
}

void attention_join(const Attention& a, const AttentionTile& t, float* parts, int num_parts) {
    const int group = a.heads / a.kv_heads, num_rows = t.num_tokens * group;
    const std::size_t stride = elinvar::attention_part_floats(num_rows, a.padded_dim);
    for (int r = 0; r < num_rows; ++r) {
        float max = kNoScore, sum = 0.0f;
        const float* acc = nullptr;
        for (int i = 0; i < num_parts; ++i) {
            const Part part(parts + static_cast<std::size_t>(i) * stride, num_rows, a.padded_dim);
            float* now = part.acc + static_cast<ptrdiff_t>(r) * a.padded_dim;
            if (part.max[r] == kNoScore) continue;
            if (!acc) {
                max = part.max[r];
                sum = part.sum[r];
                acc = now;
                continue;
            }
            const float m = max_of(max, part.max[r]);
            const float f0 = exp_of(max - m), f1 = exp_of(part.max[r] - m);
            for (int d = 0; d < a.padded_dim; d += 16)
                store(now + d, fma(load(acc + d), set1(f0), load(now + d) * set1(f1)));
            sum = fmadd(sum, f0, part.sum[r] * f1);
            max = m;
            acc = now;
        }
        const ptrdiff_t token = t.first_token + r / group;
        const ptrdiff_t head = t.kv_head * group + r % group;
        float* out = a.out + (token * a.heads + head) * a.dim;
        for (int d = 0; d < a.dim; d += 16) {
            // Only a row of NaN scores has no part: 0 / 0. + 0: no negative zero leaves here.
            const V o = (acc ? load(acc + d) : zero()) / set1(sum) + zero();
            store_n(out + d, o, min_of(16, a.dim - d));
        }
    }
}
