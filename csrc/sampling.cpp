// sample: filters and choice per row. The kept set follows from the logits alone: tokens are
// ordered by logit, equal ones by id, and probabilities are added in that order in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "provider.h"

namespace elinvar {
namespace {

// The smallest Gumbel noise is -ln(-ln(2^-24)) = -2.82, the largest 16.64, and the likeliest
// token has z = 0: below this z nothing can win.
constexpr float kHopeless = -20.0f;

// A sorted list is filled in one pass up to here; more are found by sorting.
constexpr int kShortList = 256;

struct ByLogit {
    const float* z;
    bool operator()(int32_t a, int32_t b) const { return z[a] > z[b] || (z[a] == z[b] && a < b); }
};

using Ids = std::vector<int32_t>;

// Ids of the `count` largest of z[0..n), in order.
void largest(const Kernels& k, const float* z, int n, int count, Ids& ids) {
    count = std::min(count, n);
    if (count <= kShortList) {
        ids.resize(static_cast<std::size_t>(count));
        k.top_k(z, n, count, ids.data());
        return;
    }
    ids.resize(static_cast<std::size_t>(n));
    for (int i = 0; i < n; ++i) ids[static_cast<std::size_t>(i)] = i;
    std::nth_element(ids.begin(), ids.begin() + (count - 1), ids.end(), ByLogit{z});
    ids.resize(static_cast<std::size_t>(count));
    std::sort(ids.begin(), ids.end(), ByLogit{z});
}

// Cuts the ordered ids where their probability reaches top_p of `total` (below 0: of their own
// sum); false if they do not reach it.
bool cut_top_p(const Kernels& k, const float* z, double total, float top_p, Ids& ids) {
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
        if (sum < goal) continue;
        ids.resize(i + 1);
        return true;
    }
    return false;
}

// What top-k and top-p keep, likeliest first.
void filter(const Kernels& k, const float* z, int vocab, float total, const SampleRow& a,
            Ids& ids) {
    if (a.top_k > 0 && a.top_k < vocab) {
        largest(k, z, vocab, a.top_k, ids);
        if (a.top_p < 1) cut_top_p(k, z, -1, a.top_p, ids);
        return;
    }
    largest(k, z, vocab, kShortList, ids);  // usually enough, and the same prefix if it is
    if (cut_top_p(k, z, static_cast<double>(total), a.top_p, ids)) return;
    // Tokens below (1 - p) / V of the whole cannot hold the last part of p between them.
    const float share = (1 - a.top_p) * total / static_cast<float>(vocab);
    const float least = k.log_one(std::max(share, 1e-30f));
    ids.clear();
    for (int i = 0; i < vocab; ++i)
        if (z[i] >= least) ids.push_back(i);
    std::sort(ids.begin(), ids.end(), ByLogit{z});
    cut_top_p(k, z, static_cast<double>(total), a.top_p, ids);
}

int choose_token(const Kernels& k, const float* logits, int vocab, float highest,
                 const SampleRow& a, float* z) {
    const float total = k.scale_logits(logits, vocab, highest, a.temperature, a.top_p < 1, z);
    const float least = a.min_p > 0 ? std::max(kHopeless, k.log_one(a.min_p)) : kHopeless;
    const auto position = static_cast<uint32_t>(a.position);
    if (a.top_p >= 1 && (a.top_k <= 0 || a.top_k >= vocab))
        return k.gumbel_argmax(z, nullptr, vocab, least, a.seed, position);
    Ids kept;
    filter(k, z, vocab, total, a, kept);
    std::vector<float> values(kept.size());
    for (std::size_t i = 0; i < kept.size(); ++i) values[i] = z[kept[i]];
    return k.gumbel_argmax(values.data(), kept.data(), static_cast<int>(kept.size()), least, a.seed,
                           position);
}

// Forbids what is not typical: of the tokens ordered by how far -log p is from the entropy (which
// is |z - the mean of z|), equal ones by id, those after the first that together reach typical_p.
// Sums are in double: the mean's by id, the other in that order.
void keep_typical(const Kernels& k, float typical_p, const float* z, int vocab, float* p,
                  float* x) {
    k.exp_all(z, vocab, p);
    double total = 0, mean = 0;
    for (int i = 0; i < vocab; ++i) {
        total += static_cast<double>(p[i]);
        mean += static_cast<double>(p[i]) * static_cast<double>(z[i]);
    }
    mean /= total;
    const auto distance = [&](int32_t i) { return std::abs(static_cast<double>(z[i]) - mean); };
    const auto nearer = [&](int32_t a, int32_t b) {
        const double da = distance(a), db = distance(b);
        return da < db || (da == db && a < b);
    };
    Ids ids;
    for (int i = 0; i < vocab; ++i)
        if (p[i] > 0) ids.push_back(i);
    const double goal = static_cast<double>(typical_p) * total;
    double sum = 0;
    std::size_t sorted = 0, kept = 0;
    // In growing pieces: few tokens are usually enough.
    while (kept < ids.size() && (kept == 0 || sum < goal)) {
        if (kept == sorted) {
            sorted = std::min(ids.size(), std::max<std::size_t>(kShortList, 8 * sorted));
            const auto at = [&](std::size_t i) { return ids.begin() + static_cast<int>(i); };
            std::nth_element(at(kept), at(sorted - 1), ids.end(), nearer);
            std::sort(at(kept), at(sorted), nearer);
        }
        sum += static_cast<double>(p[ids[kept++]]);
    }
    std::fill(p, p + vocab, 0.0f);
    for (std::size_t i = 0; i < kept; ++i) p[ids[i]] = 1;
    for (int i = 0; i < vocab; ++i)
        x[i] = p[i] > 0 ? x[i] : -std::numeric_limits<float>::infinity();
}

// The choice from edited logits x, whose peak this is; z, p: room for as many floats.
int choose_edited(const Kernels& k, int vocab, Peak peak, const SampleRow& a, float typical_p,
                  float* x, float* z, float* p) {
    if (!(a.temperature > 0)) return peak.argmax;
    if (typical_p < 1) {
        k.scale_logits(x, vocab, peak.max, a.temperature, false, z);
        keep_typical(k, typical_p, z, vocab, p, x);
        peak = k.peak(x, vocab);
    }
    return choose_token(k, x, vocab, peak.max, a, z);
}

// What is told of a row, if anything: the log-probs of its token and of the likeliest.
struct Report {
    const Kernels* k;
    int vocab, num_top;
    float* logprobs;
    int32_t* top_ids;
    float* top_logprobs;

