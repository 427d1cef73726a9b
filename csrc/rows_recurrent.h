// Layers with a recurrent state: a short causal convolution, the gated delta rule, gates. Included
// inside namespace ELINVAR_ISA, after rows.h.

EL_INLINE V load_some(const float* p, int n) { return n >= 16 ? load(p) : load_n(p, n); }
EL_INLINE void store_some(float* p, V a, int n) { n >= 16 ? store(p, a) : store_n(p, a, n); }

constexpr int kMaxTaps = 64;

void causal_conv(const Convolution& a, const StateSpan& s, int first, int num) {
    const int before = a.taps - 1;
    const float* from = a.tails + s.from * a.block_step + first;
    float* to = a.tails + s.to * a.block_step + first;
    // The channels of input t of this step; below 0 one of those before it, null before the
    // sequence.
    const auto input = [&](int t) -> const float* {
        if (t >= 0) return a.x + (s.first + t) * a.ld + first;
        return s.from < 0 ? nullptr : from + (before + t) * a.channels;
    };
    const auto at = [](const float* row, int c, int n) {
        return row ? load_some(row + c, n) : zero();
    };
    const float* rows[kMaxTaps];
    for (int t = 0; t < s.count; ++t) {
        for (int j = 0; j < a.taps; ++j) rows[j] = input(t - before + j);
        float* out = a.out + static_cast<ptrdiff_t>(s.first + t) * a.channels + first;
        for (int c = 0; c < num; c += 16) {
            V acc = zero();
            for (int j = 0; j < a.taps; ++j)
                acc = fma(at(rows[j], c, num - c),
                          load_some(a.w + j * a.channels + first + c, num - c), acc);
            store_some(out + c, activation_of<kSilu>(acc), num - c);
        }
    }
    // Ascending: in place, what is read lies at or beyond what is written.
    for (int j = 0; j < before; ++j)
        for (int c = 0; c < num; c += 16)
            store_some(to + j * a.channels + c, at(input(s.count - before + j), c, num - c),
                       num - c);
}

// ln(1 + e^x) = max(x, 0) + ln(1 + e) with e = e^-|x|; ln(1 + e) = 2 atanh(s), s = e / (2 + e) <=
// 1/3, so that the result is as precise where it is tiny.
EL_INLINE V softplus(V x) {
    const V e = exp(zero() - abs(x));
    const V s = e / (e + set1(2.0f));
    const V z = s * s;
    V p = set1(0.1333333333f);
    p = fma(p, z, set1(0.1538461538f));
    p = fma(p, z, set1(0.1818181818f));
    p = fma(p, z, set1(0.2222222222f));
    p = fma(p, z, set1(0.2857142857f));
    p = fma(p, z, set1(0.4f));
    p = fma(p, z, set1(0.6666666667f));
    p = fma(p, z, set1(2.0f));
    return max(x, zero()) + s * p;
}

// x * (factor / sqrt(sum of x^2 + 1e-6)); the sum as in inverse_rms.
EL_INLINE void l2_normed(const float* x, int dim, float factor, float* out) {
    V acc = zero();
    for (int i = 0; i < dim; i += 16) {
        const V v = load_some(x + i, dim - i);
        acc = fma(v, v, acc);
    }
    const V f = set1(factor / __builtin_sqrtf(tree_sum(acc) + 1e-6f));
    for (int i = 0; i < dim; i += 16) store_some(out + i, load_some(x + i, dim - i) * f, dim - i);
}

#if defined(ELINVAR_AVX512)
constexpr int kStateTile = 4;  // V of columns whose sums stay in registers
#else
constexpr int kStateTile = 2;
#endif

