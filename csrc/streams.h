// Several streams side by side, and what else Gemma 3n adds. Included inside namespace ELINVAR_ISA,
// after rows.h.

void multiply(const float* x, const float* y, size_t n, float* out) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, load(x + i) * load(y + i));
    for (; i < n; ++i) out[i] = x[i] * y[i];
}

void mix(const float* const* xs, const float* coefs, int count, int n, float* out) {
    for (int i = 0; i < n; i += 16) {
        const int m = min_of(16, n - i);
        V acc = zero();
        for (int s = 0; s < count; ++s)
            acc = fma(m == 16 ? load(xs[s] + i) : load_n(xs[s] + i, m), set1(coefs[s]), acc);
        store_n(out + i, acc, m);
    }
}

void sparsify(const float* x, float deviations, int n, float* out) {
    const float mean = mean_of(x, n), deviation = __builtin_sqrtf(variance_of(x, mean, n));
    const V least = set1(fmadd(deviations, deviation, mean));
    map(x, static_cast<size_t>(n), out, [least](V v) { return max(v - least, zero()); });
}

void match_rms(const float* x, const float* y, int n, float* out) {
    const float own = __builtin_sqrtf(max_of(mean_square(x, n), 1e-5f));
    scale(x, __builtin_sqrtf(mean_square(y, n)) / own, static_cast<size_t>(n), out);
}

void rope_queries(const Rope& a, int first, int num) {
    alignas(64) float normed[kMaxHeadDim];
    const size_t rest = static_cast<size_t>(a.dim - a.rotary_dim) * sizeof(float);
    for (int t = first; t < first + num; ++t) {
        const float* angles = a.table + static_cast<ptrdiff_t>(a.positions[t]) * a.rotary_dim;
        for (int h = 0; h < a.heads; ++h) {
            const ptrdiff_t at = (static_cast<ptrdiff_t>(t) * a.heads + h) * a.dim;
            const float* x = a.qkv + at;
            if (a.q_gain) {
                scale_row(x, inverse_rms(x, a.dim, a.eps), a.q_gain, a.dim, normed);
                x = normed;
            }
            rotate(x, angles, a.rotary_dim, a.q + at);
            if (rest) std::memcpy(a.q + at + a.rotary_dim, x + a.rotary_dim, rest);
        }
    }
}
