// sample: filters and choice per row. The kept set follows from the logits alone: tokens are
// ordered by logit, equal ones by id, and probabilities are added in that order in double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "provider.h"

namespace elinvar {
namespace {

// The largest Gumbel noise is -ln(-ln(1 - 2^-24)) = 16.64, the smallest -ln(-ln(2^-24)) = -2.82,
// and the likeliest token has z = 0: below this z nothing can win.
constexpr float kHopeless = -20.0f;

struct Candidates {
    std::vector<float> z;
    std::vector<int32_t> ids;
};

struct ByLogit {
    const float* z;
    bool operator()(int32_t a, int32_t b) const { return z[a] > z[b] || (z[a] == z[b] && a < b); }
};

// Ids of the `count` largest of z[0..n), in order.
void largest(const float* z, int n, int count, std::vector<int32_t>& ids) {
    ids.resize(static_cast<std::size_t>(n));
    for (int i = 0; i < n; ++i) ids[static_cast<std::size_t>(i)] = i;
    const ByLogit order{z};
    if (count < n) {
        std::nth_element(ids.begin(), ids.begin() + count, ids.end(), order);
        ids.resize(static_cast<std::size_t>(count));
    }
    std::sort(ids.begin(), ids.end(), order);
}

// Cuts the ordered ids where their probability reaches top_p of `total`.
void cut_top_p(const Kernels& k, const float* z, double total, float top_p,
               std::vector<int32_t>& ids) {
    std::vector<float> values(ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) values[i] = z[ids[i]];
    k.exp_all(values.data(), static_cast<int>(values.size()), values.data());
    if (total < 0) {
        total = 0;
        for (const float p : values) total += static_cast<double>(p);
    }
    const double goal = static_cast<double>(top_p) * total;
    double sum = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
        sum += static_cast<double>(values[i]);
        if (sum >= goal) {
            ids.resize(i + 1);
            return;
        }
    }
}

void filter(const Kernels& k, const float* z, int vocab, float total, const SampleRow& a,
            std::vector<int32_t>& ids) {
    if (a.top_k > 0 && a.top_k < vocab) {
        largest(z, vocab, a.top_k, ids);
        if (a.top_p < 1) cut_top_p(k, z, -1, a.top_p, ids);
    } else {
        // Tokens below (1 - p) / V of the whole cannot hold the last part of p between them.
        const float least =
            k.log_one(std::max((1 - a.top_p) * total / static_cast<float>(vocab), 1e-30f));
        ids.clear();
        for (int i = 0; i < vocab; ++i)
            if (z[i] >= least) ids.push_back(i);
        std::sort(ids.begin(), ids.end(), ByLogit{z});
        cut_top_p(k, z, static_cast<double>(total), a.top_p, ids);
    }
}

int choose_token(const Kernels& k, const float* logits, int vocab, const RowStats& stats,
                 const SampleRow& a, Candidates& c) {
    std::vector<float> z(static_cast<std::size_t>(vocab));
    const bool whole = a.top_p >= 1 && (a.top_k <= 0 || a.top_k >= vocab);
    const float total =
        k.scale_logits(logits, vocab, stats.max, a.temperature, a.top_p < 1, z.data());
    const float least = std::max(kHopeless, a.min_p > 0 ? k.log_one(a.min_p) : kHopeless);
    std::vector<int32_t> kept;
    if (!whole) filter(k, z.data(), vocab, total, a, kept);
    c.z.clear();
    c.ids.clear();
    const int count = whole ? vocab : static_cast<int>(kept.size());
    for (int i = 0; i < count; ++i) {
        const int32_t id = whole ? i : kept[static_cast<std::size_t>(i)];
        if (z[static_cast<std::size_t>(id)] < least) continue;
        c.z.push_back(z[static_cast<std::size_t>(id)]);
        c.ids.push_back(id);
    }
    const int best = k.gumbel_argmax(c.z.data(), c.ids.data(), static_cast<int>(c.ids.size()),
                                     a.seed, static_cast<uint32_t>(a.position));
    return c.ids[static_cast<std::size_t>(best)];
}

}  // namespace

void Provider::sample(const float* logits, int rows, int vocab, const SampleRow* args, int num_top,
                      int32_t* ids, float* logprobs, int32_t* top_ids, float* top_logprobs) {
    pool_.run(rows, [&](int m, int) {
        const float* row = logits + static_cast<std::ptrdiff_t>(m) * vocab;
        const RowStats stats = kernels_->row_stats(row, vocab);
        const auto logprob = [&](int32_t id) { return (row[id] - stats.max) - stats.log_sum; };
        ids[m] = stats.argmax;
        if (args[m].temperature > 0) {
            Candidates c;
            ids[m] = choose_token(*kernels_, row, vocab, stats, args[m], c);
        }
        logprobs[m] = logprob(ids[m]);
        if (num_top == 0) return;
        std::vector<int32_t> top;
        largest(row, vocab, num_top, top);
        for (int j = 0; j < num_top; ++j) {
            top_ids[m * num_top + j] = top[static_cast<std::size_t>(j)];
            top_logprobs[m * num_top + j] = logprob(top[static_cast<std::size_t>(j)]);
        }
    });
}

}  // namespace elinvar
