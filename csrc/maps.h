// Ops on each element alone: activations, factors, soft caps, sums. Included inside namespace
// ELINVAR_ISA.

enum Activation : int { kSilu, kGeluTanh, kGelu, kRelu2 };  // as in ops/api.py

// What the normal distribution has beyond -x and x together, erfc(x / sqrt 2), for x >= 0: e^(-x
// p(x)) with p fitted to -ln(erfc) / x on 0 .. 5.5 so that the largest error of the result
// (Lawson's weighted least squares, 1961) is 3e-9. p stays what it is at 5.5: the result goes on to
// 0.
EL_INLINE V two_tails(V x) {
    const V b = min(x, set1(5.5f));
    V p = set1(-3.55488911e-7f);
    p = fma(p, b, set1(6.62665041e-6f));
    p = fma(p, b, set1(-5.19679077e-5f));
    p = fma(p, b, set1(1.97094777e-4f));
    p = fma(p, b, set1(-1.03907934e-5f));
    p = fma(p, b, set1(-4.80428616e-3f));
    p = fma(p, b, set1(3.63450096e-2f));
    p = fma(p, b, set1(3.18308053e-1f));
    p = fma(p, b, set1(7.97884678e-1f));
    return exp(zero() - x * p);
}

template <int activation>
EL_INLINE V activation_of(V g) {
    if constexpr (activation == kSilu) {
        return g / (set1(1.0f) + exp(zero() - g));
    } else if constexpr (activation == kGeluTanh) {
        // 0.5 g (1 + tanh(t)) = g / (1 + e^(-2t)), t = sqrt(2/pi)(g + 0.044715 g^3)
        const V cubic = g * g * g;
        const V inner = fma(cubic, set1(0.044715f), g);
        return g / (set1(1.0f) + exp(inner * set1(-1.5957691216f)));
    } else if constexpr (activation == kGelu) {
        // g times the normal distribution up to g, by the tail beyond |g|: nothing cancels.
        const V size = abs(g);
        return fma(size * set1(-0.5f), two_tails(size), max(g, zero()));
    } else {
        const V positive = max(g, zero());
        return positive * positive;
    }
}

// body(std::integral_constant<int, activation>): the choice is made outside of loops.
template <class Body>
EL_INLINE void with_activation(int activation, const Body& body) {
    switch (activation) {
        case kSilu:
            return body(std::integral_constant<int, kSilu>());
        case kGeluTanh:
            return body(std::integral_constant<int, kGeluTanh>());
        case kGelu:
            return body(std::integral_constant<int, kGelu>());
        default:
            return body(std::integral_constant<int, kRelu2>());
    }
}

void activate(int activation, float* gate, ptrdiff_t ld_gate, const float* up, ptrdiff_t ld_up,
              int rows, int cols) {
    with_activation(activation, [&](auto which) {
        constexpr int kind = decltype(which)::value;
        for (int m = 0; m < rows; ++m) {
            float* g = gate + m * ld_gate;
            const float* u = up + m * ld_up;
            int i = 0;
            for (; i + 16 <= cols; i += 16)
                store(g + i, activation_of<kind>(load(g + i)) * load(u + i));
            if (const int n = cols - i; n > 0)
                store_n(g + i, activation_of<kind>(load_n(g + i, n)) * load_n(u + i, n), n);
        }
    });
}

template <class F>
EL_INLINE void map(const float* x, size_t n, float* out, const F& f) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, f(load(x + i)));
    if (i < n) {
        const int rest = static_cast<int>(n - i);
        store_n(out + i, f(load_n(x + i, rest)), rest);
    }
}

void activate_all(int activation, const float* x, size_t n, float* out) {
    with_activation(activation, [&](auto which) {
        constexpr int kind = decltype(which)::value;
        map(x, n, out, [](V v) { return activation_of<kind>(v); });
    });
}

void scale(const float* x, float factor, size_t n, float* out) {
    const V f = set1(factor);
    map(x, n, out, [f](V v) { return v * f; });
}

void softcap(const float* x, float cap, size_t n, float* out) {
    const V c = set1(cap);
    map(x, n, out, [c](V v) { return c * tanh(v / c); });
}

void add(const float* x, const float* y, size_t n, float* out) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) store(out + i, load(x + i) + load(y + i));
    for (; i < n; ++i) out[i] = x[i] + y[i];
}

void add_bias(const float* bias, int rows, int cols, float* out, ptrdiff_t ld) {
    for (int m = 0; m < rows; ++m, out += ld) add(out, bias, static_cast<size_t>(cols), out);
}