// One token of W * 16 columns of a head's state, read at `from` and written at `to`. The decayed
// state is rounded, twice to the same bits, rather than stored between the two walks.
template <int W>
EL_INLINE void delta_step(const float* from, float* to, ptrdiff_t ld, int key_dim, const float* k,
                          const float* q, const float* v, int num, float decay, float beta,
                          float* out) {
    const V d = set1(decay), b = set1(beta);
    V memory[W], change[W], y[W];
    EL_UNROLL
    for (int w = 0; w < W; ++w) memory[w] = y[w] = zero();
    for (int i = 0; i < key_dim; ++i) {
        const V ki = set1(k[i]);
        EL_UNROLL
        for (int w = 0; w < W; ++w)
            memory[w] = fma(load(from + i * ld + 16 * w) * d, ki, memory[w]);
    }
    EL_UNROLL
    for (int w = 0; w < W; ++w) change[w] = (load_some(v + 16 * w, num - 16 * w) - memory[w]) * b;
    for (int i = 0; i < key_dim; ++i) {
        const V ki = set1(k[i]), qi = set1(q[i]);
        EL_UNROLL
        for (int w = 0; w < W; ++w) {
            const V s = fma(ki, change[w], load(from + i * ld + 16 * w) * d);
            store(to + i * ld + 16 * w, s);
            y[w] = fma(s, qi, y[w]);
        }
    }
    EL_UNROLL
    for (int w = 0; w < W; ++w) store_some(out + 16 * w, y[w], num - 16 * w);
}

void delta_rule(const DeltaRule& a, const StateSpan& s, int head, int first, int num) {
    alignas(64) float q[kMaxHeadDim], k[kMaxHeadDim];
    const int keys = a.key_heads * a.key_dim, channels = 2 * keys + a.heads * a.value_dim;
    const ptrdiff_t ld = a.padded_dim();
    const ptrdiff_t at = static_cast<ptrdiff_t>(head) * a.key_dim * ld + first;
    float* to = a.states + s.to * a.block_step + at;
    const float* from = a.states + s.from * a.block_step + at;
    const int width = (num + 15) / 16 * 16;
    if (s.from < 0) {
        for (int i = 0; i < a.key_dim; ++i)
            for (int j = 0; j < width; j += 16) store(to + i * ld + j, zero());
        from = to;
    }
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.key_dim));
    const V rate = exp(set1(a.a_log[head])), shift = set1(a.dt_bias[head]);
    for (int t = s.first; t < s.first + s.count; ++t, from = to) {
        const float* row = a.qkv + static_cast<ptrdiff_t>(t) * channels;
        const float* own = row + head / (a.heads / a.key_heads) * a.key_dim;
        l2_normed(own, a.key_dim, scale, q);
        l2_normed(own + keys, a.key_dim, 1.0f, k);
        const float* gates = a.x + (t + 1) * a.ld - 2 * a.heads + head;
        const V g = rate * softplus(set1(gates[a.heads]) + shift);
        const float decay = first_lane(exp(zero() - g));
        const float beta = first_lane(set1(1.0f) / (set1(1.0f) + exp(zero() - set1(gates[0]))));
        const float* v = row + 2 * keys + head * a.value_dim + first;
        float* out = a.out + (static_cast<ptrdiff_t>(t) * a.heads + head) * a.value_dim + first;
        int j = 0;
        for (; j + 16 * kStateTile <= width; j += 16 * kStateTile)
            delta_step<kStateTile>(from + j, to + j, ld, a.key_dim, k, q, v + j, num - j, decay,
                                   beta, out + j);
        for (; j < width; j += 16)
            delta_step<1>(from + j, to + j, ld, a.key_dim, k, q, v + j, num - j, decay, beta,
                          out + j);
    }
}

void gated_rms_norm(const GatedNorm& a, int first, int num) {
    for (int t = first; t < first + num; ++t)
        for (int h = 0; h < a.heads; ++h) {
            const ptrdiff_t at = (static_cast<ptrdiff_t>(t) * a.heads + h) * a.dim;
            const float* gate = a.gate + t * a.ld + h * a.dim;
            scale_row(a.x + at, inverse_rms(a.x + at, a.dim, a.eps), a.gain, a.dim, a.out + at);
            for (int i = 0; i < a.dim; i += 16) {
                const int n = min_of(16, a.dim - i);
                float* y = a.out + at + i;
                store_some(y, load_some(y, n) * activation_of<kSilu>(load_some(gate + i, n)), n);
            }
        }
}

void sigmoid_gate(const float* x, const float* gate, size_t n, float* out) {
    for (size_t i = 0; i < n; i += 16) {
        const int rest = static_cast<int>(n - i < 16 ? n - i : 16);
        const V g = exp(zero() - load_some(gate + i, rest));
        store_some(out + i, load_some(x + i, rest) / (set1(1.0f) + g), rest);
    }
}
