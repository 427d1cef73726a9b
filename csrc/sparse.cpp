// Sparse attention over latents: which keys each token attends to, and `attention` over them alone.
#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "provider.h"

namespace elinvar {
namespace {

constexpr int kScoreBlocks = 64;               // of one token that a thread scores at once
constexpr std::size_t kScoreFloats = 8 << 20;  // scores, and bytes of keys, that are held at once
constexpr std::size_t kKeyBytes = 64 << 20;

// The k of positions first .. first + n - 1 with the largest scores, of equal ones the first,
// ascending. NaN is the lowest.
void choose(float* scores, int first, int n, int k, float* sorted, int32_t* out) {
    for (int i = 0; i < n; ++i)
        if (scores[i] != scores[i]) scores[i] = -std::numeric_limits<float>::infinity();
    std::copy_n(scores, n, sorted);
    std::nth_element(sorted, sorted + k - 1, sorted + n, std::greater<>());
    const float least = sorted[k - 1];
    auto equal = k - std::count_if(scores, scores + n, [&](float s) { return s > least; });
    for (int i = 0; i < n; ++i)
        if (scores[i] > least || (scores[i] == least && equal-- > 0)) *out++ = first + i;
}

std::vector<int> sequence_of_tokens(int num_seqs, const int32_t* query_start) {
    std::vector<int> of;
    for (int seq = 0; seq < num_seqs; ++seq)
        of.resize(static_cast<std::size_t>(query_start[seq + 1]), seq);
    return of;
}

}  // namespace

void Provider::index_select(const Index& a, int num_seqs, const int32_t* query_start, int k,
                            int32_t* chosen) {
    const std::vector<int> seq = sequence_of_tokens(num_seqs, query_start);
    std::vector<int> tokens;  // that see more than k keys
    int longest = 0;
    for (int t = 0; t < static_cast<int>(seq.size()); ++t) {
        int32_t* out = chosen + static_cast<std::ptrdiff_t>(t) * k;
        const int n = a.positions[t] + 1 - a.first;
        for (int i = 0; i < k; ++i) out[i] = i < n ? a.first + i : -1;
        if (n <= k) continue;
        tokens.push_back(t);
        longest = std::max(longest, a.positions[t] / 32 + 1);
    }
    const std::size_t stride = static_cast<std::size_t>(longest) * 32;
    const int chunks = (longest + kScoreBlocks - 1) / kScoreBlocks;
    const int at_once = static_cast<int>(std::max<std::size_t>(1, kScoreFloats / (stride + 1)));
    for (int first = 0; first < static_cast<int>(tokens.size()); first += at_once) {
        const int count = std::min(at_once, static_cast<int>(tokens.size()) - first);
        float* scores = gathered_.at_least(static_cast<std::size_t>(count) * stride);
        const auto token = [&](int i) { return tokens[static_cast<std::size_t>(first + i)]; };
        pool_.run(count * chunks, [&](int item, int) {
            const int t = token(item / chunks), from = item % chunks * kScoreBlocks;
            const int num = std::min(kScoreBlocks, a.positions[t] / 32 + 1 - from);
            if (num <= 0) return;
            const int32_t* table =
                a.tables + seq[static_cast<std::size_t>(t)] * a.table_stride + from;
            float* out = scores + static_cast<std::size_t>(item / chunks) * stride + from * 32;
            kernels_->index_scores(a, t, table, num, out);
        });
        pool_.run(count, [&](int i, int thread) {
            const int t = token(i);
            choose(scores + static_cast<std::size_t>(i) * stride + a.first, a.first,
                   a.positions[t] + 1 - a.first, k, scratch(thread, stride),
                   chosen + static_cast<std::ptrdiff_t>(t) * k);
        });
    }
}

// The keys of some tokens are put side by side, and each token is a sequence of its own there.
void Provider::sparse_attention(const Attention& a, int num_seqs, const int32_t* query_start,
                                const int32_t* chosen, int k) {
    const std::vector<int> seq = sequence_of_tokens(num_seqs, query_start);
    const int num_tokens = static_cast<int>(seq.size());
    const auto of = [&](int t) { return chosen + static_cast<std::ptrdiff_t>(t) * k; };
    const auto all = [&](int t) { return a.positions[t] < k && of(t)[a.positions[t]] >= 0; };
    int first = 0;
    while (first < num_tokens && all(first)) ++first;
    if (first == num_tokens) return attention(a, num_seqs, query_start);
    const int blocks = (k + 31) / 32, size = cache_bytes(a.kv_kind);
    const std::size_t row = 32 * static_cast<std::size_t>(size);
    const auto block = static_cast<std::size_t>(head_size(a.kv_kind, a.padded_dim) * size);
    const int at_once = static_cast<int>(
        std::max<std::size_t>(1, kKeyBytes / (static_cast<std::size_t>(blocks) * block)));
    std::vector<int32_t> tables, positions, starts;
    for (first = 0; first < num_tokens; first += at_once) {
        const int count = std::min(at_once, num_tokens - first);
        tables.clear(), positions.clear(), starts.assign(1, 0);
        for (int i = 0; i < count; ++i) {
            const int32_t* own = of(first + i);
            positions.push_back(static_cast<int32_t>(std::find(own, own + k, -1) - own) - 1);
            starts.push_back(i + 1);
            for (int b = 0; b < blocks; ++b) tables.push_back(i * blocks + b);
        }
        auto* keys = reinterpret_cast<uint8_t*>(
            chosen_.at_least(static_cast<std::size_t>(count * blocks) * block / 4));
        pool_.run(count * blocks, [&](int item, int) {
            const int i = item / blocks, b = item % blocks * 32;
            const int num = std::min(32, positions[static_cast<std::size_t>(i)] + 1 - b);
            if (num <= 0) return;
            const int32_t* table =
                a.tables + seq[static_cast<std::size_t>(first + i)] * a.table_stride;
            const uint8_t* from[32];
            for (int j = 0; j < num; ++j) {
                const int p = of(first + i)[b + j];
                from[j] = static_cast<const uint8_t*>(a.k) +
                          static_cast<std::size_t>(table[p / 32]) *
                              static_cast<std::size_t>(a.block_step) * block +
                          static_cast<std::size_t>(p % 32 * size);
            }
            uint8_t* to = keys + static_cast<std::size_t>(item) * block;
            if (a.kv_kind == Kind::int8)
                for (int j = 0; j < num; ++j) {
                    const std::ptrdiff_t scales = std::ptrdiff_t{32} * a.padded_dim;
                    const int p = of(first + i)[b + j] % 32;
                    std::memcpy(to + scales + 4 * j, from[j] - p + scales + 4 * p, 4);
                }
            for (int d = 0; d < a.dim; ++d, to += row)
                for (int j = 0; j < num; ++j, from[j - 1] += row)
                    std::memcpy(to + j * size, from[j], static_cast<std::size_t>(size));
        });
        Attention own = a;
        own.q += static_cast<std::ptrdiff_t>(first) * a.heads * a.dim;
        own.out += static_cast<std::ptrdiff_t>(first) * a.heads * a.value_dim;
        own.k = own.v = keys;
        own.block_step = 1;
        own.tables = tables.data();
        own.table_stride = blocks;
        own.positions = positions.data();
        attention(own, count, starts.data());
    }
}

}  // namespace elinvar
