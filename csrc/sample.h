// sample's vector parts: row statistics, temperature, and the Gumbel-max rule with noise from
// Philox4x32-10 (Salmon et al., 2011). Included inside namespace ELINVAR_ISA.

// The largest and the lowest id that has it. NaN is passed over; what is NaN alone has none: n - 1.
Peak peak(const float* x, int n) {
    constexpr int kBlock = 1024;
    float largest = kMinusInfinity;
    int argmax = 0;  // until it is found: where the first block that holds it begins
    for (int first = 0; first < n; first += kBlock) {
        const int end = min_of(n, first + kBlock);
        V top[4];
        EL_UNROLL
        for (V& one : top) one = set1(kMinusInfinity);
        int i = first;
        for (; i + 64 <= end; i += 64) {
            EL_UNROLL
            for (int j = 0; j < 4; ++j) top[j] = max(load(x + i + 16 * j), top[j]);
        }
        for (; i + 16 <= end; i += 16) top[0] = max(load(x + i), top[0]);
        float own = tree_max(max(max(top[0], top[1]), max(top[2], top[3])));
        for (; i < end; ++i) own = max_of(x[i], own);
        if (own > largest) {
            largest = own;
            argmax = first;
        }
    }
    while (argmax < n - 1 && x[argmax] != largest) ++argmax;
    return {largest, argmax};
}

float log_one(float x) {
    float r[16];
    store(r, log(set1(x)));
    return r[0];
}

// ln of the sum of e^(x - highest)
float log_sum(const float* x, int n, float highest) {
    const V m = set1(highest);
    V acc = zero();
    int i = 0;
    for (; i + 16 <= n; i += 16) acc = acc + exp(load(x + i) - m);
    if (i < n) {
        float tail[16];
        store(tail, exp(load_n(x + i, n - i) - m));
        acc = acc + load_n(tail, n - i);
    }
    return log_one(tree_sum(acc));
}

// NaN becomes the lowest float.
void finite_row(const float* x, int n, float* out) {
    const V lowest = set1(-kMaxFloat), highest = set1(kMaxFloat);
    for (int i = 0; i < n; i += 16) {
        const int count = min_of(16, n - i);
        store_n(out + i, min(max(load_n(x + i, count), lowest), highest), count);
    }
}

