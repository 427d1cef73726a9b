// How likely drafts are to be accepted, for src/elinvar/ops/chances.py. Knows no Python.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace elinvar {

// What a chain of drafts follows: a row, whose text it is, and its last token.
struct Behind {
    int row;
    int64_t space, token;
};

// Of one drafter. What it says of a draft is held against what came of such drafts, that against
// what came of drafts of this token behind that one (or anywhere, where it is new there), and that
// against what came of the same row's drafts at the same place of a chain. Each is a mean whose
// prior is the one before.
class Chances {
  public:
    Chances() : tokens_(kTokens) {}
    // Of each draft: that it and those before it are accepted; as long as that is at least so
    // likely.
    std::vector<double> of(const Behind& behind, std::span<const int64_t> tokens,
                           std::span<const double> said, double least) const;
    // The same of a chain of a row that is not made yet.
    std::vector<double> expected(int row, int count, double at_first) const;
    // These tokens came; of drafts behind the first wrong one nothing is known.
    void learn(const Behind& behind, std::span<const int64_t> tokens, std::span<const double> said,
               std::span<const int64_t> came);
    void forget(int row) { rows_.erase(row); }

  private:
    struct Counts {
        double hits = 0, trials = 0;
        void add(bool hit, double fade, double weight = 1) {
            hits = fade * hits + weight * hit;
            trials = fade * trials + weight;
        }
        double beside(double expected, double prior) const {
            return (prior * expected + hits) / (prior + trials);
        }
    };
    // What lies between two of them is held against what came of the like: finer where a little
    // decides about a long chain.
    static constexpr std::array kBounds = {0.2,  0.4, 0.5,  0.6,  0.7,  0.8,
                                           0.85, 0.9, 0.93, 0.95, 0.97, 0.98};
    // What came of one draft behind another, where no later one took its place.
    struct Place {
        uint32_t whose = 0;
        float hits = 0, trials = 0;
    };
    static constexpr std::size_t kTokens = 1 << 15;
    // That a row counts apart: the first ones of a chain, and all behind them.
    static constexpr int kPlaces = 4;
    using Row = std::array<Counts, kPlaces>;

    static std::size_t like(double said);
    static uint64_t hash(int64_t space, int64_t last, int64_t token);
    Counts behind(uint64_t hash) const;
    void came(uint64_t hash, bool hit);
    const Row* row(int row) const;

    std::array<Counts, kBounds.size() + 1> said_{};
    std::vector<Place> tokens_;
    Row places_{};
    std::unordered_map<int, Row> rows_;
};

// What drafts must promise to be worth their noise, times what steps without them do; and of the
// best number so far, when more of them promise less than that, no one is looked for.
struct Bounds {
    double margin, slow_down;
};
// How many drafts of each chain to verify: the likeliest ones, as many as bring the most tokens a
// second. chances: of each chain, as Chances::of has them, so a draft comes after those before it;
// seconds: of a step of so many rows with 0, 1, 2, ... drafts.
std::vector<int> best_counts(const std::vector<std::vector<double>>& chances,
                             std::span<const double> seconds, int rows, Bounds bounds);

}  // namespace elinvar
