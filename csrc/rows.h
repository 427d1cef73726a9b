// Ops on rows: int8 rounding, norms, activations, rotary embedding with the cache write.
// Included inside namespace ELINVAR_ISA.

// Within -limit .. limit; NaN becomes limit.
EL_INLINE V saturate(V x, float limit) { return max(min(x, set1(limit)), set1(-limit)); }

constexpr float kMaxFloat = 0x1.fffffep127f, kMaxBf16 = 0x1.fep127f, kMaxHalf = 65504.0f;

void quantize_rows(const float* x, int rows, const QuantRows& out, int first_row) {
    for (int m = first_row; m < first_row + rows; ++m) {
        const float* p = x + m * out.groups * 32;
        QuantGroup* group = quant_row(out, m);
        const ptrdiff_t step = block_height(out, m);
        for (ptrdiff_t g = 0; g < out.groups; ++g, p += 32, group += step) {
            // No instruction set agrees with another on the integer of an infinity or a NaN.
            const V a = saturate(load(p), kMaxFloat), b = saturate(load(p + 16), kMaxFloat);
            const float largest = tree_max(max(abs(a), abs(b)));
            const bool live = largest >= 1e-30f;
            const V inverse = set1(live ? 127.0f / largest : 0.0f);
            const I ra = round_to_int(a * inverse), rb = round_to_int(b * inverse);
            store_bytes(group->codes, ra);
            store_bytes(group->codes + 16, rb);
            const float total = tree_sum(to_float(ra + rb));  // small integers: exact
            group->scale = live ? largest / 127.0f : 0.0f;
            group->sum = group->scale * total;
            group->isum = static_cast<int32_t>(total);
        }
    }
}

// 1 / sqrt(mean(x^2) + eps); partial sum i takes elements i mod 16.
EL_INLINE float inverse_rms(const float* x, int dim, float eps) {
    V acc = zero();
    int i = 0;
    for (; i + 16 <= dim; i += 16) {
        const V a = load(x + i);
        acc = fma(a, a, acc);
    }
    if (i < dim) {
        const V a = load_n(x + i, dim - i);
        acc = fma(a, a, acc);
    }
    const float mean = tree_sum(acc) / static_cast<float>(dim);
    return 1.0f / __builtin_sqrtf(mean + eps);
}

EL_INLINE void scale_row(const float* x, float factor, const float* gain, int dim, float* out) {
    const V f = set1(factor);
    int i = 0;
    for (; i + 16 <= dim; i += 16) store(out + i, load(x + i) * f * load(gain + i));
    if (i < dim) store_n(out + i, load_n(x + i, dim - i) * f * load_n(gain + i, dim - i), dim - i);
}

void add(const float* x, const float* y, size_t n, float* out) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, load(x + i) + load(y + i));
    for (; i < n; ++i) out[i] = x[i] + y[i];
}

void rms_norm(const float* x, const float* y, const float* gain, float eps, int rows, int dim,
              float* sum, float* out) {
    for (int m = 0; m < rows; ++m) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(m) * dim;
        const float* row = x + at;
        if (y) {
            add(row, y + at, static_cast<size_t>(dim), sum + at);
            row = sum + at;
        }
        scale_row(row, inverse_rms(row, dim, eps), gain, dim, out + at);
    }
}

EL_INLINE V activation_of(int activation, V g) {
    if (activation == 0) return g / (set1(1.0f) + exp(zero() - g));
    // gelu(g) by tanh: 0.5 g (1 + tanh(t)) = g / (1 + e^(-2t)), t = sqrt(2/pi)(g + 0.044715 g^3)
    const V cubic = g * g * g;
    const V inner = fma(cubic, set1(0.044715f), g);
    return g / (set1(1.0f) + exp(inner * set1(-1.5957691216f)));
}

void activate(int activation, float* gate, ptrdiff_t ld_gate, const float* up, ptrdiff_t ld_up,
              int rows, int cols) {
    for (int m = 0; m < rows; ++m) {
        float* g = gate + m * ld_gate;
        const float* u = up + m * ld_up;
        int i = 0;
        for (; i + 16 <= cols; i += 16)
            store(g + i, activation_of(activation, load(g + i)) * load(u + i));
        if (i < cols)
            store_n(g + i,
                    activation_of(activation, load_n(g + i, cols - i)) * load_n(u + i, cols - i),
                    cols - i);
    }
}

