// sample's vector parts: row statistics, temperature, and the Gumbel-max rule with noise from
// Philox4x32-10 (Salmon et al., 2011). Included inside namespace ELINVAR_ISA.

RowStats row_stats(const float* x, int n) {
    V top = set1(kMinusInfinity);
    int i = 0;
    for (; i + 16 <= n; i += 16) top = max(load(x + i), top);
    float largest = tree_max(top);
    for (; i < n; ++i) largest = max_of(x[i], largest);
    int32_t argmax = 0;
    while (argmax < n - 1 && x[argmax] != largest) ++argmax;
    const V m = set1(largest);
    V acc = zero();
    for (i = 0; i + 16 <= n; i += 16) acc = acc + exp(load(x + i) - m);
    if (i < n) {
        float tail[16];
        store(tail, exp(load_n(x + i, n - i) - m));
        acc = acc + load_n(tail, n - i);
    }
    float sums[16];
    store(sums, log(set1(tree_sum(acc))));
    return {largest, argmax, sums[0]};
}

// NaN becomes the lowest float: it is never chosen before a number, and what follows can sort.
float scale_logits(const float* x, int n, float highest, float temperature, bool sum, float* z) {
    const V m = set1(highest), t = set1(temperature), lowest = set1(-kMaxFloat);
    V acc = zero();
    for (int i = 0; i < n; i += 16) {
        const int count = min_of(16, n - i);
        const V scaled = max((load_n(x + i, count) - m) / t, lowest);
        store_n(z + i, scaled, count);
        if (!sum) continue;
        float e[16];
        store(e, exp(scaled));
        acc = acc + load_n(e, count);
    }
    return sum ? tree_sum(acc) : 0.0f;
}

void exp_all(const float* z, int n, float* out) {
    for (int i = 0; i < n; i += 16) {
        const int count = min_of(16, n - i);
        store_n(out + i, exp(load_n(z + i, count)), count);
    }
}

float log_one(float x) {
    float r[16];
    store(r, log(set1(x)));
    return r[0];
}

// Ids of the k largest, largest first, equal ones by id. One pass with a sorted list of k.
void top_k(const float* x, int n, int k, int32_t* ids) {
    int held = 0;
    const auto offer = [&](int i) {
        if (held == k && !(x[i] > x[ids[k - 1]])) return;
        int at = held < k ? held++ : k - 1;
        for (; at > 0 && x[ids[at - 1]] < x[i]; --at) ids[at] = ids[at - 1];
        ids[at] = i;
    };
    for (int i = 0; i < n; i += 16) {
        const int count = min_of(16, n - i);
        if (held == k && count == 16 && !(tree_max(load(x + i)) > x[ids[k - 1]])) continue;
        for (int j = 0; j < count; ++j) offer(i + j);
    }
}

struct Words {
    uint32_t w[4];
};

EL_INLINE Words philox(uint32_t counter, uint32_t position, uint64_t seed) {
    uint32_t c0 = counter, c1 = position, c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The largest noise is -ln(-ln(1 - 2^-24)) = 16.64: what is further below the best cannot win.
constexpr float kMostNoise = 16.65f;

int gumbel_argmax(const float* z, const int32_t* ids, int n, float least, uint64_t seed,
                  uint32_t position) {
    int best = 0;
    float best_score = kMinusInfinity;
    for (int i = 0; i < n; i += 16) {
        const int count = min_of(16, n - i);
        if (count == 16 && tree_max(load(z + i)) < max_of(least, best_score - kMostNoise)) continue;
        uint32_t words[16];
        for (int j = 0; j < 16; j += ids ? 1 : 4) {
            const auto id = static_cast<uint32_t>(ids ? ids[j < count ? i + j : i] : i + j);
            const Words w = philox(id >> 2, position, seed);
            if (ids)
                words[j] = w.w[id & 3];
            else
                std::memcpy(words + j, w.w, sizeof(w.w));
        }
        float u[16];  // exact, inside (0, 1)
        for (int j = 0; j < 16; ++j) u[j] = (static_cast<float>(words[j] >> 9) + 0.5f) * 0x1p-23f;
        const V noise = zero() - log(zero() - log(load(u)));
        const V logit = load_n(z + i, count);
        float scores[16];
        store(scores, select_lt(logit, set1(least), set1(kMinusInfinity), logit + noise));
        for (int j = 0; j < count; ++j)
            if (scores[j] > best_score ||
                (scores[j] == best_score && ids && ids[i + j] < ids[best])) {
                best_score = scores[j];
                best = i + j;
            }
    }
    return ids ? ids[best] : best;
}
