// Ops on rows: int8 rounding, norms, rotary embedding with the cache write.
// Included inside namespace ELINVAR_ISA.

// Within -limit .. limit; NaN becomes limit.
EL_INLINE V saturate(V x, float limit) { return max(min(x, set1(limit)), set1(-limit)); }

constexpr float kMaxFloat = 0x1.fffffep127f, kMaxBf16 = 0x1.fep127f, kMaxHalf = 65504.0f;
constexpr float kMaxInt8 = 0x1.fcp127f;  // 127 times a scale of 2^121

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

// Of x^2; partial sum i takes elements i mod 16.
EL_INLINE float mean_square(const float* x, int dim) {
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
    return tree_sum(acc) / static_cast<float>(dim);
}

EL_INLINE float inverse_rms(const float* x, int dim, float eps) {
    return 1.0f / __builtin_sqrtf(mean_square(x, dim) + eps);
}

EL_INLINE void scale_row(const float* x, float factor, const float* gain, int dim, float* out) {
    const V f = set1(factor);
    int i = 0;
    for (; i + 16 <= dim; i += 16) store(out + i, load(x + i) * f * load(gain + i));
    if (i < dim) store_n(out + i, load_n(x + i, dim - i) * f * load_n(gain + i, dim - i), dim - i);
}

