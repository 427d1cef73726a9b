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
// Blocks that few rows take at once: the chains of one alone are too few to hide an FMA's latency.
constexpr int kBlocks = 2;

constexpr float kMinusInfinity = -__builtin_inff();
// Max of a row that has met no score. Finite, so that a masked -infinity stays below it and weighs
// nothing whatever the scores are.
constexpr float kNoScore = -0x1.fffffep127f;
alignas(64) constexpr float kKeyOfLane[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                              11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                              22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// Hadamard's matrix times the dims that lie 16 apart, `turned_dims` of them together: what a large
// one holds is shared by all.
EL_INLINE void spread(float* x, int dim) {
    for (int step = 16; step < 16 * turned_dims(dim); step *= 2)
        for (int i = 0; i < dim; i += 16) {
            if (i & step) continue;
            const V a = load(x + i), b = load(x + i + step);
            store(x + i, a + b);
            store(x + i + step, a - b);
        }
}

// Rows on their walk through the keys of one split: running max, sixteen partial sums and the
// weighted values of each.
struct Walk {
    const float* q[kWalkRows];
    int first_key[kWalkRows], last_key[kWalkRows];
    float max[kWalkRows];
    alignas(64) float partial[kWalkRows][16];
    // Of the present blocks: scores, then e^(score - max); what the values before them weigh now.
    alignas(64) float scores[kBlocks][kWalkRows][32];
    float factor[kBlocks][kWalkRows];
    float* acc;  // [rows, width]
    int width;   // padded dims of a value
};

template <Kind kind>
EL_INLINE V load_kv(const Stored<kind>* p) {
    if constexpr (kind == Kind::f32)
        return load(p);
    else if constexpr (kind == Kind::f16)
        return load_half(p);
    else if constexpr (kind == Kind::bf16)
        return load_bf16(p);
    else
        return load_int8(p);
}
// Of a head's 32 keys, or of its values; null where elements are what they stand for.
template <Kind kind>
EL_INLINE float* scales_of(Stored<kind>* head, int padded_dim) {
    if constexpr (kind != Kind::int8) return nullptr;
    return reinterpret_cast<float*>(head + static_cast<ptrdiff_t>(padded_dim) * 32);
}
template <Kind kind>
EL_INLINE const float* scales_of(const Stored<kind>* head, int padded_dim) {
    return scales_of<kind>(const_cast<Stored<kind>*>(head), padded_dim);
}
template <class T>
EL_INLINE void prefetch_values(const T* p, int n) {
    for (int i = 0; i < n; i += 64 / static_cast<int>(sizeof(T))) prefetch(p + i);
}

EL_INLINE float first_lane(V a) {
    float t[16];
    store(t, a);
    return t[0];
}

// Scores of R rows against the 32 keys of each of B blocks: one chain over d for each. The blocks
// lie scattered: each line read here asks for the same line of a block to come.
template <Kind kind, int R, int B>
EL_INLINE void block_scores(Walk& w, const Stored<kind>* const* k, const Stored<kind>* const* next,
                            int dim, V scale) {
    const int padded_dim = (dim + 15) / 16 * 16;
    constexpr int vectors = 2 * R * B <= kSums ? 2 : 1;
    for (int at = 0; at < 32; at += 16 * vectors) {
        V s[B][R][vectors];
        EL_UNROLL
        for (int b = 0; b < B; ++b) EL_UNROLL
        for (int r = 0; r < R; ++r) EL_UNROLL
        for (int i = 0; i < vectors; ++i) s[b][r][i] = zero();
        for (int d = 0; d < dim; ++d) {
            V keys[B][vectors];
            EL_UNROLL
            for (int b = 0; b < B; ++b) {
                prefetch_values(next[b] + 32 * d + at, 16 * vectors);
                EL_UNROLL
                for (int i = 0; i < vectors; ++i)
                    keys[b][i] = load_kv<kind>(k[b] + 32 * d + at + 16 * i);
            }
            EL_UNROLL
            for (int r = 0; r < R; ++r) {
                const V q = set1(w.q[r][d]);
                EL_UNROLL
                for (int b = 0; b < B; ++b) EL_UNROLL
                for (int i = 0; i < vectors; ++i) s[b][r][i] = fma(q, keys[b][i], s[b][r][i]);
            }
        }
        EL_UNROLL
        for (int b = 0; b < B; ++b) EL_UNROLL
        for (int i = 0; i < vectors; ++i) {
            V factor = scale;
            if constexpr (kind == Kind::int8)
                factor = load(scales_of<kind>(k[b], padded_dim) + at + 16 * i) * scale;
            EL_UNROLL
            for (int r = 0; r < R; ++r) store(w.scores[b][r] + at + 16 * i, s[b][r][i] * factor);
        }
    }
}

// On its own and not in block_scores, so that uncapped scores pay a branch a block.
__attribute__((noinline)) void cap_scores(Walk& w, int blocks, int rows, float softcap) {
    const V cap = set1(softcap);
    for (int b = 0; b < blocks; ++b)
        for (int r = 0; r < rows; ++r)
            for (int at = 0; at < 32; at += 16) {
                float* s = w.scores[b][r] + at;
                store(s, cap * tanh(load(s) / cap));
            }
}

// Folds the block's scores into the row's max and sum; leaves e^(score - max), exact zeros outside
// the row's keys.
EL_INLINE void block_softmax(Walk& w, int b, int r, int first_of_block) {
    float* scores = w.scores[b][r];
    V s0 = load(scores), s1 = load(scores + 16);
    w.factor[b][r] = 1.0f;
    const int low = w.first_key[r] - first_of_block, high = w.last_key[r] + 1 - first_of_block;
    if (low > 0 || high < 32) {
        if (low >= 32 || high <= 0) {  // none of this block's keys: no other row may leave a trace
            store(scores, zero());
            store(scores + 16, zero());
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
        w.factor[b][r] = first_lane(factor);
        w.max[r] = block_max;
    }
    const V m = set1(w.max[r]);
    const V p0 = exp(s0 - m), p1 = exp(s1 - m);
    store(scores, p0);
    store(scores + 16, p1);
    store(w.partial[r], (partial + p0) + p1);
}

// What codes of values are multiplied by belongs to their keys' weights.
EL_INLINE void scale_weights(float* weights, const float* scales) {
    store(weights, load(weights) * load(scales));
    store(weights + 16, load(weights + 16) * load(scales + 16));
}

// 16 N dims of a block's values: where they begin, in the block asked for too, and how far apart
// those of two keys lie.
template <Kind kind>
struct Values {
    const Stored<kind>*at, *next;
    ptrdiff_t step;
};

// Latent values lie as keys do, [16 N dims, 32]: turned to [32, 16 N] for all rows at hand.
template <Kind kind, int N>
EL_INLINE Values<kind> turn_values(const Stored<kind>* keys, Stored<kind>* out) {
    for (int d = 0; d < 16 * N; d += 16)
        for (int j = 0; j < 32; j += 16) {
            const Stored<kind>* from = keys + 32 * d + j;
            Stored<kind>* to = out + 16 * N * j + d;
            if constexpr (sizeof(*to) < 4)
                transpose(from, 32, to, 16 * N);
            else
                for (int i = 0; i < 256; ++i)
                    to[i / 16 * 16 * N + i % 16] = from[i % 16 * 32 + i / 16];
        }
    return {out, out, 16 * N};
}

// Adds the block's weighted values to 16 N dims of R rows, keys low .. high - 1 in turn.
template <Kind kind, int R, int N>
EL_INLINE void block_values(Walk& w, int b, const Values<kind>& v, int low, int high, int d) {
    const ptrdiff_t width = w.width;
    float* rows = w.acc + d;
    V acc[R][N];
    EL_UNROLL
    for (int r = 0; r < R; ++r) EL_UNROLL
    for (int i = 0; i < N; ++i) acc[r][i] = load(rows + r * width + 16 * i) * set1(w.factor[b][r]);
    for (int j = low; j < high; ++j) {
        const ptrdiff_t at = j * v.step;
        prefetch_values(v.next + at, 16 * N);
        V values[N];
        EL_UNROLL
        for (int i = 0; i < N; ++i) values[i] = load_kv<kind>(v.at + at + 16 * i);
        EL_UNROLL
        for (int r = 0; r < R; ++r) {
            const V p = set1(w.scores[b][r][j]);
            EL_UNROLL
            for (int i = 0; i < N; ++i) acc[r][i] = fma(p, values[i], acc[r][i]);
        }
    }
    EL_UNROLL
    for (int r = 0; r < R; ++r) EL_UNROLL
    for (int i = 0; i < N; ++i) store(rows + r * width + 16 * i, acc[r][i]);
}

template <Kind kind, int R, int N>
EL_INLINE void take_values(const Attention& a, Walk& w, int b, const Stored<kind>* v,
                           const Stored<kind>* next, int low, int high, int d) {
    alignas(64) Stored<kind> turned[32 * 16 * N];
    Values<kind> values{v + d, next + d, w.width};
    if (a.v == a.k) values = turn_values<kind, N>(v + 32 * d, turned);
    block_values<kind, R, N>(w, b, values, low, high, d);
}

// Where a walk goes: the blocks of its keys, first .. last within one split, then those ahead.
struct Path {
    const int32_t* table;
    int block_step, kv_head, first, last;
    const AttentionAhead& ahead;

    ptrdiff_t place(int b) const {
        const int beyond = b - last / 32 - 1;
        return beyond < 0 ? static_cast<ptrdiff_t>(table[b]) * block_step + kv_head
                          : ahead.blocks[beyond];
    }
};

// R rows through B blocks from block b.
template <Kind kind, int R, int B>
EL_INLINE void take_blocks(const Attention& a, Walk& w, const Path& path, int b, int step) {
    constexpr int vectors = R * 4 <= kSums ? 4 : R * 2 <= kSums ? 2 : 1;
    const ptrdiff_t size = head_size(kind, a.padded_dim);
    const Stored<kind>*k[B], *k_next[B], *v[B], *v_next[B];
    for (int i = 0; i < B; ++i) {
        const ptrdiff_t here = path.place(b + i), next = path.place(b + i + step);
        k[i] = static_cast<const Stored<kind>*>(a.k) + here * size;
        k_next[i] = static_cast<const Stored<kind>*>(a.k) + next * size;
        v[i] = static_cast<const Stored<kind>*>(a.v) + here * size;
        v_next[i] = static_cast<const Stored<kind>*>(a.v) + next * size;
        if constexpr (kind == Kind::int8)
            for (const auto* head : {k_next[i], v_next[i]})
                prefetch_values(scales_of<kind>(head, a.padded_dim), 32);
    }
    block_scores<kind, R, B>(w, k, k_next, a.dim, set1(a.scale));
    if (a.softcap > 0.0f) cap_scores(w, B, R, a.softcap);
    for (int i = 0; i < B; ++i)
        for (int r = 0; r < R; ++r) {
            block_softmax(w, i, r, 32 * (b + i));
            if constexpr (kind == Kind::int8)
                scale_weights(w.scores[i][r], scales_of<kind>(v[i], a.padded_dim));
        }
    for (int i = 0; i < B; ++i) {
        const int low = max_of(path.first - 32 * (b + i), 0);
        const int high = min_of(path.last + 1 - 32 * (b + i), 32);
        int d = 0;
        for (; d + 16 * vectors <= w.width; d += 16 * vectors)
            take_values<kind, R, vectors>(a, w, i, v[i], v_next[i], low, high, d);
        for (; d < w.width; d += 16)
            take_values<kind, R, 1>(a, w, i, v[i], v_next[i], low, high, d);
    }
}

template <Kind kind, int R>
__attribute__((noinline)) void walk_keys(const Attention& a, Walk& w, const Path& path) {
    constexpr int step = 2 * R * kBlocks <= kSums ? kBlocks : 1;
    int b = path.first / 32;
    for (; b + step - 1 <= path.last / 32; b += step)
        take_blocks<kind, R, step>(a, w, path, b, step);
    if constexpr (step > 1)
        for (; b <= path.last / 32; ++b) take_blocks<kind, R, 1>(a, w, path, b, step);
}

template <Kind kind, int R = kWalkRows>
void walk_rows(const Attention& a, Walk& w, int rows, const Path& path) {
    if constexpr (R > 1)
        if (rows < R) return walk_rows<kind, R - 1>(a, w, rows, path);
    walk_keys<kind, R>(a, w, path);
}

// One split's part of a tile: [rows, width] weighted values, [rows] max, [rows] sum.
struct Part {
    float *acc, *max, *sum;
    Part(float* p, int rows, int width)
        : acc(p), max(p + static_cast<ptrdiff_t>(rows) * width), sum(max + rows) {}
};

// Where the query of a token's head lies; keys of int8 with values of their own are spread, and
// queries with them, in `turned`.
EL_INLINE const float* query(const Attention& a, int token, int head, float* turned) {
    const float* q = a.q + (static_cast<ptrdiff_t>(token) * a.heads + head) * a.dim;
    if (a.kv_kind != Kind::int8 || a.v == a.k || turned_dims(a.dim) == 1) return q;
    std::memcpy(turned, q, static_cast<size_t>(a.dim) * sizeof(float));
    spread(turned, a.dim);
    return turned;
}

void attention_part(const Attention& a, const AttentionTile& t, int split,
                    const AttentionAhead& ahead, float* out) {
    const int num_rows = t.rows(), width = a.padded_values();
    const Part part(out, num_rows, width);
    const int32_t* table = a.tables + t.seq * a.table_stride;
    alignas(64) float turned[kWalkRows * kMaxHeadDim];
    const int num_walks = (num_rows + kWalkRows - 1) / kWalkRows;
    for (int i = 0; i < num_walks; ++i) {
        const int begin = num_rows * i / num_walks, rows = num_rows * (i + 1) / num_walks - begin;
        Walk w;
        w.acc = part.acc + static_cast<ptrdiff_t>(begin) * width;
        w.width = width;
        int first = split * kSplit + kSplit, last = -1;
        for (int r = 0; r < rows; ++r) {
            const int token = t.first_token + (begin + r) / t.num_heads;
            const int head = t.first_head + (begin + r) % t.num_heads;
            w.q[r] = query(a, token, head, turned + r * a.dim);
            w.last_key[r] = a.positions[token];
            w.first_key[r] = elinvar::first_key(a, w.last_key[r]);
            first = min_of(first, w.first_key[r]);
            last = max_of(last, w.last_key[r]);
            w.max[r] = kNoScore;
            store(w.partial[r], zero());
        }
        for (int d = 0; d < rows * width; d += 16) store(w.acc + d, zero());
        first = max_of(first, split * kSplit);
        last = min_of(last, split * kSplit + kSplit - 1);
        const auto walk = a.kv_kind == Kind::f32    ? walk_rows<Kind::f32>
                          : a.kv_kind == Kind::f16  ? walk_rows<Kind::f16>
                          : a.kv_kind == Kind::bf16 ? walk_rows<Kind::bf16>
                                                    : walk_rows<Kind::int8>;
        if (first <= last) walk(a, w, rows, {table, a.block_step, t.kv_head, first, last, ahead});
        for (int r = 0; r < rows; ++r) {
            part.max[begin + r] = w.max[r];
            part.sum[begin + r] = tree_sum(load(w.partial[r]));
        }
    }
}

void attention_join(const Attention& a, const AttentionTile& t, float* parts, int num_parts) {
    const int num_rows = t.rows(), width = a.padded_values();
    const std::size_t stride = elinvar::attention_part_floats(num_rows, width);
    for (int r = 0; r < num_rows; ++r) {
        float max = kNoScore, sum = 0.0f;
        float* acc = nullptr;
        for (int i = 0; i < num_parts; ++i) {
            const Part part(parts + static_cast<std::size_t>(i) * stride, num_rows, width);
            float* now = part.acc + static_cast<ptrdiff_t>(r) * width;
            if (part.max[r] == kNoScore) continue;
            if (!acc) {
                max = part.max[r];
                sum = part.sum[r];
                acc = now;
                continue;
            }
            const float m = max_of(max, part.max[r]);
            const float f0 = first_lane(exp(set1(max - m))),
                        f1 = first_lane(exp(set1(part.max[r] - m)));
            for (int d = 0; d < width; d += 16)
                store(now + d, fma(load(acc + d), set1(f0), load(now + d) * set1(f1)));
            sum = fmadd(sum, f0, part.sum[r] * f1);
            max = m;
            acc = now;
        }
        const ptrdiff_t token = t.first_token + r / t.num_heads;
        const ptrdiff_t head = t.first_head + r % t.num_heads;
        if (a.sinks && acc) {  // joined last: a part of one key, whose value is nothing
            const float m = max_of(max, a.sinks[head]);
            const float f0 = first_lane(exp(set1(max - m))),
                        f1 = first_lane(exp(set1(a.sinks[head] - m)));
            for (int d = 0; d < width; d += 16) store(acc + d, load(acc + d) * set1(f0));
            sum = fmadd(sum, f0, f1);
        }
        float* out = a.out + (token * a.heads + head) * a.value_dim;
        for (int d = 0; d < a.value_dim; d += 16) {
            // Only a row of NaN scores has no part: 0 / 0. + 0: no negative zero leaves here.
            const V o = (acc ? load(acc + d) : zero()) / set1(sum) + zero();
            store_n(out + d, o, min_of(16, a.value_dim - d));
        }
    }
}