EL_INLINE void rotate(const float* x, const float* table, int dim, float* out) {
    const int half = dim / 2;
    for (int i = 0; i < half; i += 16) {
        const int n = min_of(16, half - i);
        const V a = load_n(x + i, n), b = load_n(x + half + i, n);
        const V cos = load_n(table + i, n), sin = load_n(table + half + i, n);
        store_n(out + i, fma(a, cos, zero() - b * sin), n);
        store_n(out + half + i, fma(b, cos, a * sin), n);
    }
}

// One head's values in the cache's type. All are finite: where a query row does not see a key, its
// weight of 0 times the value must be 0.
EL_INLINE void to_cache(const float* x, int dim, float* out) {
    for (int i = 0; i < dim; i += 16) {
        const int n = min_of(16, dim - i);
        store_n(out + i, saturate(load_n(x + i, n), kMaxFloat), n);
    }
}
EL_INLINE void to_half(const float* x, int dim, uint16_t* out) {
    int i = 0;
    for (; i + 16 <= dim; i += 16) store_half(out + i, saturate(load(x + i), kMaxHalf));
    if (i < dim) {
        uint16_t t[16];
        store_half(t, saturate(load_n(x + i, dim - i), kMaxHalf));
        std::memcpy(out + i, t, static_cast<size_t>(dim - i) * 2);
    }
}
EL_INLINE void to_bf16(const float* x, int dim, uint16_t* out) {
    for (int i = 0; i < dim; i += 16) {
        const int n = min_of(16, dim - i);
        float t[16];
        store(t, saturate(load_n(x + i, n), kMaxBf16));
        for (int j = 0; j < n; ++j) out[i + j] = float_to_bf16(t[j]);
    }
}

template <class T>
EL_INLINE void write_slot(const Rope& a, const T* k, const T* v, int32_t slot, int head) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(slot / 32) * a.kv_heads + head;
    T* keys = static_cast<T*>(a.k) + at * a.dim * 32 + slot % 32;
    for (int d = 0; d < a.dim; ++d) keys[d * 32] = k[d];
    T* values = static_cast<T*>(a.v) + (at * 32 + slot % 32) * a.padded_dim;
    std::memcpy(values, v, static_cast<size_t>(a.dim) * sizeof(T));
}

constexpr int kMaxHeadDim = 1024;

void rope_write(const Rope& a, int first, int num) {
    float normed[kMaxHeadDim], rotated[kMaxHeadDim], k32[kMaxHeadDim], v32[kMaxHeadDim];
    uint16_t k16[kMaxHeadDim], v16[kMaxHeadDim];
    const ptrdiff_t width = static_cast<ptrdiff_t>(a.heads + 2 * a.kv_heads) * a.dim;
    const auto prepare = [&](const float* x, const float* gain) {
        if (!gain) return x;
        scale_row(x, inverse_rms(x, a.dim, a.eps), gain, a.dim, normed);
        return static_cast<const float*>(normed);
    };
    for (int t = first; t < first + num; ++t) {
        const float* row = a.qkv + t * width;
        const float* table = a.table + static_cast<ptrdiff_t>(a.positions[t]) * a.dim;
        float* q = a.q + static_cast<ptrdiff_t>(t) * a.heads * a.dim;
        for (int h = 0; h < a.heads; ++h)
            rotate(prepare(row + h * a.dim, a.q_gain), table, a.dim, q + h * a.dim);
        for (int h = 0; h < a.kv_heads; ++h) {
            const float* v = row + (a.heads + a.kv_heads + h) * a.dim;
            rotate(prepare(row + (a.heads + h) * a.dim, a.k_gain), table, a.dim, rotated);
            if (a.kv_kind == Kind::f32) {
                to_cache(rotated, a.dim, k32);
                to_cache(v, a.dim, v32);
                write_slot(a, k32, v32, a.slots[t], h);
                continue;
            }
            const auto round = a.kv_kind == Kind::f16 ? to_half : to_bf16;
            round(rotated, a.dim, k16);
            round(v, a.dim, v16);
            write_slot(a, k16, v16, a.slots[t], h);
        }
    }
}
