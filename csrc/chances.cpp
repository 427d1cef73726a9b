// Means with short memories, one the prior of the next, as hierarchical Bayesian estimates shrink
// what is rare towards what is common (MacKay and Peto, 1995).
#include "chances.h"

#include <algorithm>
#include <utility>

namespace elinvar {
namespace {

// Drafts that an expectation is worth: beside those of the like or of the token, and of a row.
constexpr double kPrior = 4, kPriorRow = 16;
// Of what was counted before, at each draft of the like, of the token, at each step of a row: it
// may come to another kind of text.
constexpr double kFade = 0.98, kFadeToken = 0.95, kFadeRow = 0.9;
// Of a draft, what one of a row's last kind counts: they come and fail together.
constexpr double kFar = 0.25;
constexpr int64_t kAnywhere = -1;

// Also of what is no number.
double chance(double said) { return said > 0 ? std::min(said, 1.0) : 0.0; }

}  // namespace

std::size_t Chances::like(double said) {
    return std::upper_bound(kBounds.begin(), kBounds.end(), said) - kBounds.begin();
}

uint64_t Chances::hash(int64_t space, int64_t last, int64_t token) {
    uint64_t hash = static_cast<uint64_t>(space);
    for (const int64_t part : {last, token})
        hash = (hash ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
    return hash;
}

Chances::Counts Chances::behind(uint64_t hash) const {
    const Place& place = tokens_[hash % kTokens];
    return place.whose == hash >> 32 ? Counts{place.hits, place.trials} : Counts{};
}

void Chances::came(uint64_t hash, bool hit) {
    Counts counts = behind(hash);
    counts.add(hit, kFadeToken);
    tokens_[hash % kTokens] = {static_cast<uint32_t>(hash >> 32), static_cast<float>(counts.hits),
                               static_cast<float>(counts.trials)};
}

const Chances::Row* Chances::row(int row) const {
    const auto found = rows_.find(row);
    return found == rows_.end() ? nullptr : &found->second;
}

std::vector<double> Chances::of(const Behind& behind, std::span<const int64_t> tokens,
                                std::span<const double> said, double least) const {
    const Row* own = row(behind.row);
    std::vector<double> chances;
    double all = 1;
    int64_t last = behind.token;
    for (std::size_t i = 0; i < std::min(tokens.size(), said.size()); ++i) {
        const double value = chance(said[i]);
        double expected = said_[like(value)].beside(value, kPrior);
        Counts seen = this->behind(hash(behind.space, last, tokens[i]));
        if (seen.trials == 0) seen = this->behind(hash(behind.space, kAnywhere, tokens[i]));
        expected = seen.beside(expected, kPrior);
        if (own)
            expected = (*own)[std::min<std::size_t>(i, kPlaces - 1)].beside(expected, kPriorRow);
        all *= expected;
        if (all < least) break;
        chances.push_back(all);
        last = tokens[i];
    }
    return chances;
}

std::vector<double> Chances::expected(int row_, int count, double at_first) const {
    const Row* own = row(row_);
    std::vector<double> chances;
    double all = 1;
    for (int i = 0; i < count; ++i) {
        const int at = std::min(i, kPlaces - 1);
        double expected = places_[at].beside(at_first, kPrior);
        if (own) expected = (*own)[at].beside(expected, kPriorRow);
        chances.push_back(all *= expected);
    }
    return chances;
}

void Chances::learn(const Behind& behind, std::span<const int64_t> tokens,
                    std::span<const double> said, std::span<const int64_t> came) {
    Row& own = rows_[behind.row];
    for (Counts& counts : own) counts.hits *= kFadeRow, counts.trials *= kFadeRow;
    int64_t last = behind.token;
    const std::size_t known = std::min({tokens.size(), said.size(), came.size()});
    for (std::size_t i = 0; i < known; ++i) {
        const bool hit = tokens[i] == came[i];
        const int at = std::min<int>(static_cast<int>(i), kPlaces - 1);
        said_[like(chance(said[i]))].add(hit, kFade);
        this->came(hash(behind.space, last, tokens[i]), hit);
        this->came(hash(behind.space, kAnywhere, tokens[i]), hit);
        places_[at].add(hit, kFade);
        own[at].add(hit, 1, at == kPlaces - 1 ? kFar : 1);
        if (!hit) break;
        last = tokens[i];
    }
}

std::vector<int> best_counts(const std::vector<std::vector<double>>& chances,
                             std::span<const double> seconds, int rows, Bounds bounds) {
    struct Draft {
        double chance;
        std::size_t place, chain;
    };
    std::vector<Draft> drafts;
    for (std::size_t chain = 0; chain < chances.size(); ++chain)
        for (std::size_t place = 0; place < chances[chain].size(); ++place)
            drafts.push_back({chances[chain][place], place, chain});
    std::sort(drafts.begin(), drafts.end(), [](const Draft& a, const Draft& b) {
        if (a.chance != b.chance) return a.chance > b.chance;
        return std::pair(a.place, a.chain) < std::pair(b.place, b.chain);
    });
    double tokens = rows, best = bounds.margin * rows / seconds[0];
    std::size_t count = 0;
    for (std::size_t number = 1; number <= drafts.size() && number < seconds.size(); ++number) {
        tokens += drafts[number - 1].chance;
        const double rate = tokens / seconds[number];
        if (rate > best)
            best = rate, count = number;
        else if (rate < bounds.slow_down * best)
            break;
    }
    std::vector<int> counts(chances.size());
    for (std::size_t i = 0; i < count; ++i) ++counts[drafts[i].chain];
    return counts;
}

}  // namespace elinvar
