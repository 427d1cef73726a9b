// attention: keys in blocks of 32 at absolute positions, a running softmax per query row
// (Milakov and Gimelshein, 2018) restarted every kSplit keys, the parts merged in ascending
// order (Dao et al., 2023). A row's arithmetic depends on its own position alone, never on the
// rows beside it. Included inside namespace ELINVAR_ISA.

constexpr int kSplit = 1024;
constexpr int kMaxTileRows = 128;
#if defined(ELINVAR_AVX512)
constexpr int kScoreRows = 8, kValueRows = 4, kValueVectors = 4;
#elif defined(ELINVAR_AVX2)
constexpr int kScoreRows = 2, kValueRows = 2, kValueVectors = 2;
#elif defined(ELINVAR_NEON)
constexpr int kScoreRows = 2, kValueRows = 2, kValueVectors = 2;
#else
constexpr int kScoreRows = 1, kValueRows = 1, kValueVectors = 1;
#endif

// The running softmax of one query row: max, sum and weighted values of the current split, and
// of the splits merged so far.
struct RowState {
    const float* q;
    float* out;
    int first_key, last_key;
    float max, sum, merged_max, merged_sum;
    float *acc, *merged;  // [padded_dim]
    float partial[16];    // the sixteen partial sums of this split
};

size_t attention_scratch(int rows, int padded_dim) {
    return static_cast<size_t>(rows) * (32 + 2 * static_cast<size_t>(padded_dim));
}

constexpr float kMinusInfinity = -__builtin_inff();
// Max of a row that has met no score. Finite, so that a masked -infinity stays below it and weighs
// nothing whatever the scores are.
constexpr float kNoScore = -0x1.fffffep127f;

template <Kind kind>
EL_INLINE V load_kv(const void* base, ptrdiff_t at) {
    if constexpr (kind == Kind::f32)
        return load(static_cast<const float*>(base) + at);
    else if constexpr (kind == Kind::f16)
        return load_half(static_cast<const uint16_t*>(base) + at);
    else
        return load_bf16(static_cast<const uint16_t*>(base) + at);
}

// Scores of RT rows against the block's 32 keys: one chain over d for each.
template <Kind kind, int RT>
EL_INLINE void block_scores(const RowState* rows, const void* k, ptrdiff_t at, int dim, V scale,
                            float* scores) {
    V s[RT][2];
    EL_UNROLL
    for (int r = 0; r < RT; ++r) s[r][0] = s[r][1] = zero();
    for (int d = 0; d < dim; ++d) {
        const V k0 = load_kv<kind>(k, at + 32 * d), k1 = load_kv<kind>(k, at + 32 * d + 16);
        EL_UNROLL
        for (int r = 0; r < RT; ++r) {
            const V q = set1(rows[r].q[d]);
            s[r][0] = fma(q, k0, s[r][0]);
            s[r][1] = fma(q, k1, s[r][1]);
        }
    }
    EL_UNROLL
    for (int r = 0; r < RT; ++r) {
        store(scores + 32 * r, s[r][0] * scale);
        store(scores + 32 * r + 16, s[r][1] * scale);
    }
}

// Folds the block's scores into the row's max and sum; leaves e^(s - max) in `scores`, exact
// zeros outside the row's keys.
EL_INLINE void softmax_block(RowState& row, int block, int padded_dim, float* scores) {
    const int low = max_of(row.first_key - 32 * block, 0);
    const int high = min_of(row.last_key + 1 - 32 * block, 32);
    if (low >= high) {  // none of this block's keys: no other row may leave a trace here
        for (int j = 0; j < 32; ++j) scores[j] = 0.0f;
        return;
    }
    for (int j = 0; j < low; ++j) scores[j] = kMinusInfinity;
    for (int j = high; j < 32; ++j) scores[j] = kMinusInfinity;
    const V s0 = load(scores), s1 = load(scores + 16);
    const float block_max = tree_max(max(s0, s1));
    V partial = load(row.partial);
    if (block_max > row.max) {
        const V factor = exp(set1(row.max - block_max));
        partial = partial * factor;
        for (int d = 0; d < padded_dim; d += 16) store(row.acc + d, load(row.acc + d) * factor);
        row.max = block_max;
    }
    const V m = set1(row.max);
    const V p0 = exp(s0 - m), p1 = exp(s1 - m);
    store(scores, p0);
    store(scores + 16, p1);
    store(row.partial, (partial + p0) + p1);
}

template <Kind kind, int RT, int NV>
EL_INLINE void block_values(RowState* rows, const void* v, ptrdiff_t at, int low, int high, int d,
                            int padded_dim, const float* scores) {
    V acc[RT][NV];
    EL_UNROLL
    for (int r = 0; r < RT; ++r) EL_UNROLL
    for (int i = 0; i < NV; ++i) acc[r][i] = load(rows[r].acc + d + 16 * i);
    for (int j = low; j < high; ++j) {
        V values[NV];
        EL_UNROLL
        for (int i = 0; i < NV; ++i)
            values[i] = load_kv<kind>(v, at + static_cast<ptrdiff_t>(j) * padded_dim + d + 16 * i);
        EL_UNROLL
        for (int r = 0; r < RT; ++r) {
            const V p = set1(scores[32 * r + j]);
            EL_UNROLL
            for (int i = 0; i < NV; ++i) acc[r][i] = fma(p, values[i], acc[r][i]);
        }
    }
    EL_UNROLL
    for (int r = 0; r < RT; ++r) EL_UNROLL
    for (int i = 0; i < NV; ++i) store(rows[r].acc + d + 16 * i, acc[r][i]);
}

