// Scores by which sparse attention chooses keys (DeepSeek-AI, 2025): a key is worth the sum over
// heads of weight * max(0, q . k). Included inside namespace ELINVAR_ISA, after attention.h.

// R heads from `q` on, added to the sums of the block's 32 keys by ascending head.
template <Kind kind, int R>
EL_INLINE void add_heads(Walk& w, const float* q, const float* weights, const Stored<kind>* k,
                         int dim, V (&sum)[2]) {
    for (int r = 0; r < R; ++r) w.q[r] = q + static_cast<ptrdiff_t>(r) * dim;
    block_scores<kind, R, 1>(w, &k, &k, dim, set1(1.0f));
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2; ++i) {
            const V dot = max(load(w.scores[0][r] + 16 * i), zero());
            sum[i] = fma(set1(weights[r]), dot, sum[i]);
        }
}

template <Kind kind, int R = kWalkRows>
EL_INLINE void add_rest(Walk& w, int heads, const float* q, const float* weights,
                        const Stored<kind>* k, int dim, V (&sum)[2]) {
    if constexpr (R > 0) {
        if (heads < R) return add_rest<kind, R - 1>(w, heads, q, weights, k, dim, sum);
        add_heads<kind, R>(w, q, weights, k, dim, sum);
    }
}

template <Kind kind>
void index_scores_kind(const Index& a, int token, const int32_t* blocks, int num, float* out) {
    Walk w;
    const float* q = a.q + static_cast<ptrdiff_t>(token) * a.heads * a.dim;
    const float* weights = a.weights + static_cast<ptrdiff_t>(token) * a.heads;
    for (int b = 0; b < num; ++b) {
        const Stored<kind>* k =
            static_cast<const Stored<kind>*>(a.k) +
            static_cast<ptrdiff_t>(blocks[b]) * a.block_step * head_size(kind, a.padded_dim);
        V sum[2] = {zero(), zero()};
        for (int h = 0; h < a.heads; h += kWalkRows)
            add_rest<kind>(w, min_of(kWalkRows, a.heads - h), q + static_cast<ptrdiff_t>(h) * a.dim,
                           weights + h, k, a.dim, sum);
        store(out + 32 * b, sum[0]);
        store(out + 32 * b + 16, sum[1]);
    }
}

void index_scores(const Index& a, int token, const int32_t* blocks, int num, float* out) {
    const auto score = a.kv_kind == Kind::f32    ? index_scores_kind<Kind::f32>
                       : a.kv_kind == Kind::f16  ? index_scores_kind<Kind::f16>
                       : a.kv_kind == Kind::bf16 ? index_scores_kind<Kind::bf16>
                                                 : index_scores_kind<Kind::int8>;
    score(a, token, blocks, num, out);
}