    void operator()(int m, const float* row, int32_t token) const {
        if (logprobs != nullptr) (*this)(m, row, k->peak(row, vocab).max, token);
    }
    void operator()(int m, const float* row, float highest, int32_t token) const {
        if (logprobs == nullptr) return;
        const float log_sum = k->log_sum(row, vocab, highest);
        const auto logprob = [&](int32_t id) { return (row[id] - highest) - log_sum; };
        logprobs[m] = logprob(token);
        if (num_top == 0) return;
        Ids top;
        largest(*k, row, vocab, num_top, top);
        for (int j = 0; j < num_top; ++j) {
            const int32_t id = top[static_cast<std::size_t>(j)];
            top_ids[m * num_top + j] = id;
            top_logprobs[m * num_top + j] = logprob(id);
        }
    }
};

}  // namespace

void Provider::sample(const float* logits, int rows, int vocab, const SampleRow* args, int num_top,
                      int32_t* ids, float* logprobs, int32_t* top_ids, float* top_logprobs,
                      const SampleEdits& edits) {
    const auto size = static_cast<std::size_t>(vocab);
    const Report report{kernels_, vocab, num_top, logprobs, top_ids, top_logprobs};
    pool_.run(rows, [&](int m, int thread) {
        const float* row = logits + static_cast<std::ptrdiff_t>(m) * vocab;
        const bool typical = edits.is_typical(m) && args[m].temperature > 0;
        if (typical || edits.touch(m)) {
            float* z = scratch(thread, 3 * size);
            float *x = z + size, *more = x + size;
            const Peak peak = edits.apply(*kernels_, m, row, vocab, x, more);
            ids[m] = choose_edited(*kernels_, vocab, peak, args[m],
                                   typical ? edits.typical_p[m] : 1.0f, x, z, more);
            report(m, row, ids[m]);
            return;
        }
        const Peak peak = kernels_->peak(row, vocab);
        ids[m] = peak.argmax;
        if (args[m].temperature > 0)
            ids[m] = choose_token(*kernels_, row, vocab, peak.max, args[m], scratch(thread, size));
        report(m, row, peak.max, ids[m]);
    });
}

void Provider::score(const float* logits, int rows, int vocab, const int32_t* ids, int num_top,
                     float* logprobs, int32_t* top_ids, float* top_logprobs) {
    const Report report{kernels_, vocab, num_top, logprobs, top_ids, top_logprobs};
    pool_.run(rows, [&](int m, int) {
        const float* row = logits + static_cast<std::ptrdiff_t>(m) * vocab;
        report(m, row, ids[m]);
    });
}

}  // namespace elinvar