template <Kind kind, int RT>
EL_INLINE void value_rows(RowState* rows, const void* v, ptrdiff_t at, int low, int high,
                          int padded_dim, const float* scores) {
    int d = 0;
    for (; d + 16 * kValueVectors <= padded_dim; d += 16 * kValueVectors)
        block_values<kind, RT, kValueVectors>(rows, v, at, low, high, d, padded_dim, scores);
    for (; d < padded_dim; d += 16)
        block_values<kind, RT, 1>(rows, v, at, low, high, d, padded_dim, scores);
}

EL_INLINE void reset_split(RowState& row, int padded_dim) {
    row.max = kNoScore;
    row.sum = 0.0f;
    for (int i = 0; i < 16; ++i) row.partial[i] = 0.0f;
    for (int d = 0; d < padded_dim; ++d) row.acc[d] = 0.0f;
}

// Joins the current split to those before it.
EL_INLINE void merge_split(RowState& row, int padded_dim) {
    if (row.max == kNoScore) return;
    row.sum = tree_sum(load(row.partial));
    if (row.merged_max == kNoScore) {
        row.merged_max = row.max;
        row.merged_sum = row.sum;
        std::memcpy(row.merged, row.acc, static_cast<size_t>(padded_dim) * 4);
    } else {
        const float m = max_of(row.merged_max, row.max);
        float factors[16];
        store(factors, exp(set1(row.merged_max - m)));
        const V before = set1(factors[0]);
        store(factors, exp(set1(row.max - m)));
        const V now = set1(factors[0]);
        for (int d = 0; d < padded_dim; d += 16)
            store(row.merged + d, fma(load(row.merged + d), before, load(row.acc + d) * now));
        float sums[16];
        store(sums, fma(set1(row.merged_sum), before, set1(row.sum) * now));
        row.merged_sum = sums[0];
        row.merged_max = m;
    }
    reset_split(row, padded_dim);
}

template <Kind kind>
void attention_tile(const Attention& a, int seq, RowState* rows, int num_rows, int kv_head,
                    float* scores) {
    const int32_t* table = a.tables + seq * a.table_stride;
    const V scale = set1(a.scale);
    int first = rows[0].first_key, last = rows[0].last_key;
    for (int r = 1; r < num_rows; ++r) {
        first = min_of(first, rows[r].first_key);
        last = max_of(last, rows[r].last_key);
    }
    for (int b = first / 32; b <= last / 32; ++b) {
        if (b * 32 % kSplit == 0)
            for (int r = 0; r < num_rows; ++r) merge_split(rows[r], a.padded_dim);
        const ptrdiff_t head = static_cast<ptrdiff_t>(table[b]) * a.kv_heads + kv_head;
        const ptrdiff_t key_at = head * a.dim * 32, value_at = head * 32 * a.padded_dim;
        int r = 0;
        for (; r + kScoreRows <= num_rows; r += kScoreRows)
            block_scores<kind, kScoreRows>(rows + r, a.k, key_at, a.dim, scale, scores + 32 * r);
        for (; r < num_rows; ++r)
            block_scores<kind, 1>(rows + r, a.k, key_at, a.dim, scale, scores + 32 * r);
        for (r = 0; r < num_rows; ++r) softmax_block(rows[r], b, a.padded_dim, scores + 32 * r);
        const int low = max_of(first - 32 * b, 0), high = min_of(last + 1 - 32 * b, 32);
        for (r = 0; r + kValueRows <= num_rows; r += kValueRows)
            value_rows<kind, kValueRows>(rows + r, a.v, value_at, low, high, a.padded_dim,
                                         scores + 32 * r);
        for (; r < num_rows; ++r)
            value_rows<kind, 1>(rows + r, a.v, value_at, low, high, a.padded_dim, scores + 32 * r);
    }
    for (int r = 0; r < num_rows; ++r) {
        merge_split(rows[r], a.padded_dim);
        const V sum = set1(rows[r].merged_sum);
        for (int d = 0; d < a.dim; d += 16) {  // + 0: no negative zero leaves here
            const V o = load(rows[r].merged + d) / sum + zero();
            store_n(rows[r].out + d, o, min_of(16, a.dim - d));
        }
    }
}

void attention(const Attention& a, int seq, int first_token, int num_tokens, int kv_head,
               float* scratch) {
    const int group = a.heads / a.kv_heads, num_rows = num_tokens * group;
    RowState rows[kMaxTileRows];
    float* scores = scratch;
    float* values = scratch + 32 * static_cast<size_t>(num_rows);
    for (int r = 0; r < num_rows; ++r) {
        const int t = first_token + r / group;
        const int head = kv_head * group + r % group;
        const ptrdiff_t at = (static_cast<ptrdiff_t>(t) * a.heads + head) * a.dim;
        RowState& row = rows[r];
        row.q = a.q + at;
        row.out = a.out + at;
        row.last_key = a.positions[t];
        row.first_key = a.window ? max_of(row.last_key - a.window + 1, 0) : 0;
        row.merged_max = kNoScore;
        row.merged_sum = 0.0f;
        row.acc = values + 2 * static_cast<size_t>(r) * a.padded_dim;
        row.merged = row.acc + a.padded_dim;
        // Only a row of NaN scores ends with this, as 0 / 0.
        for (int d = 0; d < a.padded_dim; ++d) row.merged[d] = 0.0f;
        reset_split(row, a.padded_dim);
    }
    const auto run = a.kv_kind == Kind::f32   ? attention_tile<Kind::f32>
                     : a.kv_kind == Kind::f16 ? attention_tile<Kind::f16>
                                              : attention_tile<Kind::bf16>;
    run(a, seq, rows, num_rows, kv_head, scores);
}