void weighted_sum(const float* y, ptrdiff_t ld, const int32_t* rows, const float* weights,
                  int count, int cols, float* out) {
    for (int i = 0; i < cols; i += 16) {
        const int n = min_of(16, cols - i);
        V acc = zero();
        for (int j = 0; j < count; ++j) {
            const float* p = y + rows[j] * ld + i;
            acc = fma(n == 16 ? load(p) : load_n(p, n), set1(weights[j]), acc);
        }
        store_n(out + i, acc, n);
    }
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

// Mean of (x - mean)^2, the sum as in mean_square.
EL_INLINE float variance_of(const float* x, float mean, int dim) {
    const V m = set1(mean);
    V acc = zero();
    int i = 0;
    for (; i + 16 <= dim; i += 16) {
        const V d = load(x + i) - m;
        acc = fma(d, d, acc);
    }
    if (i < dim) {
        float rest[16];
        store(rest, load_n(x + i, dim - i) - m);
        const V d = load_n(rest, dim - i);  // beyond the row 0, not -mean
        acc = fma(d, d, acc);
    }
    return tree_sum(acc) / static_cast<float>(dim);
}

EL_INLINE float mean_of(const float* x, int dim) {
    V acc = zero();
    int i = 0;
    for (; i + 16 <= dim; i += 16) acc = acc + load(x + i);
    if (i < dim) acc = acc + load_n(x + i, dim - i);
    return tree_sum(acc) / static_cast<float>(dim);
}

void layer_norm(const float* x, const float* y, const float* gain, const float* bias, float eps,
                int rows, int dim, float* sum, float* out) {
    for (int m = 0; m < rows; ++m, x += dim, out += dim) {
        const float* row = x;
        if (y) {
            add(x, y, static_cast<size_t>(dim), sum);
            row = sum;
            y += dim;
            sum += dim;
        }
        const float mean = mean_of(row, dim);
        const V centre = set1(mean),
                factor = set1(1.0f / __builtin_sqrtf(variance_of(row, mean, dim) + eps));
        const auto norm = [&](V v, V g) { return (v - centre) * factor * g; };
        int i = 0;
        for (; i + 16 <= dim; i += 16) {
            const V a = norm(load(row + i), load(gain + i));
            store(out + i, bias ? a + load(bias + i) : a);
        }
        if (const int n = dim - i; n > 0) {
            const V a = norm(load_n(row + i, n), load_n(gain + i, n));
            store_n(out + i, bias ? a + load_n(bias + i, n) : a, n);
        }
    }
}

EL_INLINE void rotate(const float* x, const float* table, int dim, float* out) {
    const int half = dim / 2;
    int i = 0;
    for (; i + 16 <= half; i += 16) {
        const V a = load(x + i), b = load(x + half + i);
        const V cos = load(table + i), sin = load(table + half + i);
        store(out + i, fma(a, cos, zero() - b * sin));
        store(out + half + i, fma(b, cos, a * sin));
    }
    if (i < half) {
        const int n = half - i;
        const V a = load_n(x + i, n), b = load_n(x + half + i, n);
        const V cos = load_n(table + i, n), sin = load_n(table + half + i, n);
        store_n(out + i, fma(a, cos, zero() - b * sin), n);
        store_n(out + half + i, fma(b, cos, a * sin), n);
    }
}

// One head as codes, x ~ scale * code, to the nearest, of two the even one.
EL_INLINE float to_codes(const float* x, int dim, int8_t* out) {
    const auto values = [&](int i) {
        return saturate(i + 16 <= dim ? load(x + i) : load_n(x + i, dim - i), kMaxInt8);
    };
    V all = zero();
    for (int i = 0; i < dim; i += 16) all = max(all, abs(values(i)));
    const float largest = tree_max(all);
    const bool live = largest >= 1e-30f;
    const V inverse = set1(live ? 127.0f / largest : 0.0f);
    for (int i = 0; i < dim; i += 16) {
        int8_t codes[16];
        store_bytes(codes, round_to_int(values(i) * inverse));
        std::memcpy(out + i, codes, static_cast<size_t>(min_of(16, dim - i)));
    }
    return live ? largest / 127.0f : 0.0f;
}

template <Kind kind>
EL_INLINE void to_narrow(const float* x, int dim, Stored<kind>* out) {
    const auto narrow = [](V v, Stored<kind>* p) {
        if constexpr (kind == Kind::f32) {
            store(p, saturate(v, kMaxFloat));
        } else if constexpr (kind == Kind::f16) {
            store_half(p, saturate(v, kMaxHalf));
        } else {
            float t[16];
            store(t, saturate(v, kMaxBf16));
            for (int j = 0; j < 16; ++j) p[j] = float_to_bf16(t[j]);
        }
    };
    int i = 0;
    for (; i + 16 <= dim; i += 16) narrow(load(x + i), out + i);
    if (i < dim) {
        Stored<kind> t[16];
        narrow(load_n(x + i, dim - i), t);
        std::memcpy(out + i, t, static_cast<size_t>(dim - i) * sizeof(t[0]));
    }
}

// One head in the cache's type, and where it has one its scale, number `at`. All values are finite:
// where a query row does not see a key, its weight of 0 times the value must be 0.
template <Kind kind>
EL_INLINE void to_cache(const float* x, int dim, Stored<kind>* out, float* scales, int at) {
    if constexpr (kind == Kind::int8)
        scales[at] = to_codes(x, dim, out);
    else
        to_narrow<kind>(x, dim, out);
}

// Bounded first: no sum is infinite.
EL_INLINE void bound_and_spread(float* x, int dim) {
    const int count = turned_dims(dim);
    if (count == 1) return;
    for (int i = 0; i < dim; i += 16)
        store(x + i, saturate(load(x + i), kMaxInt8 / static_cast<float>(count)));
    spread(x, dim);
}

// Keys of consecutive slots lie side by side in a cache line for each dim: so many tokens are
// turned at once.
constexpr int kRun = 16;

int run_length(const int32_t* slots, int n) {
    const int room = min_of(n, kRun - slots[0] % kRun);
    int run = 1;
    while (run < room && slots[run] == slots[0] + run) ++run;
    return run;
}

// out[d * 32 + i] = keys[i * dim + d]
template <class T>
EL_INLINE void turn_keys(const T* keys, int run, int dim, T* out) {
    int d = 0;
    if constexpr (sizeof(T) < 4)
        if (run == kRun)
            for (; d + 16 <= dim; d += 16) transpose(keys + d, dim, out + d * 32, 32);
    for (; d < dim; ++d)
        for (int i = 0; i < run; ++i) out[d * 32 + i] = keys[i * dim + d];
}

template <Kind kind>
void rope_write_kind(const Rope& a, int first, int num) {
    using T = Stored<kind>;
    alignas(64) float normed[kMaxHeadDim], rotated[kMaxHeadDim];
    alignas(64) T keys[kRun * kMaxHeadDim];
    const ptrdiff_t width = static_cast<ptrdiff_t>(a.heads + (a.v ? 2 : 1) * a.kv_heads) * a.dim;
    const ptrdiff_t head = head_size(kind, a.padded_dim);
    const auto block_of = [&](void* cache, int32_t slot) {
        return static_cast<T*>(cache) + static_cast<ptrdiff_t>(slot / 32) * a.block_step * head;
    };
    const int turned = a.rotary_dim;
    const size_t rest = static_cast<size_t>(a.dim - turned) * sizeof(float);
    const auto rms_of_all = [&](const float* x, const float* gain, int heads) {
        return gain && a.whole ? inverse_rms(x, heads * a.dim, a.eps) : 0.0f;
    };
    const auto turn = [&](int t, int h, const float* x, const float* gain, float all, float* out) {
        if (gain && a.whole)
            scale_row(x, all, gain + h * a.dim, a.dim, normed);
        else if (gain)
            scale_row(x, inverse_rms(x, a.dim, a.eps), gain, a.dim, normed);
        const float* from = gain ? normed : x;
        rotate(from, a.table + static_cast<ptrdiff_t>(a.positions[t]) * turned, turned, out);
        if (rest) std::memcpy(out + turned, from + turned, rest);
    };
    // A key is a cache line of its own for every dim, or for two: asked for one token ahead.
    constexpr ptrdiff_t line = 32 * (sizeof(T) == 1 ? 2 : 1);
    const auto ask = [&](int t) {
        const T* k = block_of(a.k, a.slots[t]) + a.slots[t] % 32;
        for (ptrdiff_t i = 0; i < a.kv_heads * head; i += line) prefetch(k + i);
    };
    for (int t = first, run; t < first + num; t += run) {
        run = run_length(a.slots + t, first + num - t);
        T *k = block_of(a.k, a.slots[t]), *v = block_of(a.v, a.slots[t]);
        const int at = a.slots[t] % 32;
        if (t == first) ask(t);
        if (t + run < first + num) ask(t + run);
        float k_all[kRun];
        for (int i = 0; i < run; ++i) {
            const float* row = a.qkv + (t + i) * width;
            const float q_all = rms_of_all(row, a.q_gain, a.heads);
            k_all[i] = rms_of_all(row + a.heads * a.dim, a.k_gain, a.kv_heads);
            for (int h = 0; h < a.heads; ++h)
                turn(t + i, h, row + h * a.dim, a.q_gain, q_all,
                     a.q + (static_cast<ptrdiff_t>(t + i) * a.heads + h) * a.dim);
        }
        for (int h = 0; h < a.kv_heads; ++h, k += head, v += head) {
            float *k_scales = scales_of<kind>(k, a.padded_dim),
                  *v_scales = scales_of<kind>(v, a.padded_dim);
            for (int i = 0; i < run; ++i) {
                const float* row = a.qkv + (t + i) * width + (a.heads + h) * a.dim;
                turn(t + i, h, row, a.k_gain, k_all[i], rotated);
                if constexpr (kind == Kind::int8)
                    if (a.v) bound_and_spread(rotated, a.dim);
                to_cache<kind>(rotated, a.dim, keys + i * a.dim, k_scales, at + i);
                if (!a.v) continue;
                if constexpr (kind == Kind::int8)
                    k_scales[at + i] /= static_cast<float>(turned_dims(a.dim));
                const float* value = row + a.kv_heads * a.dim;
                if (a.v_gain) {
                    scale_row(value, inverse_rms(value, a.dim, a.eps), a.v_gain, a.dim, rotated);
                    value = rotated;
                }
                to_cache<kind>(value, a.dim, v + static_cast<ptrdiff_t>(at + i) * a.padded_dim,
                               v_scales, at + i);
            }
            turn_keys(keys, run, a.dim, k + at);
        }
    }
}

void rope_write(const Rope& a, int first, int num) {
    const auto write = a.kv_kind == Kind::f32    ? rope_write_kind<Kind::f32>
                       : a.kv_kind == Kind::f16  ? rope_write_kind<Kind::f16>
                       : a.kv_kind == Kind::bf16 ? rope_write_kind<Kind::bf16>
                                                 : rope_write_kind<Kind::int8>;
    write(a, first, num);
}