void mask_row(const uint32_t* words, int n, float* x) {
    for (int i = 0; i < n; i += 32, ++words) {
        const uint32_t allowed = *words;
        if (allowed == ~uint32_t{0}) continue;
        if (i + 32 <= n)
            for (int j = 0; j < 32; ++j) x[i + j] = allowed >> j & 1 ? x[i + j] : kMinusInfinity;
        else
            for (int j = 0; i + j < n; ++j) x[i + j] = allowed >> j & 1 ? x[i + j] : kMinusInfinity;
    }
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

constexpr int kRounds = 10;

// Four words of random bits of each of 16 counters from `first` on.
EL_INLINE void philox(uint32_t first, uint32_t position, uint64_t seed, I* words) {
    constexpr float kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    I c0 = round_to_int(load(kLane)) + int_set1(static_cast<int32_t>(first));
    I c1 = int_set1(static_cast<int32_t>(position)), c2 = int_set1(0), c3 = c2;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const I2 p0 = wide_product(c0, 0xD2511F53u), p1 = wide_product(c2, 0xCD9E8D57u);
        c0 = p1.high ^ c1 ^ int_set1(static_cast<int32_t>(k0));
        c2 = p0.high ^ c3 ^ int_set1(static_cast<int32_t>(k1));
        c1 = p1.low;
        c3 = p0.low;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// One word of one counter.
EL_INLINE int32_t philox_word(uint32_t id, uint32_t position, uint64_t seed) {
    uint32_t c[4] = {id >> 2, position, 0, 0};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u, p1 = uint64_t{c[2]} * 0xCD9E8D57u;
        c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
        c[1] = static_cast<uint32_t>(p1);
        c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
        c[3] = static_cast<uint32_t>(p0);
    }
    return static_cast<int32_t>(c[id & 3]);
}

// Their upper 23 bits as a number inside (0, 1), exactly.
EL_INLINE V unit(I words) {
    const I upper = shift_right_signed<9>(words) & int_set1((1 << 23) - 1);
    return (to_float(upper) + set1(0.5f)) * set1(0x1p-23f);
}

// The largest noise is -ln(-ln(1 - 2^-24)) = 16.64: what is further below the best cannot win.
constexpr float kMostNoise = 16.65f;

// Below kReach[k - 1], which is e^-e^(1/2 - k), a number's noise is less than k.
constexpr float kReach[] = {0x1.17299800p-1f, 0x1.999b0000p-1f, 0x1.d7a6b000p-1f, 0x1.f0c52000p-1f,
                            0x1.fa57fa00p-1f, 0x1.fde96e00p-1f, 0x1.ff3b1600p-1f, 0x1.ffb78600p-1f,
                            0x1.ffe55400p-1f, 0x1.fff63000p-1f, 0x1.fffc6400p-1f, 0x1.fffeac00p-1f,
                            0x1.ffff8200p-1f, 0x1.ffffd000p-1f, 0x1.ffffee00p-1f, 0x1.fffff800p-1f};

// The best score so far and whose it is.
struct Best {
    float score = kMinusInfinity;
    int at = 0;

    // z + noise of `count` tokens from z[first] on, of which u are the random numbers. What has ids
    // may come in any order of them.
    __attribute__((always_inline)) void offer(const float* z, const int32_t* ids, int first,
                                              int count, float least, V u) {
        const V noise = zero() - log(zero() - log(u)), logit = load_n(z + first, count);
        const V found = select_lt(logit, set1(least), set1(kMinusInfinity), logit + noise);
        if (count == 16 && tree_max(found) < score) return;
        float scores[16];
        store(scores, found);
        for (int j = 0; j < count; ++j)
            if (scores[j] > score || (scores[j] == score && ids && ids[first + j] < ids[at])) {
                score = scores[j];
                at = first + j;
            }
    }
};

int best_of(const float* z, const int32_t* ids, int n, float least, uint64_t seed,
            uint32_t position) {
    Best best;
    for (int i = 0; i < n; i += 16) {
        const int count = min_of(16, n - i);
        float u[16];
        for (int j = 0; j < 16; ++j) {
            const int32_t id = ids[j < count ? i + j : i];
            const int32_t word = philox_word(static_cast<uint32_t>(id), position, seed);
            u[j] = (static_cast<float>(static_cast<uint32_t>(word) >> 9) + 0.5f) * 0x1p-23f;
        }
        best.offer(z, ids, i, count, least, load(u));
    }
    return ids[best.at];
}

int gumbel_argmax(const float* z, const int32_t* ids, int n, float least, uint64_t seed,
                  uint32_t position) {
    if (ids) return best_of(z, ids, n, least, seed, position);
    Best best;
    for (int i = 0; i < n; i += 64) {
        const bool whole = i + 64 <= n;
        float highest = 0;
        if (whole) {
            const V left = max(load(z + i), load(z + i + 16));
            highest = tree_max(max(left, max(load(z + i + 32), load(z + i + 48))));
            if (highest < max_of(least, best.score - kMostNoise)) continue;
        }
        I words[4];
        philox(static_cast<uint32_t>(i / 4), position, seed, words);
        const V u[4] = {unit(words[0]), unit(words[1]), unit(words[2]), unit(words[3])};
        // Most have too little noise to be worth their logarithms.
        if (const float far = best.score - highest; whole && far >= 1) {
            const V most = max(max(u[0], u[1]), max(u[2], u[3]));
            if (tree_max(most) < kReach[min_of(16, static_cast<int>(far)) - 1]) continue;
        }
        float planes[4][16], side[64];  // word j of counter c is of token 4 c + j
        EL_UNROLL
        for (int j = 0; j < 4; ++j) store(planes[j], u[j]);
        for (int c = 0; c < 16; ++c)
            for (int j = 0; j < 4; ++j) side[4 * c + j] = planes[j][c];
        for (int j = 0; j < 64 && i + j < n; j += 16)
            best.offer(z, nullptr, i + j, min_of(16, n - i - j), least, load(side + j));
    }
    return best.at;
}
